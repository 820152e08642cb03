//! Levels for programs: which processes, sockets and cgroups there are, and which level each gets.
//!
//! A [`Grant`] belongs to a cgroup. eBPF programs on that cgroup give its sockets the level (ebpf/src/authority.rs);
//! sockets from before are *adopted*, one by one. A change is made under the lock of the host; what attaches
//! programs comes first, the grant, which makes them work, afterwards, and what fails is undone.

pub mod assign;
pub mod cgroup;
mod error;
pub mod grants;
pub mod live;
pub mod process;
pub mod rules;

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::BorrowedFd,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::sys::socket::{setsockopt, sockopt};
use qjump_ebpf::{
    Level,
    grant::{GRANT_BY_RULE, GRANT_OWNS_CGROUP, Grant, MaybeLevel, decide},
};

pub use error::Error;

use crate::dataplane::{Lock, ensure_bpffs, require_capabilities};
use cgroup::{Cgroup, Hierarchy};
use grants::{Grants, Programs};
use live::{Count, Walk, processes_of};

/// What somebody wants to tag, or no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// A process; it gets a cgroup of its own.
    Process(u32),
    /// A cgroup, by its path.
    Cgroup(std::path::PathBuf),
    /// The cgroup of a systemd unit.
    Unit(String),
}

/// What a grant is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The level.
    pub level: Level,
    /// `SO_SNDBUF` of its sockets, bytes.
    pub send_buffer: Option<u32>,
    /// The user who asks, if that is not whoever runs this command.
    pub by: Option<u32>,
}

/// The largest send buffer, bytes: the kernel doubles what it is given, into an int.
pub const MOST_SEND_BUFFER: u32 = 1 << 30;

/// What a change did.
#[derive(Debug)]
pub struct Changed {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The sockets that were there.
    pub sockets: Count,
    /// The level that the cgroup still has from one above it.
    pub level: Option<Level>,
}

impl Changed {
    /// What was not moved, line by line.
    pub fn problems(&self) -> Vec<String> {
        let Count { failed, ended, unreachable, forbidden, .. } = &self.sockets;
        let each =
            failed.iter().map(|(pid, fd, error)| format!("not moved: descriptor {fd} of process {pid}: {error}"));
        let counted = [
            (ended, "process(es) ended meanwhile"),
            (
                unreachable,
                "process(es) are in a PID namespace that cannot be seen from here; their sockets were not moved",
            ),
            (
                forbidden,
                "process(es) have sockets that an agent without CAP_SYS_PTRACE may not take hold of: those that are there stay as they \
                 are, and new ones follow; as root, this command moves them all",
            ),
        ];
        let counted = counted.into_iter().filter(|(number, _)| **number > 0);
        each.chain(counted.map(|(number, what)| format!("{number} {what}"))).collect()
    }
}

/// The only one who changes grants on this host, for as long as it lives.
pub struct Session {
    hierarchy: Hierarchy,
    grants: Grants,
    programs: Option<Programs>,
    tolerant: bool,
    // Dropped last: what is removed at the end is removed under the lock.
    _lock: Lock,
}

impl Session {
    /// Waits for others, and removes the grants of cgroups that are gone or were made for processes that have ended.
    ///
    /// # Errors
    /// If rights or cgroups are missing, or the kernel refuses the programs.
    pub fn begin() -> Result<Self, Error> {
        require_capabilities("attaching")?;
        let hierarchy = Hierarchy::find()?;
        ensure_bpffs()?;
        let lock = Lock::take()?;
        // What another version may have left.
        grants::remove_unneeded();
        let begin = || {
            let (grants, programs) = match Grants::open()? {
                Some(grants) => (grants, None),
                None => {
                    let programs = Programs::load()?;
                    (Grants::open()?.ok_or(Error::NoCgroup2)?, Some(programs))
                }
            };
            Ok((grants, programs))
        };
        match begin() {
            Ok((grants, programs)) => {
                let mut session = Self { hierarchy, grants, programs, tolerant: false, _lock: lock };
                session.sweep();
                Ok(session)
            }
            Err(error) => {
                grants::remove_unneeded();
                Err(error)
            }
        }
    }

    /// The same, which leaves sockets that the kernel keeps from it where they are, and counts their processes.
    #[must_use]
    pub const fn tolerant(mut self) -> Self {
        self.tolerant = true;
        self
    }

    /// The cgroups of this host.
    pub const fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    fn programs(&mut self) -> Result<&mut Programs, Error> {
        if self.programs.is_none() {
            self.programs = Some(Programs::load()?);
        }
        Ok(self.programs.as_mut().expect("it was loaded just now"))
    }

