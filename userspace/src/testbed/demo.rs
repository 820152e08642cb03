//! `qjump testbed demo`: a probe beside iperf3 on a rack, with and without the limiter.

use std::{
    fs,
    io::{IsTerminal, Write},
    net::UdpSocket,
    os::fd::AsRawFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use qjump_ebpf::Level;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Queueing, Rack, RackSpec, iperf, needs};
use crate::{
    chart::{Curve, Picture},
    config::QueueChoice,
    measure::{Priority, Probe, Progress, Report, StallWatch, flood},
    plan::{Delays, Demand, LevelSpec, Model, Network, Plan, default_wire_overhead},
    report::write_file,
    table::Table,
    units::{Nanos, Rate, show_ns},
};

/// What the demonstration may vary.
#[derive(Clone, Debug)]
pub struct Options {
    /// Probes in each case.
    pub probes: u64,
    /// The fixed delays that the plan counts with.
    pub epsilon: Nanos,
    /// The cases to run, by name; empty for all.
    pub cases: Vec<String>,
}

/// Who does what on the rack.
const RECEIVER: usize = 0;
const PROBE_SENDERS: [usize; 4] = [1, 2, 3, 4];
const BULK_SENDERS: [usize; 2] = [5, 6];
const ROGUE: usize = 7;

const RACK: RackSpec = RackSpec::star(8, Rate::from_bps(100_000_000), 256 * 1024);
/// Largest packet of level 7, L2 bytes.
const MAX_PACKET: u32 = 512;
/// Between two probes from any host: each host sends one in four intervals.
const PROBE_INTERVAL_NS: u64 = 1_000_000;
const HOST_INTERVAL_NS: u64 = PROBE_INTERVAL_NS * PROBE_SENDERS.len() as u64;
/// 64 bytes with its FCS: the smallest frame there is.
const PROBE_PAYLOAD: usize = 18;
/// How early a probe may come. The sender's own timer is not exact, and a probe that comes early for its
/// epoch would be dropped.
const TOLERANCE: Nanos = Nanos::from_ns(200_000);
const PROBE_PORT: u16 = 7007;
const ROGUE_PORT: u16 = 7008;
const IPERF_PORT: u16 = 5201;
const WARM_UP: Duration = Duration::from_millis(1500);
/// Bulk and switch on one CPU, probes on the other.
const BULK_CPU: usize = 0;
const PROBE_CPU: usize = 1;

/// One line of the demonstration.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    about: &'static str,
    queueing: Queueing,
    shim: Shim,
    bulk: bool,
    rogue: bool,
    /// Whether the bound is a promise in this case.
    bounded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shim {
    None,
    MarkOnly,
    Limit,
}

const CASES: [Case; 5] = [
    Case {
        name: "alone",
        about: "nothing but the probe",
        queueing: Queueing::Fifo,
        shim: Shim::None,
        bulk: false,
        rogue: false,
        bounded: false,
    },
    Case {
        name: "contended",
        about: "plain Ethernet, iperf3 from two hosts",
        queueing: Queueing::Fifo,
        shim: Shim::None,
        bulk: true,
        rogue: false,
        bounded: false,
    },
    Case {
        name: "qjump",
        about: "the same, with qjump on every host",
        queueing: Queueing::Strict,
        shim: Shim::Limit,
        bulk: true,
        rogue: false,
        bounded: true,
    },
    Case {
        name: "rogue-unlimited",
        about: "another host floods level 7; priorities, no limits",
        queueing: Queueing::Strict,
        shim: Shim::MarkOnly,
        bulk: true,
        rogue: true,
        bounded: false,
    },
    Case {
        name: "rogue-limited",
        about: "the same flood, with qjump on every host",
        queueing: Queueing::Strict,
        shim: Shim::Limit,
        bulk: true,
        rogue: true,
        bounded: true,
    },
];

struct Outcome {
    case: Case,
    report: Report,
    bulk_bps: Option<f64>,
    /// The longest time for which a CPU of this machine was away, ns.
    longest_stall_ns: u64,
    /// The times for which a CPU was away for longer than epsilon, together, ns.
    long_stalls_ns: u64,
    /// CPUs were away beyond what epsilon allows for, for longer than a p99.9 can overlook.
    disturbed: bool,
    /// How many runs before this one were given up for that.
    repeats: u32,
}

/// What became of the bound in one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// No sample was over it.
    Held,
    /// Samples were over it, and nothing excuses them.
    Broken,
    /// Samples were over it, no more than the machine can have caused: its CPUs were away for longer than epsilon,
    /// so what the plan supposes did not hold. Judged by their number; nobody knows which sample met which stall.
    MachineAway,
}

