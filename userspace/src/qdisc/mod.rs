//! The queue of an interface: what holds packets back so that nothing needs to be dropped.
//!
//! Three set-ups, as data in [`tree()`], made, compared and taken down through rtnetlink:
//!
//! * [`Queue::Htb`]: HTB with one class a level, strict priority among them, each limited level shaped by its
//!   class. The egress program writes the class into `skb->priority` ([`qjump_ebpf::layout::class_id`]): there are no filters.
//! * [`Queue::Fq`]: prio with a band a level and an fq in each, which releases packets at the departure times that
//!   the limiter has stamped.
//! * [`Queue::Keep`]: what is there.
//!
//! # What HTB admits
//! A class may send while its bucket is not below 0, whatever the packet's size, and the bucket holds at most its
//! depth X (net/sched/sch_htb.c, `htb_class_mode`, `htb_accnt_tokens`). So in any time t a class sends at most
//! `r (X + t)` bytes and one packet. With X = 0, and every packet counted as P (`mpu`), two packets never leave
//! closer than P / r. The usual advice, a bucket of P, lets two leave back to back.
//!
//! A bucket of 0 has its price: for each packet that waits, the time by which the kernel's timer is late is lost
//! for good. With X at least as long as that, the level gets its whole rate.
//!
//! A GSO packet counts once as its L2 bytes and [`qjump_ebpf::frame::WIRE_OVERHEAD`], though each of its segments
//! has that much on the wire: who lets them through must lower the rates by as much, the link's too, or cap them
//! by [`set_gso_max_segs`].
//!
//! With [`Setup::link_rate`], HTB owns the queue in front of a link that does not push back: all levels borrow from
//! one class of that rate, in strict priority. That class lets at most [`LINK_BURST_NS`] of its rate through at
//! once, and a packet: so much may wait behind it.

pub mod encode;
mod error;
mod kernel;
mod rate;
mod scratch;
mod tree;

use std::sync::OnceLock;

use qjump_ebpf::LEVELS;
use serde::{Deserialize, Serialize};

use crate::units::Rate;

use encode::{HtbClass, Options};
use error::name;
use kernel::{Entry, Observed};
use tree::{ABOVE_ROOT, Change, Difference, Handle};

pub use error::Error;
pub use scratch::Available;
pub(crate) use scratch::scratch;
pub use tree::{Class, LINK_BURST_NS, Qdisc, ROOT, Tree, tree};

/// What queues the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Queue {
    /// What is there stays.
    Keep,
    /// HTB shapes each level.
    Htb,
    /// fq releases at the times that the limiter says.
    Fq,
}

impl Queue {
    /// As `--queue` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Htb => "htb",
            Self::Fq => "fq",
        }
    }
}

/// What a limited level may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes/s on the wire. The class gets the next lower rate at which HTB's rounding cannot exceed this one.
    pub rate_bytes: u64,
    /// Depth of the bucket, ns at that rate: rounded down to ticks of 64 ns. One packet more may leave at once.
    pub burst_ns: u64,
    /// Bytes on the wire that the smallest packet counts.
    pub least_bytes: u16,
}

/// A wanted queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Which.
    pub queue: Queue,
    /// The limited levels, by number. Used by [`Queue::Htb`].
    pub shapes: [Option<Shape>; LEVELS],
    /// The rate on the wire of a link that does not push back; `None` for one that does. Used by [`Queue::Htb`].
    pub link_rate: Option<Rate>,
    /// Whether frames of levels above 0 get an 802.1Q tag on their way. Used by [`Queue::Htb`].
    pub tagged: bool,
    /// How far ahead the limiter stamps departure times, ns. Used by [`Queue::Fq`].
    pub horizon_ns: u64,
}

/// What was at the root before us, to be put back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Before {
    /// The kernel's default.
    Default,
    /// A qdisc without classes.
    Classless {
        /// Its kind.
        kind: String,
        /// Its number.
        handle: u32,
        /// Its `TCA_OPTIONS`.
        options: Vec<u8>,
    },
}

/// Whose the root of an interface is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The kernel's default (handle 0).
    Default,
    /// Ours, whatever state it is in.
    Ours(Queue),
    /// Somebody else's.
    Foreign {
        /// Its kind.
        kind: String,
        /// Its number, as `tc` writes it.
        handle: String,
    },
}

