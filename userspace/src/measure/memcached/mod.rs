//! An open-loop client for memcached: what a user of a cache waits for, whatever the cache, the network and this host's
//! own limiter do.
//!
//! Requests have a schedule that nothing moves. A request that is due takes the next connection in turn that has room;
//! if none has, it waits, and its response time counts from when it was due.

mod connection;
mod engine;
mod protocol;
mod setup;
mod tally;
#[cfg(test)]
mod tests;
mod workload;

use std::{
    net::SocketAddr,
    sync::{Barrier, Mutex, PoisonError, atomic::Ordering::Relaxed},
    thread::ScopedJoinHandle,
    time::Duration,
};

use anyhow::Result;

pub use self::{
    engine::Progress,
    workload::{MAX_KEYS, MAX_VALUE, Popularity, Sizes, Workload},
};
use self::{
    engine::{Engine, Shared},
    setup::Setup,
    tally::{Series, Tally},
    workload::Content,
};
use super::{
    Priority, pin_and_prioritise,
    result::{Figure, Interval, Run, Sample, Stream},
    schedule::{Arrivals, Schedule},
    threads::pin,
    verdict,
};
use crate::{dataplane::sys::monotonic_ns, socket::Level};

/// Where memcached listens unless told otherwise.
pub const PORT: u16 = 11_211;
/// The longest measurement.
pub const MAX_DURATION: Duration = Duration::from_secs(86_400);
/// The most connections.
pub const MAX_CONNECTIONS: usize = 4_096;
/// All threads are ready before the first request is due.
const LEAD_NS: u64 = 20_000_000;
/// How often it is looked whether a second is over.
const GLANCE: Duration = Duration::from_millis(50);
/// Even the first request finds its connection made.
const LEAST_WARM_UP: Duration = Duration::from_millis(100);

/// A measurement of a memcached server.
#[derive(Clone, Debug)]
pub struct Client {
    /// Where the server listens.
    pub to: SocketAddr,
    /// `SO_PRIORITY` of all connections; unset if absent. The server's answers have the server's level.
    pub level: Option<Level>,
    /// TCP's congestion control; the kernel's default if absent.
    pub congestion: Option<String>,
    /// How many connections, of all threads together.
    pub connections: usize,
    /// How many answers a connection may owe: 1 for a request at a time.
    pub depth: usize,
    /// How many threads.
    pub threads: usize,
    /// The CPU of the first thread; the next has the next. Any if absent.
    pub cpu: Option<usize>,
    /// Whether to ask for real-time priority.
    pub real_time: bool,
    /// Requests a second, of all threads together.
    pub rate: f64,
    /// Whether they come as a Poisson process, and not at equal distances.
    pub poisson: bool,
    /// How long requests are sent, the warm-up included; at most [`MAX_DURATION`].
    pub duration: Duration,
    /// What does not count, at the beginning; 100 ms at least.
    pub warm_up: Duration,
    /// How long an answer may take before its connection is given up.
    pub timeout: Duration,
    /// Whether each key gets its value first.
    pub populate: bool,
    /// What is asked.
    pub workload: Workload,
    /// What is random follows from it.
    pub seed: u64,
}

impl Client {
    /// A thousand requests a second for ten seconds, a tenth of them sets, on 16 connections, to 10,000 keys of ETC's
    /// sizes.
    pub const fn new(to: SocketAddr) -> Self {
        Self {
            to,
            level: None,
            congestion: None,
            connections: 16,
            depth: 16,
            threads: 1,
            cpu: None,
            real_time: true,
            rate: 1_000.0,
            poisson: true,
            duration: Duration::from_secs(11),
            warm_up: Duration::from_secs(1),
            timeout: Duration::from_secs(5),
            populate: true,
            workload: Workload {
                keys: 10_000,
                sets: 0.1,
                popularity: Popularity::Zipf(0.99),
                sizes: Sizes::Etc,
                seed: 1,
            },
            seed: 1,
        }
    }

