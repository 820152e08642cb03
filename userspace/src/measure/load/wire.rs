//! What sender and sink of a load say to each other.
//!
//! Each connection, and each datagram, begins with a [`Header`]. One connection is for control, with a line of JSON
//! a message: the sender says [`Hello`] and the sink [`Reply::Ready`]; all flows connect; `Start`, `Started`; the load;
//! `Stop`, [`Reply::Received`].

use std::io::{BufRead, Read, Write};

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::count::{Received, Window};
use crate::measure::Transport;

/// Raised with every change of what is said here.
pub const VERSION: u32 = 1;
/// The most flows of one load.
pub const MAX_FLOWS: usize = 1_000;
/// Bytes of a [`Header`].
pub const HEADER: usize = 24;
const MAGIC: [u8; 4] = *b"qjLD";
/// In place of a flow's number: the connection for control.
pub const CONTROL: u32 = u32::MAX;
/// The longest line: an hour of slices.
const MAX_LINE: u64 = 1 << 20;

/// The first bytes of a connection or datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The load that it belongs to, a random number.
    pub load: u64,
    /// The flow, from 0, or [`CONTROL`].
    pub flow: u32,
    /// The datagram's number within the flow, from 0.
    pub number: u64,
}

impl Header {
    /// As it is sent: everything big-endian.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.flow.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.load.to_be_bytes());
        bytes[16..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    /// Reads it; `None` if it is none.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Option<Self> {
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let flow = u32::from_be_bytes(bytes[4..8].try_into().expect("four bytes"));
        (bytes[..4] == MAGIC).then(|| Self { load: word(8), flow, number: word(16) })
    }
}

/// The sender's first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// What its flows are.
    pub transport: Transport,
    /// How many.
    pub flows: usize,
    /// What is to be counted.
    pub window: Window,
}

/// The sender's other lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// The window's clock begins.
    Start,
    /// All is sent.
    Stop {
        /// Datagrams of all flows together.
        datagrams: u64,
    },
}

/// The sink's lines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The flows may connect.
    Ready,
    /// They may not.
    Refused(String),
    /// Arrivals count from now on.
    Started,
    /// What was counted.
    Received(Received),
}

/// Writes one line.
pub fn say(to: &mut impl Write, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(to.write_all(&line)?)
}

/// Reads one line; `None` at the end.
pub fn hear<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = Vec::new();
    from.take(MAX_LINE).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => {
            serde_json::from_slice(&line).map(Some).map_err(|_| anyhow!("it does not speak the language of a sink"))
        }
        Some(_) => bail!("it stopped in the middle of a message"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way() {
        let header = Header { load: 0x0123_4567_89ab_cdef, flow: 7, number: 1 << 40 };
        let mut bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), Some(header));
        bytes[0] ^= 1;
        assert_eq!(Header::from_bytes(&bytes), None);
    }

    #[test]
    fn lines_survive_and_garbage_does_not() {
        let window = Window { from_ns: 1, to_ns: 2 };
        let hello = Hello { version: VERSION, transport: Transport::Tcp, flows: 3, window };
        let mut line = Vec::new();
        say(&mut line, &hello).unwrap();
        assert_eq!(hear(&mut line.as_slice()).unwrap(), Some(hello));
        assert_eq!(hear::<Hello>(&mut &b""[..]).unwrap(), None);
        for garbage in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"{\"version\":1", &[0xff; 100]] {
            assert!(hear::<Hello>(&mut &*garbage).is_err());
        }
    }
}
