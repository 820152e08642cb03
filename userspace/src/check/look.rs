//! Gathers [`Facts`]: the only part of a check that asks the host. It changes nothing there.

use std::{fs, io, path::Path};

use aya::programs::loaded_programs;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, LinkXdp},
};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::{
    Cgroups, Facts, Host, Interface, Link, Load, Seen,
    bypass::bypasses,
    ethtool::{settings, tso},
    rules::rewrites,
};
use crate::{
    dataplane::{
        Capability, Error, Request, check_suitable, clsact_filter, find_interfaces, foresee, has_bpffs,
        missing_capability,
        netlink::{self, egress_filters},
        sys::tcx_programs,
        trial,
    },
    netlink::ask,
    qdisc,
    tag::cgroup::Hierarchy,
};

/// Looks at the host and at these interfaces. With a request, also at what a load would do.
///
/// # Errors
/// If an interface is not there, or the kernel does not list them.
pub fn look(interfaces: &[String], request: Option<&Request<'_>>) -> Result<Facts, Error> {
    let found = find_interfaces(interfaces)?;
    let devices = devices().map_err(|source| Error::Io {
        interface: interfaces.join(", "),
        action: "listing the devices",
        source,
    })?;
    let lacks = missing_capability();
    let interfaces = found.iter().map(|interface| Interface {
        name: interface.name.clone(),
        load: request.map(|request| would_load(interface, request, lacks)),
        link: link(interface, &devices),
        root: qdisc::root_kind(interface.index).map_err(|error| error.to_string()),
        programs: programs(interface.index),
        filters: filters(interface.index),
        has_ipv6: sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", interface.name)) == Some(0),
    });
    Ok(Facts { interfaces: interfaces.collect(), host: host(lacks, &devices) })
}

fn would_load(interface: &netlink::Interface, request: &Request<'_>, lacks: Option<Capability>) -> Load {
    let foreseen = match (check_suitable(interface, request.plan), lacks) {
        (Ok(()), Some(missing)) => return Load::Unseen(lacking(missing)),
        (Ok(()), None) => foresee(interface, request),
        (Err(error), _) => Err(error),
    };
    foreseen.map_or_else(|error| Load::Refused(error.to_string()), Load::Foreseen)
}

fn with(capability: Capability) -> Seen<()> {
    if capability.is_effective() { Ok(()) } else { Err(lacking(capability)) }
}

fn lacking(capability: Capability) -> String {
    format!("that takes {}", capability.name())
}

fn host(lacks: Option<Capability>, devices: &[Device]) -> Host {
    Host {
        lacks,
        trial: match lacks {
            Some(missing) => Err(lacking(missing)),
            None => trial().map_err(|error| error.to_string()),
        },
        has_btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        jit: sysctl("net/core/bpf_jit_enable"),
        queues: with(Capability::SysAdmin)
            .and_then(|()| with(Capability::NetAdmin))
            .and_then(|()| qdisc::available().map_err(|error| error.to_string())),
        bpffs: has_bpffs().map_err(|error| error.to_string()),
        cgroups: cgroups(),
        clock: fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            .map(|name| name.trim().to_owned())
            .map_err(|error| error.to_string()),
        forwards: sysctl("net/ipv4/ip_forward") == Some(1) || sysctl("net/ipv6/conf/all/forwarding") == Some(1),
        rewrites: with(Capability::NetAdmin).and_then(|()| rewrites().map_err(|error| error.to_string())),
        has_mangle: has_mangle(),
        bypasses: bypasses(),
        rdma: entries("/dev/infiniband").into_iter().filter(|name| name.starts_with("uverbs")).collect(),
        xdp: devices.iter().filter(|device| device.has_xdp).map(|device| device.name.clone()).collect(),
    }
}

/// A number below /proc/sys; `None` if it is not there.
fn sysctl(name: &str) -> Option<u32> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

