//! Debian packages: installs those that a task needs and the machine lacks.

use crate::{privilege, process, say};
use anyhow::{Context, bail};
use std::path::{Path, PathBuf};

/// A Debian package, and how to see that it is installed.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// A program that it brings, or a path when it holds a slash.
    pub provides: &'static str,
    /// What Debian calls it.
    pub name: &'static str,
}

/// Installs what is missing. Does nothing, and needs no rights, when nothing is.
pub fn ensure(packages: &[Package]) -> anyhow::Result<()> {
    let missing = missing(packages, present);
    if missing.is_empty() {
        return Ok(());
    }
    let remedy = remedy(&missing);
    if !on_path("apt-get") {
        bail!(
            "these are not installed, and there is no apt-get here to install them with: {}\n\
             remedy: install them with this system's package manager (on Debian: `{remedy}`)",
            missing.join(", ")
        );
    }
    let apt_get = || {
        let mut command = privilege::unasked("apt-get")?;
        command.env("DEBIAN_FRONTEND", "noninteractive");
        Some(command)
    };
    let (Some(mut update), Some(mut install)) = (apt_get(), apt_get()) else {
        bail!(
            "these packages are not installed, and installing them takes root rights: {}\nremedy: `{remedy}`",
            missing.join(", ")
        );
    };
    say!("installing Debian packages: {}", missing.join(", "));
    // One broken source among many must not stop us: whether the packages can be had, the next step tells.
    if let Err(error) = process::run(update.args(["update", "--quiet"])) {
        say!("{error}; going on with the package lists as they are");
    }
    // What a task needs is no reason to remove what the machine's owner installed: in conflict, apt-get gives up.
    install.args(["install", "--yes", "--quiet", "--no-install-recommends", "--no-remove"]).args(&missing);
    process::run(&mut install).with_context(|| format!("cannot install {}; by hand: `{remedy}`", missing.join(", ")))
}

/// The command that installs the packages by hand, to be told to a person.
pub fn remedy(packages: &[&str]) -> String {
    format!("sudo apt-get update && sudo apt-get install {}", packages.join(" "))
}

/// Whether a program is there to be called.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The names of the packages that are not there, each once.
fn missing(packages: &[Package], present: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let mut names = Vec::new();
    for package in packages {
        if !present(package.provides) && !names.contains(&package.name) {
            names.push(package.name);
        }
    }
    names
}

/// Whether what a package provides is there. Debian keeps the system folders out of a user's PATH, but root, who
/// will call the programs, has them.
fn present(provides: &str) -> bool {
    if provides.contains('/') {
        return Path::new(provides).exists();
    }
    let system = ["/usr/sbin", "/sbin"].map(|folder| PathBuf::from(folder).join(provides));
    on_path(provides) || system.iter().any(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: &[Package] = &[
        Package { provides: "ip", name: "iproute2" },
        Package { provides: "tc", name: "iproute2" },
        Package { provides: "/usr/lib/core", name: "core" },
    ];

    #[test]
    fn only_missing_packages_are_named_and_only_once() {
        assert_eq!(missing(PACKAGES, |_| true), [""; 0]);
        assert_eq!(missing(PACKAGES, |_| false), ["iproute2", "core"]);
        assert_eq!(missing(PACKAGES, |provides| provides != "tc"), ["iproute2"]);
    }

    #[test]
    fn programs_are_looked_up_and_paths_are_taken_as_they_are() {
        assert!(present("sh"));
        assert!(present("/bin/sh"));
        assert!(!present("qjump-no-such-program"));
        assert!(!present("/qjump/no/such/folder"));
    }

    #[test]
    fn nothing_to_install_needs_no_rights() {
        ensure(&[Package { provides: "sh", name: "dash" }]).unwrap();
    }
}
