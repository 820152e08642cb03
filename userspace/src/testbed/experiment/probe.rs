//! Our own probe between hosts of a rack, one-way on the machine's one clock.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Result, ensure};
use qjump_ebpf::Level;

use super::lab::{Lab, PROBE_CPU};
use crate::{
    measure::{
        Priority, Probe, Progress,
        result::{Counts, Generator, Sample, Stream},
    },
    units::{Nanos, show_ns},
};

/// UDP probes from some hosts, in turn, to one.
#[derive(Clone, Debug)]
pub struct Train {
    /// Who sends.
    pub from: Vec<usize>,
    /// Who receives.
    pub to: usize,
    /// At which level.
    pub level: Level,
    /// Bytes of UDP payload, at least 16.
    pub payload: usize,
    /// Between two probes, whoever sends them.
    pub interval: Nanos,
    /// How many.
    pub count: u64,
    /// What is promised.
    pub bound_ns: Option<u64>,
}

/// A payload of the smallest frame that there is, 64 bytes with its FCS.
pub const PAYLOAD: usize = 18;
/// How early a packet of a level that drops may come: timers are not exact, and what is early would be lost.
pub const TOLERANCE: Nanos = Nanos::from_ns(200_000);
/// Where probes arrive.
const PORT: u16 = 7_007;

impl Train {
    /// How long it takes, ns.
    pub const fn duration_ns(&self) -> u64 {
        self.count * self.interval.ns()
    }

    /// Runs it.
    ///
    /// # Errors
    /// If a socket fails, or no probe arrives.
    pub fn run(&self, lab: &Lab<'_>) -> Result<Stream> {
        let receiver = lab.socket(self.to, PORT, Level::BEST_EFFORT)?;
        let mut senders = Vec::new();
        for &host in &self.from {
            let sender = lab.socket(host, 0, self.level)?;
            sender.connect((lab.rack.address(self.to), PORT))?;
            senders.push(sender);
        }
        let probe = Probe {
            count: self.count,
            interval_ns: self.interval.ns(),
            payload: self.payload,
            bound_ns: self.bound_ns,
            cpu: PROBE_CPU,
        };
        let (progress, over) = (Progress::default(), AtomicBool::new(false));
        let report = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    if lab.check().is_err() {
                        progress.stop();
                    }
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            });
            let report = probe.run(&senders, &receiver, &progress);
            over.store(true, Relaxed);
            report
        })?;
        lab.check()?;
        ensure!(report.latencies.samples() > 0, "no probe arrived");
        // What is late by half of what is promised decides the result itself.
        let late = report.lateness.quantile_ns(0.999).unwrap_or(0);
        let limited = self.bound_ns.is_some_and(|bound| late > bound / 2);
        Ok(Stream {
            name: format!("udp level {}", self.level),
            sample: Sample::OneWay,
            level: Some(self.level.number()),
            bound_ns: self.bound_ns,
            violations: self.bound_ns.map(|_| report.latencies.violations()),
            response: report.latencies.distribution(),
            lateness: Some(report.lateness.distribution()),
            counts: Some(Counts {
                sent: report.sent,
                received: report.latencies.samples(),
                lost: report.lost(),
                refused: report.refused,
                ..Counts::default()
            }),
            generator: Some(Generator {
                limited,
                why: limited.then(|| format!("the sender itself was up to {} late (p99.9)", show_ns(late as f64))),
                real_time: report.priority == Priority::RealTime,
            }),
            ..Stream::default()
        })
    }
}
