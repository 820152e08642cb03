//! Cgroups of tests, and programs in them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::unistd::{Gid, Uid, chown};
use qjump::tag::cgroup::Hierarchy;

use crate::link::binary;

/// A cgroup that goes, with those below it, when it is dropped. Its processes must have ended.
pub struct TestCgroup {
    /// Its directory.
    pub directory: PathBuf,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl TestCgroup {
    /// A cgroup at the top, of a name that is unique on this machine.
    pub fn new() -> Result<Self> {
        let name = format!("qjtest-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let directory = Hierarchy::find()?.mount().join(name);
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self { directory })
    }

    /// One below it.
    pub fn below(&self, name: &str) -> Result<PathBuf> {
        let directory = self.directory.join(name);
        fs::create_dir(&directory)?;
        Ok(directory)
    }

    /// Gives a cgroup to a user, as a delegation does (Documentation/admin-guide/cgroup-v2.rst).
    pub fn delegate(directory: &Path, uid: u32) -> Result<()> {
        for file in ["", "cgroup.procs", "cgroup.subtree_control"] {
            chown(&directory.join(file), Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
        }
        Ok(())
    }

    /// Does something, such as making a socket, while this whole process is in the cgroup.
    pub fn within<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = Hierarchy::find()?.of_process(None)?;
        let own = std::process::id();
        fs::write(self.directory.join("cgroup.procs"), own.to_string())?;
        let result = work();
        before.take(own)?;
        result
    }

    /// The path that /proc/PID/cgroup shows.
    pub fn path(&self) -> String {
        format!("/{}", self.directory.file_name().unwrap_or_default().to_string_lossy())
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let output = Command::new(binary()).args(["untag", "--cgroup"]).arg(&self.directory).output();
        drop(output);
        for below in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(below.path());
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

/// A process that does nothing for ten minutes, once it is in a cgroup.
pub fn sleeper_in(cgroup: &Path) -> Result<Child> {
    let mut sleeper = command_in(cgroup, "sleep").arg("600").spawn()?;
    let own = sleeper.id().to_string();
    for _ in 0..20_000 {
        if fs::read_to_string(cgroup.join("cgroup.procs"))?.lines().any(|pid| pid == own) {
            return Ok(sleeper);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    sleeper.kill()?;
    sleeper.wait()?;
    bail!("it does not come into {}", cgroup.display())
}

/// A command that starts in a cgroup, by way of a shell that moves itself.
pub fn command_in(cgroup: &Path, program: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "echo 0 > \"$0/cgroup.procs\" && exec \"$@\""]).arg(cgroup).arg(program);
    command
}
