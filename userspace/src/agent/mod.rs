//! `qjump agent`: keeps this host as its configuration wants it.
//!
//! [`machine`] decides, and is pure; [`run()`] is the loop that feeds it and has [`host`] execute what it says, one command at
//! a time on a thread of its own. [`desired`] reads the configuration, [`control`] is the socket, [`events`] hears of
//! interfaces and queues, [`members`] of the size of the cluster ([`tls`], too). [`snapshot`], [`guarantee`] and [`metrics`] are what it
//! shows, [`rare`] what the programs tell.
//!
//! What the agent does is what `qjump load`, `unload` and `assign` do, by the same code; it holds nothing that would end with
//! it. Stopped or killed, the limits stay in force, and the next agent finds things as it wants them and changes nothing.
//!
//! # Logs
//! * error: a limit is not in force that should be, or a configuration was refused.
//! * warning: something is not as it should be, and is put right or can be lived with.
//! * info: what was changed, and why. Nothing is said while nothing changes.
//! * debug: each command as it is begun.
//!
//! They go to the journal if standard error does (`JOURNAL_STREAM`), else to standard error.

pub mod client;
pub mod control;
pub mod desired;
pub mod events;
pub mod guarantee;
pub mod host;
mod log;
pub mod machine;
pub mod members;
pub mod metrics;
mod notify;
pub mod rare;
mod run;
pub mod snapshot;
mod tls;

pub use run::{Failed, Options, run};

/// Where the agent listens.
pub const SOCKET: &str = "/run/qjump/agent.sock";
/// Where the configuration is.
pub const CONFIG: &str = "/etc/qjump/qjump.toml";
