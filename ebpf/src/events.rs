//! Rare events for whoever reads the log (aya-log): the first packet of each plan, level and reason.
//!
//! Most packets never come here: the caller asks only for reasons of [`Reason::is_rare`], and one look at a word of the
//! level's cache line then says whether the event has been told.

use aya_ebpf::bindings::__sk_buff;
use aya_log_ebpf::warn;
use qjump_ebpf::{Level, LevelState, Reason, layout::Told};

use crate::shared::{self, Slot};

/// ARP, as in the frame: it is on every network, and no event.
const ARP: u32 = 0x0806_u16.to_be() as u32;

/// Tells of a packet whose reason is a rare one.
#[inline(always)]
pub fn tell(skb: *mut __sk_buff, level: Level, reason: Reason, l2_bytes: u32) {
    qj_tell(skb, level.number().into(), reason.index() as u64, l2_bytes.into());
}

/// A function of its own for the verifier's sake, as `limit::qj_ask` is: what the logging copies, it follows once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_tell(skb: *mut __sk_buff, level: u64, reason: u64, l2_bytes: u64) -> u64 {
    let (level, reason) = (Level::masked(level as u8), Reason::from_number(reason as u8));
    // SAFETY: the kernel hands the program a valid context for as long as it runs.
    let protocol = unsafe { (*skb).protocol };
    if reason as u32 == Reason::NonIp as u32 && protocol == ARP {
        return 0;
    }
    let (Some(slot), Some(word)) = (Slot::in_force(), shared::told_word(level)) else {
        return 0;
    };
    let seen = Told(word.load());
    let Some(told) = seen.with(slot.plan(), reason) else {
        return 0;
    };
    // Whoever loses against another CPU leaves it to the next packet.
    if word.compare_exchange(seen.0, told.0).is_ok() {
        // The user side makes a sentence of it. Here each character costs instructions, and the path of the file more than the rest.
        warn!(&(), "{} {} {} {}", level.number(), reason as u32, l2_bytes as u32, protocol);
    }
    0
}
