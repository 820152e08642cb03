//! Who enforces what: from a plan and the queue of the host to the limits of the program, and from those to
//! the shapes of the queue.
//!
//! A level that is paced is limited twice. The program charges each packet and knows when it may leave; the
//! queue makes it wait. fq goes by the times that the program writes. HTB has its own buckets, made so that
//! they never let more through than the program's: then what waits in the queue is never more than the
//! program counts with, and the program's horizon is the last guard, whatever becomes of the queue.

use qjump_ebpf::{
    Charge, Config, LEVELS, Level, LevelLimit,
    frame::{WIRE_OVERHEAD, wire_bytes},
    layout::{FLAG_CLASSES, FLAG_DEPARTURE_TIMES, FLAG_PRIORITY_TAG, QUEUE_FQ, QUEUE_HTB, QUEUE_KEEP},
    limiter::MAX_BURST_NS,
};

use super::{Error, netlink::Interface};
use crate::{
    config::QueueChoice,
    plan::{OverRule, Plan, PlanError},
    qdisc::{self, Owner, Queue, Setup, Shape},
    units::Rate,
};

/// How long a packet may wait for its departure, ns. The buffers of sockets push back long before; beyond are
/// more senders than the level can ever serve.
const HORIZON_NS: u64 = 5_000_000_000;

/// Smallest MTU of a path for which HTB is given GSO packets, that of IPv6. HTB counts what a frame takes
/// beside its bytes once for all segments, so the smaller they are, the more it would let through.
const LEAST_MTU: u32 = 1_280;

/// The longest that one GSO packet may hold a link whose queue is ours, ns.
const LONGEST_GSO_NS: u64 = 100_000;

/// The queue for an interface, and why it is none where that is not what was asked for.
pub struct Chosen {
    /// Which.
    pub queue: Queue,
    /// Why nothing holds packets back.
    pub why_kept: Option<String>,
}

/// Finds the queue for an interface. Changes nothing.
pub fn choose(
    choice: QueueChoice,
    host_rate: Option<Rate>,
    plan: &Plan,
    interface: &Interface,
) -> Result<Chosen, Error> {
    let use_queue = |queue| Ok(Chosen { queue, why_kept: None });
    let keep = |why: String| {
        if host_rate.is_some() {
            return Err(Error::HostRate { interface: interface.name.clone(), why });
        }
        Ok(Chosen { queue: Queue::Keep, why_kept: Some(why) })
    };
    match choice {
        QueueChoice::Keep if host_rate.is_some() => keep("--queue keep leaves the queue alone".to_owned()),
        QueueChoice::Keep => use_queue(Queue::Keep),
        QueueChoice::Fq if host_rate.is_some() => keep("fq has no rate for everything; use --queue htb".to_owned()),
        QueueChoice::Fq | QueueChoice::Htb => {
            let available = qdisc::available()?;
            let (queue, kind, there) = match choice {
                QueueChoice::Fq => (Queue::Fq, "sch_prio and sch_fq", available.fq && available.prio),
                _ => (Queue::Htb, "sch_htb", available.htb),
            };
            if !there {
                return Err(Error::NoQueue { queue: queue.name(), kind });
            }
            use_queue(queue)
        }
        QueueChoice::Auto => {
            if host_rate.is_none() && !plan.levels.iter().any(|level| may_be_paced(level.spec.over, level.charge)) {
                return keep("no level is paced".to_owned());
            }
            if let Owner::Foreign { kind, handle, .. } = qdisc::owner(interface.index)? {
                return keep(format!(
                    "its queue is {kind} {handle} of somebody else; --queue htb or fq replaces it if it can be put back"
                ));
            }
            let available = qdisc::available()?;
            if host_rate.is_none() && available.fq && available.prio {
                use_queue(Queue::Fq)
            } else if available.htb && !interface.is_vlan {
                use_queue(Queue::Htb)
            } else if available.htb {
                keep(
                    "HTB's classes would hide the level from the VLAN's priority map; load the device below".to_owned(),
                )
            } else {
                keep("this kernel has neither fq with prio nor HTB".to_owned())
            }
        }
    }
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
                        limit.with_max_wire(half.max(wire_bytes(device.mtu + 14, 1)))
                    }
                    _ => limit,
                }
            }
        };
    }
    let cap = gso_segments(&config, device.mtu).filter(|&cap| cap < device.gso_max_segs);
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
        shapes[level.index()] = (limit.horizon_ns() > 0).then(|| shape(limit));
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
fn shape(limit: &LevelLimit) -> Shape {
    let packet = wire_bytes(limit.max_packet(), 1);
    match limit.charge() {
        Charge::Packet => Shape {
            rate_bytes: (u128::from(packet) * 1_000_000_000 / u128::from(limit.epoch_ns())) as u64,
            burst_ns: limit.tolerance_ns(),
            least_bytes: u16::try_from(packet).unwrap_or(u16::MAX),
        },
        _ => {
            let largest = limit.max_wire();
            let share = counted_share(largest, limit.least_segment());
            Shape {
                rate_bytes: (limit.bytes_per_second() as f64 * share) as u64,
                burst_ns: limit.burst_ns() - limit.time_ns(largest).min(limit.burst_ns()),
                least_bytes: wire_bytes(0, 1) as u16,
            }
        }
    }
}

/// What part of a packet's wire bytes HTB counts at least, if it is no larger than `largest` wire bytes and its
/// segments but the last are no smaller than `least_segment` L2 bytes.
fn counted_share(largest: u32, least_segment: u32) -> f64 {
    if least_segment == u32::MAX {
        return 1.0;
    }
    let on_wire = least_segment + WIRE_OVERHEAD;
    // The last segment may be as short as a frame can be.
    let shortest = wire_bytes(0, 1);
    let whole = largest.saturating_sub(shortest).div_ceil(on_wire);
    f64::from(whole * least_segment + shortest) / f64::from(whole * on_wire + shortest)
}

/// Most segments of a GSO packet that the levels can take, and that a queue of ours should send at once; `None`
/// where it does not matter.
fn gso_segments(config: &Config, mtu: u32) -> Option<u32> {
    let frame = wire_bytes(mtu + 14, 1);
    let paced = config.limits.iter().filter(|limit| limit.horizon_ns() > 0);
    // A level that cannot take one full frame is none for bulk.
    let levels = paced
        .filter(|limit| limit.charge() == Charge::Byte && limit.max_wire() >= frame)
        .map(|limit| limit.max_wire() / frame);
    let link = (config.plan.host_rate_bps > 0).then(|| {
        let bytes = u128::from(config.plan.host_rate_bps) * u128::from(LONGEST_GSO_NS) / 8_000_000_000;
        u32::try_from(bytes / u128::from(frame)).unwrap_or(u32::MAX).max(1)
    });
    levels.chain(link).min()
}
