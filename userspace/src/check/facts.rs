//! What there is to know of a host and its interfaces before a load.

use crate::{
    dataplane::{Capability, Foreseen, Trial, netlink::EgressFilter},
    qdisc::Available,
};

use super::{Bypass, Rewrite};

/// Something that was looked at, or why it could not be seen.
pub type Seen<T> = Result<T, String>;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Of the host, or of the network namespace as a whole.
    pub host: Host,
    /// Of each interface.
    pub interfaces: Vec<Interface>,
}

/// What is the same for all interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A capability that this user lacks for a load.
    pub lacks: Option<Capability>,
    /// What the kernel made of the eBPF object.
    pub trial: Seen<Trial>,
    /// Whether the kernel describes its own types (BTF).
    pub has_btf: bool,
    /// `net.core.bpf_jit_enable`; not to be seen from a container's network namespace.
    pub jit: Option<u32>,
    /// The queues that the kernel has.
    pub queues: Seen<Available>,
    /// Whether /sys/fs/bpf is mounted, or why nothing can be pinned.
    pub bpffs: Seen<bool>,
    /// The cgroup hierarchy that grants go by.
    pub cgroups: Seen<Cgroups>,
    /// The kernel's clock source.
    pub clock: Seen<String>,
    /// Whether packets of others are forwarded.
    pub forwards: bool,
    /// Rules of nftables that change priorities or codepoints.
    pub rewrites: Seen<Vec<Rewrite>>,
    /// Whether legacy iptables has a mangle table, whose rules are not read.
    pub has_mangle: Seen<bool>,
    /// Sockets that can send around the egress program, in this network namespace.
    pub bypasses: Seen<Vec<Bypass>>,
    /// RDMA devices, whose packets no kernel sees.
    pub rdma: Vec<String>,
    /// Interfaces of this network namespace that have XDP programs, which may redirect frames to others.
    pub xdp: Vec<String>,
}

/// Where cgroups of version 2 are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    /// The mount point.
    pub mount: String,
    /// Whether hierarchies of version 1 are there, too.
    pub hybrid: bool,
    /// Whether new cgroups can be made.
    pub writable: bool,
    /// Whether this is the host's whole hierarchy, or the part of a container.
    pub whole: bool,
}

/// What there is to know of one interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// What a load would do; `None` without a plan.
    pub load: Option<Load>,
    /// Itself.
    pub link: Link,
    /// The kind of its root qdisc, the kernel's default too.
    pub root: Seen<String>,
    /// The programs on its tcx egress, by name, in the order in which they run.
    pub programs: Seen<Vec<String>>,
    /// The filters on its clsact egress that are not ours.
    pub filters: Seen<Vec<EgressFilter>>,
    /// Whether IPv6 is on: then the kernel sends packets of its own.
    pub has_ipv6: bool,
}

/// What a load would do to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// This.
    Foreseen(Foreseen),
    /// Nothing, because of this.
    Refused(String),
    /// Not known, because of this.
    Unseen(String),
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// `IFLA_INFO_KIND`: `"veth"`, `"bond"`; empty for a real device.
    pub kind: String,
    /// L3 bytes.
    pub mtu: u32,
    /// Whether it is up and has a carrier.
    pub is_up: bool,
    /// Mbit/s, if it says.
    pub speed_mbit: Option<u32>,
    /// Whether it cannot send and receive at once.
    pub half_duplex: bool,
    /// Most segments of a GSO packet.
    pub gso_max_segs: u32,
    /// Most bytes of a GSO packet, L3.
    pub gso_max_size: u32,
    /// Whether the device cuts TCP packets into segments (TSO), if it says.
    pub tso: Option<bool>,
    /// Queues of the device.
    pub tx_queues: u32,
    /// The device that it is a port of, and its kind.
    pub master: Option<(String, String)>,
    /// Devices of this network namespace that its packets leave through.
    pub lower: Vec<String>,
    /// Virtual functions (SR-IOV), whose packets leave by the same port.
    pub virtual_functions: u32,
}
