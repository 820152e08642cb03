//! Sees the TCP packets that arrive at a host, without touching them.

use std::{
    io::{self, IoSliceMut},
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg, setsockopt,
            socket, sockopt,
        },
        time::TimeVal,
    },
};

use crate::testbed::NetNs;

/// A TCP segment that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who sent it.
    pub from: Ipv4Addr,
    /// To which port.
    pub to_port: u16,
    /// The number of its first byte.
    pub sequence: u32,
    /// Whether it begins a connection.
    pub syn: bool,
    /// Its bytes.
    pub payload: Vec<u8>,
    /// When the host's interface had received it, ns, by the kernel's clock.
    pub at_ns: u64,
}

/// A packet socket in a host's namespace.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

/// Longer than any frame of a rack.
const LONGEST: usize = 2_048;
/// For what arrives while nobody reads.
const QUEUE: usize = 16 << 20;

impl Watch {
    /// Begins to look at all that arrives.
    ///
    /// # Errors
    /// If the kernel refuses: it takes CAP_NET_RAW.
    pub fn new(netns: &NetNs) -> Result<Self> {
        let socket = netns.enter(|| {
            // Datagrams: without the Ethernet header.
            socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthIp)
                .context("cannot open a packet socket")
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &QUEUE)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        // So that whoever reads can look up now and then.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
        Ok(Self { socket, buffer: vec![0; LONGEST] })
    }

    /// The next TCP segment, or `None` after a while without any.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn segment(&mut self) -> Result<Option<Segment>> {
        loop {
            let mut control = nix::cmsg_space!(libc::timespec);
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let received = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty());
            let message = match received {
                Ok(message) => message,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            let stamp = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::ScmTimestampns(time) => {
                    Some(time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
                }
                _ => None,
            });
            let (length, at_ns) = (message.bytes, stamp.context("the kernel did not stamp a packet")?);
            if let Some(segment) = parse(&self.buffer[..length.min(LONGEST)], at_ns) {
                return Ok(Some(segment));
            }
        }
    }
}

/// Reads an IPv4 packet that carries TCP.
fn parse(packet: &[u8], at_ns: u64) -> Option<Segment> {
    const TCP: u8 = 6;
    const SYN: u8 = 2;
    let header = usize::from(packet.first()? & 15) * 4;
    if packet.first()? >> 4 != 4 || *packet.get(9)? != TCP {
        return None;
    }
    let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    // Short frames are padded; what is longer than the buffer is not ours.
    let tcp = packet.get(header..total)?;
    let payload = tcp.get(usize::from(*tcp.get(12)? >> 4) * 4..)?;
    Some(Segment {
        from: from.into(),
        to_port: u16::from_be_bytes([tcp[2], tcp[3]]),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        syn: tcp[13] & SYN != 0,
        payload: payload.to_vec(),
        at_ns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IPv4 and TCP headers without options, three bytes, and padding.
    fn packet() -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 43, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
        packet.extend([0xd0, 0, 0x08, 0x35, 1, 2, 3, 4, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        packet.extend(*b"abc\0\0\0");
        packet
    }

    #[test]
    fn reads_tcp_without_the_padding() {
        let segment = parse(&packet(), 7).unwrap();
        let expected = Segment {
            from: Ipv4Addr::new(10, 0, 0, 2),
            to_port: 2_101,
            sequence: 0x0102_0304,
            syn: false,
            payload: b"abc".to_vec(),
            at_ns: 7,
        };
        assert_eq!(segment, expected);
        let mut first = packet();
        first[33] = 2;
        assert!(parse(&first, 7).unwrap().syn);
    }

    #[test]
    fn what_is_no_tcp_or_cut_short_is_left_out() {
        for (at, value) in [(0, 0x65), (9, 17), (3, 255), (32, 0xf0)] {
            let mut other = packet();
            other[at] = value;
            assert_eq!(parse(&other, 0), None, "byte {at}");
        }
        for length in 0..43 {
            assert_eq!(parse(&packet()[..length], 0), None, "{length} bytes");
        }
    }
}
