use super::*;

const PATIENT: Patience = Patience { retry_ns: Some(10), give_up_ns: 100 };
const NEVER_AGAIN: Patience = Patience { retry_ns: None, give_up_ns: 100 };

fn message(kind: Kind, participant: u8, transaction: u64) -> Message {
    Message { kind, participant, transaction }
}

fn sends(wish: Wish) -> (u64, Kind) {
    let (recipients, message) = wish.send.expect("it sends something");
    (recipients.0, message.kind)
}

fn outcome(wish: Wish) -> Option<Outcome> {
    wish.finished.map(|finished| finished.outcome)
}

/// Both phases of transaction `n`, answered at once by all of three participants.
fn commit(coordinator: &mut Coordinator, n: u64, now_ns: u64) -> Wish {
    coordinator.begin(now_ns);
    let mut last = Wish::default();
    for kind in [Kind::Yes, Kind::Committed] {
        for participant in 0..3 {
            last = coordinator.receive(now_ns + 1, message(kind, participant, n));
        }
    }
    last
}

#[test]
fn messages_come_back_as_they_were_and_others_are_none() {
    for kind in [Kind::Prepare, Kind::Yes, Kind::No, Kind::Commit, Kind::Abort, Kind::Committed] {
        let message = message(kind, 63, u64::MAX - 1);
        assert_eq!(Message::from_bytes(&message.to_bytes()), Some(message));
    }
    let good = message(Kind::Yes, 1, 1).to_bytes();
    let changed = |at: usize| {
        let mut bytes = good;
        bytes[at] = 99;
        Message::from_bytes(&bytes)
    };
    assert_eq!((changed(0), changed(4)), (None, None));
    assert_eq!((Message::from_bytes(&good[1..]), Message::from_bytes(&[])), (None, None));
}

#[test]
fn commits_when_all_vote_yes_and_say_that_they_did() {
    let mut coordinator = Coordinator::new(3, NEVER_AGAIN);
    assert_eq!(sends(coordinator.begin(5)), (0b111, Kind::Prepare));
    assert_eq!(coordinator.receive(6, message(Kind::Yes, 2, 1)), Wish::default());
    assert_eq!(coordinator.receive(7, message(Kind::Yes, 0, 1)), Wish::default());
    assert_eq!(sends(coordinator.receive(8, message(Kind::Yes, 1, 1))), (0b111, Kind::Commit));
    assert_eq!(coordinator.receive(9, message(Kind::Committed, 0, 1)), Wish::default());
    assert_eq!(coordinator.receive(9, message(Kind::Committed, 1, 1)), Wish::default());
    let wish = coordinator.receive(11, message(Kind::Committed, 2, 1));
    let finished = Finished { transaction: 1, outcome: Outcome::Committed, took_ns: 6 };
    assert_eq!(wish, Wish { send: None, finished: Some(finished) });
    assert_eq!((coordinator.next_ns(), coordinator.resent()), (None, 0));
}

#[test]
fn one_refusal_aborts_at_once() {
    let mut coordinator = Coordinator::new(3, NEVER_AGAIN);
    coordinator.begin(0);
    coordinator.receive(1, message(Kind::Yes, 0, 1));
    let wish = coordinator.receive(2, message(Kind::No, 1, 1));
    assert_eq!((sends(wish), outcome(wish)), ((0b111, Kind::Abort), Some(Outcome::Refused)));
    // Who votes now is late.
    assert_eq!(coordinator.receive(3, message(Kind::Yes, 2, 1)), Wish::default());
    assert_eq!(outcome(commit(&mut coordinator, 2, 10)), Some(Outcome::Committed));
}

#[test]
fn duplicates_count_once() {
    let mut coordinator = Coordinator::new(3, NEVER_AGAIN);
    coordinator.begin(0);
    for _ in 0..3 {
        assert_eq!(coordinator.receive(1, message(Kind::Yes, 0, 1)), Wish::default());
    }
    coordinator.receive(1, message(Kind::Yes, 1, 1));
    coordinator.receive(1, message(Kind::Yes, 2, 1));
    // Votes that come again are no acknowledgements.
    for participant in 0..3 {
        assert_eq!(coordinator.receive(2, message(Kind::Yes, participant, 1)), Wish::default());
    }
    assert!(coordinator.next_ns().is_some());
}

#[test]
fn strangers_other_transactions_and_what_comes_unasked_change_nothing() {
    let mut coordinator = Coordinator::new(3, NEVER_AGAIN);
    assert_eq!(coordinator.receive(0, message(Kind::Yes, 0, 0)), Wish::default());
    coordinator.begin(0);
    for odd in [
        message(Kind::Yes, 3, 1),
        message(Kind::Yes, 200, 1),
        message(Kind::Yes, 0, 2),
        message(Kind::Committed, 0, 1),
        message(Kind::Prepare, 0, 1),
    ] {
        assert_eq!(coordinator.receive(1, odd), Wish::default(), "{odd:?}");
    }
    // Everybody is still missing.
    assert_eq!(outcome(coordinator.tick(100)), Some(Outcome::NoVote));
}

