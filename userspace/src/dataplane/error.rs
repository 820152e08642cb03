//! What can go wrong between a plan and a limited interface: what, where, and what to do.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::sys::namespace_path;

/// An error of [`super::load`], [`super::unload`] or [`super::status`].
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Error {
    #[error(
        "this qjump was built without its eBPF program; build it with `cargo xtask build`, or set \
         QJUMP_BPF_OBJECT to a prebuilt object when building"
    )]
    NoObject,
    #[error(
        "this kernel's eBPF has no compare-exchange, and this qjump was built without the program for such kernels \
         (qjump-old.o); build it with `cargo xtask build`"
    )]
    NoOldObject,
    #[error(
        "missing {missing}: {doing} eBPF programs needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; run it as root, for \
         example with sudo"
    )]
    Capability { missing: &'static str, doing: &'static str },
    #[error("{path} is for root alone; run it as root, for example with sudo")]
    Permission { path: PathBuf },
    #[error("there is no interface '{0}' in this network namespace; `ip link` lists what there is")]
    NoInterface(String),
    #[error("interface '{0}' is given twice; name each interface once")]
    InterfaceTwice(String),
    #[error("interface {0} is the loopback device: its packets never reach a network, so there is nothing to bound")]
    Loopback(String),
    #[error(
        "interface {0} has no Ethernet header, so its packets have no wire size and no priority tag; load qjump on \
         the Ethernet device below it"
    )]
    NotEthernet(String),
    #[error(
        "max-packet is {packet} bytes, but interface {interface} sends at most {largest} (its MTU of {mtu} and a header \
         of 14); lower --max-packet, or raise the MTU with `ip link set dev {interface} mtu {}`", packet - 14
    )]
    PacketOverMtu { interface: String, packet: u32, mtu: u32, largest: u32 },
    #[error("cannot mount the BPF file system at {path}: {source}; mount it by hand: mount -t bpf bpf {path}")]
    Mount { path: &'static str, source: io::Error },
    #[error(
        "{path} is not mounted, and this command has mounts of its own (`ip netns exec` makes them): what is pinned on \
         this host cannot be seen from here, and what is pinned here would be gone when it ends. Enter a network namespace with `nsenter --net=/run/netns/NAME` instead"
    )]
    PrivateMounts { path: &'static str },
    #[error("cannot use {path}: {source}")]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "{path} belongs to user {uid} with mode {mode:o}, and whoever may write there decides what is in force; remove it \
         if it is not yours, or give it to root with mode 700"
    )]
    NotOurs { path: PathBuf, uid: u32, mode: u32 },
    #[error(
        "'{0}' cannot be the name of an interface: 1 to 15 bytes, no slash, colon or space; `ip link` lists what there is"
    )]
    BadName(String),
    #[error("another qjump is changing this host's interfaces or grants; it did not finish within {0} s. Try again")]
    Locked(u64),
    #[error(
        "{path}: {why}. It is no state of this version of qjump; remove it with `qjump unload --interface {interface}`"
    )]
    CorruptPin { path: PathBuf, why: String, interface: String },
    #[error("this kernel refuses the eBPF program ({what}): {detail}. qjump needs Linux 5.10 or later")]
    Kernel { what: &'static str, detail: String },
    #[error("{interface} was loaded by another version of qjump{}; unload and load it again: `qjump unload --interface {interface}`",
        if *in_force { " and is still in force" } else { ", and is in force no more" })]
    OtherVersion { interface: String, in_force: bool },
    #[error(
        "interface {interface} has a filter of qjump on clsact whose pins are gone, so it cannot be managed; remove it: \
         `tc filter del dev {interface} egress pref 1 handle 0x716a bpf`, and then, if nothing else is on clsact, `tc qdisc \
         del dev {interface} clsact`"
    )]
    Orphan { interface: String },
    #[error(
        "'{interface}' is loaded in another network namespace (net:[{netns}]), as a clsact filter, which can be removed \
         only there: `nsenter --net={} qjump unload --interface {interface}`",
        namespace_path(*netns).map_or("NAMESPACE".to_owned(), |path| path.display().to_string())
    )]
    FilterElsewhere { interface: String, netns: u64 },
    #[error(
        "the state of '{interface}' belongs to an interface of that name in another network namespace (net:[{netns}]); \
         work on it there, with nsenter --net, or remove it for good with `qjump unload --interface {interface} --force`"
    )]
    OtherNamespace { interface: String, netns: u64 },
    #[error(
        "interface {interface} is already managed under the name '{old}', which it had before; run \
         `qjump unload --interface {old}` first"
    )]
    Renamed { interface: String, old: String },
    #[error("this kernel has no tcx (it came with Linux 6.6); use --hook clsact, or --hook auto")]
    NoTcx,
    #[error("interface {interface}: {source} while {action}")]
    Io { interface: String, action: &'static str, source: io::Error },
    #[error("interface {interface}: cannot attach the program: {detail}")]
    Attach { interface: String, detail: String },
    #[error("qjump is not loaded on interface {0}; `qjump status` lists where it is")]
    NotLoaded(String),
    #[error("this kernel has no {queue} ({kind}); use --queue auto, which takes the best that there is")]
    NoQueue { queue: &'static str, kind: &'static str },
    #[error(
        "level {level} is to be paced, and nothing would hold its packets back: --queue keep leaves the queue alone, and \
         auto found none to use. Use over = \"police\", or --queue htb or fq"
    )]
    NothingToPaceWith { level: qjump_ebpf::Level },
    #[error(
        "the options of the queue of interface {0} are too long to be kept for unload; remove it with `tc qdisc del dev {0} \
         root`, or leave it in charge with --queue keep"
    )]
    LargeQueue(String),
    #[error("interface {interface} cannot be shaped to a rate (--host-rate): {why}")]
    HostRate { interface: String, why: String },
    #[error(
        "'{interface}' has a queue of qjump in another network namespace (net:[{netns}]), which can be removed only there: \
         `nsenter --net={} qjump unload --interface {interface}`",
        namespace_path(*netns).map_or("NAMESPACE".to_owned(), |path| path.display().to_string())
    )]
    QueueElsewhere { interface: String, netns: u64 },
    #[error(transparent)]
    Queue(#[from] crate::qdisc::Error),
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
}

impl Error {
    /// Whether the request itself is wrong, whatever the state of the host (exit status 64).
    pub const fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::BadName(_)
                | Self::InterfaceTwice(_)
                | Self::Loopback(_)
                | Self::NotEthernet(_)
                | Self::PacketOverMtu { .. }
                | Self::HostRate { .. }
                | Self::NothingToPaceWith { .. }
                | Self::Plan(_)
        )
    }

    pub(super) fn io(interface: &str, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let interface = interface.to_owned();
        move |source| Self::Io { interface, action, source }
    }
}

/// The telling lines of an error with a verifier log: its head and its last lines.
pub(crate) fn shorten(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.len() <= 6 {
        return lines.join("; ");
    }
    format!("{}; ({} lines omitted) {}", lines[0], lines.len() - 4, lines[lines.len() - 3..].join("; "))
}
