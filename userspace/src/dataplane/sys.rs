//! The few system calls that no crate wraps: what the kernel says of a map or a link, a grace period,
//! and the limiter words in shared memory.

use std::{
    ffi::CString,
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

use aya::programs::{ProgramError, loaded_programs};
use nix::sys::{
    mman::{MapFlags, ProtFlags, mmap, munmap},
    resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
};
use qjump_ebpf::{Level, LevelState, State};

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_TCX_EGRESS: u32 = 47;

fn bpf(command: libc::c_int, attribute: &mut [u64]) -> io::Result<libc::c_long> {
    // SAFETY: `attribute` is a zero-padded `union bpf_attr` of the size given; the pointers in it are
    // the callers' and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attribute.as_mut_ptr(), size_of_val(attribute)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Opens a pinned object.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(BPF_OBJ_GET, &mut [path.as_ptr() as u64, 0, 0, 0])?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Two 32-bit fields side by side, in this machine's order.
fn halves(fields: [u32; 2]) -> u64 {
    let [a, b] = fields.map(u32::to_ne_bytes);
    u64::from_ne_bytes([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]])
}

/// The ids of the programs on the tcx egress of an interface, in the order in which they run; `None` if the
/// kernel has no tcx.
pub fn tcx_programs(ifindex: u32) -> io::Result<Option<Vec<u32>>> {
    const BPF_PROG_QUERY: libc::c_int = 16;
    let mut ids = [0u32; 64];
    // ifindex and attach type, flags, prog_ids, prog_cnt, and the fields that came later.
    let mut attribute =
        [halves([ifindex, BPF_TCX_EGRESS]), 0, ids.as_mut_ptr() as u64, halves([ids.len() as u32, 0]), 0, 0, 0, 0];
    match bpf(BPF_PROG_QUERY, &mut attribute) {
        Ok(_) => {
            let count = u32::from_ne_bytes(attribute[3].to_ne_bytes()[..4].try_into().expect("four bytes"));
            Ok(Some(ids[..(count as usize).min(ids.len())].to_vec()))
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Detaches a link at once. Unlinking its pin would do so too, but only some time later.
pub fn detach_link(fd: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_LINK_DETACH: libc::c_int = 34;
    bpf(BPF_LINK_DETACH, &mut [halves([fd.as_raw_fd() as u32, 0])]).map(drop)
}

fn info(fd: BorrowedFd<'_>, words: &mut [u32]) -> io::Result<()> {
    let length = size_of_val(words) as u64;
    // bpf_fd: u32, info_len: u32, info: u64.
    let mut head = [0u32; 2];
    head[0] = fd.as_raw_fd() as u32;
    head[1] = length as u32;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut [halves(head), words.as_mut_ptr() as u64, 0, 0]).map(|_| ())
}

/// The kernel's digest of a program's instructions (`struct bpf_prog_info`, `tag`), by the program's number.
pub fn program_tag(id: u32) -> io::Result<u64> {
    const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
    let fd = bpf(BPF_PROG_GET_FD_BY_ID, &mut [halves([id, 0]), 0])?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // type, id, tag[8].
    let mut words = [0u32; 4];
    info(fd.as_fd(), &mut words)?;
    // As aya writes it.
    Ok(u64::from_be(halves([words[2], words[3]])))
}

/// Has the kernel verify and compile a program that does nothing but exchange a word on its stack. It is attached to
/// nothing, and gone when the call returns.
pub fn try_compare_exchange() -> io::Result<()> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const SOCKET_FILTER: u32 = 1;
    // Opcode, registers (destination in the lower half), offset and immediate of each instruction (`struct bpf_insn`).
    const WORD: i16 = -8;
    let program: [(u8, u8, i16, i32); 6] = [
        (0x7a, 0x0a, WORD, 0),    // *(u64 *)(r10 - 8) = 0
        (0xb7, 0x00, 0, 0),       // r0 = 0
        (0xb7, 0x01, 0, 1),       // r1 = 1
        (0xdb, 0x1a, WORD, 0xf1), // r0 = cmpxchg_64(r10 - 8, r0, r1)
        (0xb7, 0x00, 0, 0),       // r0 = 0
        (0x95, 0x00, 0, 0),       // exit
    ];
    let instructions = program.map(|(opcode, registers, offset, immediate)| {
        let [low, high] = offset.to_ne_bytes();
        let registers = if cfg!(target_endian = "big") { registers.rotate_left(4) } else { registers };
        let [a, b, c, d] = immediate.to_ne_bytes();
        u64::from_ne_bytes([opcode, registers, low, high, a, b, c, d])
    });
    let license = c"Dual MIT/GPL";
    // prog_type and insn_cnt, insns, license, and no log.
    let kind = halves([SOCKET_FILTER, instructions.len() as u32]);
    let load = || bpf(BPF_PROG_LOAD, &mut [kind, instructions.as_ptr() as u64, license.as_ptr() as u64, 0, 0, 0]);
    let fd = load().or_else(|error| {
        // Before 5.11 programs count as locked memory of their user, those that were just freed, too.
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
        if error.kind() != io::ErrorKind::PermissionDenied || soft == RLIM_INFINITY {
            return Err(error);
        }
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)?;
        let again = load();
        setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)?;
        again
    })?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    Ok(())
}

