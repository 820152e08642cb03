//! The messages of a train: what a probe and its answer look like in a payload.
//!
//! All numbers are big-endian. The first 16 bytes are in every message:
//!
//! | at | bytes | |
//! |---|---|---|
//! | 0 | 4 | token of the train |
//! | 4 | 4 | sequence number |
//! | 8 | 4 | checksum of all other bytes before the pattern |
//! | 12 | 1 | kind |
//! | 13 | 1 | 1: belongs to the warm-up; 2: the kernels stamp it and its answer where they leave |
//! | 14 | 2 | length of the message |
//!
//! An answer of at least [`STAMPED`] bytes goes on with the other side's times: its kernel's reception, its
//! application's reception and its sending (8 bytes each, ns since 1970, 0 if not known), and, because a message
//! cannot carry the times at which it leaves itself, the sequence number of an earlier answer with the times from its
//! sending to the stamps SCHED and SND (4 bytes each, ns, all ones if not known). What is left of any message is a
//! fixed pattern, so that a changed bit is found wherever it is.

/// The shortest message, bytes.
pub const PLAIN: usize = 16;
/// The shortest message whose answer carries the other side's times.
pub const STAMPED: usize = 56;
/// The longest, bytes: what one UDP datagram takes.
pub const LONGEST: usize = 65_507;

const NOT_KNOWN: u32 = u32::MAX;

/// Bits of byte 13.
const WARM_UP: u8 = 1;
const WITH_STAMPS: u8 = 2;

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A sample's first half.
    Probe = 1,
    /// Its second.
    Answer = 2,
    /// Opens the way before the first probe.
    Hello = 3,
    /// Answers that.
    Welcome = 4,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Probe, Self::Answer, Self::Hello, Self::Welcome].into_iter().find(|&kind| kind as u8 == byte)
    }
}

/// When an answer left: ns from its application's sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Left {
    /// The answer's sequence number.
    pub sequence: u32,
    /// To its arrival at the queues.
    pub sched_ns: Option<u32>,
    /// To the device.
    pub snd_ns: Option<u32>,
}

/// The other side's times, ns since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Its kernel got the probe.
    pub rx_ns: Option<u64>,
    /// Its application got the probe.
    pub received_ns: u64,
    /// Its application sent the answer.
    pub sending_ns: u64,
    /// When an earlier answer left.
    pub left: Option<Left>,
}

/// A message, without its pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The train's.
    pub token: u32,
    /// Its number in the train.
    pub sequence: u32,
    /// What it is for.
    pub kind: Kind,
    /// Whether it is left out of the counts.
    pub warm_up: bool,
    /// Whether the kernel is asked when it leaves, and when its answer does.
    pub stamped: bool,
    /// In answers of at least [`STAMPED`] bytes.
    pub times: Option<Times>,
}

/// Each step is reversible, so that a change of one word always changes the result before it is cut.
fn checksum(header: &[u8]) -> u32 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    for word in header.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        hash = (hash ^ u64::from_be_bytes(bytes)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    }
    hash as u32
}

/// The pattern's byte at a place of a message.
const fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(167) >> 3) as u8 ^ at as u8
}

/// A buffer with the pattern in place for messages of this length, of at least [`PLAIN`] bytes.
pub fn buffer(length: usize) -> Vec<u8> {
    (0..length).map(pattern).collect()
}

/// How many bytes come before the pattern.
const fn head(kind: Kind, length: usize) -> usize {
    if matches!(kind, Kind::Answer) && length >= STAMPED { STAMPED } else { PLAIN }
}

fn put<const N: usize>(buffer: &mut [u8], at: usize, bytes: [u8; N]) {
    buffer[at..at + N].copy_from_slice(&bytes);
}

