//! The planner: from a network to epochs, rates and bounds. Pure: no clock, no I/O.
//!
//! # The published model
//! With `n` hosts, largest packet `P`, slowest link `R` and fixed delays `eps`, a packet of a level
//! that every host uses for at most one packet at a time waits for at most one packet of each host:
//! `D = n P / R + eps` (QJump, NSDI 2015, equation 1). Hosts do not share a clock, so their windows
//! are out of phase by up to one window, and the network epoch is doubled: `T = 2 n P / R + eps`
//! (equation 2). A level with throughput factor `f` may send `f P` in an epoch. Its bound is `D` as
//! long as at most `n / f` hosts send at that level at once, so only `f <= 1` holds for all hosts.
//!
//! What the published bound leaves out: it is for the strictest level alone (levels above also delay a
//! level), and it holds for links that never get slower from edge to core, strict priority in every
//! switch and on the sending host itself, and a limiter on every host. The bound begins when a packet
//! leaves its host: what waits in the host's own qdisc behind other traffic is not in it.
//!
//! `P` counts as it does on the wire: padded to a frame of 64 bytes, and 24 bytes more.

mod text;

use qjump_ebpf::{
    Config, LEVELS, Level, LevelLimit, LevelRecord,
    frame::{MIN_FRAME, WIRE_OVERHEAD},
    limiter::{LimitError, Oversize},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::{Nanos, Rate, show_rate};

/// Version of the JSON of a plan.
pub const SCHEMA_VERSION: u32 = 1;

/// How the epoch of a guaranteed level follows from the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Model {
    /// T = 2nP/R + eps, as published.
    #[default]
    Paper,
}

/// What a level may send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Demand {
    /// `f` times the largest packet in each epoch.
    Factor(f64),
    /// Marked, never limited.
    Unlimited,
}

/// One level as the user asks for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelSpec {
    /// Level 1 to 7.
    pub level: Level,
    /// What it may send.
    pub demand: Demand,
    /// What happens to larger packets.
    pub oversize: Oversize,
    /// How much earlier than one epoch after the last a packet may come. The epoch grows by as much, so
    /// that spacing, and with it the bound, stay what they are. Packet-charged levels only.
    pub tolerance: Nanos,
}

/// A network and its levels.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Hosts that may send, n.
    pub hosts: u32,
    /// Rate of the slowest link, R.
    pub link_rate: Rate,
    /// Largest packet of guaranteed levels, P: L2 bytes without FCS.
    pub max_packet: u32,
    /// Fixed delays of a path, eps.
    pub epsilon: Nanos,
    /// Bytes that a frame takes on the wire beside its L2 bytes; 0 for published numbers.
    pub wire_overhead: u32,
    /// The model.
    pub model: Model,
    /// The levels, in any order.
    pub levels: Vec<LevelSpec>,
}

/// A plan that holds under the conditions it states.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What was asked for.
    pub network: Network,
    /// The strictest level first.
    pub levels: Vec<LevelPlan>,
}

/// One level of a [`Plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct LevelPlan {
    /// What was asked for.
    pub spec: LevelSpec,
    /// Time between the budgets of the level, ns; `None` if it is unlimited.
    pub epoch_ns: Option<f64>,
    /// Rate in bit/s of wire bytes; `None` if it is unlimited.
    pub rate_bps: Option<f64>,
    /// Wire bytes that may leave at once; `None` if it is unlimited.
    pub burst_bytes: Option<f64>,
    /// Longest time in the network, ns; `None` if there is no bound.
    pub bound_ns: Option<f64>,
    /// Whether the bound holds whatever the other hosts send.
    pub guaranteed: bool,
    /// How many hosts may send at this level at once for the bound to hold; `None` without a bound.
    pub max_senders: Option<u32>,
    /// Largest packet, L2 bytes.
    pub max_packet: u32,
}

