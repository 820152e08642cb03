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
mod object;
mod pins;
pub mod rollback;
mod status;
pub mod sys;
mod trial;

pub use enforce::{Chosen, Why, loses_late_timers};
pub use error::Error;
pub(crate) use error::shorten;
pub use load::{
    Capability, Foreseen, Hook, Loaded, Request, Standing, check_suitable, find_interfaces, foresee, has, is_linked,
    load, load_each, missing_capability, recognise, standing, unload,
};
pub(crate) use load::{clsact_filter, loader, require_capabilities};
pub use maps::Maps;
pub use object::{OBJECT, OLD_OBJECT, has_compare_exchange, object};
pub use pins::{BPFFS, Pins, has_bpffs};
pub(crate) use pins::{Lock, ensure_bpffs, require_visible};
pub use status::{InterfaceStatus, LevelStatus, status};
pub use trial::{Trial, trial};

use qjump_ebpf::{Level, LevelLimit};

/// The interfaces that qjump is loaded on, or has left pins of.
///
/// # Errors
/// If /sys/fs/bpf/qjump is there and cannot be read, or this command has mounts of its own.
pub fn loaded_interfaces() -> Result<Vec<String>, Error> {
    pins::require_visible()?;
    Pins::interfaces().map_err(pins::unreadable)
}

/// Why a packet at this level would leave at level 0 on every interface that qjump is loaded on; `None` if one knows it.
/// What cannot be read counts as one that might.
pub fn ignored_everywhere(level: Level) -> Option<String> {
    let names = loaded_interfaces().ok().filter(|_| level != Level::BEST_EFFORT)?;
    if names.is_empty() {
        return Some("qjump is loaded on no interface; `qjump load --help` says how".to_owned());
    }
    let knows = |name: &String| match Maps::open(name, &Pins::of(name)) {
        Ok(maps) => maps.in_force().limits[level.index()] != LevelLimit::NOT_CONFIGURED,
        Err(_) => true,
    };
    if names.iter().any(knows) {
        return None;
    }
    Some(format!("the plan on {} has no level {level}; `qjump load` with such a level puts it there", names.join(", ")))
}
