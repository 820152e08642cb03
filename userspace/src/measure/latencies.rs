//! A distribution of latencies.

use hdrhistogram::Histogram;

/// Latencies in nanoseconds, and how many broke a bound.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    bound_ns: Option<u64>,
    violations: u64,
}

/// A percentile is shown only with at least this many samples beyond it.
const BEYOND: f64 = 10.0;

impl Latencies {
    /// No samples yet. `bound_ns` is what they are held against.
    pub fn new(bound_ns: Option<u64>) -> Self {
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("1 ns to 60 s are valid bounds");
        Self { histogram, bound_ns, violations: 0 }
    }

    /// Adds a sample.
    pub fn record(&mut self, latency_ns: u64) {
        self.histogram.saturating_record(latency_ns);
        if self.bound_ns.is_some_and(|bound| latency_ns > bound) {
            self.violations += 1;
        }
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
        (self.samples() > 0).then(|| self.histogram.max())
    }

    /// The value below which a share `quantile` of the samples lies, or `None` if fewer than ten lie
    /// above it, which would make it a matter of chance.
    pub fn quantile_ns(&self, quantile: f64) -> Option<u64> {
        let beyond = self.samples() as f64 * (1.0 - quantile);
        (beyond + 1e-6 >= BEYOND).then(|| self.histogram.value_at_quantile(quantile))
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
}
