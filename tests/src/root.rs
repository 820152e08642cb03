//! A system to install packages in: this machine's, of which nothing is changed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use qjump::testbed::NetNs;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// An overlay over this machine's root: what is written goes to memory. It has a BPF file system of its own, so pins are its
/// own, too, and no systemd runs there.
pub struct Root {
    folder: PathBuf,
}

impl Root {
    /// Mounts it.
    pub fn new() -> Result<Self> {
        let number = COUNT.fetch_add(1, Relaxed);
        let folder = std::env::temp_dir().join(format!("qjump-root-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let root = Self { folder };
        let none = None::<&str>;
        mount(Some("tmpfs"), &root.folder, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
        for part in ["upper", "work", "merged"] {
            fs::create_dir(root.folder.join(part))?;
        }
        let layers = format!(
            "lowerdir=/,upperdir={},workdir={}",
            root.folder.join("upper").display(),
            root.folder.join("work").display()
        );
        mount(Some("overlay"), &root.path(), Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .context("cannot mount an overlay over /")?;
        for (kind, at) in [("proc", "proc"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
            mount(Some(kind), &root.path().join(at), Some(kind), MsFlags::empty(), none)?;
        }
        for at in ["/sys", "/dev"] {
            mount(Some(at), &root.path().join(&at[1..]), none, MsFlags::MS_BIND, none)?;
        }
        mount(Some("bpf"), &root.path().join("sys/fs/bpf"), Some("bpf"), MsFlags::empty(), Some("mode=0700"))?;
        Ok(root)
    }

    /// Where it is, seen from outside.
    pub fn path(&self) -> PathBuf {
        self.folder.join("merged")
    }

    /// A file of it, seen from outside.
    pub fn file(&self, path: &str) -> PathBuf {
        self.path().join(path.trim_start_matches('/'))
    }

    /// Copies a file to its /tmp, and says where it is there.
    pub fn bring(&self, file: &Path) -> Result<String> {
        let name = file.file_name().and_then(|name| name.to_str()).context("a file's name")?;
        let to = format!("/tmp/{name}");
        fs::copy(file, self.file(&to)).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(to)
    }

    /// A command in it, and in a network namespace.
    pub fn command(&self, netns: &NetNs, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", netns.name())).arg("chroot").arg(self.path()).args(arguments);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for at in ["sys/fs/bpf", "sys", "dev", "tmp", "run", "proc", ""] {
            let _ = umount2(&self.path().join(at), MntFlags::MNT_DETACH);
        }
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.folder);
    }
}
