//! What the eBPF programs and the user side share: levels, marks, the limiter, the reasons, the
//! layout of the maps and the names of everything that is pinned or attached.
//!
//! The crate is `no_std`, has no clock and does no I/O. Time comes in as an argument, so the same
//! functions run in the kernel, in host tests, and under the model checker.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod frame;
pub mod layout;
pub mod level;
pub mod limiter;
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
}
