//! Live proof: a probe for each level, the mark that it has on the wire, and the counter that it moved.
//!
//! The mark is read by a packet socket on the interface. The kernel hands frames to those when it gives them to the
//! driver (`dev_queue_xmit_nit`, net/core/dev.c): after the egress program, and after the queue.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recv, setsockopt, socket,
        sockopt,
    },
    time::TimeVal,
};
use qjump_ebpf::{Level, Reason, grant::is_grant_only, layout::GRANT_ONLY_SHIFT};

use crate::{
    dataplane::{self, Error, InterfaceStatus, LevelStatus, sys::monotonic_ns},
    socket::set_level,
};

/// Where probes go unless somebody says otherwise: all hosts of the link, and none behind it.
pub const ALL_HOSTS: IpAddr = IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1));

/// The port of the discard protocol (RFC 863).
const DISCARD: u16 = 9;

/// How long a probe may take to the program.
const PATIENCE: Duration = Duration::from_millis(300);

/// How long it may take to the wire once a counter says that it has passed: it may wait for its level's budget.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What became of the probe of one level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The level that the probe asked for.
    pub level: Level,
    /// The codepoint that it should have.
    pub expected: u8,
    /// The codepoint that it had on the wire; `None` if it was not seen there.
    pub seen: Option<u8>,
    /// The counters of the level that moved meanwhile, by whatever traffic.
    pub moved: Vec<Reason>,
    /// What is wrong; `None` if nothing is.
    pub fault: Option<String>,
}

/// Sends a probe at each level of the plan in force on an interface of this network namespace.
///
/// # Errors
/// If qjump is not loaded there, or a probe cannot be sent or looked for.
pub fn probe(interface: &str, to: IpAddr) -> Result<Vec<Proof>, Error> {
    let asking = |source| Error::Io { interface: interface.to_owned(), action: "sending a probe", source };
    let status = dataplane::status(interface)?;
    if status.elsewhere || !status.attached {
        return Err(Error::NotLoaded(interface.to_owned()));
    }
    let index = status.config.plan.ifindex;
    let tap = tap(index).map_err(asking)?;
    let mut before = status;
    let mut proofs = Vec::new();
    // One level after the other, as a level that is demoted would move the counter of another.
    for level in before.levels.iter().map(|status| status.level).collect::<Vec<_>>() {
        let token = send(interface, index, to, level).map_err(asking)?;
        let mut seen = look_for(&tap, &token, PATIENCE).map_err(asking)?;
        let after = dataplane::status(interface)?;
        let moved = moved(&before, &after, level);
        if seen.is_none() && moved.iter().any(|reason| !reason.is_drop()) {
            seen = look_for(&tap, &token, LONGEST_WAIT).map_err(asking)?;
        }
        let granted_only = is_grant_only(level, (before.config.flags >> GRANT_ONLY_SHIFT) as u8);
        proofs.push(judge(level, granted_only, seen, moved));
        before = after;
    }
    Ok(proofs)
}

fn moved(before: &InterfaceStatus, after: &InterfaceStatus, level: Level) -> Vec<Reason> {
    let packets = |status: &InterfaceStatus, reason: Reason| {
        let of_level = status.levels.iter().find(|one| one.level == level);
        of_level.map_or(0, |one: &LevelStatus| one.count(reason).packets)
    };
    Reason::ALL.into_iter().filter(|&reason| packets(after, reason) > packets(before, reason)).collect()
}

/// What the mark and the counters of a level mean. A probe has no grant, and so it has level 0 where one is needed.
fn judge(level: Level, grant_only: bool, seen: Option<u8>, moved: Vec<Reason>) -> Proof {
    let expected = if grant_only { Level::BEST_EFFORT } else { level }.dscp();
    let wanted = |reason: &&Reason| {
        if grant_only { **reason == Reason::NotGranted } else { !reason.is_drop() && !reason.is_demotion() }
    };
    let others = || {
        let names: Vec<&str> = moved.iter().filter(|reason| !wanted(reason)).map(|reason| reason.name()).collect();
        if names.is_empty() { String::new() } else { format!(" (counted: {})", names.join(", ")) }
    };
    let fault = match seen {
        None if moved.is_empty() => {
            Some("the probe reached neither program nor wire: is anybody at the address (--to)?".to_owned())
        }
        None => Some(format!("the probe did not reach the wire{}", others())),
        Some(mark) if mark != expected => {
            Some(format!("the probe has DSCP {mark} on the wire, and not {expected}{}", others()))
        }
        Some(_) if !moved.iter().any(|reason| wanted(&reason)) => {
            Some("no counter of the level has moved: the probe did not pass the program".to_owned())
        }
        Some(_) => None,
    };
    Proof { level, expected, seen, moved, fault }
}

