//! What the user wants, from a TOML file or from flags, read into a [`Network`] once and for all.

use std::{fmt, path::Path, str::FromStr};

use qjump_ebpf::{Level, limiter::Oversize};
use serde::{Deserialize, de};
use thiserror::Error;
use toml::Spanned;

use crate::{
    plan::{Delays, Demand, LevelSpec, Model, Network, default_wire_overhead},
    units::{Nanos, Rate},
};

/// A configuration that could not be read.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// Where.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file's text is wrong; the message shows the place.
    #[error("{path}: {message}")]
    Text {
        /// Where.
        path: String,
        /// What is wrong, with line, column and caret.
        message: String,
    },
}

/// A configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    cluster: Spanned<Cluster>,
    #[serde(rename = "level", default)]
    levels: Vec<Spanned<FileLevel>>,
    /// This host.
    #[serde(default)]
    pub host: Host,
    /// The text that all of it comes from.
    #[serde(skip)]
    text: String,
}

/// Section `[cluster]`: what all hosts have in common.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cluster {
    #[serde(deserialize_with = "hosts")]
    hosts: u32,
    #[serde(alias = "link_rate")]
    link_rate: Rate,
    #[serde(alias = "max_packet", deserialize_with = "bytes")]
    max_packet: u32,
    epsilon: Nanos,
    #[serde(default)]
    model: Model,
    #[serde(default = "default_wire_overhead", alias = "wire_overhead", deserialize_with = "bytes")]
    wire_overhead: u32,
}

/// Section `[[level]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLevel {
    #[serde(deserialize_with = "level_number")]
    level: Level,
    #[serde(deserialize_with = "factor")]
    factor: Demand,
    #[serde(default)]
    oversize: OversizeRule,
    #[serde(default = "no_tolerance")]
    tolerance: Nanos,
}

/// Section `[host]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Interfaces to manage.
    #[serde(default, deserialize_with = "interfaces")]
    pub interfaces: Vec<String>,
    /// Whether to write the level into the frame's 802.1p priority too.
    #[serde(default)]
    pub pcp: bool,
}

/// What happens to packets larger than their level allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OversizeRule {
    /// They travel at level 0.
    #[default]
    Demote,
    /// They are dropped.
    Drop,
}

impl From<OversizeRule> for Oversize {
    fn from(rule: OversizeRule) -> Self {
        match rule {
            OversizeRule::Demote => Self::Demote,
            OversizeRule::Drop => Self::Drop,
        }
    }
}

const fn no_tolerance() -> Nanos {
    Nanos::from_ns(0)
}

fn level_number<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Level, D::Error> {
    let number = i64::deserialize(deserializer)?;
    u8::try_from(number)
        .ok()
        .and_then(Level::new)
        .ok_or_else(|| de::Error::custom(format!("there is no level {number}; levels are 0 to 7, 7 the strictest")))
}

/// A whole number from a file, that says what it should be if it is anything else.
struct Whole {
    least: u32,
    expecting: &'static str,
}

impl de::Visitor<'_> for Whole {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<u32, E> {
        match u32::try_from(number) {
            Ok(valid) if valid >= self.least => Ok(valid),
            _ => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
        }
    }
}

fn hosts<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    deserializer.deserialize_i64(Whole { least: 1, expecting: "the number of hosts that may send, at least 1" })
}

fn bytes<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    deserializer.deserialize_i64(Whole { least: 0, expecting: "a plain number of bytes" })
}

fn factor<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Demand, D::Error> {
    struct Factor;
    impl de::Visitor<'_> for Factor {
        type Value = Demand;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number above 0, or \"unlimited\"")
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<Demand, E> {
            self.visit_f64(number as f64)
        }

        fn visit_f64<E: de::Error>(self, number: f64) -> Result<Demand, E> {
            checked(number).map_err(E::custom)
        }

        fn visit_str<E: de::Error>(self, word: &str) -> Result<Demand, E> {
            demand(word).map_err(E::custom)
        }
    }
    deserializer.deserialize_any(Factor)
}

fn interfaces<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Names;
    impl<'de> de::Visitor<'de> for Names {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of names: [\"eth0\"]")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, names: A) -> Result<Self::Value, A::Error> {
            Vec::deserialize(de::value::SeqAccessDeserializer::new(names))
        }
    }
    deserializer.deserialize_seq(Names)
}

