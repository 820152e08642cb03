//! A/B/A/B: one measurement without and with something, in turns, and what it changes.
//!
//! Each round measures both sides, one right after the other, so that what drifts (a neighbour on the machine, a warming
//! cache) hits both alike; the ratio of a round is with / without. The ratio that is reported is the geometric mean of the
//! rounds' ratios, and its interval is Student's t over their logarithms: 95 % confidence if rounds do not depend on each
//! other. Percentiles themselves are not averaged over rounds.

use serde::{Deserialize, Serialize};

use super::result::{Curve, Run, Sample};

/// One of the two sides of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Without.
    Off,
    /// With.
    On,
}

impl Side {
    /// `off` or `on`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
        }
    }
}

/// Measures each side once a round, off first, for so many rounds. With an error, and if `measure` returns `None` because
/// somebody has stopped it, the whole rounds until then are kept.
///
/// # Errors
/// The first of `measure`, beside the whole rounds before it.
pub fn alternate<T, E>(
    rounds: usize,
    mut measure: impl FnMut(usize, Side) -> Result<Option<T>, E>,
) -> (Vec<(T, T)>, Result<(), E>) {
    let mut whole = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let mut one = |side| measure(round, side);
        match one(Side::Off).and_then(|off| Ok(off.zip(one(Side::On)?))) {
            Ok(Some(pair)) => whole.push(pair),
            Ok(None) => break,
            Err(error) => return (whole, Err(error)),
        }
    }
    (whole, Ok(()))
}

/// How one figure compares.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// `udp level 7: p99`, `goodput`.
    pub name: String,
    /// Of the figure itself.
    pub unit: String,
    /// The median of the rounds without.
    pub off: f64,
    /// The median of the rounds with.
    pub on: f64,
    /// With / without: the geometric mean over rounds.
    pub ratio: f64,
    /// In which it lies with 95 % confidence; absent with one round.
    pub interval: Option<(f64, f64)>,
    /// Rounds that have the figure on both sides.
    pub rounds: usize,
}

impl Ratio {
    /// Whether the interval is wholly on one side of 1: below, so that it got smaller, or above. `None` if it may be
    /// either.
    pub fn direction(&self) -> Option<std::cmp::Ordering> {
        let (low, high) = self.interval?;
        match (high < 1.0, low > 1.0) {
            (true, _) => Some(std::cmp::Ordering::Less),
            (_, true) => Some(std::cmp::Ordering::Greater),
            _ => None,
        }
    }
}

/// Compares one figure: pairs of (without, with), a round each. `None` without a round in which both are above 0.
pub fn ratio(name: &str, unit: &str, pairs: &[(f64, f64)]) -> Option<Ratio> {
    let usable: Vec<(f64, f64)> =
        pairs.iter().copied().filter(|(off, on)| *off > 0.0 && *on > 0.0 && (on / off).is_finite()).collect();
    let logs: Vec<f64> = usable.iter().map(|(off, on)| (on / off).ln()).collect();
    let rounds = logs.len();
    if rounds == 0 {
        return None;
    }
    let mean = logs.iter().sum::<f64>() / rounds as f64;
    let interval = (rounds > 1).then(|| {
        let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (rounds - 1) as f64;
        let half = student_t(rounds - 1) * (variance / rounds as f64).sqrt();
        ((mean - half).exp(), (mean + half).exp())
    });
    Some(Ratio {
        name: name.into(),
        unit: unit.into(),
        off: median(usable.iter().map(|(off, _)| *off)),
        on: median(usable.iter().map(|(_, on)| *on)),
        ratio: mean.exp(),
        interval,
        rounds,
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

/// The 97.5 % quantile of Student's t distribution, rounded up.
fn student_t(degrees: usize) -> f64 {
    const TABLE: [f64; 30] = [
        12.707, 4.303, 3.183, 2.777, 2.571, 2.447, 2.365, 2.307, 2.263, 2.229, 2.201, 2.179, 2.161, 2.145, 2.132, 2.120,
        2.110, 2.101, 2.094, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.049, 2.046, 2.043,
    ];
    // Beyond the table, its last value is a little too large: the interval a little too wide.
    TABLE[degrees.clamp(1, TABLE.len()) - 1]
}

/// The figures of a run that can be compared: name, unit, value.
fn figures(run: &Run) -> Vec<(String, &str, f64)> {
    let mut figures = Vec::new();
    for stream in &run.streams {
        let about = if stream.sample == Sample::ClockOffset { "offset" } else { "response" };
        for percentile in &stream.response.percentiles {
            figures.push((format!("{}: {about} p{}", stream.name, percentile.percent), "ns", percentile.ns as f64));
        }
        figures.extend(stream.response.max_ns.map(|max| (format!("{}: {about} max", stream.name), "ns", max as f64)));
        let service = stream.service.iter().flat_map(|service| &service.percentiles);
        for percentile in service.filter(|percentile| percentile.percent == 50.0 || percentile.percent == 99.0) {
            figures.push((format!("{}: service p{}", stream.name, percentile.percent), "ns", percentile.ns as f64));
        }
    }
    figures.extend(run.figures.iter().map(|figure| (figure.name.clone(), figure.unit.as_str(), figure.value)));
    figures
}

/// Compares all that the runs of both sides have in common, in the order of the first run.
pub fn compare(rounds: &[(Run, Run)]) -> Vec<Ratio> {
    let Some((first, _)) = rounds.first() else { return Vec::new() };
    let rounds: Vec<_> = rounds.iter().map(|(off, on)| (figures(off), figures(on))).collect();
    let value = |figures: &[(String, &str, f64)], name: &str| {
        figures.iter().find(|figure| figure.0 == name).map(|figure| figure.2)
    };
    figures(first)
        .iter()
        .filter_map(|(name, unit, _)| {
            let pairs: Vec<(f64, f64)> =
                rounds.iter().filter_map(|(off, on)| Some((value(off, name)?, value(on, name)?))).collect();
            ratio(name, unit, &pairs)
        })
        .collect()
}

/// The ratios as a line each for the document: one point a round would hide the interval, so low, ratio and high.
pub fn curves(ratios: &[Ratio]) -> Vec<Curve> {
    ratios
        .iter()
        .map(|ratio| {
            let (low, high) = ratio.interval.unwrap_or((ratio.ratio, ratio.ratio));
            Curve {
                picture: "with / without".into(),
                name: ratio.name.clone(),
                x: "low, ratio and high of 95 %".into(),
                y: "with / without".into(),
                points: vec![(0.0, low), (1.0, ratio.ratio), (2.0, high)],
            }
        })
        .collect()
}
