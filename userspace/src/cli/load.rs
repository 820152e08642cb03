//! `qjump load` and `qjump unload`.

use super::{Failure, confirm, plan::NetworkArgs, print};
use crate::{
    config::QueueChoice,
    dataplane::{self, Error, Hook, Loaded, Request, loses_late_timers},
    plan::Plan,
    units::{Nanos, Rate, UnitError},
};
use clap::Args;
use std::fmt::Write as _;

/// Limit and mark what leaves through interfaces; again to replace plan and program
#[derive(Args)]
pub struct LoadCommand {
    #[command(flatten)]
    target: TargetArgs,
    /// Go back to what was before unless that is confirmed within this time, by Enter or by `qjump confirm`; also when this
    /// command ends or loses its terminal
    #[arg(long, value_name = "TIME", value_parser = confirm_time)]
    confirm: Option<Nanos>,
    /// This is the process that goes back
    #[arg(long, hide = true, requires = "confirm")]
    supervise: bool,
}

/// A time in which a person can confirm something.
fn confirm_time(text: &str) -> Result<Nanos, String> {
    const LONGEST_S: u64 = 86_400;
    let time: Nanos = text.parse().map_err(|error: UnitError| error.to_string())?;
    match time.ns() {
        0 => Err("nobody can confirm anything in no time; give 60s, for example".to_owned()),
        ns if ns > LONGEST_S * 1_000_000_000 => Err(format!("at most {LONGEST_S}s, a day")),
        _ => Ok(time),
    }
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
        let load = |target: &Target| -> Result<String, Failure> {
            let request = target.request();
            Ok(report(request.plan, &dataplane::load(&request)?))
        };
        match self.confirm {
            Some(within) if self.supervise => {
                let work = self.target.read().map(|target| (target.interfaces.clone(), move || load(&target)));
                confirm::supervise(within, work)
            }
            Some(within) => confirm::front(within),
            None => {
                let target = self.target.read()?;
                confirm::refuse_while_waiting()?;
                print(load(&target)?.trim_end())
            }
        }
    }
}

/// What was loaded, for people.
fn report(plan: &Plan, loaded: &[Loaded]) -> String {
    let mut text = format!("{plan}\n");
    for one in loaded {
        let mut say = |line: String| {
            let _ = writeln!(text, "{}: {line}", one.interface);
        };
        let what = if one.replaced { "replaced the plan and the program" } else { "loaded" };
        let stale = if one.removed_stale { ", after removing what an earlier load had left behind" } else { "" };
        say(format!("{what} ({}){stale}", one.hook));
        say(one.queue.over_a_limit());
        if let Some(level) = loses_late_timers(plan, one.queue.queue) {
            say(format!(
                "level {level}: timers are late, and what that costs a packet that waits in htb is lost; a tolerance buys it \
                 back: --tolerance 200us"
            ));
        }
        for (level, largest) in &one.smaller {
            say(format!("level {level}: packets have at most {largest} B, half of its burst: the other half is htb's"));
        }
        if let Some(cap) = one.gso_cap {
            say(format!(
                "GSO packets have at most {cap} segment{} now, so that the bursts of byte-charged levels stay within the plan",
                if cap == 1 { "" } else { "s" }
            ));
        }
    }
    text
}

impl UnloadCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        confirm::refuse_while_waiting()?;
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