/// What makes a map fit for reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapShape {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
}

/// What the kernel says of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Its number on this host.
    pub id: u32,
    /// The name that it was made with, at most 15 bytes.
    pub name: String,
    /// Its shape.
    pub shape: MapShape,
}

/// The state of a map (the first fields of `struct bpf_map_info`). Fails for anything but a map.
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    require_kind(fd, "bpf-map")?;
    let mut words = [0u32; 20];
    info(fd, &mut words)?;
    // type, id, key_size, value_size, max_entries, map_flags, name.
    let name: Vec<u8> = words[6..10].iter().flat_map(|word| word.to_ne_bytes()).take_while(|&byte| byte != 0).collect();
    Ok(MapInfo {
        id: words[1],
        name: String::from_utf8_lossy(&name).into_owned(),
        shape: MapShape { kind: words[0], key_size: words[2], value_size: words[3], max_entries: words[4] },
    })
}

/// Whether a program is loaded that uses this map: attached somewhere, in whatever namespace, or just being
/// loaded. Yes, too, if the kernel does not say; it asks for CAP_SYS_ADMIN.
pub fn map_is_used(id: u32) -> bool {
    loaded_programs().any(|program| match program.and_then(|program| program.map_ids()) {
        Ok(ids) => ids.is_none_or(|ids| ids.contains(&id)),
        // Another error is one of a program that has gone away meanwhile.
        Err(ProgramError::SyscallError(error)) => error.io_error.kind() == io::ErrorKind::PermissionDenied,
        Err(_) => false,
    })
}

/// What the kernel says of a link on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcxLink {
    /// The program behind the link.
    pub program_id: u32,
    /// The interface, or 0 once it is gone.
    pub ifindex: u32,
}

/// The state of a tcx egress link (`struct bpf_link_info`). Fails for anything else.
pub fn tcx_link(fd: BorrowedFd<'_>) -> io::Result<TcxLink> {
    const BPF_LINK_TYPE_TCX: u32 = 11;
    require_kind(fd, "bpf-link")?;
    let mut words = [0u32; 32];
    info(fd, &mut words)?;
    // type, id, prog_id, (padding), then the union: for tcx ifindex and attach_type.
    if words[0] != BPF_LINK_TYPE_TCX || words[5] != BPF_TCX_EGRESS {
        return Err(io::Error::other("it is not a tcx egress link"));
    }
    Ok(TcxLink { program_id: words[2], ifindex: words[4] })
}

/// Attaches a program to a cgroup by a link, beside other people's programs. `hook` is an `enum bpf_attach_type`.
pub fn link_to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: u32) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    // prog_fd and target_fd, attach_type and flags.
    let mut attribute = [halves([program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32]), halves([hook, 0])];
    let fd = bpf(BPF_LINK_CREATE, &mut attribute)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Pins an object.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    const BPF_OBJ_PIN: libc::c_int = 6;
    let path = CString::new(path.as_os_str().as_bytes())?;
    // pathname, bpf_fd and file_flags.
    bpf(BPF_OBJ_PIN, &mut [path.as_ptr() as u64, halves([fd.as_raw_fd() as u32, 0])]).map(drop)
}

