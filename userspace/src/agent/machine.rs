//! What the agent does, as a pure state machine: what was seen goes in, with the time; what is to be done comes out, one
//! command at a time.
//!
//! * Nothing is done before a configuration has been accepted. One that is refused changes nothing.
//! * Interfaces are looked at first, and changed only if they are not as they should be: so a second run does nothing.
//! * What lowers a budget goes before what raises one, on all interfaces; what is the same step is one command for all of them.
//! * What fails is tried again, later each time. What others undo is repaired, but not more than [`MOST_REPAIRS`] times
//!   an hour; after that somebody means it, and it is said instead.
//! * Somebody else's queue stays: the level limits go on without one.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use super::desired::Desired;
use crate::config::QueueChoice;

/// Time since the agent began.
pub type Time = Duration;

/// How often it is asked whether programs are still attached, which the kernel does not say by itself.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How often all of an interface is looked at when nothing is heard of it.
const LOOK_CLOSELY_EVERY: Duration = Duration::from_secs(60);
/// How long what comes after an event may still belong to it.
const EVENT_DELAY: Duration = Duration::from_millis(20);
/// The longest time between two tries.
pub const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// How often in an hour an interface is repaired.
pub const MOST_REPAIRS: usize = 6;
const HOUR: Duration = Duration::from_secs(3600);
/// How often a lowering may fail until raises on other interfaces no longer wait for it.
const PATIENCE: u32 = 3;
/// A look at all processes is followed by a rest of so many times as long, at least: after a change of the processes, and
/// without one.
const REST: [u32; 2] = [100, 200];
/// How many interfaces one command loads: after it, others have their turn at the host's lock, and the watchdog hears of it.
const MOST_AT_ONCE: usize = 32;
/// The shortest rests.
const LEAST_REST: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// What was seen of an interface that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// There is none of this name.
    Absent,
    /// Nothing is enforced there.
    Unloaded(String),
    /// All is as it should be.
    AsWanted,
    /// Something else is in force: what, and whether some level may send less when that is put right.
    Differs {
        /// What.
        why: String,
        /// Whether putting it right takes from a level.
        lowers: bool,
    },
    /// Somebody else's queue is in the place of ours.
    Foreign(String),
    /// The device is managed under another name, or its pins are of another device: these pins have to go first.
    Stale(String),
    /// Nothing can be done about it here.
    Broken(String),
}

/// An interface as it should be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its name.
    pub interface: String,
    /// The queue; `auto` where somebody else's is to stay.
    pub queue: QueueChoice,
    /// Whether it is known that somebody else's queue is there, so that what follows from it is what is wanted.
    pub yields: bool,
    /// Whether it was as it should be, and nothing was heard of it: a look at the program will do.
    pub brief: bool,
    /// All the rest.
    pub desired: Arc<Desired>,
}

/// What is to be done next.
#[derive(Clone, Debug)]
pub enum Command {
    /// Look at these interfaces.
    Observe(Vec<Wanted>),
    /// Put the plan in force on these.
    Load(Vec<Wanted>),
    /// Take off all that is pinned under a name, for the sake of an interface: the same one, or one that this is in the way of.
    Unload(String, String),
    /// Apply the rules.
    Assign(Arc<Desired>),
}

/// How a command ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// What was seen.
    Observed(BTreeMap<String, Seen>),
    /// What loads or an unload did to each interface, or why they failed.
    Changed(BTreeMap<String, Result<String, String>>),
    /// What the rules could not do, nothing if they could, and how long it took.
    Assigned(Result<(), String>, Duration),
}

/// How many hosts there are, as a source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// Hosts that may send.
    pub hosts: u32,
    /// Who says so.
    pub source: String,
}

/// What goes in.
#[derive(Clone, Debug)]
pub enum Input {
    /// The configuration was read, or refused.
    Config(Result<Arc<Desired>, String>),
    /// Something happened to an interface.
    Event,
    /// Which processes and cgroups there are, as a number that changes with them.
    Processes(u64),
    /// The number of hosts; nothing if nobody counts them any more.
    Members(Option<Members>),
    /// The command has ended; a number from 0 to 1 by chance.
    Done(Outcome, f64),
    /// Take everything off the interfaces, and leave them alone until the next configuration.
    Drain,
}

/// How much something matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody may want to know.
    Info,
    /// Something is not as it should be, and is being put right or can be lived with.
    Warning,
    /// A limit is not in force that should be.
    Error,
}

/// What there is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// How much it matters.
    pub urgency: Urgency,
    /// The interface that it is about.
    pub interface: Option<String>,
    /// What.
    pub text: String,
}

