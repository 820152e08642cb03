//! The bound of a level, and why it holds.
//!
//! # What is counted
//! A packet of level `i` is *sent* when it leaves its host's limiter and *delivered* when its last bit
//! is at its destination. In between it crosses the host's own link and those behind `s` switches. Every
//! port serves levels strictly, without pre-emption, and each level first in, first out.
//!
//! **Each packet delays another at most once, plus one a hop.** Take a packet m, sent at `t` and
//! delivered at `d`, and its last port. Either that port has served levels `>= i` without a break since
//! before `t`, and then `d - t` is the time of the packets it served since; or its busy period began at
//! some `M > t`. Of the packets that it served from `M` on and that came through the port before it on
//! m's path, take the first, p. It cannot have come before `M`, so everything from `M` on is accounted
//! for by this port, and what is before `M` by the port before it, up to the time at which that one had
//! sent p; there, go on with p in the place of m. The packets served at two of these ports are
//! different ones, except p itself at each step. So with `C` the time of the largest packet on the
//! slowest link,
//!
//! `d - t <= (packets of levels >= i served in between) x C + s x C (the p) + (s + 1) x (one lower frame) + latencies`.
//!
//! The last three terms are *fixed*: they depend on the path alone, and are the epsilon of the plan
//! ([`super::delays`]). This is the trajectory approach (Martin and Minet 2006) without its
//! serialisation term, which was found to be optimistic (Kemayo et al. 2013), and with non-preemptive
//! blocking at every port. It needs routes on which packets that part do not meet again, as up/down
//! routing has, and no link slower than R.
//!
//! **Which packets can be there.** Those in the network at some time between `t` and `d`. Suppose that
//! m is the first packet of all that is late, and let `D_j` be the bound of level j. Then whatever was
//! sent at level j before `t - D_j` has been delivered, and whatever is sent after `t + D_i` comes when
//! m is late already. So at most what a host may send in the open window `(t - D_j, t + D_i)` counts.
//! If that is enough to deliver m in time after all, no packet is ever late.
//!
//! # Three models for a level of factor 1
//! * **strict**: `T = 2 D`. The window of the level itself is `2 D` long, and an open window of that
//!   length has one packet of each host. `D = n C + above + eps`, and `T` is set from it. Every level of
//!   factor 1 has its own epoch, so each of them is guaranteed, the lower ones with longer epochs.
//! * **paper**: `T = 2 n C + eps`, one eps short of `2 D`. It holds as well where fixed delays hardly
//!   vary: measure all times at a port from when a packet that never queued would be there. Then the
//!   window is `2 n C` plus twice the spread of the fixed delays between the packets that meet there. So
//!   the published epoch is safe while that spread is at most half of eps. Lower levels are "as
//!   published": the plan adds what the levels above send, but the epoch does not follow.
//! * **fan-in**: `T = D`. For packets that all go to one destination over links of one rate: the last
//!   port, delayed by the fixed delay of each branch, is busy exactly when one queue fed by all hosts
//!   would be, since a port upstream only feeds it while it has work anyway. A busy period of that
//!   queue that is `w` long has the packets of a half-open window of `w`, plus eps where fixed delays
//!   vary: `ceil(D / T) = 1` of each host. With several destinations this is not proven; the
//!   simulator's findings are in ARCHITECTURE.md.
//!
//! # Bytes instead of packets
//! A level charged by bytes may send `B + r w` in a window of `w`. With `r = P / T` that is `B + P` in its own
//! window, and so its own term is twice as large with `B = P`. The published reasoning counts `P` only;
//! `qjump sim --witness bytes` shows a network of two hops in which that is too little.
//!
//! # Fewer senders
//! Above factor 1 a bound counts `N < n` hosts. They are the different hosts that send at the level within the
//! window, not those that send at one instant: twelve now and another twelve a microsecond later are too many.
//! The plan prints the window. A level below depends on the same condition.
//!
//! # Levels above
//! In all models the levels above enter with what they may send in the window above, counted by
//! [`Envelope::time_ns`]. The equation `D = F(D)` is solved from below: `F` never falls, so the first
//! value that reproduces itself is the least, and it is the bound.

