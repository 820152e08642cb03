//! Whether the bounds of the plan hold on an interface, by what the kernel says of it. Pure.

use qjump_ebpf::Level;

use crate::{
    dataplane::{InterfaceStatus, Why},
    plan::bound_in_force,
    units::Rate,
};

/// Why the bounds that a plan gives cannot be counted on; nothing if they hold, as far as this host goes.
///
/// `link_bps` is the rate of the link, if its driver says.
pub fn doubts(status: &InterfaceStatus, link_bps: Option<u64>) -> Vec<String> {
    let plan = &status.config.plan;
    let mut doubts: Vec<String> = status.problem.iter().chain(&status.queue_problems).cloned().collect();
    if !Level::strictest_first().any(|level| bound_in_force(&status.config, level).is_some()) {
        doubts.push("no level of the plan has a bound".to_owned());
    }
    if let Some((at, _)) = status.position.filter(|(at, _)| *at > 1) {
        doubts.push(format!("{} program(s) run before qjump's and may pass packets around it", at - 1));
    }
    if let Some(speed) = link_bps.filter(|&speed| speed < plan.link_rate_bps) {
        let [speed, planned] = [speed, plan.link_rate_bps].map(Rate::from_bps);
        doubts.push(format!("the link has {speed}, and the plan counts on {planned}"));
    }
    if let Some(why @ (Why::Foreign | Why::Vlan | Why::NothingThere)) = Why::of_number(plan.queue_why) {
        doubts.push(format!("nothing serves this host's levels in their order: {why}"));
    }
    doubts
}

/// The rate of an interface's link, bit/s, if its driver says.
pub fn link_bps(interface: &str) -> Option<u64> {
    crate::check::ethtool::settings(interface).speed_mbit.map(|mbit| u64::from(mbit) * 1_000_000)
}

#[cfg(test)]
mod tests {
    use qjump_ebpf::Config;

    use super::*;
    use crate::qdisc::Queue;

    fn status() -> InterfaceStatus {
        let mut config = Config::EMPTY;
        config.plan.link_rate_bps = 1_000_000_000;
        config.plan.levels[7].bound_ns = 1e6;
        InterfaceStatus {
            interface: "eth0".to_owned(),
            elsewhere: false,
            hook: "tcx",
            attached: true,
            problem: None,
            program_id: Some(1),
            position: Some((1, 2)),
            config,
            queue: Queue::Htb,
            queue_problems: Vec::new(),
            levels: Vec::new(),
        }
    }

    #[test]
    fn each_doubt_has_its_reason() {
        assert_eq!(doubts(&status(), None), [""; 0]);
        assert_eq!(doubts(&status(), Some(1_000_000_000)), [""; 0]);
        let doubt = |change: fn(&mut InterfaceStatus), link| {
            let mut status = status();
            change(&mut status);
            let [one] = &doubts(&status, link)[..] else { panic!("not one doubt") };
            one.clone()
        };
        assert!(doubt(|_| (), Some(100_000_000)).contains("the link has 100mbit, and the plan counts on 1gbit"));
        assert!(doubt(|status| status.position = Some((3, 3)), None).starts_with("2 program(s)"));
        assert!(doubt(|status| status.config.plan.levels[7].bound_ns = -1.0, None).contains("no level"));
        assert!(doubt(|status| status.config.plan.queue_why = Why::Foreign as u16, None).contains("somebody else"));
        assert_eq!(doubt(|status| status.problem = Some("gone".to_owned()), None), "gone");
        assert_eq!(doubt(|status| status.queue_problems = vec!["other".to_owned()], None), "other");
    }
}
