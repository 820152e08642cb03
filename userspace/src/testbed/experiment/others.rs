//! What else this machine's CPUs did while something was measured. The emulated network runs at ordinary priority, so
//! other programs delay it, and no thread with real-time priority notices.

use std::{fs, time::Instant};

use nix::{
    sys::{
        resource::{UsageWho, getrusage},
        time::{TimeVal, TimeValLike},
    },
    unistd::{SysconfVar, sysconf},
};

/// CPU time until now.
pub(super) struct Usage {
    at: Instant,
    /// Of all programs and of the hypervisor, s.
    machine: f64,
    /// Of this process and of those that it has started and seen end, s.
    own: f64,
}

impl Usage {
    /// Until now.
    pub(super) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let time = |time: TimeVal| time.num_microseconds() as f64 / 1e6;
        let of = |who| getrusage(who).map_or(0.0, |usage| time(usage.user_time()) + time(usage.system_time()));
        Self {
            at: Instant::now(),
            machine: programs(&stat) as f64 / ticks,
            own: of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN),
        }
    }

    /// The share of the machine's CPU time since then that others had: programs that are not ours, and other virtual
    /// machines. Programs of ours must have ended.
    pub(super) fn others_since(&self) -> f64 {
        let now = Self::now();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let time = (now.at - self.at).as_secs_f64() * cpus;
        ((now.machine - self.machine) - (now.own - self.own)).max(0.0) / time.max(1e-9)
    }
}

/// Ticks of user, nice, system and steal in the first line of /proc/stat. What the kernel does in interrupts, the emulated
/// network above all, is counted elsewhere.
fn programs(stat: &str) -> u64 {
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<u64> = fields.map(|field| field.parse().unwrap_or(0)).collect();
    [0, 1, 2, 7].iter().filter_map(|&field| ticks.get(field)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_programs_and_the_hypervisor() {
        assert_eq!(programs("cpu  100 20 3 4000 5 6 7 80 9 9\ncpu0 1 1 1 1\n"), 203);
        assert_eq!(programs(""), 0);
    }

    #[test]
    fn own_work_is_not_others() {
        let before = Usage::now();
        let end = Instant::now() + std::time::Duration::from_millis(300);
        while Instant::now() < end {
            std::hint::spin_loop();
        }
        let now = Usage::now();
        assert!(now.own - before.own > 0.02);
        assert!((0.0..=1.5).contains(&before.others_since()));
    }
}
