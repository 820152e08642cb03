//! timely dataflow's example `barrier`, as it is, and its barriers as they are seen from its packets.
//!
//! The program prints nothing. But its workers tell each other of every barrier that they pass, in one message to each
//! other worker (timely_communication 0.32, networking.rs): six words of eight bytes, big-endian (channel, source, lowest
//! and highest target, length, sequence number), and `length` bytes. Message k of a worker says that it has passed k
//! barriers; a worker passes the next one when it has message k of all others. So the k-th barrier is complete at a
//! worker's host when the last message k has arrived there, and that packets tell. A connection begins with
//! the number of the worker that made it, and ends with a header of zeros.

use std::{collections::BTreeMap, net::Ipv4Addr, path::PathBuf};

use anyhow::{Result, bail, ensure};

use super::watch::Segment;

/// Where workers listen.
pub const PORT: u16 = 2_101;
/// Says where the program is.
pub const VARIABLE: &str = "QJUMP_BARRIER";
/// Eight bytes, the worker's number, before the first message.
const HELLO: usize = 8;
const HEADER: usize = 48;
/// Larger messages are none of the barrier's.
const LARGEST: u64 = 4_096;

/// The program: what [`VARIABLE`] names, or `barrier` on the path.
///
/// # Errors
/// If there is none, with how to get it.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        ensure!(path.is_file(), "{VARIABLE} is {}, and there is no such file", path.display());
        return Ok(path);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("barrier")).find(|file| file.is_file());
    match found {
        Some(file) => Ok(file),
        None => bail!(
            "there is no program 'barrier', an example of timely dataflow; install it: \
             cargo install timely --version 0.32.0 --locked --example barrier, and set {VARIABLE} to its path if it is not \
             on the PATH"
        ),
    }
}

/// The barriers that a worker's host sees, from the packets of the other workers to it.
#[derive(Debug)]
pub struct Barriers {
    workers: BTreeMap<Ipv4Addr, Worker>,
    /// When the barriers were complete that are complete, ns.
    complete_ns: Vec<u64>,
    arrived_ns: u64,
}

impl Barriers {
    /// None yet, of workers at these addresses.
    pub fn new(workers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        let workers = workers.into_iter().map(|address| (address, Worker::default())).collect();
        Self { workers, complete_ns: Vec::new(), arrived_ns: 0 }
    }

    /// Takes a packet. It may come twice, or after later ones.
    ///
    /// # Errors
    /// If what it brings is nothing that a barrier says.
    pub fn take(&mut self, segment: &Segment) -> Result<()> {
        let Some(worker) = self.workers.get_mut(&segment.from).filter(|_| segment.to_port == PORT) else {
            return Ok(());
        };
        worker.take(segment)?;
        self.arrived_ns = self.arrived_ns.max(segment.at_ns);
        let passed = self.workers.values().map(|worker| worker.messages).min().unwrap_or(0);
        // Packets are taken in the order of their arrival: this one completed them.
        self.complete_ns.resize(passed.max(self.complete_ns.len()), self.arrived_ns);
        Ok(())
    }

    /// How many barriers are complete. The workers' start counts as one.
    pub fn complete(&self) -> usize {
        self.complete_ns.len()
    }

