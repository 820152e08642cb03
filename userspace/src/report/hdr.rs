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
const TICKS_PER_HALF: u32 = 5;
/// Of a histogram with three significant digits.
const SUB_BUCKETS: u32 = 2048;

/// The percentile distribution, as HdrHistogram's `AbstractHistogram.outputPercentileDistribution(out, 5, 1.0)` writes
/// it. Values are ns.
pub(super) fn hgrm(distribution: &Distribution) -> String {
    let histogram = histogram(distribution);
    let mut text = format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    let mut seen = 0u64;
    for step in histogram.iter_quantiles(TICKS_PER_HALF) {
        seen = seen.saturating_add(step.count_since_last_iteration());
        let (value, share) = (step.value_iterated_to() as f64, step.quantile_iterated_to());
        let _ = write!(text, "{value:12.3} {share:.12} {seen:10}");
        let _ = if share < 1.0 { writeln!(text, " {:14.2}", 1.0 / (1.0 - share)) } else { writeln!(text) };
    }
    let (mean, deviation) = (histogram.mean(), histogram.stdev());
    let largest = distribution.max_ns.unwrap_or(histogram.max()) as f64;
    let _ = writeln!(text, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]");
    let _ = writeln!(text, "#[Max     = {largest:12.3}, Total count    = {:12}]", histogram.len());
    let _ = writeln!(text, "#[Buckets = {:12}, SubBuckets     = {SUB_BUCKETS:12}]", histogram.buckets());
    text
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
    builder.add_comment("[Histogram log format version 1.3]");
    builder.add_comment(&clean(&format!("{}: response times in ns; tags are run/stream", report.title())));
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
    use crate::measure::{
        Latencies,
        result::{Document, Run, Stream},
    };
    use hdrhistogram::serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    };
    use proptest::prelude::*;

    fn distribution(times: &[u64]) -> Distribution {
        let mut latencies = Latencies::new(None);
        times.iter().for_each(|&time| latencies.record(time));
        latencies.distribution()
    }

    #[test]
    fn a_percentile_distribution_is_what_other_tools_read() {
        let text = hgrm(&distribution(&(1..=1000).collect::<Vec<u64>>()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "       Value     Percentile TotalCount 1/(1-Percentile)");
        assert_eq!(lines[1], "");
        assert_eq!(lines[2], "       1.000 0.000000000000          1           1.00");
        assert!(text.contains("\n     500.000 0.500000000000        500           2.00\n"), "{text}");
        assert!(text.contains("\n    1000.000 1.000000000000       1000\n#[Mean    =      500.500, Std"), "{text}");
        assert!(text.contains("#[Max     =     1000.000, Total count    =         1000]\n"), "{text}");
        let empty = hgrm(&Distribution::default());
        assert!(empty.contains("Total count    =            0]"), "{empty}");
    }

    proptest! {
        #[test]
        fn a_percentile_distribution_ascends_to_all_samples(times in prop::collection::vec(1u64..60_000_000_000, 1..300)) {
            let text = hgrm(&distribution(&times));
            let rows: Vec<Vec<f64>> = text
                .lines()
                .skip(2)
                .filter(|line| !line.starts_with('#'))
                .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
                .collect();
            for pair in rows.windows(2) {
                prop_assert!(pair[0][0] <= pair[1][0] && pair[0][1] < pair[1][1] && pair[0][2] <= pair[1][2]);
            }
            let last = rows.last().unwrap();
            prop_assert_eq!((last[1], last[2] as usize), (1.0, times.len()));
            prop_assert!((last[0] / *times.iter().max().unwrap() as f64 - 1.0).abs() < 2e-3);
        }

        #[test]
        fn a_log_is_read_back_whole(
            times in prop::collection::vec(1u64..60_000_000_000, 0..300), run in "\\PC{0,20}", stream in "[ -~]{0,20}",
        ) {
            let response = distribution(&times);
            let stream = Stream { name: stream, response: response.clone(), ..Stream::default() };
            let run = Run { name: run, duration_ns: 1_500_000_000, streams: vec![stream], ..Run::default() };
            let mut document = Document::new("measurement", "a\ntitle");
            document.runs = vec![run.clone(), run];
            let log = hlog(&Report::new(vec![document]));
            let entries: Vec<_> = IntervalLogIterator::new(log.as_bytes()).map(Result::unwrap).collect();
            let intervals: Vec<_> = entries
                .iter()
                .filter_map(|entry| match entry {
                    LogEntry::Interval(interval) => Some(interval),
                    _ => None,
                })
                .collect();
            prop_assert_eq!(intervals.len(), 2);
            for interval in intervals {
                prop_assert_eq!(interval.duration(), Duration::from_millis(1_500));
                prop_assert!(interval.tag().is_some());
                let bytes = base64(interval.encoded_histogram());
                let read: Histogram<u64> = Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
                let pairs: Vec<(u64, u64)> =
                    read.iter_recorded().map(|step| (step.value_iterated_to(), step.count_since_last_iteration())).collect();
                prop_assert_eq!(&pairs, &response.histogram);
            }
        }
    }

    /// RFC 4648.
    fn base64(text: &str) -> Vec<u8> {
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digits = text.bytes().filter_map(|letter| alphabet.iter().position(|&known| known == letter));
        let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0);
        for digit in digits {
            (bits, held) = (bits << 6 | digit as u32, held + 6);
            if held >= 8 {
                held -= 8;
                bytes.push((bits >> held) as u8);
            }
        }
        bytes
    }
}
