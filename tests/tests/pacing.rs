//! What TCP makes of a limited level when it is told its share of the rate: the flows of tagged cgroups beside the same
//! flows without a grant, in one run.

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::Result;
use qjump::{config::QueueChoice, plan::OverRule, testbed::Rack, units::Rate};
use qjump_tests::{
    backpressure::{LEVEL, LINK, RATE, plan, rack},
    cgroups::TestCgroup,
    link::{binary, succeeded},
    tcp::{Flow, Flows},
};

const TIME: Duration = Duration::from_secs(4);

/// A cgroup whose sockets have the level.
fn tagged() -> Result<TestCgroup> {
    let cgroup = TestCgroup::new()?;
    let mut tag = Command::new(binary());
    tag.args(["tag", "--level", &LEVEL.to_string(), "--cgroup"]).arg(&cgroup.directory);
    succeeded(&tag.output()?)?;
    Ok(cgroup)
}

/// Flows from the first host to the second. Without a grant they claim the level, which anybody may here.
fn flows<'a>(rack: &'a Rack, address: &'a str, count: usize, congestion: &'a str) -> Flows<'a> {
    Flows { from: rack.host(0), to: rack.host(1), address, count, priority: LEVEL.into(), congestion }
}

/// What they got, of what a level of this rate can carry in full segments with time stamps.
fn share_of(rate: Rate, flows: &[Flow]) -> f64 {
    let bytes: u64 = flows.iter().map(|flow| flow.bytes).sum();
    bytes as f64 * 8.0 / TIME.as_secs_f64() / (rate.bps() as f64 * 1_448.0 / 1_538.0)
}

fn longest_gap(flows: &[Flow]) -> Duration {
    flows.iter().map(|flow| flow.longest_gap).max().unwrap_or_default()
}

#[test]
fn a_policed_level_carries_tcp_that_is_paced_and_hardly_any_other() -> Result<()> {
    let rack = rack(QueueChoice::Keep)?;
    let address = rack.address(1);
    let cgroup = tagged()?;
    for count in [1, 4] {
        let flows = flows(&rack, &address, count, "cubic");
        let unpaced = share_of(RATE, &flows.run(TIME)?);
        let paced = share_of(RATE, &cgroup.within(|| flows.run(TIME))?);
        println!("{count} flows: {:.1} % of the level's payload rate, paced {:.1} %", unpaced * 100.0, paced * 100.0);
        assert!(paced >= 2.0 * unpaced, "{paced} {unpaced}");
        assert!(paced >= 0.5, "{paced}");
    }
    Ok(())
}

#[test]
fn flows_that_start_together_do_not_fill_the_queue_first() -> Result<()> {
    let rack = rack(QueueChoice::Auto)?;
    let address = rack.address(1);
    let cgroup = tagged()?;
    let flows = flows(&rack, &address, 64, "bbr");
    let from = Duration::from_secs(1);
    let unpaced = flows.run_after(from, TIME)?;
    let paced = cgroup.within(|| flows.run_after(from, TIME))?;
    for (name, flows) in [("unpaced", &unpaced), ("paced", &paced)] {
        println!("{name}: longest gap {:?}, {:.1} %", longest_gap(flows), share_of(RATE, flows) * 100.0);
    }
    assert!(longest_gap(&paced) < longest_gap(&unpaced) / 2);
    assert!(share_of(RATE, &paced) >= 0.97);
    Ok(())
}

#[test]
fn idle_connections_take_no_share() -> Result<()> {
    let rack = rack(QueueChoice::Keep)?;
    let address = rack.address(1);
    let cgroup = tagged()?;
    cgroup.within(|| {
        let flow = flows(&rack, &address, 1, "cubic");
        let alone = share_of(RATE, &flow.run(TIME)?);
        let listener = rack.host(1).enter(|| Ok(TcpListener::bind((address.as_str(), 0))?))?;
        let to = listener.local_addr()?;
        let mut idle =
            rack.host(0).enter(|| (0..50).map(|_| Ok(TcpStream::connect(to)?)).collect::<Result<Vec<_>>>())?;
        // They were active once.
        idle.iter_mut().try_for_each(|socket| socket.write_all(&[0; 1_000]))?;
        let beside = share_of(RATE, &flow.run(TIME)?);
        println!("alone {:.1} %, beside {} idle connections {:.1} %", alone * 100.0, idle.len(), beside * 100.0);
        assert!(alone >= 0.5, "{alone}");
        assert!(beside >= 0.9 * alone, "{beside} {alone}");
        Ok(())
    })
}

#[test]
fn a_change_of_plan_and_its_end_reach_flows_that_are_under_way() -> Result<()> {
    let rack = rack(QueueChoice::Keep)?;
    let address = rack.address(1);
    let cgroup = tagged()?;
    let flow = flows(&rack, &address, 1, "cubic");
    let during_warm_up = |change: &dyn Fn() -> Result<()>| {
        cgroup.within(|| {
            std::thread::scope(|scope| {
                let flows = scope.spawn(|| flow.run(TIME));
                std::thread::sleep(Duration::from_millis(300));
                change()?;
                flows.join().expect("no panic")
            })
        })
    };
    let slower = Rate::from_bps(RATE.bps() / 2);
    let got = during_warm_up(&|| rack.load(0, &plan(slower, Some(OverRule::Police))?, QueueChoice::Keep).map(drop))?;
    let of_slower = share_of(slower, &got);
    let got = during_warm_up(&|| rack.unload_all())?;
    let of_link = share_of(LINK, &got);
    println!("at half the rate {:.1} % of it, unloaded {:.1} % of the link", of_slower * 100.0, of_link * 100.0);
    assert!(of_slower >= 0.5, "{of_slower}");
    assert!(of_link >= 0.9, "{of_link}");
    Ok(())
}
