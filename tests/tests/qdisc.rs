//! The queue of an interface on this machine's kernel, checked by iproute2's `tc` and by what arrives.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket},
};
use qjump::{
    qdisc::{self, Available, Before, Owner, Queue, Setup, Shape},
    units::Rate,
};
use qjump_ebpf::{Level, layout::class_id};
use qjump_tests::{
    arrivals::Witness,
    link::{FAR, Link, NEAR},
    sender,
};
use serde_json::Value;

/// What a packet of level 7 counts, whatever its size.
const P: u16 = 280;

/// Level 7: one packet in `epoch_ns`, and `burst_ns` of them at once.
const fn guaranteed(epoch_ns: u64, burst_ns: u64) -> Option<Shape> {
    Some(Shape { rate_bytes: P as u64 * 1_000_000_000 / epoch_ns, burst_ns, least_bytes: P })
}

/// Level 7 with an epoch of 1 ms, level 5 with 50 Mbit/s and a burst of 1 ms.
fn setup() -> Setup {
    let mut shapes = [None; 8];
    shapes[7] = guaranteed(1_000_000, 0);
    shapes[5] = Some(Shape { rate_bytes: 6_250_000, burst_ns: 1_000_000, least_bytes: 84 });
    Setup { queue: Queue::Htb, shapes, link_rate: None, tagged: false, horizon_ns: 0 }
}

fn linked(setup: Setup, mbit: u64) -> Setup {
    Setup { link_rate: Some(Rate::from_bps(mbit * 1_000_000)), ..setup }
}

/// The near interface, and what works on it.
struct Near<'a> {
    link: &'a Link,
    device: String,
    ifindex: u32,
}

impl<'a> Near<'a> {
    fn new(link: &'a Link) -> Result<Self> {
        Self::with_device(link, &link.device)
    }

    /// Another interface in the near namespace.
    fn with_device(link: &'a Link, device: &str) -> Result<Self> {
        let ifindex = link.near.enter(|| Ok(if_nametoindex(device)?))?;
        Ok(Self { link, device: device.to_owned(), ifindex })
    }

    fn on<T: Send>(&self, work: impl FnOnce(u32) -> Result<T, qdisc::Error> + Send) -> Result<T> {
        self.link.near.enter(|| Ok(work(self.ifindex)?))
    }

    fn apply(&self, setup: &Setup, before: &Before) -> Result<()> {
        self.on(|ifindex| qdisc::apply(ifindex, setup, before))
    }

    fn verify(&self, setup: &Setup) -> Result<Vec<String>> {
        self.on(|ifindex| qdisc::verify(ifindex, setup))
    }

    fn restore(&self, before: &Before) -> Result<()> {
        self.on(|ifindex| qdisc::restore(ifindex, before))
    }

    /// One command of `tc` a line; DEV stands for the interface.
    fn tc(&self, lines: &str) -> Result<()> {
        self.link.near.batch("tc", &lines.replace("DEV", &self.device))
    }

    fn show(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.link.near.command("tc");
        let output = command.args(arguments).args(["dev", &self.device]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Everything that is set, without counters; sorted, because the kernel goes by hash tables and by age.
    fn state(&self) -> Result<String> {
        let all = self.show(&["-d", "qdisc", "show"])? + &self.show(&["-d", "class", "show"])?;
        let mut lines: Vec<&str> = all.lines().collect();
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }

    /// `tc`'s line on a class, in words. (iproute2 6.1 has no JSON for classes.)
    fn class(&self, id: &str) -> Result<Vec<String>> {
        let all = self.show(&["-d", "class", "show"])?;
        let line = all.lines().find(|line| line.split(' ').nth(2) == Some(id));
        Ok(line.unwrap_or_default().split_whitespace().map(str::to_owned).collect())
    }
}

/// The word after `key`.
fn after<'a>(words: &'a [String], key: &str) -> &'a str {
    words.iter().position(|word| word == key).and_then(|at| words.get(at + 1)).map_or("", String::as_str)
}

/// Hears of every change of a queue in the namespace.
struct Monitor(File);

impl Monitor {
    fn new(near: &Near) -> Result<Self> {
        const RTNLGRP_TC: u32 = 4;
        near.link.near.enter(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
            bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 1 << (RTNLGRP_TC - 1)))?;
            Ok(Self(File::from(fd)))
        })
    }

    /// How many messages there were since the last call.
    fn heard(&mut self) -> Result<usize> {
        let mut buffer = [0; 65536];
        for count in 0.. {
            match self.0.read(&mut buffer) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(count),
                Err(error) => return Err(error.into()),
            }
        }
        unreachable!("the count is endless")
    }
}

