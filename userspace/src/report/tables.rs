//! The tables of a report, as text and as HTML alike.

use super::{
    Report, Sampled,
    compare::{self, Ratio},
    grid::{Cell, Column, Grid},
};
use crate::{
    chart::Unit,
    measure::result::{Distribution, Figure, Run, Sample},
    units::show_ns,
};

/// The percentiles that tables show, where there are enough samples for them; the first three always.
const PERCENTS: [f64; 5] = [50.0, 99.0, 99.9, 99.99, 99.999];
const ALWAYS: usize = 3;
/// The heading of latencies, losses and bounds.
pub(super) const SUMMARY: &str = "Latency";
/// The heading of single figures.
pub(super) const FIGURES: &str = "Figures";
/// The heading of claims.
pub(super) const CLAIMS: &str = "Claims";
/// The heading of latencies of runs beside each other.
pub(super) const COMPARISON: &str = "Comparison, times as long";
/// The heading of figures of runs beside each other.
pub(super) const FIGURE_COMPARISON: &str = "Comparison of figures";
/// The heading of what held senders up.
pub(super) const SENDER: &str = "Sender";
/// The heading of the kernel's time stamps.
pub(super) const SEGMENTS: &str = "Segments";
/// The heading of the largest samples.
pub(super) const WORST: &str = "Largest samples";
/// Ratios are shown of these.
const COMPARED: [f64; 3] = [50.0, 99.0, 99.9];

/// What one sample is, in a word.
pub(super) const fn sample_name(sample: Sample) -> &'static str {
    match sample {
        Sample::Rtt => "rtt",
        Sample::OneWay => "one-way",
        Sample::Request => "request",
        Sample::ClockOffset => "offset",
        Sample::Step => "step",
    }
}

/// What one sample is, in a sentence.
pub(super) const fn sample_meaning(sample: Sample) -> &'static str {
    match sample {
        Sample::Rtt => "rtt: from a send to the answer's arrival, not halved",
        Sample::OneWay => "one-way: from a send to the arrival at the other side, by clocks that agree",
        Sample::Request => "request: from a request to its answer, with the server's work",
        Sample::ClockOffset => "offset: the distance of two clocks, without its sign",
        Sample::Step => "step: the time that a step of a computation took",
    }
}

/// All tables that have rows, in the order in which they are read.
pub(super) fn all(report: &Report) -> Vec<Grid> {
    let tables = [summary, figures, claims, comparison, figure_comparison, sender, segments, worst];
    tables.into_iter().map(|table| table(report)).filter(|grid| !grid.is_empty()).collect()
}

/// The columns that say which stream a row is about.
fn who() -> Vec<Column> {
    vec![Column::words("results").if_any(), Column::words("run"), Column::words("stream")]
}

fn who_cells(report: &Report, sampled: &Sampled<'_>) -> Vec<Cell> {
    let source = (report.sources.len() > 1).then_some(&sampled.source.label);
    vec![Cell::of(source), Cell::words(&sampled.run.name), Cell::words(&sampled.stream.name)]
}

/// The unit in which the times of these distributions are shown.
fn unit_of<'a>(distributions: impl Iterator<Item = &'a Distribution>) -> Unit {
    let times = distributions.flat_map(|times| {
        let percentiles = times.percentiles.iter().map(|percentile| percentile.ns);
        percentiles.chain(times.max_ns)
    });
    Unit::of(times.map(|ns| ns as f64))
}

fn time(unit: Unit, ns: Option<u64>) -> Cell {
    Cell::of(ns.map(|ns| unit.number(ns as f64)))
}

fn percentile(unit: Unit, distribution: &Distribution, percent: f64) -> Cell {
    let found = compare::find(distribution, percent);
    let end = |ns: u64| unit.brief(ns as f64);
    let interval = found
        .map(|percentile| format!("{}–{}", end(percentile.low_ns), percentile.high_ns.map_or("?".to_owned(), end)));
    time(unit, found.map(|percentile| percentile.ns)).within(interval)
}

