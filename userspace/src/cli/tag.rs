//! `qjump tag`, `qjump untag` and `qjump tags`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use nix::unistd::{Uid, User};
use qjump_ebpf::{
    Level,
    grant::{GRANT_BY_RULE, GRANT_OWNS_CGROUP},
};
use serde_json::{Value, json};

use super::{Failure, print};
use crate::{
    agent::{
        SOCKET,
        client::{self, ClientError},
    },
    config::parse_level,
    dataplane::{ignored_everywhere, missing_capability},
    table::Table,
    tag::{self, Changed, Request, Selector, Session, Tag},
    units::{self, show_ns},
};

/// Version of the JSON of `qjump tags`.
const SCHEMA_VERSION: u32 = 1;

/// Give the sockets of a process, a cgroup or a systemd unit a level; those that it has keep their connections
///
/// Without root rights it asks the running agent, which does it for the members of group qjump.
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

fn send_buffer(text: &str) -> Result<u32, String> {
    let bytes = units::bytes(text).map_err(|error| error.to_string())?;
    if (1..=tag::MOST_SEND_BUFFER).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!("{bytes} is not between 1 and 2^30 bytes"))
    }
}

impl GrantArgs {
    pub(super) const fn request(&self) -> Request {
        Request { level: self.level, send_buffer: self.sndbuf, by: None }
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
        let what = format!("at level {}", self.grant.level);
        let GrantArgs { level, sndbuf } = self.grant;
        match ask_agent(&json!({"method": "tag", "level": level.number(), "sndbuf": sndbuf}), &selector)? {
            Some(answer) => show_answer(&answer, &what)?,
            None => show(&Session::begin()?.tag(&selector, &self.grant.request())?, &what)?,
        }
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
        let what = |level: Option<String>| match level {
            Some(level) => format!("untagged; at level {level} with the cgroup above"),
            None => "untagged".to_owned(),
        };
        let selector = self.which.selector()?;
        if let Some(answer) = ask_agent(&json!({"method": "untag"}), &selector)? {
            return show_answer(&answer, &what(answer["level"].as_u64().map(|level| level.to_string())));
        }
        let changed = Session::begin()?.untag(&selector)?;
        show(&changed, &what(changed.level.map(|level| level.to_string())))
    }
}

/// Has a running agent do what this user may not do himself, but the members of its group may ask for. `None` if this command can
/// do it, or there is no agent.
fn ask_agent(request: &Value, selector: &Selector) -> Result<Option<Value>, Failure> {
    if missing_capability().is_none() {
        return Ok(None);
    }
    let mut request = request.clone();
    let (key, value) = match selector {
        Selector::Process(pid) => ("pid", json!(pid)),
        // JSON has no other paths; without rights, this one would be refused in any case.
        Selector::Cgroup(path) => match path.to_str() {
            Some(path) => ("cgroup", json!(path)),
            None => return Ok(None),
        },
        Selector::Unit(name) => ("unit", json!(name)),
    };
    request[key] = value;
    match client::ask(Path::new(SOCKET), &request) {
        Ok(answer) if answer["ok"] == true => Ok(Some(answer)),
        Ok(answer) => {
            let error = answer["error"].as_str().unwrap_or("the agent does not say why").to_owned();
            Err(if answer["kind"] == "usage" { Failure::Usage(error) } else { Failure::Failed(error) })
        }
        Err(ClientError::NoAgent { .. }) => Ok(None),
        Err(error) => Err(Failure::Failed(format!("without root rights, the agent would have to do it: {error}"))),
    }
}

fn show(changed: &Changed, what: &str) -> Result<(), Failure> {
    report(&changed.cgroup.path, what, changed.sockets.visited as u64, changed.problems().iter().map(String::as_str))
}

/// The same of an agent's answer.
fn show_answer(answer: &Value, what: &str) -> Result<(), Failure> {
    let problems = answer["problems"].as_array().into_iter().flatten().filter_map(Value::as_str);
    report(answer["cgroup"].as_str().unwrap_or("?"), what, answer["sockets"].as_u64().unwrap_or(0), problems)
}

fn report<'a>(
    cgroup: &str,
    what: &str,
    sockets: u64,
    mut problems: impl Iterator<Item = &'a str>,
) -> Result<(), Failure> {
    print(format!("{cgroup}: {what}; {sockets} live socket(s) moved"))?;
    problems.try_for_each(|problem| print(format!("  {problem}")))
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
