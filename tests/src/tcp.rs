//! TCP flows at a level, and what their receiver sees of them.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use qjump::testbed::NetNs;

/// One flow, as its receiver saw it after the warm-up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flow {
    /// Payload bytes.
    pub bytes: u64,
    /// The longest time without any.
    pub longest_gap: Duration,
}

/// Flows from one namespace to an address in another.
pub struct Flows<'a> {
    /// Where they come from.
    pub from: &'a NetNs,
    /// Where they go to.
    pub to: &'a NetNs,
    /// The address there.
    pub address: &'a str,
    /// How many.
    pub count: usize,
    /// Their `SO_PRIORITY`.
    pub priority: u32,
    /// Their congestion control.
    pub congestion: &'a str,
}

// BBR fills the queue while it looks for the rate: with 64 flows, for some seconds.
const WARM_UP: Duration = Duration::from_secs(6);

impl Flows<'_> {
    /// Sends as much as TCP will for `time`, after a warm-up.
    pub fn run(&self, time: Duration) -> Result<Vec<Flow>> {
        self.run_after(WARM_UP, time)
    }

    /// Sends as much as TCP will for `time`, after this warm-up.
    pub fn run_after(&self, warm_up: Duration, time: Duration) -> Result<Vec<Flow>> {
        let listener = self.to.enter(|| Ok(TcpListener::bind((self.address, 0))?))?;
        let to = listener.local_addr()?;
        let sockets: Vec<TcpStream> = self.from.enter(|| {
            (0..self.count)
                .map(|_| {
                    let socket = TcpStream::connect(to)?;
                    set(&socket, libc::SOL_SOCKET, libc::SO_PRIORITY, &self.priority.to_ne_bytes())?;
                    set(&socket, libc::IPPROTO_TCP, libc::TCP_CONGESTION, self.congestion.as_bytes())?;
                    socket.set_write_timeout(Some(Duration::from_secs(5)))?;
                    Ok(socket)
                })
                .collect()
        })?;
        let stop = &AtomicBool::new(false);
        let start = Instant::now() + warm_up;
        let flows = std::thread::scope(|scope| -> Result<Vec<Flow>> {
            let receivers = (0..self.count)
                .map(|_| {
                    let (socket, _) = listener.accept()?;
                    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
                    Ok(scope.spawn(move || receive(socket, start, start + time)))
                })
                .collect::<Result<Vec<_>>>();
            for socket in sockets {
                scope.spawn(move || send(socket, stop));
            }
            let receivers = receivers?;
            let flows = receivers.into_iter().map(|receiver| receiver.join().expect("no panic")).collect();
            stop.store(true, Relaxed);
            Ok(flows)
        })?;
        Ok(flows)
    }
}

fn set(socket: &TcpStream, level: i32, option: i32, value: &[u8]) -> Result<()> {
    // SAFETY: the value is as long as said, and outlives the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as u32) };
    ensure!(result == 0, "option {option}: {}", std::io::Error::last_os_error());
    Ok(())
}

fn send(mut socket: TcpStream, stop: &AtomicBool) {
    let chunk = [0x5a; 16_384];
    // Ends when the receiver hangs up.
    while !stop.load(Relaxed) && socket.write(&chunk).is_ok() {}
}

fn receive(mut socket: TcpStream, start: Instant, end: Instant) -> Flow {
    let mut buffer = [0; 65_536];
    let mut flow = Flow::default();
    let mut last = start;
    loop {
        let read = socket.read(&mut buffer).unwrap_or(0);
        let now = Instant::now();
        if now >= end {
            flow.longest_gap = flow.longest_gap.max(end - last);
            return flow;
        }
        if now > start {
            flow.longest_gap = flow.longest_gap.max(now - last);
            last = now;
            flow.bytes += read as u64;
        }
    }
}

/// Jain's index of fairness: 1 if all are equal, 1/n if one has everything.
pub fn fairness(flows: &[Flow]) -> f64 {
    let sum: f64 = flows.iter().map(|flow| flow.bytes as f64).sum();
    let squares: f64 = flows.iter().map(|flow| (flow.bytes as f64).powi(2)).sum();
    sum * sum / (flows.len() as f64 * squares)
}
