//! `cargo xtask dist`

mod deb;
mod tree;

use crate::bpf::Objects;
use crate::workspace::Workspace;
use crate::{apt, build, pins, process, say};
use anyhow::Context;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// Make packages: a .deb and a tarball, in target/dist.
///
/// Both have the command, the library for LD_PRELOAD, the systemd unit, manual pages, shell completions and the schema of the
/// configuration. The same sources on the same system give the same bytes: times are those of the commit, or of
/// SOURCE_DATE_EPOCH.
#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    build::qjump(&workspace, Objects::Program)?;
    for package in make(&workspace)? {
        say!("made {}", workspace.display(&package));
    }
    Ok(ExitCode::SUCCESS)
}

/// What packages are called after, and how.
pub struct Release {
    /// The version of the workspace.
    pub version: &'static str,
    /// What Debian calls the machine.
    pub architecture: &'static str,
    /// Where Debian keeps its libraries: the GNU triplet.
    pub multiarch: String,
    /// Seconds since 1970 that files are dated with.
    pub epoch: u64,
}

impl Release {
    fn find(workspace: &Workspace) -> Self {
        let given = std::env::var("SOURCE_DATE_EPOCH").ok();
        let commit =
            || process::ask(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace.root())).ok();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            architecture: debian_architecture(std::env::consts::ARCH),
            multiarch: format!("{}-linux-gnu", std::env::consts::ARCH),
            // A tree without a history is as old as time.
            epoch: given.or_else(commit).and_then(|text| text.trim().parse().ok()).unwrap_or(0),
        }
    }
}

fn debian_architecture(rust: &'static str) -> &'static str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Makes the packages of what has been built: their paths.
pub fn make(workspace: &Workspace) -> anyhow::Result<Vec<PathBuf>> {
    apt::ensure(pins::PACKAGING)?;
    let release = Release::find(workspace);
    let folder = workspace.target("dist");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot clear {}", folder.display()))?;
    }
    let name = format!("qjump-{}", release.version);
    let files = folder.join(&name);
    tree::lay(workspace, &release, &files)?;

    let tarball = folder.join(format!("{name}-{}.tar.gz", release.multiarch));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).args(["--use-compress-program", "gzip -9n", "--file"]).arg(&tarball);
    process::run(tar.arg("--directory").arg(&folder).arg(&name))?;

    let deb = folder.join(format!("qjump_{}_{}.deb", release.version, release.architecture));
    deb::build(workspace, &release, &files, &deb)?;
    fs::remove_dir_all(&files)?;
    Ok(vec![deb, tarball])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_the_names_that_debian_gives_them() {
        assert_eq!(["x86_64", "aarch64", "riscv64"].map(debian_architecture), ["amd64", "arm64", "riscv64"]);
    }
}
