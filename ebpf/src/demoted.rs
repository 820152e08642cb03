//! Stepping down: where a level's rule is to demote, what is over its limit leaves at the next lower level
//! that admits it, and its socket stays there until it has been idle for a while, so that a flow is not
//! torn between two levels.

use core::ptr::{addr_of, null_mut};

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    btf_maps::SkStorage,
    helpers::{bpf_sk_fullsock, bpf_sk_storage_get},
    macros::btf_map,
};
use qjump_ebpf::{Admission, Charge, LEVELS, Level, layout::DEMOTION_IDLE_NS, limiter::admit_in};

use crate::{
    packet::Packet,
    shared::{Slot, limiter_word},
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

fn of_socket(packet: &Packet<'_>, flags: u64) -> Option<*mut Demotion> {
    let socket = packet.socket();
    if socket.is_null() {
        return None;
    }
    // SAFETY: `socket` is not null, as just checked.
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: a full socket and a socket storage map; a new value starts as zeros.
    let demotion = unsafe { bpf_sk_storage_get(addr_of!(DEMOTED).cast_mut().cast(), socket.cast(), null_mut(), flags) };
    let demotion = demotion.cast::<Demotion>();
    (!demotion.is_null()).then_some(demotion)
}

/// The level below `asked` that the packet's socket has been sending at until now, or `asked`.
#[inline(always)]
pub fn level(packet: &Packet<'_>, asked: Level, now_ns: u64) -> Level {
    let Some(demotion) = of_socket(packet, 0) else {
        return asked;
    };
    // SAFETY: the storage lives as long as its socket. Other CPUs may write to it meanwhile: then this packet
    // takes the old level or the new one.
    let (last_ns, level) = unsafe { ((*demotion).last_ns, (*demotion).level) };
    match Level::new(level as u8) {
        Some(level) if level < asked && now_ns.wrapping_sub(last_ns) < DEMOTION_IDLE_NS => level,
        _ => asked,
    }
}

/// Keeps the packet's socket at `level`.
#[inline(always)]
pub fn remember(packet: &Packet<'_>, level: Level, now_ns: u64) {
    if let Some(demotion) = of_socket(packet, u64::from(BPF_SK_STORAGE_GET_F_CREATE)) {
        // SAFETY: as in `level`.
        unsafe { *demotion = Demotion { last_ns: now_ns, level: level.number().into() } };
    }
}

/// What [`step_down`] says when the configuration is no longer in force.
const STALE: u64 = u64::MAX;

/// The first level from `from` down that admits a packet of this size, and how long it has to wait there;
/// level 0 admits everything. `None` if the configuration in `slot` is no longer in force.
#[inline(always)]
pub fn step_down(
    slot: Slot,
    from: u8,
    l2_bytes: u32,
    segments: u32,
    wire_bytes: u32,
    now_ns: u64,
) -> Option<(Level, u64)> {
    let bytes = u64::from(l2_bytes) << 32 | u64::from(wire_bytes);
    match qj_step_down(slot.number(), from.into(), bytes, segments.into(), now_ns) {
        STALE => None,
        answer => Some((Level::new(answer as u8 & 7)?, answer >> 8)),
    }
}

/// [`step_down`] as a function of its own. Inlined, the verifier would follow its loop from every state of
/// the program before it, and give up; a global function it checks once (kernel/bpf/verifier.c,
/// `do_check_subprogs`). Hence five integers in and one out.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_step_down(slot: u64, from: u64, bytes: u64, segments: u64, now_ns: u64) -> u64 {
    let Some(slot) = Slot::numbered(slot) else {
        return STALE;
    };
    let (l2_bytes, wire_bytes) = ((bytes >> 32) as u32, bytes as u32);
    // From a constant, so that the verifier knows every index.
    for number in (1..LEVELS as u8).rev() {
        let Some(level) = Level::new(number).filter(|_| u64::from(number) <= from) else {
            continue;
        };
        let limit = slot.limit(level);
        let Some(cost_ns) = limit.cost_ns(l2_bytes, segments as u32, wire_bytes) else {
            continue;
        };
        match limit.charge() {
            Charge::NotConfigured => continue,
            Charge::Unlimited => return number.into(),
            Charge::Packet | Charge::Byte => {}
        }
        let Some(word) = limiter_word(level) else {
            return STALE;
        };
        // One try, and then the next level.
        match admit_in::<1, _>(&word, slot.number(), limit, cost_ns, now_ns) {
            Admission::Admitted => return number.into(),
            Admission::Wait(ns) => return ns << 8 | u64::from(number),
            Admission::Over | Admission::Contended => {}
            Admission::Stale => return STALE,
        }
    }
    Level::BEST_EFFORT.number().into()
}
