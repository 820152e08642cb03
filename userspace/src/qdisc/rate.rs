//! HTB's arithmetic: how a rate must be lowered so that rounding never makes it faster.
//!
//! HTB charges a packet of `len` bytes `len * mult >> shift` ns, with `mult` the integer part of
//! `10^9 * 2^shift / rate` (net/sched/sch_generic.c, `psched_ratecfg_precompute__`; include/net/sch_generic.h,
//! `psched_l2t_ns`). Both steps round down, so that a packet costs up to
//!
//! * 1 ns less than its time, by the shift, whatever its size: most for the smallest packet;
//! * a fraction 1 / `mult` less, where `mult` is at least 2^31, or 2^63 / `rate` if that is less (from 2^32
//!   bytes/s on).

/// The highest rate, in bytes/s, at which HTB charges every packet of at least `least` bytes at least the time
/// that it takes at `bytes_per_s`.
///
/// With `r` the rate that is asked for and `m` = `least`, a packet of `len >= m` bytes at the rate `s` costs more
/// than `10^9 len / s * (1 - e) - 1` ns, with `e` = 1 / `mult`. That is at least `10^9 len / r` if
/// `1 / s >= (1 / r + 1 / (10^9 m)) / (1 - e)`.
pub fn lowered(bytes_per_s: u64, least: u16) -> u64 {
    let rate = u128::from(bytes_per_s);
    let second = 1_000_000_000 * u128::from(least.max(1));
    let shifted = rate * second / (second + rate);
    // The fraction 1 / mult, rounded up: 2^-31, or rate / 2^62 to be clear of the rounding of 2^63 / rate.
    let fraction = (shifted >> 31).max((shifted * shifted) >> 62) + 1;
    shifted.saturating_sub(fraction) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel charges, ns.
    fn charged(rate: u64, len: u32) -> u64 {
        let (mut factor, mut shift) = (1_000_000_000u64, 0);
        let mut mult = factor / rate;
        while mult & 1 << 31 == 0 && factor & 1 << 63 == 0 {
            factor <<= 1;
            shift += 1;
            mult = factor / rate;
        }
        (u64::from(len) * u64::from(mult as u32)) >> shift
    }

    #[test]
    fn the_kernel_charges_less_than_the_time_unless_the_rate_is_lowered() {
        // 280 bytes at 10 Gbit/s: 224 ns, but at 10.007 Gbit/s 223.8 ns, of which the kernel charges 223.
        assert_eq!(charged(1_250_900_000, 280), 223);
        let asked = 1_250_900_000;
        assert!(u128::from(charged(lowered(asked, 280), 280)) * u128::from(asked) >= 280 * 1_000_000_000);
    }

    #[test]
    fn little_is_lost() {
        // 1 ns more for each of the smallest packets.
        assert_eq!(lowered(280_000, 280), 279_998);
        assert_eq!(lowered(12_500_000, 84), 12_498_139);
        assert_eq!(lowered(1_250_000_000, 1538), 1_248_984_894);
        assert_eq!(lowered(0, 84), 0);
    }

    proptest! {
        #[test]
        fn no_packet_is_charged_less_than_its_time(
            rate in prop_oneof![2u64..1 << 20, 2u64..1 << 32, 2u64..1 << 38],
            least in 60u16..10_000,
            more in 0u32..500_000,
        ) {
            let lowered = lowered(rate, least);
            prop_assume!(lowered > 0);
            prop_assert!(lowered <= rate);
            let len = u32::from(least) + more;
            prop_assert!(u128::from(charged(lowered, len)) * u128::from(rate) >= u128::from(len) * 1_000_000_000);
        }
    }
}
