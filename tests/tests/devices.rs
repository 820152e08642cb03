//! Devices that are no plain cable: netkit, VLANs, and cards with queues for classes of traffic.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::UdpSocket,
    os::fd::AsRawFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use qjump::dataplane::Pins;
use qjump_tests::{
    arrivals::Witness,
    capture::on_the_wire,
    kernel::{has_netkit, is_guest},
    link::{FAR, Link, NEAR, PLAN, failed, succeeded},
    sender,
};
use serde_json::{Value, json};

/// What a pair of netkit devices carries: frames with Ethernet addresses, or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    L2 = 0,
    L3 = 1,
}

/// An attribute of rtnetlink (include/uapi/linux/rtnetlink.h, struct rtattr).
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = [(value.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A request for a pair of netkit devices; iproute2 6.1 knows no modes.
fn netkit_request(names: [&str; 2], mode: Mode) -> Vec<u8> {
    const RTM_NEWLINK: u16 = 16;
    const FLAGS: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    // include/uapi/linux/if_link.h
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const IFLA_INFO_DATA: u16 = 2;
    const IFLA_NETKIT_PEER_INFO: u16 = 1;
    const IFLA_NETKIT_MODE: u16 = 5;
    let device = |name: &str| [&[0; 16][..], &attribute(IFLA_IFNAME, format!("{name}\0").as_bytes())].concat();
    let data = [
        attribute(IFLA_NETKIT_MODE, &(mode as u32).to_ne_bytes()),
        attribute(IFLA_NETKIT_PEER_INFO, &device(names[1])),
    ];
    let info = [attribute(IFLA_INFO_KIND, b"netkit"), attribute(IFLA_INFO_DATA, &data.concat())];
    let body = [device(names[0]), attribute(IFLA_LINKINFO, &info.concat())].concat();
    let mut request = (body.len() as u32 + 16).to_ne_bytes().to_vec();
    request.extend([RTM_NEWLINK, FLAGS].map(u16::to_ne_bytes).concat());
    request.extend([0; 8]);
    request.extend(body);
    request
}

/// Two hosts with a pair of netkit devices in the place of the cable; the kernel's error if it has none.
fn netkit(mode: Mode) -> Result<io::Result<Link>> {
    let link = Link::new()?;
    let Link { near, far, device, far_device, .. } = &link;
    near.ip(&format!("link del {device}"))?;
    let code = near.enter(|| {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let mut file = File::from(fd);
        file.write_all(&netkit_request([device, far_device], mode))?;
        let mut answer = [0; 4096];
        ensure!(file.read(&mut answer)? >= 20, "a short answer");
        Ok(-i32::from_ne_bytes(answer[16..20].try_into()?))
    })?;
    if code != 0 {
        return Ok(Err(io::Error::from_raw_os_error(code)));
    }
    near.ip(&format!("link set {far_device} netns {}", far.name()))?;
    match mode {
        Mode::L2 => {
            near.ip(&format!("link set {device} address 02:00:00:00:09:01"))?;
            far.ip(&format!("link set {far_device} address 02:00:00:00:09:02"))?;
            link.introduce()?;
        }
        Mode::L3 => {
            for (netns, device, own) in [(near, device, NEAR), (far, far_device, FAR)] {
                netns.ip(&format!("link set {device} addrgenmode none up"))?;
                netns.ip(&format!("addr add {}/24 dev {device}", own.0))?;
            }
        }
    }
    Ok(Ok(link))
}

#[test]
fn netkit_devices_are_limited_and_marked() -> Result<()> {
    for mode in [Mode::L2, Mode::L3] {
        let link = match netkit(mode)? {
            Ok(link) => link,
            Err(error) => {
                assert!(!(is_guest() && has_netkit()), "netkit is in Linux 6.7 and later: {error}");
                println!("{mode:?}: no netkit on this kernel: {error}");
                continue;
            }
        };
        let before = link.tc_state()?;
        for queue in ["keep", "htb"] {
            let load = ["load", "--interface", &link.device, "--queue", queue];
            succeeded(&link.qjump(&[&load[..], &PLAN].concat())?)?;
            let status = link.status()?;
            assert_eq!(
                (&status["attached"], &status["queue"], &status["queue_problems"]),
                (&true.into(), &queue.into(), &json!([]))
            );
            let mut witness = Witness::new(&link.far, &link.far_device)?;
            let receiver = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 7000))?))?;
            receiver.set_read_timeout(Some(Duration::from_secs(5)))?;
            for level in [7, 5, 0] {
                sender::connected(&link.near, NEAR.0, FAR.0, 7000, level)?.send(b"hello there")?;
                receiver.recv(&mut [0; 64]).with_context(|| format!("{mode:?}, {queue}, level {level}"))?;
            }
            let marks: Vec<u32> = witness.collect().iter().map(|arrival| arrival.tos).collect();
            assert_eq!(marks, [0xe0, 0xa0, 0], "{mode:?}, {queue}");
            drop(witness);
            link.unload()?;
            assert_eq!(link.tc_state()?, before);
        }
        // An epoch of more than a minute: one packet of level 7.
        let plan =
            ["--hosts", "2", "--link-rate", "1gbit", "--max-packet", "256", "--epsilon", "31s", "--level", "7:1"];
        let load = ["load", "--interface", &link.device, "--queue", "keep"];
        succeeded(&link.qjump(&[&load[..], &plan].concat())?)?;
        let mut witness = Witness::new(&link.far, &link.far_device)?;
        sender::messages(&sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?, 20, 64);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(witness.collect().len(), 1, "{mode:?}");
        let status = link.status()?;
        let level = status["levels"].as_array().and_then(|levels| levels.iter().find(|level| level["level"] == 7));
        let level = level.context("no level 7")?;
        assert_eq!(level["dropped_packets"], 19, "{level:#}");
        link.unload()?;
    }
    Ok(())
}

