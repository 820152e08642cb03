//! A program's own choice of level: `SO_PRIORITY`, the socket option that the limiter reads.
//!
//! ```
//! use std::net::UdpSocket;
//! use qjump::socket::{Level, level, set_level};
//!
//! let socket = UdpSocket::bind("127.0.0.1:0")?;
//! let cache = Level::new(5).expect("levels are 0 to 7");
//! set_level(&socket, cache)?;
//! assert_eq!(level(&socket)?, cache);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What Linux does with the option, and what follows for a program:
//!
//! * **`IP_TOS` comes first.** Whenever `setsockopt(IP_TOS)` changes the byte, also on an IPv6 socket, it overwrites
//!   `SO_PRIORITY` with a number derived from it (`__ip_sock_set_tos`, net/ipv4/ip_sockglue.c): 0 for every class
//!   selector, 6 for low delay. A program that sets both calls [`set_level`] last. `IPV6_TCLASS` leaves it alone. An
//!   `IP_TOS` control message overrides the level for its one packet.
//! * **Accepted connections start at level 0**, whatever the listener has: set the level of each.
//! * **The mark is the limiter's.** [`set_level`] does not write a class selector into the socket's `IP_TOS`: the packet
//!   gets its codepoint where it passes the limiter, and one that passed none must not jump queues in the switches.

use std::{io, os::fd::AsFd};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, setsockopt, sockopt::Priority},
};
pub use qjump_ebpf::Level;
use thiserror::Error;

/// Why a level could not be set or read.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The program may not choose this level.
    #[error(
        "level {level} is refused: Linux gives SO_PRIORITY above 6 only to a process with CAP_NET_ADMIN (or, from 5.17 \
         on, CAP_NET_RAW). Let qjump grant it: start the program with `qjump run --level {level} -- PROGRAM`, or tag the \
         running one with `qjump tag --pid PID --level {level}`. Levels 0 to 6 need no privilege"
    )]
    NotPermitted {
        /// The level asked for.
        level: Level,
    },
    /// The kernel refuses for another reason: no socket, for example.
    #[error("cannot {action} the level of this socket: {source}")]
    Kernel {
        /// "set" or "read".
        action: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Gives all packets that this socket sends from now on a level. IPv4, IPv6 and packet sockets of any protocol.
///
/// # Errors
/// [`SocketError::NotPermitted`] for level 7 without privilege, and if it is no socket; the socket is then as before.
pub fn set_level(socket: &impl AsFd, level: Level) -> Result<(), SocketError> {
    setsockopt(socket, Priority, &level.number().into()).map_err(|errno| match errno {
        Errno::EPERM => SocketError::NotPermitted { level },
        _ => SocketError::Kernel { action: "set", source: errno.into() },
    })
}

/// The level that this socket's packets ask for. A priority that is no level (a class of some qdisc) counts as level 0,
/// as it does for the limiter.
///
/// # Errors
/// If it is no socket.
pub fn level(socket: &impl AsFd) -> Result<Level, SocketError> {
    match getsockopt(socket, Priority) {
        Ok(priority) => Ok(Level::from_priority(priority as u32).unwrap_or(Level::BEST_EFFORT)),
        Err(errno) => Err(SocketError::Kernel { action: "read", source: errno.into() }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        net::{TcpListener, TcpStream, UdpSocket},
        os::fd::OwnedFd,
    };

    use nix::sys::socket::sockopt::{Ipv4Tos, Ipv6TClass};

    use super::*;

    /// A socket of each kind that programs use; no IPv6 ones on a machine without IPv6.
    fn sockets() -> Vec<OwnedFd> {
        let mut sockets = Vec::new();
        for host in ["127.0.0.1", "::1"] {
            let Ok(listener) = TcpListener::bind((host, 0)) else { continue };
            sockets.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap().into());
            sockets.push(listener.accept().unwrap().0.into());
            sockets.push(listener.into());
            sockets.push(UdpSocket::bind((host, 0)).unwrap().into());
        }
        assert!(sockets.len() >= 4);
        sockets
    }

    #[test]
    fn levels_0_to_6_are_for_everybody() {
        for socket in sockets() {
            assert_eq!(level(&socket).unwrap(), Level::BEST_EFFORT);
            for wanted in Level::strictest_first().skip(1) {
                set_level(&socket, wanted).unwrap();
                assert_eq!(level(&socket).unwrap(), wanted);
            }
        }
    }

    /// The facts that the module's documentation states.
    #[test]
    fn ip_tos_overwrites_the_level_and_tclass_does_not() {
        let five = Level::new(5).unwrap();
        for socket in sockets() {
            set_level(&socket, five).unwrap();
            // Fails on IPv4 sockets.
            let _ = setsockopt(&socket, Ipv6TClass, &0x10);
            assert_eq!(level(&socket).unwrap(), five);
            setsockopt(&socket, Ipv4Tos, &0x10).unwrap();
            assert_eq!(level(&socket).unwrap().number(), 6);
            setsockopt(&socket, Ipv4Tos, &(5 << 5)).unwrap();
            assert_eq!(level(&socket).unwrap(), Level::BEST_EFFORT);
            set_level(&socket, five).unwrap();
            assert_eq!(level(&socket).unwrap(), five);
        }
    }

    #[test]
    fn accepted_connections_start_at_level_0() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_level(&listener, Level::new(5).unwrap()).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert_eq!(level(&listener.accept().unwrap().0).unwrap(), Level::BEST_EFFORT);
    }

    #[test]
    fn a_priority_that_is_no_level_is_best_effort() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        // Only a privileged process can have such a socket.
        if setsockopt(&socket, Priority, &0x1_0007).is_ok() {
            assert_eq!(level(&socket).unwrap(), Level::BEST_EFFORT);
        }
    }

    #[test]
    fn errors_say_what_and_what_to_do() {
        let file = File::open("/dev/null").unwrap();
        let error = set_level(&file, Level::new(5).unwrap()).unwrap_err().to_string();
        assert!(error.contains("cannot set the level") && error.contains("non-socket"), "{error}");
        assert!(level(&file).is_err());
        let error = SocketError::NotPermitted { level: Level::STRICTEST }.to_string();
        for part in ["level 7", "CAP_NET_ADMIN", "qjump run --level 7", "qjump tag --pid PID --level 7"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