fn entries(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn cgroups() -> Seen<Cgroups> {
    let hierarchy = Hierarchy::find().map_err(|error| error.to_string())?;
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    Ok(Cgroups {
        mount: hierarchy.mount().display().to_string(),
        hybrid: text.lines().any(|line| line.contains(" - cgroup ")),
        writable: statvfs(hierarchy.mount()).is_ok_and(|file_system| !file_system.flags().contains(FsFlags::ST_RDONLY)),
        // The root of all cgroups alone has no events (Documentation/admin-guide/cgroup-v2.rst).
        whole: !hierarchy.mount().join("cgroup.events").exists(),
    })
}

/// The tables that legacy iptables has made in this network namespace.
fn has_mangle() -> Seen<bool> {
    let mut found = false;
    for file in ["ip_tables_names", "ip6_tables_names"] {
        match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(text) => found |= text.lines().any(|table| table == "mangle"),
            // A kernel without legacy iptables.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("/proc/net/{file}: {error}")),
        }
    }
    Ok(found)
}

fn programs(index: u32) -> Seen<Vec<String>> {
    with(Capability::NetAdmin)?;
    let ids = tcx_programs(index).map_err(|error| error.to_string())?.unwrap_or_default();
    let name = |id: u32| {
        let known = loaded_programs().flatten().find(|program| program.id() == id);
        let name = known.and_then(|program| program.name_as_str().map(str::to_owned));
        name.filter(|name| !name.is_empty()).unwrap_or_else(|| format!("number {id}"))
    };
    Ok(ids.into_iter().map(name).collect())
}

fn filters(index: u32) -> Seen<Vec<netlink::EgressFilter>> {
    let all = || -> io::Result<_> { Ok((egress_filters(index)?, clsact_filter(index)?)) };
    let (all, ours) = all().map_err(|error| error.to_string())?;
    Ok(all.into_iter().filter(|filter| Some(filter) != ours.as_ref()).collect())
}

/// A network device, as rtnetlink lists it.
struct Device {
    name: String,
    link: Link,
    master: Option<u32>,
    below: Option<u32>,
    has_xdp: bool,
}

fn devices() -> io::Result<Vec<Device>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats]));
    let answers = ask(RouteNetlinkMessage::GetLink(request), NLM_F_DUMP)?;
    let devices = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(device(link)),
        _ => None,
    });
    Ok(devices.collect())
}

fn device(message: LinkMessage) -> Device {
    let up = LinkFlags::Up | LinkFlags::LowerUp;
    let link = Link { index: message.header.index, is_up: message.header.flags.contains(up), ..Link::default() };
    let mut device = Device { name: String::new(), link, master: None, below: None, has_xdp: false };
    let mut elsewhere = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Mtu(mtu) => device.link.mtu = mtu,
            LinkAttribute::Link(index) => device.below = Some(index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(index) => device.master = Some(index),
            LinkAttribute::GsoMaxSegs(segments) => device.link.gso_max_segs = segments,
            LinkAttribute::GsoMaxSize(bytes) => device.link.gso_max_size = bytes,
            LinkAttribute::NumTxQueues(queues) => device.link.tx_queues = queues,
            LinkAttribute::NumVf(functions) => device.link.virtual_functions = functions,
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                device.link.kind = kind.unwrap_or_default();
            }
            LinkAttribute::Xdp(parts) => {
                device.has_xdp = parts.iter().any(|part| matches!(part, LinkXdp::ProgId(id) if *id != 0));
            }
            _ => {}
        }
    }
    // The number of a device of another network namespace means nothing here, and a veth's peer is not below it.
    if elsewhere || device.link.kind == "veth" {
        device.below = None;
    }
    device
}

fn link(interface: &netlink::Interface, devices: &[Device]) -> Link {
    let by_index = |index: u32| devices.iter().find(|device| device.link.index == index);
    let Some(own) = by_index(interface.index) else { return Link::default() };
    let settings = settings(&interface.name);
    let below = own.below.filter(|&below| below != interface.index).and_then(by_index);
    let ports = devices.iter().filter(|device| device.master == Some(interface.index));
    Link {
        speed_mbit: settings.speed_mbit,
        half_duplex: settings.half_duplex,
        tso: tso(&interface.name),
        master: own.master.and_then(by_index).map(|master| (master.name.clone(), master.link.kind.clone())),
        lower: below.into_iter().chain(ports).map(|device| device.name.clone()).collect(),
        ..own.link.clone()
    }
}
