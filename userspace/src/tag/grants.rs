//! The grants in the kernel: maps that all objects of a host share, and the links of each tagged cgroup.
//!
//! They are pinned under /sys/fs/bpf/qjump-tags, beside the interfaces: `maps/NAME`, and for each grant a directory
//! with the number of its cgroup. Only the holder of the host's lock changes them.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, SkStorage},
    programs::{Program, ProgramFd},
};
use nix::sys::stat::{Mode, umask};
use qjump_ebpf::{
    Level,
    grant::{GRANT_BY_RULE, Grant, MAX_GRANTS, MaybeLevel, SocketRecord, is_rule_grant, rule_grant},
    names,
};

use super::{Error, Request, cgroup::Cgroup, new_grant};
use crate::dataplane::{
    self, BPFFS, Pins, shorten,
    sys::{self, MapShape},
};

/// The maps that all objects share.
const MAPS: [&str; 3] = [names::GRANTS, names::GENERATION, names::SOCKETS];

/// A program and where it belongs: its `enum bpf_attach_type` (include/uapi/linux/bpf.h).
type Hook = (&'static str, u32);

const SOCKOPS: Hook = (names::SOCKOPS, 3);

/// What every grant needs.
const PROGRAMS: [Hook; 4] = [(names::SKB_LEVEL, 1), (names::SOCK_CREATE, 2), SOCKOPS, (names::SETSOCKOPT, 22)];

/// What a grant that sets send buffers needs, too.
const BUFFER_PROGRAMS: [Hook; 4] =
    [(names::CONNECT4, 10), (names::CONNECT6, 11), (names::SENDMSG4, 14), (names::SENDMSG6, 15)];

/// The pin of a link to the cgroup that a process was taken from.
const ORIGIN: &str = "origin";

fn root() -> PathBuf {
    Path::new(BPFFS).join("qjump-tags")
}

fn map_pin(name: &str) -> PathBuf {
    root().join("maps").join(name)
}

/// Where the links of a cgroup's grant are pinned.
fn links_of(cgroup: u64) -> PathBuf {
    root().join(cgroup.to_string())
}

/// What a map must look like to be shared.
fn shape(name: &str) -> MapShape {
    const HASH: u32 = 1;
    const ARRAY: u32 = 2;
    const SK_STORAGE: u32 = 24;
    let shape = |kind, key: usize, value: usize, max_entries| MapShape {
        kind,
        key_size: key as u32,
        value_size: value as u32,
        max_entries,
    };
    match name {
        names::GRANTS => shape(HASH, 8, size_of::<Grant>(), MAX_GRANTS),
        names::SOCKETS => shape(SK_STORAGE, 4, size_of::<SocketRecord>(), 0),
        _ => shape(ARRAY, 4, 8, 1),
    }
}

/// Has `loader` use the shared maps, which it makes if they are not there. The caller holds the lock of the host.
///
/// # Errors
/// If they cannot be made, or are another version's.
pub fn share_maps(loader: &mut EbpfLoader<'_>) -> Result<(), dataplane::Error> {
    let failed = |path: PathBuf| move |source| dataplane::Error::Directory { path, source };
    let before = umask(Mode::from_bits_truncate(0o077));
    let made = fs::create_dir_all(root().join("maps"));
    umask(before);
    made.map_err(failed(root()))?;
    for name in MAPS {
        let path = map_pin(name);
        if path.exists() {
            let found = sys::open_pin(&path).and_then(|fd| sys::map_info(fd.as_fd())).map_err(failed(path.clone()))?;
            if found.shape != shape(name) {
                let why = "it is another version's; remove all grants, `qjump untag --all`, and unload all interfaces";
                return Err(failed(path)(io::Error::other(why)));
            }
        }
        loader.map_pin_path(name, path);
    }
    Ok(())
}

/// Removes the shared maps if no grant and no interface needs them. The caller holds the lock of the host.
pub fn remove_unneeded() {
    if Pins::interfaces().is_ok_and(|names| names.is_empty()) && tagged().is_ok_and(|ids| ids.is_empty()) {
        for name in MAPS {
            let _ = fs::remove_file(map_pin(name));
        }
        let _ = fs::remove_dir(root().join("maps"));
        let _ = fs::remove_dir(root());
    }
}

/// The numbers of the cgroups that have links.
pub fn tagged() -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(root()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        ids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
    }
    ids.sort_unstable();
    Ok(ids)
}

