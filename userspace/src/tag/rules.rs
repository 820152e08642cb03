//! Rules that give sockets a level by what they and their process are: the sections `[[assign]]` of the configuration.
//! Pure: no system call is made here.
//!
//! A rule matches a socket if all of its keys do. Of the rules that match, one counts, found by comparing key after key
//! in this order: `local-port`, `remote-port`, `remote` (what the socket is), `exe`, `user` (what the process is),
//! `cgroup` or `unit` (where it is). A rule that gives the key comes before one that does not; if both give it, the
//! narrower one comes first: fewer ports, a longer prefix, a deeper path, the nearer ancestor. The first difference
//! decides. Two rules of different levels that differ in nothing of this and may match one socket are in conflict, and
//! refused as such; so the order of the rules never matters.

use std::{
    cmp::Reverse,
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

use qjump_ebpf::Level;
use serde::{Deserialize, de};
use thiserror::Error;

use super::{live::LiveSocket, process::Process};
use crate::config::level_number;

/// A section `[[assign]]`: a level, and what a socket must be to get it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rule {
    #[serde(deserialize_with = "level_number")]
    level: Level,
    #[serde(default, deserialize_with = "cgroup_path")]
    cgroup: Option<CgroupSelector>,
    #[serde(default, deserialize_with = "unit_name")]
    unit: Option<CgroupSelector>,
    #[serde(default)]
    user: Option<User>,
    #[serde(default)]
    exe: Option<Exe>,
    #[serde(default, alias = "local_port")]
    local_port: Option<Ports>,
    #[serde(default, alias = "remote_port")]
    remote_port: Option<Ports>,
    #[serde(default)]
    remote: Option<Prefix>,
}

/// A cgroup of version 2, with all below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupSelector {
    /// Its path below the mount, as in /proc/PID/cgroup.
    Path(PathBuf),
    /// The systemd unit that it belongs to, wherever that is in the tree.
    Unit(String),
}

impl CgroupSelector {
    /// How deep in the path of a process's cgroup this one is found, if it is: the deepest place counts.
    fn depth_in(&self, cgroup: &Path) -> Option<usize> {
        match self {
            Self::Path(path) => cgroup.starts_with(path).then(|| path.components().count()),
            Self::Unit(name) => cgroup
                .components()
                .enumerate()
                .filter(|(_, component)| component.as_os_str() == name.as_str())
                .map(|(at, _)| at + 1)
                .last(),
        }
    }

    /// Whether both can be one and the same cgroup.
    fn may_be(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Path(path), Self::Unit(name)) | (Self::Unit(name), Self::Path(path)) => path.ends_with(name),
            _ => self == other,
        }
    }
}

impl fmt::Display for CgroupSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "cgroup {}", path.display()),
            Self::Unit(name) => write!(f, "unit {name}"),
        }
    }
}

fn cgroup_path<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<CgroupSelector>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let path = Path::new(&text);
    if !path.is_absolute() || text.contains("..") || path.starts_with("/sys") {
        return Err(de::Error::custom(format!(
            "'{text}' is not the path of a cgroup; write it as in the line '0::' of /proc/PID/cgroup: \"/system.slice/x.service\""
        )));
    }
    if path.parent().is_none() {
        return Err(de::Error::custom("'/' is the cgroup of all processes; name one below it"));
    }
    // Without slashes at the end and dots between.
    Ok(Some(CgroupSelector::Path(path.components().collect())))
}

fn unit_name<'de, D: de::Deserializer<'de>>(deserializer: D) -> Result<Option<CgroupSelector>, D::Error> {
    let text = String::deserialize(deserializer)?;
    // As systemctl does.
    let name = if text.contains('.') { text.clone() } else { format!("{text}.service") };
    let stem = [".service", ".scope", ".slice"].iter().find_map(|suffix| name.strip_suffix(suffix));
    if name.contains('/') || stem.is_none_or(str::is_empty) {
        return Err(de::Error::custom(format!(
            "'{text}' is not a unit that has processes: \"x.service\", \"x.scope\" or \"x.slice\""
        )));
    }
    Ok(Some(CgroupSelector::Unit(name)))
}

