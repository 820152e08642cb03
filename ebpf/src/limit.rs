//! Asking the limiter. Where that is rare, in a function of its own: the verifier checks a global function once
//! (`do_check_subprogs`, kernel/bpf/verifier.c). Inlined, it would follow the limiter's loops from every state in
//! which the program may come there, and give up. Hence integers in and one out.

use qjump_ebpf::{Admission, Charge, Level, LevelLimit, Reason, admit, limiter::admit_up_to};

use crate::shared::{Slot, limiter_word};

/// How large a packet is.
#[derive(Clone, Copy)]
pub struct Size {
    /// With the headers of every segment.
    pub l2_bytes: u32,
    pub segments: u32,
    pub wire_bytes: u32,
}

impl Size {
    /// What fits into one argument: the bytes.
    #[inline(always)]
    pub const fn packed(self) -> u64 {
        (self.l2_bytes as u64) << 32 | self.wire_bytes as u64
    }

    #[inline(always)]
    pub const fn unpacked(bytes: u64, segments: u64) -> Self {
        Self { l2_bytes: (bytes >> 32) as u32, segments: segments as u32, wire_bytes: bytes as u32 }
    }

    #[inline(always)]
    pub const fn cost_ns(self, limit: &LevelLimit) -> Option<u64> {
        limit.cost_ns(self.l2_bytes, self.segments, self.wire_bytes)
    }
}

/// What the limits make of a packet.
#[derive(Clone, Copy)]
pub struct Answer {
    pub reason: Reason,
    /// The level that it may leave at, if it may.
    pub leaves: Level,
    /// After so long, ns.
    pub wait_ns: u64,
}

impl Answer {
    #[inline(always)]
    pub const fn at_once(reason: Reason, leaves: Level) -> Self {
        Self { reason, leaves, wait_ns: 0 }
    }

    /// Waits are below 2^38 ns, levels below 2^8, reasons below 2^8.
    #[inline(always)]
    pub const fn packed(self) -> u64 {
        self.wait_ns << 16 | (self.leaves.number() as u64) << 8 | self.reason as u64
    }

    #[inline(always)]
    pub fn unpacked(answer: u64) -> Self {
        let reason = Reason::from_number(answer as u8);
        Self { reason, leaves: Level::masked((answer >> 8) as u8), wait_ns: answer >> 16 }
    }
}

/// Asks for a packet of this price in the configuration `slot`, at a level that does not demote.
#[inline(always)]
pub fn ask(slot: Slot, level: Level, size: Size, cost_ns: u64, now_ns: u64) -> Answer {
    let limit = slot.limit(level);
    let answer = limiter_word(level)
        .and_then(|word| answer(admit(&word, slot.number(), limit, cost_ns, now_ns), level, limit.horizon_ns()));
    match answer {
        Some(answer) => answer,
        // It met a change of configuration on its way. If it may not leave at this level any more, it has the mark of one
        // that it may not carry, and is dropped.
        None => match ask_anew(level, size, now_ns) {
            answer if answer.leaves == level => answer,
            _ => Answer::at_once(Reason::Contended, level),
        },
    }
}

/// Asks for a packet of this size in the configuration in force.
#[inline(always)]
pub fn ask_anew(level: Level, size: Size, now_ns: u64) -> Answer {
    ask_twice(level, level.number().into(), size, now_ns)
}

/// The same for a packet that goes to another level rather than wait at this one.
#[inline(always)]
pub fn ask_at_once(level: Level, size: Size, now_ns: u64) -> Answer {
    ask_twice(level, u64::from(level.number()) | AT_ONCE, size, now_ns)
}

/// Beside the level: no waiting.
const AT_ONCE: u64 = 1 << 8;

/// No [`Answer`]: the configuration has changed meanwhile.
const STALE: u64 = u64::MAX;

/// The second time is for a packet that met a change of configuration on its way. There is never a third: the
/// loader waits for such packets before it changes anything again.
#[inline(always)]
fn ask_twice(level: Level, request: u64, size: Size, now_ns: u64) -> Answer {
    let ask = || qj_ask(request, size.packed(), size.segments.into(), now_ns);
    let mut answer = ask();
    if answer == STALE {
        answer = ask();
    }
    if answer == STALE { Answer::at_once(Reason::Contended, level) } else { Answer::unpacked(answer) }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_ask(level: u64, bytes: u64, segments: u64, now_ns: u64) -> u64 {
    let at_once = level & AT_ONCE != 0;
    match ask_once(Level::masked(level as u8), Size::unpacked(bytes, segments), now_ns, at_once) {
        Some(answer) => answer.packed(),
        None => STALE,
    }
}

/// `None` if the configuration has changed meanwhile.
#[inline(always)]
fn ask_once(level: Level, size: Size, now_ns: u64, at_once: bool) -> Option<Answer> {
    let slot = Slot::in_force()?;
    let limit = slot.limit(level);
    match limit.charge() {
        Charge::NotConfigured => return Some(Answer::at_once(Reason::NotConfigured, Level::BEST_EFFORT)),
        Charge::Unlimited => return Some(Answer::at_once(Reason::Passed, level)),
        Charge::Packet | Charge::Byte => {}
    }
    let Some(cost_ns) = size.cost_ns(limit) else {
        return Some(if limit.drops_oversize() {
            Answer::at_once(Reason::OversizeDropped, level)
        } else {
            Answer::at_once(Reason::OversizeDemoted, Level::BEST_EFFORT)
        });
    };
    let word = limiter_word(level)?;
    let most_ns = if at_once { limit.burst_ns() } else { limit.reach_ns() };
    let admission = admit_up_to(most_ns, &word, slot.number(), limit, cost_ns, now_ns);
    answer(admission, level, limit.horizon_ns())
}

#[inline(always)]
fn answer(admission: Admission, level: Level, horizon_ns: u64) -> Option<Answer> {
    Some(match admission {
        Admission::Admitted => Answer::at_once(Reason::Passed, level),
        Admission::Wait(wait_ns) => Answer { reason: Reason::Passed, leaves: level, wait_ns },
        Admission::Over if horizon_ns > 0 => Answer::at_once(Reason::BeyondHorizon, level),
        Admission::Over => Answer::at_once(Reason::OverLimit, level),
        Admission::Contended => Answer::at_once(Reason::Contended, level),
        Admission::Stale => return None,
    })
}
