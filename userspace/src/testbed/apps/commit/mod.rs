//! Two-phase commit: a coordinator asks all participants whether they can commit a transaction, decides, and tells them.
//!
//! [`Coordinator`] and [`Participant`] are state machines without clock and network: messages and times in, messages
//! and outcomes out. [`drive`] runs them over a [`Transport`].

pub mod drive;
mod message;
pub mod transport;

pub use message::{Kind, MESSAGE_BYTES, Message};
pub use transport::Transport;

/// Participants of one coordinator; as many as a word has bits.
pub const MOST_PARTICIPANTS: usize = 64;

/// How a coordinator deals with messages that do not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// After what time whoever has not answered is asked again, ns; `None` for never.
    pub retry_ns: Option<u64>,
    /// After what time a phase is given up, ns.
    pub give_up_ns: u64,
}

/// What became of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All participants have said that they committed it.
    Committed,
    /// A participant voted against it.
    Refused,
    /// A vote did not come in time, and so it was aborted.
    NoVote,
    /// It was decided to commit, and a participant did not say in time that it did.
    NoAck,
}

/// Whom a message is for: bit `p` stands for participant `p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipients(pub u64);

impl Recipients {
    /// The first `count` participants.
    pub const fn first(count: usize) -> Self {
        Self(if count >= MOST_PARTICIPANTS { u64::MAX } else { (1 << count) - 1 })
    }

    /// Their numbers.
    pub fn numbers(self) -> impl Iterator<Item = usize> {
        (0..MOST_PARTICIPANTS).filter(move |number| self.0 >> number & 1 == 1)
    }
}

/// A transaction that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its number.
    pub transaction: u64,
    /// What became of it.
    pub outcome: Outcome,
    /// How long it took, ns.
    pub took_ns: u64,
}

/// What a coordinator wants done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// A message to be sent.
    pub send: Option<(Recipients, Message)>,
    /// The transaction that has ended with this.
    pub finished: Option<Finished>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Voting,
    /// Waiting for the participants to say that they committed.
    Committing,
}

/// A transaction that is under way.
#[derive(Clone, Copy, Debug)]
struct Current {
    phase: Phase,
    missing: Recipients,
    began_ns: u64,
    retry_at_ns: Option<u64>,
    give_up_at_ns: u64,
}

/// The coordinator. One transaction at a time; a new one has the next number.
#[derive(Debug)]
pub struct Coordinator {
    participants: usize,
    patience: Patience,
    transaction: u64,
    current: Option<Current>,
    resent: u64,
}

impl Coordinator {
    /// A coordinator of so many participants.
    ///
    /// # Panics
    /// With none or more than [`MOST_PARTICIPANTS`].
    pub fn new(participants: usize, patience: Patience) -> Self {
        assert!((1..=MOST_PARTICIPANTS).contains(&participants));
        Self { participants, patience, transaction: 0, current: None, resent: 0 }
    }

    /// Messages that were sent once more, each counted for every participant that it went to.
    pub const fn resent(&self) -> u64 {
        self.resent
    }

    /// When [`Self::tick`] has something to do, ns.
    pub fn next_ns(&self) -> Option<u64> {
        let current = self.current?;
        Some(current.retry_at_ns.map_or(current.give_up_at_ns, |retry| retry.min(current.give_up_at_ns)))
    }

    /// Begins the next transaction.
    ///
    /// # Panics
    /// If one is under way.
    pub fn begin(&mut self, now_ns: u64) -> Wish {
        assert!(self.current.is_none(), "one transaction at a time");
        self.transaction += 1;
        self.enter(Phase::Voting, now_ns, now_ns)
    }

    /// Takes a participant's message.
    pub fn receive(&mut self, now_ns: u64, message: Message) -> Wish {
        let Some(current) = &mut self.current else { return Wish::default() };
        let from = 1u64.checked_shl(message.participant.into()).unwrap_or(0) & current.missing.0;
        if message.transaction != self.transaction || from == 0 {
            return Wish::default();
        }
        match (current.phase, message.kind) {
            (Phase::Voting, Kind::No) => return self.abort(now_ns, Outcome::Refused),
            (Phase::Voting, Kind::Yes) | (Phase::Committing, Kind::Committed) => current.missing.0 &= !from,
            _ => return Wish::default(),
        }
        match (current.missing.0, current.phase) {
            (0, Phase::Voting) => {
                let began_ns = current.began_ns;
                self.enter(Phase::Committing, began_ns, now_ns)
            }
            (0, Phase::Committing) => Wish { send: None, finished: self.finish(now_ns, Outcome::Committed) },
            _ => Wish::default(),
        }
    }

