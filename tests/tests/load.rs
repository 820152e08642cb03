//! Bulk load beside iperf3, the memcached client against Debian's memcached, and A/B/A/B: in namespaces, with the
//! limiter. Directions are asserted, not figures: those depend on the machine.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::{
    config::QueueChoice,
    dataplane::{self, Hook, Request},
    measure::{
        Transport,
        compare::{Shim, Side},
        load::{self, Load, Pattern, Sink},
        memcached::{self, Client, Popularity, Sizes, Workload},
        result::{Document, Run},
    },
    plan::{Delays, Demand, LevelSpec, Model, Network, Plan},
    testbed::{NetNs, Process, Program},
    units::{Nanos, Rate},
};
use qjump_ebpf::Level;
use qjump_tests::link::{FAR, Link, PLAN, binary, failed, succeeded};

const PORT: u16 = 11_311;
/// Where whatever answers runs; whatever asks has the other.
const FAR_CPU: usize = 0;
const NEAR_CPU: usize = 1;

fn far(port: u16) -> SocketAddr {
    SocketAddr::new(FAR.0.parse().expect("an address"), port)
}

fn level(number: u8) -> Level {
    Level::new(number).expect("a level")
}

/// A link on which both ends use Reno, which every namespace may: with BBR, the default of some machines, small requests
/// are taken for a slow network.
fn reno() -> Result<Link> {
    let link = Link::new()?;
    for netns in [&link.near, &link.far] {
        netns.enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno")?))?;
    }
    Ok(link)
}

/// Sends a load to a sink in the far namespace.
fn through(link: &Link, load: Load) -> Result<load::Outcome> {
    let sink = link.far.enter(|| Sink::bind(far(0), Some(FAR_CPU)))?;
    let stop = AtomicBool::new(false);
    let load = Load { to: sink.address()?, cpu: Some(NEAR_CPU), ..load };
    let outcome = std::thread::scope(|scope| {
        let sinking = scope.spawn(|| sink.run(&stop, &|line: &str| println!("sink: {line}")));
        let outcome = link.near.enter(|| load.run(&load::Progress::default()));
        stop.store(true, Relaxed);
        sinking.join().expect("the sink does not panic")?;
        outcome
    })?;
    ensure!(outcome.trouble.is_empty(), "{:?}", outcome.trouble);
    Ok(outcome)
}

fn goodput(outcome: &load::Outcome) -> f64 {
    outcome.goodput_bps().expect("a sink has counted")
}

fn figure(run: &Run, name: &str) -> f64 {
    run.figures.iter().find(|figure| figure.name == name).unwrap_or_else(|| panic!("no {name}: {run:?}")).value
}

/// Level 5 with 50 Mbit/s and room for TCP, and level 7 guaranteed: one packet of 256 B in some 7 ms.
fn plan() -> Result<Plan> {
    let guaranteed = LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0));
    let limited =
        LevelSpec { burst: Some(30_000), ..LevelSpec::new(level(5), Demand::Rate(Rate::from_bps(50_000_000))) };
    let network = Network {
        hosts: 8,
        link_rate: Rate::from_bps(1_000_000_000),
        max_packet: 256,
        delays: Delays::Given(Nanos::from_ns(3_000_000)),
        wire_overhead: 24,
        tagged: false,
        model: Model::Strict,
        levels: vec![guaranteed, limited],
    };
    Ok(network.plan()?)
}

fn request<'a>(interfaces: &'a [String], plan: &'a Plan, queue: QueueChoice) -> Request<'a> {
    Request { interfaces, plan, pcp: false, hook: Hook::Auto, queue, host_rate: None }
}

/// What one TCP flow of iperf3 gets from the near to the far namespace (or within the near one) in two seconds, bit/s.
fn iperf3(from: &NetNs, to: &NetNs, address: &str) -> Result<f64> {
    let port = "5299";
    let far_cpu = FAR_CPU.to_string();
    let _server = Program::new(to, "iperf3").args(["--server", "--port", port, "--affinity", &far_cpu]).start()?;
    std::thread::sleep(Duration::from_millis(300));
    let near_cpu = NEAR_CPU.to_string();
    let arguments = ["--client", address, "--port", port, "--time", "2", "--json", "--affinity", &near_cpu];
    let mut client = Program::new(from, "iperf3").args(arguments).args(["--congestion", "cubic"]).start()?;
    let result: serde_json::Value = serde_json::from_str(&client.finish(Duration::from_secs(10))?)?;
    Ok(result["end"]["sum_received"]["bits_per_second"].as_f64().expect("a rate"))
}

