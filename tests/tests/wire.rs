//! Marks as they arrive at the far end of a real cable.

use std::{net::UdpSocket, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use qjump_tests::{
    arrivals::Witness,
    link::{FAR, Link, NEAR},
    sender,
};

/// A packet socket on the far end, reading whole frames, tags included.
fn capture(link: &Link, work: impl FnOnce() -> Result<()>) -> Result<String> {
    let socket = link.far.enter(|| {
        // SAFETY: plain values.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from((libc::ETH_P_ALL as u16).to_be())) };
        ensure!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
        let auxdata = 1i32;
        // SAFETY: the option's value outlives the call.
        let set =
            unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, (&raw const auxdata).cast(), 4) };
        ensure!(set == 0, "PACKET_AUXDATA: {}", std::io::Error::last_os_error());
        Ok(fd)
    })?;
    work()?;
    std::thread::sleep(Duration::from_millis(100));
    let mut seen = String::new();
    loop {
        let mut frame = [0u8; 2048];
        let mut control = [0u64; 16];
        let mut vector = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // SAFETY: all zero is a valid message header; its pointers are set next and outlive the call.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: as above.
        let length = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) };
        if length < 0 {
            break;
        }
        // SAFETY: the kernel has filled in the control buffer; a packet_auxdata follows the header.
        let tci = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            if header.is_null() {
                None
            } else {
                let data = libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                (data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(data.tp_vlan_tci)
            }
        };
        // Other things pass by: the far host's answers (nobody listens on the port), and the near kernel's
        // reports of its IPv6 multicast groups. Ours is UDP from the near host.
        let protocol = if frame[12..14] == [0x86, 0xdd] { frame[20] } else { frame[23] };
        if frame[6..12] != [2, 0, 0, 0, 9, 1] || protocol != 17 {
            continue;
        }
        let class = match frame[12..14] {
            [0x08, 0x00] => format!("v4 {:02x}", frame[15]),
            [0x86, 0xdd] => format!("v6 {:02x}", frame[14] << 4 | frame[15] >> 4),
            [a, b] => format!("{a:02x}{b:02x}"),
            _ => unreachable!("a slice of two"),
        };
        let tag = tci.map_or("untagged".to_owned(), |tci| format!("pcp {} vlan {}", tci >> 13, tci & 0xfff));
        seen += &format!("{class}, {tag}\n");
    }
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(socket) };
    Ok(seen)
}

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
    let seen = capture(&link, || send(&link, &[7, 5, 3, 0]))?;
    // Level 3 is not in the plan.
    let expected = ["e0", "a0", "00", "00"].map(|class| format!("v4 {class}, untagged\nv6 {class}, untagged\n"));
    assert_eq!(seen, expected.concat());
    Ok(())
}

#[test]
fn priority_tags_carry_the_level_when_asked() -> Result<()> {
    let link = Link::with_ipv6()?;
    link.load(&["--pcp"])?;
    let seen = capture(&link, || send(&link, &[7, 5, 3, 0]))?;
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
