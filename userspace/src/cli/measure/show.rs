//! Results for people.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    time::{Duration, Instant},
};

use crate::{
    measure::{
        result::{Claim, Distribution, Document, Run, Sample, Stream},
        train::Tick,
    },
    table::Table,
    units::{show_ns, show_rate},
};

pub fn time(ns: Option<u64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| show_ns(ns as f64))
}

/// A percentile, if it is shown.
pub fn percentile(distribution: &Distribution, percent: f64) -> Option<u64> {
    distribution.percentiles.iter().find(|shown| shown.percent == percent).map(|shown| shown.ns)
}

/// All of a run.
pub fn run(run: &Run) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{} measured, {} of warm-up left out; response: from when it was to be sent, service: from when it was\n",
        show_ns(run.duration_ns as f64),
        show_ns(run.warm_up_ns as f64)
    );
    let _ = writeln!(text, "{}", streams(run));
    for stream in run.streams.iter().filter(|stream| !stream.segments.is_empty()) {
        let _ = writeln!(text, "{}, the way of a message:\n{}", stream.name, segments(stream));
    }
    for stream in &run.streams {
        text += &details(stream);
    }
    text
}

fn streams(run: &Run) -> Table {
    let columns = [
        "stream",
        "",
        "samples",
        "lost",
        "p50",
        "p90",
        "p99",
        "95 % interval",
        "p99.9",
        "p99.99",
        "max",
        "bound",
        "over it",
    ];
    let mut table = Table::new(columns).left(0);
    for stream in &run.streams {
        let mut row = |name: String, what: &str, times: &Distribution, bound: bool| {
            let p99 = times.percentiles.iter().find(|shown| shown.percent == 99.0);
            let interval = p99.map(|p99| format!("{} - {}", show_ns(p99.low_ns as f64), time(p99.high_ns)));
            let over = stream.violations.filter(|_| bound).map(|over| over.to_string());
            let none = || "-".to_owned();
            table.row([
                name,
                what.to_owned(),
                times.samples.to_string(),
                stream.counts.filter(|_| bound).map_or_else(none, |counts| counts.lost.to_string()),
                time(percentile(times, 50.0)),
                time(percentile(times, 90.0)),
                time(percentile(times, 99.0)),
                interval.unwrap_or_else(none),
                time(percentile(times, 99.9)),
                time(percentile(times, 99.99)),
                time(times.max_ns),
                time(stream.bound_ns.filter(|_| bound)),
                over.unwrap_or_else(none),
            ]);
        };
        let kind = match stream.sample {
            Sample::OneWay => "one-way",
            Sample::Request => "request",
            _ => "rtt",
        };
        row(stream.name.clone(), &format!("{kind} response"), &stream.response, true);
        if let Some(service) = &stream.service {
            row(String::new(), "service", service, false);
        }
        if let Some(lateness) = &stream.lateness {
            row(String::new(), "sender late", lateness, false);
        }
    }
    table
}

fn segments(stream: &Stream) -> Table {
    let mut table = Table::new(["from-to", "samples", "missing", "min", "p50", "p99", "p99.9", "max"]).left(0);
    for segment in &stream.segments {
        let times = &segment.times;
        table.row([
            segment.name.clone(),
            times.samples.to_string(),
            segment.missing.to_string(),
            time(times.min_ns),
            time(percentile(times, 50.0)),
            time(percentile(times, 99.0)),
            time(percentile(times, 99.9)),
            time(times.max_ns),
        ]);
    }
    table
}

