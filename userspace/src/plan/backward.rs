//! From applications to levels: the planner run backwards.
//!
//! An application sends messages of a size, so many a second from every host, each due within a deadline.
//! Applications that share a level share its limiter. If messages of all of them come at once, with `Q`
//! packets in all, the last one waits `(Q - 1) T` for its turn and is then at its destination within the
//! level's bound D; the level's rate is a little more than the sum of theirs, so more never pile up. Or the level is
//! charged by bytes, with a burst that holds one message of each, and nothing waits, but D is larger.
//! Messages longer than a frame are always charged so.
//!
//! **The longest epoch that carries the demand and meets the deadlines is best for everyone**: it makes the level's own bound least
//! (fewer packets in the window) and delays the levels below least. So a level's epoch follows from who
//! is on it and from the levels above, and what is left to search is who goes where. That search is
//! complete for up to [`CLASSES`] classes, from the strictest level down; a class that would be late even
//! alone on the next level ends a branch, because company and levels above only make it later. Of more
//! classes, neighbours in deadline are merged, levels are filled in the order of deadlines, and the result
//! says so.
//!
//! Whatever is found is planned forwards once more and checked against every deadline.

use qjump_ebpf::{Charge, Level};
use thiserror::Error;

use super::{Above, Demand, Envelope, LevelPlan, LevelSpec, Model, Network, Plan, PlanError, delays::on_wire};
use qjump_ebpf::frame::MIN_FRAME;

use crate::units::{Nanos, Rate, show_ns, show_rate};

/// Classes of applications that are searched exhaustively.
pub const CLASSES: usize = 8;

/// What an application sends from every host.
#[derive(Clone, Debug, PartialEq)]
pub struct App {
    /// Its name.
    pub name: String,
    /// Size of a message, L2 bytes: its payload and one set of headers. Longer than a frame, and it is sent in
    /// several, each with headers of its own.
    pub message: u32,
    /// Messages a second, from each host.
    pub per_second: f64,
    /// Longest time from the application to the destination.
    pub deadline: Nanos,
    /// The level that it must have, if any.
    pub level: Option<Level>,
}

/// Applications, their levels, and the plan that serves them.
#[derive(Clone, Debug, PartialEq)]
pub struct Assigned {
    /// The plan.
    pub plan: Plan,
    /// One for each application, in the order they were given.
    pub apps: Vec<Placed>,
    /// Whether all ways of dividing applications into levels were considered.
    pub exhaustive: bool,
}

/// Where an application went.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The application.
    pub app: App,
    /// Its level.
    pub level: Level,
    /// Longest wait in the host's limiter, ns.
    pub wait_ns: f64,
    /// Longest time from the application to the destination, ns.
    pub latency_ns: f64,
}

/// Why applications cannot be served.
#[derive(Debug, Error, PartialEq)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Unserved {
    #[error("there is no application; give at least one [[app]]")]
    NoApps,
    #[error("app '{0}' is given twice; give each a name of its own")]
    Twice(String),
    #[error("app '{name}': {what}")]
    Value { name: String, what: String },
    #[error(
        "app '{name}': its deadline of {} is below what one message takes on an idle network, {}",
        show_ns(*deadline_ns), show_ns(*least_ns)
    )]
    Impossible { name: String, deadline_ns: f64, least_ns: f64 },
    #[error("model paper promises nothing below the strictest level; use strict or fan-in")]
    Paper,
    #[error("{0}")]
    Missed(Box<Missed>),
    #[error("{0}")]
    Plan(#[from] PlanError),
}

impl Unserved {
    /// The application that is to blame, if one is.
    pub fn app(&self) -> Option<&str> {
        match self {
            Self::Twice(name) | Self::Value { name, .. } | Self::Impossible { name, .. } => Some(name),
            Self::Missed(missed) => missed.app.as_ref().map(|(name, ..)| name.as_str()),
            _ => None,
        }
    }
}

