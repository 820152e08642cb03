//! What the user wants, from a TOML file or from flags, read into a [`Network`] once and for all.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::ValueEnum as _;
use qjump_ebpf::{Charge, Level, limiter::Oversize};
use serde::{Deserialize, de};
use thiserror::Error;
use toml::Spanned;

use crate::{
    agent::members,
    plan::{
        Claims, Delays, Demand, ETHERNET_MTU, LevelSpec, Model, Network, OverRule, Path as NetworkPath, Plan,
        backward::{App, Assigned},
        default_wire_overhead,
        delays::GSO_BURST,
    },
    tag::rules::{Rule, Rules},
    units::{self, Nanos, Rate},
};

/// The JSON Schema of the file, for editors. Written by hand, beside deserializers that are: the tests hold its keys against
/// theirs.
pub const SCHEMA: &str = include_str!("qjump.schema.json");

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
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    cluster: Spanned<Cluster>,
    #[serde(rename = "level", default)]
    levels: Vec<Spanned<FileLevel>>,
    #[serde(rename = "app", default)]
    apps: Vec<Spanned<FileApp>>,
    #[serde(rename = "assign", default)]
    rules: Vec<Spanned<Rule>>,
    /// This host.
    #[serde(default)]
    pub host: Host,
    /// The texts that all of it comes from, one after the other.
    #[serde(skip)]
    text: String,
    /// Where the texts of conf.d begin in it, and their names.
    #[serde(skip)]
    parts: Vec<(usize, String)>,
}

/// A file of conf.d: what it says comes on top of the configuration beside it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fragment {
    #[serde(rename = "level", default)]
    levels: Vec<Spanned<FileLevel>>,
    #[serde(rename = "app", default)]
    apps: Vec<Spanned<FileApp>>,
    #[serde(rename = "assign", default)]
    rules: Vec<Spanned<Rule>>,
    #[serde(default)]
    host: Option<Spanned<FragmentHost>>,
}

/// Section `[host]` of a file of conf.d.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FragmentHost {
    #[serde(deserialize_with = "interfaces")]
    interfaces: Vec<String>,
}

/// Section `[cluster]`: what all hosts have in common.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cluster {
    #[serde(default, deserialize_with = "hosts")]
    hosts: Option<u32>,
    #[serde(default)]
    members: Option<members::Config>,
    #[serde(alias = "link_rate")]
    link_rate: Rate,
    #[serde(alias = "max_packet", deserialize_with = "bytes")]
    max_packet: u32,
    #[serde(default)]
    epsilon: Option<Nanos>,
    #[serde(default)]
    hops: Option<u32>,
    #[serde(default, alias = "switch_delay")]
    switch_delay: Option<Nanos>,
    #[serde(default, deserialize_with = "some_bytes")]
    mtu: Option<u32>,
    #[serde(default, alias = "host_burst", deserialize_with = "some_bytes")]
    host_burst: Option<u32>,
    #[serde(default)]
    model: Model,
    #[serde(default = "default_wire_overhead", alias = "wire_overhead", deserialize_with = "bytes")]
    wire_overhead: u32,
}

/// Section `[[level]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileLevel {
    #[serde(deserialize_with = "level_number")]
    level: Level,
    #[serde(default, deserialize_with = "factor")]
    factor: Option<Demand>,
    #[serde(default)]
    rate: Option<Rate>,
    #[serde(default)]
    charge: Option<ChargeRule>,
    #[serde(default, alias = "max_packet", deserialize_with = "some_bytes")]
    max_packet: Option<u32>,
    #[serde(default, deserialize_with = "some_bytes")]
    burst: Option<u32>,
    #[serde(default)]
    oversize: OversizeRule,
    #[serde(default)]
    over: Option<OverRule>,
    #[serde(default = "no_tolerance")]
    tolerance: Nanos,
    #[serde(default)]
    claims: Claims,
}

/// Section `[[app]]`: what an application sends from every host, and how soon it must be there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileApp {
    name: String,
    #[serde(deserialize_with = "bytes")]
    message: u32,
    #[serde(default, alias = "per_second", deserialize_with = "number")]
    per_second: Option<f64>,
    #[serde(default)]
    rate: Option<Rate>,
    deadline: Nanos,
    #[serde(default, deserialize_with = "some_level")]
    level: Option<Level>,
}

