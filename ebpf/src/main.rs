//! The egress program: level -> mark -> limit -> count, for every packet of a managed interface.
//!
//! It fails open: what it cannot read, it passes, untouched and counted. It always answers "next", so
//! that other programs on the interface still run, except when it drops.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the classifier macro makes an undocumented item")]
#![cfg_attr(
    not(feature = "old"),
    expect(internal_features, reason = "core::sync::atomic has no compare_exchange for the BPF target"),
    feature(core_intrinsics)
)]

mod authority;
mod demoted;
mod events;
mod exchange;
mod grants;
mod limit;
mod paced;
mod packet;
mod shared;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
    macros::classifier,
    programs::TcContext,
};
use limit::Size;
use packet::{Header, Kind, Packet};
use qjump_ebpf::{
    Charge, Level, Reason,
    frame::{VLAN_TAG, wire_bytes},
    grant,
    layout::{class_id, fq_priority},
    pacing::LARGEST_EMPTY,
};
use shared::Slot;

/// What happens to a packet, and under which level and reason it is counted.
struct Verdict {
    level: Level,
    reason: Reason,
    /// When the packet was seen, if its level made the program read the clock; else 0.
    now_ns: u64,
    /// How long it has to wait in the queue.
    wait_ns: u64,
}

impl Verdict {
    #[inline(always)]
    const fn unclocked(level: Level, reason: Reason) -> Self {
        Self { level, reason, now_ns: 0, wait_ns: 0 }
    }
}

#[classifier]
pub fn qj_egress(ctx: TcContext) -> i32 {
    let packet = Packet::new(&ctx);
    let Some(slot) = Slot::in_force() else {
        return TC_ACT_UNSPEC;
    };
    let asked = Level::from_priority(packet.priority());
    let header = packet.header();
    // Before `mark` may add a tag to the packet's metadata. A packet that is demoted is counted with the tag that
    // it then does not get: on the safe side.
    let (l2_bytes, segments, tagged) = packet.size();
    let adds_tag = slot.tags_priority() && !tagged && header.is_untagged_ip() && is_above_best_effort(asked);
    let tag_bytes = if adds_tag { segments * VLAN_TAG as u32 } else { 0 };
    let size = Size { l2_bytes, segments, wire_bytes: wire_bytes(l2_bytes + tag_bytes, segments) };
    let (mut verdict, leaves, cost_ns) = judge(&packet, &header, slot, asked, size);
    if !verdict.reason.is_drop() {
        if send_at(&packet, &header, slot, leaves).is_err() {
            verdict.reason = Reason::MarkFailed;
        } else if let Some(cost_ns) = cost_ns {
            let answer = limit::ask(slot, leaves, size, cost_ns, verdict.now_ns);
            (verdict.reason, verdict.wait_ns) = (answer.reason, answer.wait_ns);
        }
        if verdict.now_ns != 0 && (slot.has_departure_times() || packet.has_departure()) {
            // Also without a wait, and whatever the queue: a time that the sender asked for (SO_TXTIME, TCP) is not
            // the one that the limiter counted with, and an fq would let all packets of one time go together.
            packet.set_departure(verdict.now_ns + verdict.wait_ns);
        }
    }
    shared::count(&verdict, segments, size.wire_bytes);
    // Also of a packet that is lost: its flow needs the share most.
    if verdict.now_ns != 0 && l2_bytes > LARGEST_EMPTY {
        paced::give_share(&packet, &verdict);
    }
    if verdict.reason.is_rare() {
        events::tell(packet.skb(), verdict.level, verdict.reason, l2_bytes);
    }
    if verdict.reason.is_drop() { TC_ACT_SHOT } else { TC_ACT_UNSPEC }
}

/// What becomes of a packet, the level that it leaves at if it does, and what the limiter is still to be asked for.
///
/// That comes after the marking: the verifier would follow all of the marking from each turn of the limiter's loop. And it
/// is not a function, as it is for levels that demote: calls and returns cost as much as the limiter.
#[inline(always)]
fn judge(
    packet: &Packet<'_>,
    header: &Header,
    slot: Slot,
    asked: Option<Level>,
    size: Size,
) -> (Verdict, Level, Option<u64>) {
    let best_effort = |reason| (Verdict::unclocked(Level::BEST_EFFORT, reason), Level::BEST_EFFORT, None);
    match header.kind {
        Kind::NonIp => return best_effort(Reason::NonIp),
        Kind::Malformed => return best_effort(Reason::Malformed),
        Kind::Ipv4 | Kind::Ipv6 => {}
    }
    let asked = match asked {
        None => return best_effort(Reason::UnknownPriority),
        Some(Level::BEST_EFFORT) => return best_effort(Reason::Passed),
        Some(asked) => asked,
    };
    if !may_claim(packet, slot, asked) {
        return (Verdict::unclocked(asked, Reason::NotGranted), Level::BEST_EFFORT, None);
    }
    let limit = slot.limit(asked);
    match limit.charge() {
        Charge::NotConfigured => return (Verdict::unclocked(asked, Reason::NotConfigured), Level::BEST_EFFORT, None),
        Charge::Unlimited => return (Verdict::unclocked(asked, Reason::Passed), asked, None),
        Charge::Packet | Charge::Byte => {}
    }
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    if limit.demotes() {
        let answer = demoted::step_down(packet, asked, size, now_ns);
        let verdict = Verdict { level: asked, reason: answer.reason, now_ns, wait_ns: answer.wait_ns };
        return (verdict, answer.leaves, None);
    }
    match size.cost_ns(limit) {
        Some(cost_ns) => (Verdict { level: asked, reason: Reason::Passed, now_ns, wait_ns: 0 }, asked, Some(cost_ns)),
        None if limit.drops_oversize() => (Verdict::unclocked(asked, Reason::OversizeDropped), asked, None),
        None => (Verdict::unclocked(asked, Reason::OversizeDemoted), Level::BEST_EFFORT, None),
    }
}

#[inline(always)]
fn is_above_best_effort(asked: Option<Level>) -> bool {
    matches!(asked, Some(level) if level != Level::BEST_EFFORT)
}

/// Makes the packet one of `level`: for switches by its mark, and for the queue behind the program by its priority.
#[inline(always)]
fn send_at(packet: &Packet<'_>, header: &Header, slot: Slot, level: Level) -> Result<(), ()> {
    packet.mark(header, level, slot.tags_priority())?;
    if level != Level::BEST_EFFORT {
        packet.set_priority(if slot.has_classes() {
            class_id(level)
        } else if slot.has_departure_times() {
            fq_priority(level)
        } else {
            level.number().into()
        });
    } else if slot.has_own_queue() || is_above_best_effort(Level::from_priority(packet.priority())) {
        // The queue must not serve it among those that it is not one of.
        packet.set_priority(0);
    }
    Ok(())
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
