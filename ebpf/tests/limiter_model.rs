//! Several CPUs at one word, in every order and under every reading of memory that the C11 model
//! allows, by the model checker loom.
//!
//! Loads are relaxed here, as they are plain in the program; only the compare-exchange orders.

use loom::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering, fence},
    },
    thread,
};
use qjump_ebpf::{
    Admission, LevelLimit, LevelState, admit,
    limiter::{Oversize, backlog_ns, carry_over, slot_of, word_at},
};

const NOW_NS: u64 = 1 << 40;
const EPOCH_NS: u64 = 1_000;

/// One level: its word, the slot in force, and the limit of each slot. Limits do not change while a
/// model runs: that no packet reads a slot that is being written is the loader's promise, not the limiter's.
struct Level {
    word: AtomicU64,
    active: AtomicU64,
    lock: Mutex<()>,
    slots: [LevelLimit; 2],
}

impl Level {
    fn new(backlog_ns: u64, slots: [LevelLimit; 2]) -> Arc<Self> {
        let word = AtomicU64::new(word_at(NOW_NS, backlog_ns, 0));
        Arc::new(Self { word, active: AtomicU64::new(0), lock: Mutex::new(()), slots })
    }

    fn backlog(&self, now_ns: u64) -> u64 {
        backlog_ns(self.load(), now_ns)
    }

    /// A packet that exchanges words as newer kernels do.
    fn packet(&self, cost_ns: u64, now_ns: u64) -> (Admission, u64) {
        packet(self, &self.slots, cost_ns, now_ns)
    }

    /// A packet that does it as older ones do.
    fn packet_under_a_lock(&self, cost_ns: u64, now_ns: u64) -> (Admission, u64) {
        packet(&Locked(self), &self.slots, cost_ns, now_ns)
    }
}

/// A packet as the program handles it: reads the slot, asks, and if told `Stale`, reads the slot and
/// asks again. The answer, and the slot that gave it.
fn packet(level: &impl LevelState, slots: &[LevelLimit; 2], cost_ns: u64, now_ns: u64) -> (Admission, u64) {
    let slot = level.active_slot();
    let answer = admit(level, slot, &slots[slot as usize], cost_ns, now_ns);
    if answer != Admission::Stale {
        return (answer, slot);
    }
    let again = level.active_slot();
    assert_ne!(again, slot, "stale before there was a change");
    let answer = admit(level, again, &slots[again as usize], cost_ns, now_ns);
    assert_ne!(answer, Admission::Stale, "stale again after one change");
    (answer, again)
}

impl LevelState for Level {
    fn load(&self) -> u64 {
        self.word.load(Ordering::Relaxed)
    }

    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        self.word.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst).map(drop)
    }

    fn active_slot(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }
}

/// The level as packets see it where the kernel has no compare-exchange (src/exchange.rs): they exchange its word under a lock,
/// which the loader does not take.
struct Locked<'a>(&'a Level);

impl LevelState for Locked<'_> {
    fn load(&self) -> u64 {
        self.0.load()
    }

    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        let _held = self.0.lock.lock().unwrap();
        let seen = self.load();
        if seen != current {
            return Err(seen);
        }
        // What another exchange wrote since the load is overwritten, whatever it was. A store would do; but loom lets others see a
        // store and an exchange in either order, when the exchange read what the store replaces, and C11 in this one alone.
        self.0.word.swap(new, Ordering::Relaxed);
        Ok(())
    }

    fn active_slot(&self) -> u64 {
        fence(Ordering::Acquire);
        self.0.active_slot()
    }
}

fn per_packet(tolerance_ns: u64) -> LevelLimit {
    LevelLimit::per_packet(EPOCH_NS, tolerance_ns, 256, Oversize::Demote).unwrap()
}

/// What a packet of this cost and time does.
type Packet = fn(&Level, u64, u64) -> (Admission, u64);

/// Packets of these costs and times, each on its own CPU, and `here` on another; the packets' answers.
fn race(level: &Arc<Level>, packets: &[(u64, u64)], here: impl FnOnce()) -> Vec<(Admission, u64)> {
    race_of(Level::packet, level, packets, here)
}

