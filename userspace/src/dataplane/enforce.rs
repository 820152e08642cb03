//! Who enforces what: from a plan and the queue of the host to the limits of the program, and from those to
//! the shapes of the queue.
//!
//! A level that is paced is limited twice. The program charges each packet and knows when it may leave; the
//! queue makes it wait. fq goes by the times that the program writes. HTB has its own buckets, made so that
//! they never let more through than the program's: then what waits in the queue is never more than the
//! program counts with, and the program's horizon is the last guard, whatever becomes of the queue.

use qjump_ebpf::{
    Charge, Config, LEVELS, Level, LevelLimit,
    frame::{MIN_FRAME, VLAN_TAG, WIRE_OVERHEAD, wire_bytes},
    layout::{FLAG_CLASSES, FLAG_DEPARTURE_TIMES, FLAG_PRIORITY_TAG, QUEUE_FQ, QUEUE_HTB, QUEUE_KEEP},
    limiter::MAX_BURST_NS,
};

use super::{Error, netlink::Interface};
use crate::{
    config::QueueChoice,
    plan::{LevelPlan, OverRule, Plan, PlanError},
    qdisc::{self, Owner, Queue, Setup, Shape},
    units::{Rate, show_rate},
};

/// How long a packet may wait for its departure, ns. The buffers of sockets push back before; beyond are more
/// senders than the level can serve. It is also how much more than its burst a level may send should the queue
/// be taken away.
const HORIZON_NS: u64 = 1_000_000_000;

/// Smallest MTU of a path for which HTB is given GSO packets, that of IPv6. HTB counts what a frame takes
/// beside its bytes once for all segments, so the smaller they are, the more it would let through.
const LEAST_MTU: u32 = 1_280;

/// The longest that one GSO packet may hold a link whose queue is ours, ns.
const LONGEST_GSO_NS: u64 = 100_000;

/// The queue for an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub queue: Queue,
    /// Why this one, as it is kept.
    pub reason: Why,
    /// The same for people, with what is special about this interface.
    pub why: String,
    /// Whether nothing holds packets back though a level is to be paced, and nobody asked for that.
    pub falls_short: bool,
}

impl Chosen {
    /// What becomes of packets over a limit, and why.
    pub fn over_a_limit(&self) -> String {
        match self.queue {
            Queue::Keep => format!("over a limit, packets are dropped: {}", self.why),
            queue => format!("over a limit, packets wait in {}: {}", queue.name(), self.why),
        }
    }
}

/// Why an interface's queue is what it is. The numbers are kept beside the plan, for `status`; they are never renumbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Why {
    /// `--queue fq` or `--queue htb`.
    Asked = 1,
    /// `--queue keep`.
    AskedToKeep = 2,
    /// fq, of all that `auto` may choose.
    Best = 3,
    /// HTB, because there is no fq.
    NoFq = 4,
    /// HTB, because of `--host-rate`.
    HostRate = 5,
    /// None, because nothing would wait in it.
    NothingPaced = 6,
    /// None, because somebody else has set one up.
    Foreign = 7,
    /// None: HTB would hide the level from a VLAN device.
    Vlan = 8,
    /// None, because the kernel has none of them.
    NothingThere = 9,
    /// fq cannot do what `--host-rate` asks for.
    FqHasNoRate = 10,
}

impl Why {
    const ALL: [Self; 10] = [
        Self::Asked,
        Self::AskedToKeep,
        Self::Best,
        Self::NoFq,
        Self::HostRate,
        Self::NothingPaced,
        Self::Foreign,
        Self::Vlan,
        Self::NothingThere,
        Self::FqHasNoRate,
    ];

    /// The reason of this number in a plan's record.
    pub fn of_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|why| *why as u16 == number)
    }
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Asked => "--queue asks for it",
            Self::AskedToKeep => "--queue keep leaves the queue alone",
            Self::Best => "the best there is, and this kernel has it",
            Self::NoFq => "this kernel has no fq with prio",
            Self::HostRate => "fq has no rate for everything",
            Self::NothingPaced => "no level is paced",
            Self::Foreign => {
                "the interface has a queue of somebody else; --queue htb or fq replaces it if it can be put back"
            }
            Self::Vlan => "HTB's classes would hide the level from the VLAN's priority map; load the device below",
            Self::NothingThere => "this kernel has neither fq with prio nor HTB",
            Self::FqHasNoRate => "fq has no rate for everything; use --queue htb",
        })
    }
}

