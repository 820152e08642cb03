//! All that the agent shows, at one moment: what interfaces do, asked from the kernel, and what the agent knows of itself.

use std::time::{Duration, Instant, SystemTime};

use qjump_ebpf::{Charge, LEVELS, Level, REASONS, Reason, layout::Count};

use super::members::Members;
use crate::{
    check::ethtool,
    dataplane::{self, Error, InterfaceStatus, LevelStatus, Why, netlink},
    plan::bound_in_force,
};

/// All that the agent shows.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// When it was taken.
    pub taken: Instant,
    /// The interfaces of this network namespace that qjump is loaded on, by name.
    pub interfaces: Vec<Interface>,
    /// Those that it should be loaded on and whose state cannot be read, each with the reason.
    pub unreadable: Vec<(String, String)>,
    /// What the agent says of itself.
    pub agent: Agent,
}

/// What the agent says of itself.
#[derive(Clone, Debug)]
pub struct Agent {
    /// Since when it runs.
    pub up_since: SystemTime,
    /// Number of the configuration in force: 1 is the one that it started with.
    pub generation: u64,
    /// Configurations that were put in force, and that were refused.
    pub reloads: Reloads,
    /// How many hosts there are; `None` if the agent has no configuration.
    pub members: Option<Members>,
    /// Whether all is as the configuration wants it, or what is not.
    pub ready: Result<(), String>,
}

/// What became of configurations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloads {
    /// How many were put in force.
    pub applied: u64,
    /// How many were refused.
    pub refused: u64,
    /// The last.
    pub last: Option<Reload>,
}

/// One configuration that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reload {
    /// When.
    pub at: SystemTime,
    /// Why it was refused, or that it is in force.
    pub result: Result<(), String>,
}

/// The state of one interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// `"tcx"` or `"clsact"`.
    pub hook: &'static str,
    /// Why the program is not on its egress; `None` if it is.
    pub detached: Option<String>,
    /// The place of the program among those on the egress, from 1, if it is known.
    pub position: Option<usize>,
    /// What holds packets back: `"htb"`, `"fq"` or `"keep"`.
    pub queue: &'static str,
    /// How that differs from what was set up.
    pub queue_problems: Vec<String>,
    /// Why nothing serves this host's own levels in their order, if nothing does.
    pub unordered: Option<String>,
    /// The device itself; `None` if it is gone.
    pub link: Option<Link>,
    /// The plan in force.
    pub plan: Plan,
    /// Levels that the plan has, or that were used; the strictest first.
    pub levels: Vec<LevelState>,
}

/// A network device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether it is up and has a carrier.
    pub is_up: bool,
    /// L3 bytes.
    pub mtu: u32,
    /// bit/s, if the driver says.
    pub speed_bps: Option<u64>,
}

/// The part of a plan that is the same for all levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Number of the change: 1 for the first load.
    pub number: u64,
    /// Hosts that may send, n.
    pub hosts: u32,
    /// Rate of the slowest link, bit/s.
    pub link_rate_bps: u64,
    /// Fixed delays, ns.
    pub epsilon_ns: u64,
    /// Time of the change, ns since the Unix epoch.
    pub loaded_at_unix_ns: u64,
}

/// The state of one level.
#[derive(Clone, Debug, PartialEq)]
pub struct LevelState {
    /// The level.
    pub level: Level,
    /// What its packets are charged.
    pub charge: Charge,
    /// Packets and their wire bytes by [`Reason`].
    pub counts: [Count; REASONS],
    /// Packets that had to wait.
    pub waited_packets: u64,
    /// The longest of these waits since the load, ns.
    pub worst_wait_ns: u64,
    /// Time between its budgets, ns; `None` without a limit.
    pub epoch_ns: Option<f64>,
    /// What it may send, bit/s of wire bytes; `None` without a limit.
    pub rate_bps: Option<f64>,
    /// The longest that a packet is in the network, ns; `None` without a bound.
    pub bound_ns: Option<f64>,
    /// How many hosts may send at this level at once for the bound to hold; `None` if all may, or there is no bound.
    pub senders: Option<u32>,
}

impl Snapshot {
    /// Takes one. It asks the kernel, and may have to wait for another qjump: not for a thread with something else to do.
    pub fn take(agent: Agent) -> Self {
        let (mut interfaces, mut unreadable) = (Vec::new(), Vec::new());
        match dataplane::loaded_interfaces() {
            Ok(names) => {
                for name in names {
                    match dataplane::status(&name) {
                        // What is loaded in another network namespace is another agent's.
                        Ok(status) if status.elsewhere => {}
                        Ok(status) => interfaces.push(Interface::of(&status)),
                        // Unloaded meanwhile.
                        Err(Error::NotLoaded(_)) => {}
                        Err(error) => unreadable.push((name, error.to_string())),
                    }
                }
            }
            Err(error) => unreadable.push(("all".to_owned(), error.to_string())),
        }
        Self { taken: Instant::now(), interfaces, unreadable, agent }
    }

    /// An interface by its name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }
}

impl Interface {
    /// What `status` found, and the device.
    pub fn of(status: &InterfaceStatus) -> Self {
        let plan = &status.config.plan;
        Self {
            name: status.interface.clone(),
            hook: status.hook,
            detached: status.problem.clone(),
            position: status.position.map(|(at, _)| at),
            queue: status.queue.name(),
            queue_problems: status.queue_problems.clone(),
            unordered: Why::of_number(plan.queue_why)
                .filter(|why| matches!(why, Why::Foreign | Why::Vlan | Why::NothingThere))
                .map(|why| why.to_string()),
            link: Link::of(&status.interface),
            plan: Plan {
                number: plan.generation,
                hosts: plan.hosts,
                link_rate_bps: plan.link_rate_bps,
                epsilon_ns: plan.epsilon_ns,
                loaded_at_unix_ns: plan.loaded_at_ns,
            },
            levels: status.levels.iter().map(|level| LevelState::of(status, level)).collect(),
        }
    }

