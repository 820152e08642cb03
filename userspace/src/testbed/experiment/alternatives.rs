//! What else there is: the same applications and the same bulk traffic on the same rack, with what networks have against queues.

use std::{sync::mpsc, time::Duration};

use anyhow::{Context, Result};
use qjump_ebpf::Level;
use serde_json::json;

use super::{
    Case, Done, Experiment, Findings, Lab, Setup,
    cache::{Cache, WARM_UP},
    claims,
    load::{Load, TRANSFER},
    probe::{TOLERANCE, Train},
};
use crate::{
    config::QueueChoice,
    measure::{
        memcached::{Popularity, Sizes, Workload},
        result::{Curve, Distribution, Run, Stream},
    },
    plan::{Demand, ETHERNET_MTU, LevelSpec, Plan},
    testbed::{Queueing, needs, spec::Port},
    units::{Nanos, Rate},
};

/// The experiment.
pub static ALTERNATIVES: Experiment = Experiment {
    name: "alternatives",
    about: "probes, memcached and transfers at once: FIFO, ECN, DCTCP, fq_codel, HTB on hosts, priorities alone, and qjump",
    figure: "Figure 7",
    paper: "RMS latency of PTPd and memcached, and Hadoop's run time, each over its own on an idle network: Ethernet flow \
            control and ECN leave them several times as long, DCTCP does better, and QJump is nearest to 1 for all of them",
    differs: "Probes stand for PTPd and transfers of iperf3 for Hadoop; the network is one switch at 20 Mbit/s. fq_codel in a \
              switch was not compared in the paper: no switch of that time, and few of today, have it.",
    rack: "modest",
    hosts: 7,
    needs: &[needs::MEMCACHED, needs::IPERF3],
    cases,
    judge,
};

const SERVER: usize = 0;
const CLIENT: usize = 1;
const PROBER: usize = 2;
/// Into the ports where probes and requests, and answers, arrive: two hosts each, so that TCP fills them.
const BULK: [(usize, usize); 4] = [(3, SERVER), (4, SERVER), (5, CLIENT), (6, CLIENT)];
/// Of a transfer.
const BYTES: u64 = 2_000_000;
const PAUSE: Duration = Duration::from_millis(100);
/// Of level 7, L2 bytes.
const MAX_PACKET: u32 = 256;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
/// Some four times what memcached answers on average.
const CACHE_RATE: Rate = Rate::from_bps(2_000_000);
const CACHE_BURST: u32 = 6_000;
/// Beside a queue of 50 ms, a CPU that is away for so long decides nothing.
const BESIDE_A_QUEUE: Nanos = Nanos::from_ns(10_000_000);
/// Queues from which on packets are marked, in full frames: what fits DCTCP's rule at this rate and round trip, and more.
const THRESHOLDS: [u32; 3] = [3, 10, 30];
/// What the two hosts that send bulk into a port may send together where hosts are shaped.
const SHAPED: f64 = 0.8;
const ALONE: [&str; 3] = ["alone: probes", "alone: memcached", "alone: transfers"];

fn cache_level() -> Level {
    Level::new(5).expect("levels are 0 to 7")
}

/// What runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Apps {
    probes: bool,
    cache: bool,
    bulk: bool,
}

const ALL: Apps = Apps { probes: true, cache: true, bulk: true };

fn plan(setup: &Setup, [clock, cache]: [Demand; 2]) -> Result<Plan> {
    let limited = clock != Demand::Unlimited;
    let clock = LevelSpec {
        tolerance: if limited { TOLERANCE } else { Nanos::from_ns(0) },
        ..LevelSpec::new(Level::STRICTEST, clock)
    };
    let cache = LevelSpec {
        max_packet: Some(ETHERNET_MTU),
        burst: limited.then_some(CACHE_BURST),
        ..LevelSpec::new(cache_level(), cache)
    };
    setup.plan(MAX_PACKET, MACHINE, vec![clock, cache])
}

/// What all cases have in common.
#[derive(Clone, Debug)]
struct Work {
    time: Duration,
    interval: Nanos,
    /// How hosts that send bulk are shaped, if they are.
    shaped: Option<Port>,
}

impl Work {
    fn cache(&self) -> Cache {
        let workload = Workload {
            keys: 1_000,
            sets: 0.1,
            popularity: Popularity::Zipf(0.99),
            sizes: Sizes::Fixed(1_000),
            seed: 1,
        };
        let duration = self.measured();
        Cache { server: SERVER, client: CLIENT, rate: 60.0, connections: 16, depth: 1, workload, duration }
    }