/// Latencies, losses and bounds of every stream.
pub(super) fn summary(report: &Report) -> Grid {
    let unit = unit_of(report.streams().map(|sampled| &sampled.stream.response));
    let of = |name: &str| format!("{name} {}", unit.name());
    let mut columns = who();
    columns.push(Column::words("sample"));
    columns.push(Column::number("level").if_any());
    columns.extend(["samples", "lost"].map(Column::number));
    columns.extend(["lost up", "lost down", "limiter dropped"].map(|name| Column::number(name).if_any()));
    for (place, percent) in PERCENTS.into_iter().enumerate() {
        let column = Column::number(of(&format!("p{percent}")));
        columns.push(if place < ALWAYS { column } else { column.if_any() });
    }
    columns.push(Column::number(of("max")));
    columns.extend([of("bound"), "over bound".to_owned()].map(|name| Column::number(name).if_any()));
    let mut grid = Grid::new(SUMMARY, columns);
    for sampled in report.streams() {
        let stream = sampled.stream;
        let counts = stream.counts.as_ref();
        let mut row = who_cells(report, &sampled);
        row.push(Cell::words(sample_name(stream.sample)));
        row.push(Cell::of(stream.level));
        row.push(Cell::of(Some(stream.response.samples)));
        row.push(Cell::of(counts.map(|counts| counts.lost)));
        row.push(Cell::of(counts.and_then(|counts| counts.lost_up)));
        row.push(Cell::of(counts.and_then(|counts| counts.lost_down)));
        row.push(Cell::of(counts.and_then(|counts| counts.limiter_dropped)));
        row.extend(PERCENTS.map(|percent| percentile(unit, &stream.response, percent)));
        row.push(time(unit, stream.response.max_ns));
        row.push(time(unit, stream.bound_ns));
        row.push(Cell::of(stream.violations));
        grid.row(row);
    }
    grid.about = about_summary(report);
    grid
}

fn about_summary(report: &Report) -> String {
    let mut kinds: Vec<&str> = report.streams().map(|sampled| sample_meaning(sampled.stream.sample)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut about: String = kinds.iter().map(|kind| format!("{kind}. ")).collect();
    about += "Times count from the intended send.";
    about += &durations(report);
    let hidden = |sampled: Sampled<'_>| {
        PERCENTS[..ALWAYS].iter().any(|&percent| compare::find(&sampled.stream.response, percent).is_none())
    };
    if report.streams().any(hidden) {
        about += " A percentile is - where fewer than ten samples lie beyond it.";
    }
    about
}

/// For how long runs were measured.
fn durations(report: &Report) -> String {
    let runs = report.sources.iter().flat_map(|source| &source.document.runs).filter(|run| run.duration_ns > 0);
    let shown = |run: &Run| match run.warm_up_ns {
        0 => show_ns(run.duration_ns as f64),
        warm_up => format!("{} after a warm-up of {}", show_ns(run.duration_ns as f64), show_ns(warm_up as f64)),
    };
    let mut all: Vec<(&str, String)> = runs.map(|run| (run.name.as_str(), shown(run))).collect();
    all.dedup();
    match all.as_slice() {
        [] => String::new(),
        [(_, first), others @ ..] if others.iter().all(|(_, other)| other == first) => {
            format!(" Measured for {first}.")
        }
        several => {
            let several: Vec<String> = several.iter().map(|(name, shown)| format!("{name} {shown}")).collect();
            format!(" Measured for: {}.", several.join(", "))
        }
    }
}

