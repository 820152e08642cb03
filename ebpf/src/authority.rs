//! The programs on cgroups that have a grant: they give the sockets made there its level.
//!
//! They are in the same object as the egress program, which asks the same maps with the same code whether a packet
//! may have the level that it claims. [`qj_skb_level`] has the last word, on each packet; the others make
//! what a process sees of its sockets agree with it, and keep send buffers short.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB, SO_PRIORITY,
        SO_SNDBUF, SOL_SOCKET, bpf_sock_addr, bpf_sockopt,
    },
    helpers::bpf_setsockopt,
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr, cgroup_sockopt, sock_ops},
    programs::{SkBuffContext, SockAddrContext, SockContext, SockOpsContext, SockoptContext},
};
use qjump_ebpf::{
    Level,
    grant::{MaybeLevel, SocketRecord, decide},
};

use crate::{grants, paced};

/// What every program here answers: nothing is refused.
const ALLOW: i32 = 1;

/// A new socket begins with the level of its cgroup.
#[cgroup_sock(sock_create)]
pub fn qj_sock_create(ctx: SockContext) -> i32 {
    let generation = grants::generation();
    let found = grants::of_current_process();
    if let Some(level) = found.level.level() {
        // SAFETY: the context is valid, and this field is writable in this hook.
        unsafe { (*ctx.sock).priority = u32::from(level.number()) };
        if let Some(record) = grants::make_record(ctx.sock) {
            record.send_buffer = found.send_buffer;
            record.remember(found.level, generation);
        }
    }
    ALLOW
}

/// An accepted TCP connection begins with priority 0 (`sk_clone_lock`, net/core/sock.c), whatever its listener has.
///
/// A connection that is opened gets its level again, too: `IP_TOS` on the socket has changed it. From then on, TCP is told
/// what it may send whenever packets have arrived.
#[sock_ops]
pub fn qj_sockops(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    if op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB || op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB {
        // SAFETY: the context is valid.
        let socket = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
        if let Some(record) = grants::record(socket) {
            let generation = grants::generation();
            // The cgroup of a socket cannot be asked for here. If grants have changed, an adopted socket is
            // looked up by its record; others get theirs with their next packet.
            if !record.is_fresh(generation) && record.adopted_by != 0 {
                let found = grants::of_adopter(record);
                if found.level != MaybeLevel::NONE {
                    record.send_buffer = found.send_buffer;
                    record.remember(found.level, generation);
                }
            }
            if record.is_fresh(generation) {
                set_priority(ctx.ops.cast(), record);
                limit_send_buffer(ctx.ops.cast(), record);
            }
            paced::follow(&ctx);
        }
    } else if op == BPF_SOCK_OPS_RTT_CB {
        // SAFETY: the context is valid.
        if let Some(record) = grants::record(unsafe { (*ctx.ops).__bindgen_anon_2.sk }) {
            paced::pace(&ctx, record);
        }
    }
    ALLOW as u32
}

/// A process may ask for less than its grant, and gets its grant if it asks for more. That is what it then reads
/// back, too. A number that is no level says nothing about the level.
#[cgroup_sockopt(setsockopt)]
pub fn qj_setsockopt(ctx: SockoptContext) -> i32 {
    let option = ctx.sockopt;
    // SAFETY: the context is valid.
    let (level, name) = unsafe { ((*option).level, (*option).optname) };
    if level != SOL_SOCKET as i32 || name != SO_PRIORITY as i32 || has_asked(option).is_none() {
        // "Take the process's own buffer": the kernel would otherwise refuse options of over a page.
        // SAFETY: as above; the field is writable in this hook.
        unsafe { (*option).optlen = 0 };
    }
    ALLOW
}

