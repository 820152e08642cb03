//! ptpd, memcached and iperf3 on one network at the same time.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use qjump_ebpf::Level;
use serde_json::json;

use super::{BULK_CPU, Case, Done, Experiment, Findings, Lab, Setup, cache::Cache, claims, load::Load};
use crate::{
    config::QueueChoice,
    measure::{
        Latencies,
        memcached::{Popularity, Sizes, Workload},
        result::{Curve, Interval, Run, Sample, Stream},
    },
    plan::{Demand, ETHERNET_MTU, LevelSpec, OverRule, Plan},
    testbed::{
        Process,
        apps::{
            Scratch,
            ptpd::{self, Record, Role, What},
        },
        needs,
    },
    units::{Nanos, Rate},
};

/// The experiment.
pub static PTP: Experiment = Experiment {
    name: "ptp",
    about: "clock offset by ptpd, beside memcached and iperf3 on one network at once",
    figure: "Figures 1 and 5",
    paper: "PTPd's offset and memcached's latency suffer from each other and from Hadoop, and both return to what they are on \
            an idle network with QJump",
    differs: "Master and slave are on one machine and so on one clock: their true offset is 0, ptpd changes no clock, and all \
              that it measures is what the network adds one way and not the other. Messages come 64 times a second, for \
              enough samples in a minute.",
    rack: "eight",
    hosts: 6,
    needs: &[needs::PTPD, needs::MEMCACHED, needs::IPERF3],
    cases,
    judge,
};

const MASTER: usize = 0;
const SLAVE: usize = 1;
const SERVER: usize = 2;
const CLIENT: usize = 3;
/// Where Sync messages arrive, and where memcached's answers do.
const BULK: [(usize, usize); 2] = [(4, SLAVE), (5, CLIENT)];
/// Of guaranteed levels, L2 bytes. PTP's messages are at most 106.
const MAX_PACKET: u32 = 128;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
/// A message in 2^-6 s.
const LOG_INTERVAL: i32 = -6;
/// What ptpd takes at most until the slave follows the master.
const START: Duration = Duration::from_secs(20);
/// Until ptpd's filters have settled.
const WARM_UP: Duration = Duration::from_secs(2);
/// Names of streams.
const OFFSET: &str = "clock offset";
const MEMCACHED: &str = "memcached";

fn cache_level() -> Level {
    Level::new(5).expect("levels are 0 to 7")
}

/// One packet in an epoch would not do for the clock: a master sends Sync and Follow_Up together, and a slave asks at random
/// times. What comes too early would wait in its host, and ptpd has no patience with a kernel that stamps late. So level 7
/// has a rate that is next to nothing, a burst of four messages, and drops what is beyond.
fn plan(setup: &Setup) -> Result<Plan> {
    let bucket = |level, bps, burst| LevelSpec {
        burst: Some(burst),
        ..LevelSpec::new(level, Demand::Rate(Rate::from_bps(bps)))
    };
    let clock = LevelSpec { every_host: true, over: Some(OverRule::Police), ..bucket(Level::STRICTEST, 500_000, 500) };
    let cache = LevelSpec { max_packet: Some(ETHERNET_MTU), ..bucket(cache_level(), 10_000_000, 6_000) };
    setup.plan(MAX_PACKET, MACHINE, vec![clock, cache])
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = plan(setup)?;
    let duration = setup.pick(Duration::from_secs(3), Duration::from_secs(40));
    let shuffle = || Load::Shuffle { pairs: BULK.to_vec(), bytes: 12_000_000, pause: Duration::from_millis(500) };
    let case = |name: &str, about: &str, load: Load, plan: Option<Plan>| {
        let setting = json!({
            "ptpd": {"master": "h1", "slave": "h2", "messages_per_second": 1u32 << -LOG_INTERVAL},
            "memcached": requests(duration).to_json(),
            "load": load.to_json(),
        });
        let bound_ns = plan.as_ref().and_then(|plan| plan.levels[0].bound_ns).map(|ns| ns as u64);
        let levels = plan.is_some();
        let case = Case::new(name, about, move |lab| measure(lab, &load, levels, bound_ns, duration)).setting(setting);
        match plan {
            Some(plan) => case.strict().plan(plan, QueueChoice::Auto).allow(MACHINE),
            None => case,
        }
    };
    Ok(vec![
        case("alone", "ptpd and memcached, no bulk traffic", Load::Idle, None),
        case("contended", "beside iperf3 in shuffles, plain Ethernet", shuffle(), None),
        case(
            "qjump",
            "the same, ptpd at level 7 and memcached at level 5, limits on every host",
            shuffle(),
            Some(plan),
        ),
    ])
}

fn measure(lab: &Lab<'_>, load: &Load, levels: bool, bound_ns: Option<u64>, duration: Duration) -> Result<Run> {
    let clock = levels.then_some(Level::STRICTEST);
    let cache = levels.then(cache_level);
    let ((records, asked), figures) = load.beside(lab, || {
        let mut clocks = Clocks::start(lab, clock)?;
        let start_ns = unix_ns();
        let asked = requests(duration).ask(lab, cache, &mut || ())?;
        clocks.slave.stop()?;
        let mut records = clocks.records()?;
        records.retain(|record| record.at_ns >= start_ns);
        records.iter_mut().for_each(|record| record.at_ns -= start_ns);
        Ok((records, asked))
    })?;
    let mut run = asked.run("");
    let cache = run.streams.drain(..).map(|stream| Stream { name: MEMCACHED.into(), ..stream });
    let streams = clock_streams(&records, clock, bound_ns)?.into_iter().chain(cache).collect();
    run.figures.extend(figures);
    let warm_up = load.warm_up() + WARM_UP;
    Ok(Run { warm_up_ns: warm_up.as_nanos() as u64, streams, ..run })
}

