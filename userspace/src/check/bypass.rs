//! Sockets that can send around the egress program: packet sockets with `PACKET_QDISC_BYPASS`, and AF_XDP.
//!
//! Neither sock_diag's packet_diag nor /proc/net/packet tells of the bypass, but the socket itself does, and so it is
//! asked by a duplicate of its descriptor (see [`crate::tag::live`]).

use std::{collections::HashMap, fs, io, os::fd::BorrowedFd};

use crate::tag::{
    live::{LiveError, each_duplicate, option_of},
    process::Process,
};

const PACKET_QDISC_BYPASS: libc::c_int = 20;
/// Number of a network namespace (Linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// How a socket sends around the egress program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// A packet socket that leaves the queue out; bound to this interface, or to none (0).
    QdiscBypass(u32),
    /// An AF_XDP socket. Which interface it sends through cannot be seen.
    Xdp,
}

/// A socket, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bypass {
    /// The way.
    pub path: Path,
    /// The process.
    pub pid: u32,
    /// Its name.
    pub program: String,
}

/// All such sockets of this network namespace.
///
/// # Errors
/// If there are sockets that might, and their processes cannot be looked into.
pub fn bypasses() -> Result<Vec<Bypass>, String> {
    let packet = packet_sockets(&read("packet")?);
    let xdp = xdp_sockets(&read("protocols")?);
    if packet.is_empty() && xdp == 0 {
        return Ok(Vec::new());
    }
    let here = own_namespace();
    let mut found: Vec<Bypass> = Vec::new();
    let mut refused = false;
    for pid in Process::all().map_err(|error| format!("cannot list the processes: {error}"))? {
        let wanted = |inode| xdp > 0 || packet.contains_key(&inode);
        let looked = each_duplicate(pid, wanted, |socket, inode| {
            let path = match packet.get(&inode) {
                Some(&bound) => leaves_queue_out(socket).then_some(Path::QdiscBypass(bound)),
                None => (is_xdp(socket) && namespace(socket).ok() == here).then_some(Path::Xdp),
            };
            if let Some(path) = path {
                let program = Process::read(pid).map_or_else(|_| "?".to_owned(), |process| process.name);
                found.push(Bypass { path, pid, program });
            }
        });
        refused |= matches!(looked, Err(LiveError::Permission { .. }));
    }
    if refused {
        return Err(format!(
            "{} packet and {xdp} AF_XDP socket(s) are open, and asking them takes CAP_SYS_PTRACE",
            packet.len()
        ));
    }
    found.dedup();
    Ok(found)
}

fn read(file: &str) -> Result<String, String> {
    let path = format!("/proc/thread-self/net/{file}");
    fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))
}

/// The packet sockets of a network namespace by inode, with the interface that each is bound to: /proc/net/packet has
/// the columns sk, RefCnt, Type, Proto, Iface, R, Rmem, User, Inode.
fn packet_sockets(text: &str) -> HashMap<u64, u32> {
    let sockets = text.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        Some((columns.get(8)?.parse().ok()?, columns[4].parse().ok()?))
    });
    sockets.collect()
}

/// How many AF_XDP sockets there are in a network namespace: /proc/net/protocols has protocol, size, sockets.
fn xdp_sockets(text: &str) -> u32 {
    let line = text.lines().find(|line| line.starts_with("XDP "));
    line.and_then(|line| line.split_whitespace().nth(2)?.parse().ok()).unwrap_or(0)
}

fn leaves_queue_out(socket: BorrowedFd<'_>) -> bool {
    option_of(socket, libc::SOL_PACKET, PACKET_QDISC_BYPASS).is_ok_and(|value| i32::from_ne_bytes(value) != 0)
}

fn is_xdp(socket: BorrowedFd<'_>) -> bool {
    option_of(socket, libc::SOL_SOCKET, libc::SO_DOMAIN).is_ok_and(|value| i32::from_ne_bytes(value) == libc::AF_XDP)
}

fn namespace(socket: BorrowedFd<'_>) -> io::Result<u64> {
    option_of(socket, libc::SOL_SOCKET, SO_NETNS_COOKIE).map(u64::from_ne_bytes)
}

/// The number of this network namespace; `None` if the kernel does not tell, as it then does of no socket.
fn own_namespace() -> Option<u64> {
    use std::os::fd::AsFd as _;
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| std::net::UdpSocket::bind(("::1", 0))).ok()?;
    namespace(socket.as_fd()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_lists() {
        let text = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n\
                    ffff 3      3    0003   2     1 0      0      4711\nffff 3      2    0800   0     1 0      1000   4712\nshort 1\n";
        assert_eq!(packet_sockets(text), HashMap::from([(4_711, 2), (4_712, 0)]));
        let text =
            "protocol  size sockets  memory\nPACKET    1600      4      -1\nXDP       1088      2      -1   NI\n";
        assert_eq!(xdp_sockets(text), 2);
        assert_eq!(xdp_sockets("protocol\n"), 0);
    }
}
