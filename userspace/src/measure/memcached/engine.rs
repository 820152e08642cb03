//! A thread of the client: sends what is due, takes what comes, and counts.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use anyhow::Result;
use rand::SeedableRng;
use rand_xoshiro::Xoshiro256PlusPlus;

use super::{
    Client,
    connection::Connection,
    tally::{Owed, Running, Series, Tally, Verdict},
    workload::Content,
};
use crate::{
    dataplane::sys::monotonic_ns,
    measure::{clock::SPIN_NS, poll::Poller, schedule::Schedule, tcp::Options},
};

/// How often it looks after what no event tells of.
const CARE_NS: u64 = 100_000_000;
/// A connection that broke is made again after this time.
const RETRY_NS: u64 = 100_000_000;
/// What may still come after a measurement was stopped.
const STOPPED_LINGER_NS: u64 = 200_000_000;

/// How far the client is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    pub(super) populated: AtomicU64,
    sent: AtomicU64,
    answered: AtomicU64,
    pub(super) stop: AtomicBool,
}

impl Progress {
    /// Keys that have a value so far.
    pub fn populated(&self) -> u64 {
        self.populated.load(Relaxed)
    }

    /// Requests sent so far, the warm-up included.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Requests answered so far, the warm-up included.
    pub fn answered(&self) -> u64 {
        self.answered.load(Relaxed)
    }

    /// Ends the measurement early.
    pub fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

/// What the threads share.
pub(super) struct Shared<'a> {
    pub client: &'a Client,
    pub content: &'a Content,
    pub progress: &'a Progress,
    pub series: &'a Mutex<Series>,
    /// `CLOCK_MONOTONIC`, ns.
    pub start_ns: u64,
}

/// One thread.
pub(super) struct Engine<'a> {
    shared: &'a Shared<'a>,
    poller: Poller,
    connections: Vec<Connection>,
    /// Where the search for a connection with room begins.
    turn: usize,
    schedule: Schedule,
    /// The next request of the schedule, ns since the start.
    due_ns: u64,
    number: u64,
    random: Xoshiro256PlusPlus,
    /// No connection has room, since then; requests that are due wait.
    held: bool,
    /// Since when there is room again, ns since the start.
    free_ns: u64,
    /// Requests due before are the warm-up, ns since the start.
    counted_ns: u64,
    /// Requests due from here on are not sent, ns since the start.
    end_ns: u64,
    /// Nothing is waited for any longer, ns since the start.
    last_ns: u64,
    care_ns: u64,
    /// How long before a request is due the thread stops sleeping and watches the clock.
    ahead_ns: u64,
    stopped: bool,
    /// Connections that were made.
    made: u64,
    tally: Tally,
    running: Running,
}

