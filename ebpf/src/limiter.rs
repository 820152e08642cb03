//! The limiter: GCRA (ITU-T I.371, the virtual scheduling form) on one 64-bit word a level.
//!
//! The word holds the *theoretical arrival time* (TAT): the time at which everything admitted so far
//! will have drained at the level's rate. What is still to drain is the *backlog*, `TAT - now`, in
//! nanoseconds. A packet of cost `c` is admitted when `backlog + c <= burst`, and then moves the TAT
//! by `c`. One compare-exchange does both, so the limit is exact on any number of CPUs: a CPU that
//! loses the race looks again.
//!
//! A level is charged in one of two ways.
//! * **By packet** (the guaranteed level): every packet costs a whole epoch T, whatever its size. With
//!   tolerance 0 the burst is T, so two packets are never admitted closer than T. With tolerance v
//!   they are never closer than T - v, and k of them never within less than (k - 1) T - v.
//! * **By bytes**: a packet costs its wire bytes at the level's rate r, rounded up to whole ns. With
//!   burst B, any window of length t sees at most B + r (t + 1 ns) bytes: 1 ns is the clock's resolution.
//!
//! A *paced* level, one with a horizon h, admits while `backlog + c <= burst + h` and says how long the
//! packet has to wait in a queue until its backlog is down to the burst: `backlog + c - burst`. What
//! leaves is then what a level without a horizon would admit, and nothing within the horizon is lost.
//!
//! # Live changes
//! A change of plan must not hand out a second burst, and must not leave a level stuck behind a debt
//! made at another rate. So the lowest bit of the word names the configuration *slot* in which the
//! rest of the word was written, and whoever finds a word of the other slot carries it over first:
//! the backlog is worth the same number of bytes before and after ([`Carry`]). What exceeds the new
//! burst drains first, at the old rate. Hence across a change no window admits more than the larger
//! burst plus the larger rate times its length, and a level admits again at the latest after the old
//! burst and one new packet have drained. Packets of a paced level that wait already keep the times they
//! were given, so there a backlog never becomes shorter: it is worth at least as many ns as before. A packet-charged
//! level counts its largest packet's bytes for every packet. From and to a configuration without a limit nothing is
//! carried over.
//!
//! The protocol of a change (one writer, by a lock) is: write the idle slot; make it the active one;
//! carry over every word; wait until no packet that started before is in the program any more; and again, until no
//! word had to be carried over. A packet therefore sees at most one change while it is in the program. A change that comes before the
//! excess of the last one has drained (some backlog is above its burst) counts it at the rate of the
//! configuration in between: the promise for windows holds for each change, not for the two together.

/// Costs are at most a burst, and a burst at most this long: 2^38 ns, 4.6 minutes. Keeps every
/// product of [`Carry`] below 2^64.
pub const MAX_BURST_NS: u64 = 1 << 38;

/// Fraction bits of the price of a byte.
pub const COST_SHIFT: u32 = 20;

/// Largest number of wire bytes that a single packet is charged for: 2^20 - 1. GSO packets are at
/// most 512 KiB (`GSO_MAX_SIZE`, include/linux/netdevice.h).
pub const MAX_COST_BYTES: u32 = (1 << 20) - 1;

/// Lowest rate of a level, in bit/s: keeps `bytes * ns_per_byte` within 64 bits.
pub const MIN_RATE_BPS: u64 = 8_000;

/// How often a packet tries the compare-exchange. Each failure means that another CPU admitted a
/// packet in these few nanoseconds, so a level runs out of budget long before its packets run out of tries. (Where the exchange takes a
/// lock, it may also mean that another CPU was stopped with it.)
const TRIES: usize = 16;

/// A backlog this much longer than any that the limiter can make was not made by it: the word is
/// damaged, or the clock is another one. 2^33 ns is 8.6 s, longer than a CPU may stall with an old
/// time in its hand.
const IMPLAUSIBLE_NS: u64 = 1 << 33;

/// How a level charges its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Charge {
    /// The plan has no such level: its packets travel at level 0.
    NotConfigured = 0,
    /// Marked but never limited.
    Unlimited = 1,
    /// A whole epoch for each packet.
    Packet = 2,
    /// Wire bytes at the level's rate.
    Byte = 3,
}

