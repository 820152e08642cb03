//! Paced levels: what departs is what a level without a horizon would admit, as early as it would, and
//! nothing is lost that could have waited; also across changes.

mod common;

use common::*;
use proptest::prelude::*;
use qjump_ebpf::{
    Admission, LevelLimit, admit,
    limiter::{MAX_BURST_NS, Oversize, admit_up_to, backlog_ns, carry_over, word_at},
};

/// A limit and its horizon, ns; 0 for one that is not paced.
type Paced = (Spec, u64);

fn limit_of((spec, horizon_ns): Paced) -> LevelLimit {
    spec.limit().paced(horizon_ns).unwrap()
}

/// Limits with horizons from a few packets to many bursts.
fn paced() -> impl Strategy<Value = Paced> {
    limited_spec().prop_flat_map(|spec| {
        let room = MAX_BURST_NS - spec.limit().burst_ns();
        (Just(spec), prop_oneof![3 => any_magnitude(1, room.clamp(1, 1 << 36)), 1 => Just(0)])
            .prop_map(move |(spec, horizon)| (spec, horizon.min(room)))
    })
}

/// A paced level, what left it, and what the reference says of the next packet.
struct Level {
    start_ns: u64,
    memory: Memory,
    slots: [LevelLimit; 2],
    /// When each packet leaves, and its cost, in the order of admission.
    left: Vec<(i128, i128)>,
    sent: Vec<Sent>,
}

