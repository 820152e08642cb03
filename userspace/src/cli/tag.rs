//! `qjump tag`, `qjump untag` and `qjump tags`.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use nix::unistd::{Uid, User};
use qjump_ebpf::{
    Level,
    grant::{GRANT_BY_RULE, GRANT_OWNS_CGROUP},
};
use serde_json::json;

use super::{Failure, print};
use crate::{
    config::parse_level,
    dataplane::ignored_everywhere,
    table::Table,
    tag::{self, Changed, Request, Selector, Session, Tag},
    units::{self, show_ns},
};

/// Version of the JSON of `qjump tags`.
const SCHEMA_VERSION: u32 = 1;

/// Give the sockets of a process, a cgroup or a systemd unit a level; those that it has keep their connections
#[derive(Args)]
pub struct TagCommand {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    grant: GrantArgs,
}

/// Take a level back: the sockets return to level 0, or to the level of a cgroup above
#[derive(Args)]
pub struct UntagCommand {
    #[command(flatten)]
    which: Which,
    /// Everything that is tagged
    #[arg(long, conflicts_with_all = ["pid", "cgroup", "unit"])]
    all: bool,
}

/// Show what is tagged, by whom and since when, and its live sockets by level
#[derive(Args)]
pub struct TagsCommand {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a grant is to be.
#[derive(Args)]
pub struct GrantArgs {
    /// Level, 0 to 7; 7 is the strictest, 0 is best effort
    #[arg(long, value_name = "L", value_parser = parse_level)]
    level: Level,
    /// Send buffer of its sockets, in bytes (SO_SNDBUF), so that what waits for a limited level stays short
    #[arg(long, value_name = "BYTES", value_parser = send_buffer)]
    sndbuf: Option<u32>,
}

#[derive(Args)]
#[group(multiple = false)]
struct Which {
    /// A running process; with a tag, it has a cgroup of its own below the one that it was in
    #[arg(long)]
    pid: Option<u32>,
    /// A cgroup, by its path in /proc/PID/cgroup or in full
    #[arg(long, value_name = "PATH")]
    cgroup: Option<PathBuf>,
    /// A systemd unit: a service, scope or slice
    #[arg(long, value_name = "NAME")]
    unit: Option<String>,
}

/// The kernel doubles what it is given, into an int.
fn send_buffer(text: &str) -> Result<u32, String> {
    let bytes = units::bytes(text).map_err(|error| error.to_string())?;
    if (1..=1 << 30).contains(&bytes) { Ok(bytes) } else { Err(format!("{bytes} is not between 1 and 2^30 bytes")) }
}

impl GrantArgs {
    pub(super) const fn request(&self) -> Request {
        Request { level: self.level, send_buffer: self.sndbuf }
    }

    /// Says so if the level is for nothing.
    pub(super) fn warn_if_ignored(&self) {
        if let Some(why) = ignored_everywhere(self.level) {
            eprintln!("qjump: warning: level {} does nothing: {why}", self.level);
        }
    }
}

impl Which {
    fn selector(&self) -> Result<Selector, Failure> {
        match (self.pid, &self.cgroup, &self.unit) {
            (Some(pid), ..) => Ok(Selector::Process(pid)),
            (_, Some(path), _) => Ok(Selector::Cgroup(path.clone())),
            (.., Some(unit)) => Ok(Selector::Unit(unit.clone())),
            _ => Err(Failure::Usage("say what: --pid P, --cgroup PATH or --unit NAME".to_owned())),
        }
    }
}

impl TagCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let selector = self.which.selector()?;
        let changed = Session::begin()?.tag(&selector, &self.grant.request())?;
        report(&changed, &format!("at level {}", self.grant.level))?;
        self.grant.warn_if_ignored();
        Ok(())
    }
}

