//! A/B/A/B: one measurement without and with something, in turns, and what it changes.
//!
//! Each round measures both sides, one right after the other, so that what drifts (a neighbour on the machine, a warming
//! cache) hits both alike; the ratio of a round is with / without. The ratio that is reported is the geometric mean of the
//! rounds' ratios, and its interval is Student's t over their logarithms: 95 % confidence if rounds do not depend on each
//! other. Percentiles themselves are not averaged over rounds.

use serde::{Deserialize, Serialize};

use super::result::{Figure, Run, Sample};
use crate::dataplane::{self, Request};

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
        12.707, 4.303, 3.183, 2.777, 2.571, 2.447, 2.365, 2.307, 2.263, 2.229, 2.201, 2.179, 2.161, 2.145, 2.132,
        2.120, 2.110, 2.101, 2.094, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.049, 2.046, 2.043,
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

/// The ratios as a case of results: each with the ends of its interval.
pub fn run(ratios: &[Ratio], rounds: usize) -> Run {
    let figure = |name: String, value: f64| Figure { name, value, unit: "1".into() };
    let figures = ratios.iter().flat_map(|ratio| {
        let ends = ratio.interval.map(|(low, high)| {
            [figure(format!("{}: low", ratio.name), low), figure(format!("{}: high", ratio.name), high)]
        });
        std::iter::once(figure(ratio.name.clone(), ratio.ratio)).chain(ends.into_iter().flatten())
    });
    Run {
        name: "on / off".into(),
        about: format!(
            "geometric mean of the ratios of {rounds} rounds, with the ends of its 95 % interval (Student's t)"
        ),
        figures: figures.collect(),
        ..Run::default()
    }
}

/// Loads and unloads qjump on interfaces, and at the end puts back what was there.
pub struct Shim<'a> {
    request: Request<'a>,
    was: Side,
    /// `None` after a change that failed.
    is: Option<Side>,
}

impl<'a> Shim<'a> {
    /// Notes what is loaded. Changes nothing yet.
    ///
    /// # Errors
    /// If something else is loaded than `request` says: it could not be put back exactly.
    pub fn new(request: Request<'a>) -> Result<Self, String> {
        let mut was = None;
        for interface in request.interfaces {
            let side = match dataplane::has(interface, &request).map_err(|error| error.to_string())? {
                None => Side::Off,
                Some(true) => Side::On,
                Some(false) => {
                    return Err(format!(
                        "{interface} has another plan in force than the one given; a comparison would replace it. Give that \
                         plan, or `qjump unload --interface {interface}` first"
                    ));
                }
            };
            if *was.get_or_insert(side) != side {
                return Err("qjump is loaded on some of the interfaces, and not on others".into());
            }
        }
        let was = was.ok_or("no interface to load qjump on")?;
        Ok(Self { request, was, is: Some(was) })
    }

