//! What a switch must be told for a plan to hold: trust the DSCP, serve the levels in use strictly, pause none of them.
//!
//! One traffic class and one queue a level, all with the level's number; what is not the mark of a level in use goes to
//! class 0. Every output says what the factory's configuration would do to the levels, because that is what happens where it
//! is not applied. Pure: nothing is asked of a switch, and `qjump measure switch-check` shows whether it worked.

mod cumulus;
mod eos;
mod linux;
mod sonic;

use std::fmt::Write as _;

use qjump_ebpf::Level;
use thiserror::Error;

use crate::{plan::Plan, units::Rate};

/// What runs on the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Nos {
    /// SONiC: JSON for CONFIG_DB.
    Sonic,
    /// Arista EOS: lines for `configure`.
    Eos,
    /// Cumulus Linux 5: NVUE commands.
    Cumulus,
    /// Linux that forwards by its CPU: a shell script with tc.
    Linux,
}

/// What the configuration is for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// Ports, as the switch calls them; none stands for all where the switch has a word for that.
    pub ports: &'a [String],
    /// Rate of the ports, for switches that have to be told.
    pub port_rate: Rate,
}

/// A configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// What goes to the switch. Where it may have comments, it has the notes.
    pub text: String,
    /// What a person should know, a paragraph each.
    pub notes: Vec<String>,
    /// Whether the notes are part of the text.
    pub has_comments: bool,
}

/// Why there is no configuration.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Unusable {
    #[error("give the ports: --ports {example}. {how} lists them")]
    NoPorts { example: &'static str, how: &'static str },
    #[error("'{0}' cannot be the name of a port: letters, digits and . _ : / - $ only")]
    Port(String),
}

/// Writes the configuration for one kind of switch.
///
/// # Errors
/// If ports are missing, or cannot be the names of ports.
pub fn configure(nos: Nos, request: &Request<'_>) -> Result<Configuration, Unusable> {
    let odd = |port: &&String| {
        port.is_empty()
            || !port.chars().all(|c| c.is_ascii_alphanumeric() || "._:/-".contains(c) || (c == '$' && nos == Nos::Eos))
    };
    if let Some(port) = request.ports.iter().find(odd) {
        return Err(Unusable::Port(port.clone()));
    }
    match nos {
        Nos::Sonic => sonic::configure(request),
        Nos::Eos => Ok(eos::configure(request)),
        Nos::Cumulus => Ok(cumulus::configure(request)),
        Nos::Linux => linux::configure(request),
    }
}

/// How many codepoints there are.
const CODEPOINTS: u8 = 64;

/// The traffic classes that a plan uses.
struct Classes {
    /// Levels above 0, the strictest first.
    levels: Vec<Level>,
}

impl Classes {
    fn of(plan: &Plan) -> Self {
        let mut levels: Vec<Level> =
            plan.levels.iter().map(|level| level.spec.level).filter(|&level| level != Level::BEST_EFFORT).collect();
        levels.sort_unstable_by(|one, other| other.cmp(one));
        Self { levels }
    }

    fn has(&self, class: u8) -> bool {
        self.levels.iter().any(|level| level.number() == class)
    }

    /// The class of a codepoint: qjump's hosts write CS(level) and nothing else.
    fn of_dscp(&self, dscp: u8) -> u8 {
        self.levels.iter().find(|level| level.dscp() == dscp).map_or(0, |level| level.number())
    }

    /// Those of `classes` that lie below every level in use, where they can delay none of them.
    fn below(&self, classes: &[u8]) -> Vec<u8> {
        let lowest = self.levels.last().map_or(0, |level| level.number());
        classes.iter().copied().filter(|&class| class < lowest).collect()
    }

    /// `7, 5 and 3`.
    fn names(&self) -> String {
        list(&self.levels.iter().map(Level::to_string).collect::<Vec<_>>())
    }

    /// Where the levels in use and best effort end up under another map of codepoints: `queue 6: level 6; queue 1: levels 7,
    /// 5 and 0`.
    fn under(&self, map: impl Fn(u8) -> u8) -> String {
        let mut all = self.levels.clone();
        all.push(Level::BEST_EFFORT);
        let mut text = String::new();
        for queue in (0..8).rev() {
            let here: Vec<String> =
                all.iter().filter(|level| map(level.dscp()) == queue).map(Level::to_string).collect();
            if !here.is_empty() {
                let plural = if here.len() == 1 { "" } else { "s" };
                let separator = if text.is_empty() { "" } else { "; " };
                let _ = write!(text, "{separator}queue {queue}: level{plural} {}", list(&here));
            }
        }
        text
    }
}

