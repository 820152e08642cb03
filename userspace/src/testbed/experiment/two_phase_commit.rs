//! Two-phase commit of a coordinator and seven participants, beside bursts through the same ports.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};
use qjump_ebpf::Level;
use rand::RngExt;
use serde_json::{Value, json};

use super::{BULK_CPU, Case, Done, Experiment, Findings, Lab, PROBE_CPU, Setup, claims};
use crate::{
    config::QueueChoice,
    measure::{
        self,
        load::{self, Pattern},
        result::{Claim, Counts, Curve, Figure, Run, Sample, Stream},
        threads::{pin, precise_timers},
    },
    plan::{Demand, LevelSpec, Plan},
    socket::set_level,
    testbed::{
        RackSpec,
        apps::commit::{
            Coordinator, MESSAGE_BYTES, Patience, Transport,
            drive::{Tally, coordinate, participate},
            transport::{Tcp, Udp},
        },
    },
    units::{Nanos, Rate, show_ns},
};

/// The experiment.
pub static TWO_PHASE_COMMIT: Experiment = Experiment {
    name: "two-phase-commit",
    about: "two-phase commit of eight hosts, by UDP broadcast at level 7 without retries, UDP with retries, and TCP, beside \
            bursts of up to ten switch buffers",
    figure: "Figure 6",
    paper: "with QJump the throughput of commits by UDP broadcast is the same at every size of the bursts; with TCP, and with \
            UDP and retries, it breaks down",
    differs: "Level 7 sets the pace: a transaction is two broadcasts, one in each epoch, and an epoch is that of 100 Mbit/s \
              and of CPUs that may be away. On an idle network TCP and UDP are therefore faster here; with bursts they are not.",
    rack: "ten",
    hosts: 10,
    needs: &[],
    cases,
    judge,
};

const COORDINATOR: usize = 0;
const PARTICIPANTS: [usize; 7] = [1, 2, 3, 4, 5, 6, 7];
const BURSTERS: [usize; 2] = [8, 9];
/// Bursts go to these in turn: where votes come in, and where questions come in.
const BURSTED: [usize; 2] = [COORDINATOR, 1];
/// Of level 7, L2 bytes: a message is the smallest frame.
const MAX_PACKET: u32 = 64;
/// For how long a CPU may be away, by the plan.
const MACHINE: Nanos = Nanos::from_ns(300_000);
/// Sizes of bursts, in switch buffers.
const SIZES: [u32; 5] = [0, 1, 2, 5, LARGEST];
const LARGEST: u32 = 10;
const WARM_UP: Duration = Duration::from_millis(500);
const PORTS: (u16, u16) = (7_010, 7_011);
const BURST_PORT: u16 = 7_012;
/// Payload of a datagram of a burst, and the wire bytes of its frame.
const DATAGRAM: (usize, u64) = (1_472, 1_538);

/// What carries messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carrier {
    Broadcast,
    UdpWithRetries,
    Tcp,
}

/// A line of the figure.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    carrier: Carrier,
    qjump: bool,
}

const QJUMP: Way = Way { name: "qjump", carrier: Carrier::Broadcast, qjump: true };
const RETRIES: Way = Way { name: "udp with retries", carrier: Carrier::UdpWithRetries, qjump: false };
const TCP: Way = Way { name: "tcp", carrier: Carrier::Tcp, qjump: false };
const UNPROTECTED: Way = Way { name: "broadcast without qjump", carrier: Carrier::Broadcast, qjump: false };
const WAYS: [Way; 4] = [QJUMP, RETRIES, TCP, UNPROTECTED];

impl Way {
    fn case(self, buffers: u32) -> String {
        format!("{}, {buffers} buffers", self.name)
    }

