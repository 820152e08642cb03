//! The report as text, and the summary for scripts.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{Report, compare, tables};
use crate::{
    chart::clean,
    measure::result::{Distribution, Document},
};

/// More of the largest samples than this are left to the page.
const WORST: usize = 20;

pub(super) fn text(report: &Report, intervals: bool) -> String {
    let mut text = String::new();
    let line = |text: &mut String, line: &str| {
        // A string takes everything.
        let _ = writeln!(text, "{}", clean(line));
    };
    line(&mut text, &report.title());
    for source in &report.sources {
        let document = &source.document;
        let name = if report.sources.len() > 1 { format!("{}: ", source.label) } else { String::new() };
        line(&mut text, &format!("{name}{}, {}", document.tool, utc(document.started_unix_ns)));
    }
    for note in tables::notes(report) {
        line(&mut text, &format!("note: {note}"));
    }
    for (number, grid) in tables::all(report).into_iter().enumerate() {
        if grid.title == tables::WORST && grid.len() > WORST {
            continue;
        }
        text.push('\n');
        if number > 0 {
            line(&mut text, grid.title);
        }
        text += &grid.text(intervals);
        if !grid.about.is_empty() {
            line(&mut text, &grid.about);
        }
    }
    let verdicts = tables::verdicts(report);
    if !verdicts.is_empty() {
        text.push('\n');
    }
    for verdict in verdicts {
        line(&mut text, &verdict);
    }
    text
}

/// A document without what takes space.
pub(super) fn summary(document: &Document) -> Document {
    let mut document = document.clone();
    let short = |distribution: &mut Distribution| distribution.histogram = Vec::new();
    for stream in document.runs.iter_mut().flat_map(|run| run.streams.iter_mut()) {
        stream.series = Vec::new();
        short(&mut stream.response);
        stream.service.iter_mut().chain(&mut stream.lateness).for_each(short);
        stream.segments.iter_mut().map(|segment| &mut segment.times).for_each(short);
    }
    document
}

pub(super) fn comparisons_json(report: &Report) -> Value {
    let shown = |ratio: Option<compare::Ratio>| {
        ratio.map(|ratio| json!({"value": ratio.value, "low": ratio.interval.and_then(|i| i.0), "high": ratio.interval.and_then(|i| i.1)}))
    };
    let comparisons: Vec<Value> = compare::pairs(report)
        .iter()
        .map(|pair| {
            let streams: Vec<Value> = pair
                .streams()
                .iter()
                .map(|(stream, other)| {
                    let ratio = |percent| shown(compare::percentile(&stream.response, &other.response, percent));
                    json!({
                        "stream": stream.name,
                        "p50": ratio(50.0),
                        "p99": ratio(99.0),
                        "p999": ratio(99.9),
                        "max": shown(compare::largest(&stream.response, &other.response)),
                    })
                })
                .collect();
            let figures: Vec<Value> = pair
                .figures()
                .iter()
                .map(|(figure, ratio)| json!({"name": figure.name, "unit": figure.unit, "value": ratio.value}))
                .collect();
            json!({
                "run": {"results": pair.run.0.label, "name": pair.run.1.name},
                "against": {"results": pair.against.0.label, "name": pair.against.1.name},
                "streams": streams,
                "figures": figures,
            })
        })
        .collect();
    comparisons.into()
}

/// A time since 1970 as a date (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days).
pub fn utc(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000;
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_what_date_says() {
        // date -u -d @N
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_391_999, "2026-11-22 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000_000_000), date);
        }
        assert!(utc(u64::MAX).starts_with("2554-"));
    }
}
