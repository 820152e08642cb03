//! Runs coordinators and participants over a transport, one transaction after the other.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use super::{Coordinator, Outcome, Participant, Recipients, Transport, Wish};
use crate::{dataplane::sys::monotonic_ns, measure::Latencies};

/// How often somebody who waits looks whether it is over, ns.
const LOOK_NS: u64 = 50_000_000;

/// What a coordinator has seen.
#[derive(Clone, Debug)]
pub struct Tally {
    /// From the first question to the last acknowledgement of each transaction that was committed.
    pub committed: Latencies,
    /// Transactions that a participant refused.
    pub refused: u64,
    /// Transactions that failed because a vote did not come.
    pub no_vote: u64,
    /// Transactions that were decided, and of which an acknowledgement did not come.
    pub no_ack: u64,
    /// Messages that were sent once more.
    pub resent: u64,
    /// How long this took, ns.
    pub took_ns: u64,
}

impl Tally {
    /// Committed transactions a second.
    pub fn throughput(&self) -> f64 {
        self.committed.samples() as f64 * 1e9 / self.took_ns.max(1) as f64
    }

    /// Transactions that were not committed.
    pub const fn failed(&self) -> u64 {
        self.refused + self.no_vote + self.no_ack
    }
}

/// Transactions for `duration_ns`, each begun when the one before is over, and first the one that is under way, if one is;
/// ends early when `stop` says so. The transaction under way at the end counts neither as committed nor as failed.
///
/// # Errors
/// If the transport fails.
pub fn coordinate(
    coordinator: &mut Coordinator,
    transport: &mut dyn Transport,
    duration_ns: u64,
    stop: &AtomicBool,
) -> io::Result<Tally> {
    let start = monotonic_ns();
    let end = start + duration_ns;
    let mut tally = Tally { committed: Latencies::new(None), refused: 0, no_vote: 0, no_ack: 0, resent: 0, took_ns: 0 };
    let before = coordinator.resent();
    let mut wish = Wish::default();
    loop {
        if let Some((to, message)) = wish.send {
            transport.send(to, message)?;
        }
        if let Some(finished) = wish.finished {
            match finished.outcome {
                Outcome::Committed => tally.committed.record(finished.took_ns.max(1)),
                Outcome::Refused => tally.refused += 1,
                Outcome::NoVote => tally.no_vote += 1,
                Outcome::NoAck => tally.no_ack += 1,
            }
        }
        let now = monotonic_ns();
        if now >= end || stop.load(Relaxed) {
            tally.took_ns = now - start;
            tally.resent = coordinator.resent() - before;
            return Ok(tally);
        }
        wish = match coordinator.next_ns() {
            None => coordinator.begin(now),
            Some(due) => match transport.receive(due.min(end).min(now + LOOK_NS))? {
                Some(message) => coordinator.receive(monotonic_ns(), message),
                None => coordinator.tick(monotonic_ns()),
            },
        };
    }
}

/// Answers the coordinator, with yes, until `stop`.
///
/// # Errors
/// If the transport fails.
pub fn participate(number: u8, transport: &mut dyn Transport, stop: &AtomicBool) -> io::Result<Participant> {
    let mut participant = Participant::new(number);
    while !stop.load(Relaxed) {
        if let Some(message) = transport.receive(monotonic_ns() + LOOK_NS)?
            && let Some(answer) = participant.receive(message, true)
        {
            transport.send(Recipients::first(1), answer)?;
        }
    }
    Ok(participant)
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

    use super::{
        super::{
            Patience,
            transport::{Tcp, Udp},
        },
        *,
    };

    const PATIENCE: Patience = Patience { retry_ns: Some(100_000_000), give_up_ns: 60_000_000_000 };

    /// Runs three participants beside a coordinator for a while, and sees that they agree.
    fn agree<T: Transport + Send>(mut coordinator_side: T, participant_sides: Vec<T>) -> Tally {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            let participants: Vec<_> = (0..)
                .zip(participant_sides)
                .map(|(number, mut side)| scope.spawn(move || participate(number, &mut side, stop).unwrap().commits()))
                .collect();
            let mut coordinator = Coordinator::new(participants.len(), PATIENCE);
            let tally = coordinate(&mut coordinator, &mut coordinator_side, 200_000_000, &AtomicBool::new(false));
            stop.store(true, Relaxed);
            let tally = tally.unwrap();
            for participant in participants {
                let commits = participant.join().unwrap();
                // The last one may have been under way.
                assert!((tally.committed.samples()..=tally.committed.samples() + 1).contains(&commits));
            }
            tally
        })
    }

    #[test]
    fn all_commit_over_udp() {
        let (sockets, addresses): (Vec<UdpSocket>, Vec<SocketAddr>) = (0..4)
            .map(|_| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                let address = socket.local_addr().unwrap();
                (socket, address)
            })
            .unzip();
        let mut sides = sockets.into_iter();
        let coordinator = Udp::new(sides.next().unwrap(), addresses[1..].to_vec()).unwrap();
        let participants = sides.map(|socket| Udp::new(socket, vec![addresses[0]]).unwrap()).collect();
        let tally = agree(coordinator, participants);
        assert!(tally.committed.samples() > 0 && tally.throughput() > 0.0);
        assert_eq!(tally.failed(), 0);
    }

    #[test]
    fn all_commit_over_tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let pairs = (0..3).map(|_| (TcpStream::connect(address).unwrap(), listener.accept().unwrap().0));
        let (near, far): (Vec<TcpStream>, Vec<TcpStream>) = pairs.unzip();
        let participants = far.into_iter().map(|stream| Tcp::new(vec![stream]).unwrap()).collect();
        let tally = agree(Tcp::new(near).unwrap(), participants);
        assert!(tally.committed.samples() > 0);
        assert_eq!(tally.failed(), 0);
    }

    #[test]
    fn nobody_there_is_a_failure_and_not_an_error() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        // Nobody listens on the discard port of a loopback address of no host's.
        let mut side = Udp::new(socket, vec!["127.9.9.9:9".parse().unwrap()]).unwrap();
        let patience = Patience { retry_ns: None, give_up_ns: 1_000_000 };
        let stop = AtomicBool::new(false);
        let tally = coordinate(&mut Coordinator::new(1, patience), &mut side, 50_000_000, &stop).unwrap();
        assert!(tally.no_vote > 0);
        assert_eq!((tally.committed.samples(), tally.no_ack), (0, 0));
    }
}
