//! The pictures of a report.

use super::{Report, Sampled, Unusable, tables::sample_name};
use crate::{
    chart::{self, Axis, Bar, Curve, DISTINCT, Dots, Mark, Picture, Unit},
    measure::result::{Distribution, Interval, Sample, Stream},
};

/// More curves than this make no picture.
const MOST: usize = 24;
/// The name of the picture of distributions.
const DISTRIBUTION: &str = "distribution";

/// The picture alone that was asked for, by its name; or the experiment's first; or all distributions.
pub(super) fn single(report: &Report, name: Option<&str>) -> Result<String, Unusable> {
    let experiment = experiment(report);
    let picture = match name {
        None => experiment.into_iter().next().map(|(_, svg)| svg),
        Some(DISTRIBUTION) => None,
        Some(name) => {
            let known: Vec<String> = experiment.iter().map(|(name, _)| format!("'{name}'")).collect();
            let found = experiment.into_iter().find(|(known, _)| known == name).map(|(_, picture)| picture);
            let known = [vec![format!("'{DISTRIBUTION}'")], known].concat().join(", ");
            Some(found.ok_or_else(|| Unusable(format!("there is no picture '{name}'; there are: {known}")))?)
        }
    };
    Ok(picture.unwrap_or_else(|| ccdf(report, &report.title(), &report.streams().collect::<Vec<_>>()).svg()))
}

/// Complementary distributions: those of one kind of sample together, as long as they can be told apart.
pub(super) fn distributions(report: &Report) -> Vec<Picture> {
    let mut pictures = Vec::new();
    for kind in grouped(report.streams(), |sampled| sample_name(sampled.stream.sample).to_owned()) {
        let title = format!("Distribution of {}", axis_names(&kind).2);
        if kind.len() <= DISTINCT {
            pictures.push(ccdf(report, &title, &kind));
            continue;
        }
        for stream in grouped(kind.into_iter(), |sampled| sampled.stream.name.clone()) {
            let name = &stream[0].stream.name;
            pictures.extend(stream.chunks(DISTINCT).map(|part| ccdf(report, &format!("{title}, {name}"), part)));
        }
    }
    pictures
}

