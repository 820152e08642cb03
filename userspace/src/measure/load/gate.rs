//! When a flow may send, and how much: pure, with time as an argument.

use rand::{RngExt, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

const SECOND: u128 = 1_000_000_000;
/// A flow at a rate that was held up may catch up with this much of it.
const CATCH_UP_NS: u64 = 100_000_000;
/// A flow at a rate sends pieces of about this long.
const PIECE_NS: u64 = 1_000_000;
/// But not larger ones than this.
const PIECE_BYTES: u64 = 65_536;

/// How a flow's load is spread over time. What is random is exponential with that mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// All the time.
    #[default]
    Steady,
    /// In turns: sending for `on_ns`, silent for `off_ns`.
    OnOff {
        /// How long it sends, ns.
        on_ns: u64,
        /// How long it is silent, ns.
        off_ns: u64,
        /// Whether these are averages.
        random: bool,
    },
    /// So many bytes in each period, whatever became of those before.
    Bursts {
        /// Payload bytes of a burst.
        bytes: u64,
        /// From the beginning of one to that of the next, ns.
        period_ns: u64,
        /// Whether these are averages.
        random: bool,
    },
}

/// What a flow may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Send up to so many bytes of payload; at least a unit.
    Send(u64),
    /// Nothing before this time, ns since the start.
    Wait(u64),
}

/// Decides for one flow. Its pattern is a matter of the clock alone: a flow that is held up does not move it.
#[derive(Clone, Debug)]
pub struct Gate {
    /// Bytes a second while it sends.
    rate: Option<u64>,
    pattern: Pattern,
    /// The smallest piece, bytes.
    unit: u64,
    random: Xoshiro256PlusPlus,
    /// Up to when the pattern was followed, ns.
    now_ns: u64,
    /// When the pattern changes next, ns.
    next_ns: u64,
    /// Whether an on-off flow is on.
    on: bool,
    /// What the rate allows, in bytes times 10^9.
    credit: u128,
    /// What of bursts was not sent yet, bytes.
    backlog: u64,
}

impl Gate {
    /// A flow that starts at time 0. `rate_bps` in bit/s of payload; it sends pieces of at least `unit` bytes.
    pub fn new(rate_bps: Option<u64>, pattern: Pattern, unit: u64, seed: u64) -> Self {
        let mut gate = Self {
            rate: rate_bps.map(|bps| (bps / 8).max(1)),
            pattern,
            unit: unit.max(1),
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            now_ns: 0,
            next_ns: u64::MAX,
            on: true,
            credit: 0,
            backlog: 0,
        };
        match pattern {
            Pattern::Steady => {}
            Pattern::OnOff { on_ns, random, .. } => gate.next_ns = gate.draw(on_ns, random),
            Pattern::Bursts { .. } => gate.next_ns = 0,
        }
        gate
    }

    /// What may be done at `now_ns`, which never goes back.
    pub fn poll(&mut self, now_ns: u64) -> Allowed {
        while self.next_ns <= now_ns {
            self.earn(self.next_ns);
            self.change();
        }
        self.earn(now_ns);
        let wanted = match self.pattern {
            Pattern::Bursts { .. } => self.backlog,
            _ if self.on => u64::MAX,
            _ => 0,
        };
        if wanted < self.unit {
            return Allowed::Wait(self.next_ns);
        }
        let Some(rate) = self.rate else { return Allowed::Send(wanted) };
        let piece = self.piece(rate).min(wanted);
        let credit = (self.credit / SECOND) as u64;
        if credit >= piece {
            return Allowed::Send(credit.min(wanted));
        }
        let missing = u128::from(piece) * SECOND - self.credit;
        let wait = missing.div_ceil(u128::from(rate)) as u64;
        Allowed::Wait(now_ns.saturating_add(wait).min(self.next_ns))
    }

    /// So much was sent of what [`Self::poll`] allowed.
    pub fn sent(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_sub(u128::from(bytes) * SECOND);
        self.backlog = self.backlog.saturating_sub(bytes);
        self.rest();
    }

    /// A rate is not saved up by who has nothing to send.
    fn rest(&mut self) {
        if matches!(self.pattern, Pattern::Bursts { .. }) && self.backlog < self.unit {
            self.credit = 0;
        }
    }

    fn piece(&self, rate: u64) -> u64 {
        let piece = (u128::from(rate) * u128::from(PIECE_NS) / SECOND) as u64;
        (piece.min(PIECE_BYTES) / self.unit * self.unit).max(self.unit)
    }

