//! `cargo xtask bench`: what the program costs one packet, and what it costs a flood.
//!
//! These machines are noisy, so everything that is compared runs interleaved in one process, and what
//! counts are the ratios. Written to target/bench/ebpf.json.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf,
    programs::{LinkOrder, TcAttachType, tc::TcAttachOptions},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use qjump::dataplane::OLD_OBJECT;
use qjump_ebpf::{Config, Level, LevelLimit, layout::GRANT_ONLY_SHIFT, limiter::Oversize};
use qjump_tests::{
    cgroups::TestCgroup,
    frames::{ethernet, ipv4},
    link::{FAR, Link, NEAR, succeeded},
    program::{Shim, SkBuff, classifier, lab, time},
    sender,
};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let (programs, ratios) = programs()?;
    let (flood, more) = flood()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let result = json!({
        "schema_version": 1,
        "kernel": kernel.trim(),
        "programs": programs,
        "flood": flood,
        "ratios": ratios.into_iter().chain(more).collect::<BTreeMap<_, _>>(),
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("ebpf.json"), format!("{result:#}\n"))?;
    Ok(())
}

type Ratios = Vec<(String, f64)>;

/// Runs of one program in a row, and rounds of all programs.
const REPEAT: u32 = 200_000;
const ROUNDS: usize = 41;

fn programs() -> Result<(Vec<Value>, Ratios)> {
    let mut config = Config::EMPTY;
    // Level 7: the next packet finds its epoch over. Level 6: never.
    config.limits[7] = LevelLimit::per_packet(1, 0, 256, Oversize::Drop)?;
    config.limits[6] = LevelLimit::per_packet(1 << 37, 0, 256, Oversize::Drop)?;
    let mut shim = Shim::load(&config)?;
    // The same for a level that is for grants alone, and this process has a grant.
    let mut granted = Shim::load(&Config { flags: 1 << (GRANT_ONLY_SHIFT + 7), ..config })?;
    granted.grant(7)?;
    // As kernels without a compare-exchange run it.
    let mut old = Shim::of_object(OLD_OBJECT, &config)?;
    let mut empty = lab("qj_empty")?;
    let mut clock = lab("qj_clock")?;
    // 64 bytes with FCS, carrying the right mark already, as from the second packet of a test run on.
    let packet = |class| ethernet(0x0800, &ipv4(class, 18));
    let cases = [
        ("empty", 0, packet(0)),
        ("clock", 0, packet(0)),
        ("best_effort", 0, packet(0)),
        ("guaranteed_pass", 7, packet(0xe0)),
        ("guaranteed_drop", 6, packet(0xc0)),
        ("granted_pass", 7, packet(0xe0)),
        ("old_pass", 7, packet(0xe0)),
        ("grant_of_skb", 0, packet(0)),
    ];
    let mut times: Vec<Vec<u64>> = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for ((name, priority, packet), times) in cases.iter().zip(&mut times) {
            let skb = SkBuff::priority(*priority);
            let (action, ns) = match *name {
                "empty" => time(&*classifier(&mut empty, "qj_empty")?, packet, skb, REPEAT)?,
                "clock" => time(&*classifier(&mut clock, "qj_clock")?, packet, skb, REPEAT)?,
                "granted_pass" => time(granted.program()?, packet, skb, REPEAT)?,
                "old_pass" => time(old.program()?, packet, skb, REPEAT)?,
                "grant_of_skb" => time(granted.skb_level()?, packet, skb, REPEAT)?,
                _ => time(shim.program()?, packet, skb, REPEAT)?,
            };
            ensure!(action != 0, "{name} answered {action}");
            times.push(ns);
        }
    }
    println!("BPF_PROG_TEST_RUN, 64-byte frames, {ROUNDS} rounds of {REPEAT} packets:");
    let mut medians = BTreeMap::new();
    let mut rows = Vec::new();
    for ((name, ..), times) in cases.iter().zip(&mut times) {
        times.sort_unstable();
        let (min, median) = (times[0], times[times.len() / 2]);
        println!("  {name:16} min {min:4} ns, median {median:4} ns a packet");
        medians.insert(*name, median as f64);
        rows.push(json!({"name": name, "min_ns": min, "median_ns": median}));
    }
    let ratio = |a: &str, b: &str| (format!("{a}/{b}"), medians[a] / medians[b]);
    let mut ratios =
        vec![ratio("guaranteed_pass", "clock"), ratio("best_effort", "empty"), ratio("old_pass", "guaranteed_pass")];
    show(&ratios);
    // What deciding the level costs: on a tagged cgroup, and where a level is for grants alone.
    let difference = |a: &str, b: &str| (format!("{a} - {b}, ns"), medians[a] - medians[b]);
    let differences = vec![difference("grant_of_skb", "empty"), difference("granted_pass", "guaranteed_pass")];
    show(&differences);
    ratios.extend(differences);
    Ok((rows, ratios))
}

fn show(ratios: &Ratios) {
    for (name, value) in ratios {
        println!("  {name}: {value:.2}");
    }
}

const FLOOD: Duration = Duration::from_millis(1000);
const FLOOD_ROUNDS: usize = 9;