/// What happens to a packet larger than its level allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Oversize {
    /// It travels at level 0, with the mark of level 0.
    Demote = 0,
    /// It is dropped.
    Drop = 1,
}

/// What happens to a packet that finds its level's budget used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Over {
    /// It is dropped; on a paced level, if it would have to wait beyond the horizon.
    Drop = 0,
    /// It leaves at the next lower level that admits it, with that level's mark.
    Demote = 1,
}

/// How a backlog in the time of the configuration before becomes one in the time of this one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Carry {
    /// Old rate over new rate, times 2^`shift`, rounded up; below 2^24 unless `shift` is 0.
    mult: u64,
    /// See `mult`.
    shift: u64,
    /// The old backlog, ns, that is worth exactly the new reach. What is beyond drains at the old rate.
    knee_ns: u64,
    /// The longest backlog that the old configuration could make, ns. 0: nothing is carried over.
    ceiling_ns: u64,
}

/// One level's limit, as the programs read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LevelLimit {
    charge: u32,
    oversize: u32,
    over: u32,
    /// [`Charge::Byte`]: fewest L2 bytes of a GSO packet's segments but the last; 0 if it does not matter.
    least_segment: u32,
    /// Largest packet, L2 bytes without FCS.
    max_packet: u32,
    /// [`Charge::Byte`]: most wire bytes of one packet, its segments together.
    max_wire: u32,
    /// [`Charge::Packet`]: the epoch, which each packet costs, ns.
    epoch_ns: u64,
    /// [`Charge::Byte`]: ns per wire byte times 2^[`COST_SHIFT`], rounded up.
    ns_per_byte: u64,
    /// Backlog of what has left is at most this, ns.
    burst_ns: u64,
    /// The longest that a packet may wait for its departure, ns; 0: none waits.
    horizon_ns: u64,
    /// The longest backlog that a word of this slot can hold, ns: the reach and what was carried over.
    ceiling_ns: u64,
    /// The level's rate is `unit_bytes` wire bytes ...
    unit_bytes: u64,
    /// ... in `unit_ns` nanoseconds. Only [`LevelLimit::replacing`] reads the two.
    unit_ns: u64,
    carry: Carry,
}

/// Why a limit cannot be expressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitError {
    /// An epoch of 0 ns.
    ZeroEpoch,
    /// A rate below [`MIN_RATE_BPS`], in bit/s.
    RateTooLow(u64),
    /// A burst, with the horizon, in ns, above [`MAX_BURST_NS`].
    BurstTooLong(u64),
    /// A burst smaller than the wire bytes of the largest packet: that packet could never pass.
    BurstBelowPacket {
        /// Bytes of the burst.
        burst: u64,
        /// Wire bytes of the largest packet.
        packet: u64,
    },
}

impl core::fmt::Display for LimitError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::ZeroEpoch => write!(f, "the epoch is 0 ns"),
            Self::RateTooLow(rate) => {
                write!(f, "the rate is {rate} bit/s; the limiter counts from {MIN_RATE_BPS} bit/s up")
            }
            Self::BurstTooLong(burst) => write!(
                f,
                "its budget takes {burst} ns to refill; the limiter counts to {MAX_BURST_NS} ns (4.6 minutes)"
            ),
            Self::BurstBelowPacket { burst, packet } => {
                write!(f, "its burst of {burst} bytes is smaller than its largest packet, {packet} bytes on the wire")
            }
        }
    }
}

impl core::error::Error for LimitError {}

impl LevelLimit {
    /// No such level in the plan.
    pub const NOT_CONFIGURED: Self = Self::without_limit(Charge::NotConfigured);
    /// Marked, never limited.
    pub const UNLIMITED: Self = Self::without_limit(Charge::Unlimited);

    const fn without_limit(charge: Charge) -> Self {
        Self {
            charge: charge as u32,
            oversize: Oversize::Demote as u32,
            over: Over::Drop as u32,
            least_segment: 0,
            max_packet: u32::MAX,
            max_wire: 0,
            epoch_ns: 0,
            ns_per_byte: 0,
            burst_ns: 0,
            horizon_ns: 0,
            ceiling_ns: 0,
            unit_bytes: 0,
            unit_ns: 0,
            carry: Carry { mult: 0, shift: 0, knee_ns: 0, ceiling_ns: 0 },
        }
    }

