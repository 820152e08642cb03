//! Network namespaces with a name, removed when dropped.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::dataplane::Pins;

const NETNS_DIRECTORY: &str = "/run/netns";
const PREFIX: &str = "qjump-";

/// A network namespace.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    removed_when_dropped: bool,
}

impl NetNs {
    /// Makes a namespace called `qjump-PID-role`.
    ///
    /// # Errors
    /// If `ip` is missing or refuses.
    pub fn new(role: &str) -> Result<Self> {
        Self::of_rack(&std::process::id().to_string(), role)
    }

    /// Makes a namespace called `qjump-RACK-role`.
    ///
    /// # Errors
    /// If `ip` is missing or refuses.
    pub(super) fn of_rack(rack: &str, role: &str) -> Result<Self> {
        let name = format!("{PREFIX}{rack}-{role}");
        ip(&["netns", "add", &name])?;
        let netns = Self { name, removed_when_dropped: true };
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

    /// One that somebody else has made and will remove.
    pub(super) fn standing(rack: &str, role: &str) -> Self {
        Self { name: format!("{PREFIX}{rack}-{role}"), removed_when_dropped: false }
    }

    /// Leaves it to others to remove it.
    pub(super) fn leave(&mut self) {
        self.removed_when_dropped = false;
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
        let file = self.open()?;
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", self.name))?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The file by which it can be entered.
    pub(super) fn open(&self) -> Result<File> {
        let path = Path::new(NETNS_DIRECTORY).join(&self.name);
        File::open(&path).with_context(|| format!("cannot open {}", path.display()))
    }

    /// A command that runs inside, with a /sys of its own; what must see pins is a [`super::Program`].
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

    /// `ip`, `tc` or `bridge` inside the namespace, one command a line.
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
        if self.removed_when_dropped {
            let _ = ip(&["netns", "delete", &self.name]);
        }
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

/// The namespaces of a rack that are there, whatever its state.
pub(super) fn of_rack(rack: &str) -> Vec<String> {
    let prefix = format!("{PREFIX}{rack}-");
    all().filter(|name| name.starts_with(&prefix)).collect()
}

/// Removes a namespace by its name.
pub(super) fn remove(name: &str) -> Result<()> {
    ip(&["netns", "delete", name])
}

/// The processes in a namespace.
pub(super) fn processes(name: &str) -> Vec<u32> {
    let Ok(netns) = fs::metadata(Path::new(NETNS_DIRECTORY).join(name)) else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|own| own.ino() == netns.ino()))
        .collect()
}

fn all() -> impl Iterator<Item = String> {
    let entries = fs::read_dir(NETNS_DIRECTORY).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Removes the namespaces and pins of processes that were killed before they could.
pub fn remove_stale() {
    let is_dead = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    for name in all() {
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

/// The name of an interface of a host of this process's rack: unique on this machine, because pins go by interface names.
pub(super) fn rack_interface(pid: u32, host: usize) -> String {
    format!("qj{pid:x}h{}", host + 1)
}

/// The name of an interface of a host of a named rack. No process's rack has one like it: it has a dash.
pub(super) fn named_interface(rack: &str, host: usize) -> String {
    format!("qj-{rack}-h{}", host + 1)
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
        for other in ["eth0", "qjh", "qj12", "qj12hx", "qjxyzh1", "enp3s0", "qj-eight-h1", "qj-h-h1"] {
            assert_eq!(rack_owner(other), None, "{other}");
        }
        // The kernel takes 15 characters; process ids go to 2^22.
        assert!(rack_interface(1 << 22, 99).len() <= 15);
    }
}
