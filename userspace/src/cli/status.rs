//! `qjump status`.

use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use qjump_ebpf::{
    Charge, Config, Level, LevelLimit, Reason,
    grant::is_grant_only,
    layout::{Count, FLAG_PRIORITY_TAG, GRANT_ONLY_SHIFT},
};
use serde_json::{Value, json};

use super::{Failure, print};
use crate::{
    agent::{
        SOCKET, client,
        guarantee::{self, Guarantee},
        snapshot::Interface,
    },
    dataplane::{self, Error, InterfaceStatus, LevelStatus, Why},
    plan::{Claims, bound_in_force, show_factor},
    qdisc::Queue,
    table::Table,
    units::{show_ns, show_rate},
};

/// Show what is in force and what it did, asked from the kernel; exit status 2 if nothing is, or not all of it
#[derive(Args)]
pub struct StatusCommand {
    /// Interface of this network namespace; without it, every one that qjump is loaded on, in all namespaces
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
    /// Print JSON, with --watch one line a time
    #[arg(long)]
    json: bool,
    /// Show again every second, with rates, until interrupted
    #[arg(long)]
    watch: bool,
}

impl StatusCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut before = HashMap::new();
        loop {
            let names = match &self.interface {
                Some(name) => vec![name.clone()],
                None => dataplane::loaded_interfaces()?,
            };
            // One that cannot be read does not hide the others.
            let (mut statuses, mut failures) = (Vec::new(), Vec::new());
            for name in &names {
                match dataplane::status(name) {
                    Ok(status) => statuses.push(status),
                    Err(error) if error.is_usage() => return Err(error.into()),
                    // Asked for by name, it should be there; from the list, it has just been unloaded.
                    Err(error @ Error::NotLoaded(_)) => {
                        if self.interface.is_some() {
                            eprintln!("qjump: {error}");
                        }
                    }
                    Err(error) => failures.push(error.to_string()),
                }
            }
            // Whether an agent runs is news, and not of the state of an interface.
            let agent = client::ask(Path::new(SOCKET), &json!({"method": "status"}))
                .ok()
                .map(|mut answer| answer["agent"].take());
            if self.json {
                let json = to_json(&statuses, agent.as_ref());
                print(if self.watch { json.to_string() } else { format!("{json:#}") })?;
            } else if names.is_empty() {
                print("not enforced: qjump is not loaded on any interface; `qjump load --help` says how")?;
            } else {
                // The table replaces itself on a terminal, and follows itself in a pipe.
                if self.watch && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
                    print("\x1b[2J\x1b[H")?;
                }
                for status in &statuses {
                    print(Text { status, before: &before })?;
                }
                print(agent_line(agent.as_ref()))?;
            }
            if !failures.is_empty() {
                return Err(Failure::Failed(failures.join("\nqjump: ")));
            }
            // A name means the interface here, and one elsewhere does nothing for it.
            let stranger = statuses.iter().find(|status| status.elsewhere && self.interface.is_some());
            if let Some(InterfaceStatus { interface, .. }) = stranger {
                eprintln!(
                    "qjump: not enforced: what is loaded on '{interface}' is in another network namespace; nothing is \
                     loaded on an interface of this name here"
                );
            }
            if !self.watch {
                let intact = |status: &InterfaceStatus| status.attached && status.queue_problems.is_empty();
                let holds = !statuses.is_empty() && statuses.iter().all(intact) && stranger.is_none();
                return if holds { Ok(()) } else { Err(Failure::DoesNotHold) };
            }
            before = statuses.iter().flat_map(passed_by_level).collect();
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

type Passed = HashMap<(String, Level), Count>;

fn passed_by_level(status: &InterfaceStatus) -> impl Iterator<Item = ((String, Level), Count)> + '_ {
    status.levels.iter().map(|level| ((status.interface.clone(), level.level), level.passed()))
}

fn positive(value: f64) -> Option<f64> {
    (value > 0.0).then_some(value)
}

fn factor(config: &Config, level: Level) -> Option<f64> {
    positive(config.plan.levels[level.index()].factor)
}

