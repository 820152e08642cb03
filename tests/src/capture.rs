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

/// The marks of what arrives at the far end of the cable while `work` goes on, a line for each packet of UDP from the near host: the
/// IP version, the traffic class, and the VLAN tag.
pub fn on_the_wire(link: &Link, work: impl FnOnce() -> Result<()>) -> Result<String> {
    let capture = Capture::new(link)?;
    let (socket, auxdata) = (capture.socket.as_raw_fd(), 1i32);
    // SAFETY: the option's value outlives the call.
    let set =
        unsafe { libc::setsockopt(socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, (&raw const auxdata).cast(), 4) };
    ensure!(set == 0, "PACKET_AUXDATA: {}", std::io::Error::last_os_error());
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
    Ok(seen)
}
