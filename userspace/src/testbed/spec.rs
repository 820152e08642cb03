//! What a rack is made of, read from TOML.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, de};
use serde_json::{Value, json};
use toml::Spanned;

use crate::{config, units::Rate};

/// Most hosts of a rack: each is a namespace, a cable and a port.
pub const MAX_HOSTS: usize = 64;
/// Most switches of the second tier.
const MAX_SPINES: usize = 4;
/// A port holds at least one frame of 1514 bytes.
const BUFFERS: std::ops::RangeInclusive<u32> = 1_514..=64 << 20;
/// Below, a frame takes seconds; above, no CPU keeps up with the port it emulates.
const RATES: std::ops::RangeInclusive<u64> = 100_000..=10_000_000_000;

/// How ports serve the packets that wait for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Queueing {
    /// In the order of their arrival.
    #[default]
    Fifo,
    /// Eight queues by the packets' DSCP, the highest first, each in the order of arrival.
    Strict,
    /// In the order of their arrival; from so many waiting bytes on, packets that can bear it get the mark of congestion. (In
    /// a file, `ecn-threshold` says that.)
    #[serde(skip)]
    Marking(u32),
    /// A queue for each flow, in turn, and what waits for too long is marked or dropped: fq_codel.
    #[serde(skip)]
    FairFlows,
}

impl Queueing {
    /// As in the file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fifo => "fifo",
            Self::Strict => "strict",
            Self::Marking(_) => "marking",
            Self::FairFlows => "fair-flows",
        }
    }
}

/// A port: how fast it sends, and what it can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its rate.
    #[serde(deserialize_with = "rate")]
    pub rate: Rate,
    /// Bytes that it can hold for each of its queues.
    #[serde(deserialize_with = "buffer")]
    pub buffer: u32,
}

/// A second tier of switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spine {
    /// Hosts at each switch of the first tier.
    pub hosts_per_leaf: usize,
    /// Switches of the second tier; each leaf has a link to each of them.
    pub switches: usize,
    /// The ports of those links, at both ends.
    pub port: Port,
}

/// What a rack is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RackSpec {
    /// Hosts.
    pub hosts: usize,
    /// The switches' ports towards the hosts.
    pub leaf: Port,
    /// The second tier; without one there is a single switch.
    pub spine: Option<Spine>,
    /// The hosts' own network cards: a FIFO. Without, a host sends as fast as it can: the model asks only that no link
    /// be slower than the slowest.
    pub host: Option<Port>,
    /// How ports queue, as long as nobody sets it otherwise.
    pub queueing: Queueing,
    /// Bytes in a queue from which on packets that can bear it get the mark of congestion.
    pub ecn_threshold: Option<u32>,
    /// Whether hosts have IPv6 addresses as well. Their kernels then report multicast groups now and then, at level 7.
    pub ipv6: bool,
}

/// A rack with its name and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedRack {
    /// Its name: of the stock, or the file's.
    pub name: String,
    /// One line for people.
    pub about: String,
    /// What it is made of.
    pub spec: RackSpec,
    /// The text it was read from.
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    about: String,
    #[serde(deserialize_with = "hosts")]
    hosts: usize,
    #[serde(default)]
    queueing: Queueing,
    #[serde(default)]
    ecn_threshold: Option<Spanned<u32>>,
    #[serde(default)]
    ipv6: bool,
    leaf: Port,
    #[serde(default)]
    spine: Option<Spanned<FileSpine>>,
    #[serde(default)]
    host: Option<Port>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileSpine {
    hosts_per_leaf: usize,
    #[serde(deserialize_with = "spines")]
    switches: usize,
    #[serde(deserialize_with = "rate")]
    rate: Rate,
    #[serde(deserialize_with = "buffer")]
    buffer: u32,
}

fn within<'de, D: de::Deserializer<'de>>(
    deserializer: D,
    range: &std::ops::RangeInclusive<u32>,
    what: &str,
) -> Result<u32, D::Error> {
    let number = i64::deserialize(deserializer)?;
    u32::try_from(number).ok().filter(|number| range.contains(number)).ok_or_else(|| {
        de::Error::custom(format!("{what} is {number}; from {} to {} will do", range.start(), range.end()))
    })
}

fn hosts<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    within(deserializer, &(2..=MAX_HOSTS as u32), "the number of hosts").map(|number| number as usize)
}

fn spines<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    within(deserializer, &(1..=MAX_SPINES as u32), "the number of spine switches").map(|number| number as usize)
}

fn buffer<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    within(deserializer, &BUFFERS, "the buffer, in bytes,")
}

fn rate<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Rate, D::Error> {
    let rate = Rate::deserialize(deserializer)?;
    if RATES.contains(&rate.bps()) {
        return Ok(rate);
    }
    let [low, high] = [RATES.start(), RATES.end()].map(|bps| Rate::from_bps(*bps));
    Err(de::Error::custom(format!("the rate is {rate}; namespaces can emulate {low} to {high}")))
}

