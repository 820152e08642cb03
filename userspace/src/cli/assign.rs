//! `qjump assign`.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::RawFd,
    path::{Path, PathBuf},
};

use clap::Args;
use nix::unistd::User;
use qjump_ebpf::Level;
use serde_json::{Value, json};

use super::{Failure, print, tag::user};
use crate::{
    config::File,
    table::Table,
    tag::{
        assign::{AssignError, Assigned, Assignment, Host, Moved, Place, Places},
        rules::{Match, Rules},
    },
};

/// Give cgroups, and the sockets that are there in all network namespaces, the levels of the configuration's [[assign]] rules
#[derive(Args)]
pub struct AssignCommand {
    /// The configuration with the rules
    #[arg(long, value_name = "FILE", default_value = "/etc/qjump/qjump.toml")]
    config: PathBuf,
    /// Only show which cgroups would be tagged and which sockets would be moved, by which rule
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl AssignCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let (file, rules) = read(&self.config)?;
        let failed = |error: AssignError| {
            Failure::Failed(match &error {
                AssignError::Place { rule, .. } => file.at_rule(*rule, &error),
                _ => error.to_string(),
            })
        };
        let mut host = if self.dry_run { Host::read() } else { Host::change(&rules) }.map_err(failed)?;
        let Places { found: places, missing } = host.places(&rules).map_err(failed)?;
        let unreachable = if self.dry_run { 0 } else { host.tag(&places).map_err(failed)? };
        let assignment = Assignment::find(&rules, &host, &places).map_err(failed)?;
        let moved = (!self.dry_run).then(|| assignment.apply(&mut host));
        let mut warnings = warnings(&file, &rules, &assignment);
        if unreachable > 0 {
            warnings.push(format!(
                "{unreachable} processes are in a PID namespace that cannot be seen from here; their sockets were not moved"
            ));
        }
        let mut failures: Vec<String> = missing.iter().map(|(rule, why)| file.at_rule(*rule, why)).collect();
        failures.extend(overruled(&file, &places, &assignment));
        failures.extend(refused(&assignment));
        failures.extend(host.unreadable.map(|error| error.to_string()));
        if self.dry_run {
            warnings.append(&mut failures);
        }
        let unmoved = moved.iter().flat_map(|moved| &moved.failed);
        failures.extend(assignment.failed.iter().chain(unmoved).map(failure));
        if self.json {
            print(format!("{:#}", to_json(&file, &places, &assignment, moved.as_ref(), &warnings)))?;
        } else {
            print(to_text(&file, &places, &assignment, moved.as_ref()))?;
            warnings.iter().for_each(|warning| eprintln!("qjump: warning: {warning}"));
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
        if !rules.is_place_alone(number) && !assignment.sockets.iter().any(|assigned| assigned.found.rule == number) {
            warnings.push(file.at_rule(number, "no live socket gets its level by this rule now"));
        }
    }
    warnings
}