/// The state for others to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// How many configurations have been accepted.
    pub generation: u64,
    /// Why the last one was refused, if it was.
    pub refused: Option<String>,
    /// The number of hosts that the plan in force is for.
    pub hosts: u32,
    /// Who says so.
    pub hosts_source: String,
    /// Whether each interface has had its turn once.
    pub ready: bool,
    /// Whether everything was taken off.
    pub drained: bool,
    /// What the rules could not do.
    pub rules: Option<String>,
    /// Each interface, with what is not as it should be.
    pub interfaces: BTreeMap<String, Option<String>>,
}

impl State {
    /// What is not as it should be, each with its interface.
    pub fn problems(&self) -> Vec<String> {
        let each = self.interfaces.iter();
        each.filter_map(|(name, problem)| Some(format!("{name}: {}", problem.as_ref()?))).collect()
    }
}

#[derive(Debug, Default)]
struct Managed {
    wanted: bool,
    seen: Option<Seen>,
    /// Whether it is to be looked at.
    look: bool,
    /// Whether it has been as it should be with this configuration, so that what is not now was undone by somebody.
    settled: bool,
    failures: u32,
    error: Option<String>,
    not_before: Time,
    repairs: VecDeque<Time>,
    given_up: bool,
    /// Whose queue stays.
    yielded: Option<String>,
    /// Pins that were in the way.
    stale: Option<String>,
}

#[derive(Debug, Default)]
struct Assigning {
    due: Option<Time>,
    processes: u64,
    ended: Time,
    took: Duration,
    problem: Option<String>,
}

/// The machine.
#[derive(Debug, Default)]
pub struct Machine {
    desired: Option<Arc<Desired>>,
    generation: u64,
    refused: Option<String>,
    members: Option<Members>,
    interfaces: BTreeMap<String, Managed>,
    running: bool,
    /// Changes with what is wanted, and what it was when the running command began: what that has seen is old news then.
    revision: u64,
    begun_at: u64,
    next_look: Time,
    next_close_look: Time,
    assigning: Assigning,
    ready: bool,
    drained: bool,
    reports: Vec<Report>,
}

impl Machine {
    /// One that finds interfaces which an agent before it has managed.
    pub fn new(managed: impl IntoIterator<Item = String>) -> Self {
        let interfaces = managed.into_iter().map(|name| (name, Managed::default())).collect();
        Self { interfaces, ..Self::default() }
    }

    /// Takes in what has happened; returns what there is to say.
    pub fn input(&mut self, now: Time, input: Input) -> Vec<Report> {
        match input {
            Input::Config(Ok(desired)) => self.accept(now, desired),
            Input::Config(Err(why)) => {
                let until_then = match &self.desired {
                    Some(_) => "the old one stays",
                    None => "nothing is managed until `qjump reload` finds one that is right",
                };
                self.say(Urgency::Error, None, format!("the configuration is refused, {until_then}: {why}"));
                self.refused = Some(why);
            }
            Input::Event => self.next_close_look = self.next_close_look.min(now + EVENT_DELAY),
            Input::Processes(number) => {
                if std::mem::replace(&mut self.assigning.processes, number) != number {
                    let at = self.assigning.rested(0).max(now);
                    self.assigning.due = self.assigning.due.map(|due| due.min(at));
                }
            }
            Input::Members(members) => {
                self.members = members;
                self.count();
            }
            Input::Done(outcome, chance) => self.done(now, outcome, chance),
            Input::Drain => {
                self.drained = true;
                self.revision += 1;
                self.interfaces.values_mut().for_each(|managed| managed.wanted = false);
            }
        }
        std::mem::take(&mut self.reports)
    }

    fn accept(&mut self, now: Time, desired: Arc<Desired>) {
        // Also if there are no rules now: what others gave is taken back.
        if self.desired.as_ref().is_none_or(|old| !old.has_rules_of(&desired)) {
            self.assigning.due = Some(now);
        }
        self.generation += 1;
        self.revision += 1;
        self.refused = None;
        self.drained = false;
        let wanted: BTreeSet<&String> = desired.file.host.interfaces.iter().collect();
        for managed in self.interfaces.values_mut() {
            managed.wanted = false;
        }
        for name in wanted {
            let managed = self.interfaces.entry(name.clone()).or_default();
            // Whoever asks anew gets new tries.
            let (repairs, stale) = (std::mem::take(&mut managed.repairs), managed.stale.take());
            *managed = Managed { wanted: true, look: true, repairs, stale, ..Managed::default() };
        }
        self.desired = Some(desired);
        self.count();
    }

