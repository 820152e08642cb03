//! Load, replace and unload.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Condvar, LazyLock, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
    },
};
use nix::sys::stat::Mode;
use qjump_ebpf::{
    Charge, Config, Level, LevelLimit, PlanRecord,
    layout::{HOOK_CLSACT, HOOK_TCX, QUEUE_BEFORE, QUEUE_KEEP},
    names,
};

use super::{
    Error,
    enforce::{self, Chosen, Device},
    error::shorten,
    maps::{Maps, lock},
    netlink::{self, Interface},
    object::object,
    pins::{BPFFS, Lock, Pins, check_name, ensure_bpffs, has_bpffs},
    sys,
};
use crate::{
    config::QueueChoice,
    plan::Plan,
    qdisc::{self, Before, Owner, Queue},
    tag::grants,
    units::Rate,
};

/// Where to attach the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Hook {
    /// tcx where the kernel has it (Linux 6.6), else clsact.
    #[default]
    Auto,
    /// A tcx link.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

impl Hook {
    /// What it is called once it is clear which.
    const fn attached(self) -> &'static str {
        match self {
            Self::Clsact => "clsact",
            Self::Auto | Self::Tcx => "tcx",
        }
    }
}

/// What to load.
pub struct Request<'a> {
    /// The interfaces, all or none.
    pub interfaces: &'a [String],
    /// The plan.
    pub plan: &'a Plan,
    /// Whether to write the level into the frame's 802.1p priority too.
    pub pcp: bool,
    /// Where to attach.
    pub hook: Hook,
    /// What holds packets back.
    pub queue: QueueChoice,
    /// Rate that the queue shapes everything to, for links that do not push back.
    pub host_rate: Option<Rate>,
}

/// What a load did to one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The interface.
    pub interface: String,
    /// `"tcx"` or `"clsact"`.
    pub hook: &'static str,
    /// Whether a program was there before and was replaced.
    pub replaced: bool,
    /// What holds packets back, and why that.
    pub queue: Chosen,
    /// The levels that take smaller packets than planned because of the queue, with the largest, L2 bytes.
    pub smaller: Vec<(Level, u32)>,
    /// The most segments of a GSO packet, if the load lowered it.
    pub gso_cap: Option<u32>,
    /// Whether it first removed what an interface of this name had left that is gone now.
    pub removed_stale: bool,
}

/// Room for the events of an interface that nobody has read yet: all that one plan can have.
const EVENT_BYTES: u32 = 32 << 10;

/// Our place on clsact: the first filters, under a handle that is ours ("qj").
pub(super) const FILTER_PRIORITY: u16 = 1;
pub(super) const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x716a);

/// What there is on an interface before a load.
enum Found {
    Nothing,
    /// Pins that nothing uses: of an interface that is gone, or of a load that ended half-way. Whether a
    /// clsact qdisc that is still there was ours.
    Leftovers {
        created_clsact: bool,
    },
    Tcx {
        link: FdLink,
        program: u32,
    },
    Clsact {
        program: Option<u32>,
    },
}

impl Found {
    /// The program that runs there.
    const fn program(&self) -> Option<u32> {
        match self {
            Self::Nothing | Self::Leftovers { .. } => None,
            Self::Tcx { program, .. } => Some(*program),
            Self::Clsact { program } => *program,
        }
    }

    const fn is_loaded(&self) -> bool {
        matches!(self, Self::Tcx { .. } | Self::Clsact { .. })
    }
}

/// The kernel's digest of this qjump's program, once this process has loaded it. It is of the instructions alone, without the
/// maps that they use (`bpf_prog_calc_tag`, kernel/bpf/core.c).
static OWN_TAG: OnceLock<u64> = OnceLock::new();

struct Prepared {
    interface: Interface,
    pins: Pins,
    /// Nothing if the program that runs there is this one.
    object: Option<Ebpf>,
    hook: Hook,
    found: Found,
    decision: Decision,
}

/// Undoes, in reverse order, what a failed load did.
#[derive(Default)]
struct Undo(Vec<Box<dyn FnOnce()>>);

impl Undo {
    fn push(&mut self, step: impl FnOnce() + 'static) {
        self.0.push(Box::new(step));
    }

    fn forget(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        while let Some(step) = self.0.pop() {
            step();
        }
    }
}

/// Loads a plan onto interfaces, or replaces what is in force there. All or nothing.
///
/// # Errors
/// If anything is missing or refused; then the host is as it was before.
pub fn load(request: &Request<'_>) -> Result<Vec<Loaded>, Error> {
    object()?;
    request.plan.config(0)?;
    let interfaces = check_interfaces(request)?;
    changing(|| load_all(interfaces, request))?
}