/// A level on the command line: `LEVEL:FACTOR` or `LEVEL:unlimited`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelArg {
    level: Level,
    demand: Demand,
}

impl FromStr for LevelArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (level, factor) =
            text.split_once(':').ok_or_else(|| "write LEVEL:FACTOR, for example 7:1 or 5:4".to_owned())?;
        let level = level
            .parse::<u8>()
            .ok()
            .and_then(Level::new)
            .ok_or_else(|| format!("there is no level '{level}'; levels are 0 to 7, 7 the strictest"))?;
        Ok(Self { level, demand: demand(factor)? })
    }
}

fn demand(text: &str) -> Result<Demand, String> {
    if text == "unlimited" {
        return Ok(Demand::Unlimited);
    }
    checked(text.parse().map_err(|_| format!("the factor '{text}' is neither a number nor 'unlimited'"))?)
}

fn checked(factor: f64) -> Result<Demand, String> {
    if factor.is_finite() && factor > 0.0 {
        Ok(Demand::Factor(factor))
    } else {
        Err(format!("the factor is {factor}; it must be a number above 0 (1 is the guaranteed level)"))
    }
}

impl LevelArg {
    /// The level with these rules.
    pub fn spec(self, oversize: OversizeRule, tolerance: Nanos) -> LevelSpec {
        // A level of factor above 1 has a burst; the tolerance is for those that have none.
        let tolerance = match self.demand {
            Demand::Factor(factor) if factor <= 1.0 => tolerance,
            _ => no_tolerance(),
        };
        LevelSpec { oversize: oversize.into(), tolerance, ..LevelSpec::new(self.level, self.demand) }
    }
}

impl FileLevel {
    fn spec(&self) -> LevelSpec {
        LevelSpec {
            oversize: self.oversize.into(),
            tolerance: self.tolerance,
            ..LevelSpec::new(self.level, self.factor)
        }
    }
}