/// Whether the cgroup of a grant is gone: the kernel has detached its links then.
pub fn is_gone(cgroup: u64) -> bool {
    let link = sys::open_pin(&links_of(cgroup).join(names::SKB_LEVEL));
    // A link that cannot be asked is one that a killed command left half-way.
    !link.and_then(|fd| sys::linked_cgroup(fd.as_fd())).is_ok_and(|linked| linked == cgroup)
}

/// Whether the cgroup was made for a process that was tagged: its links tell.
pub fn was_made_for_process(cgroup: u64) -> bool {
    links_of(cgroup).join(ORIGIN).exists()
}

/// Detaches the programs of a grant and removes their pins. That there are none is no error.
pub fn detach(cgroup: u64) -> io::Result<()> {
    let folder = links_of(cgroup);
    for pin in fs::read_dir(&folder).into_iter().flatten() {
        let path = pin?.path();
        // Detached by name: the kernel would take its time over a link that is only unpinned. One whose cgroup is gone
        // is detached already.
        let _ = sys::open_pin(&path).and_then(|fd| sys::detach_link(fd.as_fd()));
        fs::remove_file(path)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The programs, in the kernel but attached to nothing.
pub struct Programs {
    object: Ebpf,
}

impl Programs {
    /// Loads the object, with the shared maps.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn load() -> Result<Self, Error> {
        let bytes = dataplane::object()?;
        let mut loader = dataplane::loader();
        share_maps(&mut loader)?;
        let object =
            loader.load(bytes).map_err(|error| dataplane::Error::Kernel { what: "maps", detail: shorten(&error) })?;
        Ok(Self { object })
    }

    /// Attaches what a grant needs to its cgroup, as far as it is not there: without a grant they do nothing.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach(&mut self, cgroup: &Cgroup, sets_buffers: bool) -> Result<(), Error> {
        let buffer_programs = if sets_buffers { BUFFER_PROGRAMS.as_slice() } else { &[] };
        PROGRAMS
            .iter()
            .chain(buffer_programs)
            .try_for_each(|&hook| self.attach_one(hook, cgroup, &links_of(cgroup.id).join(hook.0)))
    }

    /// Attaches, for the grant of `cgroup`, to the cgroup that its process was taken from, what gives a level to connections
    /// accepted from the listeners that it has: they belong to the cgroup where their listener was made.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn attach_origin(&mut self, cgroup: &Cgroup, origin: &Cgroup) -> Result<(), Error> {
        self.attach_one(SOCKOPS, origin, &links_of(cgroup.id).join(ORIGIN))
    }

    fn attach_one(&mut self, (name, hook): Hook, cgroup: &Cgroup, pin: &Path) -> Result<(), Error> {
        if pin.exists() || self.lacks(name) {
            return Ok(());
        }
        let failed = |detail| Error::Attach { program: name, path: cgroup.path.clone(), detail };
        let directory = fs::File::open(&cgroup.directory).map_err(|error| failed(error.to_string()))?;
        let program = self.program(name).map_err(|error| failed(shorten(error.as_ref())))?;
        let link = sys::link_to_cgroup(program.as_fd(), directory.as_fd(), hook);
        let link = link.map_err(|error| failed(error.to_string()))?;
        let before = umask(Mode::from_bits_truncate(0o077));
        let made = fs::create_dir_all(pin.parent().expect("a pin lies in a directory"));
        umask(before);
        made.and_then(|()| sys::pin(link.as_fd(), pin)).map_err(|error| failed(error.to_string()))
    }

    /// Whether this is a program that the object for old kernels does not have, for they could not run it.
    fn lacks(&self, name: &str) -> bool {
        [names::SENDMSG4, names::SENDMSG6].contains(&name) && self.object.program(name).is_none()
    }

    /// The program of this name, loaded if it is not.
    fn program(&mut self, name: &str) -> Result<&ProgramFd, Box<dyn std::error::Error>> {
        let program = self.object.program_mut(name).ok_or_else(|| format!("the eBPF object has no {name}"))?;
        if program.fd().is_err() {
            match program {
                Program::CgroupSkb(program) => program.load()?,
                Program::CgroupSock(program) => program.load()?,
                Program::CgroupSockopt(program) => program.load()?,
                Program::CgroupSockAddr(program) => program.load()?,
                Program::SockOps(program) => program.load()?,
                _ => return Err(format!("{name} is no program for cgroups").into()),
            }
        }
        Ok(program.fd()?)
    }
}

/// The programs for cgroups that the kernel refuses, and why. They are attached to nothing.
pub fn refused_programs(object: Ebpf) -> Vec<(&'static str, String)> {
    let mut programs = Programs { object };
    let refusal = |(name, _): &Hook| {
        if programs.lacks(name) {
            return None;
        }
        Some((*name, shorten(programs.program(name).err()?.as_ref())))
    };
    PROGRAMS.iter().chain(&BUFFER_PROGRAMS).filter_map(refusal).collect()
}

