//! The maps, and the only code that touches them.

use core::{
    hint::black_box,
    mem::offset_of,
    ptr::{addr_of, read_volatile},
};

use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray},
};
use qjump_ebpf::{
    Config, Counters, LEVELS, Level, LevelLimit, LevelState, REASONS, State,
    layout::{FLAG_CLASSES, FLAG_DEPARTURE_TIMES, FLAG_PRIORITY_TAG, GRANT_ONLY_SHIFT, Word},
};

use crate::{Verdict, exchange};

/// `BPF_F_MMAPABLE`: the loader carries limiter words over with the same compare-exchange.
const MMAPABLE: u32 = 1 << 10;

/// Key: slot 0 or 1. Value: one configuration. Written by the loader, and only while no packet reads
/// that slot; read by every packet.
#[map(name = "qj_config")]
static CONFIG: Array<Config> = Array::with_max_entries(2, 0);

/// Key: 0. Value: the slot in force and the limiter words. The slot is written by the loader, words by
/// every CPU by `exchange`.
#[map(name = "qj_state")]
static STATE: Array<State> = Array::with_max_entries(1, MMAPABLE);

/// Key: 0. Value: packets and bytes by level and reason. Written on its own CPU alone, read by `status`.
#[map(name = "qj_counters")]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// One of the two configurations.
#[derive(Clone, Copy)]
pub struct Slot {
    number: u64,
    config: &'static Config,
}

impl Slot {
    /// The configuration in force now.
    #[inline(always)]
    pub fn in_force() -> Option<Self> {
        let state = STATE.get_ptr(0)?;
        // SAFETY: map values live as long as the program, and `active` is one aligned word.
        let number = unsafe { read_volatile(addr_of!((*state).active)) } & 1;
        Some(Self { number, config: CONFIG.get(number as u32)? })
    }

    #[inline(always)]
    pub const fn number(self) -> u64 {
        self.number
    }

    /// Number of the plan.
    #[inline(always)]
    pub const fn plan(self) -> u64 {
        self.config.plan.generation
    }

    #[inline(always)]
    pub const fn tags_priority(self) -> bool {
        self.config.flags & FLAG_PRIORITY_TAG != 0
    }

    /// Bit L: level L is for sockets with a grant alone.
    #[inline(always)]
    pub const fn grant_only(self) -> u8 {
        (self.config.flags >> GRANT_ONLY_SHIFT) as u8
    }

    #[inline(always)]
    pub const fn has_departure_times(self) -> bool {
        self.config.flags & FLAG_DEPARTURE_TIMES != 0
    }

    /// Whether the queue is qjump's: then a priority that is no level must not name one of its classes.
    #[inline(always)]
    pub const fn has_own_queue(self) -> bool {
        self.config.flags & (FLAG_CLASSES | FLAG_DEPARTURE_TIMES) != 0
    }

    #[inline(always)]
    pub const fn has_classes(self) -> bool {
        self.config.flags & FLAG_CLASSES != 0
    }

    #[inline(always)]
    pub fn limit(self, level: Level) -> &'static LevelLimit {
        // SAFETY: the index is below the number of levels.
        unsafe { self.config.limits.get_unchecked(index(level)) }
    }
}

/// The level as an index that the verifier can see to be below 8. The compiler knows it to be, and would drop
/// the mask.
#[inline(always)]
fn index(level: Level) -> usize {
    black_box(level.index()) & (LEVELS - 1)
}

/// A word of a level in map memory.
pub struct WordRef {
    /// Aligned to 8 bytes.
    pub word: *mut u64,
    active: *const u64,
    place: exchange::Place,
}

/// The limiter word of `level`.
#[inline(always)]
pub fn limiter_word(level: Level) -> Option<WordRef> {
    word(level, offset_of!(Word, value))
}

/// The word that counts the active flows of `level`.
#[inline(always)]
pub fn flows_word(level: Level) -> Option<WordRef> {
    word(level, offset_of!(Word, flows))
}

/// The word that knows which events of `level` have been told.
#[inline(always)]
pub fn told_word(level: Level) -> Option<WordRef> {
    word(level, offset_of!(Word, told))
}

/// The word that is so many bytes into the [`Word`] of `level`.
#[inline(always)]
pub fn word(level: Level, offset: usize) -> Option<WordRef> {
    let state = STATE.get_ptr_mut(0)?;
    // SAFETY: map values live as long as the program; the index is below the number of words, and the offset is that of
    // a field.
    unsafe {
        let words = addr_of!((*state).words).cast::<Word>();
        Some(WordRef {
            word: words.add(index(level)).cast_mut().cast::<u64>().byte_add(offset),
            active: addr_of!((*state).active),
            place: exchange::Place::new(level, offset),
        })
    }
}

impl LevelState for WordRef {
    #[inline(always)]
    fn load(&self) -> u64 {
        // A plain load of an aligned word does not tear on any architecture with eBPF. The intrinsic
        // for an atomic load crashes bpf-linker 0.10.4.
        // SAFETY: `word` points into map memory.
        unsafe { read_volatile(self.word) }
    }

    #[inline(always)]
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        // SAFETY: `word` points into map memory, aligned to 8 bytes, and `place` says where.
        unsafe { exchange::compare_exchange(self.word, self.place, current, new) }
    }

    #[inline(always)]
    fn active_slot(&self) -> u64 {
        exchange::fence();
        // SAFETY: `active` points into map memory.
        unsafe { read_volatile(self.active) & 1 }
    }
}

/// Counts `segments` frames of together `wire_bytes` bytes.
#[inline(always)]
pub fn count(verdict: &Verdict, segments: u32, wire_bytes: u32) {
    let Some(counters) = COUNTERS.get_ptr_mut(0) else {
        return;
    };
    // As in `index`; the number of reasons is no power of two.
    let reason = black_box(verdict.reason.index());
    if reason >= REASONS {
        return;
    }
    // SAFETY: this CPU's own value, and nothing else runs the program on this CPU meanwhile: egress
    // runs with bottom halves disabled (__dev_queue_xmit, net/core/dev.c). Both indices are in range.
    unsafe {
        let level = (*counters).levels.get_unchecked_mut(index(verdict.level));
        let count = level.reasons.get_unchecked_mut(reason);
        count.packets += u64::from(segments);
        count.bytes += u64::from(wire_bytes);
        if verdict.now_ns != 0 {
            level.last_ns = verdict.now_ns;
        }
        if verdict.wait_ns != 0 {
            level.waited_packets += u64::from(segments);
            if verdict.wait_ns > level.worst_wait_ns {
                level.worst_wait_ns = verdict.wait_ns;
            }
        }
    }
}