/// A user, by number or by name. In [`Rules`] there are only numbers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a user's name in quotes, or a number")]
enum User {
    Id(u32),
    Name(String),
}

/// The file that a process runs, or a folder that it is in, at whatever depth.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum Exe {
    File(PathBuf),
    Folder(PathBuf),
}

impl TryFrom<String> for Exe {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (path, folder) = match text.strip_suffix("/*") {
            Some(folder) => (folder, true),
            None => (text.as_str(), false),
        };
        if folder && path.is_empty() {
            return Err("\"/*\" is every program; name a folder: \"/opt/x/*\"".to_owned());
        }
        if !path.starts_with('/') || path.contains('*') || path.ends_with('/') {
            return Err(format!(
                "'{text}' is not a program; write its full path, \"/usr/bin/x\", or a folder's, \"/opt/x/*\""
            ));
        }
        Ok(if folder { Self::Folder(path.into()) } else { Self::File(path.into()) })
    }
}

impl Exe {
    fn matches(&self, exe: &Path) -> bool {
        match self {
            Self::File(file) => exe == file,
            Self::Folder(folder) => exe.starts_with(folder) && exe != folder,
        }
    }

    /// Greater for a folder within another, and for a file than for any folder that it is in.
    fn depth(&self) -> usize {
        let (Self::File(path) | Self::Folder(path)) = self;
        path.components().count()
    }
}

/// A port, or a range of them, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "PortsText")]
struct Ports {
    first: u16,
    last: u16,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a port, 11211, or a range in quotes, \"8000-8010\"")]
enum PortsText {
    Number(i64),
    Text(String),
}

impl TryFrom<PortsText> for Ports {
    type Error = String;

    fn try_from(text: PortsText) -> Result<Self, String> {
        let text = match text {
            PortsText::Number(number) => number.to_string(),
            PortsText::Text(text) => text,
        };
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(Self { first, last }),
            _ => Err(format!("'{text}' is neither a port, 1 to 65535, nor a range such as \"8000-8010\"")),
        }
    }
}

impl Ports {
    const fn contain(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    fn overlap(self, other: Self) -> bool {
        self.first.max(other.first) <= self.last.min(other.last)
    }

    const fn width(self) -> u16 {
        self.last - self.first
    }
}

/// A network, as its address and the length of its prefix in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Prefix {
    network: IpAddr,
    length: u32,
}

impl TryFrom<String> for Prefix {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is not a network; write \"10.0.0.0/8\", \"fd00::/8\" or one address");
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length.parse().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        if address.to_canonical() != address {
            return Err(format!(
                "'{text}' is IPv4 in the clothes of IPv6; write it as IPv4: {}",
                address.to_canonical()
            ));
        }
        let bits = bits(address);
        let length = length.unwrap_or(bits);
        if length > bits {
            return Err(format!("'{text}': a prefix of {address} has at most {bits} bits"));
        }
        let network = first_bits(address, length);
        if network != address {
            return Err(format!("'{text}' is an address within a network; did you mean {network}/{length}?"));
        }
        Ok(Self { network, length })
    }
}

impl Prefix {
    fn contains(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.network.is_ipv4() && first_bits(address, self.length) == self.network
    }
}

const fn bits(address: IpAddr) -> u32 {
    if address.is_ipv4() { u32::BITS } else { u128::BITS }
}

/// The address with all bits after the first `length` zero.
fn first_bits(address: IpAddr, length: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(u32::BITS - length).unwrap_or(0)).into()),
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(u128::BITS - length).unwrap_or(0)).into()),
    }
}

/// How specific a match is; the greater one counts. The fields are compared in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Precedence {
    local_port: Option<Reverse<u16>>,
    remote_port: Option<Reverse<u16>>,
    remote: Option<u32>,
    exe: Option<usize>,
    user: bool,
    cgroup: Option<usize>,
}

impl Rule {
    /// The level that it gives.
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The cgroup or unit that it names.
    pub fn place(&self) -> Option<&CgroupSelector> {
        self.cgroup.as_ref().or(self.unit.as_ref())
    }

