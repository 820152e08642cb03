//! Waiting for many sockets, to the nanosecond.

use std::{io, os::fd::AsFd, os::fd::AsRawFd};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
};

use super::clock::timespec;

/// Events that are taken at once; the rest comes with the next call.
const EVENTS: usize = 128;

/// Tells of changes (edges): whoever hears of one reads and writes until there is nothing left to do.
pub(super) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, events: vec![EpollEvent::empty(); EVENTS] })
    }

    /// Watches a socket until it is closed.
    pub fn watch(&self, socket: impl AsFd, token: usize) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(socket, EpollEvent::new(flags, token as u64))?)
    }

    /// Waits for at most `timeout_ns`: the tokens of what has changed.
    pub fn wait(&mut self, timeout_ns: u64) -> io::Result<impl Iterator<Item = usize> + '_> {
        let timeout = timespec(timeout_ns);
        // The system call itself (Linux 5.11), because the C library's function is younger than some.
        // SAFETY: there is room for as many events as are asked for; `EpollEvent` is a transparent `epoll_event`; all
        // that is pointed to outlives the call; no signal mask is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.epoll.0.as_raw_fd(),
                self.events.as_mut_ptr().cast::<libc::epoll_event>(),
                self.events.len() as libc::c_int,
                &raw const timeout,
                std::ptr::null::<libc::sigset_t>(),
                0usize,
            )
        };
        let ready = match Errno::result(result) {
            Ok(ready) => ready as usize,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(errno.into()),
        };
        Ok(self.events[..ready].iter().map(|event| event.data() as usize))
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream, time::Instant};

    use super::*;

    #[test]
    fn changes_are_told_once_and_waits_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut poller = Poller::new().unwrap();
        poller.watch(&near, 7).unwrap();
        // It can be written to.
        assert_eq!(poller.wait(1_000_000_000).unwrap().collect::<Vec<_>>(), [7]);
        let before = Instant::now();
        assert_eq!(poller.wait(2_000_000).unwrap().count(), 0);
        assert!(before.elapsed().as_nanos() >= 2_000_000);
        far.write_all(b"x").unwrap();
        assert_eq!(poller.wait(1_000_000_000).unwrap().collect::<Vec<_>>(), [7]);
        assert_eq!(poller.wait(0).unwrap().count(), 0);
    }
}
