//! Starting a guest under QEMU and waiting for its end.

use super::packages;
use crate::{apt, process, say};
use anyhow::{Context, bail};
use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// QEMU: the machine's own, or one that was unpacked into the build folder.
#[derive(Debug)]
pub struct Qemu {
    /// Where it was unpacked.
    unpacked: Option<PathBuf>,
}

/// How a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// By the machine's clock, on so many CPUs.
    Real {
        /// CPUs of the guest.
        cpus: u32,
        /// With the processor's help rather than in software.
        kvm: bool,
    },
    /// By the number of instructions that were executed: the same figures whatever the machine is doing. One CPU.
    Virtual {
        /// Seeds what the guest's kernel takes for chance.
        seed: u64,
    },
}

/// A guest to be started.
#[derive(Debug)]
pub struct Guest<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The first file system.
    pub image: &'a Path,
    /// Folder for console.log and results.log.
    pub folder: &'a Path,
    /// Memory, MiB.
    pub memory: u32,
    /// What time is to it.
    pub clock: Clock,
    /// Whether a person sits at its console.
    pub shell: bool,
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It turned itself off, or its kernel gave up.
    Off,
    /// It was ended because its time was over.
    TimeOut,
}

impl Qemu {
    /// Finds QEMU, or fetches Debian's into the build folder.
    pub fn find(vm: &Path) -> anyhow::Result<Self> {
        if apt::on_path(PROGRAM) {
            return Ok(Self { unpacked: None });
        }
        let folder = vm.join("qemu");
        if !folder.join("usr/bin").join(PROGRAM).is_file() {
            say!("fetching QEMU (Debian's package {PACKAGE}), into the build folder");
            let partial = vm.join("partial/qemu");
            let _ = fs::remove_dir_all(&partial);
            packages::unpack_with_dependencies(PACKAGE, &partial).with_context(|| {
                format!("guests need QEMU, and it cannot be fetched\nremedy: `{}`", apt::remedy(&[PACKAGE]))
            })?;
            let _ = fs::remove_dir_all(&folder);
            fs::rename(&partial, &folder).with_context(|| format!("cannot keep QEMU in {}", folder.display()))?;
        }
        let qemu = Self { unpacked: Some(folder) };
        process::ask(qemu.command().arg("--version")).map_err(anyhow::Error::msg).context("QEMU does not run here")?;
        Ok(qemu)
    }

    fn command(&self) -> Command {
        let Some(folder) = &self.unpacked else { return Command::new(PROGRAM) };
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| folder.join(path));
        let mut command = Command::new(folder.join("usr/bin").join(PROGRAM));
        command
            .env("LD_LIBRARY_PATH", std::env::join_paths(libraries).expect("a build folder has no colon in its path"));
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(folder.join(data));
        }
        command
    }

    /// Starts a guest, and waits until it is off or `limit` is over; `watch` sees its results as they come.
    pub fn run(&self, guest: &Guest<'_>, limit: Duration, mut watch: impl FnMut(&str)) -> anyhow::Result<End> {
        let (console, results) = (guest.folder.join("console.log"), guest.folder.join("results.log"));
        for log in [&console, &results] {
            fs::write(log, "").with_context(|| format!("cannot write {}", log.display()))?;
        }
        let mut command = self.command();
        command.args(arguments(guest)).stdin(Stdio::null());
        let errors = guest.folder.join("qemu.log");
        if guest.shell {
            command.stdin(Stdio::inherit()).args(["-serial", "stdio"]);
        } else {
            command.arg("-serial").arg(format!("file:{}", console.display()));
            command.stdout(Stdio::null());
            command.stderr(OpenOptions::new().create(true).write(true).truncate(true).open(&errors)?);
        }
        command.arg("-serial").arg(format!("file:{}", results.display()));
        end_with_parent(&mut command);
        let mut running = Running(command.spawn().context("cannot run QEMU")?);
        let begun = Instant::now();
        loop {
            if let Some(status) = running.0.try_wait()? {
                watch(&read(&results));
                if !status.success() {
                    bail!("QEMU failed ({status}): {}", read(&errors).trim());
                }
                return Ok(End::Off);
            }
            if begun.elapsed() > limit {
                return Ok(End::TimeOut);
            }
            watch(&read(&results));
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// A QEMU that ends with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends the child when this process ends, however it does.
fn end_with_parent(command: &mut Command) {
    let ask = || nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: between fork and exec the closure makes one system call and touches no memory.
    unsafe { command.pre_exec(ask) };
}

/// A log as far as it was written; a guest may write any bytes.
pub fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn arguments(guest: &Guest<'_>) -> Vec<String> {
    let kernel_line = format!(
        "console=ttyS0 rdinit=/init panic=-1 random.trust_cpu=on {}",
        if guest.shell { "quiet" } else { "loglevel=5" }
    );
    let mut words: Vec<String> =
        ["-nodefaults", "-display", "none", "-no-reboot", "-M", "pc"].map(str::to_owned).into();
    let mut add = |name: &str, value: String| words.extend([name.to_owned(), value]);
    add("-m", guest.memory.to_string());
    add("-kernel", guest.kernel.display().to_string());
    add("-initrd", guest.image.display().to_string());
    match guest.clock {
        Clock::Real { cpus, kvm } => {
            add("-accel", if kvm { "kvm" } else { "tcg,thread=multi" }.to_owned());
            add("-smp", cpus.to_string());
            add("-cpu", if kvm { "host" } else { "max" }.to_owned());
            add("-append", kernel_line);
        }
        // What is not a function of the instructions is taken away: the host's clock, and its true random numbers.
        Clock::Virtual { seed } => {
            add("-accel", "tcg,thread=single".to_owned());
            add("-icount", "shift=0,sleep=off".to_owned());
            add("-rtc", "base=2026-01-01T00:00:00,clock=vm".to_owned());
            add("-seed", seed.to_string());
            add("-cpu", "max,-rdrand,-rdseed".to_owned());
            add("-smp", "1".to_owned());
            add("-append", kernel_line);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(clock: Clock) -> Vec<String> {
        let path = Path::new("/x");
        arguments(&Guest { kernel: path, image: path, folder: path, memory: 512, clock, shell: false })
    }

    #[test]
    fn nothing_in_virtual_time_comes_from_the_machine() {
        let words = guest(Clock::Virtual { seed: 7 });
        for word in ["shift=0,sleep=off", "tcg,thread=single", "max,-rdrand,-rdseed"] {
            assert!(words.iter().any(|w| w == word), "{word}");
        }
        let after = |name: &str| words[words.iter().position(|word| word == name).unwrap() + 1].clone();
        assert_eq!((after("-smp"), after("-seed")), ("1".to_owned(), "7".to_owned()));
    }

    #[test]
    fn in_real_time_a_guest_has_its_cpus() {
        let words = guest(Clock::Real { cpus: 2, kvm: false });
        assert!(words.contains(&"2".to_owned()) && !words.contains(&"-icount".to_owned()));
    }
}
