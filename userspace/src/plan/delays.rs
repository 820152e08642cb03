//! The fixed delays of a path, epsilon: given as one number, or computed from what is on the path.

use qjump_ebpf::frame::MIN_FRAME;

use crate::units::{Nanos, Rate};

/// Where epsilon comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Delays {
    /// The user knows it.
    Given(Nanos),
    /// Sum of what is on the longest path.
    Path(Path),
}

/// The longest path between two hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Path {
    /// Switches on it: 1 in a rack, 3 in two tiers, 5 in three.
    pub hops: u32,
    /// Forwarding delay of a switch and the cable behind it.
    pub switch_delay: Nanos,
    /// Largest frame that is not planned, L2 bytes without FCS: best effort's.
    pub mtu: u32,
    /// Wire bytes of lower levels that the sender's NIC may have begun to send: a GSO burst unless it is capped. At
    /// least one frame is counted.
    pub host_burst: u32,
}

/// What a NIC may have begun to send unless GSO is capped: the kernel's default gso_max_size
/// (`GSO_LEGACY_MAX_SIZE`, include/linux/netdevice.h).
pub const GSO_BURST: u32 = 65_536;

/// What a level's epsilon consists of, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fixed {
    /// Given by the user as one number.
    pub given_ns: f64,
    /// Switches and cables.
    pub switch_ns: f64,
    /// A packet is received whole before it is sent on: once a switch.
    pub store_and_forward_ns: f64,
    /// A frame of a lower level that is on the wire already is not interrupted: once a switch.
    pub blocking_ns: f64,
    /// The same in the sender's own NIC: one frame, or one GSO burst.
    pub host_ns: f64,
}

impl Fixed {
    /// How much of it may differ from packet to packet on paths of up to `hops` switches, ns; `None` if it was
    /// given as one number.
    pub fn spread_ns(&self, hops: u32) -> Option<f64> {
        let beyond_first = f64::from(hops.saturating_sub(1)) / f64::from(hops.max(1));
        let paths = (self.switch_ns + self.store_and_forward_ns) * beyond_first;
        (self.given_ns == 0.0).then_some(self.blocking_ns + self.host_ns + paths)
    }

    /// Their sum: epsilon, ns.
    pub fn total_ns(&self) -> f64 {
        self.given_ns + self.switch_ns + self.store_and_forward_ns + self.blocking_ns + self.host_ns
    }
}

/// Bytes that a frame of `l2_bytes` takes on the wire; an overhead of 0 is for published numbers, which
/// count no padding either.
pub fn on_wire(l2_bytes: u32, overhead: u32) -> u32 {
    match overhead {
        0 => l2_bytes,
        overhead => l2_bytes.max(MIN_FRAME) + overhead,
    }
}

impl Delays {
    /// The fixed delays of a level whose own and higher packets take at most `packet_bytes` on the wire, and
    /// lower frames at most `lower_bytes`.
    pub fn fixed(&self, packet_bytes: f64, lower_bytes: f64, link_rate: Rate) -> Fixed {
        match *self {
            Self::Given(epsilon) => Fixed { given_ns: epsilon.ns() as f64, ..Fixed::default() },
            Self::Path(path) => {
                let time_ns = |bytes: f64| bytes * 8e9 / link_rate.bps() as f64;
                let hops = f64::from(path.hops);
                let frame_ns = time_ns(lower_bytes);
                Fixed {
                    given_ns: 0.0,
                    switch_ns: hops * path.switch_delay.ns() as f64,
                    store_and_forward_ns: hops * time_ns(packet_bytes),
                    blocking_ns: hops * frame_ns,
                    host_ns: frame_ns.max(time_ns(f64::from(path.host_burst))),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_what_is_on_the_path() {
        let path = Path { hops: 3, switch_delay: Nanos::from_ns(500), mtu: 1514, host_burst: 0 };
        let fixed = Delays::Path(path).fixed(280.0, 1_538.0, Rate::from_bps(10_000_000_000));
        // 1538 B are 1230.4 ns at 10 Gbit/s, 280 B are 224 ns.
        assert_eq!(fixed.switch_ns, 1500.0);
        assert!((fixed.store_and_forward_ns - 672.0).abs() < 1e-9);
        assert!((fixed.blocking_ns - 3.0 * 1230.4).abs() < 1e-9);
        assert!((fixed.host_ns - 1230.4).abs() < 1e-9);
        // A 64 KiB burst in the NIC is 52 us.
        let burst =
            Delays::Path(Path { host_burst: 65_536, ..path }).fixed(280.0, 1_538.0, Rate::from_bps(10_000_000_000));
        assert!((burst.host_ns - 52_428.8).abs() < 1e-9);
        assert_eq!(Delays::Given(Nanos::from_ns(4_000)).fixed(1e9, 1e9, Rate::from_bps(1)).total_ns(), 4_000.0);
    }
}
