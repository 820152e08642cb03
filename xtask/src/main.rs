//! `cargo xtask`: builds, tests, measures and shows qjump, and finds or installs what that needs.
//!
//! One module a verb; the other modules are what the verbs share. Every version and package name that
//! they rely on stands in [`pins`].

mod apt;
mod bench;
mod bpf;
mod build;
mod demo;
mod linker;
mod pins;
mod privilege;
mod process;
mod test;
mod toolchain;
mod workspace;

use clap::Parser;
use std::process::ExitCode;

/// Build, test, measure and try out qjump.
///
/// Everything that a task needs and the machine lacks is found or installed by the task itself: the
/// compiler for the eBPF programs, their linker, and the Debian packages that the tests use. What was
/// built or installed once is used again, so only the first run takes minutes.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
enum Task {
    Build(build::Args),
    Demo(demo::Args),
    Test(test::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let task = match Task::try_parse() {
        Ok(task) => task,
        Err(error) => {
            let _ = error.print();
            // 64 for wrong usage, as the qjump command has it.
            return if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let result = match task {
        Task::Build(args) => build::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
    };
    result.unwrap_or_else(|error| {
        say!("{error:#}");
        ExitCode::FAILURE
    })
}
