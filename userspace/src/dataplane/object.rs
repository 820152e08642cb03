//! The eBPF object, in two forms: for kernels with an atomic compare-exchange, and for older ones, where a lock takes its place.

use std::sync::OnceLock;

use super::{Error, sys};

/// For kernels with a compare-exchange. Empty if it was not there when qjump was built.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qjump.o"));
/// For kernels without, and empty likewise.
pub static OLD_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qjump-old.o"));

/// The object for this kernel.
///
/// # Errors
/// [`Error::NoObject`] or [`Error::NoOldObject`] if it was not there when qjump was built.
pub fn object() -> Result<&'static [u8], Error> {
    match has_compare_exchange() {
        true if OBJECT.is_empty() => Err(Error::NoObject),
        true => Ok(OBJECT),
        false if OLD_OBJECT.is_empty() => Err(Error::NoOldObject),
        false => Ok(OLD_OBJECT),
    }
}

/// Whether the kernel has an eBPF compare-exchange (since Linux 5.12; on arm64, since 5.18): tried once, not guessed.
/// Yes, too, if it does not let this process try.
pub fn has_compare_exchange() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return *known;
    }
    const ENOTSUPP: i32 = 524; // include/linux/errno.h: what the kernel says when its compiler has no such instruction.
    let has = match sys::try_compare_exchange().map_err(|error| error.raw_os_error()) {
        Ok(()) => true,
        Err(Some(libc::EINVAL | ENOTSUPP)) => false,
        // No rights, no memory, a signal: next time it may be another answer.
        Err(_) => return true,
    };
    *KNOWN.get_or_init(|| has)
}
