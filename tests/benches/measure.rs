//! `cargo xtask bench`: what measuring itself costs, and the same rack measured by sockperf and irtt. Written to
//! target/bench/measure.json.

use std::{
    collections::BTreeMap,
    fs,
    net::UdpSocket,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use qjump::{
    dataplane::sys::monotonic_ns,
    measure::{Latencies, pin_and_prioritise, result::Stream, train},
    testbed::{NetNs, Rack, RackSpec},
    units::Rate,
};
use qjump_tests::{
    link::{FAR, Link, NEAR, binary, succeeded},
    measuring::{Server, qjump},
};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let result = json!({
        "schema_version": 1,
        "kernel": kernel.trim(),
        "cost": cost()?,
        "tools": tools()?,
        "held_up": held_up()?,
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join("measure.json"), format!("{result:#}\n"))?)
}

/// The streams of a measurement in a namespace: round trips, there, back.
fn measured(netns: &NetNs, arguments: &[&str]) -> Result<Vec<Stream>> {
    let output = qjump(Some(netns), &[&["measure"], arguments, &["--quiet", "--json", "-"]].concat()).output()?;
    let document: Value = serde_json::from_str(&succeeded(&output)?)?;
    Ok(serde_json::from_value(document["runs"][0]["streams"].clone())?)
}

/// p50 and p99, ns.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Times {
    p50: f64,
    p99: f64,
}

impl Times {
    fn of(stream: &Stream) -> Result<Self> {
        let latencies = Latencies::from_distribution(&stream.response);
        let quantile = |q| latencies.quantile_ns(q).map(|ns| ns as f64).context("too few samples");
        Ok(Self { p50: quantile(0.5)?, p99: quantile(0.99)? })
    }

    fn json(self) -> Value {
        json!({"p50_ns": self.p50 as u64, "p99_ns": self.p99 as u64})
    }
}

/// A segment's median, ns.
fn segment(stream: &Stream, name: &str) -> Result<u64> {
    let segment = stream.segments.iter().find(|segment| segment.name == name).context("no such segment")?;
    Latencies::from_distribution(&segment.times).quantile_ns(0.5).context("too few samples")
}

/// The clients' CPU, and the servers'.
const CPUS: (usize, usize) = (1, 0);

/// Runs of a second at a fast schedule.
const FAST_ROUNDS: usize = 9;

/// A round trip with all stamps and books beside one of two bare loops, and a fast schedule.
fn cost() -> Result<Value> {
    let link = Link::new()?;
    let bare = bare(&link)?;
    let server = Server::new(Some(&link.far))?;
    let target = server.at(FAR.0);
    let closed = measured(&link.near, &["pingpong", &target, "--duration", "3s"])?;
    let whole = Times::of(&closed[0])?.p50 as u64;
    let kernel = whole - segment(&closed[0], "app-sched and rx-app")?;
    drop(server);
    // The answering side sleeps: a virtual machine whose CPUs are all busy may be stopped by its host for milliseconds.
    let server = Server::with(Some(&link.far), &["--listen", "[::]:0", "--spin", "0us"])?;
    let target = server.at(FAR.0);
    let fast = ["probe", &target, "--rate", "50000", "--duration", "1s", "--timeout", "100ms"];
    let (mut sent, mut rounds) = (0, Vec::new());
    for _ in 0..FAST_ROUNDS {
        let streams = measured(&link.near, &fast)?;
        let lateness = streams[0].lateness.as_ref().context("no lateness")?;
        sent += lateness.samples;
        rounds.push(Latencies::from_distribution(lateness).quantile_ns(0.99).context("too few samples")?);
    }
    rounds.sort_unstable();
    let late = rounds[FAST_ROUNDS / 2];
    println!("a round trip over a veth, p50:");
    println!("  bare send and receive in a loop:                 {:6.2} us", bare as f64 / 1e3);
    println!("  qjump measure pingpong:                          {:6.2} us", whole as f64 / 1e3);
    println!("  of that, between the kernel's stamps SCHED and RX: {:6.2} us", kernel as f64 / 1e3);
    println!(
        "50,000 probes a second from one thread: {sent} sent in {FAST_ROUNDS} s, lateness p99 {:.2} us in the middle one of \
         them, from {:.2} to {:.2} us",
        late as f64 / 1e3,
        rounds[0] as f64 / 1e3,
        rounds[FAST_ROUNDS - 1] as f64 / 1e3,
    );
    Ok(json!({
        "bare_p50_ns": bare, "pingpong_p50_ns": whole, "kernel_p50_ns": kernel,
        "fast_rate_per_s": 50_000, "fast_sent": sent, "fast_lateness_p99_ns": late, "fast_lateness_p99_of_rounds_ns": rounds,
    }))
}

