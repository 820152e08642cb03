//! The options of queueing disciplines and their classes, as rtnetlink carries them
//! (include/uapi/linux/pkt_sched.h), and back.
//!
//! Integers are in the machine's byte order. Attributes that a newer kernel adds are ignored.

use netlink_packet_core::{DefaultNla, Emitable, NLA_HEADER_SIZE, NlasIterator};

/// One tick of the packet scheduler's clock: `PSCHED_SHIFT` is 6 (include/net/pkt_sched.h).
pub const TICK_NS: u64 = 64;

/// `TC_LINKLAYER_ETHERNET`. With any other value but `ATM` the kernel asks for a table of transmission times
/// (net/sched/sch_htb.c, `htb_change_class`).
const LINKLAYER_ETHERNET: u8 = 1;

/// As many ticks as fit into `ns`; at most about 274 s.
pub const fn ticks(ns: u64) -> u32 {
    let ticks = ns / TICK_NS;
    if ticks > u32::MAX as u64 { u32::MAX } else { ticks as u32 }
}

/// The options of a qdisc, with its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Options {
    /// Hierarchical token bucket.
    Htb(Htb),
    /// A FIFO with a limit in packets.
    Pfifo(Fifo),
    /// A FIFO with a limit in bytes.
    Bfifo(Fifo),
    /// Departure times and pacing.
    Fq(Fq),
    /// Strict priority among bands.
    Prio(Prio),
    /// Traffic classes on the queues of the device.
    Mqprio(Mqprio),
    /// The place of ingress and egress filters.
    Clsact,
    /// Any other, or one whose options make no sense to us.
    Other {
        /// `TCA_KIND`.
        kind: String,
        /// `TCA_OPTIONS`.
        bytes: Vec<u8>,
    },
}

impl Options {
    /// The qdisc's kind, as `tc` names it.
    pub fn kind(&self) -> &str {
        match self {
            Self::Htb(_) => "htb",
            Self::Pfifo(_) => "pfifo",
            Self::Bfifo(_) => "bfifo",
            Self::Fq(_) => "fq",
            Self::Prio(_) => "prio",
            Self::Mqprio(_) => "mqprio",
            Self::Clsact => "clsact",
            Self::Other { kind, .. } => kind,
        }
    }

    /// The value of `TCA_OPTIONS`; empty if the kind has none.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Htb(htb) => htb.encode(),
            Self::Pfifo(fifo) | Self::Bfifo(fifo) => fifo.encode(),
            Self::Fq(fq) => fq.encode(),
            Self::Prio(prio) => prio.encode(),
            Self::Mqprio(mqprio) => mqprio.encode(),
            Self::Clsact => Vec::new(),
            Self::Other { bytes, .. } => bytes.clone(),
        }
    }

    /// Whether a kernel that reports `self` does what `wanted` asks for, as far as it has the options.
    pub fn holds(&self, wanted: &Self) -> bool {
        match (self, wanted) {
            (Self::Fq(actual), Self::Fq(wanted)) => wanted.holds_in(actual),
            _ => self == wanted,
        }
    }

    /// From `TCA_KIND` and `TCA_OPTIONS`.
    pub fn decode(kind: &str, bytes: &[u8]) -> Self {
        let known = match kind {
            "htb" => Htb::decode(bytes).map(Self::Htb),
            "pfifo" => Fifo::decode(bytes).map(Self::Pfifo),
            "bfifo" => Fifo::decode(bytes).map(Self::Bfifo),
            "fq" => Fq::decode(bytes).map(Self::Fq),
            "prio" => Prio::decode(bytes).map(Self::Prio),
            "mqprio" => Mqprio::decode(bytes).map(Self::Mqprio),
            "clsact" => Some(Self::Clsact),
            _ => None,
        };
        known.unwrap_or_else(|| Self::Other { kind: kind.to_owned(), bytes: bytes.to_vec() })
    }
}

