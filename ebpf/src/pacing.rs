//! What each flow of a limited level is to send, so that TCP does not run into the limit: an equal part of the
//! level's rate, shared among the flows that have lately sent anything.
//!
//! Time is cut into windows. A flow counts in each window in which it sends a packet with a payload, once, so an idle
//! connection takes no share, and nobody has to say when one ends. The limiter's program counts and
//! divides, and writes the share into the socket's record; the program on TCP's callbacks hands it to TCP.

use crate::LevelLimit;

/// Log2 of the length of a window, ns: 134 ms. A flow of full packets at a level of `r` bit/s has one in each window as
/// long as there are fewer than about `r / 92,000` of them; the count stays below that.
const WINDOW_SHIFT: u32 = 27;

/// How many windows a share holds without a packet that renews it. A socket that sends on without is on an interface that
/// does not limit it (any more).
const LASTS_WINDOWS: u32 = 8;

/// L2 bytes of the largest packet without a payload: Ethernet with a tag, IPv6, and TCP with all its options.
pub const LARGEST_EMPTY: u32 = 14 + 4 + 40 + 60;

/// `SO_MAX_PACING_RATE` of a socket that is not paced: no limit (`sk_setsockopt`, net/core/sock.c).
pub const NOT_PACED: u32 = u32::MAX;

/// The window of a time of `CLOCK_MONOTONIC`. The numbers wrap after 18 years.
#[inline(always)]
pub const fn window(now_ns: u64) -> u32 {
    (now_ns >> WINDOW_SHIFT) as u32
}

/// How many flows of a level are active: a window, the flows counted in it, and those of the window before. One word,
/// which CPUs change by compare-exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ActiveFlows(pub u64);

impl ActiveFlows {
    const fn new(window: u32, now: u16, before: u16) -> Self {
        Self((window as u64) << 32 | (before as u64) << 16 | now as u64)
    }

    /// The same, seen from this window.
    #[inline(always)]
    const fn at(self, window: u32) -> Self {
        match window.wrapping_sub((self.0 >> 32) as u32) {
            0 => self,
            1 => Self::new(window, 0, self.0 as u16),
            // A CPU that read the clock first, and came last.
            u32::MAX => self,
            _ => Self::new(window, 0, 0),
        }
    }

    /// With one flow more in this window.
    #[inline(always)]
    pub const fn with_one_more(self, window: u32) -> Self {
        let here = self.at(window);
        // Saturates, so that it does not run over into the number of the window before.
        if here.0 as u16 == u16::MAX { here } else { Self(here.0 + 1) }
    }

    /// How many there are, at least 1: as many as in the window before, as long as this one has not shown more.
    #[inline(always)]
    pub const fn count(self, window: u32) -> u32 {
        let here = self.at(window);
        let (now, before) = (here.0 as u16, (here.0 >> 16) as u16);
        let count = if now > before { now } else { before };
        if count == 0 { 1 } else { count as u32 }
    }
}

/// A queue in which a packet waits no longer than this, ns, is no reason to share: a flow that has much to send
/// would be held to the same part as those that now and then send a packet.
const SHORT_WAIT_NS: u64 = 20_000_000;

/// Among how many of the active flows the rate is shared, if a packet has to wait for so long: all, but for a queue that
/// is short.
#[inline(always)]
pub const fn sharers(limit: &LevelLimit, flows: u32, wait_ns: u64) -> u32 {
    if limit.horizon_ns() > 0 && wait_ns <= SHORT_WAIT_NS { 1 } else { flows }
}

/// What one of so many flows is to send at a level with this limit, payload bytes per second, at least 1; [`NOT_PACED`]
/// at rates that `SO_MAX_PACING_RATE` cannot express in four bytes.
///
/// Where a queue holds packets back, the shares add up to the rate on the wire, which is 1 to 6% more than the payload
/// that gets through: the queue always has something to send. Without one, what is too much is lost: they add up to
/// nine tenths, which is 95% of that payload with packets of 1,500 bytes.
#[inline(always)]
pub const fn share(limit: &LevelLimit, flows: u32) -> u32 {
    let rate = limit.wire_rate();
    let rate = if limit.horizon_ns() > 0 { rate } else { rate / 10 * 9 };
    match rate.checked_div(flows as u64) {
        Some(share) if share < NOT_PACED as u64 => {
            if share == 0 {
                1
            } else {
                share as u32
            }
        }
        _ => NOT_PACED,
    }
}

/// What a socket remembers of its share. All zero for one that never sent anything at a limited level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Pacing {
    /// The window in which it was last counted.
    window: u32,
    /// Its share, bytes per second; 0 if it never had one.
    share: u32,
    /// `SO_MAX_PACING_RATE` that it was given, bytes per second; 0 for none.
    given: u32,
    /// The flows that the share is for.
    flows: u32,
}

impl Pacing {
    /// Whether it was counted in this window already.
    #[inline(always)]
    pub const fn is_counted(&self, window: u32) -> bool {
        self.share != 0 && self.window == window
    }

    /// Whether its share is that of one of so many flows.
    #[inline(always)]
    pub const fn is_for(&self, window: u32, flows: u32) -> bool {
        self.is_counted(window) && self.flows == flows
    }