    /// The time from each barrier to the next, ns.
    pub fn steps_ns(&self) -> impl Iterator<Item = u64> {
        self.complete_ns.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// The stream of one worker, put together.
#[derive(Debug, Default)]
struct Worker {
    /// The sequence number of the next byte that is missing, once the connection has begun.
    next: Option<u32>,
    /// What came early: by its distance from the first byte of the connection.
    early: BTreeMap<u32, Vec<u8>>,
    /// What is there and not yet a whole message.
    rest: Vec<u8>,
    greeted: bool,
    messages: usize,
}

impl Worker {
    fn take(&mut self, segment: &Segment) -> Result<()> {
        if segment.syn {
            *self = Self { next: Some(segment.sequence.wrapping_add(1)), ..Self::default() };
            return Ok(());
        }
        // What comes before its connection begins was sent to somebody before us.
        if self.next.is_none() || segment.payload.is_empty() {
            return Ok(());
        }
        self.early.entry(segment.sequence).or_default().clone_from(&segment.payload);
        self.put_together();
        self.read()
    }

    /// Moves what connects to the end of `rest`.
    fn put_together(&mut self) {
        let Some(mut next) = self.next else { return };
        loop {
            // The number of bytes that are there already; at most half of all numbers is behind, as TCP has it.
            let known = |sequence: u32| next.wrapping_sub(sequence);
            self.early.retain(|sequence, bytes| {
                let known = known(*sequence);
                known > u32::MAX / 2 || (known as usize) < bytes.len()
            });
            let connects = self.early.keys().copied().find(|sequence| known(*sequence) <= u32::MAX / 2);
            let Some(sequence) = connects else { break };
            let bytes = self.early.remove(&sequence).unwrap_or_default();
            let new = &bytes[known(sequence) as usize..];
            self.rest.extend_from_slice(new);
            next = next.wrapping_add(new.len() as u32);
        }
        self.next = Some(next);
    }

    /// Counts the messages that are whole.
    fn read(&mut self) -> Result<()> {
        let mut at = 0;
        if !self.greeted && self.rest.len() >= HELLO {
            self.greeted = true;
            at = HELLO;
        }
        while self.greeted && self.rest.len() - at >= HEADER {
            let word = |number: usize| {
                let bytes = &self.rest[at + 8 * number..at + 8 * number + 8];
                u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
            };
            let (length, sequence) = (word(4), word(5));
            ensure!(
                length <= LARGEST && (length == 0 || sequence == self.messages as u64),
                "the barrier's stream has a message of {length} bytes with number {sequence} after {} others: not timely's \
                 example barrier, or not version 0.32",
                self.messages
            );
            let whole = HEADER + length as usize;
            if self.rest.len() - at < whole {
                break;
            }
            at += whole;
            // Nothing in it: the end of the stream.
            self.messages += usize::from(length > 0);
        }
        self.rest.drain(..at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

    fn segment(from: Ipv4Addr, sequence: u32, at_ns: u64, payload: &[u8]) -> Segment {
        Segment { from, to_port: PORT, sequence, syn: false, payload: payload.to_vec(), at_ns }
    }

    fn syn(from: Ipv4Addr, sequence: u32) -> Segment {
        Segment { syn: true, ..segment(from, sequence, 0, &[]) }
    }

    fn message(number: u64) -> Vec<u8> {
        let length = if number == 0 { 72 } else { 104 };
        let mut bytes: Vec<u8> = [5, 1, 0, 1, length, number].into_iter().flat_map(u64::to_be_bytes).collect();
        bytes.resize(HEADER + length as usize, 1);
        bytes
    }

    /// The stream of a worker: its number, so many messages, the end.
    fn stream(messages: u64) -> Vec<u8> {
        let mut bytes = 1u64.to_be_bytes().to_vec();
        (0..messages).for_each(|number| bytes.extend(message(number)));
        bytes.extend([0; HEADER]);
        bytes
    }

    fn steps(barriers: &Barriers) -> Vec<u64> {
        barriers.steps_ns().collect()
    }

    #[test]
    fn a_barrier_is_complete_when_the_last_worker_has_said_so() {
        let mut barriers = Barriers::new([A, B]);
        let (hello, start) = (8, 120);
        let bytes = stream(3);
        // The number of the first byte is just below where the numbers begin anew.
        for (from, first) in [(A, 0), (B, u32::MAX - 60)] {
            barriers.take(&syn(from, first.wrapping_sub(1))).unwrap();
        }
        let part = |from: Ipv4Addr, first: u32, range: std::ops::Range<usize>, at_ns| {
            segment(from, first.wrapping_add(range.start as u32), at_ns, &bytes[range])
        };
        let one = hello + start;
        let two = one + 152;
        let b = u32::MAX - 60;
        for (segment, complete) in [
            (part(A, 0, 0..hello, 1), 0),
            (part(A, 0, hello..one, 2), 0),
            (part(B, b, 0..one, 10), 1),
            (part(A, 0, one..two, 20), 1),
            // Half of it, the other half twice and with what is known already.
            (part(B, b, one..one + 50, 30), 1),
            (part(B, b, one + 20..two, 35), 2),
            (part(B, b, one + 50..two, 36), 2),
            // The third before the end of the second comes to nobody's harm.
            (part(B, b, two + 10..bytes.len(), 40), 2),
            (part(A, 0, two..bytes.len(), 41), 2),
            (part(B, b, two..two + 30, 60), 3),
        ] {
            barriers.take(&segment).unwrap();
            assert_eq!(barriers.complete(), complete, "{segment:?}");
        }
        assert_eq!(steps(&barriers), [25, 25]);
    }

    #[test]
    fn messages_that_arrive_together_complete_several_barriers() {
        let mut barriers = Barriers::new([A, B]);
        let bytes = stream(4);
        for from in [A, B] {
            barriers.take(&syn(from, 9)).unwrap();
        }
        barriers.take(&segment(A, 10, 5, &bytes)).unwrap();
        barriers.take(&segment(B, 10, 7, &bytes)).unwrap();
        assert_eq!((barriers.complete(), steps(&barriers)), (4, vec![0, 0, 0]));
    }

    #[test]
    fn strangers_and_other_connections_do_not_count() {
        let mut barriers = Barriers::new([A]);
        let bytes = stream(2);
        // Before the connection began; from somebody else; to another port.
        barriers.take(&segment(A, 10, 1, &bytes)).unwrap();
        barriers.take(&syn(B, 9)).unwrap();
        barriers.take(&segment(B, 10, 2, &bytes)).unwrap();
        barriers.take(&syn(A, 9)).unwrap();
        barriers.take(&Segment { to_port: 80, ..segment(A, 10, 3, &bytes) }).unwrap();
        assert_eq!(barriers.complete(), 0);
        // A connection that was tried before begins anew.
        barriers.take(&segment(A, 10, 4, &bytes[..5])).unwrap();
        barriers.take(&syn(A, 99)).unwrap();
        barriers.take(&segment(A, 100, 5, &bytes)).unwrap();
        assert_eq!(barriers.complete(), 2);
    }

    #[test]
    fn another_program_is_noticed() {
        let mut barriers = Barriers::new([A]);
        barriers.take(&syn(A, 0)).unwrap();
        let error = barriers.take(&segment(A, 1, 1, &[b'x'; 100])).unwrap_err().to_string();
        assert!(error.contains("not timely's"), "{error}");
        // A message is missing.
        let mut barriers = Barriers::new([A]);
        barriers.take(&syn(A, 0)).unwrap();
        let bytes = [1u64.to_be_bytes().to_vec(), message(0), message(2)].concat();
        assert!(barriers.take(&segment(A, 1, 1, &bytes)).is_err());
    }
}
