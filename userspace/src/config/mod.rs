//! What the user wants, from a TOML file or from flags, read into a [`Network`] once and for all.

use std::{path::Path, str::FromStr};

use qjump_ebpf::{Level, limiter::Oversize};
use serde::{Deserialize, de};
use thiserror::Error;

use crate::{
    plan::{Demand, LevelSpec, Model, Network, default_wire_overhead},
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
    /// The network.
    pub cluster: Cluster,
    /// The levels.
    #[serde(rename = "level", default)]
    pub levels: Vec<FileLevel>,
    /// This host.
    #[serde(default)]
    pub host: Host,
}

/// Section `[cluster]`: what all hosts have in common.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cluster {
    hosts: u32,
    #[serde(alias = "link_rate")]
    link_rate: Rate,
    #[serde(alias = "max_packet")]
    max_packet: u32,
    epsilon: Nanos,
    #[serde(default)]
    model: Model,
    #[serde(default = "default_wire_overhead", alias = "wire_overhead")]
    wire_overhead: u32,
}

/// Section `[[level]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLevel {
    #[serde(deserialize_with = "level_number")]
    level: Level,
    factor: FileFactor,
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
    #[serde(default)]
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

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum FileFactor {
    Number(f64),
    Word(String),
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
    let factor: f64 = text.parse().map_err(|_| format!("the factor '{text}' is neither a number nor 'unlimited'"))?;
    if factor.is_finite() && factor > 0.0 {
        Ok(Demand::Factor(factor))
    } else {
        Err(format!("the factor is {text}; it must be a number above 0 (1 is the guaranteed level)"))
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
        LevelSpec { level: self.level, demand: self.demand, oversize: oversize.into(), tolerance }
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
        toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())
    }

    /// The network that the file describes.
    ///
    /// # Errors
    /// If a factor is not a number above 0 or `"unlimited"`.
    pub fn network(&self) -> Result<Network, String> {
        let levels = self
            .levels
            .iter()
            .map(|level| {
                let demand = match &level.factor {
                    FileFactor::Number(factor) => Demand::Factor(*factor),
                    FileFactor::Word(word) => {
                        demand(word).map_err(|error| format!("level {}: {error}", level.level))?
                    }
                };
                Ok(LevelSpec {
                    level: level.level,
                    demand,
                    oversize: level.oversize.into(),
                    tolerance: level.tolerance,
                })
            })
            .collect::<Result<_, String>>()?;
        Ok(Network {
            hosts: self.cluster.hosts,
            link_rate: self.cluster.link_rate,
            max_packet: self.cluster.max_packet,
            epsilon: self.cluster.epsilon,
            wire_overhead: self.cluster.wire_overhead,
            model: self.cluster.model,
            levels,
        })
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
    fn shows_where_a_file_is_wrong() {
        for (from, to, line, part) in [
            ("hosts = 12", "hosts = -1", "line 3", "invalid value"),
            ("hosts = 12", "hosts = 99999999999", "line 3", "invalid value"),
            ("\"10gbit\"", "\"10gbps\"", "line 4", "bytes to tc"),
            ("max-packet", "max-paket", "line 5", "unknown field `max-paket`"),
            ("level = 7", "level = 8", "line 9", "there is no level 8"),
            ("\"drop\"", "\"keep\"", "line 15", "unknown variant"),
        ] {
            let error = File::parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(line) && error.contains(part) && error.contains('^'), "{to}: {error}");
        }
        let error = File::parse(&GOOD.replace("\"unlimited\"", "\"lots\"")).unwrap().network().unwrap_err();
        assert_eq!(error, "level 3: the factor 'lots' is neither a number nor 'unlimited'");
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
