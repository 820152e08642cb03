//! Root rights: who has them, and how the rest of the tasks get them.

use crate::{apt, process};
use anyhow::bail;
use std::ffi::OsStr;
use std::process::Command;

/// A way to run a program as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// We are root.
    Already,
    /// By sudo, which may ask for a password.
    Sudo,
}

impl Root {
    /// Finds the way, or says what to do when there is none. `what` names the task that needs it.
    pub fn find(what: &str) -> anyhow::Result<Self> {
        if nix::unistd::geteuid().is_root() {
            Ok(Self::Already)
        } else if apt::on_path("sudo") {
            Ok(Self::Sudo)
        } else {
            bail!(
                "{what} makes network namespaces and loads eBPF programs, which takes root rights, \
                 and there is no sudo here\nremedy: run `cargo xtask {what}` as root, or install sudo"
            )
        }
    }

    /// The command that runs `program` as root. The environment is kept: it tells the tests where things are.
    pub fn command(self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Already => Command::new(program),
            Self::Sudo => {
                let mut sudo = Command::new("sudo");
                sudo.arg("-E").arg(program);
                sudo
            }
        }
    }

    /// Makes cargo run what it builds as root, while cargo itself, and all it writes, stays the user's.
    pub fn lend_to_cargo(self, cargo: &mut Command) -> anyhow::Result<()> {
        if self == Self::Sudo {
            let host = host_triple()?;
            cargo.env(runner_variable(&host), "sudo -E");
        }
        Ok(())
    }
}

/// The command that gets root rights without asking anybody, for steps that nobody expects to ask; `None` when
/// there are none to be had.
pub fn unasked(program: &str) -> Option<Command> {
    if nix::unistd::geteuid().is_root() {
        return Some(Command::new(program));
    }
    process::ask(Command::new("sudo").args(["-n", "true"])).ok()?;
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", program]);
    Some(sudo)
}

/// The target that cargo builds for here.
fn host_triple() -> anyhow::Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = process::ask(Command::new(rustc).arg("-vV")).map_err(anyhow::Error::msg)?;
    match version.lines().find_map(|line| line.strip_prefix("host: ")) {
        Some(host) => Ok(host.to_owned()),
        None => bail!("`rustc -vV` does not name its host"),
    }
}

/// The variable by which cargo learns what to run the programs of a target with.
fn runner_variable(triple: &str) -> String {
    format!("CARGO_TARGET_{}_RUNNER", triple.to_uppercase().replace(['-', '.'], "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sudo_keeps_the_environment() {
        let command = Root::Sudo.command("/build/qjump");
        assert_eq!(command.get_program(), "sudo");
        assert!(command.get_args().eq(["-E", "/build/qjump"]));
        assert_eq!(Root::Already.command("/build/qjump").get_program(), "/build/qjump");
    }

    #[test]
    fn the_runner_belongs_to_the_host() {
        assert_eq!(runner_variable("x86_64-unknown-linux-gnu"), "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER");
        let mut cargo = Command::new("cargo");
        Root::Already.lend_to_cargo(&mut cargo).unwrap();
        assert_eq!(cargo.get_envs().count(), 0);
        Root::Sudo.lend_to_cargo(&mut cargo).unwrap();
        assert!(cargo.get_envs().all(|(_, value)| value == Some(OsStr::new("sudo -E"))));
    }
}