pub(super) fn rate(config: &Config, level: Level) -> Option<f64> {
    positive(config.plan.levels[level.index()].rate_bps)
}

fn epoch(config: &Config, level: Level) -> Option<f64> {
    positive(config.plan.levels[level.index()].epoch_ns)
}

fn pcp(config: &Config) -> bool {
    config.flags & FLAG_PRIORITY_TAG != 0
}

fn claims(config: &Config, level: Level) -> Claims {
    let grant_only = (config.flags >> GRANT_ONLY_SHIFT) as u8;
    if is_grant_only(level, grant_only) { Claims::GrantOnly } else { Claims::Allow }
}

/// The limit of a level that has one.
fn limited(config: &Config, level: Level) -> Option<&LevelLimit> {
    Some(&config.limits[level.index()]).filter(|limit| matches!(limit.charge(), Charge::Packet | Charge::Byte))
}

/// The rule for larger packets, as `load --oversize` takes it.
fn oversize(limit: &LevelLimit) -> &'static str {
    if limit.drops_oversize() { "drop" } else { "demote" }
}

/// The rule for packets over the limit, as `--level` takes it.
fn over(limit: &LevelLimit) -> &'static str {
    if limit.demotes() {
        "demote"
    } else if limit.horizon_ns() > 0 {
        "pace"
    } else {
        "police"
    }
}

/// Whether an agent looks after it, and what troubles it.
fn agent_line(agent: Option<&Value>) -> String {
    let Some(agent) = agent else { return "agent: none; the limits stay without one".to_owned() };
    let interfaces = agent["interfaces"].as_object().into_iter().flatten();
    let troubles = interfaces.filter_map(|(name, problem)| Some(format!("{name}: {}", problem.as_str()?)));
    let refused = agent["refused"].as_str().map(|why| format!("the last configuration was refused: {why}"));
    let rules = agent["rules"].as_str().map(|why| format!("rules: {why}"));
    let all: Vec<String> = troubles.chain(refused).chain(rules).collect();
    let hosts = format!("{} hosts, as {} says", agent["hosts"], agent["hosts_source"].as_str().unwrap_or("nobody"));
    match (all.is_empty(), agent["drained"] == true) {
        (_, true) => "agent: drained; `qjump reload` begins again".to_owned(),
        (true, _) => format!("agent: all is as the configuration wants it; {hosts}"),
        (false, _) => format!("agent: {hosts}\n  {}", all.join("\n  ")),
    }
}

fn to_json(statuses: &[InterfaceStatus], agent: Option<&Value>) -> Value {
    json!({
        "schema_version": 1,
        "at_unix_ns": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64),
        "interfaces": statuses.iter().map(interface_json).collect::<Vec<_>>(),
        "agent": agent,
    })
}

/// Whether the bounds can be counted on; not known of another network namespace.
fn guarantee(status: &InterfaceStatus) -> Option<Guarantee> {
    (!status.elsewhere).then(|| guarantee::judge(&Interface::of(status), None, Instant::now()))
}

fn interface_json(status: &InterfaceStatus) -> Value {
    let plan = &status.config.plan;
    json!({
        "interface": status.interface,
        "netns": plan.netns,
        "hook": status.hook,
        "attached": status.attached,
        "problem": status.problem,
        "program_id": status.program_id,
        "position": status.position.map(|(at, _)| at),
        "programs": status.position.map(|(_, of)| of),
        "generation": plan.generation,
        "loaded_at_unix_ns": plan.loaded_at_ns,
        "hosts": plan.hosts,
        "link_rate_bps": plan.link_rate_bps,
        "epsilon_ns": plan.epsilon_ns,
        "queue": status.queue.name(),
        "queue_why": Why::of_number(status.config.plan.queue_why).map(|why| why.to_string()),
        "queue_problems": status.queue_problems,
        "host_rate_bps": (plan.host_rate_bps > 0).then_some(plan.host_rate_bps),
        "pcp": pcp(&status.config),
        "guarantee": guarantee(status).map(|found| json!({
            "holds": found.holds(),
            "doubts": found.doubts.iter().map(|doubt| json!({"name": doubt.name(), "text": doubt.to_string()})).collect::<Vec<_>>(),
        })),
        "levels": status.levels.iter().map(|level| level_json(&status.config, level)).collect::<Vec<_>>(),
    })
}

