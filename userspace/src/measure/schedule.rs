//! When probes are to be sent.

use rand::RngExt as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};

/// How probes follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// At equal distances, ns.
    Fixed(f64),
    /// As a Poisson process: at distances that have this mean, ns, and an exponential distribution.
    Poisson(f64),
    /// Each when the answer to the one before has come, or has not come in time.
    AfterAnswer,
}

impl Arrivals {
    /// Probes a second; none if the answers decide.
    pub fn rate(self) -> Option<f64> {
        match self {
            Self::Fixed(interval) | Self::Poisson(interval) => Some(1e9 / interval),
            Self::AfterAnswer => None,
        }
    }
}

/// The times at which the probes of a train are to be sent, ns since its start. They follow from the start alone:
/// a sender that is late does not move them.
#[derive(Clone, Debug)]
pub struct Schedule {
    arrivals: Arrivals,
    random: Xoshiro256PlusPlus,
    number: u64,
    at: f64,
}

impl Schedule {
    /// The first probe is due `offset_ns` after the start (with [`Arrivals::Poisson`], an exponential time after that).
    pub fn new(arrivals: Arrivals, offset_ns: u64, seed: u64) -> Self {
        Self { arrivals, random: Xoshiro256PlusPlus::seed_from_u64(seed), number: 0, at: offset_ns as f64 }
    }
}

impl Iterator for Schedule {
    type Item = u64;

    /// For [`Arrivals::AfterAnswer`] there is only a first.
    fn next(&mut self) -> Option<u64> {
        let number = self.number;
        self.number += 1;
        match self.arrivals {
            // A product, not a sum, so that nothing adds up in an hour.
            Arrivals::Fixed(interval) => Some((self.at + number as f64 * interval) as u64),
            Arrivals::Poisson(mean) => {
                // In (0, 1]: its logarithm is finite.
                let uniform = 1.0 - self.random.random::<f64>();
                self.at -= mean * uniform.ln();
                Some(self.at as u64)
            }
            Arrivals::AfterAnswer => (number == 0).then_some(self.at as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distances_do_not_drift() {
        let mut schedule = Schedule::new(Arrivals::Fixed(1e9 / 30_000.0), 7, 0);
        assert_eq!(schedule.next(), Some(7));
        // An hour later.
        assert_eq!(schedule.nth(30_000 * 3_600 - 1), Some(3_600_000_000_007));
    }

    #[test]
    fn poisson_has_the_mean_and_the_spread_of_an_exponential() {
        const N: usize = 100_000;
        let times: Vec<u64> = Schedule::new(Arrivals::Poisson(1e6), 0, 1).take(N).collect();
        assert!(times.is_sorted());
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean / 1e6 - 1.0).abs() < 0.02, "{mean}");
        // Its standard deviation is its mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "{variance}");
        assert_ne!(times, Schedule::new(Arrivals::Poisson(1e6), 0, 2).take(N).collect::<Vec<_>>());
    }
}
