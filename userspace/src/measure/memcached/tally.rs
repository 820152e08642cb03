//! What became of requests: pure, with time as an argument.

use std::{collections::VecDeque, ops::Range};

use crate::measure::{
    Latencies,
    result::{Counts, Interval, Worst},
};

/// The largest samples that are kept.
const WORST: usize = 10;
const SECOND_NS: u64 = 1_000_000_000;

/// A request that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub struct Owed {
    /// Its number, from 0.
    pub number: u64,
    /// When it was to be sent, ns since the start.
    pub due_ns: u64,
    /// When the kernel took the last of it, ns since the start; absent as long as it has not.
    pub sent_ns: Option<u64>,
    /// How late the client itself was with it, ns: after it was due, and there was room on a connection.
    pub late_ns: u64,
    /// The number of its key.
    pub key: u64,
    /// Whether it stores.
    pub set: bool,
    /// Whether it was due after the warm-up.
    pub counts: bool,
}

/// What an answer was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A get's value, as it should be: bytes.
    Hit(u64),
    /// A get's value with other bytes.
    Corrupted,
    /// A get without a value.
    Miss,
    /// A set that was done: bytes.
    Stored(u64),
    /// The server could not.
    ServerError,
}

/// What became of the requests of a thread, or of all.
#[derive(Clone, Debug)]
pub struct Tally {
    /// From when they were due.
    pub response: Latencies,
    /// From when they were sent.
    pub service: Latencies,
    /// How late the client itself was.
    pub lateness: Latencies,
    /// Messages. Every one that was sent is received, corrupted, an error of the server, or lost.
    pub counts: Counts,
    /// Gets that were answered, with a value or without.
    pub gets: u64,
    /// Those of them without.
    pub misses: u64,
    /// Sets that were done.
    pub sets: u64,
    /// Answers that said SERVER_ERROR.
    pub server_errors: u64,
    /// Answers that came in the measured time, whenever they were due.
    pub in_time: u64,
    /// Bytes of their values, both ways.
    pub value_bytes: u64,
    /// Requests that were due and were never sent, because no connection had room.
    pub unsent: u64,
    /// Connections that broke, in the warm-up too.
    pub broken: u64,
    /// Connections that were made again.
    pub reconnected: u64,
    /// Why the last one broke.
    pub last_trouble: Option<String>,
    /// The largest samples.
    pub worst: Vec<Worst>,
    /// The measured time, ns since the start.
    measured: Range<u64>,
}

impl Tally {
    /// Nothing yet. What is measured, ns since the start, begins after the warm-up.
    pub fn new(measured: Range<u64>) -> Self {
        Self {
            measured,
            response: Latencies::new(None),
            service: Latencies::new(None),
            lateness: Latencies::new(None),
            counts: Counts::default(),
            gets: 0,
            misses: 0,
            sets: 0,
            server_errors: 0,
            in_time: 0,
            value_bytes: 0,
            unsent: 0,
            broken: 0,
            reconnected: 0,
            last_trouble: None,
            worst: Vec::new(),
        }
    }

    /// A request was sent.
    pub fn sent(&mut self, owed: &Owed) {
        if owed.counts {
            self.counts.sent += 1;
            self.lateness.record(owed.late_ns.max(1));
        }
    }

    /// Its answer came: the response time, ns, if it is a sample.
    pub fn answered(&mut self, owed: &Owed, at_ns: u64, verdict: Verdict) -> Option<u64> {
        let bytes = match verdict {
            Verdict::Hit(bytes) | Verdict::Stored(bytes) => bytes,
            Verdict::Miss | Verdict::Corrupted | Verdict::ServerError => 0,
        };
        if self.measured.contains(&at_ns) {
            self.in_time += 1;
            self.value_bytes += bytes;
        }
        if !owed.counts {
            return None;
        }
        let count = match verdict {
            Verdict::Hit(_) => &mut self.gets,
            Verdict::Miss => {
                self.gets += 1;
                &mut self.misses
            }
            Verdict::Stored(_) => &mut self.sets,
            Verdict::Corrupted => &mut self.counts.corrupted,
            Verdict::ServerError => &mut self.server_errors,
        };
        *count += 1;
        if matches!(verdict, Verdict::Corrupted | Verdict::ServerError) {
            return None;
        }
        self.counts.received += 1;
        let response = at_ns.saturating_sub(owed.due_ns).max(1);
        self.response.record(response);
        self.service.record(at_ns.saturating_sub(owed.sent_ns.unwrap_or(owed.due_ns)).max(1));
        let at_ns = owed.due_ns.saturating_sub(self.measured.start);
        self.worst(Worst { sequence: owed.number, at_ns, ns: response, lateness_ns: owed.late_ns });
        Some(response)
    }

