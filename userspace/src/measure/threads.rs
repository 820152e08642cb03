//! What threads ask of the scheduler, short of real-time priority.

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use super::clock::timespec;

/// Lets the calling thread run on one CPU only. A machine with fewer CPUs goes on without.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Sets the calling thread's timers to the nanosecond, in place of 50 us.
pub(crate) fn precise_timers() {
    // SAFETY: the call takes plain values.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

/// Sleeps until a time of `CLOCK_MONOTONIC`, ns; or less, if a signal comes.
pub(super) fn sleep_until(at_ns: u64) {
    let time = timespec(at_ns);
    // SAFETY: `time` outlives the call, and nothing is asked about the time that was left.
    unsafe {
        libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const time, std::ptr::null_mut());
    }
}
