//! Random networks, each attacked: the verdict on the models.

use qjump_ebpf::{Charge, Level, limiter::Oversize};
use rand::RngExt as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};
use rayon::prelude::*;

use super::{
    adversary::search,
    limiter::Kind,
    scenario::{Blocking, Destinations, Load, Phases, Scenario, scramble},
    topology::{Routing, Shape},
};
use crate::{
    plan::{Delays, Demand, LevelPlan, LevelSpec, Model, Network, PlanError, delays::on_wire},
    units::{Nanos, Rate},
};

/// What to attack, and how hard.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// How many networks.
    pub networks: u64,
    /// Seed of the first.
    pub seed: u64,
    /// Runs of the adversary on each.
    pub steps: u32,
    /// One model alone.
    pub model: Option<Model>,
    /// Attack beyond what is promised: level 7 alone, many destinations, nothing fixed but store and forward, and an
    /// epoch of so many times the bound.
    pub stretch: Option<f64>,
}

/// The result for one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Networks that had a plan.
    pub networks: u64,
    /// Networks in which some packet of a level with a bound came later than it.
    pub broken: u64,
    /// The greatest time over bound, and the number of the network that had it.
    pub worst: (f64, u64),
    /// How many networks came within 10% of a bound.
    pub tight: u64,
    /// Runs.
    pub runs: u64,
}

impl Verdict {
    fn merge(mut self, other: &Self) -> Self {
        self.networks += other.networks;
        self.broken += other.broken;
        self.tight += other.tight;
        self.runs += other.runs;
        // The lower number wins a tie, so that the order of threads does not show.
        if other.worst.0 > self.worst.0 || (other.worst.0 == self.worst.0 && other.worst.1 < self.worst.1) {
            self.worst = other.worst;
        }
        self
    }
}

/// Networks whose hosts would send more than this are left to the adversary's own schedules.
const MOST_PACKETS: f64 = 20_000.0;

/// The models in the order of [`Campaign::run`]'s result.
pub const MODELS: [Model; 3] = [Model::Strict, Model::Paper, Model::FanIn];

