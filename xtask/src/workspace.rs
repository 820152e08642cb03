//! Where things lie in the source tree, and how cargo is called in it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The source tree and its build folder. All paths are absolute: the children of xtask run in other folders.
pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// Finds the tree that this xtask belongs to, whatever folder it was called in.
    pub fn find() -> Self {
        // Cargo sets the variable for `cargo run`; the compiled-in value serves a direct call of the binary.
        let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).parent().expect("xtask is a folder of the workspace").to_owned();
        Self { root }
    }

    /// The folder with the workspace.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the build folder.
    pub fn target(&self, path: &str) -> PathBuf {
        self.root.join("target").join(path)
    }

    /// The eBPF programs that qjump carries.
    pub fn program_object(&self) -> PathBuf {
        self.target("bpf/qjump.o")
    }

    /// The same for kernels without a compare-exchange.
    pub fn old_object(&self) -> PathBuf {
        self.target("bpf/qjump-old.o")
    }

    /// The eBPF programs for tests and benchmarks only.
    pub fn lab_object(&self) -> PathBuf {
        self.target("bpf/lab.o")
    }

    /// The qjump command itself.
    pub fn binary(&self) -> PathBuf {
        self.target("release/qjump")
    }

    /// The library for LD_PRELOAD. It lies beside the command, where the tests look for it.
    pub fn preload(&self) -> PathBuf {
        self.target("release/libqjump_preload.so")
    }

    /// Cargo, called in this tree, for this machine.
    ///
    /// The folders of the results are known to the tests and to userspace/build.rs, so settings that would move
    /// them elsewhere do not count here.
    pub fn cargo(&self) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        self.settle(&mut cargo);
        cargo
    }

    /// Makes a command run in this tree and, when it calls cargo, build into this tree's build folder.
    pub fn settle(&self, command: &mut Command) {
        command
            .current_dir(&self.root)
            .env("CARGO_TARGET_DIR", self.root.join("target"))
            .env_remove("CARGO_BUILD_TARGET_DIR")
            .env_remove("CARGO_BUILD_TARGET");
        // What `cargo xtask` was told of the package xtask: build scripts that ask for it (ring's) would run again after each call
        // of cargo from a shell, and all that depends on them.
        let of_xtask = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(of_xtask)) {
            command.env_remove(name);
        }
    }

    /// How a path reads in a message: short when it lies in this tree.
    pub fn display<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_the_folder_with_the_workspace() {
        assert!(Workspace::find().root.join("Cargo.lock").is_file());
    }

    #[test]
    fn paths_are_shown_from_the_root_on() {
        let workspace = Workspace { root: "/somewhere/qjump".into() };
        assert_eq!(workspace.display(&workspace.lab_object()).to_string(), "target/bpf/lab.o");
        assert_eq!(workspace.display(Path::new("/usr/bin/rustc")).to_string(), "/usr/bin/rustc");
    }
}