/// The number of the cgroup that a link is attached to, or 0 once it is gone (`struct bpf_link_info`). Fails for
/// anything else.
pub fn linked_cgroup(fd: BorrowedFd<'_>) -> io::Result<u64> {
    const BPF_LINK_TYPE_CGROUP: u32 = 3;
    require_kind(fd, "bpf-link")?;
    let mut words = [0u32; 32];
    info(fd, &mut words)?;
    // type, id, prog_id, (padding), then the union: for cgroups cgroup_id and attach_type.
    if words[0] != BPF_LINK_TYPE_CGROUP {
        return Err(io::Error::other("it is not a link to a cgroup"));
    }
    Ok(halves([words[4], words[5]]))
}

/// The kernel answers "info" for maps, programs and links alike, with different layouts.
fn require_kind(fd: BorrowedFd<'_>, kind: &str) -> io::Result<()> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    // Kernels differ on "bpf_link" and "bpf-link".
    if target.to_string_lossy().replace('_', "-").contains(kind) {
        Ok(())
    } else {
        Err(io::Error::other(format!("it is {}, not a {kind}", target.display())))
    }
}

/// Waits until every packet that was in a program when the call began has left it.
///
/// `MEMBARRIER_CMD_GLOBAL` is `synchronize_rcu` (kernel/sched/membarrier.c), and tc programs run as RCU
/// readers. With nohz_full CPUs the kernel refuses it; then a pause stands in that no program lasts.
pub fn grace_period() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call has no memory arguments.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// The inode of the calling thread's network namespace.
pub fn network_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// A path by which a network namespace can be entered: its name under /run/netns, or a process in it.
pub fn namespace_path(inode: u64) -> Option<PathBuf> {
    let entries = |directory: &str| std::fs::read_dir(directory).into_iter().flatten().flatten();
    let named = entries("/run/netns").map(|entry| entry.path());
    let processes = entries("/proc").map(|entry| entry.path().join("ns/net"));
    named.chain(processes).find(|path| std::fs::metadata(path).is_ok_and(|file| file.ino() == inode))
}

/// Has all threads share one heap, from now on. To be called before there are any, by who is to do
/// [`give_memory_back`]: the C library gives back the unused end of the first heap alone.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes plain values.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives the memory that was freed back to the kernel: an allocator may keep what has been used once.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call has no preconditions, and moves nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `CLOCK_MONOTONIC`, ns: the clock of `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer, and this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The state map in this process's memory.
pub struct SharedState {
    memory: NonNull<libc::c_void>,
}

const MAPPED: NonZeroUsize = NonZeroUsize::new(size_of::<State>()).expect("State is not empty");

impl SharedState {
    /// Maps the memory of the state map behind `map`.
    pub fn new(map: impl AsFd) -> io::Result<Self> {
        let flags = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a map whose shape was checked.
        let memory = unsafe { mmap(None, MAPPED, flags, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { memory })
    }

    fn atomic(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `offset` is that of an aligned u64 in `State`, the mapping is as large and lives as
        // long as `self`; the kernel side writes these words atomically too.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().byte_add(offset).cast()) }
    }

    /// The slot in force.
    pub fn active(&self) -> u64 {
        self.atomic(std::mem::offset_of!(State, active)).load(SeqCst) & 1
    }

    /// Puts a slot in force.
    pub fn activate(&self, slot: u64) {
        self.atomic(std::mem::offset_of!(State, active)).store(slot, SeqCst);
    }

    /// One level's limiter word.
    pub fn level(&self, level: Level) -> LevelWord<'_> {
        LevelWord { state: self, level }
    }
}

impl Drop for SharedState {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference outlives `self`.
        let _ = unsafe { munmap(self.memory, MAPPED.get()) };
    }
}

/// See [`SharedState::level`].
pub struct LevelWord<'a> {
    state: &'a SharedState,
    level: Level,
}

impl LevelWord<'_> {
    fn atomic(&self) -> &AtomicU64 {
        let words = std::mem::offset_of!(State, words);
        self.state.atomic(words + self.level.index() * size_of::<qjump_ebpf::layout::Word>())
    }
}

impl LevelState for LevelWord<'_> {
    fn load(&self) -> u64 {
        self.atomic().load(SeqCst)
    }

    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        self.atomic().compare_exchange(current, new, SeqCst, SeqCst).map(drop)
    }

    fn active_slot(&self) -> u64 {
        self.state.active()
    }
}
