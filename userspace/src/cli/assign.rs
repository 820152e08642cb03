//! `qjump assign`.

use std::{
    io,
    net::SocketAddr,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use clap::Args;
use nix::unistd::User;
use qjump_ebpf::Level;
use serde_json::{Value, json};

use super::{Failure, print};
use crate::{
    config::File,
    table::Table,
    tag::{
        assign::{Assigned, Assignment, Moved},
        rules::Rules,
    },
};

/// Give the sockets that are there the levels of the configuration's [[assign]] rules
#[derive(Args)]
pub struct AssignCommand {
    /// The configuration with the rules
    #[arg(long, value_name = "FILE", default_value = "/etc/qjump/qjump.toml")]
    config: PathBuf,
    /// Only show which sockets would be moved, by which rule
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl AssignCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let (file, rules) = read(&self.config)?;
        let assignment = Assignment::find(&rules).map_err(|error| Failure::Failed(error.to_string()))?;
        let moved = (!self.dry_run).then(|| assignment.apply());
        let mut warnings = warnings(&file, &rules, &assignment);
        let refused = refused(&assignment);
        if self.dry_run {
            warnings.extend(refused.clone());
        }
        if self.json {
            print(format!("{:#}", to_json(&file, &assignment, moved.as_ref(), &warnings)))?;
        } else {
            print(to_text(&file, &assignment, moved.as_ref()))?;
            warnings.iter().for_each(|warning| eprintln!("qjump: warning: {warning}"));
        }
        let failures = assignment.failed.iter().chain(moved.iter().flat_map(|moved| &moved.failed));
        let mut failures: Vec<String> = failures.map(failure).collect();
        if !self.dry_run {
            failures.extend(refused);
        }
        if failures.is_empty() { Ok(()) } else { Err(Failure::Failed(failures.join("\nqjump: "))) }
    }
}

fn read(path: &Path) -> Result<(File, Rules), Failure> {
    let wrong = |message: String| Failure::Usage(format!("{}: {message}", path.display()));
    let file = File::read(path).map_err(|error| Failure::Usage(error.to_string()))?;
    let user_id = |name: &str| User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
    let rules = file.rules(user_id).map_err(wrong)?;
    if rules.iter().len() == 0 {
        return Err(wrong(
            "there is no [[assign]] section; give a level and whose it is: unit = \"x.service\"".to_owned(),
        ));
    }
    Ok((file, rules))
}

/// What may not be as meant, and is no error.
fn warnings(file: &File, rules: &Rules, assignment: &Assignment) -> Vec<String> {
    let mut warnings = Vec::new();
    // A plan that cannot be made is the business of `plan` and `load`.
    let planned: Option<Vec<Level>> =
        file.plan(|_| Ok(())).ok().map(|answer| answer.plan.network.levels.iter().map(|level| level.level).collect());
    for (number, rule) in rules.iter().enumerate() {
        let level = rule.level();
        if level != Level::BEST_EFFORT && planned.as_ref().is_some_and(|planned| !planned.contains(&level)) {
            let message = format!("the plan has no level {level}, so its packets travel at level 0");
            warnings.push(file.at_rule(number, message));
        }
        if !assignment.sockets.iter().any(|assigned| assigned.found.rule == number) {
            warnings.push(file.at_rule(number, "no live socket gets its level by this rule now"));
        }
    }
    warnings
}

fn refused(assignment: &Assignment) -> Option<String> {
    let count = assignment.refused.len();
    (count > 0).then(|| {
        format!(
            "{count} processes could not be looked into: that needs CAP_SYS_PTRACE. Run it as root, for example with sudo"
        )
    })
}

fn failure((pid, fd, error): &(u32, RawFd, io::Error)) -> String {
    format!("process {pid}, descriptor {fd}: {error}")
}

fn unsettled(assignment: &Assignment) -> impl Iterator<Item = &Assigned> {
    assignment.sockets.iter().filter(|assigned| !assigned.is_settled())
}

fn to_text(file: &File, assignment: &Assignment, moved: Option<&Moved>) -> String {
    let address = |address: Option<SocketAddr>| address.map_or("-".to_owned(), |address| address.to_string());
    let mut table = Table::new(["rule", "pid", "program", "socket", "local", "remote", "level"]);
    for assigned in unsettled(assignment) {
        let Assigned { process, socket, found } = assigned;
        table.row([
            format!("line {}", file.line_of_rule(found.rule)),
            process.pid.to_string(),
            process.name.clone(),
            socket.kind.to_string(),
            address(socket.local),
            address(socket.remote),
            format!("{} -> {}", socket.priority, found.level),
        ]);
    }
    let count = unsettled(assignment).count();
    let settled = assignment.sockets.len() - count;
    let sum = match moved {
        None => format!("would move {count} sockets; {settled} have their level already"),
        Some(Moved { moved, closed, failed }) => format!(
            "moved {moved} sockets; {settled} had their level already, {closed} were closed meanwhile, {} failed",
            failed.len()
        ),
    };
    if count == 0 { sum } else { format!("{table}\n{sum}") }
}

fn to_json(file: &File, assignment: &Assignment, moved: Option<&Moved>, warnings: &[String]) -> Value {
    let address = |address: Option<SocketAddr>| address.map(|address| address.to_string());
    let sockets = unsettled(assignment).map(|Assigned { process, socket, found }| {
        json!({
            "rule_line": file.line_of_rule(found.rule),
            "pid": process.pid,
            "program": process.name,
            "fd": socket.fd,
            "inode": socket.inode,
            "kind": socket.kind.to_string(),
            "local": address(socket.local),
            "remote": address(socket.remote),
            "priority": socket.priority,
            "level": found.level.number(),
        })
    });
    json!({
        "schema_version": 1,
        "dry_run": moved.is_none(),
        "sockets": sockets.collect::<Vec<_>>(),
        "settled": assignment.sockets.iter().filter(|assigned| assigned.is_settled()).count(),
        "moved": moved.map(|moved| moved.moved),
        "closed": moved.map(|moved| moved.closed),
        "failed": assignment.failed.len() + moved.map_or(0, |moved| moved.failed.len()),
        "refused_processes": assignment.refused.len(),
        "warnings": warnings,
    })
}