impl Campaign {
    /// Network number `index`, or why it has no plan.
    ///
    /// # Errors
    /// If what was drawn cannot be planned; such networks are left out.
    pub fn network(&self, index: u64) -> Result<Scenario, PlanError> {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(scramble(self.seed, index));
        let shape = match random.random_range(0..10) {
            0..3 => Shape::Star { hosts: random.random_range(2..=20) },
            3..6 => Shape::LeafSpine {
                leaves: random.random_range(2..=4),
                hosts_per_leaf: random.random_range(1..=5),
                spines: random.random_range(1..=3),
            },
            6..7 => Shape::FatTree { k: 4 },
            _ => Shape::Chain { groups: (0..random.random_range(2..=5)).map(|_| random.random_range(1..=5)).collect() },
        };
        // Perhaps the last host only receives, and the plan does not count it.
        let beside = shape.hosts() > 2 && random.random_bool(0.5);
        let hosts = shape.hosts() - u32::from(beside);
        let model = self.model.unwrap_or(MODELS[random.random_range(0..3)]);
        let rates = [10_000_000u64, 100_000_000, 1_000_000_000, 10_000_000_000, 100_000_000_000];
        let rate_bps = rates[random.random_range(0..rates.len())];
        let max_packet = random.random_range(60..=1_514);
        let mtu = random.random_range(60..=1_514);
        let blocking = [Blocking::None, Blocking::Whole, Blocking::Whole, Blocking::Part][random.random_range(0..4)];
        let host_burst = if random.random_bool(0.3) { random.random_range(0..=65_536) } else { 0 };
        let blocking = if self.stretch.is_some() { Blocking::None } else { blocking };
        let frame_ns = 1_538.0 * 8e9 / rate_bps as f64;
        let switch_delay = Nanos::from_ns((random.random_range(0.0..2.0) * frame_ns) as u64);
        let switch_delay = if self.stretch.is_some() { Nanos::from_ns(0) } else { switch_delay };
        let chain = matches!(shape, Shape::Chain { .. });
        let destinations = match (model, self.stretch) {
            (Model::FanIn, None) => Destinations::One,
            _ if chain => Destinations::One,
            (_, Some(_)) => Destinations::Any,
            _ => [Destinations::One, Destinations::Any, Destinations::Any][random.random_range(0..3)],
        };
        let mut levels = Vec::new();
        for number in (1..8).rev() {
            let wanted = match (number, self.stretch) {
                (7, _) => true,
                (_, Some(_)) => false,
                _ => random.random_bool(0.25),
            };
            if !wanted {
                continue;
            }
            let factor = match random.random_range(0..10) {
                _ if self.stretch.is_some() => 1.0,
                0..6 => 1.0,
                6..8 => random.random_range(0.2..1.0),
                _ => random.random_range(1.0..f64::from(hosts).max(1.5)),
            };
            let level = Level::new(number).unwrap_or(Level::STRICTEST);
            let charge = match random.random_range(0..4) {
                0 if self.stretch.is_none() => Some(Charge::Byte),
                1 => Some(Charge::Packet),
                _ => None,
            };
            let tolerance = match charge {
                Some(Charge::Packet) if self.stretch.is_none() && random.random_bool(0.3) => {
                    Nanos::from_ns((random.random_range(0.0..3.0) * frame_ns) as u64)
                }
                _ => Nanos::from_ns(0),
            };
            let packet_bps = rate_bps as f64 / f64::from(hosts);
            let demand = match random.random_range(0..6) {
                0 if self.stretch.is_none() => {
                    Demand::Rate(Rate::from_bps((packet_bps * random.random_range(0.01..0.4)) as u64))
                }
                _ => Demand::Factor(factor),
            };
            let burst =
                (charge == Some(Charge::Byte) && random.random_bool(0.4)).then(|| random.random_range(1_540..=20_000));
            levels.push(LevelSpec {
                charge,
                burst,
                max_packet: (self.stretch.is_none() && random.random_bool(0.3))
                    .then(|| random.random_range(60..=1_514)),
                oversize: Oversize::Drop,
                tolerance,
                ..LevelSpec::new(level, demand)
            });
        }
        let mut network = Network {
            hosts,
            link_rate: Rate::from_bps(rate_bps),
            max_packet,
            delays: Delays::Given(Nanos::from_ns(0)),
            wire_overhead: 24,
            tagged: false,
            model,
            levels,
        };
        // A fan-in plan is for links of one rate.
        let uplink = if model == Model::FanIn { 1 } else { [1, 1, 2, 4][random.random_range(0..4)] };
        let mut scenario = Scenario {
            plan: crate::plan::Plan { network: network.clone(), levels: Vec::new() },
            shape,
            routing: Routing::Destination,
            uplink,
            switch_delay,
            load: Load::Saturating,
            destinations,
            phases: Phases::Random,
            mixed: false,
            limiter: Kind::Gcra,
            mtu,
            blocking,
            host_burst,
            best_effort: None,
            everyone: false,
            buffer: None,
            drift_ppm: 0,
            epochs: 4,
            seed: scramble(self.seed, index),
        };
        network.delays = scenario.delays();
        scenario.plan = network.plan()?;
        if let Some(stretch) = self.stretch {
            let packet_ns = scenario.plan.network.time_ns(f64::from(on_wire(max_packet, 24)));
            let bound_ns = packet_ns * f64::from(hosts + scenario.shape.hops());
            for level in &mut scenario.plan.levels {
                level.bound_ns = Some(bound_ns);
                level.epoch_ns = Some(bound_ns * stretch);
            }
        }
        Ok(scenario)
    }