#[test]
fn tc_shows_what_was_asked_for() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    near.apply(&setup(), &Before::Default)?;
    let qdiscs: Vec<Value> = serde_json::from_str(&near.show(&["-j", "qdisc", "show"])?)?;
    assert_eq!(qdiscs.len(), 9);
    assert_eq!(qdiscs[0]["kind"], "htb");
    assert_eq!(qdiscs[0]["handle"], "716a:");
    assert_eq!(qdiscs[0]["root"], true);
    assert_eq!(qdiscs[0]["options"]["default"], "0x1");
    for level in 0..8 {
        let qdisc = qdiscs.iter().find(|qdisc| qdisc["handle"] == format!("717{level}:")).expect("a leaf");
        assert_eq!(qdisc["kind"], "pfifo");
        assert_eq!(qdisc["parent"], format!("716a:{}", level + 1));
        assert_eq!(qdisc["options"]["limit"], if matches!(level, 5 | 7) { 1_000_000 } else { 1_000 });
        let class = near.class(&format!("716a:{}", level + 1))?;
        assert_eq!(class[3], "root");
        assert_eq!(after(&class, "prio"), (7 - level).to_string());
        assert_eq!(after(&class, "overhead"), "24");
        // The rates are a little lower than asked for, and tc rounds them down once more.
        let (rate, burst, mpu) = match level {
            7 => ("2239Kbit", "0b/1", "280b"),
            5 => ("49996Kbit", "6249b/1", "84b"),
            _ => ("8Tbit", "1000000000b/1", "84b"),
        };
        for (key, value) in [("rate", rate), ("ceil", rate), ("burst", burst), ("cburst", burst), ("mpu", mpu)] {
            assert_eq!(after(&class, key), value, "level {level}: {class:?}");
        }
    }
    assert_eq!(near.verify(&setup())?, [""; 0]);

    near.apply(&linked(setup(), 100), &Before::Default)?;
    let class = near.class("716a:10")?;
    assert_eq!(class[3], "root");
    for (key, value) in [("rate", "99985Kbit"), ("ceil", "99985Kbit"), ("cburst", "1237b/1"), ("mpu", "84b")] {
        assert_eq!(after(&class, key), value, "{class:?}");
    }
    for level in 0..8 {
        let class = near.class(&format!("716a:{}", level + 1))?;
        let (ceil, cburst) = match level {
            7 => ("2239Kbit", "0b/1"),
            5 => ("49996Kbit", "6249b/1"),
            _ => ("8Tbit", "1000000000b/1"),
        };
        for (key, value) in [("parent", "716a:10"), ("rate", "8bit"), ("ceil", ceil), ("cburst", cburst)] {
            assert_eq!(after(&class, key), value, "level {level}: {class:?}");
        }
        assert_eq!(after(&class, "prio"), (7 - level).to_string());
    }
    assert_eq!(near.verify(&linked(setup(), 100))?, [""; 0]);
    assert_eq!(near.on(qdisc::owner)?, Owner::Ours(Queue::Htb));
    Ok(())
}

#[test]
fn fifos_and_clsact_are_what_tc_says() -> Result<()> {
    use qdisc::encode::{Fifo, Options};
    let link = Link::new()?;
    let near = Near::new(&link)?;
    for (number, kind, limit) in [(8, "pfifo", 37), (9, "bfifo", 12_345)] {
        near.tc(&format!("qdisc replace dev DEV root handle {number}: {kind} limit {limit}"))?;
        let Before::Classless { kind, handle, options } = near.on(qdisc::before)? else { panic!("no {kind}") };
        let fifo = Fifo { limit };
        let expected = if kind == "pfifo" { Options::Pfifo(fifo) } else { Options::Bfifo(fifo) };
        assert_eq!(Options::decode(&kind, &options), expected);
        assert_eq!((handle, expected.encode()), (number << 16, options));
    }
    // clsact is no queue: it is neither in the way nor touched.
    near.tc("qdisc del dev DEV root\nqdisc add dev DEV clsact")?;
    let clsact = near.state()?;
    assert_eq!(near.on(qdisc::owner)?, Owner::Default);
    near.apply(&setup(), &Before::Default)?;
    assert_eq!(near.verify(&setup())?, [""; 0]);
    assert!(near.state()?.contains("qdisc clsact ffff:"));
    near.restore(&Before::Default)?;
    assert_eq!(near.state()?, clsact);
    Ok(())
}

