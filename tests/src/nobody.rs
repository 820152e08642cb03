//! Programs that run without any privilege, and a place where they find their files.

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use anyhow::{Context, Result, ensure};

/// The user and group `nobody` of Debian.
const NOBODY: u32 = 65534;

/// A command as nobody: changing from root to another user drops all capabilities. Only programs of the system are
/// found by name: what root has in its own folders, nobody may not run.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.uid(NOBODY).gid(NOBODY).env_clear().env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    command
}

/// A folder in which everybody may read and run what is put there; removed when dropped.
pub struct Folder(PathBuf);

impl Folder {
    /// A new and empty one.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("qjump-tests-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let folder = Self(std::env::temp_dir().join(name));
        fs::create_dir(&folder.0).with_context(|| format!("cannot make {}", folder.0.display()))?;
        fs::set_permissions(&folder.0, Permissions::from_mode(0o755))?;
        Ok(folder)
    }

    /// The path of something in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Copies a file into it.
    pub fn take(&self, file: &Path) -> Result<PathBuf> {
        let name = file.file_name().with_context(|| format!("{} is no file", file.display()))?;
        let copy = self.0.join(name);
        fs::copy(file, &copy).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(copy)
    }

    /// Compiles a C program into it, warnings being errors.
    pub fn compile(&self, source: &Path) -> Result<PathBuf> {
        let name = source.file_stem().and_then(|stem| stem.to_str()).context("no name")?;
        let program = self.0.join(name);
        let status = Command::new("gcc")
            .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(&program)
            .arg(source)
            .status()
            .context("cannot run gcc; `cargo xtask test` installs it")?;
        ensure!(status.success(), "gcc refused {}", source.display());
        Ok(program)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
