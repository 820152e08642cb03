//! Ctrl-C and its like, for commands that keep what they have.

use std::sync::{
    Once,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    INTERRUPTED.store(true, Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP set the flag instead of ending the process; a second one ends it.
pub(super) fn flag() -> &'static AtomicBool {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESETHAND, SigSet::empty());
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            // SAFETY: the handler only stores into an atomic, which is allowed in a signal handler.
            let set = unsafe { sigaction(signal, &action) };
            set.expect("these signals can be handled");
        }
    });
    &INTERRUPTED
}
