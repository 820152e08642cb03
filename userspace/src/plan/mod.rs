//! The planner: from a network to epochs, rates and bounds. Pure: no clock, no I/O.
//!
//! `n` hosts send over links of at least rate `R`. A level of factor `f` may send `f` packets of at most
//! `P` bytes in each *epoch*. A packet of the level is then at its destination within its *bound*: one
//! packet of each host, what the levels above send meanwhile, and the fixed delays `eps` of the path.
//! [`bound`] has the equation, its proof and what each [`Model`] assumes; [`delays`] has `eps`.
//!
//! `P` counts as it does on the wire: padded to a frame of 64 bytes, and 24 bytes more.

pub mod backward;
pub mod bound;
pub mod delays;
mod text;

pub use delays::{Delays, Path};
pub use text::{Explanation, difference, show_factor};

use bound::{Demand as Sent, Envelope, least_fixed_point};
use delays::{Fixed, on_wire};
use qjump_ebpf::{
    Charge, Config, LEVELS, Level, LevelLimit, LevelRecord,
    frame::{VLAN_TAG, WIRE_OVERHEAD, wire_bytes},
    layout::GRANT_ONLY_SHIFT,
    limiter::{LimitError, MAX_COST_BYTES, Oversize},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::units::{Nanos, Rate, show_rate};

/// Version of the JSON of a plan.
pub const SCHEMA_VERSION: u32 = 1;

/// A bound for fewer than all hosts is sought among numbers of senders that leave some of the link: closer to a full one
/// it would be a thousand times as long, and of no use.
const MOST_LOAD: f64 = 0.9;

/// Largest frame of Ethernet without tags, L2 bytes without FCS.
pub const ETHERNET_MTU: u32 = 1_514;

/// Most hosts in a plan. Beyond, an epoch at any usual rate is longer than the limiter counts.
pub const MAX_HOSTS: u32 = 1_000_000;

/// How the epoch of a level of factor 1 follows from the network. See [`bound`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Model {
    /// T = 2D: proven for any destinations; every level of factor 1 is guaranteed.
    #[default]
    Strict,
    /// T = 2nP/R + eps, as published in 2015.
    Paper,
    /// T = D: proven where contending packets go to one destination.
    FanIn,
}

/// What happens to a packet that finds its level's budget used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OverRule {
    /// It is dropped.
    Police,
    /// It waits in the host's queue.
    Pace,
    /// It leaves at the next lower level that has room for it.
    Demote,
}

/// What a level may send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Demand {
    /// `f` times the largest packet in each epoch.
    Factor(f64),
    /// A rate of wire bytes for each host.
    Rate(Rate),
    /// Marked, never limited.
    Unlimited,
}

/// Who may use a level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Claims {
    /// Any process, by `SO_PRIORITY`; the kernel asks for CAP_NET_RAW or CAP_NET_ADMIN at level 7 alone.
    #[default]
    Allow,
    /// Sockets that were granted it, or a higher one (`qjump run`, `qjump tag`).
    GrantOnly,
}

/// One level as the user asks for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelSpec {
    /// Level 1 to 7.
    pub level: Level,
    /// What it may send.
    pub demand: Demand,
    /// What a packet costs; by default a whole `P` up to factor 1, its bytes above or with a burst.
    pub charge: Option<Charge>,
    /// Largest packet, L2 bytes without FCS; by default the network's.
    pub max_packet: Option<u32>,
    /// Wire bytes that may leave at once, for levels charged by bytes; by default one epoch's.
    pub burst: Option<u32>,
    /// Whether a bound for fewer than all hosts is of no use.
    pub every_host: bool,
    /// What happens to larger packets.
    pub oversize: Oversize,
    /// What happens to packets that find the budget used up; by default they wait where the host's queue can
    /// hold them, and are dropped where it cannot.
    pub over: Option<OverRule>,
    /// How much earlier than one epoch after the last a packet may come. The epoch grows by as much, so
    /// that spacing, and with it the bound, stay what they are. Packet-charged levels only.
    pub tolerance: Nanos,
    /// Who may use it.
    pub claims: Claims,
}

impl LevelSpec {
    /// A level with nothing special about it.
    pub const fn new(level: Level, demand: Demand) -> Self {
        Self {
            level,
            demand,
            charge: None,
            max_packet: None,
            burst: None,
            every_host: false,
            oversize: Oversize::Demote,
            over: None,
            tolerance: Nanos::from_ns(0),
            claims: Claims::Allow,
        }
    }
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
    pub delays: Delays,
    /// Bytes that a frame takes on the wire beside its L2 bytes; 0 for published numbers.
    pub wire_overhead: u32,
    /// Whether the program gives frames a priority tag, which is four bytes more.
    pub tagged: bool,
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
    /// Rate over the rate of one packet in each network epoch; `None` if it is unlimited.
    pub factor: Option<f64>,
    /// What a packet costs.
    pub charge: Charge,
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
    /// What the bound is made of; `None` without one.
    pub terms: Option<Terms>,
}

