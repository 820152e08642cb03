//! `qjump measure`.

mod compare;
mod ladder;
mod load;
mod memcached;
mod output;
mod probe;
mod serve;
mod show;
mod switch_check;

use std::net::{SocketAddr, ToSocketAddrs};

use clap::{Args, Subcommand};
use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::Pid,
};

use super::Failure;
use crate::socket::Level;

/// Measure tail latency, open loop, with the kernel's time stamps
///
/// One host runs `qjump measure serve`, the other one of the clients. A probe's response time counts from the time at which
/// it was to be sent, whatever held it up, and its service time from when it was sent; the way between is split by the
/// kernel's stamps: app-sched (system call, until the limiter and the queues), sched-snd (limiter and queues), snd-rx (the
/// network), rx-app (waking up).
#[derive(Args)]
pub struct MeasureCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Probe(probe::Probe),
    Pingpong(probe::PingPong),
    Ladder(ladder::Ladder),
    SwitchCheck(switch_check::SwitchCheck),
    Load(load::Load),
    Sink(load::Sink),
    Memcached(memcached::Memcached),
}

impl MeasureCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Serve(command) => command.run(),
            Command::Probe(command) => command.run(),
            Command::Pingpong(command) => command.run(),
            Command::Ladder(command) => command.run(),
            Command::SwitchCheck(command) => command.run(),
            Command::Load(command) => command.run(),
            Command::Sink(command) => command.run(),
            Command::Memcached(command) => command.run(),
        }
    }
}

/// Finds the address of a host, with the port that is given, or else this one.
fn resolve(target: &str, port: u16) -> Result<SocketAddr, Failure> {
    let with_port = match target.parse() {
        // An IPv6 address has colons, too.
        Ok(ip) => return Ok(SocketAddr::new(ip, port)),
        Err(_) if target.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => target.to_owned(),
        Err(_) => format!("{target}:{port}"),
    };
    let mut found =
        with_port.to_socket_addrs().map_err(|error| Failure::Failed(format!("cannot find '{target}': {error}")))?;
    found.next().ok_or_else(|| Failure::Failed(format!("'{target}' has no address")))
}

fn level(text: &str) -> Result<Level, String> {
    let number = text.parse().ok().and_then(Level::new);
    number.ok_or_else(|| "a level is a number from 0 to 7".to_owned())
}

/// The CPU to use: the one that was asked for, or one from the end of those that this process may run on.
fn choose_cpu(asked: Option<usize>, from_the_end: usize) -> Result<Option<usize>, Failure> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(|errno| Failure::Failed(errno.to_string()))?;
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true)).collect();
    match asked {
        Some(cpu) if !cpus.contains(&cpu) => {
            Err(Failure::Usage(format!("this process may not run on CPU {cpu}; it may on {cpus:?}")))
        }
        Some(cpu) => Ok(Some(cpu)),
        None => Ok(cpus.iter().rev().nth(from_the_end.min(cpus.len() - 1)).copied()),
    }
}
