//! What is in force, asked from the kernel rather than from the configuration.

use std::{io, os::fd::AsFd};

use qjump_ebpf::{
    Config, Level, Reason,
    layout::{Count, HOOK_CLSACT, LevelCounters, PlanRecord},
};

use super::{
    Error, enforce,
    load::{clsact_filter, not_loaded},
    maps::Maps,
    netlink,
    pins::{Lock, Pins, check_name},
    sys::{monotonic_ns, network_namespace, open_pin, tcx_link, tcx_programs},
};

use crate::qdisc::{self, Queue};

/// The state of one interface.
pub struct InterfaceStatus {
    /// Its name.
    pub interface: String,
    /// Whether it is an interface of another network namespace than the caller's.
    pub elsewhere: bool,
    /// `"tcx"` or `"clsact"`.
    pub hook: &'static str,
    /// Whether the program really is on the egress of this very interface now.
    pub attached: bool,
    /// What is wrong, and what to do, if anything.
    pub problem: Option<String>,
    /// The program that runs.
    pub program_id: Option<u32>,
    /// Its place among the programs on this egress, from 1, and how many there are.
    pub position: Option<(usize, usize)>,
    /// The configuration in force.
    pub config: Config,
    /// What holds packets back.
    pub queue: Queue,
    /// How the queue differs from the one that goes with the configuration. Not known of another namespace.
    pub queue_problems: Vec<String>,
    /// The strictest level first; levels neither configured nor used are left out.
    pub levels: Vec<LevelStatus>,
}

/// The state of one level.
pub struct LevelStatus {
    /// The level.
    pub level: Level,
    /// What happened to its packets.
    pub counters: LevelCounters,
    /// Since its last packet, ns. `None` if there was none, or for levels without a limit, which never
    /// read the clock.
    pub idle_ns: Option<u64>,
}

impl LevelStatus {
    /// Packets with this verdict.
    pub const fn count(&self, reason: Reason) -> Count {
        self.counters.reasons[reason.index()]
    }

    fn sum(&self, wanted: impl Fn(Reason) -> bool) -> Count {
        Reason::ALL.into_iter().filter(|&reason| wanted(reason)).fold(Count::default(), |sum, reason| {
            let count = self.count(reason);
            Count { packets: sum.packets + count.packets, bytes: sum.bytes + count.bytes }
        })
    }

    /// Packets that left at this level.
    pub fn passed(&self) -> Count {
        self.sum(|reason| !reason.is_drop() && !reason.is_demotion())
    }

    /// Packets that asked for this level and left at a lower one.
    pub fn demoted(&self) -> Count {
        self.sum(Reason::is_demotion)
    }

    /// Packets that were dropped.
    pub fn dropped(&self) -> Count {
        self.sum(Reason::is_drop)
    }
}

/// The state of one interface.
///
/// # Errors
/// If qjump is not loaded on it, or its pins are not readable or not ours.
pub fn status(interface: &str) -> Result<InterfaceStatus, Error> {
    check_name(interface)?;
    match read(interface) {
        // Perhaps a load or an unload is at work on it: once more when that has ended.
        Err(Error::CorruptPin { .. } | Error::OtherVersion { .. }) => {
            let _lock = Lock::take()?;
            read(interface)
        }
        result => result,
    }
}