    /// Gives it a share in this window, in which it was counted.
    #[inline(always)]
    pub const fn remember(&mut self, window: u32, flows: u32, share: u32) {
        self.window = window;
        self.flows = flows;
        self.share = share;
    }

    /// The `SO_MAX_PACING_RATE` that TCP is to get now, if it has another one.
    #[inline(always)]
    pub const fn change(&mut self, window: u32) -> Option<u32> {
        let is_limited = self.share != 0 && window.wrapping_sub(self.window) <= LASTS_WINDOWS;
        let wanted = match (is_limited, self.given) {
            (true, _) => self.share,
            (false, 0) => return None,
            (false, _) => NOT_PACED,
        };
        if wanted == self.given {
            return None;
        }
        self.given = wanted;
        Some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limiter::Oversize;

    const IDLE: ActiveFlows = ActiveFlows(0);

    fn limit(rate_bps: u64) -> LevelLimit {
        LevelLimit::per_byte(rate_bps, 30_000, 1_514, Oversize::Drop).unwrap()
    }

    proptest! {
        /// Against a list of who was active when.
        #[test]
        fn counts_the_flows_of_this_window_or_the_one_before(
            first in any::<u32>(),
            steps in prop::collection::vec((0u32..4, 0u32..70), 1..20),
        ) {
            let (mut word, mut window) = (IDLE, first);
            let mut active = std::collections::HashMap::new();
            // 1 and not 0: a word that nobody has written is one of window 0.
            for (ahead, joining) in core::iter::once((2, 1)).chain(steps) {
                window = window.wrapping_add(ahead);
                for _ in 0..joining {
                    word = word.with_one_more(window);
                    *active.entry(window).or_insert(0) += 1;
                }
                let of = |window: u32| active.get(&window).copied().unwrap_or(0);
                let expected = of(window).max(of(window.wrapping_sub(1))).max(1);
                prop_assert_eq!(word.count(window), expected);
            }
        }

        /// Together, flows get no more than the level, and lose less than one byte per second each.
        #[test]
        fn shares_add_up(rate_bps in 1_000_000u64..30_000_000_000, flows in 1u32..2_000, paced in any::<bool>()) {
            let policed = LevelLimit::per_byte(rate_bps, 9_000_000, 1_514, Oversize::Drop);
            prop_assume!(policed.is_ok());
            let limit = if paced { policed.unwrap().paced(1_000_000).unwrap() } else { policed.unwrap() };
            let share = share(&limit, flows);
            prop_assert!(share >= 1);
            let all = f64::from(share) * f64::from(flows);
            let rate = rate_bps as f64 / 8.0 * if paced { 1.0 } else { 0.9 };
            prop_assert!(all <= rate + f64::from(flows));
            prop_assert!(all >= rate * 0.9999 - 10.0 - f64::from(flows), "{} of {}", all, rate);
        }
    }

    #[test]
    fn a_clock_that_was_read_a_little_earlier_does_not_throw_the_count_away() {
        let word = IDLE.with_one_more(10).with_one_more(11).with_one_more(11);
        assert_eq!(word.with_one_more(10).count(11), 3);
        assert_eq!(word.count(10), 2);
    }

    #[test]
    fn counts_saturate() {
        let mut word = IDLE;
        for _ in 0..70_000 {
            word = word.with_one_more(5);
        }
        assert_eq!(word.count(5), u32::from(u16::MAX));
        assert_eq!(word.count(6), u32::from(u16::MAX));
        assert_eq!(word.count(7), 1);
    }

    #[test]
    fn no_share_is_nothing_and_none_wraps() {
        assert_eq!(share(&limit(50_000_000), u32::from(u16::MAX)), 85);
        assert_eq!(share(&LevelLimit::per_byte(8_000, 1_538, 1_514, Oversize::Drop).unwrap(), 65_535), 1);
        let fast = LevelLimit::per_byte(100_000_000_000, 1_000_000, 1_514, Oversize::Drop).unwrap();
        assert_eq!(share(&fast, 1), NOT_PACED);
        assert!(share(&fast, 4) < NOT_PACED);
    }

    #[test]
    fn tcp_hears_of_changes_alone_and_is_let_go_when_nothing_limits_it() {
        let mut pacing = Pacing::default();
        assert_eq!(pacing.change(0), None);
        assert!(!pacing.is_counted(0));
        pacing.remember(100, 2, 1_000);
        assert!(pacing.is_for(100, 2) && !pacing.is_for(100, 3) && !pacing.is_for(101, 2));
        assert_eq!((pacing.change(100), pacing.change(100 + LASTS_WINDOWS)), (Some(1_000), None));
        assert_eq!((pacing.change(109), pacing.change(110)), (Some(NOT_PACED), None));
        pacing.remember(200, 1, 2_000);
        assert_eq!(pacing.change(200), Some(2_000));
    }

    #[test]
    fn a_short_queue_is_no_reason_to_share() {
        let limit = LevelLimit::per_byte(50_000_000, 30_000, 1_514, Oversize::Demote).unwrap();
        assert_eq!(sharers(&limit, 7, 0), 7, "what is policed is shared always");
        let paced = limit.paced(1_000_000_000).unwrap();
        assert_eq!(sharers(&paced, 7, SHORT_WAIT_NS), 1);
        assert_eq!(sharers(&paced, 7, SHORT_WAIT_NS + 1), 7);
    }
}