fn level_json(config: &Config, level: &LevelStatus) -> Value {
    let reasons: serde_json::Map<String, Value> = Reason::ALL
        .into_iter()
        .map(|reason| {
            let count = level.count(reason);
            (reason.name().to_owned(), json!({"packets": count.packets, "bytes": count.bytes}))
        })
        .collect();
    json!({
        "level": level.level.number(),
        "factor": factor(config, level.level),
        "epoch_ns": epoch(config, level.level),
        "rate_bps": rate(config, level.level),
        "tolerance_ns": limited(config, level.level).map(LevelLimit::tolerance_ns),
        "max_packet_bytes": limited(config, level.level).map(LevelLimit::max_packet),
        "oversize": limited(config, level.level).map(oversize),
        "over": limited(config, level.level).map(over),
        "claims": claims(config, level.level),
        "bound_ns": bound_in_force(config, level.level),
        "guaranteed": config.plan.levels[level.level.index()].guaranteed == 1,
        "max_senders": bound_in_force(config, level.level).map(|_| config.plan.levels[level.level.index()].max_senders),
        "passed_packets": level.passed().packets,
        "passed_bytes": level.passed().bytes,
        "demoted_packets": level.demoted().packets,
        "demoted_bytes": level.demoted().bytes,
        "dropped_packets": level.dropped().packets,
        "dropped_bytes": level.dropped().bytes,
        "waited_packets": level.counters.waited_packets,
        "worst_wait_ns": level.counters.worst_wait_ns,
        "last_activity_ns_ago": level.idle_ns,
        "reasons": reasons,
    })
}

struct Text<'a> {
    status: &'a InterfaceStatus,
    before: &'a Passed,
}

