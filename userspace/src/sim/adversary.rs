//! An adversary that knows the network and chooses when every host sends, and where to.
//!
//! Coordinate descent with restarts from the best: change one host's schedule, keep it if the worst packet
//! gets no better. Most changes aim at the packet that is worst so far: they send another one so that the
//! two meet.

use qjump_ebpf::{Charge, Level};
use rand::RngExt as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};

use super::{
    limiter::Kind,
    outcome::{Outcome, Worst},
    scenario::{Destinations, Scenario},
    source::{Message, Script},
    topology::Topology,
};
use crate::plan::delays::on_wire;

/// Packets of each host and level: enough for the window of two bounds around one packet, and for what
/// delays the packets that delay it.
const PACKETS: usize = 4;

/// One host's schedule at one level.
#[derive(Clone, Debug, PartialEq)]
struct Track {
    host: u32,
    level: Level,
    epoch_ns: u64,
    largest: u32,
    by_bytes: bool,
    /// When the first packet goes, ns.
    first_ns: u64,
    /// Beyond one epoch after the one before, ns; where to; L2 bytes.
    packets: Vec<(u64, u32, u32)>,
}

impl Track {
    fn messages(&self) -> Vec<(u64, Message)> {
        let mut at = self.first_ns;
        let mut messages = Vec::with_capacity(self.packets.len());
        for (index, &(gap_ns, destination, l2_bytes)) in self.packets.iter().enumerate() {
            if index > 0 {
                // A bucket may send at once; what it may not, its limiter holds.
                at += gap_ns + if self.by_bytes { 0 } else { self.epoch_ns };
            }
            messages.push((at, Message { destination, l2_bytes }));
        }
        messages
    }
}

/// The worst that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Longest time over bound, of the level where that is most.
    pub ratio: f64,
    /// That level.
    pub level: Level,
    /// That packet.
    pub worst: Worst,
    /// What all hosts send.
    pub scripts: Vec<Script>,
    /// Runs it took.
    pub runs: u32,
}

struct Search<'a> {
    scenario: &'a Scenario,
    topology: Topology,
    until_ps: u64,
    random: Xoshiro256PlusPlus,
}

impl Search<'_> {
    fn judge(&self, tracks: &[Track]) -> (f64, Level, Worst) {
        let outcome = self.scenario.run_scripts_on(&self.topology, scripts(tracks), self.until_ps);
        worst_of(self.scenario, &outcome)
    }

    fn destination(&mut self, host: u32) -> u32 {
        let hosts = self.scenario.shape.hosts();
        match self.scenario.destinations {
            Destinations::One => hosts - 1,
            Destinations::Permutation => (host + 1) % hosts,
            Destinations::Any => {
                let other = self.random.random_range(0..hosts - 1);
                if other >= host { other + 1 } else { other }
            }
        }
    }

    fn size(&mut self, track: &Track) -> u32 {
        // Small packets matter most where they cost less than a whole one.
        if self.random.random_bool(if track.by_bytes { 0.5 } else { 0.1 }) {
            self.random.random_range(14..=track.largest)
        } else {
            track.largest
        }
    }

    /// Changes one track.
    fn change(&mut self, track: &mut Track, bound_ns: f64, worst: (Level, Worst)) {
        let (level, worst) = worst;
        let packet = self.random.random_range(0..track.packets.len());
        match self.random.random_range(0..10) {
            0 => track.first_ns = self.random.random_range(0..2 * track.epoch_ns.max(1)),
            1 => {
                let most = if track.by_bytes { track.epoch_ns } else { bound_ns as u64 };
                track.packets[packet].0 = self.random.random_range(0..=most.max(1));
            }
            2 => track.packets[packet].0 = 0,
            3 => track.packets[packet].1 = self.destination(track.host),
            4 => track.packets[packet].2 = self.size(track),
            _ if track.level >= level => {
                // Meet the worst packet, at its last port or on the way there.
                let wire = on_wire(track.largest, self.scenario.plan.network.overhead());
                if track.host != worst.destination {
                    if self.scenario.destinations == Destinations::Any && self.random.random_bool(0.7) {
                        track.packets[packet].1 = worst.destination;
                    }
                    let target = track.packets[packet].1;
                    let own = self.scenario.travel_ps(&self.topology, track.host, target, wire);
                    let other = self.scenario.travel_ps(&self.topology, worst.source, worst.destination, wire);
                    let meet_ns = (worst.sent_ps + other).saturating_sub(own) / 1_000;
                    let now = track.messages()[packet].0;
                    let off = match self.random.random_range(0..3) {
                        0 => 0,
                        _ => self.random.random_range(0..=(bound_ns as u64).max(1)),
                    };
                    let wanted = if self.random.random_bool(0.5) { meet_ns + off } else { meet_ns.saturating_sub(off) };
                    track.first_ns = (track.first_ns + wanted).saturating_sub(now);
                }
            }
            _ => track.first_ns = self.random.random_range(0..2 * track.epoch_ns.max(1)),
        }
    }
}

