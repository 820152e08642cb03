//! Probes and ping beside iperf3 through one port of a switch.

use std::time::Duration;

use anyhow::Result;
use qjump_ebpf::Level;

use super::{
    Case, Done, Experiment, Findings, Lab, Setup, claims,
    load::Load,
    ping::Ping,
    probe::{TOLERANCE, Train},
};
use crate::{
    config::QueueChoice,
    measure::result::Run,
    plan::{Demand, LevelSpec, Plan},
    testbed::needs,
    units::Nanos,
};

/// The experiment.
pub static SWITCH_QUEUE: Experiment = Experiment {
    name: "switch-queue",
    about: "probes and ping beside iperf3 through one switch port: priorities alone, limits alone, and both",
    figure: "Figure 3a",
    paper: "ping took some 1.2 ms beside iperf through one 10 Gbit/s port, and a few microseconds with QJump; priorities in \
            the switch alone did not remove all interference",
    differs: "A port of 100 Mbit/s is full of 256 KB for 21 ms, one of 10 Gbit/s for a hundredth of that. Priorities alone \
              look as good as both here, because nobody else uses the level; `rogue-unlimited` of `qjump testbed demo` shows \
              what happens when somebody does. Limits alone change nothing: the queue is iperf3's.",
    rack: "eight",
    hosts: 8,
    needs: &[needs::IPERF3, needs::PING],
    cases,
    judge,
};

const RECEIVER: usize = 0;
const PROBE_SENDER: usize = 1;
const BULK_SENDERS: [usize; 2] = [5, 6];
const PING_SENDER: usize = 7;
/// Of level 7, L2 bytes: what ping sends by default, and room.
const MAX_PACKET: u32 = 256;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(500_000);
/// Between two probes: a little more than an epoch.
const INTERVAL: Nanos = Nanos::from_ns(2_500_000);
/// The same for ping. It waits for an answer for up to 10 ms (`MININTERVAL` in iputils), so it cannot do less where answers
/// are late.
const PING_INTERVAL: Nanos = Nanos::from_ns(10_000_000);
/// Beside a queue of 20 ms, a CPU that is away for so long decides nothing.
const BESIDE_A_QUEUE: Nanos = Nanos::from_ns(10_000_000);

fn plan(setup: &Setup, demand: Demand) -> Result<Plan> {
    let tolerance = if demand == Demand::Unlimited { Nanos::from_ns(0) } else { TOLERANCE };
    setup.plan(MAX_PACKET, MACHINE, vec![LevelSpec { tolerance, ..LevelSpec::new(Level::STRICTEST, demand) }])
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let (limited, marked) = (plan(setup, Demand::Factor(1.0))?, plan(setup, Demand::Unlimited)?);
    let bound_ns = limited.levels[0].bound_ns.map(|ns| ns as u64);
    let count = setup.pick(1_400, 12_000);
    let greedy = || Load::Greedy(BULK_SENDERS.map(|host| (host, RECEIVER)).to_vec());
    let case = |name: &str, about: &str, load: Load, bound_ns: Option<u64>| {
        let setting = load.to_json();
        let measure = move |lab: &Lab<'_>| measure(lab, &load, count, bound_ns);
        Case::new(name, about, measure).setting(setting)
    };
    let keep = QueueChoice::Keep;
    Ok(vec![
        case("alone", "nothing else on the network", Load::Idle, None),
        case("contended", "iperf3 from two hosts, plain Ethernet", greedy(), None).allow(BESIDE_A_QUEUE),
        case("priority", "the same, strict priority in the switch, no limits", greedy(), None)
            .strict()
            .plan(marked, keep),
        case("limiter", "the same, limits on every host, no priorities", greedy(), None)
            .plan(limited.clone(), keep)
            .allow(BESIDE_A_QUEUE),
        case("qjump", "the same, limits and priorities", greedy(), bound_ns)
            .strict()
            .plan(limited, keep)
            .allow(MACHINE),
    ])
}

fn measure(lab: &Lab<'_>, load: &Load, count: u64, bound_ns: Option<u64>) -> Result<Run> {
    let level = Level::STRICTEST;
    let train = Train { from: PROBE_SENDER, to: RECEIVER, level, interval: INTERVAL, count, bound_ns };
    let (streams, figures) = load.beside(lab, || {
        let time = Duration::from_nanos(train.duration_ns());
        let ping = Ping { from: PING_SENDER, to: RECEIVER, level: Some(level), interval: PING_INTERVAL, time };
        let ping = ping.start(lab)?;
        let mut streams = train.run(lab)?;
        streams.push(ping.finish()?);
        Ok(streams)
    })?;
    Ok(Run { figures, ..train.as_run(streams, load) })
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    let bound_ns = claims::bound_ns(done, "qjump");
    let mut claims = claims::near_alone(done, None, bound_ns);
    claims.extend(claims::near_alone(done, Some("ping"), bound_ns));
    claims.push(claims::bound_holds(done, "qjump", INTERVAL));
    Findings { claims, ..Findings::default() }
}