/// Single figures: a column for each, a row for each run.
fn figures(report: &Report) -> Grid {
    let names = figure_names(report);
    let scales: Vec<(f64, String)> = names.iter().map(|(name, unit)| figure_scale(report, name, unit)).collect();
    let mut columns = vec![Column::words("results").if_any(), Column::words("run")];
    columns.extend(names.iter().zip(&scales).map(|((name, _), (_, unit))| Column::number(format!("{name} {unit}"))));
    let mut grid = Grid::new(FIGURES, columns);
    for source in &report.sources {
        for run in source.document.runs.iter().filter(|run| !run.figures.is_empty()) {
            let label = (report.sources.len() > 1).then_some(&source.label);
            let mut row = vec![Cell::of(label), Cell::words(&run.name)];
            row.extend(names.iter().zip(&scales).map(|((name, unit), (scale, _))| {
                let found = run.figures.iter().find(|figure| (&figure.name, &figure.unit) == (name, unit));
                Cell::of(found.map(|figure| digits(figure.value / scale)))
            }));
            grid.row(row);
        }
    }
    grid
}

/// Names and units of all figures, each once.
fn figure_names(report: &Report) -> Vec<(String, String)> {
    let mut names: Vec<(String, String)> = Vec::new();
    for figure in all_figures(report) {
        if !names.iter().any(|(name, unit)| (name, unit) == (&figure.name, &figure.unit)) {
            names.push((figure.name.clone(), figure.unit.clone()));
        }
    }
    names
}

fn all_figures(report: &Report) -> impl Iterator<Item = &Figure> {
    report.sources.iter().flat_map(|source| source.document.runs.iter().flat_map(|run| run.figures.iter()))
}

