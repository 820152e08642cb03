//! The limiters of simulated hosts: the kernel's own, and the window limiter of 2015 for comparison.

use std::cell::Cell;

use crate::plan::delays::on_wire;
use qjump_ebpf::{
    Admission, LevelLimit, LevelState, admit,
    frame::wire_bytes,
    limiter::{backlog_ns, word_at},
};

/// The word of a level, as a BPF map holds it.
#[derive(Clone, Debug, Default)]
struct Word(Cell<u64>);

impl LevelState for Word {
    fn load(&self) -> u64 {
        self.0.get()
    }

    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        let old = self.0.get();
        if old != current {
            return Err(old);
        }
        self.0.set(new);
        Ok(())
    }

    fn active_slot(&self) -> u64 {
        0
    }
}

/// Which limiter the hosts of a network have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// The one that the kernel runs.
    #[default]
    Gcra,
    /// A budget for each window, as the module of 2015 had: a window begins with the first packet after
    /// the last one ended, so two budgets may leave back to back.
    Window,
}

/// One level's limiter on one host.
#[derive(Clone, Debug)]
pub struct Limiter {
    word: Word,
    window_start_ns: u64,
    window_used: u64,
}

/// What a level's limiters have in common.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The limit.
    pub limit: LevelLimit,
    /// `None` for the kernel's limiter.
    pub window: Option<Window>,
}

/// What becomes of a packet for its size alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The limiter says when it goes.
    Limited,
    /// Too large for its level: it travels at level 0.
    Demoted,
    /// Too large for its level: it is dropped.
    Dropped,
}

impl Rule {
    /// Whether a packet is small enough for the level, and if not, what the level's rule is.
    #[inline]
    pub fn verdict(&self, l2_bytes: u32) -> Verdict {
        match self.limit.cost_ns(l2_bytes, 1, wire_bytes(l2_bytes, 1)) {
            Some(_) => Verdict::Limited,
            None if self.limit.drops_oversize() => Verdict::Dropped,
            None => Verdict::Demoted,
        }
    }
}

/// A budget for each window.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Wire bytes, counted with this overhead for each frame.
    pub budget: u64,
    /// See `budget`.
    pub overhead: u32,
    /// Length of a window, ns.
    pub length_ns: u64,
}

impl Limiter {
    /// A limiter that has seen nothing, at the start of its host's clock.
    pub fn new(now_ns: u64) -> Self {
        Self { word: Word(Cell::new(word_at(now_ns, 0, 0))), window_start_ns: 0, window_used: u64::MAX }
    }

    /// The earliest time, ns on the host's clock and not before `now_ns`, at which a packet of `l2_bytes`
    /// may go; `None` if it never may.
    #[inline]
    pub fn earliest_ns(&self, rule: &Rule, l2_bytes: u32, now_ns: u64) -> Option<u64> {
        let wire = wire_bytes(l2_bytes, 1);
        if let Some(window) = rule.window {
            let end_ns = self.window_start_ns + window.length_ns;
            let budget = window.budget;
            return match u64::from(on_wire(l2_bytes, window.overhead)) {
                bytes if bytes > budget => None,
                bytes if self.window_used == u64::MAX || now_ns >= end_ns || self.window_used + bytes <= budget => {
                    Some(now_ns)
                }
                _ => Some(end_ns),
            };
        }
        let cost_ns = rule.limit.cost_ns(l2_bytes, 1, wire)?;
        let backlog = backlog_ns(self.word.load(), now_ns);
        Some(now_ns + (backlog + cost_ns).saturating_sub(rule.limit.burst_ns()))
    }

    /// Asks for a packet of `l2_bytes`, and charges it if it may go now.
    #[inline]
    pub fn admit(&mut self, rule: &Rule, l2_bytes: u32, now_ns: u64) -> bool {
        let wire = wire_bytes(l2_bytes, 1);
        if let Some(window) = rule.window {
            if self.window_used == u64::MAX || now_ns >= self.window_start_ns + window.length_ns {
                self.window_start_ns = now_ns;
                self.window_used = 0;
            }
            let bytes = u64::from(on_wire(l2_bytes, window.overhead));
            let fits = self.window_used + bytes <= window.budget;
            self.window_used += if fits { bytes } else { 0 };
            return fits;
        }
        rule.limit
            .cost_ns(l2_bytes, 1, wire)
            .is_some_and(|cost_ns| admit(&self.word, 0, &rule.limit, cost_ns, now_ns) == Admission::Admitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qjump_ebpf::limiter::Oversize;

    /// Admission times of a host that always has a packet.
    fn greedy(rule: Rule, first_ns: u64, until_ns: u64) -> Vec<u64> {
        let mut limiter = Limiter::new(0);
        let (mut now, mut times) = (first_ns, Vec::new());
        while let Some(at) = limiter.earliest_ns(&rule, 256, now).filter(|&at| at < until_ns) {
            // Not a moment before it.
            assert!(at == now || !limiter.clone().admit(&rule, 256, at - 1));
            assert!(limiter.admit(&rule, 256, at));
            times.push(at);
            now = at;
        }
        times
    }

    #[test]
    fn the_kernels_limiter_spaces_and_a_window_does_not() {
        let limit = LevelLimit::per_packet(1_000, 0, 256, Oversize::Drop).unwrap();
        let spaced = greedy(Rule { limit, window: None }, 1, 5_000);
        assert_eq!(spaced, [1, 1_001, 2_001, 3_001, 4_001]);
        // Two packets a window of 2 us: four within a moment, across the edge.
        let mut limiter = Limiter::new(0);
        let rule = Rule { limit, window: Some(Window { budget: 560, overhead: 24, length_ns: 2_000 }) };
        let seen: Vec<bool> = [10, 2_009, 2_009, 2_010, 2_010, 2_010].map(|at| limiter.admit(&rule, 256, at)).into();
        assert_eq!(seen, [true, true, false, true, true, false]);
        assert_eq!(limiter.earliest_ns(&rule, 256, 2_010), Some(4_010));
        assert_eq!(limiter.earliest_ns(&rule, 1_000, 9_000), None);
    }

    #[test]
    fn a_bucket_lets_its_burst_go_and_then_its_rate() {
        // 1 Gbit/s: 8 ns a byte; 280 bytes are 2240 ns.
        let limit = LevelLimit::per_byte(1_000_000_000, 560, 256, Oversize::Drop).unwrap();
        assert_eq!(greedy(Rule { limit, window: None }, 5, 5_000), [5, 5, 2_245, 4_485]);
    }
}