/// Finds the queue for an interface whose root is `owner`'s. Changes nothing.
pub fn choose(
    choice: QueueChoice,
    host_rate: Option<Rate>,
    plan: &Plan,
    interface: &Interface,
    owner: &Owner,
) -> Result<Chosen, Error> {
    let sum_bps: f64 = plan.levels.iter().filter_map(|level| level.rate_bps).sum();
    if let Some(rate) = host_rate.filter(|rate| (rate.bps() as f64) < sum_bps) {
        let why = format!("{rate} is less than what the levels may send together, {}", show_rate(sum_bps));
        return Err(Error::HostRate { interface: interface.name.clone(), why });
    }
    let because = |queue, reason: Why, falls_short| Chosen { queue, reason, why: reason.to_string(), falls_short };
    let chosen = |queue, reason| Ok(because(queue, reason, false));
    let keep = |why: Why, falls_short| {
        if host_rate.is_some() {
            return Err(Error::HostRate { interface: interface.name.clone(), why: why.to_string() });
        }
        Ok(because(Queue::Keep, why, falls_short))
    };
    match choice {
        QueueChoice::Keep => keep(Why::AskedToKeep, false),
        QueueChoice::Fq if host_rate.is_some() => keep(Why::FqHasNoRate, false),
        QueueChoice::Fq | QueueChoice::Htb => {
            let available = qdisc::available()?;
            let (queue, kind, there) = match choice {
                QueueChoice::Fq => (Queue::Fq, "sch_prio and sch_fq", available.fq && available.prio),
                _ => (Queue::Htb, "sch_htb", available.htb),
            };
            if !there {
                return Err(Error::NoQueue { queue: queue.name(), kind });
            }
            chosen(queue, Why::Asked)
        }
        QueueChoice::Auto => {
            if host_rate.is_none() && !plan.levels.iter().any(|level| may_be_paced(level.spec.over, level.charge)) {
                return keep(Why::NothingPaced, false);
            }
            if let Owner::Foreign { kind, handle } = owner {
                let why = format!(
                    "its queue is {kind} {handle} of somebody else; --queue htb or fq replaces it if it can be put back"
                );
                return Ok(Chosen { why, ..keep(Why::Foreign, true)? });
            }
            let available = qdisc::available()?;
            if host_rate.is_none() && available.fq && available.prio {
                chosen(Queue::Fq, Why::Best)
            } else if available.htb && !interface.is_vlan {
                chosen(Queue::Htb, if host_rate.is_some() { Why::HostRate } else { Why::NoFq })
            } else if available.htb {
                keep(Why::Vlan, true)
            } else {
                keep(Why::NothingThere, true)
            }
        }
    }
}

/// A level that HTB spaces without any slack, so that what late timers cost is lost.
pub fn loses_late_timers(plan: &Plan, queue: Queue) -> Option<Level> {
    let untolerant = |level: &&LevelPlan| {
        level.charge == Charge::Packet
            && level.spec.tolerance.ns() == 0
            && level.spec.over.is_none_or(|over| over == OverRule::Pace)
    };
    plan.levels.iter().find(untolerant).map(|level| level.spec.level).filter(|_| queue == Queue::Htb)
}

fn may_be_paced(over: Option<OverRule>, charge: Charge) -> bool {
    matches!(charge, Charge::Packet | Charge::Byte) && matches!(over, None | Some(OverRule::Pace))
}

/// An interface, as far as limits depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// L3 bytes.
    pub mtu: u32,
    /// Most segments of a GSO packet, before qjump lowers it.
    pub gso_max_segs: u32,
}