impl UntagCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        if self.all {
            let number = Session::begin()?.untag_all()?;
            return print(format!("{number} grant(s) taken back"));
        }
        let changed = Session::begin()?.untag(&self.which.selector()?)?;
        let level = match changed.level {
            Some(level) => format!("untagged; at level {level} with the cgroup above"),
            None => "untagged".to_owned(),
        };
        report(&changed, &level)
    }
}

fn report(changed: &Changed, what: &str) -> Result<(), Failure> {
    let count = &changed.sockets;
    print(format!("{}: {what}; {} live socket(s) moved", changed.cgroup.path, count.visited))?;
    for (pid, fd, error) in &count.failed {
        print(format!("  not moved: descriptor {fd} of process {pid}: {error}"))?;
    }
    for (number, what) in [
        (count.ended, "process(es) ended meanwhile"),
        (
            count.unreachable,
            "process(es) are in a PID namespace that cannot be seen from here; their sockets were not moved",
        ),
    ] {
        if number > 0 {
            print(format!("  {number} {what}"))?;
        }
    }
    Ok(())
}

impl TagsCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let tags = tag::list()?;
        if self.json {
            let tags: Vec<_> = tags.iter().map(to_json).collect();
            return print(format!("{:#}", json!({"schema_version": SCHEMA_VERSION, "tags": tags})));
        }
        if tags.is_empty() {
            return print("nothing is tagged");
        }
        let mut table = Table::new(["cgroup", "level", "send buffer", "by", "since", "processes", "live sockets"]);
        for tag in &tags {
            let sockets = match tag.is_over {
                true => "over; the next change removes it".to_owned(),
                false => sockets(tag),
            };
            table.row([
                tag.cgroup.as_ref().map_or(format!("number {}", tag.id), |cgroup| cgroup.path.clone()),
                tag.grant.level.to_string(),
                send_buffer_of(tag).map_or("-".to_owned(), |bytes| format!("{bytes} B")),
                by(tag),
                ago(tag.grant.since_ns),
                tag.processes.to_string(),
                sockets,
            ]);
        }
        print(table)
    }
}

fn sockets(tag: &Tag) -> String {
    let at = |level: Level| tag.sockets[level.index()];
    let some: Vec<String> = Level::strictest_first()
        .filter(|&level| at(level) > 0)
        .map(|level| format!("{} at level {level}", at(level)))
        .collect();
    if some.is_empty() { "none".to_owned() } else { some.join(", ") }
}

fn send_buffer_of(tag: &Tag) -> Option<u32> {
    (tag.grant.send_buffer > 0).then_some(tag.grant.send_buffer)
}

fn by(tag: &Tag) -> String {
    let user = user(tag.grant.uid);
    if is_by_rule(tag) { format!("{user}, by a rule") } else { user }
}

const fn is_by_rule(tag: &Tag) -> bool {
    tag.grant.flags & GRANT_BY_RULE != 0
}

/// The name of a user, or the number.
pub(super) fn user(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or(uid.to_string(), |user| user.name)
}

fn ago(since_ns: u64) -> String {
    let since = UNIX_EPOCH + Duration::from_nanos(since_ns);
    let elapsed = SystemTime::now().duration_since(since).unwrap_or_default();
    format!("{} ago", show_ns(elapsed.as_nanos() as f64))
}

fn to_json(tag: &Tag) -> serde_json::Value {
    let by_level: serde_json::Map<String, serde_json::Value> =
        Level::strictest_first().map(|level| (level.to_string(), tag.sockets[level.index()].into())).collect();
    json!({
        "cgroup": tag.cgroup.as_ref().map(|cgroup| &cgroup.path),
        "cgroup_id": tag.id,
        "level": tag.grant.level,
        "sndbuf_bytes": send_buffer_of(tag),
        "granted_by_uid": tag.grant.uid,
        "by_rule": is_by_rule(tag),
        "granted_at_unix_ns": tag.grant.since_ns,
        "owns_cgroup": tag.grant.flags & GRANT_OWNS_CGROUP != 0,
        "over": tag.is_over,
        "processes": tag.processes,
        "sockets": by_level,
    })
}
