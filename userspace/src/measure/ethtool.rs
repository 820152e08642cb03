//! What a driver says of its device, by the ethtool ioctl (include/uapi/linux/ethtool.h).

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GET_TS_INFO: u32 = 0x41;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_SGRO: u32 = 0x2c;
/// The offloads that decide how packets leave and arrive, with the commands that ask for them.
const OFFLOADS: [(&str, u32); 6] = [
    ("rx_checksum", 0x14),
    ("tx_checksum", 0x16),
    ("scatter_gather", 0x18),
    ("tso", 0x1e),
    ("gso", 0x23),
    ("gro", 0x2b),
];
/// `struct ethtool_drvinfo`: cmd, then driver, version, firmware version of 32 bytes each, and more.
const DRIVER_INFO_WORDS: usize = 49;
/// `struct ethtool_ts_info`: cmd, so_timestamping, and nine words more.
const TS_INFO_WORDS: usize = 11;

/// The devices of the network namespace in which it was made.
#[derive(Debug)]
pub struct Ethtool {
    socket: UdpSocket,
}

impl Ethtool {
    /// For the calling thread's namespace.
    pub fn new() -> io::Result<Self> {
        Ok(Self { socket: UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0"))? })
    }

    /// The driver's name and version.
    pub fn driver(&self, interface: &str) -> io::Result<(String, String)> {
        let mut words = [0; DRIVER_INFO_WORDS];
        words[0] = ETHTOOL_GDRVINFO;
        ask(self.socket.as_fd(), interface, &mut words)?;
        let text = |from: usize| {
            let bytes = words[from..from + 8].iter().flat_map(|word| word.to_ne_bytes()).take_while(|&byte| byte != 0);
            String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
        };
        Ok((text(1), text(9)))
    }

    /// The offloads that the device has, and whether each is on.
    pub fn offloads(&self, interface: &str) -> Vec<(&'static str, bool)> {
        let on = |command| {
            let mut words = [command, 0];
            ask(self.socket.as_fd(), interface, &mut words).ok().map(|()| words[1] != 0)
        };
        OFFLOADS.into_iter().filter_map(|(name, command)| Some((name, on(command)?))).collect()
    }

    /// Turns TCP's segmentation by the device on or off.
    pub fn set_tso(&self, interface: &str, on: bool) -> io::Result<()> {
        ask(self.socket.as_fd(), interface, &mut [ETHTOOL_STSO, on.into()])
    }

    /// Turns generic receive offload on or off.
    pub fn set_gro(&self, interface: &str, on: bool) -> io::Result<()> {
        ask(self.socket.as_fd(), interface, &mut [ETHTOOL_SGRO, on.into()])
    }

    /// The `SOF_TIMESTAMPING_` flags that the device can satisfy.
    pub fn timestamping(&self, interface: &str) -> io::Result<u32> {
        let mut words = [0; TS_INFO_WORDS];
        words[0] = ETHTOOL_GET_TS_INFO;
        ask(self.socket.as_fd(), interface, &mut words)?;
        Ok(words[1])
    }
}

/// One request; the answer comes in its place.
fn ask(socket: BorrowedFd<'_>, interface: &str, words: &mut [u32]) -> io::Result<()> {
    let name = interface.as_bytes();
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all bytes zero are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(name) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
    // SAFETY: `request` and the words it points to outlive the call, and the words are as many as the command that is
    // the first of them makes the kernel write.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_stamps_in_software_alone() {
        let flags = Ethtool::new().unwrap().timestamping("lo").unwrap();
        assert_ne!(flags & libc::SOF_TIMESTAMPING_TX_SOFTWARE, 0);
        assert_eq!(flags & libc::SOF_TIMESTAMPING_RX_HARDWARE, 0);
    }

    #[test]
    fn offloads_have_names_and_strangers_none() {
        let ethtool = Ethtool::new().unwrap();
        assert!(ethtool.offloads("lo").iter().any(|(name, _)| *name == "gso"));
        assert_eq!(ethtool.offloads("no-such-device"), []);
        assert!(ethtool.driver("a-name-of-more-than-fifteen").is_err());
    }
}
