//! Programs for tests and benchmarks: never loaded by `qjump load`.
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the classifier macro makes an undocumented item")]

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
    macros::{classifier, map},
    maps::{PerCpuArray, RingBuf},
    programs::TcContext,
};

/// Arrivals seen by [`qj_arrivals`]; see `qjump_tests::arrivals`.
#[map(name = "qj_tap")]
static ARRIVALS: RingBuf = RingBuf::with_byte_size(1 << 24, 0);

/// Key: 0. Value: how many packets came with [`COUNTED`] in place of a time.
#[map(name = "qj_counted")]
static COUNTED_ONES: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// In place of the time that a packet was sent: it is only counted. There may be too many to tell of each.
const COUNTED: u64 = u64::MAX;

/// Does nothing: the floor of every measurement.
#[classifier]
pub fn qj_empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// Reads the clock and does nothing with it.
#[classifier]
pub fn qj_clock(_ctx: TcContext) -> i32 {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if now == 0 { 0 } else { TC_ACT_UNSPEC }
}

/// Drops everything: the cheapest far end there is.
#[classifier]
pub fn qj_drop(_ctx: TcContext) -> i32 {
    TC_ACT_SHOT
}

/// One arrival: what the payload says, and what the receiving side sees.
#[repr(C)]
struct Arrival {
    /// The sender's `CLOCK_MONOTONIC` just before its system call: the first 8 bytes of the UDP payload. 0 of TCP.
    sent_ns: u64,
    /// `CLOCK_MONOTONIC` here.
    arrived_ns: u64,
    /// L2 bytes.
    len: u32,
    /// IPv4 TOS.
    tos: u32,
}

/// Records every IPv4 UDP and TCP packet that arrives, and hands it on.
#[classifier]
pub fn qj_arrivals(ctx: TcContext) -> i32 {
    let _ = record(&ctx);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn record(ctx: &TcContext) -> Option<()> {
    const PAYLOAD: usize = 14 + 20 + 8;
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + PAYLOAD + 8 > end {
        return None;
    }
    // SAFETY: all offsets are below the one just checked.
    let (ethertype, tos, protocol, sent_ns) = unsafe {
        (
            u16::from_be_bytes(*((start + 12) as *const [u8; 2])),
            *((start + 15) as *const u8),
            *((start + 23) as *const u8),
            u64::from_ne_bytes(*((start + PAYLOAD) as *const [u8; 8])),
        )
    };
    // TCP's payload says nothing of when it was sent.
    let sent_ns = match (ethertype, protocol) {
        (0x0800, 17) => sent_ns,
        (0x0800, 6) => 0,
        _ => return None,
    };
    if sent_ns == COUNTED {
        // SAFETY: the value is this CPU's, and nothing interrupts a program to run another one on its device.
        unsafe { *COUNTED_ONES.get_ptr_mut(0)? += 1 };
        return Some(());
    }
    // SAFETY: the helper has no preconditions.
    let arrived_ns = unsafe { bpf_ktime_get_ns() };
    let mut entry = ARRIVALS.reserve::<Arrival>(0)?;
    entry.write(Arrival { sent_ns, arrived_ns, len: ctx.len(), tos: u32::from(tos) });
    entry.submit(0);
    Some(())
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The helpers that the programs call are for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