    /// Plans for as many hosts as were counted. A number counts as it comes: what has to be waited for, the source waits for
    /// ([`super::members::Hold`]).
    fn count(&mut self) {
        if let (Some(members), Some(desired)) = (&self.members, self.desired.clone())
            && members.hosts != desired.plan.network.hosts
        {
            self.resize(&desired, members.hosts);
        }
    }

    fn resize(&mut self, desired: &Desired, hosts: u32) {
        let was = desired.plan.network.hosts;
        match Desired::of(desired.file.clone(), Some(hosts)) {
            Ok(new) => {
                self.say(Urgency::Info, None, format!("the cluster has {hosts} hosts now, not {was}: planned anew"));
                self.desired = Some(Arc::new(new));
                self.revision += 1;
                self.refused = None;
                for managed in self.interfaces.values_mut().filter(|managed| managed.wanted) {
                    (managed.look, managed.settled) = (true, false);
                }
            }
            Err(why) => {
                let why = format!("there is no plan for {hosts} hosts, so that for {was} stays: {why}");
                self.say(Urgency::Error, None, why.clone());
                self.refused = Some(why);
            }
        }
    }

    fn done(&mut self, now: Time, outcome: Outcome, chance: f64) {
        self.running = false;
        let is_news = self.begun_at == self.revision;
        match outcome {
            // Whoever is still to be looked at will be.
            Outcome::Observed(_) if !is_news => {}
            Outcome::Observed(seen) => {
                for (name, seen) in seen {
                    self.observed(now, &name, seen);
                }
            }
            Outcome::Changed(results) => {
                for (name, result) in results {
                    self.changed(now, &name, result, is_news, chance);
                }
            }
            Outcome::Assigned(result, took) => {
                let problem = result.err();
                let again = problem.is_some() || self.has_rules();
                let assigning = &mut self.assigning;
                (assigning.ended, assigning.took) = (now, took);
                // What ended were the rules of another configuration if there is a new one.
                assigning.due = if is_news { again.then(|| assigning.rested(1)) } else { Some(now) };
                if problem != assigning.problem {
                    let (urgency, text) = match &problem {
                        Some(why) => (Urgency::Warning, format!("not all rules could be applied: {why}")),
                        None => (Urgency::Info, "all rules are applied again".to_owned()),
                    };
                    assigning.problem = problem;
                    self.say(urgency, None, text);
                }
            }
        }
        self.ready |= self.desired.is_some() && !self.drained && self.is_settled();
    }

    fn changed(&mut self, now: Time, name: &str, result: Result<String, String>, is_news: bool, chance: f64) {
        match result {
            Ok(what) => {
                self.say(Urgency::Info, Some(name), what);
                match self.interfaces.get_mut(name) {
                    Some(managed) if managed.wanted => {
                        managed.look = true;
                        // What is wrong now is that, and not what a load has not done.
                        managed.settled |= is_news && managed.stale.is_none();
                        managed.stale = None;
                    }
                    _ => drop(self.interfaces.remove(name)),
                }
            }
            Err(why) => {
                let Some(managed) = self.interfaces.get_mut(name) else { return };
                managed.look = managed.wanted;
                managed.failures += 1;
                managed.not_before = now + backoff(managed.failures, chance);
                if managed.error.as_ref() != Some(&why) {
                    managed.error = Some(why.clone());
                    self.say(Urgency::Error, Some(name), why);
                }
            }
        }
    }

