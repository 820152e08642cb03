//! Programs in the hosts of a rack, as they are.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read, Seek},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use qjump_ebpf::Level;

use super::NetNs;

/// How long a program that is told to end gets for it.
const GRACE: Duration = Duration::from_secs(3);

/// A program to be run in a namespace. It sees the machine's file systems, pins and cgroups among them.
#[derive(Debug)]
pub struct Program<'a> {
    netns: &'a NetNs,
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    level: Option<Level>,
    cpu: Option<usize>,
}

impl<'a> Program<'a> {
    /// A program by its name or path.
    pub fn new(netns: &'a NetNs, program: impl AsRef<OsStr>) -> Self {
        Self {
            netns,
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            directory: None,
            level: None,
            cpu: None,
        }
    }

    /// More arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// A variable of its environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// The folder that it starts in.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Under `qjump run --level`: unmodified, at a level.
    #[must_use]
    pub const fn level(mut self, level: Option<Level>) -> Self {
        self.level = level;
        self
    }

    /// On one CPU alone, with all that it starts.
    #[must_use]
    pub const fn cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    fn command(&self) -> Result<Command> {
        let Some(level) = self.level else {
            let mut command = Command::new(&self.program);
            command.args(&self.arguments);
            return Ok(command);
        };
        let mut command = Command::new(std::env::current_exe().context("cannot find out where qjump is")?);
        command.args(["run", "--level", &level.to_string(), "--"]).arg(&self.program).args(&self.arguments);
        Ok(command)
    }

    /// Starts it. It ends when the returned value is dropped, and, whatever happens to this process, when the calling
    /// thread does.
    ///
    /// # Errors
    /// If it cannot be started. Under `qjump run`, a program that is not there is noticed when it has ended with 127.
    pub fn start(self) -> Result<Process> {
        let name = self.program.to_string_lossy().into_owned();
        let mut command = self.command()?;
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        // In memory: a pipe that nobody empties would stop the program, and a file would stay.
        let out = File::from(memfd_create(c"qjump-stdout", MFdFlags::MFD_CLOEXEC)?);
        let err = File::from(memfd_create(c"qjump-stderr", MFdFlags::MFD_CLOEXEC)?);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(err.try_clone()?).process_group(0);
        let mut cpus = CpuSet::new();
        if let Some(cpu) = self.cpu {
            cpus.set(cpu)?;
        }
        let (netns, cpu, level) = (self.netns.open()?, self.cpu, self.level);
        let prepare = move || -> io::Result<()> {
            // `qjump run` hands this on to its program.
            let signal = if level.is_some() { libc::SIGTERM } else { libc::SIGKILL };
            // SAFETY: the call has no memory arguments.
            if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
            if cpu.is_some() {
                // A machine with fewer CPUs goes on without.
                let _ = sched_setaffinity(Pid::from_raw(0), &cpus);
            }
            Ok(setns(&netns, CloneFlags::CLONE_NEWNET)?)
        };
        // SAFETY: between fork and exec only system calls are made, on memory that was there before.
        unsafe { command.pre_exec(prepare) };
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!("there is no program '{name}'"),
            Err(error) => return Err(error).with_context(|| format!("cannot run {name}")),
        };
        Ok(Process { name, child, status: None, out, err })
    }
}

/// A program that runs, with the processes that it has started. Ended when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    out: File,
    err: File,
}

impl Process {
    /// What it has written to standard output so far.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn stdout(&self) -> Result<String> {
        written(&self.out)
    }

    /// What it has written to standard error so far.
    ///
    /// # Errors
    /// If memory cannot be read.
    pub fn stderr(&self) -> Result<String> {
        written(&self.err)
    }

    /// How it ended; `None` as long as it runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Fails if it has ended, with what it said.
    ///
    /// # Errors
    /// That.
    pub fn require_running(&mut self) -> Result<()> {
        match self.status()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended ({status}): {}", self.name, self.last_words()),
        }
    }

    /// Waits until it has ended by itself, and returns what it wrote to standard output.
    ///
    /// # Errors
    /// If it does not within `limit`, or fails.
    pub fn finish(&mut self, limit: Duration) -> Result<String> {
        match self.wait(limit)? {
            None => bail!("{} did not end within {limit:?}", self.name),
            Some(status) if !status.success() => bail!("{} failed ({status}): {}", self.name, self.last_words()),
            Some(_) => self.stdout(),
        }
    }

    /// Tells it to end, as a terminal would with SIGTERM, and waits until it has.
    ///
    /// # Errors
    /// If the kernel does not say how it ended.
    pub fn stop(&mut self) -> Result<()> {
        if self.status()?.is_some() {
            return Ok(());
        }
        let group = Pid::from_raw(self.child.id() as i32);
        let _ = killpg(group, Signal::SIGTERM);
        if self.wait(GRACE)?.is_none() {
            let _ = killpg(group, Signal::SIGKILL);
            self.status = Some(self.child.wait()?);
        }
        Ok(())
    }

    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The end of what it said, for messages.
    fn last_words(&self) -> String {
        let (out, err) = (self.stdout().unwrap_or_default(), self.stderr().unwrap_or_default());
        let text = if err.trim().is_empty() { out } else { err };
        let lines: Vec<&str> = text.trim().lines().collect();
        match lines.as_slice() {
            [] => "it said nothing".to_owned(),
            lines => lines[lines.len().saturating_sub(5)..].join("\n"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// All that was written to a file in memory, whoever's offset is where.
fn written(file: &File) -> Result<String> {
    // Another open file, and so an offset of its own: the program goes on writing at its own.
    let mut own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    own.rewind()?;
    let mut bytes = Vec::new();
    own.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