impl<'a> Engine<'a> {
    /// Thread `index` of the client's.
    pub fn new(shared: &'a Shared<'a>, index: usize) -> Result<Self> {
        let Client { connections, threads, warm_up, duration, timeout, seed, .. } = *shared.client;
        let mut schedule = shared.client.schedule(index);
        let due_ns = schedule.next().unwrap_or(u64::MAX);
        let end_ns = duration.as_nanos() as u64;
        // As even as it goes.
        let own = (connections + threads - 1 - index) / threads;
        Ok(Self {
            shared,
            poller: Poller::new()?,
            connections: (0..own).map(|_| Connection::new()).collect(),
            turn: 0,
            schedule,
            due_ns,
            number: 0,
            random: Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_add(index as u64)),
            held: false,
            free_ns: 0,
            counted_ns: warm_up.as_nanos() as u64,
            end_ns,
            last_ns: end_ns + timeout.as_nanos() as u64,
            care_ns: 0,
            // One that never sleeps would take the CPU from everybody, and the kernel would stop it for that.
            ahead_ns: SPIN_NS.min((1e9 / shared.client.rate) as u64 * threads as u64 / 4),
            stopped: false,
            made: 0,
            tally: Tally::new(warm_up.as_nanos() as u64..end_ns),
            running: Running::new(),
        })
    }

    /// ns since the start; 0 before.
    fn now(&self) -> u64 {
        monotonic_ns().saturating_sub(self.shared.start_ns)
    }

    /// Runs until all is answered, or nothing is waited for any longer.
    ///
    /// # Errors
    /// If the kernel does not do what it must; not if the server does not.
    pub fn run(mut self) -> Result<Tally> {
        loop {
            self.send_due();
            let now = self.now();
            if now >= self.care_ns {
                self.care(now)?;
            }
            if self.is_over(now) {
                break;
            }
            let wake = self.wake_ns(now);
            let ready: Vec<usize> = self.poller.wait(wake.saturating_sub(now))?.collect();
            for token in ready {
                self.serve(token);
            }
        }
        self.finish();
        Ok(self.tally)
    }

    fn is_over(&self, now: u64) -> bool {
        let all_sent = self.due_ns >= self.end_ns;
        now >= self.last_ns || all_sent && self.connections.iter().all(|connection| connection.owed() == 0)
    }

    /// When there is something to do that no event tells of.
    fn wake_ns(&self, now: u64) -> u64 {
        let due = if self.held || self.due_ns >= self.end_ns { u64::MAX } else { self.due_ns };
        // In the last moment it does not sleep at all, but takes what comes.
        due.saturating_sub(self.ahead_ns).max(now).min(self.care_ns).min(self.last_ns)
    }

    /// Sends what is due, as far as there is room.
    fn send_due(&mut self) {
        while self.due_ns < self.end_ns && self.due_ns <= self.now() {
            let Some(index) = self.with_room() else {
                self.held = true;
                return;
            };
            if std::mem::take(&mut self.held) {
                self.free_ns = self.now();
            }
            let request = self.shared.content.request(&mut self.random);
            let owed = Owed {
                number: self.number,
                due_ns: self.due_ns,
                sent_ns: None,
                late_ns: self.now() - self.due_ns.max(self.free_ns),
                key: request.key,
                set: request.set,
                counts: self.due_ns >= self.counted_ns,
            };
            self.number += 1;
            self.due_ns = self.schedule.next().unwrap_or(u64::MAX);
            self.connections[index].push(owed, self.shared.content);
            self.flush(index);
        }
    }

    /// A connection that may owe one more answer, the next in turn.
    fn with_room(&mut self) -> Option<usize> {
        let count = self.connections.len();
        let depth = self.shared.client.depth;
        let index = (self.turn..self.turn + count)
            .map(|index| index % count)
            .find(|index| self.connections[*index].is_up() && self.connections[*index].owed() < depth)?;
        self.turn = (index + 1) % count;
        Some(index)
    }

    fn flush(&mut self, index: usize) {
        let start_ns = self.shared.start_ns;
        let (tally, progress) = (&mut self.tally, self.shared.progress);
        let clock = || monotonic_ns().saturating_sub(start_ns);
        let result = self.connections[index].flush(clock, |owed| {
            tally.sent(owed);
            progress.sent.fetch_add(1, Relaxed);
        });
        if let Err(error) = result {
            self.broke(index, &error);
        }
    }

    /// Something changed on a connection.
    fn serve(&mut self, index: usize) {
        let start_ns = self.shared.start_ns;
        let (tally, progress, running) = (&mut self.tally, self.shared.progress, &mut self.running);
        let clock = || monotonic_ns().saturating_sub(start_ns);
        let answered = |owed: &Owed, at_ns: u64, verdict: Verdict| {
            progress.answered.fetch_add(1, Relaxed);
            if let Some(response) = tally.answered(owed, at_ns, verdict) {
                running.sample(response);
            }
        };
        match self.connections[index].ready(self.shared.content, clock, answered) {
            Ok(made) => {
                self.made += u64::from(made);
                self.flush(index);
            }
            Err(error) => self.broke(index, &error),
        }
    }

    /// A connection is of no use any more.
    fn broke(&mut self, index: usize, why: &anyhow::Error) {
        self.tally.broken += 1;
        self.tally.last_trouble = Some(format!("{why:#}"));
        let retry_ns = self.now() + RETRY_NS;
        let before = self.tally.counts.lost;
        for owed in self.connections[index].close(retry_ns) {
            self.tally.lost(&owed);
        }
        self.running.lost(self.tally.counts.lost - before);
    }

    /// What no event tells of: connections to be made, answers that do not come, seconds that are over.
    fn care(&mut self, now: u64) -> Result<()> {
        self.care_ns = now + CARE_NS;
        let client = self.shared.client;
        let timeout = client.timeout.as_nanos() as u64;
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            if connection.wants_to_connect(now) {
                let options = Options { level: client.level, congestion: client.congestion.as_deref() };
                if let Err(error) = connection.connect(client.to, options, &self.poller, index) {
                    self.broke(index, &error);
                }
            } else if connection.oldest_sent_ns().is_some_and(|sent| sent + timeout <= now) {
                self.broke(index, &anyhow::anyhow!("no answer within {:?}", client.timeout));
            }
        }
        if self.shared.progress.stop.load(Relaxed) && !self.stopped {
            self.stopped = true;
            self.end_ns = self.end_ns.min(now);
            self.last_ns = self.end_ns + STOPPED_LINGER_NS;
        }
        while self.running.is_over(now.saturating_sub(self.counted_ns)) {
            self.tell();
        }
        Ok(())
    }

    fn tell(&mut self) {
        self.running.close(&mut self.shared.series.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Counts what was never answered, and what was never sent.
    fn finish(&mut self) {
        self.tally.reconnected = self.made.saturating_sub(self.connections.len() as u64);
        let before = self.tally.counts.lost;
        for connection in &mut self.connections {
            for owed in connection.close(0) {
                if self.stopped { self.tally.forget(&owed) } else { self.tally.lost(&owed) }
            }
        }
        self.running.lost(self.tally.counts.lost - before);
        while self.due_ns < self.end_ns {
            self.tally.unsent += u64::from(self.due_ns >= self.counted_ns);
            self.due_ns = self.schedule.next().unwrap_or(u64::MAX);
        }
        self.tell();
    }
}