    /// Loads or unloads, if it is not so already.
    ///
    /// # Errors
    /// Those of [`dataplane::load`] and [`dataplane::unload`].
    pub fn set(&mut self, side: Side) -> Result<(), dataplane::Error> {
        if self.is == Some(side) {
            return Ok(());
        }
        self.is = None;
        match side {
            Side::On => drop(dataplane::load(&self.request)?),
            Side::Off => {
                for interface in self.request.interfaces {
                    match dataplane::unload(interface, false) {
                        // An earlier attempt may have come half-way.
                        Ok(()) | Err(dataplane::Error::NotLoaded(_)) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        self.is = Some(side);
        Ok(())
    }

    /// Puts back what was there; dropping it does that, too, but cannot say if it fails.
    ///
    /// # Errors
    /// Those of [`Self::set`].
    pub fn restore(mut self) -> Result<(), dataplane::Error> {
        self.set(self.was)
    }
}

impl Drop for Shim<'_> {
    fn drop(&mut self) {
        let _ = self.set(self.was);
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Ordering;

    use super::*;
    use crate::measure::{Latencies, result::Stream};

    #[test]
    fn sides_alternate_and_whole_rounds_are_kept() {
        let mut order = Vec::new();
        let (pairs, result) = alternate(2, |round, side| {
            order.push((round, side));
            Ok::<_, ()>(Some(order.len()))
        });
        assert_eq!(order, [(0, Side::Off), (0, Side::On), (1, Side::Off), (1, Side::On)]);
        assert_eq!((pairs, result), (vec![(1, 2), (3, 4)], Ok(())));
        // The second round breaks off, by an error or because somebody stopped it.
        let until = |broken: Result<Option<u32>, &'static str>| {
            alternate(5, |round, side| if (round, side) == (1, Side::On) { broken } else { Ok(Some(0)) })
        };
        assert_eq!(until(Err("gone")), (vec![(0, 0)], Err("gone")));
        assert_eq!(until(Ok(None)), (vec![(0, 0)], Ok(())));
    }

    #[test]
    fn the_interval_is_students_t_over_logarithms() {
        // Logarithms ln 2 and ln 8: mean ln 4, standard error ln 2, t(1) = 12.706.
        let one = ratio("p99", "ns", &[(1.0, 2.0), (1.0, 8.0)]).unwrap();
        assert!((one.ratio - 4.0).abs() < 1e-12);
        let (low, high) = one.interval.unwrap();
        assert!((low.ln() - (4f64.ln() - 12.707 * 2f64.ln())).abs() < 1e-9, "{low}");
        assert!((low * high - 16.0).abs() < 1e-9);
        assert_eq!(one.direction(), None);
        // The same factor in each round: no doubt about it.
        let sure = ratio("p99", "ns", &[(10.0, 5.0), (30.0, 15.0), (20.0, 10.0)]).unwrap();
        assert_eq!((sure.ratio, sure.off, sure.on, sure.rounds), (0.5, 20.0, 10.0, 3));
        assert_eq!(sure.direction(), Some(Ordering::Less));
        let single = ratio("p99", "ns", &[(10.0, 5.0)]).unwrap();
        assert_eq!((single.interval, single.direction()), (None, None));
    }

    #[test]
    fn what_is_zero_has_no_ratio() {
        assert_eq!(ratio("lost", "1", &[(0.0, 3.0), (2.0, 0.0)]), None);
        assert_eq!(ratio("lost", "1", &[]), None);
        assert_eq!(ratio("lost", "1", &[(0.0, 3.0), (2.0, 4.0)]).unwrap().rounds, 1);
    }

    /// 95 % of the intervals hold the true ratio, or somewhat more.
    #[test]
    fn the_interval_holds_what_it_promises() {
        use rand::{RngExt, SeedableRng};
        let mut random = rand_xoshiro::Xoshiro256PlusPlus::seed_from_u64(5);
        // The sum of twelve uniform numbers is nearly normal.
        let mut noise = || (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
        let holds = (0..2_000)
            .filter(|_| {
                let pairs: Vec<(f64, f64)> =
                    (0..5).map(|_| ((0.2 * noise()).exp(), 3.0 * (0.2 * noise()).exp())).collect();
                let (low, high) = ratio("", "", &pairs).unwrap().interval.unwrap();
                (low..=high).contains(&3.0)
            })
            .count();
        assert!((1_870..=1_930).contains(&holds), "{holds}");
    }

    fn measured(p50_us: u64, goodput: f64) -> Run {
        let mut response = Latencies::new(None);
        (0..1_000).for_each(|n| response.record(p50_us * 1_000 + n));
        Run {
            streams: vec![Stream { name: "udp".into(), response: response.distribution(), ..Stream::default() }],
            figures: vec![Figure { name: "goodput".into(), value: goodput, unit: "bit/s".into() }],
            ..Run::default()
        }
    }

    #[test]
    fn runs_are_compared_by_all_that_they_share() {
        let rounds = [(measured(100, 1e9), measured(10, 9e8)), (measured(120, 1e9), measured(12, 9e8))];
        let ratios = compare(&rounds);
        let find = |name: &str| ratios.iter().find(|ratio| ratio.name == name).unwrap();
        assert!((find("udp: response p50").ratio - 0.1).abs() < 0.01);
        assert!((find("goodput").ratio - 0.9).abs() < 1e-9);
        assert!(find("udp: response max").ratio < 0.2);
        assert!(!ratios.iter().any(|ratio| ratio.name.contains("p99.9")), "too few samples");
        let figures = run(&ratios, 2).figures;
        assert!(figures.iter().any(|figure| figure.name == "goodput: low"));
        assert_eq!(compare(&[]), []);
    }
}
