//! `--compare` of the measurements.

use std::{ffi::OsString, sync::atomic::Ordering::Relaxed, thread, time::Duration};

use clap::{Args, Parser};

use super::{
    super::{Failure, interrupt, load::TargetArgs},
    show,
};
use crate::{
    measure::{
        compare::{self, Ratio, Shim, Side},
        result::{Document, Run, Stream},
    },
    table::Table,
};

/// After qjump was loaded or unloaded, what is on its way may arrive.
const SETTLE: Duration = Duration::from_millis(200);

/// Whether to measure without and with qjump.
#[derive(Args)]
pub struct Compare {
    /// Measure without and with qjump on this host, in turns, so many rounds of both (5 if not said), and print ratios.
    /// What to load comes at the end, as `qjump load` takes it: `--compare=10 -- --interface eth0 --config qjump.toml`.
    /// At the end, what was loaded before is loaded, or nothing
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, require_equals = true, default_missing_value = "5",
        requires = "load", value_parser = clap::value_parser!(u16).range(1..=1000))]
    compare: Option<u16>,
    /// With --compare: what to load
    #[arg(last = true, value_name = "FLAGS OF QJUMP LOAD", requires = "compare")]
    load: Vec<OsString>,
}

/// The flags of `qjump load`, by themselves.
#[derive(Parser)]
#[command(name = "--compare --", no_binary_name = true)]
struct LoadFlags {
    #[command(flatten)]
    load: TargetArgs,
}

/// What one measurement gives: the run, and notes.
pub(super) type Measured = Result<(Run, Vec<String>), Failure>;

/// All that was measured.
pub(super) struct Found {
    /// For people.
    pub text: String,
    /// What went wrong after something was measured.
    pub failure: Option<Failure>,
}

impl Compare {
    /// Whether two sides are compared.
    pub const fn is_wanted(&self) -> bool {
        self.compare.is_some()
    }

    /// The streams that conditions are about: those with qjump, if two sides were compared.
    pub fn judged(&self, runs: &[Run]) -> Vec<Stream> {
        let off = format!("{} ", Side::Off.name());
        let judged = runs.iter().filter(|run| !self.is_wanted() || !run.name.starts_with(&off));
        judged.flat_map(|run| run.streams.clone()).collect()
    }

    /// Measures once, or in turns, into the document: with `measure`, which is given the run's name. An interruption ends
    /// it early.
    pub fn run(
        &self,
        document: &mut Document,
        name: &str,
        show: impl Fn(&Run) -> String,
        mut measure: impl FnMut(&str) -> Measured,
    ) -> Result<Found, Failure> {
        let stop = interrupt::flag();
        let Some(rounds) = self.compare else {
            let (run, notes) = measure(name)?;
            document.notes.extend(notes);
            if stop.load(Relaxed) {
                document.notes.push("interrupted: this is what was measured until then".to_owned());
            }
            let text = show(&run);
            document.runs.push(run);
            return Ok(Found { text, failure: None });
        };

        let flags = LoadFlags::try_parse_from(&self.load)
            .map_err(|error| Failure::Usage(format!("what --compare is to load: {error}")))?;
        let wanted = flags.load.read()?;
        let mut shim = Shim::new(wanted.request()).map_err(Failure::Failed)?;
        let (whole, result) = compare::alternate(rounds.into(), |round, side| {
            if stop.load(Relaxed) {
                return Ok(None);
            }
            shim.set(side)?;
            thread::sleep(SETTLE);
            let name = format!("{} {}", side.name(), round + 1);
            let (run, notes) = measure(&name)?;
            document.notes.extend(notes.into_iter().map(|note| format!("{name}: {note}")));
            Ok((!stop.load(Relaxed)).then_some(run))
        });
        let restored = shim.restore();
        document.setting["compared_with"] = wanted.request().plan.to_json();
        Ok(conclude(document, &whole, result.and_then(|()| Ok(restored?))))
    }
}

/// The ratios of the whole rounds, and what kept the others from being whole.
fn conclude(document: &mut Document, rounds: &[(Run, Run)], result: Result<(), Failure>) -> Found {
    let ratios = compare::compare(rounds);
    let text = format!(
        "{}\n\nWithout qjump on this host (off) and with it (on), in turns, {} rounds. The columns off and on are medians; \
         on / off is the geometric mean of the rounds' ratios, its interval Student's t over their logarithms.\n",
        table(&ratios),
        rounds.len()
    );
    if interrupt::flag().load(Relaxed) {
        document.notes.push("interrupted: these are the whole rounds until then".to_owned());
    }
    for (off, on) in rounds {
        document.runs.extend([off.clone(), on.clone()]);
    }
    document.runs.push(compare::run(&ratios, rounds.len()));
    let nothing = || Failure::Failed("there is no whole round to compare".to_owned());
    let failure = result.err().or_else(|| rounds.is_empty().then(nothing));
    Found { text, failure }
}

fn table(ratios: &[Ratio]) -> Table {
    let mut table = Table::new(["figure", "off", "on", "on / off", "95 % interval", "rounds"]).left(0);
    for ratio in ratios {
        table.row([
            ratio.name.clone(),
            show::quantity(ratio.off, &ratio.unit),
            show::quantity(ratio.on, &ratio.unit),
            format!("{:.3}", ratio.ratio),
            ratio.interval.map_or("-".to_owned(), |(low, high)| format!("{} to {}", end(low), end(high))),
            ratio.rounds.to_string(),
        ]);
    }
    table
}

/// An end of an interval: where it says nothing, it does not say it with ten digits.
fn end(ratio: f64) -> String {
    match ratio {
        ..0.001 => "<0.001".to_owned(),
        1_000.0.. => ">1000".to_owned(),
        _ => format!("{ratio:.3}"),
    }
}
