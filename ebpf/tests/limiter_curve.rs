//! One configuration, one level: never more than the arrival curve, nothing less than it either, at
//! every edge of the clock and from every word.

mod common;

use common::*;
use proptest::prelude::*;
use qjump_ebpf::{
    Admission, LevelLimit, admit,
    frame::wire_bytes,
    limiter::{MAX_COST_BYTES, Oversize, backlog_ns, word_at},
};

/// The limiter restated over the list of what it admitted. In every suffix of the list, the new
/// packet included, the costs are at most the burst and the time since the suffix began.
///
/// The list is in the order in which the packets were charged. That a packet's time may be older
/// than that of one charged before makes no difference to this statement.
#[derive(Default)]
struct Reference {
    admitted: Vec<(i128, i128)>,
}

impl Reference {
    /// The time from which a packet passes, if time matters to it at all.
    fn earliest(&self, burst_ns: i128, cost_ns: i128) -> Option<i128> {
        let mut costs = cost_ns;
        let suffixes = self.admitted.iter().rev().map(|&(at, cost)| {
            costs += cost;
            at + costs - burst_ns
        });
        suffixes.max()
    }

    fn admits(&self, burst_ns: i128, cost_ns: i128, now_ns: i128) -> bool {
        cost_ns <= burst_ns && self.earliest(burst_ns, cost_ns).is_none_or(|earliest| earliest <= now_ns)
    }
}

/// How far a word's time moved, ns.
fn tat_moved(before: u64, after: u64) -> i64 {
    ((after >> 1).wrapping_sub(before >> 1) << 1) as i64 >> 1
}