/// `htb`, the qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Htb {
    /// Minor number of the class for packets that no class claims; 0 lets them pass unshaped.
    pub default_class: u32,
    /// A class without a quantum gets its rate in bytes/s divided by this.
    pub rate2quantum: u32,
}

impl Htb {
    const INIT: u16 = 2;
    /// `TC_HTB_PROTOVER`.
    const VERSION: u32 = 3;

    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        // struct tc_htb_glob: version, rate2quantum, defcls, debug, direct_pkts.
        attributes(&[words(Self::INIT, &[Self::VERSION, self.rate2quantum, self.default_class, 0, 0])])
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let init = attribute(bytes, Self::INIT)?;
        Some(Self { rate2quantum: u32_at(init, 4)?, default_class: u32_at(init, 8)? })
    }
}

/// A rate, and what a packet counts at it (`struct tc_ratespec`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateSpec {
    /// Bytes/s. Needs an attribute of its own from 2^32 on.
    pub bytes_per_s: u64,
    /// Added to the L2 bytes of each packet; once to a GSO packet.
    pub overhead: u16,
    /// What a packet counts at least, overhead included.
    pub mpu: u16,
}

impl RateSpec {
    const LENGTH: usize = 12;

    fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        // cell_log: u8, linklayer: u8, overhead: u16, cell_align: i16, mpu: u16, rate: u32.
        bytes[1] = LINKLAYER_ETHERNET;
        bytes[2..4].copy_from_slice(&self.overhead.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.mpu.to_ne_bytes());
        bytes[8..].copy_from_slice(&u32::try_from(self.bytes_per_s).unwrap_or(u32::MAX).to_ne_bytes());
        bytes
    }

    fn decode(bytes: &[u8], rate64: Option<&[u8]>) -> Option<Self> {
        let bytes_per_s = match rate64 {
            Some(wide) => u64::from_ne_bytes(wide.try_into().ok()?),
            None => u64::from(u32_at(bytes, 8)?),
        };
        Some(Self { bytes_per_s, overhead: u16_at(bytes, 2)?, mpu: u16_at(bytes, 6)? })
    }
}

/// A class of `htb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HtbClass {
    /// What the class may send of its own.
    pub rate: RateSpec,
    /// What it may send at all, borrowed from its parent.
    pub ceil: RateSpec,
    /// Depth of the bucket of `rate`, in ticks of [`TICK_NS`].
    pub buffer: u32,
    /// Depth of the bucket of `ceil`, in ticks of [`TICK_NS`].
    pub cbuffer: u32,
    /// Bytes that the class may send in its turn among classes of the same `prio`.
    pub quantum: u32,
    /// 0 is served first; 0 to 7.
    pub prio: u32,
}

impl HtbClass {
    const PARMS: u16 = 1;
    const RATE64: u16 = 6;
    const CEIL64: u16 = 7;

    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        // struct tc_htb_opt: rate, ceil, buffer, cbuffer, quantum, level (the kernel's), prio.
        let mut parms = Vec::new();
        parms.extend(self.rate.encode());
        parms.extend(self.ceil.encode());
        for field in [self.buffer, self.cbuffer, self.quantum, 0, self.prio] {
            parms.extend(field.to_ne_bytes());
        }
        let mut all = vec![DefaultNla::new(Self::PARMS, parms)];
        for (kind, spec) in [(Self::RATE64, &self.rate), (Self::CEIL64, &self.ceil)] {
            if spec.bytes_per_s > u64::from(u32::MAX) {
                all.push(DefaultNla::new(kind, spec.bytes_per_s.to_ne_bytes().to_vec()));
            }
        }
        attributes(&all)
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let parms = attribute(bytes, Self::PARMS)?;
        Some(Self {
            rate: RateSpec::decode(parms.get(..12)?, attribute(bytes, Self::RATE64))?,
            ceil: RateSpec::decode(parms.get(12..24)?, attribute(bytes, Self::CEIL64))?,
            buffer: u32_at(parms, 24)?,
            cbuffer: u32_at(parms, 28)?,
            quantum: u32_at(parms, 32)?,
            prio: u32_at(parms, 40)?,
        })
    }
}