    /// Its answer will not come.
    pub fn lost(&mut self, owed: &Owed) {
        // What was not even sent is no message that was lost.
        match (owed.counts, owed.sent_ns) {
            (true, Some(_)) => self.counts.lost += 1,
            (true, None) => self.unsent += 1,
            (false, _) => {}
        }
    }

    /// Nobody waits for its answer any longer, because the measurement was stopped.
    pub fn forget(&mut self, owed: &Owed) {
        if owed.counts && owed.sent_ns.is_some() {
            self.counts.sent -= 1;
        }
    }

    fn worst(&mut self, sample: Worst) {
        if self.worst.len() < WORST || self.worst.last().is_some_and(|least| sample.ns > least.ns) {
            let place = self.worst.partition_point(|worse| worse.ns >= sample.ns);
            self.worst.insert(place, sample);
            self.worst.truncate(WORST);
        }
    }

    /// Adds another thread's.
    pub fn add(&mut self, other: Self) {
        self.response.add(&other.response);
        self.service.add(&other.service);
        self.lateness.add(&other.lateness);
        let (own, more) = (&mut self.counts, other.counts);
        own.sent += more.sent;
        own.received += more.received;
        own.lost += more.lost;
        own.corrupted += more.corrupted;
        self.gets += other.gets;
        self.misses += other.misses;
        self.sets += other.sets;
        self.server_errors += other.server_errors;
        self.in_time += other.in_time;
        self.value_bytes += other.value_bytes;
        self.unsent += other.unsent;
        self.broken += other.broken;
        self.reconnected += other.reconnected;
        self.last_trouble = other.last_trouble.or(self.last_trouble.take());
        other.worst.into_iter().for_each(|sample| self.worst(sample));
    }
}

/// What happened in each second, of several threads together. A second is closed when all have told of it.
#[derive(Debug)]
pub struct Series {
    threads: usize,
    open: VecDeque<Second>,
    closed: Vec<Interval>,
}

#[derive(Debug)]
struct Second {
    told: usize,
    samples: Latencies,
    lost: u64,
}

impl Series {
    /// Of so many threads.
    pub const fn new(threads: usize) -> Self {
        Self { threads, open: VecDeque::new(), closed: Vec::new() }
    }

    /// One thread's part of a second, from 0. Each thread tells of every second, in order.
    pub fn tell(&mut self, second: u64, samples: &Latencies, lost: u64) {
        let index = second as usize - self.closed.len();
        while self.open.len() <= index {
            self.open.push_back(Second { told: 0, samples: Latencies::new(None), lost: 0 });
        }
        let entry = &mut self.open[index];
        entry.told += 1;
        entry.samples.add(samples);
        entry.lost += lost;
        while self.open.front().is_some_and(|second| second.told == self.threads) {
            self.close();
        }
    }

    fn close(&mut self) {
        let Some(second) = self.open.pop_front() else { return };
        self.closed.push(Interval {
            at_ns: self.closed.len() as u64 * SECOND_NS,
            samples: second.samples.samples(),
            lost: second.lost,
            p50_ns: second.samples.quantile_ns(0.5),
            p99_ns: second.samples.quantile_ns(0.99),
            max_ns: second.samples.max_ns(),
        });
    }

    /// The seconds that are over, from this one on.
    pub fn closed(&self, from: usize) -> Vec<Interval> {
        self.closed[from..].to_vec()
    }

    /// All seconds.
    pub fn finish(mut self) -> Vec<Interval> {
        while !self.open.is_empty() {
            self.close();
        }
        self.closed
    }
}

/// One thread's part of the second that is running.
#[derive(Debug)]
pub struct Running {
    second: u64,
    samples: Latencies,
    lost: u64,
}

impl Running {
    /// The first.
    pub fn new() -> Self {
        Self { second: 0, samples: Latencies::new(None), lost: 0 }
    }

    /// A sample.
    pub fn sample(&mut self, ns: u64) {
        self.samples.record(ns);
    }

    /// So many more were lost.
    pub const fn lost(&mut self, count: u64) {
        self.lost += count;
    }

