//! A probe beside one TCP flow that shares nothing, a host, a switch, or a port with it.

use anyhow::Result;
use qjump_ebpf::Level;

use super::{
    Case, Done, Experiment, Findings, Lab, Setup, claims,
    load::Load,
    probe::{TOLERANCE, Train},
};
use crate::{
    config::QueueChoice,
    measure::result::Run,
    plan::{Demand, LevelSpec, Plan},
    testbed::needs,
    units::{Nanos, show_ns},
};

/// The experiment.
pub static PLACEMENT: Experiment = Experiment {
    name: "placement",
    about: "a probe beside one TCP flow in five placements: what they share decides what it waits for",
    figure: "Table 1",
    paper: "ping each millisecond beside one iperf flow: 85 us (median) and 126 us (p99) alone; sharing a host costs some, \
            sharing a switch but no port nothing, and sharing the queue of a switch port dominates everything",
    differs: "The paper's hosts have many cores and 10 Gbit/s; here network cards and ports have 100 Mbit/s, which two CPUs \
              can emulate. The queue of a shared host is shorter than that of a shared port, because TCP keeps only a \
              millisecond of its packets in its own host's queue (TCP small queues), and all the rest in the switch.",
    rack: "nics",
    hosts: 4,
    needs: &[needs::IPERF3],
    cases,
    judge,
};

/// The probe goes from the second host to the first.
const RECEIVER: usize = 0;
const SENDER: usize = 1;
/// Hosts that have nothing to do with it.
const OTHERS: [usize; 2] = [2, 3];
/// Of level 7, L2 bytes.
const MAX_PACKET: u32 = 256;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
const INTERVAL: Nanos = Nanos::from_ns(2_500_000);

/// Where the TCP flow is: name, what it shares with the probe, and its ends.
const PLACEMENTS: [(&str, &str, (usize, usize)); 4] = [
    ("source", "the probe's host sends bulk to another", (SENDER, OTHERS[0])),
    ("switch", "other hosts and ports of the same switch", (OTHERS[1], OTHERS[0])),
    ("destination", "another host sends bulk to the probe's destination", (OTHERS[1], RECEIVER)),
    ("both", "the probe's host sends bulk to the probe's destination", (SENDER, RECEIVER)),
];

fn plan(setup: &Setup) -> Result<Plan> {
    let level = LevelSpec { tolerance: TOLERANCE, ..LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0)) };
    setup.plan(MAX_PACKET, MACHINE, vec![level])
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = plan(setup)?;
    let bound_ns = plan.levels[0].bound_ns.map(|ns| ns as u64);
    let count = setup.pick(1_050, 6_000);
    let case = |name: String, about: String, load: Load, bound_ns: Option<u64>| {
        let setting = load.to_json();
        Case::new(name, about, move |lab: &Lab<'_>| measure(lab, &load, count, bound_ns)).setting(setting)
    };
    let mut cases = vec![case("idle".into(), "nothing else on the network".into(), Load::Idle, None)];
    for (name, about, pair) in PLACEMENTS {
        let bulk = || Load::Greedy(vec![pair]);
        cases.push(case(name.into(), about.into(), bulk(), None));
        // Where nothing is shared there is nothing to win.
        if name != "switch" {
            let (name, about) = (format!("{name} qjump"), format!("the same with qjump: {about}"));
            cases
                .push(case(name, about, bulk(), bound_ns).strict().plan(plan.clone(), QueueChoice::Htb).allow(MACHINE));
        }
    }
    Ok(cases)
}

fn measure(lab: &Lab<'_>, load: &Load, count: u64, bound_ns: Option<u64>) -> Result<Run> {
    let train = Train { from: SENDER, to: RECEIVER, level: Level::STRICTEST, interval: INTERVAL, count, bound_ns };
    let (streams, figures) = load.beside(lab, || train.run(lab))?;
    Ok(Run { figures, ..train.as_run(streams, load) })
}

fn judge(setup: &Setup, done: &[Done]) -> Findings {
    let p99 = |case: &str| claims::p99(done, case, None);
    let bound_ns = plan(setup).ok().and_then(|plan| plan.levels[0].bound_ns);
    let near = p99("idle").zip(bound_ns).map(|(idle, bound)| 2.0 * idle as f64 + bound);
    let over_switch = |case: &str| p99(case).zip(p99("switch")).map(|(one, other)| one as f64 / other.max(1) as f64);
    let mut claims = vec![
        claims::at_least(
            "p99 of a shared destination port at least 5 x that of a shared switch",
            over_switch("destination"),
            5.0,
        ),
        claims::at_most(
            format!(
                "p99 of a shared switch at most 2 x idle + {}, what the plan allows this machine",
                show_ns(MACHINE.ns() as f64)
            ),
            p99("switch"),
            p99("idle").map(|idle| 2.0 * idle as f64 + MACHINE.ns() as f64),
        ),
    ];
    for (name, ..) in PLACEMENTS.into_iter().filter(|(name, ..)| *name != "switch") {
        let case = format!("{name} qjump");
        claims.push(claims::at_most(format!("p99 of {case} at most 2 x idle + bound"), p99(&case), near));
    }
    let ratio =
        p99("destination").zip(p99("destination qjump")).map(|(plain, qjump)| plain as f64 / qjump.max(1) as f64);
    claims.push(claims::at_least("p99 of a shared destination port at least 5 x better with qjump", ratio, 5.0));
    Findings { claims, ..Findings::default() }
}
