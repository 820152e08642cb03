//! `qjump measure switch-check`.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, interrupt},
    choose_cpu, level,
    output::{Output, Reporter},
    probe::{Taken, measure},
    resolve, show,
};
use crate::{
    measure::{
        Arrivals, Bounds, Clocks, Transport,
        control::PORT,
        flood,
        result::{Claim, Document, Run, Sample, Stream},
        session::{BULK_PAYLOAD, Plan, Session},
        train::{Spec, Train},
    },
    socket::Level,
    table::Table,
    units::{Nanos, Rate},
};

/// Find out, without access to the switches, which levels the path to a host really serves apart
///
/// Sends a few probes at every level, first alone and then beside a flood at each level but the highest, and compares:
/// a level that suffers from the flood at a lower one as much as that level itself is in one queue with it. The path is that
/// to the server; its answers meet no flood. Marks are written by the sockets, or by qjump where it is loaded.
///
/// A flood at a level starves all levels below it, of every host on the path, for as long as a step lasts: do this where that
/// is allowed. Exit status 2 if two levels are not told apart.
#[derive(Args)]
pub struct SwitchCheck {
    /// Host that runs `qjump measure serve`, as NAME, ADDRESS, NAME:PORT or [IPV6]:PORT
    target: String,
    /// How much the flood sends: more than the narrowest link of the path carries
    #[arg(long, value_name = "RATE")]
    rate: Rate,
    /// Levels to tell apart, by commas
    #[arg(long, value_name = "N", value_parser = level, value_delimiter = ',', default_value = "0,1,2,3,4,5,6,7")]
    level: Vec<Level>,
    /// How long each flood lasts
    #[arg(long, value_name = "TIME", default_value = "2s")]
    step: Nanos,
    /// Probes a second, at each level
    #[arg(long, value_name = "N", default_value_t = 100.0)]
    probe_rate: f64,
    #[command(flatten)]
    output: Output,
}

/// A probe that waits longer is lost: longer than any queue that is not broken.
const TIMEOUT_NS: u64 = 500_000_000;
/// The flood fills the queues before anything counts.
const WARM_UP_NS: u64 = 500_000_000;
const PAYLOAD: usize = 64;

/// What a level did beside a flood.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Service {
    level: Level,
    /// Median of the round trips, ns; `None` if too few came back.
    median_ns: Option<u64>,
    lost: f64,
}

/// How a level fares beside a flood at a lower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The flood does not touch it.
    Apart,
    /// It suffers as the flooded level does.
    Together,
    /// The flood did not fill a queue, so nothing can be said.
    Unknown,
}

/// Losses that differ by less are no difference.
const LOSS: f64 = 0.1;
/// A median below this share of another is a different service.
const SHARE: f64 = 0.5;
/// A queue is full if it makes probes take so many times what they take alone.
const FULL: f64 = 4.0;

/// Judges a level by its own service and that of the flooded level, and what that has alone.
fn fate(of: &Service, flooded: &Service, alone: &Service) -> Fate {
    let filled = flooded.lost > alone.lost + LOSS
        || match (flooded.median_ns, alone.median_ns) {
            (Some(flooded), Some(alone)) => flooded as f64 > alone as f64 * FULL,
            (None, _) => true,
            (_, None) => false,
        };
    if !filled {
        return Fate::Unknown;
    }
    let faster = match (of.median_ns, flooded.median_ns) {
        (Some(of), Some(flooded)) => (of as f64) < flooded as f64 * SHARE,
        (Some(_), None) => true,
        (None, _) => false,
    };
    if faster || of.lost + LOSS < flooded.lost { Fate::Apart } else { Fate::Together }
}

/// Levels that are in one queue, lowest first, from the pairs that are.
fn queues(levels: &[Level], together: &[(Level, Level)]) -> Vec<Vec<Level>> {
    let mut queues: Vec<Vec<Level>> = levels.iter().map(|&level| vec![level]).collect();
    for (one, other) in together {
        let find = |queues: &[Vec<Level>], level| queues.iter().position(|queue| queue.contains(level));
        let (Some(a), Some(b)) = (find(&queues, one), find(&queues, other)) else { continue };
        if a != b {
            let moved = queues.remove(a.max(b));
            queues[a.min(b)].extend(moved);
        }
    }
    for queue in &mut queues {
        queue.sort_by_key(|level| level.number());
    }
    queues
}

