//! The first file system of a guest: programs of this machine with their libraries, a job, and modules.

use super::cpio::Archive;
use super::kernel::Kernel;
use crate::process;
use anyhow::{Context, bail};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The programs of this machine that tests call.
const PROGRAMS: &[&str] = &[
    "bash",
    "bridge",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "date",
    "dash",
    "dd",
    "dmesg",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "id",
    "ip",
    "iperf3",
    "kill",
    "ln",
    "ls",
    "lsmod",
    "memcached",
    "mkdir",
    "mktemp",
    "mount",
    "mountpoint",
    "mv",
    "nft",
    "nproc",
    "nsenter",
    "ping",
    "ps",
    "python3",
    "rm",
    "rmdir",
    "script",
    "sed",
    "seq",
    "setpriv",
    "setsid",
    "sh",
    "sleep",
    "sort",
    "stat",
    "su",
    "sync",
    "tail",
    "tc",
    "test",
    "timeout",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "unshare",
    "wc",
];

/// What is in a guest.
#[derive(Debug)]
pub struct Contents {
    /// Becomes /init.
    pub init: PathBuf,
    /// Files that lie in the guest where they lie here; programs bring their libraries.
    pub files: Vec<PathBuf>,
    /// The steps of the job: a name and a command line each.
    pub steps: Vec<Step>,
    /// Environment of all steps.
    pub environment: Vec<(String, String)>,
}

/// A program that the guest runs.
#[derive(Debug, serde::Serialize)]
pub struct Step {
    /// What the verdict calls it.
    pub name: String,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether it has the console, for a person.
    pub console: bool,
    /// Files that it leaves in the guest, and that are wanted here: text.
    pub files: Vec<String>,
}

/// Writes the image of a guest. `scratch` keeps programs without their debug information.
pub fn write(contents: &Contents, kernel: &Kernel, scratch: &Path, path: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::default();
    for folder in ["/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/root", "/var/lib/dhcp"] {
        archive.folder(folder);
    }
    archive.file("/etc/passwd", 0o644, b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n");
    archive.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n");
    archive.file("/etc/hosts", 0o644, b"127.0.0.1 localhost guest\n::1 localhost\n");
    archive.file("/etc/nsswitch.conf", 0o644, b"passwd: files\ngroup: files\nhosts: files\n");

    let mut there = Place { archive, files: BTreeSet::new(), scratch: scratch.to_owned() };
    fs::create_dir_all(scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let init = there.stripped(&contents.init)?;
    there.archive.file("/init", 0o755, &init);
    there.libraries(&contents.init)?;
    for program in PROGRAMS {
        // What a machine does not have, its guests do not have either; a test that needs it says so.
        if let Some(path) = find(program) {
            there.program(&path, &format!("/usr/bin/{program}"))?;
        }
    }
    for name in ["/bin", "/sbin", "/usr/sbin"] {
        there.archive.link(name, "/usr/bin");
    }
    for file in &contents.files {
        there.same(file)?;
    }
    let mut modules = Vec::new();
    for (name, content) in kernel.modules()? {
        let path = format!("/modules/{name}.ko");
        there.archive.file(&path, 0o644, &content);
        modules.push(path);
    }
    let environment: serde_json::Map<String, serde_json::Value> =
        contents.environment.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    let job = serde_json::json!({"modules": modules, "steps": contents.steps, "environment": environment});
    there.archive.file("/job.json", 0o644, job.to_string().as_bytes());
    fs::write(path, there.archive.finish()).with_context(|| format!("cannot write {}", path.display()))
}

/// An archive that is being filled, and what it has already.
struct Place {
    archive: Archive,
    files: BTreeSet<PathBuf>,
    scratch: PathBuf,
}

impl Place {
    /// A program under another path.
    fn program(&mut self, path: &Path, place: &str) -> anyhow::Result<()> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        self.archive.file(place, 0o755, &content);
        self.libraries(path)
    }

    /// A file or a folder where it lies here, with the libraries of what is a program.
    fn same(&mut self, path: &Path) -> anyhow::Result<()> {
        if !self.files.insert(path.to_owned()) {
            return Ok(());
        }
        if path.is_dir() {
            // What Python compiled, it compiles again; its own tests, and what links it into others, nobody needs.
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if ["__pycache__", "test", "dist-packages"].contains(&name.as_str()) || name.starts_with("config-") {
                return Ok(());
            }
            let entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
            let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
            // In virtual time the same files must make the same image.
            paths.sort();
            return paths.iter().try_for_each(|path| self.same(path));
        }
        if path.is_symlink() {
            let target = fs::read_link(path)?;
            self.archive.link(text(path)?, target.to_str().context("a link's target is no text")?);
            return Ok(());
        }
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        // Objects for the kernel are ELF files, too, and have their debug information for a reason.
        let is_program = content.starts_with(b"\x7fELF") && path.extension().is_none_or(|extension| extension == "so");
        let content = if is_program { self.stripped(path)? } else { content };
        let mode = fs::metadata(path)?.permissions().mode();
        self.archive.file(text(path)?, mode, &content);
        if is_program { self.libraries(path) } else { Ok(()) }
    }

    /// A program without its debug information, which would be most of it.
    fn stripped(&self, path: &Path) -> anyhow::Result<Vec<u8>> {
        let name = path.file_name().context("a program has a name")?;
        let small = self.scratch.join(name);
        let made = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        if made(&small).is_none_or(|small| Some(small) <= made(path)) {
            process::run(Command::new("strip").arg("-o").arg(&small).arg(path))
                .context("guests get programs without debug information; strip is in Debian's package binutils")?;
        }
        fs::read(&small).with_context(|| format!("cannot read {}", small.display()))
    }

    /// The libraries that a program is linked with.
    fn libraries(&mut self, program: &Path) -> anyhow::Result<()> {
        // It fails for a program that is linked statically, and for scripts.
        let Ok(answer) = process::ask(Command::new("ldd").arg(program)) else { return Ok(()) };
        for library in linked(&answer) {
            if self.files.insert(library.clone()) {
                let content = fs::read(&library).with_context(|| format!("cannot read {}", library.display()))?;
                self.archive.file(text(&library)?, 0o755, &content);
            }
        }
        Ok(())
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text),
        _ => bail!("{} cannot be the path of a file in a guest", path.display()),
    }
}

/// The paths in what ldd says: `name => /path (0x…)` and `/path (0x…)`.
fn linked(answer: &str) -> Vec<PathBuf> {
    let words = answer.lines().flat_map(str::split_whitespace);
    words.filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

fn find(program: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .map(|folder| Path::new(folder).join(program))
        .into_iter()
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_says() {
        let answer = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let paths = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(linked(answer), paths);
    }
}