    /// Whether the second is over at this time, ns since the end of the warm-up.
    pub const fn is_over(&self, now_ns: u64) -> bool {
        now_ns / SECOND_NS > self.second
    }

    /// Tells of it, and begins the next.
    pub fn close(&mut self, series: &mut Series) {
        series.tell(self.second, &self.samples, self.lost);
        self.second += 1;
        self.samples.clear();
        self.lost = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed(number: u64, due_ns: u64, sent_ns: u64) -> Owed {
        Owed { number, due_ns, sent_ns: Some(sent_ns), late_ns: 3, key: 0, set: false, counts: true }
    }

    #[test]
    fn response_counts_from_the_schedule_and_service_from_the_send() {
        let mut tally = Tally::new(0..SECOND_NS);
        let request = owed(0, 1_000, 41_000);
        tally.sent(&request);
        assert_eq!(tally.answered(&request, 51_000, Verdict::Hit(10)), Some(50_000));
        assert_eq!(tally.response.max_ns(), Some(50_000));
        assert_eq!(tally.service.max_ns(), Some(10_000));
        assert_eq!((tally.counts.sent, tally.counts.received, tally.gets, tally.value_bytes), (1, 1, 1, 10));
        // What comes after the end is a sample all the same, but no throughput of the measured time.
        tally.sent(&request);
        assert!(tally.answered(&request, SECOND_NS + 5, Verdict::Hit(10)).is_some());
        assert_eq!((tally.response.samples(), tally.in_time, tally.value_bytes), (2, 1, 10));
    }

    #[test]
    fn what_is_wrong_or_missing_is_no_sample() {
        let mut tally = Tally::new(0..SECOND_NS);
        for (number, verdict) in [Verdict::Corrupted, Verdict::ServerError, Verdict::Miss].into_iter().enumerate() {
            tally.sent(&owed(number as u64, 0, 0));
            tally.answered(&owed(number as u64, 0, 0), 10, verdict);
        }
        tally.sent(&owed(3, 0, 0));
        tally.lost(&owed(3, 0, 0));
        tally.lost(&Owed { sent_ns: None, ..owed(4, 0, 0) });
        let warm_up = Owed { counts: false, ..owed(5, 0, 0) };
        tally.sent(&warm_up);
        assert_eq!(tally.answered(&warm_up, 10, Verdict::Hit(1)), None);
        tally.lost(&warm_up);
        let counts = tally.counts;
        assert_eq!((counts.sent, counts.received, counts.lost, counts.corrupted), (4, 1, 1, 1));
        assert_eq!((tally.misses, tally.server_errors, tally.unsent), (1, 1, 1));
        assert_eq!(tally.response.samples(), 1);
        assert_eq!(counts.sent, counts.received + counts.corrupted + counts.lost + tally.server_errors);
    }

    #[test]
    fn threads_add_up() {
        let (mut one, mut other) = (Tally::new(0..SECOND_NS), Tally::new(0..SECOND_NS));
        for number in 0..30 {
            let tally = if number % 2 == 0 { &mut one } else { &mut other };
            tally.sent(&owed(number, 0, 0));
            tally.answered(&owed(number, 0, 0), number * 100 + 100, Verdict::Stored(1));
        }
        one.add(other);
        assert_eq!((one.counts.sent, one.response.samples(), one.sets), (30, 30, 30));
        let worst: Vec<u64> = one.worst.iter().map(|worst| worst.sequence).collect();
        assert_eq!(worst, (20..30).rev().collect::<Vec<_>>());
    }

    #[test]
    fn a_second_is_closed_when_all_have_told_of_it() {
        let mut series = Series::new(2);
        let (mut one, mut other) = (Running::new(), Running::new());
        one.sample(5_000);
        assert!(!one.is_over(999_999_999) && one.is_over(1_000_000_000));
        one.close(&mut series);
        one.sample(9_000);
        one.close(&mut series);
        assert!(series.closed.is_empty());
        other.sample(7_000);
        other.lost(2);
        other.close(&mut series);
        assert_eq!(series.closed.len(), 1);
        let seconds = series.finish();
        let seen: Vec<_> = seconds.iter().map(|second| (second.at_ns, second.samples, second.lost)).collect();
        assert_eq!(seen, [(0, 2, 2), (SECOND_NS, 1, 0)]);
        assert_eq!(seconds[0].max_ns, Some(7_000));
    }
}