impl SwitchCheck {
    fn plan(&self, sink: Option<Level>) -> Result<Plan, Failure> {
        let train = |&level: &Level| Train {
            transport: Transport::Udp,
            level,
            payload: PAYLOAD,
            arrivals: Arrivals::Poisson(1e9 / self.probe_rate),
            bounds: Bounds::default(),
        };
        let spec = Spec {
            trains: self.level.iter().map(train).collect(),
            warm_up_ns: WARM_UP_NS,
            duration_ns: self.step.ns(),
            timeout_ns: TIMEOUT_NS,
            cpu: choose_cpu(None, 0)?,
            spin_ns: 0,
            clocks: Clocks::Unknown,
            seed: 1,
        };
        spec.check().map_err(|error| Failure::Usage(error.to_string()))?;
        let target = resolve(&self.target, PORT)?;
        Ok(Plan { target, spec, bound_ns: None, clock_offset_ns: None, mark: true, sinks: sink.into_iter().collect() })
    }

    pub(super) fn run(mut self) -> Result<(), Failure> {
        self.level.sort_by_key(|level| level.number());
        self.level.dedup();
        if self.level.len() < 2 {
            return Err(Failure::Usage("there is nothing to tell apart: give --level two levels or more".to_owned()));
        }
        if !(self.probe_rate > 0.0 && self.probe_rate.is_finite()) {
            return Err(Failure::Usage("--probe-rate is a number of probes a second, above 0".to_owned()));
        }
        let plan = self.plan(None)?;
        self.output.check()?;
        let mut reporter = self.output.reporter()?;
        let mut document =
            Document::new("switch-check", &format!("Levels that the path to {} tells apart", plan.target));
        document.setting = json!({
            "target": plan.target.to_string(), "flood_bps": self.rate.bps(), "probe_rate_per_s": self.probe_rate,
            "levels": self.level.iter().map(|level| level.number()).collect::<Vec<_>>(),
        });
        let (stop, mut failed) = (interrupt::flag(), None);
        let floods = std::iter::once(None).chain(self.level[..self.level.len() - 1].iter().copied().map(Some));
        for flooded in floods {
            if stop.load(Relaxed) {
                document.notes.push("interrupted: the floods that were still to come are missing".to_owned());
                break;
            }
            match self.step(flooded, &mut reporter) {
                Ok(Taken { run, notes, cut_short: false }) => {
                    document.runs.push(run);
                    document.notes.extend(notes);
                }
                // What was found before is kept.
                Ok(Taken { .. }) => {
                    failed = Some(Failure::Failed("the server went away; what was found before is kept".to_owned()));
                    break;
                }
                Err(failure) if !document.runs.is_empty() => {
                    failed = Some(failure);
                    break;
                }
                Err(failure) => return Err(failure),
            }
        }
        document.notes.sort();
        document.notes.dedup();
        let (fates, mut text) = (self.judge(&document.runs), String::new());
        let pairs =
            |wanted| fates.iter().filter(move |(_, _, fate)| *fate == wanted).map(|&(one, other, _)| (one, other));
        let together: Vec<(Level, Level)> = pairs(Fate::Together).collect();
        let unknown: Vec<Level> = pairs(Fate::Unknown).map(|(flooded, _)| flooded).collect();
        let queues = queues(&self.level, &together);
        let show: Vec<String> =
            queues.iter().map(|queue| queue.iter().map(Level::to_string).collect::<Vec<_>>().join("+")).collect();
        text += &format!("{}\n", table(&self.level, &document.runs));
        for flooded in self.level.iter().filter(|level| unknown.contains(level)) {
            document.notes.push(format!(
                "the flood at level {flooded} filled no queue, so nothing is known of the levels above it: a limiter on this \
                 host holds it, or --rate is below what the path carries"
            ));
        }
        document.claims.push(Claim {
            claim: "every level has a queue of its own".to_owned(),
            holds: if !together.is_empty() { Some(false) } else { unknown.is_empty().then_some(true) },
            measured: format!("queues: {}", show.join(", ")),
        });
        document.setting["queues"] = json!(show);
        text += &show::remarks(&document);
        let live = reporter.finish();
        self.output.finish(&document, &text)?;
        live?;
        if let Some(failure) = failed {
            return Err(failure);
        }
        if document.claims.iter().all(|claim| claim.holds == Some(true)) { Ok(()) } else { Err(Failure::DoesNotHold) }
    }