/// Loads each of `requests`, as [`load`] does, and what becomes of one means nothing to the others. Side by side: most of a load
/// is waiting for the kernel. The results are in the order of the requests.
///
/// # Errors
/// If nothing could be begun.
pub fn load_each(requests: &[Request<'_>]) -> Result<Vec<Result<Vec<Loaded>, Error>>, Error> {
    object()?;
    changing(|| {
        // Two that are the same device by different names would not see each other.
        let mut seen = HashSet::new();
        let works: Vec<_> = requests
            .iter()
            .map(|request| {
                request.plan.config(0)?;
                let interfaces = check_interfaces(request)?;
                match interfaces.iter().find(|interface| !seen.insert(interface.index)) {
                    Some(twice) => Err(Error::InterfaceTwice(twice.name.clone())),
                    None => Ok((interfaces, request)),
                }
            })
            .map(|work| Mutex::new(Some(work)))
            .collect();
        let results: Vec<_> = works.iter().map(|_| OnceLock::new()).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((work, result)) = {
                let number = next.fetch_add(1, Ordering::Relaxed);
                works.get(number).zip(results.get(number))
            } {
                let work = lock(work).take().expect("each has one turn");
                let _ = result.set(work.and_then(|(interfaces, request)| load_all(interfaces, request)));
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..works.len() {
                // Fewer do it as well.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        results.into_iter().map(|result| result.into_inner().expect("each had its turn")).collect()
    })
}

/// Does `work` as the only one on this host who changes anything, with the file system of pins, and removes afterwards what nobody
/// needs.
fn changing<T>(work: impl FnOnce() -> T) -> Result<T, Error> {
    require_capabilities("loading")?;
    let mounted = ensure_bpffs()?;
    // What a failure undoes, it undoes under the lock.
    let result = Lock::take().map(|_lock| {
        // What another version may have left.
        grants::remove_unneeded();
        // Only the owner may look in: whoever can write the maps can lift the limits.
        let private = Private(nix::sys::stat::umask(Mode::from_bits_truncate(0o077)));
        let result = work();
        drop(private);
        grants::remove_unneeded();
        result
    });
    if mounted
        && Pins::interfaces().is_ok_and(|names| names.is_empty())
        && grants::tagged().is_ok_and(|cgroups| cgroups.is_empty())
    {
        let _ = nix::mount::umount(BPFFS);
    }
    result
}

/// Puts the umask back.
struct Private(Mode);

impl Drop for Private {
    fn drop(&mut self) {
        nix::sys::stat::umask(self.0);
    }
}

fn load_all(interfaces: Vec<Interface>, request: &Request<'_>) -> Result<Vec<Loaded>, Error> {
    let mut undo = Undo::default();
    let prepared = interfaces
        .into_iter()
        .map(|interface| prepare(interface, request, &mut undo))
        .collect::<Result<Vec<_>, _>>()?;
    let loaded = prepared.into_iter().map(|one| commit(one, &mut undo)).collect::<Result<_, _>>()?;
    undo.forget();
    Ok(loaded)
}

/// Removes the program and all that `load` made; the interface is as it was before the first load. With
/// `force`, also what belongs to an interface of another network namespace.
///
/// # Errors
/// If nothing is loaded there, it belongs to another network namespace, or the kernel refuses. A clsact
/// filter can be reached from its own namespace alone, whatever the force.
pub fn unload(interface: &str, force: bool) -> Result<(), Error> {
    check_name(interface)?;
    require_capabilities("removing")?;
    let pins = Pins::of(interface);
    if !has_bpffs()? {
        return Err(not_loaded(interface));
    }
    let _lock = Lock::take()?;
    if !pins.find()? {
        // A load that was killed at its first step has left what all interfaces share.
        grants::remove_unneeded();
        return Err(not_loaded(interface));
    }
    let plan = Maps::open(interface, &pins).ok().map(|maps| maps.in_force().plan);
    let here = sys::network_namespace().map_err(Error::io(interface, "asking for the network namespace"))?;
    if let Some(plan) = plan.filter(|plan| plan.netns != here) {
        let (interface, netns) = (interface.to_owned(), plan.netns);
        match plan.hook {
            HOOK_CLSACT if Maps::in_use(&pins) => return Err(Error::FilterElsewhere { interface, netns }),
            HOOK_TCX if live_link(&pins).is_some() => {
                if !force {
                    return Err(Error::OtherNamespace { interface, netns });
                }
                if plan.queue != QUEUE_KEEP {
                    return Err(Error::QueueElsewhere { interface, netns });
                }
            }
            _ => {}
        }
    }
    if let Some((link, _)) = live_link(&pins) {
        sys::detach_link(link.as_fd()).map_err(Error::io(interface, "detaching its program"))?;
    }
    // By the index that it was loaded with: the name may have changed since.
    let index = match plan {
        Some(plan) => (plan.netns == here).then_some(plan.ifindex),
        None => nix::net::if_::if_nametoindex(interface).ok(),
    };
    if let Some(index) = index {
        let created_clsact = plan.is_some_and(|plan| plan.created_clsact == 1);
        detach_clsact(index, created_clsact).map_err(Error::io(interface, "removing the clsact filter"))?;
        if let Some(plan) = plan.filter(|_| nix::net::if_::if_indextoname(index).is_ok()) {
            put_queue_back(index, &plan)?;
        }
    }
    pins.remove().map_err(Error::io(interface, "removing its pins"))?;
    grants::remove_unneeded();
    Ok(())
}

/// Whether `interface` has just what `request` would load there: `None` if nothing is loaded. Changes nothing.
///
/// # Errors
/// If there is no such interface, or its pins are not readable or not ours, or the request cannot be loaded there.
pub fn has(interface: &str, request: &Request<'_>) -> Result<Option<bool>, Error> {
    Ok(match standing(&find_interface(interface)?, request)? {
        Standing::Nothing(_) | Standing::Stale(_) => None,
        Standing::Same => Some(true),
        Standing::Other { .. } | Standing::Displaced(_) => Some(false),
    })
}

/// What an interface has, held against what a request would load there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing: why.
    Nothing(String),
    /// Just that.
    Same,
    /// Something else: what, and whether a load would take from a level.
    Other {
        /// What.
        why: String,
        /// Whether some level may send more than it would after a load.
        lowers: bool,
    },
    /// Somebody else's queue is in the place of the one that was loaded.
    Displaced(String),
    /// The device is managed under another name, or what is pinned under this one is of another device: those pins.
    Stale(String),
}

/// Holds what an interface has against what `request` would load there. Changes nothing.
///
/// # Errors
/// If its pins are not readable or not ours, or the request cannot be loaded there.
pub fn standing(device: &Interface, request: &Request<'_>) -> Result<Standing, Error> {
    check_suitable(device, request.plan)?;
    let (name, pins) = (&device.name, Pins::of(&device.name));
    let here = sys::network_namespace().map_err(Error::io(name, "asking for the network namespace"))?;
    if linked_device(&pins).is_some_and(|index| index != device.index)
        && Maps::open(name, &pins).is_ok_and(|maps| maps.in_force().plan.netns == here)
    {
        return Ok(Standing::Stale(name.clone()));
    }
    match find(device, &pins)? {
        Found::Tcx { .. } | Found::Clsact { .. } => {}
        found => {
            return Ok(match (earlier_name(device), found) {
                (Some(old), _) => Standing::Stale(old),
                (None, Found::Nothing) => Standing::Nothing("nothing is loaded".to_owned()),
                _ => Standing::Nothing("its program is not attached any more".to_owned()),
            });
        }
    }
    let old = Maps::open(name, &pins)?.in_force();
    let queues = qdisc::look(device.index)?;
    if old.plan.queue != QUEUE_KEEP
        && let Owner::Foreign { kind, handle } = queues.owner()
    {
        return Ok(Standing::Displaced(format!(
            "somebody has put a queue of his own ({kind} {handle}) in the place of qjump's"
        )));
    }
    let chosen = enforce::choose(request.queue, request.host_rate, request.plan, device, &queues.owner())?;
    let gso_now = qdisc::gso_max_segs(device.index)?;
    let gso_max_segs = if old.plan.gso_before > 0 { old.plan.gso_before } else { gso_now };
    let limits_of = Device { mtu: device.mtu, gso_max_segs };
    let (new, gso_cap) = enforce::config(request.plan, request.pcp, chosen.queue, request.host_rate, limits_of)?;
    let hook = match request.hook {
        Hook::Auto => old.plan.hook,
        Hook::Tcx => HOOK_TCX,
        Hook::Clsact => HOOK_CLSACT,
    };
    let other = |why: String, lowers| Ok(Standing::Other { why, lowers });
    // Without what a limit knows of the one before it.
    let limits = |config: &Config| config.limits.map(|limit| limit.replacing(&LevelLimit::NOT_CONFIGURED));
    let rest = |config: &Config| {
        let PlanRecord { queue, host_rate_bps, hosts, link_rate_bps, epsilon_ns, levels, .. } = config.plan;
        (config.flags, queue, host_rate_bps, hosts, link_rate_bps, epsilon_ns, levels)
    };
    if limits(&old) != limits(&new) || rest(&old) != rest(&new) || hook != old.plan.hook {
        let lowers = Level::strictest_first().any(|level| permitted(&new, level) < permitted(&old, level));
        return other("another plan is in force".to_owned(), lowers);
    }
    if let Some(cap) = gso_cap.filter(|cap| *cap < gso_now) {
        return other(format!("GSO packets may have {gso_now} segments, not {cap}"), true);
    }
    match queues.complaints(&enforce::setup(&old)).into_iter().next() {
        Some(complaint) => other(complaint, true),
        None => Ok(Standing::Same),
    }
}

/// Whether the program of an interface is still on its tcx egress: what nobody says when it changes, and costs next to
/// nothing to ask. Not known of clsact.
pub fn is_linked(interface: &str) -> bool {
    let index = nix::net::if_::if_nametoindex(interface).ok();
    index.is_some() && linked_device(&Pins::of(interface)) == index
}

/// What a level may send, bit/s.
fn permitted(config: &Config, level: Level) -> f64 {
    match config.limits[level.index()].charge() {
        Charge::NotConfigured => 0.0,
        Charge::Unlimited => f64::INFINITY,
        Charge::Packet | Charge::Byte => config.plan.levels[level.index()].rate_bps,
    }
}

/// The device that the pinned tcx link is on, if it is on one.
fn linked_device(pins: &Pins) -> Option<u32> {
    live_link(pins).map(|(_, index)| index)
}

/// Puts back the queue and the GSO limit that a load found.
pub(super) fn put_queue_back(index: u32, plan: &PlanRecord) -> Result<(), Error> {
    if plan.gso_before > 0 {
        qdisc::set_gso_max_segs(index, plan.gso_before)?;
    }
    // Whatever the record says of the queue: a load that was killed may have set it up already, or not yet removed it, or
    // have removed it in order to make another.
    if !matches!(qdisc::owner(index)?, Owner::Foreign { .. }) {
        qdisc::restore(index, &before_load(plan))?;
    }
    Ok(())
}

/// What two plans have in common whose queues need not be made anew.
pub(super) const fn queue_form(plan: &PlanRecord) -> (u32, bool) {
    (plan.queue, plan.host_rate_bps > 0)
}

/// The queue that the first load found.
pub(super) fn before_load(plan: &PlanRecord) -> Before {
    let length = (plan.queue_before_len as usize).min(QUEUE_BEFORE);
    Before::from_bytes(&plan.queue_before[..length]).unwrap_or(Before::Default)
}

/// Why there is nothing to unload or to show: never loaded, or a filter without its pins.
pub(super) fn not_loaded(interface: &str) -> Error {
    let orphan = netlink::interface(interface)
        .ok()
        .flatten()
        .is_some_and(|device| clsact_filter(device.index).is_ok_and(|filter| filter.is_some()));
    let interface = interface.to_owned();
    if orphan { Error::Orphan { interface } } else { Error::NotLoaded(interface) }
}

fn check_interfaces(request: &Request<'_>) -> Result<Vec<Interface>, Error> {
    let interfaces = find_interfaces(request.interfaces)?;
    interfaces.iter().try_for_each(|interface| check_suitable(interface, request.plan))?;
    Ok(interfaces)
}

/// Looks interfaces up.
///
/// # Errors
/// If one is named twice, that cannot be a name, or there is no such interface in this network namespace.
pub fn find_interfaces(names: &[String]) -> Result<Vec<Interface>, Error> {
    let mut seen = HashSet::new();
    let mut interfaces = Vec::new();
    for name in names {
        let interface = find_interface(name)?;
        if !seen.insert(interface.index) {
            return Err(Error::InterfaceTwice(name.clone()));
        }
        interfaces.push(interface);
    }
    Ok(interfaces)
}

/// Looks one up, as [`find_interfaces`].
pub(super) fn find_interface(name: &str) -> Result<Interface, Error> {
    check_name(name)?;
    let interface = netlink::interface(name).map_err(Error::io(name, "looking it up"))?;
    interface.ok_or_else(|| Error::NoInterface(name.to_owned()))
}

/// Whether an interface can carry what the plan allows.
///
/// # Errors
/// If it cannot: the loopback device, one without Ethernet headers, or an MTU below a largest packet.
pub fn check_suitable(interface: &Interface, plan: &Plan) -> Result<(), Error> {
    let name = || interface.name.clone();
    if interface.is_loopback {
        return Err(Error::Loopback(name()));
    }
    if !interface.is_ethernet {
        return Err(Error::NotEthernet(name()));
    }
    let largest = interface.mtu.saturating_add(14);
    match plan.largest_given_packet() {
        packet if packet > largest => {
            Err(Error::PacketOverMtu { interface: name(), packet, mtu: interface.mtu, largest })
        }
        _ => Ok(()),
    }
}

/// A capability, by its bit in /proc/PID/status (include/uapi/linux/capability.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// CAP_NET_ADMIN: interfaces, queues, attaching.
    NetAdmin = 12,
    /// CAP_SYS_PTRACE: other processes' sockets.
    SysPtrace = 19,
    /// CAP_SYS_ADMIN: namespaces to try things out in.
    SysAdmin = 21,
    /// CAP_PERFMON: the verifier's checks of pointers need it.
    Perfmon = 38,
    /// CAP_BPF.
    Bpf = 39,
}

impl Capability {
    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::SysPtrace => "CAP_SYS_PTRACE",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        }
    }

    /// Whether this process has it.
    pub fn is_effective(self) -> bool {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
            .unwrap_or(0);
        effective & (1 << self as u32) != 0
    }
}