/// Those with the same key together, in the order of the first of each.
fn grouped<T>(items: impl Iterator<Item = T>, key: impl Fn(&T) -> String) -> Vec<Vec<T>> {
    let mut groups: Vec<(String, Vec<T>)> = Vec::new();
    for item in items {
        let key = key(&item);
        match groups.iter_mut().find(|(known, _)| *known == key) {
            Some((_, group)) => group.push(item),
            None => groups.push((key, vec![item])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

fn ccdf(report: &Report, title: &str, streams: &[Sampled<'_>]) -> Picture {
    let mut curves: Vec<Curve> = Vec::new();
    let mut bounds: Vec<(String, f64)> = Vec::new();
    for sampled in streams {
        let stream = sampled.stream;
        let name = report.label(sampled);
        curves.push(Curve { name: name.clone(), points: above(&stream.response) });
        // With few curves there is room for what the network took.
        if let Some(service) = stream.service.as_ref().filter(|_| streams.len() <= 2) {
            curves.push(Curve { name: format!("{name}: service"), points: above(service) });
        }
        if let Some(bound) = stream.bound_ns {
            bounds.push((stream.name.clone(), bound as f64));
        }
    }
    let bounds = named_bounds(bounds);
    let dropped = curves.len().saturating_sub(MOST);
    curves.truncate(MOST);
    let mut title = title.to_owned();
    if dropped > 0 {
        title += &format!(" ({dropped} more not shown)");
    }
    let (sample, samples, _) = axis_names(streams);
    let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
    let description = format!(
        "The share of {samples} that took longer than a time, both on log axes, for {}.{}",
        names.join("; "),
        if bounds.is_empty() { "" } else { " Upright lines are bounds." }
    );
    let share = format!("share of {samples} that took longer");
    Picture { description, ..Picture::ccdf(&title, sample, &share, curves, &bounds) }
}

/// Each bound once; named by its stream if there are others.
fn named_bounds(mut bounds: Vec<(String, f64)>) -> Vec<(String, f64)> {
    bounds.sort_by(|one, other| one.1.total_cmp(&other.1).then_with(|| one.0.cmp(&other.0)));
    bounds.dedup();
    let several = bounds.windows(2).any(|pair| pair[0].1 != pair[1].1);
    let mut named: Vec<(String, f64)> = Vec::new();
    for (stream, ns) in bounds {
        match named.last_mut() {
            Some((name, last)) if *last == ns => {
                if several {
                    *name = format!("{name}, {stream}");
                }
            }
            _ => named.push((if several { format!("bound of {stream}") } else { "bound".to_owned() }, ns)),
        }
    }
    for (name, _) in &mut named {
        name.push(':');
    }
    named
}

/// What one time is, what it is of, and what many are.
fn axis_names(streams: &[Sampled<'_>]) -> (&'static str, &'static str, &'static str) {
    let mut kinds = streams.iter().map(|sampled| sampled.stream.sample);
    let first = kinds.next();
    if kinds.any(|kind| Some(kind) != first) {
        return ("time", "samples", "times");
    }
    match first {
        Some(Sample::Rtt) => ("round-trip time", "messages", "round-trip times"),
        Some(Sample::OneWay) => ("one-way time", "messages", "one-way times"),
        Some(Sample::Request) => ("time of a request", "requests", "times of requests"),
        Some(Sample::ClockOffset) => ("clock offset", "samples", "clock offsets"),
        Some(Sample::Step) => ("time of a step", "steps", "times of steps"),
        None => ("time", "samples", "times"),
    }
}

/// Points of the complementary distribution: (ns, share of samples above), with both ends of each step.
fn above(distribution: &Distribution) -> Vec<(f64, f64)> {
    let counts = || distribution.histogram.iter().map(|&(_, count)| u128::from(count));
    let total: u128 = counts().sum();
    let mut left = total;
    let mut points = Vec::new();
    for &(value, count) in distribution.histogram.iter().filter(|pair| pair.1 > 0) {
        // The histogram rounds up; the largest is exact.
        let value = distribution.max_ns.map_or(value, |max| value.min(max)) as f64;
        points.push((value, left as f64 / total as f64));
        left -= u128::from(count);
        if left > 0 {
            points.push((value, left as f64 / total as f64));
        }
    }
    points
}

/// How each stream went over time, all over the same axes.
pub(super) fn over_time(report: &Report) -> Vec<Picture> {
    let all: Vec<Sampled<'_>> = report.streams().filter(|sampled| sampled.stream.series.len() > 1).collect();
    let intervals = || all.iter().flat_map(|sampled| &sampled.stream.series);
    let bounds = all.iter().filter_map(|sampled| sampled.stream.bound_ns);
    let times = intervals().flat_map(|i| [i.p50_ns, i.p99_ns, i.max_ns]).flatten().chain(bounds).filter(|&ns| ns > 0);
    let times: Vec<f64> = times.map(|ns| ns as f64).collect();
    let unit = Unit::of(times.iter().copied());
    let (low, high) = chart::span(times.iter().copied());
    let longest = intervals().map(|interval| interval.at_ns).max().unwrap_or(0) as f64 / 1e9;
    let height = if low < high {
        // Whole decades: what is above one another then has the same labels.
        let decade = |ns: f64, round: fn(f64) -> f64| 10f64.powf(round(unit.scaled(ns).log10()));
        Axis::log(format!("time, {}", unit.name())).over(decade(low, f64::floor), decade(high, f64::ceil))
    } else {
        Axis::log(format!("time, {}", unit.name()))
    };
    let across = Axis::linear("time of the run, s").over(0.0, longest.max(1.0));
    all.iter().map(|sampled| series(report, sampled, unit, across.clone(), height.clone())).collect()
}

fn series(report: &Report, sampled: &Sampled<'_>, unit: Unit, x: Axis, y: Axis) -> Picture {
    let stream: &Stream = sampled.stream;
    let curve = |name: &str, value: fn(&Interval) -> Option<u64>| Curve {
        name: name.to_owned(),
        points: stream
            .series
            .iter()
            .map(|i| (i.at_ns as f64 / 1e9, value(i).map_or(f64::NAN, |ns| unit.scaled(ns as f64))))
            .collect(),
    };
    let curves = vec![curve("p50", |i| i.p50_ns), curve("p99", |i| i.p99_ns), curve("max", |i| i.max_ns)];
    let losses: Vec<&Interval> = stream.series.iter().filter(|interval| interval.lost > 0).collect();
    let lost = losses.iter().fold(0u64, |sum, interval| sum.saturating_add(interval.lost));
    let moments = losses.iter().map(|interval| interval.at_ns as f64 / 1e9).collect();
    let bound =
        stream.bound_ns.map(|ns| Mark { name: format!("bound {}", unit.show(ns as f64)), at: unit.scaled(ns as f64) });
    let label = report.label(sampled);
    Picture {
        description: format!("Median, 99th percentile and maximum of each interval of {label}; {lost} lost."),
        across: bound.into_iter().collect(),
        moments: Some((format!("lost, {lost} in all"), moments)),
        size: (500, 230),
        ..Picture::new(label, x, y, curves)
    }
}

/// Where the time of messages goes, by the means of their segments: one bar for each stream.
pub(super) fn segments(report: &Report) -> Option<String> {
    let mut kinds: Vec<String> = Vec::new();
    let mut bars = Vec::new();
    for sampled in report.streams().filter(|sampled| !sampled.stream.segments.is_empty()) {
        let mut parts = Vec::new();
        for segment in sampled.stream.segments.iter().filter(|segment| !segment.sum) {
            let kind = kinds.iter().position(|kind| *kind == segment.name).unwrap_or_else(|| {
                kinds.push(segment.name.clone());
                kinds.len() - 1
            });
            parts.extend(segment.times.mean_ns.map(|mean| (kind, mean as f64)));
        }
        bars.push(Bar { name: report.label(&sampled), parts });
    }
    let description = "How the mean time between the kernel's stamps divides; the table has the numbers.";
    (!bars.is_empty()).then(|| chart::stacked("Mean time from stamp to stamp", description, &kinds, &bars))
}

/// What experiments draw across their runs: names and pictures (SVG).
pub(super) fn experiment(report: &Report) -> Vec<(String, String)> {
    let several = report.sources.len() > 1;
    let curves =
        report.sources.iter().flat_map(|source| source.document.curves.iter().map(move |curve| (source, curve)));
    let groups = grouped(curves, |(_, curve)| format!("{}\0{}\0{}", curve.picture, curve.x, curve.y));
    let picture = |group: Vec<(&super::Source, &crate::measure::result::Curve)>| {
        let first = group[0].1;
        let values = || group.iter().flat_map(|(_, curve)| curve.points.iter().copied());
        let axis = |label: &str, log: bool| if log { Axis::log(label) } else { Axis::linear(label) };
        let x = axis(&first.x, chart::needs_log(values().map(|point| point.0)));
        let y = axis(&first.y, chart::needs_log(values().map(|point| point.1)));
        let name = |(source, curve): &(&super::Source, &crate::measure::result::Curve)| {
            if several { format!("{}, {}", source.label, curve.name) } else { curve.name.clone() }
        };
        if !first.labels.is_empty() {
            let kinds: Vec<String> = group.iter().map(name).collect();
            let description = format!("{} by {}, for {}.", first.y, first.x, kinds.join("; "));
            let value = |at: usize, curve: &crate::measure::result::Curve| {
                curve.points.iter().find(|(x, _)| *x == at as f64).map(|point| point.1)
            };
            let groups: Vec<(String, Vec<(usize, f64)>)> = first
                .labels
                .iter()
                .enumerate()
                .take(MOST)
                .map(|(at, label)| {
                    let bars =
                        group.iter().enumerate().filter_map(|(kind, (_, curve))| Some((kind, value(at, curve)?)));
                    (label.clone(), bars.collect())
                })
                .collect();
            return (first.picture.clone(), chart::grouped(&first.picture, &description, &kinds, &groups));
        }
        let few = group.iter().all(|(_, curve)| curve.points.len() <= 30);
        let curves: Vec<Curve> =
            group.iter().take(MOST).map(|pair| Curve { name: name(pair), points: pair.1.points.clone() }).collect();
        let dropped = group.len() - curves.len();
        let title =
            if dropped > 0 { format!("{} ({dropped} more not shown)", first.picture) } else { first.picture.clone() };
        let names: Vec<&str> = curves.iter().map(|curve| curve.name.as_str()).collect();
        let description = format!("{} over {}, for {}.", first.y, first.x, names.join("; "));
        let dots = if few { Dots::All } else { Dots::None };
        (first.picture.clone(), Picture { description, dots, ..Picture::new(title, x, y, curves) }.svg())
    };
    groups.into_iter().map(picture).collect()
}
