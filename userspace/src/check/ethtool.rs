//! What a driver says of its device by the ethtool ioctl. It needs no privilege and no sysfs, which shows another network
//! namespace's devices after `nsenter --net`.

use std::{io, os::fd::AsRawFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// `ETHTOOL_GSET`, with its `struct ethtool_cmd` as words.
const GET_SETTINGS: [u32; 11] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// `ETHTOOL_GTSO`, with its `struct ethtool_value`.
const GET_TSO: [u32; 2] = [0x1e, 0];

/// Speed and duplex of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Mbit/s, if it says.
    pub speed_mbit: Option<u32>,
    /// Whether it cannot send and receive at once.
    pub half_duplex: bool,
}

/// Speed and duplex of an interface. A device that does not say has none.
pub fn settings(interface: &str) -> Settings {
    let mut words = GET_SETTINGS;
    match ask(interface, &mut words) {
        Ok(()) => Settings::parse(words),
        Err(_) => Settings::default(),
    }
}

/// Whether the device cuts TCP packets into segments; `None` if it does not say.
pub fn tso(interface: &str) -> Option<bool> {
    let mut words = GET_TSO;
    ask(interface, &mut words).ok().map(|()| words[1] != 0)
}

impl Settings {
    /// cmd, supported, advertising, then speed: u16, duplex: u8 and others, and speed_hi: u16 in the eighth word.
    fn parse(words: [u32; 11]) -> Self {
        let half =
            |word: u32, at: usize| u32::from(u16::from_ne_bytes([word.to_ne_bytes()[at], word.to_ne_bytes()[at + 1]]));
        let speed = half(words[7], 0) << 16 | half(words[3], 0);
        let known = speed != 0 && speed != u32::MAX && speed != u32::from(u16::MAX);
        // DUPLEX_HALF is 0, which is also what a device without a speed has.
        Self { speed_mbit: known.then_some(speed), half_duplex: known && words[3].to_ne_bytes()[2] == 0 }
    }
}

fn ask(interface: &str, words: &mut [u32]) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    let mut request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: words.as_mut_ptr().cast() } };
    // SAFETY: the name ends with a zero, and `words` is as long as the structure of its command; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(speed: u32, duplex: u8) -> Settings {
        let [a, b, c, d] = speed.to_ne_bytes();
        let (low, high) = if cfg!(target_endian = "little") { ([a, b], [c, d]) } else { ([c, d], [a, b]) };
        let mut words = GET_SETTINGS;
        words[3] = u32::from_ne_bytes([low[0], low[1], duplex, 0]);
        words[7] = u32::from_ne_bytes([high[0], high[1], 0, 0]);
        Settings::parse(words)
    }

    #[test]
    fn reads_speed_and_duplex() {
        assert_eq!(with(10_000, 1), Settings { speed_mbit: Some(10_000), half_duplex: false });
        assert_eq!(with(400_000, 1), Settings { speed_mbit: Some(400_000), half_duplex: false });
        assert_eq!(with(10, 0), Settings { speed_mbit: Some(10), half_duplex: true });
        for unknown in [0, u32::MAX, 0xffff] {
            assert_eq!(with(unknown, 0), Settings::default());
        }
    }

    #[test]
    fn an_interface_that_is_not_there_says_nothing() {
        assert_eq!(settings("qj-no-such-if0"), Settings::default());
        assert_eq!(tso("a-name-that-is-much-too-long"), None);
    }
}
