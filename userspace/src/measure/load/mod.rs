//! Bulk load: many bytes from here to a sink, which counts what arrives.
//!
//! A thread a flow on both sides, with blocking calls: the simplest thing that fills a link. Everything ends by
//! itself: a load has a duration, and each call of the kernel a time limit.

mod count;
mod datagrams;
mod gate;
mod sender;
mod sink;
mod wire;

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

pub use self::{
    count::{FlowCount, Received, SLICE_NS, Window},
    gate::Pattern,
    sink::Sink,
    wire::MAX_FLOWS,
};
use super::{
    Transport,
    result::{Curve, Figure, Run},
};
use crate::{socket::Level, units::Rate};

/// Where sinks listen unless told otherwise, TCP and UDP.
pub const PORT: u16 = 7701;
/// The longest load.
pub const MAX_DURATION: Duration = Duration::from_secs(3_600);

/// A load to be sent.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where its [`Sink`] listens.
    pub to: SocketAddr,
    /// What carries it.
    pub transport: Transport,
    /// How many flows.
    pub flows: usize,
    /// Its `SO_PRIORITY`; unset if absent.
    pub level: Option<Level>,
    /// Payload of all flows together while they send; as much as possible if absent.
    pub rate: Option<Rate>,
    /// How it is spread over time.
    pub pattern: Pattern,
    /// How long it lasts, the warm-up included; at most [`MAX_DURATION`].
    pub duration: Duration,
    /// What does not count, at the beginning.
    pub warm_up: Duration,
    /// TCP's congestion control; the kernel's default if absent.
    pub congestion: Option<String>,
    /// Bytes of payload in a datagram.
    pub datagram: usize,
    /// Whether the kernel cuts datagrams from large packets (UDP_SEGMENT): faster, but too large for guaranteed levels.
    pub segment: bool,
    /// Whether nobody is asked what arrived: anything may listen there, or, with UDP, nobody.
    pub blind: bool,
    /// The CPU of its threads.
    pub cpu: Option<usize>,
    /// What is random follows from it.
    pub seed: u64,
}

impl Load {
    /// One greedy TCP connection for ten seconds.
    pub const fn new(to: SocketAddr) -> Self {
        Self {
            to,
            transport: Transport::Tcp,
            flows: 1,
            level: None,
            rate: None,
            pattern: Pattern::Steady,
            duration: Duration::from_secs(10),
            warm_up: Duration::ZERO,
            congestion: None,
            datagram: 1_400,
            segment: false,
            blind: false,
            cpu: None,
            seed: 1,
        }
    }

    /// What is wrong with it, if anything, before anything is sent.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_FLOWS).contains(&self.flows) {
            return Err(format!("{} flows: there can be 1 to {MAX_FLOWS}", self.flows));
        }
        if self.duration > MAX_DURATION || self.duration.is_zero() {
            return Err(format!("a load lasts longer than 0 s and at most {} s", MAX_DURATION.as_secs()));
        }
        if self.warm_up >= self.duration {
            return Err("the warm-up is as long as all of the load; nothing would be left to count".into());
        }
        if !(wire::HEADER..=65_507).contains(&self.datagram) {
            return Err(format!(
                "datagrams of {} bytes: there can be {} (for the header) to 65507",
                self.datagram,
                wire::HEADER
            ));
        }
        if self.transport == Transport::Udp && self.congestion.is_some() {
            return Err("UDP has no congestion control".into());
        }
        if self.transport == Transport::Tcp && self.segment {
            return Err("only datagrams are cut; TCP does it by itself".into());
        }
        match self.pattern {
            Pattern::OnOff { on_ns: 0, .. } => Err("an on-time of 0 sends nothing".into()),
            Pattern::Bursts { bytes: 0, .. } => Err("bursts of 0 bytes send nothing".into()),
            Pattern::Bursts { period_ns: 0..1_000, .. } => Err("bursts come at most every microsecond".into()),
            _ => Ok(()),
        }
    }

    fn window(&self) -> Window {
        Window { from_ns: self.warm_up.as_nanos() as u64, to_ns: self.duration.as_nanos() as u64 }
    }
}

