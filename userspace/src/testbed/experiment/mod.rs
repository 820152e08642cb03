//! The experiments: each puts real programs on a rack, in a few cases, and holds what it finds against what was promised.
//!
//! # How to add one
//!
//! One file in this folder with one `pub static NAME: Experiment`, and its line in [`ALL`].
//!
//! * [`Experiment::cases`] makes a [`Case`] for each line of its table: `alone`, `contended`, `qjump`. A case says how
//!   switches queue, which plan is loaded on every host, and has a closure that measures. It is made before the rack is,
//!   so what cannot be planned is refused at once.
//! * The closure gets the [`Lab`]: the rack, on which the case's queueing and plan are in force, and what it takes to start
//!   programs ([`Lab::program`], with `.level()` under `qjump run`), sockets ([`Lab::socket`]), and waits
//!   ([`Lab::pause`], [`Lab::listening`]). [`load::Load`] is bulk traffic, [`probe::Train`] our own probe. It returns a
//!   [`Run`]. Programs end when their [`Process`](super::Process) is dropped, so `?` is all that errors need. Start them
//!   from the closure's own thread, or from one that lives as long as they do: they end with it.
//! * [`Experiment::judge`] gets what was measured, one [`Done`] for each case that was run, and returns claims and curves.
//!   It may get a part of the cases (Ctrl-C): [`claims`] has the usual ones, which then decide nothing.
//!
//! The framework does the rest: builds the rack, loads and unloads plans, watches the machine's CPUs and repeats a case
//! during which they were away for too long, writes DIR/NAME.json after every case, and takes all down whatever happens.
//! With `--quick` ([`Setup::quick`]) an experiment takes well under a minute, otherwise at most six.
//! `tests/tests/experiments.rs` runs each quick form and asserts the direction of what it shows.

mod barrier;
mod bound;
pub mod claims;
mod lab;
pub mod load;
pub mod ping;
mod placement;
pub mod probe;
mod switch_queue;
mod text;
mod two_phase_commit;

use std::{
    fs,
    path::{self, PathBuf},
    sync::atomic::AtomicBool,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{NamedRack, Queueing, Rack, RackSpec, needs::Need};
use crate::{
    config::QueueChoice,
    measure::{
        StallWatch,
        result::{Claim, Curve, Document, Figure, Run},
    },
    plan::{Delays, ETHERNET_MTU, LevelSpec, Model, Network, Path, Plan, default_wire_overhead},
    units::{Nanos, show_ns},
};

pub use lab::{BULK_CPU, Interrupted, Lab, PROBE_CPU};

/// All experiments, in the order of the paper.
pub static ALL: [&Experiment; 5] = [
    &placement::PLACEMENT,
    &switch_queue::SWITCH_QUEUE,
    &barrier::BARRIER,
    &two_phase_commit::TWO_PHASE_COMMIT,
    &bound::BOUND,
];

/// An experiment.
pub struct Experiment {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// The table or figure of the paper.
    pub figure: &'static str,
    /// What the paper saw there.
    pub paper: &'static str,
    /// Why figures here differ from the paper's.
    pub differs: &'static str,
    /// The rack of the stock that it runs on, unless told otherwise.
    pub rack: &'static str,
    /// The fewest hosts that it can do with.
    pub hosts: usize,
    /// The programs that it runs.
    pub needs: &'static [Need],
    /// Its cases, in the order in which they run.
    pub cases: fn(&Setup) -> Result<Vec<Case>>,
    /// What follows from what was measured.
    pub judge: fn(&Setup, &[Done]) -> Findings,
}

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The rack.
    pub rack: RackSpec,
    /// Whether the direction is enough, and a short run will do.
    pub quick: bool,
    /// What random choices begin with.
    pub seed: u64,
}

impl Setup {
    /// One of two, for a quick form and a full one.
    pub fn pick<T>(&self, quick: T, full: T) -> T {
        if self.quick { quick } else { full }
    }

    /// A plan for all hosts of the rack: its slowest link, its switches, and for how long a CPU of this machine may be
    /// away on a packet's way.
    ///
    /// # Errors
    /// If there is none.
    pub fn plan(&self, max_packet: u32, machine: Nanos, levels: Vec<LevelSpec>) -> Result<Plan> {
        Ok(self.network(max_packet, machine, levels).plan()?)
    }

    /// The network of such a plan.
    pub fn network(&self, max_packet: u32, machine: Nanos, levels: Vec<LevelSpec>) -> Network {
        let hops = self.rack.hops();
        // Hosts send segments one by one.
        let path = Path {
            hops,
            switch_delay: Nanos::from_ns(machine.ns() / u64::from(hops)),
            mtu: ETHERNET_MTU,
            host_burst: 0,
        };
        Network {
            hosts: self.rack.hosts as u32,
            link_rate: self.rack.slowest(),
            max_packet,
            delays: Delays::Path(path),
            wire_overhead: default_wire_overhead(),
            tagged: false,
            model: Model::Strict,
            levels,
        }
    }
}