impl File {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// If it cannot be read, or its text is wrong: the message shows line, column and place.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        Self::parse(&text).map_err(|message| ConfigError::Text { path: shown, message })
    }

    /// Reads the text of a configuration file.
    ///
    /// # Errors
    /// The message, with a caret at the place.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        Ok(Self { text: text.to_owned(), ..file })
    }

    /// The network that the file describes.
    ///
    /// # Errors
    /// If no plan can have the network, or one of its levels beside those before it; with the line.
    pub fn network(&self) -> Result<Network, String> {
        let cluster = self.cluster.get_ref();
        let mut network = Network {
            hosts: cluster.hosts,
            link_rate: cluster.link_rate,
            max_packet: cluster.max_packet,
            delays: Delays::Given(cluster.epsilon),
            wire_overhead: cluster.wire_overhead,
            model: cluster.model,
            levels: Vec::new(),
        };
        // What is wrong without any limit is the network's fault.
        let unlimited = LevelArg { level: Level::STRICTEST, demand: Demand::Unlimited };
        let levels = vec![unlimited.spec(OversizeRule::Demote, no_tolerance())];
        Network { levels, ..network.clone() }.plan().map_err(|error| self.at(&self.cluster, error))?;
        for level in &self.levels {
            network.levels.push(level.get_ref().spec());
            network.plan().map_err(|error| self.at(level, error))?;
        }
        Ok(network)
    }

    /// The message with its line.
    fn at<T>(&self, place: &Spanned<T>, message: impl fmt::Display) -> String {
        let line = self.text[..place.span().start].matches('\n').count() + 1;
        format!("line {line}: {message}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[cluster]
hosts = 12
link-rate = "10gbit"
max-packet = 256
epsilon = "4us"

[[level]]
level = 7
factor = 1

[[level]]
level = 5
factor = 4.5
oversize = "drop"

[[level]]
level = 3
factor = "unlimited"

[host]
interfaces = ["eth0"]
"#;

    #[test]
    fn reads_a_file() {
        let file = File::parse(GOOD).unwrap();
        let network = file.network().unwrap();
        assert_eq!(network.hosts, 12);
        assert_eq!(network.link_rate, Rate::from_bps(10_000_000_000));
        assert_eq!(network.wire_overhead, 24);
        let demands: Vec<_> = network.levels.iter().map(|l| (l.level.number(), l.demand, l.oversize)).collect();
        assert_eq!(
            demands,
            [
                (7, Demand::Factor(1.0), Oversize::Demote),
                (5, Demand::Factor(4.5), Oversize::Drop),
                (3, Demand::Unlimited, Oversize::Demote)
            ]
        );
        assert_eq!(file.host.interfaces, ["eth0"]);
    }

    #[test]
    fn the_example_says_the_defaults() {
        let example = include_str!("../../../scripts/qjump.toml");
        let uncommented: String = example
            .lines()
            .map(|line| {
                line.strip_prefix("# ").filter(|rest| rest.contains(" = ") || rest.starts_with('[')).unwrap_or(line)
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let (plain, mut full) =
            [example, &uncommented].map(|text| File::parse(text).unwrap().network().unwrap()).into();
        assert_eq!(full.levels.pop().map(|level| level.demand), Some(Demand::Unlimited));
        assert_eq!(plain, full);
    }

    #[test]
    fn shows_where_a_file_is_wrong() {
        for (from, to, line, part) in [
            ("hosts = 12", "hosts = -3", "line 3", "`-3`, expected the number of hosts that may send, at least 1"),
            ("hosts = 12", "hosts = 0", "line 3", "at least 1"),
            ("hosts = 12", "hosts = 99999999999", "line 3", "invalid value"),
            ("\"10gbit\"", "\"10gbps\"", "line 4", "bytes to tc"),
            ("\"10gbit\"", "10", "line 4", "expected a rate with its unit, in quotes: \"10gbit\""),
            ("max-packet", "max-paket", "line 5", "unknown field `max-paket`"),
            ("= 256", "= \"256B\"", "line 5", "expected a plain number of bytes"),
            ("\"4us\"", "4", "line 6", "expected a time with its unit, in quotes: \"4us\""),
            ("factor = 1", "factor = true", "line 10", "`true`, expected a number above 0, or \"unlimited\""),
            ("factor = 1", "factor = 0", "line 10", "the factor is 0; it must be a number above 0"),
            ("factor = 1", "factor = nan", "line 10", "above 0"),
            ("factor = 1", "factor = \"lots\"", "line 10", "'lots' is neither a number nor 'unlimited'"),
            ("factor = 1", "factor = 1\ntolerance = \"20\"", "line 11", "no unit"),
            ("[\"eth0\"]", "\"eth0\"", "line 22", "expected a list of names: [\"eth0\"]"),
            ("level = 7", "level = 8", "line 9", "there is no level 8"),
            ("\"drop\"", "\"keep\"", "line 15", "unknown variant"),
        ] {
            let error = File::parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(line) && error.contains(part) && error.contains('^'), "{to}: {error}");
        }
        // What only the plan finds has its line, too.
        for (from, to, line, part) in [
            ("= 256", "= 5", "line 2: ", "max-packet is 5 bytes"),
            ("\"4us\"", "\"99999s\"", "line 2: ", "too long"),
            ("factor = 4.5", "factor = 1000", "line 12: ", "level 5: factor 1000"),
            ("factor = 4.5", "factor = 4.5\ntolerance = \"20us\"", "line 12: ", "level 5: a tolerance"),
            ("level = 3", "level = 7", "line 17: ", "level 7 is given twice"),
            ("level = 3", "level = 0", "line 17: ", "level 0"),
        ] {
            let error = File::parse(&GOOD.replace(from, to)).unwrap().network().unwrap_err();
            assert!(error.starts_with(line) && error.contains(part), "{to}: {error}");
        }
    }

    #[test]
    fn reads_levels_from_flags() {
        assert_eq!("7:1".parse::<LevelArg>(), Ok(LevelArg { level: Level::STRICTEST, demand: Demand::Factor(1.0) }));
        for (text, part) in [
            ("8:1", "no level '8'"),
            ("7:0", "above 0"),
            ("7:nan", "above 0"),
            ("7:inf", "above 0"),
            ("7:-1", "above 0"),
            ("7", "LEVEL:FACTOR"),
            ("7:x", "neither a number"),
            (":", "no level ''"),
        ] {
            let error = text.parse::<LevelArg>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