    /// One packet of at most `max_packet` L2 bytes in each epoch, with `tolerance_ns` of leave to be early.
    ///
    /// # Errors
    /// If the epoch is 0, or epoch and tolerance together exceed [`MAX_BURST_NS`].
    pub fn per_packet(
        epoch_ns: u64,
        tolerance_ns: u64,
        max_packet: u32,
        oversize: Oversize,
    ) -> Result<Self, LimitError> {
        if epoch_ns == 0 {
            return Err(LimitError::ZeroEpoch);
        }
        let burst_ns = epoch_ns.saturating_add(tolerance_ns);
        if burst_ns > MAX_BURST_NS {
            return Err(LimitError::BurstTooLong(burst_ns));
        }
        Ok(Self {
            charge: Charge::Packet as u32,
            oversize: oversize as u32,
            max_packet,
            epoch_ns,
            burst_ns,
            ceiling_ns: burst_ns,
            unit_bytes: u64::from(crate::frame::wire_bytes(max_packet, 1)),
            unit_ns: epoch_ns,
            ..Self::without_limit(Charge::Packet)
        })
    }

    /// `rate_bps` bit/s of wire bytes with bursts of at most `burst_bytes` wire bytes.
    ///
    /// # Errors
    /// If the rate is below [`MIN_RATE_BPS`], the burst cannot hold the largest packet, or it takes
    /// longer than [`MAX_BURST_NS`] to refill.
    pub fn per_byte(rate_bps: u64, burst_bytes: u64, max_packet: u32, oversize: Oversize) -> Result<Self, LimitError> {
        if rate_bps < MIN_RATE_BPS {
            return Err(LimitError::RateTooLow(rate_bps));
        }
        let packet = u64::from(crate::frame::wire_bytes(max_packet, 1));
        if burst_bytes < packet {
            return Err(LimitError::BurstBelowPacket { burst: burst_bytes, packet });
        }
        let per_byte = ((8_000_000_000u128 << COST_SHIFT).div_ceil(u128::from(rate_bps))) as u64;
        // The burst in time, at the very price that packets pay, so that one packet of `burst_bytes` is
        // admitted. Rounding it up is worth less than the clock's resolution.
        let burst_ns = (u128::from(burst_bytes) * u128::from(per_byte)).div_ceil(1 << COST_SHIFT);
        if burst_ns > u128::from(MAX_BURST_NS) {
            return Err(LimitError::BurstTooLong(u64::try_from(burst_ns).unwrap_or(u64::MAX)));
        }
        let burst_ns = burst_ns as u64;
        Ok(Self {
            charge: Charge::Byte as u32,
            oversize: oversize as u32,
            max_packet,
            max_wire: burst_bytes.min(u64::from(MAX_COST_BYTES)) as u32,
            ns_per_byte: per_byte,
            burst_ns,
            ceiling_ns: burst_ns,
            // The rate that packets pay, not `rate_bps`: a backlog is the sum of such prices.
            unit_bytes: 1 << COST_SHIFT,
            unit_ns: per_byte,
            ..Self::without_limit(Charge::Byte)
        })
    }

    /// This limit, with packets that wait up to `horizon_ns` for their departure instead of being dropped.
    ///
    /// # Errors
    /// If burst and horizon together exceed [`MAX_BURST_NS`].
    pub fn paced(mut self, horizon_ns: u64) -> Result<Self, LimitError> {
        let reach_ns = self.burst_ns.saturating_add(horizon_ns);
        if reach_ns > MAX_BURST_NS {
            return Err(LimitError::BurstTooLong(reach_ns));
        }
        self.horizon_ns = horizon_ns;
        self.ceiling_ns = reach_ns;
        Ok(self)
    }

    /// This limit without a horizon: packets over it are dropped.
    #[must_use]
    pub const fn unpaced(mut self) -> Self {
        self.horizon_ns = 0;
        self.ceiling_ns = self.burst_ns;
        self
    }

    /// This limit, with packets that step down to lower levels instead of being dropped.
    #[must_use]
    pub const fn demoting(mut self) -> Self {
        self.over = Over::Demote as u32;
        self
    }