/// What a bound is made of, ns.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// The level's own packets, from every host that may send.
    pub own_ns: f64,
    /// What each level above sends meanwhile.
    pub above: Vec<(Level, f64)>,
    /// Fixed delays.
    pub fixed: Fixed,
}

/// Why there is no plan. Each says what to change.
#[derive(Debug, Error, PartialEq)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum PlanError {
    #[error("hosts is {0}; give the number of hosts that may send, 1 to {MAX_HOSTS} (--hosts)")]
    Hosts(u32),
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
    #[error("level {level}: its rate of {rate} is more than the link's {}; give it a lower one", show_rate(*link_bps))]
    RateAboveLink { level: Level, rate: Rate, link_bps: f64 },
    #[error(
        "the levels together allow a host {} on a link of {}: the lower ones could not have what they are promised; \
         lower a factor",
        show_rate(*sum_bps), show_rate(*link_bps)
    )]
    SumAboveLink { sum_bps: f64, link_bps: f64 },
    #[error(
        "level {level} cannot have a bound: what may be sent above it is {sum} = {} of a link of {}; lower a factor \
         or a rate above it, or give it a factor above 1, which promises less",
        show_rate(*sum_bps), show_rate(*link_bps)
    )]
    Unstable { level: Level, sum: String, sum_bps: f64, link_bps: f64 },
    #[error(
        "level {level} cannot have a bound: level {above} above it has none; limit that one more, or put it below \
         level {level}"
    )]
    AboveHasNone { level: Level, above: Level },
    #[error("wire-overhead is {0} bytes; a frame takes 24 beside its L2 bytes, and no tunnel or tag adds over 1000")]
    WireOverhead(u32),
    #[error("hops is {0}; a path has 1 (one switch) to 32")]
    Hops(u32),
    #[error("mtu is {0} bytes; a frame has at least 14 and at most 65535 L2 bytes")]
    Mtu(u32),
    #[error("level {level}: a tolerance is for levels charged by packet; a level charged by bytes has a burst")]
    Tolerance { level: Level },
    #[error(
        "level {level}: a level charged by bytes cannot be planned with a wire-overhead of {overhead}: the limiter counts 24 \
         for each frame, and small frames would be more than planned; use charge packet, or a factor of 1 or less"
    )]
    BytesBeyondCount { level: Level, overhead: u32 },
    #[error("level {level}: a burst is for levels charged by bytes; a level charged by packet sends one at a time")]
    Burst { level: Level },
    #[error("the epoch would be {epoch_ns:.3e} ns, too long to count; hosts, max-packet or epsilon is too large")]
    Overflow { epoch_ns: f64 },
    #[error("level {level}: {source}")]
    Limit { level: Level, source: LimitError },
}

/// The levels above one, as far as its bound needs them.
struct Above {
    level: Level,
    /// How many hosts send, what each may send, and the level's bound; `None` without a bound.
    sent: Option<(u32, Envelope, f64)>,
    /// Whether all hosts may send at once.
    all: bool,
}

impl Network {
    /// Bytes that a frame takes on the wire beside its L2 bytes, with its tag.
    pub fn overhead(&self) -> u32 {
        match self.wire_overhead {
            0 => 0,
            overhead => overhead + if self.tagged { VLAN_TAG as u32 } else { 0 },
        }
    }

    /// Bytes that the largest packet of a level takes on the wire.
    fn packet_on_wire(&self, spec: &LevelSpec) -> f64 {
        f64::from(on_wire(spec.max_packet.unwrap_or(self.max_packet), self.overhead()))
    }

    /// Time of so many wire bytes on the slowest link, ns.
    pub fn time_ns(&self, wire_bytes: f64) -> f64 {
        wire_bytes * 8e9 / self.link_rate.bps() as f64
    }

    fn link_bps(&self) -> f64 {
        self.link_rate.bps() as f64
    }

    /// Computes the plan.
    ///
    /// # Errors
    /// If a number is out of range, or a level cannot have what it asks for.
    pub fn plan(&self) -> Result<Plan, PlanError> {
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            return Err(PlanError::Hosts(self.hosts));
        }
        let sizes = self.levels.iter().filter_map(|spec| spec.max_packet).chain([self.max_packet]);
        if let Some(size) = sizes.into_iter().find(|size| !(14..=65_535).contains(size)) {
            return Err(PlanError::PacketSize(size));
        }
        if self.wire_overhead > 1_000 {
            return Err(PlanError::WireOverhead(self.wire_overhead));
        }
        if let Delays::Path(path) = self.delays {
            if !(1..=32).contains(&path.hops) {
                return Err(PlanError::Hops(path.hops));
            }
            if !(14..=65_535).contains(&path.mtu) {
                return Err(PlanError::Mtu(path.mtu));
            }
        }
        let least_ns = f64::from(self.hosts) * self.time_ns(f64::from(self.max_packet)) + self.fixed(0.0).total_ns();
        if least_ns > qjump_ebpf::limiter::MAX_BURST_NS as f64 {
            return Err(PlanError::Overflow { epoch_ns: least_ns });
        }
        if self.levels.is_empty() {
            return Err(PlanError::NoLevels);
        }
        let mut specs = self.levels.clone();
        specs.sort_by_key(|spec| std::cmp::Reverse(spec.level));
        if let Some(pair) = specs.windows(2).find(|pair| pair[0].level == pair[1].level) {
            return Err(PlanError::Twice(pair[0].level));
        }