/// The median round trip of a loop that only sends and receives, ns.
fn bare(link: &Link) -> Result<u64> {
    let near = link.near.enter(|| Ok(UdpSocket::bind((NEAR.0, 0))?))?;
    let far = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 0))?))?;
    train::connect(&near, &far)?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let over = AtomicBool::new(false);
    let mut latencies = Latencies::new(None);
    thread::scope(|scope| {
        scope.spawn(|| {
            pin_and_prioritise(CPUS.1);
            let mut buffer = [0; 64];
            while !over.load(Relaxed) {
                if far.recv(&mut buffer).is_ok() {
                    let _ = far.send(&buffer);
                }
            }
        });
        scope.spawn(|| {
            pin_and_prioritise(CPUS.0);
            let mut buffer = [0; 64];
            let end = monotonic_ns() + 900_000_000;
            while monotonic_ns() < end {
                let sent = monotonic_ns();
                if near.send(&buffer).is_ok() {
                    while near.recv(&mut buffer).is_err() && monotonic_ns() < end {}
                    latencies.record(monotonic_ns() - sent);
                }
            }
            over.store(true, Relaxed);
        });
    });
    latencies.quantile_ns(0.5).context("no round trips")
}

/// A program that ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(netns: &NetNs, program: &str, arguments: &[&str]) -> Result<Ended> {
    let mut command = netns.command(program);
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().with_context(|| format!("cannot run {program}; `cargo xtask bench` installs it"))?;
    Ok(Ended(child))
}