/// Which application is late, and what would help.
#[derive(Clone, Debug, PartialEq)]
pub struct Missed {
    /// The application that is easiest to help, and the earliest that it can be served, ns; `None` if
    /// a later deadline of no single application would do.
    pub app: Option<(String, f64, f64)>,
    /// Rate of all hosts together and of the link, bit/s, if that alone is too much.
    pub overload: Option<(f64, f64)>,
    /// Changes that would do, with their size as a ratio, the nearest first.
    pub changes: Vec<(String, f64)>,
    /// Whether all ways were considered.
    pub exhaustive: bool,
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some((bps, link_bps)) = self.overload {
            write!(
                f,
                "all hosts together send {}, more than a link of {} carries if they choose one destination: ",
                show_rate(bps),
                show_rate(link_bps)
            )?;
        }
        match &self.app {
            Some((name, deadline_ns, earliest_ns)) => write!(
                f,
                "app '{name}' cannot be served within {}: the best is {}, {} too late",
                show_ns(*deadline_ns),
                show_ns(*earliest_ns),
                show_ns(earliest_ns - deadline_ns)
            )?,
            None => {
                write!(f, "the applications cannot all be served, and a later deadline of one alone would not help")?
            }
        }
        if !self.exhaustive {
            write!(f, " (of the divisions that were tried: more than {CLASSES} classes of demand)")?;
        }
        match self.changes.split_first() {
            Some(((nearest, _), others)) => {
                write!(f, ". Nearest change that would do: {nearest}")?;
                for (other, _) in others {
                    write!(f, "; or {other}")?;
                }
                Ok(())
            }
            None => write!(f, ". No change of hosts, message size, link or deadline alone would do"),
        }
    }
}

/// What the applications of a class, or of a level, need together.
#[derive(Clone, Copy, Debug)]
struct Load {
    /// Largest frame, L2 bytes.
    frame: u32,
    /// One message of each: wire bytes and packets.
    burst: f64,
    packets: f64,
    /// Per second and host: packets and wire bytes.
    packet_rate: f64,
    byte_rate: f64,
    /// Whether a message takes several frames.
    long: bool,
    /// The earliest deadline, ns.
    deadline_ns: f64,
    level: Option<Level>,
}

impl Load {
    fn of(network: &Network, app: &App) -> Self {
        let (count, frame, bytes) = app.on_wire(network);
        Self {
            frame,
            burst: bytes,
            packets: f64::from(count),
            packet_rate: f64::from(count) * app.per_second,
            byte_rate: bytes * app.per_second,
            long: count > 1,
            deadline_ns: app.deadline.ns() as f64,
            level: app.level,
        }
    }

    fn with(self, other: Self) -> Self {
        Self {
            frame: self.frame.max(other.frame),
            burst: self.burst + other.burst,
            packets: self.packets + other.packets,
            packet_rate: self.packet_rate + other.packet_rate,
            byte_rate: self.byte_rate + other.byte_rate,
            long: self.long || other.long,
            deadline_ns: self.deadline_ns.min(other.deadline_ns),
            level: self.level.or(other.level),
        }
    }
}

/// Classes, as the numbers of their applications, the strictest deadline first.
type Classes = Vec<Vec<usize>>;

/// What was chosen for one level: its number, the set of its classes, and its plan.
type Chosen = (Level, u32, LevelPlan);

struct Solver<'a> {
    network: &'a Network,
    /// What each set of classes needs together; a bit for each class.
    sets: Vec<Option<Load>>,
    /// A bit for each class.
    all: u32,
    /// Whether to consider every division, or only those in the order of deadlines.
    exhaustive: bool,
}

/// The ways to charge a level; by packet is the better bound, so it comes first.
const CHARGES: [Charge; 2] = [Charge::Packet, Charge::Byte];

/// Headers that every frame of a long message repeats: Ethernet 14, IPv6 40, TCP 20 and its timestamps 12.
const HEADERS: u32 = 86;

/// How much faster than the declared rate a level is, so that messages never pile up: clocks differ, and the limiter
/// counts whole nanoseconds.
const MARGIN: f64 = 1.001;

/// No level takes longer than this to refill, ns: below what the limiter counts to.
const LONGEST_NS: f64 = 200e9;

fn frames(message: u32, mtu: u32) -> (u32, u32) {
    if message <= mtu {
        return (1, message);
    }
    let room = mtu.saturating_sub(HEADERS).max(1);
    (message.saturating_sub(HEADERS).div_ceil(room), mtu)
}

impl App {
    /// Frames, the largest of them, and wire bytes of one message.
    fn on_wire(&self, network: &Network) -> (u32, u32, f64) {
        let (count, frame) = frames(self.message, network.mtu());
        let bytes = if count == 1 {
            f64::from(on_wire(frame, network.overhead()))
        } else {
            // The last frame may be short, and padded.
            let repeated = f64::from(count - 1) * f64::from(HEADERS) + f64::from(MIN_FRAME);
            f64::from(self.message) + f64::from(count) * f64::from(network.overhead()) + repeated
        };
        (count, frame, bytes)
    }

    /// What one message takes on an idle network, ns.
    fn least_ns(&self, network: &Network) -> f64 {
        let (_, frame, bytes) = self.on_wire(network);
        network.fixed(f64::from(on_wire(frame, network.overhead()))).total_ns() + network.time_ns(bytes)
    }
}