#[test]
fn a_second_apply_changes_nothing() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    for setup in [setup(), linked(setup(), 100)] {
        near.apply(&setup, &Before::Default)?;
        let state = near.state()?;
        let mut monitor = Monitor::new(&near)?;
        near.apply(&setup, &Before::Default)?;
        assert_eq!(monitor.heard()?, 0);
        assert_eq!(near.state()?, state);
        // The monitor does hear: of one class.
        let mut other = setup;
        other.shapes[7] = guaranteed(2_000_000, 0);
        near.apply(&other, &Before::Default)?;
        assert_eq!(monitor.heard()?, 1);
        assert_eq!(near.verify(&other)?, [""; 0]);
        assert_eq!(near.verify(&setup)?.len(), 1);
    }
    Ok(())
}

#[test]
fn what_others_changed_is_found_and_mended() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    near.apply(&setup(), &Before::Default)?;
    let state = near.state()?;
    for (damage, complaint) in [
        ("class change dev DEV parent 716a: classid 716a:8 htb rate 1gbit", "there is class htb 716a:8"),
        ("qdisc del dev DEV parent 716a:8", "qdisc pfifo 7177: at 716a:8 with a limit of 1000000 packets is missing"),
        ("qdisc replace dev DEV parent 716a:8 handle 5: bfifo limit 9", "there is qdisc bfifo 5: at 716a:8"),
        ("class add dev DEV parent 716a: classid 716a:99 htb rate 1gbit", "class htb 716a:99 at root"),
        ("class del dev DEV classid 716a:3", "class htb 716a:3 at root"),
        (
            "filter add dev DEV parent 716a: prio 1 u32 match u32 0 0 flowid 716a:8",
            "the root has filters, which decide on packets of no level",
        ),
        ("qdisc del dev DEV root", "the root is the kernel's default, wanted is qdisc htb 716a:"),
    ] {
        near.tc(damage)?;
        let complaints = near.verify(&setup())?;
        assert!(complaints.iter().any(|found| found.starts_with(complaint)), "{damage}: {complaints:?}");
        near.apply(&setup(), &Before::Default)?;
        assert_eq!(near.verify(&setup())?, [""; 0], "{damage}");
        assert_eq!(near.state()?, state, "{damage}");
    }
    Ok(())
}

/// Roots that can be put back.
const CLASSLESS: [&str; 5] = [
    "qdisc replace dev DEV root handle 8001: pfifo limit 37",
    "qdisc replace dev DEV root handle 2: bfifo limit 20000",
    "qdisc replace dev DEV root handle 3: tbf rate 50mbit burst 10kb limit 100kb peakrate 60mbit mtu 3000 overhead 24",
    "qdisc replace dev DEV root handle 4: pfifo_fast",
    "qdisc replace dev DEV root handle 5: noqueue",
];

#[test]
fn what_was_there_comes_back() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    let noqueue = near.state()?;
    assert!(noqueue.starts_with("qdisc noqueue 0: root"), "{noqueue}");
    let back = |state: &str| -> Result<()> {
        let before = near.on(qdisc::before)?;
        // It survives being written down.
        let before: Before = serde_json::from_str(&serde_json::to_string(&before)?)?;
        near.apply(&setup(), &before)?;
        assert_eq!(near.on(qdisc::owner)?, Owner::Ours(Queue::Htb));
        near.restore(&before)?;
        assert_eq!(near.state()?, state);
        // Once more: it is there already.
        let mut monitor = Monitor::new(&near)?;
        near.restore(&before)?;
        assert_eq!(monitor.heard()?, 0);
        Ok(())
    };
    back(&noqueue)?;
    for root in CLASSLESS {
        near.tc(root)?;
        let state = near.state()?;
        assert!(matches!(near.on(qdisc::owner)?, Owner::Foreign { .. }), "{root}: whose?");
        back(&state)?;
        // Not without having asked what is there.
        let error = near.apply(&setup(), &Before::Default).unwrap_err().to_string();
        assert!(error.contains("somebody else"), "{error}");
        assert_eq!(near.state()?, state);
    }
    // Who has set another root meanwhile keeps it.
    let before = near.on(qdisc::before)?;
    near.apply(&setup(), &before)?;
    near.tc(CLASSLESS[0])?;
    let state = near.state()?;
    let error = near.restore(&before).unwrap_err().to_string();
    assert!(error.contains("(pfifo 8001:)") && error.contains("it has come since, and stays"), "{error}");
    assert_eq!(near.state()?, state);
    Ok(())
}

