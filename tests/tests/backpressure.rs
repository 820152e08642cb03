//! What a level's queue does for programs: TCP gets its rate, and nobody gets more.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Result;
use qjump::{
    config::QueueChoice,
    plan::{Delays, Demand, LevelSpec, Model, Network, OverRule, Plan, default_wire_overhead},
    testbed::{Queueing, Rack, RackSpec},
    units::{Nanos, Rate},
};
use qjump_ebpf::Level;
use qjump_tests::{
    arrivals::{Arrival, Witness, burst_seen},
    departures::Tap,
    frames::Random,
    link::{FAR, Link, NEAR, succeeded},
    sender,
    tcp::{Flows, fairness},
};
use serde_json::Value;

const LINK: Rate = Rate::from_bps(100_000_000);
const LEVEL: u8 = 5;
const RATE: Rate = Rate::from_bps(50_000_000);
const BURST: u32 = 30_000;

/// Level 5 with 50 of 100 Mbit/s.
fn plan(over: Option<OverRule>) -> Result<Plan> {
    let level = Level::new(LEVEL).expect("a level");
    let network = Network {
        hosts: 2,
        link_rate: LINK,
        max_packet: 1_514,
        delays: Delays::Given(Nanos::from_ns(1_000_000)),
        wire_overhead: default_wire_overhead(),
        tagged: false,
        model: Model::Strict,
        levels: vec![LevelSpec { burst: Some(BURST), over, ..LevelSpec::new(level, Demand::Rate(RATE)) }],
    };
    Ok(network.plan()?)
}

fn rack() -> Result<Rack> {
    let rack = Rack::up(RackSpec { hosts: 2, rate: LINK, buffer: 256 * 1024 })?;
    rack.set_queueing(Queueing::Strict)?;
    Ok(rack)
}

/// What a receiver behind a cable saw in some seconds of more than the level allows, by this many senders.
fn arrivals_of(tcp: bool, senders: usize) -> Result<(Vec<Arrival>, Vec<u64>, Value)> {
    let link = Link::new()?;
    let mut tap = Tap::new(&link.near, &link.device, LEVEL << 5)?;
    let mut witness = Witness::new(&link.far, &link.far_device)?;
    let level = format!("{LEVEL}:{RATE},burst={BURST}");
    let plan =
        ["--hosts", "2", "--link-rate", "100mbit", "--max-packet", "1514", "--epsilon", "1ms", "--level", &level];
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(plan);
    succeeded(&link.qjump(&arguments)?)?;
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        if tcp {
            let (from, to) = (&link.near, &link.far);
            let congestion = "cubic";
            let flows = Flows { from, to, address: FAR.0, count: senders, priority: LEVEL.into(), congestion };
            scope.spawn(move || flows.run(FLOOD).map(|_| stop.store(true, Relaxed)));
        } else {
            for number in 0..senders {
                let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, LEVEL.into())?;
                let mut random = Random(number as u64 + 1);
                scope.spawn(move || sender::flood(&socket, stop, || 18 + random.below(1_400) as usize));
            }
        }
        let end = Instant::now() + 2 * FLOOD;
        while Instant::now() < end && !stop.load(Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
            witness.collect();
            tap.collect()?;
        }
        stop.store(true, Relaxed);
        Ok(())
    })?;
    // What waits leaves within the horizon; here, within what the sockets can hold.
    std::thread::sleep(Duration::from_millis(500));
    let status = link.status()?;
    let departures = tap.collect()?.to_vec();
    link.unload()?;
    let arrivals = witness.collect().iter().copied().filter(|arrival| arrival.tos == u32::from(LEVEL) << 5);
    Ok((arrivals.collect(), departures, status))
}

const FLOOD: Duration = Duration::from_secs(4);

/// The stated burst and rate, in every interval from one epoch up, counted where packets arrive. Between the
/// queue and there this machine may hold packets up (a CPU that is away, a softirq that has to wait): by so
/// much time an interval may be shorter there than it was where the packets left, and by no more.
#[test]
fn what_arrives_of_a_level_keeps_to_its_burst_and_rate() -> Result<()> {
    for tcp in [false, true] {
        for senders in [1, 4] {
            let (arrivals, departures, status) = arrivals_of(tcp, senders)?;
            assert_eq!(arrivals.len(), departures.len(), "nothing is lost between queue and arrival");
            let held_up =
                arrivals.iter().zip(&departures).map(|(arrival, left)| arrival.arrived_ns.saturating_sub(*left));
            let held_up = held_up.max().unwrap_or_default();
            assert_eq!(status["queue"], "htb");
            assert_eq!(status["queue_problems"], serde_json::json!([]));
            let bytes: u64 = arrivals.iter().map(|arrival| u64::from(arrival.len.max(60) + 24)).sum();
            let time = arrivals.last().unwrap().arrived_ns - arrivals[0].arrived_ns;
            let rate = bytes as f64 * 8e9 / time as f64;
            let burst = burst_seen(&arrivals, RATE.bps() as f64, 2_500_000, |arrival| arrival.arrived_ns);
            println!(
                "{} from {senders}: {} packets, {:.2} Mbit/s on the wire, bursts of at most {burst:.0} of {BURST} bytes; \
                 held up on the way for at most {:.3} ms",
                if tcp { "TCP" } else { "UDP" },
                arrivals.len(),
                rate / 1e6,
                held_up as f64 / 1e6,
            );
            assert!(rate <= RATE.bps() as f64 * 1.001, "{rate} bit/s");
            assert!(rate >= RATE.bps() as f64 * 0.97, "{rate} bit/s");
            let excused = RATE.bps() as f64 * held_up as f64 / 8e9;
            assert!(burst <= f64::from(BURST) + excused, "bursts of {burst} bytes, of which {excused} are excused");
        }
    }
    Ok(())
}

/// The level's rate, less what headers and the wire take of full segments with time stamps.
fn payload_bps() -> f64 {
    RATE.bps() as f64 * 1_448.0 / 1_538.0
}

#[test]
fn tcp_gets_the_rate_of_its_level_and_without_a_queue_hardly_any() -> Result<()> {
    let rack = rack()?;
    let time = Duration::from_secs(5);
    for (queue, over) in [(QueueChoice::Auto, None), (QueueChoice::Keep, Some(OverRule::Police))] {
        rack.load(0, &plan(over)?, queue)?;
        for congestion in ["cubic", "bbr"] {
            for count in [1, 4, 64] {
                let flows = Flows {
                    from: rack.host(0),
                    to: rack.host(1),
                    address: &rack.address(1),
                    count,
                    priority: LEVEL.into(),
                    congestion,
                };
                let flows = flows.run(time)?;
                let bytes: u64 = flows.iter().map(|flow| flow.bytes).sum();
                let share = bytes as f64 * 8.0 / time.as_secs_f64() / payload_bps();
                let gap = flows.iter().map(|flow| flow.longest_gap).max().unwrap_or_default();
                let fairness = fairness(&flows);
                println!(
                    "{queue:?}, {congestion}, {count} flows: {:.2} % of the level's payload rate, longest gap {gap:?}, \
                     fairness {fairness:.3}",
                    share * 100.0
                );
                if queue == QueueChoice::Auto {
                    assert!(share >= 0.97, "{share}");
                    assert!(gap < Duration::from_millis(100), "{gap:?}");
                    assert!(count != 4 || fairness >= 0.9, "{fairness}");
                }
            }
        }
    }
    Ok(())
}