#[test]
fn one_thread_fills_a_link_as_iperf3_does() -> Result<()> {
    let link = Link::new()?;
    for (netns, device) in [(&link.near, &link.device), (&link.far, &link.far_device)] {
        netns.ip(&format!("link set {device} gso_max_segs 65535"))?;
    }
    let load = || Load {
        congestion: Some("cubic".into()),
        duration: Duration::from_millis(2_200),
        warm_up: Duration::from_millis(200),
        ..Load::new(far(0))
    };
    let udp = |segment| Load { transport: Transport::Udp, congestion: None, segment, ..load() };
    for round in 0..2 {
        let (theirs, ours) = (iperf3(&link.near, &link.far, FAR.0)?, goodput(&through(&link, load())?));
        println!(
            "round {round}: iperf3 {:.2} Gbit/s, qjump {:.2} Gbit/s, {:.2} x",
            theirs / 1e9,
            ours / 1e9,
            ours / theirs
        );
        // It counts without copying, and must not be the slower tool by far on any machine.
        assert!(ours > 0.6 * theirs, "{ours} of {theirs}");
        for segment in [false, true] {
            let outcome = through(&link, udp(segment))?;
            let (taken, got) = (figure(&outcome.run("udp"), "taken by the kernel"), goodput(&outcome));
            println!(
                "  datagrams of 1400 B, cut by the kernel {segment}: {:.2} sent, {:.2} Gbit/s",
                taken / 1e9,
                got / 1e9
            );
            assert!(got > 0.0);
        }
    }
    Ok(())
}

#[test]
fn a_load_has_its_level_and_what_the_limiter_lets_through() -> Result<()> {
    let link = Link::new()?;
    let (plan, interfaces) = (plan()?, [link.device.clone()]);
    link.near.enter(|| Ok(dataplane::load(&request(&interfaces, &plan, QueueChoice::Htb))?))?;
    let load = Load {
        flows: 4,
        congestion: Some("cubic".into()),
        duration: Duration::from_secs(4),
        warm_up: Duration::from_secs(1),
        ..Load::new(far(0))
    };
    let unlimited = goodput(&through(&link, load.clone())?);
    let outcome = through(&link, Load { level: Some(level(5)), ..load.clone() })?;
    let limited = goodput(&outcome);
    println!("level 0: {:.0} Mbit/s, level 5: {:.2} of 50 Mbit/s", unlimited / 1e6, limited / 1e6);
    assert!(limited < 50e6 && limited > 0.5 * 50e6 && unlimited > 2.0 * limited);
    let run = outcome.run("level 5");
    assert_eq!(run.about, "4 tcp flows at level 5, greedy");
    let flows: f64 = (0..4).map(|flow| figure(&run, &format!("goodput of flow {flow}"))).sum();
    assert!((flows / limited - 1.0).abs() < 1e-9);
    assert!(figure(&run, "fairness (Jain)") > 0.25);

    // With nothing to hold them back, most datagrams of a flood are lost, and the sink knows how many.
    link.near.enter(|| Ok(dataplane::load(&request(&interfaces, &plan, QueueChoice::Keep))?))?;
    let flood = Load {
        transport: Transport::Udp,
        level: Some(Level::STRICTEST),
        datagram: 200,
        congestion: None,
        rate: Some(Rate::from_bps(10_000_000)),
        flows: 1,
        ..load
    };
    let run = through(&link, flood)?.run("flood");
    let (sent, lost) = (figure(&run, "datagrams"), figure(&run, "lost datagrams"));
    println!("flood at level 7: {sent} datagrams, {lost} lost, {} refused", figure(&run, "refused sends"));
    assert!(lost + figure(&run, "refused sends") > 0.5 * sent && figure(&run, "goodput") > 0.0);
    link.unload()?;
    Ok(())
}

