//! timely's barrier over TCP on four hosts, beside iperf3.

use std::{
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use qjump_ebpf::Level;
use serde_json::json;

use super::{Case, Done, Experiment, Findings, Lab, PROBE_CPU, Setup, claims, load::Load, planned};
use crate::{
    config::QueueChoice,
    measure::{
        Latencies,
        result::{Figure, Run, Sample, Stream},
    },
    plan::{Claims, Demand, LevelSpec, Plan},
    testbed::{
        apps::{
            Scratch,
            timely::{Barriers, PORT, program},
            watch::Watch,
        },
        needs,
    },
    units::{Nanos, Rate},
};

/// The experiment.
pub static BARRIER: Experiment = Experiment {
    name: "barrier",
    about: "timely's barrier over TCP on four hosts, beside iperf3",
    figure: "Figure 3c",
    paper: "Naiad's barrier on four hosts, 10,000 times beside Hadoop: the tail is back near that of an idle network",
    differs: "timely is Naiad's descendant in Rust, and its barrier runs as it is published. Its workers, the switch and the \
              bulk traffic share two CPUs, which is most of what a barrier takes here on an idle network. With qjump the \
              level's rate sets the pace: a barrier is three messages and some acknowledgements of each host.",
    rack: "eight",
    hosts: 6,
    needs: &[needs::IPERF3],
    cases,
    judge,
};

/// The workers' hosts. On the first, barriers are seen; bulk goes to others, because whoever looks sees that as well.
const WORKERS: [usize; 4] = [0, 1, 2, 3];
const BULK: [(usize, usize); 2] = [(4, 1), (5, 2)];
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
/// A barrier is some 900 wire bytes of each host: three messages of 242, and acknowledgements.
const RATE: Rate = Rate::from_bps(6_000_000);
/// Two of the largest packets: what two barriers say to one host.
const BURST: u32 = 1_200;
/// Two messages in one segment, and room, L2 bytes.
const MAX_PACKET: u32 = 512;
/// Barriers that are left out at the beginning.
const WARM_UP: usize = 100;
/// No run goes on for longer.
const LONGEST: Duration = Duration::from_secs(120);

fn level() -> Level {
    Level::new(6).expect("levels are 0 to 7")
}

/// The four workers' hosts alone may send at the level, so they are the plan's n.
fn plan(setup: &Setup) -> Result<Plan> {
    let spec = LevelSpec {
        burst: Some(BURST),
        claims: Claims::GrantOnly,
        every_host: true,
        ..LevelSpec::new(level(), Demand::Rate(RATE))
    };
    let mut network = setup.network(MAX_PACKET, MACHINE, vec![spec]);
    network.hosts = WORKERS.len() as u32;
    planned(&network)
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = plan(setup)?;
    let bound_ns = plan.levels[0].bound_ns.map(|ns| ns as u64);
    let case = |name: &str, about: &str, load: Load, level: Option<Level>, bound_ns: Option<u64>, count: usize| {
        let setting = json!({"barriers": count, "workers": WORKERS.len(), "load": load.to_json()});
        Case::new(name, about, move |lab| measure(lab, &load, level, bound_ns, count)).setting(setting)
    };
    let greedy = || Load::Greedy(BULK.to_vec());
    let many = setup.pick(2_000, 10_000);
    // Each takes as long as a full queue, and longer where a segment is lost.
    let slow = setup.pick(150, 1_500);
    Ok(vec![
        case("alone", "nothing else on the network", Load::Idle, None, None, many),
        case("contended", "iperf3 to two of the hosts, plain Ethernet", greedy(), None, None, slow),
        case(
            "qjump",
            "the same, the barrier at level 6 and limits on every host",
            greedy(),
            Some(level()),
            bound_ns,
            many,
        )
        .strict()
        .plan(plan, QueueChoice::Auto)
        .allow(MACHINE),
    ])
}

fn measure(lab: &Lab<'_>, load: &Load, level: Option<Level>, bound_ns: Option<u64>, count: usize) -> Result<Run> {
    let ((barriers, took), mut figures) = load.beside(lab, || run(lab, level, count))?;
    // One step for each barrier, from the start on.
    ensure!(
        barriers.complete() == count + 1,
        "{count} barriers were asked for, and {} were seen",
        barriers.complete().saturating_sub(1)
    );
    let mut steps = Latencies::new(bound_ns);
    let mut duration_ns = 0;
    for ns in barriers.steps_ns().skip(WARM_UP) {
        steps.record(ns.max(1));
        duration_ns += ns;
    }
    let left_out: u64 = barriers.steps_ns().take(WARM_UP).sum();
    figures.push(Figure { name: "program, with its start".into(), value: took.as_nanos() as f64, unit: "ns".into() });
    figures.push(Figure {
        name: "barriers".into(),
        value: steps.samples() as f64 * 1e9 / duration_ns.max(1) as f64,
        unit: "1/s".into(),
    });
    let stream = Stream {
        name: "barrier".into(),
        sample: Sample::Step,
        level: level.map(Level::number),
        response: steps.distribution(),
        ..Stream::default()
    };
    let warm_up_ns = load.warm_up().as_nanos() as u64 + left_out;
    Ok(Run { duration_ns, warm_up_ns, streams: vec![stream], figures, ..Run::default() })
}

/// Runs the workers to their end, and looks at what arrives at the first.
fn run(lab: &Lab<'_>, level: Option<Level>, count: usize) -> Result<(Barriers, Duration)> {
    let address = |host: usize| -> Result<Ipv4Addr> { Ok(lab.rack.address(host).parse()?) };
    let others = WORKERS[1..].iter().map(|&host| address(host)).collect::<Result<Vec<_>>>()?;
    // Tells workers where they all are.
    let hosts = Scratch::new("barrier");
    let lines: String = WORKERS.iter().map(|&host| format!("{}:{PORT}\n", lab.rack.address(host))).collect();
    fs::write(hosts.path(), lines).with_context(|| format!("cannot write {}", hosts.path().display()))?;
    let mut watch = Watch::new(lab.rack.host(WORKERS[0]))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let mut barriers = Barriers::new(others);
            loop {
                match watch.segment()? {
                    Some(segment) => barriers.take(&segment)?,
                    None if over.load(Relaxed) => return anyhow::Ok(barriers),
                    None => {}
                }
            }
        });
        let ran = workers(lab, level, count, hosts.path());
        over.store(true, Relaxed);
        let barriers = watching.join().expect("the watch does not panic");
        let took = ran?;
        Ok((barriers?, took))
    })
}

