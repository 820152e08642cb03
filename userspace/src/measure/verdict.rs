//! Whether the sender, and not the network, decided a result.

use super::result::{Distribution, Generator, Stream};

/// A sender whose lateness has this share of what was measured, at the same percentile, has decided it.
const SHARE: f64 = 0.25;
/// Lateness up to this is what a system call takes, ns.
const NEGLIGIBLE_NS: u64 = 2_000;
/// A sender that sent less than this share of what it should have could not keep up.
const KEPT_UP: f64 = 0.99;

/// What Linux leaves to ordinary threads of every second, when real-time ones would take all (sched_rt_runtime_us, and the
/// fair server since 6.12), ns; a little less, for what is seen of it.
const THROTTLE_NS: u64 = 25_000_000;
const THROTTLED: &str = "some of it may be the kernel's: from threads of real-time priority that are always busy it takes some 50 ms \
                         of every second; a lower --rate or --spin leaves the CPU time for others";

/// Whether the sender stood still for about as long as the kernel makes busy real-time threads.
fn was_throttled(stream: &Stream) -> bool {
    stream.lateness.as_ref().and_then(|lateness| lateness.max_ns).is_some_and(|max| max >= THROTTLE_NS)
}

/// Judges the sender of a stream, of which it should have sent `planned`, if it had a schedule.
pub fn generator(stream: &Stream, planned: Option<u64>, real_time: bool) -> Generator {
    let sent = stream.counts.map_or(0, |counts| counts.sent);
    let late = late(&stream.response, stream.lateness.as_ref());
    let late = late.map(|why| if real_time && was_throttled(stream) { format!("{why}; {THROTTLED}") } else { why });
    let why = late.or_else(|| {
        let planned = planned.filter(|&planned| (sent as f64) < planned as f64 * KEPT_UP)?;
        Some(format!("only {sent} of {planned} probes were sent in time"))
    });
    Generator { limited: why.is_some(), why, real_time }
}

fn late(response: &Distribution, lateness: Option<&Distribution>) -> Option<String> {
    // The highest percentile up to 99 that both show.
    let shown = |distribution: &Distribution, percent| {
        distribution.percentiles.iter().find(|shown| shown.percent == percent).map(|shown| shown.ns)
    };
    let (percent, late, response) = [99.0, 90.0, 50.0]
        .into_iter()
        .find_map(|percent| Some((percent, shown(lateness?, percent)?, shown(response, percent)?)))?;
    let limited = late > NEGLIGIBLE_NS && late as f64 > response as f64 * SHARE;
    limited.then(|| {
        format!(
            "p{percent} of the sender's own lateness is {}, of the {} that were measured",
            crate::units::show_ns(late as f64),
            crate::units::show_ns(response as f64)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Latencies, result::Counts};

    fn distribution(ns: u64) -> Distribution {
        let mut latencies = Latencies::new(None);
        (0..2_000).for_each(|_| latencies.record(ns));
        latencies.distribution()
    }

    fn stream(response_ns: u64, lateness_ns: u64, sent: u64) -> Stream {
        Stream {
            response: distribution(response_ns),
            lateness: Some(distribution(lateness_ns)),
            counts: Some(Counts { sent, ..Counts::default() }),
            ..Stream::default()
        }
    }

    #[test]
    fn lateness_decides_by_its_share() {
        let judge = |response, late| generator(&stream(response, late, 10), Some(10), true);
        assert!(!judge(100_000, 20_000).limited);
        let limited = judge(100_000, 30_000);
        assert!(limited.limited && limited.why.unwrap().starts_with("p99 of the sender's own lateness is 30"));
        // What a system call takes is nobody's fault.
        assert!(!judge(4_000, 1_900).limited);
    }

    #[test]
    fn a_sender_that_does_not_keep_up_decides() {
        assert!(generator(&stream(100_000, 0, 98), Some(100), true).limited);
        assert!(!generator(&stream(100_000, 0, 99), Some(100), false).limited);
        assert!(!generator(&stream(100_000, 0, 5), None, false).limited);
    }
}
