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
use qjump_ebpf::{Admission, Charge, LEVELS, Level, layout::DEMOTION_IDLE_NS};

use crate::{
    grants,
    packet::Packet,
    shared::{Slot, ask},
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
    let socket = grants::socket_of(packet.skb());
    if socket.is_null() {
        return None;
    }
    // SAFETY: `socket` is not null, as just checked.
    let socket = unsafe { bpf_sk_fullsock(socket.cast()) };
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
    // From a constant, so that the verifier sees an end.
    for number in (1..LEVELS as u8).rev() {
        let Some(level) = Level::new(number).filter(|_| number <= from) else {
            continue;
        };
        let limit = slot.limit(level);
        let Some(cost_ns) = limit.cost_ns(l2_bytes, segments, wire_bytes) else {
            continue;
        };
        match limit.charge() {
            Charge::NotConfigured => continue,
            Charge::Unlimited => return Some((level, 0)),
            Charge::Packet | Charge::Byte => {}
        }
        match ask(slot, level, cost_ns, now_ns) {
            Admission::Admitted => return Some((level, 0)),
            Admission::Wait(ns) => return Some((level, ns)),
            Admission::Over | Admission::Contended => {}
            Admission::Stale => return None,
        }
    }
    Some((Level::BEST_EFFORT, 0))
}
