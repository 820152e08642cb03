//! What the kernel under test should be able to do, by its version: a test that leaves something out asks here, so that
//! a kernel that should have it cannot hide that it has not.

use std::time::Duration;

/// Whether the kernel is of this release or later.
pub fn at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split('.').map_while(|number| number.parse().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Whether time goes by instructions here, so that figures are the program's and not the machine's: a virtual machine of
/// `cargo xtask vm --virtual-time`.
pub fn is_virtual() -> bool {
    std::env::var_os("QJUMP_VIRTUAL_TIME").is_some()
}

/// Whether this is a virtual machine of `cargo xtask vm`: its kernel is Debian's, which has every queue that tests use, and they are
/// loaded.
pub fn is_guest() -> bool {
    std::env::var_os("QJUMP_GUEST").is_some()
}

/// How often to do what is done `times` times so that chance has its chances: where every instruction is emulated, a tenth.
pub fn rounds(times: u32) -> u32 {
    if is_guest() { times.div_ceil(10) } else { times }
}

/// For how long to do what is done for some `time` for the same reason.
pub fn a_while(time: Duration) -> Duration {
    if is_guest() { time.mul_f64(0.4) } else { time }
}

/// The eBPF compare-exchange, without which the limiter takes locks.
pub fn has_compare_exchange() -> bool {
    if cfg!(target_arch = "x86_64") { at_least(5, 12) } else { at_least(5, 18) }
}

/// Several programs on one hook, with links.
pub fn has_tcx() -> bool {
    at_least(6, 6)
}

/// Pairs of devices with a program of their own, made for containers.
pub fn has_netkit() -> bool {
    at_least(6, 7)
}

/// SO_PRIORITY as a control message. Before, the message that has one is refused.
pub fn has_priority_message() -> bool {
    at_least(6, 14)
}

/// SO_PRIORITY 7 for whoever has CAP_NET_RAW. Before, it took CAP_NET_ADMIN.
pub fn raw_may_claim_all() -> bool {
    at_least(5, 17)
}

/// Options of sockets, set by a program that sees datagrams addressed. Without, a socket that is not connected keeps its
/// send buffer.
pub fn has_options_of_datagrams() -> bool {
    at_least(5, 12)
}