type Measure = Box<dyn Fn(&Lab<'_>) -> Result<Run>>;

/// One line of an experiment.
pub struct Case {
    name: String,
    about: String,
    queueing: Queueing,
    plan: Option<(Plan, QueueChoice)>,
    allowed: Nanos,
    setting: Value,
    measure: Measure,
}

impl Case {
    /// A case with FIFO queues and no plan. Names are unique within an experiment.
    pub fn new(
        name: impl Into<String>,
        about: impl Into<String>,
        measure: impl Fn(&Lab<'_>) -> Result<Run> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            about: about.into(),
            queueing: Queueing::Fifo,
            plan: None,
            allowed: Nanos::from_ns(2_500_000),
            setting: Value::Null,
            measure: Box::new(measure),
        }
    }

    /// Strict priority in the switches.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.queueing = Queueing::Strict;
        self
    }

    /// A plan on every host, and what holds back there what is over a limit.
    #[must_use]
    pub fn plan(mut self, plan: Plan, queue: QueueChoice) -> Self {
        self.plan = Some((plan, queue));
        self
    }

    /// For how long a CPU may be away at a time without disturbing the case: what its plan allows for the machine, or, if
    /// it has none, what does not matter beside the effect. 2.5 ms if nobody says.
    #[must_use]
    pub fn allow(mut self, stall: Nanos) -> Self {
        self.allowed = stall;
        self
    }

    /// What else there is to know: who sends what to whom.
    #[must_use]
    pub fn setting(mut self, setting: Value) -> Self {
        self.setting = setting;
        self
    }
}

/// A time for which a CPU was away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stalls {
    /// The longest, ns.
    pub longest_ns: u64,
    /// Those that were longer than what is allowed for, together, ns.
    pub long_ns: u64,
}

/// A case that was measured.
pub struct Done {
    /// The name of its case.
    pub case: String,
    /// The plan's, if it had one.
    pub plan: Option<Plan>,
    /// What was measured. Its name may have the repetition in it.
    pub run: Run,
    /// What the machine did meanwhile.
    pub stalls: Stalls,
}

impl Done {
    /// Whether the machine can have caused so many samples over a bound, if there was one in each `interval`: its CPUs
    /// were away for longer than the bound allows for, and for every interval of that two samples may have suffered, one in
    /// it and one behind it. Judged by number; nobody knows which sample met which stall.
    pub fn excuses(&self, violations: u64, interval: Nanos) -> bool {
        violations <= 2 * self.stalls.long_ns.div_ceil(interval.ns().max(1))
    }
}

/// What an experiment makes of its runs.
#[derive(Default)]
pub struct Findings {
    /// What was promised, and whether it held.
    pub claims: Vec<Claim>,
    /// Lines across the runs.
    pub curves: Vec<Curve>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// How to run an experiment.
#[derive(Clone, Debug)]
pub struct Options {
    /// Another rack than the experiment's own: a name of the stock, or a file.
    pub rack: Option<String>,
    /// The short form.
    pub quick: bool,
    /// Where results go.
    pub output: PathBuf,
    /// What random choices begin with.
    pub seed: u64,
    /// How many times all cases are run, one after the other.
    pub repeat: u32,
}

/// A case is disturbed when CPUs were away, beyond what is allowed, for this share of its time: half of what decides a
/// p99.9.
const DISTURBED: f64 = 0.000_5;
/// Cases that are run once more for that, in each repetition of the full form.
const REPEATS: u32 = 3;

/// The experiment of this name.
pub fn find(name: &str) -> Option<&'static Experiment> {
    ALL.into_iter().find(|experiment| experiment.name == name)
}

/// An experiment that is ready to run: everything that can be refused beforehand has been looked at.
pub struct Prepared {
    experiment: &'static Experiment,
    rack: NamedRack,
    setup: Setup,
    cases: Vec<Case>,
    options: Options,
}

/// Looks at all that can be wrong without touching anything.
///
/// # Errors
/// If the rack is wrong or too small, or the cases cannot be planned on it.
pub fn prepare(experiment: &'static Experiment, options: &Options) -> Result<Prepared> {
    let rack = NamedRack::find(options.rack.as_deref().unwrap_or(experiment.rack))?;
    ensure!(
        rack.spec.hosts >= experiment.hosts,
        "experiment {} needs {} hosts, and rack {} has {}; `qjump testbed list` shows larger ones",
        experiment.name,
        experiment.hosts,
        rack.name,
        rack.spec.hosts
    );
    let setup = Setup { rack: rack.spec, quick: options.quick, seed: options.seed };
    let cases =
        (experiment.cases)(&setup).with_context(|| format!("experiment {} on rack {}", experiment.name, rack.name))?;
    Ok(Prepared { experiment, rack, setup, cases, options: options.clone() })
}

