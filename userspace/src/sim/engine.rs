//! The event loop: packets, ports, queues and time.
//!
//! Every port has eight first-in-first-out queues, serves the highest level that has something, and never
//! interrupts a frame. A packet is in the next port's queue when its last bit has arrived and the switch
//! has forwarded it. Memory holds the packets in flight, not those that were sent.
//!
//! Events at the same instant run in one order: arrivals before ports choose what to send next, so that
//! no level is better off by a coincidence, and arrivals by their tie number, which an adversary may choose.

use std::{cmp::Reverse, collections::BinaryHeap};

use qjump_ebpf::LEVELS;

use super::{
    limiter::{Limiter, Rule, Verdict},
    outcome::{Outcome, Worst},
    scenario::scramble,
    source::Source,
    topology::{MAX_HOPS, Picos, Topology},
};
use crate::plan::delays::on_wire;

/// Lower-level traffic beside the sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Background {
    /// None.
    #[default]
    None,
    /// A port that has nothing to send always began such a frame just before the next packet came: the worst that
    /// any lower-level traffic can do.
    Worst(Lower),
    /// The same, but part of such a frame, another part each time: delays that vary.
    Part(Lower),
}

/// Wire bytes of lower levels that cannot be interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lower {
    /// At a port of a switch: one frame.
    pub frame: u32,
    /// At a host's own port: what the NIC has begun to send.
    pub host: u32,
}

impl Lower {
    fn at(self, port: usize, hosts: usize) -> u32 {
        if port < hosts { self.host } else { self.frame }
    }
}

/// A host's clock against true time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// How much faster than true time it runs, parts in 10^9.
    pub fast_ppb: i64,
}

impl Clock {
    /// True time of a time on this clock.
    fn true_ps(self, local_ns: u64) -> Picos {
        if self.fast_ppb == 0 {
            return local_ns.saturating_mul(1_000);
        }
        let rate = (1_000_000_000 + self.fast_ppb) as u128;
        // Rounded up, so that the clock shows `local_ns` by then.
        u64::try_from((u128::from(local_ns) * 1_000_000_000_000).div_ceil(rate)).unwrap_or(Picos::MAX)
    }

    /// The time on this clock, whole ns.
    fn local_ns(self, true_ps: Picos) -> u64 {
        if self.fast_ppb == 0 {
            return true_ps / 1_000;
        }
        let rate = (1_000_000_000 + self.fast_ppb) as u128;
        (u128::from(true_ps) * rate / 1_000_000_000_000) as u64
    }
}

/// All that a run depends on.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// The network.
    pub topology: &'a Topology,
    /// Each level's limiter; packets of a level without one travel at level 0, as the kernel's program has it.
    pub rules: [Option<Rule>; LEVELS],
    /// Each level's bound, ps; later is a violation.
    pub bounds_ps: [Option<Picos>; LEVELS],
    /// Bytes that a frame takes on the wire beside its L2 bytes.
    pub wire_overhead: u32,
    /// One for each host, or none where all are true.
    pub clocks: &'a [Clock],
    /// Lower-level traffic.
    pub background: Background,
    /// Wire bytes that each queue of a port can hold; `None` without limit.
    pub buffer: Option<u64>,
    /// No packet is sent later.
    pub until_ps: Picos,
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Packet {
    sent_ps: Picos,
    ports: [u32; MAX_HOPS],
    /// L2 bytes would do for the report; wire bytes are what takes time.
    wire: u32,
    next: u32,
    source: u32,
    tie: u32,
    hop: u8,
    hops: u8,
    level: u8,
}

#[derive(Clone, Copy)]
struct Port {
    busy_until_ps: Picos,
    /// ps a byte, times 2^10, rounded up.
    price: u64,
    delay_ps: Picos,
    held: [u64; LEVELS],
    head: [u32; LEVELS],
    tail: [u32; LEVELS],
    /// A bit for each level that has a packet.
    waiting: u8,
    /// Whether a wake-up is due at `busy_until_ps`.
    armed: bool,
}

impl Port {
    #[inline]
    fn time_ps(&self, wire: u32) -> Picos {
        (u64::from(wire) * self.price).div_ceil(1 << 10)
    }
}

