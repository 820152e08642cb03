//! What the configuration wants of this host: read from files that only its owner can have written, and planned.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::unistd::User;
use qjump_ebpf::Level;
use thiserror::Error;

use crate::{
    config::{ConfigError, File},
    plan::{Claims, Plan},
    tag::rules::Rules,
    units::show_rate,
};

/// Why a configuration is refused. What was in force stays.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Refused {
    #[error(transparent)]
    Text(#[from] ConfigError),
    #[error("{path}: {message}")]
    Wrong { path: PathBuf, message: String },
    #[error("cannot look at {path}: {source}")]
    Look { path: PathBuf, source: io::Error },
    #[error(
        "{path} may be written by everybody (mode {mode:o}), and whoever can write it decides what this host may send; \
         `chmod o-w {path}`"
    )]
    Writable { path: PathBuf, mode: u32 },
    #[error(
        "{path} belongs to user {uid}, and the configuration gives programs levels (sections [[assign]], or claims = \
         \"grant-only\"), which is root's to do; `chown root {path}`"
    )]
    NotRoots { path: PathBuf, uid: u32 },
}

/// What a configuration wants.
#[derive(Debug)]
pub struct Desired {
    /// The plan.
    pub plan: Plan,
    /// The rules for programs.
    pub rules: Rules,
    /// The configuration itself: what it wants of the host, and where each rule is.
    pub file: File,
}

/// A configuration with its conf.d, read and not yet planned.
#[derive(Debug)]
pub struct Source {
    /// What it says.
    pub file: File,
    path: PathBuf,
    /// Whose its files and their folders are.
    owners: Vec<(PathBuf, u32)>,
}

impl Source {
    /// Reads it.
    ///
    /// # Errors
    /// If it cannot be read, others may write it, or its text is wrong.
    pub fn read(path: &Path) -> Result<Self, Refused> {
        let mut owners = Vec::new();
        for file in File::paths(path)? {
            owners.push(owner(&file)?);
            if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                owners.push(owner(folder)?);
            }
        }
        Ok(Self { file: File::read(path)?, path: path.to_owned(), owners })
    }

    /// Plans it for `hosts`, or for as many as it says.
    ///
    /// # Errors
    /// If there is no plan, or it grants levels and is not root's.
    pub fn plan(self, hosts: Option<u32>) -> Result<Arc<Desired>, Refused> {
        let Self { file, path, owners } = self;
        let desired = Desired::of(file, hosts).map_err(|message| Refused::Wrong { path, message })?;
        let grants =
            desired.has_rules() || desired.plan.network.levels.iter().any(|level| level.claims == Claims::GrantOnly);
        match owners.into_iter().find(|(_, uid)| grants && *uid != 0) {
            Some((path, uid)) => Err(Refused::NotRoots { path, uid }),
            None => Ok(Arc::new(desired)),
        }
    }
}

impl Desired {
    /// What a configuration wants that has been read, with `hosts` in the place of the number that it says.
    ///
    /// # Errors
    /// If there is no plan, or a rule makes no sense; with the place.
    pub fn of(file: File, hosts: Option<u32>) -> Result<Self, String> {
        let pcp = file.host.pcp;
        let answer = file.plan_for(hosts, |network| {
            network.tagged = pcp;
            Ok(())
        })?;
        let user_id = |name: &str| User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
        let rules = file.rules(user_id)?;
        Ok(Self { plan: answer.plan, rules, file })
    }

    /// Whether there are rules.
    pub fn has_rules(&self) -> bool {
        self.rules.iter().len() > 0
    }

    /// Whether the sockets that the rules are about are the same.
    pub fn has_rules_of(&self, other: &Self) -> bool {
        self.rules == other.rules
    }

    /// What changes if `after` comes into force in the place of this, one line a change; empty if nothing does.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        let (was, is) = (&self.plan.network, &after.plan.network);
        for (what, was, is) in [
            ("hosts", was.hosts.to_string(), is.hosts.to_string()),
            ("link rate", was.link_rate.to_string(), is.link_rate.to_string()),
            ("max packet", was.max_packet.to_string(), is.max_packet.to_string()),
            ("fixed delays", format!("{:?}", was.delays), format!("{:?}", is.delays)),
            ("model", format!("{:?}", was.model), format!("{:?}", is.model)),
            ("pcp", self.file.host.pcp.to_string(), after.file.host.pcp.to_string()),
            ("queue", format!("{:?}", self.file.host.queue), format!("{:?}", after.file.host.queue)),
            ("host rate", show(self.file.host.rate), show(after.file.host.rate)),
        ] {
            if was != is {
                lines.push(format!("{what}: {was} -> {is}"));
            }
        }
        for level in Level::strictest_first() {
            let rate = |plan: &Plan| {
                let level = plan.level(level)?;
                Some(level.rate_bps.map_or_else(|| "unlimited".to_owned(), show_rate))
            };
            let changed = match (rate(&self.plan), rate(&after.plan)) {
                (None, None) => continue,
                (None, Some(is)) => format!("+ level {level}: {is}"),
                (Some(was), None) => format!("- level {level}: {was}"),
                (Some(was), Some(is)) if was != is => format!("  level {level}: {was} -> {is}"),
                (Some(_), Some(_)) if self.plan.level(level) != after.plan.level(level) => {
                    format!("  level {level}: the same rate, other details")
                }
                _ => continue,
            };
            lines.push(changed);
        }
        listed(&mut lines, "interface", &self.file.host.interfaces, &after.file.host.interfaces);
        let rules = |desired: &Self| desired.rules.iter().map(ToString::to_string).collect::<Vec<_>>();
        listed(&mut lines, "rule", &rules(self), &rules(after));
        lines
    }
}

fn show(rate: Option<crate::units::Rate>) -> String {
    rate.map_or_else(|| "none".to_owned(), |rate| rate.to_string())
}

/// What has gone from a list, and what has come.
fn listed(lines: &mut Vec<String>, what: &str, was: &[String], is: &[String]) {
    let gone = was.iter().filter(|one| !is.contains(one)).map(|one| ('-', one));
    let come = is.iter().filter(|one| !was.contains(one)).map(|one| ('+', one));
    lines.extend(gone.chain(come).map(|(sign, one)| format!("{sign} {what} {one}")));
}

/// Whose a file or folder is; refused if everybody may write there. A folder with the sticky bit keeps what is in it.
fn owner(path: &Path) -> Result<(PathBuf, u32), Refused> {
    const STICKY: u32 = 0o1000;
    let found = fs::metadata(path).map_err(|source| Refused::Look { path: path.to_owned(), source })?;
    let mode = found.mode() & 0o7777;
    if mode & 0o002 != 0 && !(found.is_dir() && mode & STICKY != 0) {
        return Err(Refused::Writable { path: path.to_owned(), mode });
    }
    Ok((path.to_owned(), found.uid()))
}
