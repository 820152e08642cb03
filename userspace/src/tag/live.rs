//! The live sockets of processes, read and changed through duplicates of their file descriptors.
//!
//! A cgroup program decides for sockets that are made from now on. Those that a process has already keep what
//! they were made with, so they are moved one by one: `pidfd_getfd` (Linux 5.6) gives a descriptor of the same
//! open socket, whatever network namespace it belongs to, and `setsockopt` on it changes it for its owner, too. A
//! connection that its owner closes meanwhile ends when the duplicate is gone; therefore there is one at a time.
//!
//! What this cannot see: connections that wait in a listener's queue, descriptors that are on their way in a Unix
//! socket or registered with io_uring alone, and those of a thread that has a table of its own
//! (`unshare(CLONE_FILES)`). Nor does a walk see what appears behind it: first tag the cgroup, then walk.

use std::{
    collections::{BTreeSet, HashSet},
    fmt, fs, io,
    net::{SocketAddr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{SockaddrStorage, getpeername, getsockname},
};
use thiserror::Error;

use crate::dataplane::Capability;

/// The protocol of a socket, as far as a rule or a reader cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// TCP, or MPTCP, which hands its priority down to its subflows.
    Tcp,
    /// UDP, or UDP-Lite.
    Udp,
    /// SCTP.
    Sctp,
    /// A raw IP socket.
    Raw,
    /// A packet socket (`AF_PACKET`).
    Packet,
    /// Another protocol over IP: ping sockets, for example.
    Other,
}

impl Kind {
    /// Whether the number beside an address is a port. Linux shows a raw socket's protocol in its place, and the
    /// identifier of a ping socket.
    const fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Raw => "raw",
            Self::Packet => "packet",
            Self::Other => "other",
        })
    }
}

/// The address family of a network socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`; may carry IPv4, too.
    V6,
    /// `AF_PACKET`.
    Packet,
}

/// A network socket of a process, as it was when it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSocket {
    /// The process through which it was found.
    pub pid: u32,
    /// Its lowest descriptor there.
    pub fd: RawFd,
    /// Its number on this host, as in `socket:[INODE]` of /proc/PID/fd.
    pub inode: u64,
    /// Its address family.
    pub family: Family,
    /// Its protocol.
    pub kind: Kind,
    /// Its own address, if it has a port or is bound to an address. IPv4 over an IPv6 socket is shown as IPv4, and the port of
    /// a protocol that has none as 0.
    pub local: Option<SocketAddr>,
    /// The address that it is connected to.
    pub remote: Option<SocketAddr>,
    /// `SO_PRIORITY`: its level, if it is 0 to 7.
    pub priority: u32,
}

/// What a walk met.
#[derive(Debug, Default)]
pub struct Count {
    /// Sockets for which the callback returned `Ok`.
    pub visited: usize,
    /// Sockets that could not be read, or for which the callback failed: process, descriptor, why.
    pub failed: Vec<(u32, RawFd, io::Error)>,
    /// Processes that ended before all of their sockets had been met. Nothing of them is left to move.
    pub ended: usize,
    /// Processes of the cgroup that are outside of this PID namespace, where nothing of them can be reached.
    pub unreachable: usize,
    /// Processes whose sockets the kernel keeps from this one, on a [`Walk::tolerant`] walk.
    pub forbidden: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.visited += other.visited;
        self.failed.extend(other.failed);
        self.ended += other.ended;
        self.unreachable += other.unreachable;
        self.forbidden += other.forbidden;
    }
}

/// Why the sockets of a process, or the processes of a cgroup, could not be listed.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum LiveError {
    #[error("there is no process {pid}; `ps -p {pid}` would show it")]
    NoProcess { pid: u32 },
    #[error("{pid} is a thread, not a process; give the process's number, 'Tgid' in /proc/{pid}/status")]
    Thread { pid: u32 },
    #[error(
        "the kernel keeps the sockets of process {pid} from this user: taking hold of another process's sockets \
         needs CAP_SYS_PTRACE, and the sysctl kernel.yama.ptrace_scope below 3; run it as root, for example with sudo"
    )]
    Permission { pid: u32 },
    #[error("cannot {action} of process {pid}: {source}")]
    Process { pid: u32, action: &'static str, source: io::Error },
    #[error("there is no cgroup {}", path.display())]
    NoCgroup { path: PathBuf },
    #[error("{} is no cgroup of version 2: it has no cgroup.procs that lists processes", path.display())]
    NotCgroup { path: PathBuf },
    #[error("cannot list the processes of cgroup {}: {source}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
}