#[test]
fn the_default_of_many_queues_comes_back() -> Result<()> {
    let link = Link::new()?;
    link.near.ip("tuntap add dev many mode tap multi_queue")?;
    link.near.ip("link set many up")?;
    let many = Near::with_device(&link, "many")?;
    let state = many.state()?;
    assert!(state.contains("qdisc mq 0: root"), "{state}");
    assert_eq!(many.on(qdisc::owner)?, Owner::Default);
    let before = many.on(qdisc::before)?;
    many.apply(&setup(), &before)?;
    assert_eq!(many.verify(&setup())?, [""; 0]);
    many.restore(&before)?;
    assert_eq!(many.state()?, state);
    Ok(())
}

#[test]
fn what_could_not_come_back_is_not_touched() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    for (root, why) in [
        (
            "qdisc replace dev DEV root handle 1: htb default 10\nclass add dev DEV parent 1: classid 1:10 htb rate 1gbit",
            "it may have classes",
        ),
        (
            "qdisc replace dev DEV root handle 1: tbf rate 50mbit burst 10kb limit 100kb\n\
             qdisc replace dev DEV parent 1:1 handle 2: pfifo limit 5",
            "it has other queues below it",
        ),
        ("qdisc replace dev DEV root handle 1: stab overhead 10 linklayer atm pfifo limit 5", "it has a size table"),
    ] {
        near.tc(root)?;
        let state = near.state()?;
        assert!(matches!(near.on(qdisc::owner)?, Owner::Foreign { .. }), "{root}: whose?");
        let error = near.on(qdisc::before).unwrap_err().to_string();
        assert!(error.contains(&link.device) && error.contains(why) && error.contains("tc qdisc del"), "{error}");
        assert!(near.apply(&setup(), &Before::Default).is_err());
        assert!(near.restore(&Before::Default).is_err());
        assert_eq!(near.state()?, state);
        near.tc("qdisc del dev DEV root")?;
    }
    Ok(())
}

#[test]
fn a_failure_half_way_leaves_what_was_there() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    // No class can have a rate of 0. It is the fifth of eight, and level 7 has another rate than before.
    let mut absurd = setup();
    absurd.shapes[7] = guaranteed(5_000_000, 0);
    absurd.shapes[3] = Some(Shape { rate_bytes: 0, burst_ns: 0, least_bytes: 84 });
    let unharmed = |absurd: &Setup, before: &Before| -> Result<()> {
        let state = near.state()?;
        let error = near.apply(absurd, before).unwrap_err().to_string();
        assert!(error.contains("the kernel refuses class htb 716a:4"), "{error}");
        assert_eq!(near.state()?, state);
        Ok(())
    };
    unharmed(&absurd, &Before::Default)?;
    for root in CLASSLESS {
        near.tc(root)?;
        unharmed(&absurd, &near.on(qdisc::before)?)?;
    }
    near.tc("qdisc del dev DEV root")?;
    near.apply(&setup(), &Before::Default)?;
    unharmed(&absurd, &Before::Default)?;
    // This needs another tree.
    unharmed(&linked(absurd, 100), &Before::Default)?;
    // A queue that this kernel does not have.
    if !near.on(|_| qdisc::available())?.prio {
        let state = near.state()?;
        let fq = Setup { queue: Queue::Fq, ..setup() };
        let error = near.apply(&fq, &Before::Default).unwrap_err().to_string();
        assert!(error.contains("qdisc prio 716a:") && error.contains("this kernel has no such queue"), "{error}");
        assert_eq!(near.state()?, state);
    }
    Ok(())
}