    const fn about(self) -> &'static str {
        match (self.carrier, self.qjump) {
            (Carrier::Broadcast, true) => "UDP broadcast at level 7 without retries, limits and priorities",
            (Carrier::Broadcast, false) => "UDP broadcast without retries, plain Ethernet",
            (Carrier::UdpWithRetries, _) => "UDP to each participant, asked again after 10 ms, plain Ethernet",
            (Carrier::Tcp, _) => "TCP to each participant, plain Ethernet",
        }
    }

    /// Who does not ask again loses a transaction with a message, and goes on; who does, and TCP does it by itself,
    /// waits.
    const fn patience(self) -> Patience {
        match self.carrier {
            Carrier::Broadcast => Patience { retry_ns: None, give_up_ns: 50_000_000 },
            Carrier::UdpWithRetries => Patience { retry_ns: Some(10_000_000), give_up_ns: 60_000_000_000 },
            Carrier::Tcp => Patience { retry_ns: None, give_up_ns: 60_000_000_000 },
        }
    }
}

/// Every host may send at the level, so the plan counts all of them.
fn plan(setup: &Setup) -> Result<Plan> {
    setup.plan(MAX_PACKET, MACHINE, vec![LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0))])
}

fn cases(setup: &Setup) -> Result<Vec<Case>> {
    let plan = plan(setup)?;
    let duration = setup.pick(Duration::from_millis(2_500), Duration::from_secs(8));
    let (ways, sizes): (&[Way], &[u32]) = setup.pick((&WAYS[..3], &[0, LARGEST]), (&WAYS, &SIZES));
    let mut cases = Vec::new();
    for &way in ways {
        for &buffers in sizes {
            let bursts = Bursts::new(&setup.rack, buffers);
            let setting = json!({
                "participants": PARTICIPANTS.len(),
                "message_bytes": MESSAGE_BYTES,
                "retry_ns": way.patience().retry_ns,
                "give_up_ns": way.patience().give_up_ns,
                "bursts": bursts.to_json(),
            });
            let mut case = Case::new(way.case(buffers), way.about(), move |lab| measure(lab, way, &bursts, duration));
            if way.qjump {
                case = case.strict().plan(plan.clone(), QueueChoice::Auto);
            }
            cases.push(case.setting(setting));
        }
    }
    Ok(cases)
}

fn measure(lab: &Lab<'_>, way: Way, bursts: &Bursts, duration: Duration) -> Result<Run> {
    let (tally, burst_bps) = bursts.beside(lab, || transactions(lab, way, duration))?;
    let committed = tally.committed.samples();
    let figure = |name: &str, value: f64, unit: &str| Figure { name: name.into(), value, unit: unit.into() };
    let stream = Stream {
        name: "transaction".into(),
        sample: Sample::Request,
        level: way.qjump.then(|| Level::STRICTEST.number()),
        response: tally.committed.distribution(),
        counts: Some(Counts {
            sent: committed + tally.failed(),
            received: committed,
            lost: tally.failed(),
            ..Counts::default()
        }),
        ..Stream::default()
    };
    Ok(Run {
        duration_ns: tally.took_ns,
        warm_up_ns: WARM_UP.as_nanos() as u64,
        streams: vec![stream],
        figures: vec![
            figure(COMMITS, tally.throughput(), "1/s"),
            figure(FAILED, tally.failed() as f64, "1"),
            figure("messages sent again", tally.resent as f64, "1"),
            figure("bursts, on average", burst_bps, "bit/s"),
        ],
        ..Run::default()
    })
}

/// Names of figures.
const COMMITS: &str = "commits";
const FAILED: &str = "transactions that failed";

/// Runs coordinator and participants.
fn transactions(lab: &Lab<'_>, way: Way, duration: Duration) -> Result<Tally> {
    let mut sides = sides(lab, way)?;
    let mut coordinator_side = sides.remove(0);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = &over;
        let participants: Vec<_> = (0..)
            .zip(sides)
            .map(|(number, mut side)| {
                scope.spawn(move || {
                    settle();
                    participate(number, &mut *side, over)
                })
            })
            .collect();
        let coordinator = scope.spawn(move || {
            let tally = coordinated(&mut *coordinator_side, way, duration, over);
            // Its connections last longer than those who wait for messages.
            (tally, coordinator_side)
        });
        let waited = wait(lab, || coordinator.is_finished());
        over.store(true, Relaxed);
        let (result, _side) = coordinator.join().expect("the coordinator does not panic");
        waited?;
        let (committed, tally) = result.context("the coordinator")?;
        for participant in participants {
            let commits = participant.join().expect("a participant does not panic").context("a participant")?.commits();
            ensure!(
                commits >= committed,
                "the coordinator says that {committed} transactions were committed, and a participant has {commits}"
            );
        }
        Ok(tally)
    })
}

