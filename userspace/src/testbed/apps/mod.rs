//! Applications of the experiments that Debian does not have, and what it takes to read those that it has.

pub mod commit;
pub mod ptpd;
pub mod timely;
pub mod watch;

use std::path::{Path, PathBuf};

/// A file of this process for a program that wants one, removed with this value.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A place for such a file. Nothing is there yet.
    pub fn new(role: &str) -> Self {
        Self(std::env::temp_dir().join(format!("qjump-{}-{role}", std::process::id())))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
