//! Does the bound hold? What of a snapshot speaks against it. Pure.
//!
//! What this host cannot see is not here: the switches, the other hosts. `qjump measure switch-check` looks at the former.

use std::{
    fmt,
    time::{Duration, Instant},
};

use qjump_ebpf::{
    Level,
    frame::{ETHERNET, WIRE_OVERHEAD},
};

use super::{
    members::Members,
    snapshot::{Interface, Snapshot},
};
use crate::units::{show_ns, show_rate};

/// Why nobody can say that packets of an interface arrive within their bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The state of the interface could not be read, because of this.
    Unreadable(String),
    /// The program is not on the egress, because of this.
    Detached(String),
    /// Another program runs before it, and may pass packets around it.
    NotFirst,
    /// The queue is not the one that was set up, in these ways.
    Queue(Vec<String>),
    /// Nothing serves this host's levels in their order, because of this.
    Unordered(String),
    /// The link is slower than the plan's slowest, bit/s.
    SlowLink {
        /// The link.
        speed_bps: u64,
        /// The plan's.
        planned_bps: u64,
    },
    /// One frame of the link's MTU takes longer than all fixed delays of the plan, ns.
    LongFrame {
        /// The frame.
        frame_ns: u64,
        /// The plan's fixed delays.
        epsilon_ns: u64,
    },
    /// No level of the plan has a bound.
    NoBound,
    /// There are more hosts than the plan is for.
    MoreHosts {
        /// In the plan.
        planned: u32,
        /// By the last count.
        counted: u32,
    },
    /// Nobody has known for so long how many hosts there are.
    UnknownHosts(Duration),
}

impl Doubt {
    /// All that [`Self::name`] gives.
    pub const NAMES: [&str; 10] = [
        "unreadable",
        "detached",
        "not_first",
        "queue",
        "slow_link",
        "long_frame",
        "no_bound",
        "more_hosts",
        "unknown_hosts",
        "unordered",
    ];

    /// Its name in metrics and JSON.
    pub const fn name(&self) -> &'static str {
        Self::NAMES[match self {
            Self::Unreadable(_) => 0,
            Self::Detached(_) => 1,
            Self::NotFirst => 2,
            Self::Queue(_) => 3,
            Self::SlowLink { .. } => 4,
            Self::LongFrame { .. } => 5,
            Self::NoBound => 6,
            Self::MoreHosts { .. } => 7,
            Self::UnknownHosts(_) => 8,
            Self::Unordered(_) => 9,
        }]
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "its state cannot be read: {why}"),
            Self::Detached(why) => write!(f, "the program is not on its egress: {why}"),
            Self::NotFirst => f.write_str("another program runs before it, and may pass packets around it"),
            Self::Queue(problems) => write!(f, "its queue is not the one that was set up: {}", problems.join(", ")),
            Self::Unordered(why) => write!(f, "nothing serves this host's levels in their order: {why}"),
            Self::SlowLink { speed_bps, planned_bps } => write!(
                f,
                "its link has {}, and the plan's slowest has {}",
                show_rate(*speed_bps as f64),
                show_rate(*planned_bps as f64)
            ),
            Self::LongFrame { frame_ns, epsilon_ns } => write!(
                f,
                "one frame of its MTU takes {} on the slowest link, longer than all fixed delays of the plan, {}",
                show_ns(*frame_ns as f64),
                show_ns(*epsilon_ns as f64)
            ),
            Self::NoBound => f.write_str("no level of its plan has a bound"),
            Self::MoreHosts { planned, counted } => {
                write!(f, "its plan is for {planned} hosts, and there are {counted}")
            }
            Self::UnknownHosts(since) => {
                write!(f, "for {} s nobody has said how many hosts there are", since.as_secs())
            }
        }
    }
}

/// What is promised to packets of one level, when nothing speaks against it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Promise {
    /// This bound, ns, whatever other hosts send.
    Bound(f64),
    /// This bound, ns, while at most so many hosts send at this level.
    While(f64, u32),
    /// Nothing.
    None,
}

