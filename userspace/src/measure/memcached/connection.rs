//! One connection to a cache: requests go out in order, and answers come in that order.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
};

use anyhow::{Result, bail};
use nix::{
    errno::Errno,
    sys::socket::{SockFlag, SockaddrStorage, connect, getsockopt, sockopt::SocketError},
};

use super::{
    protocol::{self, Answer},
    tally::{Owed, Verdict},
    workload::Content,
};
use crate::measure::{poll::Poller, tcp::Options};

/// What is read at once; a larger answer takes several.
const READ: usize = 16_384;

#[derive(Debug)]
enum State {
    /// Nothing, until this time, ns since the start.
    Down {
        retry_ns: u64,
    },
    Connecting(TcpStream),
    Up(TcpStream),
}

/// See the module. It never blocks.
#[derive(Debug)]
pub struct Connection {
    state: State,
    /// Requests whose answers have not come, in order; those that the kernel has not taken are the last.
    owed: VecDeque<Owed>,
    /// Where in the stream of requests each of them ends.
    ends: VecDeque<u64>,
    /// How many of them the kernel has.
    taken: usize,
    /// Bytes for the kernel.
    out: Vec<u8>,
    /// What of `out` it has.
    written: usize,
    /// Bytes of requests since the connection was made.
    queued: u64,
    /// What has come, and room for more.
    input: Vec<u8>,
    /// How much of `input` has come.
    filled: usize,
}

impl Connection {
    /// Not connected yet; may be at once.
    pub fn new() -> Self {
        Self {
            state: State::Down { retry_ns: 0 },
            owed: VecDeque::new(),
            ends: VecDeque::new(),
            taken: 0,
            out: Vec::new(),
            written: 0,
            queued: 0,
            input: Vec::new(),
            filled: 0,
        }
    }

    /// Whether it is there.
    pub const fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Whether it is to be connected at this time, ns since the start.
    pub const fn wants_to_connect(&self, now_ns: u64) -> bool {
        matches!(self.state, State::Down { retry_ns } if retry_ns <= now_ns)
    }

    /// Requests without an answer.
    pub fn owed(&self) -> usize {
        self.owed.len()
    }

    /// When the oldest request without an answer was sent, ns since the start.
    pub fn oldest_sent_ns(&self) -> Option<u64> {
        self.owed.front().and_then(|owed| owed.sent_ns)
    }

    /// Begins to connect.
    pub fn connect(&mut self, to: SocketAddr, options: Options<'_>, poller: &Poller, token: usize) -> Result<()> {
        let socket = options.socket(to, SockFlag::SOCK_NONBLOCK)?;
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        poller.watch(&socket, token)?;
        self.state = State::Connecting(socket.into());
        Ok(())
    }

    /// Gives it up until `retry_ns`. What was owed comes with it.
    pub fn close(&mut self, retry_ns: u64) -> VecDeque<Owed> {
        let owed = std::mem::take(&mut self.owed);
        *self = Self { state: State::Down { retry_ns }, ..Self::new() };
        owed
    }

    /// Puts a request into the queue.
    pub fn push(&mut self, owed: Owed, content: &Content) {
        let before = self.out.len();
        let key = content.key(owed.key);
        if owed.set {
            protocol::set(&mut self.out, &key, content.value(owed.key));
        } else {
            protocol::get(&mut self.out, &key);
        }
        self.queued += (self.out.len() - before) as u64;
        self.owed.push_back(owed);
        self.ends.push_back(self.queued);
    }

    /// Gives the kernel what it takes. `clock` says the time, ns since the start; `sent` is told of each request that is
    /// wholly with the kernel now.
    ///
    /// # Errors
    /// If the connection broke.
    pub fn flush(&mut self, clock: impl Fn() -> u64, mut sent: impl FnMut(&Owed)) -> Result<()> {
        let State::Up(stream) = &mut self.state else { return Ok(()) };
        while self.written < self.out.len() {
            let now = clock();
            match stream.write(&self.out[self.written..]) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            let with_kernel = self.queued - (self.out.len() - self.written) as u64;
            while self.ends.get(self.taken).is_some_and(|end| *end <= with_kernel) {
                let owed = &mut self.owed[self.taken];
                owed.sent_ns = Some(now);
                sent(owed);
                self.taken += 1;
            }
        }
        if self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
        }
        Ok(())
    }

    /// Something changed. Takes what has come; `clock` says when. `answered` is told of each answer.
    /// Whether the connection has just been made.
    ///
    /// # Errors
    /// If it broke, or could not be made.
    pub fn ready(
        &mut self,
        content: &Content,
        clock: impl Fn() -> u64,
        mut answered: impl FnMut(&Owed, u64, Verdict),
    ) -> Result<bool> {
        let made = matches!(self.state, State::Connecting(_));
        if let State::Connecting(stream) = &self.state {
            let error = getsockopt(stream, SocketError)?;
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error).into());
            }
            // Not connected yet: what woke us was an earlier state of the socket.
            if stream.peer_addr().is_err() {
                return Ok(false);
            }
            let State::Connecting(stream) = std::mem::replace(&mut self.state, State::Down { retry_ns: 0 }) else {
                unreachable!("it was connecting")
            };
            self.state = State::Up(stream);
        }
        loop {
            let State::Up(stream) = &mut self.state else { return Ok(made) };
            if self.input.len() < self.filled + READ {
                self.input.resize(self.filled + READ, 0);
            }
            match stream.read(&mut self.input[self.filled..][..READ]) {
                Ok(0) => bail!("the server hung up"),
                Ok(bytes) => {
                    self.filled += bytes;
                    self.parse(content, clock(), &mut answered)?;
                    // A stream that gave less than there was room for has nothing more (epoll(7)).
                    if bytes < READ {
                        return Ok(made);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(made),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn parse(&mut self, content: &Content, now_ns: u64, answered: &mut impl FnMut(&Owed, u64, Verdict)) -> Result<()> {
        let mut parsed = 0;
        while parsed < self.filled {
            let bytes = &self.input[parsed..self.filled];
            let Some(owed) = self.owed.front().filter(|_| self.taken > 0) else {
                let start = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).escape_debug().to_string();
                bail!("the server said '{start}' unasked");
            };
            let answer = if owed.set {
                protocol::answer_to_set(bytes)?
            } else {
                protocol::answer_to_get(bytes, &content.key(owed.key))?
            };
            let Some((answer, length)) = answer else { break };
            let expected = content.value(owed.key);
            let verdict = match answer {
                Answer::Value(value) if value == expected => Verdict::Hit(value.len() as u64),
                Answer::Value(_) => Verdict::Corrupted,
                Answer::Miss => Verdict::Miss,
                Answer::Stored => Verdict::Stored(expected.len() as u64),
                Answer::ServerError(_) => Verdict::ServerError,
            };
            parsed += length;
            answered(owed, now_ns, verdict);
            self.owed.pop_front();
            self.ends.pop_front();
            self.taken -= 1;
        }
        // Seldom more than a part of one answer is left.
        self.input.copy_within(parsed..self.filled, 0);
        self.filled -= parsed;
        Ok(())
    }
}
