//! What the limiter's tests share: a level in plain memory, limits as a plan would state them, and
//! the reference that the limiter is held against: exact fractions over the list of what it admitted.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::cell::Cell;

use proptest::prelude::*;
use qjump_ebpf::{
    Admission, LevelLimit, LevelState, admit,
    frame::wire_bytes,
    limiter::{MAX_BURST_NS, Oversize, word_at},
};

/// A year, ns.
pub const YEAR_NS: u64 = 365 * 24 * 3600 * 1_000_000_000;

/// What the limiter takes for a stall of a CPU rather than for a damaged word, ns.
pub const IMPLAUSIBLE_NS: u64 = 1 << 33;

/// A level in the memory of one thread.
#[derive(Clone, Debug)]
pub struct Memory {
    pub word: Cell<u64>,
    pub active: Cell<u64>,
}

impl Memory {
    pub fn new(word: u64, active: u64) -> Self {
        Self { word: Cell::new(word), active: Cell::new(active) }
    }

    /// A level that nobody used before `now_ns`. Map memory starts as zeros; only a clock that has
    /// gone half round (146 years) would take those for a time ahead.
    pub fn fresh(now_ns: u64) -> Self {
        Self::new(if now_ns < 1 << 61 { 0 } else { word_at(now_ns, 0, 0) }, 0)
    }

    /// The first time from `from_ns` on, at most `within_ns` later, at which a packet would pass; by
    /// bisection on copies, because a packet that is refused now and not later says when.
    pub fn first_admission(&self, limit: &LevelLimit, cost_ns: u64, from_ns: u64, within_ns: u64) -> Option<u64> {
        let passes = |after: u64| {
            let copy = self.clone();
            admit(&copy, copy.active.get(), limit, cost_ns, from_ns.wrapping_add(after)) == Admission::Admitted
        };
        if passes(0) {
            return Some(from_ns);
        }
        let (mut refused, mut passed) = (0, within_ns);
        if !passes(passed) {
            return None;
        }
        while passed - refused > 1 {
            let middle = refused + (passed - refused) / 2;
            if passes(middle) { passed = middle } else { refused = middle }
        }
        Some(from_ns.wrapping_add(passed))
    }
}

impl LevelState for Memory {
    fn load(&self) -> u64 {
        self.word.get()
    }

    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        let before = self.word.get();
        if before != current {
            return Err(before);
        }
        self.word.set(new);
        Ok(())
    }

    fn active_slot(&self) -> u64 {
        self.active.get()
    }
}

/// A positive fraction.
#[derive(Clone, Copy, Debug)]
pub struct Fraction {
    pub over: u128,
    pub under: u128,
}

impl Fraction {
    pub fn max(self, other: Self) -> Self {
        if self.over * other.under >= other.over * self.under { self } else { other }
    }

    pub fn min(self, other: Self) -> Self {
        if self.over * other.under <= other.over * self.under { self } else { other }
    }
}

/// An arrival curve: bytes, and bytes per ns.
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    pub burst: Fraction,
    pub rate: Fraction,
}

impl Curve {
    /// The larger burst and the larger rate.
    pub fn looser(self, other: Self) -> Self {
        Self { burst: self.burst.max(other.burst), rate: self.rate.max(other.rate) }
    }

    /// Whether `bytes` in a window of `window_ns` are within the curve, given `leave_ns` more time.
    pub fn holds(&self, bytes: u128, window_ns: u128, leave_ns: u128) -> bool {
        let Self { burst, rate } = self;
        bytes * burst.under * rate.under <= burst.over * rate.under + rate.over * burst.under * (window_ns + leave_ns)
    }
}

/// A packet that the limiter admitted: when, and the bytes that its level charges for it.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub at_ns: i128,
    pub bytes: u128,
}