fn scripts(tracks: &[Track]) -> Vec<Script> {
    let script = |track: &Track| Script { host: track.host, level: track.level, messages: track.messages() };
    tracks.iter().map(script).collect()
}

fn worst_of(scenario: &Scenario, outcome: &Outcome) -> (f64, Level, Worst) {
    let bounds = scenario.bounds_ps();
    (0..qjump_ebpf::LEVELS as u8)
        .filter_map(Level::new)
        .filter_map(|level| {
            let result = &outcome.levels[level.index()];
            Some((result.max_ps as f64 / bounds[level.index()]? as f64, level, result.worst))
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap_or((0.0, Level::BEST_EFFORT, Worst::default()))
}

impl Search<'_> {
    /// Where to begin: first packets meet at the end of their paths. `focused`: all at the last host, else where
    /// the scenario sends them.
    fn start(&mut self, focused: bool) -> Vec<Track> {
        let scenario = self.scenario;
        let overhead = scenario.plan.network.overhead();
        let last = scenario.shape.hosts() - 1;
        let mut tracks = Vec::new();
        for plan in &scenario.plan.levels {
            let (Some(epoch_ns), Some(bound_ns)) = (plan.epoch_ns, plan.bound_ns) else { continue };
            // A window, too, lets more than one packet go at once.
            let by_bytes = plan.charge != Charge::Packet || scenario.limiter == Kind::Window;
            let largest = plan.largest_frame(scenario.plan.network.mtu());
            let wire = on_wire(largest, overhead);
            // A bucket's packets may be many to an epoch: one burst, and small ones behind it.
            let burst = (plan.burst_bytes.unwrap_or(0.0) / f64::from(wire)).ceil() as usize;
            let count = if by_bytes { PACKETS + 12 + burst.min(12) } else { PACKETS };
            let small = largest.min(60);
            let packet = |index: usize| match scenario.limiter {
                // A small packet begins a window, its end has the rest of the budget, and the next one begins.
                Kind::Window if index == 0 => (0, small),
                Kind::Window if index == 1 => {
                    let room = wire.saturating_sub(on_wire(small, overhead)).saturating_sub(overhead);
                    (epoch_ns as u64 * 99 / 100, room.max(14).min(largest))
                }
                Kind::Gcra if by_bytes && index >= burst.max(1) => (0, small),
                _ => (0, largest),
            };
            for host in scenario.senders(plan.spec.level, plan.max_senders) {
                if host == last && (focused || scenario.destinations == Destinations::One) {
                    continue;
                }
                let packets: Vec<(u64, u32, u32)> = (0..count)
                    .map(|index| {
                        let (gap_ns, l2_bytes) = packet(index);
                        (gap_ns, if focused { last } else { self.destination(host) }, l2_bytes)
                    })
                    .collect();
                let travel_ns = scenario.travel_ps(&self.topology, host, packets[0].1, wire) / 1_000;
                tracks.push(Track {
                    host,
                    level: plan.spec.level,
                    epoch_ns: epoch_ns.ceil() as u64,
                    largest,
                    by_bytes,
                    first_ns: (2.0 * (epoch_ns + bound_ns)) as u64 - travel_ns.min(2 * bound_ns as u64),
                    packets,
                });
            }
        }
        tracks
    }

    /// Climbs from there, so many runs.
    fn climb(&mut self, mut tracks: Vec<Track>, steps: u32) -> Found {
        let (mut ratio, mut level, mut worst) = self.judge(&tracks);
        let mut runs = 1;
        while runs < steps && !tracks.is_empty() {
            let index = self.random.random_range(0..tracks.len());
            let plan = self.scenario.plan.level(tracks[index].level);
            let bound_ns = plan.and_then(|plan| plan.bound_ns).unwrap_or(1.0);
            let before = tracks[index].clone();
            let mut track = before.clone();
            for _ in 0..self.random.random_range(1..=2) {
                self.change(&mut track, bound_ns, (level, worst));
            }
            tracks[index] = track;
            let judged = self.judge(&tracks);
            runs += 1;
            if judged.0 >= ratio {
                (ratio, level, worst) = judged;
            } else {
                tracks[index] = before;
            }
        }
        Found { ratio, level, worst, scripts: scripts(&tracks), runs }
    }
}

/// Searches for the schedule that makes some packet latest against its bound. `steps` runs of the network.
pub fn search(scenario: &Scenario, steps: u32) -> Found {
    let random = Xoshiro256PlusPlus::seed_from_u64(scenario.seed ^ 0xad7e);
    let mut search = Search { scenario, topology: scenario.topology(), until_ps: u64::MAX, random };
    let free = scenario.destinations == Destinations::Any;
    let tracks = search.start(false);
    let found = search.climb(tracks, if free { steps.div_ceil(2) } else { steps });
    if !free {
        return found;
    }
    // Where anybody may send anywhere, all to one host is another place to begin.
    let tracks = search.start(true);
    let focused = search.climb(tracks, steps / 2);
    let runs = found.runs + focused.runs;
    Found { runs, ..if focused.ratio > found.ratio { focused } else { found } }
}
