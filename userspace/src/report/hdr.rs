//! The text formats of HdrHistogram, which its plotters and log readers take.

use std::{
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

use hdrhistogram::{
    Histogram,
    serialization::{
        V2DeflateSerializer,
        interval_log::{IntervalLogWriterBuilder, Tag},
    },
};

use super::Report;
use crate::{chart::clean, measure::result::Distribution};

/// Steps within each halving of the distance to 100 %, as HdrHistogram's own output has.
const TICKS_PER_HALF: f64 = 5.0;

/// The percentile distribution: `outputPercentileDistribution(out, 5, 1.0)` of HdrHistogram's AbstractHistogram. Values
/// are ns.
pub(super) fn hgrm(distribution: &Distribution) -> String {
    let total = distribution.histogram.iter().fold(0u64, |sum, pair| sum.saturating_add(pair.1));
    let mut text = format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let (mut seen, mut goal) = (0u64, 0.0);
    let counted = distribution.histogram.iter().filter(|pair| pair.1 > 0);
    for &(value, count) in counted {
        seen = seen.saturating_add(count);
        let share = seen as f64 / total as f64;
        if share < goal || seen == total {
            continue;
        }
        let inverse = 1.0 / (1.0 - share);
        let _ = writeln!(text, "{value:>8}.000 {share:.12} {seen:>10} {inverse:>14.2}");
        // The next one that this sample does not reach yet.
        while goal <= share {
            goal += 0.5f64.powf((1.0 / (1.0 - goal)).log2().floor() + 1.0) / TICKS_PER_HALF;
        }
    }
    let largest = distribution.max_ns.or(distribution.histogram.last().map(|pair| pair.0)).unwrap_or(0);
    let _ = writeln!(text, "{largest:>8}.000 {:.12} {total:>10}", 1.0);
    let (mean, deviation) = mean_and_deviation(distribution);
    let _ = writeln!(text, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]");
    let _ = writeln!(text, "#[Max     = {:>12.3}, Total count    = {total:>12}]", largest as f64);
    let histogram = histogram(distribution);
    let sub_buckets = 2048;
    let _ = writeln!(text, "#[Buckets = {:>12}, SubBuckets     = {sub_buckets:>12}]", histogram.buckets());
    text
}

fn mean_and_deviation(distribution: &Distribution) -> (f64, f64) {
    let pairs = || distribution.histogram.iter().map(|&(value, count)| (value as f64, count as f64));
    let total: f64 = pairs().map(|(_, count)| count).sum();
    if total == 0.0 {
        return (0.0, 0.0);
    }
    let mean = pairs().map(|(value, count)| value * count).sum::<f64>() / total;
    let variance = pairs().map(|(value, count)| (value - mean).powi(2) * count).sum::<f64>() / total;
    (mean, variance.sqrt())
}

/// The histogram again, with three significant digits.
fn histogram(distribution: &Distribution) -> Histogram<u64> {
    let mut histogram = Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are valid"));
    histogram.auto(true);
    for &(value, count) in &distribution.histogram {
        // It grows as needed, up to what 64 bits hold.
        let _ = histogram.record_n(value, count);
    }
    histogram
}

/// An interval log: one interval for each stream, as long as its run, with run and stream as its tag. Values are ns.
pub(super) fn hlog(report: &Report) -> String {
    let mut log = Vec::new();
    let started = report.sources.iter().map(|source| source.document.started_unix_ns).min().unwrap_or(0);
    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    let start = UNIX_EPOCH + Duration::from_nanos(started);
    builder.add_comment(&clean(&format!("[{}: response times in ns; tags are run/stream]", report.title())));
    builder.with_start_time(start).with_base_time(start);
    let mut writer = builder.begin_log_with(&mut log, &mut serializer).expect("a vector takes everything");
    for sampled in report.streams() {
        let name = format!("{}/{}", report_and_run(report, &sampled), sampled.stream.name);
        // A tag ends with a comma, and a line with its end.
        let tag = clean(&name).replace([',', ' '], "_");
        let begin = Duration::from_nanos(sampled.source.document.started_unix_ns.saturating_sub(started));
        let long = Duration::from_nanos(sampled.run.duration_ns);
        let histogram = histogram(&sampled.stream.response);
        writer.write_histogram(&histogram, begin, long, Tag::new(&tag)).expect("a vector takes everything");
    }
    drop(writer);
    String::from_utf8(log).expect("the log is text")
}

fn report_and_run(report: &Report, sampled: &super::Sampled<'_>) -> String {
    let run = &sampled.run.name;
    if report.sources.len() > 1 { format!("{}/{run}", sampled.source.label) } else { run.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hdrhistogram::serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    };
    use proptest::prelude::*;
}