    /// This byte-charged limit, with packets of at most `wire_bytes` wire bytes.
    #[must_use]
    pub fn with_max_wire(mut self, wire_bytes: u32) -> Self {
        self.max_wire = self.max_wire.min(wire_bytes);
        self.max_packet = self.max_packet.min(self.max_wire.saturating_sub(crate::frame::WIRE_OVERHEAD));
        self
    }

    /// This limit, with GSO packets of smaller segments counted as oversize: for a queue that counts what a
    /// frame takes beside its bytes once a packet, and not once a segment.
    #[must_use]
    pub const fn with_least_segment(mut self, l2_bytes: u32) -> Self {
        self.least_segment = l2_bytes;
        self
    }

    /// This limit, ready to take over the words that `old` left.
    #[must_use]
    pub fn replacing(mut self, old: &Self) -> Self {
        if self.burst_ns == 0 || old.burst_ns == 0 {
            self.ceiling_ns = self.reach_ns();
            self.carry = Carry::default();
            return self;
        }
        // old rate / new rate, exact in 128 bits: bytes are below 2^32 and times at most 2^40, so the
        // products are at most 2^72, and 2^110 with the burst.
        let mut over = u128::from(old.unit_bytes) * u128::from(self.unit_ns);
        let under = u128::from(old.unit_ns) * u128::from(self.unit_bytes);
        if self.horizon_ns > 0 || old.horizon_ns > 0 {
            // Packets that wait have their times already; those after them must not leave before them.
            over = over.max(under);
        }
        self.carry = Carry::new(over, under, self.reach_ns(), old.ceiling_ns);
        // An excess that `old` itself had taken over has drained by now, or is forgotten.
        self.ceiling_ns = self.reach_ns() + old.reach_ns();
        self
    }

    /// How the level charges.
    #[inline(always)]
    pub const fn charge(&self) -> Charge {
        match self.charge {
            1 => Charge::Unlimited,
            2 => Charge::Packet,
            3 => Charge::Byte,
            _ => Charge::NotConfigured,
        }
    }

    /// Whether packets larger than allowed are dropped rather than demoted.
    #[inline(always)]
    pub const fn drops_oversize(&self) -> bool {
        self.oversize == Oversize::Drop as u32
    }

    /// Whether packets over the limit try the next lower level.
    #[inline(always)]
    pub const fn demotes(&self) -> bool {
        self.over == Over::Demote as u32
    }

    /// The longest that a packet may wait for its departure, ns; 0 for a level that is not paced.
    #[inline(always)]
    pub const fn horizon_ns(&self) -> u64 {
        self.horizon_ns
    }

    /// The longest backlog after an admission, ns.
    #[inline(always)]
    pub const fn reach_ns(&self) -> u64 {
        self.burst_ns + self.horizon_ns
    }

    /// Most wire bytes of one packet of a byte-charged level, its segments together.
    pub const fn max_wire(&self) -> u32 {
        self.max_wire
    }

    /// [`Charge::Packet`]: what each packet costs, ns.
    pub const fn epoch_ns(&self) -> u64 {
        self.epoch_ns
    }

    /// [`Charge::Byte`]: the rate that packets pay, wire bytes per second, rounded down.
    pub const fn bytes_per_second(&self) -> u64 {
        match (1_000_000_000u64 << COST_SHIFT).checked_div(self.ns_per_byte) {
            Some(rate) => rate,
            None => 0,
        }
    }

    /// Rate of the largest packets, wire bytes per second, rounded down; 0 for a level without a limit.
    #[inline(always)]
    pub const fn wire_rate(&self) -> u64 {
        match (self.unit_bytes * 1_000_000_000).checked_div(self.unit_ns) {
            Some(rate) => rate,
            None => 0,
        }
    }

    /// [`Charge::Byte`]: fewest L2 bytes of a GSO packet's segments but the last.
    pub const fn least_segment(&self) -> u32 {
        self.least_segment
    }

    /// [`Charge::Byte`]: the price of so many wire bytes, ns.
    pub const fn time_ns(&self, wire_bytes: u32) -> u64 {
        cost_of(wire_bytes, self.ns_per_byte)
    }

