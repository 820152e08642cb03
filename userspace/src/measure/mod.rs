//! Measuring the time of messages in a network, open loop.
//!
//! A probe's latency counts from the time at which it *should* have been sent. A sender that is held up
//! does not get to leave out the waiting that it would have seen (coordinated omission), and its schedule
//! is never moved.

mod ethtool;
pub mod host;
mod latencies;
mod probe;
mod ranks;
mod realtime;
pub mod result;
mod stalls;

pub use latencies::Latencies;
pub use probe::{Probe, Progress, Report, flood};
pub use realtime::{Priority, pin_and_prioritise};
pub use stalls::StallWatch;
