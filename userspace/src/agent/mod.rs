//! The agent: a service that keeps the interfaces of a host as its configuration wants them, and shows what they do.

pub mod events;
pub mod guarantee;
pub mod members;
pub mod metrics;
pub mod snapshot;