impl Prepared {
    /// Runs all cases, writes NAME.json and NAME.md, and returns the document. Whatever happens, the rack is removed, and
    /// what was measured before is in the file.
    ///
    /// # Errors
    /// If a program is missing, the rack cannot be built, a case fails, or it was `cancelled` ([`Interrupted`]).
    pub fn run(&self, cancelled: &AtomicBool) -> Result<Document> {
        let Self { experiment, options, .. } = self;
        ensure!(
            nix::unistd::geteuid().is_root(),
            "experiments make network namespaces and load eBPF programs; run this as root, for example with sudo"
        );
        super::needs::require(experiment.needs)?;
        fs::create_dir_all(&options.output).with_context(|| format!("cannot create {}", options.output.display()))?;
        let mut document = Document::new(experiment.name, experiment.about);
        document.emulated = true;
        document.setting = self.setting();
        document.notes.push(
            "Hosts and switches are network namespaces of this machine, and its CPUs do the work of all of them: compare \
             ratios, and times in units of nP/R, with other networks."
                .to_owned(),
        );
        let file = options.output.join(format!("{}.json", experiment.name));
        write(&file, &document)?;
        let ended = self.run_cases(&mut document, &file, cancelled);
        write(&file, &document)?;
        let page = options.output.join(format!("{}.md", experiment.name));
        fs::write(&page, text::page(experiment, &document))
            .with_context(|| format!("cannot write {}", page.display()))?;
        ended.with_context(|| format!("{}: what was measured before is in {}", experiment.name, file.display()))?;
        Ok(document)
    }

