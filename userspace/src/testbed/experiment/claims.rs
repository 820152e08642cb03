//! What experiments claim of their runs.

use super::Done;
use crate::{
    measure::result::{Claim, Distribution, Stream},
    units::{Nanos, show_ns},
};

/// The case of this name, if it was run.
pub fn case<'a>(done: &'a [Done], name: &str) -> Option<&'a Done> {
    done.iter().find(|done| done.case == name)
}

/// The first stream of a case, or the one of this name.
pub fn stream<'a>(done: &'a [Done], case_name: &str, name: Option<&str>) -> Option<&'a Stream> {
    let streams = &case(done, case_name)?.run.streams;
    match name {
        None => streams.first(),
        Some(name) => streams.iter().find(|stream| stream.name == name),
    }
}

/// A percentile that has enough samples beyond it, ns.
pub fn percentile(distribution: &Distribution, percent: f64) -> Option<u64> {
    distribution.percentiles.iter().find(|one| one.percent == percent).map(|one| one.ns)
}

/// The 99th percentile of the response times of a case, ns.
pub fn p99(done: &[Done], case: &str, name: Option<&str>) -> Option<u64> {
    percentile(&stream(done, case, name)?.response, 99.0)
}

/// The value of a figure of a case.
pub fn figure(done: &[Done], case_name: &str, name: &str) -> Option<f64> {
    case(done, case_name)?.run.figures.iter().find(|figure| figure.name == name).map(|figure| figure.value)
}

/// The bound of the strictest level of a case's plan, ns.
pub fn bound_ns(done: &[Done], case_name: &str) -> Option<u64> {
    let plan = case(done, case_name)?.plan.as_ref()?;
    plan.levels.first()?.bound_ns.map(|ns| ns as u64)
}

/// That no sample of the first stream of a case was over its bound. Undecided if there were no more than the machine can
/// have caused, with one sample in each `interval`.
pub fn bound_holds(done: &[Done], case_name: &str, interval: Nanos) -> Claim {
    let claim = format!("no sample of {case_name} over the bound");
    let Some((case, stream)) = case(done, case_name).zip(stream(done, case_name, None)) else {
        return Claim { claim, holds: None, measured: "not measured".into() };
    };
    let over = stream.violations.unwrap_or(0);
    let holds = if over == 0 {
        Some(true)
    } else if case.excuses(over, interval) {
        None
    } else {
        Some(false)
    };
    let mut measured = format!("{over} of {}", stream.response.samples);
    if over > 0 {
        measured += &format!(
            "; a CPU of this machine was away for up to {}, which can have caused {}",
            show_ns(case.stalls.longest_ns as f64),
            if holds.is_none() { "them" } else { "fewer" }
        );
    }
    Claim { claim, holds, measured }
}

/// That `measured` is at most `limit`, times in ns; undecided if one of them is not known.
pub fn at_most(claim: impl Into<String>, measured: Option<u64>, limit: Option<f64>) -> Claim {
    let text = |ns: Option<f64>| ns.map_or("not measured".to_owned(), show_ns);
    Claim {
        claim: claim.into(),
        holds: measured.zip(limit).map(|(measured, limit)| measured as f64 <= limit),
        measured: format!("{} against {}", text(measured.map(|ns| ns as f64)), text(limit)),
    }
}

/// That a ratio is at least so much; undecided if it is not known.
pub fn at_least(claim: impl Into<String>, ratio: Option<f64>, least: f64) -> Claim {
    Claim {
        claim: claim.into(),
        holds: ratio.map(|ratio| ratio >= least),
        measured: ratio.map_or("not measured".to_owned(), |ratio| format!("{ratio:.2}")),
    }
}

/// What every experiment with a contended network claims of a stream (the first, if it has no name): with qjump, its p99
/// is at most twice that of the idle network and what the bound is worth, and at least five times better than contended.
pub fn near_alone(done: &[Done], name: Option<&str>, bound_ns: Option<u64>) -> Vec<Claim> {
    let of = name.map_or(String::new(), |name| format!(" of {name}"));
    let [alone, contended, qjump] = ["alone", "contended", "qjump"].map(|case| p99(done, case, name));
    let limit = alone.zip(bound_ns).map(|(alone, bound)| 2.0 * alone as f64 + bound as f64);
    let ratio = contended.zip(qjump).map(|(contended, qjump)| contended as f64 / qjump.max(1) as f64);
    vec![
        at_most(format!("p99{of} with qjump at most 2 x alone + bound"), qjump, limit),
        at_least(format!("p99{of} with qjump at least 5 x better than contended"), ratio, 5.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        measure::{Latencies, result::Run},
        testbed::experiment::Stalls,
    };

    fn done(case: &str, ns: u64) -> Done {
        let mut latencies = Latencies::new(None);
        (0..2_000).for_each(|_| latencies.record(ns));
        let streams = vec![Stream { response: latencies.distribution(), ..Stream::default() }];
        let stalls = Stalls { longest_ns: 0, long_ns: 0 };
        Done { case: case.into(), plan: None, run: Run { streams, ..Run::default() }, stalls, others: 0.0 }
    }

    #[test]
    fn the_usual_claims_hold_and_fail_where_they_should() {
        let verdicts = |alone, contended, qjump| -> Vec<Option<bool>> {
            let done = [done("alone", alone), done("contended", contended), done("qjump", qjump)];
            near_alone(&done, None, Some(1_000)).iter().map(|claim| claim.holds).collect()
        };
        assert_eq!(verdicts(100, 9_000, 1_100), [Some(true), Some(true)]);
        assert_eq!(verdicts(100, 9_000, 1_300), [Some(false), Some(true)]);
        assert_eq!(verdicts(100, 4_000, 1_100), [Some(true), Some(false)]);
    }

    #[test]
    fn what_was_not_run_decides_nothing() {
        let claims = near_alone(&[done("alone", 5)], None, Some(1));
        assert!(claims.iter().all(|claim| claim.holds.is_none() && claim.measured.contains("not measured")));
    }
}
