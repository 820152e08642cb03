//! Where things are pinned, and who may change them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use qjump_ebpf::names;

use super::Error;

/// Where the BPF file system is.
pub const BPFFS: &str = "/sys/fs/bpf";

/// How long to wait for another qjump, s.
const LOCK_TIMEOUT_S: u64 = 10;

/// The pins of one interface: /sys/fs/bpf/qjump/IFACE/{maps,links}.
#[derive(Clone, Debug)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// The pins of `interface`, whether or not they exist. Whatever the name, they are in our directory.
    pub fn of(interface: &str) -> Self {
        Self { directory: root().join(escape(interface)) }
    }

    /// The directory of all of them.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a map is pinned.
    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join("maps").join(name)
    }

    /// Where the tcx link is pinned.
    pub fn link(&self) -> PathBuf {
        self.directory.join("links").join(names::PROGRAM)
    }

    /// Whether anything is there, as far as this user can see.
    pub fn exist(&self) -> bool {
        self.directory.exists()
    }

    /// Whether anything is there.
    ///
    /// # Errors
    /// If this command may not know: it lacks the rights, or has mounts of its own.
    pub fn find(&self) -> Result<bool, Error> {
        require_visible()?;
        self.directory.try_exists().map_err(unreadable)
    }

    /// Makes the directories.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(self.directory.join("maps"))?;
        fs::create_dir_all(self.directory.join("links"))
    }

    /// Removes what is pinned here, and nothing below it; what a removed link was attached to is detached.
    pub fn remove(&self) -> io::Result<()> {
        let absent_is_fine = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        for folder in ["maps", "links"].map(|name| self.directory.join(name)) {
            for pin in fs::read_dir(&folder).into_iter().flatten() {
                fs::remove_file(pin?.path())?;
            }
            absent_is_fine(fs::remove_dir(folder))?;
        }
        absent_is_fine(fs::remove_dir(&self.directory))
    }

    /// The interfaces that have pins.
    pub fn interfaces() -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(root()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names =
            entries.map(|entry| Ok(unescape(&entry?.file_name().to_string_lossy()))).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }
}

/// Why the directory of all pins cannot be read.
pub fn unreadable(source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => Error::Permission { path: root() },
        _ => Error::Directory { path: root(), source },
    }
}

fn root() -> PathBuf {
    Path::new(BPFFS).join("qjump")
}

/// The BPF file system refuses names with a dot (bpf_lookup, kernel/bpf/inode.c), and VLAN devices have
/// one. A slash would lead out of our directory, and so would nothing at all.
fn escape(interface: &str) -> String {
    if interface.is_empty() {
        return "%".to_owned();
    }
    interface.replace('%', "%25").replace('.', "%2e").replace('/', "%2f")
}

fn unescape(name: &str) -> String {
    name.replace("%2f", "/").replace("%2e", ".").replace("%25", "%")
}

/// Refuses what cannot be the name of an interface (dev_valid_name, net/core/dev.c).
pub fn check_name(interface: &str) -> Result<(), Error> {
    let valid = (1..16).contains(&interface.len())
        && !matches!(interface, "." | "..")
        && !interface.contains(|c: char| c == '/' || c == ':' || c.is_ascii_whitespace());
    if valid { Ok(()) } else { Err(Error::BadName(interface.to_owned())) }
}

/// Refuses to call "not there" what this command cannot see.
pub fn require_visible() -> Result<(), Error> {
    let mounted = statfs(BPFFS).is_ok_and(|answer| answer.filesystem_type() == BPF_FS_MAGIC);
    if !mounted && runs_under_ip_netns_exec() { Err(Error::PrivateMounts { path: BPFFS }) } else { Ok(()) }
}

/// Whether the BPF file system is mounted; a load mounts it if it is not.
///
/// # Errors
/// If there is no place for it, or this command has mounts of its own.
pub fn has_bpffs() -> Result<bool, Error> {
    require_visible()?;
    let kind = statfs(BPFFS).map_err(|errno| not_mountable(errno.into()))?.filesystem_type();
    Ok(kind == BPF_FS_MAGIC)
}

/// Mounts the BPF file system if it is not; whether it did.
pub fn ensure_bpffs() -> Result<bool, Error> {
    if has_bpffs()? {
        return Ok(false);
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(|errno| not_mountable(errno.into()))?;
    Ok(true)
}

fn not_mountable(source: io::Error) -> Error {
    Error::Mount { path: BPFFS, source }
}

/// `ip netns exec NAME` gives its command mounts of its own, with a fresh /sys whose source is NAME
/// (netns_switch, lib/namespace.c of iproute2). A mount there goes with the command, and takes the pins along.
fn runs_under_ip_netns_exec() -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| {
        // id, parent, device, root, mount point, options ... - type, source, ...
        let is_sys = line.split(' ').nth(4) == Some("/sys");
        let source = line.split(" - ").nth(1).and_then(|rest| rest.split(' ').nth(1));
        is_sys && source.is_some_and(|name| Path::new("/run/netns").join(name).is_file())
    })
}

/// Held while a process changes anything: one at a time on a host. It is a lock on our directory in the
/// BPF file system, which is there exactly as long as somebody needs it.
pub struct Lock {
    _directory: Flock<File>,
}

impl Lock {
    /// Waits for other processes, at most ten seconds.
    pub fn take() -> Result<Self, Error> {
        let deadline = Instant::now() + Duration::from_secs(LOCK_TIMEOUT_S);
        let failed = |source| Error::Directory { path: root(), source };
        while Instant::now() < deadline {
            match fs::DirBuilder::new().mode(0o700).create(root()) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
            if let Ok(directory) = File::open(root())
                && let Ok(lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            {
                // The holder before may have removed the directory, and somebody made another one.
                let (ours, now) = (lock.metadata().map_err(failed)?, fs::metadata(root()));
                if now.is_ok_and(|now| now.ino() == ours.ino()) {
                    // Whoever may write here decides what is in force.
                    if ours.uid() != 0 || ours.mode() & 0o077 != 0 {
                        return Err(Error::NotOurs { path: root(), uid: ours.uid(), mode: ours.mode() & 0o777 });
                    }
                    return Ok(Self { _directory: lock });
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(Error::Locked(LOCK_TIMEOUT_S))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Fails, as it should, while anything is pinned.
        let _ = fs::remove_dir(root());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_survive_the_file_system() {
        for name in ["eth0", "eth0.100", "a%2eb.c", "%", "...", "/etc", "../x"] {
            assert!(!escape(name).contains('.'));
            assert_eq!(unescape(&escape(name)), name);
        }
        // Two names never share a directory.
        assert_ne!(escape("a.b"), escape("a%2eb"));
        for name in ["", "/", "/etc", "../..", "."] {
            assert_eq!(Pins::of(name).directory().parent(), Some(root().as_path()), "{name}");
        }
    }
}