fn flood() -> Result<(Vec<Value>, Ratios)> {
    let link = Link::new()?;
    let _far_end = drop_on_arrival(&link)?;
    let tagged = TestCgroup::new()?;
    succeeded(&link.qjump(&["tag", "--level", "5", "--cgroup", &tagged.path()])?)?;
    let mut pps: BTreeMap<(usize, &str), Vec<f64>> = BTreeMap::new();
    for _ in 0..FLOOD_ROUNDS {
        for senders in [1, 2] {
            for name in ["none", "shim", "tagged", "htb"] {
                match name {
                    "shim" | "tagged" => shim(&link)?,
                    "htb" => htb(&link)?,
                    _ => {}
                }
                pps.entry((senders, name)).or_default().push(one_flood(&link, senders, name, &tagged)?);
                match name {
                    "shim" | "tagged" => drop(link.unload()?),
                    "htb" => link.near.batch("tc", &format!("qdisc del dev {} root\n", link.device))?,
                    _ => {}
                }
            }
        }
    }
    println!("UDP flood of 64-byte frames at level 5, packets that arrived a second, median of {FLOOD_ROUNDS}:");
    let mut medians = BTreeMap::new();
    let mut rows = Vec::new();
    for ((senders, name), values) in &mut pps {
        values.sort_by(f64::total_cmp);
        let median = values[values.len() / 2];
        println!("  {senders} sender(s), {name:6} {:6.3} M", median / 1e6);
        medians.insert((*senders, *name), median);
        rows.push(json!({"name": name, "senders": senders, "pps": median.round()}));
    }
    let ratio = |senders, a: &'static str, b: &'static str| {
        (format!("flood {a}/{b}, {senders} senders"), medians[&(senders, a)] / medians[&(senders, b)])
    };
    let ratios = vec![
        ratio(1, "shim", "none"),
        ratio(2, "shim", "none"),
        ratio(2, "shim", "htb"),
        ratio(1, "tagged", "shim"),
        ratio(2, "tagged", "shim"),
    ];
    show(&ratios);
    Ok((rows, ratios))
}

/// A plan under which level 5 is marked and limited, and the limit is far above the flood.
fn shim(link: &Link) -> Result<()> {
    let plan = ["--hosts", "2", "--link-rate", "400gbit", "--max-packet", "1514", "--epsilon", "0us", "--level", "5:2"];
    let mut arguments = vec!["load", "--interface", &link.device, "--queue", "keep"];
    arguments.extend(plan);
    succeeded(&link.qjump(&arguments)?).map(drop)
}

/// What one would set up without qjump: eight classes below one, a level each, chosen by DSCP, and none of
/// them near its rate.
fn htb(link: &Link) -> Result<()> {
    let device = &link.device;
    let mut lines = format!(
        "qdisc add dev {device} root handle 1: htb default 10\n\
         class add dev {device} parent 1: classid 1:1 htb rate 100gbit burst 1m\n"
    );
    for level in Level::strictest_first() {
        let (class, prio, tos) = (format!("1:1{level}"), 7 - level.number(), level.traffic_class(0));
        lines += &format!(
            "class add dev {device} parent 1:1 classid {class} htb rate 10gbit ceil 100gbit prio {prio} burst 1m quantum 1514\n\
             qdisc add dev {device} parent {class} pfifo limit 1000\n\
             filter add dev {device} parent 1: protocol ip prio 1 u32 match ip tos {tos:#04x} 0xe0 flowid {class}\n"
        );
    }
    link.near.batch("tc", &lines)
}

/// What arrives is dropped before the far host's network stack sees it, so that the far end costs little.
fn drop_on_arrival(link: &Link) -> Result<Ebpf> {
    let mut lab = lab("qj_drop")?;
    link.far.enter(|| {
        classifier(&mut lab, "qj_drop")?.attach_with_options(
            &link.far_device,
            TcAttachType::Ingress,
            TcAttachOptions::TcxOrder(LinkOrder::first()),
        )?;
        Ok(())
    })?;
    Ok(lab)
}

/// Packets a second that arrived at the far end.
fn one_flood(link: &Link, senders: usize, name: &str, tagged: &TestCgroup) -> Result<f64> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for cpu in 0..senders {
            let connect = || sender::connected(&link.near, NEAR.0, FAR.0, 7000, 5);
            let socket = if name == "tagged" { tagged.within(connect)? } else { connect()? };
            if name == "htb" {
                sender::set_tos(&socket, 0xa0)?;
            }
            let stop = &stop;
            scope.spawn(move || {
                let mut set = CpuSet::new();
                if set.set(cpu).is_ok() {
                    let _ = sched_setaffinity(Pid::from_raw(0), &set);
                }
                sender::flood(&socket, stop, || 18);
            });
        }
        std::thread::sleep(Duration::from_millis(100));
        let (start, before) = (Instant::now(), arrived(link)?);
        std::thread::sleep(FLOOD);
        let (elapsed, after) = (start.elapsed(), arrived(link)?);
        stop.store(true, Relaxed);
        Ok((after - before) as f64 / elapsed.as_secs_f64())
    })
}

/// The far device's count of received packets.
fn arrived(link: &Link) -> Result<u64> {
    link.far.enter(|| {
        // Of this thread, which is in the far namespace; /proc/net is the process's.
        let text = fs::read_to_string("/proc/thread-self/net/dev")?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(&format!("{}:", link.far_device)));
        let packets = line.and_then(|line| line.split_whitespace().nth(1)).context("no such device")?;
        Ok(packets.parse()?)
    })
}
