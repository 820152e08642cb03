//! The compiler of the eBPF programs: they need one that knows a target without `std`, which stable Rust does not
//! ship. The first of these that works is taken:
//!
//! 1. a nightly of rustup's with `rust-src`: it builds `core` itself;
//! 2. Debian's `rustc-web` with `core` for BPF as a package, installed when that can be done without asking.
//!
//! A prebuilt object replaces the compiler altogether: see [`crate::bpf`]. rustup is only asked what it has, never
//! to install: a nightly is the user's own, and downloading one is not a build step.

use crate::bpf::PREBUILT;
use crate::workspace::Workspace;
use crate::{apt, pins, process, say};
use anyhow::{Context, bail};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A compiler that makes eBPF objects here.
pub enum Compiler {
    /// A rustup toolchain with `rust-src`, by name.
    Rustup { toolchain: &'static str, version: Version },
    /// Debian's.
    Debian { version: Version },
}

/// A way that does not work here, why, and the command that would change it.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    way: &'static str,
    reason: String,
    remedy: String,
}

impl Compiler {
    /// The first compiler that works, or an error with all that was tried. `replaceable` says whether the task could
    /// do with a prebuilt object instead.
    pub fn find(replaceable: bool) -> anyhow::Result<Self> {
        let rustup = match rustup() {
            Ok(compiler) => return Ok(compiler),
            Err(refusal) => refusal,
        };
        say!("not {}: {}", rustup.way, rustup.reason);
        let debian = match debian() {
            Ok(compiler) => return Ok(compiler),
            Err(refusal) => refusal,
        };
        let mut refusals = vec![rustup, debian];
        if replaceable {
            refusals.push(Refusal {
                way: "a prebuilt object instead of a compiler",
                reason: format!("{PREBUILT} is not set"),
                remedy: format!("{PREBUILT}=/path/to/qjump.o cargo xtask build"),
            });
        }
        bail!(no_compiler(&refusals))
    }

    /// `cargo build` with this compiler, set to link with `linker`.
    pub fn cargo(&self, workspace: &Workspace, linker: &Path) -> anyhow::Result<Command> {
        let mut cargo;
        match self {
            Self::Rustup { toolchain, .. } => {
                // The nightly's own cargo, for -Z is for nightlies.
                cargo = Command::new("rustup");
                workspace.settle(&mut cargo);
                cargo.args(["run", toolchain, "cargo", "build", "-Zbuild-std=core"]).env("RUSTUP_AUTO_INSTALL", "0");
                // rustup and cargo put the compiler's own folder here, and the linker finds its LLVM there.
                cargo.env_remove("LD_LIBRARY_PATH").env_remove("RUSTC");
            }
            Self::Debian { version } => {
                cargo = workspace.cargo();
                cargo.arg("build").env("RUSTC", pins::DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
                cargo.env("LD_LIBRARY_PATH", debian_llvm(version, &workspace.target("tools"))?);
            }
        }
        for (name, _) in std::env::vars_os() {
            if hurts(&name) {
                cargo.env_remove(name);
            }
        }
        // Empty, and not unset, overrides a wrapper from the user's configuration: it is meant for another compiler.
        cargo.env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
        // Encoded, so that the path of the linker may hold spaces.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", encoded_flags(linker));
        Ok(cargo)
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rustup { toolchain, version } => write!(f, "rustup's {toolchain}, rustc {}", version.release),
            Self::Debian { version } => write!(f, "Debian's rustc-web {}", version.release),
        }
    }
}

/// The one message for a machine without a compiler: each way, why it fails, and what to type.
fn no_compiler(refusals: &[Refusal]) -> String {
    let mut message = String::from("there is no compiler for the eBPF programs; one of these ways is enough:");
    for (number, Refusal { way, reason, remedy }) in (1..).zip(refusals) {
        message += &format!("\n  {number}. {way}\n     now:    {reason}\n     remedy: {remedy}");
    }
    message
}

fn rustup() -> Result<Compiler, Refusal> {
    let way = "a rustup nightly with the sources of core (rust-src)";
    let install = format!("rustup toolchain install {} --profile minimal --component rust-src", pins::NIGHTLY);
    if !apt::on_path("rustup") {
        let reason = "rustup is not installed".into();
        return Err(Refusal { way, reason, remedy: format!("install rustup (https://rustup.rs), then: {install}") });
    }
    let mut first = None;
    for &toolchain in pins::NIGHTLIES {
        match probe_nightly(toolchain) {
            Ok(version) => return Ok(Compiler::Rustup { toolchain, version }),
            // The most helpful reason is that of a toolchain which is there and lacks something.
            Err((Lack::Toolchain, reason)) => {
                first.get_or_insert((reason, install.clone()));
            }
            Err((Lack::Source, reason)) => {
                first = Some((reason, format!("rustup component add rust-src --toolchain {toolchain}")));
            }
            Err((Lack::Fit, reason)) => first = Some((reason, install.clone())),
        }
    }
    let (reason, remedy) = first.expect("at least one nightly is looked for");
    Err(Refusal { way, reason, remedy })
}

