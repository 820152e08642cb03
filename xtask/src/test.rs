//! `cargo xtask test`

use crate::bpf::Objects;
use crate::privilege::Root;
use crate::workspace::Workspace;
use crate::{apt, barrier, build, dist, pins, process, say};
use std::ffi::OsString;
use std::process::ExitCode;

/// Run all tests: those of each crate, then those that drive real kernels and network namespaces.
///
/// The former run as you; the latter need root rights and take them by sudo if need be. What they need is built and
/// installed first.
///
/// Plain `cargo test` runs the former alone.
#[derive(clap::Args)]
pub struct Args {
    /// Arguments for the test programs: part of a test's name, or options such as --nocapture
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    // First, because it may fail, and what follows takes minutes.
    let root = Root::find("test")?;
    build::qjump(&workspace, Objects::ProgramAndLab)?;
    apt::ensure(&[pins::TESTBED, pins::TESTS].concat())?;
    let barrier = barrier::ensure(&workspace)?;
    let packages = dist::make(&workspace)?;

    say!("tests without root rights");
    let mut unit = build::cargo(&workspace)?;
    unit.args(["test", "--workspace", "--exclude", "qjump-tests", "--locked", "--"]).args(&args.arguments);
    let status = process::attend(&mut unit)?;
    if status != ExitCode::SUCCESS {
        return Ok(status);
    }

    say!("tests with root rights");
    let mut integration = build::cargo(&workspace)?;
    integration.env("QJUMP_BARRIER", barrier);
    integration.env("QJUMP_DEB", &packages[0]);
    root.lend_to_cargo(&mut integration)?;
    // The release profile, so that they share what was built with the command. One at a time: they measure.
    integration.args(["test", "--package", "qjump-tests", "--locked", "--release", "--", "--test-threads=1"]);
    process::attend(integration.args(&args.arguments))
}
