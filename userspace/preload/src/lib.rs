//! `LD_PRELOAD=libqjump_preload.so QJUMP_LEVEL=5 program`: what an unmodified program sends over IPv4 and IPv6 travels at
//! a level from 0 to 6. No privilege is needed, and no eBPF in this program's way.
//!
//! The functions of the C library that bring sockets into being are replaced by ones that call them and then set
//! `SO_PRIORITY`. What a program sets with `SO_PRIORITY` itself stays. Without `QJUMP_LEVEL` nothing is done; a value that
//! is no level is said once on standard error, and nothing is done.
//!
//! Not covered: programs that do not call the C library through its dynamic symbols (static ones, Go), set-user-ID
//! programs (the dynamic linker ignores `LD_PRELOAD`), sockets that the C library makes for itself (name service), packets
//! with an `IP_TOS` control message, and what TCP sends before `accept` returns.
//!
//! After the constructor has run, all functions are as safe in signal handlers and after `vfork` as the ones that they
//! stand for: they make system calls and read atomics. No function panics, and `errno` is as the replaced one left it.
//! Their ABI is `C-unwind`, because glibc unwinds the stack of a thread that is cancelled in `accept` or `connect`; for that
//! to be sound, none of their frames may have anything to drop.

use std::{
    ffi::CStr,
    mem::transmute,
    ptr,
    sync::atomic::{AtomicI32, AtomicPtr, Ordering::Relaxed},
};

use libc::{c_int, c_void, sockaddr, socklen_t};

/// The level, [`NO_LEVEL`], or [`NOT_READ`].
static LEVEL: AtomicI32 = AtomicI32::new(NOT_READ);
const NO_LEVEL: c_int = -1;
const NOT_READ: c_int = -2;

/// A function of the C library, behind the one of this library with the same name.
struct Next {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, address: AtomicPtr::new(ptr::null_mut()) }
    }

    fn address(&self) -> *mut c_void {
        let known = self.address.load(Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name ends with a zero byte.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        self.address.store(found, Relaxed);
        found
    }
}

static SOCKET: Next = Next::new(c"socket");
static ACCEPT: Next = Next::new(c"accept");
static ACCEPT4: Next = Next::new(c"accept4");
static CONNECT: Next = Next::new(c"connect");
static DUP: Next = Next::new(c"dup");
static DUP2: Next = Next::new(c"dup2");
static DUP3: Next = Next::new(c"dup3");
static SETSOCKOPT: Next = Next::new(c"setsockopt");

/// Calls the next function of this name with these arguments; fails with ENOSYS in a process without C library.
macro_rules! next {
    ($next:ident: fn($($type:ty),*), $($argument:expr),*) => {{
        type Function = unsafe extern "C-unwind" fn($($type),*) -> c_int;
        // SAFETY: the address is null or that of a function with this signature, by its name in the C library.
        match unsafe { transmute::<*mut c_void, Option<Function>>($next.address()) } {
            // SAFETY: the arguments are those of our caller, who keeps to the same contract, or outlive the call.
            Some(function) => unsafe { function($($argument),*) },
            None => {
                set_errno(libc::ENOSYS);
                -1
            }
        }
    }};
}

/// Runs when the library is loaded, before the program and before any of its threads.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn constructor() {
        for next in [&SOCKET, &ACCEPT, &ACCEPT4, &CONNECT, &DUP, &DUP2, &DUP3, &SETSOCKOPT] {
            next.address();
        }
        level();
    }
    constructor
};

/// The level to give, if any.
fn level() -> Option<c_int> {
    let mut level = LEVEL.load(Relaxed);
    // Only in constructors of other libraries, which may run before ours.
    if level == NOT_READ {
        level = read_level();
    }
    (level != NO_LEVEL).then_some(level)
}

#[cold]
fn read_level() -> c_int {
    // SAFETY: the name ends with a zero byte, and while libraries are loaded nobody changes the environment.
    let value = unsafe { libc::getenv(c"QJUMP_LEVEL".as_ptr()) };
    let value = match value.is_null() {
        true => None,
        // SAFETY: it is a string of the environment.
        false => Some(unsafe { CStr::from_ptr(value) }.to_bytes()),
    };
    let level = match value {
        Some(&[digit @ b'0'..=b'6']) => c_int::from(digit - b'0'),
        _ => NO_LEVEL,
    };
    let first = LEVEL.compare_exchange(NOT_READ, level, Relaxed, Relaxed).is_ok();
    match value {
        Some(b"7") if first => say(&[
            b"qjump: QJUMP_LEVEL=7 does nothing: Linux gives level 7 only to a process with CAP_NET_ADMIN; start the \
              program with `qjump run --level 7 -- PROGRAM`\n",
        ]),
        Some(wrong) if first && level == NO_LEVEL => {
            say(&[b"qjump: QJUMP_LEVEL='", wrong, b"' does nothing: it is not a level from 0 to 6\n"]);
        }
        _ => {}
    }
    level
}