#[test]
fn trying_queues_out_leaves_nothing_behind() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    let seen = || -> Result<_> {
        let ip = near.link.near.command("ip").args(["-d", "link"]).output()?.stdout;
        let namespaces: Vec<_> = std::fs::read_dir("/proc/self/task")?
            .filter_map(|task| std::fs::read_link(task.ok()?.path().join("ns/net")).ok())
            .collect();
        let here = std::fs::read_link("/proc/thread-self/ns/net")?;
        Ok((String::from_utf8(ip)?, near.state()?, namespaces.iter().all(|namespace| *namespace == here)))
    };
    let before = seen()?;
    assert!(before.2);
    let available = near.on(|_| qdisc::available())?;
    assert_eq!(seen()?, before);
    // What `tc` finds, on an interface of this test.
    for (kind, has) in [("htb", available.htb), ("fq", available.fq), ("prio", available.prio)] {
        assert_eq!(near.tc(&format!("qdisc add dev DEV root {kind}\nqdisc del dev DEV root")).is_ok(), has, "{kind}");
    }
    let Available { htb, .. } = available;
    assert!(htb);
    Ok(())
}

#[test]
fn gso_is_capped_and_back() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    near.on(|ifindex| qdisc::set_gso_max_segs(ifindex, 7))?;
    assert_eq!(near.on(qdisc::gso_max_segs)?, 7);
    let ip = near.link.near.command("ip").args(["-d", "link", "show", &link.device]).output()?.stdout;
    assert!(String::from_utf8(ip)?.contains("gso_max_segs 7 "));
    let error = near.on(|_| qdisc::gso_max_segs(99_999)).unwrap_err().to_string();
    assert!(error.contains("interface number 99999") && error.contains("is gone"), "{error}");
    Ok(())
}

fn level(number: u8) -> Level {
    Level::new(number).expect("0 to 7")
}

/// Floods levels with packets of so much payload for some time; `meanwhile` is called every 20 ms. Returns how many
/// were sent, after all of them have arrived.
fn flood(
    near: &Near,
    witness: &mut Witness,
    senders: &[(u8, usize)],
    time: Duration,
    mut meanwhile: impl FnMut() -> Result<()>,
) -> Result<u64> {
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| -> Result<()> {
        for &(number, size) in senders {
            let socket = sender::connected(&near.link.near, NEAR.0, FAR.0, 7000, class_id(level(number)))?;
            let (stop, sent) = (&stop, &sent);
            scope.spawn(move || sent.fetch_add(sender::flood(&socket, stop, || size), Relaxed));
        }
        let end = Instant::now() + time;
        let mut result = Ok(());
        while Instant::now() < end && result.is_ok() {
            thread::sleep(Duration::from_millis(20));
            witness.collect();
            result = meanwhile();
        }
        stop.store(true, Relaxed);
        result
    })?;
    let sent = sent.into_inner();
    let patience = Instant::now() + Duration::from_secs(10);
    while (witness.collect().len() as u64) < sent && Instant::now() < patience {
        thread::sleep(Duration::from_millis(20));
    }
    Ok(sent)
}

#[test]
fn rates_change_under_traffic_without_losing_a_packet() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    for mbit in [None, Some(100)] {
        let wanted = |turn: u64| {
            let mut setup = setup();
            setup.shapes[7] = guaranteed(1_000_000 + turn % 2 * 900_000, turn % 3 * 50_000);
            mbit.map_or(setup, |mbit| linked(setup, mbit))
        };
        near.apply(&wanted(0), &Before::Default)?;
        let mut witness = Witness::new(&link.far, &link.far_device)?;
        let mut turn = 0;
        let sent = flood(&near, &mut witness, &[(7, 100)], Duration::from_secs(3), || {
            turn += 1;
            near.apply(&wanted(turn), &Before::Default)
        })?;
        assert!(turn > 50 && sent > 1_000, "{turn} changes, {sent} packets");
        assert_eq!(witness.collect().len() as u64, sent);
        assert_eq!(near.verify(&wanted(turn))?, [""; 0]);
    }
    Ok(())
}

/// How many of `count` pairs of packets of level 7, sent together after a long pause, arrived closer than half an
/// epoch; and how many other packets did.
fn close_pairs(near: &Near, epoch: Duration, count: usize) -> Result<(usize, usize)> {
    let mut witness = Witness::new(&near.link.far, &near.link.far_device)?;
    let socket = sender::connected(&near.link.near, NEAR.0, FAR.0, 7000, class_id(level(7)))?;
    for _ in 0..count {
        for _ in 0..2 {
            // Nobody listens at the far end; it may say so.
            let _ = socket.send(&[0; 100]);
        }
        thread::sleep(epoch * 3);
    }
    let arrivals = witness.collect();
    let close = |pair: &&[qjump_tests::arrivals::Arrival]| {
        pair[1].arrived_ns - pair[0].arrived_ns < epoch.as_nanos() as u64 / 2
    };
    Ok((arrivals.windows(2).filter(close).count(), arrivals.len()))
}