/// Why there is no plan. Each says what to change.
#[derive(Debug, Error, PartialEq)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum PlanError {
    #[error("hosts is 0; give the number of hosts that may send, at least 1 (--hosts)")]
    NoHosts,
    #[error("max-packet is {0} bytes; a frame has at least 14 and at most 65535 L2 bytes (--max-packet)")]
    PacketSize(u32),
    #[error("there is no level; give at least one, for example --level 7:1")]
    NoLevels,
    #[error("level {0} is given twice; keep one of the two")]
    Twice(Level),
    #[error("level 0 is best effort and cannot be limited; use levels 1 to 7")]
    LevelZero,
    #[error("level {level}: the factor is {factor}; it must be a number above 0 (1 is the guaranteed level)")]
    Factor { level: Level, factor: f64 },
    #[error(
        "level {level}: factor {factor} allows {} on a link of {}; the largest factor that fits is {largest:.2}",
        show_rate(*rate_bps), show_rate(*link_bps)
    )]
    AboveLink { level: Level, factor: f64, rate_bps: f64, link_bps: f64, largest: f64 },
    #[error(
        "the levels together allow a host {} on a link of {}: the lower ones could not have what they are promised; \
         lower a factor",
        show_rate(*sum_bps), show_rate(*link_bps)
    )]
    SumAboveLink { sum_bps: f64, link_bps: f64 },
    #[error("wire-overhead is {0} bytes; a frame takes 24 beside its L2 bytes, and no tunnel or tag adds over 1000")]
    WireOverhead(u32),
    #[error("level {level}: a tolerance is for levels of factor 1 or less; a level of factor {factor} has a burst")]
    Tolerance { level: Level, factor: f64 },
    #[error("the epoch would be {0:.3e} ns, too long to count; hosts, max-packet or epsilon is too large")]
    Overflow(f64),
    #[error("level {level}: {source}")]
    Limit { level: Level, source: LimitError },
}

impl Network {
    /// Bytes that the largest packet takes on the wire.
    pub fn packet_on_wire(&self) -> u32 {
        match self.wire_overhead {
            0 => self.max_packet,
            overhead => self.max_packet.max(MIN_FRAME) + overhead,
        }
    }

    /// Time of one largest packet on the slowest link, `P / R`, ns.
    pub fn packet_time_ns(&self) -> f64 {
        f64::from(self.packet_on_wire()) * 8e9 / self.link_rate.bps() as f64
    }

    /// Computes the plan.
    ///
    /// # Errors
    /// If a number is out of range, or a level cannot have what it asks for.
    pub fn plan(&self) -> Result<Plan, PlanError> {
        if self.hosts == 0 {
            return Err(PlanError::NoHosts);
        }
        if !(14..=65_535).contains(&self.max_packet) {
            return Err(PlanError::PacketSize(self.max_packet));
        }
        if self.wire_overhead > 1_000 {
            return Err(PlanError::WireOverhead(self.wire_overhead));
        }
        if self.levels.is_empty() {
            return Err(PlanError::NoLevels);
        }
        let mut specs = self.levels.clone();
        specs.sort_by_key(|spec| std::cmp::Reverse(spec.level));
        if let Some(pair) = specs.windows(2).find(|pair| pair[0].level == pair[1].level) {
            return Err(PlanError::Twice(pair[0].level));
        }

        let fan_in_ns = f64::from(self.hosts) * self.packet_time_ns();
        let epsilon_ns = self.epsilon.ns() as f64;
        let (bound_ns, epoch_ns) = match self.model {
            Model::Paper => (fan_in_ns + epsilon_ns, 2.0 * fan_in_ns + epsilon_ns),
        };
        if epoch_ns > qjump_ebpf::limiter::MAX_BURST_NS as f64 {
            return Err(PlanError::Overflow(epoch_ns));
        }
        let levels = specs
            .iter()
            .enumerate()
            .map(|(position, spec)| self.level(*spec, position, bound_ns, epoch_ns))
            .collect::<Result<Vec<LevelPlan>, _>>()?;
        let sum_bps: f64 = levels.iter().filter_map(|level| level.rate_bps).sum();
        let link_bps = self.link_rate.bps() as f64;
        if sum_bps > link_bps {
            return Err(PlanError::SumAboveLink { sum_bps, link_bps });
        }
        Ok(Plan { network: self.clone(), levels })
    }