        let mut above: Vec<Above> = Vec::new();
        let mut levels: Vec<LevelPlan> = Vec::new();
        for spec in specs {
            let largest = levels
                .iter()
                .map(|level| f64::from(on_wire(level.largest_frame(self.mtu()), self.overhead())))
                .fold(0.0, f64::max);
            let (level, envelope) = self.level(spec, &above, largest)?;
            above.push(Above {
                level: spec.level,
                sent: match (envelope, level.bound_ns, level.max_senders) {
                    (Some(envelope), Some(bound_ns), Some(senders)) => Some((senders, envelope, bound_ns)),
                    _ => None,
                },
                all: level.max_senders == Some(self.hosts),
            });
            levels.push(level);
        }
        let sum_bps: f64 = levels.iter().filter_map(|level| level.rate_bps).sum();
        if sum_bps > self.link_bps() {
            return Err(PlanError::SumAboveLink { sum_bps, link_bps: self.link_bps() });
        }
        Ok(Plan { network: self.clone(), levels })
    }

    /// Largest frame on the path, L2 bytes: what a byte-charged level sends, and what is in the way of the
    /// levels above it.
    pub fn mtu(&self) -> u32 {
        let packets = self.levels.iter().filter_map(|spec| spec.max_packet).chain([self.max_packet]);
        let mtu = match self.delays {
            Delays::Path(path) => path.mtu,
            Delays::Given(_) => ETHERNET_MTU,
        };
        packets.fold(mtu, u32::max)
    }

    fn fixed(&self, packet: f64) -> Fixed {
        self.delays.fixed(packet, f64::from(on_wire(self.mtu(), self.overhead().max(WIRE_OVERHEAD))), self.link_rate)
    }

    /// The time and the spacing of a packet-charged level, or the bucket of a byte-charged one.
    fn level(
        &self,
        spec: LevelSpec,
        above: &[Above],
        largest: f64,
    ) -> Result<(LevelPlan, Option<Envelope>), PlanError> {
        let level = spec.level;
        if level == Level::BEST_EFFORT {
            return Err(PlanError::LevelZero);
        }
        let packet = self.packet_on_wire(&spec);
        let packet_ns = self.time_ns(packet);
        let hosts = f64::from(self.hosts);
        // The network epoch of this level's packets, by the published equation or its stricter sisters.
        let base_ns = {
            let epsilon = self.fixed(packet).total_ns();
            match self.model {
                Model::Strict => 2.0 * (hosts * packet_ns + epsilon),
                Model::Paper => 2.0 * hosts * packet_ns + epsilon,
                Model::FanIn => hosts * packet_ns + epsilon,
            }
        };
        let factor = match spec.demand {
            Demand::Unlimited => {
                let plan = LevelPlan {
                    spec,
                    factor: None,
                    charge: Charge::Unlimited,
                    epoch_ns: None,
                    rate_bps: None,
                    burst_bytes: None,
                    bound_ns: None,
                    guaranteed: false,
                    max_senders: None,
                    max_packet: u32::MAX,
                    terms: None,
                };
                return Ok((plan, None));
            }
            Demand::Factor(factor) => factor,
            Demand::Rate(rate) => rate.bps() as f64 * base_ns / (packet * 8e9),
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(PlanError::Factor { level, factor });
        }
        let by_factor = matches!(spec.demand, Demand::Factor(factor) if factor <= 1.0);
        let charge = match spec.charge {
            Some(charge @ (Charge::Packet | Charge::Byte)) => charge,
            // Who names a burst wants bytes counted.
            _ if factor <= 1.0 && spec.burst.is_none() => Charge::Packet,
            _ => Charge::Byte,
        };
        let spaced = charge == Charge::Packet;
        if !spaced && spec.tolerance.ns() > 0 {
            return Err(PlanError::Tolerance { level });
        }
        if spaced && spec.burst.is_some() {
            return Err(PlanError::Burst { level });
        }
        if !spaced && self.wire_overhead > WIRE_OVERHEAD {
            return Err(PlanError::BytesBeyondCount { level, overhead: self.wire_overhead });
        }

        // What a packet may be as long as: a byte-charged level may use its burst up with one.
        let burst = match spec.burst {
            Some(burst) => f64::from(burst),
            None if spaced || by_factor => packet,
            None => (factor * packet).max(packet),
        };
        let max_packet = spec.max_packet.unwrap_or(self.max_packet);
        let max_packet = if spaced {
            max_packet
        } else {
            ((burst - f64::from(self.overhead())).max(0.0) as u32).max(max_packet).min(MAX_COST_BYTES)
        };
        let mut plan = LevelPlan {
            spec,
            factor: Some(factor),
            charge,
            epoch_ns: None,
            rate_bps: None,
            burst_bytes: Some(burst),
            bound_ns: None,
            guaranteed: false,
            max_senders: None,
            max_packet,
            terms: None,
        };
        let frame = f64::from(on_wire(plan.largest_frame(self.mtu()), self.overhead()));
        let fixed = self.fixed(frame.max(largest));
        let epsilon = fixed.total_ns();
        let (scale, past) = match self.model {
            Model::Strict | Model::Paper => (2.0, 1.0),
            Model::FanIn => (1.0, 0.0),
        };
        let barrier = above.iter().find(|above| above.sent.is_none()).map(|above| above.level);
        let higher: Vec<(Level, Sent)> = above
            .iter()
            .filter_map(|above| {
                let (senders, envelope, bound_ns) = above.sent?;
                // (t - D_j, t + D_i) is as long as D_i plus the bound of the level above.
                Some((above.level, Sent { senders, envelope, scale: 1.0, offset_ns: past * bound_ns }))
            })
            .collect();
        let demands: Vec<Sent> = higher.iter().map(|&(_, sent)| sent).collect();

        // Bound, own term and senders, and the time between packets at the level's rate.
        let once = |senders: f64, bytes: f64| senders * self.time_ns(bytes);
        let mut solved: Option<(f64, f64, u32)> = None;
        let spacing_ns;
        if by_factor || self.model == Model::Paper {
            let senders = if factor <= 1.0 { self.hosts } else { (hosts / factor).floor() as u32 };
            // One packet of each host, or f of each of n/f hosts. By bytes, and by proof rather than as
            // published, the burst and what the window adds to it.
            let own_ns = match (self.model, charge) {
                (Model::Paper, Charge::Byte) if by_factor => once(hosts, burst),
                (Model::Paper, _) => once(hosts, packet),
                (_, Charge::Byte) => once(hosts, burst + packet * factor),
                _ => once(hosts, packet),
            };
            if senders > 0 && barrier.is_none() {
                solved = least_fixed_point(own_ns + epsilon, &demands).map(|d| (d, own_ns, senders));
            }
            if by_factor && self.model != Model::Paper {
                let Some((d, ..)) = solved else {
                    return Err(match barrier {
                        Some(above) => PlanError::AboveHasNone { level, above },
                        None => self.unstable(level, &higher),
                    });
                };
                spacing_ns = scale * d / factor;
            } else {
                spacing_ns = base_ns / factor;
            }
        } else {
            spacing_ns = base_ns / factor;
            if barrier.is_none() {
                let envelope = self.envelope(charge, packet, spacing_ns, spec.tolerance, burst);
                let tries = if spec.every_host { 1 } else { usize::MAX };
                // For all hosts if that has a solution, else for as many as the factor leaves, or fewer.
                let shares = std::iter::once(hosts)
                    .chain(std::iter::successors(Some(hosts / factor.max(1.0)), |n| Some(n / 2.0)));
                for senders in shares.map(|n| n.floor() as u32).take_while(|&n| n > 0).take(tries) {
                    let own = Sent { senders, envelope, scale, offset_ns: 0.0 };
                    let all: Vec<Sent> = demands.iter().copied().chain([own]).collect();
                    let load: f64 = all.iter().map(Sent::slope).sum();
                    if senders < self.hosts && load > MOST_LOAD {
                        continue;
                    }
                    if let Some(d) = least_fixed_point(epsilon, &all) {
                        solved = Some((d, own.time_ns(d), senders));
                        break;
                    }
                }
            }
        }
        let tolerance_ns = spec.tolerance.ns() as f64;
        let epoch_ns = match charge {
            Charge::Packet => spacing_ns + tolerance_ns,
            // f packets' worth in each network epoch.
            _ if by_factor => spacing_ns,
            _ => base_ns,
        };
        let rate_bps = match charge {
            Charge::Packet => packet * 8e9 / epoch_ns,
            _ => packet * 8e9 / spacing_ns,
        };
        if epoch_ns > qjump_ebpf::limiter::MAX_BURST_NS as f64 {
            return Err(PlanError::Overflow { epoch_ns });
        }
        if rate_bps > self.link_bps() {
            let link_bps = self.link_bps();
            if let Demand::Rate(rate) = spec.demand {
                return Err(PlanError::RateAboveLink { level, rate, link_bps });
            }
            let largest = factor * link_bps / rate_bps;
            return Err(PlanError::AboveLink { level, factor, rate_bps, link_bps, largest });
        }
        plan.epoch_ns = Some(epoch_ns);
        plan.rate_bps = Some(rate_bps);
        if spaced {
            plan.burst_bytes = Some(packet * (1.0 + tolerance_ns / epoch_ns));
        }
        if let Some((d, own_ns, senders)) = solved {
            let above_ns = higher.iter().map(|(level, sent)| (*level, sent.time_ns(d))).collect();
            plan.bound_ns = Some(d);
            plan.max_senders = Some(senders);
            plan.terms = Some(Terms { own_ns, above: above_ns, fixed });
            plan.guaranteed = senders == self.hosts
                && above.iter().all(|above| above.all)
                // As published: the strictest level, a whole packet at a time, and delays that hardly vary.
                && (self.model != Model::Paper
                    || (above.is_empty() && spaced && self.spread_ns(&fixed).is_none_or(|ns| 2.0 * ns <= epsilon)));
        }
        plan.limit().map_err(|source| PlanError::Limit { level, source })?;
        let envelope = self.envelope(charge, packet, spacing_ns, spec.tolerance, burst);
        Ok((plan, Some(envelope)))
    }

    fn spread_ns(&self, fixed: &Fixed) -> Option<f64> {
        match self.delays {
            Delays::Given(_) => None,
            Delays::Path(path) => fixed.spread_ns(path.hops),
        }
    }

    fn envelope(&self, charge: Charge, packet: f64, spacing_ns: f64, tolerance: Nanos, burst: f64) -> Envelope {
        let tolerance_ns = tolerance.ns() as f64;
        let packet_ns = self.time_ns(packet);
        match charge {
            Charge::Packet => Envelope::Spaced { packet_ns, epoch_ns: spacing_ns + tolerance_ns, tolerance_ns },
            _ => Envelope::Bucket { burst_ns: self.time_ns(burst), share: packet_ns / spacing_ns },
        }
    }

    fn unstable(&self, level: Level, higher: &[(Level, Sent)]) -> PlanError {
        let rate = |sent: &Sent| f64::from(sent.senders) * sent.envelope.share() * self.link_bps();
        if higher.iter().map(|(_, sent)| rate(sent)).sum::<f64>() < self.link_bps() * (1.0 - 1e-9) {
            // There is a solution, but none that the limiter can count to.
            return PlanError::Overflow { epoch_ns: qjump_ebpf::limiter::MAX_BURST_NS as f64 };
        }
        let sum = higher.iter().map(|(above, sent)| {
            format!("level {above}: {} hosts x {}", sent.senders, show_rate(sent.envelope.share() * self.link_bps()))
        });
        PlanError::Unstable {
            level,
            sum: sum.collect::<Vec<_>>().join(" + "),
            sum_bps: higher.iter().map(|(_, sent)| rate(sent)).sum(),
            link_bps: self.link_bps(),
        }
    }
}