    /// How long memcached is measured.
    const fn measured(&self) -> Duration {
        self.time.saturating_sub(WARM_UP)
    }

    fn train(&self) -> Train {
        // From the first second of memcached's on, which tells that its cache is full.
        let time = self.measured().saturating_sub(Duration::from_secs(1));
        let count = time.as_nanos() as u64 / self.interval.ns();
        Train { from: PROBER, to: SERVER, level: Level::STRICTEST, interval: self.interval, count, bound_ns: None }
    }

    fn measure(&self, lab: &Lab<'_>, apps: Apps) -> Result<Run> {
        let _shaped = self.shaped.map(|port| Shaped::new(lab, port)).transpose()?;
        let load = if apps.bulk { bulk() } else { Load::Idle };
        let ((probes, cache), figures) = load.beside(lab, || {
            std::thread::scope(|scope| {
                // What fills the cache is no part of any measure.
                let (warm, is_warm) = mpsc::channel();
                let probing = apps.probes.then(|| {
                    scope.spawn(move || match apps.cache && is_warm.recv().is_err() {
                        true => Ok(Vec::new()),
                        false => self.train().run(lab),
                    })
                });
                let mut tell = || {
                    // Only the first time somebody waits for it.
                    let _ = warm.send(());
                };
                let asked = apps.cache.then(|| self.cache().ask(lab, Some(cache_level()), &mut tell)).transpose();
                drop(warm);
                let probes = probing.map(|thread| thread.join().expect("the prober does not panic")).transpose();
                if !apps.probes && !apps.cache {
                    lab.pause(self.time)?;
                }
                Ok((probes?.unwrap_or_default(), asked?))
            })
        })?;
        let mut run = cache.map_or_else(Run::default, |asked| asked.run(""));
        run.streams.iter_mut().for_each(|stream| stream.name = MEMCACHED.into());
        // The way to the server, which the bulk traffic fills.
        run.streams.extend(probes.into_iter().take(1).map(|stream| Stream { name: PROBES.into(), ..stream }));
        run.figures.extend(figures);
        run.duration_ns = self.time.as_nanos() as u64;
        run.warm_up_ns = load.warm_up().as_nanos() as u64;
        Ok(run)
    }
}

const PROBES: &str = "probes";
const MEMCACHED: &str = "memcached";

fn bulk() -> Load {
    Load::Shuffle { pairs: BULK.to_vec(), bytes: BYTES, pause: PAUSE }
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let limited = plan(setup, [Demand::Factor(1.0), Demand::Rate(CACHE_RATE)])?;
    let marked = plan(setup, [Demand::Unlimited; 2])?;
    let epoch_ns = limited.levels[0].epoch_ns.context("level 7 is limited")?;
    let work = Work {
        time: setup.pick(Duration::from_secs(5), Duration::from_secs(16)),
        interval: Nanos::from_ns((epoch_ns * 1.05) as u64),
        shaped: None,
    };
    let setting = json!({
        "probes": {"from": format!("h{}", PROBER + 1), "to": format!("h{}", SERVER + 1), "interval_ns": work.interval.ns()},
        "memcached": work.cache().to_json(),
        "load": bulk().to_json(),
    });
    let shaped_case = |name: &str, about: String, apps: Apps, shaped: Option<Port>| {
        let work = Work { shaped, ..work.clone() };
        let case = Case::new(name, about, move |lab: &Lab<'_>| work.measure(lab, apps));
        case.tcp("cubic", false).setting(setting.clone()).allow(BESIDE_A_QUEUE)
    };
    let case = |name: &str, about: String, apps: Apps| shaped_case(name, about, apps, None);
    let none = Apps { probes: false, cache: false, bulk: false };
    let mut cases = vec![
        case(ALONE[0], "probes, and nothing else on the network".into(), Apps { probes: true, ..none }).allow(MACHINE),
        case(ALONE[1], "memcached, and nothing else".into(), Apps { cache: true, ..none }).allow(MACHINE),
        case(ALONE[2], "transfers between four pairs of hosts, and nothing else".into(), Apps { bulk: true, ..none }),
        case("fifo", "all three, plain Ethernet".into(), ALL),
    ];
    for frames in THRESHOLDS {
        let about = format!("CUBIC with ECN, marked from {frames} frames on");
        let marking = Queueing::Marking(frames * ETHERNET_MTU);
        cases.push(case(&format!("ecn {frames}"), about, ALL).queueing(marking).tcp("cubic", true).optional());
    }
    let share = Rate::from_bps((setup.rack.leaf.rate.bps() as f64 * SHAPED / 2.0) as u64);
    let port = Port { rate: share, ..setup.rack.leaf };
    cases.extend([
        case("dctcp", format!("DCTCP, marked from {} frames on", THRESHOLDS[1]), ALL)
            .queueing(Queueing::Marking(THRESHOLDS[1] * ETHERNET_MTU))
            .tcp("dctcp", true)
            .optional(),
        case("fq_codel", "a queue for each flow in the switch".into(), ALL).queueing(Queueing::FairFlows).optional(),
        shaped_case("htb", format!("hosts that send bulk are shaped to {share} each"), ALL, Some(port)),
        case("priorities", "levels 7 and 5 first in the switch, no limits".into(), ALL)
            .strict()
            .plan(marked, QueueChoice::Keep)
            .allow(MACHINE),
        case("qjump", "levels 7 and 5 first, and limits on every host".into(), ALL)
            .strict()
            .plan(limited, QueueChoice::Auto)
            .allow(MACHINE),
    ]);
    Ok(cases)
}

/// Hosts that are shaped for as long as it lives.
struct Shaped<'a> {
    lab: &'a Lab<'a>,
    hosts: Vec<usize>,
}

