//! `qjump measure serve`.

use std::{io, net::SocketAddr};

use clap::Args;

use super::{
    super::{Failure, interrupt},
    choose_cpu,
};
use crate::{
    measure::{
        control::PORT,
        server::{Options, Server},
    },
    units::Nanos,
};

/// Answer the probes of `qjump measure` on other hosts, until interrupted
///
/// Listens on one port, TCP and UDP, and answers only whoever has opened a session over TCP, with messages of the size
/// of the probes. Answers go out at the level of the probes, so this host needs its own `qjump load` if the way back is to be
/// bounded. There is no authentication: let it run while you measure, on addresses that only your hosts reach.
#[derive(Args)]
pub struct Serve {
    /// Address and port to listen on; port 0 for any that is free
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from(([0; 16], PORT)))]
    listen: SocketAddr,
    /// CPU for the threads that answer [default: the last but one that this process may run on]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Watch for the next probe for so long before sleeping: longer than the time between two of them, and no probe
    /// waits until this host has woken up, at the price of a CPU
    #[arg(long, value_name = "TIME", default_value = "20us")]
    spin: Nanos,
}

impl Serve {
    pub(super) fn run(self) -> Result<(), Failure> {
        let cpu = choose_cpu(self.cpu, 1)?;
        let options = |listen| Options { listen, cpu, spin_ns: self.spin.ns() };
        let server = Server::new(options(self.listen))
            // A host may be without IPv6.
            .or_else(|error| match error.raw_os_error() {
                Some(libc::EAFNOSUPPORT) if self.listen.ip().is_unspecified() => {
                    Server::new(options(SocketAddr::from(([0; 4], self.listen.port()))))
                }
                _ => Err(error),
            })
            .map_err(|error| self.cannot_listen(&error))?;
        eprintln!("qjump: listening on {}, TCP and UDP", server.address()?);
        Ok(server.run(interrupt::flag(), |line| eprintln!("qjump: {line}"))?)
    }

    fn cannot_listen(&self, error: &io::Error) -> Failure {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "; another program has the port, perhaps another `qjump measure serve`: choose another by --listen"
            }
            io::ErrorKind::AddrNotAvailable => "; it is no address of this host",
            _ => "",
        };
        Failure::Failed(format!("cannot listen on {}: {error}{hint}", self.listen))
    }
}
