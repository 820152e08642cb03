//! TCP connections with a level and a congestion control of their own, from the first packet on.

use std::{
    fs, io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket,
            sockopt::{SendTimeout, TcpCongestion, TcpNoDelay},
        },
        time::TimeVal,
    },
};

use crate::socket::{Level, set_level};

/// What is special about a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Options<'a> {
    /// `SO_PRIORITY`.
    pub level: Option<Level>,
    /// The kernel's default if absent.
    pub congestion: Option<&'a str>,
}

impl Options<'_> {
    /// A socket for connections to `to`, not yet connected.
    pub fn socket(&self, to: SocketAddr, flags: SockFlag) -> Result<OwnedFd> {
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let socket = socket(family, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, TcpNoDelay, &true)?;
        if let Some(level) = self.level {
            set_level(&socket, level)?;
        }
        if let Some(name) = self.congestion {
            setsockopt(&socket, TcpCongestion, &name.into()).map_err(|errno| no_congestion_control(name, errno))?;
        }
        Ok(socket)
    }

    /// A connection to `to`, made within `timeout`.
    pub fn connect(&self, to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        let socket = self.socket(to, SockFlag::empty())?;
        // Linux takes the send timeout for connect, too (socket(7)).
        setsockopt(&socket, SendTimeout, &TimeVal::new(timeout.as_secs() as i64, timeout.subsec_micros().into()))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).map_err(|errno| match errno {
            Errno::EINPROGRESS => anyhow!("cannot connect to {to}: no answer within {timeout:?}"),
            _ => anyhow!("cannot connect to {to}: {}", io::Error::from(errno)),
        })?;
        Ok(socket.into())
    }
}

fn no_congestion_control(name: &str, errno: Errno) -> anyhow::Error {
    let available = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default();
    match errno {
        Errno::ENOENT => {
            anyhow!("this kernel has no congestion control '{name}'; it has: {}", available.trim())
        }
        Errno::EPERM => anyhow!(
            "congestion control '{name}' is not for everybody; root may use it, or add it to \
             net.ipv4.tcp_allowed_congestion_control"
        ),
        _ => anyhow!("cannot set congestion control '{name}': {}", io::Error::from(errno)),
    }
}

/// How many segments a connection has sent again.
pub(super) fn retransmits(connection: &TcpStream) -> Result<u64> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the answer has room for `length` bytes, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            connection.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result).context("cannot read TCP_INFO")?;
    // SAFETY: it consists of integers, all of which were zeroed.
    Ok(unsafe { info.assume_init() }.tcpi_total_retrans.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::getsockopt;

    use super::*;
    use crate::socket::level;

    #[test]
    fn a_connection_has_its_options() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let options = Options { level: Level::new(5), congestion: Some("reno") };
        let connection = options.connect(listener.local_addr().unwrap(), Duration::from_secs(1)).unwrap();
        assert_eq!(level(&connection).unwrap().number(), 5);
        let name = getsockopt(&connection, TcpCongestion).unwrap();
        assert_eq!(name.to_str().unwrap().trim_end_matches('\0'), "reno");
        assert_eq!(retransmits(&connection).unwrap(), 0);
    }

    #[test]
    fn errors_say_what_there_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let options = Options { congestion: Some("warp"), ..Options::default() };
        let error = options.connect(to, Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("no congestion control 'warp'; it has: ") && error.contains("reno"), "{error}");
        drop(listener);
        let error = Options::default().connect(to, Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains(&to.to_string()) && error.contains("refused"), "{error}");
    }
}
