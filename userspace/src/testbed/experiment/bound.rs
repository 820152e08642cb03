//! Is the bound true on a real kernel, and what becomes of it above a throughput factor of 1?

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use qjump_ebpf::{Level, frame::WIRE_OVERHEAD};
use rand::RngExt;
use serde_json::json;

use super::{
    BULK_CPU, Case, Done, Experiment, Findings, Lab, PROBE_CPU, Setup, claims, load::Load, planned, probe::TOLERANCE,
};
use crate::{
    config::QueueChoice,
    dataplane::sys::monotonic_ns,
    measure::{
        Latencies, pin_and_prioritise,
        result::{Claim, Counts, Curve, Figure, Run, Sample, Stream},
    },
    plan::{Delays, Demand, LevelSpec, Model, Network, Plan},
    testbed::needs,
    units::Nanos,
};

/// The experiment.
pub static BOUND: Experiment = Experiment {
    name: "bound",
    about: "all hosts send to one as much as their limiters let through: the longest time over the bound, by throughput factor",
    figure: "Figure 11",
    paper: "66 emulated senders of 256 B into one host at 10 Gbit/s, f from 0.84 to 3.47: no packet over the bound of 24.29 us \
            up to f = 1, by proof, and in practice a little beyond; then it breaks",
    differs: "Here there are 16 senders of 1514 B at 10 Mbit/s, so that nP/R is 19.7 ms and a machine that is away for a \
              millisecond does not decide the result. `aligned` senders begin their epochs at the same moment, which the \
              paper's hosts did only by chance: above f = 1 they break the bound at once. Those of `drifting` phases are \
              like the paper's.",
    rack: "slow",
    hosts: 3,
    needs: &[needs::IPERF3],
    cases,
    judge,
};

/// The same at f = 1 alone, for as long as it takes to send some 300,000 packets.
pub static BOUND_SOAK: Experiment = Experiment {
    name: "bound-soak",
    about: "all hosts send to one at throughput factor 1, some 300,000 packets: whether any is over the bound, and how near they come",
    figure: "Figure 11 at f = 1",
    paper: "no packet over the bound up to f = 1, by proof",
    differs: "Made for virtual time, where the machine is never away; elsewhere it takes some four minutes. Of the bound, a \
              millisecond is for the CPU, or CPUs, that are all hosts and the switch: a burst of another host's TCP keeps the \
              only CPU of a guest from a probe for that long now and then. (With 250 us for it, 2 of 322,714 packets were over.)",
    rack: "slow",
    hosts: 3,
    needs: &[needs::IPERF3],
    cases: soak_cases,
    judge: judge_soak,
};

/// Of level 7, L2 bytes: as large as frames are.
const MAX_PACKET: u32 = 1_514;
/// Ethernet, IPv4 and UDP headers.
const HEADERS: u32 = 42;
/// What a sender writes into its packets: a number and a time.
const STAMP: usize = 16;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(1_000_000);
/// What a bucket of bytes is short of when a sender's timer is early: senders leave it out.
const SLACK: f64 = 0.98;
const PORT: u16 = 7_011;
/// Of level 7 in the long run, L2 bytes: as in the paper, and small beside a lower frame on the wire.
const SMALL: u32 = 256;
/// Cases of the long run whose senders begin anywhere, each otherwise.
const DRIFTS: u64 = 5;
const QUICK: [f64; 3] = [0.8, 1.0, 3.5];
const FULL: [f64; 9] = [0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5];

/// When senders begin their epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phases {
    /// All at the same moment: the worst that there is for one port.
    Aligned,
    /// Anywhere, with epochs that differ by up to 2 %, so that every pattern comes about.
    Drifting,
}

impl Phases {
    const fn name(self) -> &'static str {
        match self {
            Self::Aligned => "aligned",
            Self::Drifting => "drifting",
        }
    }
}

/// The plan with level 7 at a factor.
fn plan(setup: &Setup, factor: f64) -> Result<Plan> {
    planned(&network(setup, MAX_PACKET, factor))
}

