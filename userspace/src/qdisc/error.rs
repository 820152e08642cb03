//! What can go wrong with an interface's queue: what, where, and what to do.

use std::io;

use nix::net::if_::if_indextoname;
use thiserror::Error;

/// An error of this module.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Error {
    #[error("interface {interface}: {source} while {action}{}", hint(.source))]
    Io { interface: String, action: &'static str, source: io::Error },
    #[error("interface {interface}: the kernel refuses {what}: {source}{}", hint(.source))]
    Refused { interface: String, what: String, source: io::Error },
    #[error(
        "interface {interface} has a queue of somebody else at its root ({kind} {handle}), which qjump does not touch: {why}. \
         Remove it with `tc qdisc del dev {interface} root`, or leave it in charge with --queue keep"
    )]
    Foreign { interface: String, kind: String, handle: String, why: String },
    #[error(
        "interface {interface}: {kind} {handle} is back at the root, but its options are not what they were; look at them \
         with `tc -d qdisc show dev {interface}` and set them again"
    )]
    OtherOptions { interface: String, kind: String, handle: String },
    #[error("{failure}; and what was there before could not be put back: {undo}")]
    Undo { failure: Box<Error>, undo: Box<Error> },
    #[error("cannot try queues out in a network namespace of their own: {source}{}", hint(.source))]
    Scratch { source: io::Error },
}

impl Error {
    pub(super) fn io(ifindex: u32, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { interface: name(ifindex), action, source }
    }

    pub(super) fn scratch(source: io::Error) -> Self {
        Self::Scratch { source }
    }

    pub(super) fn refused(ifindex: u32, what: impl ToString) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Refused { interface: name(ifindex), what: what.to_string(), source }
    }
}

/// The interface's name, or its number if it is gone.
pub(super) fn name(ifindex: u32) -> String {
    // nix answers with an empty name where the kernel knows none.
    let known = if_indextoname(ifindex).ok().and_then(|name| name.into_string().ok()).filter(|name| !name.is_empty());
    known.unwrap_or_else(|| format!("number {ifindex}"))
}

/// What to do about it.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; queues are set with CAP_NET_ADMIN and tried out with CAP_SYS_ADMIN: run it as root, for example with sudo"
        }
        Some(libc::ENODEV) => "; the interface is gone: `ip link` lists what there is",
        Some(libc::ENOENT) => {
            "; this kernel has no such queue: `modprobe sch_htb` (or sch_fq) loads it if it was built"
        }
        Some(libc::EEXIST) => "; somebody else has set a queue meanwhile: try again",
        _ => "",
    }
}