fn u32_at(buffer: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(buffer[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(buffer: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(buffer[at..at + 8].try_into().expect("eight bytes"))
}

impl Message {
    /// Writes the message into a [`buffer`] of its length, whose pattern stays.
    pub fn write(&self, buffer: &mut [u8]) {
        let length = buffer.len();
        put(buffer, 0, self.token.to_be_bytes());
        put(buffer, 4, self.sequence.to_be_bytes());
        put(buffer, 8, [0; 4]);
        let flags = if self.warm_up { WARM_UP } else { 0 } | if self.stamped { WITH_STAMPS } else { 0 };
        put(buffer, 12, [self.kind as u8, flags]);
        put(buffer, 14, (length as u16).to_be_bytes());
        let head = head(self.kind, length);
        if head == STAMPED {
            let times = self.times.unwrap_or_default();
            put(buffer, 16, times.rx_ns.unwrap_or(0).to_be_bytes());
            put(buffer, 24, times.received_ns.to_be_bytes());
            put(buffer, 32, times.sending_ns.to_be_bytes());
            let known = |time: Option<u32>| time.unwrap_or(NOT_KNOWN).to_be_bytes();
            // An answer's own number cannot be an earlier one's.
            put(buffer, 40, times.left.map_or(self.sequence, |left| left.sequence).to_be_bytes());
            put(buffer, 44, known(times.left.and_then(|left| left.sched_ns)));
            put(buffer, 48, known(times.left.and_then(|left| left.snd_ns)));
            put(buffer, 52, [0; 4]);
        }
        let sum = checksum(&buffer[..head]);
        put(buffer, 8, sum.to_be_bytes());
    }

    /// Reads a message; `clean` is a [`buffer`] of at least its length. `None` if a bit of it is not as it was sent.
    pub fn read(message: &mut [u8], clean: &[u8]) -> Option<Self> {
        let length = message.len();
        if length < PLAIN || usize::from(u16::from_be_bytes([message[14], message[15]])) != length {
            return None;
        }
        let kind = Kind::of(message[12])?;
        let head = head(kind, length);
        let sum = u32_at(message, 8);
        put(message, 8, [0; 4]);
        if checksum(&message[..head]) != sum || message[head..] != clean[head..length] {
            return None;
        }
        let sequence = u32_at(message, 4);
        let times = (head == STAMPED).then(|| {
            let known = |at| Some(u32_at(message, at)).filter(|&time| time != NOT_KNOWN);
            let left = Left { sequence: u32_at(message, 40), sched_ns: known(44), snd_ns: known(48) };
            Times {
                rx_ns: Some(u64_at(message, 16)).filter(|&time| time != 0),
                received_ns: u64_at(message, 24),
                sending_ns: u64_at(message, 32),
                left: Some(left).filter(|left| left.sequence != sequence),
            }
        });
        let flag = |bit| message[13] & bit != 0;
        let (warm_up, stamped) = (flag(WARM_UP), flag(WITH_STAMPS));
        Some(Self { token: u32_at(message, 0), sequence, kind, warm_up, stamped, times })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEFT: Left = Left { sequence: 6, sched_ns: Some(900), snd_ns: None };
    const TIMES: Times = Times { rx_ns: Some(1), received_ns: 2, sending_ns: 3, left: Some(LEFT) };

    fn message(kind: Kind, times: Option<Times>) -> Message {
        Message { token: 0xdead_beef, sequence: 7, kind, warm_up: true, stamped: kind == Kind::Probe, times }
    }

    #[test]
    fn every_length_reads_as_it_was_written() {
        let clean = buffer(1500);
        for length in [PLAIN, 18, STAMPED - 1, STAMPED, 64, 1472] {
            for kind in [Kind::Probe, Kind::Answer, Kind::Hello, Kind::Welcome] {
                for times in [TIMES, Times { rx_ns: None, left: None, ..TIMES }] {
                    let times = (kind == Kind::Answer && length >= STAMPED).then_some(times);
                    let mut bytes = buffer(length);
                    message(kind, times).write(&mut bytes);
                    assert_eq!(Message::read(&mut bytes, &clean), Some(message(kind, times)), "{length}");
                }
            }
        }
    }

    #[test]
    fn no_changed_bit_and_no_other_length_goes_unnoticed() {
        let clean = buffer(200);
        for (kind, length) in [(Kind::Probe, 100), (Kind::Answer, 100), (Kind::Answer, 20)] {
            let times = (length >= STAMPED).then_some(TIMES).filter(|_| kind == Kind::Answer);
            let mut sent = buffer(length);
            message(kind, times).write(&mut sent);
            for bit in 0..length * 8 {
                let mut changed = sent.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Message::read(&mut changed, &clean), None, "bit {bit}");
            }
            for other in (0..length).chain([length + 1]) {
                let mut cut = sent.clone();
                cut.resize(other, 0);
                assert_eq!(Message::read(&mut cut, &clean), None, "length {other}");
            }
        }
    }
}
