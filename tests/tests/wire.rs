//! Marks as they arrive at the far end of a real cable.

use std::{net::UdpSocket, process::Command, time::Duration};

use anyhow::{Context, Result};
use qjump_tests::{
    arrivals::Witness,
    capture::on_the_wire,
    link::{FAR, Link, NEAR},
    sender,
};

fn send(link: &Link, priorities: &[u32]) -> Result<()> {
    for &priority in priorities {
        for (near, far) in [(NEAR.0, FAR.0), (NEAR.1, FAR.1)] {
            sender::connected(&link.near, near, far, 7000, priority)?.send(&[0; 100])?;
            // Level 7 has an epoch of 9 us, level 5 a burst.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

#[test]
fn every_level_arrives_with_its_codepoint_and_no_tag() -> Result<()> {
    let link = Link::with_ipv6()?;
    link.load(&[])?;
    let seen = on_the_wire(&link, || send(&link, &[7, 5, 3, 0]))?;
    // Level 3 is not in the plan.
    let expected = ["e0", "a0", "00", "00"].map(|class| format!("v4 {class}, untagged\nv6 {class}, untagged\n"));
    assert_eq!(seen, expected.concat());
    Ok(())
}

#[test]
fn priority_tags_carry_the_level_when_asked() -> Result<()> {
    let link = Link::with_ipv6()?;
    link.load(&["--pcp"])?;
    let seen = on_the_wire(&link, || send(&link, &[7, 5, 3, 0]))?;
    let expected = [
        "v4 e0, pcp 7 vlan 0\nv6 e0, pcp 7 vlan 0\n",
        "v4 a0, pcp 5 vlan 0\nv6 a0, pcp 5 vlan 0\n",
        "v4 00, untagged\nv6 00, untagged\n",
        "v4 00, untagged\nv6 00, untagged\n",
    ];
    assert_eq!(seen, expected.concat());
    Ok(())
}

#[test]
fn a_priority_tagged_message_reaches_a_socket() -> Result<()> {
    let link = Link::new()?;
    link.load(&["--pcp"])?;
    let receiver = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 7001))?))?;
    receiver.set_read_timeout(Some(Duration::from_secs(5)))?;
    sender::connected(&link.near, NEAR.0, FAR.0, 7001, 7)?.send(b"hello")?;
    let mut buffer = [0; 16];
    let length = receiver.recv(&mut buffer).context("nothing arrived")?;
    assert_eq!(&buffer[..length], b"hello");
    Ok(())
}

#[test]
fn foreign_codepoints_do_not_leave() -> Result<()> {
    let link = Link::new()?;
    link.load(&[])?;
    let witness = std::cell::RefCell::new(Witness::new(&link.far, &link.far_device)?);
    let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, 0)?;
    // EF with ECT(0): IP_TOS also sets the socket's priority, to something that is no planned level.
    sender::set_tos(&socket, 0xba)?;
    socket.send(&[0; 100])?;
    std::thread::sleep(Duration::from_millis(100));
    let classes: Vec<u32> = witness.borrow_mut().collect().iter().map(|arrival| arrival.tos).collect();
    assert_eq!(classes, [0x02], "the codepoint goes, ECN stays");
    Ok(())
}

#[test]
fn checksums_arrive_right() -> Result<()> {
    // Without offloads the far kernel checks what it gets: a wrong header checksum would be counted there.
    let link = Link::new()?;
    link.load(&[])?;
    let receiver = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 7002))?))?;
    receiver.set_read_timeout(Some(Duration::from_secs(5)))?;
    let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7002, 7)?;
    for length in 1..=100 {
        socket.send(&vec![length as u8; length])?;
        std::thread::sleep(Duration::from_millis(1));
        let mut buffer = [0; 128];
        assert_eq!(receiver.recv(&mut buffer)?, length);
        assert!(buffer[..length].iter().all(|&byte| byte == length as u8));
    }
    let errors = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", link.far.name()))
        .args(["cat", "/proc/net/snmp"])
        .output()?;
    let text = String::from_utf8(errors.stdout)?;
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (lines.next().context("Ip:")?, lines.next().context("Ip:")?);
    let at = names.split_whitespace().position(|name| name == "InHdrErrors").context("InHdrErrors")?;
    assert_eq!(values.split_whitespace().nth(at), Some("0"));
    Ok(())
}
