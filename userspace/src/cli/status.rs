//! `qjump status`.

use std::{collections::HashMap, time::Duration};

use clap::Args;
use qjump_ebpf::{Charge, Config, Level, Reason, layout::Count};
use serde_json::{Value, json};

use super::{Failure, print};
use crate::{
    dataplane::{self, InterfaceStatus, LevelStatus},
    plan::bound_in_force,
    table::Table,
    units::{show_ns, show_rate},
};

/// Show what is in force and what it did, asked from the kernel; exit status 2 if it is not attached
#[derive(Args)]
pub struct StatusCommand {
    /// Interface; without it, every one that qjump is loaded on
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
                    Err(error) => failures.push(error.to_string()),
                }
            }
            if self.json {
                let json = to_json(&statuses);
                print(if self.watch { json.to_string() } else { format!("{json:#}") })?;
            } else if names.is_empty() {
                print("qjump is not loaded on any interface; `qjump load --help` says how")?;
            } else {
                // The table replaces itself on a terminal, and follows itself in a pipe.
                if self.watch && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
                    print("\x1b[2J\x1b[H")?;
                }
                for status in &statuses {
                    print(Text { status, before: &before })?;
                }
            }
            if !failures.is_empty() {
                return Err(Failure::Failed(failures.join("\nqjump: ")));
            }
            if !self.watch {
                let all_attached = statuses.iter().all(|status| status.attached);
                return if all_attached { Ok(()) } else { Err(Failure::DoesNotHold) };
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

fn rate(config: &Config, level: Level) -> Option<f64> {
    positive(config.plan.levels[level.index()].rate_bps)
}

fn to_json(statuses: &[InterfaceStatus]) -> Value {
    json!({
        "schema_version": 1,
        "interfaces": statuses.iter().map(interface_json).collect::<Vec<_>>(),
    })
}

fn interface_json(status: &InterfaceStatus) -> Value {
    let plan = &status.config.plan;
    json!({
        "interface": status.interface,
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
        "epoch_ns": positive(config.plan.levels[level.level.index()].epoch_ns),
        "rate_bps": rate(config, level.level),
        "bound_ns": bound_in_force(config, level.level),
        "guaranteed": config.plan.levels[level.level.index()].guaranteed == 1,
        "max_senders": bound_in_force(config, level.level).map(|_| config.plan.levels[level.level.index()].max_senders),
        "passed_packets": level.passed().packets,
        "passed_bytes": level.passed().bytes,
        "demoted_packets": level.demoted().packets,
        "demoted_bytes": level.demoted().bytes,
        "dropped_packets": level.dropped().packets,
        "dropped_bytes": level.dropped().bytes,
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
        write!(f, "{}: ", status.interface)?;
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
            "\n{} hosts, {} links, epsilon {}, plan number {}",
            plan.hosts,
            show_rate(plan.link_rate_bps as f64),
            show_ns(plan.epsilon_ns as f64),
            plan.generation
        )?;
        let mut header =
            vec!["level", "factor", "rate", "bound", "passed", "bytes", "demoted", "dropped", "last packet"];
        if !before.is_empty() {
            header.push("rate now");
        }
        header.push("why not passed");
        let mut table = Table::new(header);
        for level in &status.levels {
            let passed = level.passed();
            let mut row = vec![
                level.level.to_string(),
                factor(&status.config, level.level).map_or("-".to_owned(), |factor| factor.to_string()),
                limit(&status.config, level.level),
                bound(&status.config, level.level),
                passed.packets.to_string(),
                passed.bytes.to_string(),
                level.demoted().packets.to_string(),
                level.dropped().packets.to_string(),
                last_packet(level),
            ];
            if !before.is_empty() {
                let key = (status.interface.clone(), level.level);
                let bytes = before.get(&key).map_or(0, |count| passed.bytes.saturating_sub(count.bytes));
                row.push(show_rate(bytes as f64 * 8.0));
            }
            row.push(reasons(level));
            table.row(row);
        }
        write!(f, "{table}")
    }
}

fn bound(config: &Config, level: Level) -> String {
    let record = &config.plan.levels[level.index()];
    match bound_in_force(config, level) {
        None => "-".to_owned(),
        Some(bound) if record.guaranteed == 1 => show_ns(bound),
        Some(bound) => format!("{} if <= {} send", show_ns(bound), record.max_senders),
    }
}

fn limit(config: &Config, level: Level) -> String {
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

fn reasons(level: &LevelStatus) -> String {
    let seen: Vec<String> = Reason::ALL
        .into_iter()
        .filter(|&reason| reason != Reason::Passed && level.count(reason).packets > 0)
        .map(|reason| format!("{} {}", reason.name(), level.count(reason).packets))
        .collect();
    if seen.is_empty() { "-".to_owned() } else { seen.join(", ") }
}
