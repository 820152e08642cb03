//! Who may use which level: what a cgroup was granted, what a socket remembers of it, and the decision.
//!
//! A grant belongs to a cgroup and counts for the sockets that were made in it or below it; the nearest grant
//! wins. The cgroup of a socket is that of its maker at that time, and never changes (`sk_cgrp_data`), whoever
//! holds the socket and wherever he moves. A socket from before the grant is *adopted*: its record names the
//! cgroup whose grant counts for it.

use crate::{Level, pacing::Pacing};

/// Deepest cgroup that can have a grant, counted from the root. The programs look at every ancestor of a
/// socket's cgroup down to this depth, so nothing below can hide a nearer grant from them.
pub const MAX_DEPTH: u32 = 32;

/// Most grants on a host.
pub const MAX_GRANTS: u32 = 4096;

/// One entry of the map [`crate::names::GRANTS`]; the key is the number of a cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Grant {
    /// The level, 0 to 7.
    pub level: u32,
    /// `SO_SNDBUF` for its sockets, bytes; 0 leaves them as they are.
    pub send_buffer: u32,
    /// The user who granted it.
    pub uid: u32,
    /// See [`GRANT_OWNS_CGROUP`] and [`GRANT_BY_RULE`].
    pub flags: u32,
    /// When it was granted, ns since the Unix epoch.
    pub since_ns: u64,
}

/// In [`Grant::flags`]: the cgroup was made for the grant, and goes with it.
pub const GRANT_OWNS_CGROUP: u32 = 1;

/// In [`Grant::flags`]: a rule of the configuration made it, and may change it. What a person granted it may not.
pub const GRANT_BY_RULE: u32 = 2;

/// The key in the map [`crate::names::GRANTS`] of the grant that stands for "a rule gave this socket this level". It adopts
/// sockets as a cgroup's does. No cgroup has the topmost bit: its number is one of 32 bits, and above it how often those have
/// been used up (`__kernfs_new_node`, fs/kernfs/dir.c).
pub const fn rule_grant(level: Level) -> u64 {
    RULES | level.number() as u64
}

/// Whether a key is one of [`rule_grant`]'s.
pub const fn is_rule_grant(key: u64) -> bool {
    key & RULES != 0
}

const RULES: u64 = 1 << 63;

/// A level, or none: what a socket is granted, or what it asks for. One register for the eBPF verifier, where
/// an `Option<Level>` may be two, one of them not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct MaybeLevel(u32);

impl MaybeLevel {
    /// No level.
    pub const NONE: Self = Self(0);

    /// This level.
    #[inline(always)]
    pub const fn of(level: Level) -> Self {
        Self(level.number() as u32 + 1)
    }

    /// The level with this number, or none above 7.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        if number <= Level::STRICTEST.number() as u32 { Self(number + 1) } else { Self::NONE }
    }

    /// Whether whoever was granted this may use `level`.
    #[inline(always)]
    pub const fn covers(self, level: Level) -> bool {
        self.0 > level.number() as u32
    }

    /// The level, if there is one.
    #[inline(always)]
    pub const fn level(self) -> Option<Level> {
        Level::from_priority(self.0.wrapping_sub(1))
    }
}

/// The level of a socket's packets: what it was granted, or less if it asks for less. None without a grant: then
/// the packet stays what it is.
#[inline(always)]
pub const fn decide(granted: MaybeLevel, asked: MaybeLevel) -> MaybeLevel {
    // No grant is 0, which nothing asked for could lower.
    if asked.0 != 0 && asked.0 < granted.0 { asked } else { granted }
}

/// Whether only sockets with a grant may claim `level`: whether its bit is set in `grant_only`.
#[inline(always)]
pub const fn is_grant_only(level: Level, grant_only: u8) -> bool {
    grant_only & (1 << level.index()) != 0
}