impl std::fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { status, before } = self;
        let plan = &status.config.plan;
        let elsewhere = if status.elsewhere {
            format!(" in namespace net:[{}], seen from another namespace", plan.netns)
        } else {
            String::new()
        };
        write!(f, "{}{elsewhere}: ", status.interface)?;
        match (&status.problem, status.position) {
            (Some(problem), _) => write!(f, "NOT ENFORCED: {problem}")?,
            (None, Some((at, of))) => {
                let id = status.program_id.map_or(String::new(), |id| format!(", program {id}"));
                write!(f, "enforced at {} egress{id}, {at} of {of} there", status.hook)?;
                if at > 1 {
                    write!(f, " (a program before it may pass packets around it)")?;
                }
            }
            (None, None) => write!(f, "enforced at {} egress", status.hook)?,
        }
        writeln!(
            f,
            "\n{} hosts, {} links, epsilon {}, {}plan number {}",
            plan.hosts,
            show_rate(plan.link_rate_bps as f64),
            show_ns(plan.epsilon_ns as f64),
            if pcp(&status.config) { "802.1p priority written, " } else { "" },
            plan.generation
        )?;
        let host_rate = match plan.host_rate_bps {
            0 => String::new(),
            rate => format!(", all of it shaped to {}", show_rate(rate as f64)),
        };
        let why = Why::of_number(plan.queue_why).map_or_else(String::new, |why| format!(" ({why})"));
        match status.queue {
            Queue::Keep => writeln!(f, "queue: as it was; nothing waits for its level{why}")?,
            queue => writeln!(f, "queue: {}, where packets wait for their level{host_rate}{why}", queue.name())?,
        }
        if let Some(guarantee) = guarantee(status) {
            let as_far = if guarantee.holds() { ", as far as this host goes" } else { "" };
            writeln!(f, "guarantee: {guarantee}{as_far}")?;
        }
        for problem in &status.queue_problems {
            writeln!(f, "QUEUE NOT AS IT SHOULD BE: {problem}; run `qjump load` again")?;
        }
        let mut table = Table::new([
            "level",
            "factor",
            "epoch",
            "tolerance",
            "rate",
            "max packet",
            "larger ones",
            "over",
            "who may",
            "bound",
        ]);
        for level in status.levels.iter().map(|level| level.level) {
            let config = &status.config;
            let limit = limited(config, level);
            let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            table.row([
                level.to_string(),
                or_none(factor(config, level).map(show_factor)),
                or_none(epoch(config, level).map(show_ns)),
                or_none(limit.map(|limit| show_ns(limit.tolerance_ns() as f64))),
                permitted(config, level),
                or_none(limit.map(|limit| format!("{} B", limit.max_packet()))),
                or_none(limit.map(|limit| oversize(limit).to_owned())),
                or_none(limit.map(|limit| over(limit).to_owned())),
                match claims(config, level) {
                    Claims::Allow => "any".to_owned(),
                    Claims::GrantOnly => "granted".to_owned(),
                },
                bound(config, level),
            ]);
        }
        writeln!(f, "{table}")?;
        let mut header =
            vec!["level", "passed", "wire bytes", "demoted", "dropped", "waited", "longest wait", "last packet"];
        if !before.is_empty() {
            header.push("rate now");
        }
        header.push("notes");
        let mut table = Table::new(header);
        for level in &status.levels {
            let passed = level.passed();
            let mut row = vec![
                level.level.to_string(),
                passed.packets.to_string(),
                passed.bytes.to_string(),
                level.demoted().packets.to_string(),
                level.dropped().packets.to_string(),
                level.counters.waited_packets.to_string(),
                match level.counters.worst_wait_ns {
                    0 => "-".to_owned(),
                    wait => show_ns(wait as f64),
                },
                last_packet(level),
            ];
            if !before.is_empty() {
                let key = (status.interface.clone(), level.level);
                let bytes = before.get(&key).map_or(0, |count| passed.bytes.saturating_sub(count.bytes));
                row.push(show_rate(bytes as f64 * 8.0));
            }
            row.push(notes(level));
            table.row(row);
        }
        write!(f, "{table}")?;
        for level in &status.levels {
            let oversize = [Reason::OversizeDropped, Reason::OversizeDemoted].map(|reason| level.count(reason).packets);
            if oversize.iter().any(|&packets| packets > 0) {
                let largest = limited(&status.config, level.level).map_or(0, LevelLimit::max_packet);
                write!(
                    f,
                    "\nlevel {}: packets above {largest} bytes asked for it: make messages smaller, lower the TCP segment \
                     (TCP_MAXSEG, or advmss of the route), cap GSO (`ip link set dev {} gso_max_segs 1`), or plan the level \
                     with a larger max-packet or burst",
                    level.level, status.interface
                )?;
            }
        }
        Ok(())
    }
}

pub(super) fn bound(config: &Config, level: Level) -> String {
    let record = &config.plan.levels[level.index()];
    match bound_in_force(config, level) {
        None => "-".to_owned(),
        Some(bound) if record.guaranteed == 1 => show_ns(bound),
        Some(bound) => format!("{} if <= {} send", show_ns(bound), record.max_senders),
    }
}

fn permitted(config: &Config, level: Level) -> String {
    match config.limits[level.index()].charge() {
        Charge::NotConfigured if level != Level::BEST_EFFORT => "not planned".to_owned(),
        Charge::NotConfigured | Charge::Unlimited => "unlimited".to_owned(),
        Charge::Packet | Charge::Byte => rate(config, level).map_or("?".to_owned(), show_rate),
    }
}

/// Levels without a limit never read the clock, so nobody knows when their last packet left.
fn last_packet(level: &LevelStatus) -> String {
    match level.idle_ns {
        Some(idle) => format!("{} ago", show_ns(idle as f64)),
        None if level.passed().packets > 0 => "not timed".to_owned(),
        None => "never".to_owned(),
    }
}

fn notes(level: &LevelStatus) -> String {
    let seen: Vec<String> = Reason::ALL
        .into_iter()
        .filter(|&reason| reason != Reason::Passed && level.count(reason).packets > 0)
        .map(|reason| format!("{} {}", reason.name(), level.count(reason).packets))
        .collect();
    if seen.is_empty() { "-".to_owned() } else { seen.join(", ") }
}