    /// Grants a level to what the selector names, and moves the sockets that are there.
    ///
    /// # Errors
    /// If it is not there, or the kernel refuses; then everything is as it was.
    pub fn tag(&mut self, selector: &Selector, request: &Request) -> Result<Changed, Error> {
        match selector {
            Selector::Process(pid) => self.tag_process(*pid, request),
            Selector::Cgroup(path) => {
                let cgroup = self.hierarchy.at(path)?;
                if cgroup.path == "/" {
                    return Err(Error::WholeHost(cgroup.path));
                }
                self.tag_cgroup(cgroup, request, 0)
            }
            Selector::Unit(unit) => self.tag_cgroup(self.hierarchy.unit(unit)?, request, 0),
        }
    }

    /// `origin` is [`GRANT_BY_RULE`], or 0 for a person.
    fn tag_cgroup(&mut self, cgroup: Cgroup, request: &Request, origin: u32) -> Result<Changed, Error> {
        let owned = self.grants.get(cgroup.id).map_or(0, |grant| grant.flags & GRANT_OWNS_CGROUP);
        let before = self.grant(&cgroup, request, owned | origin)?;
        self.settle(&cgroup).map_or_else(
            |error| {
                self.revert(&cgroup, before);
                Err(error)
            },
            |sockets| Ok(Changed { level: Some(request.level), cgroup: cgroup.clone(), sockets }),
        )
    }

    fn tag_process(&mut self, pid: u32, request: &Request) -> Result<Changed, Error> {
        let origin = self.hierarchy.of_process(Some(pid))?;
        if process::is_kernel_thread(pid) {
            return Err(Error::KernelThread(pid));
        }
        if self.grants.get(origin.id).is_some_and(|grant| grant.flags & GRANT_OWNS_CGROUP != 0) {
            return self.tag_cgroup(origin, request, 0);
        }
        let cgroup = self.make(&origin, &format!("qjump-{pid}"), request)?;
        let done = self
            .programs()
            .and_then(|programs| programs.attach_origin(&cgroup, &origin))
            .and_then(|()| cgroup.take(pid))
            .and_then(|()| self.settle(&cgroup));
        match done {
            Ok(sockets) => Ok(Changed { level: Some(request.level), cgroup, sockets }),
            Err(error) => {
                let _ = self.remove(&cgroup);
                Err(error)
            }
        }
    }

    /// Makes a cgroup that has a grant, and goes with it.
    ///
    /// # Errors
    /// If the kernel refuses; then there is none.
    pub fn make(&mut self, parent: &Cgroup, name: &str, request: &Request) -> Result<Cgroup, Error> {
        let cgroup = self.hierarchy.make(parent, name)?;
        match self.grant(&cgroup, request, GRANT_OWNS_CGROUP) {
            Ok(_) => Ok(cgroup),
            Err(error) => {
                let _ = cgroup.dissolve();
                Err(error)
            }
        }
    }

    /// Attaches the programs and grants the level; returns the grant before.
    fn grant(&mut self, cgroup: &Cgroup, request: &Request, flags: u32) -> Result<Option<Grant>, Error> {
        cgroup.check_depth()?;
        let before = self.grants.get(cgroup.id);
        let grant = new_grant(request, flags);
        let done = self
            .programs()
            .and_then(|programs| programs.attach(cgroup, request.send_buffer.is_some()))
            .and_then(|()| self.grants.put(cgroup.id, grant));
        if done.is_err() {
            self.revert(cgroup, before);
        }
        done.map(|()| before)
    }

    /// Back to the grant before, or to none.
    fn revert(&mut self, cgroup: &Cgroup, before: Option<Grant>) {
        let _ = match before {
            Some(grant) => self.grants.put(cgroup.id, grant),
            None => self.grants.remove(cgroup.id).and_then(|()| detach(cgroup.id)),
        };
        let _ = self.settle(cgroup);
    }

    /// Takes back what was granted to what the selector names.
    ///
    /// # Errors
    /// If it has no grant of its own, or is not there.
    pub fn untag(&mut self, selector: &Selector) -> Result<Changed, Error> {
        let cgroup = match selector {
            Selector::Process(pid) => {
                let cgroup = self.hierarchy.of_process(Some(*pid))?;
                let governing = self.governing(&cgroup);
                match governing {
                    Some((from, grant)) if from.id != cgroup.id || grant.flags & GRANT_OWNS_CGROUP == 0 => {
                        return Err(Error::TaggedByCgroup { pid: *pid, path: from.path });
                    }
                    _ => cgroup,
                }
            }
            Selector::Cgroup(path) => self.hierarchy.at(path)?,
            Selector::Unit(unit) => self.hierarchy.unit(unit)?,
        };
        if self.grants.get(cgroup.id).is_none() {
            return Err(Error::NotTagged { path: cgroup.path });
        }
        self.remove(&cgroup)
    }

