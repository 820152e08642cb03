//! Cgroups of version 2: where they are mounted, which one a process is in, and what may be done to them.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use qjump_ebpf::grant::MAX_DEPTH;

use super::Error;
use crate::dataplane::require_visible;

/// The cgroup2 hierarchy as this process sees it, alone (unified) or beside those of version 1 (hybrid).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// Which cgroup is mounted there: the root, or what a container was given.
    root: PathBuf,
}

/// One cgroup that was there when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Its directory.
    pub directory: PathBuf,
    /// Its path in the hierarchy, as in /proc/PID/cgroup.
    pub path: String,
    /// Its number, by which the kernel's programs know it.
    pub id: u64,
}

impl Hierarchy {
    /// Finds where it is mounted.
    ///
    /// # Errors
    /// If it is not.
    pub fn find() -> Result<Self, Error> {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        // Under `ip netns exec` there are others than the host's, and the advice is another.
        Self::parse(&text).ok_or_else(|| require_visible().map_or_else(Error::from, |()| Error::NoCgroup2))
    }

    /// The mount that shows the most, out of /proc/self/mountinfo (Documentation/filesystems/proc.rst, 3.5).
    fn parse(mountinfo: &str) -> Option<Self> {
        let mounts = mountinfo.lines().filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = before.split(' ').skip(3);
            let (root, mount) = (unescape(fields.next()?), unescape(fields.next()?));
            // A root with ".." is above what this cgroup namespace may name.
            let usable = after.split(' ').next() == Some("cgroup2") && !has_parent(&root);
            usable.then_some(Self { mount, root })
        });
        mounts.min_by_key(|found| found.root.components().count())
    }

    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The cgroup of a process; of this one for `None`.
    ///
    /// # Errors
    /// If there is no such process, or its cgroup cannot be seen from here.
    pub fn of_process(&self, pid: Option<u32>) -> Result<Cgroup, Error> {
        let process = pid.map_or("self".to_owned(), |pid| pid.to_string());
        let file = format!("/proc/{process}/cgroup");
        let text = fs::read_to_string(&file).map_err(|source| match (source.kind(), source.raw_os_error(), pid) {
            (io::ErrorKind::NotFound, _, Some(pid)) | (_, Some(libc::ESRCH), Some(pid)) => Error::NoProcess(pid),
            _ => Error::Cgroup { action: "read", path: file.into(), source },
        })?;
        // Of version 2 there is one line, with the hierarchy number 0 and no controllers.
        let path = text.lines().find_map(|line| line.strip_prefix("0::")).ok_or(Error::NoCgroup2)?;
        // The kernel says so of a process that is in a cgroup which was removed; such a process is at its end.
        let path = path.strip_suffix(" (deleted)").unwrap_or(path);
        let outside = || Error::OutsideNamespace { process: process.clone(), path: path.to_owned() };
        let below = Path::new(path).strip_prefix(&self.root).map_err(|_| outside())?;
        if has_parent(below) {
            return Err(outside());
        }
        self.cgroup(self.mount.join(below))
    }

    /// The cgroup at a path, given in full or as in /proc/PID/cgroup.
    ///
    /// # Errors
    /// If there is none.
    pub fn at(&self, path: &Path) -> Result<Cgroup, Error> {
        let full = if path.starts_with(&self.mount) {
            path.to_path_buf()
        } else {
            let below = path.strip_prefix(&self.root).unwrap_or(path);
            self.mount.join(below.strip_prefix("/").unwrap_or(below))
        };
        if has_parent(&full) {
            return Err(self.not_cgroup(path));
        }
        self.cgroup(full).map_err(|_| self.not_cgroup(path))
    }

    /// The cgroup of a systemd unit: wherever below there is one of its name.
    ///
    /// # Errors
    /// If there is none, or more than one (a user's units have their names for themselves).
    pub fn unit(&self, unit: &str) -> Result<Cgroup, Error> {
        // `systemctl` takes a name without a suffix for a service, too.
        let name = if unit.contains('.') { unit.to_owned() } else { format!("{unit}.service") };
        let known = [".service", ".scope", ".slice"].iter().any(|suffix| name.ends_with(suffix));
        if !known || name.contains('/') {
            return Err(Error::UnitName(unit.to_owned()));
        }
        let mut found: Vec<Cgroup> = self
            .all()
            .into_values()
            .filter(|cgroup| cgroup.directory.file_name().is_some_and(|own| *own == *name))
            .collect();
        found.sort_by(|a, b| a.path.cmp(&b.path));
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Ok(one),
            (None, _) => Err(Error::NoUnit { unit: name, mount: self.mount.clone(), systemd: has_systemd() }),
            (Some(last), false) => {
                let paths = found.into_iter().chain([last]).map(|cgroup| cgroup.path).collect();
                Err(Error::ManyUnits { unit: name, paths })
            }
        }
    }

    /// All cgroups by their numbers.
    pub fn all(&self) -> HashMap<u64, Cgroup> {
        let mut found = HashMap::new();
        let mut waiting = vec![self.mount.clone()];
        while let Some(directory) = waiting.pop() {
            // What cannot be read has been removed meanwhile.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    waiting.push(entry.path());
                }
            }
            if let Ok(cgroup) = self.cgroup(directory) {
                found.insert(cgroup.id, cgroup);
            }
        }
        found
    }

    /// The cgroup itself and those above it, the nearest first, as far as they can be seen from here.
    pub fn upwards(&self, cgroup: &Cgroup) -> impl Iterator<Item = Cgroup> {
        cgroup
            .directory
            .ancestors()
            .take_while(|directory| directory.starts_with(&self.mount))
            .filter_map(|directory| self.cgroup(directory.to_path_buf()).ok())
    }

    /// Makes a cgroup below another.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn make(&self, parent: &Cgroup, name: &str) -> Result<Cgroup, Error> {
        let path = parent.directory.join(name);
        fs::create_dir(&path).map_err(|source| Error::Make { path: path.clone(), source })?;
        self.cgroup(path)
    }

    fn cgroup(&self, directory: PathBuf) -> Result<Cgroup, Error> {
        // Those of version 1 have no cgroup.controllers. The number of a cgroup is the inode of its directory
        // (`cgroup_id`, include/linux/cgroup.h).
        let id = fs::metadata(directory.join("cgroup.controllers"))
            .and_then(|_| fs::metadata(&directory))
            .map_err(|source| Error::Cgroup { action: "look at", path: directory.clone(), source })?
            .ino();
        let below = directory.strip_prefix(&self.mount).unwrap_or(Path::new(""));
        let path = self.root.join(below).display().to_string();
        Ok(Cgroup { path, directory, id })
    }

    fn not_cgroup(&self, path: &Path) -> Error {
        Error::NotCgroup { path: path.to_path_buf(), mount: self.mount.clone() }
    }
}