/// The shared maps.
pub struct Grants {
    grants: HashMap<MapData, u64, Grant>,
    generation: Array<MapData, u64>,
    sockets: SkStorage<MapData, SocketRecord>,
}

impl Grants {
    /// Opens the pinned maps; `None` if there are none.
    ///
    /// # Errors
    /// If they cannot be opened, or are another version's.
    pub fn open() -> Result<Option<Self>, Error> {
        if !map_pin(names::GRANTS).try_exists().map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => dataplane::Error::Permission { path: root() },
            _ => dataplane::Error::Directory { path: root(), source },
        })? {
            return Ok(None);
        }
        let failed = |name| move |source| Error::State { action: "open", path: map_pin(name), source };
        let open = |name| MapData::from_pin(map_pin(name)).map_err(io::Error::other).map_err(failed(name));
        let cannot = |name| move |error| failed(name)(io::Error::other::<aya::maps::MapError>(error));
        Ok(Some(Self {
            grants: HashMap::try_from(Map::HashMap(open(names::GRANTS)?)).map_err(cannot(names::GRANTS))?,
            generation: Array::try_from(Map::Array(open(names::GENERATION)?)).map_err(cannot(names::GENERATION))?,
            sockets: SkStorage::try_from(Map::SkStorage(open(names::SOCKETS)?)).map_err(cannot(names::SOCKETS))?,
        }))
    }

    /// The grant of a cgroup.
    pub fn get(&self, cgroup: u64) -> Option<Grant> {
        self.grants.get(&cgroup, 0).ok()
    }

    /// Grants, or changes a grant.
    ///
    /// # Errors
    /// If there are too many.
    pub fn put(&mut self, cgroup: u64, grant: Grant) -> Result<(), Error> {
        self.grants.insert(cgroup, grant, 0).map_err(|_| Error::TooMany)?;
        self.changed()
    }

    /// Takes a grant back. That there is none is no error.
    ///
    /// # Errors
    /// If the kernel refuses to count the change.
    pub fn remove(&mut self, cgroup: u64) -> Result<(), Error> {
        let _ = self.grants.remove(&cgroup);
        self.changed()
    }

    /// Has every socket look for its grant again. After the change, never before: see `claim_of` in the programs.
    fn changed(&mut self) -> Result<(), Error> {
        let next = self.generation.get(&0, 0).unwrap_or(0) + 1;
        self.generation.set(0, next, 0).map_err(|error| Error::State {
            action: "change",
            path: map_pin(names::GENERATION),
            source: io::Error::other(error),
        })
    }

    /// What a socket remembers.
    pub fn record(&self, socket: BorrowedFd<'_>) -> Option<SocketRecord> {
        self.sockets.get(&socket, 0).ok()
    }

    /// Has a grant, by its key, count for a socket that asks for a level, wherever the socket was made.
    pub fn adopt(&mut self, socket: BorrowedFd<'_>, by: u64, asked: MaybeLevel) -> io::Result<()> {
        let record = SocketRecord::adopted(by, asked);
        self.sockets.insert(&socket, record, 0).map_err(io::Error::other)
    }

    /// The key of the grant of rules at this level, which is made if it is not there.
    ///
    /// # Errors
    /// If there are too many grants.
    pub fn rule_grant(&mut self, level: Level) -> Result<u64, Error> {
        let key = rule_grant(level);
        if self.get(key).is_none() {
            self.put(key, new_grant(&Request { level, send_buffer: None, by: None }, GRANT_BY_RULE))?;
        }
        Ok(key)
    }

    /// Whether a socket has its level from a rule that was about the socket.
    pub fn is_granted_by_rule(&self, socket: BorrowedFd<'_>) -> bool {
        let adopter = self.record(socket).map_or(0, |record| record.adopted_by);
        is_rule_grant(adopter) && self.get(adopter).is_some()
    }

    /// Takes back what rules granted to sockets.
    ///
    /// # Errors
    /// If the kernel refuses to count the change.
    pub fn remove_rule_grants(&mut self) -> Result<(), Error> {
        Level::strictest_first().try_for_each(|level| self.remove(rule_grant(level)))
    }

    /// Has a socket forget all of this.
    pub fn forget(&mut self, socket: BorrowedFd<'_>) {
        // It may have nothing to forget.
        let _ = self.sockets.remove(&socket);
    }
}