/// What a socket remembers: the value of the map [`crate::names::SOCKETS`]. All zero for a new socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SocketRecord {
    /// The cgroup whose grant counts for a socket that was made elsewhere, or a [`rule_grant`]; 0 for none. If there is no
    /// such grant any more, the cgroup where the socket was made counts.
    pub adopted_by: u64,
    /// The grant found last, with the generation of the grants in which it was found. One word, because CPUs write
    /// it side by side: two fields could end up as an old grant that is called new.
    found: u64,
    /// The level that the process asked for with `SO_PRIORITY`.
    pub asked: MaybeLevel,
    /// `SO_SNDBUF` that the socket is still to get, bytes; 0 if it has it.
    pub send_buffer: u32,
    /// Its share of its level's rate.
    pub pacing: Pacing,
}

impl SocketRecord {
    /// The record of a socket that the grant with the key `by` counts for from now on.
    pub fn adopted(by: u64, asked: MaybeLevel) -> Self {
        Self { adopted_by: by, found: 0, asked, send_buffer: 0, pacing: Pacing::default() }
    }

    /// Whether what was found is still true in this generation of the grants, 1 or more.
    #[inline(always)]
    pub const fn is_fresh(&self, generation: u64) -> bool {
        self.found >> 8 == generation
    }

    /// The level that was found.
    #[inline(always)]
    pub const fn granted(&self) -> MaybeLevel {
        MaybeLevel((self.found & 0xff) as u32)
    }

    /// Remembers what was found in this generation.
    #[inline(always)]
    pub const fn remember(&mut self, granted: MaybeLevel, generation: u64) {
        self.found = generation << 8 | granted.0 as u64;
    }
}

const _: () = assert!(size_of::<Grant>() == 24);
const _: () = assert!(size_of::<SocketRecord>() == 40);

// SAFETY: `repr(C)`, `Copy`, integers without padding, and every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for Grant {}
// SAFETY: as for `Grant`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for SocketRecord {}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = MaybeLevel> {
        (0..=8).map(|number| MaybeLevel::from_number(8 - number))
    }

    #[test]
    fn nobody_gets_more_than_granted_nor_more_than_asked() {
        for granted in all() {
            for asked in all() {
                let level = decide(granted, asked).level();
                let least = [granted.level(), asked.level()].into_iter().flatten().min();
                assert_eq!(level, granted.level().and(least), "{granted:?} {asked:?}");
            }
        }
    }

    #[test]
    fn a_grant_covers_its_level_and_those_below() {
        for number in 0..8 {
            let level = Level::new(number).unwrap();
            for granted in all() {
                assert_eq!(granted.covers(level), granted.level().is_some_and(|granted| granted >= level));
            }
            for other in 0..8 {
                assert_eq!(is_grant_only(level, 1 << other), number == other);
            }
        }
    }

    #[test]
    fn what_was_found_is_forgotten_when_grants_change() {
        let mut record = SocketRecord::default();
        assert!(!record.is_fresh(1));
        for granted in all() {
            record.remember(granted, 1 << 40);
            assert!(record.is_fresh(1 << 40) && !record.is_fresh((1 << 40) + 1));
            assert_eq!(record.granted(), granted);
        }
        let adopted = SocketRecord::adopted(9, MaybeLevel::of(Level::STRICTEST));
        assert!(!adopted.is_fresh(1 << 40));
        assert_eq!((adopted.adopted_by, adopted.asked), (9, MaybeLevel::of(Level::STRICTEST)));
    }

    #[test]
    fn rules_have_a_grant_for_each_level_and_none_is_a_cgroup_s() {
        for level in Level::strictest_first() {
            assert!(is_rule_grant(rule_grant(level)));
            assert_eq!(rule_grant(level) as u8, level.number());
        }
        assert!(!is_rule_grant(0) && !is_rule_grant(u64::MAX >> 1));
    }

    #[test]
    fn numbers_above_seven_are_no_level() {
        assert_eq!(MaybeLevel::from_number(7).level(), Some(Level::STRICTEST));
        assert_eq!(MaybeLevel::from_number(8), MaybeLevel::NONE);
        assert_eq!(MaybeLevel::from_number(u32::MAX), MaybeLevel::NONE);
        assert_eq!(MaybeLevel::NONE.level(), None);
    }
}