#[test]
fn bursts_leave_the_link_idle_between_them() -> Result<()> {
    let link = reno()?;
    let pattern = Pattern::OnOff { on_ns: 100_000_000, off_ns: 300_000_000, random: false };
    let load = Load { pattern, duration: Duration::from_secs(2), ..Load::new(far(0)) };
    let outcome = through(&link, load)?;
    let received = outcome.received.expect("a sink has counted");
    // A slice of 100 ms in four is busy; sender and sink began a little apart.
    let mut slices = received.slices;
    slices.sort_unstable();
    let (idle, busy): (u64, u64) = (slices[..10].iter().sum(), slices[15..].iter().sum());
    println!("slices: {slices:?}");
    assert!(busy > 20 * idle, "{slices:?}");
    assert!(received.flows[0].longest_gap_ns > 200_000_000);
    Ok(())
}

/// Debian's memcached, unmodified, in a namespace.
fn memcached(netns: &NetNs, more: &[&str]) -> Result<Process> {
    let port = PORT.to_string();
    let mut server = Program::new(netns, "memcached")
        // A change of user would make it outlive a test that is killed (PR_SET_PDEATHSIG of prctl(2)).
        .args(["-u", "root", "-l", FAR.0, "-p", &port, "-t", "1"])
        .args(more)
        .cpu(FAR_CPU)
        .start()?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while netns.enter(|| Ok(std::net::TcpStream::connect(far(PORT)).is_err()))? {
        server.require_running()?;
        ensure!(Instant::now() < deadline, "memcached does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

/// Two seconds of 2000 requests a second.
fn client() -> Client {
    Client {
        rate: 2_000.0,
        duration: Duration::from_millis(2_500),
        warm_up: Duration::from_millis(500),
        cpu: Some(NEAR_CPU),
        ..Client::new(far(PORT))
    }
}

fn ask(link: &Link, client: &Client) -> Result<memcached::Outcome> {
    link.near.enter(|| client.run(&memcached::Progress::default(), &mut |_| {}))
}

#[test]
fn memcached_answers_and_every_value_is_right() -> Result<()> {
    let link = reno()?;
    let _server = memcached(&link.far, &[])?;
    for (popularity, sizes, threads) in
        [(Popularity::Zipf(0.99), Sizes::Etc, 1), (Popularity::Uniform, Sizes::Fixed(20_000), 2)]
    {
        let workload = Workload { keys: 500, sets: 0.3, popularity, sizes, seed: 9 };
        let outcome = ask(&link, &Client { workload, threads, ..client() })?;
        let run = outcome.run("alone");
        println!("{}\n{:?}", run.about, outcome.notes());
        let stream = &run.streams[0];
        let counts = stream.counts.expect("counts");
        println!("{counts:?} {:?} {:?}", stream.response.percentiles, stream.generator);
        assert!(outcome.server.starts_with("1."), "{}", outcome.server);
        assert_eq!((counts.lost, counts.corrupted, figure(&run, "misses")), (0, 0, 0.0));
        assert!(counts.sent > 3_000 && counts.sent == counts.received);
        let (gets, sets) = (figure(&run, "gets"), figure(&run, "sets"));
        assert!((0.25..0.35).contains(&(sets / (gets + sets))));
        assert_eq!(stream.series.iter().map(|second| second.samples).sum::<u64>(), counts.received);
    }
    Ok(())
}

#[test]
fn what_memcached_forgets_is_a_miss_and_what_it_refuses_is_said() -> Result<()> {
    let link = reno()?;
    // 40 MB of values for a cache of 8 MB.
    let workload =
        Workload { keys: 40_000, sets: 0.0, popularity: Popularity::Uniform, sizes: Sizes::Fixed(1_000), seed: 1 };
    let client = Client { workload, ..client() };
    let server = memcached(&link.far, &["-m", "8"])?;
    let run = ask(&link, &client)?.run("small");
    println!("{} misses of {} gets", figure(&run, "misses"), figure(&run, "gets"));
    assert!(figure(&run, "misses") > 0.3 * figure(&run, "gets"));
    drop(server);
    let _server = memcached(&link.far, &["-m", "8", "-M"])?;
    let error = format!("{:#}", ask(&link, &client).unwrap_err());
    assert!(error.contains("out of memory") && error.contains("memcached -m"), "{error}");
    Ok(())
}

#[test]
fn a_server_that_is_killed_and_comes_back_is_measured_on() -> Result<()> {
    let link = reno()?;
    let mut server = memcached(&link.far, &[])?;
    let client = Client { timeout: Duration::from_secs(1), duration: Duration::from_secs(4), ..client() };
    let progress = memcached::Progress::default();
    let outcome = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| link.near.enter(|| client.run(&progress, &mut |_| {})));
        while progress.answered() < 2_000 {
            ensure!(!asking.is_finished(), "it ended early");
            std::thread::sleep(Duration::from_millis(10));
        }
        server.stop()?;
        std::thread::sleep(Duration::from_millis(300));
        let _server = memcached(&link.far, &[])?;
        asking.join().expect("the client does not panic")
    })?;
    let run = outcome.run("killed");
    println!("{:?}\n{:?}", outcome.notes(), run.figures);
    assert!(figure(&run, "connections lost") >= 16.0 && figure(&run, "connections made again") >= 16.0);
    // The new one knows nothing.
    assert!(figure(&run, "misses") > 100.0);
    // What was due meanwhile waited, and is in the response times.
    let response = &run.streams[0].response;
    assert!(response.max_ns.expect("samples") > 250_000_000, "{response:?}");
    Ok(())
}

