//! Racks that stand: what is built is what was asked for, and what is taken down is gone, finished or not.

use std::{
    collections::BTreeSet,
    fs,
    net::UdpSocket,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::{
    config::QueueChoice,
    dataplane::Pins,
    plan::{Delays, Demand, LevelSpec, Model, Network, default_wire_overhead},
    testbed::{NamedRack, NetNs, Rack},
    units::{Nanos, Rate},
};
use qjump_ebpf::Level;
use qjump_tests::link::{binary, failed, succeeded};
use serde_json::Value;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A rack with a name of its own; taken down when dropped.
struct Standing {
    name: String,
    file: PathBuf,
}

const LEAF: &str = "[leaf]\nrate = \"100mbit\"\nbuffer = 65536\n";

impl Standing {
    fn new(text: &str) -> Result<Self> {
        // Eight characters: process ids have up to 22 bits.
        let name = format!("{}{:x}", char::from(b'a' + COUNT.fetch_add(1, Relaxed) as u8), std::process::id());
        let file = std::env::temp_dir().join(format!("{name}.toml"));
        fs::write(&file, text)?;
        Ok(Self { name, file })
    }

    fn testbed(&self, arguments: &[&str]) -> Result<Output> {
        Ok(Command::new(binary()).arg("testbed").args(arguments).output()?)
    }

    fn up(&self) -> Result<Output> {
        self.testbed(&["up", self.file.to_str().context("a path")?])
    }

    fn down(&self) -> Result<Output> {
        self.testbed(&["down", &self.name])
    }

    fn exec(&self, place: &str, command: &[&str]) -> Result<Output> {
        self.testbed(&[&["exec", &self.name, place, "--"], command].concat())
    }

    fn status(&self) -> Result<(i32, Value)> {
        let output = self.testbed(&["status", &self.name, "--json"])?;
        let mut status: Value = serde_json::from_slice(&output.stdout)?;
        Ok((output.status.code().context("an exit status")?, status["racks"][0].take()))
    }

    /// What there is of it on this machine.
    fn traces(&self) -> Result<BTreeSet<String>> {
        let of = |directory: &str, prefix: String| -> Vec<String> {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            names.filter(|name| name.starts_with(&prefix)).collect()
        };
        let mut traces: BTreeSet<String> = of("/run/netns", format!("qjump-{}-", self.name)).into_iter().collect();
        traces.extend(of("/run/qjump/testbed", self.name.clone()).iter().map(|name| format!("note {name}")));
        let pins = Pins::interfaces()?.into_iter().filter(|name| name.starts_with(&format!("qj-{}-", self.name)));
        traces.extend(pins.map(|name| format!("pins {name}")));
        Ok(traces)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.down();
        let _ = fs::remove_file(&self.file);
    }
}

fn two_tiers(more: &str) -> String {
    format!(
        "hosts = 5\n{more}\n{LEAF}\n[spine]\nhosts-per-leaf = 2\nswitches = 2\nrate = \"200mbit\"\nbuffer = 65536\n"
    )
}

#[test]
fn a_rack_outlives_its_process_and_goes_without_a_trace() -> Result<()> {
    let rack = Standing::new(&format!("about = \"x\"\nhosts = 3\nipv6 = true\n{LEAF}"))?;
    let said = succeeded(&rack.up()?)?;
    assert!(said.contains("is up") && said.contains(&format!("qjump testbed down {}", rack.name)), "{said}");
    let (code, status) = rack.status()?;
    assert_eq!((code, &status["state"], &status["rack"]["hosts"]), (0, &"up".into(), &3.into()));
    let interface = status["hosts"][2]["interface"].as_str().context("an interface")?.to_owned();

    // Names, addresses, exit status and the variable of a program inside.
    let shown = succeeded(&rack.exec("h3", &["sh", "-c", "ip -br addr show dev $QJUMP_INTERFACE"])?)?;
    for part in [&interface, "10.0.0.3/24", "fd00:716a::3/64", "UP"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(rack.exec("2", &["sh", "-c", "exit 7"])?.status.code(), Some(7));

    let (code, message) = failed(&rack.up()?);
    assert!(code == 1 && message.contains(&format!("qjump testbed down {}", rack.name)), "{message}");

    // A plan on a host, pins and all: shown, and gone with the rack.
    let qjump = binary();
    let qjump = qjump.to_str().context("a path")?;
    let mut load = vec![qjump, "load", "--interface", &interface, "--hosts", "3", "--link-rate", "100mbit"];
    load.extend(["--max-packet", "256", "--epsilon", "1ms", "--level", "7:1"]);
    succeeded(&rack.exec("h3", &load)?)?;
    assert!(Pins::of(&interface).exist());
    let (_, status) = rack.status()?;
    let loaded = |host: usize| status["hosts"][host]["loaded"] == true;
    assert!(loaded(2) && !loaded(0) && !loaded(1));

    succeeded(&rack.down()?)?;
    assert_eq!(rack.traces()?, BTreeSet::new());
    let (code, message) = failed(&rack.down()?);
    assert!(code == 1 && message.contains("there is no rack"), "{message}");
    Ok(())
}

/// The namespace of a host of a standing rack.
fn within<T: Send>(rack: &Standing, host: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // The library enters namespaces that it has made; this one it only knows by name.
    let name = format!("/run/netns/qjump-{}-h{host}", rack.name);
    std::thread::scope(|scope| {
        let inside = || {
            nix::sched::setns(fs::File::open(name)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work()
        };
        scope.spawn(inside).join().expect("no panic")
    })
}

#[test]
fn two_tiers_carry_everything_everywhere_once() -> Result<()> {
    let rack = Standing::new(&two_tiers("ipv6 = true"))?;
    succeeded(&rack.up()?)?;
    let mut receivers = Vec::new();
    for host in 1..=5 {
        let receiver = within(&rack, host, || Ok(UdpSocket::bind(("::", 7_100))?))?;
        receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
        receivers.push(receiver);
    }
    for from in 1..=5 {
        within(&rack, from, || {
            let sender = UdpSocket::bind(("::", 0))?;
            for to in (1..=5).filter(|&to| to != from) {
                for address in [format!("::ffff:10.0.0.{to}"), format!("fd00:716a::{to}")] {
                    sender.send_to(&[from as u8, to as u8], (address.as_str(), 7_100))?;
                }
            }
            let broadcast = UdpSocket::bind(("0.0.0.0", 0))?;
            broadcast.set_broadcast(true)?;
            broadcast.send_to(&[from as u8, 0], ("10.0.0.255", 7_100))?;
            Ok(())
        })?;
    }
    for (host, receiver) in (1..).zip(&receivers) {
        let mut got = Vec::new();
        let mut buffer = [0; 8];
        while let Ok(length) = receiver.recv(&mut buffer) {
            got.push(buffer[..length].to_vec());
        }
        got.sort();
        let others = (1..=5).filter(|&from| from != host);
        // By IPv4, by IPv6, and once what goes to everybody, although there are two ways.
        let mut wanted: Vec<Vec<u8>> =
            others.flat_map(|from| [vec![from, host], vec![from, host], vec![from, 0]]).collect();
        // The kernel gives a sender its own broadcast.
        wanted.push(vec![host, 0]);
        wanted.sort();
        assert_eq!(got, wanted, "h{host}");
    }
    let (_, status) = rack.status()?;
    assert_eq!((&status["state"], &status["rack"]["spine"]["switches"]), (&"up".into(), &2.into()));
    succeeded(&rack.exec("spine2", &["ip", "link", "show", "dev", "down3"])?)?;
    let (_, message) = failed(&rack.exec("leaf4", &["true"])?);
    assert!(message.contains("h1 to h5, leaf1 to leaf3, spine1 to spine2"), "{message}");
    Ok(())
}

#[test]
fn strict_ports_know_levels_of_both_protocols_on_every_tier() -> Result<()> {
    let rack = Standing::new(&two_tiers("ipv6 = true\nqueueing = \"strict\""))?;
    succeeded(&rack.up()?)?;
    // From h1 to h3: up from the first leaf, down from a spine, and to the host from the second leaf.
    let send = "import socket\n\
                for family, to, protocol, option in ((socket.AF_INET, '10.0.0.3', 0, 1), (socket.AF_INET6, 'fd00:716a::3', 41, 67)):\n\
                \x20   s = socket.socket(family, socket.SOCK_DGRAM)\n\
                \x20   s.setsockopt(protocol, option, 5 << 5)\n\
                \x20   [s.sendto(b'x', (to, 7101)) for _ in range(10)]\n";
    succeeded(&rack.exec("h1", &["python3", "-c", send])?)?;
    // 10.0.0.3 is host number 2 from 0, so it is reached by the first of the two spines.
    for (place, device) in [("leaf1", "up1"), ("spine1", "down2"), ("leaf2", "p3")] {
        let shown = succeeded(&rack.exec(place, &["tc", "-s", "class", "show", "dev", device])?)?;
        // class htb 1:15 parent 1:1 ...
        //  Sent 860 bytes 20 pkt (dropped 0, overlimits 0 requeues 0)
        let packets = |handle: &str| -> Option<u64> {
            let (_, class) = shown.split_once(&format!("class htb {handle} "))?;
            let (_, sent) = class.split_once(" Sent ")?;
            sent.split_whitespace().nth(2)?.parse().ok()
        };
        assert_eq!((packets("1:15"), packets("1:14")), (Some(20), Some(0)), "{place}: {shown}");
    }
    Ok(())
}

#[test]
fn what_a_killed_up_has_left_is_seen_and_removed() -> Result<()> {
    let rack = Standing::new(&format!("hosts = 64\n{LEAF}"))?;
    for remedy in ["up", "down"] {
        let mut child = Command::new(binary())
            .args(["testbed", "up"])
            .arg(&rack.file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while rack.traces()?.len() < 12 {
            ensure!(Instant::now() < deadline && child.try_wait()?.is_none(), "nothing is built");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill()?;
        child.wait()?;
        let (code, status) = rack.status()?;
        assert_eq!((code, &status["state"]), (2, &"half-built".into()));
        let (_, message) = failed(&rack.exec("h1", &["true"])?);
        assert!(message.contains("was not finished"), "{message}");
        if remedy == "up" {
            succeeded(&rack.up()?)?;
            let (code, status) = rack.status()?;
            assert_eq!((code, &status["state"]), (0, &"up".into()));
        }
        succeeded(&rack.down()?)?;
        assert_eq!(rack.traces()?, BTreeSet::new());
    }
    Ok(())
}

#[test]
fn two_who_build_the_same_rack_do_not_disturb_each_other() -> Result<()> {
    let rack = Standing::new(&format!("hosts = 32\n{LEAF}"))?;
    let start = || Command::new(binary()).args(["testbed", "up"]).arg(&rack.file).output();
    let outputs = std::thread::scope(|scope| {
        let both = [scope.spawn(start), scope.spawn(start)];
        both.map(|one| one.join().expect("no panic"))
    });
    let [one, other] = outputs;
    let (one, other) = (one?, other?);
    let codes = BTreeSet::from([one.status.code(), other.status.code()]);
    assert_eq!(codes, BTreeSet::from([Some(0), Some(1)]), "{one:?} {other:?}");
    let refused = if one.status.success() { other } else { one };
    let (_, message) = failed(&refused);
    assert!(message.contains("just being built") || message.contains("is up already"), "{message}");
    assert_eq!(rack.status()?.0, 0);
    Ok(())
}

#[test]
fn a_rack_whose_parts_were_removed_is_said_to_be_broken() -> Result<()> {
    let rack = Standing::new(&format!("hosts = 2\n{LEAF}"))?;
    succeeded(&rack.up()?)?;
    succeeded(&Command::new("ip").args(["netns", "delete", &format!("qjump-{}-h2", rack.name)]).output()?)?;
    let (code, status) = rack.status()?;
    assert_eq!((code, &status["state"]), (2, &"broken: 2 of 3 namespaces".into()));
    succeeded(&rack.down()?)?;
    assert_eq!(rack.traces()?, BTreeSet::new());
    Ok(())
}

#[test]
fn processes_that_go_on_are_named() -> Result<()> {
    let rack = Standing::new(&format!("hosts = 2\n{LEAF}"))?;
    succeeded(&rack.up()?)?;
    let mut child = Command::new(binary())
        .args(["testbed", "exec", &rack.name, "h2", "--", "sleep", "60"])
        .stdout(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while rack.status()?.1["hosts"][1]["processes"] != 1 {
        ensure!(Instant::now() < deadline, "no process in h2");
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = succeeded(&rack.down()?)?;
    child.kill()?;
    child.wait()?;
    assert!(said.contains(&child.id().to_string()) && said.contains("kill"), "{said}");
    Ok(())
}

#[test]
fn mistakes_are_refused_and_nothing_is_built() -> Result<()> {
    for (text, status, part) in [
        (format!("hosts = 65\n{LEAF}"), 64, "from 2 to 64"),
        (format!("hosts = 2\nqueing = 3\n{LEAF}"), 64, "did you mean 'queueing'?"),
        (format!("hosts = 2\n{LEAF}latency = 3\n"), 64, "^^^^^^^"),
        ("hosts = \n".to_owned(), 64, "line 1"),
        (String::new(), 64, "missing field"),
    ] {
        let rack = Standing::new(&text)?;
        let (code, message) = failed(&rack.up()?);
        assert!(code == status && message.contains(part), "{text}: {message}");
        assert_eq!(rack.traces()?, BTreeSet::new());
    }
    let rack = Standing::new(&format!("hosts = 2\n{LEAF}"))?;
    let file = rack.file.to_str().context("a path")?;
    for (arguments, status, part) in [
        (vec!["up", "eigth"], 64, "did you mean 'eight'?"),
        (vec!["up", "/nowhere/rack.toml"], 64, "cannot read"),
        (vec!["up", file, "--name", "much-too-long"], 64, "--name"),
        (vec!["down", "nothere"], 1, "there is no rack nothere"),
        (vec!["exec", "nothere", "h1", "--", "true"], 1, "there is no rack nothere"),
        (vec!["status", "nothere"], 1, "there is no rack nothere"),
        (vec!["down", "../../x"], 1, "cannot be the name"),
    ] {
        let (code, message) = failed(&rack.testbed(&arguments)?);
        assert!(code == status && message.contains(part), "{arguments:?}: {message}");
    }
    Ok(())
}

/// Marks of congestion need a qdisc that not every kernel has: then it is said which, and nothing is left.
#[test]
fn marks_are_made_or_refused_with_the_remedy() -> Result<()> {
    let rack = Standing::new(&format!("hosts = 2\necn-threshold = 15140\n{LEAF}"))?;
    let output = rack.up()?;
    let scratch = NetNs::new("red")?;
    let red = "root red limit 60000 min 15000 max 15001 avpkt 1514 burst 10 bandwidth 1mbit probability 1 ecn";
    if scratch.batch("tc", &format!("qdisc add dev lo {red}\n")).is_ok() {
        succeeded(&output)?;
        let shown = succeeded(&rack.exec("leaf1", &["tc", "qdisc", "show", "dev", "p1"])?)?;
        assert!(shown.contains("red") && shown.contains("ecn"), "{shown}");
    } else {
        let (code, message) = failed(&output);
        assert!(code == 1 && message.contains("CONFIG_NET_SCH_RED"), "{message}");
        assert_eq!(rack.traces()?, BTreeSet::new());
    }
    Ok(())
}

#[test]
fn qjump_takes_the_place_of_a_network_card_and_gives_it_back() -> Result<()> {
    let rack = Rack::up(NamedRack::find("nics")?.spec)?;
    let shown = || -> Result<String> {
        let output = rack.host(0).command("tc").args(["-d", "qdisc", "show", "dev", &rack.interface(0)]).output()?;
        succeeded(&output)
    };
    let card = shown()?;
    assert!(card.contains("htb 1:") && card.contains("bfifo"), "{card}");
    let network = Network {
        hosts: 8,
        link_rate: Rate::from_bps(100_000_000),
        max_packet: 256,
        delays: Delays::Given(Nanos::from_ns(1_000_000)),
        wire_overhead: default_wire_overhead(),
        tagged: false,
        model: Model::Strict,
        levels: vec![LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0))],
    };
    let plan = network.plan()?;
    for (queue, place) in [(QueueChoice::Htb, "htb 716a:"), (QueueChoice::Keep, "htb 1:")] {
        rack.load(0, &plan, queue)?;
        assert!(shown()?.contains(place), "{}", shown()?);
        assert!(rack.is_loaded(0) && !rack.is_loaded(1));
        rack.unload_all()?;
        assert_eq!(shown()?, card);
        assert!(!rack.is_loaded(0));
    }
    Ok(())
}

#[test]
fn the_stock_is_listed_and_its_files_are_the_embedded_ones() -> Result<()> {
    let output = Command::new(binary()).args(["testbed", "list", "--json"]).output()?;
    let list: Value = serde_json::from_str(&succeeded(&output)?)?;
    let names: BTreeSet<&str> =
        list["racks"].as_array().context("racks")?.iter().filter_map(|r| r["name"].as_str()).collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/racks");
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).context("a name")?.to_owned();
        assert!(names.contains(stem.as_str()), "{stem} is not in the stock");
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let copy = std::env::temp_dir().join(format!("qjump-testbed-bin-{}", std::process::id()));
    fs::copy(binary(), &copy)?;
    let output = nobody.arg(&copy).args(["testbed", "up", "pair"]).current_dir("/").output()?;
    fs::remove_file(copy)?;
    let (code, message) = failed(&output);
    assert!(code == 1 && message.contains("as root"), "{message}");
    Ok(())
}
