//! Arithmetic on frames: what a packet takes on the wire, and the header bytes that change with a mark.

use crate::Level;

/// Length of an Ethernet header without tags, in bytes.
pub const ETHERNET: usize = 14;
/// Length of an 802.1Q tag, in bytes.
pub const VLAN_TAG: usize = 4;
/// Ethertype of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// Ethertype of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Ethertype of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// Ethertype of an 802.1ad service tag.
pub const ETHERTYPE_QINQ: u16 = 0x88a8;
/// Length of an IPv4 header without options, in bytes.
pub const IPV4: usize = 20;
/// Length of the fixed IPv6 header, in bytes.
pub const IPV6: usize = 40;

/// What a frame takes on the wire beside its L2 bytes: FCS 4, preamble and delimiter 8, gap 12
/// (IEEE 802.3, clause 4.4.2).
pub const WIRE_OVERHEAD: u32 = 24;
/// Shortest frame without its FCS: senders pad to 64 bytes with it.
pub const MIN_FRAME: u32 = 60;

/// Bytes that a packet takes on the wire.
///
/// `l2_bytes` counts the headers of every segment, as `skb->wire_len` does at egress, without FCS;
/// `segments` is 1 for a packet that is not GSO. The lengths of single segments are not known, so a
/// short last one is counted as padded: never less than the truth, at most 18 bytes more.
#[inline(always)]
pub const fn wire_bytes(l2_bytes: u32, segments: u32) -> u32 {
    // The shortest last segment is 42 bytes of headers (UDP over IPv4) and one of payload.
    let padding = if segments > 1 { MIN_FRAME - 43 } else { 0 };
    let padded = l2_bytes.saturating_add(padding);
    let least = segments.saturating_mul(MIN_FRAME);
    let frames = if padded > least { padded } else { least };
    frames.saturating_add(segments.saturating_mul(WIRE_OVERHEAD))
}

/// The IPv4 header checksum after one 16-bit word of the header changed (RFC 1624, equation 3).
#[inline(always)]
pub const fn checksum_after(checksum: u16, old_word: u16, new_word: u16) -> u16 {
    let sum = (!checksum) as u32 + (!old_word) as u32 + new_word as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The first two bytes of an IPv6 header with the traffic class of `level`; version, ECN and flow
/// label stay. The class lies across both bytes: its high half in the first, its low half in the second.
#[inline(always)]
pub const fn ipv6_marked(first_two: [u8; 2], level: Level) -> [u8; 2] {
    let [a, b] = first_two;
    let class = level.traffic_class((a << 4) | (b >> 4));
    [(a & 0xf0) | (class >> 4), (class << 4) | (b & 0x0f)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full_checksum(header: &[u8; 20]) -> u16 {
        let mut sum = 0u32;
        for (i, pair) in header.chunks(2).enumerate() {
            if i != 5 {
                sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
            }
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn wire_bytes_of_single_frames() {
        assert_eq!(wire_bytes(14, 1), 84); // padded to 64 with FCS, and 20 more
        assert_eq!(wire_bytes(60, 1), 84);
        assert_eq!(wire_bytes(61, 1), 85);
        assert_eq!(wire_bytes(1514, 1), 1538);
        assert_eq!(wire_bytes(u32::MAX, u32::MAX), u32::MAX);
    }

    proptest! {
        #[test]
        fn wire_bytes_never_less_than_the_segments(size in 1u32..1400, last in 1u32..1400, count in 2u32..40) {
            let last = last.min(size);
            let headers = 42;
            let exact: u32 = (0..count)
                .map(|i| (headers + if i + 1 == count { last } else { size }).max(MIN_FRAME) + WIRE_OVERHEAD)
                .sum();
            let l2 = count * headers + (count - 1) * size + last;
            let counted = wire_bytes(l2, count);
            prop_assert!(counted >= exact && counted <= exact + 18, "{counted} {exact}");
        }

        #[test]
        fn checksum_follows_the_traffic_class(mut header in any::<[u8; 20]>(), level in 0u8..8) {
            header[0] = 0x45;
            let sum = full_checksum(&header);
            let level = Level::new(level).unwrap();
            let old = u16::from_be_bytes([header[0], header[1]]);
            header[1] = level.traffic_class(header[1]);
            let new = u16::from_be_bytes([header[0], header[1]]);
            prop_assert_eq!(checksum_after(sum, old, new), full_checksum(&header));
        }

        #[test]
        fn ipv6_mark_changes_the_class_alone(a in any::<u8>(), b in any::<u8>(), level in 0u8..8) {
            let level = Level::new(level).unwrap();
            let [x, y] = ipv6_marked([a, b], level);
            prop_assert_eq!(x & 0xf0, a & 0xf0);
            prop_assert_eq!(y & 0x0f, b & 0x0f);
            let class = (x << 4) | (y >> 4);
            prop_assert_eq!(class >> 2, level.dscp());
            prop_assert_eq!(class & 3, (b >> 4) & 3);
        }
    }
}
