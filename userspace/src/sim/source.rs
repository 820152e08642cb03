//! What hosts want to send: the traffic before the limiter.

use qjump_ebpf::Level;
use rand::RngExt as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};

/// When a source wants to send.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// Always: as fast as the limiter allows, from `phase_ns` on its clock.
    Saturating {
        /// Time of the first packet, ns.
        phase_ns: u64,
    },
    /// At random times, so many packets a second on average.
    Poisson {
        /// Packets a second.
        per_second: f64,
    },
    /// Bursts of packets at once, and silence of a random length between them.
    OnOff {
        /// Packets in a burst.
        burst: u32,
        /// Mean silence, ns.
        mean_gap_ns: f64,
    },
    /// At these times (ns on its clock), ascending, with these destinations and sizes.
    Script(Vec<(u64, Message)>),
}

/// Where packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// One host.
    One(u32),
    /// Any other of so many hosts, anew for each packet.
    Any(u32),
}

/// How large packets are, L2 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// All the same.
    Fixed(u32),
    /// Between the two, anew for each packet.
    Between(u32, u32),
}

/// A packet before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Host that it goes to.
    pub destination: u32,
    /// L2 bytes without FCS.
    pub l2_bytes: u32,
}

/// What one host sends at one level: ascending times in ns on its clock, and what.
#[derive(Clone, Debug, PartialEq)]
pub struct Script {
    /// The host.
    pub host: u32,
    /// The level.
    pub level: Level,
    /// When, and what.
    pub messages: Vec<(u64, Message)>,
}

/// One host's traffic at one level.
#[derive(Clone, Debug)]
pub struct Source {
    host: u32,
    level: u8,
    tie: u32,
    pattern: Pattern,
    target: Target,
    size: Size,
    random: Xoshiro256PlusPlus,
    /// The packet to send next.
    current: Message,
    /// Packets behind it that have been due, or the place in a script.
    behind: usize,
    /// When the application's next packet is due, ns.
    due_ns: u64,
}

impl Source {
    /// A source; `tie` orders it among others at the same instant, and `seed` makes its choices.
    pub fn new(host: u32, level: u8, pattern: Pattern, target: Target, size: Size, tie: u32, seed: u64) -> Self {
        // A stream of its own for each host and level, whatever else is in the network.
        let random = Xoshiro256PlusPlus::seed_from_u64(
            seed ^ (u64::from(host) << 8 | u64::from(level)).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        let current = Message { destination: 0, l2_bytes: 0 };
        Self { host, level, tie, pattern, target, size, random, current, behind: 0, due_ns: 0 }
    }

    /// The host.
    pub fn host(&self) -> u32 {
        self.host
    }

    /// The level.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// Its place among events of the same instant.
    pub fn tie(&self) -> u32 {
        self.tie
    }

    /// The packet to send next.
    pub fn message(&self) -> Message {
        self.current
    }

    /// Time of the first packet, ns on the host's clock; `None` without any.
    pub fn first_ns(&mut self) -> Option<u64> {
        let first = match &self.pattern {
            Pattern::Saturating { phase_ns } => *phase_ns,
            Pattern::Poisson { .. } | Pattern::OnOff { .. } => {
                self.due_ns = self.gap_ns();
                self.behind = self.burst() - 1;
                self.due_ns
            }
            Pattern::Script(messages) => messages.first()?.0,
        };
        self.choose();
        Some(first)
    }

    /// The packet has left, at `now_ns` on the host's clock: when is the next one due? `None` if there is
    /// none, and never in the past.
    pub fn advance(&mut self, now_ns: u64) -> Option<u64> {
        let due_ns = match &self.pattern {
            Pattern::Saturating { .. } => now_ns,
            Pattern::Poisson { .. } | Pattern::OnOff { .. } => {
                if self.behind > 0 {
                    self.behind -= 1;
                } else {
                    self.due_ns = self.due_ns.saturating_add(self.gap_ns());
                    self.behind = self.burst() - 1;
                }
                self.due_ns.max(now_ns)
            }
            Pattern::Script(messages) => {
                self.behind += 1;
                messages.get(self.behind)?.0.max(now_ns)
            }
        };
        self.choose();
        Some(due_ns)
    }

    /// Whether it would offer packets for ever.
    pub fn endless(&self) -> bool {
        !matches!(self.pattern, Pattern::Script(_))
    }

    fn burst(&self) -> usize {
        match self.pattern {
            Pattern::OnOff { burst, .. } => burst.max(1) as usize,
            _ => 1,
        }
    }

    fn gap_ns(&mut self) -> u64 {
        let mean = match self.pattern {
            Pattern::Poisson { per_second } => 1e9 / per_second,
            Pattern::OnOff { mean_gap_ns, .. } => mean_gap_ns,
            _ => 0.0,
        };
        let uniform: f64 = self.random.random();
        (-(1.0 - uniform).ln() * mean) as u64
    }

    fn choose(&mut self) {
        if let Pattern::Script(messages) = &self.pattern {
            self.current = messages[self.behind].1;
            return;
        }
        self.current.destination = match self.target {
            Target::One(host) => host,
            Target::Any(hosts) => {
                let other = self.random.random_range(0..hosts - 1);
                if other >= self.host { other + 1 } else { other }
            }
        };
        self.current.l2_bytes = match self.size {
            Size::Fixed(bytes) => bytes,
            Size::Between(least, most) => self.random.random_range(least..=most),
        };
    }
}
