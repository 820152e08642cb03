//! Why a packet was passed or dropped.

/// How many reasons there are.
pub const REASONS: usize = 13;

/// The one verdict that each packet gets. Numbers are part of the pinned counters' layout: add at the
/// end, never renumber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Reason {
    /// Left at the level it asked for.
    Passed = 0,
    /// Dropped: the level's budget was used up.
    OverLimit = 1,
    /// Dropped: larger than the level's largest packet, and the level's rule is to drop.
    OversizeDropped = 2,
    /// Left at level 0: larger than the level's largest packet. Counted at the level asked for.
    OversizeDemoted = 3,
    /// Left at level 0: the plan has no such level. Counted at the level asked for.
    NotConfigured = 4,
    /// Left at level 0: `skb->priority` is above 7 and names no level. Counted at level 0.
    UnknownPriority = 5,
    /// Left at level 0: neither IPv4 nor IPv6 (ARP, LLDP). Has no DSCP.
    NonIp = 6,
    /// Left at level 0: says it is IP, but its header is cut short or contradicts itself. Its DSCP is not
    /// touched.
    Malformed = 7,
    /// Dropped: other CPUs changed the limiter's word more often than the program may retry, or the plan changed under
    /// the packet and has no place for it at its level.
    Contended = 8,
    /// Dropped: the header could not be made writable, so the packet would have carried another mark.
    MarkFailed = 9,
    /// Dropped: it would have had to wait longer than the horizon of its level.
    BeyondHorizon = 10,
    /// Left at a lower level that admitted it: the level's budget was used up. Counted at the level asked for.
    OverDemoted = 11,
    /// Left at level 0: the socket was not granted the level, which is for grants alone, or there is no socket:
    /// the packet is forwarded. Counted at the level asked for.
    NotGranted = 12,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; REASONS] = [
        Self::Passed,
        Self::OverLimit,
        Self::OversizeDropped,
        Self::OversizeDemoted,
        Self::NotConfigured,
        Self::UnknownPriority,
        Self::NonIp,
        Self::Malformed,
        Self::Contended,
        Self::MarkFailed,
        Self::BeyondHorizon,
        Self::OverDemoted,
        Self::NotGranted,
    ];

    /// The reason with this number; those that do not exist are taken for the last.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Self {
        let last = REASONS as u32 - 1;
        let number = if (number as u32) < last { number as u32 } else { last };
        // SAFETY: `repr(u32)`, and the numbers up to `last` are those of the reasons (tested below). A table would be made
        // anew on the eBPF stack for each packet.
        unsafe { core::mem::transmute::<u32, Self>(number) }
    }

    /// The reason as an index into the counters.
    #[inline(always)]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Whether the packet was dropped.
    #[inline(always)]
    pub const fn is_drop(self) -> bool {
        matches!(
            self,
            Self::OverLimit | Self::OversizeDropped | Self::Contended | Self::MarkFailed | Self::BeyondHorizon
        )
    }

    /// Whether the first such packet of a plan is an event for the log: it tells of a mistake, or of something unknown. What
    /// limits are there for is none.
    #[inline(always)]
    pub const fn is_rare(self) -> bool {
        matches!(
            self,
            Self::OversizeDropped
                | Self::OversizeDemoted
                | Self::NotConfigured
                | Self::UnknownPriority
                | Self::NonIp
                | Self::Malformed
                | Self::Contended
                | Self::MarkFailed
                | Self::BeyondHorizon
                | Self::NotGranted
        )
    }

    /// Whether a packet left at a lower level than it asked for.
    pub const fn is_demotion(self) -> bool {
        matches!(self, Self::OversizeDemoted | Self::NotConfigured | Self::OverDemoted | Self::NotGranted)
    }

    /// The name in tables, JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::OverLimit => "over_limit",
            Self::OversizeDropped => "oversize_dropped",
            Self::OversizeDemoted => "oversize_demoted",
            Self::NotConfigured => "not_configured",
            Self::UnknownPriority => "unknown_priority",
            Self::NonIp => "non_ip",
            Self::Malformed => "malformed",
            Self::Contended => "contended",
            Self::MarkFailed => "mark_failed",
            Self::BeyondHorizon => "beyond_horizon",
            Self::OverDemoted => "over_demoted",
            Self::NotGranted => "not_granted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_pinned_layout() {
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), number, "{}", reason.name());
            assert_eq!(Reason::from_number(number as u8), *reason);
        }
    }
}