impl Cgroup {
    /// Refuses what is too deep for the programs to find.
    pub fn check_depth(&self) -> Result<(), Error> {
        let depth = Path::new(&self.path).components().count() as u32 - 1;
        if depth <= MAX_DEPTH { Ok(()) } else { Err(Error::TooDeep { path: self.path.clone(), depth }) }
    }

    /// Moves a process, with all of its threads, into the cgroup. Its sockets stay with the cgroup that they were
    /// made in.
    ///
    /// # Errors
    /// If the process is gone, or the kernel refuses.
    pub fn take(&self, pid: u32) -> Result<(), Error> {
        fs::write(self.directory.join("cgroup.procs"), pid.to_string()).map_err(|source| match source.raw_os_error() {
            Some(libc::ESRCH) => Error::NoProcess(pid),
            _ => Error::Move { pid, path: self.directory.clone(), source },
        })
    }

    /// Whether it has a name that qjump gives to those that it makes: `qjump-PID` and `qjump-run-PID`.
    pub fn is_of_qjump(&self) -> bool {
        let name = self.directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("qjump-").map(|rest| rest.strip_prefix("run-").unwrap_or(rest));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit()))
    }

    /// Whether a process is in the cgroup, or in one below it.
    pub fn is_populated(&self) -> bool {
        let events = fs::read_to_string(self.directory.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "populated 1")
    }

    /// Moves all processes to the cgroup above and removes this one.
    ///
    /// # Errors
    /// If the kernel refuses. That it is gone already is no error.
    pub fn dissolve(&self) -> Result<(), Error> {
        const TRIES: u32 = 50;
        let Some(parent) = self.directory.parent() else { return Ok(()) };
        for attempt in 1.. {
            for pid in fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default().lines() {
                // One that has ended need not be moved, and one that cannot be moved stops the removal.
                let _ = fs::write(parent.join("cgroup.procs"), pid);
            }
            match fs::remove_dir(&self.directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                // Processes that were just made, or that have not quite ended.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && attempt < TRIES => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(source) => return Err(Error::Remove { path: self.directory.clone(), source }),
                Ok(()) => break,
            }
        }
        Ok(())
    }
}

/// Whether systemd runs this host (sd_booted(3)).
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn has_parent(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}

/// Space, tab, newline and backslash are octal numbers in mountinfo.
fn unescape(field: &str) -> PathBuf {
    let text = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(field.to_owned(), |text, (code, character)| text.replace(code, character));
    PathBuf::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &[&str]) -> Option<(String, String)> {
        let shown = |path: PathBuf| path.display().to_string();
        Hierarchy::parse(&lines.join("\n")).map(|found| (shown(found.mount), shown(found.root)))
    }

    #[test]
    fn finds_the_mount_of_every_layout() {
        let v1 = "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        let own = |root: &str, at: &str| {
            format!("41 31 0:38 {root} {at} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate")
        };
        let some = |mount: &str, root: &str| Some((mount.to_owned(), root.to_owned()));
        assert_eq!(parse(&[v1, &own("/", "/sys/fs/cgroup/unified")]), some("/sys/fs/cgroup/unified", "/"));
        assert_eq!(parse(&[&own("/", "/sys/fs/cgroup")]), some("/sys/fs/cgroup", "/"));
        // A container without a cgroup namespace sees its own part; one that has the whole, too, uses the whole.
        let part = own("/docker/4f", "/sys/fs/cgroup");
        assert_eq!(parse(&[&part]), some("/sys/fs/cgroup", "/docker/4f"));
        assert_eq!(
            parse(&[&part, &own("/", "/host cgroup".replace(' ', "\\040").as_str())]),
            some("/host cgroup", "/")
        );
        // Mounted from outside into a namespace.
        assert_eq!(parse(&[&own("/../..", "/sys/fs/cgroup")]), None);
        assert_eq!(parse(&[v1]), None);
        assert_eq!(parse(&["", "-", "41 31 0:38 - cgroup2"]), None);
    }

    #[test]
    fn names_that_are_no_units_are_refused() {
        let nowhere = Hierarchy { mount: "/nonexistent".into(), root: "/".into() };
        for name in ["x.timer", "a/b.service", "x.y"] {
            assert!(matches!(nowhere.unit(name), Err(Error::UnitName(_))), "{name}");
        }
        for name in ["x", "x.service", "user-0.slice"] {
            assert!(matches!(nowhere.unit(name), Err(Error::NoUnit { .. })), "{name}");
        }
        assert!(matches!(nowhere.at(Path::new("/../x")), Err(Error::NotCgroup { .. })));
    }
}
