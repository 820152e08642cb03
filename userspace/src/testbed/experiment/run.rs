//! From an experiment to its document: the rack, the cases one after the other, and what follows from them.

use std::{fs, path::PathBuf, sync::atomic::AtomicBool};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{Case, Done, Experiment, Lab, Options, Setup, Stalls, others::Usage, text};
use crate::{
    measure::{
        StallWatch,
        result::{Claim, Curve, Document, Figure, Run},
    },
    report::{Report, write_file},
    testbed::{NamedRack, Rack, needs},
    units::show_ns,
};

/// A case is run once more when CPUs were away, beyond what is allowed, for this share of its time: half of what decides a
/// p99.9.
const DISTURBED: f64 = 0.000_5;
/// Cases that are run once more for that, in each repetition of the full form.
const REPEATS: u32 = 3;

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
    let virtual_time = std::env::var_os("QJUMP_VIRTUAL_TIME").is_some();
    let setup = Setup { rack: rack.spec, quick: options.quick, seed: options.seed, virtual_time };
    let cases =
        (experiment.cases)(&setup).with_context(|| format!("experiment {} on rack {}", experiment.name, rack.name))?;
    Ok(Prepared { experiment, rack, setup, cases, options: options.clone() })
}

impl Prepared {
    /// Its cases.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// What was asked for.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Runs all cases, writes NAME.json, .html, .svg and .md, and returns the document. Whatever happens, the rack is removed, and
    /// what was measured before is in the file.
    ///
    /// # Errors
    /// If a program is missing, the rack cannot be built, a case fails, or it was `cancelled`
    /// ([`Interrupted`](super::Interrupted)).
    pub fn run(&self, cancelled: &AtomicBool) -> Result<Document> {
        let Self { experiment, options, .. } = self;
        ensure!(
            nix::unistd::geteuid().is_root(),
            "experiments make network namespaces and load eBPF programs; run this as root, for example with sudo"
        );
        needs::require(experiment.needs)?;
        fs::create_dir_all(&options.output).with_context(|| format!("cannot create {}", options.output.display()))?;
        let mut document = Document::new(experiment.name, experiment.about);
        document.emulated = true;
        document.setting = self.setting();
        if let Some(unit_ns) = self.unit_ns() {
            document
                .notes
                .push(format!("nP/R is {} here: compare times with other networks in its units.", show_ns(unit_ns)));
        }
        let mut runner = Runner {
            prepared: self,
            rack: Rack::up(self.setup.rack)?,
            in_force: None,
            repeats_left: 0,
            cancelled,
            document,
        };
        runner.write()?;
        let ended = (1..=options.repeat).try_for_each(|repetition| runner.repetition(repetition));
        runner.write()?;
        let document = runner.document.clone();
        drop(runner);
        self.show(&document)?;
        ended.with_context(|| {
            format!("{}: what was measured before is in {}", experiment.name, self.file("json").display())
        })?;
        Ok(document)
    }

    /// A file of the results.
    pub fn file(&self, extension: &str) -> PathBuf {
        self.options.output.join(format!("{}.{extension}", self.experiment.name))
    }

    /// Writes the results for people: a page, its picture, and text for documentation.
    fn show(&self, document: &Document) -> Result<()> {
        let report = Report::new(vec![document.clone()]);
        write_file(&self.file("html"), report.html().as_bytes())?;
        // Without any samples there is nothing to draw.
        if let Ok(picture) = report.svg(None) {
            write_file(&self.file("svg"), picture.as_bytes())?;
        }
        write_file(&self.file("md"), text::page(self.experiment, document).as_bytes())
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
                    "tcp": case.tcp.map(|tcp| json!({"congestion": tcp.congestion, "ecn": tcp.ecn})),
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
            "guest": guest(self.setup.virtual_time),
            "cases": cases,
        })
    }
}

/// The virtual machine that this is, if `cargo xtask vm` runs it: the command that started it, and how its time goes by.
fn guest(virtual_time: bool) -> Value {
    std::env::var("QJUMP_GUEST")
        .map_or(Value::Null, |command| json!({"command": command, "virtual_time": virtual_time}))
}

/// An experiment that runs.
struct Runner<'a> {
    prepared: &'a Prepared,
    rack: Rack,
    /// Whose queueing and plan are in force on the rack.
    in_force: Option<&'a Case>,
    repeats_left: u32,
    cancelled: &'a AtomicBool,
    document: Document,
}

impl<'a> Runner<'a> {
    /// Writes what there is so far. Whoever reads it meanwhile, and whoever finds it later, sees a whole document.
    fn write(&self) -> Result<()> {
        write_file(&self.prepared.file("json"), (serde_json::to_string_pretty(&self.document)? + "\n").as_bytes())
    }

