//! Two network namespaces with a cable between them, and the `qjump` command inside.

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use anyhow::{Context, Result, bail, ensure};
use qjump::{dataplane::Pins, testbed::NetNs};
use serde_json::Value;

/// A plan for tests: level 7 guaranteed, level 5 with a burst.
pub const PLAN: [&str; 12] = [
    "--hosts",
    "12",
    "--link-rate",
    "10gbit",
    "--max-packet",
    "256",
    "--epsilon",
    "4us",
    "--level",
    "7:1",
    "--level",
    "5:4",
];

/// A near and a far host, connected. All of it goes away when dropped, pins included.
pub struct Link {
    /// Where qjump is loaded.
    pub near: NetNs,
    /// Where traffic arrives.
    pub far: NetNs,
    /// The near interface; its name is unique on this machine.
    pub device: String,
    /// The far interface.
    pub far_device: String,
    ipv6: bool,
}

/// The near host's addresses.
pub const NEAR: (&str, &str) = ("10.9.0.1", "fd00:9::1");
/// The far host's addresses.
pub const FAR: (&str, &str) = ("10.9.0.2", "fd00:9::2");

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Link {
    /// Both ends up, with IPv4 addresses and permanent neighbours, MTU 1500, GSO off. The kernel sends
    /// nothing of its own on it.
    pub fn new() -> Result<Self> {
        Self::build(false)
    }

    /// The same with IPv6 addresses, too. The kernel reports its multicast groups on it, at level 7: such a
    /// packet may take the epoch that a test's packet needs.
    pub fn with_ipv6() -> Result<Self> {
        Self::build(true)
    }

    fn build(ipv6: bool) -> Result<Self> {
        let number = COUNT.fetch_add(1, Relaxed);
        let near = NetNs::new(&format!("near{number}"))?;
        let far = NetNs::new(&format!("far{number}"))?;
        let device = format!("qj{:x}n{number}", std::process::id());
        let far_device = format!("qj{:x}f{number}", std::process::id());
        let link = Self { near, far, device, far_device, ipv6 };
        link.plug()?;
        Ok(link)
    }

    /// Creates the cable: also after the near end was deleted.
    pub fn plug(&self) -> Result<()> {
        self.plug_with_queues(1)
    }

    /// The same with so many queues at each end.
    pub fn plug_with_queues(&self, queues: u32) -> Result<()> {
        let Self { near, far, device, far_device, .. } = self;
        let queues = format!("numtxqueues {queues} numrxqueues {queues}");
        near.ip(&format!(
            "link add {device} address 02:00:00:00:09:01 {queues} type veth \
             peer name {far_device} address 02:00:00:00:09:02 {queues} netns {}",
            far.name()
        ))?;
        self.introduce()
    }

    /// Gives the ends of a cable their addresses and neighbours, and sets them up.
    pub fn introduce(&self) -> Result<()> {
        let Self { near, far, device, far_device, ipv6 } = self;
        for (netns, device, own, other, mac) in
            [(near, device, NEAR, FAR, "02:00:00:00:09:02"), (far, far_device, FAR, NEAR, "02:00:00:00:09:01")]
        {
            if *ipv6 {
                netns.enter(|| Ok(std::fs::write(format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"), "0")?))?;
            }
            netns.ip(&format!("link set {device} gso_max_segs 1 addrgenmode none up"))?;
            netns.ip(&format!("addr add {}/24 dev {device}", own.0))?;
            netns.ip(&format!("neigh replace {} lladdr {mac} dev {device} nud permanent", other.0))?;
            if *ipv6 {
                netns.ip(&format!("addr add {}/64 dev {device} nodad", own.1))?;
                netns.ip(&format!("neigh replace {} lladdr {mac} dev {device} nud permanent", other.1))?;
            }
        }
        Ok(())
    }

    /// `qjump` with these arguments, in the near namespace and the host's file systems.
    pub fn qjump(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().context("cannot run nsenter")
    }

    /// The same, not yet started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.near.name())).arg(binary()).args(arguments);
        command
    }

    /// `qjump load` of [`PLAN`] and more arguments on the near interface, the queue left alone.
    pub fn load(&self, more: &[&str]) -> Result<String> {
        let mut arguments = vec!["load", "--interface", &self.device, "--queue", "keep"];
        arguments.extend(PLAN);
        arguments.extend(more);
        succeeded(&self.qjump(&arguments)?)
    }

    /// `qjump unload` of the near interface.
    pub fn unload(&self) -> Result<String> {
        succeeded(&self.qjump(&["unload", "--interface", &self.device])?)
    }

    /// `qjump status --json` of the near interface; null if nothing is loaded there.
    pub fn status(&self) -> Result<Value> {
        let output = self.qjump(&["status", "--interface", &self.device, "--json"])?;
        ensure!(matches!(output.status.code(), Some(0 | 2)), "{}", String::from_utf8_lossy(&output.stderr));
        let mut status: Value = serde_json::from_slice(&output.stdout)?;
        Ok(status["interfaces"].get_mut(0).map_or(Value::Null, Value::take))
    }

    /// The pins of the near interface.
    pub fn pins(&self) -> Pins {
        Pins::of(&self.device)
    }

    /// What `tc` and `ip` say of the near interface: its qdiscs and filters.
    pub fn tc_state(&self) -> Result<String> {
        let mut state = String::new();
        for what in ["qdisc", "filter"] {
            let mut command = self.near.command("tc");
            command.args([what, "show", "dev", &self.device]);
            if what == "filter" {
                command.arg("egress");
            }
            state += &String::from_utf8(command.output()?.stdout)?;
        }
        Ok(state)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.pins().remove();
    }
}

/// The `qjump` binary under test.
pub fn binary() -> PathBuf {
    std::env::var_os("QJUMP_BIN")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/release/qjump"), PathBuf::from)
}

/// The standard output of a command that must have succeeded.
pub fn succeeded(output: &Output) -> Result<String> {
    if !output.status.success() {
        bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// The exit status and the standard error of a command that must have failed.
pub fn failed(output: &Output) -> (i32, String) {
    assert!(!output.status.success(), "it succeeded: {}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().expect("an exit status"), String::from_utf8_lossy(&output.stderr).into_owned())
}