/// The first capability that this process lacks of those that changing eBPF programs needs. CAP_SYS_ADMIN stands in
/// for CAP_BPF and CAP_PERFMON, as in the kernel.
pub fn missing_capability() -> Option<Capability> {
    let has = |capability: Capability| match capability {
        Capability::NetAdmin => capability.is_effective(),
        _ => capability.is_effective() || Capability::SysAdmin.is_effective(),
    };
    [Capability::Bpf, Capability::Perfmon, Capability::NetAdmin].into_iter().find(|&capability| !has(capability))
}

pub(crate) fn require_capabilities(doing: &'static str) -> Result<(), Error> {
    missing_capability().map_or(Ok(()), |missing| Err(Error::Capability { missing: missing.name(), doing }))
}

/// Where the program goes, and what is there: changes nothing.
fn locate(interface: &Interface, pins: &Pins, wanted: Hook) -> Result<(Found, Hook), Error> {
    let name = interface.name.clone();
    let has_tcx = sys::tcx_programs(interface.index).map_err(Error::io(&name, "asking for its programs"))?.is_some();
    let found = find(interface, pins)?;
    if matches!(found, Found::Nothing | Found::Leftovers { .. })
        && let Some(old) = earlier_name(interface)
    {
        return Err(Error::Renamed { interface: name, old });
    }
    if matches!(found, Found::Nothing | Found::Leftovers { .. })
        && clsact_filter(interface.index).map_err(Error::io(&name, "listing its filters"))?.is_some()
    {
        return Err(Error::Orphan { interface: name });
    }
    let hook = match (wanted, &found) {
        (Hook::Tcx, _) if !has_tcx => return Err(Error::NoTcx),
        // A replacement stays where it is, unless told otherwise.
        (Hook::Auto, Found::Clsact { .. }) => Hook::Clsact,
        (Hook::Auto, _) if has_tcx => Hook::Tcx,
        (Hook::Auto, _) => Hook::Clsact,
        (hook, _) => hook,
    };
    let moving = matches!((&found, hook), (Found::Tcx { .. }, Hook::Clsact) | (Found::Clsact { .. }, Hook::Tcx));
    if moving {
        return Err(Error::Attach {
            detail: format!(
                "it is attached at the other hook; run `qjump unload --interface {name}` first, then load with --hook"
            ),
            interface: name,
        });
    }
    if hook == Hook::Clsact
        && let Some(other) = netlink::egress_filters(interface.index)
            .map_err(Error::io(&name, "listing its filters"))?
            .into_iter()
            .find(|filter| filter.priority == FILTER_PRIORITY && !filter.shares_with_programs())
    {
        return Err(Error::Attach {
            detail: format!(
                "the first place on clsact is taken by a filter of kind {kind}, which no program can share; give that another                  one: `tc filter del dev {name} egress pref {FILTER_PRIORITY}`, and add it again with a higher pref",
                kind = other.kind
            ),
            interface: name,
        });
    }
    Ok((found, hook))
}

