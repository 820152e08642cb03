//! Where things are pinned, and who may change them.

use std::{
    fs::{self, File},
    io,
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
    /// The pins of `interface`, whether or not they exist.
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

    /// Whether anything is there.
    pub fn exist(&self) -> bool {
        self.directory.exists()
    }

    /// Makes the directories.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir_all(self.directory.join("maps"))?;
        fs::create_dir_all(self.directory.join("links"))
    }

    /// Removes everything that is pinned here; what a removed link was attached to is detached.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The last one takes the common directory along; others keep it.
        let _ = fs::remove_dir(root());
        Ok(())
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

fn root() -> PathBuf {
    Path::new(BPFFS).join("qjump")
}

/// The BPF file system refuses names with a dot (bpf_lookup, kernel/bpf/inode.c), and VLAN devices have one.
fn escape(interface: &str) -> String {
    interface.replace('%', "%25").replace('.', "%2e")
}

fn unescape(name: &str) -> String {
    name.replace("%2e", ".").replace("%25", "%")
}

/// Mounts the BPF file system if it is not; whether it did.
pub fn ensure_bpffs() -> Result<bool, Error> {
    let failed = |source: io::Error| Error::Mount { path: BPFFS, source };
    let kind = statfs(BPFFS).map_err(|errno| failed(errno.into()))?.filesystem_type();
    if kind == BPF_FS_MAGIC {
        return Ok(false);
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(|errno| failed(errno.into()))?;
    Ok(true)
}

/// Held while a process changes anything: one at a time on a host.
pub struct Lock {
    _directory: Flock<File>,
}

impl Lock {
    /// Waits for other processes, at most ten seconds.
    pub fn take() -> Result<Self, Error> {
        let deadline = Instant::now() + Duration::from_secs(LOCK_TIMEOUT_S);
        let mut directory = File::open(BPFFS).map_err(|source| Error::Mount { path: BPFFS, source })?;
        loop {
            match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { _directory: lock }),
                Err((back, _)) if Instant::now() < deadline => directory = back,
                Err(_) => return Err(Error::Locked(LOCK_TIMEOUT_S)),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_survive_the_file_system() {
        for name in ["eth0", "eth0.100", "a%2eb.c", "%", "..."] {
            assert!(!escape(name).contains('.'));
            assert_eq!(unescape(&escape(name)), name);
        }
        // Two names never share a directory.
        assert_ne!(escape("a.b"), escape("a%2eb"));
    }
}