/// The client's own limiter is in the response time: what it was made for.
#[test]
fn a_client_held_up_by_its_own_limiter_says_so() -> Result<()> {
    let link = reno()?;
    let _server = memcached(&link.far, &[])?;
    let (plan, interfaces) = (plan()?, [link.device.clone()]);
    // Sets of 1000 B at 16 Mbit/s and then at 80 Mbit/s, of the 50 Mbit/s of level 5.
    let workload =
        Workload { keys: 1_000, sets: 1.0, popularity: Popularity::Uniform, sizes: Sizes::Fixed(1_000), seed: 1 };
    let client = Client { workload, level: Some(level(5)), ..client() };
    link.near.enter(|| Ok(dataplane::load(&request(&interfaces, &plan, QueueChoice::Htb))?))?;
    let below = ask(&link, &client)?.run("below");
    let above = ask(&link, &Client { rate: 10_000.0, ..client })?.run("above");
    link.unload()?;
    let p50 = |run: &Run| run.streams[0].response.percentiles[0].ns;
    let answered = |run: &Run| figure(run, "requests answered");
    println!(
        "p50 {} and {} us; {} and {} 1/s",
        p50(&below) / 1_000,
        p50(&above) / 1_000,
        answered(&below),
        answered(&above)
    );
    assert!(p50(&above) > 5 * p50(&below));
    // Neither is the client to blame, nor does it hide what waited.
    assert!(answered(&above) < 0.9 * 10_000.0);
    assert!(above.streams[0].response.max_ns > above.streams[0].service.as_ref().and_then(|service| service.max_ns));
    assert_eq!(below.streams[0].level, Some(5));
    Ok(())
}

#[test]
fn a_comparison_puts_back_what_it_found() -> Result<()> {
    let link = Link::new()?;
    let (plan, interfaces) = (plan()?, [link.device.clone()]);
    let queue = link.tc_state()?;
    let request = || request(&interfaces, &plan, QueueChoice::Htb);
    let loaded = || link.near.enter(|| Ok(dataplane::has(&link.device, &request())?));
    link.near.enter(|| {
        // Nothing was there.
        let mut shim = Shim::new(request()).map_err(anyhow::Error::msg)?;
        for side in [Side::Off, Side::On, Side::Off, Side::On] {
            shim.set(side)?;
            assert_eq!(dataplane::has(&link.device, &request())?, (side == Side::On).then_some(true));
        }
        drop(shim);
        Ok(())
    })?;
    assert_eq!((loaded()?, link.tc_state()?), (None, queue));

    // The same plan was there, in whatever state it is left.
    link.near.enter(|| {
        dataplane::load(&request())?;
        let mut shim = Shim::new(request()).map_err(anyhow::Error::msg)?;
        shim.set(Side::Off)?;
        assert_eq!(dataplane::has(&link.device, &request())?, None);
        Ok(shim.restore()?)
    })?;
    assert_eq!(loaded()?, Some(true));

    // Another was there: it is not touched.
    let before = link.status()?;
    let other = Plan { network: Network { hosts: 12, ..plan.network.clone() }, ..plan.clone() }.network.plan()?;
    let error = link.near.enter(|| {
        let interfaces = [link.device.clone()];
        Ok(Shim::new(self::request(&interfaces, &other, QueueChoice::Htb)).err())
    })?;
    assert!(error.as_ref().is_some_and(|error| error.contains("another plan")), "{error:?}");
    assert_eq!(link.status()?["generation"], before["generation"]);
    link.unload()?;
    Ok(())
}

