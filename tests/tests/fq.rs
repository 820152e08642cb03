//! Pacing by time of departure: the limiter stamps, fq releases. On a kernel without fq it is refused.
//!
//! The figures are sharp in virtual time alone (`cargo xtask vm --virtual-time fq`); with the machine's own clock,
//! whose CPUs may be away, only what no delay can excuse is asserted.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::{dataplane::sys::monotonic_ns, units::Rate};
use qjump_tests::{
    arrivals::{Arrival, Witness},
    departures::Tap,
    kernel::{is_guest, is_virtual},
    link::{FAR, Link, NEAR, failed, succeeded},
    sender,
    serial::{LARGEST, Serial},
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
        assert!(!is_guest(), "a guest has sch_fq");
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
        assert_eq!(level(&status, 7)?["dropped_packets"], 0, "{status}");
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

/// What a program sends at a level: packets of one size, evenly.
#[derive(Clone, Copy)]
struct Stream {
    level: u8,
    payload: usize,
    /// Bytes/s on the wire.
    rate: f64,
}

impl Stream {
    const fn wire(self) -> f64 {
        (self.payload + 42 + 24) as f64
    }

    /// How many were offered, and how many the socket took. `until` is when it ends.
    fn send(self, socket: &std::net::UdpSocket, until: Instant) -> Result<(u64, u64)> {
        nix::sys::prctl::set_timerslack(1)?;
        socket.set_nonblocking(true)?;
        let interval = Duration::from_secs_f64(self.wire() / self.rate);
        let (mut payload, mut offered, mut taken) = (vec![0; self.payload], 0, 0);
        let mut due = Instant::now();
        while due < until {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            payload[..8].copy_from_slice(&monotonic_ns().to_ne_bytes());
            taken += u64::from(socket.send(&payload).is_ok());
            offered += 1;
            due += interval;
        }
        Ok((offered, taken))
    }
}

/// A frame that is on the wire already stays there. Whoever waits for it waits also for the packets that higher levels send
/// meanwhile: each as many as begin in that time.
fn one_frame_and(above: &[Stream], bps: u64) -> u64 {
    let mut wait = FRAME_NS as f64;
    loop {
        let packets = |stream: &Stream| (wait / 1e9 * stream.rate / stream.wire()).ceil() * stream.wire();
        let longer = FRAME_NS as f64 + above.iter().map(packets).sum::<f64>() * 8e9 / bps as f64;
        if longer <= wait {
            return wait as u64;
        }
        wait = longer;
    }
}

/// What became of a level's packets.
#[derive(Debug)]
struct Outcome {
    offered: u64,
    arrived: u64,
    /// From before the system call to the far end, ns.
    median: u64,
    p99: u64,
    max: u64,
}

/// Sends at several levels at once, and sees what arrives at the end of a cable.
fn send_at_once(cable: &Serial, streams: &[Stream], time: Duration) -> Result<BTreeMap<u8, Outcome>> {
    let Serial { link, .. } = cable;
    let mut witness = Witness::new(&link.far, &link.far_device)?;
    let _receiver = link.far.enter(|| Ok(std::net::UdpSocket::bind((FAR.0, 7000))?))?;
    let until = Instant::now() + time;
    let sent = std::thread::scope(|scope| -> Result<Vec<(u64, u64)>> {
        let start = |stream: &Stream| {
            let stream = *stream;
            let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, stream.level.into())?;
            Ok(scope.spawn(move || stream.send(&socket, until)))
        };
        let senders = streams.iter().map(start).collect::<Result<Vec<_>>>()?;
        senders.into_iter().map(|sender| sender.join().expect("no panic")).collect()
    })?;
    // What waits for the lowest level has the cable to itself.
    let patience = Instant::now() + Duration::from_secs(20);
    let taken: u64 = sent.iter().map(|(_, taken)| taken).sum();
    let of_ours = |arrivals: &[Arrival]| arrivals.iter().filter(|arrival| arrival.sent_ns > 0).count() as u64;
    while of_ours(witness.collect()) < taken && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(100));
    }
    let ends = monotonic_ns() - (Instant::now() - until).as_nanos() as u64;
    let mut outcome = |(stream, (offered, taken)): (&Stream, &(u64, u64))| {
        let is_its = |arrival: &&Arrival| arrival.sent_ns > 0 && arrival.tos == u32::from(stream.level) << 5;
        let arrivals: Vec<Arrival> = witness.collect().iter().filter(is_its).copied().collect();
        ensure!(arrivals.len() as u64 == *taken, "level {}: {} of {taken} arrived", stream.level, arrivals.len());
        let mut delays: Vec<u64> = arrivals.iter().map(|arrival| arrival.arrived_ns - arrival.sent_ns).collect();
        delays.sort_unstable();
        let quantile = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
        // What was late because it waited for the others to end does not count as their equal.
        let arrived = arrivals.iter().filter(|arrival| arrival.arrived_ns <= ends).count() as u64;
        let outcome =
            Outcome { offered: *offered, arrived, median: quantile(0.5), p99: quantile(0.99), max: quantile(1.0) };
        println!("level {}: {outcome:?}", stream.level);
        Ok((stream.level, outcome))
    };
    streams.iter().zip(&sent).map(&mut outcome).collect()
}