/// A walk over the sockets of processes, which meets each socket once, however many descriptors and processes
/// share it.
#[derive(Debug, Default)]
pub struct Walk {
    seen: HashSet<u64>,
    tolerant: bool,
}

impl Walk {
    /// One that counts processes which it may not look into, if `tolerant`, and does not end there.
    pub fn new(tolerant: bool) -> Self {
        Self { tolerant, ..Self::default() }
    }

    /// Calls back for each network socket (IPv4, IPv6, packet) of a process that this walk has not met yet. The
    /// descriptor is a duplicate, valid during the call.
    ///
    /// # Errors
    /// If the process does not exist, is a thread or cannot be looked into. That a descriptor is closed, or that
    /// the process ends meanwhile, is no error; what the callback returns is in the count.
    pub fn process(
        &mut self,
        pid: u32,
        mut each: impl FnMut(BorrowedFd<'_>, &LiveSocket) -> io::Result<()>,
    ) -> Result<Count, LiveError> {
        // First the handle, then the names: should the number be another process's by then, the handle knows.
        let process = hold(pid)?;
        let mut count = Count::default();
        let descriptors = match socket_descriptors(pid) {
            Ok(descriptors) => descriptors,
            Err(_) if has_ended(process.as_fd()) => return Ok(Count { ended: 1, ..count }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(LiveError::Permission { pid }),
            Err(error) => return Err(LiveError::Process { pid, action: "list the descriptors", source: error }),
        };
        for (fd, inode) in descriptors {
            if self.seen.contains(&inode) {
                continue;
            }
            let socket = match pidfd_getfd(process.as_fd(), fd) {
                Ok(socket) => socket,
                Err(error) => match error.raw_os_error() {
                    // Closed meanwhile, or the whole process is gone.
                    Some(libc::EBADF | libc::ESRCH) => continue,
                    Some(libc::EPERM) => return Err(LiveError::Permission { pid }),
                    _ => {
                        count.failed.push((pid, fd, error));
                        continue;
                    }
                },
            };
            match read(pid, fd, socket.as_fd()) {
                // What the descriptor is by now may be another socket than its name said.
                Ok(Some(live)) if self.seen.insert(live.inode) => match each(socket.as_fd(), &live) {
                    Ok(()) => count.visited += 1,
                    Err(error) => count.failed.push((pid, fd, error)),
                },
                Ok(_) => {}
                Err(error) => count.failed.push((pid, fd, error)),
            }
        }
        count.ended = usize::from(has_ended(process.as_fd()));
        Ok(count)
    }

    /// Calls back for each network socket of the processes of a cgroup and of those below it, and of processes
    /// that appear there meanwhile.
    ///
    /// # Errors
    /// If it is no cgroup of version 2, is removed meanwhile, or a process cannot be looked into.
    pub fn cgroup(
        &mut self,
        cgroup: &Path,
        mut each: impl FnMut(BorrowedFd<'_>, &LiveSocket) -> io::Result<()>,
    ) -> Result<Count, LiveError> {
        let mut count = Count::default();
        count.unreachable = each_process(cgroup, |pid| {
            match self.process(pid, &mut each) {
                Ok(more) => count.add(more),
                // It has ended since it was listed.
                Err(LiveError::NoProcess { .. }) => count.ended += 1,
                Err(LiveError::Permission { .. }) if self.tolerant => count.forbidden += 1,
                Err(error) => return Err(error),
            }
            Ok(())
        })?;
        Ok(count)
    }
}

/// Calls back for each network socket of a process, once each; see [`Walk::process`].
///
/// # Errors
/// Those of [`Walk::process`].
pub fn each_socket(
    pid: u32,
    each: impl FnMut(BorrowedFd<'_>, &LiveSocket) -> io::Result<()>,
) -> Result<Count, LiveError> {
    Walk::default().process(pid, each)
}

/// Calls back with a duplicate of each socket of a process, of whatever family, whose inode is wanted. Sockets that are
/// closed meanwhile are left out.
///
/// # Errors
/// If the process does not exist, or cannot be looked into.
pub fn each_duplicate(
    pid: u32,
    wanted: impl Fn(u64) -> bool,
    mut each: impl FnMut(BorrowedFd<'_>, u64),
) -> Result<(), LiveError> {
    let process = hold(pid)?;
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => LiveError::Permission { pid },
        _ => LiveError::NoProcess { pid },
    };
    for (fd, inode) in socket_descriptors(pid).map_err(refused)? {
        if !wanted(inode) {
            continue;
        }
        match pidfd_getfd(process.as_fd(), fd) {
            Ok(socket) => each(socket.as_fd(), inode),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Err(LiveError::Permission { pid }),
            Err(_) => {}
        }
    }
    Ok(())
}

/// The processes of a cgroup and of all below it, as far as they are in this PID namespace.
///
/// # Errors
/// If it is no cgroup of version 2, or cannot be read.
pub fn processes_of(cgroup: &Path) -> Result<BTreeSet<u32>, LiveError> {
    let mut pids = BTreeSet::new();
    each_process(cgroup, |pid| {
        pids.insert(pid);
        Ok(())
    })?;
    Ok(pids)
}

/// How often a cgroup is listed again because new processes appeared in it. A shell script makes new ones all the
/// time; those that it makes later begin with what it has by then.
const MOST_ROUNDS: usize = 16;

/// Calls back once for each process of a cgroup and of those below it, and lists them again until no new one has
/// appeared meanwhile. Returns how many processes are outside of this PID namespace.
fn each_process(cgroup: &Path, mut each: impl FnMut(u32) -> Result<(), LiveError>) -> Result<usize, LiveError> {
    let mut met = HashSet::new();
    let mut unreachable = 0;
    for _ in 0..MOST_ROUNDS {
        let mut listed = Vec::new();
        list_processes(cgroup, &mut listed)?;
        // The kernel writes 0 for a process that has no number in the reader's PID namespace.
        unreachable = listed.iter().filter(|&&pid| pid == 0).count();
        listed.retain(|&pid| pid != 0 && met.insert(pid));
        if listed.is_empty() {
            break;
        }
        listed.into_iter().try_for_each(&mut each)?;
    }
    Ok(unreachable)
}

fn list_processes(cgroup: &Path, pids: &mut Vec<u32>) -> Result<(), LiveError> {
    let path = || cgroup.to_path_buf();
    // Of version 1 there are cgroup.procs, too, but no cgroup.controllers.
    if !cgroup.join("cgroup.controllers").exists() {
        return Err(if cgroup.exists() {
            LiveError::NotCgroup { path: path() }
        } else {
            LiveError::NoCgroup { path: path() }
        });
    }
    let failed = |source: io::Error| match source.raw_os_error() {
        // Removed between one call and the next.
        Some(libc::ENOENT | libc::ENODEV) => LiveError::NoCgroup { path: path() },
        _ => LiveError::Cgroup { path: path(), source },
    };
    match fs::read_to_string(cgroup.join("cgroup.procs")) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        // A threaded cgroup: its processes are listed in the domain above (Documentation/admin-guide/cgroup-v2.rst).
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(failed(error)),
    }
    for entry in fs::read_dir(cgroup).map_err(failed)? {
        let below = entry.map_err(failed)?;
        if below.file_type().is_ok_and(|kind| kind.is_dir()) {
            match list_processes(&below.path(), pids) {
                // It was removed meanwhile, so it has no processes.
                Err(LiveError::NoCgroup { .. }) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// The descriptors of a process that are sockets, the lowest first, with their inodes.
fn socket_descriptors(pid: u32) -> io::Result<Vec<(RawFd, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target,
            // The folder may be root's to read, and what is in it only for who may trace the process.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !Capability::SysPtrace.is_effective() => {
                return Err(error);
            }
            // A descriptor that was closed since has no target any more; and some processes are kept from everybody.
            Err(_) => continue,
        };
        let inode = target.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        found.extend(fd.zip(inode));
    }
    found.sort_unstable();
    Ok(found)
}

/// What a socket is, or `None` if it is none of the network's.
fn read(pid: u32, fd: RawFd, socket: BorrowedFd<'_>) -> io::Result<Option<LiveSocket>> {
    let family = match option(socket, libc::SO_DOMAIN)? {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        libc::AF_PACKET => Family::Packet,
        _ => return Ok(None),
    };
    let kind = match (family, option(socket, libc::SO_TYPE)?, option(socket, libc::SO_PROTOCOL)?) {
        (Family::Packet, ..) => Kind::Packet,
        (_, libc::SOCK_RAW, _) => Kind::Raw,
        (_, _, libc::IPPROTO_TCP | libc::IPPROTO_MPTCP) => Kind::Tcp,
        (_, _, libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE) => Kind::Udp,
        (_, _, libc::IPPROTO_SCTP) => Kind::Sctp,
        _ => Kind::Other,
    };
    let (local, remote) = match kind {
        Kind::Packet => (None, None),
        _ => {
            let [local, remote] = [getsockname(socket.as_raw_fd()), getpeername(socket.as_raw_fd())]
                .map(|answer| address(answer, kind.has_ports()));
            (local?.filter(|at| at.port() != 0 || !at.ip().is_unspecified()), remote?)
        }
    };
    let priority = option(socket, libc::SO_PRIORITY)? as u32;
    let inode = nix::sys::stat::fstat(socket)?.st_ino;
    Ok(Some(LiveSocket { pid, fd, inode, family, kind, local, remote, priority }))
}

fn address(answer: nix::Result<SockaddrStorage>, has_port: bool) -> io::Result<Option<SocketAddr>> {
    let storage = match answer {
        Ok(storage) => storage,
        // EINVAL: a TCP socket that was shut down.
        Err(Errno::ENOTCONN | Errno::EINVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let v4 = storage.as_sockaddr_in().map(|&address| SocketAddr::V4(address.into()));
    let mut address = v4.or_else(|| storage.as_sockaddr_in6().map(|&address| unmapped(address.into())));
    if let Some(address) = address.as_mut().filter(|_| !has_port) {
        address.set_port(0);
    }
    Ok(address)
}

/// An IPv6 socket that speaks IPv4 has its addresses as ::ffff:a.b.c.d.
fn unmapped(address: SocketAddrV6) -> SocketAddr {
    match address.ip().to_ipv4_mapped() {
        Some(v4) => SocketAddr::from((v4, address.port())),
        None => SocketAddr::V6(address),
    }
}

/// An option of `SOL_SOCKET` that is an int.
fn option(socket: BorrowedFd<'_>, name: libc::c_int) -> io::Result<libc::c_int> {
    option_of(socket, libc::SOL_SOCKET, name).map(libc::c_int::from_ne_bytes)
}

/// An option of so many bytes.
pub fn option_of<const N: usize>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<[u8; N]> {
    let mut value = [0; N];
    let mut length = N as libc::socklen_t;
    // SAFETY: `value` is as long as `length` says, and both outlive the call.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// A handle of a process.
fn hold(pid: u32) -> Result<OwnedFd, LiveError> {
    pidfd_open(pid).map_err(|error| match error.raw_os_error() {
        // For a thread that leads no process, kernels differ (6.18 says ENOENT, before it was EINVAL).
        Some(libc::EINVAL | libc::ENOENT) if Path::new(&format!("/proc/{pid}")).exists() => LiveError::Thread { pid },
        Some(libc::ESRCH | libc::EINVAL) => LiveError::NoProcess { pid },
        _ => LiveError::Process { pid, action: "take hold", source: error },
    })
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call has no memory arguments.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) })
}

/// A descriptor of our own for an open file of another process, close-on-exec.
fn pidfd_getfd(process: BorrowedFd<'_>, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call has no memory arguments.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Whether the process behind a pidfd has ended: it is readable from then on.
fn has_ended(process: BorrowedFd<'_>) -> bool {
    matches!(poll(&mut [PollFd::new(process, PollFlags::POLLIN)], PollTimeout::ZERO), Ok(1..))
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::net::UnixDatagram,
        process::{Child, Command, Stdio},
    };

    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    /// A process that holds what it is given, killed when dropped.
    struct Holder(Child);

    impl Holder {
        fn of(first: impl Into<OwnedFd>, second: impl Into<OwnedFd>) -> Self {
            let mut command = Command::new("sleep");
            Self(command.arg("60").stdin(Stdio::from(first.into())).stdout(second.into()).spawn().unwrap())
        }

        fn pid(&self) -> u32 {
            self.0.id()
        }

        fn end(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            self.end();
        }
    }

    fn udp() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").unwrap()
    }

    fn sockets(pid: u32) -> Vec<LiveSocket> {
        let mut found = Vec::new();
        each_socket(pid, |_, socket| {
            found.push(socket.clone());
            Ok(())
        })
        .unwrap();
        found
    }

    #[test]
    fn finds_each_network_socket_once_and_says_what_it_is() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, from) = listener.accept().unwrap();
        let unconnected = udp();
        let twice = unconnected.try_clone().unwrap();
        let local_only = UnixDatagram::unbound().unwrap();
        let found = sockets(std::process::id());
        let one = |fd: RawFd| found.iter().find(|socket| socket.fd == fd).unwrap();

        let expected = (Family::V6, Kind::Tcp, listener.local_addr().ok(), None);
        let seen = one(listener.as_raw_fd());
        assert_eq!((seen.family, seen.kind, seen.local, seen.remote), expected);
        let seen = one(client.as_raw_fd());
        assert_eq!(
            (seen.family, seen.local, seen.remote),
            (Family::V4, client.local_addr().ok(), client.peer_addr().ok())
        );
        // The server's end is an IPv6 socket that speaks IPv4.
        let seen = one(server.as_raw_fd());
        assert_eq!((seen.family, seen.local), (Family::V6, client.peer_addr().ok()));
        assert!(from.ip().is_ipv6() && seen.remote == client.local_addr().ok());
        let seen = one(unconnected.as_raw_fd().min(twice.as_raw_fd()));
        assert_eq!((seen.kind, seen.local, seen.remote), (Kind::Udp, unconnected.local_addr().ok(), None));
        assert_eq!(found.iter().filter(|other| other.inode == seen.inode).count(), 1);
        assert!(found.iter().all(|socket| socket.fd != local_only.as_raw_fd()));
    }

    #[test]
    fn what_is_set_through_the_duplicate_holds_for_the_owner() {
        let socket = udp();
        let holder = Holder::of(socket.try_clone().unwrap(), udp());
        let count = each_socket(holder.pid(), |duplicate, live| {
            assert_eq!(live.priority, 0);
            Ok(setsockopt(&duplicate, sockopt::Priority, &5)?)
        })
        .unwrap();
        assert_eq!((count.visited, count.failed.len(), count.ended), (2, 0, 0));
        assert_eq!(nix::sys::socket::getsockopt(&socket, sockopt::Priority).unwrap(), 5);
        assert_eq!(sockets(holder.pid()).iter().map(|live| live.priority).collect::<Vec<_>>(), [5, 5]);
    }

    #[test]
    fn a_walk_meets_what_processes_share_once() {
        let shared = udp();
        let holders = [(); 2].map(|()| Holder::of(shared.try_clone().unwrap(), shared.try_clone().unwrap()));
        let mut walk = Walk::default();
        let visited = holders.each_ref().map(|holder| walk.process(holder.pid(), |_, _| Ok(())).unwrap().visited);
        assert_eq!(visited, [1, 0]);
    }

    #[test]
    fn a_process_may_end_and_a_callback_may_fail() {
        let mut holder = Holder::of(udp(), udp());
        let pid = holder.pid();
        let count = each_socket(pid, |_, _| {
            holder.end();
            Ok(())
        })
        .unwrap();
        assert_eq!((count.visited, count.failed.len(), count.ended), (1, 0, 1));
        assert!(matches!(each_socket(pid, |_, _| Ok(())), Err(LiveError::NoProcess { .. })));

        let holder = Holder::of(udp(), udp());
        let count = each_socket(holder.pid(), |_, _| Err(io::ErrorKind::PermissionDenied.into())).unwrap();
        assert_eq!((count.visited, count.failed.len(), count.ended), (0, 2, 0));
        assert_eq!((count.failed[0].0, count.failed[0].1), (holder.pid(), 0));
    }

    #[test]
    fn numbers_that_are_no_process() {
        for pid in [0, u32::MAX] {
            assert!(matches!(each_socket(pid, |_, _| Ok(())), Err(LiveError::NoProcess { .. })), "{pid}");
        }
        let thread = std::thread::spawn(|| {
            let pid = nix::unistd::gettid().as_raw() as u32;
            each_socket(pid, |_, _| Ok(())).unwrap_err()
        });
        assert!(matches!(thread.join().unwrap(), LiveError::Thread { .. }));
    }

    #[test]
    fn directories_that_are_no_cgroup() {
        let error = |path: &str| processes_of(Path::new(path)).unwrap_err();
        assert!(matches!(error("/nonexistent"), LiveError::NoCgroup { .. }));
        assert!(matches!(error("/proc/self"), LiveError::NotCgroup { .. }));
    }
}
