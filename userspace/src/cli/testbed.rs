//! `qjump testbed`.

use std::{
    ffi::OsString,
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
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, print};
use crate::{
    report,
    table::Table,
    testbed::{
        NamedRack,
        demo::{self, Options},
        experiment::{self, Experiment, Prepared},
        remove_stale,
        standing::{self, Status},
        stock,
    },
    units::Nanos,
};

/// Racks of network namespaces on this machine, and experiments on them
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
    /// The racks and experiments that there are
    List(List),
    /// Build a rack that stands until it is taken down
    Up(Up),
    /// Take a rack down, finished or not, with everything that was loaded on its hosts
    Down(Down),
    /// Run a program in a host or a switch of a rack
    ///
    /// It sees the machine's file systems, so that `qjump load --interface $QJUMP_INTERFACE` works there; the variable
    /// has the name of the host's interface. Exit status and signals are the program's own.
    Exec(Exec),
    /// What stands: hosts, their interfaces and addresses, and where a plan is loaded
    ///
    /// Exit status 2 if a rack is not as it was built.
    Status(StatusArgs),
    /// Run experiments: what the paper measured, on a rack, with real programs
    ///
    /// Writes NAME.json (which `qjump report` reads), .html, .svg and .md. Exit status 2 if a claim does not hold. Needs root. Ctrl-C takes the rack down and
    /// keeps what was measured.
    Run(Run),
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