/// `pfifo` and `bfifo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fifo {
    /// Packets or bytes.
    pub limit: u32,
}

impl Fifo {
    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        self.limit.to_ne_bytes().to_vec()
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self { limit: u32_at(bytes, 0)? })
    }
}

/// `fq`. What is `None` is left to the kernel, or the kernel has no such option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fq {
    /// Packets in all.
    pub limit: Option<u32>,
    /// Packets of one flow.
    pub flow_limit: Option<u32>,
    /// Bytes that a flow may send in its turn.
    pub quantum: Option<u32>,
    /// Bytes that a new flow may send in its first turn.
    pub initial_quantum: Option<u32>,
    /// Whether sockets' own pacing rates count.
    pub pacing: Option<bool>,
    /// Number of flow buckets, as a power of 2.
    pub buckets_log: Option<u32>,
    /// How late a timer may fire, ns (Linux 5.1).
    pub timer_slack_ns: Option<u32>,
    /// How far ahead a departure time may be, us (Linux 5.8).
    pub horizon_us: Option<u32>,
    /// Whether packets beyond the horizon are dropped; else they leave at it (Linux 5.8).
    pub horizon_drop: Option<bool>,
}

impl Fq {
    const LIMIT: u16 = 1;
    const FLOW_LIMIT: u16 = 2;
    const QUANTUM: u16 = 3;
    const INITIAL_QUANTUM: u16 = 4;
    const RATE_ENABLE: u16 = 5;
    const BUCKETS_LOG: u16 = 8;
    const TIMER_SLACK: u16 = 13;
    const HORIZON: u16 = 14;
    const HORIZON_DROP: u16 = 15;

    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        let fields = [
            (Self::BUCKETS_LOG, self.buckets_log),
            (Self::LIMIT, self.limit),
            (Self::FLOW_LIMIT, self.flow_limit),
            (Self::QUANTUM, self.quantum),
            (Self::INITIAL_QUANTUM, self.initial_quantum),
            (Self::RATE_ENABLE, self.pacing.map(u32::from)),
            (Self::TIMER_SLACK, self.timer_slack_ns),
            (Self::HORIZON, self.horizon_us),
        ];
        let mut all: Vec<_> =
            fields.iter().filter_map(|(kind, value)| value.map(|value| words(*kind, &[value]))).collect();
        all.extend(self.horizon_drop.map(|drop| DefaultNla::new(Self::HORIZON_DROP, vec![u8::from(drop)])));
        attributes(&all)
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |kind| attribute(bytes, kind).and_then(|value| u32_at(value, 0));
        Some(Self {
            limit: word(Self::LIMIT),
            flow_limit: word(Self::FLOW_LIMIT),
            quantum: word(Self::QUANTUM),
            initial_quantum: word(Self::INITIAL_QUANTUM),
            pacing: word(Self::RATE_ENABLE).map(|on| on != 0),
            buckets_log: word(Self::BUCKETS_LOG),
            timer_slack_ns: word(Self::TIMER_SLACK),
            horizon_us: word(Self::HORIZON),
            horizon_drop: attribute(bytes, Self::HORIZON_DROP).and_then(|value| value.first()).map(|&drop| drop != 0),
        })
    }

    /// Whether a kernel that reports `actual` does what this asks for, as far as it has the option.
    pub fn holds_in(&self, actual: &Self) -> bool {
        fn holds<T: PartialEq>(wanted: Option<T>, actual: Option<T>) -> bool {
            wanted.is_none() || actual.is_none() || wanted == actual
        }
        holds(self.limit, actual.limit)
            && holds(self.flow_limit, actual.flow_limit)
            && holds(self.quantum, actual.quantum)
            && holds(self.initial_quantum, actual.initial_quantum)
            && holds(self.pacing, actual.pacing)
            && holds(self.buckets_log, actual.buckets_log)
            && holds(self.timer_slack_ns, actual.timer_slack_ns)
            && holds(self.horizon_us, actual.horizon_us)
            && holds(self.horizon_drop, actual.horizon_drop)
    }
}

