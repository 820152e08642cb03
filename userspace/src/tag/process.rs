//! What rules ask of a process: its user, program and cgroup.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A process, as it was when it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Its number in this PID namespace.
    pub pid: u32,
    /// Its name, at most 15 bytes; what `ps -o comm` shows.
    pub name: String,
    /// Its effective user.
    pub user: u32,
    /// The file that it runs (a script's interpreter); none if the kernel does not tell.
    pub exe: Option<PathBuf>,
    /// Its cgroup of version 2, as a path below the mount; none if there is no such hierarchy.
    pub cgroup: Option<PathBuf>,
}

impl Process {
    /// Reads what /proc says of a process.
    ///
    /// # Errors
    /// If there is none.
    pub fn read(pid: u32) -> io::Result<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let status = fs::read_to_string(folder.join("status"))?;
        let cgroups = fs::read_to_string(folder.join("cgroup"))?;
        let exe = fs::read_link(folder.join("exe")).ok();
        Self::parse(pid, &status, &cgroups, exe).ok_or_else(|| io::Error::other("/proc has no name or user of it"))
    }

    fn parse(pid: u32, status: &str, cgroups: &str, exe: Option<PathBuf>) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        // Uid: real, effective, saved, file system.
        let user = field("Uid:")?.split_whitespace().nth(1)?.parse().ok()?;
        // Hierarchy 0 is version 2; the others are listed beside it on hybrid hosts.
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::"));
        Some(Self {
            pid,
            name: field("Name:")?.to_owned(),
            user,
            exe: exe.map(|path| existing(&path)),
            cgroup: cgroup.map(|path| existing(Path::new(path))),
        })
    }

    /// The numbers of all processes of this PID namespace, the lowest first.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn all() -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc")? {
            pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        pids.sort_unstable();
        Ok(pids)
    }
}

/// Whether it is a thread of the kernel, which no user's program runs in.
pub fn is_kernel_thread(pid: u32) -> bool {
    /// `PF_KTHREAD` (include/linux/sched.h).
    const KERNEL_THREAD: u64 = 0x0020_0000;
    // pid (name) state ppid pgrp session tty tpgid flags; the name may have anything in it.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(6)?.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// The path without the remark that it was removed since, as a program is by each upgrade.
fn existing(path: &Path) -> PathBuf {
    path.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map_or_else(|| path.to_owned(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_itself() {
        let pid = std::process::id();
        let process = Process::read(pid).unwrap();
        assert_eq!((process.pid, process.user), (pid, nix::unistd::geteuid().as_raw()));
        assert_eq!(process.exe, std::env::current_exe().ok());
        assert!(Process::all().unwrap().contains(&pid));
        assert!(Process::read(0).is_err());
        assert!(!is_kernel_thread(pid) && !is_kernel_thread(0));
    }

    #[test]
    fn takes_the_effective_user_and_the_unified_hierarchy() {
        let status = "Name:\ta b\nUmask:\t0022\nUid:\t1\t2\t3\t4\n";
        let cgroups = "12:cpu:/other\n1:name=systemd:/wrong\n0::/a.slice/b.service (deleted)\n";
        let expected = Process {
            pid: 9,
            name: "a b".into(),
            user: 2,
            exe: Some("/usr/bin/x".into()),
            cgroup: Some("/a.slice/b.service".into()),
        };
        assert_eq!(Process::parse(9, status, cgroups, Some("/usr/bin/x (deleted)".into())), Some(expected));
        assert_eq!(Process::parse(9, status, "1:cpu:/\n", None).unwrap().cgroup, None);
        assert_eq!(Process::parse(9, "", cgroups, None), None);
    }
}
