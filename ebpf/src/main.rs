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
mod demoted;
mod grants;
mod paced;
mod packet;
mod shared;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
    macros::classifier,
    programs::TcContext,
};
use packet::{Header, Kind, Packet};
use qjump_ebpf::{
    Admission, Charge, Level, Reason,
    frame::{VLAN_TAG, wire_bytes},
    grant,
    layout::class_id,
};
use shared::{Slot, ask};

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
    // Before `mark` may add a tag to the packet's metadata.
    let (l2_bytes, segments, tagged) = packet.size();
    // Before `send_at` may write a class there.
    let asked = Level::from_priority(packet.priority());
    // The second turn is for a packet that met a change of configuration on its way. There is never
    // a third: the loader waits for such packets before it changes anything again.
    for _ in 0..2 {
        let Some(slot) = Slot::in_force() else {
            return TC_ACT_UNSPEC;
        };
        let header = packet.header();
        // A packet that is demoted is counted with the tag that it then does not get: on the safe side.
        let adds_tag = slot.tags_priority() && !tagged && header.is_untagged_ip() && names_limited(asked);
        let tag_bytes = if adds_tag { segments * VLAN_TAG as u32 } else { 0 };
        let wire_bytes = wire_bytes(l2_bytes + tag_bytes, segments);
        if let Some(verdict) = judge(&packet, &header, slot, asked, (l2_bytes, segments, wire_bytes)) {
            shared::count(&verdict, segments, wire_bytes);
            // Also of a packet that is lost: its flow needs the share most. Here, at the end, the verifier has little to
            // follow from it.
            if verdict.now_ns != 0 {
                paced::give_share(&packet, verdict.level, verdict.now_ns);
            }
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
    asked: Option<Level>,
    (l2_bytes, segments, wire_bytes): (u32, u32, u32),
) -> Option<Verdict> {
    let not_ip = match header.kind {
        Kind::NonIp => Some(Reason::NonIp),
        Kind::Malformed => Some(Reason::Malformed),
        Kind::Ipv4 | Kind::Ipv6 => None,
    };
    // The level to count at, the reason so far, the level to leave at, and what the limiter is asked for.
    let (counted, reason, leaves, cost_ns) = match (not_ip, asked) {
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
    if send_at(packet, header, slot, leaves).is_err() {
        return Some(Verdict::unclocked(counted, Reason::MarkFailed));
    }
    let Some(cost_ns) = cost_ns else {
        return Some(Verdict::unclocked(counted, reason));
    };
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let limit = slot.limit(counted);
    let mut verdict = Verdict { level: counted, reason, now_ns, wait_ns: 0 };
    let from = if limit.demotes() { demoted::level(packet, counted, now_ns) } else { counted };
    if from == counted {
        match ask(slot, counted, cost_ns, now_ns) {
            Admission::Admitted => {}
            Admission::Wait(ns) => verdict.wait_ns = ns,
            Admission::Over if limit.demotes() => verdict.reason = Reason::OverDemoted,
            Admission::Over if limit.horizon_ns() > 0 => verdict.reason = Reason::BeyondHorizon,
            Admission::Over => verdict.reason = Reason::OverLimit,
            Admission::Contended => verdict.reason = Reason::Contended,
            Admission::Stale => return None,
        }
    } else {
        verdict.reason = Reason::OverDemoted;
    }
    let mut horizon_ns = limit.horizon_ns();
    if verdict.reason == Reason::OverDemoted {
        let from = if from == counted { counted.number() - 1 } else { from.number() };
        let (lower, wait_ns) = demoted::step_down(slot, from, l2_bytes, segments, wire_bytes, now_ns)?;
        // The header is another one since it was marked.
        if send_at(packet, &packet.header(), slot, lower).is_err() {
            verdict.reason = Reason::MarkFailed;
            return Some(verdict);
        }
        demoted::remember(packet, lower, now_ns);
        verdict.wait_ns = wait_ns;
        horizon_ns = slot.limit(lower).horizon_ns();
    }
    if slot.has_departure_times() && horizon_ns > 0 {
        // Also without a wait: a time that the sender asked for is not one that the limiter counted with.
        packet.set_departure(now_ns + verdict.wait_ns);
    }
    Some(verdict)
}

#[inline(always)]
fn names_limited(asked: Option<Level>) -> bool {
    matches!(asked, Some(level) if level != Level::BEST_EFFORT)
}

/// Makes the packet one of `level`, for switches by its mark and for the queue behind the program by its
/// priority.
#[inline(always)]
fn send_at(packet: &Packet<'_>, header: &Header, slot: Slot, level: Level) -> Result<(), ()> {
    packet.mark(header, level, slot.tags_priority())?;
    if level != Level::BEST_EFFORT {
        packet.set_priority(if slot.has_classes() { class_id(level) } else { level.number().into() });
    } else if slot.has_classes() || names_limited(Level::from_priority(packet.priority())) {
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
    !grant::is_grant_only(level, slot.grant_only()) || qj_is_granted(packet.skb(), level.number().into()) != 0
}

/// Whether the socket of a packet was granted this level. A function of its own for the verifier's sake, as
/// `shared::qj_admit` is.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_is_granted(skb: *mut __sk_buff, level: u64) -> u64 {
    Level::new(level as u8).is_some_and(|level| grants::claim_of(skb).granted.covers(level)).into()
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