impl LevelPlan {
    /// Its largest frame on a path with this MTU, L2 bytes: a larger packet of a byte-charged level is a
    /// GSO packet, and leaves in frames.
    pub fn largest_frame(&self, mtu: u32) -> u32 {
        self.max_packet.min(mtu)
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
        let oversize = self.spec.oversize;
        if self.charge == Charge::Packet {
            return LevelLimit::per_packet(epoch_ns.ceil() as u64, self.spec.tolerance.ns(), self.max_packet, oversize);
        }
        // The limiter counts real wire bytes; published numbers leave them out of the burst.
        let least = match self.spec.burst {
            None => u64::from(wire_bytes(self.max_packet, 1)),
            Some(_) => 0,
        };
        LevelLimit::per_byte(rate_bps as u64, (burst as u64).max(least), self.max_packet, oversize)
    }

    fn record(&self) -> LevelRecord {
        LevelRecord {
            factor: self.factor.unwrap_or(0.0),
            epoch_ns: self.epoch_ns.unwrap_or(0.0),
            rate_bps: self.rate_bps.unwrap_or(0.0),
            bound_ns: self.bound_ns.unwrap_or(-1.0),
            max_senders: self.max_senders.unwrap_or(0),
            guaranteed: u32::from(self.guaranteed),
        }
    }
}

