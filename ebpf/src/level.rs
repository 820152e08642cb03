//! The one numbering: level = `SO_PRIORITY` = 802.1p PCP, and DSCP = CS(level).

/// How many levels there are: as many as an 802.1p priority and an IP class selector can name.
pub const LEVELS: usize = 8;

/// A priority level, 0 to 7. Level 7 is the strictest; level 0 is best effort and never limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Level(u8);

impl Level {
    /// Best effort: the default, unlimited.
    pub const BEST_EFFORT: Self = Self(0);
    /// The strictest level.
    pub const STRICTEST: Self = Self(7);

    /// The level with this number, or `None` above 7.
    #[inline(always)]
    pub const fn new(number: u8) -> Option<Self> {
        if number < LEVELS as u8 { Some(Self(number)) } else { None }
    }

    /// The level in the lowest three bits of a number.
    #[inline(always)]
    pub const fn masked(number: u8) -> Self {
        Self(number & (LEVELS as u8 - 1))
    }

    /// The level that `skb->priority` names, or `None` for values that are not a level (a class id
    /// of some qdisc, for example).
    #[inline(always)]
    pub const fn from_priority(priority: u32) -> Option<Self> {
        if priority < LEVELS as u32 { Some(Self(priority as u8)) } else { None }
    }

    /// 0 to 7; also the PCP of an 802.1Q tag.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The level as an array index, below [`LEVELS`].
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The class selector codepoint CS(level) (RFC 2474, section 4.2.2.1), as the six DSCP bits.
    #[inline(always)]
    pub const fn dscp(self) -> u8 {
        self.0 << 3
    }

    /// The IPv4 TOS or IPv6 traffic class byte: CS(level), with the two ECN bits of `old` kept.
    #[inline(always)]
    pub const fn traffic_class(self, old: u8) -> u8 {
        (self.dscp() << 2) | (old & 0b11)
    }

    /// All levels, the strictest first.
    pub fn strictest_first() -> impl Iterator<Item = Self> {
        (0..LEVELS as u8).rev().map(Self)
    }
}

impl core::fmt::Display for Level {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zero_to_seven_are_levels() {
        for number in 0..=u8::MAX {
            assert_eq!(Level::new(number).is_some(), number <= 7);
        }
        assert_eq!(Level::from_priority(7), Some(Level::STRICTEST));
        // 8 must not wrap to 0, nor 0x10007 (a class id) to 7.
        assert_eq!(Level::from_priority(8), None);
        assert_eq!(Level::from_priority(0x1_0007), None);
    }

    #[test]
    fn marks_are_class_selectors_and_keep_ecn() {
        let cs: std::vec::Vec<u8> = (0..8).map(|n| Level::new(n).unwrap().dscp()).collect();
        assert_eq!(cs, [0, 8, 16, 24, 32, 40, 48, 56]);
        for old in 0..=u8::MAX {
            let class = Level::STRICTEST.traffic_class(old);
            assert_eq!(class >> 2, 56);
            assert_eq!(class & 3, old & 3);
        }
    }
}
