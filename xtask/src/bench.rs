//! `cargo xtask bench`

use crate::bpf::Objects;
use crate::privilege::Root;
use crate::workspace::Workspace;
use crate::{apt, build, pins, process, say};
use anyhow::Context;
use std::ffi::OsString;
use std::fs;
use std::process::ExitCode;

/// Measure what the eBPF programs cost per packet, and how fast planner and simulator are.
///
/// The kernel runs the programs on made-up packets, and carries TCP and probes between network namespaces, which takes
/// root rights, by sudo if need be; sockperf and irtt measure the same networks as `qjump measure`. The numbers go to
/// target/bench/ebpf.json, queue.json and measure.json; those of the planner and the simulator (frames of simulated ports
/// a second) are printed, and kept by criterion in target/criterion.
#[derive(clap::Args)]
pub struct Args {
    /// Arguments for the benchmark program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    // First, because it may fail, and what follows takes minutes.
    let root = Root::find("bench")?;
    build::qjump(&workspace, Objects::ProgramAndLab)?;
    apt::ensure(&[pins::TESTBED, pins::BENCHES].concat())?;
    let folder = workspace.target("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;

    say!("running the benchmarks");
    let mut bench = build::cargo(&workspace)?;
    root.lend_to_cargo(&mut bench)?;
    bench.args(["bench", "--package", "qjump-tests", "--locked", "--bench", "ebpf", "--"]);
    let status = process::attend(bench.args(&args.arguments))?;
    let result = folder.join("ebpf.json");
    if status == ExitCode::SUCCESS && result.is_file() {
        say!("the numbers are in {}", workspace.display(&result));
    }
    if status != ExitCode::SUCCESS || !args.arguments.is_empty() {
        return Ok(status);
    }
    for name in ["queue", "measure"] {
        let mut bench = build::cargo(&workspace)?;
        root.lend_to_cargo(&mut bench)?;
        let status = process::attend(bench.args(["bench", "--package", "qjump-tests", "--locked", "--bench", name]))?;
        if status != ExitCode::SUCCESS {
            return Ok(status);
        }
    }
    let mut planner = build::cargo(&workspace)?;
    planner.args(["bench", "--package", "qjump", "--locked", "--bench", "planner", "--", "--quiet"]);
    process::attend(&mut planner)
}
