//! A level of 50 of 100 Mbit/s, TCP on it, and probes beside bulk: what test and benchmark share.

use std::{
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use anyhow::Result;
use qjump::{
    config::QueueChoice,
    measure::{Latencies, Probe, Progress},
    plan::{Delays, Demand, LevelSpec, Model, Network, OverRule, Plan, default_wire_overhead},
    testbed::{Queueing, Rack, RackSpec},
    units::{Nanos, Rate},
};
use qjump_ebpf::Level;

use crate::{
    link::{FAR, Link, NEAR, succeeded},
    sender,
    tcp::{Flows, fairness},
};

/// The rate of every link.
pub const LINK: Rate = Rate::from_bps(100_000_000);
/// The level.
pub const LEVEL: u8 = 5;
/// Its rate.
pub const RATE: Rate = Rate::from_bps(50_000_000);
/// Its burst, wire bytes.
pub const BURST: u32 = 30_000;

/// Level 5 with this rate, of 100 Mbit/s.
pub fn plan(rate: Rate, over: Option<OverRule>) -> Result<Plan> {
    let level = Level::new(LEVEL).expect("a level");
    let network = Network {
        hosts: 2,
        link_rate: LINK,
        max_packet: 1_514,
        delays: Delays::Given(Nanos::from_ns(1_000_000)),
        wire_overhead: default_wire_overhead(),
        tagged: false,
        model: Model::Strict,
        levels: vec![LevelSpec { burst: Some(BURST), over, ..LevelSpec::new(level, Demand::Rate(rate)) }],
    };
    Ok(network.plan()?)
}

/// Two hosts, of which the first has level 5, paced or policed.
pub fn rack(queue: QueueChoice) -> Result<Rack> {
    let rack = Rack::up(RackSpec::star(2, LINK, 256 * 1024))?;
    rack.set_queueing(Queueing::Strict)?;
    let over = (queue == QueueChoice::Keep).then_some(OverRule::Police);
    rack.load(0, &plan(RATE, over)?, queue)?;
    Ok(rack)
}

/// What TCP made of the level.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Payload, as a share of what the level's rate leaves for it.
    pub share: f64,
    /// The longest time that one of the flows got nothing.
    pub longest_gap: Duration,
    /// Jain's index.
    pub fairness: f64,
}

/// So many greedy flows from the first host to the second.
pub fn tcp(rack: &Rack, congestion: &str, count: usize, time: Duration) -> Result<Outcome> {
    let (from, to) = (rack.host(0), rack.host(1));
    let address = &rack.address(1);
    let flows = Flows { from, to, address, count, priority: LEVEL.into(), congestion }.run(time)?;
    let bytes: u64 = flows.iter().map(|flow| flow.bytes).sum();
    // What headers and the wire take of full segments with time stamps.
    let payload_bps = RATE.bps() as f64 * 1_448.0 / 1_538.0;
    Ok(Outcome {
        share: bytes as f64 * 8.0 / time.as_secs_f64() / payload_bps,
        longest_gap: flows.iter().map(|flow| flow.longest_gap).max().unwrap_or_default(),
        fairness: fairness(&flows),
    })
}

/// What the host does with its own queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostQueue {
    /// 100 Mbit/s, in the order of arrival.
    Fifo,
    /// `qjump load --host-rate 100mbit`.
    Levels,
}

/// Latencies of probes at level 7 that share the host, its link and its queue with so many bulk flows.
pub fn probes_beside(queue: HostQueue, flows: usize, count: u64) -> Result<Latencies> {
    let link = Link::new()?;
    match queue {
        HostQueue::Levels => {
            let mut arguments = vec!["load", "--interface", &link.device, "--queue", "htb", "--host-rate", "100mbit"];
            arguments.extend(["--hosts", "2", "--link-rate", "100mbit", "--max-packet", "256", "--epsilon", "1ms"]);
            arguments.extend(["--level", "7:1"]);
            succeeded(&link.qjump(&arguments)?)?;
        }
        HostQueue::Fifo => link.near.batch(
            "tc",
            &format!(
                "qdisc add dev {device} root handle 1: htb default 1\n\
                 class add dev {device} parent 1: classid 1:1 htb rate 100mbit burst 1514 cburst 1514 overhead 24 mpu 84\n",
                device = link.device
            ),
        )?,
    }
    let receiver = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 7000))?))?;
    let probing = sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?;
    let probe = Probe { count, interval_ns: 5_000_000, payload: 64, bound_ns: None, cpu: 0 };
    let started = &AtomicBool::new(flows == 0);
    let report = std::thread::scope(|scope| -> Result<_> {
        let bulk = (flows > 0).then(|| {
            let link = &link;
            scope.spawn(move || {
                let (from, to) = (&link.near, &link.far);
                let bulk = Flows { from, to, address: FAR.0, count: flows, priority: 0, congestion: "cubic" };
                started.store(true, Relaxed);
                bulk.run(Duration::from_nanos(count * 5_000_000) + Duration::from_secs(2))
            })
        });
        while !started.load(Relaxed) {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_secs(2));
        let report = probe.run(&[probing], &receiver, &Progress::default())?;
        if let Some(bulk) = bulk {
            bulk.join().expect("no panic")?;
        }
        Ok(report)
    })?;
    if queue == HostQueue::Levels {
        link.unload()?;
    }
    Ok(report.latencies)
}