/// What happens at a time. The order of two events at one instant is the order of `rank`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at_ps: Picos,
    /// Two bits of kind, tie number, and what it is about.
    rank: u64,
}

const ARRIVE: u64 = 0;
const SEND: u64 = 1;
const WAKE: u64 = 2;

impl Event {
    #[inline]
    fn new(at_ps: Picos, kind: u64, tie: u32, about: u32) -> Reverse<Self> {
        Reverse(Self { at_ps, rank: (kind << 62) | (u64::from(tie & 0x3fff_ffff) << 32) | u64::from(about) })
    }
}

struct Engine<'a> {
    setup: &'a Setup<'a>,
    ports: Vec<Port>,
    packets: Vec<Packet>,
    /// Free places in `packets`, linked by `next`.
    free: u32,
    events: BinaryHeap<Reverse<Event>>,
    /// Ports below this are hosts' own.
    hosts: usize,
    outcome: Outcome,
}

impl Engine<'_> {
    fn store(&mut self, packet: Packet) -> u32 {
        if self.free == NONE {
            self.packets.push(packet);
            self.outcome.most_in_flight = self.packets.len();
            (self.packets.len() - 1) as u32
        } else {
            let place = self.free;
            self.free = self.packets[place as usize].next;
            self.packets[place as usize] = packet;
            place
        }
    }

    fn forget(&mut self, place: u32) {
        self.packets[place as usize].next = self.free;
        self.free = place;
    }

    /// A packet is at its next port.
    #[inline]
    fn arrive(&mut self, place: u32, now: Picos) {
        let packet = &self.packets[place as usize];
        let index = packet.ports[usize::from(packet.hop)] as usize;
        let (level, wire) = (usize::from(packet.level), packet.wire);
        let port = &mut self.ports[index];
        if now >= port.busy_until_ps && port.waiting == 0 {
            match self.setup.background {
                // The lower frame began an instant ago.
                Background::Worst(lower) => port.busy_until_ps = now + port.time_ps(lower.at(index, self.hosts)),
                Background::Part(lower) => {
                    let part = scramble(now, index as u64) % (u64::from(lower.at(index, self.hosts)) + 1);
                    port.busy_until_ps = now + port.time_ps(part as u32);
                }
                Background::None => {
                    self.transmit(index, place, now);
                    return;
                }
            }
        }
        if self.setup.buffer.is_some_and(|buffer| port.held[level] + u64::from(wire) > buffer) {
            self.outcome.levels[level].lost += 1;
            self.forget(place);
            return;
        }
        port.held[level] += u64::from(wire);
        if port.waiting & (1 << level) == 0 {
            port.waiting |= 1 << level;
            port.head[level] = place;
        } else {
            self.packets[port.tail[level] as usize].next = place;
        }
        port.tail[level] = place;
        if !port.armed {
            port.armed = true;
            self.events.push(Event::new(port.busy_until_ps, WAKE, 0, index as u32));
        }
    }

    /// A port has sent its frame.
    #[inline]
    fn wake(&mut self, index: usize, now: Picos) {
        let port = &mut self.ports[index];
        port.armed = false;
        if port.waiting == 0 {
            return;
        }
        let level = 7 - port.waiting.leading_zeros() as usize;
        let place = port.head[level];
        let packet = &self.packets[place as usize];
        if port.tail[level] == place {
            port.waiting &= !(1 << level);
        } else {
            port.head[level] = packet.next;
        }
        port.held[level] -= u64::from(packet.wire);
        let more = port.waiting != 0;
        self.transmit(index, place, now);
        if more {
            let port = &mut self.ports[index];
            port.armed = true;
            self.events.push(Event::new(port.busy_until_ps, WAKE, 0, index as u32));
        }
    }

    #[inline]
    fn transmit(&mut self, index: usize, place: u32, now: Picos) {
        self.outcome.packet_hops += 1;
        let port = &mut self.ports[index];
        let packet = &mut self.packets[place as usize];
        port.busy_until_ps = now + port.time_ps(packet.wire);
        let there = port.busy_until_ps + port.delay_ps;
        packet.hop += 1;
        if packet.hop == packet.hops {
            let level = usize::from(packet.level);
            let destination = self.setup.topology.host_behind(index as u32);
            let worst = Worst { source: packet.source, destination, sent_ps: packet.sent_ps };
            self.outcome.levels[level].delivered(there - packet.sent_ps, self.setup.bounds_ps[level], worst);
            self.outcome.ended_ps = self.outcome.ended_ps.max(there);
            self.forget(place);
        } else {
            let tie = packet.tie;
            self.events.push(Event::new(there, ARRIVE, tie, place));
        }
    }
}

