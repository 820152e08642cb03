//! Notices when this machine's CPUs are away: preempted by a hypervisor, or busy in the kernel.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::Scope,
    time::Duration,
};

use super::pin_and_prioritise;
use crate::dataplane::sys::monotonic_ns;

/// Threads that do nothing but wake on time, one a CPU, and what they saw. They touch no network, so what
/// they see is the machine's alone.
#[derive(Debug)]
pub struct StallWatch {
    allowed_ns: u64,
    longest_ns: AtomicU64,
    long_ns: AtomicU64,
    excess_ns: AtomicU64,
    /// From when to when, ns of CLOCK_MONOTONIC, those that were longer than what is allowed for.
    long: Mutex<Vec<(u64, u64)>>,
    stop: AtomicBool,
}

/// More stalls than this are only summed up.
const REMEMBERED: usize = 10_000;

const INTERVAL: Duration = Duration::from_micros(500);

impl StallWatch {
    /// Stalls of up to `allowed_ns` are allowed for.
    pub const fn new(allowed_ns: u64) -> Self {
        Self {
            allowed_ns,
            longest_ns: AtomicU64::new(0),
            long_ns: AtomicU64::new(0),
            excess_ns: AtomicU64::new(0),
            long: Mutex::new(Vec::new()),
            stop: AtomicBool::new(false),
        }
    }

    /// Starts watching these CPUs, until [`Self::stop`].
    pub fn start<'scope, 'env>(&'env self, scope: &'scope Scope<'scope, 'env>, cpus: impl IntoIterator<Item = usize>) {
        for cpu in cpus {
            scope.spawn(move || {
                pin_and_prioritise(cpu);
                let mut before = monotonic_ns();
                while !self.stop.load(Relaxed) {
                    std::thread::sleep(INTERVAL);
                    let now = monotonic_ns();
                    let late = (now - before).saturating_sub(INTERVAL.as_nanos() as u64);
                    self.longest_ns.fetch_max(late, Relaxed);
                    if late > self.allowed_ns {
                        self.long_ns.fetch_add(late, Relaxed);
                        self.remember(now - late, now);
                    }
                    self.excess_ns.fetch_add(late.saturating_sub(self.allowed_ns), Relaxed);
                    before = now;
                }
            });
        }
    }

    fn remember(&self, from_ns: u64, to_ns: u64) {
        let mut long = self.long.lock().unwrap_or_else(PoisonError::into_inner);
        if long.len() < REMEMBERED {
            long.push((from_ns, to_ns));
        }
    }

    /// Whether a CPU was away at any time between these two, ns of CLOCK_MONOTONIC, for longer than what is allowed for.
    pub fn was_away(&self, from_ns: u64, to_ns: u64) -> bool {
        let long = self.long.lock().unwrap_or_else(PoisonError::into_inner);
        long.iter().any(|&(from, to)| from < to_ns && to > from_ns)
    }

    /// Ends the watch.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    /// The longest stall, ns.
    pub fn longest_ns(&self) -> u64 {
        self.longest_ns.load(Relaxed)
    }

    /// The stalls that were longer than what is allowed for, together, ns.
    pub fn long_ns(&self) -> u64 {
        self.long_ns.load(Relaxed)
    }

    /// The time for which CPUs were away beyond what is allowed for, ns.
    pub fn excess_ns(&self) -> u64 {
        self.excess_ns.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_when_a_cpu_was_away() {
        let watch = StallWatch::new(0);
        watch.remember(100, 200);
        watch.remember(300, 400);
        assert!(
            watch.was_away(0, 101) && watch.was_away(150, 160) && watch.was_away(199, 299) && watch.was_away(0, 900)
        );
        assert!(!watch.was_away(0, 100) && !watch.was_away(200, 300) && !watch.was_away(400, 900));
    }

    #[test]
    fn counts_what_exceeds_the_allowance() {
        let (strict, lenient) = (StallWatch::new(0), StallWatch::new(u64::MAX));
        std::thread::scope(|scope| {
            strict.start(scope, [0]);
            lenient.start(scope, [0]);
            // On a busy machine the threads themselves begin late.
            let patience = std::time::Instant::now() + Duration::from_secs(20);
            while strict.longest_ns() == 0 && std::time::Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(5));
            }
            strict.stop();
            lenient.stop();
        });
        // No timer wakes in the very nanosecond.
        assert!(strict.longest_ns() > 0 && strict.excess_ns() >= strict.longest_ns());
        assert_eq!(strict.long_ns(), strict.excess_ns());
        assert_eq!((lenient.excess_ns(), lenient.long_ns()), (0, 0));
    }
}
