//! The queue that is wanted, as data, and how it differs from another.

use std::fmt;

use qjump_ebpf::{
    LEVELS, Level,
    frame::{MIN_FRAME, WIRE_OVERHEAD},
};

use super::{
    Queue, Setup,
    encode::{Fifo, Fq, Htb, HtbClass, Options, Prio, RateSpec, ticks},
    rate::lowered,
};

/// The major number of our root qdisc: "qj".
pub const MAJOR: u16 = 0x716a;

/// The handle of our root qdisc.
pub const ROOT: u32 = (MAJOR as u32) << 16;

/// The class through which all share the link. Leaf classes are numbered from 1.
const LINK_CLASS: u32 = ROOT | 0x10;

/// `TC_H_ROOT`: the parent of a root qdisc, and of the classes directly below it.
pub(super) const ABOVE_ROOT: u32 = u32::MAX;

/// What a class counts for a packet besides its L2 bytes without FCS, and at least: its bytes on the wire.
const OVERHEAD: u16 = WIRE_OVERHEAD as u16;
const LEAST: u16 = (MIN_FRAME + WIRE_OVERHEAD) as u16;

/// Bytes/s that no device reaches (8 Tbit/s), with [`DEEP_NS`] of it at once: never shapes.
const UNSHAPED: u64 = 1_000_000_000_000;
const DEEP_NS: u64 = 1_000_000;

/// How much of the link's time may be made up for after a late timer, ns. At full load the queue behind the
/// link holds as much. Without it, every late timer would cost capacity for good.
pub const LINK_BURST_NS: u64 = 100_000;

/// Packets in the queue of a limited level, and in an fq. Not meant to be reached: what the sockets may have in
/// flight bounds the queue, and packets that wait too long for the limiter are its own to drop.
const DEEP_QUEUE: u32 = 100_000;

/// Packets in the queue of a level without a limit: the kernel's default for a device (`DEFAULT_TX_QUEUE_LEN`).
const DEFAULT_QUEUE: u32 = 1_000;

/// Only matters among classes of the same priority, of which there are none; but without it the kernel warns.
const QUANTUM: u32 = 60_000;

/// fq's own default, us (net/sched/sch_fq.c, `fq_init`): never set below.
const FQ_HORIZON_US: u64 = 10_000_000;

/// The class of a level, which is what `skb->priority` must be for its packets.
///
/// Both HTB (`htb_classify`) and prio (`prio_classify`) take such a priority without any filter, if the class is
/// one of the root qdisc's own. The two queues number their classes differently: this is for [`Queue::Htb`]. Under
/// [`Queue::Fq`] the priority is the level's number.
pub const fn class_id(level: Level) -> u32 {
    ROOT | (level.number() as u32 + 1)
}

/// A queueing discipline in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// Its number: `major:0`.
    pub handle: u32,
    /// The class that it is the leaf of, or `TC_H_ROOT`.
    pub parent: u32,
    /// Kind and options.
    pub options: Options,
}

/// A class of HTB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its number: `major:minor`.
    pub id: u32,
    /// The class that it borrows from, or `TC_H_ROOT`.
    pub parent: u32,
    /// Its options.
    pub options: HtbClass,
}

/// A root qdisc and what is below it, in the order in which it can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The root.
    pub root: Qdisc,
    /// HTB's classes; parents come before their children.
    pub classes: Vec<Class>,
    /// The qdiscs at the leaves.
    pub leaves: Vec<Qdisc>,
}

/// The tree of a set-up; `None` for [`Queue::Keep`].
pub fn tree(setup: &Setup) -> Option<Tree> {
    match setup.queue {
        Queue::Keep => None,
        Queue::Htb => Some(htb(setup)),
        Queue::Fq => Some(fq(setup)),
    }
}

