//! The egress program: level -> mark -> limit -> count, for every packet of a managed interface.
//!
//! It fails open: what it cannot read, it passes, untouched and counted. It always answers "next", so
//! that other programs on the interface still run, except when it drops.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the classifier macro makes an undocumented item")]
#![expect(internal_features, reason = "core::sync::atomic has no compare_exchange for the BPF target")]
#![feature(core_intrinsics)]

mod authority;
mod grants;
mod packet;
mod shared;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
    macros::classifier,
    programs::TcContext,
};
use packet::{Header, Kind, Packet};
use qjump_ebpf::{
    Admission, Charge, Level, Reason, admit,
    frame::{VLAN_TAG, wire_bytes},
    grant,
};
use shared::{Slot, limiter_word};

/// What happens to a packet, and under which level and reason it is counted.
struct Verdict {
    level: Level,
    reason: Reason,
    /// When the packet was seen, if its level made the program read the clock; else 0.
    now_ns: u64,
}

impl Verdict {
    #[inline(always)]
    const fn unclocked(level: Level, reason: Reason) -> Self {
        Self { level, reason, now_ns: 0 }
    }
}

#[classifier]
pub fn qj_egress(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    // Before `mark` may add a tag to the packet's metadata.
    let (l2_bytes, segments, tagged) = packet.size();
    // The second turn is for a packet that met a change of configuration on its way. There is never
    // a third: the loader waits for such packets before it changes anything again.
    for _ in 0..2 {
        let Some(slot) = Slot::in_force() else {
            return TC_ACT_UNSPEC;
        };
        let header = packet.header();
        // A packet that is demoted is counted with the tag that it then does not get: on the safe side.
        let adds_tag = slot.tags_priority() && !tagged && header.is_untagged_ip() && packet.names_limited_level();
        let tag_bytes = if adds_tag { segments * VLAN_TAG as u32 } else { 0 };
        let wire_bytes = wire_bytes(l2_bytes + tag_bytes, segments);
        if let Some(verdict) = judge(&packet, &header, slot, l2_bytes, segments, wire_bytes) {
            shared::count(&verdict, segments, wire_bytes);
            return if verdict.reason.is_drop() { TC_ACT_SHOT } else { TC_ACT_UNSPEC };
        }
    }
    shared::count(&Verdict::unclocked(Level::BEST_EFFORT, Reason::Contended), 1, wire_bytes(l2_bytes, segments));
    TC_ACT_SHOT
}

/// Marks the packet and asks the limiter; `None` if the configuration in `slot` is no longer in force.
#[inline(always)]
fn judge(
    packet: &Packet<'_>,
    header: &Header,
    slot: Slot,
    l2_bytes: u32,
    segments: u32,
    wire_bytes: u32,
) -> Option<Verdict> {
    let asked = Level::from_priority(packet.priority());
    let not_ip = match header.kind {
        Kind::NonIp => Some(Reason::NonIp),
        Kind::Malformed => Some(Reason::Malformed),
        Kind::Ipv4 | Kind::Ipv6 => None,
    };
    // The level to count at, the reason so far, the level to mark with, and what the limiter is asked for.
    let (counted, mut reason, marked, cost_ns) = match (not_ip, asked) {
        (Some(reason), _) => (Level::BEST_EFFORT, reason, Level::BEST_EFFORT, None),
        (None, None) => (Level::BEST_EFFORT, Reason::UnknownPriority, Level::BEST_EFFORT, None),
        (None, Some(Level::BEST_EFFORT)) => (Level::BEST_EFFORT, Reason::Passed, Level::BEST_EFFORT, None),
        (None, Some(asked)) if !may_claim(packet, slot, asked) => (asked, Reason::NotGranted, Level::BEST_EFFORT, None),
        (None, Some(asked)) => {
            let limit = slot.limit(asked);
            match (limit.charge(), limit.cost_ns(l2_bytes, segments, wire_bytes)) {
                (Charge::NotConfigured, _) => (asked, Reason::NotConfigured, Level::BEST_EFFORT, None),
                (Charge::Unlimited, _) => (asked, Reason::Passed, asked, None),
                (_, Some(cost_ns)) => (asked, Reason::Passed, asked, Some(cost_ns)),
                (_, None) if limit.drops_oversize() => {
                    return Some(Verdict::unclocked(asked, Reason::OversizeDropped));
                }
                (_, None) => (asked, Reason::OversizeDemoted, Level::BEST_EFFORT, None),
            }
        }
    };
    if packet.mark(header, marked, slot.tags_priority()).is_err() {
        return Some(Verdict::unclocked(counted, Reason::MarkFailed));
    }
    if marked == Level::BEST_EFFORT && packet.names_limited_level() {
        // The qdisc behind the program must not serve it among the levels that it may not have.
        packet.set_priority(Level::BEST_EFFORT);
    }
    let Some(cost_ns) = cost_ns else {
        return Some(Verdict::unclocked(counted, reason));
    };
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let word = limiter_word(counted)?;
    match admit(&word, slot.number(), slot.limit(counted), cost_ns, now_ns) {
        Admission::Admitted => {}
        Admission::Over => reason = Reason::OverLimit,
        Admission::Contended => reason = Reason::Contended,
        Admission::Stale => return None,
    }
    Some(Verdict { level: counted, reason, now_ns })
}

/// Whether the sender of a packet may have the level that it names.
///
/// A packet without a socket was not sent by a process of this host. What it names is what the sender wrote into its
/// TOS (`rt_tos2priority` in `ip_forward`, net/ipv4/ip_forward.c), so it may have none. Of the host's own packets, ARP, IGMP and
/// SYN-ACKs with a SYN cookie have no socket either.
#[inline(always)]
fn may_claim(packet: &Packet<'_>, slot: Slot, level: Level) -> bool {
    if !packet.has_socket() {
        return false;
    }
    !grant::is_grant_only(level, slot.grant_only()) || grants::covers(packet.skb(), level)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The helpers that the program calls are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
