//! `qjump measure` as a program: a server, and commands.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::testbed::NetNs;

use crate::link::binary;

/// `qjump` in a namespace, or here.
pub fn qjump(netns: Option<&NetNs>, arguments: &[&str]) -> Command {
    let mut command = match netns {
        Some(netns) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{}", netns.name())).arg(binary());
            command
        }
        None => Command::new(binary()),
    };
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The memory of a process, KiB.
pub fn memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(resident.trim().trim_end_matches(" kB").parse()?)
}

/// A server, ended when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// On any port that is free.
    pub fn new(netns: Option<&NetNs>) -> Result<Self> {
        Self::listening_on(netns, "[::]:0")
    }

    /// On this address.
    pub fn listening_on(netns: Option<&NetNs>, listen: &str) -> Result<Self> {
        Self::with(netns, &["--listen", listen])
    }

    /// With these arguments.
    pub fn with(netns: Option<&NetNs>, arguments: &[&str]) -> Result<Self> {
        let mut child = qjump(netns, &[&["measure", "serve"], arguments].concat()).spawn()?;
        let mut said = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let address = line.strip_prefix("qjump: listening on ").and_then(|rest| rest.split(',').next());
        let address = address.with_context(|| format!("it said: {line}"))?.parse()?;
        // Its other lines must go somewhere.
        thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Ok(Self { child, address })
    }

    /// `HOST:PORT`.
    pub fn at(&self, host: &str) -> String {
        format!("{host}:{}", self.address.port())
    }

    /// Its memory, KiB.
    pub fn memory(&self) -> Result<u64> {
        memory(self.child.id())
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
