//! UDP senders at a level.

use std::{
    net::UdpSocket,
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use anyhow::{Result, ensure};
use qjump::{dataplane::sys::monotonic_ns, testbed::NetNs};

/// A UDP socket inside `netns`, with this SO_PRIORITY, connected to `to`.
pub fn connected(netns: &NetNs, from: &str, to: &str, port: u16, priority: u32) -> Result<UdpSocket> {
    let bind = if from.contains(':') { format!("[{from}]:0") } else { format!("{from}:0") };
    let socket = netns.enter(|| Ok(UdpSocket::bind(bind)?))?;
    // SAFETY: the option's value is a u32 that outlives the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY, (&raw const priority).cast(), 4)
    };
    ensure!(result == 0, "SO_PRIORITY {priority}: {}", std::io::Error::last_os_error());
    socket.connect((to, port))?;
    Ok(socket)
}

/// Sets a socket's TOS, and with it, as a side effect in the kernel, its SO_PRIORITY.
pub fn set_tos(socket: &UdpSocket, tos: u8) -> Result<()> {
    let tos = libc::c_int::from(tos);
    // SAFETY: the option's value is an int that outlives the call.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_TOS, (&raw const tos).cast(), 4) };
    ensure!(result == 0, "IP_TOS {tos:#x}: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Sends so many messages of this many bytes, a millisecond apart.
pub fn messages(socket: &UdpSocket, number: u32, bytes: usize) {
    for _ in 0..number {
        // The far host says that nobody listens: a call that reports that has sent nothing.
        while matches!(socket.send(&vec![0; bytes]), Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused)
        {
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Sends as fast as it can until `stop`; the first 8 bytes of each payload are the time just before its
/// system call. `size` gives each packet's payload. Returns how many it sent.
pub fn flood(socket: &UdpSocket, stop: &AtomicBool, mut size: impl FnMut() -> usize) -> u64 {
    let mut payload = [0; 1472];
    let mut sent = 0;
    while !stop.load(Relaxed) {
        let length = size();
        payload[..8].copy_from_slice(&monotonic_ns().to_ne_bytes());
        match socket.send(&payload[..length]) {
            // The far host says that nobody listens: this call reported that, and sent nothing.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            // A drop may or may not be reported; either way the packet was offered.
            _ => sent += 1,
        }
    }
    sent
}