/// Section `[host]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Interfaces to manage.
    #[serde(default, deserialize_with = "interfaces")]
    pub interfaces: Vec<String>,
    /// Whether to write the level into the frame's 802.1p priority too.
    #[serde(default)]
    pub pcp: bool,
    /// What holds packets back.
    #[serde(default)]
    pub queue: QueueChoice,
    /// Rate that the queue shapes everything to: for links that do not push back.
    #[serde(default)]
    pub rate: Option<Rate>,
}

/// What of the host holds packets back that find their level's budget used up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum QueueChoice {
    /// The best that the kernel has, where a level is paced and the queue is the kernel's own.
    #[default]
    Auto,
    /// fq below strict priorities: packets leave at the times that the limiter gives them.
    Fq,
    /// HTB: a shaped class for each level, with strict priorities.
    Htb,
    /// Nothing: the queue stays as it is, and what is over a limit is dropped.
    Keep,
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

/// What a packet costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ChargeRule {
    /// A whole packet of the largest size.
    Packet,
    /// Its bytes.
    Bytes,
}

impl From<ChargeRule> for Charge {
    fn from(rule: ChargeRule) -> Self {
        match rule {
            ChargeRule::Packet => Self::Packet,
            ChargeRule::Bytes => Self::Byte,
        }
    }
}

const fn no_tolerance() -> Nanos {
    Nanos::from_ns(0)
}

pub(crate) fn level_number<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Level, D::Error> {
    struct Number;
    impl de::Visitor<'_> for Number {
        type Value = Level;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a level, which is a number from 0 to 7, without quotes")
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<Level, E> {
            let level = u8::try_from(number).ok().and_then(Level::new);
            level.ok_or_else(|| E::custom(format!("there is no level {number}; levels are 0 to 7, 7 the strictest")))
        }
    }
    deserializer.deserialize_i64(Number)
}

fn some_level<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<Level>, D::Error> {
    level_number(deserializer).map(Some)
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

fn hosts<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let hosts = Whole { least: 1, expecting: "the number of hosts that may send, at least 1" };
    deserializer.deserialize_i64(hosts).map(Some)
}

fn bytes<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    deserializer.deserialize_i64(Whole { least: 0, expecting: "a plain number of bytes" })
}

fn some_bytes<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    bytes(deserializer).map(Some)
}

fn number<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    f64::deserialize(deserializer).map(Some)
}

fn factor<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<Demand>, D::Error> {
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
    deserializer.deserialize_any(Factor).map(Some)
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

/// A level on the command line: `LEVEL:FACTOR`, `LEVEL:RATE` or `LEVEL:unlimited`, and `,KEY=VALUE` for
/// what is special about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LevelArg {
    level: Level,
    demand: Demand,
    charge: Option<ChargeRule>,
    max_packet: Option<u32>,
    burst: Option<u32>,
    oversize: Option<OversizeRule>,
    over: Option<OverRule>,
    tolerance: Option<Nanos>,
    claims: Claims,
}

impl FromStr for LevelArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let (level, wanted) = parts
            .next()
            .and_then(|part| part.split_once(':'))
            .ok_or_else(|| "write LEVEL:FACTOR, for example 7:1 or 5:4".to_owned())?;
        let level = parse_level(level)?;
        let mut arg = Self {
            level,
            demand: demand(wanted)?,
            charge: None,
            max_packet: None,
            burst: None,
            oversize: None,
            over: None,
            tolerance: None,
            claims: Claims::Allow,
        };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("'{part}': write KEY=VALUE"))?;
            let size = || units::bytes(value).map_err(|error| format!("{key}: {error}"));
            match key {
                "charge" => arg.charge = Some(ChargeRule::from_str(value, true)?),
                "max-packet" => arg.max_packet = Some(size()?),
                "burst" => arg.burst = Some(size()?),
                "oversize" => arg.oversize = Some(OversizeRule::from_str(value, true)?),
                "over" => arg.over = Some(word(key, value)?),
                "tolerance" => arg.tolerance = Some(value.parse().map_err(|error| format!("{key}: {error}"))?),
                "claims" => arg.claims = word(key, value)?,
                _ => {
                    let keys = ["charge", "max-packet", "burst", "oversize", "over", "tolerance", "claims"];
                    return Err(format!("unknown key '{key}'{}, one of {}", meant(key, &keys), keys.join(", ")));
                }
            }
        }
        Ok(arg)
    }
}

/// A level on the command line.
///
/// # Errors
/// If it is anything but a number from 0 to 7.
pub fn parse_level(text: &str) -> Result<Level, String> {
    let level = text.parse::<u8>().ok().and_then(Level::new);
    level.ok_or_else(|| format!("there is no level '{text}'; levels are 0 to 7, 7 the strictest"))
}