impl RackSpec {
    /// Hosts at one switch.
    pub const fn star(hosts: usize, rate: Rate, buffer: u32) -> Self {
        Self {
            hosts,
            leaf: Port { rate, buffer },
            spine: None,
            host: None,
            queueing: Queueing::Fifo,
            ecn_threshold: None,
            ipv6: false,
        }
    }

    /// Switches that hosts are connected to.
    pub fn leaves(&self) -> usize {
        self.spine.map_or(1, |spine| self.hosts.div_ceil(spine.hosts_per_leaf))
    }

    /// Switches of the second tier.
    pub fn spines(&self) -> usize {
        self.spine.map_or(0, |spine| spine.switches)
    }

    /// The switch of the first tier that a host is connected to.
    pub fn leaf_of(&self, host: usize) -> usize {
        self.spine.map_or(0, |spine| host / spine.hosts_per_leaf)
    }

    /// The slowest of its links, R.
    pub fn slowest(&self) -> Rate {
        let others = [self.spine.map(|spine| spine.port.rate), self.host.map(|host| host.rate)];
        others.into_iter().flatten().fold(self.leaf.rate, Rate::min)
    }

    /// Ports of switches on the longest way from host to host.
    pub fn hops(&self) -> u32 {
        if self.spine.is_some() { 3 } else { 1 }
    }

    /// For results.
    pub fn to_json(&self) -> Value {
        let port = |port: &Port| json!({"rate_bps": port.rate.bps(), "buffer_bytes": port.buffer});
        json!({
            "hosts": self.hosts,
            "queueing": self.queueing.name(),
            "ecn_threshold_bytes": self.ecn_threshold,
            "ipv6": self.ipv6,
            "leaf": port(&self.leaf),
            "spine": self.spine.map(|spine| json!({
                "hosts_per_leaf": spine.hosts_per_leaf,
                "switches": spine.switches,
                "rate_bps": spine.port.rate.bps(),
                "buffer_bytes": spine.port.buffer,
            })),
            "host": self.host.as_ref().map(port),
        })
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let mut text = match self.spine {
            None => format!("{} hosts at one switch of {}", self.hosts, self.leaf.rate),
            Some(spine) => format!(
                "{} hosts, {} at each of {} switches of {}, {} of {} above",
                self.hosts,
                spine.hosts_per_leaf,
                self.leaves(),
                self.leaf.rate,
                spine.switches,
                spine.port.rate
            ),
        };
        if let Some(host) = self.host {
            text += &format!(", network cards of {}", host.rate);
        }
        text + &format!(", {} queues of {} bytes", self.queueing.name(), self.leaf.buffer)
    }
}

impl NamedRack {
    /// Reads a rack.
    ///
    /// # Errors
    /// The message, with line, column and caret.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| config::helpful(error.to_string().trim_end()))?;
        let spine = match &file.spine {
            None => None,
            Some(place) => {
                let spine = place.get_ref();
                // Each switch above reaches every one below, so one below is no second tier.
                if spine.hosts_per_leaf < 1 || spine.hosts_per_leaf >= file.hosts {
                    let message = format!(
                        "hosts-per-leaf is {}; of {} hosts, 1 to {} leave two leaves or more",
                        spine.hosts_per_leaf,
                        file.hosts,
                        file.hosts - 1
                    );
                    return Err(config::at(text, place, message));
                }
                let port = Port { rate: spine.rate, buffer: spine.buffer };
                Some(Spine { hosts_per_leaf: spine.hosts_per_leaf, switches: spine.switches, port })
            }
        };
        if let Some(threshold) = &file.ecn_threshold {
            let least = spine.map_or(file.leaf.buffer, |spine| spine.port.buffer.min(file.leaf.buffer));
            if !(1_514..=least).contains(threshold.get_ref()) {
                let message = format!(
                    "ecn-threshold is {}; from one frame, 1514 bytes, to the smallest buffer, {least}, will do",
                    threshold.get_ref()
                );
                return Err(config::at(text, threshold, message));
            }
        }
        let spec = RackSpec {
            hosts: file.hosts,
            leaf: file.leaf,
            spine,
            host: file.host,
            queueing: file.queueing,
            ecn_threshold: file.ecn_threshold.map(Spanned::into_inner),
            ipv6: file.ipv6,
        };
        Ok(Self { name: name.to_owned(), about: file.about, spec, text: text.to_owned() })
    }

    /// A rack of the stock by its name, or of a file by its path.
    ///
    /// # Errors
    /// If there is neither, or the file is wrong.
    pub fn find(source: &str) -> Result<Self> {
        if let Some((name, text)) = STOCK.iter().find(|(name, _)| *name == source) {
            return Self::parse(name, text).map_err(|error| anyhow!("rack {name}: {error}"));
        }
        let path = Path::new(source);
        if !path.exists() && !source.contains(['/', '.']) {
            let names: Vec<&str> = STOCK.iter().map(|(name, _)| *name).collect();
            bail!(
                "there is neither a rack '{source}' nor a file of that name{}; the racks are {}",
                config::meant(source, &names),
                names.join(", ")
            );
        }
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the rack {source}"))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Self::parse(&name, &text).map_err(|error| anyhow!("{source}: {error}"))
    }
}