/// As in the experiment `memcached`.
fn requests(duration: Duration) -> Cache {
    let workload =
        Workload { keys: 1_000, sets: 0.1, popularity: Popularity::Zipf(0.99), sizes: Sizes::Fixed(1_000), seed: 1 };
    Cache { server: SERVER, client: CLIENT, rate: 400.0, connections: 16, depth: 16, workload, duration }
}

fn unix_ns() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

/// The offset, and the times of messages both ways.
fn clock_streams(records: &[Record], level: Option<Level>, bound_ns: Option<u64>) -> Result<Vec<Stream>> {
    let mut offsets = Latencies::new(None);
    let (mut down, mut up) = (Latencies::new(bound_ns), Latencies::new(bound_ns));
    // Two stamps of one clock: what is negative is a clock that was set meanwhile.
    let positive = |ns: i64| u64::try_from(ns).unwrap_or(0).max(1);
    for record in records {
        match record.what {
            What::Sync { offset_ns, down_ns } => {
                offsets.record(offset_ns.unsigned_abs().max(1));
                down.record(positive(down_ns));
            }
            What::Delay { up_ns } => up.record(positive(up_ns)),
        }
    }
    ensure!(offsets.samples() > 0, "the slave received no Sync message");
    let level = level.map(Level::number);
    let one_way = |name: &str, times: &Latencies| Stream {
        name: name.into(),
        sample: Sample::OneWay,
        level,
        bound_ns,
        violations: bound_ns.map(|_| times.violations()),
        response: times.distribution(),
        ..Stream::default()
    };
    let offset = Stream {
        name: OFFSET.into(),
        sample: Sample::ClockOffset,
        level,
        response: offsets.distribution(),
        series: seconds(records),
        ..Stream::default()
    };
    Ok(vec![offset, one_way("master to slave", &down), one_way("slave to master", &up)])
}

/// The offsets of each second.
fn seconds(records: &[Record]) -> Vec<Interval> {
    const SECOND: u64 = 1_000_000_000;
    let mut seconds: BTreeMap<u64, Latencies> = BTreeMap::new();
    for record in records {
        if let What::Sync { offset_ns, .. } = record.what {
            let second = seconds.entry(record.at_ns / SECOND).or_insert_with(|| Latencies::new(None));
            second.record(offset_ns.unsigned_abs().max(1));
        }
    }
    let interval = |(second, offsets): (u64, Latencies)| Interval {
        at_ns: second * SECOND,
        samples: offsets.samples(),
        lost: 0,
        p50_ns: offsets.quantile_ns(0.5),
        p99_ns: offsets.quantile_ns(0.99),
        max_ns: offsets.max_ns(),
    };
    seconds.into_iter().map(interval).collect()
}

/// A master and a slave that follows it.
struct Clocks {
    slave: Process,
    master: Process,
    files: [Scratch; 2],
}

impl Clocks {
    /// Returns when the slave follows the master, and its filters have settled.
    fn start(lab: &Lab<'_>, level: Option<Level>) -> Result<Self> {
        let start = |role: Role, host: usize, file: &Scratch| {
            let interface = lab.rack.interface(host);
            let arguments = ptpd::arguments(role, &interface, LOG_INTERVAL, file.path());
            lab.program(host, "ptpd").args(arguments).level(level).cpu(BULK_CPU).start()
        };
        let files = ["ptp-master", "ptp-slave"].map(Scratch::new);
        let master = start(Role::Master, MASTER, &files[0])?;
        let slave = start(Role::Slave, SLAVE, &files[1])?;
        let mut clocks = Self { slave, master, files };
        let deadline = Instant::now() + START;
        while clocks.records()?.is_empty() {
            clocks.master.require_running()?;
            clocks.slave.require_running()?;
            ensure!(Instant::now() < deadline, "ptpd's slave does not follow its master after {START:?}");
            lab.pause(Duration::from_millis(100))?;
        }
        lab.pause(WARM_UP)?;
        Ok(clocks)
    }

    /// What the slave has written so far.
    fn records(&self) -> Result<Vec<Record>> {
        let path = self.files[1].path();
        match fs::read_to_string(path) {
            Ok(text) => Ok(ptpd::records(&text).collect()),
            // Not yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    let bound_ns = claims::bound_ns(done, "qjump");
    let mut claims = claims::near_alone(done, Some(OFFSET), bound_ns);
    let cache_bound = || claims::case(done, "qjump")?.plan.as_ref()?.levels.get(1)?.bound_ns;
    claims.extend(claims::near_alone(done, Some(MEMCACHED), cache_bound().map(|ns| ns as u64)));
    let curve = |case: &str| -> Option<Curve> {
        let series = &claims::stream(done, case, Some(OFFSET))?.series;
        let points = series.iter().filter_map(|second| Some((second.at_ns as f64 / 1e9, second.max_ns? as f64 / 1e3)));
        Some(Curve {
            picture: "clock offset".into(),
            name: case.into(),
            x: "time, s".into(),
            y: "largest offset of each second, without its sign, us".into(),
            points: points.collect(),
            labels: Vec::new(),
        })
    };
    Findings {
        claims,
        curves: ["alone", "contended", "qjump"].into_iter().filter_map(curve).collect(),
        notes: Vec::new(),
    }
}