/// Prepares a thread. Without real-time priority: some of the ways use all of a CPU, and the kernel would take it away from
/// them now and then.
fn settle() {
    pin(PROBE_CPU);
    precise_timers();
}

/// A warm-up, and what counts: how many transactions were committed in both, and the tally of the latter.
fn coordinated(side: &mut dyn Transport, way: Way, duration: Duration, over: &AtomicBool) -> io::Result<(u64, Tally)> {
    settle();
    let mut coordinator = Coordinator::new(PARTICIPANTS.len(), way.patience());
    let warm_up = coordinate(&mut coordinator, side, WARM_UP.as_nanos() as u64, over)?;
    let tally = coordinate(&mut coordinator, side, duration.as_nanos() as u64, over)?;
    Ok((warm_up.committed.samples() + tally.committed.samples(), tally))
}

/// Waits until something is over, or somebody asks for the end.
fn wait(lab: &Lab<'_>, over: impl Fn() -> bool) -> Result<()> {
    while !over() {
        lab.pause(Duration::from_millis(20))?;
    }
    Ok(())
}

/// The transports: the coordinator's, and those of the participants.
fn sides(lab: &Lab<'_>, way: Way) -> Result<Vec<Box<dyn Transport + Send>>> {
    let address = |host: usize, port: u16| -> Result<SocketAddr> {
        Ok((lab.rack.address(host).parse::<Ipv4Addr>()?, port).into())
    };
    let coordinator = address(COORDINATOR, PORTS.0)?;
    let everybody = PARTICIPANTS.iter().map(|&host| address(host, PORTS.1)).collect::<Result<Vec<_>>>()?;
    if way.carrier == Carrier::Tcp {
        return connections(lab, &everybody);
    }
    let level = if way.qjump { Level::STRICTEST } else { Level::BEST_EFFORT };
    let socket = |host: usize, port: u16| {
        lab.rack.host(host).enter(|| {
            // To any address: a broadcast is to none of the host's own.
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
                .with_context(|| format!("cannot bind port {port} of host {}", host + 1))?;
            set_level(&socket, level)?;
            Ok(socket)
        })
    };
    let own = socket(COORDINATOR, PORTS.0)?;
    let mut sides: Vec<Box<dyn Transport + Send>> = vec![match way.carrier {
        Carrier::Broadcast => Box::new(Udp::broadcast(own, (BROADCAST, PORTS.1).into())?),
        Carrier::UdpWithRetries | Carrier::Tcp => Box::new(Udp::new(own, everybody)?),
    }];
    for host in PARTICIPANTS {
        sides.push(Box::new(Udp::new(socket(host, PORTS.1)?, vec![coordinator])?));
    }
    Ok(sides)
}

/// To all hosts of the link.
const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 255);

/// A TCP connection of the coordinator with each participant.
fn connections(lab: &Lab<'_>, to: &[SocketAddr]) -> Result<Vec<Box<dyn Transport + Send>>> {
    // What most Linux hosts have, whatever this one has. A connection that is accepted has its listener's.
    let cubic = "cubic".into();
    let (mut near, mut far) = (Vec::new(), Vec::new());
    for (&host, &address) in PARTICIPANTS.iter().zip(to) {
        let listener = lab.rack.host(host).enter(|| Ok(TcpListener::bind(address)?))?;
        setsockopt(&listener, TcpCongestion, &cubic)?;
        let stream = lab.rack.host(COORDINATOR).enter(|| {
            TcpStream::connect_timeout(&address, Duration::from_secs(10))
                .with_context(|| format!("cannot connect to {address}"))
        })?;
        setsockopt(&stream, TcpCongestion, &cubic)?;
        near.push(stream);
        far.push(listener.accept()?.0);
    }
    let mut sides: Vec<Box<dyn Transport + Send>> = vec![Box::new(Tcp::new(near)?)];
    for stream in far {
        sides.push(Box::new(Tcp::new(vec![stream])?));
    }
    Ok(sides)
}