impl Level {
    fn new(start_ns: u64, limit: LevelLimit) -> Self {
        Self {
            start_ns,
            memory: Memory::fresh(start_ns),
            slots: [limit, LevelLimit::NOT_CONFIGURED],
            left: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn clock(&self, at: i128) -> u64 {
        self.start_ns.wrapping_add(u64::try_from(at).unwrap())
    }

    fn limit(&self) -> LevelLimit {
        self.slots[self.memory.active.get() as usize]
    }

    /// The first time from which a level without a horizon would let a packet of this cost go, after those
    /// that have left.
    fn earliest(&self, cost_ns: i128) -> Option<i128> {
        let mut costs = cost_ns;
        let burst = i128::from(self.limit().burst_ns());
        let suffixes = self.left.iter().rev().map(|&(at, cost)| {
            costs += cost;
            at + costs - burst
        });
        suffixes.max()
    }

    /// Offers a packet; when it leaves, if it does.
    fn offer(&mut self, spec: &Spec, step: &Step, at: i128) -> Result<Option<i128>, TestCaseError> {
        let (limit, slot) = (self.limit(), self.memory.active.get());
        let (l2, wire) = step.bytes(spec.max_packet());
        let Some(cost_ns) = limit.cost_ns(l2, step.segments, wire) else { return Ok(None) };
        let wait = match admit(&self.memory, slot, &limit, cost_ns, self.clock(at)) {
            Admission::Admitted => 0,
            Admission::Wait(ns) => {
                prop_assert!(ns > 0 && ns <= limit.horizon_ns(), "waits {ns} ns beyond the horizon");
                ns
            }
            Admission::Over => return Ok(None),
            answer => return Err(TestCaseError::fail(format!("{answer:?} on one thread"))),
        };
        let leaves = at + i128::from(wait);
        self.left.push((leaves, cost_ns.into()));
        self.sent.push(Sent { at_ns: leaves, bytes: spec.charged_bytes(wire) });
        Ok(Some(leaves))
    }

    fn check_departures(&self, curve: &Curve) -> Result<(), TestCaseError> {
        let mut sent = self.sent.clone();
        sent.sort_by_key(|packet| packet.at_ns);
        check_every_window(&sent, curve, 1)
    }
}

fn advance(time: i128, step: &Step, scale_ns: u64) -> i128 {
    time + match step.wait {
        Wait::None | Wait::Boundary(_) => 0,
        Wait::Short(ns) => i128::from(ns),
        Wait::OfBurst(parts) => i128::from(scale_ns) * i128::from(parts) / 1024,
    }
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn packets_leave_as_early_as_the_curve_allows_and_none_is_lost_within_the_horizon(
        paced in paced(), start in clock_start(), steps in steps(60),
    ) {
        let (spec, horizon_ns) = paced;
        let mut level = Level::new(start, limit_of(paced));
        let mut time = 0;
        for step in &steps {
            time = advance(time, step, spec.limit().burst_ns());
            let (l2, wire) = step.bytes(spec.max_packet());
            let Some(cost) = level.limit().cost_ns(l2, step.segments, wire) else { continue };
            let earliest = level.earliest(cost.into()).map_or(time, |earliest| earliest.max(time));
            let expected = (earliest - time <= i128::from(horizon_ns)).then_some(earliest);
            prop_assert_eq!(level.offer(&spec, step, time)?, expected, "{} bytes at {}", wire, time);
        }
        let order = level.left.windows(2).all(|pair| pair[0].0 <= pair[1].0);
        prop_assert!(order, "a packet leaves before one that was admitted earlier");
        level.check_departures(&spec.curve())?;
    }

    /// Old and new may each be paced or not. Packets that wait keep their times; a packet may overtake them
    /// if the new burst is larger and has room for them all.
    #[test]
    fn departures_across_a_change_keep_to_the_looser_curve(
        old in paced(), new in paced(), start in clock_start(), before in steps(40), after in steps(40),
        carried in 0usize..40,
    ) {
        let mut level = Level::new(start, limit_of(old));
        let mut time = 0;
        for step in &before {
            time = advance(time, step, old.0.limit().burst_ns());
            level.offer(&old.0, step, time)?;
        }
        level.slots[1] = limit_of(new).replacing(&level.slots[0]);
        level.memory.active.set(1);
        for (number, step) in after.iter().enumerate() {
            time = advance(time, step, new.0.limit().burst_ns());
            if number == carried {
                carry_over(&level.memory, 1, &level.slots[1], level.clock(time));
            }
            level.offer(&new.0, step, time)?;
        }
        level.check_departures(&old.0.curve().looser(new.0.curve()))?;
        // Nor is the level stuck: what it holds drains within both reaches.
        let reaches = i128::from(limit_of(old).reach_ns()) + i128::from(limit_of(new).reach_ns());
        prop_assert_eq!(backlog_ns(level.memory.word.get(), level.clock(time + reaches)), 0);
    }
}

#[test]
fn two_packets_at_once_leave_an_epoch_apart() {
    let spec = Spec::Packet { epoch_ns: 1_000_000, tolerance_ns: 0, max_packet: 256 };
    let limit = spec.limit().paced(2_500_000).unwrap();
    let level = Memory::fresh(0);
    let answers: Vec<_> = (0..4).map(|_| admit(&level, 0, &limit, 1_000_000, 5_000_000)).collect();
    let wait = Admission::Wait;
    assert_eq!(answers, [Admission::Admitted, wait(1_000_000), wait(2_000_000), Admission::Over]);
}

#[test]
fn a_horizon_that_the_word_cannot_hold_is_refused() {
    let spec = Spec::Packet { epoch_ns: 1_000_000, tolerance_ns: 0, max_packet: 256 };
    assert!(spec.limit().paced(MAX_BURST_NS - 1_000_000).is_ok());
    assert!(spec.limit().paced(MAX_BURST_NS).is_err());
}

/// The first packet after a change may be one that would rather go to another level than wait: those that wait keep the times
/// they were given all the same.
#[test]
fn who_does_not_wait_shortens_nobodys_wait() {
    let paced = LevelLimit::per_packet(1_000, 0, 256, Oversize::Drop).unwrap().paced(10_000).unwrap();
    let (changed, now) = (paced.replacing(&paced), 5_000_000_000);
    let level = Memory::new(word_at(now, 6_000, 0), 1);
    let answer = admit_up_to(changed.burst_ns(), &level, 1, &changed, 1_000, now);
    assert_eq!(answer, Admission::Over);
    assert_eq!(level.word.get(), word_at(now, 6_000, 1));
    assert_eq!(admit(&level, 1, &changed, 1_000, now), Admission::Wait(6_000));
}
