//! `cargo xtask bench`: what the host's queue does for TCP at a level, and for messages beside bulk. Written to
//! target/bench/queue.json.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use qjump::config::QueueChoice;
use qjump_tests::backpressure::{HostQueue, LINK, RATE, probes_beside, rack, tcp};
use serde_json::{Value, json};

fn main() -> Result<()> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let result = json!({
        "schema_version": 1,
        "kernel": kernel.trim(),
        "tcp": tcp_rows()?,
        "probes": probe_rows()?,
    });
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    fs::create_dir_all(&folder)?;
    Ok(fs::write(folder.join("queue.json"), format!("{result:#}\n"))?)
}

fn tcp_rows() -> Result<Vec<Value>> {
    println!("TCP at a level of {RATE} on a path of {LINK}, share of the level's payload rate:");
    let mut rows = Vec::new();
    for (name, queue) in [("paced", QueueChoice::Auto), ("policed", QueueChoice::Keep)] {
        let rack = rack(queue)?;
        for congestion in ["cubic", "bbr"] {
            for flows in [1, 4, 64] {
                let outcome = tcp(&rack, congestion, flows, Duration::from_secs(5))?;
                println!(
                    "  {name:7} {congestion:5} {flows:2} flows: {:6.2} %, longest gap {:4} ms, fairness {:.3}",
                    outcome.share * 100.0,
                    outcome.longest_gap.as_millis(),
                    outcome.fairness
                );
                rows.push(json!({
                    "queue": name, "congestion": congestion, "flows": flows, "share": outcome.share,
                    "longest_gap_ns": outcome.longest_gap.as_nanos() as u64, "fairness": outcome.fairness,
                }));
            }
        }
    }
    Ok(rows)
}

/// Probes in a case.
const PROBES: u64 = 2_000;

fn probe_rows() -> Result<Vec<Value>> {
    println!("probes at level 7 through the host's own 100 Mbit/s, one way:");
    let mut rows = Vec::new();
    let mut idle_p99 = None;
    for (queue, flows) in [(HostQueue::Levels, 0), (HostQueue::Levels, 64), (HostQueue::Fifo, 64)] {
        let latencies = probes_beside(queue, flows, PROBES)?;
        let quantile = |q| latencies.quantile_ns(q).context("too few probes arrived");
        let (p50, p99) = (quantile(0.5)?, quantile(0.99)?);
        let idle = *idle_p99.get_or_insert(p99);
        println!(
            "  {:6} beside {flows:2} bulk flows: p50 {:7.1} us, p99 {:7.1} us, p99 less that of an idle host {:.1} us",
            format!("{queue:?}").to_lowercase(),
            p50 as f64 / 1e3,
            p99 as f64 / 1e3,
            (p99 as f64 - idle as f64) / 1e3
        );
        rows.push(json!({
            "queue": format!("{queue:?}").to_lowercase(), "flows": flows, "p50_ns": p50, "p99_ns": p99,
            "samples": latencies.samples(),
        }));
    }
    Ok(rows)
}