impl Plan {
    /// Fixed delays of the strictest level, ns.
    pub fn epsilon_ns(&self) -> f64 {
        match (self.network.delays, &self.levels[0].terms) {
            (Delays::Given(epsilon), _) => epsilon.ns() as f64,
            (_, Some(terms)) => terms.fixed.total_ns(),
            _ => 0.0,
        }
    }

    /// The plan of one level.
    pub fn level(&self, level: Level) -> Option<&LevelPlan> {
        self.levels.iter().find(|plan| plan.spec.level == level)
    }

    /// The largest packet that somebody has given for a limited level, L2 bytes: what an interface must be able to send.
    pub fn largest_given_packet(&self) -> u32 {
        let limited = self.levels.iter().filter(|level| level.epoch_ns.is_some());
        limited.map(|level| level.spec.max_packet.unwrap_or(self.network.max_packet)).max().unwrap_or(0)
    }

    /// What the programs need of this plan. Generation and time are for the loader to fill in.
    ///
    /// # Errors
    /// If a limit cannot be expressed; a plan from [`Network::plan`] has been checked for it.
    pub fn config(&self, flags: u64) -> Result<Config, PlanError> {
        let mut config = Config { flags, ..Config::EMPTY };
        config.plan.hosts = self.network.hosts;
        config.plan.link_rate_bps = self.network.link_rate.bps();
        config.plan.epsilon_ns = self.epsilon_ns().ceil() as u64;
        for level in &self.levels {
            let index = level.spec.level.index();
            config.limits[index] =
                level.limit().map_err(|source| PlanError::Limit { level: level.spec.level, source })?;
            config.plan.levels[index] = level.record();
            if level.spec.claims == Claims::GrantOnly {
                config.flags |= 1 << (GRANT_ONLY_SHIFT + u32::from(level.spec.level.number()));
            }
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
            "epsilon_ns": self.epsilon_ns(),
            "levels": self.levels.iter().map(|level| serde_json::json!({
                "level": level.spec.level.number(),
                "factor": level.factor,
                "charge": level.charge_name(),
                "max_packet_bytes": level.epoch_ns.map(|_| level.max_packet),
                "epoch_ns": level.epoch_ns,
                "rate_bps": level.rate_bps,
                "burst_bytes": level.burst_bytes,
                "bound_ns": level.bound_ns,
                "guaranteed": level.guaranteed,
                "max_senders": level.max_senders,
                "terms": level.terms.as_ref().map(Terms::to_json),
            })).collect::<Vec<_>>(),
            "conditions": self.conditions(),
        })
    }
}