    /// Credits the time up to `now_ns`.
    fn earn(&mut self, now_ns: u64) {
        let dt = now_ns.saturating_sub(self.now_ns);
        self.now_ns = self.now_ns.max(now_ns);
        let Some(rate) = self.rate else { return };
        if !self.on {
            return;
        }
        let most = u128::from(rate) * u128::from(CATCH_UP_NS) + u128::from(self.piece(rate)) * SECOND;
        self.credit += u128::from(rate) * u128::from(dt);
        match self.pattern {
            Pattern::Bursts { .. } => self.credit = self.credit.min(u128::from(self.backlog) * SECOND),
            _ => self.credit = self.credit.min(most),
        }
        self.rest();
    }

    /// The change of the pattern at `next_ns`.
    fn change(&mut self) {
        let wait = match self.pattern {
            Pattern::Steady => u64::MAX,
            Pattern::OnOff { on_ns, off_ns, random } => {
                self.on = !self.on;
                self.credit = 0;
                self.draw(if self.on { on_ns } else { off_ns }, random)
            }
            Pattern::Bursts { bytes, period_ns, random } => {
                self.backlog = self.backlog.saturating_add(self.draw(bytes, random));
                self.draw(period_ns, random)
            }
        };
        self.next_ns = self.next_ns.saturating_add(wait);
    }

    fn draw(&mut self, mean: u64, random: bool) -> u64 {
        if !random {
            return mean.max(1);
        }
        exponential(&mut self.random, mean as f64).max(1.0) as u64
    }
}

