//! The compare-exchange of a word: the kernel's, or where it has none (before Linux 5.12; on arm64, before 5.18), one under
//! a lock.

pub use imp::{Place, compare_exchange, fence};

#[cfg(not(feature = "old"))]
mod imp {
    use core::intrinsics::{AtomicOrdering::SeqCst, atomic_cxchg};

    use qjump_ebpf::Level;

    /// Nothing: the pointer to a word is enough.
    #[derive(Clone, Copy)]
    pub struct Place;

    impl Place {
        #[inline(always)]
        pub const fn new(_level: Level, _offset: usize) -> Self {
            Self
        }
    }

    /// # Safety
    /// `word` is aligned, and may be written at any time.
    #[inline(always)]
    pub unsafe fn compare_exchange(word: *mut u64, _place: Place, current: u64, new: u64) -> Result<(), u64> {
        // SAFETY: as the caller promises.
        let (seen, done) = unsafe { atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(word, current, new) };
        if done { Ok(()) } else { Err(seen) }
    }

    /// Nothing: the exchange orders what is read before and after it.
    #[inline(always)]
    pub const fn fence() {}
}

#[cfg(feature = "old")]
mod imp {
    use core::ptr::{read_volatile, write_volatile};

    use aya_ebpf::{macros::map, maps::HashMap};
    use qjump_ebpf::{LEVELS, Level, layout::WORDS};

    use crate::shared::{self, WordRef};

    /// The level of a word, and from bit 3 on its place among the level's words.
    #[derive(Clone, Copy)]
    pub struct Place(u64);

    const ONLY_IF_ABSENT: u64 = 1; // BPF_NOEXIST
    /// How often a CPU looks for a lock that is free. Who has it is done in two map operations, some 200 ns; but a virtual machine's CPU
    /// may be stopped with it for milliseconds. Then others give up, and their packet is dropped as contended.
    const SPINS: usize = 64;

    /// Key: a [`Place`]. An entry is there while a CPU is at that word: inserting it takes the lock, for an insertion that finds
    /// it fails, and removing it gives the lock back. Programs run to their end, on one CPU, with bottom halves
    /// disabled: nobody keeps a lock for good, and nobody waits for one that its own CPU has.
    #[map(name = "qj_locks")]
    static LOCKS: HashMap<u64, u8> = HashMap::with_max_entries((LEVELS * WORDS) as u32, 0);

    impl Place {
        #[inline(always)]
        pub const fn new(level: Level, offset: usize) -> Self {
            Self(level.number() as u64 | ((offset / size_of::<u64>()) as u64) << 3)
        }
    }

    /// # Safety
    /// `word` is the one at `place`, aligned, and may be written at any time.
    #[inline(always)]
    pub unsafe fn compare_exchange(word: *mut u64, place: Place, current: u64, new: u64) -> Result<(), u64> {
        if qj_exchange(place.0, current, new) == 1 {
            return Ok(());
        }
        // SAFETY: as the caller promises.
        Err(unsafe { read_volatile(word) })
    }

    /// 1 if the word was `current` and is `new` now. A function of its own for the verifier's sake, as `limit::qj_ask` is; and to
    /// those, such kernels hand no pointers.
    ///
    /// The loader exchanges words, too, without the lock ([`qjump_ebpf::limiter::carry_over`]). What it writes between the two
    /// accesses here is overwritten, as if it had not come yet; so it comes again, when all such packets have left, until there
    /// is nothing to do.
    #[unsafe(no_mangle)]
    #[inline(never)]
    extern "C" fn qj_exchange(place: u64, current: u64, new: u64) -> u64 {
        let field = (place >> 3) as usize & (WORDS - 1);
        let Some(WordRef { word, .. }) = shared::word(Level::masked(place as u8), field * size_of::<u64>()) else {
            return 0;
        };
        for _ in 0..SPINS {
            // SAFETY: as below. Who comes too late, or has to wait, should not keep the others from the map.
            if unsafe { read_volatile(word) } != current {
                return 0;
            }
            if LOCKS.get_ptr(&place).is_some() || LOCKS.insert(&place, &0, ONLY_IF_ABSENT).is_err() {
                continue;
            }
            // SAFETY: a pointer into map memory, aligned to 8 bytes. The two accesses are ordered against those of other CPUs by the
            // spin lock in each of the map operations around them.
            let is_current = unsafe {
                let is_current = read_volatile(word) == current;
                if is_current {
                    write_volatile(word, new);
                }
                is_current
            };
            let _ = LOCKS.remove(&place);
            return is_current.into();
        }
        0
    }

    /// Orders reads before it against reads after it, by the kernel's spin locks: unlocking waits for what was read before, and what is
    /// read after locking comes after. One lock alone would let both into its middle.
    #[inline(always)]
    pub fn fence() {
        const NO_PLACE: u64 = u64::MAX;
        let _ = LOCKS.remove(&NO_PLACE);
    }
}
