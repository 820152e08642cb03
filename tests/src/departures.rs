//! When packets leave a device's queue, or arrive at a device: a packet socket, and the kernel's stamps. On the sending
//! side it sees them behind the queue (`dev_hard_start_xmit`, net/core/dev.c), so with the arrivals it says how long
//! each was on its way.

use std::{
    io::IoSliceMut,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use nix::{
    cmsg_space,
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
        socket, sockopt,
    },
    sys::time::TimeSpec,
};
use qjump::{dataplane::sys::monotonic_ns, testbed::NetNs};

/// A tap at work.
pub struct Tap {
    socket: OwnedFd,
    /// From the wall clock, which the kernel stamps with, to the monotonic one, ns.
    offset_ns: i128,
    seen: Vec<u64>,
    tos: u8,
    outgoing: bool,
}

impl Tap {
    /// Watches what leaves `device` in `netns` with this IPv4 TOS.
    pub fn new(netns: &NetNs, device: &str, tos: u8) -> Result<Self> {
        Self::watching(netns, device, tos, true)
    }

    /// Watches what arrives there.
    pub fn arrivals(netns: &NetNs, device: &str, tos: u8) -> Result<Self> {
        Self::watching(netns, device, tos, false)
    }

    fn watching(netns: &NetNs, device: &str, tos: u8, outgoing: bool) -> Result<Self> {
        let socket = netns.enter(|| {
            let protocol = SockProtocol::EthAll;
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol)?;
            setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20))?;
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
                sll_ifindex: if_nametoindex(device)? as i32,
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            // SAFETY: the address is a `sockaddr_ll` of the size given.
            let bound =
                unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) };
            Errno::result(bound).context("cannot bind the tap")?;
            Ok(socket)
        })?;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as i128;
        Ok(Self { socket, offset_ns: i128::from(monotonic_ns()) - wall, seen: Vec::new(), tos, outgoing })
    }

    /// Takes in what was seen so far, and returns when each packet was. Called often enough, nothing is lost.
    pub fn collect(&mut self) -> Result<&[u64]> {
        let mut bytes = [0; 64];
        let mut control = cmsg_space!(TimeSpec);
        loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let message =
                match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_TRUNC)
                {
                    Ok(message) => message,
                    Err(Errno::EAGAIN) => return Ok(&self.seen),
                    Err(error) => return Err(error.into()),
                };
            let outgoing = message.address.is_some_and(|address| address.as_ref().sll_pkttype == libc::PACKET_OUTGOING);
            let stamp = message.cmsgs()?.find_map(|message| match message {
                ControlMessageOwned::ScmTimestampns(stamp) => Some(Duration::from(stamp)),
                _ => None,
            });
            let stamp = stamp.context("a packet without a time stamp")?;
            if outgoing == self.outgoing && bytes[12..14] == [8, 0] && bytes[15] == self.tos {
                self.seen.push((stamp.as_nanos() as i128 + self.offset_ns) as u64);
            }
        }
    }
}