/// Runs the workers to their end: how long that took.
fn workers(lab: &Lab<'_>, level: Option<Level>, count: usize, hosts: &Path) -> Result<Duration> {
    let program = program()?;
    let start = Instant::now();
    let mut workers = Vec::new();
    for (number, &host) in WORKERS.iter().enumerate() {
        let words = [count.to_string(), "-n".into(), WORKERS.len().to_string(), "-p".into(), number.to_string()];
        let worker = lab.program(host, &program).args(words).args(["-h".as_ref(), hosts.as_os_str()]);
        workers.push(worker.level(level).cpu(PROBE_CPU).start()?);
        // Those behind it connect to it, and would try again only after a second.
        if number + 1 < WORKERS.len() {
            lab.listening(host, PORT)?;
        }
    }
    while start.elapsed() < LONGEST {
        lab.pause(Duration::from_millis(20))?;
        let mut running = false;
        for worker in &mut workers {
            match worker.status()? {
                None => running = true,
                Some(status) if status.success() => {}
                Some(_) => worker.require_running().context("a worker of the barrier")?,
            }
        }
        if !running {
            return Ok(start.elapsed());
        }
    }
    bail!("{count} barriers were not over after {LONGEST:?}")
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    Findings { claims: claims::near_alone(done, None, claims::bound_ns(done, "qjump")), ..Findings::default() }
}
