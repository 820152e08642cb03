//! Arista EOS. Commands and defaults: "EOS User Manual", chapter "Quality of Service" (arista.com/en/um-eos/eos-quality-of-service):
//! trust modes, default maps of DSCP to traffic class, `tx-queue`, `priority`; and chapter "Priority Flow Control" for
//! `priority-flow-control priority N drop`. None of it has been tried on a switch.

use std::fmt::Write as _;

use super::{CODEPOINTS, Classes, Configuration, Request, comments, common_notes};

/// The default map of DSCP to traffic class, the same on all platforms of the manual. Classes 0 and 1 are the other way
/// round: best effort is class 1, and CS1 is below it.
const fn factory_class(dscp: u8) -> u8 {
    match dscp >> 3 {
        0 => 1,
        1 => 0,
        class => class,
    }
}

/// Class 7 belongs to queue 7 for good; `qos map traffic-class 7` is refused on most platforms.
const FIXED_CLASS: u8 = 7;

pub(super) fn configure(request: &Request<'_>) -> Configuration {
    let classes = Classes::of(request.plan);
    let mut notes = common_notes(request.plan, &classes);
    notes.push(format!(
        "Factory: a switched port trusts CoS, and frames without a tag have none: {}. A routed port trusts DSCP: {}; best \
         effort is in queue 1 and CS1 below it.",
        classes.under(|_| 1),
        classes.under(factory_class)
    ));
    notes.push(
        "Where the platform has unicast queues of their own (Trident, Tomahawk), write uc-tx-queue for tx-queue below \
         interface. Class 7 is always queue 7, which the switch's own control frames use, too."
            .to_owned(),
    );
    notes.push(
        "PFC is off by default; a level of the plan must not be lossless on any port, so its priority is set to drop."
            .to_owned(),
    );
    let mut text = comments("!", &notes) + "!\n";
    // Eight to a line, as the class selectors have them.
    for row in 0..CODEPOINTS / 8 {
        let row: Vec<u8> = (row * 8..row * 8 + 8).collect();
        let rest: Vec<String> = row.iter().filter(|&&dscp| classes.of_dscp(dscp) == 0).map(u8::to_string).collect();
        let _ = writeln!(text, "qos map dscp {} to traffic-class 0", rest.join(" "));
        for dscp in row.into_iter().filter(|&dscp| classes.of_dscp(dscp) != 0) {
            let _ = writeln!(text, "qos map dscp {dscp} to traffic-class {}", classes.of_dscp(dscp));
        }
    }
    let queues: Vec<u8> = classes.levels.iter().map(|level| level.number()).chain([0]).collect();
    for class in queues.iter().filter(|&&class| class != FIXED_CLASS) {
        let _ = writeln!(text, "qos map traffic-class {class} to tx-queue {class}");
    }
    let every = [String::from("Ethernet1-$")];
    for port in if request.ports.is_empty() { &every } else { request.ports } {
        let _ = writeln!(text, "!\ninterface {port}\n   qos trust dscp");
        for level in &classes.levels {
            let _ = writeln!(text, "   priority-flow-control priority {level} drop");
        }
        for queue in &queues {
            let _ = writeln!(text, "   tx-queue {queue}\n      priority strict");
        }
    }
    text += "!\n";
    Configuration { text, notes, has_comments: true }
}