impl<'a> Shaped<'a> {
    fn new(lab: &'a Lab<'a>, port: Port) -> Result<Self> {
        let mut shaped = Self { lab, hosts: Vec::new() };
        for (host, _) in BULK {
            lab.rack.shape(host, port)?;
            shaped.hosts.push(host);
        }
        Ok(shaped)
    }
}

impl Drop for Shaped<'_> {
    fn drop(&mut self) {
        for &host in &self.hosts {
            // What is left goes with the rack.
            let _ = self.lab.rack.unshape(host);
        }
    }
}

/// The root of the mean square, ns: what is rare and long counts more than in an average.
fn rms(distribution: &Distribution) -> Option<f64> {
    let samples = distribution.histogram.iter().map(|&(_, count)| count).sum::<u64>();
    let squares = distribution.histogram.iter().map(|&(ns, count)| (ns as f64).powi(2) * count as f64).sum::<f64>();
    (samples > 0).then(|| (squares / samples as f64).sqrt())
}

/// The three measures of a case, ns: what is missing was not measured.
fn measures(done: &[Done], case: &str) -> [Option<f64>; 3] {
    let latency = |name: &str| rms(&claims::stream(done, case, Some(name))?.response);
    [latency(PROBES), latency(MEMCACHED), claims::figure(done, case, TRANSFER)]
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    let apps = [PROBES, MEMCACHED, "transfers"];
    let alone: Vec<Option<f64>> = (0..3).map(|app| measures(done, ALONE[app])[app]).collect();
    let together: Vec<&Done> = done.iter().filter(|one| !ALONE.contains(&one.case.as_str())).collect();
    let ratio = |case: &str, app: usize| Some(measures(done, case)[app]? / alone[app]?);
    let mut findings = Findings::default();
    for (app, name) in apps.iter().enumerate() {
        let points = together.iter().enumerate().filter_map(|(at, one)| Some((at as f64, ratio(&one.case, app)?)));
        findings.curves.push(Curve {
            picture: "RMS over that of the application alone".into(),
            name: (*name).into(),
            x: "what the network does".into(),
            y: "RMS over RMS alone".into(),
            points: points.collect(),
            labels: together.iter().map(|one| one.case.clone()).collect(),
        });
    }
    for (app, name) in apps.iter().enumerate().take(2) {
        let better = ratio("fifo", app).zip(ratio("qjump", app)).map(|(fifo, qjump)| fifo / qjump);
        findings.claims.push(claims::at_least(
            format!("RMS of {name} with qjump at least 5 x better than with a FIFO"),
            better,
            5.0,
        ));
    }
    let slower = ratio("qjump", 2).zip(ratio("fifo", 2)).map(|(qjump, fifo)| fifo / qjump);
    findings.claims.push(claims::at_least("transfers with qjump at least 0.9 x as fast as with a FIFO", slower, 0.9));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_the_mean_square_counts_what_is_long() {
        let of =
            |histogram: &[(u64, u64)]| rms(&Distribution { histogram: histogram.to_vec(), ..Distribution::default() });
        assert_eq!(of(&[(3, 1), (4, 1)]), Some(12.5f64.sqrt()));
        assert_eq!(of(&[(5, 7)]), Some(5.0));
        assert_eq!(of(&[]), None);
    }
}