/// `prio` (`struct tc_prio_qopt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prio {
    /// Number of bands; band 0 is served first.
    pub bands: u32,
    /// The band of each `skb->priority & 15`.
    pub map: [u8; 16],
}

impl Prio {
    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        [&self.bands.to_ne_bytes()[..], &self.map].concat()
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self { bands: u32_at(bytes, 0)?, map: bytes.get(4..20)?.try_into().ok()? })
    }
}

/// `mqprio` (`struct tc_mqprio_qopt`), in its DCB mode: the traffic classes and their queues alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mqprio {
    /// Number of traffic classes.
    pub classes: u8,
    /// The traffic class of each `skb->priority & 15`.
    pub map: [u8; 16],
    /// Whether the device does it.
    pub hardware: bool,
    /// Number of queues of each traffic class.
    pub counts: [u16; 16],
    /// First queue of each traffic class.
    pub offsets: [u16; 16],
}

impl Mqprio {
    /// The value of `TCA_OPTIONS`.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.classes];
        bytes.extend(self.map);
        bytes.push(u8::from(self.hardware));
        bytes.extend(self.counts.iter().chain(&self.offsets).flat_map(|field| field.to_ne_bytes()));
        bytes
    }

    /// From `TCA_OPTIONS`.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let queues = |at: usize| -> Option<[u16; 16]> {
            let fields: Option<Vec<u16>> = (0..16).map(|n| u16_at(bytes, at + 2 * n)).collect();
            fields?.try_into().ok()
        };
        Some(Self {
            classes: *bytes.first()?,
            map: bytes.get(1..17)?.try_into().ok()?,
            hardware: *bytes.get(17)? != 0,
            counts: queues(18)?,
            offsets: queues(50)?,
        })
    }
}

fn words(kind: u16, values: &[u32]) -> DefaultNla {
    DefaultNla::new(kind, values.iter().flat_map(|value| value.to_ne_bytes()).collect())
}

pub(super) fn attributes(all: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; all.buffer_len()];
    all.emit(&mut bytes);
    bytes
}

pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let found = NlasIterator::new(bytes).map_while(Result::ok).find(|nla| nla.kind() == kind)?;
    let end = usize::from(found.length());
    Some(&found.into_inner()[NLA_HEADER_SIZE..end])
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(digit).collect()
    }

    // The options that `tc` of iproute2 6.1.0 sends, recorded with
    // `strace -e trace=sendmsg -e write=3,4 tc qdisc add dev v0 ...` on x86-64.

    #[test]
    fn prio_is_what_tc_sends() {
        // root handle 716a: prio bands 8 priomap 7 6 5 4 3 2 1 0 7 7 7 7 7 7 7 7
        let sent = hex("080000000706050403020100070707070707070704000200");
        let prio = Prio { bands: 8, map: [7, 6, 5, 4, 3, 2, 1, 0, 7, 7, 7, 7, 7, 7, 7, 7] };
        // Behind the structure tc adds an attribute without a value, for a multi-queue prio that is long gone.
        assert_eq!(prio.encode(), sent[..20]);
        assert_eq!(Options::decode("prio", &sent), Options::Prio(prio));
    }

    #[test]
    fn fq_is_what_tc_sends() {
        // root fq limit 100000 flow_limit 100000 horizon 20s horizon_drop
        let sent = hex("08000100a086010008000200a086010008000e00002d310105000f0001000000");
        let fq = Fq {
            limit: Some(100_000),
            flow_limit: Some(100_000),
            horizon_us: Some(20_000_000),
            horizon_drop: Some(true),
            ..Fq::default()
        };
        assert_eq!(fq.encode(), sent);
        assert_eq!(Options::decode("fq", &sent), Options::Fq(fq));

        // root fq limit 5000 flow_limit 200 quantum 3028 initial_quantum 15140 buckets 2048 timer_slack 1000 nopacing
        // horizon 2s horizon_cap
        let sent = hex(concat!(
            "080008000b000000080001008813000008000200c800000008000300d40b000008000400243b00000800050000000000",
            "08000d00e803000008000e0080841e0005000f0000000000"
        ));
        let fq = Fq {
            limit: Some(5_000),
            flow_limit: Some(200),
            quantum: Some(3_028),
            initial_quantum: Some(15_140),
            pacing: Some(false),
            buckets_log: Some(11),
            timer_slack_ns: Some(1_000),
            horizon_us: Some(2_000_000),
            horizon_drop: Some(false),
        };
        assert_eq!(fq.encode(), sent);
        assert_eq!(Options::decode("fq", &sent), Options::Fq(fq));
    }

    #[test]
    fn mqprio_is_what_tc_sends() {
        // root mqprio num_tc 3 map 0 1 2 2 0 0 0 0 0 0 0 0 0 0 0 0 queues 2@0 2@2 4@4 hw 0
        let sent = hex(concat!(
            "0300010202000000000000000000000000000200020004000000000000000000000000000000000000000000000000000000",
            "00000200040000000000000000000000000000000000000000000000000000000000"
        ));
        let [mut map, mut counts, mut offsets] = [[0; 16]; 3];
        map[1..4].copy_from_slice(&[1, 2, 2]);
        counts[..3].copy_from_slice(&[2, 2, 4]);
        offsets[..3].copy_from_slice(&[0, 2, 4]);
        let mqprio = Mqprio { classes: 3, map: map.map(|class| class as u8), hardware: false, counts, offsets };
        // tc pads it to a multiple of 4 bytes.
        assert_eq!(mqprio.encode(), sent[..82]);
        assert_eq!(Options::decode("mqprio", &sent), Options::Mqprio(mqprio));
    }

    #[test]
    fn an_option_that_the_kernel_does_not_have_does_not_count() {
        let wanted = Fq { limit: Some(5), horizon_us: Some(7), ..Fq::default() };
        assert!(wanted.holds_in(&Fq { limit: Some(5), quantum: Some(3), ..Fq::default() }));
        assert!(!wanted.holds_in(&Fq { limit: Some(5), horizon_us: Some(6), ..Fq::default() }));
    }

    #[test]
    fn ticks_round_down() {
        assert_eq!([0, 63, 64, 1_000_000].map(ticks), [0, 0, 1, 15_625]);
        assert_eq!(ticks(u64::MAX), u32::MAX);
    }

    fn spec() -> impl Strategy<Value = RateSpec> {
        (any::<u64>(), any::<u16>(), any::<u16>()).prop_map(|(rate, overhead, mpu)| {
            // Half of them need the attribute for 64 bits.
            RateSpec { bytes_per_s: if rate % 2 == 0 { rate >> 32 } else { rate }, overhead, mpu }
        })
    }

    proptest! {
        #[test]
        fn classes_survive_a_round_trip(
            rate in spec(), ceil in spec(), buffer: u32, cbuffer: u32, quantum: u32, prio in 0u32..8,
        ) {
            let class = HtbClass { rate, ceil, buffer, cbuffer, quantum, prio };
            prop_assert_eq!(HtbClass::decode(&class.encode()), Some(class));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            for kind in ["htb", "pfifo", "fq", "prio", "mqprio", "clsact", "tbf"] {
                Options::decode(kind, &bytes);
            }
            HtbClass::decode(&bytes);
        }
    }
}