/// Divides applications into classes of equal size, deadline and level, and merges those into no more than
/// [`CLASSES`]; whether nothing had to be merged.
fn classes(network: &Network, apps: &[App]) -> (Classes, bool) {
    let mut order: Vec<usize> = (0..apps.len()).collect();
    order.sort_by_key(|&index| (apps[index].deadline, index));
    let mut classes: Classes = Vec::new();
    for index in order {
        let key = |index: usize| (apps[index].deadline, apps[index].level, apps[index].message);
        // Up to CLASSES applications are left as they are.
        let same = classes.iter_mut().find(|class| apps.len() > CLASSES && key(class[0]) == key(index));
        match same {
            Some(class) => class.push(index),
            None => classes.push(vec![index]),
        }
    }
    let exhaustive = classes.len() <= CLASSES;
    while classes.len() > CLASSES {
        let first = |class: usize| &apps[classes[class][0]];
        // The two neighbours whose deadlines differ least, of one kind if there are any.
        let cost = |class: usize| {
            let (a, b) = (first(class), first(class + 1));
            let kind = |app: &App| (app.on_wire(network).0 > 1, app.level);
            let other_kind = if kind(a) == kind(b) { 1.0 } else { 1e6 };
            other_kind * b.deadline.ns() as f64 / a.deadline.ns() as f64
        };
        let mixed = |class: usize| {
            let (a, b) = (first(class).level, first(class + 1).level);
            a.is_some() && b.is_some() && a != b
        };
        let pairs = (0..classes.len() - 1).filter(|&class| !mixed(class));
        let Some(pair) = pairs.min_by(|&a, &b| cost(a).total_cmp(&cost(b))) else { break };
        let other = classes.remove(pair + 1);
        classes[pair].extend(other);
    }
    (classes, exhaustive)
}

impl<'a> Solver<'a> {
    fn new(network: &'a Network, apps: &[App], classes: &Classes, exhaustive: bool) -> Self {
        let load = |class: &Vec<usize>| class.iter().map(|&index| Load::of(network, &apps[index])).reduce(Load::with);
        let mut sets: Vec<Option<Load>> = vec![None];
        for class in classes {
            let own = load(class);
            let with: Vec<Option<Load>> = sets
                .iter()
                .map(|other| match (own, *other) {
                    (Some(own), Some(other)) => Some(own.with(other)),
                    (own, _) => own,
                })
                .collect();
            sets.extend(with);
        }
        Self { network, all: sets.len() as u32 - 1, sets, exhaustive }
    }

    /// A level that serves a set of classes below those above, charged by packet or by bytes.
    fn serve(
        &self,
        level: Level,
        set: u32,
        charge: Charge,
        above: &[Above],
        largest: f64,
    ) -> Option<(LevelPlan, Envelope)> {
        let all = self.sets[set as usize]?;
        let network = self.network;
        let plan = |spec: LevelSpec| match network.level(spec, above, largest) {
            Ok((plan, Some(envelope))) if plan.guaranteed => Some((plan, envelope)),
            _ => None,
        };
        let mut spec = LevelSpec { every_host: true, ..LevelSpec::new(level, Demand::Unlimited) };
        spec.max_packet = Some(all.frame);
        spec.charge = Some(charge);
        if charge == Charge::Byte {
            if all.burst > f64::from(u32::MAX) {
                return None;
            }
            spec.burst = Some(all.burst.ceil() as u32);
            // Each packet may cost up to a nanosecond more than its bytes.
            let rounding = 1.0 - all.packet_rate * 1e-9;
            let bytes = (MARGIN * all.byte_rate / rounding).max(all.burst * 1e9 / LONGEST_NS);
            if rounding <= 0.0 {
                return None;
            }
            spec.demand = Demand::Rate(rate_of(bytes * 8.0));
            return plan(spec).filter(|(plan, _)| plan.bound_ns.is_some_and(|bound| bound <= all.deadline_ns));
        }
        if all.long {
            return None;
        }
        let packet_bits = f64::from(on_wire(all.frame, network.overhead())) * 8.0;
        let behind = all.packets - 1.0;
        // The longest epoch that carries the demand, shortened until the last in line is in time.
        let mut epoch_ns = (1e9 / (all.packet_rate * MARGIN)).min(LONGEST_NS).floor();
        for _ in 0..64 {
            if epoch_ns < 1.0 {
                return None;
            }
            spec.demand = Demand::Rate(rate_of(packet_bits * 1e9 / epoch_ns));
            let (plan, envelope) = plan(spec)?;
            let (bound_ns, spacing_ns) = (plan.bound_ns?, plan.epoch_ns?.ceil());
            if bound_ns + behind * spacing_ns <= all.deadline_ns {
                return Some((plan, envelope));
            }
            let next_ns = (all.deadline_ns - bound_ns) / behind;
            if behind == 0.0 || next_ns <= 0.0 || next_ns >= epoch_ns {
                return None;
            }
            epoch_ns = next_ns.floor();
        }
        None
    }