    /// Takes back every grant; how many there were.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn untag_all(&mut self) -> Result<usize, Error> {
        self.grants.remove_rule_grants()?;
        let cgroups = self.hierarchy.all();
        let tagged = tagged()?;
        for id in &tagged {
            match cgroups.get(id) {
                Some(cgroup) => drop(self.remove(cgroup)?),
                None => self.remove_gone(*id)?,
            }
        }
        Ok(tagged.len())
    }

    /// Removes the grant of a cgroup, and the cgroup if it was made for it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(&mut self, cgroup: &Cgroup) -> Result<Changed, Error> {
        // The links tell it, too, when the grant is gone already.
        let owned = grants::was_made_for_process(cgroup.id)
            || self.grants.get(cgroup.id).is_some_and(|grant| grant.flags & GRANT_OWNS_CGROUP != 0);
        self.grants.remove(cgroup.id)?;
        let sockets = match self.settle(cgroup) {
            // It was removed meanwhile, and all of its processes before it.
            Err(Error::Live(live::LiveError::NoCgroup { .. })) => Ok(Count::default()),
            other => other,
        };
        let dissolved = if owned { cgroup.dissolve() } else { Ok(()) };
        // Programs without a grant are what is left if this is interrupted: `sweep` goes on there.
        detach(cgroup.id)?;
        let sockets = sockets?;
        dissolved?;
        let level = self.governing(cgroup).and_then(|(_, grant)| Level::from_priority(grant.level));
        Ok(Changed { cgroup: cgroup.clone(), sockets, level })
    }

    fn remove_gone(&mut self, id: u64) -> Result<(), Error> {
        self.grants.remove(id)?;
        detach(id)
    }

    /// Removes what nobody needs any more: a command that was killed, or a cgroup that somebody removed, left it.
    fn sweep(&mut self) {
        let cgroups = self.hierarchy.all();
        for id in tagged().unwrap_or_default() {
            let grant = self.grants.get(id);
            let owned = grant.is_some_and(|grant| grant.flags & GRANT_OWNS_CGROUP != 0);
            match cgroups.get(&id) {
                // Programs come before the grant and go after it, under one lock.
                Some(cgroup) if grant.is_none() || owned && !cgroup.is_populated() => drop(self.remove(cgroup)),
                _ if grant.is_none() || grants::is_gone(id) => drop(self.remove_gone(id)),
                _ => {}
            }
        }
        // A cgroup comes before all that. A name alone proves nothing, so no process is moved.
        for cgroup in cgroups.values().filter(|cgroup| cgroup.is_of_qjump() && !cgroup.is_populated()) {
            if self.grants.get(cgroup.id).is_none() {
                let _ = fs::remove_dir(&cgroup.directory);
            }
        }
    }

    /// The nearest grant of a cgroup, and whose it is.
    fn governing(&self, cgroup: &Cgroup) -> Option<(Cgroup, Grant)> {
        self.hierarchy.upwards(cgroup).find_map(|above| self.grants.get(above.id).map(|grant| (above, grant)))
    }

    /// Gives every live socket of a cgroup, and of those below it, what the grants say now. A socket that has its level from
    /// a rule of its own keeps it, unless a person has granted otherwise.
    fn settle(&mut self, cgroup: &Cgroup) -> Result<Count, Error> {
        let mut known: BTreeMap<u32, Option<(u64, Grant)>> = BTreeMap::new();
        Ok(Walk::new(self.tolerant).cgroup(&cgroup.directory, |socket, live| {
            let governing = *known.entry(live.pid).or_insert_with(|| {
                let at = self.hierarchy.of_process(Some(live.pid)).ok()?;
                self.governing(&at).map(|(from, grant)| (from.id, grant))
            });
            let by_person = governing.is_some_and(|(_, grant)| grant.flags & GRANT_BY_RULE == 0);
            if !by_person && self.grants.is_granted_by_rule(socket) { Ok(()) } else { self.follow(socket, governing) }
        })?)
    }

    /// Gives a socket what the grant of a cgroup, if there is one, has for it.
    fn follow(&mut self, socket: BorrowedFd<'_>, governing: Option<(u64, Grant)>) -> io::Result<()> {
        let Some((id, grant)) = governing else {
            set_priority(socket, Level::BEST_EFFORT)?;
            self.grants.forget(socket);
            return Ok(());
        };
        if grant.send_buffer != 0 {
            setsockopt(&socket, sockopt::SndBuf, &(grant.send_buffer as usize))?;
        }
        let asked = self.grants.record(socket).unwrap_or_default().asked;
        self.adopt(socket, id, asked, decide(MaybeLevel::from_number(grant.level), asked))
    }

    /// Gives a socket the level of a rule, whatever its process asked for before.
    fn assign(&mut self, socket: BorrowedFd<'_>, level: Level) -> io::Result<()> {
        let key = self.grants.rule_grant(level).map_err(io::Error::other)?;
        self.adopt(socket, key, MaybeLevel::NONE, MaybeLevel::of(level))
    }

    fn adopt(&mut self, socket: BorrowedFd<'_>, by: u64, asked: MaybeLevel, level: MaybeLevel) -> io::Result<()> {
        self.grants.adopt(socket, by, asked)?;
        set_priority(socket, level.level().unwrap_or(Level::BEST_EFFORT))?;
        // The program on the cgroup of the socket has noted this as what its process asks for.
        self.grants.adopt(socket, by, asked)
    }

    /// Waits a moment for the processes of a cgroup to end; how many are left.
    pub fn remaining(cgroup: &Cgroup) -> usize {
        const TRIES: u32 = 20;
        for _ in 0..TRIES {
            if !cgroup.is_populated() {
                return 0;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        processes_of(&cgroup.directory).map_or(0, |pids| pids.len())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        grants::remove_unneeded();
    }
}

fn tagged() -> Result<Vec<u64>, Error> {
    grants::tagged().map_err(|source| Error::State {
        action: "list",
        path: Path::new("/sys/fs/bpf/qjump-tags").into(),
        source,
    })
}

fn detach(id: u64) -> Result<(), Error> {
    grants::detach(id).map_err(|source| Error::State {
        action: "remove",
        path: Path::new("/sys/fs/bpf/qjump-tags").join(id.to_string()),
        source,
    })
}

fn set_priority(socket: BorrowedFd<'_>, level: Level) -> io::Result<()> {
    Ok(setsockopt(&socket, sockopt::Priority, &i32::from(level.number()))?)
}

fn new_grant(request: &Request, flags: u32) -> Grant {
    Grant {
        level: request.level.number().into(),
        send_buffer: request.send_buffer.unwrap_or(0),
        uid: request.by.unwrap_or_else(caller),
        flags,
        since_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64),
    }
}

