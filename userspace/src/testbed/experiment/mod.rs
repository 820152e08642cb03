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
//! during which they were away for too long, leaves undecided what does not hold on a machine that was busy with something
//! else, writes DIR/NAME.json after every case, and what people read at the end, and takes all down whatever happens.
//! With `--quick` ([`Setup::quick`]) an experiment takes well under a minute, otherwise at most six.
//! `tests/tests/experiments.rs` runs each quick form and asserts the direction of what it shows.

mod alternatives;
mod barrier;
mod bound;
pub mod cache;
pub mod claims;
mod lab;
pub mod load;
mod memcached;
mod others;
pub mod ping;
mod placement;
pub mod probe;
mod ptp;
mod rate_sweep;
mod run;
mod switch_queue;
mod text;
mod two_phase_commit;

use std::path::PathBuf;

use anyhow::Result;
use serde_json::Value;

use super::{Queueing, RackSpec, needs::Need};
use crate::{
    config::QueueChoice,
    measure::result::{Claim, Curve, Document, Run},
    plan::{Delays, ETHERNET_MTU, LevelSpec, Model, Network, Path, Plan, default_wire_overhead},
    units::{Nanos, show_ns},
};

pub use lab::{BULK_CPU, Interrupted, Lab, PROBE_CPU};
pub use run::{Prepared, prepare};

/// All experiments, in the order of the paper.
pub static ALL: [&Experiment; 10] = [
    &placement::PLACEMENT,
    &ptp::PTP,
    &switch_queue::SWITCH_QUEUE,
    &memcached::MEMCACHED,
    &barrier::BARRIER,
    &two_phase_commit::TWO_PHASE_COMMIT,
    &alternatives::ALTERNATIVES,
    &rate_sweep::RATE_SWEEP,
    &bound::BOUND,
    &bound::BOUND_SOAK,
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
    /// Whether time goes by the instructions executed (`cargo xtask vm --virtual-time`): then no CPU is ever away.
    pub virtual_time: bool,
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
        planned(&self.network(max_packet, machine, levels))
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

/// The plan of a network.
///
/// # Errors
/// If there is none.
pub fn planned(network: &Network) -> Result<Plan> {
    // The message has its source in it.
    network.plan().map_err(|error| anyhow::anyhow!("{error}"))
}

type Measure = Box<dyn Fn(&Lab<'_>) -> Result<Run>>;

/// One line of an experiment.
pub struct Case {
    name: String,
    about: String,
    queueing: Queueing,
    plan: Option<(Plan, QueueChoice)>,
    tcp: Option<Tcp>,
    optional: bool,
    allowed: Nanos,
    setting: Value,
    measure: Measure,
}

/// How all hosts' TCP reacts to congestion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// The algorithm, whatever programs ask for.
    pub congestion: &'static str,
    /// Whether connections use marks of congestion.
    pub ecn: bool,
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
            tcp: None,
            optional: false,
            allowed: Nanos::from_ns(2_500_000),
            setting: Value::Null,
            measure: Box::new(measure),
        }
    }

    /// Strict priority in the switches.
    #[must_use]
    pub fn strict(self) -> Self {
        self.queueing(Queueing::Strict)
    }

    /// Other queues in the switches.
    #[must_use]
    pub fn queueing(mut self, queueing: Queueing) -> Self {
        self.queueing = queueing;
        self
    }

    /// How all hosts' TCP reacts to congestion. If one case says so, all of an experiment must.
    #[must_use]
    pub fn tcp(mut self, congestion: &'static str, ecn: bool) -> Self {
        self.tcp = Some(Tcp { congestion, ecn });
        self
    }

    /// Left out, with a note, where the kernel does not have what it needs.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
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
    /// The share of the machine's CPU time that other programs had.
    pub others: f64,
}

/// More than this share of the machine, and other programs decide what the emulated network does.
const BUSY: f64 = 0.1;
/// CPUs that are away for this share of the time are half of what decides a p99.
const AWAY: f64 = 0.005;

impl Done {
    /// Why the machine may have decided what was measured, if it may.
    pub fn disturbance(&self) -> Option<String> {
        if self.others > BUSY {
            return Some(format!("other programs had {:.0} % of this machine's CPU time", 100.0 * self.others));
        }
        let away = self.stalls.long_ns as f64 > AWAY * self.run.duration_ns as f64;
        away.then(|| format!("CPUs of this machine were away for up to {}", show_ns(self.stalls.longest_ns as f64)))
    }

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

/// The experiment of this name.
pub fn find(name: &str) -> Option<&'static Experiment> {
    ALL.into_iter().find(|experiment| experiment.name == name)
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
                let names: std::collections::HashSet<_> = prepared.cases().iter().map(|case| &case.name).collect();
                assert!(names.len() == prepared.cases().len() && !names.is_empty(), "{}", experiment.name);
                // Of nothing, nothing follows; and it does not panic.
                assert!((experiment.judge)(prepared.setup(), &[]).claims.iter().all(|claim| claim.holds.is_none()));
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
            others: 0.0,
        };
        let interval = Nanos::from_ns(1_000_000);
        assert!(done(0).excuses(0, interval) && !done(0).excuses(1, interval));
        assert!(done(6_000_000).excuses(12, interval) && !done(6_000_000).excuses(13, interval));
    }
}