impl Verdict {
    fn of(violations: u64, long_stalls_ns: u64) -> Self {
        // The probes before and after a stall may suffer as well: as many again.
        match violations {
            0 => Self::Held,
            _ if violations <= 2 * long_stalls_ns.div_ceil(PROBE_INTERVAL_NS) => Self::MachineAway,
            _ => Self::Broken,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Broken => "BROKEN",
            Self::MachineAway => "machine away",
        }
    }
}

impl Outcome {
    /// `None` where no bound is promised.
    fn verdict(&self) -> Option<Verdict> {
        self.case.bounded.then(|| Verdict::of(self.report.latencies.violations(), self.long_stalls_ns))
    }
}

/// A run is disturbed when its CPUs were away, beyond epsilon, for this share of its time. Half of what
/// decides a p99.9.
const DISTURBED: f64 = 0.000_5;
/// Runs that may be given up in one demonstration.
const REPEATS: u32 = 3;

fn network(demand: Demand, epsilon: Nanos) -> Network {
    Network {
        hosts: RACK.hosts as u32,
        link_rate: RACK.leaf.rate,
        max_packet: MAX_PACKET,
        delays: Delays::Given(epsilon),
        wire_overhead: default_wire_overhead(),
        tagged: false,
        model: Model::Paper,
        levels: vec![LevelSpec { tolerance: TOLERANCE, ..LevelSpec::new(Level::STRICTEST, demand) }],
    }
}

/// The cases: name, and what it is about.
pub fn cases() -> impl Iterator<Item = (&'static str, &'static str)> {
    CASES.iter().map(|case| (case.name, case.about))
}

impl Options {
    /// The plan of the cases with limits.
    ///
    /// # Errors
    /// If there is none with this epsilon that lets the probes pass.
    pub fn plan(&self) -> Result<Plan> {
        let plan = network(Demand::Factor(1.0), self.epsilon).plan()?;
        let epoch_ns = plan.levels[0].epoch_ns.context("a level of factor 1 has an epoch")?;
        ensure!(
            epoch_ns <= HOST_INTERVAL_NS as f64,
            "with this epsilon the epoch is {}, longer than the {} between two probes of a host; lower --epsilon",
            show_ns(epoch_ns),
            show_ns(HOST_INTERVAL_NS as f64)
        );
        Ok(plan)
    }

    fn runs(&self, case: &Case) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|name| name == case.name)
    }

    /// What the names of files end with: a run of some cases does not overwrite one of all.
    fn suffix(&self) -> String {
        if CASES.iter().all(|case| self.runs(case)) {
            return String::new();
        }
        let names: Vec<&str> = CASES.iter().filter(|case| self.runs(case)).map(|case| case.name).collect();
        format!("-{}", names.join("+"))
    }
}

