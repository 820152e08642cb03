//! bpf-linker, which makes an eBPF object of what the compiler emits.

use crate::workspace::Workspace;
use crate::{pins, process};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The linker of the pinned version.
pub fn ensure(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    pins::BPF_LINKER.ensure(workspace, works)
}

/// Whether the linker runs and is the pinned one.
fn works(linker: &Path) -> bool {
    process::ask(Command::new(linker).arg("--version")).is_ok_and(|answer| is_pinned(&answer))
}

fn is_pinned(answer: &str) -> bool {
    answer.split_whitespace().last() == Some(pins::BPF_LINKER.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_not_the_linker() {
        assert!(is_pinned(&format!("bpf-linker {}\n", pins::BPF_LINKER.version)));
        assert!(!is_pinned("bpf-linker 0.9.13\n"));
        assert!(!is_pinned(""));
    }

    #[test]
    fn what_does_not_run_is_not_the_linker() {
        assert!(!works(Path::new("/qjump/no/such/linker")));
        assert!(!works(Path::new("/bin/false")));
    }
}