/// Checks every window from one admitted packet to another, straight from the definition.
pub fn check_every_window(sent: &[Sent], curve: &Curve, leave_ns: u128) -> Result<(), TestCaseError> {
    // Of packets at the same time, the windows with all of them are the fullest.
    let same_time = sent.chunk_by(|one, other| one.at_ns == other.at_ns);
    let sent: Vec<_> =
        same_time.map(|packets| (packets[0].at_ns, packets.iter().map(|packet| packet.bytes).sum::<u128>())).collect();
    for (i, (start, _)) in sent.iter().enumerate() {
        let mut sum = 0;
        for (end, bytes) in &sent[i..] {
            sum += bytes;
            let window = u128::try_from(end - start).unwrap_or(0);
            prop_assert!(
                curve.holds(sum, window, leave_ns),
                "{sum} bytes in {window} ns from {start}, over {curve:?} and {leave_ns} ns of leave"
            );
        }
    }
    Ok(())
}

/// One level of a plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spec {
    Packet { epoch_ns: u64, tolerance_ns: u64, max_packet: u32 },
    Byte { rate_bps: u64, burst_bytes: u64, max_packet: u32 },
    Unlimited,
    NotConfigured,
}

impl Spec {
    pub fn limit(&self) -> LevelLimit {
        match *self {
            Self::Packet { epoch_ns, tolerance_ns, max_packet } => {
                LevelLimit::per_packet(epoch_ns, tolerance_ns, max_packet, Oversize::Demote).unwrap()
            }
            Self::Byte { rate_bps, burst_bytes, max_packet } => {
                LevelLimit::per_byte(rate_bps, burst_bytes, max_packet, Oversize::Demote).unwrap()
            }
            Self::Unlimited => LevelLimit::UNLIMITED,
            Self::NotConfigured => LevelLimit::NOT_CONFIGURED,
        }
    }

    pub fn is_limited(&self) -> bool {
        matches!(self, Self::Packet { .. } | Self::Byte { .. })
    }

    pub fn max_packet(&self) -> u32 {
        match *self {
            Self::Packet { max_packet, .. } | Self::Byte { max_packet, .. } => max_packet,
            Self::Unlimited | Self::NotConfigured => 1514,
        }
    }

    /// The curve as the plan states it. A packet-charged level counts every packet as its largest.
    pub fn curve(&self) -> Curve {
        match *self {
            Self::Packet { epoch_ns, tolerance_ns, max_packet } => {
                let (packet, epoch) = (u128::from(wire_bytes(max_packet, 1)), u128::from(epoch_ns));
                Curve {
                    burst: Fraction { over: packet * (epoch + u128::from(tolerance_ns)), under: epoch },
                    rate: Fraction { over: packet, under: epoch },
                }
            }
            Self::Byte { rate_bps, burst_bytes, .. } => Curve {
                burst: Fraction { over: burst_bytes.into(), under: 1 },
                rate: Fraction { over: rate_bps.into(), under: 8_000_000_000 },
            },
            Self::Unlimited | Self::NotConfigured => unreachable!("no curve without a limit"),
        }
    }

    /// The bytes that the level charges for a packet.
    pub fn charged_bytes(&self, wire: u32) -> u128 {
        match *self {
            Self::Packet { max_packet, .. } => wire_bytes(max_packet, 1).into(),
            _ => wire.into(),
        }
    }
}

/// Numbers of every magnitude from `low` to `high`.
pub fn any_magnitude(low: u64, high: u64) -> impl Strategy<Value = u64> {
    (low.ilog2()..=high.ilog2()).prop_flat_map(move |bits| {
        let floor = 1u64 << bits;
        floor.max(low)..=(floor - 1 + floor).min(high)
    })
}

pub fn packet_spec() -> impl Strategy<Value = Spec> {
    let tolerance = prop_oneof![Just(0), any_magnitude(1, 1 << 37)];
    (any_magnitude(1, 1 << 37), tolerance, 60u32..9000).prop_map(|(epoch_ns, tolerance_ns, max_packet)| Spec::Packet {
        epoch_ns,
        tolerance_ns,
        max_packet,
    })
}