/// The cable of these tests.
const CABLE: Rate = Rate::from_bps(10_000_000);
/// How long the largest frame is on it, ns.
const FRAME_NS: u64 = LARGEST * 8_000_000_000 / CABLE.bps();
/// What the only CPU may need meanwhile for packets of others, ns: some 25 us each.
const CPU_NS: u64 = 300_000;

/// Cables with qjump's queues in front of them, fq and HTB, each with levels of every kind.
fn behind_each_queue(test: impl Fn(&Serial, &str) -> Result<()>) -> Result<()> {
    for queue in ["fq", "htb"] {
        let Some(cable) = Serial::new(CABLE)? else { return Ok(()) };
        let (link, bucket) = (&cable.link, format!("{}bit", cable.bucket_bps()));
        let mut load = vec!["load", "--interface", &link.device, "--queue", queue];
        if queue == "htb" {
            // It pushes back by itself.
            load.extend(["--host-rate", &bucket]);
        }
        let plan = ["--hosts", "2", "--link-rate", "10mbit", "--max-packet", "256", "--epsilon", "2ms"];
        let levels = ["--level", "7:1", "--level", "5:3mbit,burst=6000", "--level", "3:unlimited"];
        succeeded(&link.qjump(&[&load[..], &plan, &levels].concat())?)?;
        if queue == "fq" {
            cable.push_back()?;
        }
        println!("{queue}:");
        test(&cable, queue)?;
        let levels = link.status()?;
        for number in [7, 5, 3, 0] {
            assert_eq!(level(&levels, number)?["dropped_packets"], 0, "{levels:#}");
        }
        link.unload()?;
    }
    Ok(())
}

const MESSAGES: Stream = Stream { level: 7, payload: 64, rate: 13_000.0 };

#[test]
fn at_half_as_much_again_as_the_link_carries_only_the_lowest_level_starves() -> Result<()> {
    let mbit = |rate: f64| rate * 1e6 / 8.0;
    let higher = [
        MESSAGES,
        Stream { level: 5, payload: 500, rate: mbit(2.9) },
        Stream { level: 3, payload: 1_000, rate: mbit(5.5) },
    ];
    let lowest = Stream { level: 0, payload: 1_472, rate: mbit(6.6) };
    let offered: f64 = higher.iter().chain([&lowest]).map(|stream| stream.rate * 8.0).sum();
    assert!(offered > 1.5 * CABLE.bps() as f64, "{offered}");
    behind_each_queue(|cable, queue| {
        let time = Duration::from_secs(4);
        let alone = send_at_once(cable, &higher, time)?;
        let all = send_at_once(cable, &[&higher[..], &[lowest]].concat(), time)?;
        for level in [7, 5, 3] {
            let (alone, all) = (&alone[&level], &all[&level]);
            // All but what was under way at the end.
            assert!(all.arrived + 5 >= all.offered || !is_virtual(), "level {level}: {all:?}");
            let above: Vec<Stream> = higher.into_iter().filter(|other| other.level > level).collect();
            let one_frame = one_frame_and(&above, cable.bucket_bps());
            // With HTB, once a minute, one packet of a level goes before its turn: see qdisc::tree.
            let max = (queue == "fq").then_some((alone.max, all.max));
            for (without, with) in [(alone.median, all.median), (alone.p99, all.p99)].into_iter().chain(max) {
                assert!(with <= without + one_frame + CPU_NS || !is_virtual(), "level {level}: {alone:?} {all:?}");
            }
        }
        let left = cable.bucket_bps() as f64 - higher.iter().map(|stream| stream.rate * 8.0).sum::<f64>();
        let starved = &all[&0];
        let got = starved.arrived as f64 * lowest.wire() * 8.0 / time.as_secs_f64();
        println!("the lowest level got {:.3} of {:.3} Mbit/s that were left", got / 1e6, left / 1e6);
        assert!((got <= left * 1.05 && got >= left * 0.9) || !is_virtual(), "{got} of {left}");
        Ok(())
    })
}

#[test]
fn a_message_waits_for_one_frame_of_bulk_on_the_same_host() -> Result<()> {
    behind_each_queue(|cable, _| {
        let link = &cable.link;
        let alone = &send_at_once(cable, &[MESSAGES], Duration::from_secs(4))?[&7];
        let time = Duration::from_secs(3);
        let (beside, bytes) = std::thread::scope(|scope| -> Result<_> {
            let bulk = scope.spawn(|| {
                let (from, to) = (&link.near, &link.far);
                Flows { from, to, address: FAR.0, count: 4, priority: 0, congestion: "cubic" }
                    .run_after(Duration::from_secs(2), time)
            });
            std::thread::sleep(Duration::from_secs(2));
            let mut outcomes = send_at_once(cable, &[MESSAGES], time)?;
            let flows = bulk.join().expect("no panic")?;
            Ok((outcomes.remove(&7).context("level 7")?, flows.iter().map(|flow| flow.bytes).sum::<u64>()))
        })?;
        let share = bytes as f64 * 8.0 / time.as_secs_f64() / cable.bucket_bps() as f64;
        println!("bulk got {:.1} % of the cable, as payload", share * 100.0);
        assert!(share > 0.85 || !is_virtual(), "{share}: the link was not busy");
        assert!(beside.max <= alone.max + FRAME_NS + CPU_NS || !is_virtual(), "{alone:?} {beside:?}");
        // It does wait for that one: there was something to wait for.
        assert!(beside.median > alone.median + FRAME_NS / 5 || !is_virtual(), "{alone:?} {beside:?}");
        Ok(())
    })
}
