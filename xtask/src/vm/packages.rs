//! Debian packages that are fetched into the build folder and unpacked there, and never installed.

use crate::pins::DEBIAN_KEYS;
use crate::process;
use anyhow::{Context, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where kernels come from: each suite has some of the series.
const SOURCES: &[(&str, &str)] = &[
    ("http://deb.debian.org/debian-security", "bullseye-security"),
    ("http://deb.debian.org/debian-security", "bookworm-security"),
    ("http://deb.debian.org/debian", "trixie-backports"),
];

/// A private state of apt: its sources and lists lie in the build folder, the machine's own stay untouched.
#[derive(Debug)]
pub struct Mirror {
    folder: PathBuf,
}

impl Mirror {
    /// A mirror whose state lies in `folder`.
    pub fn new(folder: PathBuf) -> anyhow::Result<Self> {
        for part in ["lists/partial", "archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let sources: String =
            SOURCES.iter().map(|(uri, suite)| format!("deb [signed-by={DEBIAN_KEYS}] {uri} {suite} main\n")).collect();
        fs::write(folder.join("sources.list"), sources)?;
        // Nothing is installed, as far as this state knows.
        fs::write(folder.join("status"), "")?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let place = |file: &str| self.folder.join(file).display().to_string();
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::State", place("")),
            ("Dir::State::status", place("status")),
            ("Dir::State::lists", place("lists")),
            ("Dir::Cache", place("")),
            ("Dir::Cache::archives", place("archives")),
            ("Dir::Etc::sourcelist", place("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            // The build folder may be out of reach for apt's own user.
            ("APT::Sandbox::User", "root".into()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command
    }

    /// Fetches the lists of packages.
    pub fn update(&self) -> Result<(), String> {
        process::ask(self.command("apt-get").args(["update", "--quiet", "--error-on=any"])).map(drop)
    }

    /// The names of all packages that begin like this.
    pub fn names(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let names = process::ask(self.command("apt-cache").args(["pkgnames", prefix])).map_err(anyhow::Error::msg)?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Fetches these packages and unpacks them into `folder`. Apt checks their sums, so a truncated one is refused.
    pub fn unpack(&self, packages: &[String], folder: &Path) -> Result<(), String> {
        unpack(&mut self.command("apt-get"), packages, folder)
    }
}

/// Fetches packages of the machine's own suites, with all that they need and the machine lacks, and unpacks them.
/// They are not installed: that could ask for the removal of others, and takes rights.
pub fn unpack_with_dependencies(package: &str, folder: &Path) -> anyhow::Result<()> {
    let plan =
        process::ask(Command::new("apt-get").args(["install", "--simulate", "--no-install-recommends", package]))
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("apt knows no way to get {package}; `sudo apt-get update` may help"))?;
    let packages = to_be_installed(&plan);
    if packages.is_empty() {
        bail!(
            "{package} is installed, but its programs are not where they should be; `sudo apt-get install --reinstall {package}`"
        );
    }
    unpack(&mut Command::new("apt-get"), &packages, folder).map_err(anyhow::Error::msg)
}

/// The packages that `apt-get --simulate` would install.
fn to_be_installed(plan: &str) -> Vec<String> {
    let lines = plan.lines().filter_map(|line| line.strip_prefix("Inst "));
    lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

fn unpack(apt_get: &mut Command, packages: &[String], folder: &Path) -> Result<(), String> {
    let text = |error: std::io::Error| format!("cannot write to {}: {error}", folder.display());
    let archives = folder.join("archives");
    fs::create_dir_all(&archives).map_err(text)?;
    process::ask(apt_get.current_dir(&archives).args(["download", "--quiet"]).args(packages))?;
    for entry in fs::read_dir(&archives).map_err(text)? {
        let archive = entry.map_err(text)?.path();
        process::ask(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder))?;
    }
    fs::remove_dir_all(&archives).map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulation_names_what_is_missing() {
        let plan = "Reading package lists...\nInst seabios (1.16 Debian [all])\nRemv qemu-utils [1]\n\
                    Inst qemu-system-x86 [1:7.2] (1:7.2+dfsg Debian [amd64])\nConf seabios (1.16)\n";
        assert_eq!(to_be_installed(plan), ["seabios", "qemu-system-x86"]);
    }
}
