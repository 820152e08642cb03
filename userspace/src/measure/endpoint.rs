//! A connected socket that carries the messages of one train.

use std::{
    io,
    net::{TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use qjump_ebpf::Level;

use super::{
    stamping::{self, Left, Stamp},
    wire::{self, Message},
};

/// What carries a train.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// One datagram a message.
    Udp,
    /// Messages of a fixed length on a connection.
    Tcp,
}

impl Transport {
    /// `udp`, `tcp`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// Bytes: some thousand messages, should a thread be held up.
const RECEIVE_BUFFER: usize = 4 << 20;

/// A connected socket, and messages of one length on it. It never waits.
#[derive(Debug)]
pub struct Endpoint {
    socket: OwnedFd,
    transport: Transport,
    length: usize,
    /// What comes in, and how much of a message of TCP is there. One byte longer than a message, to see that a datagram
    /// is longer.
    input: Vec<u8>,
    filled: usize,
    /// What goes out, and how much of it the kernel has not taken yet.
    output: Vec<u8>,
    pending: usize,
    /// Whether stamps are asked for with it.
    stamped: bool,
    clean: Vec<u8>,
    /// Messages given to the kernel.
    given: u64,
    /// What the kernel's stamps are numbered by: bytes, or datagrams that it was to stamp; and the numbers of the latest of
    /// those among all messages.
    counted: u64,
    stamps_of: Box<[u64]>,
}

/// Datagrams that may wait for their stamps at once: more than a socket's buffer holds stamps.
const STAMPS: usize = 1 << 13;

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A message, and when the kernel got it.
    Message(Message, Stamp),
    /// Something else.
    Corrupted,
    /// Nothing, for now.
    Nothing,
    /// The other side has closed the connection, or does not listen.
    Closed,
}

/// What became of a message that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The kernel has it, or the rest of it will follow by itself.
    Given,
    /// The kernel dropped it.
    Dropped,
    /// There is no room; nothing was sent.
    Full,
    /// The other side has closed the connection, or does not listen.
    Closed,
}

impl Endpoint {
    /// Messages of `length` bytes on a connected socket, whose packets the kernel can be asked to stamp. For TCP, nothing
    /// may be on its way.
    pub fn udp(socket: UdpSocket, length: usize) -> io::Result<Self> {
        stamping::report_drops(socket.as_fd(), socket.local_addr()?.is_ipv6())?;
        Self::new(socket.into(), Transport::Udp, length)
    }