/// One of the words that a key knows.
fn word<T: clap::ValueEnum>(key: &str, value: &str) -> Result<T, String> {
    T::from_str(value, true).map_err(|_| {
        let known: Vec<_> = T::value_variants().iter().filter_map(T::to_possible_value).collect();
        let known: Vec<&str> = known.iter().map(clap::builder::PossibleValue::get_name).collect();
        format!("{key}: '{value}' is none of {}{}", known.join(", "), meant(value, &known))
    })
}

/// `; did you mean 'x'?` if a known word is near.
pub(crate) fn meant(word: &str, known: &[&str]) -> String {
    known
        .iter()
        .map(|other| (strsim::jaro_winkler(word, other), other))
        .filter(|(near, _)| *near > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, other)| format!("; did you mean '{other}'?"))
}

fn demand(text: &str) -> Result<Demand, String> {
    if text == "unlimited" {
        return Ok(Demand::Unlimited);
    }
    if let Ok(factor) = text.parse() {
        return checked(factor);
    }
    if text.ends_with("bit") {
        return text.parse().map(Demand::Rate).map_err(|error: units::UnitError| error.to_string());
    }
    Err(format!("the factor '{text}' is neither a number nor 'unlimited', nor a rate such as 100mbit"))
}

fn checked(factor: f64) -> Result<Demand, String> {
    if factor.is_finite() && factor > 0.0 {
        Ok(Demand::Factor(factor))
    } else {
        Err(format!("the factor is {factor}; it must be a number above 0 (1 is the guaranteed level)"))
    }
}

impl LevelArg {
    /// The level; these rules are for what it does not say itself.
    pub fn spec(self, oversize: OversizeRule, tolerance: Nanos) -> LevelSpec {
        // A level of factor above 1 has a burst; the tolerance is for those that have none.
        let spaced = matches!(self.demand, Demand::Factor(factor) if factor <= 1.0) && self.charge.is_none();
        LevelSpec {
            charge: self.charge.map(Charge::from),
            max_packet: self.max_packet,
            burst: self.burst,
            oversize: self.oversize.unwrap_or(oversize).into(),
            over: self.over,
            tolerance: self.tolerance.unwrap_or(if spaced { tolerance } else { no_tolerance() }),
            claims: self.claims,
            ..LevelSpec::new(self.level, self.demand)
        }
    }
}

impl FileLevel {
    fn spec(&self) -> Result<LevelSpec, String> {
        let demand = match (self.factor, self.rate) {
            (Some(factor), None) => factor,
            (None, Some(rate)) => Demand::Rate(rate),
            _ => return Err(format!("level {}: give either factor or rate", self.level)),
        };
        Ok(LevelSpec {
            charge: self.charge.map(Charge::from),
            max_packet: self.max_packet,
            burst: self.burst,
            oversize: self.oversize.into(),
            over: self.over,
            tolerance: self.tolerance,
            claims: self.claims,
            ..LevelSpec::new(self.level, demand)
        })
    }
}

impl FileApp {
    fn app(&self) -> Result<App, String> {
        let per_second = match (self.per_second, self.rate) {
            (Some(number), None) => number,
            (None, Some(rate)) => rate.bps() as f64 / (8.0 * f64::from(self.message)),
            _ => return Err(format!("app '{}': give either per-second or rate", self.name)),
        };
        Ok(App {
            name: self.name.clone(),
            message: self.message,
            per_second,
            deadline: self.deadline,
            level: self.level,
        })
    }
}

/// The fixed delays, given as one number or as what is on the path.
///
/// # Errors
/// If it is neither or both.
pub fn delays(
    epsilon: Option<Nanos>,
    hops: Option<u32>,
    switch_delay: Option<Nanos>,
    mtu: Option<u32>,
    host_burst: Option<u32>,
) -> Result<Delays, String> {
    let path = hops.is_some() || switch_delay.is_some() || mtu.is_some() || host_burst.is_some();
    match (epsilon, hops, switch_delay) {
        (Some(epsilon), ..) if !path => Ok(Delays::Given(epsilon)),
        (None, Some(hops), Some(switch_delay)) => Ok(Delays::Path(NetworkPath {
            hops,
            switch_delay,
            mtu: mtu.unwrap_or(ETHERNET_MTU),
            host_burst: host_burst.unwrap_or(GSO_BURST),
        })),
        _ => {
            Err("give the fixed delays either as epsilon, or as hops and switch-delay (and mtu, host-burst)".to_owned())
        }
    }
}