fn output(mut command: Command) -> Result<String> {
    let output = command.output()?;
    let text = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        bail!("{command:?}: {}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}

const SOCKPERF_PORT: &str = "11111";
/// Bytes of a message of every tool.
const SIZE: &str = "64";
/// Between two of irtt's and of our open loop.
const INTERVAL_MS: u64 = 2;

fn sockperf(netns: &NetNs, mode: &[&str], address: &str, seconds: u64) -> Result<Times> {
    let mut command = netns.command("sockperf");
    command.args(mode).args(["-i", address, "-p", SOCKPERF_PORT, "-m", SIZE, "-t", &seconds.to_string(), "--full-rtt"]);
    let text = output(command)?;
    let percentile = |percent: &str| {
        let line = text.lines().find_map(|line| line.split_once(&format!("percentile {percent} =")));
        let us: f64 = line.with_context(|| format!("sockperf said: {text}"))?.1.trim().parse()?;
        Ok::<_, anyhow::Error>(us * 1e3)
    };
    Ok(Times { p50: percentile("50.000")?, p99: percentile("99.000")? })
}

fn irtt(netns: &NetNs, address: &str, seconds: u64) -> Result<Times> {
    let mut command = netns.command("irtt");
    let (interval, time) = (format!("{INTERVAL_MS}ms"), format!("{seconds}s"));
    command.args(["client", "-i", &interval, "-d", &time, "-l", SIZE, "-Q", "-o", "-", address]);
    let result: Value = serde_json::from_str(&output(command)?)?;
    let mut latencies = Latencies::new(None);
    let round_trips = result["round_trips"].as_array().context("irtt reported no round trips")?;
    round_trips.iter().filter_map(|trip| trip["delay"]["rtt"].as_u64()).for_each(|ns| latencies.record(ns));
    let quantile = |q| latencies.quantile_ns(q).map(|ns| ns as f64).context("irtt measured too little");
    Ok(Times { p50: quantile(0.5)?, p99: quantile(0.99)? })
}

/// Rounds in which the tools take turns; the median of a tool's rounds counts.
const ROUNDS: usize = 3;

fn tools() -> Result<Value> {
    let rack = Rack::up(RackSpec::star(3, Rate::from_bps(100_000_000), 32 * 1024))?;
    let (client, receiver, address) = (rack.host(0), rack.host(1), &rack.address(1));
    // On one CPU with the client, as everything beside the load must be where there are two; threads that watch on both
    // would leave no time for the load.
    let server = Server::with(Some(receiver), &["--listen", "[::]:0", "--cpu", &CPUS.0.to_string()])?;
    let target = server.at(address);
    let _sockperf = serve(receiver, "sockperf", &["sr", "-i", address, "-p", SOCKPERF_PORT])?;
    let _irtt = serve(receiver, "irtt", &["server", "-i", "0", "-b", &format!("{address}:2112")])?;
    thread::sleep(Duration::from_secs(1));
    let mut rows = Vec::new();
    for (situation, seconds) in [("idle", 3), ("loaded", 8)] {
        let bulk = (situation == "loaded").then(|| bulk(rack.host(2), receiver, address));
        let bulk = bulk.transpose()?;
        let duration = format!("{seconds}s");
        let rate = (1_000 / INTERVAL_MS).to_string();
        let mut found: BTreeMap<&str, Vec<Times>> = BTreeMap::new();
        for _ in 0..ROUNDS {
            let pingpong = measured(client, &["pingpong", &target, "--size", SIZE, "--duration", &duration])?;
            found.entry("pingpong").or_default().push(Times::of(&pingpong[0])?);
            found.entry("sockperf").or_default().push(sockperf(client, &["pp"], address, seconds)?);
            let probe =
                measured(client, &["probe", &target, "--size", SIZE, "--rate", &rate, "--duration", &duration])?;
            found.entry("probe").or_default().push(Times::of(&probe[0])?);
            found.entry("irtt").or_default().push(irtt(client, address, seconds)?);
        }
        drop(bulk);
        println!("{situation} rack, round trips, the middle one of {ROUNDS} rounds:");
        for (ours, theirs) in [("pingpong", "sockperf"), ("probe", "irtt")] {
            let (own, other) = (middle(&found[ours]), middle(&found[theirs]));
            println!(
                "  {ours:8} p50 {:8.1} us, p99 {:8.1} us; {theirs:8} p50 {:8.1} us, p99 {:8.1} us; ratio {:.2} and {:.2}",
                own.p50 / 1e3,
                own.p99 / 1e3,
                other.p50 / 1e3,
                other.p99 / 1e3,
                own.p50 / other.p50,
                own.p99 / other.p99
            );
            rows.push(json!({
                "situation": situation, "ours": ours, "theirs": theirs,
                "own": own.json(), "other": other.json(),
                "ratio_p50": own.p50 / other.p50, "ratio_p99": own.p99 / other.p99,
            }));
        }
    }
    Ok(rows.into())
}

/// TCP from another host through the receiver's port, until it is dropped.
fn bulk(from: &NetNs, to: &NetNs, address: &str) -> Result<[Ended; 2]> {
    let cpu = CPUS.1.to_string();
    let server = serve(to, "iperf3", &["--server", "--affinity", &cpu])?;
    thread::sleep(Duration::from_millis(500));
    let arguments = ["--client", address, "--time", "600", "--affinity", &cpu, "--congestion", "cubic"];
    let client = serve(from, "iperf3", &arguments)?;
    thread::sleep(Duration::from_secs(2));
    Ok([server, client])
}

fn middle(rounds: &[Times]) -> Times {
    let of = |value: fn(&Times) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Times { p50: of(|times| times.p50), p99: of(|times| times.p99) }
}

/// The level that IP_TOS 16 gives a socket, which is the only way that sockperf has.
const TOS_LEVEL: &str = "6";

/// A sender that its own limiter holds up: one message each 0.54 ms leaves, of one each 0.33 ms that is to.
fn held_up() -> Result<Value> {
    let link = Link::new()?;
    let mut load = Command::new("nsenter");
    load.arg(format!("--net=/run/netns/{}", link.near.name())).arg(binary());
    load.args(["load", "--interface", &link.device, "--hosts", "12", "--link-rate", "100mbit", "--max-packet", "256"]);
    load.args(["--epsilon", "4us", "--level", "6:1", "--queue", "htb"]);
    succeeded(&load.output()?)?;
    let server = Server::new(Some(&link.far))?;
    let _sockperf = serve(&link.far, "sockperf", &["sr", "-i", FAR.0, "-p", SOCKPERF_PORT])?;
    thread::sleep(Duration::from_secs(1));
    let rate = ["--rate", "3000", "--level", TOS_LEVEL, "--size", SIZE, "--timeout", "10s"];
    let streams = measured(&link.near, &[&["probe", &server.at(FAR.0)], &rate[..], &["--duration", "4s"]].concat())?;
    let response = Times::of(&streams[0])?;
    let service =
        Times::of(&Stream { response: streams[0].service.clone().context("no service")?, ..Stream::default() })?;
    let closed = sockperf(&link.near, &["pp", "--tos", "16"], FAR.0, 4)?;
    let open = sockperf(&link.near, &["ul", "--mps=3000", "--reply-every=1", "--tos", "16"], FAR.0, 4)?;
    println!("3,000 messages a second through a limiter that lets 1,860 pass, round trips:");
    let rows = [
        ("probe, response", response),
        ("probe, service", service),
        ("sockperf under-load", open),
        ("sockperf ping-pong", closed),
    ];
    for (name, times) in rows {
        println!("  {name:20} p50 {:10.1} us, p99 {:10.1} us", times.p50 / 1e3, times.p99 / 1e3);
    }
    link.unload()?;
    Ok(rows.map(|(name, times)| json!({"name": name, "times": times.json()})).to_vec().into())
}
