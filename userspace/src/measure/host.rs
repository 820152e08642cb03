//! What can decide a result on this machine, noted with every result so that another reader can judge it. The list
//! follows flent's host metadata (<https://flent.org>).

use std::{fs, path::Path};

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    tc::{TcAttribute, TcHandle, TcMessage},
};
use serde_json::{Map, Value, json};

use super::ethtool::Ethtool;
use crate::netlink::ask;

/// Those that change how packets wait or how TCP sends; of the calling thread's network namespace.
const SYSCTLS: [&str; 20] = [
    "net.core.busy_poll",
    "net.core.busy_read",
    "net.core.default_qdisc",
    "net.core.netdev_budget",
    "net.core.netdev_max_backlog",
    "net.core.rmem_default",
    "net.core.rmem_max",
    "net.core.wmem_default",
    "net.core.wmem_max",
    "net.ipv4.tcp_autocorking",
    "net.ipv4.tcp_congestion_control",
    "net.ipv4.tcp_ecn",
    "net.ipv4.tcp_limit_output_bytes",
    "net.ipv4.tcp_min_tso_segs",
    "net.ipv4.tcp_notsent_lowat",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_tso_rtt_log",
    "net.ipv4.tcp_wmem",
    "kernel.sched_rt_runtime_us",
    "kernel.timer_migration",
];

/// This machine, and the interfaces that are up in the network namespace of the calling thread. What cannot be read is
/// `null`.
pub fn metadata() -> Value {
    let kernel = |name: &str| text(Path::new("/proc/sys/kernel").join(name));
    let sysctls: Map<String, Value> = SYSCTLS
        .into_iter()
        .map(|name| (name.to_owned(), text(Path::new("/proc/sys").join(name.replace('.', "/"))).into()))
        .collect();
    json!({
        "name": kernel("hostname"),
        "kernel": kernel("osrelease"),
        "kernel_version": kernel("version"),
        "kernel_command_line": text("/proc/cmdline"),
        "distribution": distribution(&text("/etc/os-release").unwrap_or_default()),
        "architecture": std::env::consts::ARCH,
        "cpu": cpu(),
        "memory_bytes": memory(&text("/proc/meminfo").unwrap_or_default()),
        "clock_source": text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "sysctls": sysctls,
        "interfaces": interfaces(),
        "qjump": env!("CARGO_PKG_VERSION"),
    })
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn cpu() -> Value {
    let info = text("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
            .map(|(_, value)| value.trim())
    };
    json!({
        "model": field("model name"),
        "count": std::thread::available_parallelism().map_or(0, usize::from),
        "virtual": field("flags").map(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
        // Absent where the hypervisor decides.
        "governor": text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "idle_driver": text("/sys/devices/system/cpu/cpuidle/current_driver"),
    })
}

fn distribution(os_release: &str) -> Option<String> {
    os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"').to_owned())
}

fn memory(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn interfaces() -> Option<Vec<Value>> {
    let links = ask(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP).ok()?;
    let qdiscs = ask(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()), NLM_F_DUMP).unwrap_or_default();
    let ethtool = Ethtool::new().ok();
    let up = links.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) if link.header.flags.contains(LinkFlags::Up) => Some(link),
        _ => None,
    });
    Some(up.filter_map(|link| interface(&link, &qdiscs, ethtool.as_ref())).collect())
}

fn interface(link: &LinkMessage, qdiscs: &[RouteNetlinkMessage], ethtool: Option<&Ethtool>) -> Option<Value> {
    let (mut name, mut mtu, mut gso_max_segs) = (None, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.as_str()),
            LinkAttribute::Mtu(value) => mtu = Some(*value),
            LinkAttribute::GsoMaxSegs(value) => gso_max_segs = Some(*value),
            _ => {}
        }
    }
    let name = name?;
    let driver = ethtool.and_then(|ethtool| ethtool.driver(name).ok());
    const HARDWARE: u32 = libc::SOF_TIMESTAMPING_TX_HARDWARE | libc::SOF_TIMESTAMPING_RX_HARDWARE;
    let stamps = ethtool.and_then(|ethtool| ethtool.timestamping(name).ok());
    let offloads: Map<String, Value> = ethtool
        .map(|ethtool| ethtool.offloads(name))
        .unwrap_or_default()
        .into_iter()
        .map(|(name, on)| (name.to_owned(), on.into()))
        .collect();
    Some(json!({
        "name": name,
        "mtu": mtu,
        "gso_max_segs": gso_max_segs,
        "driver": driver.as_ref().map(|(driver, _)| driver),
        "driver_version": driver.as_ref().map(|(_, version)| version),
        "hardware_time_stamps": stamps.map(|flags| flags & HARDWARE == HARDWARE),
        "offloads": offloads,
        "qdiscs": qdiscs.iter().filter_map(|answer| qdisc(answer, link.header.index)).collect::<Vec<_>>(),
    }))
}

fn qdisc(answer: &RouteNetlinkMessage, ifindex: u32) -> Option<Value> {
    let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer else { return None };
    if qdisc.header.index != ifindex.cast_signed() {
        return None;
    }
    let kind = qdisc.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind),
        _ => None,
    })?;
    let show = |TcHandle { major, minor }: TcHandle| match (major, minor) {
        (0xffff, 0xffff) => "root".to_owned(),
        (0xffff, 0xfff1) => "ingress".to_owned(),
        _ => format!("{major:x}:{minor:x}"),
    };
    Some(json!({"kind": kind, "handle": show(qdisc.header.handle), "parent": show(qdisc.header.parent)}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_machine_and_its_loopback() {
        let host = metadata();
        for field in ["kernel", "kernel_version", "architecture", "qjump"] {
            assert!(host[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {host:#}");
        }
        assert!(host["cpu"]["count"].as_u64().unwrap() > 0);
        assert!(host["sysctls"]["net.ipv4.tcp_congestion_control"].is_string());
        let interfaces = host["interfaces"].as_array().unwrap();
        let loopback = interfaces.iter().find(|interface| interface["name"] == "lo").expect("loopback is up");
        assert!(loopback["mtu"].as_u64().unwrap() >= 1500 && loopback["offloads"]["gso"].is_boolean());
    }

    #[test]
    fn reads_the_files_that_everybody_reads() {
        assert_eq!(distribution("ID=x\nPRETTY_NAME=\"Debian 12\"\n").as_deref(), Some("Debian 12"));
        assert_eq!(memory("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2_097_152));
        assert_eq!((distribution(""), memory("MemTotal: x")), (None, None));
    }
}
