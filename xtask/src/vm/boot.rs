//! Starting a guest under QEMU and waiting for its end.

use super::packages;
use crate::{apt, process, say};
use anyhow::{Context, bail};
use nix::sys::statvfs::statvfs;
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

/// Room for translated code, MiB. What does not fit is thrown away, all at once, and translated again: QEMU would take a GiB.
const TRANSLATED: &str = "tb-size=128";
/// In virtual time nothing may be thrown away: that shows in when interrupts come, and two runs do not translate all the same.
const ALL_TRANSLATED: &str = "tb-size=1024";

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
    /// The first file system, if it has any.
    pub image: Option<&'a Path>,
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
            let status = running.0.try_wait()?;
            watch(&read(&results));
            if let Some(status) = status.filter(|status| !status.success()) {
                bail!("QEMU failed ({status}): {}", read(&errors).trim());
            }
            // QEMU says nothing when it cannot write what the guest says.
            if statvfs(guest.folder)?.blocks_available() == 0 {
                bail!(
                    "no space is left for what the guest says, in {}: make room, and start again",
                    guest.folder.display()
                );
            }
            if status.is_some() {
                return Ok(End::Off);
            }
            if begun.elapsed() > limit {
                return Ok(End::TimeOut);
            }
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
    if let Some(image) = guest.image {
        add("-initrd", image.display().to_string());
    }
    match guest.clock {
        Clock::Real { cpus, kvm } => {
            add("-accel", if kvm { "kvm".to_owned() } else { format!("tcg,thread=multi,{TRANSLATED}") });
            add("-smp", cpus.to_string());
            add("-cpu", if kvm { "host" } else { "max" }.to_owned());
            // The emulated CPUs count together. A kernel that does not believe it goes over to the hpet, whose readers wait for each
            // other and may then see a time that is over (read_hpet, arch/x86/kernel/hpet.c).
            add("-append", if kvm { kernel_line } else { format!("{kernel_line} tsc=reliable") });
        }
        // What is not a function of the instructions is taken away: the host's clock, and its true random numbers.
        Clock::Virtual { seed } => {
            add("-accel", format!("tcg,thread=single,{ALL_TRANSLATED}"));
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
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use std::os::unix::fs::PermissionsExt;

    fn guest(clock: Clock) -> Vec<String> {
        let path = Path::new("/x");
        arguments(&Guest { kernel: path, image: Some(path), folder: path, memory: 512, clock, shell: false })
    }

    #[test]
    fn nothing_in_virtual_time_comes_from_the_machine() {
        let words = guest(Clock::Virtual { seed: 7 });
        for word in ["shift=0,sleep=off", "tcg,thread=single,tb-size=1024", "max,-rdrand,-rdseed"] {
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

    /// A folder with a program in QEMU's place. It finds where its console and its results go in `$console` and `$results`.
    struct Fake(PathBuf);

    impl Fake {
        fn new(name: &str, script: &str) -> Self {
            let fake = Self(std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id())));
            let find = "for word; do case $word in file:*console.log) console=${word#file:};; file:*) results=${word#file:};; esac; done";
            fake.put(format!("#!/bin/sh\n{find}\n{script}\n").as_bytes());
            fake
        }

        fn put(&self, content: &[u8]) {
            let program = self.0.join("usr/bin").join(PROGRAM);
            fs::create_dir_all(program.parent().unwrap()).unwrap();
            fs::write(&program, content).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn run(&self, limit: Duration) -> anyhow::Result<End> {
            let clock = Clock::Real { cpus: 1, kvm: false };
            let kernel = Path::new("/kernel");
            let guest = Guest { kernel, image: None, folder: &self.0, memory: 256, clock, shell: false };
            Qemu { unpacked: Some(self.0.clone()) }.run(&guest, limit, |_| {})
        }

        /// The process that the program has written down, once it has.
        fn pid(&self) -> u32 {
            (0..500)
                .find_map(|_| {
                    std::thread::sleep(Duration::from_millis(20));
                    fs::read_to_string(self.0.join("pid")).ok()?.trim().parse().ok()
                })
                .expect("the program starts")
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// Whether a process is there and no zombie.
    fn lives(pid: u32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
    }

    const FOR_EVER: &str = "echo booting > $console; echo $$ > ${results%/*}/pid; exec sleep 1000";
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_guest_that_hangs_is_ended_and_its_console_kept() {
        let fake = Fake::new("hangs", FOR_EVER);
        assert_eq!(fake.run(Duration::from_secs(1)).unwrap(), End::TimeOut);
        assert!(!lives(fake.pid()));
        assert_eq!(read(&fake.0.join("console.log")), "booting\n");
    }

    #[test]
    fn qemus_own_failure_is_told_in_its_words() {
        let fake = Fake::new("fails", "echo no such machine >&2; exit 1");
        let error = fake.run(LONG).unwrap_err().to_string();
        assert!(error.contains("exit status: 1") && error.contains("no such machine"), "{error}");
    }

    /// A small disk at a fake's folder; it takes root rights.
    struct Disk<'a>(&'a Path);

    impl Drop for Disk<'_> {
        fn drop(&mut self) {
            let _ = umount2(self.0, MntFlags::MNT_DETACH);
        }
    }

    #[test]
    fn a_full_disk_is_no_silent_end() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let fake = Fake::new("full", "echo said > $results; while echo more; do :; done >> $console 2> /dev/null");
        let program = fs::read(fake.0.join("usr/bin").join(PROGRAM)).unwrap();
        mount(Some("tmpfs"), &fake.0, Some("tmpfs"), MsFlags::empty(), Some("size=128k")).unwrap();
        let _disk = Disk(&fake.0);
        fake.put(&program);
        let error = fake.run(LONG).unwrap_err().to_string();
        assert!(error.contains("no space is left") && error.contains(fake.0.to_str().unwrap()), "{error}");
    }

    const FOLDER: &str = "XTASK_TEST_FOLDER";

    /// Not a test of its own: what the next one kills.
    #[test]
    #[ignore = "the process that another test kills"]
    fn waits_for_a_guest() {
        let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
        let fake = std::mem::ManuallyDrop::new(Fake(folder));
        let _ = fake.run(LONG);
    }

    #[test]
    fn no_guest_outlives_who_started_it() {
        let fake = Fake::new("orphan", FOR_EVER);
        let mut owner = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "vm::boot::tests::waits_for_a_guest", "--ignored"])
            .env(FOLDER, &fake.0)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = fake.pid();
        assert!(lives(pid));
        // It can do nothing about this.
        owner.kill().unwrap();
        owner.wait().unwrap();
        let gone = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            !lives(pid)
        });
        assert!(gone, "{pid} lives on");
    }
}