/// What keeps a nightly from being used.
enum Lack {
    Toolchain,
    Source,
    Fit,
}

fn probe_nightly(toolchain: &str) -> Result<Version, (Lack, String)> {
    let rustc = |arguments: &[&str]| {
        let mut command = Command::new("rustup");
        command.args(["run", toolchain, "rustc"]).args(arguments).env("RUSTUP_AUTO_INSTALL", "0");
        process::ask(&mut command).map_err(|reason| (Lack::Toolchain, reason))
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    let version = Version::parse(&rustc(&["-vV"])?).map_err(|reason| (Lack::Fit, format!("{toolchain}: {reason}")))?;
    version.fits().map_err(|reason| (Lack::Fit, format!("{toolchain}: {reason}")))?;
    if !Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file() {
        return Err((Lack::Source, format!("the toolchain {toolchain} is installed without rust-src")));
    }
    Ok(version)
}

fn debian() -> Result<Compiler, Refusal> {
    let refuse = |reason: String| {
        let names: Vec<_> = pins::DEBIAN_COMPILER.iter().map(|package| package.name).collect();
        Refusal { way: "Debian's compiler", reason, remedy: apt::remedy(&names) }
    };
    apt::ensure(pins::DEBIAN_COMPILER).map_err(|error| {
        let reason = format!("{error:#}");
        refuse(reason.lines().next().unwrap_or_default().to_owned())
    })?;
    let version = process::ask(Command::new(pins::DEBIAN_RUSTC).arg("-vV")).map_err(refuse)?;
    let version = Version::parse(&version).map_err(refuse)?;
    version.fits().map_err(refuse)?;
    compile_nothing().map_err(refuse)?;
    Ok(Compiler::Debian { version })
}

/// Compiles an empty crate for BPF. It shows that compiler and `core` belong together, which the mere presence of
/// both does not: they may be of different versions, or the compiler not Debian's `rustc-web`.
fn compile_nothing() -> Result<(), String> {
    let run = || -> std::io::Result<std::process::Output> {
        let mut rustc = Command::new(pins::DEBIAN_RUSTC)
            .args(["--target", pins::BPF_TARGET, "--crate-type=lib", "--crate-name=probe", "--emit=metadata=-", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        rustc.stdin.take().expect("stdin is piped").write_all(b"#![no_std]")?;
        rustc.wait_with_output()
    };
    let output = run().map_err(|error| format!("cannot run {}: {error}", pins::DEBIAN_RUSTC))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let first = complaint.lines().next().unwrap_or("it failed").to_owned();
    Err(format!("{} cannot compile for {}: {first}", pins::DEBIAN_RUSTC, pins::BPF_TARGET))
}

/// A folder with nothing in it but a link to the LLVM library of Debian's compiler.
///
/// bpf-linker takes the first file called libLLVM* in the folders of LD_LIBRARY_PATH, so Debian's own folder, which
/// may hold several releases, will not do. The name of the link is not one that a program asks the loader for:
/// whatever else runs during the build is not affected.
fn debian_llvm(version: &Version, tools: &Path) -> anyhow::Result<PathBuf> {
    let name = format!("libLLVM.so.{}.{}", version.llvm.0, version.llvm.1);
    let libraries = fs::read_dir("/usr/lib").context("cannot read /usr/lib")?;
    let library = libraries
        .filter_map(|entry| Some(entry.ok()?.path().join(&name)))
        .find(|path| path.is_file())
        .with_context(|| format!("{name}, which Debian's rustc is linked with, is in no folder of /usr/lib"))?;
    let folder = tools.join(format!("llvm-{}.{}", version.llvm.0, version.llvm.1));
    let link = folder.join("libLLVM.so");
    if fs::read_link(&link).ok().as_ref() != Some(&library) {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let _ = fs::remove_file(&link);
        symlink(&library, &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    Ok(folder)
}

/// What a compiler says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    release: String,
    rust: (u32, u32),
    llvm: (u32, u32),
}

impl Version {
    /// Reads the output of `rustc -vV`.
    fn parse(text: &str) -> Result<Self, String> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            line.ok_or_else(|| format!("`rustc -vV` says nothing of its {name}"))
        };
        let number = |text: &str| major_minor(text).ok_or_else(|| format!("`rustc -vV`: {text:?} is not a version"));
        let release = field("release")?;
        Ok(Self { release: release.to_owned(), rust: number(release)?, llvm: number(field("LLVM version")?)? })
    }

    /// Whether it can compile the programs, and the linker read what it writes.
    fn fits(&self) -> Result<(), String> {
        let oldest = env!("CARGO_PKG_RUST_VERSION");
        if major_minor(oldest).is_some_and(|oldest| self.rust < oldest) {
            return Err(format!("rustc {} is too old: qjump needs {oldest}", self.release));
        }
        if self.llvm.0 != pins::LLVM_MAJOR {
            return Err(format!(
                "rustc {} has LLVM {}, and bpf-linker {} works with LLVM {} only",
                self.release,
                self.llvm.0,
                pins::BPF_LINKER.version,
                pins::LLVM_MAJOR
            ));
        }
        Ok(())
    }
}

fn major_minor(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The compiler's flags, in the form of CARGO_ENCODED_RUSTFLAGS.
fn encoded_flags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Clinker=");
    flags.push(linker);
    // Debug information is what the linker makes BTF of, without which the kernel refuses the maps.
    for flag in ["-Cdebuginfo=2", "-Clink-arg=--btf", &format!("-Ctarget-cpu={}", pins::BPF_CPU)] {
        flags.push("\u{1f}");
        flags.push(flag);
    }
    flags
}

/// Whether a variable of the user's, meant for programs of this machine, would spoil a build for BPF.
fn hurts(variable: &OsStr) -> bool {
    let Some(name) = variable.to_str() else { return false };
    matches!(name, "RUSTFLAGS" | "CARGO_BUILD_RUSTFLAGS" | "CARGO_BUILD_RUSTC" | "CARGO_INCREMENTAL")
        || name.starts_with("CARGO_PROFILE_")
        || name.starts_with("CARGO_TARGET_BPF")
        || name.starts_with("CARGO_UNSTABLE_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rustc(release: &str, llvm: &str) -> Result<Version, String> {
        Version::parse(&format!("rustc {release}\nhost: x86_64\nrelease: {release}\nLLVM version: {llvm}\n"))
    }

    #[test]
    fn versions_are_read() {
        let version = rustc("1.97.0-nightly", "22.1.4").unwrap();
        assert_eq!(version, Version { release: "1.97.0-nightly".into(), rust: (1, 97), llvm: (22, 1) });
        assert_eq!(version.fits(), Ok(()));
        assert!(rustc("new", "22.1.4").is_err());
        assert_eq!(Version::parse("release: 1.97.0\n").unwrap_err(), "`rustc -vV` says nothing of its LLVM version");
    }

    #[test]
    fn a_compiler_fits_by_its_age_and_its_llvm() {
        assert!(rustc("1.85.0", "22.1.4").unwrap().fits().unwrap_err().contains("too old"));
        assert!(rustc("1.99.0", "23.1.0").unwrap().fits().unwrap_err().contains("has LLVM 23"));
    }

    #[test]
    fn the_error_names_each_way_its_reason_and_its_remedy() {
        let refusal = |way, reason: &str, remedy: &str| Refusal { way, reason: reason.into(), remedy: remedy.into() };
        let message = no_compiler(&[
            refusal("a nightly", "no rust-src", "rustup component add rust-src"),
            refusal("Debian's compiler", "no apt-get", "apt-get install rustc-web"),
        ]);
        assert_eq!(
            message,
            "there is no compiler for the eBPF programs; one of these ways is enough:\n\
             \x20 1. a nightly\n\
             \x20    now:    no rust-src\n\
             \x20    remedy: rustup component add rust-src\n\
             \x20 2. Debian's compiler\n\
             \x20    now:    no apt-get\n\
             \x20    remedy: apt-get install rustc-web"
        );
    }

    #[test]
    fn flags_survive_a_path_with_spaces() {
        let flags = encoded_flags(Path::new("/my tree/bpf-linker"));
        let flags: Vec<_> = flags.to_str().unwrap().split('\u{1f}').collect();
        assert_eq!(flags, ["-Clinker=/my tree/bpf-linker", "-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"]);
    }

    #[test]
    fn settings_for_programs_of_this_machine_are_kept_out() {
        for name in ["RUSTFLAGS", "CARGO_PROFILE_RELEASE_DEBUG", "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER"] {
            assert!(hurts(OsStr::new(name)), "{name}");
        }
        for name in ["PATH", "CARGO_HOME", "CARGO_BUILD_JOBS", "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER"] {
            assert!(!hurts(OsStr::new(name)), "{name}");
        }
    }
}