fn htb(setup: &Setup) -> Tree {
    let unshaped = spec(UNSHAPED, LEAST);
    let mut classes = Vec::new();
    if let Some(rate) = setup.link_rate {
        let link = spec(lowered(rate.bps() / 8, LEAST), LEAST);
        let burst = ticks(LINK_BURST_NS);
        classes.push(Class { id: LINK_CLASS, parent: ABOVE_ROOT, options: class(link, burst, link, burst, 0) });
    }
    for level in Level::strictest_first() {
        let (ceil, cbuffer) = match &setup.shapes[level.index()] {
            Some(shape) => {
                (spec(lowered(shape.rate_bytes, shape.least_bytes), shape.least_bytes), ticks(shape.burst_ns))
            }
            None => (unshaped, ticks(DEEP_NS)),
        };
        let prio = u32::from(Level::STRICTEST.number() - level.number());
        classes.push(match setup.link_rate {
            // HTB sends what classes have of their own before it looks at who may borrow, so for strict priority
            // all must borrow everything. A rate of 0 is refused. At 1 byte/s a packet puts the class 60 s into
            // debt (`mbuffer`, the most that HTB keeps books of): once a minute, one packet of a level may go
            // before its turn, within its ceil.
            Some(_) => Class {
                id: class_id(level),
                parent: LINK_CLASS,
                options: class(spec(1, LEAST), 0, ceil, cbuffer, prio),
            },
            None => {
                Class { id: class_id(level), parent: ABOVE_ROOT, options: class(ceil, cbuffer, ceil, cbuffer, prio) }
            }
        });
    }
    let leaves = Level::strictest_first().map(|level| Qdisc {
        handle: leaf_handle(level),
        parent: class_id(level),
        options: Options::Pfifo(Fifo {
            limit: if setup.shapes[level.index()].is_some() { DEEP_QUEUE } else { DEFAULT_QUEUE },
        }),
    });
    let default_class = class_id(Level::BEST_EFFORT) & 0xffff;
    // rate2quantum is what tc sets; every class has a quantum.
    let root = Options::Htb(Htb { default_class, rate2quantum: 10 });
    Tree { root: Qdisc { handle: ROOT, parent: ABOVE_ROOT, options: root }, classes, leaves: leaves.collect() }
}

fn fq(setup: &Setup) -> Tree {
    let band = |level: Level| Level::STRICTEST.number() - level.number();
    let mut map = [band(Level::BEST_EFFORT); 16];
    for level in Level::strictest_first() {
        map[level.index()] = band(level);
    }
    let horizon_us = setup.horizon_ns.div_ceil(1_000).max(FQ_HORIZON_US);
    let options = Options::Fq(Fq {
        limit: Some(DEEP_QUEUE),
        flow_limit: Some(DEEP_QUEUE),
        horizon_us: Some(u32::try_from(horizon_us).unwrap_or(u32::MAX)),
        horizon_drop: Some(true),
        ..Fq::default()
    });
    Tree {
        root: Qdisc { handle: ROOT, parent: ABOVE_ROOT, options: Options::Prio(Prio { bands: LEVELS as u32, map }) },
        classes: Vec::new(),
        leaves: Level::strictest_first()
            .map(|level| Qdisc {
                handle: leaf_handle(level),
                parent: ROOT | (u32::from(band(level)) + 1),
                options: options.clone(),
            })
            .collect(),
    }
}

const fn leaf_handle(level: Level) -> u32 {
    (0x7170 + level.number() as u32) << 16
}

const fn spec(bytes_per_s: u64, mpu: u16) -> RateSpec {
    RateSpec { bytes_per_s, overhead: OVERHEAD, mpu }
}

const fn class(rate: RateSpec, buffer: u32, ceil: RateSpec, cbuffer: u32, prio: u32) -> HtbClass {
    HtbClass { rate, ceil, buffer, cbuffer, quantum: QUANTUM, prio }
}