/// Runs the demonstration, prints it, and writes summary.json and latency.svg into `output`; with some of the
/// cases only, summary-CASE+CASE.json and latency-CASE+CASE.svg. Whether no promised bound was broken.
/// `cancelled` ends it early; then nothing is written.
///
/// # Errors
/// If the rack cannot be built, a program is missing, or it was cancelled. The rack is removed in any case.
pub fn run(options: &Options, output: &Path, cancelled: &AtomicBool) -> Result<bool> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the demonstration makes network namespaces and loads eBPF programs; run it as root, for example with sudo"
    );
    needs::require(&[needs::IPERF3])?;
    let limited = options.plan()?;
    let marked = network(Demand::Unlimited, options.epsilon).plan()?;
    let bound_ns = limited.levels[0].bound_ns.context("a level of factor 1 has a bound")? as u64;

    fs::create_dir_all(output).with_context(|| format!("cannot create {}", output.display()))?;
    println!(
        "Rack: {} hosts and a switch with {} ports, in network namespaces of this machine: {} send probes to one, {} \
         send bulk to it, and one may turn rogue.",
        RACK.hosts,
        RACK.leaf.rate,
        PROBE_SENDERS.len(),
        BULK_SENDERS.len()
    );
    println!("{limited}\n");
    let rack = Rack::up(RACK)?;
    let mut outcomes = Vec::new();
    let mut repeats_left = REPEATS;
    for case in CASES {
        if options.runs(&case) {
            let plan = match case.shim {
                Shim::None => None,
                Shim::MarkOnly => Some(&marked),
                Shim::Limit => Some(&limited),
            };
            let mut repeats = 0;
            let outcome = loop {
                let outcome = run_case(&rack, case, plan, options, bound_ns, cancelled)
                    .with_context(|| format!("case {}", case.name))?;
                if !outcome.disturbed || repeats_left == 0 {
                    break outcome;
                }
                repeats_left -= 1;
                repeats += 1;
                eprintln!(
                    "{}: once more: a CPU of this machine was away for {}, more than epsilon",
                    case.name,
                    show_ns(outcome.longest_stall_ns as f64)
                );
            };
            outcomes.push(Outcome { repeats, ..outcome });
        }
    }
    drop(rack);

    println!("{}", table(&outcomes, bound_ns));
    let suffix = options.suffix();
    let summary = output.join(format!("summary{suffix}.json"));
    fs::write(&summary, format!("{:#}\n", summary_json(&outcomes, &limited, bound_ns)))
        .with_context(|| format!("cannot write {}", summary.display()))?;
    let picture = output.join(format!("latency{suffix}.svg"));
    let curves: Vec<Curve> = outcomes
        .iter()
        .map(|outcome| Curve { name: outcome.case.name.to_owned(), points: outcome.report.latencies.ccdf() })
        .collect();
    let title = format!("Time of a probe through a {} switch port, beside iperf3", RACK.leaf.rate);
    let bounds = [("bound".to_owned(), bound_ns as f64)];
    let drawn = Picture::ccdf(&title, "one-way latency", "share of probes that took longer", curves, &bounds);
    write_file(&picture, drawn.svg().as_bytes())?;
    println!("Written: {} and {}", summary.display(), picture.display());
    Ok(outcomes.iter().all(|outcome| outcome.verdict() != Some(Verdict::Broken)))
}

fn run_case(
    rack: &Rack,
    case: Case,
    plan: Option<&Plan>,
    options: &Options,
    bound_ns: u64,
    cancelled: &AtomicBool,
) -> Result<Outcome> {
    if cancelled.load(Relaxed) {
        bail!("interrupted");
    }
    rack.set_queueing(case.queueing)?;
    if let Some(plan) = plan {
        for host in 0..RACK.hosts {
            rack.load(host, plan, QueueChoice::Keep)?;
        }
    }
    let probe = Probe {
        count: options.probes,
        interval_ns: PROBE_INTERVAL_NS,
        payload: PROBE_PAYLOAD,
        bound_ns: Some(bound_ns),
        cpu: PROBE_CPU,
    };
    let duration = Duration::from_nanos(probe.count * probe.interval_ns);
    let receiver = socket(rack, RECEIVER, PROBE_PORT, 0)?;
    let mut senders = Vec::new();
    for host in PROBE_SENDERS {
        let sender = socket(rack, host, 0, 7)?;
        sender.connect((rack.address(RECEIVER), PROBE_PORT))?;
        senders.push(sender);
    }

    // Servers and clients are ended when they go out of scope, whatever happens.
    let mut servers = Vec::new();
    let mut clients = Vec::new();
    if case.bulk {
        for port in (IPERF_PORT..).take(BULK_SENDERS.len()) {
            servers.push(iperf::server(rack.host(RECEIVER), port, BULK_CPU)?);
        }
        std::thread::sleep(Duration::from_millis(500));
        let seconds = (WARM_UP + duration + Duration::from_secs(1)).as_secs() + 1;
        for (number, &host) in BULK_SENDERS.iter().enumerate() {
            let port = IPERF_PORT + number as u16;
            let amount = iperf::Amount::Seconds(seconds);
            clients.push(iperf::client(rack.host(host), &rack.address(RECEIVER), port, amount, BULK_CPU)?);
        }
        std::thread::sleep(WARM_UP);
    }

    let rogue = match case.rogue {
        true => Some(socket(rack, ROGUE, 0, 7)?),
        false => None,
    };
    if let Some(rogue) = &rogue {
        rogue.connect((rack.address(RECEIVER), ROGUE_PORT))?;
    }
    let rogue_stop = AtomicBool::new(false);
    let progress = Progress::default();
    let stalls = StallWatch::new(options.epsilon.ns());
    let report = std::thread::scope(|scope| {
        stalls.start(scope, [BULK_CPU, PROBE_CPU]);
        if let Some(socket) = &rogue {
            // More than the receiver's port carries, in the largest packets of the level.
            let payload = MAX_PACKET as usize - 42;
            let stop = &rogue_stop;
            scope.spawn(move || flood(socket, payload, RACK.leaf.rate.bps() * 5 / 4, stop));
        }
        let probing = scope.spawn(|| probe.run(&senders, &receiver, &progress));
        show_progress(case, &probe, &progress, || probing.is_finished(), cancelled);
        let report = probing.join().expect("the probe does not panic");
        rogue_stop.store(true, Relaxed);
        stalls.stop();
        report.context("the probe")
    })?;
    if cancelled.load(Relaxed) {
        bail!("interrupted");
    }

    ensure!(!case.bounded || report.latencies.samples() > 0, "no probe arrived");

    let mut bulk_bps = None;
    for client in clients {
        bulk_bps = Some(bulk_bps.unwrap_or(0.0) + iperf::goodput(client)?);
    }
    drop(servers);
    rack.unload_all()?;
    let disturbed = stalls.excess_ns() as f64 > DISTURBED * duration.as_nanos() as f64;
    Ok(Outcome {
        case,
        report,
        bulk_bps,
        longest_stall_ns: stalls.longest_ns(),
        long_stalls_ns: stalls.long_ns(),
        disturbed,
        repeats: 0,
    })
}

