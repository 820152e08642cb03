//! timely's example `barrier`, the program of the experiment `barrier`.

use crate::workspace::Workspace;
use crate::{pins, process};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The example of the pinned version, as its authors published it.
pub fn ensure(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    pins::TIMELY.ensure(workspace, works)
}

/// Whether one barrier of one worker comes to its end.
fn works(barrier: &Path) -> bool {
    process::ask(Command::new(barrier).arg("1")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_run_is_not_the_barrier() {
        assert!(!works(Path::new("/qjump/no/such/barrier")));
        assert!(!works(Path::new("/bin/false")));
    }
}
