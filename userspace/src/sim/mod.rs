//! A packet-level simulator that tries to break the planner's bounds.
//!
//! Pure and deterministic: time is a number, randomness comes from a seed, and the hosts' limiter is the
//! very function that the kernel runs ([`qjump_ebpf::admit`]).

pub mod adversary;
pub mod campaign;
pub mod engine;
pub mod experiment;
pub mod limiter;
pub mod outcome;
pub mod scenario;
pub mod source;
pub mod topology;
pub mod trace;
