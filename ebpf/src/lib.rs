//! What the eBPF programs and the user side share: levels, marks, the limiter, the reasons, the
//! layout of the maps and the names of everything that is pinned or attached.
//!
//! The crate is `no_std`, has no clock and does no I/O. Time comes in as an argument, so the same
//! functions run in the kernel, in host tests, and under the model checker.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod frame;
pub mod grant;
pub mod layout;
pub mod level;
pub mod limiter;
pub mod pacing;
pub mod reason;

pub use layout::{Config, Counters, LevelRecord, PlanRecord, State};
pub use level::{LEVELS, Level};
pub use limiter::{Admission, Charge, LevelLimit, LevelState, admit};
pub use reason::{REASONS, Reason};

/// Names of programs and maps, at most 15 characters (the kernel cuts longer ones, and two cut names
/// could meet).
pub mod names {
    /// The program on the egress of every managed interface.
    pub const PROGRAM: &str = "qj_egress";
    /// Two configuration slots, one of them in force.
    pub const CONFIG: &str = "qj_config";
    /// The slot in force and one limiter word a level.
    pub const STATE: &str = "qj_state";
    /// Packets and bytes per CPU, level and reason.
    pub const COUNTERS: &str = "qj_counters";
    /// Locks of words, where the kernel has no compare-exchange.
    pub const LOCKS: &str = "qj_locks";
    /// Rare events, for the log of an agent. The name is aya-log's.
    pub const EVENTS: &str = "AYA_LOGS";
    /// Grants by cgroup.
    pub const GRANTS: &str = "qj_grants";
    /// Number of the last change of the grants.
    pub const GENERATION: &str = "qj_generation";
    /// What sockets remember of their grants.
    pub const SOCKETS: &str = "qj_sockets";
    /// The program that gives new sockets the level of their cgroup.
    pub const SOCK_CREATE: &str = "qj_sock_create";
    /// The program that gives TCP connections the level of their listener or maker.
    pub const SOCKOPS: &str = "qj_sockops";
    /// The program that sees what a process asks for.
    pub const SETSOCKOPT: &str = "qj_setsockopt";
    /// The program that gives each packet of a granted socket its level.
    pub const SKB_LEVEL: &str = "qj_skb_level";
    /// The programs that set send buffers, where connections begin and where datagrams are addressed.
    pub const CONNECT4: &str = "qj_connect4";
    /// See [`CONNECT4`].
    pub const CONNECT6: &str = "qj_connect6";
    /// See [`CONNECT4`].
    pub const SENDMSG4: &str = "qj_sendmsg4";
    /// See [`CONNECT4`].
    pub const SENDMSG6: &str = "qj_sendmsg6";
}