/// UDP from two hosts, each at the rate of a link, to one host and the other in turn.
#[derive(Clone, Debug)]
struct Bursts {
    /// Of a burst, of both hosts together.
    wire_bytes: u64,
    /// From the beginning of one to that of the next to the same host.
    period: Duration,
    rate: Rate,
}

impl Bursts {
    /// The largest of them keep one of the ports busy all the time: they come in at twice the rate at which they go
    /// out, and what is in the buffer at their end takes as long as it takes.
    fn new(rack: &RackSpec, buffers: u32) -> Self {
        let rate = rack.leaf.rate;
        let buffer = Duration::from_secs_f64(f64::from(rack.leaf.buffer) * 8.0 / rate.bps() as f64);
        Self {
            wire_bytes: u64::from(buffers) * u64::from(rack.leaf.buffer),
            period: 2 * (buffer * LARGEST / 2 + buffer),
            rate,
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "wire_bytes": self.wire_bytes,
            "period_ns": self.period.as_nanos() as u64,
            "hosts": BURSTERS.len(),
            "rate_of_each_bps": self.rate.bps(),
            "to": BURSTED.map(|host| format!("h{}", host + 1)),
        })
    }

    fn load(&self, lab: &Lab<'_>, to: usize) -> Result<load::Load> {
        let payload = |wire: u64| wire * DATAGRAM.0 as u64 / DATAGRAM.1;
        Ok(load::Load {
            transport: measure::Transport::Udp,
            level: None,
            rate: Some(Rate::from_bps(payload(self.rate.bps()))),
            pattern: Pattern::Bursts {
                bytes: payload(self.wire_bytes) / BURSTERS.len() as u64,
                period_ns: self.period.as_nanos() as u64,
                random: false,
            },
            // Ended before.
            duration: Duration::from_secs(300),
            datagram: DATAGRAM.0,
            blind: true,
            cpu: Some(BULK_CPU),
            ..load::Load::new((lab.rack.address(to).parse::<Ipv4Addr>()?, BURST_PORT).into())
        })
    }

    /// Does `work` beside the bursts; what was sent meanwhile, bit/s on the wire.
    fn beside<T>(&self, lab: &Lab<'_>, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
        if self.wire_bytes == 0 {
            return Ok((work()?, 0.0));
        }
        // Nobody reads them, but there is somebody: the hosts do not answer with ICMP.
        let _sinks =
            BURSTED.iter().map(|&host| lab.socket(host, BURST_PORT, Level::BEST_EFFORT)).collect::<Result<Vec<_>>>()?;
        let loads = BURSTED.iter().map(|&host| self.load(lab, host)).collect::<Result<Vec<_>>>()?;
        let progress = load::Progress::default();
        // Where in their period they are when the transactions begin.
        let phase = self.period.mul_f64(lab.random(u64::from(BURST_PORT)).random_range(0.0..1.0));
        std::thread::scope(|scope| {
            let mut senders = Vec::new();
            for (turn, load) in (0u32..).zip(&loads) {
                for from in BURSTERS {
                    let (progress, delay) = (&progress, phase + self.period * turn / loads.len() as u32);
                    senders.push(scope.spawn(move || {
                        std::thread::sleep(delay);
                        lab.rack.host(from).enter(|| load.run(progress))
                    }));
                }
            }
            let done = work();
            progress.stop();
            let mut bps = 0.0;
            for sender in senders {
                let outcome = sender.join().expect("a burst does not panic").context("the bursts")?;
                for sent in outcome.sent {
                    ensure!(sent.broken.is_none(), "a burst broke off: {sent:?}");
                    bps += (sent.datagrams * DATAGRAM.1 * 8) as f64 * 1e9 / outcome.duration_ns.max(1) as f64;
                }
            }
            Ok((done?, bps))
        })
    }
}