/// Sends `steps`, and holds every answer against the reference. The times of the answer are from the
/// start of the clock, as the CPU of the packet saw it and as it was.
fn send(
    spec: &Spec,
    start_ns: u64,
    steps: &[Step],
    skews: [i64; CPUS],
) -> Result<(Vec<Sent>, Vec<Sent>), TestCaseError> {
    let limit = spec.limit();
    let burst_ns = i128::from(limit.burst_ns());
    let level = Memory::fresh(start_ns);
    let mut reference = Reference::default();
    let (mut seen, mut real) = (Vec::new(), Vec::new());
    // No CPU may start before the clock does.
    let mut time = i128::from(SKEW_NS);
    let mut cpu_times = [0i128; CPUS];
    for step in steps {
        let (l2, wire) = step.bytes(spec.max_packet());
        let Some(cost_ns) = limit.cost_ns(l2, step.segments, wire) else {
            // Refused by size. A single packet of at most the largest size is never refused so.
            prop_assert!(step.segments > 1, "a packet of {l2} bytes has no price");
            continue;
        };
        let skew = i128::from(skews[step.cpu]);
        let earliest = reference.earliest(burst_ns, cost_ns.into());
        time = match step.wait {
            Wait::None => time,
            Wait::Short(ns) => time + i128::from(ns),
            Wait::OfBurst(parts) => time + burst_ns * i128::from(parts) / 256,
            // The boundary as this packet's CPU will see it.
            Wait::Boundary(offset) => time.max(earliest.map_or(0, |at| at - skew) + i128::from(offset)),
        };
        // On each CPU time goes on, whatever the others' clocks say.
        let seen_at = (time + skew).max(cpu_times[step.cpu]);
        cpu_times[step.cpu] = seen_at;
        let now_ns = start_ns.wrapping_add(u64::try_from(seen_at).unwrap());

        let before = level.word.get();
        let answer = admit(&level, 0, &limit, cost_ns, now_ns);
        let expected = reference.admits(burst_ns, cost_ns.into(), seen_at);
        let expected = if expected { Admission::Admitted } else { Admission::Over };
        prop_assert_eq!(answer, expected, "{} bytes at {}, free from {:?}", wire, seen_at, earliest);
        if answer == Admission::Admitted {
            prop_assert!(tat_moved(before, level.word.get()) >= cost_ns as i64, "the packet was not charged");
            reference.admitted.push((seen_at, cost_ns.into()));
            let bytes = spec.charged_bytes(wire);
            seen.push(Sent { at_ns: seen_at, bytes });
            real.push(Sent { at_ns: time, bytes });
        } else {
            prop_assert_eq!(before, level.word.get(), "a refused packet was charged");
        }
    }
    Ok((seen, real))
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn no_window_exceeds_the_curve(spec in limited_spec(), start in clock_start(), steps in steps(60)) {
        let (sent, _) = send(&spec, start, &steps, [0; CPUS])?;
        // 1 ns is the clock's resolution.
        check_every_window(&sent, &spec.curve(), 1)?;
    }

    #[test]
    fn no_window_exceeds_the_curve_by_more_than_what_the_cpus_clocks_differ(
        spec in limited_spec(), start in clock_start(), steps in steps(60), skews in skews(),
    ) {
        let (seen, real) = send(&spec, start, &steps, skews)?;
        // By the times that the packets were charged at, nothing is exceeded. (Where those go back, the
        // window is shorter than none; `check_every_window` takes it for 0.)
        check_every_window(&seen, &spec.curve(), 1)?;
        // In real time, the ends of a window are off by one skew each.
        check_every_window(&real, &spec.curve(), 2 * SKEW_NS as u128 + 1)?;
    }

    #[test]
    fn packets_charged_by_packet_keep_their_distance(
        spec in packet_spec(), start in clock_start(), steps in steps(60), tolerant in any::<bool>(),
    ) {
        let Spec::Packet { epoch_ns, tolerance_ns, max_packet } = spec else { unreachable!() };
        let tolerance_ns = if tolerant { tolerance_ns } else { 0 };
        let spec = Spec::Packet { epoch_ns, tolerance_ns, max_packet };
        let (sent, _) = send(&spec, start, &steps, [0; CPUS])?;
        for (i, first) in sent.iter().enumerate() {
            for (k, last) in (1..).zip(&sent[i..]) {
                let least = (k - 1) * i128::from(epoch_ns) - i128::from(tolerance_ns);
                prop_assert!(last.at_ns - first.at_ns >= least, "{k} packets in {}", last.at_ns - first.at_ns);
            }
        }
        if tolerance_ns == 0 {
            for pair in sent.windows(2) {
                prop_assert!(pair[1].at_ns - pair[0].at_ns >= i128::from(epoch_ns));
            }
        }
    }

    #[test]
    fn packets_an_epoch_apart_all_pass_within_their_tolerance(
        spec in packet_spec(), start in clock_start(), early in proptest::collection::vec(0u64..=256, 2..100),
    ) {
        let Spec::Packet { epoch_ns, tolerance_ns, .. } = spec else { unreachable!() };
        let limit = spec.limit();
        let level = Memory::fresh(start);
        let mut before = 0;
        for (number, delay) in (0u64..).zip(early) {
            // Late by up to the tolerance, so that the next may be early by as much. In order.
            let at = number * epoch_ns + (u128::from(tolerance_ns) * u128::from(delay) / 256) as u64;
            before = at.max(before);
            prop_assert_eq!(
                admit(&level, 0, &limit, epoch_ns, start.wrapping_add(before)),
                Admission::Admitted,
                "packet {} at {}", number, before
            );
        }
    }

    /// The prices and the burst, in exact fractions. All that rounding takes from a level is in here.
    #[test]
    fn prices_are_rounded_up_and_by_little(spec in byte_spec(), wire in 84u32..=MAX_COST_BYTES) {
        let Spec::Byte { rate_bps, burst_bytes, .. } = spec else { unreachable!() };
        let limit = spec.limit();
        // In 2^-20 ns, to keep `2^-20 ns a byte` in integers.
        let exact = |bytes: u64| Fraction { over: (u128::from(bytes) * 8_000_000_000) << 20, under: rate_bps.into() };
        let burst = exact(burst_bytes);
        let slack = |bytes: u64| (1 << 20) + u128::from(bytes);
        let burst_ns = u128::from(limit.burst_ns());
        prop_assert!((burst_ns << 20) * burst.under >= burst.over, "the burst is short");
        prop_assert!((burst_ns << 20) * burst.under < burst.over + slack(burst_bytes) * burst.under);
        // As a GSO packet, to which the largest frame is no bound.
        match limit.cost_ns(wire, 2, wire) {
            Some(cost) => {
                let (cost, price) = (u128::from(cost), exact(wire.into()));
                prop_assert!((cost << 20) * price.under >= price.over, "{cost} ns is below {price:?}");
                prop_assert!((cost << 20) * price.under < price.over + slack(wire.into()) * price.under);
            }
            None => prop_assert!(u64::from(wire) > burst_bytes, "{wire} bytes have no price"),
        }
    }

    #[test]
    fn a_burst_of_exactly_its_bytes_passes_in_one_packet(
        rate_bps in any_magnitude(8_000, 400_000_000_000), burst in 84u32..=MAX_COST_BYTES, start in clock_start(),
    ) {
        let limit = LevelLimit::per_byte(rate_bps, burst.into(), 60, Oversize::Drop);
        prop_assume!(limit.is_ok());
        let limit = limit.unwrap();
        let cost = limit.cost_ns(burst, 2, burst);
        prop_assert!(cost.is_some(), "the whole burst has no price");
        let level = Memory::fresh(start);
        prop_assert_eq!(admit(&level, 0, &limit, cost.unwrap(), start), Admission::Admitted);
        prop_assert_eq!(admit(&level, 0, &limit, limit.cost_ns(60, 1, 84).unwrap(), start), Admission::Over);
    }

    /// A token bucket in exact fractions with every packet's price rounded up as far as the limiter
    /// may: its packets all pass.
    #[test]
    fn a_sender_within_the_curve_loses_nothing(
        spec in byte_spec(), start in clock_start(), steps in steps(60),
    ) {
        let Spec::Byte { rate_bps, burst_bytes, max_packet } = spec else { unreachable!() };
        let limit = spec.limit();
        let level = Memory::fresh(start);
        let rate = i128::from(rate_bps);
        // All in bits at 10^9 a second: one ns adds `rate` tokens, a byte takes 8 * 10^9 of them.
        let full = i128::from(burst_bytes) * 8_000_000_000;
        let (mut tokens, mut time) = (full, 0u64);
        for step in steps {
            let (l2, wire) = step.bytes(max_packet);
            // The most that rounding may add to the price: 1 ns, and 2^-20 ns a byte.
            let exact = i128::from(wire) * 8_000_000_000;
            let price = exact + rate + i128::from(wire) * rate / (1 << 20) + 1;
            if exact > full || wire > MAX_COST_BYTES {
                continue;
            }
            // A full bucket that holds the bare packet lets it pass, on credit for the rounding.
            let missing = price.min(full) - tokens;
            let least = if missing > 0 { (missing + rate - 1) / rate } else { 0 } as u64;
            let wait = match step.wait {
                Wait::None | Wait::Boundary(_) => 0,
                Wait::Short(ns) => ns,
                Wait::OfBurst(parts) => limit.burst_ns() * parts / 256,
            };
            let wait = wait.max(least);
            time += wait;
            tokens = (tokens + i128::from(wait) * rate).min(full) - price;
            let cost = limit.cost_ns(l2, step.segments, wire);
            prop_assert!(cost.is_some(), "{wire} bytes have no price");
            prop_assert_eq!(
                admit(&level, 0, &limit, cost.unwrap(), start.wrapping_add(time)),
                Admission::Admitted,
                "{} bytes at {} with {} tokens left", wire, time, tokens
            );
        }
    }

    /// A sender that sends whenever it can is behind an exact token bucket by no more than rounding.
    #[test]
    fn a_greedy_sender_gets_the_rate(spec in byte_spec(), size in any::<u16>(), start in clock_start()) {
        let Spec::Byte { rate_bps, burst_bytes, max_packet } = spec else { unreachable!() };
        let limit = spec.limit();
        let step = Step { wait: Wait::None, size, cpu: 0, segments: 1, late: false };
        let (l2, wire) = step.bytes(max_packet);
        let cost_ns = limit.cost_ns(l2, 1, wire).unwrap();
        // Almost all of a long burst at once, or this test would take as long.
        let level = Memory::fresh(start);
        let bulk = (limit.burst_ns() / cost_ns).saturating_sub(3);
        level.word.set(word_at(start, bulk * cost_ns, 0));
        let mut now = start;
        for number in u128::from(bulk) + 1..u128::from(bulk) + 200 {
            let next = level.first_admission(&limit, cost_ns, now, limit.burst_ns() + cost_ns);
            prop_assert!(next.is_some(), "stuck");
            now = next.unwrap();
            prop_assert_eq!(admit(&level, 0, &limit, cost_ns, now), Admission::Admitted);
            // The exact bucket releases packet `number` (from 1) when it has released all of them but
            // the burst. Rounding adds up to 1 ns and 2^-20 ns a byte for each; 1 ns is the clock's.
            let rate = u128::from(rate_bps);
            let after = u128::from(now.wrapping_sub(start)).saturating_sub(1 + number) * rate;
            let priced = u128::from(wire) * 8_000_000_000 + (u128::from(wire) * rate).div_ceil(1 << 20);
            let exact = (number * priced).saturating_sub(u128::from(burst_bytes) * 8_000_000_000);
            prop_assert!(after <= exact, "packet {number} passed only at {}", now.wrapping_sub(start));
        }
    }

    #[test]
    fn an_idle_level_has_one_burst_however_long_it_was_idle(
        spec in limited_spec(), start in clock_start(), first in steps(20), then in steps(20),
        idle in prop_oneof![Just(YEAR_NS), Just(10 * YEAR_NS), Just(140 * YEAR_NS), any_magnitude(1 << 38, YEAR_NS)],
    ) {
        let limit = spec.limit();
        let level = Memory::fresh(start);
        let mut sent = Vec::new();
        let mut time = 0u64;
        for (steps, pause) in [(&first, idle), (&then, 0)] {
            // Backwards from all that a level admits at once: what it has is what a fresh one has.
            let mut budget = i128::from(limit.burst_ns());
            for step in steps {
                let (l2, wire) = step.bytes(spec.max_packet());
                let Some(cost) = limit.cost_ns(l2, step.segments, wire) else { continue };
                let fits = i128::from(cost) <= budget;
                let answer = admit(&level, 0, &limit, cost, start.wrapping_add(time));
                prop_assert_eq!(answer == Admission::Admitted, fits, "{} ns of {} ns", cost, budget);
                if fits {
                    budget -= i128::from(cost);
                    sent.push(Sent { at_ns: time.into(), bytes: spec.charged_bytes(wire) });
                }
            }
            time += pause;
        }
        check_every_window(&sent, &spec.curve(), 1)?;
    }

    /// A CPU that stops between reading the clock and asking takes nothing back from the others.
    #[test]
    fn an_old_time_never_moves_a_word_back(
        spec in limited_spec(), start in clock_start(), ahead in 0u64..=256, stall in any_magnitude(1, 1 << 33),
    ) {
        let limit = spec.limit();
        let cost = match spec {
            Spec::Packet { epoch_ns, .. } => epoch_ns,
            _ => limit.cost_ns(60, 1, 84).unwrap(),
        };
        let start = start.wrapping_add(1 << 34);
        let backlog = (u128::from(limit.burst_ns()) * u128::from(ahead) / 256) as u64;
        let level = Memory::new(word_at(start, backlog, 0), 0);
        let before = level.word.get();
        let answer = admit(&level, 0, &limit, cost, start.wrapping_sub(stall));
        let charged = if answer == Admission::Admitted { cost as i64 } else { 0 };
        prop_assert_eq!(tat_moved(before, level.word.get()), charged);
        prop_assert_eq!(answer == Admission::Admitted, backlog + stall + cost <= limit.burst_ns());
    }

    /// Whatever is in the word, in either slot, after a change or without one: packets that keep
    /// asking pass again after the longest backlog that a word may have.
    #[test]
    fn a_damaged_word_heals(
        spec in limited_spec(), old in proptest::option::of(limited_spec()), word in any::<u64>(), slot in 0u64..2,
        start in prop_oneof![clock_start(), any::<u64>()], asked in proptest::collection::vec(0u64..=256, 0..20),
        near in proptest::option::of(any_magnitude(1, 1 << 41)),
    ) {
        let limit = match old {
            Some(old) => spec.limit().replacing(&old.limit()),
            None => spec.limit(),
        };
        // A random word is far from the clock; those near it are the ones that pass for good.
        let word = near.map_or(word, |ahead| word_at(start, ahead, word));
        let level = Memory::new(word, slot);
        let cost = limit.cost_ns(spec.max_packet(), 1, wire_bytes(spec.max_packet(), 1)).unwrap();
        let longest = limit.burst_ns() + limit.ceiling_ns() + IMPLAUSIBLE_NS;
        let mut times: Vec<u64> = asked.iter().map(|part| (u128::from(longest) * u128::from(*part) / 256) as u64).collect();
        times.extend([0, longest]);
        times.sort_unstable();
        let answers: Vec<_> =
            times.iter().map(|after| admit(&level, slot, &limit, cost, start.wrapping_add(*after))).collect();
        prop_assert!(answers.contains(&Admission::Admitted), "{word:#x} at {start}: {answers:?}");
        // And from then on it is a level like any other.
        let end = start.wrapping_add(longest);
        prop_assert!(backlog_ns(level.word.get(), end) <= limit.burst_ns());
    }
}