/// What one host may send at a level, as time on the slowest link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Envelope {
    /// Packets of at most `packet_ns`, k of them never within less than `(k - 1) epoch - tolerance`.
    Spaced {
        /// Time of the largest packet, ns.
        packet_ns: f64,
        /// What a packet costs, ns.
        epoch_ns: f64,
        /// How early a packet may be, ns.
        tolerance_ns: f64,
    },
    /// A token bucket.
    Bucket {
        /// Time of the whole burst, ns.
        burst_ns: f64,
        /// The rate, as a share of the link.
        share: f64,
    },
}

/// Ratios that differ from a whole number by rounding alone are that number.
const ROUNDING: f64 = 1e-12;

impl Envelope {
    /// How many packets an open window of `window_ns` can have, and one where it has no length: what is
    /// there at an instant; `None` for a bucket.
    pub fn packets(&self, window_ns: f64) -> Option<f64> {
        match *self {
            Self::Spaced { epoch_ns, tolerance_ns, .. } => {
                Some((((window_ns + tolerance_ns) / epoch_ns) * (1.0 - ROUNDING)).ceil().max(1.0))
            }
            Self::Bucket { .. } => None,
        }
    }

    /// Most time that one host's packets of an open window of `window_ns` take on the slowest link, ns.
    pub fn time_ns(&self, window_ns: f64) -> f64 {
        match *self {
            Self::Spaced { packet_ns, .. } => packet_ns * self.packets(window_ns).unwrap_or(0.0),
            Self::Bucket { burst_ns, share } => burst_ns + share * window_ns,
        }
    }

    /// Its rate in the long run, as a share of the slowest link.
    pub fn share(&self) -> f64 {
        match *self {
            Self::Spaced { packet_ns, epoch_ns, .. } => packet_ns / epoch_ns,
            Self::Bucket { share, .. } => share,
        }
    }
}

/// What `senders` hosts send in a window of `scale x D + offset_ns`, where D is what is sought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// How many hosts send.
    pub senders: u32,
    /// What each may send.
    pub envelope: Envelope,
    /// How much the window grows with D: 1 or 2.
    pub scale: f64,
    /// The rest of the window, ns: the bound of the level that sends.
    pub offset_ns: f64,
}

impl Demand {
    /// Time on the slowest link if the bound is `d_ns`.
    pub fn time_ns(&self, d_ns: f64) -> f64 {
        f64::from(self.senders) * self.envelope.time_ns(self.scale * d_ns + self.offset_ns)
    }

    /// How much more of its time there is for each ns that D is longer, in the long run. Together they must stay below
    /// 1 for there to be a bound.
    pub fn slope(&self) -> f64 {
        f64::from(self.senders) * self.envelope.share() * self.scale
    }
}

/// Bounds above this are none: the limiter does not count longer, and neither does anyone's patience.
const LONGEST_NS: f64 = qjump_ebpf::limiter::MAX_BURST_NS as f64;

/// Steps towards a fixed point; hardly ever more than ten. A link so full that it takes more has no bound.
const MOST_STEPS: u32 = 100_000;