/// The configuration that puts a plan in force with this queue, and the most segments that GSO packets may
/// have, if that is less than the device allows.
pub fn config(
    plan: &Plan,
    pcp: bool,
    queue: Queue,
    host_rate: Option<Rate>,
    device: Device,
) -> Result<(Config, Option<u32>), Error> {
    let (flag, number) = match queue {
        Queue::Keep => (0, QUEUE_KEEP),
        Queue::Htb => (FLAG_CLASSES, QUEUE_HTB),
        Queue::Fq => (FLAG_DEPARTURE_TIMES, QUEUE_FQ),
    };
    let mut config = plan.config(flag | if pcp { FLAG_PRIORITY_TAG } else { 0 })?;
    let frame = Frame { l2_bytes: device.mtu + 14, tag_bytes: tag_bytes(&config) };
    config.plan.queue = number;
    config.plan.host_rate_bps = host_rate.map_or(0, Rate::bps);
    for planned in &plan.levels {
        let level = planned.spec.level;
        let limit = &mut config.limits[level.index()];
        if limit.burst_ns() == 0 {
            continue;
        }
        *limit = match (planned.spec.over, queue) {
            (Some(OverRule::Demote), _) => limit.demoting(),
            (Some(OverRule::Police), _) | (None, Queue::Keep) => *limit,
            (Some(OverRule::Pace), Queue::Keep) => return Err(Error::NothingToPaceWith { level }),
            (None | Some(OverRule::Pace), queue) => {
                let horizon_ns = HORIZON_NS.min(MAX_BURST_NS - limit.burst_ns());
                let limit = limit.paced(horizon_ns).map_err(|source| PlanError::Limit { level, source })?;
                match (queue, limit.charge()) {
                    // HTB lets one packet more through than its bucket holds: half of the burst for each, or
                    // as much as one frame takes. A bucket of its own makes up for timers that are late.
                    (Queue::Htb, Charge::Byte) => {
                        let half = (planned.burst_bytes.unwrap_or(0.0) / 2.0) as u32;
                        limit.with_max_wire(half.max(frame.on_wire(1)))
                    }
                    _ => limit,
                }
            }
        };
    }
    let cap = gso_segments(&config, frame).filter(|&cap| cap < device.gso_max_segs);
    if queue == Queue::Htb {
        let least_segment = match cap.unwrap_or(device.gso_max_segs) {
            // Then there is none but what programs make by hand.
            1 => u32::MAX,
            _ => device.mtu.min(LEAST_MTU) + 14,
        };
        for limit in config.limits.iter_mut().filter(|limit| limit.horizon_ns() > 0) {
            *limit = limit.with_least_segment(least_segment);
        }
    }
    Ok((config, cap))
}

/// The levels whose packets must be smaller than the plan says for the queue's sake, with the largest, L2 bytes.
pub fn smaller(plan: &Plan, config: &Config) -> Vec<(Level, u32)> {
    let largest = |level: Level| config.limits[level.index()].max_packet();
    let limited = plan.levels.iter().filter(|level| level.epoch_ns.is_some());
    let less = limited.filter(|level| largest(level.spec.level) < level.max_packet);
    less.map(|level| (level.spec.level, largest(level.spec.level))).collect()
}

/// The queue that goes with a configuration.
pub fn setup(config: &Config) -> Setup {
    let queue = match config.plan.queue {
        QUEUE_HTB => Queue::Htb,
        QUEUE_FQ => Queue::Fq,
        _ => Queue::Keep,
    };
    let mut shapes = [None; LEVELS];
    for level in Level::strictest_first() {
        let limit = &config.limits[level.index()];
        shapes[level.index()] = (limit.horizon_ns() > 0).then(|| shape(limit, tag_bytes(config)));
    }
    Setup {
        queue,
        shapes,
        link_rate: (config.plan.host_rate_bps > 0).then(|| Rate::from_bps(config.plan.host_rate_bps)),
        tagged: config.flags & FLAG_PRIORITY_TAG != 0,
        horizon_ns: HORIZON_NS,
    }
}

/// The bucket of HTB that never lets more through than `limit` does.
fn shape(limit: &LevelLimit, tag_bytes: u32) -> Shape {
    let packet = wire_bytes(limit.max_packet() + tag_bytes, 1);
    match limit.charge() {
        Charge::Packet => Shape {
            rate_bytes: (u128::from(packet) * 1_000_000_000 / u128::from(limit.epoch_ns())) as u64,
            burst_ns: limit.tolerance_ns(),
            least_bytes: u16::try_from(packet).unwrap_or(u16::MAX),
        },
        _ => {
            let largest = limit.max_wire();
            let share = counted_share(limit.least_segment(), tag_bytes);
            Shape {
                rate_bytes: (limit.bytes_per_second() as f64 * share) as u64,
                burst_ns: limit.burst_ns() - limit.time_ns(largest).min(limit.burst_ns()),
                least_bytes: wire_bytes(tag_bytes, 1) as u16,
            }
        }
    }
}