/// The user who runs this command; `sudo` says who that was before.
fn caller() -> u32 {
    let uid = nix::unistd::getuid();
    let before = std::env::var("SUDO_UID").ok().and_then(|text| text.parse().ok());
    before.filter(|_| uid.is_root()).unwrap_or(uid.as_raw())
}

/// What there is to say about one grant.
#[derive(Debug)]
pub struct Tag {
    /// The number of the cgroup.
    pub id: u64,
    /// The cgroup, unless it is gone or cannot be seen from here.
    pub cgroup: Option<Cgroup>,
    /// The grant.
    pub grant: Grant,
    /// Whether the cgroup was removed, or was made for processes that have ended. The next change removes the grant.
    pub is_over: bool,
    /// How many processes have their level from it.
    pub processes: usize,
    /// How many live sockets there are at each level.
    pub sockets: [usize; qjump_ebpf::LEVELS],
}

/// What is tagged.
///
/// # Errors
/// If this command lacks the rights to see it.
pub fn list() -> Result<Vec<Tag>, Error> {
    crate::dataplane::require_visible()?;
    let Some(grants) = Grants::open()? else { return Ok(Vec::new()) };
    let hierarchy = Hierarchy::find()?;
    let cgroups = hierarchy.all();
    let nearest = |pid: u32| {
        let at = hierarchy.of_process(Some(pid)).ok()?;
        hierarchy.upwards(&at).map(|above| above.id).find(|&id| grants.get(id).is_some())
    };
    let mut tags = Vec::new();
    for id in tagged()? {
        // One without a grant is being made, or was left half-way.
        let Some(grant) = grants.get(id) else { continue };
        let cgroup = cgroups.get(&id).cloned();
        let owned = grant.flags & GRANT_OWNS_CGROUP != 0;
        let ended = owned && cgroup.as_ref().is_some_and(|cgroup| !cgroup.is_populated());
        let mut tag = Tag { id, grant, is_over: ended || grants::is_gone(id), cgroup, processes: 0, sockets: [0; _] };
        if let Some(cgroup) = tag.cgroup.as_ref().filter(|_| !tag.is_over) {
            let mut walk = Walk::default();
            for pid in processes_of(&cgroup.directory)?.into_iter().filter(|&pid| nearest(pid) == Some(id)) {
                tag.processes += 1;
                let count = walk.process(pid, |socket, live| {
                    let level = grants.record(socket).map_or(MaybeLevel::from_number(live.priority), |record| {
                        let granted = grants.get(record.adopted_by).unwrap_or(grant);
                        decide(MaybeLevel::from_number(granted.level), record.asked)
                    });
                    tag.sockets[level.level().map_or(0, Level::index)] += 1;
                    Ok(())
                });
                match count {
                    Ok(_) | Err(live::LiveError::NoProcess { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        tags.push(tag);
    }
    Ok(tags)
}