/// A socket that gets every frame of an interface.
fn tap(index: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: it is an address of the family that it names, of this length.
    let address = unsafe {
        nix::sys::socket::LinkAddr::from_raw(
            (&raw const address).cast(),
            Some(size_of_val(&address) as libc::socklen_t),
        )
    };
    bind(socket.as_raw_fd(), &address.ok_or(io::ErrorKind::InvalidInput)?)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
    Ok(socket)
}

/// Sends a datagram at a level through an interface; returns its content, which no other has.
fn send(interface: &str, index: u32, to: IpAddr, level: Level) -> io::Result<[u8; 16]> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    setsockopt(&socket, sockopt::BindToDevice, &interface.into())?;
    setsockopt(&socket, sockopt::Broadcast, &true)?;
    set_level(&socket, level).map_err(io::Error::other)?;
    let mut token = *b"qjump...........";
    token[5] = level.number();
    token[8..].copy_from_slice(&(monotonic_ns() ^ u64::from(std::process::id()) << 40).to_ne_bytes());
    let to = match to {
        IpAddr::V6(to) => SocketAddr::V6(SocketAddrV6::new(to, DISCARD, 0, index)),
        to => SocketAddr::new(to, DISCARD),
    };
    socket.send_to(&token, to)?;
    Ok(token)
}

/// The codepoint of the frame with this content; `None` if it does not come.
fn look_for(tap: &OwnedFd, token: &[u8], patience: Duration) -> io::Result<Option<u8>> {
    let deadline = Instant::now() + patience;
    let mut frame = [0; 2_048];
    while Instant::now() < deadline {
        match recv(tap.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) if contains(&frame[..length], token) => {
                return Ok(dscp(&frame[..length]));
            }
            Ok(_) | Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn contains(frame: &[u8], token: &[u8]) -> bool {
    frame.windows(token.len()).any(|window| window == token)
}

/// The codepoint of an Ethernet frame, below its VLAN tags.
fn dscp(frame: &[u8]) -> Option<u8> {
    let mut at = 12;
    while matches!(frame.get(at..at + 2)?, [0x81, 0x00] | [0x88, 0xa8]) {
        at += 4;
    }
    let ip = frame.get(at + 2..)?;
    match frame[at..at + 2] {
        [0x08, 0x00] => Some(ip.get(1)? >> 2),
        [0x86, 0xdd] => Some((ip.first()? << 4 | ip.get(1)? >> 4) >> 2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_codepoint_of_every_kind_of_frame() {
        let frame = |head: &[u8]| [&[0; 12][..], head].concat();
        assert_eq!(dscp(&frame(&[8, 0, 0x45, 0xe1])), Some(56));
        assert_eq!(dscp(&frame(&[0x81, 0, 0xe0, 0, 8, 0, 0x45, 0xe0])), Some(56));
        assert_eq!(dscp(&frame(&[0x86, 0xdd, 0x6a, 0x10])), Some(0xa1 >> 2));
        assert_eq!(dscp(&frame(&[8, 6, 0, 0])), None);
        assert_eq!(dscp(&frame(&[0x81, 0])), None);
    }

    #[test]
    fn a_mark_alone_or_a_counter_alone_is_no_proof() {
        let five = Level::new(5).expect("a level");
        let fault = |grant_only, seen, moved: &[Reason]| judge(five, grant_only, seen, moved.to_vec()).fault;
        assert_eq!(fault(false, Some(40), &[Reason::Passed]), None);
        assert_eq!(fault(true, Some(0), &[Reason::NotGranted]), None);
        for (grant_only, seen, moved, part) in [
            (false, Some(40), &[][..], "no counter"),
            (false, Some(40), &[Reason::NotGranted], "no counter"),
            (false, Some(0), &[Reason::Passed], "DSCP 0 on the wire, and not 40"),
            (false, Some(0), &[Reason::OversizeDemoted], "(counted: oversize_demoted)"),
            (false, None, &[], "--to"),
            (false, None, &[Reason::OverLimit], "did not reach the wire (counted: over_limit)"),
            (true, Some(40), &[Reason::Passed], "DSCP 40 on the wire, and not 0"),
        ] {
            let found = fault(grant_only, seen, moved).expect("a fault");
            assert!(found.contains(part), "{found}");
        }
    }
}