/// Losses, the largest samples, and the sender's health, as far as there is anything to say.
fn details(stream: &Stream) -> String {
    let mut text = String::new();
    let name = &stream.name;
    if let Some(counts) = &stream.counts {
        let _ = write!(text, "{name}: {} sent, {} answered, {} lost", counts.sent, counts.received, counts.lost);
        if stream.sample == Sample::Request {
            let _ = write!(text, ", {} corrupted", counts.corrupted);
        } else {
            let or_unknown = |count: Option<u64>| count.map_or_else(|| "unknown".to_owned(), |count| count.to_string());
            let _ = write!(
                text,
                " ({} on the way there, {} on the way back), {} duplicated, {} reordered, {} corrupted, {} refused by this host",
                or_unknown(counts.lost_up),
                or_unknown(counts.lost_down),
                counts.duplicated,
                counts.reordered,
                counts.corrupted,
                counts.refused
            );
        }
        let dropped = counts.limiter_dropped;
        let _ = writeln!(text, "{}", dropped.map_or_else(String::new, |n| format!(", {n} dropped by its limiter")));
    }
    if !stream.worst.is_empty() {
        let worst: Vec<String> = stream
            .worst
            .iter()
            .map(|worst| {
                let late = if worst.lateness_ns > 1_000 {
                    format!(", sent {} late", show_ns(worst.lateness_ns as f64))
                } else {
                    String::new()
                };
                format!(
                    "{} at {:.6} s (no. {}{late})",
                    show_ns(worst.ns as f64),
                    worst.at_ns as f64 / 1e9,
                    worst.sequence
                )
            })
            .collect();
        let _ = writeln!(text, "{name}: worst: {}", worst.join(", "));
    }
    if let Some(generator) = &stream.generator {
        if let Some(why) = &generator.why {
            let _ = writeln!(text, "{name}: GENERATOR-LIMITED: {why}");
        }
        if !generator.real_time {
            let _ = writeln!(text, "{name}: the sender had no real-time priority: other programs may have held it up");
        }
    }
    text
}

/// The single figures of a run.
pub fn figures(run: &Run) -> Table {
    let mut table = Table::new(["figure", "value"]).left(0);
    for figure in &run.figures {
        table.row([figure.name.clone(), quantity(figure.value, &figure.unit)]);
    }
    table
}

/// A value with its unit.
pub fn quantity(value: f64, unit: &str) -> String {
    match unit {
        "ns" => show_ns(value),
        "bit/s" => show_rate(value),
        "1" => format!("{}", (value * 1e3).round() / 1e3),
        _ => format!("{value:.1} {unit}"),
    }
}

/// The notes and claims of a document.
pub fn remarks(document: &Document) -> String {
    let mut text = String::new();
    for note in &document.notes {
        let _ = writeln!(text, "note: {note}");
    }
    for Claim { claim, holds, measured } in &document.claims {
        let verdict = if *holds == Some(true) { "holds" } else { "DOES NOT HOLD" };
        let _ = writeln!(text, "{claim}: {verdict} ({measured})");
    }
    text
}

/// One line on standard error that replaces itself on a terminal, and comes now and then elsewhere.
pub struct Progress {
    wanted: bool,
    terminal: bool,
    last: Option<Instant>,
    lines: Vec<String>,
}

impl Progress {
    /// Nothing shown yet, and nothing ever unless it is `wanted`.
    pub fn new(wanted: bool) -> Self {
        Self { wanted, terminal: std::io::stderr().is_terminal(), last: None, lines: Vec::new() }
    }

    /// A second of a stream is over.
    pub fn tick(&mut self, run: &str, names: &[String], tick: &Tick) {
        if !self.wanted {
            return;
        }
        self.lines.resize(names.len(), String::new());
        let interval = &tick.interval;
        self.lines[tick.train] = format!(
            "{}: {} sent, {} unanswered, p50 {}, max {}",
            names[tick.train],
            tick.sent,
            tick.sent - tick.received,
            time(interval.p50_ns),
            time(interval.max_ns)
        );
        // The last train's second is the last of this second.
        if tick.train + 1 < names.len() {
            return;
        }
        const PAUSE: Duration = Duration::from_secs(5);
        let due = self.last.is_none_or(|last| last.elapsed() >= PAUSE);
        if self.terminal || due {
            let line = format!("{run} {:6.1} s  {}", tick.until_ns as f64 / 1e9, self.lines.join("; "));
            let mut out = std::io::stderr();
            let _ = if self.terminal { write!(out, "\r\x1b[K{line}") } else { writeln!(out, "{line}") };
            self.last = Some(Instant::now());
        }
    }

    /// Ends the line.
    pub fn finish(&mut self) {
        if self.last.take().is_some() && self.terminal {
            eprintln!();
        }
    }
}