/// What a load sets up.
struct Decision {
    config: Config,
    smaller: Vec<(Level, u32)>,
    chosen: Chosen,
    gso_cap: Option<u32>,
    before: Before,
}

/// What is to be set up: changes nothing.
fn decide(interface: &Interface, pins: &Pins, request: &Request<'_>, found: &Found) -> Result<Decision, Error> {
    let name = &interface.name;
    let owner = qdisc::owner(interface.index)?;
    let chosen = enforce::choose(request.queue, request.host_rate, request.plan, interface, &owner)?;
    let old = match found {
        Found::Tcx { .. } | Found::Clsact { .. } => Some(Maps::open(name, pins)?.in_force().plan),
        Found::Nothing | Found::Leftovers { .. } => None,
    };
    let before = match &old {
        Some(old) if !matches!(owner, Owner::Foreign { .. }) => before_load(old),
        _ if chosen.queue == Queue::Keep => Before::Default,
        _ => qdisc::before(interface.index)?,
    };
    let gso_max_segs = match &old {
        Some(old) if old.gso_before > 0 => old.gso_before,
        _ => qdisc::gso_max_segs(interface.index)?,
    };
    let device = Device { mtu: interface.mtu, gso_max_segs };
    let (mut config, gso_cap) = enforce::config(request.plan, request.pcp, chosen.queue, request.host_rate, device)?;
    if gso_cap.is_some() {
        config.plan.gso_before = gso_max_segs;
    }
    config.plan.queue_why = chosen.reason as u16;
    let bytes = before.to_bytes();
    config.plan.queue_before_len = bytes.len() as u32;
    config
        .plan
        .queue_before
        .get_mut(..bytes.len())
        .ok_or_else(|| Error::LargeQueue(name.clone()))?
        .copy_from_slice(&bytes);
    Ok(Decision { smaller: enforce::smaller(request.plan, &config), config, chosen, gso_cap, before })
}

