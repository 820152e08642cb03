//! What can go wrong with grants: what, where, and what to do.

use std::{io, path::PathBuf};

use qjump_ebpf::grant::{MAX_DEPTH, MAX_GRANTS};
use thiserror::Error;

use super::live::LiveError;
use crate::dataplane;

/// An error of [`super::Session`] and [`super::list`].
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Error {
    #[error(
        "this host has no cgroup2 file system that this command can see; mount it, for example `mount -t cgroup2 none \
         /sys/fs/cgroup/unified`, or start the command with the mounts and the cgroup namespace of the host"
    )]
    NoCgroup2,
    #[error(
        "the cgroup of process {process} lies outside of what is mounted here ({path}): this command is in a cgroup namespace of \
         its own, as in a container; run it on the host"
    )]
    OutsideNamespace { process: String, path: String },
    #[error("there is no process {0}; `ps -p {0}` would show it")]
    NoProcess(u32),
    #[error("process {0} is a thread of the kernel, which sends for no program; `ps -p {0}` shows it in brackets")]
    KernelThread(u32),
    #[error("{} is no cgroup of version 2; give a path below {}, as in /proc/PID/cgroup or in full", path.display(), mount.display())]
    NotCgroup { path: PathBuf, mount: PathBuf },
    #[error(
        "no cgroup below {} is the unit '{unit}'; systemd makes one when the unit runs: `systemctl status {unit}`{}",
        mount.display(),
        if *systemd { "" } else { ". This host does not run systemd: use --cgroup or --pid" }
    )]
    NoUnit { unit: String, mount: PathBuf, systemd: bool },
    #[error("'{0}' is no name of a unit with processes: those end in .service, .scope or .slice")]
    UnitName(String),
    #[error("the unit '{unit}' is there more than once, give one of them with --cgroup: {}", paths.join(", "))]
    ManyUnits { unit: String, paths: Vec<String> },
    #[error("{path} is {depth} cgroups deep; a grant can be at most {MAX_DEPTH} deep")]
    TooDeep { path: String, depth: u32 },
    #[error("{0} is the cgroup of all processes of this host; name one below it")]
    WholeHost(String),
    #[error("there are {MAX_GRANTS} grants, and no more are possible; remove some with `qjump untag`")]
    TooMany,
    #[error("cannot make cgroup {}: {source}{}", path.display(), hint(source))]
    Make { path: PathBuf, source: io::Error },
    #[error("cannot move process {pid} into cgroup {}: {source}", path.display())]
    Move { pid: u32, path: PathBuf, source: io::Error },
    #[error("cannot remove cgroup {}: {source}", path.display())]
    Remove { path: PathBuf, source: io::Error },
    #[error("cannot {action} {}: {source}", path.display())]
    Cgroup { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot attach {program} to cgroup {path}: {detail}")]
    Attach { program: &'static str, path: String, detail: String },
    #[error("cannot {action} the grants in {}: {source}", path.display())]
    State { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} has no grant of its own; `qjump tags` lists what has")]
    NotTagged { path: String },
    #[error("process {pid} has its level from cgroup {path}; use `qjump untag --cgroup {path}`")]
    TaggedByCgroup { pid: u32, path: String },
    #[error(transparent)]
    Live(#[from] LiveError),
    #[error(transparent)]
    Host(#[from] dataplane::Error),
}

impl Error {
    /// Whether the request itself is wrong, whatever the state of the host (exit status 64).
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::UnitName(_))
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; cgroups are mounted read-only here, as in a container: run it on the host"
        }
        io::ErrorKind::PermissionDenied => "; run it as root, for example with sudo",
        _ => "",
    }
}
