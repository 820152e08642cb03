//! What the integration tests and the benchmark share. Everything here needs root and the eBPF objects;
//! `cargo xtask test` and `cargo xtask bench` see to both.

pub mod agent;
pub mod arrivals;
pub mod backpressure;
pub mod capture;
pub mod cgroups;
pub mod departures;
pub mod frames;
pub mod http;
pub mod interrupt;
pub mod kernel;
pub mod link;
pub mod measuring;
pub mod nobody;
pub mod png;
pub mod program;
pub mod relay;
pub mod results;
pub mod root;
pub mod sender;
pub mod serial;
pub mod tcp;
