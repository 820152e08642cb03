//! memcached's throughput and latency by the rate of its level.

use std::time::Duration;

use anyhow::Result;
use qjump_ebpf::Level;
use serde_json::json;

use super::{Case, Done, Experiment, Findings, Setup, cache::Cache, claims, load::Load, memcached};
use crate::{
    config::QueueChoice,
    measure::{
        memcached::{Popularity, Sizes, Workload},
        result::{Claim, Curve},
    },
    testbed::needs,
    units::Rate,
};

/// The experiment.
pub static RATE_SWEEP: Experiment = Experiment {
    name: "rate-sweep",
    about: "memcached's throughput and latency by the rate of its level, beside iperf3",
    figure: "Figure 10",
    paper: "Limits from 0.1 to 10 Gbit/s: below what memcached needs, requests wait at its host; above, latency creeps up \
            with what the level lets into the network. Best near 5 Gbit/s",
    differs: "The load is offered open loop, a third of the port's rate. So throughput grows with the level's rate until it \
              is what is offered, and latency falls there from seconds to less than what one full port holds. One server and \
              one client cannot fill the network with their own level, so latency does not creep up again.",
    rack: "eight",
    hosts: 6,
    needs: &[needs::MEMCACHED, needs::IPERF3],
    cases,
    judge,
};

const SERVER: usize = 0;
const CLIENT: usize = 1;
const BULK: [(usize, usize); 4] = [(2, SERVER), (3, SERVER), (4, CLIENT), (5, CLIENT)];
/// Bytes of a value.
const VALUE: usize = 1_000;
/// Requests a second.
const OFFERED: f64 = 3_000.0;
/// Bytes of an answer: its line, the value, and END.
const ANSWER: f64 = (45 + VALUE + 7) as f64;
/// Wire bytes of a full frame for each byte of TCP in it: below, no packing of answers into frames gets more through.
const WIRE: f64 = 1_538.0 / 1_448.0;
/// Of the level, bytes.
const BURST: u32 = 12_000;
const QUICK: [u64; 3] = [10, 20, 60];
const FULL: [u64; 8] = [2, 5, 10, 20, 30, 40, 60, 80];

fn rates(setup: &Setup) -> &'static [u64] {
    setup.pick(&QUICK[..], &FULL[..])
}

fn name(mbit: u64) -> String {
    format!("{mbit} Mbit/s")
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let cache = Cache {
        server: SERVER,
        client: CLIENT,
        rate: OFFERED,
        connections: 16,
        depth: 16,
        workload: Workload {
            keys: 2_000,
            sets: 0.0,
            popularity: Popularity::Uniform,
            sizes: Sizes::Fixed(VALUE),
            seed: setup.seed,
        },
        duration: setup.pick(Duration::from_secs(3), Duration::from_secs(8)),
    };
    let greedy = || Load::Greedy(BULK.to_vec());
    let case = |name: String, about: String, load: Load, level: Option<Level>| {
        let setting = json!({"memcached": cache.to_json(), "load": load.to_json()});
        let cache = cache.clone();
        Case::new(name, about, move |lab| memcached::measure(lab, &load, &cache, level)).setting(setting)
    };
    let mut cases = vec![
        case("alone".into(), "memcached, no bulk traffic".into(), Load::Idle, None),
        case("contended".into(), "beside iperf3, plain Ethernet".into(), greedy(), None),
    ];
    for &mbit in rates(setup) {
        let plan = memcached::plan(setup, Rate::from_bps(mbit * 1_000_000), BURST)?;
        let level = plan.levels[0].spec.level;
        let about = format!("beside iperf3, memcached at a level of {mbit} Mbit/s");
        cases.push(case(name(mbit), about, greedy(), Some(level)).strict().plan(plan, QueueChoice::Auto));
    }
    Ok(cases)
}

/// Requests a second that a level of this rate lets through at most.
fn most(mbit: u64) -> f64 {
    mbit as f64 * 1e6 / 8.0 / (ANSWER * WIRE)
}

fn judge(setup: &Setup, done: &[Done]) -> Findings {
    let rates = rates(setup);
    let answered = |mbit: u64| claims::figure(done, &name(mbit), "requests answered");
    let p99 = |mbit: u64| claims::p99(done, &name(mbit), None);
    let mut findings = Findings::default();
    let mut curve = |y: &str, name: &str, value: &dyn Fn(u64) -> Option<f64>| {
        findings.curves.push(Curve {
            picture: y.into(),
            name: name.into(),
            x: "rate of the level, Mbit/s".into(),
            y: y.into(),
            points: rates.iter().filter_map(|&mbit| Some((mbit as f64, value(mbit)?))).collect(),
            labels: Vec::new(),
        });
    };
    curve("requests answered, 1/s", "memcached", &answered);
    curve("p99 of the response, ms", "memcached", &|mbit| p99(mbit).map(|ns| ns as f64 / 1e6));
    let into = format!("into h{}, h{}", SERVER + 1, CLIENT + 1);
    curve("what arrives at the two ports, Mbit/s", "all traffic", &|mbit| {
        claims::figure(done, &name(mbit), &into).map(|bps| bps / 1e6)
    });

    // Where the level is the limit, and where it is not, with room on either side.
    for &mbit in rates.iter().filter(|&&mbit| most(mbit) < 0.8 * OFFERED) {
        findings.claims.push(limited(mbit, answered(mbit)));
    }
    for &mbit in rates.iter().filter(|&&mbit| most(mbit) > 1.5 * OFFERED) {
        let share = answered(mbit).map(|answered| answered / OFFERED);
        findings.claims.push(claims::at_least(
            format!("{}: at least 0.95 of what is offered", name(mbit)),
            share,
            0.95,
        ));
        let better = claims::p99(done, "contended", None).zip(p99(mbit));
        let better = better.map(|(contended, qjump)| contended as f64 / qjump.max(1) as f64);
        findings.claims.push(claims::at_least(
            format!("{}: p99 at least 2 x better than contended", name(mbit)),
            better,
            2.0,
        ));
    }
    findings
}

/// That the level's rate is used, and kept.
fn limited(mbit: u64, answered: Option<f64>) -> Claim {
    let share = answered.map(|answered| answered / most(mbit));
    Claim {
        claim: format!("{}: 0.7 to 1 of what the level lets through", name(mbit)),
        holds: share.map(|share| (0.7..=1.0).contains(&share)),
        measured: share.map_or("not measured".into(), |share| format!("{share:.2}")),
    }
}
