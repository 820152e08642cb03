//! What systemd wants to know (sd_notify(3)). Without systemd there is nobody to tell.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// Whoever started the agent.
pub struct Supervisor {
    socket: Option<UnixDatagram>,
}

impl Supervisor {
    /// That of `NOTIFY_SOCKET`, if there is one. One that cannot be reached is as good as none.
    pub fn find() -> Self {
        let connected = |name: std::ffi::OsString| -> io::Result<UnixDatagram> {
            let address = match name.as_bytes().strip_prefix(b"@") {
                Some(name) => SocketAddr::from_abstract_name(name)?,
                None => SocketAddr::from_pathname(&name)?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        Self { socket: env::var_os("NOTIFY_SOCKET").and_then(|name| connected(name).ok()) }
    }

    /// Says something: `READY=1` and the like.
    pub fn say(&self, what: &str) {
        if let Some(socket) = &self.socket {
            // A supervisor that does not listen cannot be helped.
            let _ = socket.send(what.as_bytes());
        }
    }

    /// How often it wants to hear `WATCHDOG=1`: half of what it allows.
    pub fn watchdog(&self) -> Option<Duration> {
        self.socket.as_ref()?;
        let meant = env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let limit: u64 = env::var("WATCHDOG_USEC").ok().filter(|_| meant)?.parse().ok()?;
        Some(Duration::from_micros(limit / 2)).filter(|interval| !interval.is_zero())
    }
}