    /// Whether it is about all sockets of a cgroup or unit.
    fn is_place_alone(&self) -> bool {
        let Self { level: _, cgroup: _, unit: _, user, exe, local_port, remote_port, remote } = self;
        self.place().is_some()
            && user.is_none()
            && exe.is_none()
            && local_port.is_none()
            && remote_port.is_none()
            && remote.is_none()
    }

    /// The precedence of a match whose cgroup is found at this depth.
    fn precedence(&self, cgroup: Option<usize>) -> Precedence {
        Precedence {
            local_port: self.local_port.map(|ports| Reverse(ports.width())),
            remote_port: self.remote_port.map(|ports| Reverse(ports.width())),
            remote: self.remote.map(|prefix| prefix.length),
            exe: self.exe.as_ref().map(Exe::depth),
            user: self.user.is_some(),
            cgroup,
        }
    }

    fn matches(&self, process: &Process, socket: &LiveSocket) -> Option<Precedence> {
        let port = |wanted: Option<Ports>, at: Option<SocketAddr>| {
            wanted.is_none_or(|ports| at.is_some_and(|at| ports.contain(at.port())))
        };
        let fits = port(self.local_port, socket.local)
            && port(self.remote_port, socket.remote)
            && self.remote.is_none_or(|prefix| socket.remote.is_some_and(|at| prefix.contains(at.ip())))
            && self.exe.as_ref().is_none_or(|exe| process.exe.as_ref().is_some_and(|path| exe.matches(path)))
            && self.user.as_ref().is_none_or(|user| *user == User::Id(process.user));
        if !fits {
            return None;
        }
        let depth = match self.place() {
            None => None,
            Some(place) => Some(place.depth_in(process.cgroup.as_ref()?)?),
        };
        Some(self.precedence(depth))
    }

    /// Whether both may match one socket with equal precedence.
    fn ties_with(&self, other: &Self) -> bool {
        fn both<T>(one: Option<T>, other: Option<T>, meet: impl Fn(T, T) -> bool) -> bool {
            match (one, other) {
                (Some(one), Some(other)) => meet(one, other),
                (None, None) => true,
                _ => false,
            }
        }
        // Of the same length, prefixes are equal or apart, and so are paths.
        self.precedence(None) == other.precedence(None)
            && both(self.local_port, other.local_port, Ports::overlap)
            && both(self.remote_port, other.remote_port, Ports::overlap)
            && self.remote == other.remote
            && self.exe == other.exe
            && self.user == other.user
            && both(self.place(), other.place(), CgroupSelector::may_be)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, cgroup: _, unit: _, user, exe, local_port, remote_port, remote } = self;
        write!(f, "level {level} for")?;
        if let Some(place) = self.place() {
            write!(f, " {place}")?;
        }
        match user {
            Some(User::Id(id)) => write!(f, " user {id}")?,
            Some(User::Name(name)) => write!(f, " user {name}")?,
            None => {}
        }
        match exe {
            Some(Exe::File(path)) => write!(f, " exe {}", path.display())?,
            Some(Exe::Folder(path)) => write!(f, " exe {}/*", path.display())?,
            None => {}
        }
        for (what, ports) in [("local-port", local_port), ("remote-port", remote_port)] {
            if let Some(Ports { first, last }) = ports {
                write!(f, " {what} {first}-{last}")?;
            }
        }
        remote.map_or(Ok(()), |Prefix { network, length }| write!(f, " remote {network}/{length}"))
    }
}

/// Why rules are refused. Rules are counted from 0.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum RuleError {
    #[error(
        "this rule matches every socket of the host; give it one or more of cgroup, unit, user, exe, local-port, \
         remote-port, remote"
    )]
    NoKey { rule: usize },
    #[error("give either cgroup or unit, not both")]
    CgroupAndUnit { rule: usize },
    #[error("there is no user '{name}' on this host; `getent passwd` lists them")]
    NoUser { rule: usize, name: String },
    #[error(
        "this rule is in conflict with another one: some socket may match both, with equal precedence, and they give it \
         different levels. Give one of them a further or narrower key, or both the same level"
    )]
    Conflict { first: usize, second: usize },
}

