//! The two ends of [`qjump_ebpf::pacing`]: the limiter's, which counts flows and divides the rate, and that of TCP.
//!
//! Between them is the socket's record, so a share is always that of the interface and the level that the socket's packets
//! really leave at, in whatever network namespace, and a change of plan reaches it with the next packet. Only
//! sockets of tagged cgroups have one.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SOCK_OPS_RTT_CB_FLAG, SO_MAX_PACING_RATE},
    helpers::bpf_ktime_get_ns,
    programs::SockOpsContext,
};
use qjump_ebpf::{
    Level, LevelState,
    grant::SocketRecord,
    pacing::{self, ActiveFlows, share, window},
};

use crate::{
    Verdict,
    authority::set_option,
    grants,
    packet::Packet,
    shared::{self, Slot},
};

/// How often to try to count a flow while other CPUs count theirs. The next packet tries again.
const ATTEMPTS: u32 = 4;

/// Gives the socket of a packet with a payload its share of its level's rate in the configuration in force.
#[inline(always)]
pub fn give_share(packet: &Packet<'_>, verdict: &Verdict) {
    qj_share(packet.skb(), verdict.level.number().into(), verdict.now_ns, verdict.wait_ns);
}

/// [`give_share`] as a function of its own for the verifier's sake, as `limit::qj_ask` is. It has most of the conditions, too: each
/// branch in the caller would double what the verifier has to follow from there.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn qj_share(skb: *mut __sk_buff, level: u64, now_ns: u64, wait_ns: u64) -> u64 {
    let level = Level::masked(level as u8);
    let Some(slot) = Slot::in_force() else {
        return 0;
    };
    // What is over a demoting level is welcome below it.
    if slot.limit(level).demotes() {
        return 0;
    }
    let (Some(record), Some(word)) = (grants::record(grants::socket_of(skb)), shared::flows_word(level)) else {
        return 0;
    };
    let window = window(now_ns);
    let mut flows = ActiveFlows(word.load());
    if !record.pacing.is_counted(window) {
        let mut counted = false;
        for _ in 0..ATTEMPTS {
            let more = flows.with_one_more(window);
            match word.compare_exchange(flows.0, more.0) {
                Ok(()) => {
                    flows = more;
                    counted = true;
                    break;
                }
                Err(seen) => flows = ActiveFlows(seen),
            }
        }
        if !counted {
            return 0;
        }
    }
    let limit = slot.limit(level);
    let count = pacing::sharers(limit, flows.count(window), wait_ns);
    if !record.pacing.is_for(window, count) {
        record.pacing.remember(window, count, share(limit, count));
    }
    1
}

/// Has TCP call back with each round-trip time that it measures: packets of the flow have arrived, and others may go.
#[inline(always)]
pub fn follow(ctx: &SockOpsContext) {
    // Kernels before 5.3 do not know the flag; there, nothing is paced.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_RTT_CB_FLAG) as i32);
}

/// Has TCP keep to the socket's share.
#[inline(always)]
pub fn pace(ctx: &SockOpsContext, record: &mut SocketRecord) {
    // SAFETY: the helper has no preconditions.
    if let Some(rate) = record.pacing.change(pacing::window(unsafe { bpf_ktime_get_ns() })) {
        set_option(ctx.ops.cast(), SO_MAX_PACING_RATE, rate);
    }
}