/// As published: the strictest level, and epochs of 2nP/R + eps. The receiver is none of the n.
fn network(setup: &Setup, max_packet: u32, factor: f64) -> Network {
    let tolerance = if factor <= 1.0 { TOLERANCE } else { Nanos::from_ns(0) };
    let level = LevelSpec { tolerance, ..LevelSpec::new(Level::STRICTEST, Demand::Factor(factor)) };
    let network = setup.network(max_packet, MACHINE, vec![level]);
    Network { hosts: setup.rack.hosts as u32 - 1, model: Model::Paper, ..network }
}

/// The long run's plan. Where hosts without network cards are at one switch, nothing is fixed but one lower frame at the one
/// port, and the machine: so small an epsilon leaves the bound no room.
fn soak_plan(setup: &Setup) -> Result<Plan> {
    let network = network(setup, SMALL, 1.0);
    if setup.rack.host.is_some() || setup.rack.spine.is_some() {
        return planned(&network);
    }
    let frame_ns = f64::from(MAX_PACKET + WIRE_OVERHEAD) * 8e9 / network.link_rate.bps() as f64;
    planned(&Network { delays: Delays::Given(Nanos::from_ns(frame_ns as u64 + MACHINE.ns())), ..network })
}

/// The bound of f = 1, ns, which all factors are held against.
fn bound_ns(setup: &Setup) -> Result<u64> {
    promised_ns(&plan(setup, 1.0)?)
}

fn promised_ns(plan: &Plan) -> Result<u64> {
    plan.levels[0].bound_ns.map(|ns| ns as u64).context("a level of factor 1 has a bound")
}

fn name(phases: Phases, factor: f64) -> String {
    format!("{} f={factor}", phases.name())
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let bound_ns = bound_ns(setup)?;
    let time = Duration::from_secs(setup.pick(3, 10));
    let mut cases = Vec::new();
    // Factor by factor: cases that have a plan in common keep it loaded.
    for &factor in setup.pick(&QUICK[..], &FULL[..]) {
        let plan = plan(setup, factor)?;
        for phases in [Phases::Aligned, Phases::Drifting] {
            let attack = Attack::new(setup, &plan, MAX_PACKET, phases, time, bound_ns)?;
            cases.push(attack.case(name(phases, factor), &plan).allow(MACHINE));
        }
    }
    Ok(cases)
}

fn soak_cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = soak_plan(setup)?;
    let time = Duration::from_secs(setup.pick(2, 32));
    let aligned = Attack::new(setup, &plan, SMALL, Phases::Aligned, time, promised_ns(&plan)?)?;
    let mut cases = vec![aligned.clone().case(Phases::Aligned.name().into(), &plan).allow(MACHINE)];
    for drift in 1..=setup.pick(1, DRIFTS) {
        let attack = Attack { phases: Phases::Drifting, chance: drift, ..aligned.clone() };
        cases.push(attack.case(format!("{} {drift}", Phases::Drifting.name()), &plan).allow(MACHINE));
    }
    Ok(cases)
}

/// Senders that offer more than their limiters let through.
#[derive(Clone)]
struct Attack {
    senders: Vec<usize>,
    receiver: usize,
    /// What each sends at the beginning of its epoch, bytes of UDP payload.
    payloads: Vec<usize>,
    factor: f64,
    epoch_ns: f64,
    phases: Phases,
    /// Tells attacks of the same epoch apart: what is random about them differs.
    chance: u64,
    time: Duration,
    /// Of f = 1.
    bound_ns: u64,
}

impl Attack {
    fn new(setup: &Setup, plan: &Plan, max_packet: u32, phases: Phases, time: Duration, bound_ns: u64) -> Result<Self> {
        let level = &plan.levels[0];
        let factor = level.factor.context("the level is limited")?;
        Ok(Self {
            senders: (1..setup.rack.hosts).collect(),
            receiver: 0,
            payloads: payloads(max_packet, factor),
            factor,
            epoch_ns: level.epoch_ns.context("the level is limited")?,
            phases,
            chance: 0,
            time,
            bound_ns,
        })
    }