/// What a file or flags lead to.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The plan.
    pub plan: Plan,
    /// Where the applications went, if there were any.
    pub assigned: Option<Assigned>,
}

impl File {
    /// Reads a configuration file, and on top of it the files `*.toml` of the folder `conf.d` beside it, by name. Those may have
    /// the sections `[[level]]`, `[[app]]`, `[[assign]]` and `[host]` with interfaces.
    ///
    /// # Errors
    /// If one cannot be read, or its text is wrong: the message shows file, line, column and place.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut file = Self::parse(&read(path)?).map_err(|message| text_error(path, message))?;
        for part in Self::paths(path)?.iter().skip(1) {
            let name = format!("conf.d/{}", part.file_name().unwrap_or_default().display());
            file.add(&name, &read(part)?).map_err(|message| text_error(path, message))?;
        }
        Ok(file)
    }

    /// The files that [`File::read`] reads.
    ///
    /// # Errors
    /// If there is a conf.d that cannot be listed.
    pub fn paths(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
        let folder = path.with_file_name("conf.d");
        let failed = |source| ConfigError::Read { path: folder.display().to_string(), source };
        let mut paths = vec![path.to_owned()];
        match fs::read_dir(&folder) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            entries => {
                for entry in entries.map_err(failed)? {
                    let found = entry.map_err(failed)?.path();
                    if found.extension().is_some_and(|extension| extension == "toml") {
                        paths.push(found);
                    }
                }
                paths[1..].sort();
            }
        }
        Ok(paths)
    }

    /// Adds a file of conf.d.
    ///
    /// # Errors
    /// The message, with a caret at the place.
    pub fn add(&mut self, name: &str, text: &str) -> Result<(), String> {
        /// The same value at its place in all texts together.
        fn moved<T>(values: Vec<Spanned<T>>, by: usize) -> impl Iterator<Item = Spanned<T>> {
            values.into_iter().map(move |value| {
                let span = value.span();
                Spanned::new(span.start + by..span.end + by, value.into_inner())
            })
        }
        let Fragment { levels, apps, rules, host } =
            toml::from_str(text).map_err(|error| format!("in {name}: {}", helpful(error.to_string().trim_end())))?;
        let by = self.text.len();
        self.parts.push((by, name.to_owned()));
        self.text += text;
        self.levels.extend(moved(levels, by));
        self.apps.extend(moved(apps, by));
        self.rules.extend(moved(rules, by));
        for host in moved(host.into_iter().collect(), by) {
            if let Some(twice) = host.get_ref().interfaces.iter().find(|name| self.host.interfaces.contains(name)) {
                return Err(self.at(&host, format!("interface '{twice}' is named already; name it in one file")));
            }
            self.host.interfaces.extend(host.into_inner().interfaces);
        }
        Ok(())
    }

    /// Reads the text of a configuration file.
    ///
    /// # Errors
    /// The message, with a caret at the place.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| helpful(error.to_string().trim_end()))?;
        Ok(Self { text: text.to_owned(), ..file })
    }

    /// The plan of what the file describes, after `change`.
    ///
    /// # Errors
    /// If there is none; with the line and a caret where the file is to blame.
    pub fn plan(&self, change: impl Fn(&mut Network) -> Result<(), String>) -> Result<Answer, String> {
        self.plan_for(None, change)
    }

    /// Where the members of the cluster are listed, if the number of hosts is to be counted.
    pub fn members(&self) -> Option<&members::Config> {
        self.cluster.get_ref().members.as_ref()
    }

    /// The number of hosts that the file gives: what holds without [`Self::members`], and until they have been counted.
    pub fn hosts(&self) -> Option<u32> {
        self.cluster.get_ref().hosts
    }

    /// The same for as many hosts as members were counted, if they were.
    ///
    /// # Errors
    /// As for [`Self::plan`], and if neither a list nor the file says how many hosts there are.
    pub fn plan_for(
        &self,
        counted: Option<u32>,
        change: impl Fn(&mut Network) -> Result<(), String>,
    ) -> Result<Answer, String> {
        let cluster = self.cluster.get_ref();
        let missing = || {
            let why = match &cluster.members {
                None => {
                    "give hosts = N, the number of hosts that may send, or [cluster.members], where they are listed"
                }
                Some(_) => {
                    "members have not been counted, which is what an agent does; give hosts = N, the number that holds until then"
                }
            };
            self.at(&self.cluster, why)
        };
        let mut network = Network {
            hosts: counted.or(cluster.hosts).ok_or_else(missing)?,
            link_rate: cluster.link_rate,
            max_packet: cluster.max_packet,
            delays: delays(cluster.epsilon, cluster.hops, cluster.switch_delay, cluster.mtu, cluster.host_burst)
                .map_err(|error| self.at(&self.cluster, error))?,
            wire_overhead: cluster.wire_overhead,
            tagged: false,
            model: cluster.model,
            levels: Vec::new(),
        };
        if let (Some(app), Some(_)) = (self.apps.first(), self.levels.first()) {
            return Err(
                self.at(app, "there are levels as well; give either [[level]] or [[app]], which finds levels itself")
            );
        }
        // What is wrong without any limit is the network's fault.
        let unlimited = LevelSpec::new(Level::STRICTEST, Demand::Unlimited);
        Network { levels: vec![unlimited], ..network.clone() }.plan().map_err(|error| self.at(&self.cluster, error))?;
        if self.apps.is_empty() {
            for (number, level) in self.levels.iter().enumerate() {
                let same = |other: &&Spanned<FileLevel>| other.get_ref().level == level.get_ref().level;
                if let Some(first) = self.levels[..number].iter().find(same) {
                    let twice = format!("level {} is given twice", level.get_ref().level);
                    return Err(format!("{}\n{}", self.at(level, twice), self.show(first, "this is the other one")));
                }
                network.levels.push(level.get_ref().spec().map_err(|error| self.at(level, error))?);
                network.plan().map_err(|error| self.at(level, error))?;
            }
            change(&mut network)?;
            let plan = network.plan().map_err(|error| error.to_string())?;
            return Ok(Answer { plan, assigned: None });
        }
        change(&mut network)?;
        let apps = self
            .apps
            .iter()
            .map(|app| app.get_ref().app().map_err(|error| self.at(app, error)))
            .collect::<Result<Vec<App>, String>>()?;
        let assigned = network.assign(&apps).map_err(|error| {
            let culprit = self.apps.iter().rfind(|app| Some(app.get_ref().name.as_str()) == error.app());
            culprit.map_or_else(|| self.at(&self.cluster, &error), |app| self.at(app, &error))
        })?;
        Ok(Answer { plan: assigned.plan.clone(), assigned: Some(assigned) })
    }

    /// The rules of the sections `[[assign]]`; `user_id` finds the number of a user's name.
    ///
    /// # Errors
    /// If a rule makes no sense or two are in conflict, with the line of each and a caret.
    pub fn rules(&self, user_id: impl Fn(&str) -> Option<u32>) -> Result<Rules, String> {
        let rules = self.rules.iter().map(|rule| rule.get_ref().clone()).collect();
        Rules::new(rules, user_id).map_err(|error| {
            let (rule, other) = error.rules();
            let also = other.map(|other| format!("\n{}", self.at_rule(other, "this is the other one")));
            format!("error {}{}", self.at_rule(rule, error), also.unwrap_or_default())
        })
    }

    /// A message about a rule, counted from 0, with its line and a caret.
    pub fn at_rule(&self, rule: usize, message: impl fmt::Display) -> String {
        self.show(&self.rules[rule], message)
    }

    /// The line on which a rule, counted from 0, begins.
    pub fn line_of_rule(&self, rule: usize) -> usize {
        self.line(self.rules[rule].span().start)
    }

    /// The text that a byte of all texts is in: its name, empty for the first, its text and the byte's place there.
    fn part(&self, offset: usize) -> (&str, &str, usize) {
        let number = self.parts.partition_point(|(start, _)| *start <= offset);
        let end = self.parts.get(number).map_or(self.text.len(), |(start, _)| *start);
        let (start, name) =
            number.checked_sub(1).map_or((0, ""), |before| (self.parts[before].0, &*self.parts[before].1));
        (name, &self.text[start..end], offset - start)
    }

    fn line(&self, offset: usize) -> usize {
        let (_, text, offset) = self.part(offset);
        line(text, offset)
    }

    /// The message with its line and a caret, in the form of the TOML reader's own.
    fn at<T>(&self, place: &Spanned<T>, message: impl fmt::Display) -> String {
        format!("error {}", self.show(place, message))
    }

    /// The same without the word. A place in conf.d has its file's name before it.
    fn show<T>(&self, place: &Spanned<T>, message: impl fmt::Display) -> String {
        let (name, text, start) = self.part(place.span().start);
        let shown = show(text, start, message);
        if name.is_empty() { shown } else { format!("in {name} {shown}") }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.display().to_string(), source })
}

