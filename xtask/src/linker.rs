//! bpf-linker, which makes an eBPF object of what the compiler emits.

use crate::workspace::Workspace;
use crate::{pins, process, say};
use anyhow::{Context, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The linker of the pinned version, installed into the build folder when it is not there: what a person has in the
/// home folder is neither used nor changed.
pub fn ensure(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    let root = workspace.target(&format!("tools/bpf-linker-{}", pins::BPF_LINKER));
    let linker = root.join("bin/bpf-linker");
    if works(&linker) {
        return Ok(linker);
    }
    say!("installing bpf-linker {} into {}: about 90 seconds, this once", pins::BPF_LINKER, workspace.display(&root));
    // Not a folder that cargo would delete on interrupt: the next run goes on where this one stopped.
    let scratch = workspace.target("tools/bpf-linker-build");
    let mut install = workspace.cargo();
    install
        .args(["install", "bpf-linker", "--version", pins::BPF_LINKER, "--locked", "--force", "--root"])
        .arg(&root)
        .env("CARGO_TARGET_DIR", &scratch);
    process::run(&mut install).context("cannot install bpf-linker, which needs crates.io and a C compiler")?;
    if !works(&linker) {
        bail!("{} was just installed and does not run", linker.display());
    }
    if let Err(error) = fs::remove_dir_all(&scratch) {
        say!("cannot remove {}: {error}", workspace.display(&scratch));
    }
    Ok(linker)
}

/// Whether the linker runs and is the pinned one. Asking it is the only sure sign: an installation that was
/// interrupted leaves a folder too.
fn works(linker: &Path) -> bool {
    process::ask(Command::new(linker).arg("--version")).is_ok_and(|answer| is_pinned(&answer))
}

fn is_pinned(answer: &str) -> bool {
    answer.split_whitespace().last() == Some(pins::BPF_LINKER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_not_the_linker() {
        assert!(is_pinned(&format!("bpf-linker {}\n", pins::BPF_LINKER)));
        assert!(!is_pinned("bpf-linker 0.9.13\n"));
        assert!(!is_pinned(""));
    }

    #[test]
    fn what_does_not_run_is_not_the_linker() {
        assert!(!works(Path::new("/qjump/no/such/linker")));
        assert!(!works(Path::new("/bin/false")));
    }
}