fn race_of(packet: Packet, level: &Arc<Level>, packets: &[(u64, u64)], here: impl FnOnce()) -> Vec<(Admission, u64)> {
    let threads: Vec<_> = packets
        .iter()
        .map(|&(cost_ns, now_ns)| {
            let level = Arc::clone(level);
            thread::spawn(move || packet(&level, cost_ns, now_ns))
        })
        .collect();
    here();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Runs `model` in every order of its threads that takes the CPU away from threads up to three times.
///
/// All orders of three threads with up to nine accesses each take minutes, these take seconds. A packet
/// makes one decision, from its read to its exchange: one preemption between the two lets any of the
/// others' steps come between, and there are three threads. (Loom's manual takes two or three to find
/// most bugs.)
fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

fn count(answers: &[(Admission, u64)], wanted: Admission) -> usize {
    answers.iter().filter(|(answer, _)| *answer == wanted).count()
}

#[test]
fn of_two_packets_on_a_budget_of_one_exactly_one_passes() {
    loom::model(|| {
        let level = Level::new(0, [per_packet(0); 2]);
        let answers = race(&level, &[(EPOCH_NS, NOW_NS); 2], || ());
        assert_eq!((count(&answers, Admission::Admitted), count(&answers, Admission::Over)), (1, 1), "{answers:?}");
        assert_eq!(level.backlog(NOW_NS), EPOCH_NS);
    });
}

#[test]
fn of_three_packets_on_a_budget_of_one_exactly_one_passes_whatever_their_clocks() {
    loom::model(|| {
        let level = Level::new(0, [per_packet(0); 2]);
        let times = [NOW_NS - 7, NOW_NS, NOW_NS + 5];
        let answers = race(&level, &times.map(|now| (EPOCH_NS, now)), || ());
        assert_eq!((count(&answers, Admission::Admitted), count(&answers, Admission::Over)), (1, 2), "{answers:?}");
        let passed = answers.iter().position(|(answer, _)| *answer == Admission::Admitted).unwrap();
        assert_eq!(level.backlog(times[passed]), EPOCH_NS, "not one epoch from the one that passed");
    });
}

#[test]
fn of_three_packets_on_a_budget_of_two_exactly_two_pass() {
    check(|| {
        let level = Level::new(0, [per_packet(EPOCH_NS); 2]);
        let answers = race(&level, &[(EPOCH_NS, NOW_NS); 3], || ());
        assert_eq!((count(&answers, Admission::Admitted), count(&answers, Admission::Over)), (2, 1), "{answers:?}");
        assert_eq!(level.backlog(NOW_NS), 2 * EPOCH_NS);
    });
}

#[test]
fn packets_of_different_cost_take_the_budget_to_the_last_byte() {
    check(|| {
        // 8 ns a byte; 300 bytes for packets of 100, 200 and 200: whoever is first, 300 pass.
        let limit = LevelLimit::per_byte(1_000_000_000, 300, 60, Oversize::Demote).unwrap();
        let cost = |bytes| limit.cost_ns(bytes, 2, bytes).unwrap();
        let level = Level::new(0, [limit; 2]);
        let packets = [cost(100), cost(200), cost(200)].map(|cost| (cost, NOW_NS));
        let answers = race(&level, &packets, || ());
        assert_eq!((count(&answers, Admission::Admitted), count(&answers, Admission::Over)), (2, 1), "{answers:?}");
        assert_eq!(answers[0].0, Admission::Admitted);
        assert_eq!(level.backlog(NOW_NS), 8 * 300);
    });
}

/// Two packets and a change of configuration. In any order of them, at least `least` and at most `most`
/// packets pass.
fn change(slots: fn() -> [LevelLimit; 2], backlog: u64, least: usize, most: usize) {
    check(move || {
        let level = Level::new(backlog, slots());
        let answers = race(&level, &[(EPOCH_NS, NOW_NS); 2], || {
            level.active.store(1, Ordering::Relaxed);
            carry_over(&*level, 1, &level.slots[1], NOW_NS);
            assert_eq!(slot_of(level.load()), 1, "a word of the old slot after the change");
        });
        let admitted = count(&answers, Admission::Admitted);
        assert_eq!(admitted + count(&answers, Admission::Over), 2, "{answers:?}");
        assert!((least..=most).contains(&admitted), "{answers:?}");
        assert_eq!(slot_of(level.load()), 1);
        assert_eq!(level.active_slot(), 1);
    });
}

#[test]
fn a_change_to_a_smaller_burst_admits_within_the_larger() {
    change(|| [per_packet(EPOCH_NS), per_packet(0).replacing(&per_packet(EPOCH_NS))], 0, 1, 2);
}

#[test]
fn a_change_to_a_larger_burst_admits_within_the_larger() {
    change(|| [per_packet(0), per_packet(EPOCH_NS).replacing(&per_packet(0))], 0, 1, 2);
}

#[test]
fn an_identical_reload_under_racing_packets_admits_exactly_the_budget() {
    change(|| [per_packet(0), per_packet(0).replacing(&per_packet(0))], 0, 1, 1);
}

#[test]
fn a_change_of_an_exhausted_level_admits_nothing() {
    change(|| [per_packet(0), per_packet(0).replacing(&per_packet(0))], EPOCH_NS, 0, 0);
}

#[test]
fn a_change_admits_what_the_larger_burst_has_left() {
    let slots = || [per_packet(0), per_packet(EPOCH_NS).replacing(&per_packet(0))];
    change(slots, EPOCH_NS, 0, 1);
}

/// A packet in the middle of its decision when the slot changes under it: it either was first, and is
/// charged in a word that is then carried over, or it is told `Stale`.
#[test]
fn a_packet_that_races_with_a_change_is_charged_once_in_the_slot_that_admitted_it() {
    loom::model(|| {
        // The epoch doubles: what was charged at the old one must be worth twice as much at the new.
        let old = per_packet(0);
        let new = LevelLimit::per_packet(2 * EPOCH_NS, 0, 256, Oversize::Demote).unwrap().replacing(&old);
        let level = Level::new(0, [old, new]);
        let packet = {
            let level = Arc::clone(&level);
            thread::spawn(move || {
                let slot = level.active_slot();
                let cost = [EPOCH_NS, 2 * EPOCH_NS];
                match admit(&*level, slot, &level.slots[slot as usize], cost[slot as usize], NOW_NS) {
                    Admission::Stale => {
                        assert_eq!((slot, level.active_slot()), (0, 1));
                        admit(&*level, 1, &level.slots[1], cost[1], NOW_NS)
                    }
                    answer => answer,
                }
            })
        };
        level.active.store(1, Ordering::Relaxed);
        carry_over(&*level, 1, &level.slots[1], NOW_NS);
        assert_eq!(packet.join().unwrap(), Admission::Admitted);
        assert_eq!(level.load(), word_at(NOW_NS, 2 * EPOCH_NS, 1));
    });
}

/// Two packets that exchange words under a lock, and a change of configuration by a loader that takes no lock, and carries over
/// once more when both have left. As many pass as with a compare-exchange.
fn change_under_a_lock(slots: fn() -> [LevelLimit; 2], backlog: u64, least: usize, most: usize) {
    check(move || {
        let level = Level::new(backlog, slots());
        let answers = race_of(Level::packet_under_a_lock, &level, &[(EPOCH_NS, NOW_NS); 2], || {
            level.active.store(1, Ordering::Relaxed);
            carry_over(&*level, 1, &level.slots[1], NOW_NS);
        });
        carry_over(&*level, 1, &level.slots[1], NOW_NS);
        let admitted = count(&answers, Admission::Admitted);
        assert_eq!(admitted + count(&answers, Admission::Over), 2, "{answers:?}");
        assert!((least..=most).contains(&admitted), "{answers:?}");
        assert_eq!(slot_of(level.load()), 1, "a word of the old slot after the change");
    });
}

/// A packet of the new slot beside the second carry-over: unless that had nothing to do, the loader waits and comes again.
#[test]
fn under_a_lock_a_change_has_ended_when_nothing_is_left_to_carry_over() {
    check(|| {
        let level = Level::new(0, [per_packet(0), per_packet(0).replacing(&per_packet(0))]);
        let packet = || {
            let level = Arc::clone(&level);
            thread::spawn(move || level.packet_under_a_lock(EPOCH_NS, NOW_NS))
        };
        let carry = || carry_over(&*level, 1, &level.slots[1], NOW_NS);
        let old = packet();
        level.active.store(1, Ordering::Relaxed);
        carry();
        let mut answers = vec![old.join().unwrap()];
        let new = packet();
        let again = carry();
        let slot = slot_of(level.word.load(Ordering::SeqCst));
        answers.push(new.join().unwrap());
        if again {
            carry();
            assert!(!carry(), "a third grace period would be needed");
        } else {
            assert_eq!((slot, slot_of(level.load())), (1, 1), "the change had not ended");
        }
        assert_eq!((count(&answers, Admission::Admitted), count(&answers, Admission::Over)), (1, 1), "{answers:?}");
        assert_eq!(level.load(), word_at(NOW_NS, EPOCH_NS, 1));
    });
}

#[test]
fn under_a_lock_an_identical_reload_admits_exactly_the_budget() {
    change_under_a_lock(|| [per_packet(0), per_packet(0).replacing(&per_packet(0))], 0, 1, 1);
}

#[test]
fn under_a_lock_a_change_admits_within_the_larger_burst() {
    change_under_a_lock(|| [per_packet(EPOCH_NS), per_packet(0).replacing(&per_packet(EPOCH_NS))], 0, 1, 2);
    change_under_a_lock(|| [per_packet(0), per_packet(EPOCH_NS).replacing(&per_packet(0))], 0, 1, 2);
}

#[test]
fn under_a_lock_a_change_of_an_exhausted_level_admits_nothing() {
    change_under_a_lock(|| [per_packet(0), per_packet(0).replacing(&per_packet(0))], EPOCH_NS, 0, 0);
}
