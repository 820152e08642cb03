//! What a run measured.

use hdrhistogram::Histogram;
use qjump_ebpf::LEVELS;

use super::topology::Picos;

/// Which packet took longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Worst {
    /// Host that sent it.
    pub source: u32,
    /// Host that it went to.
    pub destination: u32,
    /// When it left the limiter, ps.
    pub sent_ps: Picos,
}

/// What became of one level's packets.
#[derive(Clone, Debug, Default)]
pub struct LevelOutcome {
    /// Packets that left a limiter.
    pub sent: u64,
    /// Packets that no limit would ever let go: too large.
    pub refused: u64,
    /// Packets that travelled at level 0 instead: too large, or of a level that the plan does not have.
    pub demoted: u64,
    /// Packets that a full buffer lost.
    pub lost: u64,
    /// Packets that came later than the bound.
    pub violations: u64,
    /// The longest time in the network, exactly, ps.
    pub max_ps: Picos,
    /// That packet.
    pub worst: Worst,
    /// All times in the network, ns; allocated with the first one.
    times: Option<Box<Histogram<u64>>>,
}

/// What a run measured.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// One for each level.
    pub levels: [LevelOutcome; LEVELS],
    /// Frames that ports sent.
    pub packet_hops: u64,
    /// Events handled.
    pub events: u64,
    /// Most packets in the network at once.
    pub most_in_flight: usize,
    /// When the last packet was delivered, ps.
    pub ended_ps: Picos,
}

impl LevelOutcome {
    #[inline]
    pub(super) fn delivered(&mut self, time_ps: Picos, bound_ps: Option<Picos>, packet: Worst) {
        if time_ps > self.max_ps {
            self.max_ps = time_ps;
            self.worst = packet;
        }
        if bound_ps.is_some_and(|bound| time_ps > bound) {
            self.violations += 1;
        }
        let times = self.times.get_or_insert_with(|| {
            // Three digits are enough for a curve; the maximum is exact beside it.
            let mut histogram = Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are valid"));
            histogram.auto(true);
            Box::new(histogram)
        });
        times.record(time_ps / 1_000).unwrap_or_else(|_| unreachable!("it grows as needed"));
    }

    /// All times in the network, ns.
    pub fn times(&self) -> Option<&Histogram<u64>> {
        self.times.as_deref()
    }

    /// Whether a bound was broken: a packet came later, or never.
    pub fn broken(&self, bound_ps: Option<Picos>) -> bool {
        bound_ps.is_some() && (self.violations > 0 || self.lost > 0)
    }

    /// The time that this share of packets did not exceed, ns; `None` if they are too few to say.
    pub fn quantile_ns(&self, share: f64) -> Option<f64> {
        let times = self.times.as_ref().filter(|times| times.len() as f64 * (1.0 - share) >= 1.0)?;
        // A class of the histogram may reach beyond the largest time in it.
        Some((times.value_at_quantile(share) as f64).min(self.max_ps as f64 / 1e3))
    }

    /// Packets delivered.
    pub fn delivered_count(&self) -> u64 {
        self.times.as_ref().map_or(0, |times| times.len())
    }

    fn merge(&mut self, other: &Self) {
        self.sent += other.sent;
        self.refused += other.refused;
        self.demoted += other.demoted;
        self.lost += other.lost;
        self.violations += other.violations;
        if other.max_ps > self.max_ps {
            (self.max_ps, self.worst) = (other.max_ps, other.worst);
        }
        match (&mut self.times, &other.times) {
            (Some(mine), Some(theirs)) => {
                mine.add(theirs.as_ref()).unwrap_or_else(|_| unreachable!("both grow as needed"));
            }
            (mine @ None, theirs) => mine.clone_from(theirs),
            (Some(_), None) => {}
        }
    }
}

impl Outcome {
    /// Adds another run of the same network.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.levels.iter_mut().zip(&other.levels) {
            mine.merge(theirs);
        }
        self.packet_hops += other.packet_hops;
        self.events += other.events;
        self.most_in_flight = self.most_in_flight.max(other.most_in_flight);
        self.ended_ps = self.ended_ps.max(other.ended_ps);
    }
}