/// The racks that come with qjump: name and text.
const STOCK: [(&str, &str); 7] = [
    ("pair", include_str!("../../../scripts/racks/pair.toml")),
    ("eight", include_str!("../../../scripts/racks/eight.toml")),
    ("ten", include_str!("../../../scripts/racks/ten.toml")),
    ("nics", include_str!("../../../scripts/racks/nics.toml")),
    ("tiers", include_str!("../../../scripts/racks/tiers.toml")),
    ("modest", include_str!("../../../scripts/racks/modest.toml")),
    ("slow", include_str!("../../../scripts/racks/slow.toml")),
];

/// The racks that come with qjump.
pub fn stock() -> impl Iterator<Item = NamedRack> {
    STOCK.iter().map(|(name, text)| NamedRack::parse(name, text).expect("a test reads them all"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: &str = "[leaf]\nrate = \"100mbit\"\nbuffer = 262144\n";

    fn refused(text: &str) -> String {
        NamedRack::parse("x", text).unwrap_err()
    }

    #[test]
    fn every_rack_of_the_stock_can_be_read_and_says_what_it_is_for() {
        for rack in stock() {
            assert!(!rack.about.is_empty(), "{}", rack.name);
            assert!(NamedRack::find(&rack.name).unwrap() == rack);
            assert!(super::super::standing::check_name(&rack.name).is_ok());
        }
        let eight = NamedRack::find("eight").unwrap();
        assert_eq!(eight.spec, RackSpec::star(8, Rate::from_bps(100_000_000), 262_144));
    }

    #[test]
    fn two_tiers_are_counted_from_hosts_per_leaf() {
        let spine = "[spine]\nhosts-per-leaf = 6\nswitches = 2\nrate = \"50mbit\"\nbuffer = 65536\n";
        let spec = NamedRack::parse("x", &format!("hosts = 14\n{LEAF}{spine}")).unwrap().spec;
        assert_eq!((spec.leaves(), spec.spines(), spec.hops()), (3, 2, 3));
        assert_eq!((spec.leaf_of(5), spec.leaf_of(6), spec.leaf_of(13)), (0, 1, 2));
        assert_eq!(spec.slowest(), Rate::from_bps(50_000_000));
    }

    #[test]
    fn mistakes_are_shown_where_they_are() {
        for (text, parts) in [
            (format!("hosts = 65\n{LEAF}"), ["line 1, column 9", "from 2 to 64"]),
            (format!("hosts = 1\n{LEAF}"), ["line 1, column 9", "is 1"]),
            (format!("hosts = 4\nqueing = \"fifo\"\n{LEAF}"), ["line 2, column 1", "did you mean 'queueing'?"]),
            (format!("hosts = 4\nqueueing = \"red\"\n{LEAF}"), ["line 2", "`fifo` or `strict`"]),
            (format!("hosts = 4\necn-threshold = 9\n{LEAF}"), ["line 2, column 17", "from one frame"]),
            (
                "hosts = 4\n[leaf]\nrate = \"1bit\"\nbuffer = 9000\n".to_owned(),
                ["line 3, column 8", "100kbit to 10gbit"],
            ),
            ("hosts = 4\n[leaf]\nrate = \"1gbit\"\nbuffer = 900\n".to_owned(), ["line 4, column 10", "1514"]),
            ("hosts = 4\n".to_owned(), ["missing field", "leaf"]),
            (
                format!(
                    "hosts = 4\n{LEAF}[spine]\nhosts-per-leaf = 4\nswitches = 1\nrate = \"1gbit\"\nbuffer = 9000\n"
                ),
                ["line 5, column 1", "1 to 3 leave two leaves"],
            ),
            (
                format!(
                    "hosts = 4\n{LEAF}[spine]\nhosts-per-leaf = 2\nswitches = 9\nrate = \"1gbit\"\nbuffer = 9000\n"
                ),
                ["line 7, column 12", "from 1 to 4"],
            ),
        ] {
            let message = refused(&text);
            for part in parts {
                assert!(message.contains(part), "{text}\n{message}");
            }
            assert!(message.contains('^') || message.contains("missing"), "{message}");
        }
    }

    #[test]
    fn what_is_no_rack_is_said_with_the_nearest_name() {
        let error = NamedRack::find("eigt").unwrap_err().to_string();
        assert!(error.contains("did you mean 'eight'?") && error.contains("pair, eight"), "{error}");
        assert!(format!("{:#}", NamedRack::find("/nowhere/x.toml").unwrap_err()).contains("cannot read"));
    }
}