/// A number of the exponential distribution with this mean.
pub(super) fn exponential(random: &mut Xoshiro256PlusPlus, mean: f64) -> f64 {
    // The complement is never 0, whose logarithm is infinite.
    -(1.0 - random.random::<f64>()).ln() * mean
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: u64 = 1_000_000;

    /// Sends all it may until `end_ns`, in steps: (time, bytes).
    fn follow(gate: &mut Gate, end_ns: u64, most: u64) -> Vec<(u64, u64)> {
        let (mut now, mut sent) = (0, Vec::new());
        while now < end_ns {
            match gate.poll(now) {
                Allowed::Send(bytes) => {
                    let bytes = bytes.min(most);
                    gate.sent(bytes);
                    sent.push((now, bytes));
                    // A system call takes some time.
                    now += 1_000;
                }
                Allowed::Wait(until) => {
                    assert!(until > now, "a wait ends later than now");
                    now = until;
                }
            }
        }
        sent
    }

    fn total(sent: &[(u64, u64)]) -> u64 {
        sent.iter().map(|(_, bytes)| bytes).sum()
    }

    #[test]
    fn greedy_means_any_time_and_any_amount() {
        let mut gate = Gate::new(None, Pattern::Steady, 1400, 0);
        assert_eq!(gate.poll(0), Allowed::Send(u64::MAX));
        gate.sent(1 << 40);
        assert_eq!(gate.poll(0), Allowed::Send(u64::MAX));
    }

    #[test]
    fn a_rate_is_kept_and_datagrams_are_spaced() {
        // 11.2 Mbit/s in datagrams of 1400 B: one a millisecond.
        let mut gate = Gate::new(Some(11_200_000), Pattern::Steady, 1400, 0);
        let sent = follow(&mut gate, 100 * MS, u64::MAX);
        assert!(sent.iter().all(|&(_, bytes)| bytes == 1400), "{sent:?}");
        assert_eq!(sent.iter().map(|&(at, _)| at).collect::<Vec<_>>(), (1..100).map(|n| n * MS).collect::<Vec<_>>());
    }

    #[test]
    fn who_was_held_up_catches_up_but_not_without_end() {
        let mut gate = Gate::new(Some(80_000_000), Pattern::Steady, 1000, 0);
        let Allowed::Send(bytes) = gate.poll(50 * MS) else { panic!("50 ms late") };
        assert_eq!(bytes, 500_000);
        let Allowed::Send(bytes) = gate.poll(10_000 * MS) else { panic!("10 s late") };
        assert_eq!(bytes, 1_000_000 + 10_000);
    }

    #[test]
    fn on_and_off_go_by_the_clock() {
        let pattern = Pattern::OnOff { on_ns: 10 * MS, off_ns: 30 * MS, random: false };
        let mut gate = Gate::new(None, pattern, 1, 0);
        assert_eq!(gate.poll(9 * MS), Allowed::Send(u64::MAX));
        assert_eq!(gate.poll(10 * MS), Allowed::Wait(40 * MS));
        // Somebody came late: the pattern did not wait for him.
        assert_eq!(gate.poll(81 * MS), Allowed::Send(u64::MAX));
        assert_eq!(gate.poll(95 * MS), Allowed::Wait(120 * MS));
        // With a rate, an on-time begins without what the last one left.
        let mut gate = Gate::new(Some(8_000_000), pattern, 1, 0);
        let sent = follow(&mut gate, 400 * MS, u64::MAX);
        assert!(sent.iter().all(|(at, _)| at % (40 * MS) < 10 * MS));
        assert!((90_000..=100_000).contains(&total(&sent)), "{}", total(&sent));
    }

    #[test]
    fn every_burst_is_sent_whole_and_begins_when_it_should() {
        let pattern = Pattern::Bursts { bytes: 100_000, period_ns: 10 * MS, random: false };
        let mut gate = Gate::new(None, pattern, 1, 0);
        let sent = follow(&mut gate, 100 * MS, 65_536);
        assert_eq!(total(&sent), 1_000_000);
        assert!(sent.iter().all(|(at, _)| at % (10 * MS) < MS), "{sent:?}");
        // At 20 bytes a microsecond a burst takes 5 ms.
        let mut gate = Gate::new(Some(160_000_000), pattern, 1, 0);
        let sent = follow(&mut gate, 100 * MS, u64::MAX);
        assert_eq!(total(&sent), 1_000_000);
        assert!(sent.iter().all(|(at, _)| (MS..=6 * MS).contains(&(at % (10 * MS)))), "{sent:?}");
        // Held up for three periods, what is due is what three bursts left.
        let mut gate = Gate::new(None, pattern, 1, 0);
        assert_eq!(gate.poll(29 * MS), Allowed::Send(300_000));
    }

    #[test]
    fn what_is_smaller_than_a_datagram_waits_for_the_next_burst() {
        let pattern = Pattern::Bursts { bytes: 1000, period_ns: MS, random: false };
        let mut gate = Gate::new(None, pattern, 1400, 0);
        assert_eq!(gate.poll(0), Allowed::Wait(MS));
        assert_eq!(gate.poll(MS), Allowed::Send(2000));
        gate.sent(1400);
        assert_eq!(gate.poll(MS), Allowed::Wait(2 * MS));
        assert_eq!(gate.poll(2 * MS), Allowed::Send(1600));
    }

    #[test]
    fn what_is_random_has_the_mean_and_follows_the_seed() {
        let pattern = Pattern::Bursts { bytes: 100_000, period_ns: MS, random: true };
        let run = |seed| follow(&mut Gate::new(None, pattern, 1, seed), 5_000 * MS, u64::MAX);
        let mean = total(&run(7)) as f64 / 5_000.0;
        assert!((90_000.0..110_000.0).contains(&mean), "{mean}");
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let pattern = Pattern::OnOff { on_ns: MS, off_ns: 3 * MS, random: true };
        let mut gate = Gate::new(Some(8_000_000_000), pattern, 1, 1);
        let share = total(&follow(&mut gate, 10_000 * MS, u64::MAX)) as f64 / 10e9;
        assert!((0.2..0.3).contains(&share), "{share}");
    }

    proptest! {
        #[test]
        fn no_pattern_sends_more_than_its_rate(
            rate in 1_000u64..10_000_000_000,
            unit in 1u64..2_000,
            times in (1u64..100 * MS, 1u64..100 * MS),
            bytes in 1u64..10_000_000,
            which in 0..3,
            random: bool,
            seed: u64,
            steps in proptest::collection::vec(0u64..50 * MS, 1..200),
        ) {
            let pattern = match which {
                0 => Pattern::Steady,
                1 => Pattern::OnOff { on_ns: times.0, off_ns: times.1, random },
                _ => Pattern::Bursts { bytes, period_ns: times.0.max(1000), random },
            };
            let mut gate = Gate::new(Some(rate), pattern, unit, seed);
            let (mut now, mut sent) = (0u64, 0u128);
            for step in steps {
                now += step;
                if let Allowed::Send(bytes) = gate.poll(now) {
                    prop_assert!(bytes >= unit);
                    gate.sent(bytes);
                    sent += u128::from(bytes);
                }
                prop_assert!(sent * 8 * SECOND <= u128::from(rate) * u128::from(now));
            }
        }
    }
}
