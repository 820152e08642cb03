//! `qjump load` and `qjump unload`.

use super::{Failure, plan::NetworkArgs, print};
use crate::{
    config::QueueChoice,
    dataplane::{self, Chosen, Error, Hook, Request, loses_late_timers},
    plan::Plan,
    qdisc::Queue,
    units::Rate,
};
use clap::Args;

/// Limit and mark what leaves through interfaces; again to replace plan and program
#[derive(Args)]
pub struct LoadCommand {
    #[command(flatten)]
    target: TargetArgs,
}

/// Interfaces, and what is to be in force there.
#[derive(Args)]
pub struct TargetArgs {
    /// Interface to manage; repeatable. Without it, those of the configuration file
    #[arg(long, value_name = "IF")]
    interface: Vec<String>,
    #[command(flatten)]
    network: NetworkArgs,
    /// Write the level into the frame's 802.1p priority too, tagging untagged frames with VLAN 0
    #[arg(long)]
    pcp: bool,
    /// Where to attach the program
    #[arg(long, value_enum, default_value_t)]
    hook: Hook,
    /// What holds packets back that are over a limit; with keep they are dropped [default: auto]
    #[arg(long, value_enum)]
    queue: Option<QueueChoice>,
    /// Shape everything to this rate: for a virtual link that does not push back, so that packets wait on this
    /// host, by level, and not behind it
    #[arg(long, value_name = "RATE")]
    host_rate: Option<Rate>,
}

/// What [`TargetArgs`] and the configuration file say together.
pub struct Target {
    interfaces: Vec<String>,
    plan: Plan,
    pcp: bool,
    hook: Hook,
    queue: QueueChoice,
    host_rate: Option<Rate>,
}

impl TargetArgs {
    /// The interfaces that flags name.
    pub(super) fn interfaces(&self) -> &[String] {
        &self.interface
    }

    /// Whether there is anything to plan.
    pub(super) const fn has_plan(&self) -> bool {
        self.network.config.is_some() || self.network.hosts.is_some()
    }

    pub(super) fn read(&self) -> Result<Target, Failure> {
        let (answer, host) = self.network.plan(self.pcp)?;
        let interfaces = if self.interface.is_empty() { host.interfaces } else { self.interface.clone() };
        if interfaces.is_empty() {
            return Err(Failure::Usage(
                "no interface; give --interface IF, or interfaces = [\"IF\"] in section [host] of the configuration"
                    .into(),
            ));
        }
        Ok(Target {
            interfaces,
            plan: answer.plan,
            pcp: host.pcp,
            hook: self.hook,
            queue: self.queue.unwrap_or(host.queue),
            host_rate: self.host_rate.or(host.rate),
        })
    }
}

impl Target {
    pub(super) fn request(&self) -> Request<'_> {
        let Self { interfaces, plan, pcp, hook, queue, host_rate } = self;
        Request { interfaces, plan, pcp: *pcp, hook: *hook, queue: *queue, host_rate: *host_rate }
    }
}

/// Remove the program; the interface is as it was before the first load
#[derive(Args)]
pub struct UnloadCommand {
    /// Interface; repeatable
    #[arg(long, value_name = "IF", required_unless_present = "all")]
    interface: Vec<String>,
    /// Every interface of this network namespace that qjump is loaded on
    #[arg(long, conflicts_with = "interface")]
    all: bool,
    /// Also what belongs to an interface of another network namespace; a clsact filter can only be removed there
    #[arg(long)]
    force: bool,
}

impl LoadCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let target = self.target.read()?;
        let request = target.request();
        let plan = request.plan;
        let loaded = dataplane::load(&request)?;
        print(plan)?;
        for one in loaded {
            let what = if one.replaced { "replaced the plan and the program" } else { "loaded" };
            let stale = if one.removed_stale { ", after removing what an earlier load had left behind" } else { "" };
            print(format!("{}: {what} ({}){stale}", one.interface, one.hook))?;
            let Chosen { queue, why, .. } = &one.queue;
            match queue {
                Queue::Keep => print(format!("{}: over a limit, packets are dropped: {why}", one.interface))?,
                _ => print(format!("{}: over a limit, packets wait in {}: {why}", one.interface, queue.name()))?,
            }
            if let Some(level) = loses_late_timers(plan, *queue) {
                print(format!(
                    "{}: level {level}: timers are late, and what that costs a packet that waits in htb is lost; a tolerance \
                     buys it back: --tolerance 200us",
                    one.interface
                ))?;
            }
            for (level, largest) in &one.smaller {
                print(format!(
                    "{}: level {level}: packets have at most {largest} B, half of its burst: the other half is htb's",
                    one.interface
                ))?;
            }
            if let Some(cap) = one.gso_cap {
                print(format!(
                    "{}: GSO packets have at most {cap} segment{} now, so that the bursts of byte-charged levels stay within the plan",
                    one.interface,
                    if cap == 1 { "" } else { "s" }
                ))?;
            }
        }
        Ok(())
    }
}

impl UnloadCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let interfaces = if self.all { dataplane::loaded_interfaces()? } else { self.interface.clone() };
        if interfaces.is_empty() {
            return print("qjump is not loaded on any interface");
        }
        let mut failures = Vec::new();
        for interface in interfaces {
            match dataplane::unload(&interface, self.force) {
                Ok(()) => print(format!("{interface}: unloaded"))?,
                // "All" means those that are this namespace's to unload.
                Err(error @ (Error::OtherNamespace { .. } | Error::FilterElsewhere { .. }))
                    if self.all && !self.force =>
                {
                    print(format!("{interface}: left alone: {error}"))?;
                }
                Err(error) if error.is_usage() => return Err(error.into()),
                Err(error) => failures.push(error.to_string()),
            }
        }
        if !failures.is_empty() {
            return Err(Failure::Failed(failures.join("\nqjump: ")));
        }
        Ok(())
    }
}
