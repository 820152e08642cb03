//! Network namespaces with a name, removed when dropped.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::dataplane::Pins;

const NETNS_DIRECTORY: &str = "/run/netns";
const PREFIX: &str = "qjump-";

/// A network namespace of this process.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes a namespace called `qjump-PID-role`.
    ///
    /// # Errors
    /// If `ip` is missing or refuses.
    pub fn new(role: &str) -> Result<Self> {
        let name = format!("{PREFIX}{}-{role}", std::process::id());
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        netns.enter(|| {
            // Neighbour discovery and its like would put packets of their own on every link, some of them
            // at level 7 (the kernel sends them with TC_PRIO_CONTROL).
            fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?;
            Ok(())
        })?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as in `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in a thread inside the namespace. File systems, /sys/fs/bpf among them, stay the host's.
    ///
    /// # Errors
    /// Those of `work`, and if the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = Path::new(NETNS_DIRECTORY).join(&self.name);
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
                    setns(file, CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("cannot enter {}", path.display()))?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that runs inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).stdin(Stdio::null());
        command
    }

    /// `ip` inside the namespace, with these words.
    ///
    /// # Errors
    /// If it fails; the message has its words and its error.
    pub fn ip(&self, words: &str) -> Result<()> {
        let mut all = vec!["-n", &self.name];
        all.extend(words.split_whitespace());
        ip(&all)
    }

    /// `tc` or `bridge` inside the namespace, one command a line.
    ///
    /// # Errors
    /// If one of the commands fails.
    pub fn batch(&self, program: &str, lines: &str) -> Result<()> {
        let mut child = Command::new(program)
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| missing(program, error))?;
        child.stdin.take().context("no stdin")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{program} refused this:\n{lines}\n{}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.name]);
    }
}

fn missing(program: &str, error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::NotFound {
        anyhow::anyhow!("there is no program '{program}'; install it: apt-get install iproute2")
    } else {
        anyhow::anyhow!("cannot run {program}: {error}")
    }
}

/// Runs `ip` with these arguments.
pub(super) fn ip(arguments: &[&str]) -> Result<()> {
    let output =
        Command::new("ip").args(arguments).stdin(Stdio::null()).output().map_err(|error| missing("ip", error))?;
    if !output.status.success() {
        bail!("`ip {}` failed: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Removes the namespaces and pins of processes that were killed before they could.
pub fn remove_stale() {
    let is_dead = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    let names = fs::read_dir(NETNS_DIRECTORY).into_iter().flatten().flatten().map(|entry| entry.file_name());
    for name in names.filter_map(|name| name.into_string().ok()) {
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse().ok());
        if pid.is_some_and(is_dead) {
            let _ = ip(&["netns", "delete", &name]);
        }
    }
    for interface in Pins::interfaces().unwrap_or_default() {
        if rack_owner(&interface).is_some_and(is_dead) {
            let _ = Pins::of(&interface).remove();
        }
    }
}

/// The name of a rack host's interface: unique on this machine, because pins go by interface names.
pub(super) fn rack_interface(pid: u32, host: usize) -> String {
    format!("qj{pid:x}h{}", host + 1)
}

/// The process whose rack an interface belongs to, by its name.
fn rack_owner(interface: &str) -> Option<u32> {
    let (pid, host) = interface.strip_prefix("qj")?.split_once('h')?;
    host.parse::<u32>().ok()?;
    u32::from_str_radix(pid, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interfaces_of_racks_have_an_owner() {
        assert_eq!(rack_owner(&rack_interface(0x0012_abcd, 4)), Some(0x0012_abcd));
        for other in ["eth0", "qjh", "qj12", "qj12hx", "qjxyzh1", "enp3s0"] {
            assert_eq!(rack_owner(other), None, "{other}");
        }
        // The kernel takes 15 characters; process ids go to 2^22.
        assert!(rack_interface(1 << 22, 99).len() <= 15);
    }
}