    /// All cases once, and what follows from them.
    fn repetition(&mut self, number: u32) -> Result<()> {
        self.repeats_left = self.prepared.setup.pick(0, REPEATS);
        let (experiment, cases) = (self.prepared.experiment, &self.prepared.cases);
        let mut done = Vec::new();
        let result = cases.iter().enumerate().try_for_each(|(at, case)| {
            eprintln!("{}: {} of {}, {}: {}", experiment.name, at + 1, cases.len(), case.name, case.about);
            if !self.is_possible(case)? {
                return Ok(());
            }
            let one = self.case(case)?;
            self.document.runs.push(Run { name: marked(&one.run.name, number), ..one.run.clone() });
            done.push(one);
            self.write()
        });
        let findings = (experiment.judge)(&self.prepared.setup, &done);
        let disturbed: Vec<(&str, String)> =
            done.iter().filter_map(|one| Some((one.case.as_str(), one.disturbance()?))).collect();
        let claims = findings.claims.into_iter().map(|claim| undecided(claim, !disturbed.is_empty()));
        self.document.claims.extend(claims.map(|claim| Claim { claim: marked(&claim.claim, number), ..claim }));
        let curves = findings.curves.into_iter();
        self.document.curves.extend(curves.map(|curve| Curve { name: marked(&curve.name, number), ..curve }));
        self.document.notes.extend(findings.notes);
        if let Some((case, why)) = disturbed.first() {
            self.document.notes.push(format!(
                "Disturbed: {} of {} cases ({case}: {why}). What does not hold is therefore not decided; try again on a \
                 quiet machine.",
                disturbed.len(),
                done.len()
            ));
        }
        if let Err(error) = &result {
            self.document.notes.push(format!("Not complete: {error:#}"));
        }
        result
    }

    /// Sets the rack up for a case. `false` if it is left out because this kernel cannot do it.
    fn is_possible(&mut self, case: &'a Case) -> Result<bool> {
        let lab = Lab {
            setup: &self.prepared.setup,
            rack: &self.rack,
            watch: &StallWatch::new(0),
            cancelled: self.cancelled,
        };
        lab.check()?;
        let before = self.in_force.take();
        match put_in_force(&lab, case, before) {
            Ok(()) => self.in_force = Some(case),
            Err(error) if case.optional => {
                let why = format!("{}: left out: {error:#}", case.name);
                eprintln!("{why}");
                self.document.notes.push(why);
            }
            Err(error) => return Err(error.context(format!("case {}", case.name))),
        }
        Ok(self.in_force.is_some())
    }

    /// Runs a case, and again if the machine's CPUs were away for too long meanwhile.
    fn case(&mut self, case: &'a Case) -> Result<Done> {
        loop {
            let watch = StallWatch::new(case.allowed.ns());
            let usage = Usage::now();
            let mut run = self.measured(case, &watch).with_context(|| format!("case {}", case.name))?;
            // The clock of virtual time stands still while others have this machine.
            let others = if self.prepared.setup.virtual_time { 0.0 } else { usage.others_since() };
            let stalls = Stalls { longest_ns: watch.longest_ns(), long_ns: watch.long_ns() };
            if watch.excess_ns() as f64 > DISTURBED * run.duration_ns as f64 && self.repeats_left > 0 {
                self.repeats_left -= 1;
                let why = format!(
                    "{}: once more, because a CPU of this machine was away for {}; {} are allowed for",
                    case.name,
                    show_ns(stalls.longest_ns as f64),
                    case.allowed
                );
                eprintln!("{why}");
                self.document.notes.push(why + ".");
                continue;
            }
            run.name.clone_from(&case.name);
            run.about.clone_from(&case.about);
            if !self.prepared.setup.virtual_time {
                let figure =
                    |name: &str, value: f64, unit: &str| Figure { name: name.into(), value, unit: unit.into() };
                run.figures.push(figure("longest CPU stall", stalls.longest_ns as f64, "ns"));
                run.figures.push(figure("CPU stalls beyond what is allowed for", stalls.long_ns as f64, "ns"));
                run.figures.push(figure("CPU time of other programs", others, "1"));
            }
            let plan = case.plan.as_ref().map(|(plan, _)| plan.clone());
            return Ok(Done { case: case.name.clone(), plan, run, stalls, others });
        }
    }

    /// Measures a case once, for which the rack is set up.
    fn measured(&self, case: &'a Case, watch: &StallWatch) -> Result<Run> {
        let lab = Lab { setup: &self.prepared.setup, rack: &self.rack, watch, cancelled: self.cancelled };
        lab.check()?;
        let run = std::thread::scope(|scope| {
            let _ended = Ended(watch);
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            watch.start(scope, 0..if lab.setup.virtual_time { 0 } else { cpus });
            (case.measure)(&lab)
        });
        // What went wrong because somebody asked for the end is no news.
        lab.check()?;
        run
    }
}

/// Ends a watch whatever happens to what is watched, or its threads would never be joined.
struct Ended<'a>(&'a StallWatch);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Sets the rack up for a case, as far as it differs from the one before.
fn put_in_force(lab: &Lab<'_>, case: &Case, before: Option<&Case>) -> Result<()> {
    if before.is_none_or(|before| before.queueing != case.queueing) {
        lab.rack.set_queueing(case.queueing)?;
    }
    if let Some(tcp) = case.tcp.filter(|_| before.is_none_or(|before| before.tcp != case.tcp)) {
        (0..lab.setup.rack.hosts).try_for_each(|host| lab.rack.set_tcp(host, tcp.congestion, tcp.ecn))?;
    }
    if before.is_some_and(|before| before.plan == case.plan) {
        return Ok(());
    }
    lab.rack.unload_all()?;
    if let Some((plan, queue)) = &case.plan {
        for host in 0..lab.setup.rack.hosts {
            lab.rack.load(host, plan, *queue)?;
        }
    }
    Ok(())
}

/// A claim that does not hold, of runs that the machine disturbed, is not decided.
fn undecided(claim: Claim, disturbed: bool) -> Claim {
    Claim { holds: claim.holds.filter(|&holds| holds || !disturbed), ..claim }
}

/// The name of something in a repetition: names are unique within a document.
fn marked(name: &str, repetition: u32) -> String {
    if repetition == 1 { name.to_owned() } else { format!("{name} ({repetition})") }
}