/// A UDP socket in a host's namespace, at a level.
fn socket(rack: &Rack, host: usize, port: u16, level: u32) -> Result<UdpSocket> {
    let address = rack.address(host);
    rack.host(host).enter(|| {
        let socket =
            UdpSocket::bind((address.as_str(), port)).with_context(|| format!("cannot bind {address}:{port}"))?;
        // SAFETY: the option's value is a u32 that outlives the call.
        let failed = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PRIORITY,
                (&raw const level).cast(),
                size_of::<u32>() as u32,
            )
        };
        if failed != 0 {
            bail!("cannot set SO_PRIORITY {level}: {}", std::io::Error::last_os_error());
        }
        Ok(socket)
    })
}

fn show_progress(case: Case, probe: &Probe, progress: &Progress, finished: impl Fn() -> bool, cancelled: &AtomicBool) {
    let mut out = std::io::stderr();
    let terminal = out.is_terminal();
    let start = Instant::now();
    let mut shown = Duration::ZERO;
    let line = || {
        format!(
            "{:16} {:5.1} s  {:6} of {} probes, {} lost or on their way, max {:10} ({})",
            case.name,
            start.elapsed().as_secs_f64(),
            progress.sent(),
            probe.count,
            progress.sent().saturating_sub(progress.received()),
            show_ns(progress.max_ns() as f64),
            case.about,
        )
    };
    while !finished() {
        if cancelled.load(Relaxed) {
            progress.stop();
        }
        std::thread::sleep(Duration::from_millis(50));
        let pause = if terminal { 500 } else { 5_000 };
        if start.elapsed() - shown > Duration::from_millis(pause) {
            shown = start.elapsed();
            let _ = if terminal { write!(out, "\r{}", line()) } else { writeln!(out, "{}", line()) };
        }
    }
    let _ = writeln!(out, "{}{}", if terminal { "\r" } else { "" }, line());
}