/// A program in the far namespace, ended when dropped.
fn far_qjump(link: &Link, arguments: &[&str]) -> Result<Process> {
    let mut process = Program::new(&link.far, binary()).args(arguments).start()?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !process.stderr()?.contains(" TCP and UDP") {
        process.require_running()?;
        ensure!(Instant::now() < deadline, "it does not listen: {}", process.stderr()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(process)
}

#[test]
fn the_command_line_measures_and_says_what_is_wrong() -> Result<()> {
    let link = reno()?;
    let _sink = far_qjump(&link, &["measure", "sink", "--listen", &format!("{}:7701", FAR.0)])?;
    let _server = memcached(&link.far, &[])?;
    let memcached = format!("{}:{PORT}", FAR.0);
    let document = |arguments: &[&str]| -> Result<Document> {
        let output =
            link.qjump(&[&["measure"], arguments, &["--warm-up", "200ms", "--quiet", "--json", "-"]].concat())?;
        Ok(serde_json::from_str(&succeeded(&output)?)?)
    };
    let load = document(&["load", FAR.0, "--udp", "--rate", "20mbit", "--flows", "2", "--duration", "1s"])?;
    assert_eq!(load.curves.len(), 1);
    let goodput = figure(&load.runs[0], "goodput");
    assert!((10e6..21e6).contains(&goodput), "{goodput}");
    let asked = document(&["memcached", &memcached, "--duration", "1s", "--assert", "p50<5s", "--values", "100"])?;
    assert!(asked.runs[0].streams[0].response.samples == 1_000 && asked.claims[0].holds == Some(true), "{asked:?}");

    for (arguments, status, part) in [
        (&["memcached", &memcached, "--assert", "p50<1ns", "--duration", "500ms"][..], 2, "condition does not hold"),
        (&["memcached", &memcached, "--assert", "max<bound"], 64, "has no bound"),
        (&["memcached", &memcached, "--rate=-1"], 64, "requests a second"),
        (&["memcached", &format!("{}:7701", FAR.0), "--duration", "1s"], 1, "did not answer to 'version'"),
        (&["load", &memcached, "--duration", "1s"], 1, "is `qjump measure sink` running there, at port 11311?"),
        (&["load", FAR.0, "--burst", "0", "--period", "1ms"], 64, "bursts of 0 bytes"),
        (&["load", FAR.0, "--congestion", "warp"], 1, "no congestion control 'warp'; it has:"),
        (&["load", FAR.0, "--duration", "7200s"], 64, "at most 3600 s"),
        (&["load", FAR.0, "--compare", "--", "--interface", "qjnone", "--config", "/nowhere"], 64, "/nowhere"),
        (&["load", FAR.0, "--compare"], 64, "FLAGS OF QJUMP LOAD"),
    ] {
        let (code, error) = failed(&link.qjump(&[&["measure"], arguments].concat())?);
        assert!(code == status && error.contains(part), "{arguments:?}: {code} {error}");
    }
    Ok(())
}

#[test]
fn an_interrupted_comparison_keeps_its_rounds_and_puts_back_what_was_there() -> Result<()> {
    let link = reno()?;
    let _sink = far_qjump(&link, &["measure", "sink", "--listen", &format!("{}:7701", FAR.0)])?;
    let before = link.tc_state()?;
    let mut arguments = vec!["measure", "load", FAR.0, "--duration", "300ms", "--warm-up", "100ms", "--json", "-"];
    arguments.extend(["--compare=100", "--", "--interface", &link.device]);
    arguments.extend(PLAN);
    let child = link.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Three rounds or so, and then in the middle of one with it loaded.
    std::thread::sleep(Duration::from_secs(4));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !link.pins().exist() {
        ensure!(Instant::now() < deadline, "never loaded");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
    let output = child.wait_with_output()?;
    let document: Document = serde_json::from_str(&succeeded(&output)?)?;
    assert!(!link.pins().exist());
    assert_eq!(link.tc_state()?, before);
    let names: Vec<&str> = document.runs.iter().map(|run| run.name.as_str()).collect();
    assert!(names.len() >= 3 && names[..2] == ["off 1", "on 1"] && names.last() == Some(&"on / off"), "{names:?}");
    assert!(document.notes.iter().any(|note| note.starts_with("interrupted")), "{:?}", document.notes);
    assert!(figure(&document.runs[names.len() - 1], "goodput") > 0.0);
    Ok(())
}
