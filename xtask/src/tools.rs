//! Programs from crates.io, each of a pinned version, in the build folder: what a person has in the home folder is
//! neither used nor changed.

use crate::workspace::Workspace;
use crate::{process, say};
use anyhow::{Context, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// A program that cargo can install.
#[derive(Clone, Copy, Debug)]
pub struct Tool {
    /// The crate that it is in.
    pub package: &'static str,
    /// The version of that crate.
    pub version: &'static str,
    /// The program, if it is an example of the crate and not its command of the same name.
    pub example: Option<&'static str>,
    /// How long the installation takes, for people.
    pub takes: &'static str,
}

impl Tool {
    /// The program, installed when it does not work yet. Only running it tells: an installation that was interrupted
    /// leaves a folder too.
    pub fn ensure(&self, workspace: &Workspace, works: impl Fn(&Path) -> bool) -> anyhow::Result<PathBuf> {
        let Self { package, version, .. } = *self;
        let root = workspace.target(&format!("tools/{package}-{version}"));
        let program = root.join("bin").join(self.example.unwrap_or(package));
        if works(&program) {
            return Ok(program);
        }
        say!("installing {package} {version} into {}: about {}, this once", workspace.display(&root), self.takes);
        // Not a folder that cargo would delete on interrupt: the next run goes on where this one stopped.
        let scratch = workspace.target(&format!("tools/{package}-build"));
        let mut install = workspace.cargo();
        install.args(["install", package, "--version", version, "--locked", "--force", "--root"]).arg(&root);
        install.args(self.example.iter().flat_map(|example| ["--example", example]));
        install.env("CARGO_TARGET_DIR", &scratch);
        process::run(&mut install)
            .with_context(|| format!("cannot install {package}, which needs crates.io and a C compiler"))?;
        if !works(&program) {
            bail!("{} was just installed and does not run", program.display());
        }
        if let Err(error) = fs::remove_dir_all(&scratch) {
            say!("cannot remove {}: {error}", workspace.display(&scratch));
        }
        Ok(program)
    }
}