    /// Largest packet, L2 bytes.
    pub const fn max_packet(&self) -> u32 {
        self.max_packet
    }

    /// Time for a full budget to refill, ns; 0 for a level without a limit.
    pub const fn burst_ns(&self) -> u64 {
        self.burst_ns
    }

    /// How much earlier than an epoch after the last a packet may come, ns; 0 where bytes are counted.
    pub const fn tolerance_ns(&self) -> u64 {
        match self.charge() {
            Charge::Packet => self.burst_ns - self.epoch_ns,
            _ => 0,
        }
    }

    /// The longest that a word of this configuration can be ahead of the clock, ns.
    pub const fn ceiling_ns(&self) -> u64 {
        self.ceiling_ns
    }

    /// Price of a packet, ns, or `None` for one that is larger than the level allows. A GSO packet
    /// (`segments > 1`) leaves as a burst of frames, so no packet-charged level takes it.
    #[inline(always)]
    pub const fn cost_ns(&self, l2_bytes: u32, segments: u32, wire_bytes: u32) -> Option<u64> {
        match self.charge() {
            Charge::Packet => {
                if segments > 1 || l2_bytes > self.max_packet {
                    None
                } else {
                    Some(self.epoch_ns)
                }
            }
            Charge::Byte => {
                if wire_bytes > self.max_wire
                    || (segments <= 1 && l2_bytes > self.max_packet)
                    || l2_bytes < self.least_segment.saturating_mul(segments.saturating_sub(1))
                {
                    None
                } else {
                    Some(cost_of(wire_bytes, self.ns_per_byte))
                }
            }
            Charge::Unlimited | Charge::NotConfigured => Some(0),
        }
    }
}

#[inline(always)]
const fn cost_of(wire_bytes: u32, ns_per_byte: u64) -> u64 {
    (wire_bytes as u64 * ns_per_byte + ((1 << COST_SHIFT) - 1)) >> COST_SHIFT
}

impl Carry {
    fn new(over: u128, under: u128, reach_ns: u64, ceiling_ns: u64) -> Self {
        const MANTISSA: u128 = 1 << 24;
        let knee_ns = u64::try_from(u128::from(reach_ns) * under / over).unwrap_or(u64::MAX);
        let mut shift = 0;
        while shift < 38 && (over << (shift + 1)).div_ceil(under) < MANTISSA {
            shift += 1;
        }
        // Above 2^24 only with shift 0; then the knee is as much smaller than the new burst.
        let mult = (over << shift).div_ceil(under) as u64;
        Self { mult, shift, knee_ns, ceiling_ns }
    }

    #[inline(always)]
    const fn over(&self, backlog_ns: u64, reach_ns: u64) -> u64 {
        if self.ceiling_ns == 0 {
            return 0;
        }
        if backlog_ns > self.ceiling_ns + IMPLAUSIBLE_NS {
            // Not made by the old configuration. No less than all there may be, for it may be worth that.
            return reach_ns;
        }
        if backlog_ns > self.knee_ns {
            return reach_ns + (backlog_ns - self.knee_ns);
        }
        let shift = self.shift & 63;
        let new = (backlog_ns * self.mult + ((1 << shift) - 1)) >> shift;
        if new < reach_ns { new } else { reach_ns }
    }
}

/// Where a level's word lives: BPF map memory, an atomic, or the model checker's atomic.
pub trait LevelState {
    /// The word now.
    fn load(&self) -> u64;
    /// Writes `new` if the word is `current`. Where it succeeds, what is loaded before it and the [`LevelState::active_slot`] asked for
    /// after it are seen in this order.
    ///
    /// # Errors
    /// The word as it is, if nothing was written. That may be `current`, for a reason that passes: then try again.
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64>;
    /// The slot in force now: 0 or 1.
    fn active_slot(&self) -> u64;
}

/// The limiter's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The packet is within the limit and has been charged.
    Admitted,
    /// The packet has been charged and may leave after so many ns. Paced levels only.
    Wait(u64),
    /// The packet is over the limit; nothing was charged.
    Over,
    /// The configuration that the caller read is no longer in force: read again, ask again.
    Stale,
    /// Too many other CPUs changed the word meanwhile; nothing was charged.
    Contended,
}

