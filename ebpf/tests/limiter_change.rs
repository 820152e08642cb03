//! Changes of the configuration under traffic: never more than the looser of the two configurations,
//! nothing lost to a sender that keeps to both, and never stuck.
//!
//! The simulated host does what the eBPF program and the loader do: a packet reads the slot, prices
//! itself, asks, and asks once more if told `Stale`; the loader writes the idle slot, makes it the
//! active one, and carries the word over, while packets that read the old slot are still on their way.

mod common;

use common::*;
use proptest::prelude::*;
use qjump_ebpf::{
    Admission, Charge, LevelLimit, admit,
    frame::wire_bytes,
    limiter::{Oversize, backlog_ns, carry_over, slot_of, word_at},
};

/// One level of a host.
struct Host {
    start_ns: u64,
    level: Memory,
    slots: [(Spec, LevelLimit); 2],
    /// What the limiter admitted since the level was last without a limit, in real time.
    sent: Vec<Sent>,
}

impl Host {
    fn new(start_ns: u64, spec: Spec) -> Self {
        Self {
            start_ns,
            level: Memory::fresh(start_ns),
            slots: [(spec, spec.limit()), (Spec::NotConfigured, LevelLimit::NOT_CONFIGURED)],
            sent: Vec::new(),
        }
    }

    fn active(&self) -> u64 {
        self.level.active.get()
    }

    fn spec(&self) -> Spec {
        self.slots[self.active() as usize].0
    }

    fn limit(&self) -> LevelLimit {
        self.slots[self.active() as usize].1
    }

    fn clock(&self, at: i128) -> u64 {
        self.start_ns.wrapping_add(u64::try_from(at).unwrap())
    }

    /// The loader's first half: write the idle slot, make it the active one.
    fn flip(&mut self, spec: Spec) {
        let next = 1 - self.active();
        self.slots[next as usize] = (spec, spec.limit().replacing(&self.limit()));
        self.level.active.set(next);
    }

    /// The loader's second half.
    fn carry_over(&self, at: i128) {
        carry_over(&self.level, self.active(), &self.limit(), self.clock(at));
        assert_eq!(slot_of(self.level.word.get()), self.active());
    }

    /// A packet that read `slot`, seen by its CPU at `seen` and by the world at `real`. `None` if it
    /// never came to ask the limiter.
    fn offer(&mut self, slot: u64, step: &Step, seen: i128, real: i128) -> Result<Option<bool>, TestCaseError> {
        let mut slot = slot;
        for turn in 0..2 {
            let (spec, limit) = self.slots[slot as usize];
            let (l2, wire) = step.bytes(spec.max_packet());
            if matches!(limit.charge(), Charge::Unlimited | Charge::NotConfigured) {
                return Ok(None);
            }
            let Some(cost_ns) = limit.cost_ns(l2, step.segments, wire) else { return Ok(None) };
            match admit(&self.level, slot, &limit, cost_ns, self.clock(seen)) {
                Admission::Admitted => {
                    self.sent.push(Sent { at_ns: real, bytes: spec.charged_bytes(wire) });
                    return Ok(Some(true));
                }
                Admission::Over => return Ok(Some(false)),
                Admission::Stale => {
                    prop_assert!(turn == 0, "stale again");
                    prop_assert!(slot != self.active(), "stale without a change");
                    slot = self.active();
                }
                answer @ (Admission::Contended | Admission::Wait(_)) => prop_assert!(false, "{answer:?} on one thread"),
            }
        }
        unreachable!()
    }

    /// When the packet of `step` comes, if the last one came at `time`. `scale_ns` is a burst.
    fn next(&self, time: i128, step: &Step, scale_ns: u64) -> i128 {
        match step.wait {
            Wait::None => time,
            Wait::Short(ns) => time + i128::from(ns),
            Wait::OfBurst(parts) => time + i128::from(scale_ns) * i128::from(parts) / 256,
            Wait::Boundary(offset) => {
                let (spec, limit) = (self.spec(), self.limit());
                let (l2, wire) = step.bytes(spec.max_packet());
                let cost = if spec.is_limited() { limit.cost_ns(l2, step.segments, wire) } else { None };
                let Some(cost) = cost else { return time };
                let now = self.clock(time);
                let longest = limit.burst_ns() + 2 * limit.ceiling_ns() + IMPLAUSIBLE_NS;
                let first = self.level.first_admission(&limit, cost, now, longest).expect("never stuck");
                time.max(time + i128::from(first.wrapping_sub(now)) + i128::from(offset))
            }
        }
    }
}

