//! Racks of network namespaces on this machine, the demonstration that runs on one, and the experiments.
//!
//! Racks are built with iproute2's `ip`, `tc` and `bridge`: they are a laboratory, and anyone should be
//! able to read what they are made of. What manages real interfaces (`crate::dataplane`) calls no program.

pub mod apps;
pub mod demo;
pub mod experiment;
mod iperf;
pub mod needs;
mod netns;
mod process;
mod rack;
mod spec;
pub mod standing;

pub use netns::{NetNs, remove_stale};
pub use process::{Process, Program};
pub use rack::Rack;
pub use spec::{MAX_HOSTS, NamedRack, Port, Queueing, RackSpec, Spine, stock};