fn list(words: &[String]) -> String {
    match words {
        [] => "none".to_owned(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// What holds for every switch.
fn common_notes(plan: &Plan, classes: &Classes) -> Vec<String> {
    vec![
        format!(
            "qjump switch-config, for levels {} of a plan of {} hosts with links of {}. Level = DSCP CS(level) = traffic \
             class = queue. All other codepoints are best effort, class 0.",
            classes.names(),
            plan.network.hosts,
            plan.network.link_rate
        ),
        "Codepoints of routing protocols that pass through (CS6) are best effort too, unless the plan has level 6. What the \
         switch itself sends and receives does not go by these maps."
            .to_owned(),
        "Then look whether it worked: qjump measure switch-check HOST --rate RATE.".to_owned(),
    ]
}

/// Paragraphs as comments of at most 100 columns.
fn comments(start: &str, notes: &[String]) -> String {
    let mut text = String::new();
    for note in notes {
        let mut line = start.to_owned();
        for word in note.split(' ') {
            if line.len() + 1 + word.len() > 100 {
                text += &line;
                text.push('\n');
                line = format!("{start}  ");
            }
            line.push(' ');
            line += word;
        }
        text += &line;
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        plan::{Delays, Demand, LevelSpec, Model, Network, default_wire_overhead},
        units::Nanos,
    };

    fn plan(levels: &[u8]) -> Plan {
        let level = |&number: &u8| {
            let level = Level::new(number).expect("a level");
            LevelSpec::new(level, if number > 3 { Demand::Factor(1.0) } else { Demand::Unlimited })
        };
        let network = Network {
            hosts: 12,
            link_rate: Rate::from_bps(10_000_000_000),
            max_packet: 256,
            delays: Delays::Given(Nanos::from_ns(4_000)),
            wire_overhead: default_wire_overhead(),
            tagged: false,
            model: Model::Strict,
            levels: levels.iter().map(level).collect(),
        };
        network.plan().expect("a plan")
    }

    fn configured(nos: Nos, levels: &[u8], ports: &[&str]) -> Configuration {
        let ports: Vec<String> = ports.iter().map(|&port| port.to_owned()).collect();
        let request = Request { plan: &plan(levels), ports: &ports, port_rate: Rate::from_bps(10_000_000_000) };
        configure(nos, &request).expect("a configuration")
    }

    /// Read by people, line by line, against the manuals that the modules name. After a change that is meant: look at the
    /// difference, and keep what the test has written.
    #[test]
    fn outputs_are_those_that_were_reviewed() {
        let reviewed = [
            (Nos::Sonic, &["Ethernet0", "Ethernet4"][..], "sonic.json", include_str!("reviewed/sonic.json")),
            (Nos::Eos, &[], "eos.txt", include_str!("reviewed/eos.txt")),
            (Nos::Cumulus, &[], "cumulus.txt", include_str!("reviewed/cumulus.txt")),
            (Nos::Linux, &["swp1", "swp2"], "linux.sh", include_str!("reviewed/linux.sh")),
        ];
        let folder = std::env::temp_dir();
        let mut different = Vec::new();
        for (nos, ports, file, expected) in reviewed {
            let Configuration { text, notes, has_comments } = configured(nos, &[7, 5, 4], ports);
            if text != expected {
                std::fs::write(folder.join(file), &text).expect("the folder is writable");
                different.push(file);
            }
            assert_eq!(has_comments, nos != Nos::Sonic);
            assert!(
                notes.iter().any(|note| note.starts_with("Factory: ")),
                "{nos:?} does not say what the factory does"
            );
        }
        assert!(different.is_empty(), "not as reviewed: {different:?}; the new ones are in {}", folder.display());
    }

    #[test]
    fn only_marks_of_levels_in_use_have_a_class() {
        let classes = Classes::of(&plan(&[5, 7]));
        for dscp in 0..CODEPOINTS {
            let expected = match dscp {
                40 => 5,
                56 => 7,
                _ => 0,
            };
            assert_eq!(classes.of_dscp(dscp), expected, "DSCP {dscp}");
        }
        assert_eq!(classes.names(), "7 and 5");
        assert_eq!(classes.below(&[3, 4]), [3, 4]);
        assert_eq!(Classes::of(&plan(&[7, 4])).below(&[3, 4]), [3]);
        assert_eq!(Classes::of(&plan(&[7, 2])).below(&[3, 4]), [0; 0]);
        assert_eq!(classes.under(|_| 1), "queue 1: levels 7, 5 and 0");
        assert_eq!(classes.under(|dscp| dscp >> 3), "queue 7: level 7; queue 5: level 5; queue 0: level 0");
    }

    #[test]
    fn ports_are_asked_for_and_looked_at() {
        let plan = plan(&[7]);
        let with = |nos, ports: &[&str]| {
            let ports: Vec<String> = ports.iter().map(|&port| port.to_owned()).collect();
            configure(nos, &Request { plan: &plan, ports: &ports, port_rate: Rate::from_bps(1) }).map(|_| ())
        };
        for nos in [Nos::Sonic, Nos::Linux] {
            assert!(matches!(with(nos, &[]), Err(Unusable::NoPorts { .. })), "{nos:?}");
        }
        for port in ["", "a b", "eth0;reboot", "$(reboot)", "\"", "a\nb"] {
            for nos in [Nos::Sonic, Nos::Eos, Nos::Cumulus, Nos::Linux] {
                assert_eq!(with(nos, &[port]), Err(Unusable::Port(port.to_owned())), "{nos:?}");
            }
        }
        assert_eq!(with(Nos::Eos, &["Ethernet1-$"]), Ok(()));
    }

    #[test]
    fn a_paused_class_is_never_one_of_the_plan_nor_above_one() {
        for levels in [&[7][..], &[7, 4], &[7, 3], &[5, 2], &[7, 6, 5, 4, 3, 2, 1]] {
            let text = configured(Nos::Sonic, levels, &["Ethernet0"]).text;
            let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            let paused = json["PORT_QOS_MAP"]["Ethernet0"]["pfc_enable"].as_str().unwrap_or_default();
            let lowest = *levels.iter().min().expect("a level");
            for class in paused.split(',').filter(|class| !class.is_empty()) {
                assert!(class.parse::<u8>().expect("a class") < lowest, "{levels:?} {paused}");
            }
            // The scheduler of each level in use is strict.
            for level in levels {
                assert_eq!(json["QUEUE"][format!("Ethernet0|{level}")]["scheduler"], "qjump_strict");
            }
            assert_eq!(json["DSCP_TO_TC_MAP"]["QJUMP"].as_object().expect("a map").len(), 64);
        }
    }
}
