//! `cargo xtask`: builds, tests, measures and shows qjump, and finds or installs what that needs.
//!
//! One module a verb; the other modules are what the verbs share. Every version and package name that
//! they rely on stands in [`pins`].

mod apt;
mod barrier;
mod bench;
mod bpf;
mod build;
mod demo;
mod dist;
mod linker;
mod pins;
mod privilege;
mod process;
mod test;
mod toolchain;
mod tools;
mod vm;
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
    Vm(vm::Args),
    Dist(dist::Args),
}

fn main() -> ExitCode {
    let task = match Task::try_parse() {
        Ok(task) => task,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(usage_status(&error));
        }
    };
    let result = match task {
        Task::Build(args) => build::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Vm(args) => vm::run(&args),
        Task::Dist(args) => dist::run(&args),
    };
    result.unwrap_or_else(|error| {
        say!("{error:#}");
        ExitCode::FAILURE
    })
}

/// 64 for wrong usage, as the qjump command has it; 0 for help that was asked for.
fn usage_status(error: &clap::Error) -> u8 {
    if error.use_stderr() { 64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_task_is_wrong_usage_and_asking_for_help_is_not() {
        let status = |arguments: &[&str]| Task::try_parse_from(arguments).err().map(|error| usage_status(&error));
        assert_eq!(status(&["cargo xtask"]), Some(64));
        assert_eq!(status(&["cargo xtask", "tset"]), Some(64));
        assert_eq!(status(&["cargo xtask", "--help"]), Some(0));
        assert_eq!(status(&["cargo xtask", "build"]), None);
    }
}