    fn level(&self, spec: LevelSpec, position: usize, bound_ns: f64, epoch_ns: f64) -> Result<LevelPlan, PlanError> {
        let level = spec.level;
        if level == Level::BEST_EFFORT {
            return Err(PlanError::LevelZero);
        }
        let Demand::Factor(factor) = spec.demand else {
            return Ok(LevelPlan {
                spec,
                epoch_ns: None,
                rate_bps: None,
                burst_bytes: None,
                bound_ns: None,
                guaranteed: false,
                max_senders: None,
                max_packet: u32::MAX,
            });
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(PlanError::Factor { level, factor });
        }
        if factor > 1.0 && spec.tolerance.ns() > 0 {
            return Err(PlanError::Tolerance { level, factor });
        }
        let packet_bits = f64::from(self.packet_on_wire()) * 8.0;
        let link_bps = self.link_rate.bps() as f64;
        let rate_bps = factor * packet_bits * 1e9 / epoch_ns;
        if rate_bps > link_bps {
            return Err(PlanError::AboveLink {
                level,
                factor,
                rate_bps,
                link_bps,
                largest: factor * link_bps / rate_bps,
            });
        }
        // Up to f = 1 a budget is one packet, and a lower factor makes it come less often. Above, it is
        // f packets' worth of bytes in every epoch.
        let (level_epoch_ns, rate_bps, burst_bytes) = if factor <= 1.0 {
            let spacing_ns = epoch_ns / factor;
            let tolerance_ns = spec.tolerance.ns() as f64;
            let level_epoch_ns = spacing_ns + tolerance_ns;
            let burst = f64::from(self.packet_on_wire()) * (1.0 + tolerance_ns / level_epoch_ns);
            (level_epoch_ns, packet_bits * 1e9 / level_epoch_ns, burst)
        } else {
            (epoch_ns, rate_bps, factor * f64::from(self.packet_on_wire()))
        };
        // Above f = n a single host sends more in an epoch than the bound has room for.
        let max_senders = (f64::from(self.hosts) / factor.max(1.0)).floor() as u32;
        let plan = LevelPlan {
            spec,
            epoch_ns: Some(level_epoch_ns),
            rate_bps: Some(rate_bps),
            burst_bytes: Some(burst_bytes),
            bound_ns: (max_senders > 0).then_some(bound_ns),
            guaranteed: factor <= 1.0 && position == 0,
            max_senders: (max_senders > 0).then_some(max_senders),
            // A level above f = 1 has a budget of f P, and may use it up with one packet.
            max_packet: if factor <= 1.0 {
                self.max_packet
            } else {
                (burst_bytes as u32).saturating_sub(self.wire_overhead.max(WIRE_OVERHEAD))
            },
        };
        plan.limit().map_err(|source| PlanError::Limit { level, source })?;
        Ok(plan)
    }
}

impl LevelPlan {
    /// The throughput factor, if the level has one.
    pub fn factor(&self) -> Option<f64> {
        match self.spec.demand {
            Demand::Factor(factor) => Some(factor),
            Demand::Unlimited => None,
        }
    }

    /// The limit that enforces this level. Rounded to the safe side: an epoch is never shorter, a rate
    /// and a burst never larger than planned.
    ///
    /// # Errors
    /// If the limiter cannot express it.
    pub fn limit(&self) -> Result<LevelLimit, LimitError> {
        let (Some(epoch_ns), Some(rate_bps), Some(burst)) = (self.epoch_ns, self.rate_bps, self.burst_bytes) else {
            return Ok(LevelLimit::UNLIMITED);
        };
        if self.factor().is_some_and(|factor| factor <= 1.0) {
            LevelLimit::per_packet(
                epoch_ns.ceil() as u64,
                self.spec.tolerance.ns(),
                self.max_packet,
                self.spec.oversize,
            )
        } else {
            LevelLimit::per_byte(rate_bps as u64, burst as u64, self.max_packet, self.spec.oversize)
        }
    }