/// Kinds of qdisc that have no classes but those that they report their flows as (all of net/sched that set up a
/// queue with one request). Whatever else may have classes, which a restored qdisc would not have.
const CLASSLESS: [&str; 21] = [
    "bfifo",
    "blackhole",
    "cake",
    "choke",
    "codel",
    "dualpi2",
    "etf",
    "fq",
    "fq_codel",
    "fq_pie",
    "gred",
    "hhf",
    "netem",
    "noqueue",
    "pfifo",
    "pfifo_fast",
    "pfifo_head_drop",
    "pie",
    "red",
    "sfq",
    "tbf",
];

/// Tries which queues this kernel has, on the loopback device of a network namespace of its own: nothing of it can
/// be seen from outside. A process tries once.
///
/// # Errors
/// Without CAP_SYS_ADMIN and CAP_NET_ADMIN, or if the kernel refuses for another reason than not having a queue.
pub fn available() -> Result<Available, Error> {
    static KNOWN: OnceLock<Available> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let found = scratch::available().map_err(Error::scratch)?;
    Ok(*KNOWN.get_or_init(|| found))
}

/// What was at an interface at one moment.
pub struct Look(Observed);

/// Looks at an interface, once for all questions.
///
/// # Errors
/// If the kernel does not say.
pub fn look(ifindex: u32) -> Result<Look, Error> {
    observe(ifindex).map(Look)
}

impl Look {
    /// Whose the root is.
    pub fn owner(&self) -> Owner {
        match &self.0.root {
            None => Owner::Default,
            Some(root) => match ours(root) {
                Some(queue) => Owner::Ours(queue),
                None => Owner::Foreign { kind: root.kind.clone(), handle: Handle(root.handle).to_string() },
            },
        }
    }

    /// What differs from the wanted queue; empty if nothing does.
    pub fn complaints(&self, setup: &Setup) -> Vec<String> {
        let Some(wanted) = tree(setup) else { return Vec::new() };
        let Some(root) = &self.0.root else {
            return vec![format!("the root is the kernel's default, wanted is {}", wanted.root)];
        };
        let mut complaints = self.0.tree(root).complaints(&wanted);
        if self.0.has_filters {
            complaints.push("the root has filters, which decide on packets of no level".to_owned());
        }
        complaints
    }
}

/// Whose the root is.
///
/// # Errors
/// If the kernel does not say.
pub fn owner(ifindex: u32) -> Result<Owner, Error> {
    Ok(look(ifindex)?.owner())
}

/// The kind of qdisc at the root, the kernel's default too.
///
/// # Errors
/// If the kernel does not say.
pub fn root_kind(ifindex: u32) -> Result<String, Error> {
    kernel::root_kind(ifindex).map_err(Error::io(ifindex, "listing its queues"))
}

/// What is to be put back when our queue goes. If ours is there already, that is the kernel's default: what was
/// there before it is not known here.
///
/// # Errors
/// [`Error::Foreign`] if it is a qdisc that could not be put back as it is, or if that cannot be tried out, for
/// which CAP_SYS_ADMIN is needed; and if the kernel does not say.
pub fn before(ifindex: u32) -> Result<Before, Error> {
    let observed = observe(ifindex)?;
    let Some(root) = observed.root.as_ref().filter(|root| ours(root).is_none()) else {
        return Ok(Before::Default);
    };
    match obstacle(root, &observed) {
        Some(why) => Err(foreign(ifindex, root, why)),
        None => Ok(Before::Classless { kind: root.kind.clone(), handle: root.handle, options: root.options.clone() }),
    }
}