    /// Serves `left` from level `number` down.
    fn search(&self, number: u8, left: u32, above: &mut Vec<Above>, largest: f64, chosen: &mut Vec<Chosen>) -> bool {
        if left == 0 {
            return true;
        }
        let Some(level) = Level::new(number).filter(|&level| level > Level::BEST_EFFORT) else { return false };
        let (mut must, mut may, mut fixed_below) = (0, 0, false);
        for bit in (0..self.all.count_ones()).map(|index| 1 << index).filter(|bit| left & bit != 0) {
            let asked = self.sets[bit as usize].and_then(|load| load.level);
            match asked {
                Some(asked) if asked == level => must |= bit,
                Some(asked) if asked > level => return false,
                Some(_) => fixed_below = true,
                None => may |= bit,
            }
            // Late even if it were next and alone: later it is later still.
            let alone = |charge| self.serve(level, bit, charge, above, largest).is_some();
            if asked.is_none_or(|asked| asked == level) && !CHARGES.into_iter().any(alone) {
                return false;
            }
        }
        self.fill(level, left, must, may, above, largest, chosen)
            // An empty level is of use only above one that somebody asked for.
            || (must == 0 && fixed_below && self.search(number - 1, left, above, largest, chosen))
    }

    /// Tries `set` on a level, then `set` with more of those that may join, the strictest deadlines first.
    #[expect(clippy::too_many_arguments, reason = "the state of one search")]
    fn fill(
        &self,
        level: Level,
        left: u32,
        set: u32,
        may: u32,
        above: &mut Vec<Above>,
        largest: f64,
        chosen: &mut Vec<Chosen>,
    ) -> bool {
        let mut served = set == 0;
        if set != 0 {
            for charge in CHARGES {
                let Some((plan, envelope)) = self.serve(level, set, charge, above, largest) else { continue };
                served = true;
                let frame = f64::from(on_wire(plan.largest_frame(self.network.mtu()), self.network.overhead()));
                let sent = plan.bound_ns.map(|bound| (self.network.hosts, envelope, bound));
                above.push(Above { level, sent, all: true });
                chosen.push((level, set, plan));
                if self.search(level.number() - 1, left & !set, above, largest.max(frame), chosen) {
                    return true;
                }
                above.pop();
                chosen.pop();
            }
        }
        // More company only makes a level later.
        if !served {
            return false;
        }
        let mut rest = may;
        while rest != 0 {
            let bit = rest & rest.wrapping_neg();
            rest &= !bit;
            if self.fill(level, left, set | bit, rest, above, largest, chosen) {
                return true;
            }
            if !self.exhaustive {
                // Neighbours in deadline only.
                return false;
            }
        }
        false
    }
}

fn rate_of(bps: f64) -> Rate {
    Rate::from_bps((bps.ceil() as u64).max(qjump_ebpf::limiter::MIN_RATE_BPS))
}

fn solve(network: &Network, apps: &[App], classes: &Classes, exhaustive: bool) -> Option<Vec<Chosen>> {
    // In the order of deadlines first: there are few such divisions, and most demands have one.
    [false, true].into_iter().take(1 + usize::from(exhaustive)).find_map(|exhaustive| {
        let solver = Solver::new(network, apps, classes, exhaustive);
        let mut chosen = Vec::new();
        solver.search(7, solver.all, &mut Vec::new(), 0.0, &mut chosen).then_some(chosen)
    })
}

/// The most extreme value between one that does and one that does not, to one part in a thousand.
fn edge(mut good: f64, mut bad: f64, does: impl Fn(f64) -> bool) -> f64 {
    while (good / bad - 1.0).abs() > 1e-3 {
        let middle = (good * bad).sqrt();
        if does(middle) { good = middle } else { bad = middle }
    }
    good
}