fn text_error(path: &Path, message: String) -> ConfigError {
    ConfigError::Text { path: path.display().to_string(), message }
}

/// The line, from 1, of a byte of a text.
fn line(text: &str, offset: usize) -> usize {
    text[..offset].matches('\n').count() + 1
}

/// A message about a place of a TOML text with its line and a caret, in the form of the TOML reader's own.
pub(crate) fn at<T>(text: &str, place: &Spanned<T>, message: impl fmt::Display) -> String {
    format!("error {}", show(text, place.span().start, message))
}

fn show(text: &str, start: usize, message: impl fmt::Display) -> String {
    let start = start.min(text.len());
    let before = &text[..start];
    let number = line(text, start);
    let begin = before.rfind('\n').map_or(0, |at| at + 1);
    let line = text[begin..].lines().next().unwrap_or_default();
    let column = text[begin..start].chars().count();
    let margin = " ".repeat(number.to_string().len());
    let carets = "^".repeat(line.chars().count().saturating_sub(column).max(1));
    format!(
        "at line {number}, column {}\n{margin} |\n{number} | {line}\n{margin} | {}{carets}\n{message}",
        column + 1,
        " ".repeat(column),
    )
}

/// Adds the nearest known key to the TOML reader's message about an unknown one.
pub(crate) fn helpful(message: &str) -> String {
    let words: Vec<&str> = message.rsplit("unknown field ").next().unwrap_or_default().split('`').collect();
    match words.split_first() {
        Some((_, [unknown, known @ ..])) if message.contains("unknown field `") => {
            let known: Vec<&str> = known.iter().skip(1).step_by(2).copied().collect();
            format!("{message}{}", meant(unknown, &known))
        }
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use qjump_ebpf::layout::GRANT_ONLY_SHIFT;

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
claims = "grant-only"

[[level]]
level = 3
factor = "unlimited"

[host]
interfaces = ["eth0"]
"#;

    #[test]
    fn reads_a_file() {
        let file = File::parse(GOOD).unwrap();
        let network = file.plan(|_| Ok(())).unwrap().plan.network;
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
        let claims: Vec<_> = network.levels.iter().map(|level| level.claims).collect();
        assert_eq!(claims, [Claims::Allow, Claims::GrantOnly, Claims::Allow]);
        let flags = network.plan().unwrap().config(1).unwrap().flags;
        assert_eq!(flags, 1 << (GRANT_ONLY_SHIFT + 5) | 1, "the bit of level 5, beside those given");
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
        let (plain, mut full) = [example, &uncommented]
            .map(|text| File::parse(text).unwrap().plan(|_| Ok(())).unwrap().plan.network)
            .into();
        assert_eq!(full.levels.pop().map(|level| level.demand), Some(Demand::Unlimited));
        assert_eq!(plain, full);
        let rules =
            [example, &uncommented].map(|text| File::parse(text).unwrap().rules(|_| None).unwrap().iter().len());
        assert_eq!(rules, [0, 2]);
    }

    #[test]
    fn shows_where_a_file_is_wrong() {
        for (from, to, line, part) in [
            ("hosts = 12", "hosts = -3", "line 3", "`-3`, expected the number of hosts that may send, at least 1"),
            ("hosts = 12", "hosts = 0", "line 3", "at least 1"),
            ("level = 7", "level = \"7\"", "line 9", "a number from 0 to 7, without quotes"),
            ("hosts = 12", "hosts = 99999999999", "line 3", "invalid value"),
            ("\"10gbit\"", "\"10gbps\"", "line 4", "bytes to tc"),
            ("\"10gbit\"", "10", "line 4", "expected a rate with its unit, in quotes: \"10gbit\""),
            ("max-packet", "max-paket", "line 5", "did you mean 'max-packet'?"),
            ("= 256", "= \"256B\"", "line 5", "expected a plain number of bytes"),
            ("\"4us\"", "4", "line 6", "expected a time with its unit, in quotes: \"4us\""),
            ("factor = 1", "factor = true", "line 10", "`true`, expected a number above 0, or \"unlimited\""),
            ("factor = 1", "factor = 0", "line 10", "the factor is 0; it must be a number above 0"),
            ("factor = 1", "factor = nan", "line 10", "above 0"),
            ("factor = 1", "factor = \"lots\"", "line 10", "'lots' is neither a number nor 'unlimited'"),
            ("factor = 1", "factor = 1\ntolerance = \"20\"", "line 11", "no unit"),
            ("[\"eth0\"]", "\"eth0\"", "line 23", "expected a list of names: [\"eth0\"]"),
            ("level = 7", "level = 8", "line 9", "there is no level 8"),
            ("\"drop\"", "\"keep\"", "line 15", "unknown variant"),
            ("\"grant-only\"", "\"nobody\"", "line 16", "expected `allow` or `grant-only`"),
        ] {
            let error = File::parse(&GOOD.replace(from, to)).unwrap_err();
            assert!(error.contains(line) && error.contains(part) && error.contains('^'), "{to}: {error}");
        }
        // What only the plan finds has its line, too.
        for (from, to, line, part) in [
            ("= 256", "= 5", "line 2,", "max-packet is 5 bytes"),
            ("\"4us\"", "\"99999s\"", "line 2,", "too long"),
            ("factor = 4.5", "factor = 1000", "line 12,", "level 5: factor 1000"),
            ("factor = 4.5", "factor = 4.5\ntolerance = \"20us\"", "line 12,", "level 5: a tolerance"),
            ("level = 3", "level = 7", "line 18,", "level 7 is given twice"),
            ("level = 3", "level = 0", "line 18,", "level 0"),
        ] {
            let error = File::parse(&GOOD.replace(from, to)).unwrap().plan(|_| Ok(())).unwrap_err();
            assert!(error.contains(line) && error.contains(part) && error.contains('^'), "{to}: {error}");
        }
    }

    #[test]
    fn members_count_before_hosts() {
        let members = "\n[cluster.members]\nfile = \"/etc/qjump/hosts\"\n\n[[level]]";
        let with =
            |hosts: &str| File::parse(&GOOD.replace("hosts = 12", hosts).replacen("\n[[level]]", members, 1)).unwrap();
        let hosts = |file: &File, counted| file.plan_for(counted, |_| Ok(())).map(|answer| answer.plan.network.hosts);
        let both = with("hosts = 12");
        assert!(both.members().is_some() && both.hosts() == Some(12));
        assert_eq!([None, Some(5)].map(|counted| hosts(&both, counted)), [Ok(12), Ok(5)]);
        let listed = with("");
        assert_eq!(hosts(&listed, Some(5)), Ok(5));
        let error = hosts(&listed, None).unwrap_err();
        assert!(error.contains("have not been counted") && error.contains("line 2,"), "{error}");
        let error = hosts(&File::parse(&GOOD.replace("hosts = 12", "")).unwrap(), None).unwrap_err();
        assert!(error.contains("give hosts = N") && error.contains("[cluster.members]"), "{error}");
        let wrong =
            GOOD.replacen("\n[[level]]", "\n[cluster.members]\ndns = \"a\"\nleast = 9\nmost = 1\n\n[[level]]", 1);
        let error = File::parse(&wrong).unwrap_err();
        assert!(error.contains("least not above most") && error.contains('^'), "{error}");
    }

    #[test]
    fn reads_applications_and_paths() {
        let text = r#"
[cluster]
hosts = 12
link-rate = "10gbit"
max-packet = 256
hops = 3
switch-delay = "500ns"
host-burst = 1538

[[app]]
name = "ptp"
message = 128
per-second = 1000
deadline = "100us"

[[app]]
name = "cache"
message = 1024
rate = "10mbit"
deadline = "2ms"
level = 4
"#;
        let answer = File::parse(text).unwrap().plan(|_| Ok(())).unwrap();
        let levels: Vec<_> = answer.assigned.unwrap().apps.iter().map(|placed| placed.level.number()).collect();
        assert_eq!(levels, [7, 4]);
        for (from, to, line, part) in [
            ("hops = 3", "epsilon = \"1us\"\nhops = 3", "line 2,", "either as epsilon"),
            ("hops = 3", "hops = 99", "line 2,", "hops is 99"),
            ("per-second = 1000", "", "line 10,", "either per-second or rate"),
            ("per-second = 1000", "per-second = 0", "line 10,", "above 0"),
            ("\"100us\"", "\"1us\"", "line 10,", "idle network"),
            ("\"100us\"", "\"8us\"", "line 10,", "cannot be served within 8us"),
            ("\"cache\"", "\"ptp\"", "line 16,", "twice"),
            ("level = 4", "level = 0", "line 16,", "best effort"),
            (
                "[[app]]\nname = \"ptp\"",
                "[[level]]\nlevel = 7\nfactor = 1\n\n[[app]]\nname = \"ptp\"",
                "line 14,",
                "levels as well",
            ),
        ] {
            let error = File::parse(&text.replace(from, to)).unwrap().plan(|_| Ok(())).unwrap_err();
            assert!(error.contains(line) && error.contains(part) && error.contains('^'), "{to}: {error}");
        }
        let error = File::parse(&text.replace("level = 4", "level = 9")).unwrap_err();
        assert!(error.contains("no level 9") && error.contains('^'), "{error}");
    }

    #[test]
    fn rules_that_are_refused_are_shown() {
        let with = |rules: &str| File::parse(&format!("{GOOD}\n{rules}")).unwrap().rules(|_| None);
        let assign = |table: &str| format!("[[assign]]\n{table}\n\n");
        assert_eq!(with(&assign("level = 5\nuser = 1")).unwrap().iter().len(), 1);
        let error = with(&assign("level = 5")).unwrap_err();
        assert!(error.contains("line 25,") && error.contains('^') && error.contains("every socket"), "{error}");
        let error = with(&(assign("level = 5\nunit = \"a\"") + &assign("level = 6\nunit = \"a\""))).unwrap_err();
        for part in ["line 29,", "conflict", "line 25,", "this is the other one"] {
            assert!(error.contains(part) && error.matches("^^^").count() >= 2, "{error}");
        }
    }

    #[test]
    fn reads_levels_from_flags() {
        let spec = |text: &str| text.parse::<LevelArg>().unwrap().spec(OversizeRule::Demote, Nanos::from_ns(7));
        let seven = LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0));
        assert_eq!(spec("7:1"), LevelSpec { tolerance: Nanos::from_ns(7), ..seven });
        assert_eq!(
            spec("7:1mbit,charge=bytes,max-packet=1514,burst=9000,oversize=drop,over=demote,claims=grant-only"),
            LevelSpec {
                demand: Demand::Rate(Rate::from_bps(1_000_000)),
                charge: Some(Charge::Byte),
                max_packet: Some(1_514),
                burst: Some(9_000),
                oversize: Oversize::Drop,
                over: Some(OverRule::Demote),
                claims: Claims::GrantOnly,
                ..seven
            }
        );
        for (text, part) in [
            ("8:1", "no level '8'"),
            ("7:0", "above 0"),
            ("7:nan", "above 0"),
            ("7:inf", "above 0"),
            ("7:-1", "above 0"),
            ("7", "LEVEL:FACTOR"),
            ("7:x", "neither a number"),
            (":", "no level ''"),
            ("7:1,max-paket=3", "did you mean 'max-packet'?"),
            ("7:1,burst", "KEY=VALUE"),
            ("7:1,burst=1k", "plain number of bytes"),
            ("7:0bit", "above 0"),
        ] {
            let error = text.parse::<LevelArg>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    /// serde lists the keys that it would have taken.
    #[test]
    fn the_schema_knows_the_keys_of_the_deserializers() {
        let schema: serde_json::Value = serde_json::from_str(SCHEMA).unwrap();
        let cluster = "[cluster]\nhosts = 1\nlink-rate = \"1gbit\"\nmax-packet = 64\nepsilon = \"1us\"\n";
        for (section, pointer) in [
            ("nonsense = 1\n[cluster]", "/properties"),
            ("[cluster]\nnonsense = 1", "/$defs/cluster/properties"),
            ("[cluster.members]\nnonsense = 1", "/$defs/members/properties"),
            ("[[level]]\nnonsense = 1", "/$defs/level/properties"),
            ("[[app]]\nnonsense = 1", "/$defs/app/properties"),
            ("[[assign]]\nnonsense = 1", "/$defs/assign/properties"),
            ("[host]\nnonsense = 1", "/$defs/host/properties"),
        ] {
            // Before what is missing, and after it where it is a section of its own.
            let text = match section.strip_suffix("[cluster]") {
                Some(first) => format!("{first}{cluster}"),
                None if section.contains("[cluster]") => section.to_owned(),
                None => format!("{cluster}{section}"),
            };
            let message = toml::from_str::<File>(&text).unwrap_err().message().to_owned();
            let (_, known) = message.split_once("expected one of ").unwrap_or_else(|| panic!("{section}: {message}"));
            let mut known: Vec<&str> = known.split(['`', ',', ' ']).filter(|word| !word.is_empty()).collect();
            // The other spelling of keys of two words.
            known.retain(|key| !key.contains('_'));
            known.sort_unstable();
            let properties = schema.pointer(pointer).and_then(serde_json::Value::as_object).unwrap();
            let keys: Vec<&str> = properties.keys().map(String::as_str).collect();
            assert_eq!(keys, known, "{section}");
        }
    }
}