fn table(outcomes: &[Outcome], bound_ns: u64) -> String {
    let mut table = Table::new([
        "case",
        "samples",
        "lost",
        "p50",
        "p99",
        "p99.9",
        "max",
        "bulk Mbit/s",
        "bound",
        "over bound",
        "bound promised",
        "verdict",
    ]);
    for outcome in outcomes {
        let latencies = &outcome.report.latencies;
        let show = |value: Option<u64>| value.map_or("-".to_owned(), |ns| format!("{:.1} us", ns as f64 / 1e3));
        table.row([
            outcome.case.name.to_owned(),
            latencies.samples().to_string(),
            outcome.report.lost().to_string(),
            show(latencies.quantile_ns(0.5)),
            show(latencies.quantile_ns(0.99)),
            show(latencies.quantile_ns(0.999)),
            show(latencies.max_ns()),
            outcome.bulk_bps.map_or("-".to_owned(), |bps| format!("{:.1}", bps / 1e6)),
            show(Some(bound_ns)),
            latencies.violations().to_string(),
            if outcome.case.bounded { "yes" } else { "no" }.to_owned(),
            outcome.verdict().map_or("-", Verdict::text).to_owned(),
        ]);
    }
    let mut text = format!(
        "\n{table}\nLatency: one-way, from the intended send to the receiving application, on one clock. The network is \
         emulated by this machine's CPUs, so a sample over the bound can be the machine's, not the network's."
    );
    if outcomes.iter().any(|outcome| outcome.report.latencies.quantile_ns(0.999).is_none()) {
        text += "\nA percentile is - where fewer than ten samples lie beyond it: too few samples.";
    }
    for outcome in outcomes {
        let name = outcome.case.name;
        let over =
            format!("{} of {} samples", outcome.report.latencies.violations(), outcome.report.latencies.samples());
        match outcome.verdict() {
            Some(Verdict::Broken) => text += &format!("\n{name}: the promised bound was broken by {over}."),
            Some(Verdict::MachineAway) => {
                text += &format!(
                    "\n{name}: {over} over the bound, no more than the machine can have caused: a CPU was away for up to {}, \
                     longer than the plan's epsilon. The run decides nothing about them.",
                    show_ns(outcome.longest_stall_ns as f64)
                );
            }
            Some(Verdict::Held) | None => {}
        }
        if outcome.repeats > 0 {
            text += &format!(
                "\n{name}: repeated {} time(s), because a CPU of this machine was away for longer than epsilon.",
                outcome.repeats
            );
        }
        if outcome.disturbed {
            text += &format!(
                "\n{name}: disturbed: a CPU of this machine was away for up to {}; the plan's epsilon allows for less.",
                show_ns(outcome.longest_stall_ns as f64)
            );
        }
        let late = outcome.report.lateness.quantile_ns(0.999).unwrap_or(0);
        if late > bound_ns / 2 {
            text += &format!(
                "\n{name}: generator-limited: the probe sender itself was up to {} late (p99.9).",
                show_ns(late as f64)
            );
        }
    }
    if outcomes.iter().any(|outcome| outcome.report.priority == Priority::Ordinary) {
        text += "\nThe probe threads had no real-time priority (it needs CAP_SYS_NICE): expect longer tails.";
    }
    text
}

fn summary_json(outcomes: &[Outcome], plan: &Plan, bound_ns: u64) -> Value {
    let cases: Vec<Value> = outcomes
        .iter()
        .map(|outcome| {
            let latencies = &outcome.report.latencies;
            json!({
                "name": outcome.case.name,
                "samples": latencies.samples(),
                "lost": outcome.report.lost(),
                "p50_ns": latencies.quantile_ns(0.5),
                "p99_ns": latencies.quantile_ns(0.99),
                "p999_ns": latencies.quantile_ns(0.999),
                "max_ns": latencies.max_ns(),
                "bulk_mbps": outcome.bulk_bps.map(|bps| bps / 1e6),
                "violations": latencies.violations(),
                "longest_stall_ns": outcome.longest_stall_ns,
                "disturbed": outcome.disturbed,
                "repeats": outcome.repeats,
                "bound_promised": outcome.case.bounded,
                "verdict": outcome.verdict(),
                "sender_lateness_p999_ns": outcome.report.lateness.quantile_ns(0.999),
                "real_time_priority": outcome.report.priority == Priority::RealTime,
            })
        })
        .collect();
    json!({
        "schema_version": 1,
        "latency": "one-way",
        "emulated": true,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "rack": {"hosts": RACK.hosts, "link_rate_bps": RACK.leaf.rate.bps(), "buffer_bytes": RACK.leaf.buffer},
        "probe": {"senders": PROBE_SENDERS.len(), "interval_ns": PROBE_INTERVAL_NS, "payload_bytes": PROBE_PAYLOAD},
        "plan": plan.to_json(),
        "bound_ns": bound_ns,
        "cases": cases,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_as_many_samples_as_the_machine_was_away_for_are_excused() {
        assert_eq!(Verdict::of(0, 0), Verdict::Held);
        assert_eq!(Verdict::of(0, 9_000_000), Verdict::Held);
        assert_eq!(Verdict::of(1, 0), Verdict::Broken);
        assert_eq!(Verdict::of(12, 6_000_000), Verdict::MachineAway);
        assert_eq!(Verdict::of(13, 6_000_000), Verdict::Broken);
    }

    #[test]
    fn some_cases_are_written_to_files_of_their_own() {
        let suffix = |cases: &[&str]| {
            let cases = cases.iter().map(|&name| name.to_owned()).collect();
            Options { probes: 1, epsilon: Nanos::from_ns(0), cases }.suffix()
        };
        assert_eq!(suffix(&[]), "");
        assert_eq!(suffix(&["rogue-limited", "alone", "alone"]), "-alone+rogue-limited");
        assert_eq!(suffix(&CASES.map(|case| case.name)), "");
    }
}