    /// What is wrong with it, if anything, before anything is sent.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn check(&self) -> Result<(), String> {
        let Workload { keys, sets, .. } = self.workload;
        let check = |holds: bool, why: String| if holds { Ok(()) } else { Err(why) };
        check((1..=MAX_KEYS).contains(&keys), format!("{keys} keys: there can be 1 to {MAX_KEYS}"))?;
        check((0.0..=1.0).contains(&sets), format!("a share of sets of {sets}: it is 0 to 1"))?;
        check(
            (1..=MAX_CONNECTIONS).contains(&self.connections),
            format!("{} connections: there can be 1 to {MAX_CONNECTIONS}", self.connections),
        )?;
        check(self.depth > 0, "a connection owes at least one answer".into())?;
        check(
            (1..=self.connections).contains(&self.threads),
            format!("{} threads: each needs a connection of its own", self.threads),
        )?;
        check(
            self.rate.is_finite() && self.rate > 0.0 && self.rate <= 1e7,
            format!("{} requests a second: it is above 0 and at most ten million", self.rate),
        )?;
        check(
            self.warm_up >= LEAST_WARM_UP,
            format!(
                "a warm-up of {:?}: connections are made meanwhile, so it lasts at least {LEAST_WARM_UP:?}",
                self.warm_up
            ),
        )?;
        check(self.warm_up < self.duration, "the warm-up leaves nothing to measure".into())?;
        check(self.duration <= MAX_DURATION, format!("a measurement lasts at most {} s", MAX_DURATION.as_secs()))?;
        check(!self.timeout.is_zero(), "an answer takes longer than 0 s".into())
    }

    /// When thread `index` sends. Together they are a Poisson process, or send at equal distances.
    fn schedule(&self, index: usize) -> Schedule {
        let interval = self.threads as f64 * 1e9 / self.rate;
        let offset = interval * index as f64 / self.threads as f64;
        let arrivals = if self.poisson { Arrivals::Poisson(interval) } else { Arrivals::Fixed(interval) };
        Schedule::new(arrivals, offset as u64, self.seed.wrapping_add(index as u64).rotate_left(17))
    }

    /// Measures, from the network namespace of the calling thread, which tells `on_second` of each second that is over.
    ///
    /// # Errors
    /// If it cannot begin: the server is absent or no memcached, or has no room. What goes wrong later is counted.
    pub fn run(&self, progress: &Progress, on_second: &mut dyn FnMut(&Interval)) -> Result<Outcome> {
        self.check().map_err(anyhow::Error::msg)?;
        let content = Content::new(self.workload.clone());
        let mut setup = Setup::connect(self.to)?;
        let server = setup.version()?;
        if self.populate && !setup.populate(&content, progress)? {
            anyhow::bail!("it was stopped before each key had a value; nothing was measured");
        }
        drop(setup);

        let series = Mutex::new(Series::new(self.threads));
        let shared =
            Shared { client: self, content: &content, progress, series: &series, start_ns: monotonic_ns() + LEAD_NS };
        let together = Barrier::new(self.threads);
        let run = |index: usize| {
            let priority = self.prepare_thread(index);
            let engine = Engine::new(&shared, index);
            together.wait();
            (priority, engine.and_then(Engine::run))
        };
        let results: Vec<(Priority, Result<Tally>)> = std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = (0..self.threads).map(|index| scope.spawn(move || run(index))).collect();
            let mut told = 0;
            while !threads.iter().all(ScopedJoinHandle::is_finished) {
                std::thread::sleep(GLANCE);
                let closed = series.lock().unwrap_or_else(PoisonError::into_inner).closed(told);
                told += closed.len();
                closed.iter().for_each(&mut *on_second);
            }
            threads.into_iter().map(|thread| thread.join().expect("a thread does not panic")).collect()
        });
        let ended_ns = monotonic_ns().saturating_sub(shared.start_ns);

        let warm_up_ns = self.warm_up.as_nanos() as u64;
        let mut tally = Tally::new(warm_up_ns..u64::MAX);
        let mut real_time = true;
        for (priority, result) in results {
            real_time &= priority == Priority::RealTime;
            tally.add(result?);
        }
        let stopped = progress.stop.load(Relaxed);
        Ok(Outcome {
            client: self.clone(),
            server,
            duration_ns: ended_ns.min(self.duration.as_nanos() as u64).saturating_sub(warm_up_ns),
            tally,
            series: series.into_inner().unwrap_or_else(PoisonError::into_inner).finish(),
            real_time,
            stopped,
        })
    }

    fn prepare_thread(&self, index: usize) -> Priority {
        let cpu = self.cpu.map(|cpu| cpu + index);
        match (cpu, self.real_time) {
            (Some(cpu), true) => pin_and_prioritise(cpu),
            (cpu, _) => {
                if let Some(cpu) = cpu {
                    pin(cpu);
                }
                super::threads::precise_timers();
                Priority::Ordinary
            }
        }
    }
}

