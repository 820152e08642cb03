//! `cargo xtask demo`

use crate::bpf::Objects;
use crate::privilege::Root;
use crate::workspace::Workspace;
use crate::{apt, build, pins, process, say};
use anyhow::Context;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::process::ExitCode;

/// Show qjump at work in a network of namespaces on this machine.
///
/// Builds qjump, installs iproute2 and iperf3 if they are missing, and runs `qjump testbed demo`, as root by sudo if
/// need be. The results go to target/demo. Nothing outside the namespaces is changed, and Ctrl-C takes them down.
#[derive(clap::Args)]
pub struct Args {
    /// More arguments for `qjump testbed demo`; `-- --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    // First, because it may fail, and what follows takes minutes.
    let root = Root::find("demo")?;
    build::qjump(&workspace, Objects::Program)?;
    apt::ensure(pins::TESTBED)?;
    let mut demo = root.command(workspace.binary());
    demo.args(["testbed", "demo"]);
    if !names_output(&args.arguments) {
        let output = workspace.target("demo");
        // Made here, so that it belongs to the user and not to root.
        fs::create_dir_all(&output).with_context(|| format!("cannot make {}", output.display()))?;
        demo.arg("--output").arg(output);
    }
    say!("running the demo");
    process::attend(demo.args(&args.arguments))
}

/// Whether the user says where the results go.
fn names_output(arguments: &[OsString]) -> bool {
    let is_output = |argument: &OsString| {
        argument == OsStr::new("--output") || argument.to_str().is_some_and(|text| text.starts_with("--output="))
    };
    arguments.iter().any(is_output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_may_choose_the_output() {
        let names = |arguments: &[&str]| names_output(&arguments.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(names(&["--output", "/tmp/demo"]));
        assert!(names(&["--hosts", "4", "--output=/tmp/demo"]));
        assert!(!names(&["--hosts", "4"]));
    }
}