/// What a limit may become: the same, one thing about it more or less, or something else altogether.
fn changed(spec: Spec, other: Spec, what: u8, factor: u64) -> Spec {
    let longest = 1 << 36;
    match (spec, what) {
        (_, 0) => spec,
        (Spec::Packet { epoch_ns, tolerance_ns, max_packet }, 1) => {
            Spec::Packet { epoch_ns: (epoch_ns * factor).min(longest), tolerance_ns, max_packet }
        }
        (Spec::Packet { epoch_ns, tolerance_ns, max_packet }, 2) => {
            Spec::Packet { epoch_ns: (epoch_ns / factor).max(1), tolerance_ns, max_packet }
        }
        (Spec::Packet { epoch_ns, tolerance_ns, max_packet }, 3) => {
            Spec::Packet { epoch_ns, tolerance_ns: (tolerance_ns + epoch_ns * factor).min(longest), max_packet }
        }
        (Spec::Packet { epoch_ns, max_packet, .. }, 4) => Spec::Packet { epoch_ns, tolerance_ns: 0, max_packet },
        (Spec::Packet { epoch_ns, tolerance_ns, .. }, 5) => {
            Spec::Packet { epoch_ns, tolerance_ns, max_packet: 60 + factor as u32 }
        }
        (Spec::Byte { rate_bps, burst_bytes, max_packet }, 1) => {
            Spec::Byte { rate_bps: (rate_bps * factor).min(400_000_000_000), burst_bytes, max_packet }
        }
        (Spec::Byte { rate_bps, burst_bytes, max_packet }, 2) => {
            // A slower level may not hold as large a burst.
            let slower = (rate_bps / factor).max(8_000);
            let packet = u64::from(wire_bytes(max_packet, 1));
            Spec::Byte { rate_bps: slower, burst_bytes: burst_bytes.min(slower * 30).max(packet), max_packet }
        }
        (Spec::Byte { rate_bps, burst_bytes, max_packet }, 3) => {
            let most = (rate_bps * 30).max(burst_bytes);
            Spec::Byte { rate_bps, burst_bytes: (burst_bytes + 1500 * factor).min(most), max_packet }
        }
        (Spec::Byte { rate_bps, burst_bytes, max_packet }, 4) => {
            let packet = u64::from(wire_bytes(max_packet, 1));
            Spec::Byte { rate_bps, burst_bytes: (burst_bytes / factor).max(packet), max_packet }
        }
        (Spec::Byte { rate_bps, max_packet, .. }, 5) => {
            Spec::Byte { rate_bps, burst_bytes: wire_bytes(max_packet, 1).into(), max_packet }
        }
        _ => other,
    }
}

fn limited_pair() -> impl Strategy<Value = (Spec, Spec)> {
    (limited_spec(), limited_spec(), 0u8..10, any_magnitude(2, 1 << 20))
        .prop_map(|(old, other, what, factor)| (old, changed(old, other, what, factor)))
}

/// Any kind of level.
fn any_spec() -> impl Strategy<Value = Spec> {
    prop_oneof![6 => limited_spec(), 1 => Just(Spec::Unlimited), 1 => Just(Spec::NotConfigured)]
}

/// Traffic before a change, the change, traffic after it. The loader carries the word over before the
/// packet of that number; packets that come later than its last one find it carried over by others.
#[derive(Clone, Debug)]
struct Change {
    start: u64,
    before: Vec<Step>,
    after: Vec<Step>,
    carried_before: usize,
    /// Whether packets after the change come in times of the new burst, or still in those of the old.
    new_pace: bool,
}

