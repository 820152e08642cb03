//! Racks of network namespaces on this machine, and the demonstration that runs on one.
//!
//! Racks are built with iproute2's `ip`, `tc` and `bridge`: they are a laboratory, and anyone should be
//! able to read what they are made of. What manages real interfaces (`crate::dataplane`) calls no program.

pub mod apps;
pub mod demo;
mod iperf;
mod netns;
mod rack;

pub use netns::{NetNs, remove_stale};
pub use rack::{Queueing, Rack, RackSpec};
