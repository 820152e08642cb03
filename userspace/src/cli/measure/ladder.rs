//! `qjump measure ladder`.

use std::sync::atomic::Ordering::Relaxed;

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, interrupt},
    level,
    probe::{Common, Taken, measure, round_trips},
    show,
};
use crate::{
    measure::{
        Arrivals,
        result::{Document, Figure, Run, Stream},
        session::Session,
    },
    socket::Level,
    table::Table,
};

/// Measure step by step, at growing rates, sizes or levels, one after the other, and find the knee
///
/// The knee is the first step at which the 99th percentile of the response is more than twice that of the service (the
/// sender was held up), or more than twice that of the first step's response (the network was), or at which more than
/// 1 % was lost.
#[derive(Args)]
pub struct Ladder {
    #[command(flatten)]
    common: Common,
    /// Probes a second, at each level
    #[arg(long, value_name = "N", default_value_t = 1000.0)]
    rate: f64,
    /// At random times (a Poisson process) instead of equal distances
    #[arg(long)]
    poisson: bool,
    #[command(flatten)]
    steps: Steps,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Steps {
    /// A step for each of these rates, probes a second
    #[arg(long, value_name = "N", value_delimiter = ',')]
    rates: Vec<f64>,
    /// A step for each of these sizes, bytes
    #[arg(long, value_name = "BYTES", value_delimiter = ',')]
    sizes: Vec<usize>,
    /// A step for each of these levels
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = level)]
    levels: Vec<Level>,
}

/// One step, with its name.
struct Step {
    name: String,
    rate: f64,
    size: usize,
    level: Option<Level>,
}

impl Ladder {
    fn steps(&self) -> Vec<Step> {
        let step = |name: String| Step { name, rate: self.rate, size: self.common.size, level: None };
        let Steps { rates, sizes, levels } = &self.steps;
        let rates = rates.iter().map(|&rate| Step { rate, ..step(format!("{rate}/s")) });
        let sizes = sizes.iter().map(|&size| Step { size, ..step(format!("{size} bytes")) });
        let levels = levels.iter().map(|&level| Step { level: Some(level), ..step(format!("level {level}")) });
        rates.chain(sizes).chain(levels).collect()
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        let steps = self.steps();
        // All steps are checked before the first is taken.
        let mut plans = Vec::new();
        for step in &steps {
            if !(step.rate > 0.0 && step.rate.is_finite()) {
                return Err(Failure::Usage("a rate is a number of probes a second, above 0".to_owned()));
            }
            self.common.size = step.size;
            if let Some(level) = step.level {
                self.common.level = vec![level];
            }
            let interval = 1e9 / step.rate;
            let arrivals = if self.poisson { Arrivals::Poisson(interval) } else { Arrivals::Fixed(interval) };
            plans.push(self.common.plan(arrivals)?);
        }
        self.common.output.check()?;
        let mut reporter = self.common.output.reporter()?;
        let (mut document, mut failed): (Option<Document>, _) = (None, None);
        let stop = interrupt::flag();
        for (step, plan) in steps.iter().zip(&plans) {
            if stop.load(Relaxed) {
                break;
            }
            let session = Session::open(plan);
            let session = match (session, &mut document) {
                (Ok(session), _) => session,
                // What the steps before have found is kept.
                (Err(error), Some(_)) => {
                    failed = Some(Failure::Failed(format!("{}: {error}; the steps before are kept", step.name)));
                    break;
                }
                (Err(error), None) => return Err(error.into()),
            };
            let document = document.get_or_insert_with(|| {
                let mut document = Document::new("measurement", &format!("Ladder to {}", plan.target));
                document.setting = self.common.setting(plan, &session);
                document.setting["steps"] = json!(steps.iter().map(|step| &step.name).collect::<Vec<_>>());
                document
            });
            let Taken { mut run, notes, cut_short } = measure(session, &step.name, &mut reporter)?;
            run.figures.push(Figure { name: "rate".to_owned(), value: step.rate, unit: "1/s".to_owned() });
            run.figures.push(Figure { name: "size".to_owned(), value: step.size as f64, unit: "bytes".to_owned() });
            document.runs.push(run);
            document.notes.extend(notes.into_iter().map(|note| format!("{}: {note}", step.name)));
            if cut_short {
                failed = Some(Failure::Failed(format!("the server went away at {}", step.name)));
                break;
            }
        }
        let mut document = document.ok_or_else(|| Failure::Failed("interrupted before the first step".to_owned()))?;
        if stop.load(Relaxed) {
            document.notes.push("interrupted: these are the steps that were taken until then".to_owned());
        }
        let knee = if self.steps.levels.is_empty() { Some(knee(&document.runs)) } else { None };
        document.setting["knee"] = json!(knee.as_ref().and_then(|knee| knee.as_ref().map(|(name, _)| name)));
        let conclusion = match knee {
            Some(Some((name, why))) => format!("knee at {name}: {why}\n"),
            Some(None) => "no knee up to the last step\n".to_owned(),
            None => String::new(),
        };
        let text = format!("{}\n{conclusion}{}", table(&document.runs), show::remarks(&document));
        let live = reporter.finish();
        self.common.output.finish(&document, &text)?;
        live?;
        failed.map_or(Ok(()), Err)
    }
}

