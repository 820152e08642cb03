//! What coordinator and participants say to each other.

/// Bytes of a message: with the headers of UDP, IPv4 and Ethernet, the smallest frame there is.
pub const MESSAGE_BYTES: usize = 18;

/// Begins each message, so that nobody takes another packet for one.
const MAGIC: [u8; 4] = *b"q2pc";

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To participants: can you commit?
    Prepare = 1,
    /// To the coordinator: yes.
    Yes = 2,
    /// To the coordinator: no.
    No = 3,
    /// To participants: commit.
    Commit = 4,
    /// To participants: do not commit.
    Abort = 5,
    /// To the coordinator: committed.
    Committed = 6,
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it says.
    pub kind: Kind,
    /// Whose it is; of no meaning in the coordinator's.
    pub participant: u8,
    /// What it is about.
    pub transaction: u64,
}

impl Message {
    /// As it travels.
    pub fn to_bytes(self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind as u8;
        bytes[5] = self.participant;
        bytes[6..14].copy_from_slice(&self.transaction.to_be_bytes());
        bytes
    }

    /// `None` if it is something else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MESSAGE_BYTES] = bytes.try_into().ok()?;
        if bytes[..4] != MAGIC {
            return None;
        }
        let kinds = [Kind::Prepare, Kind::Yes, Kind::No, Kind::Commit, Kind::Abort, Kind::Committed];
        let kind = kinds.into_iter().find(|kind| *kind as u8 == bytes[4])?;
        let transaction = u64::from_be_bytes(bytes[6..14].try_into().ok()?);
        Some(Self { kind, participant: bytes[5], transaction })
    }
}
