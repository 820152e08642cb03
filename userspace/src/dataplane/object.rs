//! The eBPF object, in two forms: for kernels with an atomic compare-exchange, and for older ones, where a lock takes its place.

use std::{io, sync::OnceLock};

use super::{Error, sys};

/// For kernels with a compare-exchange. Empty if it was not there when qjump was built.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qjump.o"));
/// For kernels without, and empty likewise.
pub static OLD_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/qjump-old.o"));

/// The object for this kernel.
///
/// # Errors
/// [`Error::NoObject`] if it was not there when qjump was built.
pub fn object() -> Result<&'static [u8], Error> {
    // Without the one for old kernels such a kernel says itself what it does not take.
    let object = if has_compare_exchange() || OLD_OBJECT.is_empty() { OBJECT } else { OLD_OBJECT };
    if object.is_empty() { Err(Error::NoObject) } else { Ok(object) }
}

/// Whether the kernel has an eBPF compare-exchange (since Linux 5.12; on arm64, since 5.18): tried once, not guessed.
/// Yes, too, if it does not let this process try.
pub fn has_compare_exchange() -> bool {
    static TRIED: OnceLock<bool> = OnceLock::new();
    *TRIED.get_or_init(|| match sys::try_compare_exchange() {
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        Ok(()) => true,
    })
}
