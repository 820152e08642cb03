//! Conditions on results: `p99.9<300us`, `7:max<bound`, `loss<0.1%`.

use std::str::FromStr;

use thiserror::Error;

use super::{
    Latencies,
    latencies::{BEYOND, is_shown},
    result::{Claim, Sample, Stream},
};
use crate::units::{Nanos, show_ns};

/// A condition that every stream it is about must meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Assertion {
    text: String,
    level: Option<u8>,
    way: Way,
    metric: Metric,
    or_equal: bool,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    RoundTrip,
    Up,
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Metric {
    Percentile(f64),
    Min,
    Mean,
    Max,
    Loss,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    Time(u64),
    Bound,
    Share(f64),
}

/// A condition that cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "'{text}' is no condition: {why}; write for example 'p99.9<300us', '7:max<bound', 'up:p50<20us' or 'loss<0.1%'"
)]
pub struct AssertionError {
    text: String,
    why: String,
}

impl FromStr for Assertion {
    type Err = AssertionError;

    fn from_str(text: &str) -> Result<Self, AssertionError> {
        let fail = |why: String| AssertionError { text: text.to_owned(), why };
        let (left, right) = text.split_once('<').ok_or_else(|| fail("it has no '<'".to_owned()))?;
        let (or_equal, right) = match right.strip_prefix('=') {
            Some(right) => (true, right.trim()),
            None => (false, right.trim()),
        };
        let mut parts: Vec<&str> = left.split(':').map(str::trim).collect();
        let metric = parts.pop().unwrap_or_default();
        let (mut level, mut way) = (None, Way::RoundTrip);
        for part in parts {
            match part {
                "up" => way = Way::Up,
                "down" => way = Way::Down,
                _ => {
                    let number = part.parse().ok().filter(|number| *number < 8);
                    level = Some(number.ok_or_else(|| fail(format!("'{part}' is neither a level nor up nor down")))?);
                }
            }
        }
        let metric = Metric::read(metric).map_err(fail)?;
        let limit = match (metric, right) {
            (Metric::Loss, share) => {
                let share = share.strip_suffix('%').and_then(|share| share.trim().parse::<f64>().ok());
                let share = share.filter(|share| (0.0..=100.0).contains(share));
                Limit::Share(
                    share.ok_or_else(|| fail("a loss is held against a share such as 0.1%".to_owned()))? / 100.0,
                )
            }
            (_, "bound") => Limit::Bound,
            (_, time) => Limit::Time(time.parse::<Nanos>().map_err(|error| fail(error.to_string()))?.ns()),
        };
        Ok(Self { text: text.to_owned(), level, way, metric, or_equal, limit })
    }
}

impl Metric {
    fn read(text: &str) -> Result<Self, String> {
        if let Some(percent) = text.strip_prefix('p').and_then(|number| number.parse::<f64>().ok()) {
            return if percent > 0.0 && percent < 100.0 {
                Ok(Self::Percentile(percent))
            } else {
                Err(format!("there is no percentile {percent}: it lies between 0 and 100"))
            };
        }
        match text {
            "min" => Ok(Self::Min),
            "mean" => Ok(Self::Mean),
            "max" => Ok(Self::Max),
            "loss" => Ok(Self::Loss),
            _ => Err(format!("'{text}' is neither a percentile such as p99.9, nor min, mean, max or loss")),
        }
    }
}

impl Assertion {
    /// The level whose bound it needs, or `Some(None)` if it needs that of every level.
    pub fn needs_bound(&self) -> Option<Option<u8>> {
        (self.limit == Limit::Bound).then_some(self.level)
    }

    fn is_about(&self, stream: &Stream) -> bool {
        let of_level = self.level.is_none_or(|level| stream.level == Some(level));
        let of_way = match self.way {
            Way::RoundTrip => matches!(stream.sample, Sample::Rtt | Sample::Request),
            Way::Up => stream.sample == Sample::OneWay && stream.name.ends_with(" up"),
            Way::Down => stream.sample == Sample::OneWay && stream.name.ends_with(" down"),
        };
        of_level && of_way
    }

    /// Whether all streams that it is about meet it, and what they have. What cannot be decided does not hold.
    pub fn check(&self, streams: &[Stream]) -> Claim {
        let about: Vec<&Stream> = streams.iter().filter(|stream| self.is_about(stream)).collect();
        let judged: Vec<(bool, String)> = about.iter().map(|stream| self.judge(stream)).collect();
        let measured = judged.iter().zip(&about).map(|((_, text), stream)| format!("{}: {text}", stream.name));
        let measured = if about.is_empty() {
            "nothing that it is about was measured".to_owned()
        } else {
            measured.collect::<Vec<_>>().join("; ")
        };
        Claim {
            claim: self.text.clone(),
            holds: Some(!judged.is_empty() && judged.iter().all(|(holds, _)| *holds)),
            measured,
        }
    }

