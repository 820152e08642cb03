//! A plan put to the test: which network, which traffic, and the run.

use qjump_ebpf::{LEVELS, Level};

use super::{
    engine::{Background, Clock, Lower, Setup, run},
    limiter::{Kind, Rule, Window},
    outcome::Outcome,
    source::{Pattern, Script, Size, Source, Target},
    topology::{Picos, Routing, Shape, Topology},
};
use crate::{
    plan::{Delays, Plan, delays::on_wire},
    units::Nanos,
};

/// What hosts want to send at every level that is limited.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// As much as the limiter allows.
    Saturating,
    /// So much of the level's rate, at random times.
    Poisson(f64),
    /// So much of the level's rate, in bursts of so many packets.
    OnOff(f64, u32),
}

/// Where hosts send to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Destinations {
    /// All to the last host: fan-in.
    #[default]
    One,
    /// Each to a host of its own.
    Permutation,
    /// Anywhere, anew for each packet.
    Any,
}

/// When hosts begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Phases {
    /// So that first packets meet at the port of the last host.
    #[default]
    Aligned,
    /// At random within their epoch.
    Random,
}

/// Lower-level frames in the way of what comes to an idle port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Blocking {
    /// None.
    None,
    /// Always a whole one.
    #[default]
    Whole,
    /// Part of one, another part each time.
    Part,
}

/// A plan, a network and its traffic.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What is put to the test.
    pub plan: Plan,
    /// The network's shape; its hosts should be the plan's.
    pub shape: Shape,
    /// How switches choose among equal paths.
    pub routing: Routing,
    /// How many times faster links between switches are.
    pub uplink: u32,
    /// Forwarding delay of a switch.
    pub switch_delay: Nanos,
    /// Traffic at limited levels.
    pub load: Load,
    /// Where it goes.
    pub destinations: Destinations,
    /// When it begins.
    pub phases: Phases,
    /// Packets of random sizes instead of the largest.
    pub mixed: bool,
    /// Which limiter hosts have.
    pub limiter: Kind,
    /// Largest frame, L2 bytes.
    pub mtu: u32,
    /// Whether a port without anything to send is in the middle of such a frame of a lower level.
    pub blocking: Blocking,
    /// Wire bytes of lower levels that a host's NIC is in the middle of; at least a frame.
    pub host_burst: u32,
    /// Best effort from every host to any other, as a share of its link.
    pub best_effort: Option<f64>,
    /// Whether all hosts send, even at levels that allow fewer.
    pub everyone: bool,
    /// Wire bytes that each queue of a port holds.
    pub buffer: Option<u64>,
    /// Clocks run up to so many parts in 10^6 fast or slow.
    pub drift_ppm: u32,
    /// How many epochs of the slowest level hosts send.
    pub epochs: u32,
    /// Seed of everything random.
    pub seed: u64,
}