    /// Probes at all levels, beside a flood at one.
    fn step(&self, flooded: Option<Level>, reporter: &mut Reporter) -> Result<Taken, Failure> {
        let mut session = Session::open(&self.plan(flooded)?)?;
        let name = flooded.map_or_else(|| "alone".to_owned(), |level| format!("flood at level {level}"));
        let sinks = session.take_sinks();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            for sink in &sinks {
                scope.spawn(|| flood(sink, BULK_PAYLOAD, self.rate.bps(), &over));
            }
            let measured = measure(session, &name, reporter);
            over.store(true, Relaxed);
            measured
        })
    }

    /// For each flooded level and each level above it, how that fares.
    fn judge(&self, runs: &[Run]) -> Vec<(Level, Level, Fate)> {
        let Some((alone, floods)) = runs.split_first() else { return Vec::new() };
        let mut fates = Vec::new();
        for (run, &flooded) in floods.iter().zip(&self.level) {
            let of = |run, level| services(run).into_iter().find(|service| service.level == level);
            for &above in self.level.iter().filter(|level| level.number() > flooded.number()) {
                if let (Some(own), Some(under), Some(alone)) = (of(run, above), of(run, flooded), of(alone, flooded)) {
                    fates.push((flooded, above, fate(&own, &under, &alone)));
                }
            }
        }
        fates
    }
}

fn services(run: &Run) -> Vec<Service> {
    let round_trips = run.streams.iter().filter(|stream| stream.sample == Sample::Rtt);
    round_trips.filter_map(service).collect()
}

fn service(stream: &Stream) -> Option<Service> {
    let counts = stream.counts?;
    Some(Service {
        level: Level::new(stream.level?)?,
        median_ns: show::percentile(&stream.response, 50.0),
        lost: counts.lost as f64 / counts.sent.max(1) as f64,
    })
}

fn table(levels: &[Level], runs: &[Run]) -> Table {
    let header: Vec<String> = levels.iter().map(|level| format!("level {level}")).collect();
    let mut table = Table::new(std::iter::once("median (lost)").chain(header.iter().map(String::as_str))).left(0);
    for run in runs {
        let services = services(run);
        let cells = levels.iter().map(|level| {
            let service = services.iter().find(|service| service.level == *level);
            service.map_or_else(String::new, |service| match service.lost {
                0.0 => show::time(service.median_ns),
                lost => format!("{} ({:.0}%)", show::time(service.median_ns), lost * 100.0),
            })
        });
        table.row(std::iter::once(run.name.clone()).chain(cells));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(number: u8) -> Level {
        Level::new(number).expect("a level")
    }

    fn service(median_ns: impl Into<Option<u64>>, lost: f64) -> Service {
        Service { level: level(0), median_ns: median_ns.into(), lost }
    }

    #[test]
    fn a_level_is_apart_if_the_flood_does_not_touch_it() {
        let alone = service(50_000, 0.0);
        for (of, flooded, expected) in [
            (service(150_000, 0.0), service(9_000_000, 0.0), Fate::Apart),
            (service(8_500_000, 0.0), service(9_000_000, 0.0), Fate::Together),
            // The queue is full: what gets in is not told apart by its time.
            (service(8_900_000, 0.0), service(9_000_000, 0.4), Fate::Apart),
            (service(8_900_000, 0.35), service(9_000_000, 0.4), Fate::Together),
            (service(150_000, 0.0), service(None, 1.0), Fate::Apart),
            (service(None, 1.0), service(None, 1.0), Fate::Together),
            // No queue filled.
            (service(60_000, 0.0), service(70_000, 0.0), Fate::Unknown),
        ] {
            assert_eq!(fate(&of, &flooded, &alone), expected, "{of:?} beside {flooded:?}");
        }
    }

    #[test]
    fn pairs_make_queues() {
        let levels = [0, 1, 2, 3, 7].map(level);
        let numbers = |together: &[(u8, u8)]| {
            let together: Vec<_> = together.iter().map(|&(one, other)| (level(one), level(other))).collect();
            let queues = queues(&levels, &together);
            queues.iter().map(|queue| queue.iter().map(|level| level.number()).collect()).collect::<Vec<Vec<u8>>>()
        };
        assert_eq!(numbers(&[]), [vec![0], vec![1], vec![2], vec![3], vec![7]]);
        assert_eq!(numbers(&[(0, 7), (1, 2), (2, 3)]), [vec![0, 7], vec![1, 2, 3]]);
    }
}
