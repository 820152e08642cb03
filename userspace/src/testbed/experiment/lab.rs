//! What a case works with.

use std::{
    ffi::OsStr,
    fs,
    net::UdpSocket,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use qjump_ebpf::Level;
use rand::SeedableRng;
use rand_xoshiro::Xoshiro256PlusPlus;
use thiserror::Error;

use super::Setup;
use crate::{
    dataplane::{self, LevelStatus},
    measure::StallWatch,
    socket::set_level,
    testbed::{Program, Rack},
};

/// Where bulk traffic runs, and with it most of the emulated network.
pub const BULK_CPU: usize = 0;
/// Where what is measured runs.
pub const PROBE_CPU: usize = 1;

/// Somebody asked for the end.
#[derive(Debug, Error)]
#[error("interrupted")]
pub struct Interrupted;

/// A rack with what a case needs to work on it.
pub struct Lab<'a> {
    /// What was asked for.
    pub setup: &'a Setup,
    /// The rack.
    pub rack: &'a Rack,
    /// Watches this machine's CPUs while the case is measured.
    pub watch: &'a StallWatch,
    pub(super) cancelled: &'a AtomicBool,
}

impl Lab<'_> {
    /// Fails once somebody has asked for the end.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Sleeps, unless somebody asks for the end.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn pause(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Random choices of this run: `stream` tells independent ones apart.
    pub fn random(&self, stream: u64) -> Xoshiro256PlusPlus {
        // The golden ratio: neighbouring streams have nothing in common.
        Xoshiro256PlusPlus::seed_from_u64(self.setup.seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// A program on a host, not yet started.
    pub fn program(&self, host: usize, program: impl AsRef<OsStr>) -> Program<'_> {
        Program::new(self.rack.host(host), program)
    }

    /// A UDP socket on a host, bound to its address, at a level. Port 0 is any.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn socket(&self, host: usize, port: u16, level: Level) -> Result<UdpSocket> {
        let address = self.rack.address(host);
        self.rack.host(host).enter(|| {
            let socket =
                UdpSocket::bind((address.as_str(), port)).with_context(|| format!("cannot bind {address}:{port}"))?;
            set_level(&socket, level)?;
            Ok(socket)
        })
    }

    /// Waits until a program on a host listens on a TCP port, without connecting to it.
    ///
    /// # Errors
    /// If none does within five seconds.
    pub fn listening(&self, host: usize, port: u16) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let listens = self.rack.host(host).enter(|| {
                let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
                Ok(tables.iter().any(|table| listens(&fs::read_to_string(table).unwrap_or_default(), port)))
            })?;
            if listens {
                return Ok(());
            }
            self.pause(Duration::from_millis(20))?;
        }
        bail!("nothing listens on port {port} of host {} after five seconds", host + 1)
    }

    /// The packets of a level that the limiters of all hosts have dropped so far.
    ///
    /// # Errors
    /// If the pins of a host cannot be read. A host without a plan drops nothing.
    pub fn dropped_by_limiters(&self, level: Level) -> Result<u64> {
        self.limited(level, |status| status.dropped().packets)
    }

    /// The packets of a level that the limiters of all hosts have sent at a lower one so far.
    ///
    /// # Errors
    /// If the pins of a host cannot be read. A host without a plan demotes nothing.
    pub fn demoted_by_limiters(&self, level: Level) -> Result<u64> {
        self.limited(level, |status| status.demoted().packets)
    }

    fn limited(&self, level: Level, count: impl Fn(&LevelStatus) -> u64) -> Result<u64> {
        let mut sum = 0;
        for host in (0..self.setup.rack.hosts).filter(|&host| self.rack.is_loaded(host)) {
            let status = dataplane::status(&self.rack.interface(host))?;
            sum += status.levels.iter().filter(|one| one.level == level).map(&count).sum::<u64>();
        }
        Ok(sum)
    }

    /// The bytes that have arrived at a host so far, L2 without FCS.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn received_bytes(&self, host: usize) -> Result<u64> {
        let interface = self.rack.interface(host);
        let table = self.rack.host(host).enter(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = table.lines().find_map(|line| line.trim().strip_prefix(&format!("{interface}:")));
        let bytes = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        bytes.with_context(|| format!("no counters of {interface}"))
    }
}

/// Whether a table of TCP sockets (/proc/net/tcp) has one that listens on a port.
fn listens(table: &str, port: u16) -> bool {
    const LISTEN: &str = "0A";
    table.lines().skip(1).any(|line| {
        // sl, local_address, rem_address, st
        let words: Vec<&str> = line.split_whitespace().take(4).collect();
        matches!(words[..], [_, local, _, LISTEN] if local.ends_with(&format!(":{port:04X}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_that_listen_listen() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 0100007F:1451 00000000:0000 0A 00000000:00000000\n\
                     1: 0100007F:1F90 0100007F:C001 01 00000000:00000000\n";
        assert!(listens(table, 0x1451));
        assert!(!listens(table, 0x1f90) && !listens(table, 0x451) && !listens("", 80));
    }
}