    fn record(&self) -> LevelRecord {
        LevelRecord {
            factor: self.factor().unwrap_or(0.0),
            epoch_ns: self.epoch_ns.unwrap_or(0.0),
            rate_bps: self.rate_bps.unwrap_or(0.0),
            bound_ns: self.bound_ns.unwrap_or(-1.0),
            max_senders: self.max_senders.unwrap_or(0),
            guaranteed: u32::from(self.guaranteed),
        }
    }
}

impl Plan {
    /// What the programs need of this plan. Generation and time are for the loader to fill in.
    ///
    /// # Errors
    /// If a limit cannot be expressed; a plan from [`Network::plan`] has been checked for it.
    pub fn config(&self, flags: u64) -> Result<Config, PlanError> {
        let mut config = Config { flags, ..Config::EMPTY };
        config.plan.hosts = self.network.hosts;
        config.plan.link_rate_bps = self.network.link_rate.bps();
        config.plan.epsilon_ns = self.network.epsilon.ns();
        for level in &self.levels {
            let index = level.spec.level.index();
            config.limits[index] =
                level.limit().map_err(|source| PlanError::Limit { level: level.spec.level, source })?;
            config.plan.levels[index] = level.record();
        }
        Ok(config)
    }

    /// The plan as JSON, in the schema that README describes.
    pub fn to_json(&self) -> serde_json::Value {
        let network = &self.network;
        serde_json::json!({
            "schema_version": SCHEMA_VERSION,
            "model": network.model,
            "hosts": network.hosts,
            "link_rate_bps": network.link_rate.bps(),
            "epsilon_ns": network.epsilon.ns(),
            "levels": self.levels.iter().map(|level| serde_json::json!({
                "level": level.spec.level.number(),
                "factor": level.factor(),
                "max_packet_bytes": (level.epoch_ns.is_some()).then_some(level.max_packet),
                "epoch_ns": level.epoch_ns,
                "rate_bps": level.rate_bps,
                "burst_bytes": level.burst_bytes,
                "bound_ns": level.bound_ns,
                "guaranteed": level.guaranteed,
                "max_senders": level.max_senders,
                "terms": level.bound_ns.map(|_| serde_json::json!({
                    "fan_in_ns": f64::from(network.hosts) * network.packet_time_ns(),
                    "epsilon_ns": network.epsilon.ns(),
                })),
            })).collect::<Vec<_>>(),
        })
    }
}

/// The wire overhead of Ethernet, for callers without an opinion.
pub const fn default_wire_overhead() -> u32 {
    WIRE_OVERHEAD
}

/// The bound of a level in a configuration in force, ns.
pub fn bound_in_force(config: &Config, level: Level) -> Option<f64> {
    let bound = config.plan.levels[level.index()].bound_ns;
    (bound >= 0.0).then_some(bound)
}