/// One step from a tree to another of the same form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// This class has other options.
    Class(&'a Class),
    /// This leaf is missing or has other options.
    Leaf(&'a Qdisc),
}

/// How to get from one tree to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference<'a> {
    /// In place, without loss; nothing at all if they are the same.
    InPlace(Vec<Change<'a>>),
    /// Only from scratch: another root, or classes elsewhere.
    Rebuild,
}

impl Tree {
    /// How to get from `self`, as the kernel reports it, to `wanted`.
    pub fn difference<'a>(&self, wanted: &'a Self) -> Difference<'a> {
        let places = |tree: &Self| {
            let mut places: Vec<_> = tree.classes.iter().map(|class| (class.id, class.parent)).collect();
            places.sort_unstable();
            places
        };
        let foreign = self.leaves.iter().any(|leaf| !wanted.leaves.iter().any(|other| other.same_place(leaf)));
        if self.root != wanted.root || foreign || places(self) != places(wanted) {
            return Difference::Rebuild;
        }
        let classes = wanted.classes.iter().filter(|class| !self.classes.contains(class)).map(Change::Class);
        let leaves = wanted.leaves.iter().filter(|leaf| !self.has_leaf(leaf)).map(Change::Leaf);
        Difference::InPlace(classes.chain(leaves).collect())
    }

    fn has_leaf(&self, wanted: &Qdisc) -> bool {
        self.leaves.iter().any(|leaf| leaf.same_place(wanted) && leaf.options.holds(&wanted.options))
    }

    /// What differs from `wanted`, for people; empty if nothing does.
    pub fn complaints(&self, wanted: &Self) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.root != wanted.root {
            complaints.push(format!("the root is {}, wanted is {}", self.root, wanted.root));
        }
        for class in &wanted.classes {
            match self.classes.iter().find(|other| other.id == class.id) {
                None => complaints.push(format!("{class} is missing")),
                Some(other) if other != class => complaints.push(format!("there is {other}, wanted is {class}")),
                Some(_) => {}
            }
        }
        for class in self.classes.iter().filter(|class| !wanted.classes.iter().any(|other| other.id == class.id)) {
            complaints.push(format!("{class} is not ours"));
        }
        for leaf in wanted.leaves.iter().filter(|leaf| !self.has_leaf(leaf)) {
            match self.leaves.iter().find(|other| other.parent == leaf.parent) {
                None => complaints.push(format!("{leaf} is missing")),
                Some(other) => complaints.push(format!("there is {other}, wanted is {leaf}")),
            }
        }
        for leaf in self.leaves.iter().filter(|leaf| !wanted.leaves.iter().any(|other| other.parent == leaf.parent)) {
            complaints.push(format!("{leaf} is not ours"));
        }
        complaints
    }
}

impl Qdisc {
    fn same_place(&self, other: &Self) -> bool {
        (self.handle, self.parent, self.options.kind()) == (other.handle, other.parent, other.options.kind())
    }
}

/// A handle or class number, as `tc` writes it.
pub(super) struct Handle(pub u32);

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (self.0 >> 16, self.0 & 0xffff);
        match (self.0, minor) {
            (ABOVE_ROOT, _) => f.write_str("root"),
            (_, 0) => write!(f, "{major:x}:"),
            _ => write!(f, "{major:x}:{minor:x}"),
        }
    }
}

impl fmt::Display for Qdisc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qdisc {} {} at {}", self.options.kind(), Handle(self.handle), Handle(self.parent))?;
        match &self.options {
            Options::Htb(htb) => write!(f, " with default class {:x}", htb.default_class),
            Options::Pfifo(fifo) => write!(f, " with a limit of {} packets", fifo.limit),
            Options::Bfifo(fifo) => write!(f, " with a limit of {} bytes", fifo.limit),
            Options::Prio(prio) => write!(f, " with {} bands, map {:?}", prio.bands, prio.map),
            Options::Fq(fq) => write!(
                f,
                " with limits of {:?} and {:?} packets, horizon {:?} us",
                fq.limit, fq.flow_limit, fq.horizon_us
            ),
            Options::Mqprio(_) | Options::Clsact | Options::Other { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HtbClass { rate, ceil, buffer, cbuffer, prio, .. } = &self.options;
        write!(
            f,
            "class htb {} at {} (priority {prio}, {} bytes/s and at most {} bytes/s, buckets of {buffer} and {cbuffer} \
             ticks, a packet counts at least {} bytes)",
            Handle(self.id),
            Handle(self.parent),
            rate.bytes_per_s,
            ceil.bytes_per_s,
            ceil.mpu
        )
    }
}