fn missed(network: &Network, apps: &[App], classes: &Classes, exhaustive: bool) -> Missed {
    // Divisions in the order of deadlines are quick to try, and what they serve is served. How late the
    // application is, is then made exact.
    let serves = |network: &Network, apps: &[App]| solve(network, apps, classes, false).is_some();
    let with = |class: &[usize], change: &dyn Fn(&mut App)| {
        let mut apps = apps.to_vec();
        class.iter().for_each(|&index| change(&mut apps[index]));
        apps
    };
    let by = |class: &[usize], ns: f64| {
        with(class, &|app| app.deadline = app.deadline.max(Nanos::from_ns(ns.ceil() as u64)))
    };
    let mut changes: Vec<(String, f64)> = Vec::new();
    // The class whose deadline has to move least, and the application of it that is due first.
    let longest_ns = 1e11;
    let mut late: Option<(usize, f64)> = None;
    for (number, class) in classes.iter().enumerate() {
        let deadline_ns = apps[class[0]].deadline.ns() as f64;
        let does = |ns: f64| serves(network, &by(class, ns));
        // Only if it beats the best so far.
        let ratio = late.map(|(best, ns)| ns / apps[classes[best][0]].deadline.ns() as f64);
        let limit_ns = ratio.map_or(longest_ns, |ratio| ratio * deadline_ns * 0.999);
        if limit_ns > deadline_ns && does(limit_ns) {
            late = Some((number, edge(limit_ns, deadline_ns, does)));
        }
    }
    if let Some((number, ns)) = late.filter(|_| exhaustive) {
        let deadline_ns = apps[classes[number][0]].deadline.ns() as f64;
        let does = |ns: f64| solve(network, &by(&classes[number], ns), classes, true).is_some();
        late = Some((number, edge(ns, deadline_ns, does)));
    }
    let app = late
        .map(|(number, ns)| (apps[classes[number][0]].name.clone(), apps[classes[number][0]].deadline.ns() as f64, ns));
    if let Some((name, deadline_ns, earliest_ns)) = &app {
        changes.push((format!("a deadline of {} for '{name}'", show_ns(*earliest_ns)), earliest_ns / deadline_ns));
    }
    let smaller: Vec<usize> = late.map_or((0..classes.len()).collect(), |(number, _)| vec![number]);
    for class in smaller.into_iter().map(|number| &classes[number]) {
        let largest = class.iter().map(|&index| apps[index].message).max().unwrap_or(0);
        let does = |bytes: f64| serves(network, &with(class, &|app| app.message = app.message.min(bytes as u32)));
        if largest > 14 && does(14.0) {
            let bytes = edge(14.0, f64::from(largest), does).floor();
            changes.push((format!("messages of {bytes} B for '{}'", apps[class[0]].name), f64::from(largest) / bytes));
            break;
        }
    }
    let hosts = f64::from(network.hosts);
    let does = |n: f64| serves(&Network { hosts: n as u32, ..network.clone() }, apps);
    if network.hosts > 1 && does(1.0) {
        let most = edge(1.0, hosts, does).floor();
        changes.push((format!("{most} hosts"), hosts / most));
    }
    let bps = network.link_rate.bps() as f64;
    let does = |bps: f64| serves(&Network { link_rate: Rate::from_bps(bps as u64), ..network.clone() }, apps);
    if does(1_000.0 * bps) {
        let least = edge(1_000.0 * bps, bps, does);
        changes.push((format!("a link of {}", show_rate(least)), least / bps));
    }
    let at_rate = |share: f64| {
        let mut apps = apps.to_vec();
        apps.iter_mut().for_each(|app| app.per_second *= share);
        serves(network, &apps)
    };
    if at_rate(1e-3) {
        let share = edge(1e-3, 1.0, at_rate);
        changes.push((format!("{:.3} of the messages a second of all", share), 1.0 / share));
    }
    let mut free = apps.to_vec();
    free.iter_mut().for_each(|app| app.level = None);
    if apps.iter().any(|app| app.level.is_some()) && serves(network, &free) {
        changes.push(("leave the choice of levels to the planner".to_owned(), 1.0));
    }
    changes.sort_by(|a, b| a.1.total_cmp(&b.1));
    let sum_bps = hosts * apps.iter().map(|app| app.on_wire(network).2 * 8.0 * app.per_second).sum::<f64>();
    Missed { app, overload: (sum_bps > bps).then_some((sum_bps, bps)), changes, exhaustive }
}