// The clock in a word has 63 bits: it goes round after 292 years, and distances are signed, so a level
// may idle for 146 years. The slot takes the lowest bit.
const TIME: u64 = u64::MAX >> 1;

#[inline(always)]
const fn pack(tat_ns: u64, slot: u64) -> u64 {
    (tat_ns << 1) | (slot & 1)
}

/// The slot in which a word was written.
#[inline(always)]
pub const fn slot_of(word: u64) -> u64 {
    word & 1
}

/// How far the word's TAT is ahead of `now_ns`, ns; 0 if it is not.
#[inline(always)]
pub const fn backlog_ns(word: u64, now_ns: u64) -> u64 {
    let ahead = ((word >> 1).wrapping_sub(now_ns) & TIME) << 1;
    if (ahead as i64) <= 0 { 0 } else { ahead >> 1 }
}

/// The word of a level that has `backlog_ns` to drain at `now_ns`.
#[inline(always)]
pub const fn word_at(now_ns: u64, backlog_ns: u64, slot: u64) -> u64 {
    pack(now_ns.wrapping_add(backlog_ns), slot)
}

/// A word of the other slot, written for `slot`.
#[inline(always)]
const fn carried(word: u64, slot: u64, limit: &LevelLimit, now_ns: u64) -> u64 {
    match backlog_ns(word, now_ns) {
        // A time that has passed stays as it is: a packet on its way may hold an older `now_ns`.
        0 => pack(word >> 1, slot),
        backlog => word_at(now_ns, limit.carry.over(backlog, limit.reach_ns()), slot),
    }
}

/// Asks for a packet that costs `cost_ns` under `limit`, the level's limit in configuration `slot`.
#[inline(always)]
pub fn admit<S: LevelState>(state: &S, slot: u64, limit: &LevelLimit, cost_ns: u64, now_ns: u64) -> Admission {
    admit_up_to(limit.reach_ns(), state, slot, limit, cost_ns, now_ns)
}

/// [`admit`], if the backlog is at most `most_ns` afterwards: the burst, for a packet that does not wait.
#[inline(always)]
pub fn admit_up_to<S: LevelState>(
    most_ns: u64,
    state: &S,
    slot: u64,
    limit: &LevelLimit,
    cost_ns: u64,
    now_ns: u64,
) -> Admission {
    let mut word = state.load();
    for _ in 0..TRIES {
        let (new, after) = if slot_of(word) == slot & 1 {
            let backlog = backlog_ns(word, now_ns);
            let after = backlog + cost_ns;
            if after > most_ns {
                if backlog > limit.ceiling_ns.wrapping_add(IMPLAUSIBLE_NS) {
                    // A damaged word: without this the level would be shut until the clock reached it.
                    let _ = state.compare_exchange(word, word_at(now_ns, limit.reach_ns(), slot));
                }
                return Admission::Over;
            }
            (word_at(now_ns, after, slot), Some(after))
        } else {
            // Either this packet is the first after a change, or the change came after it read the
            // configuration. The exchange of the word with itself orders the two reads.
            if let Err(seen) = state.compare_exchange(word, word) {
                word = seen;
                continue;
            }
            if state.active_slot() != slot {
                return Admission::Stale;
            }
            (carried(word, slot, limit, now_ns), None)
        };
        match (state.compare_exchange(word, new), after) {
            (Ok(()), None) => word = new,
            (Ok(()), Some(after)) if after > limit.burst_ns => return Admission::Wait(after - limit.burst_ns),
            (Ok(()), Some(_)) => return Admission::Admitted,
            (Err(seen), _) => word = seen,
        }
    }
    Admission::Contended
}

/// Carries a word that still belongs to the other slot over to `slot`. The writer of a change calls
/// it for every level once `slot` is in force. Whether there was anything to do.
pub fn carry_over<S: LevelState>(state: &S, slot: u64, limit: &LevelLimit, now_ns: u64) -> bool {
    let mut word = state.load();
    while slot_of(word) != slot & 1 {
        match state.compare_exchange(word, carried(word, slot, limit, now_ns)) {
            Ok(()) => return true,
            Err(seen) => word = seen,
        }
    }
    false
}