impl Terms {
    fn to_json(&self) -> serde_json::Value {
        let above: serde_json::Map<String, serde_json::Value> =
            self.above.iter().map(|(level, ns)| (level.to_string(), (*ns).into())).collect();
        serde_json::json!({
            "own_ns": self.own_ns,
            "above_ns": above,
            "epsilon_ns": self.fixed.total_ns(),
            "switch_ns": self.fixed.switch_ns,
            "store_and_forward_ns": self.fixed.store_and_forward_ns,
            "blocking_ns": self.fixed.blocking_ns,
            "host_ns": self.fixed.host_ns,
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
            delays: Delays::Given(Nanos::from_ns(0)),
            wire_overhead: 0,
            tagged: false,
            model: Model::Paper,
            levels: levels
                .iter()
                .map(|&(level, factor)| LevelSpec::new(Level::new(level).unwrap(), Demand::Factor(factor)))
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
        let mut network = network(12, 256, "10gbit", &[(5, 4.0), (7, 1.0), (6, 1.0)]);
        // Without fixed delays the two levels of factor 1 fill the link, and level 5 has no bound.
        assert_eq!(network.plan().unwrap().levels[2].bound_ns, None);
        network.delays = Delays::Given(Nanos::from_ns(4_000));
        let plan = network.plan().unwrap();
        let seen: Vec<_> = plan.levels.iter().map(|l| (l.spec.level.number(), l.guaranteed, l.max_senders)).collect();
        assert_eq!(seen, [(7, true, Some(12)), (6, false, Some(12)), (5, false, Some(3))]);
    }

    fn strict(levels: &[(u8, f64)]) -> Network {
        let mut network = network(12, 256, "10gbit", levels);
        network.model = Model::Strict;
        network.wire_overhead = WIRE_OVERHEAD;
        network.delays = Delays::Given(Nanos::from_ns(4_000));
        network
    }

    #[test]
    fn strict_epochs_are_twice_the_bound_level_by_level() {
        // C = 280 B = 224 ns, n C = 2688, eps = 4000. Level 6: 6688 + 2688 ceil((D6 + D7) / T7).
        let plan = strict(&[(7, 1.0), (6, 1.0), (5, 0.5)]).plan().unwrap();
        let seen: Vec<_> =
            plan.levels.iter().map(|l| (l.bound_ns.unwrap(), l.epoch_ns.unwrap(), l.guaranteed)).collect();
        let d7 = 2_688.0 + 4_000.0;
        let d6 = d7 + 2.0 * 2_688.0;
        // Level 5: (D5 + D7) / T7 = 1.9 and (D5 + D6) / T6 = 1.2 packets, so two of each, and half as often.
        let d5 = d7 + 2.0 * 2_688.0 + 2.0 * 2_688.0;
        assert_eq!(seen, [(d7, 2.0 * d7, true), (d6, 2.0 * d6, true), (d5, 4.0 * d5, true)]);
        let terms = plan.levels[1].terms.as_ref().unwrap();
        assert_eq!((terms.own_ns, terms.above.clone()), (2_688.0, vec![(Level::STRICTEST, 5_376.0)]));
    }

    #[test]
    fn fan_in_epochs_are_the_bound() {
        let mut network = strict(&[(7, 1.0)]);
        network.model = Model::FanIn;
        let plan = network.plan().unwrap();
        assert_eq!(plan.levels[0].epoch_ns, plan.levels[0].bound_ns);
        assert_eq!(plan.levels[0].bound_ns, Some(6_688.0));
    }

    #[test]
    fn bytes_cost_a_second_packet() {
        let mut network = strict(&[(7, 1.0)]);
        network.levels[0].charge = Some(Charge::Byte);
        let plan = network.plan().unwrap();
        assert_eq!(plan.levels[0].bound_ns, Some(2.0 * 2_688.0 + 4_000.0));
        assert!(plan.levels[0].guaranteed);
        // The published reasoning does not count it, and so it is no guarantee.
        network.model = Model::Paper;
        let plan = network.plan().unwrap();
        assert_eq!((plan.levels[0].bound_ns, plan.levels[0].guaranteed), (Some(6_688.0), false));
    }

    #[test]
    fn above_factor_one_fewer_may_send() {
        let plan = strict(&[(7, 1.0), (5, 4.0)]).plan().unwrap();
        let five = &plan.levels[1];
        assert_eq!((five.max_senders, five.guaranteed), (Some(3), false));
        // D = eps + 3 (4 C + 2 D r / R) + above(D), with r = 4 P / T.
        let d = five.bound_ns.unwrap();
        let (t, c) = (plan.levels[0].epoch_ns.unwrap(), 224.0);
        let above = 12.0 * c * ((d + 6_688.0) / t).ceil();
        let own = 3.0 * (4.0 * c + 4.0 * c * 2.0 * d / t);
        assert!(close(d, 4_000.0 + own + above, 1e-9), "{d} {own} {above}");
    }

    #[test]
    fn a_burst_is_in_the_bound() {
        let mut network = strict(&[(7, 1.0)]);
        network.levels[0].charge = Some(Charge::Byte);
        network.levels[0].burst = Some(60_000);
        // n (B + P) at 0.8 ns a byte.
        let bound = network.plan().unwrap().levels[0].bound_ns.unwrap();
        assert!(close(bound, 12.0 * 60_280.0 * 0.8 + 4_000.0, 1e-12), "{bound}");
    }

    #[test]
    fn a_packet_delays_itself() {
        // Without fixed delays, and with an epoch that is far longer than the bound.
        let mut network = strict(&[(7, 1.0)]);
        network.delays = Delays::Given(Nanos::from_ns(0));
        network.levels[0].demand = Demand::Rate("1mbit".parse().unwrap());
        let bound = network.plan().unwrap().levels[0].bound_ns.unwrap();
        assert!(close(bound, 12.0 * 224.0, 1e-12), "{bound}");
    }

    #[test]
    fn bytes_that_the_limiter_does_not_count_are_refused() {
        let mut network = strict(&[(7, 1.0), (5, 4.0)]);
        network.wire_overhead = 28;
        assert!(matches!(network.plan(), Err(PlanError::BytesBeyondCount { .. })));
        network.levels.pop();
        assert!(network.plan().is_ok());
        // A tag of its own it does count.
        let tagged = Network { tagged: true, ..strict(&[(7, 1.0), (5, 4.0)]) };
        let untagged = strict(&[(7, 1.0), (5, 4.0)]);
        let bound = |network: &Network| network.plan().unwrap().levels[0].bound_ns.unwrap();
        assert!(close(bound(&tagged) - bound(&untagged), 12.0 * 4.0 * 0.8, 1e-9));
    }

    #[test]
    fn published_promises_need_fixed_delays_that_hardly_vary() {
        let mut network = strict(&[(7, 1.0)]);
        network.model = Model::Paper;
        assert!(network.plan().unwrap().levels[0].guaranteed);
        let path = |mtu: u32| Delays::Path(Path { hops: 1, switch_delay: Nanos::from_ns(9_000), mtu, host_burst: 0 });
        network.delays = path(1_514);
        assert!(network.plan().unwrap().levels[0].guaranteed);
        network.delays = path(9_014);
        assert!(!network.plan().unwrap().levels[0].guaranteed);
    }

    #[test]
    fn a_link_that_is_all_but_full_is_refused_in_time() {
        let mut network = strict(&[(7, 1.0)]);
        network.model = Model::FanIn;
        network.hosts = 1;
        network.link_rate = "400gbit".parse().unwrap();
        network.max_packet = 14;
        network.delays = Delays::Given(Nanos::from_ns(1));
        network.levels[0].charge = Some(Charge::Packet);
        network.levels[0].demand = Demand::Rate("399999999990bit".parse().unwrap());
        let plan = network.plan().unwrap();
        assert!(plan.levels[0].bound_ns.is_none_or(|bound| bound > 1e6), "{plan:?}");
    }

    #[test]
    fn a_bound_for_fewer_is_worth_having() {
        let mut network = strict(&[(7, 1.0), (6, 1.0), (3, 4.0), (2, 16.0), (1, 100.0)]);
        network.hosts = 10_000;
        let plan = network.plan().unwrap();
        for level in &plan.levels[2..] {
            assert!(level.bound_ns.is_none_or(|bound| bound < 1e3 * plan.levels[1].bound_ns.unwrap()), "{level:?}");
        }
    }

    #[test]
    fn a_rate_is_a_factor_by_another_name() {
        let by_factor = strict(&[(7, 1.0), (5, 4.0)]).plan().unwrap();
        let rate = by_factor.levels[1].rate_bps.unwrap().round() as u64;
        let mut network = strict(&[(7, 1.0), (5, 4.0)]);
        network.levels[1].demand = Demand::Rate(Rate::from_bps(rate));
        let by_rate = network.plan().unwrap();
        assert!(close(by_rate.levels[1].factor.unwrap(), 4.0, 1e-6));
        assert!(close(by_rate.levels[1].bound_ns.unwrap(), by_factor.levels[1].bound_ns.unwrap(), 1e-6));
        // Little enough, and it holds for all hosts.
        network.levels[1].demand = Demand::Rate("1mbit".parse().unwrap());
        let slow = network.plan().unwrap();
        assert!(slow.levels[1].guaranteed);
        assert!(close(slow.levels[1].rate_bps.unwrap(), 1e6, 1e-9));
    }

    #[test]
    fn refuses_what_the_levels_above_make_impossible() {
        let mut network = strict(&[(7, 1.0), (6, 1.0), (3, 1.0)]);
        network.model = Model::FanIn;
        network.delays = Delays::Given(Nanos::from_ns(0));
        assert_eq!(
            network.plan().unwrap_err().to_string(),
            "level 6 cannot have a bound: what may be sent above it is level 7: 12 hosts x 833.333mbit = 10gbit of a \
             link of 10gbit; lower a factor or a rate above it, or give it a factor above 1, which promises less"
        );
        network.levels[1].demand = Demand::Unlimited;
        assert_eq!(
            network.plan().unwrap_err().to_string(),
            "level 3 cannot have a bound: level 6 above it has none; limit that one more, or put it below level 3"
        );
    }

    #[test]
    fn computes_epsilon_from_the_path() {
        let mut network = strict(&[(7, 1.0)]);
        network.delays = Delays::Path(Path { hops: 1, switch_delay: Nanos::from_ns(500), mtu: 1_514, host_burst: 0 });
        let plan = network.plan().unwrap();
        let eps = 500.0 + 224.0 + 2.0 * 1_230.4;
        assert!(close(plan.levels[0].bound_ns.unwrap(), 2_688.0 + eps, 1e-12));
        // A level of long packets above makes the store-and-forward term longer below as well.
        network.levels[0].max_packet = Some(1_514);
        network.levels.push(LevelSpec::new(Level::new(6).unwrap(), Demand::Factor(1.0)));
        let plan = network.plan().unwrap();
        assert!(close(plan.levels[1].terms.as_ref().unwrap().fixed.store_and_forward_ns, 1_230.4, 1e-12));
    }

    #[test]
    fn explains_every_term() {
        let plan = strict(&[(7, 1.0), (6, 1.0)]).plan().unwrap();
        let text = Explanation(&plan, &plan.levels[1]).to_string();
        for part in ["bound 12.064us", "12 hosts x 224ns = 2.688us", "level 7 meanwhile", "5.376us", "4us", "45%"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let terms = plan.levels[1].terms.as_ref().unwrap();
        let sum = terms.own_ns + terms.above[0].1 + terms.fixed.total_ns();
        assert!(close(sum, plan.levels[1].bound_ns.unwrap(), 1e-12));
    }

    #[test]
    fn says_what_a_change_would_do() {
        let now = strict(&[(7, 1.0)]);
        let later = Network { hosts: 24, ..now.clone() };
        let text = difference(&now.plan().unwrap(), &later.plan().unwrap());
        assert!(text.contains("6.688us -> 9.376us (x1.40)"), "{text}");
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
        assert_eq!(with(|n| n.hosts = 0), PlanError::Hosts(0));
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
        assert!(matches!(with(|n| n.delays = Delays::Given("9000s".parse().unwrap())), PlanError::Overflow { .. }));
        assert!(matches!(
            with(|n| {
                n.levels[0].demand = Demand::Factor(2.0);
                n.levels[0].tolerance = Nanos::from_ns(1);
            }),
            PlanError::Tolerance { .. }
        ));
    }

    #[test]
    fn the_text_says_what_each_sender_has_on_the_wire() {
        let mut burst = network(4, 256, "1gbit", &[(7, 1.0)]);
        (burst.wire_overhead, burst.model) = (24, Model::Strict);
        let text = |network: &Network| network.plan().unwrap().to_string();
        assert!(text(&burst).contains("4 hosts x 2.24us = 8.96us (280 B on the wire each, 1gbit)"), "{}", text(&burst));
        burst.levels[0].burst = Some(30_000);
        // The burst, and a packet that comes while it is on its way.
        assert!(
            text(&burst).contains("4 hosts x 242.24us = 968.96us (30280 B on the wire each, 1gbit)"),
            "{}",
            text(&burst)
        );
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
            model in prop::sample::select(vec![Model::Strict, Model::Paper, Model::FanIn]),
        ) {
            let network = Network {
                hosts, link_rate: Rate::from_bps(bps), max_packet: packet,
                delays: Delays::Given(Nanos::from_ns(epsilon)), wire_overhead: overhead, tagged: false, model,
                levels: vec![LevelSpec {
                    oversize: Oversize::Drop, ..LevelSpec::new(Level::STRICTEST, Demand::Factor(factor))
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
                    // The limiter counts the overhead that published numbers leave out.
                    let burst = (level.burst_bytes.unwrap() as u32).max(wire_bytes(level.max_packet, 1));
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