    fn observed(&mut self, now: Time, name: &str, seen: Seen) {
        let Some(managed) = self.interfaces.get_mut(name).filter(|managed| managed.wanted) else { return };
        managed.look = false;
        let before = managed.seen.replace(seen.clone());
        let is_news = before.as_ref() != Some(&seen);
        let mut news = None;
        match &seen {
            Seen::AsWanted => {
                (managed.settled, managed.failures, managed.error) = (true, 0, None);
            }
            Seen::Absent if is_news => {
                managed.settled = false;
                news = Some((Urgency::Warning, "there is no such interface; it is limited when it comes".to_owned()));
            }
            Seen::Absent => {}
            Seen::Broken(why) if is_news => news = Some((Urgency::Error, why.clone())),
            Seen::Broken(_) => {}
            Seen::Stale(pins) => managed.stale = Some(pins.clone()),
            Seen::Foreign(why) => {
                if managed.yielded.is_none() {
                    news = Some((
                        Urgency::Warning,
                        format!(
                            "{why}; it stays, and what is over a limit is dropped where that queue holds nothing back"
                        ),
                    ));
                    managed.yielded = Some(why.clone());
                    // To be looked at once more, with what is wanted now.
                    managed.look = true;
                    managed.settled = false;
                }
            }
            Seen::Unloaded(why) | Seen::Differs { why, .. } if managed.settled => {
                managed.repairs.retain(|&at| now < at + HOUR);
                if managed.repairs.len() < MOST_REPAIRS {
                    managed.repairs.push_back(now);
                    (managed.settled, managed.given_up) = (false, false);
                    news = Some((Urgency::Warning, format!("somebody has undone it, it is repaired: {why}")));
                } else if !std::mem::replace(&mut managed.given_up, true) {
                    news = Some((
                        Urgency::Error,
                        format!(
                            "repaired {MOST_REPAIRS} times within an hour, and undone again ({why}); left alone for now: find out who \
                             does that, then `qjump reload`"
                        ),
                    ));
                }
            }
            Seen::Unloaded(_) | Seen::Differs { .. } => {}
        }
        if let Some((urgency, text)) = news {
            self.say(urgency, Some(name), text);
        }
    }

    fn say(&mut self, urgency: Urgency, interface: Option<&str>, text: String) {
        self.reports.push(Report { urgency, interface: interface.map(str::to_owned), text });
    }

    /// What is to be done now, if anything; [`Input::Done`] has to follow.
    pub fn next(&mut self, now: Time) -> Option<Command> {
        let desired = self.desired.clone().filter(|_| !self.running)?;
        let command = self.choose(now, &desired)?;
        (self.running, self.begun_at) = (true, self.revision);
        Some(command)
    }

    fn choose(&mut self, now: Time, desired: &Arc<Desired>) -> Option<Command> {
        let (ticks, closely) = (now >= self.next_look, now >= self.next_close_look);
        if closely {
            self.interfaces.values_mut().for_each(|managed| managed.look |= managed.wanted);
        }
        let wanted = |name: &String, managed: &Managed| Wanted {
            interface: name.clone(),
            queue: if managed.yielded.is_some() { QueueChoice::Auto } else { desired.file.host.queue },
            yields: managed.yielded.is_some(),
            brief: !managed.look && managed.seen == Some(Seen::AsWanted),
            desired: Arc::clone(desired),
        };
        let due = self.interfaces.iter().filter(|(_, managed)| managed.look || ticks && managed.wanted);
        let look: Vec<Wanted> = due.map(|(name, managed)| wanted(name, managed)).collect();
        if !look.is_empty() {
            if ticks || closely {
                self.next_look = now + LOOK_EVERY;
            }
            if closely {
                self.next_close_look = now + LOOK_CLOSELY_EVERY;
            }
            return Some(Command::Observe(look));
        }
        let due = || {
            let steps = self.interfaces.iter().filter_map(|(name, managed)| Some((managed.step()?, name, managed)));
            steps.filter(|(_, _, managed)| managed.not_before <= now)
        };
        if let Some((step, name, managed)) = due().min_by_key(|(step, ..)| *step) {
            let lowering = |other: &Managed| {
                matches!(other.step(), Some(Step::Lower | Step::Clear)) && (1..=PATIENCE).contains(&other.failures)
            };
            let waits = step == Step::Raise && self.interfaces.values().any(lowering);
            match step {
                _ if waits => {}
                Step::Clear => {
                    return Some(Command::Unload(managed.stale.clone().unwrap_or_else(|| name.clone()), name.clone()));
                }
                Step::Remove => return Some(Command::Unload(name.clone(), name.clone())),
                Step::Lower | Step::Raise => {
                    let same = due().filter(|(other, ..)| *other == step).take(MOST_AT_ONCE);
                    return Some(Command::Load(same.map(|(_, name, managed)| wanted(name, managed)).collect()));
                }
            }
        }
        if !self.drained && self.assigning.due.is_some_and(|due| due <= now) {
            return Some(Command::Assign(Arc::clone(desired)));
        }
        None
    }

    /// When [`Machine::next`] is to be asked again, if nothing happens before.
    pub fn deadline(&self, now: Time) -> Option<Time> {
        if self.running || self.desired.is_none() {
            return None;
        }
        let retries = self.interfaces.values().filter(|managed| managed.step().is_some()).map(|one| one.not_before);
        let looks =
            self.interfaces.values().any(|managed| managed.wanted).then(|| self.next_look.min(self.next_close_look));
        retries.filter(|&at| at > now).chain(looks).chain(self.assigning.due.filter(|_| !self.drained)).min()
    }