/// What part of a packet's wire bytes HTB counts at least, if its segments but the last are no smaller than
/// `least_segment` L2 bytes.
///
/// The worst is one such segment and a tail of a single byte (43 with its headers): HTB counts the overhead
/// once, and does not pad the tail to a whole frame.
fn counted_share(least_segment: u32, tag_bytes: u32) -> f64 {
    if least_segment == u32::MAX {
        return 1.0;
    }
    let overhead = WIRE_OVERHEAD + tag_bytes;
    let counted = least_segment + SHORTEST_TAIL + overhead;
    let on_wire = least_segment + overhead + MIN_FRAME + overhead;
    f64::from(counted) / f64::from(on_wire)
}

/// L2 bytes of the shortest last segment: one byte of UDP over IPv4.
const SHORTEST_TAIL: u32 = 14 + 20 + 8 + 1;

/// Bytes that the program adds to each frame of a level, which the queue does not see.
const fn tag_bytes(config: &Config) -> u32 {
    if config.flags & FLAG_PRIORITY_TAG != 0 { VLAN_TAG as u32 } else { 0 }
}

/// A full frame.
#[derive(Clone, Copy)]
struct Frame {
    l2_bytes: u32,
    tag_bytes: u32,
}

impl Frame {
    /// What the limiter charges for a GSO packet of so many.
    const fn on_wire(self, segments: u32) -> u32 {
        wire_bytes(segments * (self.l2_bytes + self.tag_bytes), segments)
    }

    /// How many fit into one packet of so many wire bytes.
    fn fit_into(self, most: u32) -> u32 {
        (1..=most / self.on_wire(1)).rev().find(|&segments| self.on_wire(segments) <= most).unwrap_or(0)
    }
}

/// Most segments of a GSO packet that the levels can take, and that a queue of ours should send at once; `None`
/// where it does not matter.
fn gso_segments(config: &Config, frame: Frame) -> Option<u32> {
    let paced = config.limits.iter().filter(|limit| limit.horizon_ns() > 0 && limit.charge() == Charge::Byte);
    // A level that cannot take one full frame is none for bulk.
    let levels = paced.map(|limit| frame.fit_into(limit.max_wire())).filter(|&segments| segments > 0);
    let link = (config.plan.host_rate_bps > 0).then(|| {
        let bytes = u128::from(config.plan.host_rate_bps) * u128::from(LONGEST_GSO_NS) / 8_000_000_000;
        frame.fit_into(u32::try_from(bytes).unwrap_or(u32::MAX)).max(1)
    });
    levels.chain(link).min()
}

/// The same limits while the queue is not there: what is over them is dropped.
pub fn unpaced(config: &Config) -> Config {
    let mut config = *config;
    config.flags &= !(FLAG_CLASSES | FLAG_DEPARTURE_TIMES);
    config.plan.queue = QUEUE_KEEP;
    config.plan.host_rate_bps = 0;
    config.limits = config.limits.map(LevelLimit::unpaced);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wire bytes of a GSO packet with `whole` segments of so many L2 bytes and a tail, and what HTB counts.
    fn wire_and_counted(whole: u32, segment: u32, tail: u32, tag: u32) -> (u32, u32) {
        let overhead = WIRE_OVERHEAD + tag;
        let wire = whole * (segment + overhead) + tail.max(MIN_FRAME) + overhead;
        (wire, whole * segment + tail + overhead)
    }

    #[test]
    fn no_gso_packet_is_counted_less_than_its_share() {
        for tag in [0, 4] {
            let least = LEAST_MTU + 14;
            let share = counted_share(least, tag);
            for whole in 1..=44 {
                for segment in [least, least + 1, 1_514] {
                    for tail in (SHORTEST_TAIL..=segment).step_by(7) {
                        let (wire, counted) = wire_and_counted(whole, segment, tail, tag);
                        assert!(f64::from(counted) >= share * f64::from(wire), "{whole} x {segment} and {tail}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_packet_of_as_many_full_frames_as_the_cap_allows_has_a_price() {
        for tag_bytes in [0, 4] {
            let frame = Frame { l2_bytes: 1_514, tag_bytes };
            for most in frame.on_wire(1)..70_000 {
                let segments = frame.fit_into(most);
                assert!(segments >= 1 && frame.on_wire(segments) <= most && frame.on_wire(segments + 1) > most);
            }
        }
    }
}
