//! qjump bounds the time that a small message spends in a shared network: a limiter on every host, a
//! mark on every packet, strict priority in the switches, and a plan that says what may be sent.

pub mod agent;
pub mod chart;
pub mod check;
pub mod cli;
pub mod config;
pub mod dataplane;
pub mod measure;
mod netlink;
pub mod plan;
pub mod qdisc;
pub mod report;
pub mod sim;
pub mod socket;
pub mod table;
pub mod tag;
pub mod testbed;
pub mod units;