/// Notes the level that a process asks for and sees to it that it gets what it may; `None` if the kernel should do as it would.
#[inline(always)]
fn has_asked(option: *mut bpf_sockopt) -> Option<()> {
    // SAFETY: the context is valid; the verifier knows the two as the bounds of the value.
    let (value, end, socket) = unsafe {
        (
            (*option).__bindgen_anon_2.optval.cast::<u32>(),
            (*option).__bindgen_anon_3.optval_end.cast::<u32>(),
            (*option).__bindgen_anon_1.sk,
        )
    };
    if value.wrapping_add(1) > end {
        return None;
    }
    // SAFETY: the four bytes were just found to be within the bounds.
    let asked = MaybeLevel::from_number(unsafe { *value });
    let record = grants::make_record(socket)?;
    if asked == MaybeLevel::NONE {
        return None;
    }
    record.asked = asked;
    if !record.is_fresh(grants::generation()) || record.granted() == MaybeLevel::NONE {
        return None;
    }
    let level = decide(record.granted(), record.asked).level()?;
    if cfg!(not(feature = "old")) {
        set_option(socket.cast(), SO_PRIORITY, u32::from(level.number()));
    } else if level != Level::STRICTEST {
        // Before Linux 5.15 a program cannot set it here, but what the process asks the kernel for it can change.
        // SAFETY: the four bytes are within the bounds. The kernel refuses more than it has room for, which may be less than the process gave.
        unsafe {
            *value = u32::from(level.number());
            (*option).optlen = size_of::<u32>() as i32;
        }
        return Some(());
    }
    // Done; the kernel need not do it again. For level 7 it would ask for a capability. Where it could not be set, packets get
    // it all the same, and the process reads what it read before.
    // SAFETY: as in the caller.
    unsafe { (*option).optlen = -1 };
    Some(())
}

/// The last word, on every IP packet of these sockets, however they claimed another level: `IP_TOS`, which sets
/// `sk->sk_priority` as well, control messages, or a socket that somebody passed on.
#[cgroup_skb(egress)]
pub fn qj_skb_level(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let claim = grants::claim_of(skb);
    if let Some(level) = decide(claim.granted, claim.asked).level() {
        // SAFETY: the context is valid, and this field is writable in this hook.
        unsafe { (*skb).priority = u32::from(level.number()) };
    }
    ALLOW
}

#[cgroup_sock_addr(connect4)]
pub fn qj_connect4(ctx: SockAddrContext) -> i32 {
    on_address(ctx.sock_addr)
}

#[cgroup_sock_addr(connect6)]
pub fn qj_connect6(ctx: SockAddrContext) -> i32 {
    on_address(ctx.sock_addr)
}

// Before Linux 5.12 these cannot set options: there, a datagram socket that is not connected keeps its buffer.
#[cfg(not(feature = "old"))]
#[cgroup_sock_addr(sendmsg4)]
pub fn qj_sendmsg4(ctx: SockAddrContext) -> i32 {
    on_address(ctx.sock_addr)
}

#[cfg(not(feature = "old"))]
#[cgroup_sock_addr(sendmsg6)]
pub fn qj_sendmsg6(ctx: SockAddrContext) -> i32 {
    on_address(ctx.sock_addr)
}

/// The first places where a send buffer can be set: `bpf_setsockopt` is not for the hook that sees sockets made.
#[inline(always)]
fn on_address(address: *mut bpf_sock_addr) -> i32 {
    // SAFETY: the context is valid.
    if let Some(record) = grants::record(unsafe { (*address).__bindgen_anon_1.sk }) {
        limit_send_buffer(address.cast(), record);
    }
    ALLOW
}

/// Gives a socket the send buffer of its grant, once.
#[inline(always)]
fn limit_send_buffer(socket: *mut c_void, record: &mut SocketRecord) {
    if record.send_buffer != 0 {
        set_option(socket, SO_SNDBUF, record.send_buffer);
        record.send_buffer = 0;
    }
}

/// Sets `sk->sk_priority` to what is decided for the socket, if anything is. Programs may set 7 as well.
#[inline(always)]
fn set_priority(socket: *mut c_void, record: &SocketRecord) {
    if let Some(level) = decide(record.granted(), record.asked).level() {
        set_option(socket, SO_PRIORITY, u32::from(Level::number(level)));
    }
}

/// `setsockopt` at level `SOL_SOCKET`, on a socket or a context that stands for one.
#[inline(always)]
pub fn set_option(socket: *mut c_void, name: u32, value: u32) {
    let mut value = value;
    // SAFETY: the verifier checks the socket; the value is four bytes.
    unsafe { bpf_setsockopt(socket, SOL_SOCKET as i32, name as i32, ptr::from_mut(&mut value).cast(), 4) };
}