impl Network {
    /// Assigns applications to levels so that every deadline is met on every host, whatever the others do.
    /// The network's own levels are not looked at.
    ///
    /// # Errors
    /// If a value is out of range, or there is no such assignment: then which application is late, by how
    /// much, and what would help.
    pub fn assign(&self, apps: &[App]) -> Result<Assigned, Unserved> {
        if apps.is_empty() {
            return Err(Unserved::NoApps);
        }
        if self.model == Model::Paper {
            return Err(Unserved::Paper);
        }
        let network = Network { levels: Vec::new(), ..self.clone() };
        // What is wrong with the network alone.
        let probe = LevelSpec::new(Level::STRICTEST, Demand::Unlimited);
        Network { levels: vec![probe], ..network.clone() }.plan()?;
        for (index, app) in apps.iter().enumerate() {
            let value = |what: String| Unserved::Value { name: app.name.clone(), what };
            if apps[..index].iter().any(|other| other.name == app.name) {
                return Err(Unserved::Twice(app.name.clone()));
            }
            if !(14..=16_000_000).contains(&app.message) {
                return Err(value(format!("a message of {} bytes; give 14 to 16000000", app.message)));
            }
            if !(app.per_second.is_finite() && app.per_second > 0.0) {
                return Err(value(format!("{} messages a second; give a number above 0", app.per_second)));
            }
            if app.level == Some(Level::BEST_EFFORT) {
                return Err(value("level 0 is best effort and meets no deadline; use 1 to 7".to_owned()));
            }
            let (deadline_ns, least_ns) = (app.deadline.ns() as f64, app.least_ns(&network));
            if deadline_ns < least_ns {
                return Err(Unserved::Impossible { name: app.name.clone(), deadline_ns, least_ns });
            }
        }
        let (classes, exhaustive) = classes(&network, apps);
        let late = || Unserved::Missed(Box::new(missed(&network, apps, &classes, exhaustive)));
        let chosen = solve(&network, apps, &classes, exhaustive).ok_or_else(late)?;
        let levels = chosen.iter().map(|(_, _, plan)| plan.spec).collect();
        let plan = Network { levels, ..network.clone() }.plan()?;
        let mut placed: Vec<Option<Placed>> = vec![None; apps.len()];
        for (level, set, _) in &chosen {
            let on: Vec<usize> =
                (0..classes.len()).filter(|i| set & (1 << i) != 0).flat_map(|i| classes[i].clone()).collect();
            let packets: f64 = on.iter().map(|&index| f64::from(apps[index].on_wire(&network).0)).sum();
            let level_plan = plan.level(*level);
            let bound_ns =
                level_plan.filter(|plan| plan.guaranteed).and_then(|plan| plan.bound_ns).unwrap_or(f64::INFINITY);
            let wait_ns = match level_plan {
                Some(plan) if plan.charge == Charge::Packet => {
                    (packets - 1.0) * plan.epoch_ns.unwrap_or(f64::INFINITY).ceil()
                }
                _ => 0.0,
            };
            for index in on {
                let latency_ns = wait_ns + bound_ns;
                // Planned forwards, it must still be in time; if not, it is not offered.
                if latency_ns > apps[index].deadline.ns() as f64 {
                    return Err(late());
                }
                placed[index] = Some(Placed { app: apps[index].clone(), level: *level, wait_ns, latency_ns });
            }
        }
        Ok(Assigned { plan, apps: placed.into_iter().flatten().collect(), exhaustive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Delays;
    use proptest::prelude::*;

    fn network(hosts: u32) -> Network {
        Network {
            hosts,
            link_rate: "10gbit".parse().unwrap(),
            max_packet: 256,
            delays: Delays::Given(Nanos::from_ns(4_000)),
            wire_overhead: 24,
            tagged: false,
            model: Model::Strict,
            levels: Vec::new(),
        }
    }

    fn app(name: &str, message: u32, per_second: f64, deadline: &str) -> App {
        App { name: name.to_owned(), message, per_second, deadline: deadline.parse().unwrap(), level: None }
    }

    fn check(assigned: &Assigned) {
        for placed in &assigned.apps {
            assert!(placed.latency_ns <= placed.app.deadline.ns() as f64, "{placed:?}");
            let plan = assigned.plan.level(placed.level).unwrap();
            assert!(plan.guaranteed && plan.bound_ns.unwrap() <= placed.latency_ns);
            assert!(placed.app.level.is_none_or(|level| level == placed.level));
        }
        for level in &assigned.plan.levels {
            let demand: f64 = assigned
                .apps
                .iter()
                .filter(|placed| placed.level == level.spec.level)
                .map(|placed| placed.app.on_wire(&assigned.plan.network).2 * 8.0 * placed.app.per_second)
                .sum();
            assert!(level.rate_bps.unwrap() >= demand, "{level:?} {demand}");
        }
    }

    #[test]
    fn one_application_gets_the_longest_epoch() {
        let assigned = network(12).assign(&[app("ptp", 128, 1_000.0, "100us")]).unwrap();
        check(&assigned);
        assert_eq!(assigned.apps[0].level, Level::STRICTEST);
        // A packet each millisecond, and a thousandth more.
        let epoch = assigned.plan.levels[0].epoch_ns.unwrap();
        assert!((epoch * MARGIN / 1e6 - 1.0).abs() < 1e-4, "{epoch}");
    }

    #[test]
    fn what_is_declared_never_waits_longer_than_promised() {
        // The limiter itself, and messages at exactly the declared rate.
        for (message, per_second, deadline, rate) in [
            (128, 3e6, "10us", "100gbit"),
            (128, 7e5, "10us", "10gbit"),
            (60_000, 1e4, "2ms", "100gbit"),
            (60_000, 7.0, "10ms", "10gbit"),
            (600_000, 0.001, "1s", "10gbit"),
        ] {
            let network = Network { link_rate: rate.parse().unwrap(), ..network(2) };
            let app = app("it", message, per_second, deadline);
            let assigned = network.assign(std::slice::from_ref(&app)).unwrap();
            let limit = assigned.plan.levels[0].limit().unwrap();
            let rule = crate::sim::limiter::Rule { limit, window: None };
            let mut limiter = crate::sim::limiter::Limiter::new(0);
            let (count, frame, _) = app.on_wire(&network);
            for number in 1..20_000u64 {
                let due_ns = (number as f64 * 1e9 / per_second) as u64;
                let mut at_ns = due_ns;
                for index in 0..count {
                    // Full frames, and a last one with the rest.
                    let rest = app.message + (count - 1) * HEADERS - (count - 1) * frame;
                    let size = if count > 1 && index + 1 == count { rest.min(frame) } else { frame };
                    at_ns = limiter.earliest_ns(&rule, size, at_ns).unwrap();
                    assert!(limiter.admit(&rule, size, at_ns));
                }
                let wait_ns = (at_ns - due_ns) as f64;
                assert!(wait_ns <= assigned.apps[0].wait_ns, "{message} B, number {number}: {wait_ns}");
            }
        }
    }

    #[test]
    fn tight_and_loose_deadlines_part() {
        let apps = [
            app("bulk", 60_000, 20.0, "20ms"),
            app("barrier", 128, 5_000.0, "50us"),
            app("cache", 1_024, 3_000.0, "1ms"),
        ];
        let assigned = network(48).assign(&apps).unwrap();
        check(&assigned);
        let level = |name: &str| assigned.apps.iter().find(|p| p.app.name == name).unwrap().level;
        assert!(level("barrier") > level("cache") && level("cache") > level("bulk"), "{:?}", assigned.apps);
        assert!(assigned.exhaustive);
    }

    #[test]
    fn keeps_the_levels_that_were_asked_for() {
        let mut apps = [app("a", 128, 100.0, "1ms"), app("b", 128, 100.0, "500us"), app("c", 128, 100.0, "2ms")];
        apps[0].level = Level::new(3);
        apps[2].level = Level::new(5);
        let assigned = network(12).assign(&apps).unwrap();
        check(&assigned);
        assert_eq!((assigned.apps[0].level.number(), assigned.apps[2].level.number()), (3, 5));
    }

    #[test]
    fn says_what_is_late_and_what_would_help() {
        let error = network(1_000).assign(&[app("ptp", 256, 1_000.0, "50us")]).unwrap_err();
        let Unserved::Missed(missed) = &error else { panic!("{error}") };
        let (name, deadline_ns, earliest_ns) = missed.app.clone().unwrap();
        // 1000 x 224 ns + 4 us.
        assert_eq!((name.as_str(), deadline_ns), ("ptp", 50_000.0));
        assert!((earliest_ns / 228_000.0 - 1.0).abs() < 2e-3, "{earliest_ns}");
        let text = error.to_string();
        for part in ["app 'ptp' cannot be served within 50us", "178", "hosts", "a link of", "a deadline of"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        // More than the link carries is called so, and so is the remedy.
        let error = network(12).assign(&[app("flood", 256, 1e6, "1ms")]).unwrap_err().to_string();
        for part in ["all hosts together send 26.88gbit", "of the messages a second"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // Each change, made, does.
        let hosts = missed.changes.iter().find(|(what, _)| what.ends_with(" hosts")).unwrap();
        let n: u32 = hosts.0.split(' ').next().unwrap().parse().unwrap();
        assert!(network(n).assign(&[app("ptp", 256, 1_000.0, "50us")]).is_ok());
        assert!(network(n + 2).assign(&[app("ptp", 256, 1_000.0, "50us")]).is_err());
    }

    #[test]
    fn refuses_bad_values() {
        let refuse = |apps: &[App]| network(12).assign(apps).unwrap_err().to_string();
        assert!(refuse(&[]).contains("no application"));
        let ok = app("a", 128, 10.0, "1ms");
        assert!(refuse(&[ok.clone(), ok.clone()]).contains("twice"));
        for (change, part) in [
            (App { message: 3, ..ok.clone() }, "14 to 16000000"),
            (App { per_second: 0.0, ..ok.clone() }, "above 0"),
            (App { per_second: f64::NAN, ..ok.clone() }, "above 0"),
            (App { level: Level::new(0), ..ok.clone() }, "best effort"),
            (App { deadline: Nanos::from_ns(3_000), ..ok.clone() }, "idle network"),
        ] {
            let text = refuse(&[change]);
            assert!(text.contains(part), "{text}");
        }
        let paper = Network { model: Model::Paper, ..network(12) };
        assert_eq!(paper.assign(&[ok]), Err(Unserved::Paper));
    }

    #[test]
    fn serves_two_hundred_applications() {
        let apps: Vec<App> = (0..200u32)
            .map(|i| app(&format!("app{i}"), 100 + i * 5, 5.0 + f64::from(i % 7), &format!("{}us", 5_000 + 200 * i)))
            .collect();
        let assigned = network(50).assign(&apps).unwrap();
        check(&assigned);
        assert!(!assigned.exhaustive);
        // And says what to do where it cannot.
        let error = network(100).assign(&apps).unwrap_err().to_string();
        assert!(error.contains("more than 8 classes") && error.contains(" hosts"), "{error}");
    }

    /// Every way to divide `count` applications into levels from 7 down.
    fn divisions(count: usize) -> Vec<Vec<u8>> {
        let mut all = vec![vec![]];
        for _ in 0..count {
            all = all
                .into_iter()
                .flat_map(|way: Vec<u8>| (0..count as u8).map(move |level| [way.clone(), vec![7 - level]].concat()))
                .collect();
        }
        // No gaps: a gap is the same plan with other numbers.
        all.retain(|way| {
            let least = way.iter().min().copied().unwrap_or(7);
            (least..=7).all(|level| way.contains(&level))
        });
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn finds_a_way_if_there_is_one(
            hosts in 2u32..200,
            fan_in in any::<bool>(),
            wanted in prop::collection::vec((64u32..1_500, 10.0f64..20_000.0, 10.0f64..3_000.0), 1..4),
        ) {
            let model = if fan_in { Model::FanIn } else { Model::Strict };
            let network = Network { model, ..network(hosts) };
            let apps: Vec<App> = wanted
                .iter()
                .enumerate()
                .map(|(i, &(message, per_second, us))| app(&i.to_string(), message, per_second, &format!("{us:.3}us")))
                .collect();
            let solved = network.assign(&apps);
            if let Ok(assigned) = &solved {
                check(assigned);
            }
            // By brute force, forwards, with the rate that the demand needs and some larger ones.
            let found = divisions(apps.len()).into_iter().find(|way| {
                [1.0011, 1.3, 2.0, 4.0].into_iter().any(|more| {
                    let levels: Vec<LevelSpec> = (1..8)
                        .filter(|number| way.contains(number))
                        .map(|number| {
                            let on: Vec<&App> = apps.iter().zip(way).filter(|(_, l)| **l == number).map(|(a, _)| a).collect();
                            let frame = on.iter().map(|a| a.message).max().unwrap();
                            let packets: f64 = on.iter().map(|a| a.per_second).sum();
                            let bits = f64::from(on_wire(frame, 24)) * 8.0;
                            let demand = Demand::Rate(rate_of(packets * bits * if on.len() > 1 { more } else { 1.0011 }));
                            let level = Level::new(number).unwrap();
                            LevelSpec { charge: Some(Charge::Packet), max_packet: Some(frame), ..LevelSpec::new(level, demand) }
                        })
                        .collect();
                    let Ok(plan) = (Network { levels, ..network.clone() }).plan() else { return false };
                    apps.iter().zip(way).all(|(app, &number)| {
                        let level = plan.level(Level::new(number).unwrap()).unwrap();
                        let others = way.iter().filter(|other| **other == number).count() as f64 - 1.0;
                        level.guaranteed
                            && level.bound_ns.unwrap() + others * level.epoch_ns.unwrap() <= app.deadline.ns() as f64
                    })
                })
            });
            prop_assert!(solved.is_ok() || found.is_none(), "{:?} but {found:?}", solved.err());
        }
    }
}