    fn run_cases(&self, document: &mut Document, file: &path::Path, cancelled: &AtomicBool) -> Result<()> {
        let rack = Rack::up(self.setup.rack)?;
        for repetition in 1..=self.options.repeat {
            let mut done = Vec::new();
            let mut repeats_left = self.setup.pick(0, REPEATS);
            let result = self.cases.iter().enumerate().try_for_each(|(number, case)| {
                eprintln!(
                    "{}: {} of {}, {}: {}",
                    self.experiment.name,
                    number + 1,
                    self.cases.len(),
                    case.name,
                    case.about
                );
                let one = self.run_case(&rack, case, &mut repeats_left, &mut document.notes, cancelled)?;
                document.runs.push(numbered(&one.run, repetition));
                done.push(one);
                write(file, document)
            });
            let findings = (self.experiment.judge)(&self.setup, &done);
            let mark = |text: String| if repetition == 1 { text } else { format!("{text} ({repetition})") };
            let claims = findings.claims.into_iter();
            document.claims.extend(claims.map(|claim| Claim { claim: mark(claim.claim), ..claim }));
            let curves = findings.curves.into_iter();
            document.curves.extend(curves.map(|curve| Curve { name: mark(curve.name), ..curve }));
            document.notes.extend(findings.notes);
            if let Err(error) = result {
                document.notes.push(format!("Not complete: {error:#}"));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Runs a case, and again if the machine disturbed it.
    fn run_case(
        &self,
        rack: &Rack,
        case: &Case,
        repeats_left: &mut u32,
        notes: &mut Vec<String>,
        cancelled: &AtomicBool,
    ) -> Result<Done> {
        loop {
            let watch = StallWatch::new(case.allowed.ns());
            let lab = Lab { setup: &self.setup, rack, watch: &watch, cancelled };
            let mut run = measured(&lab, case).with_context(|| format!("case {}", case.name))?;
            run.name.clone_from(&case.name);
            run.about.clone_from(&case.about);
            let stalls = Stalls { longest_ns: watch.longest_ns(), long_ns: watch.long_ns() };
            let figure = |name: &str, ns: u64| Figure { name: name.into(), value: ns as f64, unit: "ns".into() };
            run.figures.push(figure("longest CPU stall", stalls.longest_ns));
            run.figures.push(figure("CPU stalls beyond what is allowed for", stalls.long_ns));
            let disturbed = watch.excess_ns() as f64 > DISTURBED * run.duration_ns as f64;
            let why = || {
                format!(
                    "a CPU of this machine was away for {}; {} are allowed for",
                    show_ns(stalls.longest_ns as f64),
                    case.allowed
                )
            };
            if disturbed && *repeats_left > 0 {
                *repeats_left -= 1;
                eprintln!("{}: once more: {}", case.name, why());
                notes.push(format!("{}: run once more, because {}.", case.name, why()));
                continue;
            }
            if disturbed {
                notes.push(format!("{}: disturbed: {}.", case.name, why()));
            }
            let plan = case.plan.as_ref().map(|(plan, _)| plan.clone());
            return Ok(Done { case: case.name.clone(), plan, run, stalls });
        }
    }

    /// nP/R of the strictest level: what times are compared in with other networks.
    fn unit_ns(&self) -> Option<f64> {
        let plans = self.cases.iter().filter_map(|case| case.plan.as_ref());
        plans.flat_map(|(plan, _)| &plan.levels).find_map(|level| Some(level.terms.as_ref()?.own_ns))
    }

    fn setting(&self) -> Value {
        let mut rack = self.rack.spec.to_json();
        rack["name"] = json!(self.rack.name);
        let cases: Map<String, Value> = self
            .cases
            .iter()
            .map(|case| {
                let setting = json!({
                    "queueing": case.queueing.name(),
                    "queue": case.plan.as_ref().map(|(_, queue)| format!("{queue:?}").to_lowercase()),
                    "plan": case.plan.as_ref().map(|(plan, _)| plan.to_json()),
                    "allowed_stall_ns": case.allowed.ns(),
                    "setting": case.setting,
                });
                (case.name.clone(), setting)
            })
            .collect();
        json!({
            "figure": self.experiment.figure,
            "paper": self.experiment.paper,
            "differs": self.experiment.differs,
            "rack": rack,
            "quick": self.setup.quick,
            "seed": self.setup.seed,
            "unit_ns": self.unit_ns(),
            "repeat": self.options.repeat,
            "cases": cases,
        })
    }
}

/// Ends a watch whatever happens to what is watched, or its threads would never be joined.
struct Ended<'a>(&'a StallWatch);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Puts a case in force, measures, and takes it back.
fn measured(lab: &Lab<'_>, case: &Case) -> Result<Run> {
    lab.check()?;
    lab.rack.set_queueing(case.queueing)?;
    if let Some((plan, queue)) = &case.plan {
        for host in 0..lab.setup.rack.hosts {
            lab.rack.load(host, plan, *queue)?;
        }
    }
    let run = std::thread::scope(|scope| {
        let _ended = Ended(lab.watch);
        lab.watch.start(scope, 0..std::thread::available_parallelism().map_or(1, usize::from));
        (case.measure)(lab)
    });
    // Also after a failure: the next case starts from nothing.
    let unloaded = lab.rack.unload_all();
    lab.check()?;
    let run = run?;
    unloaded?;
    Ok(run)
}

/// The run of a repetition: names are unique within a document.
fn numbered(run: &Run, repetition: u32) -> Run {
    let name = if repetition == 1 { run.name.clone() } else { format!("{} ({repetition})", run.name) };
    Run { name, ..run.clone() }
}

/// Writes a document in one step: whoever reads it meanwhile, and whoever finds it later, sees a whole one.
fn write(file: &path::Path, document: &Document) -> Result<()> {
    let failed = || format!("cannot write {}", file.display());
    let part = file.with_extension("json.part");
    let text = serde_json::to_string_pretty(document)? + "\n";
    fs::write(&part, text).with_context(failed)?;
    fs::rename(&part, file).with_context(failed)
}

/// A document for people, on a terminal.
pub fn show(document: &Document) -> String {
    text::plain(document)
}

/// Whether no claim of a document is known not to hold.
pub fn holds(document: &Document) -> bool {
    document.claims.iter().all(|claim| claim.holds != Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_experiment_can_be_planned_on_its_own_rack() {
        for experiment in ALL {
            for quick in [true, false] {
                let options = Options { rack: None, quick, output: PathBuf::new(), seed: 1, repeat: 1 };
                let prepared = prepare(experiment, &options).unwrap();
                let names: std::collections::HashSet<_> = prepared.cases.iter().map(|case| &case.name).collect();
                assert!(names.len() == prepared.cases.len() && !names.is_empty(), "{}", experiment.name);
                // Of nothing, nothing follows; and it does not panic.
                assert!((experiment.judge)(&prepared.setup, &[]).claims.iter().all(|claim| claim.holds.is_none()));
            }
        }
    }

    #[test]
    fn the_machine_excuses_as_many_samples_as_it_can_have_caused() {
        let done = |long_ns| Done {
            case: String::new(),
            plan: None,
            run: Run::default(),
            stalls: Stalls { longest_ns: long_ns, long_ns },
        };
        let interval = Nanos::from_ns(1_000_000);
        assert!(done(0).excuses(0, interval) && !done(0).excuses(1, interval));
        assert!(done(6_000_000).excuses(12, interval) && !done(6_000_000).excuses(13, interval));
    }
}