/// Where a person's grant stands against a rule.
fn overruled(file: &File, places: &[Place], assignment: &Assignment) -> Vec<String> {
    let mut messages = Vec::new();
    for place in places.iter().filter(|place| place.is_overruled()) {
        let Place { rule, cgroup, level, before } = place;
        let Some(grant) = before else { continue };
        let path = &cgroup.path;
        let message = format!(
            "cgroup {path} stays at level {}, which {} granted it; to have level {level}, take that back first: \
             `qjump untag --cgroup {path}`",
            grant.level,
            user(grant.uid),
        );
        messages.push(file.at_rule(*rule, message));
    }
    // One message for all sockets that a rule and a cgroup have in common. Those of the cgroups above are said already.
    let mut counts: BTreeMap<(usize, Level, &str, Level), usize> = BTreeMap::new();
    for assigned in &assignment.sockets {
        let Some(cgroup) = &assigned.overruled_by else { continue };
        if !places.iter().any(|place| place.rule == assigned.found.rule && place.cgroup == *cgroup) {
            let Match { rule, level, .. } = assigned.found;
            *counts.entry((rule, level, &cgroup.path, assigned.level)).or_default() += 1;
        }
    }
    for ((rule, wanted, path, level), count) in counts {
        let message = format!(
            "{count} socket(s) stay at level {level}, not {wanted}: cgroup {path} has a grant of its own; \
             `qjump untag --cgroup {path}` takes it back",
        );
        messages.push(file.at_rule(rule, message));
    }
    messages
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

/// The sockets that are not as their rule says: those to be moved, and those that may not be.
fn notable(assignment: &Assignment) -> impl Iterator<Item = &Assigned> {
    assignment.sockets.iter().filter(|assigned| !assigned.is_settled() || assigned.overruled_by.is_some())
}

fn notable_places(places: &[Place]) -> impl Iterator<Item = &Place> {
    places.iter().filter(|place| !place.is_settled())
}

fn to_text(file: &File, places: &[Place], assignment: &Assignment, moved: Option<&Moved>) -> String {
    let mut text = String::new();
    let mut table = Table::new(["rule", "cgroup", "level"]);
    for place in notable_places(places) {
        let before = place.before.map_or("none".to_owned(), |grant| grant.level.to_string());
        table.row([
            format!("line {}", file.line_of_rule(place.rule)),
            place.cgroup.path.clone(),
            if place.is_overruled() { format!("stays at {before}") } else { format!("{before} -> {}", place.level) },
        ]);
    }
    if notable_places(places).count() > 0 {
        text += &format!("{table}\n");
    }
    let address = |address: Option<SocketAddr>| address.map_or("-".to_owned(), |address| address.to_string());
    let mut table = Table::new(["rule", "pid", "program", "socket", "local", "remote", "level"]);
    for assigned in notable(assignment) {
        let Assigned { process, socket, found, level, overruled_by, .. } = assigned;
        table.row([
            format!("line {}", file.line_of_rule(found.rule)),
            process.pid.to_string(),
            process.name.clone(),
            socket.kind.to_string(),
            address(socket.local),
            address(socket.remote),
            match overruled_by {
                Some(_) => format!("stays at {level}"),
                None => format!("{} -> {level}", socket.priority),
            },
        ]);
    }
    if notable(assignment).count() > 0 {
        text += &format!("{table}\n");
    }
    let to_tag = places.iter().filter(|place| place.needs_tag()).count();
    let tagged = places.iter().filter(|place| place.is_settled()).count();
    let settled = assignment.sockets.iter().filter(|assigned| assigned.is_settled()).count();
    text += &match moved {
        None => format!(
            "would tag {to_tag} cgroups; {tagged} have their level already\n\
             would move {} sockets; {settled} have their level already",
            assignment.sockets.len() - settled
        ),
        Some(Moved { moved, closed, failed }) => format!(
            "tagged {to_tag} cgroups; {tagged} had their level already\n\
             moved {moved} sockets; {settled} had their level already or with their cgroup, {closed} were closed meanwhile, {} failed",
            failed.len()
        ),
    };
    text
}

fn to_json(
    file: &File,
    places: &[Place],
    assignment: &Assignment,
    moved: Option<&Moved>,
    warnings: &[String],
) -> Value {
    let address = |address: Option<SocketAddr>| address.map(|address| address.to_string());
    let cgroups = notable_places(places).map(|place| {
        json!({
            "rule_line": file.line_of_rule(place.rule),
            "cgroup": place.cgroup.path,
            "level_before": place.before.map(|grant| grant.level),
            "level": place.level.number(),
            "overruled": place.is_overruled(),
        })
    });
    let sockets = notable(assignment).map(|Assigned { process, socket, found, level, overruled_by, .. }| {
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
            "level": level.number(),
            "rule_level": found.level.number(),
            "overruled_by": overruled_by.as_ref().map(|cgroup| &cgroup.path),
        })
    });
    json!({
        "schema_version": 1,
        "dry_run": moved.is_none(),
        "cgroups": cgroups.collect::<Vec<_>>(),
        "sockets": sockets.collect::<Vec<_>>(),
        "settled_cgroups": places.iter().filter(|place| place.is_settled()).count(),
        "settled": assignment.sockets.iter().filter(|assigned| assigned.is_settled()).count(),
        "moved": moved.map(|moved| moved.moved),
        "closed": moved.map(|moved| moved.closed),
        "failed": assignment.failed.len() + moved.map_or(0, |moved| moved.failed.len()),
        "refused_processes": assignment.refused.len(),
        "warnings": warnings,
    })
}