#[test]
fn a_bucket_of_nothing_spaces_packets_and_one_of_a_packet_does_not() -> Result<()> {
    const EPOCH: Duration = Duration::from_millis(1);
    const PAIRS: usize = 1_000;
    let link = Link::new()?;
    let near = Near::new(&link)?;
    let shaped = |burst_ns: u64| {
        let mut setup = setup();
        setup.shapes[7] = guaranteed(EPOCH.as_nanos() as u64, burst_ns);
        setup
    };
    for with_link in [false, true] {
        let form = |setup| if with_link { linked(setup, 1_000) } else { setup };
        // One tick of 64 ns is as good as nothing.
        for burst_ns in [0, 64] {
            near.apply(&form(shaped(burst_ns)), &Before::Default)?;
            let (close, arrived) = close_pairs(&near, EPOCH, PAIRS)?;
            println!("bucket of {burst_ns} ns, link rate {with_link}: {close} of {arrived} too close");
            assert!(arrived > PAIRS);
            // None leaves early; but now and then this machine stops between a departure and its arrival.
            assert!(close <= arrived / 200, "{close} of {arrived}");
        }
        near.apply(&form(shaped(EPOCH.as_nanos() as u64)), &Before::Default)?;
        let (close, arrived) = close_pairs(&near, EPOCH, PAIRS)?;
        println!("bucket of a packet, link rate {with_link}: {close} of {arrived} too close");
        assert!(close > PAIRS * 9 / 10, "{close} of {arrived}");
    }
    Ok(())
}

#[test]
fn a_level_never_gets_more_than_its_rate_and_one_packet() -> Result<()> {
    const EPOCH_NS: u64 = 1_000_000;
    let link = Link::new()?;
    let near = Near::new(&link)?;
    for with_link in [false, true] {
        let mut setup = setup();
        setup.shapes[7] = guaranteed(EPOCH_NS, 20_000);
        near.apply(&if with_link { linked(setup, 1_000) } else { setup }, &Before::Default)?;
        let mut witness = Witness::new(&link.far, &link.far_device)?;
        flood(&near, &mut witness, &[(7, 100)], Duration::from_secs(3), || Ok(()))?;
        let arrivals = witness.collect();
        let span = arrivals[arrivals.len() - 1].arrived_ns - arrivals[0].arrived_ns;
        let most = (span + 20_000) / EPOCH_NS + 1;
        println!("{} packets in {span} ns, at most {most}", arrivals.len());
        assert!(arrivals.len() as u64 <= most + most / 1_000, "{} of {most}", arrivals.len());
        // And it gets most of it: late timers are made up for by the burst.
        assert!(arrivals.len() as u64 > most * 8 / 10, "{} of {most}", arrivals.len());
    }
    Ok(())
}

#[test]
fn levels_have_strict_priority_on_a_link_that_does_not_push_back() -> Result<()> {
    const MBIT: u64 = 20;
    let link = Link::new()?;
    let near = Near::new(&link)?;
    near.apply(&linked(setup(), MBIT), &Before::Default)?;
    let mut witness = Witness::new(&link.far, &link.far_device)?;
    // Told apart by their sizes. Both alone would take the whole link.
    flood(&near, &mut witness, &[(0, 1_000), (3, 500)], Duration::from_secs(3), || Ok(()))?;
    let arrivals = witness.collect();
    let is_high = |len: u32| len < 800;
    let first = arrivals.iter().position(|arrival| is_high(arrival.len)).expect("level 3 arrives");
    let last = arrivals.iter().rposition(|arrival| is_high(arrival.len)).expect("level 3 arrives");
    let both = &arrivals[first..=last];
    let low = both.iter().filter(|arrival| !is_high(arrival.len)).count();
    println!("{low} of level 0 between {} of level 3", both.len() - low);
    assert!(low * 20 < both.len(), "{low} of {}", both.len());
    let bits: u64 = both.iter().skip(1).map(|arrival| (u64::from(arrival.len) + 24) * 8).sum();
    let span = both[both.len() - 1].arrived_ns - both[0].arrived_ns;
    let rate = bits as f64 * 1e3 / span as f64;
    println!("{rate:.2} Mbit/s");
    assert!(rate <= MBIT as f64 * 1.01 && rate > MBIT as f64 * 0.9, "{rate} Mbit/s");
    Ok(())
}