/// Number `index` of the random numbers that `seed` begins (SplitMix64: Steele, Lea, Flood 2014): the same on every
/// machine, in any order.
pub(super) fn scramble(seed: u64, index: u64) -> u64 {
    let mut x = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Scenario {
    /// Fixed delays of the longest path of this network, with what is in the way, as a plan counts them.
    pub fn delays(&self) -> Delays {
        Delays::Path(crate::plan::Path {
            hops: self.shape.hops(),
            switch_delay: self.switch_delay,
            mtu: self.mtu,
            host_burst: self.host_burst,
        })
    }

    /// The network.
    pub fn topology(&self) -> Topology {
        let delay_ps = self.switch_delay.ns() * 1_000;
        Topology::new(self.shape.clone(), self.routing, self.plan.network.link_rate.bps(), self.uplink, delay_ps)
    }

    /// Each level's limiter; one that lets everything go for a level without a limit.
    pub fn rules(&self) -> [Option<Rule>; LEVELS] {
        let mut rules = [None; LEVELS];
        for level in &self.plan.levels {
            let Ok(limit) = level.limit() else { continue };
            let window = match (self.limiter, level.epoch_ns, level.rate_bps) {
                (Kind::Window, Some(epoch_ns), Some(rate_bps)) => Some(Window {
                    budget: (rate_bps * epoch_ns / 8e9).round() as u64,
                    overhead: self.plan.network.overhead(),
                    length_ns: epoch_ns as u64,
                }),
                _ => None,
            };
            rules[level.spec.level.index()] = Some(Rule { limit, window });
        }
        rules
    }

    /// Each level's bound, rounded up to whole ps.
    pub fn bounds_ps(&self) -> [Option<Picos>; LEVELS] {
        let mut bounds = [None; LEVELS];
        for level in &self.plan.levels {
            bounds[level.spec.level.index()] = level.bound_ns.map(|ns| (ns * 1e3).ceil() as Picos);
        }
        bounds
    }

    /// How long hosts send, ps.
    pub fn length_ps(&self) -> Picos {
        let longest = self.plan.levels.iter().filter_map(|level| level.epoch_ns).fold(0.0, f64::max);
        (longest * f64::from(self.epochs) * 1e3) as Picos
    }

    /// The hosts' clocks.
    pub fn clocks(&self) -> Vec<Clock> {
        if self.drift_ppm == 0 {
            return Vec::new();
        }
        let span = 2 * u64::from(self.drift_ppm) * 1_000 + 1;
        (0..self.shape.hosts())
            .map(|host| {
                let at = scramble(self.seed ^ 0xc10c, u64::from(host)) % span;
                Clock { fast_ppb: at as i64 - (span / 2) as i64 }
            })
            .collect()
    }

    fn setup<'a>(&self, topology: &'a Topology, clocks: &'a [Clock]) -> Setup<'a> {
        Setup {
            topology,
            rules: self.rules(),
            bounds_ps: self.bounds_ps(),
            wire_overhead: self.plan.network.overhead(),
            clocks,
            background: match self.blocking {
                Blocking::None => Background::None,
                Blocking::Whole => Background::Worst(self.lower()),
                Blocking::Part => Background::Part(self.lower()),
            },
            buffer: self.buffer,
            until_ps: self.length_ps(),
        }
    }

    fn lower(&self) -> Lower {
        let frame = on_wire(self.plan.network.mtu(), self.plan.network.overhead());
        Lower { frame, host: frame.max(self.host_burst) }
    }

    /// Who may send at a level at once.
    pub(super) fn senders(&self, level: Level, limit: Option<u32>) -> Vec<u32> {
        // Hosts beyond those that the plan counts only receive.
        let hosts = self.shape.hosts().min(self.plan.network.hosts);
        let Some(most) = limit.filter(|&most| most < hosts) else { return (0..hosts).collect() };
        // The first of a shuffle.
        let mut all: Vec<u32> = (0..hosts).collect();
        all.sort_by_key(|&host| scramble(self.seed ^ level.index() as u64, u64::from(host)));
        all.truncate(most as usize);
        all
    }

    /// How long a packet of `wire` bytes takes to the last host's port if nothing but lower frames is in
    /// its way, ps.
    pub(super) fn travel_ps(&self, topology: &Topology, host: u32, destination: u32, wire: u32) -> Picos {
        let lower = match self.blocking {
            Blocking::Whole => self.lower(),
            _ => Lower { frame: 0, host: 0 },
        };
        let route = topology.route(host, destination, 0);
        let ports = &route.ports[..usize::from(route.len) - 1];
        ports
            .iter()
            .map(|&port| {
                let link = topology.links()[port as usize];
                let lower = if port == host { lower.host } else { lower.frame };
                (u128::from(wire + lower) * 8_000_000_000_000).div_ceil(u128::from(link.rate_bps)) as Picos
                    + link.delay_ps
            })
            .sum()
    }

    fn sources(&self, topology: &Topology) -> Vec<Source> {
        let hosts = self.shape.hosts();
        let last = hosts - 1;
        let mut sources = Vec::new();
        for plan in self.plan.levels.iter().filter(|plan| plan.epoch_ns.is_some()) {
            let level = plan.spec.level;
            let (epoch_ns, rate_bps) = (plan.epoch_ns.unwrap_or(1.0), plan.rate_bps.unwrap_or(1.0));
            let largest = plan.largest_frame(self.plan.network.mtu());
            let size = if self.mixed { Size::Between(14, largest) } else { Size::Fixed(largest) };
            let wire = on_wire(largest, self.plan.network.overhead());
            let per_second = rate_bps / (f64::from(wire) * 8.0);
            let senders = self.senders(level, plan.max_senders.filter(|_| !self.everyone));
            let slowest = senders
                .iter()
                .filter(|&&host| host != last)
                .map(|&host| self.travel_ps(topology, host, last, wire))
                .max()
                .unwrap_or(0);
            for host in senders {
                let target = match self.destinations {
                    Destinations::One if host == last => continue,
                    Destinations::One => Target::One(last),
                    Destinations::Permutation => Target::One((host + 1) % hosts),
                    Destinations::Any => Target::Any(hosts),
                };
                let turn = scramble(self.seed, u64::from(host) << 3 | level.index() as u64);
                let phase_ns = match (self.phases, target) {
                    (Phases::Aligned, Target::One(to)) if to == last => {
                        1_000 + (slowest - self.travel_ps(topology, host, to, wire)) / 1_000
                    }
                    (Phases::Aligned, _) => 1_000,
                    (Phases::Random, _) => (turn as f64 / u64::MAX as f64 * epoch_ns) as u64,
                };
                let pattern = match self.load {
                    Load::Saturating => Pattern::Saturating { phase_ns },
                    Load::Poisson(share) => Pattern::Poisson { per_second: per_second * share },
                    Load::OnOff(share, burst) => {
                        Pattern::OnOff { burst, mean_gap_ns: f64::from(burst) * 1e9 / (per_second * share) }
                    }
                };
                sources.push(Source::new(host, level.number(), pattern, target, size, turn as u32, self.seed));
            }
        }
        if let Some(share) = self.best_effort {
            let frame = self.plan.network.mtu();
            let wire = on_wire(frame, self.plan.network.overhead());
            let per_second = share * self.plan.network.link_rate.bps() as f64 / (f64::from(wire) * 8.0);
            sources.extend((0..hosts).map(|host| {
                let tie = scramble(self.seed, u64::from(host) << 3) as u32;
                let (target, size) = (Target::Any(hosts), Size::Fixed(frame));
                Source::new(host, 0, Pattern::Poisson { per_second }, target, size, tie, self.seed)
            }));
        }
        sources
    }

    /// Runs it.
    pub fn run(&self) -> Outcome {
        let topology = self.topology();
        let clocks = self.clocks();
        run(&self.setup(&topology, &clocks), &mut self.sources(&topology))
    }

    /// Runs it with these messages instead of its own traffic.
    pub fn run_scripts(&self, scripts: Vec<Script>, until_ps: Picos) -> Outcome {
        self.run_scripts_on(&self.topology(), scripts, until_ps)
    }

    pub(super) fn run_scripts_on(&self, topology: &Topology, scripts: Vec<Script>, until_ps: Picos) -> Outcome {
        let clocks = self.clocks();
        let setup = Setup { until_ps, ..self.setup(topology, &clocks) };
        let mut sources: Vec<Source> = scripts
            .into_iter()
            .map(|Script { host, level, messages }| {
                let tie = scramble(self.seed, u64::from(host) << 3 | level.index() as u64) as u32;
                let (target, size) = (Target::One(0), Size::Fixed(0));
                Source::new(host, level.number(), Pattern::Script(messages), target, size, tie, self.seed)
            })
            .collect();
        run(&setup, &mut sources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Demand, LevelSpec, Model, Network};

    pub(crate) fn star(hosts: u32, model: Model) -> Scenario {
        let mut scenario = Scenario {
            plan: Plan { network: network(hosts, model), levels: Vec::new() },
            shape: Shape::Star { hosts },
            routing: Routing::Destination,
            uplink: 1,
            switch_delay: Nanos::from_ns(500),
            load: Load::Saturating,
            destinations: Destinations::One,
            phases: Phases::Aligned,
            mixed: false,
            limiter: Kind::Gcra,
            mtu: 1_514,
            blocking: Blocking::Whole,
            host_burst: 0,
            best_effort: None,
            everyone: false,
            buffer: None,
            drift_ppm: 0,
            epochs: 10,
            seed: 1,
        };
        let network = Network { delays: scenario.delays(), ..network(hosts, model) };
        scenario.plan = network.plan().unwrap();
        scenario
    }

    fn network(hosts: u32, model: Model) -> Network {
        Network {
            hosts,
            link_rate: "10gbit".parse().unwrap(),
            max_packet: 256,
            delays: Delays::Given(Nanos::from_ns(0)),
            wire_overhead: 24,
            tagged: false,
            model,
            levels: vec![LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0))],
        }
    }

    #[test]
    fn one_packet_takes_what_arithmetic_says() {
        let mut scenario = star(2, Model::FanIn);
        scenario.blocking = Blocking::None;
        scenario.epochs = 1;
        let outcome = scenario.run();
        // 280 B at 10 Gbit/s twice, and a switch of 500 ns.
        assert_eq!(outcome.levels[7].max_ps, 2 * 224_000 + 500_000);
        assert_eq!((outcome.levels[7].sent, outcome.packet_hops), (1, 2));
        // With a lower frame of 1538 B in the way at both ports.
        scenario.blocking = Blocking::Whole;
        assert_eq!(scenario.run().levels[7].max_ps, 2 * (224_000 + 1_230_400) + 500_000);
    }

    #[test]
    fn aligned_fan_in_comes_close_to_the_bound_and_not_beyond() {
        for hosts in [12, 100] {
            let scenario = star(hosts, Model::FanIn);
            let outcome = scenario.run();
            let bound = scenario.bounds_ps()[7].unwrap();
            let tightness = outcome.levels[7].max_ps as f64 / bound as f64;
            assert!(tightness > 0.9 && tightness <= 1.0, "{hosts}: {tightness}");
            assert_eq!(outcome.levels[7].violations, 0);
            assert_eq!(outcome.levels[7].delivered_count(), outcome.levels[7].sent);
            assert_eq!(outcome.levels[7].sent, u64::from(hosts - 1) * 10);
            // Of so many at once, the one in the middle waits half as long as the last.
            let fixed_ns = 500.0 + 224.0 + 2.0 * 1_230.4;
            let middle = outcome.levels[7].times().unwrap().value_at_quantile(0.5) as f64 - fixed_ns;
            let last = outcome.levels[7].max_ps as f64 / 1e3 - fixed_ns;
            assert!((middle / last - 0.5).abs() < 0.06, "{middle} {last}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let mut scenario = star(20, Model::Strict);
        scenario.destinations = Destinations::Any;
        scenario.load = Load::Poisson(0.8);
        scenario.mixed = true;
        scenario.drift_ppm = 50;
        let key = |outcome: Outcome| {
            let level = &outcome.levels[7];
            (level.max_ps, level.sent, level.worst, outcome.events, level.times().unwrap().value_at_quantile(0.5))
        };
        assert_eq!(key(scenario.run()), key(scenario.run()));
        let other = Scenario { seed: 2, ..scenario.clone() };
        assert_ne!(key(scenario.run()), key(other.run()));
    }

    #[test]
    fn a_full_buffer_loses_and_everything_is_accounted_for() {
        let mut scenario = star(50, Model::FanIn);
        scenario.buffer = Some(2_000);
        let level = &scenario.run().levels[7];
        assert!(level.lost > 0);
        assert_eq!(level.sent, level.delivered_count() + level.lost);
    }

    #[test]
    fn what_does_not_fit_its_level_travels_at_level_0() {
        let scenario = star(4, Model::Strict);
        let script = |host: u32, level: u8, l2_bytes: u32| Script {
            host,
            level: Level::new(level).unwrap(),
            messages: vec![(10, crate::sim::source::Message { destination: 3, l2_bytes })],
        };
        // Too large for level 7, a level that the plan does not have, and one that is in order.
        let outcome = scenario.run_scripts(vec![script(0, 7, 1_000), script(1, 5, 100), script(2, 7, 100)], u64::MAX);
        let seen = |level: usize| (outcome.levels[level].sent, outcome.levels[level].demoted);
        assert_eq!((seen(7), seen(5), seen(0)), ((1, 1), (0, 1), (2, 0)));
        // A level without a limit keeps its packets.
        let mut free = scenario.clone();
        free.plan.network.levels.push(LevelSpec::new(Level::new(5).unwrap(), Demand::Unlimited));
        free.plan = free.plan.network.plan().unwrap();
        let outcome = free.run_scripts(vec![script(1, 5, 1_000)], u64::MAX);
        assert_eq!((outcome.levels[5].sent, outcome.levels[5].demoted), (1, 0));
        let mut strict = scenario.clone();
        strict.plan.levels[0].spec.oversize = qjump_ebpf::limiter::Oversize::Drop;
        let outcome = strict.run_scripts(vec![script(0, 7, 1_000)], u64::MAX);
        assert_eq!((outcome.levels[7].refused, outcome.levels[0].sent), (1, 0));
    }

    #[test]
    fn a_gso_burst_in_the_nic_is_in_the_way() {
        let mut scenario = star(12, Model::FanIn);
        scenario.host_burst = 65_536;
        scenario.plan = Network { delays: scenario.delays(), ..network(12, Model::FanIn) }.plan().unwrap();
        let level = &scenario.run().levels[7];
        // 65,536 B are 52.4 us at 10 Gbit/s.
        assert!(level.max_ps > 52_000_000 && level.violations == 0, "{level:?}");
    }

    #[test]
    fn memory_follows_what_is_in_flight() {
        let mut scenario = star(10, Model::FanIn);
        let short = scenario.run();
        scenario.epochs = 1_000;
        let long = scenario.run();
        assert_eq!(long.packet_hops, 100 * short.packet_hops);
        assert_eq!(long.most_in_flight, short.most_in_flight);
    }

    #[test]
    fn higher_levels_go_first() {
        let mut scenario = star(12, Model::Strict);
        scenario.plan.network.levels.push(LevelSpec::new(Level::new(6).unwrap(), Demand::Factor(1.0)));
        scenario.plan = scenario.plan.network.plan().unwrap();
        let outcome = scenario.run();
        assert!(outcome.levels[7].max_ps < outcome.levels[6].max_ps);
        for level in [6, 7] {
            assert_eq!(outcome.levels[level].violations, 0, "{level}");
            assert!(outcome.levels[level].max_ps * 10 > scenario.bounds_ps()[level].unwrap() * 5, "{level}");
        }
    }
}