/// Runs a network until everything that was sent until `until_ps` has been delivered or lost.
pub fn run(setup: &Setup<'_>, sources: &mut [Source]) -> Outcome {
    let clock = |host: u32| setup.clocks.get(host as usize).copied().unwrap_or_default();
    let ports = setup.topology.links().iter().map(|link| Port {
        busy_until_ps: 0,
        price: (8_000_000_000_000u128 << 10).div_ceil(u128::from(link.rate_bps)) as u64,
        delay_ps: link.delay_ps,
        held: [0; LEVELS],
        head: [NONE; LEVELS],
        tail: [NONE; LEVELS],
        waiting: 0,
        armed: false,
    });
    let mut engine = Engine {
        setup,
        ports: ports.collect(),
        packets: Vec::new(),
        free: NONE,
        events: BinaryHeap::new(),
        hosts: setup.topology.shape().hosts() as usize,
        outcome: Outcome::default(),
    };
    let mut limiters: Vec<Limiter> = sources.iter().map(|_| Limiter::new(0)).collect();
    for (index, source) in sources.iter_mut().enumerate() {
        if let Some(first_ns) = source.first_ns() {
            let at = clock(source.host()).true_ps(first_ns);
            engine.events.push(Event::new(at, SEND, source.tie(), index as u32));
        }
    }
    while let Some(Reverse(event)) = engine.events.pop() {
        let (now, about) = (event.at_ps, event.rank as u32);
        engine.outcome.events += 1;
        match event.rank >> 62 {
            ARRIVE => engine.arrive(about, now),
            WAKE => engine.wake(about as usize, now),
            _ => {
                if now > setup.until_ps {
                    continue;
                }
                let source = &mut sources[about as usize];
                let host = source.host();
                let local_ns = clock(host).local_ns(now);
                let level = usize::from(source.level());
                let message = source.message();
                let limiter = &mut limiters[about as usize];
                let rule = &setup.rules[level];
                let travels = match rule {
                    Some(rule) => match rule.verdict(message.l2_bytes) {
                        Verdict::Limited if limiter.admit(rule, message.l2_bytes, local_ns) => Some(level),
                        Verdict::Demoted => Some(0),
                        Verdict::Limited | Verdict::Dropped => None,
                    },
                    None => Some(0),
                };
                match travels {
                    None => engine.outcome.levels[level].refused += 1,
                    Some(travels) => {
                        engine.outcome.levels[level].demoted += u64::from(travels != level);
                        engine.outcome.levels[travels].sent += 1;
                        let route = setup.topology.route(host, message.destination, about);
                        let place = engine.store(Packet {
                            sent_ps: now,
                            ports: route.ports,
                            wire: on_wire(message.l2_bytes, setup.wire_overhead),
                            next: NONE,
                            source: host,
                            tie: source.tie(),
                            hop: 0,
                            hops: route.len,
                            level: travels as u8,
                        });
                        engine.arrive(place, now);
                    }
                }
                // The next packet, when the limiter will let it go. One that it never lets go is due at once: then
                // it is refused or demoted. Were all of a saturating source so, time would stand still.
                if let Some(due_ns) = source.advance(local_ns) {
                    let at_ns = match rule {
                        Some(rule) => limiter
                            .earliest_ns(rule, source.message().l2_bytes, due_ns)
                            .unwrap_or(due_ns + u64::from(source.endless())),
                        None => due_ns + u64::from(source.endless()),
                    };
                    let at = clock(host).true_ps(at_ns).max(now);
                    // Beyond the end of time, there is nothing.
                    if at <= setup.until_ps && at < Picos::MAX / 2 {
                        engine.events.push(Event::new(at, SEND, source.tie(), about));
                    }
                }
            }
        }
    }
    engine.outcome
}