/// Whether packets of an interface arrive within the bounds of its plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Guarantee {
    /// What speaks against it.
    pub doubts: Vec<Doubt>,
    /// What is promised to each level of the plan above 0, the strictest first.
    pub levels: Vec<(Level, Promise)>,
}

impl Guarantee {
    /// Whether nothing speaks against it.
    pub fn holds(&self) -> bool {
        self.doubts.is_empty()
    }
}

impl fmt::Display for Guarantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.holds() {
            return f.write_str("holds");
        }
        let doubts: Vec<String> = self.doubts.iter().map(Doubt::to_string).collect();
        write!(f, "not provable because {}", doubts.join("; and because "))
    }
}

/// The guarantee of every interface of a snapshot, by name.
pub fn all(snapshot: &Snapshot) -> Vec<(&str, Guarantee)> {
    let members = snapshot.agent.members.as_ref();
    let read = snapshot
        .interfaces
        .iter()
        .map(|interface| (interface.name.as_str(), judge(interface, members, snapshot.taken)));
    let unreadable = snapshot.unreadable.iter().map(|(name, why)| {
        (name.as_str(), Guarantee { doubts: vec![Doubt::Unreadable(why.clone())], levels: Vec::new() })
    });
    read.chain(unreadable).collect()
}

/// The guarantee of one interface. Without members, only what the interface itself says counts.
pub fn judge(interface: &Interface, members: Option<&Members>, now: Instant) -> Guarantee {
    let promise = |level: &super::snapshot::LevelState| match (level.bound_ns, level.senders) {
        (Some(bound), None) => Promise::Bound(bound),
        (Some(bound), Some(senders)) => Promise::While(bound, senders),
        (None, _) => Promise::None,
    };
    let planned = interface.levels.iter().filter(|level| level.level != Level::BEST_EFFORT);
    let levels: Vec<_> = planned.map(|level| (level.level, promise(level))).collect();
    let mut doubts = of_the_host(interface);
    if levels.iter().all(|(_, promise)| *promise == Promise::None) {
        doubts.push(Doubt::NoBound);
    }
    doubts.extend(members.into_iter().flat_map(|members| of_the_cluster(interface.plan.hosts, members, now)));
    Guarantee { doubts, levels }
}

fn of_the_host(interface: &Interface) -> Vec<Doubt> {
    let mut doubts = Vec::new();
    doubts.extend(interface.detached.clone().map(Doubt::Detached));
    if interface.position.is_some_and(|at| at > 1) {
        doubts.push(Doubt::NotFirst);
    }
    if !interface.queue_problems.is_empty() {
        doubts.push(Doubt::Queue(interface.queue_problems.clone()));
    }
    doubts.extend(interface.unordered.clone().map(Doubt::Unordered));
    let Some(link) = interface.link else { return doubts };
    let (planned_bps, epsilon_ns) = (interface.plan.link_rate_bps, interface.plan.epsilon_ns);
    if let Some(speed_bps) = link.speed_bps.filter(|speed| *speed < planned_bps) {
        doubts.push(Doubt::SlowLink { speed_bps, planned_bps });
    }
    // The fixed delays have such a frame in them: a packet finds one of a lower level on the wire, in front of it.
    let frame = u64::from(link.mtu) + ETHERNET as u64 + u64::from(WIRE_OVERHEAD);
    let frame_ns = frame * 8_000_000_000 / planned_bps.max(1);
    if frame_ns > epsilon_ns {
        doubts.push(Doubt::LongFrame { frame_ns, epsilon_ns });
    }
    doubts
}