    /// The same on a TCP connection.
    pub fn tcp(socket: TcpStream, length: usize) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        Self::new(socket.into(), Transport::Tcp, length)
    }

    fn new(socket: OwnedFd, transport: Transport, length: usize) -> io::Result<Self> {
        stamping::enable(socket.as_fd(), transport == Transport::Tcp)?;
        // As much as may be had; stamps take of it, too.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER));
        Ok(Self {
            socket,
            transport,
            length,
            input: vec![0; length + 1],
            filled: 0,
            output: wire::buffer(length),
            pending: 0,
            stamped: false,
            clean: wire::buffer(length),
            given: 0,
            counted: 0,
            stamps_of: vec![0; STAMPS].into(),
        })
    }

    /// What carries it.
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// Bytes of a message.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Whether a part of a message waits for room, and nothing can be sent.
    pub const fn is_blocked(&self) -> bool {
        self.pending > 0
    }

    /// The next message, if one is there.
    pub fn receive(&mut self) -> io::Result<Received> {
        let end = if self.transport == Transport::Tcp { self.length } else { self.length + 1 };
        let (count, stamp) = match stamping::receive(self.socket.as_fd(), &mut self.input[self.filled..end]) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(error) => return closed(error).map(|()| Received::Closed),
        };
        if self.transport == Transport::Tcp {
            if count == 0 {
                return Ok(Received::Closed);
            }
            self.filled += count;
            if self.filled < self.length {
                return Ok(Received::Nothing);
            }
            self.filled = 0;
        }
        let length = if self.transport == Transport::Tcp { self.length } else { count };
        if length != self.length {
            return Ok(Received::Corrupted);
        }
        Ok(match Message::read(&mut self.input[..length], &self.clean) {
            Some(message) => Received::Message(message, stamp),
            None => Received::Corrupted,
        })
    }

    /// Prepares a message, so that [`Self::send`] has only to give it to the kernel.
    pub fn prepare(&mut self, message: &Message) {
        self.stamped = message.stamped;
        message.write(&mut self.output);
    }

    /// Sends what was prepared.
    pub fn send(&mut self) -> io::Result<Sent> {
        self.pending = self.length;
        let sent = self.flush()?;
        if sent == Sent::Full && self.pending == self.length {
            self.pending = 0;
        }
        // A part is on its way: the rest must follow.
        Ok(if sent == Sent::Full && self.pending > 0 { Sent::Given } else { sent })
    }

    /// Sends what is left of a message.
    pub fn flush(&mut self) -> io::Result<Sent> {
        while self.pending > 0 {
            let rest = &self.output[self.length - self.pending..];
            match stamping::send(self.socket.as_fd(), rest, self.stamped) {
                Ok(count) => self.took(count),
                Err(error) => {
                    let (dropped, full) = (is_drop(&error), error.kind() == io::ErrorKind::WouldBlock);
                    if full {
                        return Ok(Sent::Full);
                    }
                    if dropped && self.transport == Transport::Udp {
                        // It had its number.
                        self.took(self.pending);
                        return Ok(Sent::Dropped);
                    }
                    self.pending = 0;
                    // It had a number of ours, and none of the kernel's.
                    self.given += 1;
                    return closed(error).map(|()| Sent::Closed);
                }
            }
        }
        Ok(Sent::Given)
    }

    /// The kernel took so many bytes.
    fn took(&mut self, count: usize) {
        self.pending -= count;
        if self.transport == Transport::Tcp {
            self.counted += count as u64;
        } else if self.stamped {
            self.stamps_of[self.counted as usize % STAMPS] = self.given;
            self.counted += 1;
        }
        self.given += u64::from(self.pending == 0);
    }

    /// Fetches the stamps of what has left: the number of the message, from 0, and the stamp. A message that the kernel
    /// had no room for has no number.
    pub fn left(&mut self, mut take: impl FnMut(u64, Left)) -> io::Result<usize> {
        let (counted, length) = (self.counted, self.length as u64);
        let tcp = self.transport == Transport::Tcp;
        stamping::left(self.socket.as_fd(), |left| {
            // The kernel's 32 bits, continued: it is one of the last that were counted.
            let last = counted.saturating_sub(1);
            let id = last - u64::from((last as u32).wrapping_sub(left.id)).min(last);
            if !tcp {
                if last - id < STAMPS as u64 {
                    take(self.stamps_of[id as usize % STAMPS], left);
                }
            } else if (id + 1).is_multiple_of(length) {
                take((id + 1) / length - 1, left);
            }
        })
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Writes a level's codepoint into all packets of a socket: for hosts whose limiter does not do that. Then the level
/// must be set, because this changes it.
pub(super) fn set_mark(socket: &impl AsFd, level: Level) -> io::Result<()> {
    let byte = i32::from(level.dscp()) << 2;
    // Of an IPv6 socket, IP_TOS counts for packets of IPv4.
    let v4 = setsockopt(socket, sockopt::Ipv4Tos, &byte);
    let v6 = setsockopt(socket, sockopt::Ipv6TClass, &byte);
    Ok(v4.or(v6)?)
}

/// A queue, a limiter or a filter of this host dropped a datagram, and the kernel says so.
fn is_drop(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EPERM))
}

/// Whether an error means that nobody is there any more; others are errors of ours.
fn closed(error: io::Error) -> io::Result<()> {
    use io::ErrorKind::{
        BrokenPipe, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
    };
    match error.kind() {
        BrokenPipe | ConnectionRefused | ConnectionReset | HostUnreachable | NetworkUnreachable | TimedOut => Ok(()),
        _ => Err(error),
    }
}

/// Sleeps until one of the sockets has something, has room if it is `blocked`, or reports, or until `timeout_ns` from now.
pub(super) fn sleep<'a>(sockets: impl Iterator<Item = (BorrowedFd<'a>, bool)>, timeout_ns: u64) -> io::Result<()> {
    let mut fds: Vec<libc::pollfd> = sockets
        .map(|(socket, blocked)| {
            let events = if blocked { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
            libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 }
        })
        .collect();
    let timeout = super::clock::timespec(timeout_ns);
    // SAFETY: the array and the time outlive the call.
    let result = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as _, &raw const timeout, std::ptr::null()) };
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}