    /// One of its levels.
    pub fn level(&self, level: Level) -> Option<&LevelState> {
        self.levels.iter().find(|state| state.level == level)
    }
}

impl Link {
    fn of(name: &str) -> Option<Self> {
        let device = netlink::interface(name).ok().flatten()?;
        let speed_mbit = ethtool::settings(name).speed_mbit;
        Some(Self {
            is_up: device.is_up,
            mtu: device.mtu,
            speed_bps: speed_mbit.map(|speed| u64::from(speed) * 1_000_000),
        })
    }
}

impl LevelState {
    fn of(status: &InterfaceStatus, level: &LevelStatus) -> Self {
        let record = &status.config.plan.levels[level.level.index()];
        let bound_ns = bound_in_force(&status.config, level.level);
        let positive = |value: f64| (value > 0.0).then_some(value);
        Self {
            level: level.level,
            charge: status.config.limits[level.level.index()].charge(),
            counts: level.counters.reasons,
            waited_packets: level.counters.waited_packets,
            worst_wait_ns: level.counters.worst_wait_ns,
            epoch_ns: positive(record.epoch_ns),
            rate_bps: positive(record.rate_bps),
            bound_ns,
            senders: bound_ns.and((record.guaranteed == 0).then_some(record.max_senders)),
        }
    }

    /// Packets with this verdict.
    pub const fn count(&self, reason: Reason) -> Count {
        self.counts[reason.index()]
    }

    /// The share of the level's budget that it used since `before`, `elapsed` ago: 1 is all of it. `None` without a limit.
    ///
    /// A level charged by packet may send one in each epoch, one charged by bytes so many in each second. A burst may be more than
    /// the budget of a short time. What came down from a higher level is counted there, and not here.
    pub fn budget_used(&self, before: &Self, elapsed: Duration) -> Option<f64> {
        let (now, then) = (self.count(Reason::Passed), before.count(Reason::Passed));
        let elapsed_ns = elapsed.as_nanos() as f64;
        let used_ns = match self.charge {
            Charge::Packet => now.packets.saturating_sub(then.packets) as f64 * self.epoch_ns?,
            Charge::Byte => now.bytes.saturating_sub(then.bytes) as f64 * 8e9 / self.rate_bps?,
            Charge::NotConfigured | Charge::Unlimited => return None,
        };
        (elapsed_ns > 0.0).then(|| used_ns / elapsed_ns)
    }
}

const _: () = assert!(LEVELS == 8, "a level is one digit in labels");

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Level 7 guaranteed, level 5 for three senders, level 3 marked alone, on a link of 10 Gbit/s.
    pub(in crate::agent) fn interface() -> Interface {
        let level = |number, charge, epoch_ns, rate_bps, bound_ns, senders| LevelState {
            level: Level::new(number).unwrap(),
            charge,
            counts: [Count::default(); REASONS],
            waited_packets: 0,
            worst_wait_ns: 0,
            epoch_ns,
            rate_bps,
            bound_ns,
            senders,
        };
        Interface {
            name: "eth0".to_owned(),
            hook: "tcx",
            detached: None,
            position: Some(1),
            queue: "htb",
            queue_problems: Vec::new(),
            unordered: None,
            link: Some(Link { is_up: true, mtu: 1_500, speed_bps: Some(10_000_000_000) }),
            plan: Plan {
                number: 1,
                hosts: 12,
                link_rate_bps: 10_000_000_000,
                epsilon_ns: 4_000,
                loaded_at_unix_ns: 1_700_000_000_000_000_000,
            },
            levels: vec![
                level(7, Charge::Packet, Some(10_000.0), Some(224e6), Some(6_688.0), None),
                level(5, Charge::Byte, Some(13_376.0), Some(8e6), Some(24_665.0), Some(3)),
                level(3, Charge::Unlimited, None, None, None, None),
                level(0, Charge::NotConfigured, None, None, None, None),
            ],
        }
    }

    pub(in crate::agent) fn snapshot() -> Snapshot {
        Snapshot {
            taken: Instant::now(),
            interfaces: vec![interface()],
            unreadable: Vec::new(),
            agent: Agent {
                up_since: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
                generation: 1,
                reloads: Reloads::default(),
                members: Some(Members::fixed(12)),
                ready: Ok(()),
            },
        }
    }

    #[test]
    fn budgets_are_of_epochs_or_of_bytes() {
        let before = interface();
        let mut now = before.clone();
        for level in &mut now.levels {
            level.counts[Reason::Passed.index()] = Count { packets: 25_000, bytes: 500_000 };
            level.counts[Reason::OverLimit.index()] = Count { packets: 1_000_000, bytes: 1_000_000 };
        }
        let used: Vec<Option<f64>> = now
            .levels
            .iter()
            .zip(&before.levels)
            .map(|(now, before)| now.budget_used(before, Duration::from_secs(1)))
            .collect();
        assert_eq!(used, [Some(0.25), Some(0.5), None, None]);
        assert_eq!(now.levels[0].budget_used(&before.levels[0], Duration::ZERO), None);
    }
}
