//! Comma-separated values (RFC 4180): a row for each percentile of each stream.

use super::{Report, read::distributions, tables::sample_name};

const HEADER: &str = "results,run,stream,sample,level,times,samples,sent,lost,bound_ns,violations,min_ns,mean_ns,max_ns,\
                      percent,ns,low_ns,high_ns";

/// Every distribution has at least one row, so that none goes missing.
pub(super) fn csv(report: &Report) -> String {
    let mut csv = format!("{HEADER}\r\n");
    for sampled in report.streams() {
        let stream = sampled.stream;
        for (name, times) in distributions(stream) {
            // Bound and counts are about responses.
            let response = name == "response";
            let counts = stream.counts.filter(|_| response);
            let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
            let common = [
                field(&sampled.source.label),
                field(&sampled.run.name),
                field(&stream.name),
                sample_name(stream.sample).to_owned(),
                number(stream.level.map(u64::from)),
                field(name),
                times.samples.to_string(),
                number(counts.map(|counts| counts.sent)),
                number(counts.map(|counts| counts.lost)),
                number(stream.bound_ns.filter(|_| response)),
                number(stream.violations.filter(|_| response)),
                number(times.min_ns),
                number(times.mean_ns),
                number(times.max_ns),
            ]
            .join(",");
            if times.percentiles.is_empty() {
                csv += &format!("{common},,,,\r\n");
            }
            for percentile in &times.percentiles {
                let high = number(percentile.high_ns);
                csv += &format!("{common},{},{},{},{high}\r\n", percentile.percent, percentile.ns, percentile.low_ns);
            }
        }
    }
    csv
}

/// In quotes, if it needs them.
fn field(text: &str) -> String {
    if text.contains([',', '"', '\r', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_needs_quotes_has_them() {
        assert_eq!(field("udp level 7"), "udp level 7");
        assert_eq!(field("a,b"), "\"a,b\"");
        assert_eq!(field("say \"x\"\n"), "\"say \"\"x\"\"\n\"");
    }
}
