//! The first process of a guest: prepares it, runs the programs of a job one after the other, reports, and
//! turns the machine off. `cargo xtask vm` puts it into the guest's image as /init.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};
use serde_json::Value;

/// Where the image has what is to be done.
const JOB: &str = "/job.json";
/// The serial line for results; the first one is the kernel's.
const RESULTS: &str = "/dev/ttyS1";
/// Begins each line that is about the job rather than of a program.
const MARK: &str = "@@qjump";

/// What is mounted: type, place, options. /dev first, because results go there.
const MOUNTS: [(&str, &str, &str); 8] = [
    ("devtmpfs", "/dev", ""),
    ("proc", "/proc", ""),
    ("sysfs", "/sys", ""),
    ("devpts", "/dev/pts", ""),
    ("tmpfs", "/dev/shm", ""),
    ("tmpfs", "/run", ""),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("bpf", "/sys/fs/bpf", "mode=700"),
];

fn main() {
    if std::process::id() != 1 {
        eprintln!("guest: this is the first process of a virtual machine (`cargo xtask vm`); it turns machines off");
        std::process::exit(64);
    }
    if let Err(error) = work() {
        // The kernel's line: the other one may be what failed.
        println!("{MARK} failed {error:#}");
    }
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_POWER_OFF).expect_err("a machine that is off runs nothing");
    println!("{MARK} failed cannot turn off: {error}");
}

fn work() -> Result<()> {
    for (kind, place, options) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("cannot make {place}"))?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), Some(options))
            .with_context(|| format!("cannot mount {kind} on {place}"))?;
    }
    let mut results = OpenOptions::new().write(true).open(RESULTS).with_context(|| format!("cannot open {RESULTS}"))?;
    let job = fs::read_to_string(JOB).with_context(|| format!("cannot read {JOB}"))?;
    let job: Value = serde_json::from_str(&job).with_context(|| format!("cannot understand {JOB}"))?;
    for path in strings(&job["modules"])? {
        // Some kernels have built in what others have as modules; those are not in the image.
        load(Path::new(&path)).with_context(|| format!("cannot load the module {path}"))?;
    }
    // What a distribution's start-up would do.
    fs::write("/proc/sys/kernel/hostname", "guest")?;
    Command::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot run ip")?;
    writeln!(results, "{MARK} up {}", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim())?;
    for step in job["steps"].as_array().context("the job has no steps")? {
        let name = step["name"].as_str().context("a step has no name")?;
        writeln!(results, "{MARK} begin {name}")?;
        let status = run(step, &job, &results).with_context(|| format!("step {name}"))?;
        for path in strings(&step["files"])? {
            // A step that failed may have left none.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let file = Path::new(&path).file_name().unwrap_or_default().display();
            writeln!(results, "{MARK} file {file}\n{}\n{MARK} whole", text.trim_end())?;
        }
        writeln!(results, "{MARK} end {status} {name}")?;
    }
    writeln!(results, "{MARK} done")?;
    Ok(())
}

fn load(path: &Path) -> Result<()> {
    match finit_module(File::open(path)?, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => bail!(error),
    }
}

/// Runs one program to its end; its exit status as a shell would report it.
fn run(step: &Value, job: &Value, results: &File) -> Result<i32> {
    let words = strings(&step["command"])?;
    let (program, arguments) = words.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    for (name, value) in job["environment"].as_object().context("the job has no environment")? {
        command.env(name, value.as_str().context("a variable is no text")?);
    }
    let interactive = step["console"].as_bool() == Some(true);
    if interactive {
        let console = || OpenOptions::new().read(true).write(true).open("/dev/ttyS0");
        command.stdin(console()?).stdout(console()?).stderr(console()?);
    } else {
        command.stdin(Stdio::null()).stdout(results.try_clone()?).stderr(results.try_clone()?);
    }
    let status = command.status().with_context(|| format!("cannot run {program}"))?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}

fn strings(value: &Value) -> Result<Vec<String>> {
    let list = value.as_array().context("a list is missing")?;
    list.iter().map(|word| word.as_str().map(str::to_owned).context("a word is no text")).collect()
}
