//! Pacing by time of departure: the limiter stamps, fq releases. On a kernel without fq it is refused.
//!
//! The figures are sharp in virtual time alone (`cargo xtask vm --virtual-time fq`); with the machine's own clock,
//! whose CPUs may be away, only what no delay can excuse is asserted.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump_tests::{
    departures::Tap,
    kernel::is_virtual,
    link::{FAR, Link, NEAR, failed, succeeded},
    sender,
    tcp::{Flows, fairness},
};

/// A link with these levels, paced by fq; `None` on a kernel that has no fq and says so.
fn paced(plan: &[&str]) -> Result<Option<Link>> {
    let link = Link::new()?;
    let mut arguments = vec!["load", "--interface", &link.device, "--queue", "fq", "--hosts", "2"];
    arguments.extend(plan);
    let output = link.qjump(&arguments)?;
    let has_fq = link.near.batch("tc", &format!("qdisc add dev {} root fq\n", link.far_device)).is_ok()
        || link.far.batch("tc", &format!("qdisc add dev {} root fq\n", link.far_device)).is_ok();
    if !has_fq {
        let (status, message) = failed(&output);
        assert_eq!(status, 1, "{message}");
        assert!(message.contains("sch_fq") && message.contains("--queue auto"), "{message}");
        assert!(!link.pins().exist());
        return Ok(None);
    }
    succeeded(&output)?;
    let status = link.status()?;
    assert_eq!((&status["queue"], &status["queue_problems"]), (&"fq".into(), &serde_json::json!([])));
    Ok(Some(link))
}

fn level(status: &serde_json::Value, level: u64) -> Result<&serde_json::Value> {
    let levels = status["levels"].as_array().context("no levels")?;
    levels.iter().find(|entry| entry["level"] == level).with_context(|| format!("no level {level}"))
}

/// Sends so many pairs of packets, a pair each epoch, which is twice what the level allows. It sleeps in between, and
/// sends in the middle of an epoch: on a machine with one CPU, who sends while a packet is due makes that one late.
fn send_pairs(socket: &std::net::UdpSocket, pairs: u32, epoch: Duration) -> Result<()> {
    nix::sys::prctl::set_timerslack(1)?;
    let payload = [0; 64];
    // The first packet leaves at once, and the others after it, epoch by epoch.
    socket.send(&payload)?;
    let begun = Instant::now();
    for number in 0..pairs {
        std::thread::sleep((begun + epoch * number + epoch / 3).saturating_duration_since(Instant::now()));
        socket.send(&payload)?;
        socket.send(&payload)?;
    }
    Ok(())
}

#[test]
fn packets_of_a_guaranteed_level_leave_an_epoch_apart() -> Result<()> {
    // An epoch is twice 2 x 280 B at 1 Gbit/s and epsilon.
    for (epsilon, epoch_ns) in [("45520ns", 100_000), ("495520ns", 1_000_000)] {
        let plan = ["--link-rate", "1gbit", "--max-packet", "256", "--epsilon", epsilon, "--level", "7:1"];
        let Some(link) = paced(&plan)? else { return Ok(()) };
        assert_eq!(level(&link.status()?, 7)?["epoch_ns"].as_f64(), Some(epoch_ns as f64));
        let mut tap = Tap::arrivals(&link.far, &link.far_device, 0xe0)?;
        let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?;
        let (pairs, count) = (700, 1_401);
        let _receiver = link.far.enter(|| Ok(std::net::UdpSocket::bind((FAR.0, 7000))?))?;
        send_pairs(&socket, pairs, Duration::from_nanos(epoch_ns))?;
        std::thread::sleep(Duration::from_nanos(u64::from(pairs) * epoch_ns) + Duration::from_millis(200));
        let arrivals = tap.collect()?;
        assert_eq!(arrivals.len(), count, "nothing is lost");
        let mut gaps: Vec<u64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_unstable();
        let quantile = |share: f64| gaps[(gaps.len() as f64 * share) as usize];
        let (least, median, p99) = (gaps[0], quantile(0.5), quantile(0.99));
        // How much later than the first possible time a packet came, at worst: no gap can be shorter by more.
        let due = |n: usize| arrivals[n] as i64 - n as i64 * epoch_ns as i64;
        let late = (0..arrivals.len()).map(due).max().unwrap() - (0..arrivals.len()).map(due).min().unwrap();
        println!("epoch {epoch_ns} ns: gaps least {least}, p50 {median}, p99 {p99} ns; at worst {late} ns late");
        let status = link.status()?;
        assert_eq!(level(&status, 7)?["dropped"].as_object().map_or(0, serde_json::Map::len), 0, "{status}");
        // Whatever the machine does, a thousand epochs take a thousand epochs.
        let time = arrivals[arrivals.len() - 1] - arrivals[0];
        assert!(time as i64 + late >= (count as i64 - 1) * epoch_ns as i64, "{time}");
        if is_virtual() {
            assert!(median.abs_diff(epoch_ns) <= epoch_ns / 1_000, "{median}");
            assert!(p99 <= epoch_ns + 10_000, "{p99}");
            // None is early; one that was late, by what this CPU takes for a packet, is nearer to the next one.
            assert!(least + 22_700 >= epoch_ns, "{least}");
        }
        link.unload()?;
    }
    Ok(())
}

