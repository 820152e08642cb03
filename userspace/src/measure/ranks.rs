//! Confidence intervals of percentiles by order statistics: which samples, counted from the smallest, enclose the
//! true percentile, whatever the distribution.

/// What an interval may miss on either side: 95 % together.
const TAIL: f64 = 0.025;

/// The ranks, from 1, of the two samples between which the quantile `quantile` of the population lies with 95 %
/// confidence; `None` for an end that lies beyond the samples.
///
/// The number B of samples below the true quantile is binomial (`samples`, `quantile`), and the sample of rank r lies
/// below it if B >= r. So the lower rank is the largest with P(B < lower) <= 2.5 %, the upper the smallest with
/// P(B >= upper) <= 2.5 %. (Le Boudec, Performance Evaluation of Computer and Communication Systems, theorem 2.1.)
pub fn confidence(samples: u64, quantile: f64) -> (Option<u64>, Option<u64>) {
    let n = samples as f64;
    let mode = ((n + 1.0) * quantile).floor().min(n) as u64;
    // P(B = k) over P(B = mode): neighbours have a simple ratio, so no factorial is needed.
    let odds = quantile / (1.0 - quantile);
    let up = |k: u64, weight: f64| weight * (n - k as f64) / (k as f64 + 1.0) * odds;
    let down = |k: u64, weight: f64| weight * k as f64 / (n - k as f64 + 1.0) / odds;
    let below: f64 = walk(mode, down, |k| k.checked_sub(1)).map(|(_, weight)| weight).sum();
    let above: f64 = walk(mode, up, |k| (k < samples).then_some(k + 1)).map(|(_, weight)| weight).sum();
    let allowed = TAIL * (below + 1.0 + above);

    // Outwards, until what is left beyond is small enough.
    let mut left = below;
    let lower = std::iter::once((mode, 1.0)).chain(walk(mode, down, |k| k.checked_sub(1))).find_map(|(k, weight)| {
        if k < mode {
            left -= weight;
        }
        // `left` is now P(B < k).
        (left <= allowed).then_some(k)
    });
    let mut left = above + 1.0;
    let upper = std::iter::once((mode, 1.0)).chain(walk(mode, up, |k| (k < samples).then_some(k + 1))).find_map(
        |(k, weight)| {
            left -= weight;
            // `left` is now P(B > k).
            (left <= allowed).then_some(k + 1)
        },
    );
    (lower.filter(|&rank| rank >= 1), upper.filter(|&rank| rank <= samples))
}

/// From the mode outwards, without it, until the weights no longer count.
fn walk(
    mode: u64,
    ratio: impl Fn(u64, f64) -> f64,
    next: impl Fn(u64) -> Option<u64>,
) -> impl Iterator<Item = (u64, f64)> {
    let mut at = (mode, 1.0);
    std::iter::from_fn(move || {
        let k = next(at.0)?;
        at = (k, ratio(at.0, at.1));
        (at.1 > 1e-18).then_some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_published_table() {
        // Le Boudec, table A.1: the median at 95 %.
        for (samples, lower, upper) in [(10, 2, 9), (20, 6, 15), (30, 10, 21), (50, 18, 33), (70, 27, 44)] {
            let (low, high) = confidence(samples, 0.5);
            // The table takes the narrowest pair; both ends here keep their own 2.5 %.
            assert!((lower - 1..=lower).contains(&low.unwrap()), "{samples}: {low:?}");
            assert!((upper..=upper + 1).contains(&high.unwrap()), "{samples}: {high:?}");
        }
    }

    #[test]
    fn agrees_with_a_sum_over_the_binomial() {
        for (samples, quantile) in [(40u64, 0.5f64), (200, 0.9), (1000, 0.99)] {
            let mut weights = vec![0.0f64; samples as usize + 1];
            // log of the binomial coefficient, step by step.
            let mut coefficient = 0.0f64;
            for k in 0..=samples {
                let (i, n) = (k as f64, samples as f64);
                weights[k as usize] = (coefficient + i * quantile.ln() + (n - i) * (1.0 - quantile).ln()).exp();
                coefficient += ((n - i) / (i + 1.0)).ln();
            }
            let below = |rank: u64| weights[..rank as usize].iter().sum::<f64>();
            let (low, high) = confidence(samples, quantile);
            let low = low.unwrap();
            assert!(below(low) <= 0.025 && below(low + 1) > 0.025, "{samples} {quantile}: {low}");
            let from = |rank: u64| weights[rank as usize..].iter().sum::<f64>();
            match high {
                Some(high) => assert!(from(high) <= 0.025 && from(high - 1) > 0.025, "{samples} {quantile}: {high}"),
                None => assert!(from(samples) > 0.025),
            }
        }
    }

    #[test]
    fn few_samples_have_no_upper_end_and_many_take_no_time() {
        assert_eq!(confidence(10, 0.99).1, None);
        assert_eq!(confidence(1, 0.5), (None, None));
        let (low, high) = confidence(1_000_000_000, 0.5);
        // 1.96 standard deviations of 15,811.
        assert!((499_969_000..499_969_020).contains(&low.unwrap()), "{low:?}");
        assert!((500_030_980..500_031_000).contains(&high.unwrap()), "{high:?}");
    }
}