    /// Whether each interface has had its turn: what is left to do has failed once at least.
    pub fn is_settled(&self) -> bool {
        let open = |managed: &Managed| (managed.look || managed.step().is_some()) && managed.failures == 0;
        !self.running && (self.desired.is_none() || !self.interfaces.values().any(open))
    }

    /// What is wanted, once something is.
    pub const fn desired(&self) -> Option<&Arc<Desired>> {
        self.desired.as_ref()
    }

    /// The interfaces that are managed, or are still to be left.
    pub fn managed(&self) -> impl Iterator<Item = &String> {
        self.interfaces.keys()
    }

    /// Whether there are rules that follow processes.
    pub fn has_rules(&self) -> bool {
        self.desired.as_ref().is_some_and(|desired| desired.has_rules())
    }

    /// The state for others to read.
    pub fn state(&self) -> State {
        let members = self.members.as_ref();
        State {
            generation: self.generation,
            refused: self.refused.clone(),
            hosts: self.desired.as_ref().map_or(0, |desired| desired.plan.network.hosts),
            hosts_source: members.map_or_else(|| "the configuration".to_owned(), |members| members.source.clone()),
            ready: self.ready,
            drained: self.drained,
            rules: self.assigning.problem.clone(),
            interfaces: self.interfaces.iter().map(|(name, managed)| (name.clone(), managed.problem())).collect(),
        }
    }
}

/// What is to be done about an interface, in the order in which that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Pins that are in the way have to go.
    Clear,
    /// A load that takes from a level.
    Lower,
    /// An unload.
    Remove,
    /// A load that gives to levels.
    Raise,
}

impl Managed {
    fn step(&self) -> Option<Step> {
        if !self.wanted {
            return Some(Step::Remove);
        }
        match self.seen.as_ref()? {
            _ if self.given_up => None,
            Seen::Absent | Seen::AsWanted | Seen::Foreign(_) | Seen::Broken(_) => None,
            Seen::Stale(_) => Some(Step::Clear),
            Seen::Unloaded(_) | Seen::Differs { lowers: true, .. } => Some(Step::Lower),
            Seen::Differs { .. } => Some(Step::Raise),
        }
    }

    /// What is not as it should be.
    fn problem(&self) -> Option<String> {
        if let Some(error) = &self.error {
            return Some(error.clone());
        }
        match self.seen.as_ref()? {
            Seen::AsWanted => self.yielded.clone(),
            Seen::Absent => Some("there is no such interface".to_owned()),
            Seen::Stale(pins) => Some(format!("what is pinned as {pins} is of another device")),
            Seen::Unloaded(why) | Seen::Differs { why, .. } | Seen::Foreign(why) | Seen::Broken(why) => {
                Some(why.clone())
            }
        }
    }
}

impl Assigning {
    /// The end of the rest: 0 after a change of the processes, 1 without one.
    fn rested(&self, kind: usize) -> Time {
        self.ended + LEAST_REST[kind].max(self.took * REST[kind])
    }
}