fn read(interface: &str) -> Result<InterfaceStatus, Error> {
    let pins = Pins::of(interface);
    if !pins.find()? {
        return Err(not_loaded(interface));
    }
    let maps = Maps::open(interface, &pins)?;
    let config = maps.in_force();
    let counters = maps.counters().map_err(Error::io(interface, "reading its counters"))?;
    let here = network_namespace().map_err(Error::io(interface, "asking for the network namespace"))?;
    let elsewhere = config.plan.netns != here;
    let attachment = attachment(interface, &pins, &config.plan, elsewhere)?;
    let setup = enforce::setup(&config);
    let queue_problems =
        if elsewhere || attachment.device_gone { Vec::new() } else { qdisc::verify(config.plan.ifindex, &setup)? };
    let now = monotonic_ns();
    let levels = Level::strictest_first()
        .filter_map(|level| {
            let counters = counters[level.index()];
            let used = counters.reasons.iter().any(|count| count.packets > 0);
            let configured =
                level == Level::BEST_EFFORT || config.limits[level.index()] != qjump_ebpf::LevelLimit::NOT_CONFIGURED;
            let idle_ns = (counters.last_ns != 0).then(|| now.saturating_sub(counters.last_ns));
            (configured || used).then_some(LevelStatus { level, counters, idle_ns })
        })
        .collect();
    Ok(InterfaceStatus {
        interface: interface.to_owned(),
        elsewhere,
        hook: if config.plan.hook == HOOK_CLSACT { "clsact" } else { "tcx" },
        attached: attachment.problem.is_none(),
        problem: attachment.problem,
        program_id: attachment.program_id,
        position: attachment.position,
        queue: setup.queue,
        queue_problems,
        config,
        levels,
    })
}

struct Attachment {
    problem: Option<String>,
    program_id: Option<u32>,
    position: Option<(usize, usize)>,
    device_gone: bool,
}

fn attachment(interface: &str, pins: &Pins, plan: &PlanRecord, elsewhere: bool) -> Result<Attachment, Error> {
    let broken = |program_id, problem: String| Attachment {
        problem: Some(problem),
        program_id,
        position: None,
        device_gone: false,
    };
    let reload = format!("run `qjump load` again, or `qjump unload --interface {interface}`");
    let asking = |source| Error::Io { interface: interface.to_owned(), action: "asking for its programs", source };
    let corrupt = |error: io::Error| Error::CorruptPin {
        path: pins.link(),
        why: error.to_string(),
        interface: interface.to_owned(),
    };
    let clsact = plan.hook == HOOK_CLSACT;
    if elsewhere {
        let gone =
            format!("its interface or its program is gone; remove its record: `qjump unload --interface {interface}`");
        // A filter of another namespace cannot be asked for, but its program goes when it goes.
        if clsact {
            let problem = (!Maps::in_use(pins)).then_some(gone);
            return Ok(Attachment { problem, program_id: None, position: None, device_gone: false });
        }
        let link = open_pin(&pins.link()).and_then(|fd| tcx_link(fd.as_fd())).map_err(corrupt)?;
        let problem = (link.ifindex == 0).then_some(gone);
        return Ok(Attachment { problem, program_id: Some(link.program_id), position: None, device_gone: false });
    }
    let Some(device) = netlink::interface(interface).map_err(asking)? else {
        let problem = format!("there is no interface {interface} in this network namespace any more; {reload}");
        return Ok(Attachment { device_gone: true, ..broken(None, problem) });
    };
    if clsact {
        let filters = netlink::egress_filters(device.index).map_err(asking)?;
        return Ok(match clsact_filter(device.index).map_err(asking)? {
            Some(ours) => Attachment {
                problem: None,
                program_id: ours.program_id,
                position: filters.iter().position(|filter| *filter == ours).map(|at| (at + 1, filters.len())),
                device_gone: false,
            },
            None => broken(None, format!("its filter is gone from clsact; {reload}")),
        });
    }
    let fd = match open_pin(&pins.link()) {
        Ok(fd) => fd,
        Err(error) => return Ok(broken(None, format!("its link cannot be opened ({error}); {reload}"))),
    };
    let link = tcx_link(fd.as_fd()).map_err(corrupt)?;
    if link.ifindex != device.index {
        let what = if link.ifindex == 0 { "a device that is gone" } else { "another device" };
        let problem = format!("its link is on {what}, which had this name; {reload}");
        return Ok(Attachment { device_gone: true, ..broken(Some(link.program_id), problem) });
    }
    let programs = tcx_programs(device.index).map_err(asking)?.unwrap_or_default();
    match programs.iter().position(|&program| program == link.program_id) {
        Some(at) => Ok(Attachment {
            problem: None,
            program_id: Some(link.program_id),
            position: Some((at + 1, programs.len())),
            device_gone: false,
        }),
        None => Ok(broken(Some(link.program_id), format!("the kernel does not list it on the egress; {reload}"))),
    }
}