fn judge(_: &Setup, done: &[Done]) -> Findings {
    let commits = |way: Way, buffers: u32| claims::figure(done, &way.case(buffers), COMMITS);
    let share = |way: Way| Some(commits(way, LARGEST)? / commits(way, 0)?);
    let better = |way: Way| Some(commits(QJUMP, LARGEST)? / commits(way, LARGEST)?.max(f64::MIN_POSITIVE));
    let mut claims = vec![
        claims::at_least(
            "commits of qjump with the largest bursts over those without, at least 0.9",
            share(QJUMP),
            0.9,
        ),
        nothing_lost(done),
    ];
    for way in [RETRIES, TCP] {
        let claim = format!("commits of qjump over those of {} with the largest bursts, at least 1", way.name);
        claims.push(claims::at_least(claim, better(way), 1.0));
    }
    let curve = |way: Way| Curve {
        picture: "throughput".into(),
        name: way.name.into(),
        x: "size of a burst, switch buffers".into(),
        y: "commits a second".into(),
        points: SIZES.iter().filter_map(|&size| Some((f64::from(size), commits(way, size)?))).collect(),
        labels: Vec::new(),
    };
    let curves = WAYS.map(curve).into_iter().filter(|curve| !curve.points.is_empty()).collect();
    Findings { claims, curves, notes: pace(done).into_iter().collect() }
}

/// Without retries, each message that is lost is a transaction that fails.
fn nothing_lost(done: &[Done]) -> Claim {
    let runs: Vec<&Done> = done.iter().filter(|done| done.plan.is_some()).collect();
    let failed =
        |done: &Done| done.run.figures.iter().find(|figure| figure.name == FAILED).map_or(0.0, |figure| figure.value);
    let lost: f64 = runs.iter().map(|done| failed(done)).sum();
    let longest = runs.iter().map(|done| done.stalls.longest_ns).max();
    // A CPU that was away for as long as a phase may take fails it without any loss.
    let away = longest.is_some_and(|longest| longest >= QJUMP.patience().give_up_ns);
    let holds = if runs.is_empty() || (lost > 0.0 && away) { None } else { Some(lost == 0.0) };
    Claim {
        claim: "no transaction of qjump fails for a lost message".into(),
        holds,
        measured: format!("{lost} failed; the longest CPU stall was {}", show_ns(longest.unwrap_or(0) as f64)),
    }
}

/// How fast a transaction can be at level 7.
fn pace(done: &[Done]) -> Option<String> {
    let plan = done.iter().find_map(|done| done.plan.as_ref())?;
    let epoch_ns = plan.levels.first()?.epoch_ns?;
    Some(format!(
        "At level 7 the epoch sets the pace: {}, and a transaction is two broadcasts of the coordinator's and two answers of \
         each participant, so at most {:.0} a second.",
        show_ns(epoch_ns),
        1e9 / (2.0 * epoch_ns)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::NamedRack;

    #[test]
    fn the_largest_bursts_leave_no_moment_without_one() {
        let rack = NamedRack::find(TWO_PHASE_COMMIT.rack).unwrap().spec;
        let bursts = Bursts::new(&rack, LARGEST);
        let buffer = f64::from(rack.leaf.buffer) * 8.0 / rack.leaf.rate.bps() as f64;
        // Twice as much comes in as goes out, until the buffer is all that is left.
        let busy = f64::from(LARGEST) * buffer / 2.0 + buffer;
        let turn = bursts.period.as_secs_f64() / BURSTED.len() as f64;
        assert!((busy - turn).abs() < 1e-6, "{busy} {turn}");
        assert_eq!(bursts.wire_bytes, 2_621_440);
        assert_eq!(Bursts::new(&rack, 0).wire_bytes, 0);
    }

    #[test]
    fn the_plan_is_guaranteed_whoever_sends() {
        let rack = NamedRack::find(TWO_PHASE_COMMIT.rack).unwrap().spec;
        let setup = Setup { rack, quick: true, seed: 1, virtual_time: false };
        let plan = plan(&setup).unwrap();
        assert!(plan.levels[0].guaranteed);
        assert_eq!(plan.network.hosts, 10);
        assert_eq!(cases(&setup).unwrap().len(), 6);
        assert_eq!(cases(&Setup { quick: false, ..setup }).unwrap().len(), 20);
    }
}