/// What a load would do to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreseen {
    /// Where it would attach the program: `"tcx"` or `"clsact"`.
    pub hook: &'static str,
    /// Whether it would replace a program.
    pub replaces: bool,
    /// What would hold packets back, and why that.
    pub queue: Chosen,
    /// The qdisc at the root that it would replace until the unload, with its handle.
    pub displaces: Option<String>,
    /// The most segments of a GSO packet, if it would lower that.
    pub gso_cap: Option<u32>,
    /// Whether it would first remove what an earlier load left behind.
    pub removes_stale: bool,
}

/// What a load would do to an interface, found out without a change.
///
/// # Errors
/// Those for which a load would refuse; its other conditions are [`check_suitable`], [`missing_capability`],
/// [`super::has_bpffs`] and [`super::trial`].
pub fn foresee(interface: &Interface, request: &Request<'_>) -> Result<Foreseen, Error> {
    let pins = Pins::of(&interface.name);
    let (found, hook) = locate(interface, &pins, request.hook)?;
    let Decision { chosen, gso_cap, before, .. } = decide(interface, &pins, request, &found)?;
    Ok(Foreseen {
        hook: hook.attached(),
        replaces: found.is_loaded(),
        displaces: match before {
            Before::Classless { kind, .. } if chosen.queue != Queue::Keep => Some(kind),
            _ => None,
        },
        queue: chosen,
        gso_cap,
        removes_stale: matches!(found, Found::Leftovers { .. }),
    })
}

/// Finds what is there, and loads the program into the kernel: nothing that traffic could notice.
fn prepare(interface: Interface, request: &Request<'_>, undo: &mut Undo) -> Result<Prepared, Error> {
    let name = interface.name.clone();
    let pins = Pins::of(&name);
    let (found, hook) = locate(&interface, &pins, request.hook)?;
    if matches!(found, Found::Leftovers { .. }) {
        let record = Maps::open(&name, &pins).map(|maps| maps.in_force().plan);
        let here = sys::network_namespace().map_err(Error::io(&name, "asking for the network namespace"))?;
        if let Ok(record) = record
            && (record.netns, record.ifindex) == (here, interface.index)
        {
            put_queue_back(interface.index, &record)?;
            if record.created_clsact == 1 {
                netlink::remove_unused_clsact(interface.index).map_err(Error::io(&name, "removing stale clsact"))?;
            }
        }
        pins.remove().map_err(Error::io(&name, "removing stale pins"))?;
    }
    let decision = decide(&interface, &pins, request, &found)?;
    if matches!(found, Found::Nothing | Found::Leftovers { .. }) {
        let pins = pins.clone();
        undo.push(move || drop(pins.remove()));
    }
    if let (Some(id), Some(own)) = (found.program(), OWN_TAG.get())
        && sys::program_tag(id).is_ok_and(|tag| tag == *own)
    {
        return Ok(Prepared { interface, pins, object: None, hook, found, decision });
    }
    pins.create().map_err(Error::io(&name, "creating its directory in /sys/fs/bpf"))?;
    Ok(Prepared { object: Some(load_object(&pins)?), interface, pins, hook, found, decision })
}