/// Sets the queue up, all or nothing. [`Queue::Keep`] does nothing.
///
/// A second call changes nothing at all. Other rates, bursts and limits are set in place, without losing a packet;
/// for another queue, or a link rate where there was none or the other way round, the tree is made anew, and what
/// was queued is lost. While the tree is made, packets pass unshaped.
///
/// # Errors
/// [`Error::Foreign`] if the root is neither the kernel's default, nor ours, nor just what `before` says; if the
/// kernel refuses something: then what was there is there again.
pub fn apply(ifindex: u32, setup: &Setup, before: &Before) -> Result<(), Error> {
    let Some(wanted) = tree(setup) else { return Ok(()) };
    let observed = observe(ifindex)?;
    let result = match &observed.root {
        None => build(ifindex, &wanted, kernel::ADD),
        Some(root) if ours(root).is_some() => transform(ifindex, &observed, root, &wanted),
        Some(root) if before.is(root) => build(ifindex, &wanted, kernel::REPLACE),
        Some(root) => return Err(foreign(ifindex, root, "it has come since".to_owned())),
    };
    result.map_err(|failure| {
        let undone = match observed.root.as_ref().filter(|root| ours(root).is_some()) {
            Some(root) => return_to(ifindex, &observed.tree(root)),
            None => restore(ifindex, before),
        };
        match undone {
            // Who has set a root of his own meanwhile has left nothing of ours.
            Ok(()) | Err(Error::Foreign { .. }) => failure,
            Err(undo) => Error::Undo { failure: Box::new(failure), undo: Box::new(undo) },
        }
    })
}

/// What differs from the wanted queue; empty if nothing does.
///
/// # Errors
/// If the kernel does not say what is there.
pub fn verify(ifindex: u32, setup: &Setup) -> Result<Vec<String>, Error> {
    Ok(look(ifindex)?.complaints(setup))
}

/// Takes our queue down and puts back what was there. Nothing happens if that is there already.
///
/// # Errors
/// [`Error::Foreign`] if somebody else has set a root meanwhile, which stays; if the kernel refuses.
pub fn restore(ifindex: u32, before: &Before) -> Result<(), Error> {
    let root = observe(ifindex)?.root;
    match (&root, before) {
        (Some(root), _) if before.is(root) => Ok(()),
        (Some(root), _) if ours(root).is_none() => {
            Err(foreign(ifindex, root, "it has come since, and stays".to_owned()))
        }
        (None, Before::Default) => Ok(()),
        (Some(_), Before::Default) => delete(ifindex),
        (_, Before::Classless { kind, handle, options }) => {
            let options = Options::Other { kind: kind.clone(), bytes: options.clone() };
            set(ifindex, &Qdisc { handle: *handle, parent: ABOVE_ROOT, options }, kernel::REPLACE)?;
            if observe(ifindex)?.root.is_some_and(|root| before.is(&root)) {
                return Ok(());
            }
            let handle = Handle(*handle).to_string();
            Err(Error::OtherOptions { interface: name(ifindex), kind: kind.clone(), handle })
        }
    }
}

/// The most segments that a packet may have which the stack hands to the interface; 65535 is no limit.
///
/// # Errors
/// If there is no such interface.
pub fn gso_max_segs(ifindex: u32) -> Result<u32, Error> {
    kernel::gso_max_segs(ifindex).map_err(Error::io(ifindex, "asking for its gso_max_segs"))
}

/// Sets the most segments that a packet may have; 1 turns GSO off for what comes from this host's own sockets.
///
/// # Errors
/// If there is no such interface, or the kernel refuses.
pub fn set_gso_max_segs(ifindex: u32, segments: u32) -> Result<(), Error> {
    kernel::set_gso_max_segs(ifindex, segments).map_err(Error::refused(ifindex, format!("gso_max_segs {segments}")))
}

impl Before {
    /// As bytes, for state that is kept in fixed room; empty for the kernel's default.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Default => Vec::new(),
            Self::Classless { kind, handle, options } => {
                [kind.as_bytes(), b"\0", &handle.to_ne_bytes(), options].concat()
            }
        }
    }

    /// The inverse of [`Before::to_bytes`]; `None` for other bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() {
            return Some(Self::Default);
        }
        let end = bytes.iter().position(|&byte| byte == 0)?;
        let (handle, options) = bytes[end + 1..].split_first_chunk()?;
        Some(Self::Classless {
            kind: String::from_utf8(bytes[..end].to_vec()).ok()?,
            handle: u32::from_ne_bytes(*handle),
            options: options.to_vec(),
        })
    }

    fn is(&self, root: &Entry) -> bool {
        match self {
            Self::Default => false,
            Self::Classless { kind, handle, options } => {
                (kind, handle, options) == (&root.kind, &root.handle, &root.options)
            }
        }
    }
}

