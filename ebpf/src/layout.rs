//! The memory that the kernel and the user side share, byte for byte. All of it is pinned, so a
//! change here is a change of [`VERSION`].

use crate::{LEVELS, Level, LevelLimit, REASONS, Reason};

/// Version of everything in this module. Pins of another version are not reused.
pub const VERSION: u32 = 3;

/// One configuration slot of the map [`crate::names::CONFIG`]. The program reads `flags` and
/// `limits`; `plan` is there for people who ask what is in force.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Config {
    /// See [`FLAG_PRIORITY_TAG`].
    pub flags: u64,
    /// One limit a level.
    pub limits: [LevelLimit; LEVELS],
    /// The plan that the limits come from.
    pub plan: PlanRecord,
}

/// In [`Config::flags`]: write the level into the PCP of the frame's tag, and tag untagged frames of
/// levels above 0 with VLAN 0.
pub const FLAG_PRIORITY_TAG: u64 = 1;

/// In [`Config::flags`]: the queue releases packets at their departure times (fq), so write them.
pub const FLAG_DEPARTURE_TIMES: u64 = 2;
/// In [`Config::flags`]: the queue has a class for each level (HTB), so write the class id into
/// `skb->priority`.
pub const FLAG_CLASSES: u64 = 4;

/// How long a socket that was demoted must have sent nothing until it may use its own level again, ns.
pub const DEMOTION_IDLE_NS: u64 = 1_000_000_000;

/// Major number of the handles of the queue that a load sets up ("qj").
pub const QUEUE_MAJOR: u16 = 0x716a;

/// The class of a level in the queue of classes, as `skb->priority` names it (`htb_classify`,
/// net/sched/sch_htb.c).
#[inline(always)]
pub const fn class_id(level: Level) -> u32 {
    ((QUEUE_MAJOR as u32) << 16) | (level.number() as u32 + 1)
}

/// A level above 0 in the queue of bands with an fq each, as `skb->priority` names it. Not the level itself: fq releases
/// packets of priority 7 (TC_PRIO_CONTROL) at once, whatever their departure time (`fq_classify`, net/sched/sch_fq.c; seen on
/// Linux 6.1, not on 6.12). prio has a map of 16 priorities, and looks at the lowest four bits.
#[inline(always)]
pub const fn fq_priority(level: Level) -> u32 {
    8 | level.number() as u32
}

/// In [`PlanRecord::queue`]: the interface's queue is as it was found.
pub const QUEUE_KEEP: u32 = 0;
/// In [`PlanRecord::queue`]: HTB with a class for each level.
pub const QUEUE_HTB: u32 = 1;
/// In [`PlanRecord::queue`]: prio with an fq for each level.
pub const QUEUE_FQ: u32 = 2;
/// In [`Config::flags`]: bit `GRANT_ONLY_SHIFT + L` is set if level L is for sockets with a grant alone.
pub const GRANT_ONLY_SHIFT: u32 = 8;

/// In [`PlanRecord::hook`]: a tcx link (Linux 6.6 and later).
pub const HOOK_TCX: u32 = 0;
/// In [`PlanRecord::hook`]: a filter of the clsact qdisc.
pub const HOOK_CLSACT: u32 = 1;

/// The network-wide part of a plan, for `status`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct PlanRecord {
    /// [`VERSION`] of the writer.
    pub version: u32,
    /// Number of hosts.
    pub hosts: u32,
    /// Slowest link, bit/s.
    pub link_rate_bps: u64,
    /// Fixed delays, ns.
    pub epsilon_ns: u64,
    /// Number of this change: 1 for the first load.
    pub generation: u64,
    /// Time of the change, ns since the Unix epoch.
    pub loaded_at_ns: u64,
    /// Inode of the network namespace of the interface: names and indices mean nothing without it.
    pub netns: u64,
    /// Index of the interface in it. A name may change, this does not.
    pub ifindex: u32,
    /// The host's queue: [`QUEUE_KEEP`], [`QUEUE_HTB`] or [`QUEUE_FQ`].
    pub queue: u32,
    /// 1 if the load created the interface's clsact qdisc, so that unload may remove it.
    pub created_clsact: u16,
    /// Why the queue is what it is, as the user side numbers the reasons; 0 if that is not known.
    pub queue_why: u16,
    /// Where the program is attached: [`HOOK_TCX`] or [`HOOK_CLSACT`].
    pub hook: u32,
    /// Rate that the queue shapes everything to, bit/s; 0 if it does not.
    pub host_rate_bps: u64,
    /// Most segments of a GSO packet before the load, for unload to put back; 0 if the load left it alone.
    pub gso_before: u32,
    /// How many bytes of `queue_before` are used.
    pub queue_before_len: u32,
    /// What the queue was before the load, as the user side writes it.
    pub queue_before: [u8; QUEUE_BEFORE],
    /// One record a level.
    pub levels: [LevelRecord; LEVELS],
}

/// Room for a description of a queue: a classless qdisc with its options.
pub const QUEUE_BEFORE: usize = 448;

