//! What threads ask of the scheduler, short of real-time priority.

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Lets the calling thread run on one CPU only. A machine with fewer CPUs goes on without.
pub(super) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Sets the calling thread's timers to the nanosecond, in place of 50 us.
pub(super) fn precise_timers() {
    // SAFETY: the call takes plain values.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// Sleeps until a time of `CLOCK_MONOTONIC`, ns; or less, if a signal comes.
pub(super) fn sleep_until(at_ns: u64) {
    let time = libc::timespec { tv_sec: (at_ns / 1_000_000_000) as i64, tv_nsec: (at_ns % 1_000_000_000) as i64 };
    // SAFETY: `time` outlives the call, and nothing is asked about the time that was left.
    unsafe {
        libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const time, std::ptr::null_mut());
    }
}
