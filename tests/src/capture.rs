//! What arrives at the far end, packet by packet: protocol and codepoint of all TCP and UDP from the near host.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::link::Link;

/// A packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seen {
    /// Whether it is IPv6.
    pub ipv6: bool,
    /// 6 or 17.
    pub protocol: u8,
    /// The differentiated services codepoint.
    pub dscp: u8,
    /// The source port.
    pub from: u16,
    /// The destination port.
    pub to: u16,
}

/// A packet socket on the far end.
pub struct Capture {
    socket: OwnedFd,
}

impl Capture {
    /// Begins to look.
    pub fn new(link: &Link) -> Result<Self> {
        let socket = link.far.enter(|| {
            let every = i32::from((libc::ETH_P_ALL as u16).to_be());
            // SAFETY: plain values.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, every) };
            ensure!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
            // SAFETY: the kernel has just given this descriptor to us alone.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20))?;
        Ok(Self { socket })
    }

    /// What has arrived since the last call, and a moment longer.
    pub fn take(&self) -> Vec<Seen> {
        std::thread::sleep(Duration::from_millis(100));
        let mut seen = Vec::new();
        let mut frame = [0u8; 2048];
        while let Ok(length) = recv(self.socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
            seen.extend(parse(&frame[..length]));
        }
        seen
    }
}

fn parse(frame: &[u8]) -> Option<Seen> {
    // From the near host; what else passes by are the far host's answers.
    if frame.get(6..12)? != [2, 0, 0, 0, 9, 1] {
        return None;
    }
    let ip = frame.get(14..)?;
    let (ipv6, protocol, class, ports) = match frame[12..14] {
        [0x08, 0x00] => (false, *ip.get(9)?, *ip.get(1)?, ip.get(20..24)?),
        [0x86, 0xdd] => (true, *ip.get(6)?, ip.first()? << 4 | ip.get(1)? >> 4, ip.get(40..44)?),
        _ => return None,
    };
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    matches!(protocol, 6 | 17).then(|| Seen { ipv6, protocol, dscp: class >> 2, from: port(0), to: port(2) })
}
