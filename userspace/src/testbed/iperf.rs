//! iperf3, as it is.

use std::time::Duration;

use anyhow::{Context, Result, bail};
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
pub fn client(netns: &NetNs, server: &str, port: u16, amount: Amount, cpu: usize) -> Result<Process> {
    let (flag, number) = match amount {
        Amount::Seconds(seconds) => ("--time", seconds),
        Amount::Bytes(bytes) => ("--bytes", bytes),
    };
    Program::new(netns, "iperf3")
        .args(["--client", server, "--port", &port.to_string(), flag, &number.to_string()])
        .args(["--affinity", &cpu.to_string(), "--congestion", "cubic", "--connect-timeout", "3000", "--json"])
        .start()
}

/// Waits for a client; what its server received, bit/s.
pub fn goodput(mut client: Process) -> Result<f64> {
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
    result["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 reported no throughput")
}