    /// Attacks one network: its greatest time over bound, and the runs it took.
    pub fn attack(&self, scenario: &Scenario) -> (f64, u64) {
        let bounds = scenario.bounds_ps();
        // As published, a promise is for the strictest level alone, a packet at a time. It is attacked even where
        // the plan does not call it guaranteed because fixed delays vary too much for the proof.
        let promised = |level: usize| {
            let published = |plan: &LevelPlan| {
                plan.spec.level.index() == level
                    && plan.charge == Charge::Packet
                    && matches!(plan.spec.demand, Demand::Factor(factor) if factor <= 1.0)
            };
            scenario.plan.network.model != Model::Paper || scenario.plan.levels.first().is_some_and(published)
        };
        let mut judged = scenario.clone();
        for plan in &mut judged.plan.levels {
            if !promised(plan.spec.level.index()) {
                plan.bound_ns = None;
            }
        }
        let ratio = |outcome: &super::outcome::Outcome| {
            (0..bounds.len())
                .filter(|&level| promised(level))
                .filter_map(|level| {
                    let lost = outcome.levels[level].lost > 0;
                    Some(if lost { f64::INFINITY } else { outcome.levels[level].max_ps as f64 / bounds[level]? as f64 })
                })
                .fold(0.0, f64::max)
        };
        let mut worst = 0.0f64;
        let mut runs = 0;
        // As many epochs as there is time for: levels may be a thousand times as fast as the slowest.
        let packets: f64 = scenario
            .plan
            .levels
            .iter()
            .filter_map(|plan| {
                Some(plan.rate_bps? / 8.0 * scenario.length_ps() as f64 * 1e-12 / f64::from(plan.max_packet))
            })
            .sum::<f64>()
            * f64::from(scenario.plan.network.hosts);
        let own_traffic: &[Phases] = if packets < MOST_PACKETS { &[Phases::Aligned, Phases::Random] } else { &[] };
        for &phases in own_traffic {
            for mixed in [false, true] {
                worst = worst.max(ratio(&Scenario { phases, mixed, ..judged.clone() }.run()));
                runs += 1;
            }
        }
        if judged.plan.levels.iter().any(|level| level.bound_ns.is_some()) {
            let found = search(&judged, self.steps);
            worst = worst.max(found.ratio);
            runs += u64::from(found.runs);
        }
        (worst, runs)
    }

    /// Attacks all networks, on as many threads as there are; one verdict for each of [`MODELS`].
    pub fn run(&self, progress: impl Fn(u64) + Sync) -> [Verdict; 3] {
        let done = std::sync::atomic::AtomicU64::new(0);
        (0..self.networks)
            .into_par_iter()
            .map(|index| {
                let mut verdicts: [Verdict; 3] = Default::default();
                if let Ok(scenario) = self.network(index) {
                    let (worst, runs) = self.attack(&scenario);
                    let model = MODELS.iter().position(|&model| model == scenario.plan.network.model).unwrap_or(0);
                    verdicts[model] = Verdict {
                        networks: 1,
                        broken: u64::from(worst > 1.0),
                        worst: (worst, index),
                        tight: u64::from(worst >= 0.9),
                        runs,
                    };
                }
                progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1);
                verdicts
            })
            .reduce(Default::default, |a, b| {
                let [a0, a1, a2] = a;
                [a0.merge(&b[0]), a1.merge(&b[1]), a2.merge(&b[2])]
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_threads_does_not_show() {
        let campaign = Campaign { networks: 40, seed: 3, steps: 10, model: None, stretch: None };
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| campaign.run(|_| ()))
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(5));
        assert_ne!(one, Campaign { seed: 4, ..campaign }.run(|_| ()));
    }

    #[test]
    fn too_short_an_epoch_is_found_out() {
        // With epochs of a third of the bound, the same attack breaks what it otherwise does not.
        let campaign = Campaign { networks: 200, seed: 1, steps: 60, model: Some(Model::FanIn), stretch: Some(0.33) };
        assert!(campaign.run(|_| ())[2].broken > 0);
    }

    #[test]
    fn no_promise_is_broken_in_random_networks() {
        let networks = if cfg!(debug_assertions) { 300 } else { 3_000 };
        let campaign = Campaign { networks, seed: 1, steps: 20, model: None, stretch: None };
        for (model, verdict) in MODELS.iter().zip(campaign.run(|_| ())) {
            eprintln!("{model:?} {verdict:?}");
            assert!(verdict.networks > networks / 6, "{model:?}: {verdict:?}");
            assert_eq!(verdict.broken, 0, "{model:?}: {verdict:?}");
            // An attack that never comes near proves nothing.
            assert!(verdict.worst.0 > 0.8, "{model:?}: {verdict:?}");
        }
    }
}
