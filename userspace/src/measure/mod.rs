//! Measuring the time of messages in a network, open loop.
//!
//! A probe's latency counts from the time at which it *should* have been sent. A sender that is held up
//! does not get to leave out the waiting that it would have seen (coordinated omission), and its schedule
//! is never moved.

mod assertion;
mod clock;
pub mod compare;
pub mod control;
mod endpoint;
pub(crate) mod ethtool;
pub mod host;
mod latencies;
pub mod load;
pub mod memcached;
mod poll;
mod probe;
mod ranks;
mod realtime;
mod recorder;
mod responder;
pub mod result;
pub mod route;
mod schedule;
pub mod server;
pub mod session;
mod stalls;
mod stamping;
mod tcp;
pub(crate) mod threads;
pub mod train;
mod verdict;
mod window;
pub mod wire;

pub use assertion::{Assertion, AssertionError};
pub use endpoint::Transport;
pub use latencies::Latencies;
pub use probe::{Probe, Progress, Report, flood};
pub use realtime::{Priority, give_up_real_time, pin_and_prioritise};
pub use recorder::{Bounds, Clocks};
pub use schedule::Arrivals;
pub use stalls::StallWatch;