/// The scale of [`a_damaged_word_heals`], in one example: a word an hour ahead does not shut a level for
/// an hour, nor does it open it for more than a burst.
#[test]
fn a_word_ahead_by_an_hour_is_taken_back_to_one_burst() {
    let limit = LevelLimit::per_packet(1_000_000, 0, 256, Oversize::Demote).unwrap();
    let now = 5_000_000_000;
    let level = Memory::new(word_at(now, 3_600_000_000_000, 0), 0);
    assert_eq!(admit(&level, 0, &limit, 1_000_000, now), Admission::Over);
    assert_eq!(admit(&level, 0, &limit, 1_000_000, now + 999_999), Admission::Over);
    assert_eq!(admit(&level, 0, &limit, 1_000_000, now + 1_000_000), Admission::Admitted);
    // Up to a stall's length ahead, the word is believed.
    let level = Memory::new(word_at(now, 1_000_000 + IMPLAUSIBLE_NS, 0), 0);
    let before = level.word.get();
    assert_eq!(admit(&level, 0, &limit, 1_000_000, now), Admission::Over);
    assert_eq!(level.word.get(), before);
}

/// No test above reaches the clock's ends by a single packet at a time: these do.
#[test]
fn the_first_packet_passes_at_every_end_of_the_clock() {
    let limit = LevelLimit::per_packet(1_000, 0, 256, Oversize::Demote).unwrap();
    for now in [0, 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 63) + 1, u64::MAX - 1, u64::MAX] {
        let level = Memory::fresh(now);
        assert_eq!(admit(&level, 0, &limit, 1_000, now), Admission::Admitted, "{now}");
        for early in [0, 1, 999] {
            assert_eq!(admit(&level, 0, &limit, 1_000, now.wrapping_add(early)), Admission::Over, "{now} + {early}");
        }
        assert_eq!(admit(&level, 0, &limit, 1_000, now.wrapping_add(1_000)), Admission::Admitted, "{now}");
    }
}

