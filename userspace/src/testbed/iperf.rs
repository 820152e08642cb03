//! iperf3, as it is.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use qjump_ebpf::Level;
use serde_json::Value;

use super::{NetNs, Process, Program};

/// How long a client may take longer than it was told to.
const LIMIT: Duration = Duration::from_secs(20);

/// A server for one client at a time.
pub fn server(netns: &NetNs, port: u16, cpu: usize) -> Result<Process> {
    let arguments = ["--server", "--affinity", &cpu.to_string(), "--port", &port.to_string()];
    Program::new(netns, "iperf3").args(arguments).start()
}

/// How much a client sends.
#[derive(Clone, Copy, Debug)]
pub enum Amount {
    /// As much as it can for so many seconds.
    Seconds(u64),
    /// So many bytes, as fast as it can.
    Bytes(u64),
}

/// One TCP flow, with CUBIC.
pub fn client(
    netns: &NetNs,
    server: &str,
    port: u16,
    amount: Amount,
    cpu: usize,
    level: Option<Level>,
) -> Result<Process> {
    let (flag, number) = match amount {
        Amount::Seconds(seconds) => ("--time", seconds),
        Amount::Bytes(bytes) => ("--bytes", bytes),
    };
    Program::new(netns, "iperf3")
        .args(["--client", server, "--port", &port.to_string(), flag, &number.to_string()])
        .args(["--affinity", &cpu.to_string(), "--congestion", "cubic", "--connect-timeout", "3000", "--json"])
        .level(level)
        .start()
}

/// What a client's server received.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes.
    pub bytes: u64,
    /// In the time that it took, bit/s.
    pub bps: f64,
}

/// Waits for a client.
pub fn received(mut client: Process) -> Result<Received> {
    // It says in its JSON what went wrong, so how it ended comes second.
    let ended = client.finish(LIMIT);
    let text = client.stdout()?;
    let result: Value = match serde_json::from_str(&text) {
        Ok(result) => result,
        Err(error) => {
            ended?;
            return Err(error).context("iperf3 wrote no JSON");
        }
    };
    if let Some(error) = result["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let sum = &result["end"]["sum_received"];
    let numbers = sum["bytes"].as_u64().zip(sum["bits_per_second"].as_f64());
    numbers.map(|(bytes, bps)| Received { bytes, bps }).context("iperf3 reported no throughput")
}
