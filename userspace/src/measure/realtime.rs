//! Threads that must run on time.

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Whether the thread got real-time priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// SCHED_FIFO.
    RealTime,
    /// The ordinary one: the process may not ask for more.
    Ordinary,
}

/// Pins the calling thread to a CPU, if there is such, asks for real-time priority, and sets its timers
/// to the nanosecond.
pub fn pin_and_prioritise(cpu: usize) -> Priority {
    let mut set = CpuSet::new();
    if set.set(cpu).is_ok() {
        // A machine with fewer CPUs goes on without.
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
    let parameter = libc::sched_param { sched_priority: 50 };
    // SAFETY: both calls take plain values, and a pointer to one that outlives the call.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1);
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter)
    };
    if refused == 0 { Priority::RealTime } else { Priority::Ordinary }
}