    fn case(self, name: String, plan: &Plan) -> Case {
        let Self { factor, phases, .. } = self;
        let about = format!("{} senders, {} phases, throughput factor {factor}", self.senders.len(), phases.name());
        let setting = json!({"phases": phases.name(), "factor": factor, "payloads": self.payloads});
        let case = Case::new(name, about, move |lab: &Lab<'_>| self.run(lab));
        case.strict().plan(plan.clone(), QueueChoice::Keep).setting(setting)
    }

    fn run(&self, lab: &Lab<'_>) -> Result<Run> {
        // Lower frames in the way, which the bound counts.
        let load = Load::Greedy(vec![(self.senders[0], self.receiver)]);
        let (stream, mut figures) = load.beside(lab, || self.attack(lab))?;
        let (stream, excused) = stream;
        let over = stream.violations.unwrap_or(0);
        let figure = |name: &str, value: f64| Figure { name: name.into(), value, unit: "1".into() };
        figures.push(figure("over the bound while a CPU was away", excused as f64));
        figures.push(figure("over the bound, not excused", (over - excused) as f64));
        let lost_in_network = stream.counts.map_or(0, |counts| counts.lost_in_network());
        figures.push(figure("lost in the network", lost_in_network as f64));
        let warm_up_ns = load.warm_up().as_nanos() as u64;
        Ok(Run {
            duration_ns: self.time.as_nanos() as u64,
            warm_up_ns,
            streams: vec![stream],
            figures,
            ..Run::default()
        })
    }

    /// The stream, and how many of its violations are the machine's.
    fn attack(&self, lab: &Lab<'_>) -> Result<(Stream, u64)> {
        let receiver = lab.socket(self.receiver, PORT, Level::BEST_EFFORT)?;
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut sockets = Vec::new();
        for &host in &self.senders {
            let socket = lab.socket(host, 0, Level::STRICTEST)?;
            socket.connect((lab.rack.address(self.receiver), PORT))?;
            sockets.push(socket);
        }
        let dropped_before = lab.dropped_by_limiters(Level::STRICTEST)?;
        let over = AtomicBool::new(false);
        let (sent, arrivals) = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| self.receive(&receiver, &over));
            let sent = self.send(lab, &sockets);
            // What is still in the network: as much as a full buffer holds.
            std::thread::sleep(Duration::from_millis(500));
            over.store(true, Relaxed);
            (sent, receiving.join().expect("the receiver does not panic"))
        });
        let ((sent, refused), (latencies, violations)) = (sent?, arrivals?);
        lab.check()?;
        ensure!(latencies.samples() > 0, "no packet arrived");
        // A stall leaves packets behind that delay those after it, for a bound's time.
        let away = |&&(from, to): &&(u64, u64)| lab.watch.was_away(from.saturating_sub(self.bound_ns), to);
        let excused = violations.iter().filter(away).count() as u64;
        let stream = Stream {
            name: "udp level 7".into(),
            sample: Sample::OneWay,
            level: Some(7),
            bound_ns: Some(self.bound_ns),
            violations: Some(latencies.violations()),
            response: latencies.distribution(),
            counts: Some(Counts {
                sent,
                received: latencies.samples(),
                lost: sent - latencies.samples(),
                refused,
                limiter_dropped: Some(lab.dropped_by_limiters(Level::STRICTEST)? - dropped_before),
                ..Counts::default()
            }),
            ..Stream::default()
        };
        Ok((stream, excused))
    }

    /// Sends for as long as it is to last: how many packets were offered, and how many the kernel refused.
    fn send(&self, lab: &Lab<'_>, sockets: &[UdpSocket]) -> Result<(u64, u64)> {
        std::thread::scope(|scope| {
            scope.spawn(|| self.send_all(lab, sockets)).join().expect("the sender does not panic")
        })
    }

    fn send_all(&self, lab: &Lab<'_>, sockets: &[UdpSocket]) -> Result<(u64, u64)> {
        pin_and_prioritise(PROBE_CPU);
        let mut random = lab.random(self.epoch_ns as u64 + self.chance);
        let start = monotonic_ns() + 20_000_000;
        let end = start + self.time.as_nanos() as u64;
        // By the time at which each is due: the sender, and its epoch.
        let mut due: BinaryHeap<Reverse<(u64, usize, u64)>> = (0..sockets.len())
            .map(|sender| match self.phases {
                Phases::Aligned => Reverse((start, sender, self.epoch_ns.ceil() as u64)),
                Phases::Drifting => {
                    let epoch_ns = self.epoch_ns * random.random_range(1.0..1.02);
                    let phase_ns = random.random_range(0.0..epoch_ns);
                    Reverse((start + phase_ns as u64, sender, epoch_ns.ceil() as u64))
                }
            })
            .collect();
        let mut buffer = vec![0; self.payloads.iter().copied().max().unwrap_or(STAMP)];
        let (mut sent, mut refused) = (0u64, 0);
        while let Some(Reverse((at, sender, epoch_ns))) = due.pop().filter(|Reverse((at, ..))| *at < end) {
            lab.check()?;
            std::thread::sleep(Duration::from_nanos(at.saturating_sub(monotonic_ns())));
            for &payload in &self.payloads {
                buffer[..8].copy_from_slice(&sent.to_be_bytes());
                buffer[8..STAMP].copy_from_slice(&monotonic_ns().to_be_bytes());
                match sockets[sender].send(&buffer[..payload]) {
                    Ok(_) => {}
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => refused += 1,
                    Err(error) => return Err(error.into()),
                }
                sent += 1;
            }
            due.push(Reverse((at + epoch_ns, sender, epoch_ns)));
        }
        Ok((sent, refused))
    }

    /// What arrives until `over`: latencies from the actual send, and from when to when those over the bound took.
    fn receive(&self, socket: &UdpSocket, over: &AtomicBool) -> Result<(Latencies, Vec<(u64, u64)>)> {
        pin_and_prioritise(BULK_CPU);
        let mut latencies = Latencies::new(Some(self.bound_ns));
        let mut violations = Vec::new();
        let mut payload = [0; 2_048];
        while !over.load(Relaxed) {
            let length = match socket.recv(&mut payload) {
                Ok(length) => length,
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let now = monotonic_ns();
            if length >= STAMP {
                let sent = u64::from_be_bytes(payload[8..STAMP].try_into().expect("eight bytes"));
                let latency = now.saturating_sub(sent).max(1);
                latencies.record(latency);
                if latency > self.bound_ns {
                    violations.push((sent, now));
                }
            }
        }
        Ok((latencies, violations))
    }
}