fn of_the_cluster(planned: u32, members: &Members, now: Instant) -> Vec<Doubt> {
    let more =
        members.counted.filter(|counted| *counted > planned).map(|counted| Doubt::MoreHosts { planned, counted });
    more.into_iter().chain(members.unknown_for(now).map(Doubt::UnknownHosts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::snapshot::tests::{interface, snapshot};

    fn doubts(change: impl Fn(&mut Interface)) -> Vec<Doubt> {
        let mut interface = interface();
        change(&mut interface);
        judge(&interface, Some(&Members::fixed(12)), Instant::now()).doubts
    }

    #[test]
    fn a_clean_interface_holds() {
        let snapshot = snapshot();
        let [(name, guarantee)] = &all(&snapshot)[..] else { panic!("one interface") };
        assert!(*name == "eth0" && guarantee.holds(), "{guarantee}");
        assert_eq!(guarantee.to_string(), "holds");
        let promises: Vec<_> = guarantee.levels.iter().map(|(level, promise)| (level.number(), *promise)).collect();
        assert_eq!(promises, [(7, Promise::Bound(6_688.0)), (5, Promise::While(24_665.0, 3)), (3, Promise::None)]);
    }

    #[test]
    fn each_thing_that_speaks_against_it() {
        type Change = fn(&mut Interface);
        let cases: [(Change, &str, &str); 8] = [
            (|one| one.detached = Some("its link is gone".into()), "detached", "its link is gone"),
            (|one| one.position = Some(2), "not_first", "before it"),
            (|one| one.queue_problems = vec!["no root".into()], "queue", "no root"),
            (|one| one.unordered = Some("a VLAN".into()), "unordered", "a VLAN"),
            (|one| one.link.as_mut().unwrap().speed_bps = Some(1_000_000_000), "slow_link", "1gbit"),
            (|one| one.link.as_mut().unwrap().mtu = 9_000, "long_frame", "7.23us"),
            (|one| one.plan.epsilon_ns = 100, "long_frame", "100ns"),
            (|one| one.levels.iter_mut().for_each(|level| level.bound_ns = None), "no_bound", "no level"),
        ];
        for (change, name, part) in cases {
            let found = doubts(change);
            let [doubt] = &found[..] else { panic!("{name}: {found:?}") };
            assert!(doubt.name() == name && doubt.to_string().contains(part), "{name}: {doubt}");
        }
        // What is not known, or does not matter, speaks for nothing.
        assert_eq!(doubts(|one| one.link = None), []);
        assert_eq!(doubts(|one| one.link.as_mut().unwrap().speed_bps = None), []);
        assert_eq!(doubts(|one| one.link.as_mut().unwrap().is_up = false), []);
        let both =
            judge(&Interface { position: Some(3), detached: Some("x".into()), ..interface() }, None, Instant::now());
        assert!(both.to_string().starts_with("not provable because the program"), "{both}");
        assert!(both.to_string().contains("; and because another program"), "{both}");
    }

    #[test]
    fn hosts_that_the_plan_is_not_for() {
        let now = Instant::now();
        let of = |members: &Members, now| judge(&interface(), Some(members), now).doubts;
        let mut members = Members::fixed(12);
        members.counted = Some(13);
        assert_eq!(of(&members, now), [Doubt::MoreHosts { planned: 12, counted: 13 }]);
        members.counted = Some(11);
        members.answered = Some(now);
        members.stale_after = Some(Duration::from_secs(40));
        assert_eq!(of(&members, now + Duration::from_secs(40)), []);
        let later = Duration::from_secs(41);
        assert_eq!(of(&members, now + later), [Doubt::UnknownHosts(later)]);
        assert_eq!(judge(&interface(), None, now).doubts, []);
    }

    #[test]
    fn what_cannot_be_read_is_no_guarantee() {
        let mut snapshot = snapshot();
        snapshot.unreadable.push(("eth1".to_owned(), "no rights".to_owned()));
        let found = all(&snapshot);
        let (name, guarantee) = &found[1];
        assert!(*name == "eth1" && !guarantee.holds());
        assert_eq!(guarantee.doubts[0].name(), "unreadable");
        assert!(guarantee.to_string().contains("no rights"));
    }
}