/// The first step that departs, and how.
fn knee(runs: &[Run]) -> Option<(String, String)> {
    const TIMES: f64 = 2.0;
    const LOST: f64 = 0.01;
    let p99 = |stream: &Stream| highest(stream).0;
    let first = p99(round_trips(runs.first()?)?);
    runs.iter().find_map(|run| {
        let stream = round_trips(run)?;
        let counts = stream.counts.unwrap_or_default();
        let (response, service) = highest(stream);
        let why = if counts.lost as f64 > counts.sent as f64 * LOST {
            format!("{} of {} were lost", counts.lost, counts.sent)
        } else if response? as f64 > service? as f64 * TIMES {
            format!("the sender was held up: response {}, service {}", show::time(response), show::time(service))
        } else if response? as f64 > first? as f64 * TIMES {
            format!("the network took longer: {}, at the first step {}", show::time(response), show::time(first))
        } else {
            return None;
        };
        Some((run.name.clone(), why))
    })
}

/// Response and service at the 99th percentile, or the highest that both show.
fn highest(stream: &Stream) -> (Option<u64>, Option<u64>) {
    let service = stream.service.clone().unwrap_or_default();
    [99.0, 90.0, 50.0]
        .into_iter()
        .map(|percent| (show::percentile(&stream.response, percent), show::percentile(&service, percent)))
        .find(|(response, service)| response.is_some() && service.is_some())
        .unwrap_or_default()
}

fn table(runs: &[Run]) -> Table {
    let header =
        ["step", "stream", "sent", "lost", "p50", "p99", "max", "service p50", "p99", "max", "bound", "over it", ""];
    let mut table = Table::new(header).left(0);
    for run in runs {
        for stream in run.streams.iter().filter(|stream| stream.counts.is_some()) {
            let counts = stream.counts.unwrap_or_default();
            let service = stream.service.clone().unwrap_or_default();
            let limited = stream.generator.as_ref().is_some_and(|generator| generator.limited);
            table.row([
                run.name.clone(),
                stream.name.clone(),
                counts.sent.to_string(),
                counts.lost.to_string(),
                show::time(show::percentile(&stream.response, 50.0)),
                show::time(show::percentile(&stream.response, 99.0)),
                show::time(stream.response.max_ns),
                show::time(show::percentile(&service, 50.0)),
                show::time(show::percentile(&service, 99.0)),
                show::time(service.max_ns),
                show::time(stream.bound_ns),
                stream.violations.map_or_else(|| "-".to_owned(), |over| over.to_string()),
                if limited { "generator-limited" } else { "" }.to_owned(),
            ]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Latencies, result::Counts};

    fn run(name: &str, response: u64, service: u64, lost: u64) -> Run {
        let of = |ns| {
            let mut latencies = Latencies::new(None);
            (0..2_000).for_each(|_| latencies.record(ns));
            latencies.distribution()
        };
        let counts = Counts { sent: 2_000 + lost, received: 2_000, lost, ..Counts::default() };
        let stream =
            Stream { response: of(response), service: Some(of(service)), counts: Some(counts), ..Stream::default() };
        Run { name: name.to_owned(), streams: vec![stream], ..Run::default() }
    }

    #[test]
    fn the_knee_is_where_something_departs() {
        let quiet = [run("1", 100_000, 100_000, 0), run("2", 190_000, 180_000, 10)];
        assert_eq!(knee(&quiet), None);
        for (step, part) in [
            (run("3", 500_000, 150_000, 0), "the sender was held up"),
            (run("3", 500_000, 490_000, 0), "the network took longer"),
            (run("3", 100_000, 100_000, 100), "100 of 2100 were lost"),
        ] {
            let [one, two] = quiet.clone();
            let (name, why) = knee(&[one, two, step.clone(), step]).unwrap();
            assert!(name == "3" && why.contains(part), "{why}");
        }
    }
}
