//! What a level's queue does for programs: TCP gets its rate, and nobody gets more.

use std::time::Duration;

use anyhow::Result;
use qjump::{
    config::QueueChoice,
    plan::{Delays, Demand, LevelSpec, Model, Network, OverRule, Plan, default_wire_overhead},
    testbed::{Queueing, Rack, RackSpec},
    units::{Nanos, Rate},
};
use qjump_ebpf::Level;
use qjump_tests::tcp::{Flows, fairness};

const LINK: Rate = Rate::from_bps(100_000_000);
const LEVEL: u8 = 5;
const RATE: Rate = Rate::from_bps(50_000_000);
const BURST: u32 = 30_000;

/// Level 5 with 50 of 100 Mbit/s.
fn plan(over: Option<OverRule>) -> Result<Plan> {
    let level = Level::new(LEVEL).expect("a level");
    let network = Network {
        hosts: 2,
        link_rate: LINK,
        max_packet: 1_514,
        delays: Delays::Given(Nanos::from_ns(1_000_000)),
        wire_overhead: default_wire_overhead(),
        tagged: false,
        model: Model::Strict,
        levels: vec![LevelSpec { burst: Some(BURST), over, ..LevelSpec::new(level, Demand::Rate(RATE)) }],
    };
    Ok(network.plan()?)
}

fn rack() -> Result<Rack> {
    let rack = Rack::up(RackSpec { hosts: 2, rate: LINK, buffer: 256 * 1024 })?;
    rack.set_queueing(Queueing::Strict)?;
    Ok(rack)
}

/// The level's rate, less what headers and the wire take of full segments with time stamps.
fn payload_bps() -> f64 {
    RATE.bps() as f64 * 1_448.0 / 1_538.0
}

#[test]
fn tcp_gets_the_rate_of_its_level_and_without_a_queue_hardly_any() -> Result<()> {
    let rack = rack()?;
    let time = Duration::from_secs(5);
    for (queue, over) in [(QueueChoice::Auto, None), (QueueChoice::Keep, Some(OverRule::Police))] {
        rack.load(0, &plan(over)?, queue)?;
        for congestion in ["cubic", "bbr"] {
            for count in [1, 4, 64] {
                let flows = Flows {
                    from: rack.host(0),
                    to: rack.host(1),
                    address: &rack.address(1),
                    count,
                    priority: LEVEL.into(),
                    congestion,
                };
                let flows = flows.run(time)?;
                let bytes: u64 = flows.iter().map(|flow| flow.bytes).sum();
                let share = bytes as f64 * 8.0 / time.as_secs_f64() / payload_bps();
                let gap = flows.iter().map(|flow| flow.longest_gap).max().unwrap_or_default();
                let fairness = fairness(&flows);
                println!(
                    "{queue:?}, {congestion}, {count} flows: {:.2} % of the level's payload rate, longest gap {gap:?}, \
                     fairness {fairness:.3}",
                    share * 100.0
                );
                if queue == QueueChoice::Auto {
                    assert!(share >= 0.97, "{share}");
                    assert!(gap < Duration::from_millis(100), "{gap:?}");
                    assert!(count != 4 || fairness >= 0.9, "{fairness}");
                }
            }
        }
    }
    Ok(())
}