impl Observed {
    /// What is there, as a tree. What cannot be read is left out, and then missing.
    fn tree(&self, root: &Entry) -> Tree {
        let class = |class: &Entry| {
            let options = HtbClass::decode(&class.options)?;
            Some(Class { id: class.handle, parent: class.parent, options })
        };
        let mut classes: Vec<Class> = self.classes.iter().filter_map(class).collect();
        // The order in which they can be made again.
        classes.sort_by_key(|class| (class.parent != ABOVE_ROOT, class.id));
        Tree { root: qdisc(root), classes, leaves: self.leaves.iter().map(qdisc).collect() }
    }
}

fn qdisc(entry: &Entry) -> Qdisc {
    Qdisc { handle: entry.handle, parent: entry.parent, options: Options::decode(&entry.kind, &entry.options) }
}

fn ours(root: &Entry) -> Option<Queue> {
    match (root.handle, root.kind.as_str()) {
        (ROOT, "htb") => Some(Queue::Htb),
        (ROOT, "prio") => Some(Queue::Fq),
        _ => None,
    }
}

/// Why a root that is not ours could not be put back as it is.
fn obstacle(root: &Entry, observed: &Observed) -> Option<String> {
    if !CLASSLESS.contains(&root.kind.as_str()) {
        Some("it may have classes".to_owned())
    } else if !observed.leaves.is_empty() {
        Some("it has other queues below it".to_owned())
    } else if observed.has_filters {
        Some("it has filters".to_owned())
    } else if root.has_size_table {
        Some("it has a size table, which the kernel does not report in full".to_owned())
    } else {
        match scratch::is_replayable(root) {
            Ok(true) => None,
            Ok(false) => Some("the kernel does not report all that is needed to make it again".to_owned()),
            Err(source) => Some(Error::scratch(source).to_string()),
        }
    }
}

fn foreign(ifindex: u32, root: &Entry, why: String) -> Error {
    Error::Foreign { interface: name(ifindex), kind: root.kind.clone(), handle: Handle(root.handle).to_string(), why }
}

fn observe(ifindex: u32) -> Result<Observed, Error> {
    kernel::observe(ifindex).map_err(Error::io(ifindex, "listing its queues"))
}

fn set(ifindex: u32, qdisc: &Qdisc, mode: u16) -> Result<(), Error> {
    kernel::set_qdisc(ifindex, qdisc, mode).map_err(Error::refused(ifindex, qdisc))
}

fn set_class(ifindex: u32, class: &Class) -> Result<(), Error> {
    kernel::set_class(ifindex, class).map_err(Error::refused(ifindex, class))
}

fn delete(ifindex: u32) -> Result<(), Error> {
    kernel::delete_root(ifindex, ROOT).map_err(Error::io(ifindex, "removing qjump's queue"))
}

fn build(ifindex: u32, tree: &Tree, mode: u16) -> Result<(), Error> {
    set(ifindex, &tree.root, mode)?;
    // A new class begins with a full bucket, and the limiter may have used the level's up: so first an empty one. A
    // change keeps what is in it (`htb_change_class`).
    for class in &tree.classes {
        let empty = HtbClass { buffer: 0, cbuffer: 0, ..class.options };
        set_class(ifindex, &Class { options: empty, ..*class })?;
        set_class(ifindex, class)?;
    }
    tree.leaves.iter().try_for_each(|leaf| set(ifindex, leaf, kernel::REPLACE))
}

fn transform(ifindex: u32, observed: &Observed, root: &Entry, wanted: &Tree) -> Result<(), Error> {
    match observed.tree(root).difference(wanted) {
        Difference::InPlace(changes) if !observed.has_filters => changes.iter().try_for_each(|change| match change {
            Change::Class(class) => set_class(ifindex, class),
            Change::Leaf(leaf) => set(ifindex, leaf, kernel::REPLACE),
        }),
        _ => {
            delete(ifindex)?;
            build(ifindex, wanted, kernel::ADD)
        }
    }
}

/// Back to a tree of ours, from wherever a change of it has stopped.
fn return_to(ifindex: u32, was: &Tree) -> Result<(), Error> {
    let observed = observe(ifindex)?;
    match &observed.root {
        Some(root) => transform(ifindex, &observed, root, was),
        None => build(ifindex, was, kernel::ADD),
    }
}
