//! What a level's queue does for programs: TCP gets its rate, and nobody gets more.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Result;
use qjump::{config::QueueChoice, qdisc};
use qjump_tests::{
    arrivals::{Arrival, Witness, burst_seen},
    backpressure::{self, BURST, HostQueue, LEVEL, RATE},
    departures::Tap,
    frames::Random,
    kernel::{a_while, is_guest},
    link::{FAR, Link, NEAR, succeeded},
    sender,
    tcp::Flows,
};
use serde_json::Value;

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
            scope.spawn(move || flows.run(flood()).map(|_| stop.store(true, Relaxed)));
        } else {
            for number in 0..senders {
                let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, LEVEL.into())?;
                let mut random = Random(number as u64 + 1);
                scope.spawn(move || sender::flood(&socket, stop, || 18 + random.below(1_400) as usize));
            }
        }
        let end = Instant::now() + 2 * flood();
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

/// For how long is sent.
fn flood() -> Duration {
    a_while(Duration::from_secs(4))
}

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
            let queues = qdisc::available()?;
            assert_eq!(status["queue"], if queues.fq && queues.prio { "fq" } else { "htb" });
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
            // An emulated machine cannot always send as much.
            assert!(rate >= RATE.bps() as f64 * 0.97 || is_guest(), "{rate} bit/s");
            let excused = RATE.bps() as f64 * held_up as f64 / 8e9;
            assert!(burst <= f64::from(BURST) + excused, "bursts of {burst} bytes, of which {excused} are excused");
        }
    }
    Ok(())
}

#[test]
fn tcp_gets_the_rate_of_its_level() -> Result<()> {
    let rack = backpressure::rack(QueueChoice::Auto)?;
    for congestion in ["cubic", "bbr"] {
        for count in [1, 4, 64] {
            let outcome = backpressure::tcp(&rack, congestion, count, Duration::from_secs(4))?;
            println!("{congestion}, {count} flows: {outcome:?}");
            assert!(outcome.share >= 0.97);
            assert!(count != 4 || outcome.fairness >= 0.9);
            assert!(outcome.longest_gap < Duration::from_millis(100));
        }
    }
    Ok(())
}

/// The reason why the queue is there.
#[test]
fn without_a_queue_tcp_gets_a_fraction() -> Result<()> {
    let rack = backpressure::rack(QueueChoice::Keep)?;
    let outcome = backpressure::tcp(&rack, "cubic", 1, Duration::from_secs(4))?;
    println!("policed: {outcome:?}");
    assert!(outcome.share < 0.5);
    Ok(())
}

#[test]
fn a_message_does_not_wait_behind_bulk_of_its_own_host() -> Result<()> {
    let median = |queue| -> Result<f64> {
        let latencies = backpressure::probes_beside(queue, 64, 400)?;
        Ok(latencies.quantile_ns(0.5).expect("enough samples") as f64)
    };
    let (fifo, levels) = (median(HostQueue::Fifo)?, median(HostQueue::Levels)?);
    println!("median latency beside 64 flows: {:.0} us in one queue, {:.0} us by levels", fifo / 1e3, levels / 1e3);
    assert!(fifo > 10.0 * levels);
    Ok(())
}