    /// Does what is due: asks again, or gives up.
    pub fn tick(&mut self, now_ns: u64) -> Wish {
        let Some(current) = &mut self.current else { return Wish::default() };
        if now_ns >= current.give_up_at_ns {
            return match current.phase {
                Phase::Voting => self.abort(now_ns, Outcome::NoVote),
                Phase::Committing => Wish { send: None, finished: self.finish(now_ns, Outcome::NoAck) },
            };
        }
        if current.retry_at_ns.is_some_and(|at| now_ns >= at) {
            current.retry_at_ns = self.patience.retry_ns.map(|retry| now_ns + retry);
            self.resent += u64::from(current.missing.0.count_ones());
            let (missing, phase) = (current.missing, current.phase);
            return Wish { send: Some((missing, self.question(phase))), finished: None };
        }
        Wish::default()
    }

    fn enter(&mut self, phase: Phase, began_ns: u64, now_ns: u64) -> Wish {
        let all = Recipients::first(self.participants);
        self.current = Some(Current {
            phase,
            missing: all,
            began_ns,
            retry_at_ns: self.patience.retry_ns.map(|retry| now_ns + retry),
            give_up_at_ns: now_ns + self.patience.give_up_ns,
        });
        Wish { send: Some((all, self.question(phase))), finished: None }
    }

    /// What a phase asks of participants.
    fn question(&self, phase: Phase) -> Message {
        let kind = match phase {
            Phase::Voting => Kind::Prepare,
            Phase::Committing => Kind::Commit,
        };
        self.message(kind)
    }

    const fn message(&self, kind: Kind) -> Message {
        Message { kind, participant: 0, transaction: self.transaction }
    }

    /// Nobody waits for answers to an abort: whoever does not hear of it learns by the next transaction.
    fn abort(&mut self, now_ns: u64, outcome: Outcome) -> Wish {
        let send = Some((Recipients::first(self.participants), self.message(Kind::Abort)));
        Wish { send, finished: self.finish(now_ns, outcome) }
    }

    fn finish(&mut self, now_ns: u64, outcome: Outcome) -> Option<Finished> {
        let current = self.current.take()?;
        Some(Finished { transaction: self.transaction, outcome, took_ns: now_ns.saturating_sub(current.began_ns) })
    }
}

/// A participant. It votes yes unless told otherwise.
#[derive(Debug, Default)]
pub struct Participant {
    number: u8,
    /// The newest transaction that it was asked about, and its vote.
    voted: Option<(u64, Kind)>,
    /// The newest transaction that it committed.
    committed: u64,
    commits: u64,
}

impl Participant {
    /// The participant with this number.
    pub fn new(number: u8) -> Self {
        Self { number, ..Self::default() }
    }

    /// Transactions that it has committed.
    pub const fn commits(&self) -> u64 {
        self.commits
    }

    /// Takes the coordinator's message, and returns the answer; `can_commit` is its vote, if it has not voted yet.
    /// A question that comes twice is answered twice, and done once. What is older than the newest transaction is late.
    pub fn receive(&mut self, message: Message, can_commit: bool) -> Option<Message> {
        let transaction = message.transaction;
        let newest = self.voted.map_or(0, |(newest, _)| newest);
        let kind = match message.kind {
            Kind::Prepare if transaction > newest => {
                let vote = if can_commit { Kind::Yes } else { Kind::No };
                self.voted = Some((transaction, vote));
                vote
            }
            Kind::Prepare if transaction == newest => self.voted?.1,
            // Only what it voted for: the coordinator cannot have decided anything else.
            Kind::Commit if self.voted == Some((transaction, Kind::Yes)) => {
                if transaction != self.committed {
                    self.committed = transaction;
                    self.commits += 1;
                }
                Kind::Committed
            }
            _ => return None,
        };
        Some(Message { kind, participant: self.number, transaction })
    }
}

#[cfg(test)]
mod tests;