impl RuleError {
    /// The rules that it is about.
    pub const fn rules(&self) -> (usize, Option<usize>) {
        match *self {
            Self::NoKey { rule } | Self::CgroupAndUnit { rule } | Self::NoUser { rule, .. } => (rule, None),
            Self::Conflict { first, second } => (second, Some(first)),
        }
    }
}

/// Rules without conflict.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules(Vec<Rule>);

/// The rule that counts for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Match {
    /// Its number, from 0.
    pub rule: usize,
    /// The level that it gives.
    pub level: Level,
    /// How specific it is: of a socket that several processes share, the greatest counts.
    pub precedence: Precedence,
}

impl Rules {
    /// Checks rules; `user_id` finds the number of a user's name.
    ///
    /// # Errors
    /// If a rule makes no sense, or two are in conflict.
    pub fn new(rules: Vec<Rule>, user_id: impl Fn(&str) -> Option<u32>) -> Result<Self, RuleError> {
        let mut checked: Vec<Rule> = Vec::with_capacity(rules.len());
        for (number, mut rule) in rules.into_iter().enumerate() {
            if rule.cgroup.is_some() && rule.unit.is_some() {
                return Err(RuleError::CgroupAndUnit { rule: number });
            }
            if rule.place().is_none() && rule.precedence(None) == NO_KEY {
                return Err(RuleError::NoKey { rule: number });
            }
            if let Some(User::Name(name)) = rule.user {
                // As useradd and systemd have it, a name of digits is a number.
                match name.parse().ok().or_else(|| user_id(&name)) {
                    Some(id) => rule.user = Some(User::Id(id)),
                    None => return Err(RuleError::NoUser { rule: number, name }),
                }
            }
            let tied = checked.iter().position(|before| before.level != rule.level && before.ties_with(&rule));
            if let Some(first) = tied {
                return Err(RuleError::Conflict { first, second: number });
            }
            checked.push(rule);
        }
        Ok(Self(checked))
    }

    /// The rule that counts for a socket of a process, if any matches.
    pub fn find(&self, process: &Process, socket: &LiveSocket) -> Option<Match> {
        let matches = self.0.iter().enumerate().filter_map(|(rule, candidate)| {
            let precedence = candidate.matches(process, socket)?;
            Some(Match { rule, level: candidate.level, precedence })
        });
        matches.max_by_key(|found| found.precedence)
    }

    /// Whether a rule, counted from 0, is about all sockets of a cgroup or unit.
    pub fn is_place_alone(&self, rule: usize) -> bool {
        self.0[rule].is_place_alone()
    }

    /// The rules, in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Rule> {
        self.0.iter()
    }
}

const NO_KEY: Precedence =
    Precedence { local_port: None, remote_port: None, remote: None, exe: None, user: false, cgroup: None };

