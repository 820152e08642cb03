//! The eBPF program on interfaces: load, replace, inspect, remove.
//!
//! Everything that outlives the process is pinned under /sys/fs/bpf/qjump/IFACE. A load first checks
//! all it can without touching anything, then prepares every interface, attaches last, and undoes what
//! it did if a later step fails.

mod enforce;
mod error;
mod load;
mod maps;
pub mod netlink;
mod pins;
mod status;
pub mod sys;

pub use error::Error;
pub(crate) use error::shorten;
pub(crate) use load::require_capabilities;
pub use load::{Hook, Loaded, Request, has, load, unload};
pub use maps::Maps;
pub use pins::{BPFFS, Pins};
pub(crate) use pins::{Lock, ensure_bpffs, require_visible};
pub use status::{InterfaceStatus, LevelStatus, status};

/// The eBPF object, or empty if it was not there when qjump was built.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qjump.o"));

/// The interfaces that qjump is loaded on, or has left pins of.
///
/// # Errors
/// If /sys/fs/bpf/qjump is there and cannot be read, or this command has mounts of its own.
pub fn loaded_interfaces() -> Result<Vec<String>, Error> {
    pins::require_visible()?;
    Pins::interfaces().map_err(pins::unreadable)
}