#[derive(Args)]
struct List {
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Up {
    /// A rack of the stock (see `qjump testbed list`), or a TOML file
    #[arg(value_name = "FILE|NAME")]
    rack: String,
    /// What to call it [default: the name of the stock or of the file]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Args)]
struct Down {
    /// The rack; if only one stands, it may be left out
    name: Option<String>,
    /// Every rack, and what demonstrations and experiments that were killed have left
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

#[derive(Args)]
struct Exec {
    /// The rack
    name: String,
    /// A host, h1 to hN, or a switch: leaf1, spine1
    host: String,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Args)]
struct StatusArgs {
    /// This rack alone
    name: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Run {
    /// The experiments, or "all"
    #[arg(required = true, value_name = "EXPERIMENT", value_parser = experiment_names())]
    experiments: Vec<String>,
    /// Another rack than the experiment's own: a name of the stock, or a TOML file
    #[arg(long, value_name = "FILE|NAME")]
    rack: Option<String>,
    /// A short form of well under a minute: it shows the direction, not the figure
    #[arg(long)]
    quick: bool,
    /// Folder for the results
    #[arg(long, value_name = "DIR", default_value = "qjump-results")]
    output: PathBuf,
    /// What random choices begin with
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Run all cases so many times, one after the other
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
}

fn case_names() -> PossibleValuesParser {
    PossibleValuesParser::new(demo::cases().map(|(name, about)| PossibleValue::new(name).help(about)))
}

fn experiment_names() -> PossibleValuesParser {
    let experiments = experiment::ALL.into_iter().map(|one| PossibleValue::new(one.name).help(one.about));
    PossibleValuesParser::new(experiments.chain([PossibleValue::new("all").help("all of them")]))
}

impl TestbedCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        match self.command {
            Command::Demo(demo) => demo.run(),
            Command::List(list) => list.run(),
            Command::Up(up) => up.run(),
            Command::Down(down) => down.run(),
            Command::Exec(exec) => match standing::exec(&exec.name, &exec.host, &exec.command)? {},
            Command::Status(status) => status.run(),
            Command::Run(run) => run.run(),
        }
    }
}

/// Does work that takes its rack down by itself when a signal asks for the end. `true` if it says that all held.
fn attended(work: impl FnOnce(&AtomicBool) -> anyhow::Result<bool> + Send + 'static) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let cancelled = Arc::new(AtomicBool::new(false));
    let held = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let flag = Arc::clone(&cancelled);
        let mut work = tokio::task::spawn_blocking(move || work(&flag));
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

impl Demo {
    fn run(self) -> Result<(), Failure> {
        let options = Options { probes: self.probes, epsilon: self.epsilon, cases: self.case };
        options.plan().map_err(|error| Failure::Usage(format!("{error:#}")))?;
        attended(move |cancelled| demo::run(&options, &self.output, cancelled))
    }
}

impl List {
    fn run(&self) -> Result<(), Failure> {
        if self.json {
            let racks: Vec<_> = stock()
                .map(|rack| json!({"name": rack.name, "about": rack.about, "rack": rack.spec.to_json()}))
                .collect();
            let experiments: Vec<_> = experiment::ALL
                .iter()
                .map(|one| {
                    let needs: Vec<&str> = one.needs.iter().map(|need| need.program).collect();
                    json!({
                        "name": one.name, "about": one.about, "figure": one.figure, "rack": one.rack, "programs": needs,
                    })
                })
                .collect();
            return print(format!("{:#}", json!({"schema_version": 1, "racks": racks, "experiments": experiments})));
        }
        let mut racks = Table::new(["rack", "what", "for"]).left(0).left(1).left(2);
        for rack in stock() {
            racks.row([rack.name, rack.spec.describe(), rack.about]);
        }
        let mut experiments = Table::new(["experiment", "paper", "rack", "what"]).left(0).left(1).left(2).left(3);
        for one in experiment::ALL {
            experiments.row([one.name, one.figure, one.rack, one.about].map(str::to_owned));
        }
        print(format!(
            "{racks}\n{experiments}\n`qjump testbed up RACK` builds one, also of a file like scripts/racks/eight.toml; \
             `qjump testbed run EXPERIMENT` builds its own."
        ))
    }
}

impl Up {
    fn run(&self) -> Result<(), Failure> {
        let rack = NamedRack::find(&self.rack).map_err(|error| Failure::Usage(format!("{error:#}")))?;
        let rack = NamedRack { name: self.name.clone().unwrap_or(rack.name), ..rack };
        standing::check_name(&rack.name).map_err(|error| Failure::Usage(format!("{error:#}")))?;
        let up = standing::up(&rack)?;
        let name = &rack.name;
        print(format!(
            "rack {name} is up: {}\n\
             try: qjump testbed exec {name} h1 -- ping -c 3 {}\n\
             and: qjump testbed status {name}; qjump testbed down {name}",
            rack.spec.describe(),
            up.address(1)
        ))
    }
}

impl Down {
    fn run(&self) -> Result<(), Failure> {
        let names = match (&self.name, self.all) {
            (Some(name), _) => vec![name.clone()],
            (None, true) => {
                remove_stale();
                standing::names()?
            }
            (None, false) => match standing::names()?.as_slice() {
                [] => return Err(Failure::Failed("no rack stands".into())),
                [one] => vec![one.clone()],
                more => {
                    return Err(Failure::Usage(format!("which one? {} stand; give one, or --all", more.join(", "))));
                }
            },
        };
        for name in names {
            let remaining = standing::down(&name)?;
            print(format!("rack {name} is down"))?;
            if !remaining.is_empty() {
                let pids: Vec<String> = remaining.iter().map(u32::to_string).collect();
                print(format!(
                    "processes go on in what were its hosts, without a network: {}; end them with kill",
                    pids.join(" ")
                ))?;
            }
        }
        Ok(())
    }
}

impl StatusArgs {
    fn run(&self) -> Result<(), Failure> {
        let names = standing::names()?;
        if let Some(name) = &self.name
            && !names.contains(name)
        {
            standing::open(name)?;
        }
        let chosen = names.iter().filter(|name| self.name.as_ref().is_none_or(|only| only == *name));
        let racks: Vec<Status> = chosen.map(|name| standing::status(name)).collect();
        if self.json {
            let racks: Vec<_> = racks.iter().map(Status::to_json).collect();
            print(format!("{:#}", json!({"schema_version": 1, "racks": racks})))?;
        } else if racks.is_empty() {
            print("no rack stands; `qjump testbed list` shows those that `qjump testbed up` can build")?;
        } else {
            for rack in &racks {
                print(show(rack))?;
            }
        }
        if racks.iter().all(Status::is_up) { Ok(()) } else { Err(Failure::DoesNotHold) }
    }
}

fn show(rack: &Status) -> String {
    let Some(named) = &rack.rack else {
        return format!("{}: {}; remove it: qjump testbed down {}", rack.name, rack.state, rack.name);
    };
    let mut table =
        Table::new(["host", "namespace", "interface", "IPv4", "IPv6", "plan", "processes"]).left(0).left(1).left(2);
    for host in &rack.hosts {
        table.row([
            host.name.clone(),
            host.namespace.clone(),
            host.interface.clone(),
            host.address.clone(),
            host.address6.clone().unwrap_or_else(|| "-".into()),
            if host.loaded { "loaded" } else { "-" }.into(),
            host.processes.to_string(),
        ]);
    }
    format!("{}: {}: {}\n{table}", rack.name, rack.state, named.spec.describe())
}

impl Run {
    fn run(self) -> Result<(), Failure> {
        let options = experiment::Options {
            rack: self.rack,
            quick: self.quick,
            output: self.output,
            seed: self.seed,
            repeat: self.repeat,
        };
        let all = self.experiments.iter().any(|name| name == "all");
        let chosen = |one: &&&'static Experiment| all || self.experiments.iter().any(|name| name == one.name);
        // All before the first: a mistake is said at once, not after minutes.
        let prepared: Vec<&'static Experiment> = experiment::ALL.iter().filter(chosen).copied().collect();
        for experiment in &prepared {
            experiment::prepare(experiment, &options).map_err(|error| Failure::Usage(format!("{error:#}")))?;
        }
        attended(move |cancelled| {
            let mut held = true;
            for experiment in prepared {
                let document = Prepared::run(&experiment::prepare(experiment, &options)?, cancelled)?;
                println!("{}", report::text(std::slice::from_ref(&document)));
                println!("Written: {}/{}.json, .html, .svg and .md\n", options.output.display(), experiment.name);
                held &= experiment::holds(&document);
            }
            Ok(held)
        })
    }
}