/// What a measurement found.
#[derive(Clone, Debug)]
pub struct Outcome {
    client: Client,
    /// The server's version.
    pub server: String,
    duration_ns: u64,
    tally: Tally,
    series: Vec<Interval>,
    real_time: bool,
    /// Whether somebody ended it before its time.
    pub stopped: bool,
}

impl Outcome {
    /// Whether there is a single sample.
    pub fn has_samples(&self) -> bool {
        self.tally.response.samples() > 0
    }

    /// As a case of results.
    pub fn run(&self, name: &str) -> Run {
        let Client { rate, connections, threads, warm_up, ref workload, .. } = self.client;
        Run {
            name: name.into(),
            about: format!(
                "memcached {}: {rate} requests/s ({}), {} % sets, {} keys, {connections} connections, {threads} thread{}",
                self.server,
                if self.client.poisson { "Poisson" } else { "equal distances" },
                workload.sets * 100.0,
                workload.keys,
                if threads == 1 { "" } else { "s" },
            ),
            duration_ns: self.duration_ns,
            warm_up_ns: warm_up.as_nanos() as u64,
            streams: vec![self.stream()],
            figures: self.figures(),
        }
    }

    fn stream(&self) -> Stream {
        let mut stream = Stream {
            name: match self.client.level {
                Some(level) => format!("memcached level {level}"),
                None => "memcached".into(),
            },
            sample: Sample::Request,
            level: self.client.level.map(Level::number),
            response: self.tally.response.distribution(),
            service: Some(self.tally.service.distribution()),
            lateness: Some(self.tally.lateness.distribution()),
            counts: Some(self.tally.counts),
            worst: self.tally.worst.clone(),
            series: self.series.clone(),
            ..Stream::default()
        };
        stream.generator = Some(verdict::generator(&stream, None, self.real_time));
        stream
    }

    fn figures(&self) -> Vec<Figure> {
        let Tally { in_time, gets, misses, sets, server_errors, value_bytes, unsent, broken, reconnected, .. } =
            self.tally;
        let figure = |name: &str, value: f64, unit: &str| Figure { name: name.into(), value, unit: unit.into() };
        let mut figures = Vec::new();
        if self.duration_ns > 0 {
            let seconds = self.duration_ns as f64 / 1e9;
            figures.push(figure("requests answered", in_time as f64 / seconds, "1/s"));
            figures.push(figure("values moved", value_bytes as f64 * 8.0 / seconds, "bit/s"));
        }
        figures.extend(
            [
                ("gets", gets),
                ("misses", misses),
                ("sets", sets),
                ("server errors", server_errors),
                ("requests never sent", unsent),
                ("connections lost", broken),
                ("connections made again", reconnected),
            ]
            .map(|(name, count)| figure(name, count as f64, "1")),
        );
        figures
    }

    /// What a reader must know.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.stopped {
            notes.push(format!("it was stopped after {:.1} s", self.duration_ns as f64 / 1e9));
        }
        if self.tally.broken > 0 {
            notes.push(format!(
                "{} connections broke; the last: {}",
                self.tally.broken,
                self.tally.last_trouble.as_deref().unwrap_or("unknown")
            ));
        }
        if self.tally.unsent > 0 {
            notes.push(format!(
                "{} requests were due and never sent, because each connection owed {} answers or was down: the \
                 distribution leaves out the worst",
                self.tally.unsent, self.client.depth
            ));
        }
        if self.tally.counts.corrupted > 0 {
            notes.push(format!("{} values came with other bytes than were stored", self.tally.counts.corrupted));
        }
        if self.tally.server_errors > 0 {
            notes.push(format!("{} requests were answered with SERVER_ERROR", self.tally.server_errors));
        }
        if !self.real_time && self.client.real_time && self.client.cpu.is_some() {
            notes.push(
                "the client's threads had no real-time priority (it needs CAP_SYS_NICE): expect longer tails".into(),
            );
        }
        notes
    }
}
