//! Reading two clocks, and waiting for one of them.

use crate::dataplane::sys::monotonic_ns;

/// One moment on two clocks. Times between events of this process are taken from the first, which never jumps; the
/// kernel stamps packets by the second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// `CLOCK_MONOTONIC`, ns.
    pub monotonic_ns: u64,
    /// `CLOCK_REALTIME`, ns since 1970.
    pub real_ns: u64,
}

impl Moment {
    /// Now. A thread that was interrupted between its looks at the two clocks looks again.
    pub fn now() -> Self {
        /// Three looks take some 70 ns.
        const TOGETHER_NS: u64 = 1_000;
        let mut before = monotonic_ns();
        for _ in 0..4 {
            let (real_ns, after) = (real_ns(), monotonic_ns());
            if after - before < TOGETHER_NS {
                return Self { monotonic_ns: before, real_ns };
            }
            before = after;
        }
        Self { monotonic_ns: before, real_ns: real_ns() }
    }
}

/// `CLOCK_REALTIME`, ns since 1970: the clock of the kernel's software time stamps.
pub fn real_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut time) };
    timespec_ns(&time)
}

/// In nanoseconds; 0 for a time before 1970.
pub(super) fn timespec_ns(time: &libc::timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

pub(super) fn timespec(ns: u64) -> libc::timespec {
    libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

/// This long before something is due, a sender stops sleeping and watches the clock: a timer may be late by so much.
pub(super) const SPIN_NS: u64 = 40_000;

/// Returns at `due_ns` of `CLOCK_MONOTONIC`: sleeps first, and watches the clock at the end.
pub(super) fn wait_until(due_ns: u64) {
    let time = timespec(due_ns.saturating_sub(SPIN_NS));
    // SAFETY: `time` outlives the call; an interruption only makes the loop below longer.
    unsafe {
        libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const time, std::ptr::null_mut());
    }
    while monotonic_ns() < due_ns {
        std::hint::spin_loop();
    }
}

/// What a thread that watches instead of sleeping must know of its kernel: one of real-time priority that is always busy is
/// stopped for 50 ms in each second ([`super::give_up_real_time`]).
#[derive(Debug)]
pub(super) struct Vigil {
    since_ns: u64,
    slept_ns: u64,
    looked_ns: u64,
}

impl Vigil {
    const WINDOW_NS: u64 = 10_000_000;
    /// Of each window: more than the twentieth that the kernel asks for.
    const REST_NS: u64 = 700_000;
    /// A thread that did not sleep, and did not look for so long, has been stopped.
    const STOPPED_NS: u64 = 30_000_000;

    pub(super) const fn new(now_ns: u64) -> Self {
        Self { since_ns: now_ns, slept_ns: 0, looked_ns: now_ns }
    }

    /// How long a closed loop at full speed, which keeps the threads on both sides busy, must rest before it goes on, ns:
    /// then it is never stopped.
    pub(super) const fn due_rest_ns(&mut self, now_ns: u64) -> u64 {
        if now_ns < self.since_ns + Self::WINDOW_NS {
            return 0;
        }
        let rest = Self::REST_NS.saturating_sub(self.slept_ns);
        if rest == 0 {
            (self.since_ns, self.slept_ns) = (now_ns, 0);
        }
        rest
    }

    /// To be called all the time while the thread does not sleep. Whether it has just been stopped.
    pub(super) const fn look(&mut self, now_ns: u64) -> bool {
        let stopped = now_ns > self.looked_ns + Self::STOPPED_NS;
        self.looked_ns = now_ns;
        stopped
    }

    /// The thread has slept.
    pub(super) const fn slept(&mut self, from_ns: u64, until_ns: u64) {
        self.slept_ns += until_ns - from_ns;
        self.looked_ns = until_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_vigil_asks_for_its_rest_in_each_window() {
        let mut vigil = Vigil::new(0);
        assert_eq!((vigil.due_rest_ns(0), vigil.due_rest_ns(10 * MS - 1)), (0, 0));
        assert_eq!(vigil.due_rest_ns(10 * MS), Vigil::REST_NS);
        vigil.slept(10 * MS, 10 * MS + 400_000);
        assert_eq!(vigil.due_rest_ns(11 * MS), 300_000);
        vigil.slept(11 * MS, 11 * MS + 300_000);
        // A new window begins.
        assert_eq!((vigil.due_rest_ns(12 * MS), vigil.due_rest_ns(22 * MS - 1)), (0, 0));
        // Who sleeps enough anyway is never asked.
        vigil.slept(12 * MS, 17 * MS);
        assert_eq!(vigil.due_rest_ns(22 * MS), 0);
    }

    #[test]
    fn a_vigil_notices_that_the_thread_was_stopped() {
        let mut vigil = Vigil::new(0);
        assert!(!vigil.look(MS) && !vigil.look(20 * MS));
        // Sleeping is not being stopped.
        vigil.slept(20 * MS, 90 * MS);
        assert!(!vigil.look(91 * MS));
        assert!(vigil.look(141 * MS) && !vigil.look(142 * MS));
    }

    #[test]
    fn both_clocks_go_on_together() {
        let (one, other) = (Moment::now(), Moment::now());
        let (monotonic, real) = (other.monotonic_ns - one.monotonic_ns, other.real_ns.abs_diff(one.real_ns));
        assert!(monotonic.abs_diff(real) < 1_000_000, "{monotonic} and {real}");
    }
}