/// By how much figures of one name are divided, and their unit then.
fn figure_scale(report: &Report, name: &str, unit: &str) -> (f64, String) {
    let same = all_figures(report).filter(|figure| figure.name == name && figure.unit == unit);
    let largest = same.map(|figure| figure.value.abs()).filter(|value| value.is_finite()).fold(0.0, f64::max);
    let steps: &[(f64, &str)] = match unit {
        "bit/s" => &[(1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")],
        "ns" => &[(1e9, "s"), (1e6, "ms"), (1e3, "us")],
        _ => &[],
    };
    match steps.iter().find(|(scale, _)| largest >= *scale) {
        Some((scale, unit)) => (*scale, (*unit).to_owned()),
        None if unit == "1" => (1.0, String::new()),
        None => (1.0, unit.to_owned()),
    }
}

/// Four digits at least, and no more behind the point than they need.
fn digits(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 1e15 => return format!("{value:e}"),
        size if size >= 1000.0 || size == 0.0 => 0,
        size if size >= 100.0 => 1,
        size if size >= 10.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn claims(report: &Report) -> Grid {
    let columns = ["results", "verdict", "claim", "measured"].map(Column::words);
    let [results, verdict, claim, measured] = columns;
    let mut grid = Grid::new(CLAIMS, vec![verdict, results.if_any(), claim, measured]);
    for source in &report.sources {
        for claim in &source.document.claims {
            grid.row(vec![
                Cell::words(verdict_name(claim.holds)),
                Cell::of((report.sources.len() > 1).then_some(&source.label)),
                Cell::words(&claim.claim),
                Cell::words(&claim.measured),
            ]);
        }
    }
    grid
}

const fn verdict_name(holds: Option<bool>) -> &'static str {
    match holds {
        Some(true) => "holds",
        Some(false) => "does not hold",
        None => "undecided",
    }
}

/// Latencies of runs, as multiples of another's.
fn comparison(report: &Report) -> Grid {
    let mut columns = Vec::from(["run", "against", "stream"].map(Column::words));
    columns.extend(COMPARED.map(|percent| Column::number(format!("p{percent}"))));
    columns.push(Column::number("max"));
    let mut grid = Grid::new(COMPARISON, columns);
    let ratio = |ratio: Option<Ratio>| Cell::of(ratio).within(ratio.and_then(|ratio| ratio.interval()));
    for pair in compare::pairs(report) {
        for (stream, other) in pair.streams() {
            let mut row = pair_cells(report, &pair);
            row.push(Cell::words(&stream.name));
            row.extend(COMPARED.map(|percent| ratio(compare::percentile(&stream.response, &other.response, percent))));
            row.push(ratio(compare::largest(&stream.response, &other.response)));
            grid.row(row);
        }
    }
    grid.about =
        "Each value over the other run's. Below 1 is quicker. Intervals: if both percentiles lie in their own \
                  (each with a confidence of 95 %)."
            .to_owned();
    grid
}

fn pair_cells(report: &Report, pair: &compare::Pair<'_>) -> Vec<Cell> {
    let several = report.sources.len() > 1;
    let name = |(source, run): (&super::Source, &Run)| {
        Cell::words(&if several { format!("{}, {}", source.label, run.name) } else { run.name.clone() })
    };
    vec![name(pair.run), name(pair.against)]
}

fn figure_comparison(report: &Report) -> Grid {
    let columns = ["run", "against", "figure"].map(Column::words);
    let columns = columns.into_iter().chain([Column::number("times as much")]).collect();
    let mut grid = Grid::new(FIGURE_COMPARISON, columns);
    for pair in compare::pairs(report) {
        for (figure, ratio) in pair.figures() {
            let mut row = pair_cells(report, &pair);
            row.extend([Cell::words(&figure.name), Cell::of(Some(ratio))]);
            grid.row(row);
        }
    }
    grid
}

/// What held the sender up, where that was measured.
fn sender(report: &Report) -> Grid {
    let measured = || report.streams().filter(|s| s.stream.service.is_some() || s.stream.lateness.is_some());
    let parts = |s: Sampled<'_>| [Some(s.stream.response.clone()), s.stream.service.clone(), s.stream.lateness.clone()];
    let all: Vec<Distribution> = measured().flat_map(parts).flatten().collect();
    let unit = unit_of(all.iter());
    let mut columns = who();
    for what in ["response", "service", "lateness"] {
        columns
            .extend(["p50", "p99"].map(|percent| Column::number(format!("{what} {percent} {}", unit.name())).if_any()));
    }
    columns.push(Column::words("generator"));
    let mut grid = Grid::new(SENDER, columns);
    for sampled in measured() {
        let stream = sampled.stream;
        let mut row = who_cells(report, &sampled);
        for times in [Some(&stream.response), stream.service.as_ref(), stream.lateness.as_ref()] {
            row.extend([50.0, 99.0].map(|percent| match times {
                Some(times) => percentile(unit, times, percent),
                None => Cell::of(None::<u8>),
            }));
        }
        row.push(Cell::of(stream.generator.as_ref().map(|generator| if generator.limited { "limited" } else { "ok" })));
        grid.row(row);
    }
    grid.about =
        "response: from the intended send; service: from the actual send; lateness: of the sender's own sends. \
                  What response has beyond service, the sender waited for its own limiter, queue or CPU."
            .to_owned();
    grid
}

/// The way of messages, split by the kernel's time stamps.
fn segments(report: &Report) -> Grid {
    let all = || report.streams().flat_map(|s| s.stream.segments.iter().map(move |segment| (s, segment)));
    let unit = unit_of(all().map(|(_, segment)| &segment.times));
    let mut columns = who();
    columns.push(Column::words("segment"));
    columns.extend(["samples", "missing"].map(Column::number));
    columns.extend(["mean", "p50", "p99", "max"].map(|name| Column::number(format!("{name} {}", unit.name()))));
    let mut grid = Grid::new(SEGMENTS, columns);
    for (sampled, segment) in all() {
        let times = &segment.times;
        let mut row = who_cells(report, &sampled);
        row.push(Cell::words(&segment.name));
        row.extend([times.samples, segment.missing].map(|count| Cell::of(Some(count))));
        row.push(time(unit, times.mean_ns));
        row.extend([50.0, 99.0].map(|percent| percentile(unit, times, percent)));
        row.push(time(unit, times.max_ns));
        grid.row(row);
    }
    grid.about =
        "From one of the kernel's time stamps to the next. missing: messages for which one of the two did not \
                  come. Means add up; percentiles do not."
            .to_owned();
    grid
}

/// The largest samples of every stream.
fn worst(report: &Report) -> Grid {
    let all = || report.streams().flat_map(|s| s.stream.worst.iter().map(move |worst| (s, worst)));
    let unit = Unit::of(all().map(|(_, worst)| worst.ns as f64));
    let mut columns = who();
    columns.extend(["number", "at s"].map(Column::number));
    columns.extend(["response", "sent late"].map(|name| Column::number(format!("{name} {}", unit.name()))));
    let mut grid = Grid::new(WORST, columns);
    for (sampled, worst) in all() {
        let mut row = who_cells(report, &sampled);
        row.push(Cell::of(Some(worst.sequence)));
        row.push(Cell::of(Some(Unit::Second.number(worst.at_ns as f64))));
        row.extend([worst.ns, worst.lateness_ns].map(|ns| time(unit, Some(ns))));
        grid.row(row);
    }
    grid
}

/// What a reader must know about single streams, in sentences.
pub(super) fn verdicts(report: &Report) -> Vec<String> {
    let mut verdicts = Vec::new();
    for sampled in report.streams() {
        let (stream, label) = (sampled.stream, report.label(&sampled));
        if let (Some(over @ 1..), Some(bound)) = (stream.violations, stream.bound_ns) {
            let largest = stream.response.max_ns.unwrap_or(0);
            verdicts.push(format!(
                "{label}: {over} of {} samples over the bound of {}, the largest {} times as long.",
                stream.response.samples,
                show_ns(bound as f64),
                compare::show(largest as f64 / bound.max(1) as f64)
            ));
        }
        if let Some(generator) = stream.generator.as_ref().filter(|generator| generator.limited) {
            let why = generator.why.as_deref().unwrap_or("the sender, not the network, decided the result");
            verdicts.push(format!("{label}: generator-limited: {why}"));
        }
        if stream.response.samples == 0 {
            verdicts.push(format!("{label}: no samples."));
        }
        let counts = stream.counts.unwrap_or_default();
        let odd = [
            (counts.duplicated, "came again"),
            (counts.reordered, "came after a later one"),
            (counts.corrupted, "came changed"),
            (counts.refused, "refused by the kernel"),
        ];
        let odd: Vec<String> =
            odd.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        if !odd.is_empty() {
            verdicts.push(format!("{label}: of {} messages sent, {}.", counts.sent, odd.join(", ")));
        }
    }
    let ordinary = |s: &Sampled<'_>| s.stream.generator.as_ref().is_some_and(|generator| !generator.real_time);
    let ordinary: Vec<String> = report.streams().filter(ordinary).map(|sampled| report.label(&sampled)).collect();
    if !ordinary.is_empty() {
        verdicts.push(format!("Without real-time priority (expect longer tails): {}.", ordinary.join("; ")));
    }
    for source in &report.sources {
        let empty = source.document.runs.iter().filter(|run| run.streams.is_empty() && run.figures.is_empty());
        verdicts.extend(empty.map(|run| format!("{}: run '{}' has no results.", source.label, run.name)));
        if source.document.runs.is_empty() && source.document.curves.is_empty() {
            verdicts.push(format!("{}: no runs.", source.label));
        }
    }
    verdicts
}

/// What the documents themselves want said first.
pub(super) fn notes(report: &Report) -> Vec<String> {
    let several = report.sources.len() > 1;
    let mut notes = Vec::new();
    for source in &report.sources {
        let label = if several { format!("{}: ", source.label) } else { String::new() };
        if source.document.emulated {
            notes.push(format!(
                "{label}Emulated: namespaces or virtual machines stood for hosts and switches. Look at ratios rather than \
                 at times."
            ));
        }
        notes.extend(source.document.notes.iter().map(|note| format!("{label}{note}")));
    }
    notes
}
