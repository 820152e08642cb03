//! A distribution of latencies.

use hdrhistogram::Histogram;

use super::{
    ranks,
    result::{Distribution, Percentile},
};

/// Latencies in nanoseconds, and how many broke a bound. Its memory does not grow with the samples.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    /// The histogram has three significant digits; these are exact.
    min_ns: u64,
    max_ns: u64,
    sum_ns: u128,
    bound_ns: Option<u64>,
    violations: u64,
}

/// A percentile is shown only with at least this many samples beyond it.
pub(crate) const BEYOND: f64 = 10.0;
/// Longer ones count as this long in the histogram.
const LONGEST_NS: u64 = 60_000_000_000;
/// The percentiles of a [`Distribution`].
pub(crate) const PERCENTILES: [f64; 6] = [50.0, 90.0, 99.0, 99.9, 99.99, 99.999];

/// Whether a percentile of so many samples has enough of them beyond it.
pub(crate) fn is_shown(samples: u64, quantile: f64) -> bool {
    samples as f64 * (1.0 - quantile) + 1e-6 >= BEYOND
}

impl Latencies {
    /// No samples yet. `bound_ns` is what they are held against.
    pub fn new(bound_ns: Option<u64>) -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("1 ns to 60 s are valid bounds");
        Self { histogram, min_ns: u64::MAX, max_ns: 0, sum_ns: 0, bound_ns, violations: 0 }
    }

    /// Adds a sample.
    pub fn record(&mut self, latency_ns: u64) {
        self.histogram.saturating_record(latency_ns);
        self.min_ns = self.min_ns.min(latency_ns);
        self.max_ns = self.max_ns.max(latency_ns);
        self.sum_ns += u128::from(latency_ns);
        if self.bound_ns.is_some_and(|bound| latency_ns > bound) {
            self.violations += 1;
        }
    }

    /// Adds all samples of another, with their violations of its bound.
    pub fn add(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("all have the same bounds");
        self.min_ns = self.min_ns.min(other.min_ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        self.sum_ns += other.sum_ns;
        self.violations += other.violations;
    }

    /// Forgets all samples, and keeps the bound.
    pub fn clear(&mut self) {
        self.histogram.reset();
        (self.min_ns, self.max_ns, self.sum_ns, self.violations) = (u64::MAX, 0, 0, 0);
    }

    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.histogram.len()
    }

    /// How many were above the bound.
    pub const fn violations(&self) -> u64 {
        self.violations
    }

    /// The largest.
    pub fn max_ns(&self) -> Option<u64> {
        (self.samples() > 0).then_some(self.max_ns)
    }

    /// The value below which a share `quantile` of the samples lies, or `None` if fewer than ten lie
    /// above it, which would make it a matter of chance.
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        is_shown(self.samples(), quantile)
            .then(|| self.histogram.value_at_quantile(quantile).clamp(self.min_ns, self.max_ns))
    }

    /// Points of the complementary distribution: (ns, share of samples above).
    pub fn ccdf(&self) -> Vec<(f64, f64)> {
        let total = self.samples() as f64;
        let mut above = total;
        let mut points = Vec::new();
        for value in self.histogram.iter_recorded() {
            points.push((value.value_iterated_to() as f64, above / total));
            above -= value.count_since_last_iteration() as f64;
            if above > 0.0 {
                points.push((value.value_iterated_to() as f64, above / total));
            }
        }
        points
    }

    /// All of it in the form of results.
    pub fn distribution(&self) -> Distribution {
        let samples = self.samples();
        if samples == 0 {
            return Distribution::default();
        }
        let pairs = self.histogram.iter_recorded();
        let histogram: Vec<(u64, u64)> =
            pairs.map(|value| (value.value_iterated_to(), value.count_since_last_iteration())).collect();
        let mut seen = 0;
        let up_to: Vec<u64> = histogram
            .iter()
            .map(|&(_, count)| {
                seen += count;
                seen
            })
            .collect();
        // The value of the sample of a rank, counted from 1.
        let at = |rank: u64| {
            let index = up_to.partition_point(|&seen| seen < rank);
            histogram[index.min(histogram.len() - 1)].0.clamp(self.min_ns, self.max_ns)
        };
        let shown = PERCENTILES.into_iter().filter(|percent| is_shown(samples, percent / 100.0));
        let percentiles = shown
            .map(|percent| {
                let quantile = percent / 100.0;
                let (low, high) = ranks::confidence(samples, quantile);
                let rank = (samples as f64 * quantile - 1e-6).ceil().max(1.0) as u64;
                Percentile { percent, ns: at(rank), low_ns: low.map_or(self.min_ns, at), high_ns: high.map(at) }
            })
            .collect();
        Distribution {
            samples,
            min_ns: Some(self.min_ns),
            mean_ns: Some((self.sum_ns / u128::from(samples)) as u64),
            max_ns: Some(self.max_ns),
            percentiles,
            histogram,
        }
    }

    /// The samples of a distribution again, to merge and to ask for other percentiles. Its least, largest and average
    /// stay exact; there is no bound.
    pub fn from_distribution(distribution: &Distribution) -> Self {
        let mut latencies = Self::new(None);
        for &(value, count) in &distribution.histogram {
            latencies.histogram.saturating_record_n(value, count);
        }
        latencies.min_ns = distribution.min_ns.unwrap_or(u64::MAX);
        latencies.max_ns = distribution.max_ns.unwrap_or(0);
        latencies.sum_ns = u128::from(distribution.mean_ns.unwrap_or(0)) * u128::from(latencies.samples());
        latencies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_breaks_the_bound_exactly() {
        // Two values that the histogram cannot tell apart.
        let mut latencies = Latencies::new(Some(1_000_000));
        latencies.record(1_000_000);
        latencies.record(1_000_001);
        assert_eq!(latencies.violations(), 1);
    }

    #[test]
    fn hides_percentiles_with_too_few_samples() {
        let mut latencies = Latencies::new(None);
        assert_eq!(latencies.max_ns(), None);
        for n in 1..=1000 {
            latencies.record(n * 1000);
        }
        assert!(latencies.quantile_ns(0.99).is_some());
        assert_eq!(latencies.quantile_ns(0.999), None);
        let median = latencies.quantile_ns(0.5).unwrap();
        assert!((499_000..=501_000).contains(&median), "{median}");
    }

    #[test]
    fn the_ccdf_falls_from_one() {
        let mut latencies = Latencies::new(None);
        for n in [5u64, 10, 10, 20] {
            latencies.record(n);
        }
        assert_eq!(latencies.ccdf(), [(5.0, 1.0), (5.0, 0.75), (10.0, 0.75), (10.0, 0.25), (20.0, 0.25)]);
    }

    #[test]
    fn extremes_and_mean_are_exact() {
        let mut latencies = Latencies::new(None);
        for n in [1_000_003, 1_000_001, 1_000_008] {
            latencies.record(n);
        }
        let distribution = latencies.distribution();
        assert_eq!(
            (distribution.min_ns, distribution.mean_ns, distribution.max_ns),
            (Some(1_000_001), Some(1_000_004), Some(1_000_008))
        );
        assert_eq!(latencies.max_ns(), Some(1_000_008));
        assert_eq!(Latencies::new(None).distribution(), Distribution::default());
    }

    #[test]
    fn a_distribution_has_percentiles_inside_their_intervals() {
        let mut latencies = Latencies::new(None);
        for n in 1..=10_000 {
            latencies.record(n);
        }
        let percentiles = latencies.distribution().percentiles;
        assert_eq!(percentiles.iter().map(|p| p.percent).collect::<Vec<_>>(), [50.0, 90.0, 99.0, 99.9]);
        for Percentile { percent, ns, low_ns, high_ns } in percentiles {
            let exact = (percent * 100.0) as u64;
            assert!(ns.abs_diff(exact) <= exact / 1000 + 1, "{percent}: {ns}");
            let (low, high) = ranks::confidence(10_000, percent / 100.0);
            assert!(low_ns.abs_diff(low.unwrap()) <= exact / 1000 + 1, "{percent}: {low_ns}");
            assert!(high_ns.unwrap().abs_diff(high.unwrap()) <= exact / 1000 + 1, "{percent}: {high_ns:?}");
            assert!(low_ns <= ns && Some(ns) <= high_ns);
        }
    }

    #[test]
    fn a_distribution_goes_there_and_back_and_merges() {
        let (mut all, mut parts) = (Latencies::new(None), [Latencies::new(None), Latencies::new(None)]);
        for n in 0..2_000u64 {
            let latency = n * n % 70_001 * 1_003;
            all.record(latency);
            parts[(n % 2) as usize].record(latency);
        }
        let again = Latencies::from_distribution(&all.distribution());
        assert_eq!(again.distribution(), all.distribution());
        let [first, second] = parts.map(|part| Latencies::from_distribution(&part.distribution()));
        let mut merged = first;
        merged.add(&second);
        assert_eq!(merged.distribution().histogram, all.distribution().histogram);
        assert_eq!(merged.distribution().percentiles, all.distribution().percentiles);
        merged.clear();
        assert_eq!(merged.distribution(), Distribution::default());
    }

    #[test]
    fn what_took_too_long_for_the_histogram_still_counts() {
        let mut latencies = Latencies::new(None);
        latencies.record(100_000_000_000);
        assert_eq!((latencies.samples(), latencies.max_ns()), (1, Some(100_000_000_000)));
    }
}