pub fn byte_spec() -> impl Strategy<Value = Spec> {
    (any_magnitude(8_000, 400_000_000_000), 60u32..9000).prop_flat_map(|(rate_bps, max_packet)| {
        let packet = u64::from(wire_bytes(max_packet, 1));
        // Bytes in the longest burst, less what rounding the price up can add to its time.
        let most = (u128::from(rate_bps) * u128::from(MAX_BURST_NS) / 8_000_000_000 * 99 / 100) as u64;
        prop_oneof![Just(packet), packet..=most.min(20 * packet), any_magnitude(packet, most)]
            .prop_map(move |burst_bytes| Spec::Byte { rate_bps, burst_bytes, max_packet })
    })
}

pub fn limited_spec() -> impl Strategy<Value = Spec> {
    prop_oneof![packet_spec(), byte_spec()]
}

/// When a packet comes, after the one before.
#[derive(Clone, Copy, Debug)]
pub enum Wait {
    /// At the same time.
    None,
    /// So many ns later.
    Short(u64),
    /// After so many 256ths of the time in which a full budget refills.
    OfBurst(u64),
    /// At the very time from which it may pass, or 1 ns to either side.
    Boundary(i8),
}

pub fn wait() -> impl Strategy<Value = Wait> {
    prop_oneof![
        3 => Just(Wait::None),
        2 => any_magnitude(1, 100_000).prop_map(Wait::Short),
        2 => (0u64..700).prop_map(Wait::OfBurst),
        4 => (-1i8..=1).prop_map(Wait::Boundary),
    ]
}

/// A packet to come: when, how large (in 65535ths between the smallest and the largest), on which CPU.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub wait: Wait,
    pub size: u16,
    pub cpu: usize,
    /// Segments; above 1, the packet is GSO.
    pub segments: u32,
    /// Whether the packet had read the configuration before the latest change.
    pub late: bool,
}

impl Step {
    /// L2 and wire bytes.
    pub fn bytes(&self, max_packet: u32) -> (u32, u32) {
        let least = 14;
        let frame = least + (u64::from(max_packet - least) * u64::from(self.size) / u64::from(u16::MAX)) as u32;
        let l2 = frame * self.segments;
        (l2, wire_bytes(l2, self.segments))
    }
}

/// CPUs of the simulated host.
pub const CPUS: usize = 4;
/// How far the clock of a CPU may be off, to either side, ns.
pub const SKEW_NS: i64 = 5_000;

pub fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![2 => Just(u16::MAX), 1 => Just(0), 3 => any::<u16>()];
    let segments = prop_oneof![4 => Just(1u32), 1 => 2u32..8];
    let step = (wait(), size, 0..CPUS, segments, any::<bool>()).prop_map(|(wait, size, cpu, segments, late)| Step {
        wait,
        size,
        cpu,
        segments,
        late,
    });
    proptest::collection::vec(step, 1..count)
}

pub fn skews() -> impl Strategy<Value = [i64; CPUS]> {
    prop_oneof![Just([0; CPUS]), proptest::array::uniform4(-SKEW_NS..=SKEW_NS)]
}

/// Where the clock stands at the start: at its ends, before it goes round, and where clocks really are.
pub fn clock_start() -> impl Strategy<Value = u64> {
    let edge = prop_oneof![Just(1u64 << 62), Just((1u64 << 63) - 1), Just(1u64 << 63), Just(u64::MAX)];
    prop_oneof![
        Just(0),
        0..YEAR_NS,
        (edge, any_magnitude(1, 1 << 40)).prop_map(|(edge, before)| edge.wrapping_sub(before)),
    ]
}

/// Settings for a property that takes a while: fewer cases, and no files beside the tests.
pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_global_rejects: cases * 16, ..ProptestConfig::default() }
}