/// What a sender offers in each epoch, bytes of UDP payload. Up to factor 1 a packet, and another one, which its limiter must
/// drop. Above, whole packets and a part of one, as much as the level may send at once.
fn payloads(max_packet: u32, factor: f64) -> Vec<usize> {
    let payload = |wire: f64| (wire as u32).saturating_sub(WIRE_OVERHEAD + HEADERS) as usize;
    let whole = f64::from(max_packet + WIRE_OVERHEAD);
    if factor <= 1.0 {
        return vec![payload(whole); 2];
    }
    let mut payloads = vec![payload(whole * SLACK); factor as usize];
    let part = payload(whole * SLACK * factor.fract());
    if part >= STAMP {
        payloads.push(part);
    }
    payloads
}

fn judge(setup: &Setup, done: &[Done]) -> Findings {
    let factors = setup.pick(&QUICK[..], &FULL[..]);
    let mut findings = Findings::default();
    for phases in [Phases::Aligned, Phases::Drifting] {
        let curve = |points: Vec<(f64, f64)>, picture: &str, y: &str| Curve {
            picture: picture.into(),
            name: phases.name().into(),
            x: "throughput factor f".into(),
            y: y.into(),
            points,
            labels: Vec::new(),
        };
        let over = |factor: f64| longest_over_bound(done, &name(phases, factor)).map(|ratio| (factor, ratio));
        let points = factors.iter().copied().filter_map(over).collect();
        findings.curves.push(curve(points, "longest time over the bound of f = 1", "longest time over the bound"));
        for factor in factors.iter().copied().filter(|&factor| factor <= 1.0) {
            findings.claims.extend(holds(done, &name(phases, factor)));
        }
    }
    let worst = longest_over_bound(done, &name(Phases::Aligned, 3.5));
    findings.claims.push(claims::at_least("aligned senders of f = 3.5 break the bound of f = 1", worst, 1.0));
    findings
}

