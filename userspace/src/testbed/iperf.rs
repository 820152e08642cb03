//! iperf3, as it is.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::NetNs;

/// A process of ours that ends with us, even if we are killed.
#[derive(Debug)]
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(mut command: Command) -> Result<Process> {
    let end_with_parent = || {
        // SAFETY: the call has no memory arguments.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(end_with_parent) };
    Ok(Process(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?))
}

/// Whether iperf3 can be run.
pub fn check() -> Result<()> {
    let found = Command::new("iperf3").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok() {
        return Ok(());
    }
    bail!("there is no program 'iperf3'; install it: apt-get install iperf3")
}

/// A server for one client at a time.
pub fn server(netns: &NetNs, port: u16, cpu: usize) -> Result<Process> {
    let mut command = netns.command("iperf3");
    command.args(["--server", "--affinity", &cpu.to_string(), "--port", &port.to_string()]);
    spawn(command)
}

/// One TCP flow for `seconds`, with CUBIC.
pub fn client(netns: &NetNs, server: &str, port: u16, seconds: u64, cpu: usize) -> Result<Process> {
    let mut command = netns.command("iperf3");
    command.args(["--client", server, "--port", &port.to_string(), "--time", &seconds.to_string()]);
    command.args(["--affinity", &cpu.to_string(), "--congestion", "cubic", "--connect-timeout", "3000", "--json"]);
    spawn(command)
}

/// Waits for a client; what its server received, bit/s.
pub fn goodput(mut client: Process) -> Result<f64> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut text = String::new();
    client.0.stdout.take().context("no stdout")?.read_to_string(&mut text)?;
    while client.0.try_wait()?.is_none() {
        if Instant::now() > deadline {
            bail!("iperf3 did not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let result: serde_json::Value = serde_json::from_str(&text).context("iperf3 wrote no JSON")?;
    if let Some(error) = result["error"].as_str() {
        bail!("iperf3: {error}");
    }
    result["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 reported no throughput")
}
