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
    /// The highest ordinary one, by choice: see [`give_up_real_time`].
    GivenUp,
}

/// Makes the calling thread an ordinary one, at the highest priority of those. Linux stops threads of real-time priority
/// for 50 ms in each second that they take all of (`sched_rt_runtime_us`, with RT_GROUP_SCHED whether anybody else wants
/// the CPU or not; else the fair server), and a thread that has no time to sleep is better off without.
pub fn give_up_real_time() -> Priority {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the calls take plain values, and a pointer to one that outlives the call. Their failure leaves the priority
    // as it is, which is the worst that can happen.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const parameter);
        libc::setpriority(libc::PRIO_PROCESS, 0, -20);
    }
    Priority::GivenUp
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
