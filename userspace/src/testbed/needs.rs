//! Programs of Debian's that racks and experiments run.

use anyhow::{Result, bail};

/// A program that must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// The program.
    pub program: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
}

/// Bulk traffic.
pub const IPERF3: Need = Need { program: "iperf3", package: "iperf3" };
/// Echo requests.
pub const PING: Need = Need { program: "ping", package: "iputils-ping" };
/// A cache.
pub const MEMCACHED: Need = Need { program: "memcached", package: "memcached" };
/// A daemon of the Precision Time Protocol.
pub const PTPD: Need = Need { program: "ptpd", package: "ptpd" };

/// Refuses to begin without these.
///
/// # Errors
/// With the names of those that are missing, and how to install them.
pub fn require(needs: &[Need]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |need: &Need| std::env::split_paths(&path).any(|folder| folder.join(need.program).is_file());
    let missing: Vec<&Need> = needs.iter().filter(|need| !there(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<&str> = missing.iter().map(|need| need.program).collect();
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    bail!("there is no program '{}'; install it: apt-get install {}", programs.join("', '"), packages.join(" "))
}