/// A loader of our object. Each that aya makes reads and parses the kernel's own types (/sys/kernel/btf/vmlinux, some 6 MB),
/// to which no program of ours refers. Who lives longer than a command does [`sys::give_memory_back`] afterwards.
pub(crate) fn loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

/// One for all loads of a process.
static LOADER: Mutex<Option<EbpfLoader<'static>>> = Mutex::new(None);

/// How many more may verify a program: more than there are CPUs would take memory and save no time.
static VERIFIERS: LazyLock<(Mutex<usize>, Condvar)> =
    LazyLock::new(|| (Mutex::new(std::thread::available_parallelism().map_or(1, usize::from)), Condvar::new()));

/// One of [`VERIFIERS`].
struct Verifier;

impl Verifier {
    fn wait() -> Self {
        let (free, freed) = &*VERIFIERS;
        let mut free = freed.wait_while(lock(free), |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Self
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        let (free, freed) = &*VERIFIERS;
        *lock(free) += 1;
        freed.notify_one();
    }
}

fn load_object(pins: &Pins) -> Result<Ebpf, Error> {
    let mut object = make_maps(pins)?;
    let _turn = Verifier::wait();
    load_program(&mut object)?;
    Ok(object)
}

fn make_maps(pins: &Pins) -> Result<Ebpf, Error> {
    let mut kept = lock(&LOADER);
    let loader = kept.get_or_insert_with(loader);
    for map in [names::CONFIG, names::STATE, names::COUNTERS, names::LOCKS, names::EVENTS] {
        loader.map_pin_path(map, pins.map(map));
    }
    loader.map_max_entries(names::EVENTS, EVENT_BYTES);
    grants::share_maps(loader)?;
    let refused = |what| move |detail| Error::Kernel { what, detail };
    loader.load(object()?).map_err(|error| refused("maps")(shorten(&error)))
}

fn load_program(object: &mut Ebpf) -> Result<(), Error> {
    let refused = |detail| Error::Kernel { what: "program", detail };
    let program = program(object)?;
    program.load().map_err(|error| refused(shorten(&error)))?;
    let tag = program.info().map_err(|error| refused(shorten(&error)))?.tag();
    let _ = OWN_TAG.set(tag);
    Ok(())
}

/// Has this process know its program again where it runs, so that a change of the plan need not load it: loads it once,
/// attached to nothing.
///
/// # Errors
/// If the kernel refuses it.
pub fn recognise() -> Result<(), Error> {
    if OWN_TAG.get().is_some() {
        return Ok(());
    }
    let refused = |detail| Error::Kernel { what: "maps", detail };
    load_program(&mut loader().load(object()?).map_err(|error| refused(shorten(&error)))?)
}

pub(super) fn program(object: &mut Ebpf) -> Result<&mut SchedClassifier, Error> {
    object
        .program_mut(names::PROGRAM)
        .and_then(|program| program.try_into().ok())
        .ok_or(Error::Kernel { what: "program", detail: format!("the object has no {}", names::PROGRAM) })
}

fn find(interface: &Interface, pins: &Pins) -> Result<Found, Error> {
    if !pins.exist() {
        return Ok(Found::Nothing);
    }
    let corrupt = |path: PathBuf, why: String| Error::CorruptPin { path, why, interface: interface.name.clone() };
    let link = pins.link();
    let other_namespace = |netns| Error::OtherNamespace { interface: interface.name.clone(), netns };
    let here = sys::network_namespace().map_err(Error::io(&interface.name, "asking for the network namespace"))?;
    if link.exists() {
        let fd = sys::open_pin(&link).map_err(|error| corrupt(link.clone(), error.to_string()))?;
        let state = sys::tcx_link(fd.as_fd()).map_err(|error| corrupt(link.clone(), error.to_string()))?;
        if state.ifindex == 0 {
            return Ok(Found::Leftovers { created_clsact: false }); // Its device is gone.
        }
        let plan = Maps::open(&interface.name, pins)?.in_force().plan;
        if plan.netns != here {
            return Err(other_namespace(plan.netns));
        }
        if state.ifindex != interface.index {
            // The device that had this name has another one now, and still has the program.
            return Err(corrupt(link, format!("its link is on another device, index {}", state.ifindex)));
        }
        let link = PinnedLink::from_pin(&link).map_err(|error| corrupt(link.clone(), error.to_string()))?;
        return Ok(Found::Tcx { link: FdLink::from(link), program: state.program_id });
    }
    let filter = clsact_filter(interface.index).map_err(Error::io(&interface.name, "listing its filters"))?;
    match Maps::open(&interface.name, pins).map(|maps| maps.in_force().plan) {
        Ok(plan) if plan.hook == HOOK_CLSACT && plan.netns != here && Maps::in_use(pins) => {
            Err(Error::FilterElsewhere { interface: interface.name.clone(), netns: plan.netns })
        }
        Ok(plan) if plan.hook == HOOK_CLSACT && filter.is_some() && plan.ifindex == interface.index => {
            Ok(Found::Clsact { program: filter.and_then(|filter| filter.program_id) })
        }
        Ok(plan) => {
            Ok(Found::Leftovers { created_clsact: plan.ifindex == interface.index && plan.created_clsact == 1 })
        }
        // A filter of ours runs on maps that cannot be read: not for a load to throw away.
        Err(error) if filter.is_some() || matches!(error, Error::OtherVersion { in_force: true, .. }) => Err(error),
        Err(_) => Ok(Found::Leftovers { created_clsact: false }),
    }
}

/// The pinned tcx link, if it is still on a device, and that one, whatever its namespace.
fn live_link(pins: &Pins) -> Option<(OwnedFd, u32)> {
    let fd = sys::open_pin(&pins.link()).ok()?;
    let index = sys::tcx_link(fd.as_fd()).ok()?.ifindex;
    (index != 0).then_some((fd, index))
}

/// The name under which another set of pins already manages this very device.
fn earlier_name(interface: &Interface) -> Option<String> {
    let here = sys::network_namespace().ok()?;
    Pins::interfaces().ok()?.into_iter().filter(|name| *name != interface.name).find(|name| {
        let pins = Pins::of(name);
        // Where the program is costs less to ask than what it does there.
        let linked = linked_device(&pins);
        let is_there = match linked {
            Some(index) => index == interface.index,
            None => clsact_filter(interface.index).is_ok_and(|filter| filter.is_some()),
        };
        if !is_there {
            return false;
        }
        let Ok(plan) = Maps::open(name, &pins).map(|maps| maps.in_force().plan) else {
            return false;
        };
        plan.netns == here && plan.ifindex == interface.index && (plan.hook == HOOK_CLSACT) == linked.is_none()
    })
}

fn commit(prepared: Prepared, undo: &mut Undo) -> Result<Loaded, Error> {
    let Prepared { interface, pins, mut object, hook, found, decision } = prepared;
    let Decision { mut config, smaller, chosen, gso_cap, before } = decision;
    let name = interface.name.clone();
    let mut maps = match &mut object {
        Some(object) => Maps::of(object).map_err(Error::io(&name, "opening its maps"))?,
        None => Maps::open(&name, &pins)?,
    };
    let loaded = Loaded {
        interface: name.clone(),
        hook: hook.attached(),
        replaced: found.is_loaded(),
        queue: chosen.clone(),
        smaller,
        gso_cap,
        removed_stale: matches!(found, Found::Leftovers { .. }),
    };
    let index = interface.index;
    config.plan.hook = if hook == Hook::Clsact { HOOK_CLSACT } else { HOOK_TCX };
    config.plan.netns = sys::network_namespace().map_err(Error::io(&name, "asking for the network namespace"))?;
    config.plan.ifindex = interface.index;
    let attach_failed = |detail: String| Error::Attach { interface: name.clone(), detail };
    match found {
        Found::Nothing | Found::Leftovers { .. } => {
            let adds_clsact = hook == Hook::Clsact
                && !netlink::has_clsact(interface.index).map_err(Error::io(&name, "listing its qdiscs"))?;
            let was_ours = matches!(found, Found::Leftovers { created_clsact: true });
            config.plan.created_clsact = u16::from(adds_clsact || (hook == Hook::Clsact && was_ours));
            // Written before the qdisc is there: a load that is killed in between leaves its name on it.
            maps.initialise(&config).map_err(Error::io(&name, "writing its configuration"))?;
            let record = config.plan;
            undo.push(move || drop(put_queue_back(index, &record)));
            // Without the program, everything is in the class of level 0 and passes.
            set_queue_up(index, &config, gso_cap, &before)?;
            if adds_clsact {
                tc::qdisc_add_clsact(&name).map_err(|error| attach_failed(shorten(&error)))?;
                let index = interface.index;
                undo.push(move || drop(netlink::remove_unused_clsact(index)));
            }
            if let Some(object) = &mut object {
                attach(object, &interface, &pins, hook)?;
            }
            if hook == Hook::Clsact {
                let index = interface.index;
                undo.push(move || drop(detach_clsact(index, false)));
            }
        }
        Found::Tcx { .. } | Found::Clsact { .. } => {
            let old = maps.in_force();
            config.plan.created_clsact = old.plan.created_clsact;
            let gso_now = qdisc::gso_max_segs(index)?;
            let was = before_load(&config.plan);
            undo.push(move || {
                drop(qdisc::set_gso_max_segs(index, gso_now));
                if old.plan.queue != QUEUE_KEEP {
                    drop(qdisc::apply(index, &enforce::setup(&old), &was));
                } else if matches!(qdisc::owner(index), Ok(Owner::Ours(_))) {
                    drop(qdisc::restore(index, &was));
                }
            });
            // Noted before anything is touched: who finds the rest of a load that was killed can put things back.
            let noted = PlanRecord {
                gso_before: config.plan.gso_before.max(old.plan.gso_before),
                queue_before: config.plan.queue_before,
                queue_before_len: config.plan.queue_before_len,
                ..old.plan
            };
            maps.note(&noted).map_err(Error::io(&name, "noting what was there"))?;
            // First the program, then the configuration: both programs read the same configuration, and
            // the change of configuration is the step that can be taken back.
            match (&mut object, found) {
                (None, _) => {}
                (Some(object), Found::Tcx { link, .. }) => {
                    let link = SchedClassifierLink::try_from(link).map_err(|error| attach_failed(shorten(&error)))?;
                    let program = program(object)?;
                    let id = program.attach_to_link(link).map_err(|error| attach_failed(shorten(&error)))?;
                    // The pin goes on holding the link when this handle is closed.
                    drop(program.take_link(id));
                }
                (Some(object), _) => attach_clsact(object, &interface, true)?,
            }
            let changing = Error::io(&name, "changing its configuration");
            if queue_form(&old.plan) != queue_form(&config.plan) {
                // While there is another queue, or none, what is over a limit must not be let go.
                let mut unpaced = enforce::unpaced(&config);
                unpaced.plan.gso_before = noted.gso_before;
                maps.put_in_force(&unpaced).map_err(Error::io(&name, "changing its configuration"))?;
            }
            set_queue_up(index, &config, gso_cap, &before)?;
            let mut settled = config;
            settled.plan.gso_before = noted.gso_before;
            maps.put_in_force(&settled).map_err(changing)?;
            undo.push(move || drop(maps.put_in_force(&old)));
            // What is no longer needed goes when the program counts on it no more.
            let mut gone = noted;
            if config.plan.gso_before > 0 {
                gone.gso_before = 0;
            }
            match chosen.queue {
                Queue::Keep => put_queue_back(index, &gone)?,
                _ if gone.gso_before > 0 => qdisc::set_gso_max_segs(index, gone.gso_before)?,
                _ => {}
            }
            let mut done = Maps::open(&name, &pins)?;
            let mut record = PlanRecord { gso_before: config.plan.gso_before, ..done.in_force().plan };
            if chosen.queue == Queue::Keep {
                record.queue_before_len = 0;
            }
            done.note(&record).map_err(Error::io(&name, "noting what was there"))?;
        }
    }
    Ok(loaded)
}

fn set_queue_up(index: u32, config: &Config, gso_cap: Option<u32>, before: &Before) -> Result<(), Error> {
    if let Some(cap) = gso_cap {
        qdisc::set_gso_max_segs(index, cap)?;
    }
    Ok(qdisc::apply(index, &enforce::setup(config), before)?)
}

fn attach(object: &mut Ebpf, interface: &Interface, pins: &Pins, hook: Hook) -> Result<(), Error> {
    if hook == Hook::Clsact {
        return attach_clsact(object, interface, false);
    }
    let failed = |detail: String| Error::Attach { interface: interface.name.clone(), detail };
    let program = program(object)?;
    let link = program
        .attach_with_options(&interface.name, TcAttachType::Egress, TcAttachOptions::TcxOrder(LinkOrder::first()))
        .and_then(|id| program.take_link(id))
        .map_err(|error| failed(shorten(&error)))?;
    let link = FdLink::try_from(link).map_err(|error| failed(shorten(&error)))?;
    link.pin(pins.link()).map(drop).map_err(|error| failed(shorten(&error)))
}

fn attach_clsact(object: &mut Ebpf, interface: &Interface, replace: bool) -> Result<(), Error> {
    let failed = |detail: String| Error::Attach { interface: interface.name.clone(), detail };
    let program = program(object)?;
    let id = if replace {
        SchedClassifierLink::attached(&interface.name, TcAttachType::Egress, FILTER_PRIORITY, FILTER_HANDLE, None)
            .map_err(|error| failed(error.to_string()))
            .and_then(|link| program.attach_to_link(link).map_err(|error| failed(shorten(&error))))?
    } else {
        let options = NlOptions { priority: FILTER_PRIORITY, handle: FILTER_HANDLE, classid: None };
        program
            .attach_with_options(&interface.name, TcAttachType::Egress, TcAttachOptions::Netlink(options))
            .map_err(|error| failed(shorten(&error)))?
    };
    // Dropping the link would remove the filter, which is to outlive this process.
    program.take_link(id).map(std::mem::forget).map_err(|error| failed(shorten(&error)))
}

/// Whether our filter is on the interface's clsact, and behind which program.
pub(crate) fn clsact_filter(ifindex: u32) -> io::Result<Option<netlink::EgressFilter>> {
    Ok(netlink::egress_filters(ifindex)?
        .into_iter()
        .find(|filter| filter.handle == u32::from(FILTER_HANDLE) && filter.priority == FILTER_PRIORITY))
}

fn detach_clsact(ifindex: u32, created_clsact: bool) -> io::Result<()> {
    let Ok(name) = nix::net::if_::if_indextoname(ifindex) else {
        return Ok(()); // The device is gone, and the filter with it.
    };
    if clsact_filter(ifindex)?.is_some() {
        let name = name.to_string_lossy();
        let link = SchedClassifierLink::attached(&name, TcAttachType::Egress, FILTER_PRIORITY, FILTER_HANDLE, None)?;
        aya::programs::Link::detach(link).map_err(io::Error::other)?;
    }
    if created_clsact { netlink::remove_unused_clsact(ifindex) } else { Ok(()) }
}