    fn judge(&self, stream: &Stream) -> (bool, String) {
        if let Limit::Share(limit) = self.limit {
            let Some(counts) = stream.counts.filter(|counts| counts.sent > 0) else {
                return (false, "nothing was sent".to_owned());
            };
            let share = counts.lost as f64 / counts.sent as f64;
            let text = format!("{:.4}% ({} of {})", share * 100.0, counts.lost, counts.sent);
            return (share < limit || self.or_equal && share <= limit, text);
        }
        let limit = match self.limit {
            Limit::Time(limit) => limit,
            Limit::Bound | Limit::Share(_) => match stream.bound_ns {
                Some(bound) => bound,
                None => return (false, "there is no bound".to_owned()),
            },
        };
        let response = &stream.response;
        let value = match self.metric {
            Metric::Percentile(percent) => {
                let quantile = percent / 100.0;
                if !is_shown(response.samples, quantile) {
                    let needed = (BEYOND / (1.0 - quantile)).round();
                    let text = format!("hidden: {} samples, p{percent} needs {needed}", response.samples);
                    return (false, text);
                }
                Latencies::from_distribution(response).quantile_ns(quantile)
            }
            Metric::Min => response.min_ns,
            Metric::Mean => response.mean_ns,
            Metric::Max | Metric::Loss => response.max_ns,
        };
        match value {
            Some(value) => (value < limit || self.or_equal && value == limit, show_ns(value as f64)),
            None => (false, "no samples".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::result::Counts;

    fn stream(level: u8, times: impl Iterator<Item = u64>, bound_ns: Option<u64>, lost: u64) -> Stream {
        let mut latencies = Latencies::new(bound_ns);
        times.for_each(|time| latencies.record(time));
        let received = latencies.samples();
        Stream {
            name: format!("udp level {level}"),
            level: Some(level),
            bound_ns,
            response: latencies.distribution(),
            counts: Some(Counts { sent: received + lost, received, lost, ..Counts::default() }),
            ..Stream::default()
        }
    }

    fn holds(assertion: &str, streams: &[Stream]) -> bool {
        assertion.parse::<Assertion>().unwrap().check(streams).holds.unwrap()
    }

    #[test]
    fn judges_every_stream_that_it_is_about() {
        let streams = [
            stream(7, (1..=2_000).map(|n| n * 100), Some(200_000), 1),
            stream(0, (1..=2_000).map(|n| n * 1_000), None, 100),
        ];
        for (assertion, expected) in [
            ("7:max<bound", false),
            ("7:max<=bound", true),
            ("max<=bound", false),
            ("max<3ms", true),
            ("7:p50<101us", true),
            ("p50<101us", false),
            (" p99 < 1990us ", true),
            ("7 : min <= 100ns", true),
            ("7:min<100ns", false),
            ("7:mean<101us", true),
            ("7:loss<0.1%", true),
            ("loss<0.1%", false),
            ("0:loss<=5%", true),
            // Nothing that it is about.
            ("5:max<1s", false),
            ("up:max<1s", false),
        ] {
            assert_eq!(holds(assertion, &streams), expected, "{assertion}");
        }
    }

    #[test]
    fn a_hidden_percentile_does_not_hold_and_says_why() {
        let claim = "p99.9<1s".parse::<Assertion>().unwrap().check(&[stream(7, 1..=2_000, None, 0)]);
        assert_eq!(claim.holds, Some(false));
        assert_eq!(claim.measured, "udp level 7: hidden: 2000 samples, p99.9 needs 10000");
    }

    #[test]
    fn what_cannot_be_read_is_refused_with_the_reason() {
        for (text, part) in [
            ("p99", "no '<'"),
            ("p100<1ms", "between 0 and 100"),
            ("p0<1ms", "between 0 and 100"),
            ("q9<1ms", "neither a percentile"),
            ("p99<300", "no unit"),
            ("8:p99<1ms", "neither a level"),
            ("loss<1ms", "a share such as"),
            ("loss<bound", "a share such as"),
            ("sideways:p99<1ms", "neither a level nor up nor down"),
        ] {
            let error = text.parse::<Assertion>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