#[test]
fn packets_larger_than_allowed_have_no_price() {
    let packet = LevelLimit::per_packet(1_000, 5_000, 256, Oversize::Drop).unwrap();
    assert_eq!(packet.cost_ns(256, 1, wire_bytes(256, 1)), Some(1_000));
    assert_eq!(packet.cost_ns(14, 1, wire_bytes(14, 1)), Some(1_000));
    assert_eq!(packet.cost_ns(257, 1, wire_bytes(257, 1)), None);
    // The segments of a GSO packet leave back to back.
    assert_eq!(packet.cost_ns(120, 2, wire_bytes(120, 2)), None);
    // 8 ns a byte.
    let byte = LevelLimit::per_byte(1_000_000_000, 10_000, 1514, Oversize::Demote).unwrap();
    assert_eq!(byte.cost_ns(1514, 1, 1538), Some(8 * 1538));
    assert_eq!(byte.cost_ns(1515, 1, 1539), None);
    assert_eq!(byte.cost_ns(3_028, 2, 3_093), Some(8 * 3_093));
    assert_eq!(byte.cost_ns(9_976, 7, 10_000), Some(80_000));
    assert_eq!(byte.cost_ns(9_977, 7, 10_001), None);
    let large = LevelLimit::per_byte(400_000_000_000, 1 << 30, 1514, Oversize::Demote).unwrap();
    assert!(large.cost_ns(MAX_COST_BYTES, 700, MAX_COST_BYTES).is_some());
    assert_eq!(large.cost_ns(MAX_COST_BYTES, 700, MAX_COST_BYTES + 1), None);
    for (limit, drops) in [(packet, true), (byte, false), (LevelLimit::UNLIMITED, false)] {
        assert_eq!(limit.drops_oversize(), drops);
    }
    for limit in [LevelLimit::UNLIMITED, LevelLimit::NOT_CONFIGURED] {
        assert_eq!(limit.cost_ns(u32::MAX, 1, u32::MAX), Some(0));
    }
}