fn change() -> impl Strategy<Value = Change> {
    (clock_start(), steps(40), steps(40), 0usize..40, any::<bool>()).prop_map(
        |(start, before, after, carried_before, new_pace)| Change { start, before, after, carried_before, new_pace },
    )
}

/// Makes the change; the host afterwards.
fn play(old: Spec, new: Spec, change: &Change, skews: [i64; CPUS]) -> Result<Host, TestCaseError> {
    let mut host = Host::new(change.start, old);
    let mut time = i128::from(SKEW_NS);
    let scale = old.limit().burst_ns().max(1);
    for step in &change.before {
        time = host.next(time, step, scale);
        let active = host.active();
        host.offer(active, step, time + i128::from(skews[step.cpu]), time)?;
    }
    host.flip(new);
    let scale = if change.new_pace { new.limit().burst_ns().max(1) } else { scale };
    for (number, step) in change.after.iter().enumerate() {
        time = host.next(time, step, scale);
        if number == change.carried_before {
            host.carry_over(time + i128::from(skews[3]));
        }
        let slot = if step.late { 1 - host.active() } else { host.active() };
        host.offer(slot, step, time + i128::from(skews[step.cpu]), time)?;
    }
    Ok(host)
}

/// Sends until nothing more passes at `at`, so that the backlog is as long as it can be.
fn exhaust(host: &mut Host, at: i128) -> Result<(), TestCaseError> {
    let largest = Step { wait: Wait::None, size: u16::MAX, cpu: 0, segments: 1, late: false };
    let smallest = Step { size: 0, ..largest };
    let (active, spec, limit) = (host.active(), host.spec(), host.limit());
    let (l2, wire) = largest.bytes(spec.max_packet());
    let cost = limit.cost_ns(l2, 1, wire).unwrap();
    // Of millions of packets, all but the last few in one step.
    assert_eq!(slot_of(host.level.word.get()), active);
    let backlog = backlog_ns(host.level.word.get(), host.clock(at));
    let bulk = (limit.burst_ns().saturating_sub(backlog) / cost).saturating_sub(3);
    if bulk > 0 {
        host.level.word.set(word_at(host.clock(at), backlog + bulk * cost, active));
        host.sent.push(Sent { at_ns: at, bytes: spec.charged_bytes(wire) * u128::from(bulk) });
    }
    for step in [largest, smallest] {
        let mut packets = 0;
        while host.offer(active, &step, at, at)? == Some(true) {
            packets += 1;
            prop_assert!(packets < 1_000, "no end to the burst");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn no_window_across_a_change_exceeds_the_looser_curve(pair in limited_pair(), change in change()) {
        let (old, new) = pair;
        let host = play(old, new, &change, [0; CPUS])?;
        // No allowance for the change itself: all its rounding is against the sender.
        check_every_window(&host.sent, &old.curve().looser(new.curve()), 1)?;
    }

    #[test]
    fn nor_by_more_than_what_the_cpus_clocks_differ(pair in limited_pair(), change in change(), skews in skews()) {
        let (old, new) = pair;
        let host = play(old, new, &change, skews)?;
        // A window is a part before the word was carried over and a part after, each off by two skews.
        check_every_window(&host.sent, &old.curve().looser(new.curve()), 4 * SKEW_NS as u128 + 1)?;
    }

    /// The worst case: a full burst, the change at once, and all that the level then gives.
    #[test]
    fn a_change_hands_out_no_second_burst(
        pair in limited_pair(), start in clock_start(), by_loader in any::<bool>(), after in 0u64..=256, steps in steps(10),
    ) {
        let (old, new) = pair;
        let mut host = Host::new(start, old);
        exhaust(&mut host, 0)?;
        let mut time = i128::from(old.limit().burst_ns()) * i128::from(after) / 256;
        host.flip(new);
        if by_loader {
            host.carry_over(time);
        }
        for step in &steps {
            time = host.next(time, step, new.limit().burst_ns());
            let active = host.active();
            host.offer(active, step, time, time)?;
        }
        time += 2 * i128::from(old.limit().burst_ns() + new.limit().burst_ns());
        check_every_window(&host.sent, &old.curve().looser(new.curve()), 1)?;
        // When all has drained, there is the new burst again and not the old.
        host.sent.clear();
        host.carry_over(time);
        exhaust(&mut host, time)?;
        check_every_window(&host.sent, &new.curve(), 1)?;
    }

    #[test]
    fn a_level_admits_again_when_the_old_burst_and_one_packet_have_drained(
        pair in limited_pair(), start in clock_start(), exhausted in any::<bool>(), before in steps(20),
        by_loader in any::<bool>(), late in 0u64..=256, probes in proptest::collection::vec(0u64..=256, 0..8),
    ) {
        let (old, new) = pair;
        let mut host = Host::new(start, old);
        let mut time = 0;
        for step in &before {
            time = host.next(time, step, old.limit().burst_ns());
            host.offer(0, step, time, time)?;
        }
        if exhausted {
            exhaust(&mut host, time)?;
        }
        host.flip(new);
        let limit = host.limit();
        let cost = limit.cost_ns(new.max_packet(), 1, wire_bytes(new.max_packet(), 1)).unwrap();
        let longest = old.limit().burst_ns() + cost;
        let within = |part: u64| (u128::from(longest) * u128::from(part) / 256) as u64;
        if by_loader {
            carry_over(&host.level, 1, &limit, host.clock(time).wrapping_add(within(late)));
        }
        // Packets that ask too early do not put it off.
        let mut probes = probes;
        probes.sort_unstable();
        let mut admitted = false;
        for probe in probes {
            let probe = within(probe.max(if by_loader { late } else { 0 }));
            admitted |= admit(&host.level, 1, &limit, cost, host.clock(time).wrapping_add(probe)) == Admission::Admitted;
        }
        if !admitted {
            let last = host.clock(time).wrapping_add(longest);
            prop_assert_eq!(admit(&host.level, 1, &limit, cost, last), Admission::Admitted, "after {} ns", longest);
        }
    }

    /// However often: the answers are those of a host that was left alone, to the nanosecond, also
    /// where clocks differ.
    #[test]
    fn an_identical_reload_changes_no_answer(
        spec in limited_spec(), start in clock_start(), steps in steps(80), skews in skews(),
        reloads in proptest::collection::vec((0usize..80, 0usize..8), 0..8),
    ) {
        let mut alone = Host::new(start, spec);
        let mut reloaded = Host::new(start, spec);
        let mut time = i128::from(SKEW_NS);
        let mut pending: Option<usize> = None;
        for (number, step) in steps.iter().enumerate() {
            time = alone.next(time, step, spec.limit().burst_ns());
            let seen = time + i128::from(skews[step.cpu]);
            if let Some((_, lag)) = reloads.iter().find(|(at, _)| *at == number) {
                if pending.is_some() {
                    // One change ends before another begins.
                    reloaded.carry_over(seen);
                }
                reloaded.flip(spec);
                pending = Some(number + lag);
            }
            if pending == Some(number) {
                reloaded.carry_over(seen);
                pending = None;
            }
            let slot = if step.late && pending.is_some() { 1 - reloaded.active() } else { reloaded.active() };
            let expected = alone.offer(0, step, seen, time)?;
            let answer = reloaded.offer(slot, step, seen, time)?;
            prop_assert_eq!(answer, expected, "packet {} at {}", number, seen);
        }
        check_every_window(&reloaded.sent, &spec.curve(), 2 * SKEW_NS as u128 + 1)?;
    }

    /// A CPU may stop between reading the clock and carrying a word over, and others admit packets
    /// meanwhile. It must carry their backlog as well, however short a burst is against its stall.
    #[test]
    fn a_packet_with_an_old_time_carries_over_the_whole_backlog(
        spec in limited_spec(), start in clock_start(), ahead in 0u64..=256, stall in any_magnitude(1, 1 << 33),
        by_loader in any::<bool>(), size in any::<u16>(),
    ) {
        let mut host = Host::new(start, spec);
        let now = 1i128 << 34;
        let backlog = (u128::from(spec.limit().burst_ns()) * u128::from(ahead) / 256) as u64;
        host.level.word.set(word_at(host.clock(now), backlog, 0));
        host.flip(spec);
        let old_time = now - i128::from(stall);
        let step = Step { wait: Wait::None, size, cpu: 0, segments: 1, late: false };
        let mut charged = 0;
        if by_loader {
            host.carry_over(old_time);
        } else if host.offer(1, &step, old_time, old_time)? == Some(true) {
            let (l2, wire) = step.bytes(spec.max_packet());
            charged = host.limit().cost_ns(l2, 1, wire).unwrap();
        }
        let expected = word_at(host.clock(now), backlog + charged, 1);
        // A word that lies behind the old time as well is of no interest.
        if backlog + stall > 0 {
            prop_assert_eq!(host.level.word.get(), expected);
        }
    }

    /// A sender within the smaller burst and the smaller rate loses nothing to the change. It stops
    /// once for as long as rounding may take: carrying over adds up to 2^-23 of the new burst and 3 ns,
    /// and the new price up to 1 ns for each MiB of the burst; the rest is the packets' own rounding.
    #[test]
    fn a_sender_within_both_curves_loses_nothing(
        pair in limited_pair(), start in clock_start(), steps in steps(60), flipped in 0usize..60, lag in 0usize..5,
        by_loader in any::<bool>(),
    ) {
        let (old, new) = pair;
        let (before, after) = (old.curve(), new.curve());
        let (burst, rate) = (before.burst.min(after.burst), before.rate.min(after.rate));
        let faster = before.rate.max(after.rate);
        // The bucket counts in 1 / rate.under bytes: one ns adds rate.over of them.
        let (gain, byte) = (rate.over as i128, rate.under as i128);
        let full = (burst.over * rate.under / burst.under) as i128;
        let rounding = 8 + u128::from(new.limit().burst_ns() >> 23) + match new {
            Spec::Byte { burst_bytes, .. } => u128::from(burst_bytes >> 20),
            _ => 0,
        };
        // Without the loader, the old rate makes up for rounding that the new one would.
        let slower = (after.rate.over * before.rate.under).div_ceil(after.rate.under * before.rate.over);
        let rounding = if by_loader { rounding } else { rounding * slower.max(1) + 1 } as i128;

        let mut host = Host::new(start, old);
        let (mut tokens, mut time) = (full, 0i128);
        let carried = if by_loader { flipped + lag } else { flipped };
        for (number, step) in steps.iter().enumerate() {
            let step = Step { segments: 1, ..*step };
            let smaller = old.max_packet().min(new.max_packet());
            let (l2, wire) = step.bytes(smaller);
            let bytes = old.charged_bytes(wire).max(new.charged_bytes(wire)) as i128;
            let bare = bytes * byte;
            // A ns, and 2^-20 ns a byte, at the faster rate.
            let rounded = (faster.over * rate.under * ((1 << 20) + bytes as u128)).div_ceil(faster.under << 20) as i128;
            let price = bare + rounded;
            if number == flipped {
                host.flip(new);
            }
            if number == carried {
                if by_loader {
                    host.carry_over(time);
                }
                time += rounding;
            }
            if bare > full {
                continue;
            }
            let missing = price.min(full) - tokens;
            let least = if missing > 0 { (missing + gain - 1) / gain } else { 0 };
            let wait = match step.wait {
                Wait::None | Wait::Boundary(_) => 0,
                Wait::Short(ns) => ns,
                Wait::OfBurst(parts) => old.limit().burst_ns().min(new.limit().burst_ns()) * parts / 256,
            };
            let wait = least.max(wait.into());
            time += wait;
            tokens = (tokens + wait * gain).min(full) - price;
            // Until the word is carried over, packets come that read the slot before the change.
            let slot = u64::from(number >= carried);
            let (_, limit) = host.slots[slot as usize];
            let cost = limit.cost_ns(l2, 1, wire).unwrap();
            prop_assert_eq!(
                admit(&host.level, slot, &limit, cost, host.clock(time)),
                Admission::Admitted,
                "packet {} at {}", number, time
            );
        }
    }
}

proptest! {
    #![proptest_config(cases(96))]

    /// Change after change, each when the excess of the one before has drained.
    #[test]
    fn a_chain_of_changes_keeps_to_the_loosest_curve(
        first in limited_spec(), start in clock_start(), skews in skews(),
        chain in proptest::collection::vec((any_spec(), 0u8..14, any_magnitude(2, 1 << 16), steps(14), 0usize..16, any::<bool>()), 20..26),
    ) {
        let leave = if skews == [0; CPUS] { 1 } else {
            // Two skews for each change in the window, and two for its ends.
            (chain.len() as u128 + 1) * 2 * SKEW_NS as u128 + 1
        };
        let mut host = Host::new(start, first);
        let mut curve = first.curve();
        let mut time = i128::from(SKEW_NS);
        let mut old = first;
        for (other, what, factor, steps, carried_before, exhausted) in &chain {
            let new = changed(old, *other, *what, *factor);
            let old_burst = host.limit().burst_ns();
            host.flip(new);
            let mut carried_at = None;
            for (number, step) in steps.iter().enumerate() {
                if number == *carried_before {
                    host.carry_over(time + i128::from(skews[3]));
                    carried_at = Some(time);
                }
                time = host.next(time, step, old_burst.max(1));
                let seen = time + i128::from(skews[step.cpu]);
                let slot = if step.late && carried_at.is_none() { 1 - host.active() } else { host.active() };
                host.offer(slot, step, seen, time)?;
            }
            if carried_at.is_none() {
                host.carry_over(time + i128::from(skews[3]));
            }
            // The wait between changes: until the old burst has drained.
            let drained = carried_at.unwrap_or(time) + i128::from(old_burst) + 2 * i128::from(SKEW_NS);
            match (old.is_limited(), new.is_limited()) {
                (true, true) => curve = curve.looser(new.curve()),
                // A window across a time without a limit has none.
                (false, true) => curve = new.curve(),
                (true, false) => {}
                (false, false) => prop_assert!(host.sent.is_empty()),
            }
            check_every_window(&host.sent, &curve, leave)?;
            if !new.is_limited() {
                host.sent.clear();
            }
            let step = Step { wait: Wait::Boundary(0), size: u16::MAX, cpu: 0, segments: 1, late: false };
            while time < drained && new.is_limited() {
                // Greedy to the end, but not for millions of packets.
                let next = host.next(time, &step, 1);
                let next = next.max(time + i128::from(old_burst) / 8 + i128::from(SKEW_NS) / 4);
                if next > drained {
                    break;
                }
                time = next;
                let active = host.active();
                host.offer(active, &step, time + i128::from(skews[0]), time)?;
            }
            time = time.max(drained);
            if *exhausted && new.is_limited() {
                exhaust(&mut host, time)?;
            }
            old = new;
        }
        check_every_window(&host.sent, &curve, leave)?;
    }

    /// Where one side has no limit there is nothing to carry over: the limit starts afresh.
    #[test]
    fn a_limit_after_none_starts_with_one_full_burst(
        limited in limited_spec(), without in prop_oneof![Just(Spec::Unlimited), Just(Spec::NotConfigured)],
        start in clock_start(), before in steps(20), after in steps(20), word in proptest::option::of(any::<u64>()),
        by_loader in any::<bool>(),
    ) {
        let mut host = Host::new(start, limited);
        let mut time = 0;
        for step in &before {
            time = host.next(time, step, limited.limit().burst_ns());
            host.offer(0, step, time, time)?;
        }
        host.flip(without);
        // Packets still on their way are within the limit that they read, or see that there is none.
        for step in &after {
            time = host.next(time, step, limited.limit().burst_ns());
            host.offer(u64::from(!step.late), step, time, time)?;
        }
        check_every_window(&host.sent, &limited.curve(), 1)?;
        host.carry_over(time);
        prop_assert_eq!(backlog_ns(host.level.word.get(), host.clock(time)), 0);
        // Even a damaged word does not keep the new limit from starting.
        if let Some(word) = word {
            host.level.word.set(word | 1);
        }
        host.flip(limited);
        if by_loader {
            host.carry_over(time);
        }
        host.sent.clear();
        let first = Step { wait: Wait::None, size: u16::MAX, cpu: 0, segments: 1, late: false };
        prop_assert_eq!(host.offer(0, &first, time, time)?, Some(true));
        for step in &after {
            time = host.next(time, step, limited.limit().burst_ns());
            host.offer(0, step, time, time)?;
        }
        check_every_window(&host.sent, &limited.curve(), 1)?;
    }

    #[test]
    fn carrying_over_a_damaged_word_leaves_a_level_that_drains(
        pair in limited_pair(), start in any::<u64>(), word in any::<u64>(), near in proptest::option::of(any_magnitude(1, 1 << 41)),
    ) {
        let (old, new) = pair;
        let limit = new.limit().replacing(&old.limit());
        let word = near.map_or(word, |ahead| word_at(start, ahead, word));
        let level = Memory::new(word & !1, 1);
        carry_over(&level, 1, &limit, start);
        prop_assert_eq!(slot_of(level.word.get()), 1);
        let backlog = backlog_ns(level.word.get(), start);
        prop_assert!(backlog <= limit.burst_ns() + old.limit().ceiling_ns() + IMPLAUSIBLE_NS);
        // What no limiter can have made counts as a full burst, and never as less.
        if backlog_ns(word, start) > old.limit().ceiling_ns() + IMPLAUSIBLE_NS {
            prop_assert_eq!(backlog, limit.burst_ns());
        }
    }
}

/// Why an excess drains rather than being forgotten: a large burst, a small one for a while, and the
/// large one again would otherwise be two large bursts with little time between them.
#[test]
fn a_burst_taken_away_and_given_back_is_not_given_twice() {
    let large = Spec::Byte { rate_bps: 8_000_000, burst_bytes: 200_000, max_packet: 1514 };
    let small = Spec::Byte { rate_bps: 8_000_000, burst_bytes: 1_538, max_packet: 1514 };
    let step = Step { wait: Wait::Boundary(0), size: u16::MAX, cpu: 0, segments: 1, late: false };
    let mut host = Host::new(0, large);
    exhaust(&mut host, 0).unwrap();
    host.flip(small);
    host.carry_over(0);
    // Until the excess has drained: 200 kB take 200 ms.
    let mut time = 0;
    while time < 200_000_000 {
        host.offer(1, &step, time, time).unwrap();
        time = host.next(time, &step, 0);
    }
    host.flip(large);
    host.carry_over(time);
    exhaust(&mut host, time).unwrap();
    check_every_window(&host.sent, &large.curve(), 1).unwrap();
}

/// Rates whose price is a whole number of the limiter's units (2^-20 ns a byte), so that a backlog in
/// time is a number of bytes without rounding: 2^a * 5^b bit/s.
fn exact_spec() -> impl Strategy<Value = Spec> {
    let byte = (6u32..14, 3u32..9, any_magnitude(84, 1 << 34)).prop_map(|(twos, fives, burst)| {
        let rate_bps = (1u64 << (twos + 6)) * 5u64.pow(fives);
        Spec::Byte { rate_bps, burst_bytes: burst.min(rate_bps * 30).max(84), max_packet: 60 }
    });
    prop_oneof![packet_spec(), byte]
}

proptest! {
    #![proptest_config(cases(1024))]

    /// The exchange itself, against fractions. Never for fewer bytes; for more by rounding alone, which is
    /// 2^-23 of the new burst and 3 ns. What exceeds the new burst comes on top in the old time.
    #[test]
    fn a_backlog_is_never_worth_less_after_a_change_and_hardly_more(
        old in exact_spec(), new in exact_spec(), part in any::<u32>(), near in -2i64..=2, at_knee in any::<bool>(),
    ) {
        let (before, after) = (old.curve().rate, new.curve().rate);
        let burst = u128::from(new.limit().burst_ns());
        // Old ns times this fraction are new ns.
        let ratio = Fraction { over: before.over * after.under, under: before.under * after.over };
        let knee = burst * ratio.under / ratio.over;
        let longest = old.limit().burst_ns();
        let backlog = if at_knee && knee < longest.into() {
            (knee as u64).saturating_add_signed(near).min(longest)
        } else {
            ((u128::from(longest) * u128::from(part)) >> 32) as u64
        };
        let limit = new.limit().replacing(&old.limit());
        let level = Memory::new(word_at(7, backlog, 0), 1);
        carry_over(&level, 1, &limit, 7);
        let carried = u128::from(backlog_ns(level.word.get(), 7));
        let backlog = u128::from(backlog);
        if backlog <= knee {
            prop_assert!(carried * ratio.under >= backlog * ratio.over, "{carried} ns are worth less than {backlog}");
            let more = (burst >> 23) + 3;
            prop_assert!(carried.saturating_sub(more) * ratio.under <= backlog * ratio.over, "{carried} ns, {backlog}");
            prop_assert!(carried <= burst);
        } else {
            prop_assert_eq!(carried, burst + (backlog - knee));
        }
    }

    /// With rates as they come, whose prices are rounded: a budget that is used up stays used up.
    #[test]
    fn a_budget_that_is_used_up_stays_so_when_only_the_rate_changes(
        old in byte_spec(), rate_bps in any_magnitude(8_000, 400_000_000_000),
    ) {
        let Spec::Byte { burst_bytes, max_packet, .. } = old else { unreachable!() };
        let new = LevelLimit::per_byte(rate_bps, burst_bytes, max_packet, Oversize::Demote);
        prop_assume!(new.is_ok());
        let old = old.limit();
        let new = new.unwrap().replacing(&old);
        let level = Memory::new(word_at(7, old.burst_ns(), 0), 1);
        carry_over(&level, 1, &new, 7);
        let carried = backlog_ns(level.word.get(), 7);
        prop_assert!(carried >= new.burst_ns(), "{carried} of {}", new.burst_ns());
        prop_assert!(carried <= new.burst_ns() + 1, "{carried} of {}", new.burst_ns());
    }
}

/// The loader's clock may be ahead of the time that a packet on its way has read, if only because the
/// packet read it earlier. A level that had nothing to drain has nothing to drain for that packet, too.
#[test]
fn carrying_over_an_idle_level_delays_no_packet_that_read_the_clock_before() {
    let spec = Spec::Packet { epoch_ns: 1_000, tolerance_ns: 0, max_packet: 256 };
    let mut host = Host::new(5_000, spec);
    let step = Step { wait: Wait::None, size: 0, cpu: 0, segments: 1, late: false };
    assert_eq!(host.offer(0, &step, 0, 0).unwrap(), Some(true));
    host.flip(spec);
    host.carry_over(1_005);
    assert_eq!(host.offer(1, &step, 999, 1_006).unwrap(), Some(false));
    assert_eq!(host.offer(0, &step, 1_000, 1_006).unwrap(), Some(true));
}

/// The exchange of one burst for another in numbers, by hand: 1000 bytes of backlog at 8 Mbit/s are
/// 1 ms; at 80 Mbit/s they are 100 us; and into a burst of 500 bytes, 500 drain first, at the old rate.
#[test]
fn a_backlog_is_worth_the_same_bytes_after_a_change() {
    let limit = |rate, burst| LevelLimit::per_byte(rate, burst, 60, Oversize::Demote).unwrap();
    let old = limit(8_000_000, 2_000);
    // The backlog before and after, ns; up to 1 ns more is rounding.
    let check = |new: LevelLimit, before, after| {
        let level = Memory::new(word_at(7, before, 0), 1);
        carry_over(&level, 1, &new.replacing(&old), 7);
        let carried = backlog_ns(level.word.get(), 7);
        assert!(carried == after || carried == after + 1, "{carried}, not {after}");
    };
    check(limit(80_000_000, 2_000), 1_000_000, 100_000);
    check(limit(800_000, 2_000), 1_000_000, 10_000_000);
    check(limit(8_000_000, 500), 1_000_000, 500_000 + 500_000);
    check(limit(80_000_000, 500), 1_000_000, 50_000 + 500_000);
    // A packet-charged level of 84 bytes a millisecond: 84 bytes of backlog are one epoch.
    check(LevelLimit::per_packet(1_000_000, 9_000_000, 60, Oversize::Demote).unwrap(), 84_000, 1_000_000);
}
