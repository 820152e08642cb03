//! Rare events: each is told once a plan, waits for whoever reads it, and leaves nothing behind.

use std::path::Path;

use anyhow::Result;
use qjump::agent::rare::{Buffers, Event};
use qjump_ebpf::{Reason, names};
use qjump_tests::{
    frames::{ethernet, ipv4},
    link::{FAR, Link, NEAR, succeeded},
    sender,
};

/// The events of this test's interface: others may be loaded, too.
fn events(buffers: &mut Buffers, link: &Link) -> Vec<(u8, Reason, u32, u16)> {
    let of_link = |event: Event| {
        (event.interface == link.device).then_some((event.level, event.reason, event.bytes, event.protocol))
    };
    let mut events: Vec<_> = buffers.read().into_iter().filter_map(of_link).collect();
    events.sort_by_key(|(level, reason, ..)| (*level, *reason as u32));
    events
}

/// Sends messages of so many bytes at a level.
fn send(link: &Link, level: u32, messages: u32, bytes: usize) -> Result<()> {
    let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, level)?;
    sender::messages(&socket, messages, bytes);
    Ok(())
}

#[test]
fn each_is_told_once_a_plan() -> Result<()> {
    let link = Link::new()?;
    link.load(&[])?;
    let header = 14 + 20 + 8;
    // Nobody reads yet.
    send(&link, 7, 5, 1000)?;
    send(&link, 7, 5, 900)?;
    send(&link, 6, 5, 100)?;
    send(&link, 7, 5, 100)?;
    let mut buffers = Buffers::default();
    let told = [(6, Reason::NotConfigured, 100 + header, 0x0800), (7, Reason::OversizeDemoted, 1000 + header, 0x0800)];
    assert_eq!(events(&mut buffers, &link), told);
    // Once is enough.
    send(&link, 7, 5, 1000)?;
    send(&link, 6, 5, 100)?;
    assert_eq!(events(&mut buffers, &link), []);
    // Also of another reason.
    send(&link, 12, 2, 50)?;
    assert_eq!(events(&mut buffers, &link), [(0, Reason::UnknownPriority, 50 + header, 0x0800)]);
    // Another plan begins anew, in the same buffer.
    link.load(&["--tolerance", "10us", "--oversize", "drop"])?;
    send(&link, 7, 5, 1000)?;
    assert_eq!(events(&mut buffers, &link), [(7, Reason::OversizeDropped, 1000 + header, 0x0800)]);
    // What a limit is there for is no event.
    send(&link, 7, 300, 100)?;
    assert_eq!(events(&mut buffers, &link), []);
    // Nor is ARP, but what is neither that nor IP.
    link.near.enter(|| {
        let device = nix::net::if_::if_nametoindex(link.device.as_str())?;
        for protocol in [0x0806, 0x88b5] {
            raw(device, &ethernet(protocol, &[0; 46]), protocol)?;
        }
        let cut = ethernet(0x0800, &ipv4(0, 18)[..12]);
        raw(device, &cut, 0x0800)
    })?;
    let odd: Vec<_> =
        events(&mut buffers, &link).into_iter().map(|(level, reason, _, kind)| (level, reason, kind)).collect();
    assert_eq!(odd, [(0, Reason::NonIp, 0x88b5), (0, Reason::Malformed, 0x0800)]);

    let pin = link.pins().map(names::EVENTS);
    assert!(pin.exists());
    link.unload()?;
    assert!(!pin.exists() && !Path::new("/sys/fs/bpf/qjump").join(&link.device).exists());
    // The buffer of the next load is another one.
    link.load(&[])?;
    send(&link, 7, 1, 800)?;
    assert_eq!(events(&mut buffers, &link), [(7, Reason::OversizeDemoted, 800 + header, 0x0800)]);
    Ok(())
}

#[test]
fn a_flood_of_events_is_one() -> Result<()> {
    let link = Link::new()?;
    succeeded(
        &link.qjump(
            &[&["load", "--interface", &link.device, "--queue", "keep"][..], &qjump_tests::link::PLAN].concat(),
        )?,
    )?;
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..4).map(|_| scope.spawn(|| send(&link, 7, 200, 1200))).collect();
        senders.into_iter().try_for_each(|sender| sender.join().expect("it does not panic"))
    })?;
    assert_eq!(events(&mut Buffers::default(), &link).len(), 1);
    Ok(())
}

/// Sends a frame as it is.
fn raw(device: u32, frame: &[u8], protocol: u16) -> Result<()> {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: device as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0; 8],
    };
    // SAFETY: frame and address are as long as the call is told, and outlive it.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    };
    anyhow::ensure!(sent == frame.len() as isize, "{}", std::io::Error::last_os_error());
    Ok(())
}