/// The least D with `D = constant + sum of demands(D)`, ns; `None` if there is none.
pub fn least_fixed_point(constant_ns: f64, demands: &[Demand]) -> Option<f64> {
    let slope: f64 = demands.iter().map(Demand::slope).sum();
    if slope >= 1.0 - ROUNDING {
        return None;
    }
    // Counts of packets are held while the rest, which is linear, is solved exactly; they only grow.
    let (mut linear, mut fixed) = (0.0, constant_ns);
    for demand in demands {
        if let Envelope::Bucket { burst_ns, share } = demand.envelope {
            linear += demand.slope();
            fixed += f64::from(demand.senders) * (burst_ns + share * demand.offset_ns);
        }
    }
    // As if packets could be divided: never above the solution, for a count is never less than its share.
    let shares: f64 = demands
        .iter()
        .filter(|demand| matches!(demand.envelope, Envelope::Spaced { .. }))
        .map(|demand| f64::from(demand.senders) * demand.envelope.share() * demand.offset_ns)
        .sum();
    let mut d = (fixed + shares) / (1.0 - slope) * (1.0 - ROUNDING);
    for _ in 0..MOST_STEPS {
        if d > LONGEST_NS {
            break;
        }
        let counted: f64 = demands
            .iter()
            .filter(|demand| matches!(demand.envelope, Envelope::Spaced { .. }))
            .map(|demand| demand.time_ns(d))
            .sum();
        let next = (fixed + counted) / (1.0 - linear);
        if next <= d * (1.0 + ROUNDING) {
            return Some(next.max(d));
        }
        d = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spaced(packet_ns: f64, epoch_ns: f64) -> Envelope {
        Envelope::Spaced { packet_ns, epoch_ns, tolerance_ns: 0.0 }
    }

    #[test]
    fn an_open_window_of_one_epoch_has_one_packet() {
        let envelope = spaced(1.0, 10.0);
        let counts: Vec<_> = [0.1, 10.0, 10.1, 20.0, 20.1].map(|w| envelope.packets(w).unwrap()).into();
        assert_eq!(counts, [1.0, 1.0, 2.0, 2.0, 3.0]);
        // Early by 2: 8 apart, then 10 again.
        let early = Envelope::Spaced { packet_ns: 1.0, epoch_ns: 10.0, tolerance_ns: 2.0 };
        let counts: Vec<_> = [8.0, 8.1, 18.0, 18.1].map(|w| early.packets(w).unwrap()).into();
        assert_eq!(counts, [1.0, 2.0, 2.0, 3.0]);
    }

    #[test]
    fn counts_what_comes_while_it_waits() {
        // 100 ns of its own; above it, 4 hosts with 10 ns in each 100 ns: D = 100 + 40 ceil(D / 100).
        let above = Demand { senders: 4, envelope: spaced(10.0, 100.0), scale: 1.0, offset_ns: 0.0 };
        assert_eq!(least_fixed_point(100.0, &[above]), Some(180.0));
        let full = Demand { senders: 10, ..above };
        assert_eq!(least_fixed_point(100.0, &[full]), None);
    }

    #[test]
    fn solves_buckets_exactly() {
        let bucket = Demand {
            senders: 2,
            envelope: Envelope::Bucket { burst_ns: 50.0, share: 0.2 },
            scale: 2.0,
            offset_ns: 10.0,
        };
        // D = 30 + 2 (50 + 0.2 (2 D + 10)) = 134 + 0.8 D
        let d = least_fixed_point(30.0, &[bucket]).unwrap();
        assert!((d - 670.0).abs() < 1e-6, "{d}");
    }

    proptest! {
        #[test]
        fn is_a_fixed_point_and_the_least(
            constant in prop_oneof![Just(0.0), 1.0f64..1e6],
            parts in prop::collection::vec((1u32..50, 1.0f64..1e3, 1e3f64..1e6, 1u8..3, 0.0f64..1e5, any::<bool>()), 1..7),
        ) {
            let demands: Vec<Demand> = parts
                .iter()
                .map(|&(senders, packet, epoch, scale, offset_ns, bucket)| Demand {
                    senders,
                    envelope: if bucket {
                        Envelope::Bucket { burst_ns: packet, share: packet / epoch }
                    } else {
                        spaced(packet, epoch)
                    },
                    scale: f64::from(scale),
                    offset_ns,
                })
                .collect();
            let f = |d: f64| constant + demands.iter().map(|demand| demand.time_ns(d)).sum::<f64>();
            match least_fixed_point(constant, &demands) {
                Some(d) => {
                    prop_assert!((f(d) - d).abs() <= 1e-6 * d, "{} {}", f(d), d);
                    // From below, plain iteration never passes it.
                    let mut low = 0.0;
                    for _ in 0..2_000 {
                        low = f(low);
                    }
                    prop_assert!(low <= d * (1.0 + 1e-9));
                }
                None => prop_assert!(f(1e7) > 1e7),
            }
        }
    }
}
