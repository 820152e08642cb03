//! memcached beside bulk traffic in shuffles.

use std::time::Duration;

use anyhow::Result;
use qjump_ebpf::Level;
use serde_json::json;

use super::{Case, Done, Experiment, Findings, Lab, Setup, cache::Cache, cache::WARM_UP, claims, load::Load, planned};
use crate::{
    config::QueueChoice,
    measure::{
        memcached::{Popularity, Sizes, Workload},
        result::{Claim, Figure, Run, Stream},
    },
    plan::{Demand, LevelSpec, Plan},
    testbed::needs,
    units::{Nanos, Rate},
};

/// The experiment.
pub static MEMCACHED: Experiment = Experiment {
    name: "memcached",
    about: "memcached asked open loop over 128 connections, beside iperf3 in shuffles",
    figure: "Figure 3b",
    paper: "memaslap with 128 connections beside Hadoop: the tail of the latencies is back near that of an idle network",
    differs: "The client's schedule waits for nobody, where memaslap's connections wait for their answers, so that what the \
              network holds up is counted in full. Transfers of iperf3 with pauses stand for Hadoop's shuffle. A full port \
              holds 21 ms here, and a request meets two of them: one on its way, and one on the way of its answer.",
    rack: "eight",
    hosts: 6,
    needs: &[needs::MEMCACHED, needs::IPERF3],
    cases,
    judge,
};

const SERVER: usize = 0;
const CLIENT: usize = 1;
/// Into the ports where requests and answers arrive: two hosts each, so that TCP fills them.
const BULK: [(usize, usize); 4] = [(2, SERVER), (3, SERVER), (4, CLIENT), (5, CLIENT)];
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
/// Bytes of a value, as memaslap has them by default. Larger ones, such as the tail of ETC, wait for the level's rate in their host,
/// for longer than in the network.
const VALUE: usize = 1_000;
/// Some two and a half times what is answered on average.
const RATE: Rate = Rate::from_bps(10_000_000);
/// A few values at once. More, or a higher rate, and the bound is longer than what it is to be better than.
const BURST: u32 = 6_000;
/// A full frame, L2 bytes.
const FRAME: u32 = 1_514;

fn level() -> Level {
    Level::new(5).expect("levels are 0 to 7")
}

/// The hosts of server and client alone send at the level, so they are the plan's n. (The client takes its level by itself,
/// so it cannot be for grants alone.)
pub(super) fn plan(setup: &Setup, rate: Rate, burst: u32) -> Result<Plan> {
    let spec = LevelSpec { burst: Some(burst), ..LevelSpec::new(level(), Demand::Rate(rate)) };
    let mut network = setup.network(FRAME, MACHINE, vec![spec]);
    network.hosts = 2;
    planned(&network)
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = plan(setup, RATE, BURST)?;
    let cache = Cache {
        server: SERVER,
        client: CLIENT,
        rate: 400.0,
        connections: 128,
        depth: 1,
        workload: Workload {
            keys: 10_000,
            sets: 0.1,
            popularity: Popularity::Zipf(0.99),
            sizes: Sizes::Fixed(VALUE),
            seed: setup.seed,
        },
        duration: setup.pick(Duration::from_secs(4), Duration::from_secs(30)),
    };
    let shuffle = || Load::Shuffle { pairs: BULK.to_vec(), bytes: 12_000_000, pause: Duration::from_millis(500) };
    let case = |name: &str, about: &str, load: Load, level: Option<Level>| {
        let setting = json!({"memcached": cache.to_json(), "load": load.to_json()});
        let cache = cache.clone();
        Case::new(name, about, move |lab| measure(lab, &load, &cache, level)).setting(setting)
    };
    Ok(vec![
        case("alone", "memcached, no bulk traffic", Load::Idle, None),
        case("contended", "beside iperf3 in shuffles, plain Ethernet", shuffle(), None),
        case("qjump", "the same, memcached at level 5, limits and priorities", shuffle(), Some(level()))
            .strict()
            .plan(plan, QueueChoice::Auto)
            .allow(MACHINE),
    ])
}

/// Asks beside a load.
pub(super) fn measure(lab: &Lab<'_>, load: &Load, cache: &Cache, level: Option<Level>) -> Result<Run> {
    let (asked, figures) = load.beside(lab, || cache.ask(lab, level, &mut || ()))?;
    let mut run = asked.run("");
    run.streams.iter_mut().for_each(|stream| stream.name = "memcached".into());
    run.figures.extend(figures);
    if let Some(level) = level {
        let figure = |name: &str, packets: u64| Figure { name: name.into(), value: packets as f64, unit: "1".into() };
        run.figures.push(figure("packets demoted by the limiters", lab.demoted_by_limiters(level)?));
        run.figures.push(figure("packets dropped by the limiters", lab.dropped_by_limiters(level)?));
    }
    let warm_up = load.warm_up() + WARM_UP;
    Ok(Run { warm_up_ns: warm_up.as_nanos() as u64, ..run })
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    // A request is one message there and one back.
    let bound_ns = claims::bound_ns(done, "qjump").map(|ns| 2 * ns);
    let mut claims = claims::near_alone(done, None, bound_ns);
    claims.extend(done.iter().map(answered));
    Findings { claims, ..Findings::default() }
}

/// That each request was answered, and each value was right.
fn answered(done: &Done) -> Claim {
    let counts = claims::stream(std::slice::from_ref(done), &done.case, None).and_then(|stream: &Stream| stream.counts);
    let misses = claims::figure(std::slice::from_ref(done), &done.case, "misses");
    Claim {
        claim: format!("{}: every request answered, every value right", done.case),
        holds: counts.map(|counts| counts.lost == 0 && counts.corrupted == 0 && misses == Some(0.0)),
        measured: counts.map_or("not measured".into(), |counts| {
            let misses = misses.unwrap_or(0.0);
            format!("{} lost, {} with other bytes, {misses} missing, of {}", counts.lost, counts.corrupted, counts.sent)
        }),
    }
}
