//! The `qjump` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    qjump::cli::run(std::env::args_os())
}
