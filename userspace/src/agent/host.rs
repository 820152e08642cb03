//! What the commands of the machine do to this host: blocking, one at a time, and all of it in [`crate::dataplane`] and
//! [`crate::tag`].

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Instant,
};

use super::{
    desired::Desired,
    machine::{Command, Outcome, Seen, Wanted},
};
use crate::{
    config::QueueChoice,
    dataplane::{self, Error, Loaded, Request, Standing, netlink},
    tag::{
        assign::{AssignError, Assignment, Host},
        cgroup::Hierarchy,
        process::Process,
    },
};

/// Executes a command.
pub fn execute(command: &Command) -> Outcome {
    match command {
        Command::Observe(wanted) => {
            Outcome::Observed(wanted.iter().map(|wanted| (wanted.interface.clone(), see(wanted))).collect())
        }
        Command::Load(wanted) => Outcome::Changed(load(wanted)),
        Command::Unload(pins, interface) => {
            let result = match dataplane::unload(pins, false) {
                Ok(()) => Ok("unloaded".to_owned()),
                Err(Error::NotLoaded(_)) => Ok("there was nothing to unload".to_owned()),
                Err(error) => Err(error.to_string()),
            };
            Outcome::Changed(BTreeMap::from([(interface.clone(), result)]))
        }
        Command::Assign(desired) => {
            let began = Instant::now();
            Outcome::Assigned(assign(desired), began.elapsed())
        }
    }
}

/// Loads, and says what that did to each interface.
fn load(wanted: &[Wanted]) -> BTreeMap<String, Result<String, String>> {
    let requests: Vec<Request<'_>> = wanted.iter().map(Wanted::request).collect();
    let names = wanted.iter().map(|wanted| wanted.interface.clone());
    match dataplane::load_each(&requests) {
        Ok(results) => {
            let text = |loaded: Vec<Loaded>| loaded.iter().map(describe).collect();
            names.zip(results.into_iter().map(|result| result.map(text).map_err(|error| error.to_string()))).collect()
        }
        Err(error) => names.map(|name| (name, Err(error.to_string()))).collect(),
    }
}

/// What the configuration wants loaded on one interface.
fn request<'a>(desired: &'a Desired, interface: &'a String, queue: QueueChoice) -> Request<'a> {
    let host = &desired.file.host;
    Request {
        interfaces: std::slice::from_ref(interface),
        plan: &desired.plan,
        pcp: host.pcp,
        hook: dataplane::Hook::Auto,
        queue,
        host_rate: host.rate,
    }
}

impl Wanted {
    fn request(&self) -> Request<'_> {
        request(&self.desired, &self.interface, self.queue)
    }
}

fn see(wanted: &Wanted) -> Seen {
    if wanted.brief && dataplane::is_linked(&wanted.interface) {
        return Seen::AsWanted;
    }
    let device = match netlink::interface(&wanted.interface) {
        Ok(Some(device)) => device,
        Ok(None) => return Seen::Absent,
        Err(error) => return Seen::Broken(error.to_string()),
    };
    match dataplane::standing(&device, &wanted.request()) {
        Ok(Standing::Nothing(why)) => Seen::Unloaded(why),
        Ok(Standing::Same) => Seen::AsWanted,
        Ok(Standing::Other { why, lowers }) => Seen::Differs { why, lowers },
        Ok(Standing::Displaced(why)) if wanted.yields => Seen::Differs { why, lowers: true },
        Ok(Standing::Displaced(why)) => Seen::Foreign(why),
        Ok(Standing::Stale(pins)) => Seen::Stale(pins),
        Err(error) => Seen::Broken(error.to_string()),
    }
}

fn describe(loaded: &Loaded) -> String {
    let Loaded { hook, replaced, queue, .. } = loaded;
    let what = if *replaced { "replaced the plan" } else { "loaded" };
    format!("{what} ({hook}); {}", queue.over_a_limit())
}

/// What a load of this configuration would refuse on the interfaces that are there now: the first thing.
///
/// # Errors
/// That.
pub fn rehearse(desired: &Desired) -> Result<(), String> {
    for interface in &desired.file.host.interfaces {
        let request = request(desired, interface, desired.file.host.queue);
        let there = match dataplane::find_interfaces(request.interfaces) {
            // It may come later.
            Err(Error::NoInterface(_)) => continue,
            there => there.map_err(|error| error.to_string())?,
        };
        let check = |device: &netlink::Interface| match dataplane::standing(device, &request) {
            Err(error) if error.is_usage() => Err(format!("interface {interface}: {error}")),
            _ => Ok(()),
        };
        there.iter().try_for_each(check)?;
    }
    Ok(())
}

/// Applies the rules, as `qjump assign` does, and takes back what rules gave that are no more.
fn assign(desired: &Desired) -> Result<(), String> {
    let at = |rule: usize, why: &dyn std::fmt::Display| desired.file.at_rule(rule, why);
    let failed = |error: AssignError| match &error {
        AssignError::Place { rule, .. } => at(*rule, &error),
        _ => error.to_string(),
    };
    let mut host = Host::change(&desired.rules).map_err(failed)?;
    let places = host.places(&desired.rules).map_err(failed)?;
    host.tag(&places.found).map_err(failed)?;
    let released = host.release(&places).map_err(failed);
    let assignment = Assignment::find(&desired.rules, &host, &places.found).map_err(failed)?;
    assignment.release(&mut host);
    let moved = assignment.apply(&mut host);
    let mut problems: Vec<String> = released.err().into_iter().collect();
    problems.extend(places.missing.iter().map(|(rule, why)| at(*rule, why)));
    let unmoved = assignment.failed.len() + moved.failed.len();
    if unmoved > 0 {
        problems.push(format!("{unmoved} sockets could not be moved; `qjump assign --dry-run` lists them"));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// A number that changes with the processes and cgroups that there are. Cheap: two files are read.
pub fn processes() -> u64 {
    let mut hasher = DefaultHasher::new();
    Process::all().unwrap_or_default().hash(&mut hasher);
    if let Ok(hierarchy) = Hierarchy::find() {
        // The first line is how many there are below the root (Documentation/admin-guide/cgroup-v2.rst).
        let cgroups = fs::read_to_string(hierarchy.mount().join("cgroup.stat")).unwrap_or_default();
        cgroups.lines().next().hash(&mut hasher);
    }
    hasher.finish()
}

/// The number of hosts that limits here are planned for already: the largest, of all interfaces.
pub fn hosts_in_force() -> Option<u32> {
    let names = dataplane::loaded_interfaces().ok()?;
    let statuses = names.iter().filter_map(|name| dataplane::status(name).ok()).filter(|status| !status.elsewhere);
    statuses.map(|status| status.config.plan.hosts).max()
}
