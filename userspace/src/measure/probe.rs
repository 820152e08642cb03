//! One-way probes between two sockets on one clock.

use std::{
    io,
    net::UdpSocket,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::{
    Arrivals, Latencies, Priority,
    clock::wait_until,
    pin_and_prioritise,
    schedule::Schedule,
    window::{Arrival, Window},
};
use crate::dataplane::sys::monotonic_ns;

/// A train of probes.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// How many.
    pub count: u64,
    /// Time between two intended sends, ns. With several senders each sends every so many intervals.
    pub interval_ns: u64,
    /// Bytes of UDP payload, at least 16.
    pub payload: usize,
    /// What the latencies are held against.
    pub bound_ns: Option<u64>,
    /// The CPU on which both threads run.
    pub cpu: usize,
}

/// How far a running train is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
    max_ns: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    /// Probes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Probes received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// The largest latency so far, ns.
    pub fn max_ns(&self) -> u64 {
        self.max_ns.load(Relaxed)
    }

    /// Ends the train early.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// What a train of probes found.
#[derive(Clone, Debug)]
pub struct Report {
    /// From the intended send to the receiving application.
    pub latencies: Latencies,
    /// How late the sender itself was.
    pub lateness: Latencies,
    /// Probes that were sent.
    pub sent: u64,
    /// Probes that the kernel refused to send.
    pub refused: u64,
    /// Whether the threads had real-time priority.
    pub priority: Priority,
}

impl Report {
    /// Probes that did not arrive.
    pub fn lost(&self) -> u64 {
        self.sent - self.latencies.samples()
    }
}

/// How long the receiver waits for the last probes.
const LINGER: Duration = Duration::from_millis(1500);

impl Probe {
    /// Sends from `senders` in turn, which are connected to `receiver`'s address; `receiver` gets probes alone.
    ///
    /// # Errors
    /// If a socket fails.
    pub fn run(&self, senders: &[UdpSocket], receiver: &UdpSocket, progress: &Progress) -> io::Result<Report> {
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(receiver, progress, &done));
            let sending = scope.spawn(|| self.send(senders, progress));
            let sent = sending.join().expect("the sender does not panic");
            done.store(true, Relaxed);
            let latencies = receiving.join().expect("the receiver does not panic")?;
            let (lateness, refused, priority) = sent?;
            Ok(Report { latencies, lateness, sent: progress.sent(), refused, priority })
        })
    }

    fn send(&self, senders: &[UdpSocket], progress: &Progress) -> io::Result<(Latencies, u64, Priority)> {
        let priority = pin_and_prioritise(self.cpu);
        let mut lateness = Latencies::new(None);
        let mut refused = 0;
        let mut payload = vec![0; self.payload.max(16)];
        let start = monotonic_ns() + 10_000_000;
        let schedule = Schedule::new(Arrivals::Fixed(self.interval_ns as f64), start, 0);
        for ((number, due), socket) in (0..self.count).zip(schedule).zip(senders.iter().cycle()) {
            if progress.stop.load(Relaxed) {
                break;
            }
            wait_until(due);
            payload[..8].copy_from_slice(&number.to_be_bytes());
            payload[8..16].copy_from_slice(&due.to_be_bytes());
            lateness.record((monotonic_ns() - due).max(1));
            match socket.send(&payload) {
                Ok(_) => {}
                // A limiter that drops says so to some senders; the probe is lost, not the train.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => refused += 1,
                Err(error) => return Err(error),
            }
            progress.sent.fetch_add(1, Relaxed);
        }
        Ok((lateness, refused, priority))
    }

    fn receive(&self, socket: &UdpSocket, progress: &Progress, done: &AtomicBool) -> io::Result<Latencies> {
        pin_and_prioritise(self.cpu);
        let mut latencies = Latencies::new(self.bound_ns);
        let mut seen = Window::new();
        let mut payload = vec![0; 65_536];
        let mut deadline = None;
        loop {
            let length = match socket.recv(&mut payload) {
                Ok(length) => Some(length),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => None,
                Err(error) => return Err(error),
            };
            let now = monotonic_ns();
            if let Some(length) = length
                && length >= 16
            {
                let field = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().expect("eight bytes"));
                let (number, due) = (field(0), field(8));
                // A packet that is no probe, or comes twice, is not a sample.
                if number < self.count && matches!(seen.insert(number), Arrival::InOrder | Arrival::Reordered) {
                    let latency = now.saturating_sub(due).max(1);
                    latencies.record(latency);
                    progress.received.fetch_add(1, Relaxed);
                    progress.max_ns.fetch_max(latency, Relaxed);
                }
            }
            if done.load(Relaxed) {
                let end = *deadline.get_or_insert(now + LINGER.as_nanos() as u64);
                if latencies.samples() == progress.sent() || now >= end {
                    return Ok(latencies);
                }
            }
        }
    }
}

/// Sends `payload` bytes at `bps` bit/s of payload until `stop`, in steps of a millisecond: a sender that
/// does not care what becomes of its packets. Returns how many it sent.
///
/// # Errors
/// If the socket fails; a full queue is not a failure.
pub fn flood(socket: &UdpSocket, payload: usize, bps: u64, stop: &AtomicBool) -> io::Result<u64> {
    const STEP: Duration = Duration::from_millis(1);
    let payload = vec![0xff; payload];
    let per_second = bps / (8 * payload.len() as u64);
    let start = monotonic_ns();
    let mut sent = 0;
    while !stop.load(Relaxed) {
        let due = (monotonic_ns() - start) as u128 * u128::from(per_second) / 1_000_000_000;
        while u128::from(sent) < due && !stop.load(Relaxed) {
            match socket.send(&payload) {
                Ok(_) => {}
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::ECONNREFUSED)) => {}
                Err(error) => return Err(error),
            }
            sent += 1;
        }
        std::thread::sleep(STEP);
    }
    Ok(sent)
}
