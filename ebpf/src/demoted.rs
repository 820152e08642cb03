//! Stepping down: where a level's rule is to demote, what is over its limit leaves at the next lower level
//! that admits it, and its socket stays there until it has been idle for a while, so that a flow is not
//! torn between two levels.

use core::ptr::{addr_of, null_mut};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::SkStorage,
    helpers::{bpf_sk_fullsock, bpf_sk_storage_get},
    macros::btf_map,
};
use qjump_ebpf::{LEVELS, Level, Reason, grant::is_grant_only, layout::DEMOTION_IDLE_NS};

use crate::{
    grants,
    limit::{self, Answer, Size},
    packet::Packet,
    shared::Slot,
};

/// What is remembered of a socket.
#[repr(C)]
struct Demotion {
    /// `CLOCK_MONOTONIC` of its last packet that left at a lower level, ns.
    last_ns: u64,
    /// That level.
    level: u64,
}

#[btf_map(name = "qj_demoted")]
static DEMOTED: SkStorage<Demotion> = SkStorage::new();

/// What is remembered of the packet's socket; null if nothing is.
#[inline(always)]
fn of_socket(skb: *mut __sk_buff, flags: u32) -> *mut Demotion {
    let socket = grants::socket_of(skb);
    if socket.is_null() {
        return null_mut();
    }
    // SAFETY: `socket` is not null, as just checked.
    let socket = unsafe { bpf_sk_fullsock(socket.cast()) };
    if socket.is_null() {
        return null_mut();
    }
    let map = addr_of!(DEMOTED).cast_mut().cast();
    // SAFETY: a full socket and a socket storage map; a new value starts as zeros.
    unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), flags.into()) }.cast()
}

/// The level below `asked` that the socket has been sending at until now, or `asked`.
#[inline(always)]
fn remembered(demotion: *mut Demotion, asked: Level, now_ns: u64) -> Level {
    if demotion.is_null() {
        return asked;
    }
    // SAFETY: the storage lives as long as its socket. Other CPUs may write to it meanwhile: then this packet
    // takes the old level or the new one.
    let (last_ns, level) = unsafe { ((*demotion).last_ns, (*demotion).level) };
    match Level::new(level as u8) {
        // Signed: another CPU may have written a time that is later than ours.
        Some(level) if level < asked && (now_ns.wrapping_sub(last_ns) as i64) < DEMOTION_IDLE_NS as i64 => level,
        _ => asked,
    }
}

/// Asks for a packet of this size at `asked`, and at the levels below it until one admits it; level 0 admits
/// everything. Its socket stays there.
#[inline(always)]
pub fn step_down(packet: &Packet<'_>, asked: Level, size: Size, now_ns: u64) -> Answer {
    let level = asked.number().into();
    Answer::unpacked(qj_step_down(packet.skb(), level, size.packed(), size.segments.into(), now_ns))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_step_down(skb: *mut __sk_buff, asked: u64, bytes: u64, segments: u64, now_ns: u64) -> u64 {
    let size = Size::unpacked(bytes, segments);
    let Some(asked) = Level::new(asked as u8) else {
        return Answer::at_once(Reason::UnknownPriority, Level::BEST_EFFORT).packed();
    };
    let from = remembered(of_socket(skb, 0), asked, now_ns);
    if from == asked {
        let own = limit::ask_anew(asked, size, now_ns);
        if own.reason != Reason::OverLimit {
            return own.packed();
        }
    }
    let grant_only = Slot::in_force().map_or(u8::MAX, Slot::grant_only);
    // Down from a constant, so that the verifier sees an end.
    let mut lower = Answer::at_once(Reason::OverDemoted, Level::BEST_EFFORT);
    for number in (1..LEVELS as u8).rev() {
        match Level::new(number) {
            // Whoever may not claim a level is not demoted to it either.
            Some(level)
                if level <= from
                    && level < asked
                    && (!is_grant_only(level, grant_only) || grants::covers(skb, level)) =>
            {
                let answer = limit::ask_at_once(level, size, now_ns);
                if answer.reason == Reason::Passed {
                    lower = Answer { reason: Reason::OverDemoted, ..answer };
                    break;
                }
            }
            _ => {}
        }
    }
    let demotion = of_socket(skb, BPF_SK_STORAGE_GET_F_CREATE);
    if !demotion.is_null() {
        // SAFETY: as in `remembered`.
        unsafe { *demotion = Demotion { last_ns: now_ns, level: lower.leaves.number().into() } };
    }
    lower.packed()
}