/// Writes the parts to standard error, at once.
fn say<const PARTS: usize>(parts: &[&[u8]; PARTS]) {
    let parts = parts.map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    keeping_errno(|| {
        // SAFETY: the kernel reads as many parts as there are, each as long as it says.
        unsafe { libc::writev(libc::STDERR_FILENO, parts.as_ptr(), PARTS as c_int) };
    });
}

fn set_errno(value: c_int) {
    // SAFETY: the address is that of this thread's errno.
    unsafe { *libc::__errno_location() = value };
}

fn keeping_errno(work: impl FnOnce()) {
    // SAFETY: the address is that of this thread's errno.
    let errno = unsafe { *libc::__errno_location() };
    work();
    set_errno(errno);
}

/// An option of `SOL_SOCKET` that is an int.
fn option(fd: c_int, name: c_int) -> Option<c_int> {
    let mut value: c_int = 0;
    let mut length = size_of::<c_int>() as socklen_t;
    // SAFETY: `value` is as long as `length` says, and both outlive the call.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut length) };
    (result == 0).then_some(value)
}

fn is_network(fd: c_int) -> bool {
    matches!(option(fd, libc::SO_DOMAIN), Some(libc::AF_INET | libc::AF_INET6))
}

fn set_priority(fd: c_int, priority: c_int) {
    next!(
        SETSOCKOPT: fn(c_int, c_int, c_int, *const c_void, socklen_t),
        fd, libc::SOL_SOCKET, libc::SO_PRIORITY, (&raw const priority).cast(), size_of::<c_int>() as socklen_t
    );
}

/// Gives the level to a socket that has just come into being.
fn give_level(fd: c_int) -> c_int {
    if let Some(level) = level().filter(|_| fd >= 0) {
        keeping_errno(|| {
            if is_network(fd) {
                set_priority(fd, level);
            }
        });
    }
    fd
}

/// Gives the level to a socket that may have been there before this library was: inherited, or received from another
/// process. Any other has a priority already, and if it is not ours, the program has chosen it.
fn give_level_if_none(fd: c_int) -> c_int {
    if let Some(level) = level().filter(|_| fd >= 0) {
        keeping_errno(|| {
            if is_network(fd) && option(fd, libc::SO_PRIORITY) == Some(0) {
                set_priority(fd, level);
            }
        });
    }
    fd
}

/// socket(2): the socket has the level.
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    give_level(next!(SOCKET: fn(c_int, c_int, c_int), domain, kind, protocol))
}

/// accept(2): connections do not inherit their listener's level in Linux, so each is given its own.
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn accept(fd: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    give_level(next!(ACCEPT: fn(c_int, *mut sockaddr, *mut socklen_t), fd, address, length))
}

/// accept4(2), like [`accept`].
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
    flags: c_int,
) -> c_int {
    give_level(next!(ACCEPT4: fn(c_int, *mut sockaddr, *mut socklen_t, c_int), fd, address, length, flags))
}

/// connect(2): the first packet has the level, also of a socket that the program was given.
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn connect(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    give_level_if_none(fd);
    next!(CONNECT: fn(c_int, *const sockaddr, socklen_t), fd, address, length)
}

/// dup(2). A duplicate is the same socket; this is for those that the program was given.
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup(fd: c_int) -> c_int {
    give_level_if_none(next!(DUP: fn(c_int), fd))
}

/// dup2(2), like [`dup`].
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup2(fd: c_int, to: c_int) -> c_int {
    give_level_if_none(next!(DUP2: fn(c_int, c_int), fd, to))
}

/// dup3(2), like [`dup`].
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    give_level_if_none(next!(DUP3: fn(c_int, c_int, c_int), fd, to, flags))
}

/// setsockopt(2): `IP_TOS` leaves the level as it is. Linux would overwrite `SO_PRIORITY` with a number of its own, 0 for
/// every class selector (`__ip_sock_set_tos`, net/ipv4/ip_sockglue.c).
///
/// # Safety
/// As the function of the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn setsockopt(
    fd: c_int,
    protocol: c_int,
    name: c_int,
    value: *const c_void,
    length: socklen_t,
) -> c_int {
    let mut before = None;
    if (protocol, name) == (libc::IPPROTO_IP, libc::IP_TOS) && level().is_some() {
        keeping_errno(|| before = option(fd, libc::SO_PRIORITY));
    }
    let result = next!(
        SETSOCKOPT: fn(c_int, c_int, c_int, *const c_void, socklen_t),
        fd, protocol, name, value, length
    );
    if let Some(priority) = before.filter(|_| result == 0) {
        keeping_errno(|| set_priority(fd, priority));
    }
    result
}