#[test]
fn limits_that_cannot_be_kept_are_refused() {
    use qjump_ebpf::limiter::{LimitError, MAX_BURST_NS};
    let packet = |epoch, tolerance| LevelLimit::per_packet(epoch, tolerance, 256, Oversize::Drop).map(|_| ());
    assert_eq!(packet(0, 5), Err(LimitError::ZeroEpoch));
    assert_eq!(packet(MAX_BURST_NS, 0), Ok(()));
    assert_eq!(packet(MAX_BURST_NS, 1), Err(LimitError::BurstTooLong(MAX_BURST_NS + 1)));
    assert_eq!(packet(2, u64::MAX), Err(LimitError::BurstTooLong(u64::MAX)));
    let byte = |rate, burst| LevelLimit::per_byte(rate, burst, 1514, Oversize::Drop).map(|_| ());
    assert_eq!(byte(7_999, 1538), Err(LimitError::RateTooLow(7_999)));
    assert_eq!(byte(8_000, 1537), Err(LimitError::BurstBelowPacket { burst: 1537, packet: 1538 }));
    assert_eq!(byte(8_000, 1538), Ok(()));
    // At 8 kbit/s a byte takes a millisecond.
    assert_eq!(byte(8_000, MAX_BURST_NS / 1_000_000), Ok(()));
    let bytes = MAX_BURST_NS / 1_000_000 + 1;
    assert_eq!(byte(8_000, bytes), Err(LimitError::BurstTooLong(bytes * 1_000_000)));
    assert!(matches!(byte(8_000, u64::MAX), Err(LimitError::BurstTooLong(_))));
}

/// A level that another CPU always changes first.
struct Contested(std::cell::Cell<u64>);

impl qjump_ebpf::LevelState for Contested {
    fn load(&self) -> u64 {
        self.0.get()
    }

    fn compare_exchange(&self, current: u64, _new: u64) -> Result<(), u64> {
        // Somebody who charges nothing, so that there is room all the time, and is faster every time.
        self.0.set(current.wrapping_add(2));
        Err(self.0.get())
    }

    fn active_slot(&self) -> u64 {
        0
    }
}

#[test]
fn a_packet_that_never_wins_the_race_is_contended_and_not_charged() {
    let limit = LevelLimit::per_byte(1_000_000_000, 100_000, 1_500, Oversize::Drop).unwrap();
    let level = Contested(0.into());
    assert_eq!(admit(&level, 0, &limit, 1_000, 1_000_000), Admission::Contended);
    // Each try moved the time by 1 ns, and none by the packet's cost.
    assert!(backlog_ns(level.0.get(), 0) <= 16);
}
