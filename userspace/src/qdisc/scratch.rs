//! A network namespace to try things out in: what a kernel has, and whether a queue can be put back.

use std::{io, panic, thread};

use netlink_packet_core::DefaultNla;
use nix::sched::{CloneFlags, unshare};

use super::{
    encode::{Fq, Htb, Options, Prio, attributes},
    kernel::{self, Entry},
    tree::Qdisc,
};

/// The loopback device: the only one in a new namespace, and always this number (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// Runs `work` in a thread of its own with a namespace of its own, in which it may do anything to the interface
/// that it is given. The namespace goes away with the thread.
pub(crate) fn scratch<T: Send>(work: impl FnOnce(u32) -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                work(LOOPBACK)
            })
            .join()
            .unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}

/// The queues that this kernel has, or can load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Available {
    /// sch_htb.
    pub htb: bool,
    /// sch_fq.
    pub fq: bool,
    /// sch_prio.
    pub prio: bool,
}

pub(super) fn available() -> io::Result<Available> {
    let tried = scratch(|lo| {
        Ok(Available {
            htb: kernel::has_kind(lo, &Options::Htb(Htb { default_class: 1, rate2quantum: 10 }))?,
            fq: kernel::has_kind(lo, &Options::Fq(Fq::default()))?,
            prio: kernel::has_kind(lo, &Options::Prio(Prio { bands: 8, map: [0; 16] }))?,
        })
    });
    match tried {
        // Without CAP_SYS_ADMIN, as the agent runs.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => known().map_err(|_| error),
        result => result,
    }
}

/// The same found out without a namespace, by requests for the loopback device's root that no kernel carries out: it looks for
/// the kind first (`qdisc_create`, net/sched/sch_api.c) and then refuses the options. HTB and prio must have some (`htb_init`,
/// `prio_tune`); fq need not, and takes no table of 2^0 buckets (`fq_change`).
pub(super) fn known() -> io::Result<Available> {
    const BUCKETS_LOG: u16 = 3;
    let none = attributes(&[DefaultNla::new(BUCKETS_LOG, vec![0; 4])]);
    let knows = |kind: &str, bytes: &[u8]| {
        kernel::knows_kind(LOOPBACK, &Options::Other { kind: kind.to_owned(), bytes: bytes.to_vec() })
    };
    Ok(Available { htb: knows("htb", &[])?, fq: knows("fq", &none)?, prio: knows("prio", &[])? })
}

/// Whether the kernel makes the same qdisc again from what it reports of it. Some kinds want more to be made than
/// they report (red its table, for example).
pub(super) fn is_replayable(root: &Entry) -> io::Result<bool> {
    let qdisc = Qdisc {
        handle: root.handle,
        parent: root.parent,
        options: Options::Other { kind: root.kind.clone(), bytes: root.options.clone() },
    };
    scratch(|lo| match kernel::set_qdisc(lo, &qdisc, kernel::ADD) {
        Ok(()) => Ok(kernel::observe(lo)?.root.as_ref() == Some(root)),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Err(error),
        Err(_) => Ok(false),
    })
}