#[test]
fn a_silent_participant_fails_the_transaction_and_not_the_next_one() {
    let mut coordinator = Coordinator::new(3, NEVER_AGAIN);
    coordinator.begin(0);
    coordinator.receive(1, message(Kind::Yes, 0, 1));
    coordinator.receive(1, message(Kind::Yes, 1, 1));
    assert_eq!((coordinator.next_ns(), coordinator.tick(99)), (Some(100), Wish::default()));
    let wish = coordinator.tick(100);
    assert_eq!((sends(wish), outcome(wish)), ((0b111, Kind::Abort), Some(Outcome::NoVote)));

    coordinator.begin(200);
    for participant in 0..3 {
        coordinator.receive(250, message(Kind::Yes, participant, 2));
    }
    // The time to commit begins when all have voted.
    assert_eq!(coordinator.next_ns(), Some(350));
    let wish = coordinator.tick(350);
    assert_eq!((wish.send, outcome(wish)), (None, Some(Outcome::NoAck)));
    assert_eq!(wish.finished.unwrap().took_ns, 150);
    assert_eq!(outcome(commit(&mut coordinator, 3, 400)), Some(Outcome::Committed));
}

#[test]
fn whoever_has_not_answered_is_asked_again() {
    let mut coordinator = Coordinator::new(3, PATIENT);
    coordinator.begin(0);
    coordinator.receive(1, message(Kind::Yes, 1, 1));
    assert_eq!((coordinator.next_ns(), coordinator.tick(9)), (Some(10), Wish::default()));
    assert_eq!(sends(coordinator.tick(10)), (0b101, Kind::Prepare));
    // Lateness of the clock does not make for two at once.
    assert_eq!((coordinator.next_ns(), coordinator.tick(11)), (Some(20), Wish::default()));
    assert_eq!(sends(coordinator.tick(25)), (0b101, Kind::Prepare));
    coordinator.receive(26, message(Kind::Yes, 0, 1));
    assert_eq!(sends(coordinator.receive(27, message(Kind::Yes, 2, 1))), (0b111, Kind::Commit));
    coordinator.receive(28, message(Kind::Committed, 2, 1));
    assert_eq!(sends(coordinator.tick(37)), (0b011, Kind::Commit));
    assert_eq!(coordinator.resent(), 6);
    assert_eq!(outcome(coordinator.tick(127)), Some(Outcome::NoAck));
}

#[test]
fn a_participant_answers_twice_and_commits_once() {
    let mut participant = Participant::new(4);
    let answer = |kind, transaction| Some(message(kind, 4, transaction));
    for _ in 0..2 {
        assert_eq!(participant.receive(message(Kind::Prepare, 0, 1), true), answer(Kind::Yes, 1));
    }
    // It has voted: what it could do now does not matter.
    assert_eq!(participant.receive(message(Kind::Prepare, 0, 1), false), answer(Kind::Yes, 1));
    for _ in 0..2 {
        assert_eq!(participant.receive(message(Kind::Commit, 0, 1), true), answer(Kind::Committed, 1));
    }
    assert_eq!(participant.commits(), 1);
}

#[test]
fn a_participant_commits_only_what_it_voted_for() {
    let mut participant = Participant::new(0);
    assert_eq!(participant.receive(message(Kind::Commit, 0, 1), true), None);
    assert_eq!(participant.receive(message(Kind::Prepare, 0, 2), false).unwrap().kind, Kind::No);
    assert_eq!(participant.receive(message(Kind::Commit, 0, 2), true), None);
    assert_eq!(participant.receive(message(Kind::Abort, 0, 2), true), None);
    assert_eq!(participant.receive(message(Kind::Prepare, 0, 3), true).unwrap().kind, Kind::Yes);
    // Late ones.
    assert_eq!(participant.receive(message(Kind::Prepare, 0, 2), true), None);
    assert_eq!(participant.receive(message(Kind::Commit, 0, 2), true), None);
    assert_eq!(participant.commits(), 0);
}

#[test]
fn whatever_the_network_loses_nothing_is_called_committed_that_is_not() {
    // A network that loses a third of all messages, duplicates some, by a fixed sequence.
    let mut state = 1u64;
    let mut chance = |of: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33).is_multiple_of(of)
    };
    for patience in [NEVER_AGAIN, PATIENT] {
        let mut coordinator = Coordinator::new(7, patience);
        let mut participants: Vec<Participant> = (0..7).map(Participant::new).collect();
        let mut committed = 0;
        let mut now_ns = 0;
        for _ in 0..2_000 {
            let mut wish = coordinator.begin(now_ns);
            let finished = loop {
                if let Some(finished) = wish.finished {
                    break finished;
                }
                now_ns += 1;
                let mut answers = Vec::new();
                if let Some((recipients, message)) = wish.send {
                    for number in recipients.numbers() {
                        for _ in 0..1 + u8::from(chance(10)) {
                            let answer = participants[number].receive(message, !chance(50));
                            answers.extend(answer.filter(|_| !chance(3)));
                        }
                    }
                }
                wish = Wish::default();
                for answer in answers {
                    let next = coordinator.receive(now_ns, answer);
                    wish = Wish { send: wish.send.or(next.send), finished: wish.finished.or(next.finished) };
                }
                if wish == Wish::default() {
                    now_ns = coordinator.next_ns().expect("a transaction is under way");
                    wish = coordinator.tick(now_ns);
                }
            };
            committed += u64::from(finished.outcome == Outcome::Committed);
        }
        assert!(participants.iter().all(|participant| participant.commits() >= committed));
        let expected = if patience.retry_ns.is_some() { 1_000..2_000 } else { 0..100 };
        assert!(expected.contains(&committed), "{committed} of 2000");
    }
}