const _: () = assert!(LEVELS == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(hosts: u32, max_packet: u32, rate: &str, levels: &[(u8, f64)]) -> Network {
        Network {
            hosts,
            link_rate: rate.parse().unwrap(),
            max_packet,
            epsilon: Nanos::from_ns(0),
            wire_overhead: 0,
            model: Model::Paper,
            levels: levels
                .iter()
                .map(|&(level, factor)| LevelSpec {
                    level: Level::new(level).unwrap(),
                    demand: Demand::Factor(factor),
                    oversize: Oversize::Demote,
                    tolerance: Nanos::from_ns(0),
                })
                .collect(),
        }
    }

    fn close(a: f64, b: f64, relative: f64) -> bool {
        (a - b).abs() <= b.abs() * relative
    }

    /// The published configurations: hosts, P, R, nP/R and 2nP/R in ns, as printed, to three digits.
    #[test]
    fn published_configurations() {
        for (hosts, packet, rate, bound_ns, epoch_ns) in [
            (12, 256, "10gbit", 2_460.0, 4_920.0),
            (12, 1518, "10gbit", 14_570.0, 29_150.0),
            (144, 9000, "10gbit", 1_036_800.0, 2_073_600.0),
            (300, 256, "10gbit", 61_400.0, 122_900.0),
            (1000, 64, "10gbit", 51_200.0, 102_400.0),
            (1000, 256, "10gbit", 204_800.0, 409_600.0),
            (1000, 1500, "10gbit", 1_200_000.0, 2_400_000.0),
            (12, 1500, "10mbit", 14_400_000.0, 28_800_000.0),
        ] {
            let plan = network(hosts, packet, rate, &[(7, 1.0)]).plan().unwrap();
            let level = &plan.levels[0];
            assert!(close(level.bound_ns.unwrap(), bound_ns, 1e-3), "{hosts} {packet}: {level:?}");
            assert!(close(level.epoch_ns.unwrap(), epoch_ns, 1e-3), "{hosts} {packet}: {level:?}");
        }
    }

    #[test]
    fn the_rate_of_factor_one_does_not_depend_on_the_packet() {
        for packet in [64, 256, 1518] {
            let plan = network(12, packet, "10gbit", &[(7, 1.0)]).plan().unwrap();
            assert!(close(plan.levels[0].rate_bps.unwrap(), 416.67e6, 1e-4));
        }
        assert!(close(
            network(300, 256, "10gbit", &[(7, 1.0)]).plan().unwrap().levels[0].rate_bps.unwrap(),
            16.67e6,
            1e-3
        ));
        assert!(close(
            network(1000, 256, "10gbit", &[(7, 1.0)]).plan().unwrap().levels[0].rate_bps.unwrap(),
            5e6,
            1e-9
        ));
    }

    #[test]
    fn line_rate_needs_a_factor_of_twice_the_hosts() {
        assert!(network(12, 256, "10gbit", &[(5, 24.0)]).plan().is_ok());
        let error = network(12, 256, "10gbit", &[(5, 25.0)]).plan().unwrap_err();
        assert_eq!(
            error.to_string(),
            "level 5: factor 25 allows 10.417gbit on a link of 10gbit; the largest factor that fits is 24.00"
        );
    }

    #[test]
    fn only_the_strictest_level_of_factor_one_is_guaranteed() {
        let plan = network(12, 256, "10gbit", &[(5, 4.0), (7, 1.0), (6, 1.0)]).plan().unwrap();
        let seen: Vec<_> = plan.levels.iter().map(|l| (l.spec.level.number(), l.guaranteed, l.max_senders)).collect();
        assert_eq!(seen, [(7, true, Some(12)), (6, false, Some(12)), (5, false, Some(3))]);
    }

    #[test]
    fn a_tolerance_lengthens_the_epoch_and_leaves_spacing_and_bound() {
        let plain = network(12, 256, "10gbit", &[(7, 1.0)]).plan().unwrap();
        let mut early = network(12, 256, "10gbit", &[(7, 1.0)]);
        early.levels[0].tolerance = Nanos::from_ns(1_000);
        let early = early.plan().unwrap();
        assert_eq!(early.levels[0].bound_ns, plain.levels[0].bound_ns);
        assert_eq!(early.levels[0].epoch_ns.unwrap() - 1_000.0, plain.levels[0].epoch_ns.unwrap());
    }

    #[test]
    fn refuses_with_the_remedy() {
        let ok = || network(12, 256, "10gbit", &[(7, 1.0)]);
        let with = |change: fn(&mut Network)| {
            let mut network = ok();
            change(&mut network);
            network.plan().unwrap_err()
        };
        assert_eq!(with(|n| n.hosts = 0), PlanError::NoHosts);
        assert_eq!(with(|n| n.max_packet = 13), PlanError::PacketSize(13));
        assert_eq!(with(|n| n.levels.clear()), PlanError::NoLevels);
        assert_eq!(with(|n| n.levels.push(n.levels[0])), PlanError::Twice(Level::STRICTEST));
        assert_eq!(with(|n| n.levels[0].level = Level::BEST_EFFORT), PlanError::LevelZero);
        for factor in [0.0, -1.0, f64::INFINITY] {
            let mut network = ok();
            network.levels[0].demand = Demand::Factor(factor);
            assert_eq!(network.plan().unwrap_err(), PlanError::Factor { level: Level::STRICTEST, factor });
        }
        let mut nan = ok();
        nan.levels[0].demand = Demand::Factor(f64::NAN);
        assert!(matches!(nan.plan(), Err(PlanError::Factor { .. })));
        assert!(matches!(with(|n| n.epsilon = "9000s".parse().unwrap()), PlanError::Overflow(_)));
        assert!(matches!(
            with(|n| {
                n.levels[0].demand = Demand::Factor(2.0);
                n.levels[0].tolerance = Nanos::from_ns(1);
            }),
            PlanError::Tolerance { .. }
        ));
    }

    #[test]
    fn a_host_cannot_promise_more_than_its_link_or_its_bound() {
        // One host alone sends 4 x 256 bytes, more than 2 x 256 bytes' time of bound.
        let plan = network(2, 256, "10gbit", &[(7, 4.0)]).plan().unwrap();
        assert_eq!((plan.levels[0].bound_ns, plan.levels[0].max_senders), (None, None));
        let error = network(12, 256, "10gbit", &[(7, 10.0), (6, 10.0), (5, 10.0)]).plan().unwrap_err();
        assert!(matches!(error, PlanError::SumAboveLink { .. }), "{error}");
        assert!(error.to_string().contains("12.5gbit"), "{error}");
        let mut wide = network(12, 256, "10gbit", &[(7, 1.0)]);
        wide.wire_overhead = u32::MAX - 100;
        assert!(matches!(wide.plan(), Err(PlanError::WireOverhead(_))));
    }

    proptest! {
        #[test]
        fn every_plan_can_be_enforced_and_never_exceeds_itself(
            hosts in 1u32..20_000, packet in 14u32..9_600, bps in 1_000_000u64..400_000_000_000,
            epsilon in 0u64..10_000_000, factor in 0.1f64..64.0, overhead in prop::sample::select(vec![0u32, 24, 28]),
        ) {
            let network = Network {
                hosts, link_rate: Rate::from_bps(bps), max_packet: packet, epsilon: Nanos::from_ns(epsilon),
                wire_overhead: overhead, model: Model::Paper,
                levels: vec![LevelSpec {
                    level: Level::STRICTEST, demand: Demand::Factor(factor), oversize: Oversize::Drop, tolerance: Nanos::from_ns(0),
                }],
            };
            if let Ok(plan) = network.plan() {
                let config = plan.config(0).unwrap();
                let limit = &config.limits[7];
                let level = &plan.levels[0];
                if factor <= 1.0 {
                    prop_assert!(limit.burst_ns() as f64 >= level.epoch_ns.unwrap());
                } else {
                    // One packet of the whole burst passes, one byte more does not, and no price is too low.
                    let burst = level.burst_bytes.unwrap() as u32;
                    if burst < qjump_ebpf::limiter::MAX_COST_BYTES {
                        let price = limit.cost_ns(0, 2, burst);
                        prop_assert!(price.is_some_and(|ns| ns as f64 >= f64::from(burst) * 8e9 / level.rate_bps.unwrap() - 1.0));
                        prop_assert_eq!(limit.cost_ns(0, 2, burst + 1), None);
                    }
                }
            }
        }
    }
}