fn judge_soak(_: &Setup, done: &[Done]) -> Findings {
    let ratios = done.iter().map(|one| longest_over_bound(done, &one.case));
    let points: Vec<(f64, f64)> = (0u32..).map(f64::from).zip(ratios).filter_map(|(at, y)| Some((at, y?))).collect();
    let streams = || done.iter().filter_map(|one| one.run.streams.first());
    let packets: u64 = streams().map(|stream| stream.response.samples).sum();
    let over: u64 = streams().filter_map(|stream| stream.violations).sum();
    let nearest = points.iter().map(|&(_, ratio)| ratio).fold(0.0, f64::max);
    let sum = format!("{packets} packets, {over} over the bound; the longest time is {nearest:.3} of it.");
    Findings {
        claims: done.iter().flat_map(|one| holds(done, &one.case)).collect(),
        curves: vec![Curve {
            picture: "longest time over the bound".into(),
            name: "tightness".into(),
            x: "phases of the senders".into(),
            y: "longest time over the bound".into(),
            points,
            labels: done.iter().map(|one| one.case.clone()).collect(),
        }],
        notes: if done.is_empty() { Vec::new() } else { vec![sum] },
    }
}

/// The longest time of a case over the bound of f = 1.
fn longest_over_bound(done: &[Done], case: &str) -> Option<f64> {
    let stream = claims::stream(done, case, None)?;
    Some(stream.response.max_ns? as f64 / stream.bound_ns? as f64)
}

/// That no packet of a case was over the bound, unless a CPU was away meanwhile, and that none was lost.
fn holds(done: &[Done], case: &str) -> [Claim; 2] {
    let figure = |name| claims::figure(done, case, name);
    let (blamed, excused) = (figure("over the bound, not excused"), figure("over the bound while a CPU was away"));
    let lost = figure("lost in the network");
    let known = |value: Option<f64>| value.map_or("not measured".to_owned(), |value| value.to_string());
    [
        Claim {
            claim: format!("{case}: no packet over the bound"),
            holds: blamed.zip(excused).and_then(|(blamed, excused)| match (blamed > 0.0, excused > 0.0) {
                (true, _) => Some(false),
                (false, true) => None,
                (false, false) => Some(true),
            }),
            measured: format!("{} over it, and {} while a CPU of this machine was away", known(blamed), known(excused)),
        },
        Claim {
            claim: format!("{case}: no packet lost in the network"),
            holds: lost.map(|lost| lost == 0.0),
            measured: known(lost),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_offer_what_their_level_may_send_at_once() {
        assert_eq!(payloads(MAX_PACKET, 0.8), [1_472, 1_472]);
        assert_eq!(payloads(MAX_PACKET, 1.0), [1_472, 1_472]);
        for factor in [1.2, 1.5, 2.0, 3.5] {
            let payloads = payloads(MAX_PACKET, factor);
            assert_eq!(payloads.len(), factor.ceil() as usize);
            let wire: usize = payloads.iter().map(|payload| payload + (HEADERS + WIRE_OVERHEAD) as usize).sum();
            let burst = factor * 1_538.0;
            assert!((0.97 * burst..0.981 * burst).contains(&(wire as f64)), "{factor}: {wire} of {burst}");
        }
    }
}
