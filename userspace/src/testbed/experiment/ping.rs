//! ping, as it is.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qjump_ebpf::Level;

use super::lab::{Lab, PROBE_CPU};
use crate::{
    measure::{
        Latencies,
        result::{Counts, Sample, Stream},
    },
    testbed::Process,
    units::Nanos,
};

/// Echo requests from one host to another.
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    /// Who asks.
    pub from: usize,
    /// Who answers.
    pub to: usize,
    /// The level of the requests, by `qjump run`. Answers are the kernel's, at level 0.
    pub level: Option<Level>,
    /// Between two requests, at least 10 ms: ping cannot do less where answers are late.
    pub interval: Nanos,
    /// For how long; ping rounds it up to whole seconds.
    pub time: Duration,
}

/// A ping that runs.
pub struct Pinging {
    ping: Ping,
    process: Process,
}

impl Ping {
    /// Starts it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(self, lab: &Lab<'_>) -> Result<Pinging> {
        let interval = format!("{:.4}", self.interval.ns() as f64 / 1e9);
        // A deadline rather than a number: on a busy CPU it sends less often than it was told to.
        let deadline = (self.time.as_secs_f64().ceil() as u64).to_string();
        let mut process = lab
            .program(self.from, "ping")
            .args(["-n", "-i", &interval, "-w", &deadline, &lab.rack.address(self.to)])
            .level(self.level)
            .cpu(PROBE_CPU)
            .start()?;
        // `qjump run` has the kernel verify programs first, and on a machine of one CPU everybody waits for that.
        while process.stdout()?.is_empty() {
            process.require_running()?;
            lab.pause(Duration::from_millis(20))?;
        }
        Ok(Pinging { ping: self, process })
    }
}

impl Pinging {
    /// Waits until it has ended.
    ///
    /// # Errors
    /// If it does not end, or nothing was answered.
    pub fn finish(mut self) -> Result<Stream> {
        let ping = self.ping;
        let text = self.process.finish(ping.time + Duration::from_secs(10))?;
        let mut latencies = Latencies::new(None);
        times(&text).for_each(|ns| latencies.record(ns));
        let received = latencies.samples();
        ensure!(received > 0, "no echo request of ping was answered");
        let sent = transmitted(&text).context("ping does not say how many it sent")?;
        Ok(Stream {
            name: "ping".into(),
            sample: Sample::Rtt,
            level: ping.level.map(Level::number),
            response: latencies.distribution(),
            counts: Some(Counts { sent, received, lost: sent.saturating_sub(received), ..Counts::default() }),
            ..Stream::default()
        })
    }
}

/// The times in ping's lines, ns: `64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.045 ms`.
fn times(text: &str) -> impl Iterator<Item = u64> {
    text.lines().filter_map(|line| {
        let (_, time) = line.split_once(" time=")?;
        let ms: f64 = time.strip_suffix(" ms")?.parse().ok()?;
        Some((ms * 1e6).round() as u64)
    })
}

/// How many ping has sent, by its last lines: `12000 packets transmitted, 11995 received`. Those on their way when it ended
/// are among them.
fn transmitted(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(" packets transmitted"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ping_writes() {
        let text = "PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.\n\
                    64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=0.045 ms\n\
                    64 bytes from 10.0.0.1: icmp_seq=2 ttl=64 time=21.3 ms\n\
                    64 bytes from 10.0.0.1: icmp_seq=3 ttl=64 time=1.20 ms (DUP!)\n\n\
                    --- 10.0.0.1 ping statistics ---\n\
                    2 packets transmitted, 2 received, 0% packet loss, time 11ms\n\
                    rtt min/avg/max/mdev = 0.045/10.672/21.300/10.627 ms\n";
        assert_eq!(times(text).collect::<Vec<_>>(), [45_000, 21_300_000]);
        assert_eq!((transmitted(text), transmitted("ping: unknown host")), (Some(2), None));
    }
}
