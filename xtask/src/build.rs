//! `cargo xtask build`

use crate::bpf::{self, Objects};
use crate::workspace::Workspace;
use crate::{process, say};
use std::process::{Command, ExitCode};

/// Build the eBPF programs, the qjump command that carries them, and the library for LD_PRELOAD.
///
/// The results are target/release/qjump, one file that needs nothing beside it, and target/release/libqjump_preload.so.
/// The eBPF programs lie next to them in target/bpf.
///
/// They are compiled with a rustup nightly that has rust-src, or else with Debian's rustc-web, which is installed when
/// it is missing. With QJUMP_BPF_OBJECT=/path/to/qjump.o no compiler is needed: that object is built in.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    qjump(&workspace, Objects::Program)?;
    for result in [workspace.binary(), workspace.preload()] {
        say!("built {}", workspace.display(&result));
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the objects and then the command and the library; the other tasks begin with this.
pub fn qjump(workspace: &Workspace, objects: Objects) -> anyhow::Result<()> {
    bpf::build(workspace, objects)?;
    say!("building the qjump command");
    let packages = ["--package", "qjump", "--package", "qjump-preload"];
    process::run(cargo(workspace)?.args(["build", "--release", "--locked"]).args(packages))
}

/// Cargo for the crates of this machine. It tells them, and the tests that it runs, where the results lie.
pub fn cargo(workspace: &Workspace) -> anyhow::Result<Command> {
    let mut cargo = workspace.cargo();
    if let Some(object) = bpf::prebuilt()? {
        cargo.env(bpf::PREBUILT, object);
    }
    cargo.env("QJUMP_BIN", workspace.binary());
    cargo.env("QJUMP_LAB_OBJECT", workspace.lab_object());
    Ok(cargo)
}