/// Twice as long after each failure, up to a limit, and up to half less by chance.
fn backoff(failures: u32, chance: f64) -> Duration {
    let longest = LONGEST_BACKOFF.min(Duration::from_secs(1 << (failures - 1).min(6)));
    longest.mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;
    use crate::config::File;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    /// A configuration for some interfaces; of two, the one with the greater factor lets more through.
    fn desired(interfaces: &[&str], factor: u32) -> Arc<Desired> {
        let text = format!(
            "cluster = {{ hosts = 4, link-rate = \"1gbit\", max-packet = 256, epsilon = \"4us\" }}\n\
             host = {{ interfaces = {interfaces:?} }}\n[[level]]\nlevel = 5\nfactor = {factor}\n"
        );
        Arc::new(Desired::of(File::parse(&text).expect("it is right"), None).expect("there is a plan"))
    }

    fn rate(desired: &Desired) -> f64 {
        desired.plan.levels[0].rate_bps.expect("a limit")
    }

    /// A host, as far as the machine can see it.
    #[derive(Default)]
    struct World {
        machine: Machine,
        now: Time,
        /// The rate in force on each interface that is there.
        devices: BTreeMap<String, Option<f64>>,
        /// Interfaces whose queue is somebody else's.
        foreign: BTreeSet<String>,
        /// Whether loads fail.
        fails: bool,
        /// Every interface that was ever wanted.
        named: BTreeSet<String>,
        /// What was done to interfaces: the rate before and after, nothing for an unload.
        done: Vec<(String, Option<f64>, Option<f64>)>,
        said: Vec<Report>,
    }

    impl World {
        fn put_in(&mut self, input: Input) {
            if let Input::Config(Ok(desired)) = &input {
                self.named.extend(desired.file.host.interfaces.iter().cloned());
            }
            self.said.extend(self.machine.input(self.now, input));
        }

        fn configure(&mut self, interfaces: &[&str], factor: u32) {
            self.put_in(Input::Config(Ok(desired(interfaces, factor))));
        }

        /// Executes what is to be done now; how much it was.
        fn proceed(&mut self) -> usize {
            for count in 0.. {
                let Some(command) = self.machine.next(self.now) else { return count };
                assert!(count < 100, "it goes on and on: {command:?}");
                assert!(self.machine.next(self.now).is_none(), "one at a time");
                let outcome = self.execute(&command);
                self.put_in(Input::Done(outcome, 0.5));
            }
            unreachable!()
        }

        /// Lets time pass, with the pauses that the machine asks for.
        fn wait(&mut self, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                self.proceed();
                let next = self.machine.deadline(self.now).unwrap_or(end);
                // It must not ask to be asked again at once.
                self.now = next.max(self.now + Duration::from_millis(1)).min(end);
            }
        }

        fn execute(&mut self, command: &Command) -> Outcome {
            match command {
                Command::Observe(wanted) => Outcome::Observed(
                    wanted.iter().map(|wanted| (wanted.interface.clone(), self.see(wanted))).collect(),
                ),
                Command::Load(all) => Outcome::Changed(all.iter().map(|one| self.load(one)).collect()),
                Command::Unload(pins, name) => {
                    assert!(self.named.contains(pins), "nobody wanted {pins}");
                    if let Some(in_force) = self.devices.get_mut(pins) {
                        self.done.push((pins.clone(), *in_force, None));
                        *in_force = None;
                    }
                    Outcome::Changed(BTreeMap::from([(name.clone(), Ok("unloaded".to_owned()))]))
                }
                Command::Assign(_) => Outcome::Assigned(Ok(()), Duration::from_millis(1)),
            }
        }

        fn load(&mut self, wanted: &Wanted) -> (String, Result<String, String>) {
            let name = wanted.interface.clone();
            assert!(self.named.contains(&name), "nobody wanted {name}");
            let result = match self.devices.get_mut(&name) {
                None => Err("no such interface".to_owned()),
                Some(_) if self.fails => Err("no room".to_owned()),
                Some(in_force) => {
                    let new = Some(rate(&wanted.desired));
                    self.done.push((name.clone(), *in_force, new));
                    *in_force = new;
                    Ok("loaded".to_owned())
                }
            };
            (name, result)
        }

        fn see(&self, wanted: &Wanted) -> Seen {
            let new = rate(&wanted.desired);
            match self.devices.get(&wanted.interface) {
                None => Seen::Absent,
                Some(None) => Seen::Unloaded("nothing".to_owned()),
                Some(Some(_)) if self.foreign.contains(&wanted.interface) && !wanted.yields => {
                    Seen::Foreign("other".to_owned())
                }
                Some(Some(rate)) if *rate == new => Seen::AsWanted,
                Some(Some(rate)) => Seen::Differs { why: "another plan".to_owned(), lowers: new < *rate },
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Event {
        Configure(Vec<&'static str>, u32),
        Refuse,
        Come(&'static str),
        Go(&'static str),
        Undo(&'static str),
        Foreign(&'static str),
        Fail(bool),
        Hear,
        Members(u32),
        Drain,
        Wait(u64),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let name = || select(NAMES.to_vec());
        let one = prop_oneof![
            3 => (proptest::sample::subsequence(NAMES.to_vec(), 0..=4), 1..4u32).prop_map(|(names, factor)| Event::Configure(names, factor)),
            1 => Just(Event::Refuse),
            3 => name().prop_map(Event::Come),
            1 => name().prop_map(Event::Go),
            2 => name().prop_map(Event::Undo),
            1 => name().prop_map(Event::Foreign),
            1 => any::<bool>().prop_map(Event::Fail),
            1 => Just(Event::Hear),
            1 => (1..9u32).prop_map(Event::Members),
            1 => Just(Event::Drain),
            3 => (1..5_000u64).prop_map(Event::Wait),
        ];
        vec(one, 1..40)
    }

    fn play(world: &mut World, events: Vec<Event>) {
        for event in events {
            match event {
                Event::Configure(names, factor) => world.configure(&names, factor),
                Event::Refuse => {
                    let before = world.machine.desired().cloned();
                    world.put_in(Input::Config(Err("wrong".to_owned())));
                    let after = world.machine.desired();
                    assert!(before.as_ref().map(Arc::as_ptr) == after.map(Arc::as_ptr), "the old one stays");
                    assert_eq!(world.machine.state().refused.as_deref(), Some("wrong"));
                }
                Event::Come(name) => drop(world.devices.entry(name.to_owned()).or_default()),
                Event::Go(name) => drop(world.devices.remove(name)),
                Event::Undo(name) => world
                    .devices
                    .entry(name.to_owned())
                    .and_modify(|rate| *rate = None)
                    .or_default()
                    .take()
                    .map_or((), drop),
                Event::Foreign(name) => drop(world.foreign.insert(name.to_owned())),
                Event::Fail(fails) => world.fails = fails,
                Event::Hear => world.put_in(Input::Event),
                Event::Members(hosts) => {
                    world.put_in(Input::Members(Some(Members { hosts, source: "file".to_owned() })));
                }
                Event::Drain => world.put_in(Input::Drain),
                Event::Wait(ms) => world.wait(Duration::from_millis(ms)),
            }
            world.proceed();
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_it_ends_as_wanted_and_stays_so(events in events()) {
            let mut world = World::default();
            play(&mut world, events);
            // No more faults, and what was given up gets a new chance.
            world.fails = false;
            world.wait(HOUR + LONGEST_BACKOFF);
            if let Some(wanted) = world.machine.desired().cloned().filter(|_| !world.machine.state().drained) {
                for name in &wanted.file.host.interfaces {
                    if let Some(in_force) = world.devices.get(name) {
                        prop_assert_eq!(*in_force, Some(rate(&wanted)), "{} {:?}", name, world.machine.state());
                    }
                }
                prop_assert!(world.machine.is_settled());
            }
            // The second run does nothing.
            world.done.clear();
            world.said.clear();
            world.wait(LOOK_EVERY * 10);
            prop_assert_eq!(&world.done, &[]);
            prop_assert_eq!(&world.said, &[]);
        }

        #[test]
        fn what_lowers_goes_before_what_raises(
            before in proptest::collection::btree_map(select(NAMES.to_vec()), proptest::option::of(1..4u32), 1..=4),
            factor in 1..4u32,
        ) {
            let mut world = World::default();
            for (name, factor) in &before {
                world.devices.insert((*name).to_owned(), factor.map(|factor| rate(&desired(&[name], factor))));
            }
            let names: Vec<&str> = before.keys().copied().collect();
            world.configure(&names, factor);
            world.proceed();
            let raises = world.done.iter().map(|(_, was, is)| was.zip(*is).is_some_and(|(was, is)| was < is));
            prop_assert!(raises.is_sorted(), "{:?}", world.done);
        }
    }

    #[test]
    fn nothing_is_done_without_a_configuration() {
        let mut machine = Machine::new(["a".to_owned()]);
        machine.input(Time::ZERO, Input::Config(Err("wrong".to_owned())));
        assert!(machine.next(Time::ZERO).is_none() && machine.deadline(Time::ZERO).is_none());
        // What an agent before it has managed, and nobody wants any more, goes.
        machine.input(Time::ZERO, Input::Config(Ok(desired(&[], 1))));
        assert!(matches!(machine.next(Time::ZERO), Some(Command::Unload(pins, _)) if pins == "a"));
    }

    #[test]
    fn what_is_the_same_step_for_several_interfaces_is_one_command() {
        let mut world = World::default();
        world.devices.extend(
            [("a", Some(rate(&desired(&["a"], 3)))), ("b", None), ("c", None)]
                .map(|(name, rate)| (name.to_owned(), rate)),
        );
        world.configure(&["a", "b", "c"], 4);
        let mut loads = Vec::new();
        while let Some(command) = world.machine.next(world.now) {
            if let Command::Load(wanted) = &command {
                loads.push(wanted.iter().map(|wanted| wanted.interface.clone()).collect::<Vec<_>>());
            }
            let outcome = world.execute(&command);
            world.put_in(Input::Done(outcome, 0.5));
        }
        // What is unlimited first, both at once, and then what may have more.
        assert_eq!(loads, [vec!["b", "c"], vec!["a"]]);
    }

    #[test]
    fn what_was_seen_for_one_configuration_says_nothing_of_the_next() {
        let mut world = World::default();
        world.devices.insert("a".to_owned(), None);
        world.configure(&["a"], 1);
        world.proceed();
        world.now += LOOK_EVERY;
        // A look is under way when the configuration changes.
        assert!(matches!(world.machine.next(world.now), Some(Command::Observe(_))));
        world.configure(&["a"], 2);
        let seen = BTreeMap::from([("a".to_owned(), Seen::AsWanted)]);
        world.put_in(Input::Done(Outcome::Observed(seen), 0.5));
        assert!(!world.machine.is_settled());
        world.proceed();
        assert_eq!(world.devices["a"], Some(rate(&desired(&["a"], 2))));
    }

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let mut world = World { fails: true, ..World::default() };
        world.devices.insert("a".to_owned(), None);
        world.configure(&["a"], 1);
        world.proceed();
        let said = world.said.len();
        let mut tries = Vec::new();
        for _ in 0..600 {
            world.now += Duration::from_secs(1);
            if world.machine.next(world.now).is_some_and(|command| match command {
                Command::Load(_) => true,
                other => {
                    let outcome = world.execute(&other);
                    world.put_in(Input::Done(outcome, 1.0));
                    false
                }
            }) {
                tries.push(world.now.as_secs());
                let failed = BTreeMap::from([("a".to_owned(), Err("no room".to_owned()))]);
                world.put_in(Input::Done(Outcome::Changed(failed), 1.0));
            }
        }
        let gaps: Vec<u64> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps.is_sorted() && gaps.iter().all(|&gap| gap <= LONGEST_BACKOFF.as_secs() + 2), "{gaps:?}");
        assert!(gaps.last() >= Some(&50), "{gaps:?}");
        assert_eq!(world.said.len(), said, "it is said once: {:?}", world.said);
    }

    #[test]
    fn who_undoes_it_again_and_again_means_it() {
        let mut world = World::default();
        world.devices.insert("a".to_owned(), None);
        world.configure(&["a"], 1);
        for _ in 0..100 {
            world.wait(LOOK_EVERY * 2);
            world.devices.insert("a".to_owned(), None);
        }
        assert_eq!(world.done.len(), 1 + MOST_REPAIRS);
        let errors = world.said.iter().filter(|report| report.urgency == Urgency::Error).count();
        assert_eq!(errors, 1, "{:?}", world.said);
        // Who asks anew gets new tries.
        world.configure(&["a"], 1);
        world.wait(LOOK_EVERY);
        assert_eq!(world.done.len(), 2 + MOST_REPAIRS);
    }

    #[test]
    fn the_plan_is_for_as_many_hosts_as_were_counted() {
        let members = |hosts| Input::Members(Some(Members { hosts, source: "file".to_owned() }));
        let mut world = World::default();
        world.configure(&["a"], 1);
        let in_force = |world: &World| world.machine.state().hosts;
        assert_eq!((in_force(&world), world.machine.state().hosts_source.as_str()), (4, "the configuration"));
        for hosts in [6, 3] {
            world.put_in(members(hosts));
            assert_eq!((in_force(&world), world.machine.state().hosts_source.as_str()), (hosts, "file"));
        }
        // Another configuration says another number, which was counted.
        world.configure(&["a", "b"], 1);
        assert_eq!(in_force(&world), 3);
        // More hosts than can be planned for: the plan in force stays, and that is said.
        world.put_in(members(u32::MAX));
        assert_eq!(in_force(&world), 3);
        assert!(world.machine.state().refused.is_some());
    }

    #[test]
    fn looks_at_processes_leave_the_host_alone() {
        let mut machine = Machine::default();
        let mut world = desired(&[], 1);
        let rules = File::parse(&format!(
            "{}\n[[assign]]\nlevel = 5\nlocal-port = 11211\n",
            "[cluster]\nhosts = 4\nlink-rate = \"1gbit\"\nmax-packet = 256\nepsilon = \"4us\"\n[[level]]\nlevel = 5\nfactor = 1"
        ));
        world = Arc::new(Desired::of(rules.expect("it is right"), None).unwrap_or_else(|_| panic!("{world:?}")));
        machine.input(Time::ZERO, Input::Config(Ok(world)));
        let took = Duration::from_millis(80);
        let (mut now, mut working) = (Time::ZERO, Duration::ZERO);
        while now < Duration::from_secs(1000) {
            // Some process comes each second.
            machine.input(now, Input::Processes(now.as_secs()));
            while let Some(command) = machine.next(now) {
                assert!(matches!(command, Command::Assign(_)));
                (now, working) = (now + took, working + took);
                machine.input(now, Input::Done(Outcome::Assigned(Ok(()), took), 0.0));
            }
            now += Duration::from_millis(250);
        }
        assert!(working >= took * 50 && working < now / 90, "{working:?}");
    }
}
