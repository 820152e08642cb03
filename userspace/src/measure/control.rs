//! The conversation that goes with every measurement: one TCP connection, one line of JSON a message.
//!
//! The client opens a session with its trains, each with a token; opens the way of each train (a greeting over UDP, or a
//! connection of its own that names the token); measures; and asks for what the server counted. Whoever has no session
//! gets no answers, so that a server cannot be made to send anything to a third party.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use thiserror::Error;

use super::{endpoint::Transport, recorder::PeerCounts, wire::Left};
use crate::socket::Level;

/// Raised with every change of a message, of this conversation or of [`super::wire`].
pub const PROTOCOL: u32 = 2;
/// Where servers listen unless told otherwise, TCP and UDP.
pub const PORT: u16 = 7700;
/// A message that has not come after so long does not come.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Trains of one session.
pub const MOST_TRAINS: usize = 32;

/// A train, as the other side must know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainRequest {
    /// Its name in messages.
    pub token: u32,
    /// What carries it.
    pub transport: Transport,
    /// The level of the answers.
    pub level: u8,
    /// Whether the answers' packets are to carry the level's codepoint from the socket on.
    pub mark: bool,
    /// Bytes of a message.
    pub payload: usize,
    /// Whether it is answered; bulk is not, and not even read.
    pub answered: bool,
}

/// What a client says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum Request {
    /// Opens a session.
    Open {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Which boot of which machine: two sides with the same have the same clock.
        boot_id: String,
        /// The CPU on which the client watches for answers.
        cpu: Option<usize>,
        /// Its trains.
        trains: Vec<TrainRequest>,
    },
    /// Makes this connection the way of a train.
    Attach {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Which.
        token: u32,
    },
    /// All trains are over.
    Finish {
        /// [`PROTOCOL`].
        protocol: u32,
    },
}

/// What a server says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum Reply {
    /// The session is open.
    Opened {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Of the server.
        boot_id: String,
        /// Its name.
        host: String,
        /// The CPU on which it answers.
        cpu: Option<usize>,
        /// What a message at each level may take on its way back, ns: by the plan in force there.
        bounds_ns: [Option<u64>; 8],
    },
    /// It is not.
    Refused {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Why.
        why: String,
    },
    /// The connection is the train's now.
    Attached {
        /// [`PROTOCOL`].
        protocol: u32,
    },
    /// The end of the session.
    Finished {
        /// [`PROTOCOL`].
        protocol: u32,
        /// For each train.
        trains: Vec<TrainReport>,
        /// Whether the answering thread had real-time priority.
        real_time: bool,
    },
}

/// What the other side tells when a train is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainReport {
    /// What it counted.
    pub counts: PeerCounts,
    /// Stamps of answers that no other answer has carried.
    pub left: Vec<Left>,
    /// What its limiter dropped at the train's level meanwhile, if it has one.
    pub limiter_dropped: Option<u64>,
}

/// Why a conversation failed.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The connection.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Closed in the middle.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Silent,
    /// Some other program.
    #[error("the other side does not speak this protocol: is it `qjump measure serve`?")]
    Stranger,
    /// Another version of this one.
    #[error(
        "the other side speaks version {theirs} of the protocol, this side version {PROTOCOL}: install the same qjump on both"
    )]
    Version {
        /// What it speaks.
        theirs: u64,
    },
}

/// One end of the conversation.
#[derive(Debug)]
pub struct Control {
    stream: TcpStream,
    /// What has come of the next message.
    partial: Vec<u8>,
}

impl Control {
    /// On a connection.
    ///
    /// # Errors
    /// If it is closed already.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream, partial: Vec::new() })
    }

    /// The connection.
    pub const fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The connection, for something else: nothing but messages may have come so far.
    ///
    /// # Errors
    /// If there was.
    pub fn into_stream(self) -> Result<TcpStream, ControlError> {
        if self.partial.is_empty() { Ok(self.stream) } else { Err(ControlError::Stranger) }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If the connection fails.
    pub fn send(&mut self, message: &impl Serialize) -> Result<(), ControlError> {
        let mut line = serde_json::to_vec(message).map_err(io::Error::from)?;
        line.push(b'\n');
        Ok(self.stream.write_all(&line)?)
    }

    /// Receives a message of at most `most` bytes. If it has not come within `patience`, the next call goes on with it.
    ///
    /// # Errors
    /// [`ControlError::Silent`] if none comes in time, others if something else comes.
    pub fn receive<T: DeserializeOwned>(&mut self, most: usize, patience: Duration) -> Result<T, ControlError> {
        self.stream.set_read_timeout(Some(patience))?;
        let mut bytes = [0; 4096];
        let end = loop {
            if let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
                break end;
            }
            if self.partial.len() > most {
                return Err(ControlError::Stranger);
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(count) => self.partial.extend_from_slice(&bytes[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(ControlError::Silent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        };
        let line: Vec<u8> = self.partial.drain(..=end).collect();
        let message: Value = serde_json::from_slice(&line).map_err(|_| ControlError::Stranger)?;
        match message["protocol"].as_u64() {
            Some(theirs) if theirs == u64::from(PROTOCOL) => {
                serde_json::from_value(message).map_err(|_| ControlError::Stranger)
            }
            Some(theirs) => Err(ControlError::Version { theirs }),
            None => Err(ControlError::Stranger),
        }
    }

    /// Whether the other side has closed the connection.
    pub fn is_closed(&self) -> bool {
        let _ = self.stream.set_nonblocking(true);
        let peeked = self.stream.peek(&mut [0]);
        let _ = self.stream.set_nonblocking(false);
        match peeked {
            Ok(count) => count == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }
}

/// The largest request, bytes.
pub const REQUEST: usize = 64 << 10;
/// The largest reply, bytes: stamps that no answer carried.
pub const REPLY: usize = 16 << 20;

/// Which boot of which machine this is; empty if the kernel does not say.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Whether two threads are on CPUs of their own: another machine's, by its boot, or others of this one. Whoever shares a
/// CPU must not watch for a message that the other can only send when it gets the CPU.
pub fn are_apart(other_boot_id: &str, cpus: (Option<usize>, Option<usize>)) -> bool {
    other_boot_id.is_empty() || other_boot_id != boot_id() || matches!(cpus, (Some(one), Some(other)) if one != other)
}

/// What this machine calls itself.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

impl TrainRequest {
    /// Its level.
    ///
    /// # Errors
    /// If it is none, or the size is not possible.
    pub fn check(&self) -> Result<Level, String> {
        let sizes = super::wire::PLAIN..=super::wire::LONGEST;
        if !sizes.contains(&self.payload) {
            return Err(format!("a message of {} bytes is not possible", self.payload));
        }
        Level::new(self.level).ok_or_else(|| format!("there is no level {}", self.level))
    }
}