/// One level of a plan, for `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct LevelRecord {
    /// Throughput factor; 0 for levels without one.
    pub factor: f64,
    /// Epoch, ns.
    pub epoch_ns: f64,
    /// Rate, bit/s of wire bytes.
    pub rate_bps: f64,
    /// Bound, ns; negative where there is none.
    pub bound_ns: f64,
    /// How many hosts may send at this level at once for the bound to hold.
    pub max_senders: u32,
    /// 1 if the bound holds whatever the other hosts send.
    pub guaranteed: u32,
}

/// The only entry of the map [`crate::names::STATE`]. The words are a cache line apart: two levels
/// that are busy on two CPUs do not slow each other down.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct State {
    /// The slot in force: 0 or 1. Written by the loader, read by every packet.
    pub active: u64,
    reserved: [u64; 7],
    /// One limiter word a level. Written by every CPU, by compare-exchange or under a lock.
    pub words: [Word; LEVELS],
}

/// One limiter word and the level's active flows, alone on their cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Word {
    /// See [`crate::limiter`].
    pub value: u64,
    /// See [`crate::pacing::ActiveFlows`]. No loader touches it.
    pub flows: u64,
    /// See [`Told`]. No loader touches it.
    pub told: u64,
    reserved: [u64; 5],
}

/// The words of a level: what the size of a [`Word`] has room for.
pub const WORDS: usize = size_of::<Word>() / size_of::<u64>();

/// Which events of a level have been told (a word, so that one compare-exchange changes it): a bit for each reason, and in the
/// upper half the number of the plan that they are of. Another plan begins anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told(pub u64);

impl Told {
    /// The word with this event in it, if it is not there yet.
    #[inline(always)]
    pub const fn with(self, plan: u64, reason: Reason) -> Option<Self> {
        let of_plan = if self.0 >> 32 == plan & u32::MAX as u64 { self.0 } else { plan << 32 };
        let with = of_plan | 1 << reason as u32;
        if with == self.0 { None } else { Some(Self(with)) }
    }
}

/// The only entry, on each CPU, of the map [`crate::names::COUNTERS`]. Written by the program on its
/// own CPU: egress runs with bottom halves disabled, so nothing on the same CPU comes between.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Counters {
    /// One set a level.
    pub levels: [LevelCounters; LEVELS],
}

/// What happened to one level's packets.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LevelCounters {
    /// One counter a [`crate::Reason`].
    pub reasons: [Count; REASONS],
    /// `CLOCK_MONOTONIC` of the last packet, ns. Only levels with a limit write it: best effort never
    /// reads the clock.
    pub last_ns: u64,
    /// Packets that had to wait in the queue; each segment counts.
    pub waited_packets: u64,
    /// The longest of these waits, ns.
    pub worst_wait_ns: u64,
}

/// Packets and their wire bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Count {
    /// Packets; each segment of a GSO packet counts.
    pub packets: u64,
    /// Bytes on the wire ([`crate::frame::wire_bytes`]).
    pub bytes: u64,
}

// What the pins of this VERSION look like. If one of these fails, raise VERSION.
const _: () = assert!(size_of::<LevelLimit>() == 112);
const _: () = assert!(size_of::<Config>() == 8 + 112 * 8 + 80 + QUEUE_BEFORE + 40 * 8);
const _: () = assert!(size_of::<State>() == 64 * 9);
const _: () = assert!(size_of::<Counters>() == 8 * (REASONS * 16 + 24));

impl Config {
    /// Every level unlimited at level 0: what a slot holds before the first load.
    pub const EMPTY: Self = Self {
        flags: 0,
        limits: [LevelLimit::NOT_CONFIGURED; LEVELS],
        plan: PlanRecord {
            version: VERSION,
            hosts: 0,
            link_rate_bps: 0,
            epsilon_ns: 0,
            generation: 0,
            loaded_at_ns: 0,
            netns: 0,
            ifindex: 0,
            queue: QUEUE_KEEP,
            created_clsact: 0,
            queue_why: 0,
            hook: HOOK_TCX,
            host_rate_bps: 0,
            gso_before: 0,
            queue_before_len: 0,
            queue_before: [0; QUEUE_BEFORE],
            levels: [LevelRecord {
                factor: 0.0,
                epoch_ns: 0.0,
                rate_bps: 0.0,
                bound_ns: -1.0,
                max_senders: 0,
                guaranteed: 0,
            }; LEVELS],
        },
    };
}

// SAFETY: `repr(C)`, `Copy`, integers and floats only, no padding (the sizes above), and every bit
// pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Config {}
// SAFETY: as for `Config`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for State {}
// SAFETY: as for `Config`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Counters {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_told_once_a_plan() {
        let nothing = Told(0);
        let malformed = nothing.with(1, Reason::Malformed).unwrap();
        assert_eq!(malformed.with(1, Reason::Malformed), None);
        let both = malformed.with(1, Reason::NonIp).unwrap();
        for reason in [Reason::Malformed, Reason::NonIp] {
            assert_eq!(both.with(1, reason), None);
            let anew = both.with(2, reason).unwrap();
            assert_eq!(anew.0.count_ones(), 2, "the plan's number and one event");
        }
    }
}