/// A VLAN on the near host's end of the cable; `None` on a kernel that has none. The far end is left to packet sockets.
fn vlan(link: &Link, options: &str) -> Result<Option<String>> {
    let (lower, vlan) = (&link.device, format!("{}v", link.device));
    if let Err(error) = link.near.ip(&format!("link add link {lower} name {vlan} type vlan id 5 {options}")) {
        assert!(!is_guest(), "a guest has 8021q: {error}");
        println!("no VLANs on this kernel: {error}");
        return Ok(None);
    }
    link.near.ip(&format!("link set {vlan} addrgenmode none gso_max_segs 1 up"))?;
    link.near.ip(&format!("addr add 10.9.1.1/24 dev {vlan}"))?;
    link.near.ip(&format!("neigh replace 10.9.1.2 lladdr 02:00:00:00:09:02 dev {vlan} nud permanent"))?;
    Ok(Some(vlan))
}

/// A message of each of these levels in the VLAN.
fn send_in_vlan(link: &Link) -> Result<()> {
    for level in [7, 5, 3, 0] {
        sender::connected(&link.near, "10.9.1.1", "10.9.1.2", 7000, level)?.send(&[0; 100])?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Level 3 is not in the plan.
fn with_pcp(seven: u8, five: u8) -> String {
    format!("v4 e0, pcp {seven} vlan 5\nv4 a0, pcp {five} vlan 5\nv4 00, pcp 0 vlan 5\nv4 00, pcp 0 vlan 5\n")
}

#[test]
fn a_vlan_writes_the_level_by_its_egress_map() -> Result<()> {
    let link = Link::new()?;
    let Some(vlan) = vlan(&link, "egress-qos-map 7:7 5:5")? else { return Ok(()) };
    let run = || -> Result<()> {
        let check = link.qjump(&[&["check", "--interface", &vlan][..], &PLAN].concat())?;
        assert!(succeeded(&check)?.contains(&format!("load qjump on {}", link.device)), "the better place is named");
        let load = |queue: &str| -> Result<()> {
            succeeded(&link.qjump(&[&["load", "--interface", &vlan, "--queue", queue][..], &PLAN].concat())?).map(drop)
        };
        load("keep")?;
        assert_eq!(on_the_wire(&link, || send_in_vlan(&link))?, with_pcp(7, 5));
        // With a queue of qjump's, the packet's priority is the name of its class there.
        for (queue, map) in [("htb", "0x716a0008:7 0x716a0006:5"), ("fq", "15:7 13:5")] {
            if queue == "fq" && !is_guest() {
                continue;
            }
            load(queue)?;
            assert_eq!(on_the_wire(&link, || send_in_vlan(&link))?, with_pcp(0, 0), "{queue}");
            link.near.ip(&format!("link set {vlan} type vlan egress-qos-map {map}"))?;
            assert_eq!(on_the_wire(&link, || send_in_vlan(&link))?, with_pcp(7, 5), "{queue}");
        }
        succeeded(&link.qjump(&["unload", "--interface", &vlan])?).map(drop)
    };
    let result = run();
    let _ = Pins::of(&vlan).remove();
    result
}

#[test]
fn a_vlan_over_the_limited_device_has_its_tags_written() -> Result<()> {
    let link = Link::new()?;
    if vlan(&link, "")?.is_none() {
        return Ok(());
    }
    for queue in ["keep", "htb"] {
        let load = ["load", "--interface", &link.device, "--queue", queue, "--pcp"];
        succeeded(&link.qjump(&[&load[..], &PLAN].concat())?)?;
        assert_eq!(on_the_wire(&link, || send_in_vlan(&link))?, with_pcp(7, 5), "{queue}");
        // What is in no VLAN gets a tag for its priority alone.
        let seen = on_the_wire(&link, || {
            sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?.send(&[0; 100])?;
            Ok(())
        })?;
        assert_eq!(seen, "v4 e0, pcp 7 vlan 0\n", "{queue}");
    }
    link.unload().map(drop)
}

/// How many packets each of the card's queues has sent, by what the kernel calls its qdisc's parent.
fn sent_by_queue(link: &Link) -> Result<Vec<u64>> {
    let output = link.near.command("tc").args(["-s", "-j", "qdisc", "show", "dev", &link.device]).output()?;
    let qdiscs: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let sent = |number: usize| {
        let parent = format!("100:{number}");
        qdiscs.iter().find(|qdisc| qdisc["parent"] == *parent).and_then(|qdisc| qdisc["packets"].as_u64())
    };
    (1..=4).map(|number| sent(number).with_context(|| format!("no queue {number}: {qdiscs:#?}"))).collect()
}

#[test]
fn queues_for_classes_of_traffic_stay_their_owners() -> Result<()> {
    let link = Link::new()?;
    link.near.ip(&format!("link del {}", link.device))?;
    link.plug_with_queues(4)?;
    let theirs = format!(
        "qdisc add dev {} root handle 100: mqprio num_tc 4 map 0 0 1 1 2 2 3 3 0 0 0 0 0 0 0 0 queues 1@0 1@1 1@2 1@3 hw 0\n",
        link.device
    );
    if let Err(error) = link.near.batch("tc", &theirs) {
        assert!(!is_guest(), "a guest has sch_mqprio: {error}");
        println!("no mqprio on this kernel: {error}");
        return Ok(());
    }
    let before = link.tc_state()?;
    assert!(before.contains("mqprio 100:"), "{before}");
    let load =
        |queue: &str| link.qjump(&[&["load", "--interface", &link.device, "--queue", queue][..], &PLAN].concat());
    // One queue of qjump's cannot take the place of four.
    for queue in ["htb", "fq"] {
        let (status, error) = failed(&load(queue)?);
        assert_eq!(status, 1, "{error}");
        assert!(error.contains("mqprio 100:") && error.contains("--queue keep"), "{error}");
        assert_eq!(link.tc_state()?, before, "{queue}");
    }
    let said = succeeded(&load("auto")?)?;
    assert!(said.contains("packets are dropped: its queue is mqprio 100: of somebody else"), "{said}");
    assert!(link.tc_state()?.starts_with(before.split("qdisc clsact").next().unwrap_or_default()), "the queues stay");
    // Each level goes by the queue that the card's owner gave it: two levels have one here.
    let was = sent_by_queue(&link)?;
    let seen = on_the_wire(&link, || {
        for (level, count) in [(7, 4), (5, 3), (0, 2)] {
            sender::messages(&sender::connected(&link.near, NEAR.0, FAR.0, 7000, level)?, count, 100);
        }
        Ok(())
    })?;
    assert_eq!(seen.lines().filter(|line| line.starts_with("v4 e0")).count(), 4, "{seen}");
    let sent: Vec<u64> = sent_by_queue(&link)?.iter().zip(was).map(|(now, was)| now - was).collect();
    assert_eq!(sent, [2, 0, 3, 4], "by queue");
    link.unload()?;
    assert_eq!(link.tc_state()?, before);
    Ok(())
}

#[test]
fn a_device_with_many_queues_is_paced_as_one() -> Result<()> {
    let link = Link::new()?;
    link.near.ip(&format!("link del {}", link.device))?;
    link.plug_with_queues(4)?;
    let before = link.tc_state()?;
    for queue in ["htb", "fq"] {
        // One packet in a second, whoever sends it and by whichever queue.
        let plan =
            ["--hosts", "2", "--link-rate", "1gbit", "--max-packet", "256", "--epsilon", "50ms", "--level", "7:1"];
        let output = link.qjump(&[&["load", "--interface", &link.device, "--queue", queue][..], &plan].concat())?;
        if queue == "fq" && !is_guest() && !output.status.success() {
            return Ok(());
        }
        succeeded(&output)?;
        let mut witness = Witness::new(&link.far, &link.far_device)?;
        for _ in 0..8 {
            // Ports of their own: the kernel spreads them over the queues.
            sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?.send(&[0; 64])?;
        }
        std::thread::sleep(Duration::from_millis(1_500));
        let arrivals: Vec<u64> = witness.collect().iter().map(|arrival| arrival.arrived_ns).collect();
        assert_eq!(arrivals.len(), 8, "{queue}");
        let time = arrivals[7] - arrivals[0];
        // Seven epochs of 100 ms, less by how late the first one was.
        assert!(time > 650_000_000, "{queue}: all in {time} ns");
        drop(witness);
        link.unload()?;
        assert_eq!(link.tc_state()?, before, "{queue}");
    }
    Ok(())
}
