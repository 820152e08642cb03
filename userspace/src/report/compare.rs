//! Runs beside each other: how many times as long, how many times as much.

use std::fmt;

use super::{Report, Source};
use crate::measure::result::{Distribution, Figure, Percentile, Run, Stream};

/// One value over another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ratio {
    pub value: f64,
    /// From the least that it can be to the most, if both values lie in their intervals (each with a confidence of
    /// 95 %, so at least 90 % for both). An end that lies beyond the last sample is absent.
    pub interval: Option<(Option<f64>, Option<f64>)>,
}

impl Ratio {
    fn of(value: f64, against: f64) -> Option<Self> {
        let ratio = value / against;
        (ratio.is_finite() && against != 0.0).then_some(Self { value: ratio, interval: None })
    }

    fn of_percentiles(value: &Percentile, against: &Percentile) -> Option<Self> {
        let over = |above: u64, below: u64| (below > 0).then(|| above as f64 / below as f64);
        let low = against.high_ns.and_then(|high| over(value.low_ns, high));
        let high = value.high_ns.and_then(|high| over(high, against.low_ns));
        let ratio = Self::of(value.ns as f64, against.ns as f64)?;
        Some(Self { interval: Some((low, high)), ..ratio })
    }

    /// From where to where it lies, for people.
    pub fn interval(&self) -> Option<String> {
        let end = |end: Option<f64>| end.map_or("?".to_owned(), show);
        self.interval.map(|(low, high)| format!("{}–{}", end(low), end(high)))
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(self.value))
    }
}

/// Three digits, or whole from 100 on.
pub(super) fn show(value: f64) -> String {
    let digits = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.995 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Two runs.
pub(super) struct Pair<'a> {
    pub run: (&'a Source, &'a Run),
    pub against: (&'a Source, &'a Run),
}

impl<'a> Pair<'a> {
    /// Streams of the same name, or the only ones.
    pub fn streams(&self) -> Vec<(&'a Stream, &'a Stream)> {
        let (ours, theirs) = (&self.run.1.streams, &self.against.1.streams);
        if let ([one], [other]) = (ours.as_slice(), theirs.as_slice()) {
            return vec![(one, other)];
        }
        let same = |stream: &'a Stream| Some((stream, theirs.iter().find(|other| other.name == stream.name)?));
        ours.iter().filter_map(same).collect()
    }

    /// Figures of the same name and unit.
    pub fn figures(&self) -> Vec<(&'a Figure, Ratio)> {
        let ratio = |figure: &'a Figure| {
            let same = |other: &&Figure| (&other.name, &other.unit) == (&figure.name, &figure.unit);
            let other = self.against.1.figures.iter().find(same)?;
            Some((figure, Ratio::of(figure.value, other.value)?))
        };
        self.run.1.figures.iter().filter_map(ratio).collect()
    }
}

/// The percentile of one distribution over that of the other, if both have it.
pub(super) fn percentile(one: &Distribution, other: &Distribution, percent: f64) -> Option<Ratio> {
    Ratio::of_percentiles(find(one, percent)?, find(other, percent)?)
}

/// The largest over the largest.
pub(super) fn largest(one: &Distribution, other: &Distribution) -> Option<Ratio> {
    Ratio::of(one.max_ns? as f64, other.max_ns? as f64)
}

/// A percentile, if it is there.
pub(super) fn find(distribution: &Distribution, percent: f64) -> Option<&Percentile> {
    distribution.percentiles.iter().find(|percentile| percentile.percent == percent)
}

/// What is compared: within a file each run with its first one, and across files each run with the first of its name.
pub(super) fn pairs(report: &Report) -> Vec<Pair<'_>> {
    let mut pairs = Vec::new();
    for source in &report.sources {
        let Some((first, others)) = source.document.runs.split_first() else { continue };
        pairs.extend(others.iter().map(|run| Pair { run: (source, run), against: (source, first) }));
    }
    for (number, source) in report.sources.iter().enumerate() {
        for run in &source.document.runs {
            let earlier = report.sources[..number].iter();
            let same = earlier.flat_map(|source| source.document.runs.iter().map(move |run| (source, run)));
            if let Some(against) = same.into_iter().find(|(_, other)| other.name == run.name) {
                pairs.push(Pair { run: (source, run), against });
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(ns: u64, low_ns: u64, high_ns: Option<u64>) -> Percentile {
        Percentile { percent: 99.0, ns, low_ns, high_ns }
    }

    #[test]
    fn a_ratio_is_at_least_low_over_high() {
        let ratio = Ratio::of_percentiles(&of(200, 180, Some(240)), &of(100, 90, Some(120))).unwrap();
        assert_eq!((ratio.value, ratio.interval), (2.0, Some((Some(1.5), Some(240.0 / 90.0)))));
        assert_eq!(ratio.interval().unwrap(), "1.50–2.67");
        let open = Ratio::of_percentiles(&of(200, 180, None), &of(100, 90, Some(120))).unwrap();
        assert_eq!(open.interval().unwrap(), "1.50–?");
    }

    #[test]
    fn nothing_over_nothing_is_no_ratio() {
        assert_eq!(Ratio::of(1.0, 0.0), None);
        assert_eq!(Ratio::of(f64::NAN, 1.0), None);
        assert_eq!(Ratio::of_percentiles(&of(0, 0, Some(0)), &of(0, 0, Some(0))), None);
        assert_eq!(Ratio::of(0.0, 5.0).unwrap().to_string(), "0.000");
    }

    #[test]
    fn ratios_have_three_digits() {
        assert_eq!([0.1234, 1.0, 12.34, 1234.5].map(show), ["0.123", "1.00", "12.3", "1234"]);
    }
}
