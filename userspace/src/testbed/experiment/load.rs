//! Bulk traffic beside what is measured: iperf3, as it is.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use rand::RngExt;
use serde_json::{Value, json};

use super::lab::{BULK_CPU, Lab};
use crate::{
    measure::result::Figure,
    testbed::{
        Process,
        iperf::{self, Amount},
    },
};

/// Bulk traffic between pairs of hosts: (from, to), counted from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// None.
    #[default]
    Idle,
    /// One TCP flow for each pair, as fast as it goes.
    Greedy(Vec<(usize, usize)>),
    /// Transfers of about so many bytes for each pair, with pauses of about this time between them: a shuffle of a batch
    /// job. Sizes and pauses vary by half, by the seed.
    Shuffle {
        /// From and to.
        pairs: Vec<(usize, usize)>,
        /// Bytes of a transfer.
        bytes: u64,
        /// Between two transfers of a pair.
        pause: Duration,
    },
}

/// The first port of the servers; each pair has one of its own.
const PORT: u16 = 5_201;
/// Until queues are full and TCP has found its rate.
const WARM_UP: Duration = Duration::from_millis(1_500);
/// No load goes on for longer, whatever happens to who started it.
const LONGEST: Duration = Duration::from_secs(900);

impl Load {
    fn pairs(&self) -> &[(usize, usize)] {
        match self {
            Self::Idle => &[],
            Self::Greedy(pairs) | Self::Shuffle { pairs, .. } => pairs,
        }
    }

    /// How long it runs before `work` begins.
    pub const fn warm_up(&self) -> Duration {
        match self {
            Self::Idle => Duration::ZERO,
            Self::Greedy(_) | Self::Shuffle { .. } => WARM_UP,
        }
    }

    /// For results.
    pub fn to_json(&self) -> Value {
        let pairs: Vec<String> = self.pairs().iter().map(|(from, to)| format!("h{}-h{}", from + 1, to + 1)).collect();
        match self {
            Self::Idle => Value::Null,
            Self::Greedy(_) => json!({"kind": "greedy", "program": "iperf3", "congestion": "cubic", "pairs": pairs}),
            Self::Shuffle { bytes, pause, .. } => json!({
                "kind": "shuffle",
                "program": "iperf3",
                "congestion": "cubic",
                "pairs": pairs,
                "bytes": bytes,
                "pause_ns": pause.as_nanos() as u64,
            }),
        }
    }

    /// Does `work` beside the load, after a warm-up. What arrived at the load's destinations meanwhile comes as a figure;
    /// without load there is none.
    ///
    /// # Errors
    /// Those of `work`, and if iperf3 fails.
    pub fn beside<T>(&self, lab: &Lab<'_>, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Figure>)> {
        if *self == Self::Idle {
            return Ok((work()?, Vec::new()));
        }
        let mut servers = Vec::new();
        for (number, &(_, to)) in self.pairs().iter().enumerate() {
            servers.push(iperf::server(lab.rack.host(to), port(number), BULK_CPU)?);
            lab.listening(to, port(number))?;
        }
        let stop = AtomicBool::new(false);
        let (failed, took) = (Mutex::new(None), Mutex::new(Vec::new()));
        let result = std::thread::scope(|scope| {
            let _stopping = Stopping(&stop);
            scope.spawn(|| {
                // The programs end with this thread.
                if let Err(error) = self.drive(lab, &stop, &took) {
                    *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                }
            });
            lab.pause(self.warm_up())?;
            self.counted(lab, work)
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            lab.check()?;
            return Err(error.context("the bulk traffic"));
        }
        let took = took.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        result.map(|(done, mut figures)| {
            figures.extend(transfers(&took));
            (done, figures)
        })
    }

    /// Does `work` and counts what arrives meanwhile.
    fn counted<T>(&self, lab: &Lab<'_>, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Figure>)> {
        let to: BTreeSet<usize> = self.pairs().iter().map(|&(_, to)| to).collect();
        let arrived = || to.iter().map(|&host| lab.received_bytes(host)).sum::<Result<u64>>();
        let (start, before) = (Instant::now(), arrived()?);
        let done = work()?;
        let (after, seconds) = (arrived()?, start.elapsed().as_secs_f64());
        let value = (after - before) as f64 * 8.0 / seconds;
        let name = format!("into {}", to.iter().map(|host| format!("h{}", host + 1)).collect::<Vec<_>>().join(", "));
        Ok((done, vec![Figure { name, value, unit: "bit/s".into() }]))
    }

    /// Keeps the load going until `stop`. How long transfers took, s, were they all of the mean size, goes to `took`.
    fn drive(&self, lab: &Lab<'_>, stop: &AtomicBool, took: &Mutex<Vec<f64>>) -> Result<()> {
        let client = |number: usize, amount: Amount| {
            let (from, to) = self.pairs()[number];
            iperf::client(lab.rack.host(from), &lab.rack.address(to), port(number), amount, BULK_CPU)
        };
        let mut random = lab.random(u64::from(PORT));
        let mut about = |value: f64| value * random.random_range(0.5..1.5);
        let mut flows: Vec<Flow> = self.pairs().iter().map(|_| Flow::Waiting(Instant::now())).collect();
        let end = Instant::now() + LONGEST;
        while !stop.load(Relaxed) && Instant::now() < end {
            for (number, flow) in flows.iter_mut().enumerate() {
                match (self, &mut *flow) {
                    (Self::Idle, _) => {}
                    (Self::Greedy(_), Flow::Waiting(_)) => {
                        let process = client(number, Amount::Seconds(LONGEST.as_secs()))?;
                        *flow = Flow::Sending { process, since: Instant::now(), size: 1.0 };
                    }
                    (Self::Greedy(_), Flow::Sending { process, .. }) => process.require_running()?,
                    (Self::Shuffle { bytes, .. }, Flow::Waiting(until)) => {
                        if Instant::now() >= *until {
                            let size = about(1.0);
                            let process = client(number, Amount::Bytes((*bytes as f64 * size) as u64))?;
                            *flow = Flow::Sending { process, since: Instant::now(), size };
                        }
                    }
                    (Self::Shuffle { pause, .. }, Flow::Sending { process, since, size }) => {
                        if let Some(status) = process.status()? {
                            if !status.success() {
                                process.require_running()?;
                            }
                            let mut took = took.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            took.push(since.elapsed().as_secs_f64() / *size);
                            *flow = Flow::Waiting(Instant::now() + Duration::from_secs_f64(about(pause.as_secs_f64())));
                        }
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// What a pair is doing.
enum Flow {
    Waiting(Instant),
    /// A program, since when, and its bytes over those of the mean transfer.
    Sending {
        process: Process,
        since: Instant,
        size: f64,
    },
}

/// The name of the figure for how long transfers took.
pub const TRANSFER: &str = "RMS time of a mean transfer";

/// What there is to say of transfers that took so long, s.
fn transfers(took: &[f64]) -> Vec<Figure> {
    if took.is_empty() {
        return Vec::new();
    }
    let squares: f64 = took.iter().map(|time| time * time).sum();
    let rms_ns = (squares / took.len() as f64).sqrt() * 1e9;
    vec![
        Figure { name: "transfers".into(), value: took.len() as f64, unit: "1".into() },
        Figure { name: TRANSFER.into(), value: rms_ns, unit: "ns".into() },
    ]
}

/// Ends the load whatever happens to the work beside it.
struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn port(number: usize) -> u16 {
    PORT + number as u16
}
