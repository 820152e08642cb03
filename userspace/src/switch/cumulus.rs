//! Cumulus Linux 5 with NVUE. Commands and defaults: NVIDIA, "Cumulus Linux User Guide", section "Quality of Service" (trust,
//! DSCP, egress queues, egress scheduler; PFC), and the "NVUE Reference", section "QoS".

use std::fmt::Write as _;

use super::{CODEPOINTS, Classes, Configuration, Request, comments, common_notes};

/// The map of the guide for a port that trusts DSCP.
const fn factory_class(dscp: u8) -> u8 {
    dscp >> 3
}

pub(super) fn configure(request: &Request<'_>) -> Configuration {
    let classes = Classes::of(request.plan);
    let mut notes = common_notes(request.plan, &classes);
    notes.push(format!(
        "Factory: the lines that classify by DSCP are commented out and 802.1p counts, which frames without a tag have not: \
         {}. Even where DSCP is trusted ({}), the eight queues share the link by DWRR, 12 or 13 percent each: nothing is \
         strict.",
        classes.under(|_| 0),
        classes.under(factory_class)
    ));
    let mut pfc = "PFC: none by default; `nv set qos roce` makes switch priority 3 lossless.".to_owned();
    if classes.has(3) {
        pfc += " Level 3 is one of the plan and must never be paused: `nv unset qos roce`, and no PFC profile with priority 3.";
    } else {
        pfc += " RoCE's codepoints (26, and 48 of its notifications) are best effort here, and its priority 3 gets nothing.";
    }
    notes.push(pfc);
    let mut text = comments("#", &notes);
    let mut set = |line: &str| {
        let _ = writeln!(text, "nv set {line}");
    };
    // The default profile is that of all ports; ports that are named get one of their own.
    let (profile, ports) = match request.ports {
        [] => ("default-global", None),
        ports => ("qjump", Some(ports.join(","))),
    };
    set(&format!("qos mapping {profile} trust l3"));
    for row in 0..CODEPOINTS / 8 {
        let rest: Vec<String> =
            (row * 8..row * 8 + 8).filter(|&dscp| classes.of_dscp(dscp) == 0).map(|dscp| dscp.to_string()).collect();
        set(&format!("qos mapping {profile} dscp {} switch-priority 0", rest.join(",")));
    }
    for level in classes.levels.iter().rev() {
        set(&format!("qos mapping {profile} dscp {} switch-priority {level}", level.dscp()));
    }
    // One map for the whole switch.
    for priority in 0..8 {
        set(&format!("qos egress-queue-mapping default-global switch-priority {priority} traffic-class {priority}"));
    }
    set(&format!("qos egress-scheduler {profile} traffic-class 0-7 mode strict"));
    if let Some(ports) = ports {
        set(&format!("interface {ports} qos mapping profile {profile}"));
        set(&format!("interface {ports} qos egress-scheduler profile {profile}"));
    }
    text += "nv config apply\n";
    Configuration { text, notes, has_comments: true }
}