/// The cgroups and units all of whose sockets get a level, also those that are made later: what is to be tagged. Rules
/// with further keys cannot be said by a tag; they are about the sockets that are there. Each with its rule, from 0.
pub fn needs_tag(rules: &Rules) -> Vec<(usize, &CgroupSelector, Level)> {
    let places = rules.iter().enumerate().filter(|(_, rule)| rule.is_place_alone());
    places.filter_map(|(number, rule)| Some((number, rule.place()?, rule.level))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;
    use crate::tag::live::{Family, Kind};

    #[derive(Deserialize)]
    struct Section {
        assign: Vec<Rule>,
    }

    /// Rules from TOML, one inline table a line.
    fn parse(tables: &[&str]) -> Result<Vec<Rule>, String> {
        let text = format!("assign = [{{ {} }}]", tables.join(" }, { "));
        toml::from_str(&text).map(|section: Section| section.assign).map_err(|error| error.to_string())
    }

    fn rules(tables: &[&str]) -> Result<Rules, RuleError> {
        Rules::new(parse(tables).unwrap(), |name| (name == "alice").then_some(1000))
    }

    fn process() -> Process {
        Process {
            pid: 7,
            name: "x".into(),
            user: 1000,
            exe: Some("/opt/app/bin/x".into()),
            cgroup: Some("/system.slice/app.service/worker".into()),
        }
    }

    fn socket(local: &str, remote: &str) -> LiveSocket {
        let (local, remote) = (local.parse().ok(), remote.parse().ok());
        LiveSocket { pid: 7, fd: 3, inode: 1, family: Family::V4, kind: Kind::Tcp, local, remote, priority: 0 }
    }

    fn level_of(tables: &[&str]) -> Option<u8> {
        let socket = socket("10.0.0.1:8005", "10.0.0.2:443");
        rules(tables).unwrap().find(&process(), &socket).map(|found| found.level.number())
    }

    #[test]
    fn all_keys_given_must_match() {
        for (key, matches) in [
            ("local-port = 8005", true),
            ("local-port = 8006", false),
            ("local-port = \"8000-8010\"", true),
            ("local-port = \"8006-8010\"", false),
            ("remote-port = 443", true),
            ("remote-port = 8005", false),
            ("remote = \"10.0.0.0/8\"", true),
            ("remote = \"10.0.0.2\"", true),
            ("remote = \"11.0.0.0/8\"", false),
            ("remote = \"::/0\"", false),
            ("remote = \"0.0.0.0/0\"", true),
            ("exe = \"/opt/app/bin/x\"", true),
            ("exe = \"/opt/app/bin\"", false),
            ("exe = \"/opt/*\"", true),
            ("exe = \"/opt/app/bin/x/*\"", false),
            ("exe = \"/op/*\"", false),
            ("user = 1000", true),
            ("user = \"1000\"", true),
            ("user = \"alice\"", true),
            ("user = 0", false),
            ("cgroup = \"/system.slice\"", true),
            ("cgroup = \"/system.slice/app.service/worker/\"", true),
            ("cgroup = \"/system.slice/app\"", false),
            ("unit = \"app\"", true),
            ("unit = \"system.slice\"", true),
            ("unit = \"worker\"", false),
        ] {
            assert_eq!(level_of(&[&format!("level = 5, {key}")]), matches.then_some(5), "{key}");
            let narrower = format!("level = 5, user = 1000, local-port = 8005, {key}");
            if !key.starts_with("user") && !key.starts_with("local-port") {
                assert_eq!(level_of(&[&narrower]), matches.then_some(5), "{narrower}");
            }
        }
    }

    #[test]
    fn the_most_specific_rule_counts_in_any_order() {
        // Each beats all that follow it.
        let ranked = [
            "local-port = 8005, remote-port = 443",
            "local-port = 8005",
            "local-port = \"8000-8010\"",
            "remote-port = 443",
            "remote = \"10.0.0.2\"",
            "remote = \"10.0.0.0/8\", exe = \"/opt/app/bin/x\"",
            "remote = \"10.0.0.0/8\"",
            "exe = \"/opt/app/bin/x\", user = 1000",
            "exe = \"/opt/app/bin/x\"",
            "exe = \"/opt/app/*\"",
            "exe = \"/opt/*\"",
            "user = \"alice\", unit = \"app\"",
            "user = \"alice\"",
            "cgroup = \"/system.slice/app.service/worker\"",
            "unit = \"app\"",
            "cgroup = \"/system.slice\"",
        ];
        for (at, first) in ranked.iter().enumerate() {
            for later in &ranked[at + 1..] {
                let (first, later) = (format!("level = 3, {first}"), format!("level = 6, {later}"));
                assert_eq!(level_of(&[&first, &later]), Some(3), "{first} before {later}");
                assert_eq!(level_of(&[&later, &first]), Some(3), "{first} before {later}");
            }
        }
    }

    #[test]
    fn sockets_without_ports_or_peers_match_no_rule_about_them() {
        let find = |table: &str, socket: &LiveSocket| rules(&[table]).unwrap().find(&process(), socket).is_some();
        let listening = socket("10.0.0.1:8005", "");
        assert!(find("level = 1, local-port = 8005", &listening));
        assert!(!find("level = 1, remote = \"0.0.0.0/0\"", &listening));
        assert!(!find("level = 1, remote-port = \"1-65535\"", &listening));
        let raw = LiveSocket { kind: Kind::Raw, ..socket("10.0.0.1:0", "") };
        assert!(!find("level = 1, local-port = \"1-65535\"", &raw) && find("level = 1, user = 1000", &raw));
        let mapped = socket("", "[::ffff:10.0.0.2]:443");
        assert!(find("level = 1, remote = \"10.0.0.0/8\"", &mapped));
        let hidden = Process { exe: None, cgroup: None, ..process() };
        let rules = rules(&["level = 1, exe = \"/opt/*\"", "level = 1, unit = \"app\""]).unwrap();
        assert_eq!(rules.find(&hidden, &listening), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (table, part) in [
            ("level = 8, user = 1", "no level 8"),
            ("level = 5, cgroup = \"/\"", "all processes"),
            ("level = 5, cgroup = \"a\"", "not the path of a cgroup"),
            ("level = 5, cgroup = \"/a/../b\"", "not the path of a cgroup"),
            ("level = 5, cgroup = \"/sys/fs/cgroup/a\"", "/proc/PID/cgroup"),
            ("level = 5, unit = \"a/b\"", "'a/b' is not a unit"),
            ("level = 5, unit = \"\"", "not a unit"),
            ("level = 5, unit = \"a.timer\"", "x.service"),
            ("level = 5, user = -1", "a user's name in quotes, or a number"),
            ("level = 5, exe = \"x\"", "full path"),
            ("level = 5, exe = \"/*\"", "every program"),
            ("level = 5, exe = \"/usr/*/x\"", "not a program"),
            ("level = 5, local-port = 0", "1 to 65535"),
            ("level = 5, local-port = 65536", "1 to 65535"),
            ("level = 5, local-port = \"9-8\"", "'9-8' is neither"),
            ("level = 5, local-port = true", "a range in quotes"),
            ("level = 5, remote = \"10.0.0.1/8\"", "did you mean 10.0.0.0/8?"),
            ("level = 5, remote = \"10.0.0.0/33\"", "at most 32 bits"),
            ("level = 5, remote = \"::ffff:10.0.0.0/104\"", "write it as IPv4"),
            ("level = 5, remote = \"here\"", "not a network"),
            ("level = 5, port = 1", "unknown field `port`"),
        ] {
            let error = parse(&[table]).unwrap_err();
            assert!(error.contains(part) && error.contains('^'), "{table}: {error}");
        }
        assert_eq!(rules(&["level = 5"]), Err(RuleError::NoKey { rule: 0 }));
        let twice = rules(&["level = 5, user = 1", "level = 5, cgroup = \"/a\", unit = \"a\""]);
        assert_eq!(twice, Err(RuleError::CgroupAndUnit { rule: 1 }));
        let unknown = rules(&["level = 5, user = \"bob\""]);
        assert_eq!(unknown, Err(RuleError::NoUser { rule: 0, name: "bob".into() }));
    }

    #[test]
    fn conflicts_are_found() {
        for (one, other, conflict) in [
            ("user = 1000", "user = \"alice\"", true),
            ("user = 1000", "user = 1001", false),
            ("user = 1000", "exe = \"/x\"", false),
            ("local-port = \"8000-8010\"", "local-port = \"8005-8015\"", true),
            ("local-port = \"8000-8010\"", "local-port = \"8005-8014\"", false),
            ("local-port = 80", "local-port = 81", false),
            ("local-port = 80, user = 1", "local-port = 80", false),
            ("remote = \"10.0.0.0/8\"", "remote = \"10.0.0.0/8\"", true),
            ("remote = \"10.0.0.0/8\"", "remote = \"11.0.0.0/8\"", false),
            ("remote = \"0.0.0.0/0\"", "remote = \"::/0\"", false),
            ("exe = \"/a/*\"", "exe = \"/a\"", false),
            ("exe = \"/a/*\"", "exe = \"/b/*\"", false),
            ("cgroup = \"/a\"", "cgroup = \"/a/b\"", false),
            ("cgroup = \"/a/b.service\"", "unit = \"b\"", true),
            ("cgroup = \"/b.service/a\"", "unit = \"b\"", false),
            ("unit = \"a\"", "unit = \"b\"", false),
        ] {
            let found = rules(&[&format!("level = 5, {one}"), &format!("level = 6, {other}")]);
            let expected = conflict.then_some(RuleError::Conflict { first: 0, second: 1 });
            assert_eq!(found.err(), expected, "{one} and {other}");
            rules(&[&format!("level = 5, {one}"), &format!("level = 5, {other}")]).unwrap();
        }
    }

    #[test]
    fn places_alone_need_a_tag() {
        let rules =
            rules(&["level = 5, unit = \"a\"", "level = 6, cgroup = \"/b\"", "level = 7, unit = \"c\", user = 0"]);
        let rules = rules.unwrap();
        let found: Vec<_> = needs_tag(&rules)
            .into_iter()
            .map(|(rule, place, level)| (rule, place.to_string(), level.number()))
            .collect();
        assert_eq!(found, [(0, "unit a.service".to_owned(), 5), (1, "cgroup /b".to_owned(), 6)]);
    }

    fn ports() -> impl Strategy<Value = Option<Ports>> {
        proptest::option::of((1..6u16, 0..3u16).prop_map(|(first, more)| Ports { first, last: first + more }))
    }

    /// A path of one to three components out of two, so that paths meet often.
    fn path() -> impl Strategy<Value = PathBuf> {
        proptest::collection::vec(select(vec!["a", "b"]), 1..4).prop_map(|parts| Path::new("/").join(parts.join("/")))
    }

    fn place() -> impl Strategy<Value = CgroupSelector> {
        prop_oneof![
            path().prop_map(CgroupSelector::Path),
            select(vec!["a", "b"]).prop_map(|name| CgroupSelector::Unit(name.to_owned()))
        ]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let prefix = select(vec!["0.0.0.0/0", "10.0.0.0/8", "10.0.0.2", "::/0", "fd00::/8"]);
        let exe = prop_oneof![path().prop_map(Exe::File), path().prop_map(Exe::Folder)];
        let socket = (ports(), ports(), proptest::option::of(prefix));
        let process = (proptest::option::of(exe), proptest::option::of(0..3u32), proptest::option::of(place()));
        (0..8u8, socket, process).prop_map(|(level, (local_port, remote_port, remote), (exe, user, place))| Rule {
            level: Level::new(level).unwrap(),
            unit: None,
            cgroup: place,
            user: user.map(User::Id),
            exe,
            local_port,
            remote_port,
            remote: remote.map(|text| text.parse().unwrap()),
        })
    }

    fn met() -> impl Strategy<Value = (Process, LiveSocket)> {
        let host = select(vec!["10.0.0.2", "10.9.9.9", "192.168.0.1", "fd00::1", "2001:db8::1"]);
        let remote = proptest::option::of((host, 1..8u16));
        (1..8u16, remote, path(), path(), 0..3u32).prop_map(|(local, remote, exe, cgroup, user)| {
            let process = Process { pid: 7, name: "x".into(), user, exe: Some(exe), cgroup: Some(cgroup) };
            let local = Some(SocketAddr::from(([10, 0, 0, 1], local)));
            let remote = remote.map(|(host, port)| SocketAddr::new(host.parse().unwrap(), port));
            (process, LiveSocket { local, remote, ..socket("", "") })
        })
    }

    /// A socket that both rules match with equal precedence, if they tie: proof of the conflict.
    fn witness(one: &Rule, other: &Rule) -> (Process, LiveSocket) {
        let port = |a: Option<Ports>, b: Option<Ports>| a.zip(b).map_or(1, |(a, b)| a.first.max(b.first));
        let host = one.remote.map_or("10.0.0.1".parse().unwrap(), |prefix| prefix.network);
        let places = [one, other].map(|rule| rule.place().cloned());
        let cgroup = places.iter().flatten().find_map(|place| match place {
            CgroupSelector::Path(path) => Some(path.clone()),
            CgroupSelector::Unit(_) => None,
        });
        let unit = places.iter().flatten().find_map(|place| match place {
            CgroupSelector::Path(_) => None,
            CgroupSelector::Unit(name) => Some(Path::new("/").join(name)),
        });
        let process = Process {
            exe: Some(match &one.exe {
                Some(Exe::File(file)) => file.clone(),
                Some(Exe::Folder(folder)) => folder.join("x"),
                None => "/x".into(),
            }),
            user: match one.user {
                Some(User::Id(id)) => id,
                _ => 0,
            },
            cgroup: cgroup.or(unit),
            ..process()
        };
        let local = Some(SocketAddr::from(([10, 0, 0, 1], port(one.local_port, other.local_port))));
        let remote = Some(SocketAddr::new(host, port(one.remote_port, other.remote_port)));
        (process, LiveSocket { local, remote, ..socket("", "") })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// Two that tie do meet; two that meet with equal precedence are known to tie.
        #[test]
        fn ties_are_exactly_those_that_can_happen(one in rule(), other in rule(), (process, socket) in met()) {
            if one.ties_with(&other) {
                let (process, socket) = witness(&one, &other);
                let found = [&one, &other].map(|rule| rule.matches(&process, &socket));
                prop_assert!(found[0].is_some() && found[0] == found[1], "{found:?} for {process:?} {socket:?}");
            }
            let found = [&one, &other].map(|rule| rule.matches(&process, &socket));
            if found[0].is_some() && found[0] == found[1] {
                prop_assert!(one.ties_with(&other) && other.ties_with(&one));
            }
        }

        /// Without a conflict, the order of the rules makes no difference, and one that matches is found.
        #[test]
        fn the_order_of_rules_makes_no_difference(
            (sorted, shuffled) in proptest::collection::vec(rule(), 1..8)
                .prop_flat_map(|rules| (Just(rules.clone()), Just(rules).prop_shuffle())),
            (process, socket) in met(),
        ) {
            let [sorted, shuffled] = [sorted, shuffled].map(|rules| Rules::new(rules, |_| None));
            prop_assert_eq!(sorted.is_ok(), shuffled.is_ok());
            if let (Ok(sorted), Ok(shuffled)) = (sorted, shuffled) {
                let level = |rules: &Rules| rules.find(&process, &socket).map(|found| found.level);
                prop_assert_eq!(level(&sorted), level(&shuffled));
                let any = sorted.iter().any(|rule| rule.matches(&process, &socket).is_some());
                prop_assert_eq!(level(&sorted).is_some(), any);
            }
        }

        /// An independent reading of prefixes: the first bits are the same.
        #[test]
        fn prefixes_contain_what_begins_alike(network: u128, other: u128, same in 0..128u32, length in 0..=128u32, v4: bool) {
            let address_of = |bits: u128| match v4 {
                true => IpAddr::V4((bits as u32).into()),
                false => IpAddr::V6(bits.into()),
            };
            let length = if v4 { length.min(32) } else { length };
            let network = first_bits(address_of(network), length);
            let near = match network {
                IpAddr::V4(v4) => u128::from(v4.to_bits() ^ (other as u32).checked_shr(same).unwrap_or(0)),
                IpAddr::V6(v6) => v6.to_bits() ^ (other >> same),
            };
            let address = address_of(near);
            prop_assume!(network.to_canonical() == network && address.to_canonical() == address);
            let text = |address: IpAddr| match address {
                IpAddr::V4(v4) => format!("{:032b}", v4.to_bits()),
                IpAddr::V6(v6) => format!("{:0128b}", v6.to_bits()),
            };
            let alike = text(network)[..length as usize] == text(address)[..length as usize];
            let prefix: Prefix = format!("{network}/{length}").parse().unwrap();
            prop_assert_eq!(prefix.contains(address), alike);
        }
    }
}
