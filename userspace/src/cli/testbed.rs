//! `qjump testbed`.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use clap::{
    Args, Subcommand,
    builder::{PossibleValue, PossibleValuesParser},
};
use tokio::signal::unix::{SignalKind, signal};

use super::Failure;
use crate::{
    testbed::demo::{self, Options},
    units::Nanos,
};

/// Racks of network namespaces on this machine
#[derive(Args)]
pub struct TestbedCommand {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A probe beside iperf3 on a rack, with and without the limiter; takes about two minutes
    ///
    /// Exit status 2 if a bound that was promised was broken. Needs root. Ctrl-C takes the rack down; what one that
    /// was killed (SIGKILL) leaves behind, the next one removes.
    Demo(Demo),
}

#[derive(Args)]
struct Demo {
    /// Folder for summary.json and latency.svg; their names have the cases in them if not all are run
    #[arg(long, value_name = "DIR", default_value = "qjump-demo")]
    output: PathBuf,
    /// Probes in each case, a millisecond apart
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    probes: u64,
    /// Fixed delays that the plan counts with: a lower-level frame on the wire (123us at 100mbit), and the
    /// time for which this machine's CPUs may be away, for they are the switch. Lower it on a quiet machine
    #[arg(long, value_name = "TIME", default_value = "2500us")]
    epsilon: Nanos,
    /// Run this case alone; repeatable
    #[arg(long, value_name = "NAME", value_parser = case_names())]
    case: Vec<String>,
}

fn case_names() -> PossibleValuesParser {
    PossibleValuesParser::new(demo::cases().map(|(name, about)| PossibleValue::new(name).help(about)))
}

impl TestbedCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Command::Demo(demo) = self.command;
        let options = Options { probes: demo.probes, epsilon: demo.epsilon, cases: demo.case };
        options.plan().map_err(|error| Failure::Usage(format!("{error:#}")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let cancelled = Arc::new(AtomicBool::new(false));
        let held = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut hang_up = signal(SignalKind::hangup())?;
            let flag = Arc::clone(&cancelled);
            let mut work = tokio::task::spawn_blocking(move || demo::run(&options, &demo.output, &flag));
            // A signal asks the demonstration to end; it takes its rack down and says so.
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
                _ = hang_up.recv() => {}
                result = &mut work => return result.map_err(anyhow::Error::from)?,
            }
            cancelled.store(true, Relaxed);
            eprintln!("\nqjump: taking the rack down");
            work.await.map_err(anyhow::Error::from)?
        })?;
        if held { Ok(()) } else { Err(Failure::DoesNotHold) }
    }
}