#[test]
fn tcp_gets_the_rate_of_a_paced_level() -> Result<()> {
    let plan =
        ["--link-rate", "100mbit", "--max-packet", "1514", "--epsilon", "1ms", "--level", "5:50mbit,burst=30000"];
    let Some(link) = paced(&plan)? else { return Ok(()) };
    let time = Duration::from_secs(4);
    for count in [1, 4, 64] {
        let (from, to) = (&link.near, &link.far);
        let flows = Flows { from, to, address: FAR.0, count, priority: 5, congestion: "cubic" };
        let flows = flows.run_after(Duration::from_secs(3), time)?;
        let bytes: u64 = flows.iter().map(|flow| flow.bytes).sum();
        let share = bytes as f64 * 8.0 / time.as_secs_f64() / (50e6 * 1_448.0 / 1_538.0);
        let gap = flows.iter().map(|flow| flow.longest_gap).max().unwrap_or_default();
        println!("{count} flows: {:.2} %, longest gap {gap:?}, fairness {:.3}", share * 100.0, fairness(&flows));
        assert!(share <= 1.01, "{share}");
        if is_virtual() {
            assert!(share >= 0.98, "{share}");
            assert!(gap < Duration::from_millis(50), "{gap:?}");
        }
    }
    link.unload().map(drop)
}

#[test]
fn eight_levels_at_once_keep_their_rates() -> Result<()> {
    let rates = [1, 2, 3, 4, 2, 1];
    let levels: Vec<String> = (1..).zip(rates).map(|(level, rate)| format!("{level}:{rate}mbit,burst=6000")).collect();
    let mut plan = vec!["--link-rate", "100mbit", "--max-packet", "512", "--epsilon", "1ms", "--level", "7:1"];
    levels.iter().for_each(|level| plan.extend(["--level", level]));
    let Some(link) = paced(&plan)? else { return Ok(()) };
    let _receiver = link.far.enter(|| Ok(std::net::UdpSocket::bind((FAR.0, 7000))?))?;
    let mut taps =
        (0..8).map(|level| Tap::arrivals(&link.far, &link.far_device, level << 5)).collect::<Result<Vec<_>>>()?;
    let (payload, wire) = (400, 400 + 42 + 24);
    let time = Duration::from_secs(2);
    let stop = &AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        for level in 0..8 {
            let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, level)?;
            // Twice what each of them may send; the socket's buffer makes it wait.
            let rate = match level {
                0 => 1e6,
                7 => 4e6,
                level => f64::from(rates[level as usize - 1]) * 2e6,
            };
            let interval = Duration::from_secs_f64(f64::from(wire) * 8.0 / rate);
            scope.spawn(move || {
                let mut due = Instant::now();
                while !stop.load(Relaxed) {
                    let _ = socket.send(&vec![0; payload]);
                    due += interval;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            });
        }
        std::thread::sleep(time);
        stop.store(true, Relaxed);
        Ok(())
    })?;
    let status = link.status()?;
    for (number, tap) in taps.iter_mut().enumerate().skip(1) {
        let arrivals = tap.collect()?;
        ensure!(arrivals.len() > 100, "level {number}: {} packets", arrivals.len());
        // The second half: the burst is over.
        let half = &arrivals[arrivals.len() / 2..];
        let took = (half[half.len() - 1] - half[0]) as f64;
        let cost = if number == 7 { 536.0 } else { f64::from(wire) };
        let rate = (half.len() - 1) as f64 * cost * 8e9 / took;
        let wanted = level(&status, number as u64)?["rate_bps"].as_f64().context("no rate")?;
        println!("level {number}: {:.4} of {:.4} Mbit/s", rate / 1e6, wanted / 1e6);
        assert!(rate <= wanted * 1.01 || !is_virtual(), "level {number}: {rate} of {wanted}");
        assert!(rate >= wanted * 0.99 || !is_virtual(), "level {number}: {rate} of {wanted}");
    }
    link.unload().map(drop)
}