/// How far a load is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    /// Payload bytes that the kernel took so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Ends the load early.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }
}

/// One flow, as its sender saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Payload bytes that the kernel took.
    pub bytes: u64,
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Datagrams that the kernel refused: its limiter or its queue dropped them and said so.
    pub refused: u64,
    /// TCP segments that were sent again; absent for UDP.
    pub retransmits: Option<u64>,
    /// Why the flow ended before its time.
    pub broken: Option<String>,
}

/// What became of a load.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it was.
    pub load: Load,
    /// How long it lasted, ns.
    pub duration_ns: u64,
    /// What its flows sent.
    pub sent: Vec<Sent>,
    /// What its sink counted; absent if nobody was asked or nobody answered.
    pub received: Option<Received>,
    /// What went wrong on the way. With none, the load is complete.
    pub trouble: Vec<String>,
}

impl Outcome {
    /// Payload that arrived, of all flows, bit/s.
    pub fn goodput_bps(&self) -> Option<f64> {
        self.received.as_ref().map(Received::goodput_bps)
    }

    /// As a case of results.
    pub fn run(&self, name: &str) -> Run {
        let figure = |name: &str, value: f64, unit: &str| Figure { name: name.into(), value, unit: unit.into() };
        let total = |of: fn(&Sent) -> u64| self.sent.iter().map(of).sum::<u64>() as f64;
        let mut figures = Vec::new();
        if let Some(received) = &self.received {
            figures.push(figure("goodput", received.goodput_bps(), "bit/s"));
            if received.flows.len() > 1 {
                for (number, flow) in received.flows.iter().enumerate() {
                    figures.push(figure(&format!("goodput of flow {number}"), received.flow_bps(flow), "bit/s"));
                }
                figures.extend(received.fairness().map(|index| figure("fairness (Jain)", index, "1")));
            }
            figures.push(figure("longest gap of a flow", received.longest_gap_ns() as f64, "ns"));
        }
        if self.duration_ns > 0 {
            let rate = total(|sent| sent.bytes) * 8e9 / self.duration_ns as f64;
            figures.push(figure("taken by the kernel", rate, "bit/s"));
        }
        match self.load.transport {
            Transport::Tcp => {
                figures.push(figure("retransmits", total(|sent| sent.retransmits.unwrap_or(0)), "1"));
            }
            Transport::Udp => {
                figures.push(figure("datagrams", total(|sent| sent.datagrams), "1"));
                figures.push(figure("refused sends", total(|sent| sent.refused), "1"));
                if let Some(received) = &self.received {
                    let sum = |of: fn(&FlowCount) -> u64| received.flows.iter().map(of).sum::<u64>() as f64;
                    let lost = (total(|sent| sent.datagrams) - sum(|flow| flow.arrived)).max(0.0);
                    figures.push(figure("lost datagrams", lost, "1"));
                    figures.push(figure("reordered datagrams", sum(|flow| flow.reordered), "1"));
                }
            }
        }
        Run {
            name: name.into(),
            about: self.about(),
            duration_ns: self.duration_ns.saturating_sub(self.load.window().from_ns),
            warm_up_ns: self.load.window().from_ns,
            figures,
            ..Run::default()
        }
    }

    /// Goodput over time, if a sink counted it.
    pub fn curve(&self, name: &str) -> Option<Curve> {
        Some(Curve {
            picture: "goodput over time".into(),
            name: name.into(),
            x: "time, s".into(),
            y: "goodput, Mbit/s".into(),
            points: self.received.as_ref()?.over_time(),
            labels: Vec::new(),
        })
    }

    fn about(&self) -> String {
        let Load { transport, flows, level, rate, pattern, .. } = &self.load;
        let mut text = format!("{flows} {} flow{}", transport.name(), if *flows == 1 { "" } else { "s" });
        if let Some(level) = level {
            text += &format!(" at level {level}");
        }
        text += &rate.map_or(", greedy".to_owned(), |rate| format!(", {rate} of payload"));
        match pattern {
            Pattern::Steady => {}
            Pattern::OnOff { .. } => text += ", on and off",
            Pattern::Bursts { .. } => text += ", in bursts",
        }
        text
    }
}
