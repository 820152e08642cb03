//! The command line: one module a verb.

mod agent;
mod assign;
mod check;
mod completions;
mod confirm;
mod doctor;
mod interrupt;
mod load;
mod measure;
mod plan;
mod report;
mod run;
mod sim;
mod status;
mod switch_config;
mod tag;
mod testbed;
mod top;

use std::{ffi::OsString, io, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};

/// Bounded network latency for small messages: limits what each priority level may send, marks every
/// packet with its level, and computes the bound that follows.
#[derive(Parser)]
#[command(name = "qjump", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Plan(plan::PlanCommand),
    Sim(Box<sim::SimCommand>),
    Check(Box<check::CheckCommand>),
    Load(load::LoadCommand),
    Confirm(confirm::ConfirmCommand),
    Unload(load::UnloadCommand),
    Agent(agent::AgentCommand),
    Reload(agent::ReloadCommand),
    Drain(agent::DrainCommand),
    Status(status::StatusCommand),
    Top(top::TopCommand),
    Doctor(doctor::DoctorCommand),
    Run(run::RunCommand),
    Tag(tag::TagCommand),
    Untag(tag::UntagCommand),
    Tags(tag::TagsCommand),
    Assign(assign::AssignCommand),
    Measure(measure::MeasureCommand),
    Testbed(testbed::TestbedCommand),
    Report(report::ReportCommand),
    SwitchConfig(switch_config::SwitchConfigCommand),
    Completions(completions::CompletionsCommand),
    Man(completions::ManCommand),
    Schema(completions::SchemaCommand),
}

/// How a command failed; each kind has its exit status.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The request is wrong, whatever the state of the host: 64 (EX_USAGE).
    Usage(String),
    /// It could not be done: 1.
    Failed(String),
    /// A check or an assertion did not hold: 2. It has been reported already.
    DoesNotHold,
    /// A program that was run in its place has ended with this status.
    Status(u8),
}

impl From<crate::dataplane::Error> for Failure {
    fn from(error: crate::dataplane::Error) -> Self {
        if error.is_usage() { Self::Usage(error.to_string()) } else { Self::Failed(error.to_string()) }
    }
}

impl From<crate::tag::Error> for Failure {
    fn from(error: crate::tag::Error) -> Self {
        if error.is_usage() { Self::Usage(error.to_string()) } else { Self::Failed(error.to_string()) }
    }
}

impl From<crate::report::Unusable> for Failure {
    fn from(error: crate::report::Unusable) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(format!("{error:#}"))
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // Whoever read our output has seen enough (`qjump status | head`).
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(0)
        }
        Self::Failed(error.to_string())
    }
}

/// Runs the command with these arguments; exit status 0 done, 1 failed, 2 a check did not hold, 64 usage
/// or configuration.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let result = match cli.command {
        Command::Plan(command) => command.run(),
        Command::Sim(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Load(command) => command.run(),
        Command::Confirm(command) => command.run(),
        Command::Unload(command) => command.run(),
        Command::Agent(command) => command.run(),
        Command::Reload(command) => command.run(),
        Command::Drain(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Top(command) => command.run(),
        Command::Doctor(command) => command.run(),
        Command::Run(command) => command.run(),
        Command::Tag(command) => command.run(),
        Command::Untag(command) => command.run(),
        Command::Tags(command) => command.run(),
        Command::Assign(command) => command.run(),
        Command::Measure(command) => command.run(),
        Command::Testbed(command) => command.run(),
        Command::Report(command) => command.run(),
        Command::SwitchConfig(command) => command.run(),
        Command::Completions(command) => command.run(Cli::command()),
        Command::Man(command) => command.run(Cli::command()),
        Command::Schema(command) => command.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => fail(&message, 64),
        Err(Failure::Failed(message)) => fail(&message, 1),
        Err(Failure::DoesNotHold) => ExitCode::from(2),
        Err(Failure::Status(status)) => ExitCode::from(status),
    }
}

fn fail(message: &str, status: u8) -> ExitCode {
    eprintln!("qjump: {message}");
    ExitCode::from(status)
}

/// Prints to standard output; a reader that has gone away ends the program quietly.
pub(crate) fn print(text: impl std::fmt::Display) -> Result<(), Failure> {
    use io::Write as _;
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}
