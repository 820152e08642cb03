//! Trains of probes over connected sockets: one thread sends all trains on their schedules, takes in the answers and
//! fetches the kernel's stamps. Another, on whichever host, answers them ([`super::responder`]).

use std::{
    io,
    net::UdpSocket,
    os::fd::AsFd,
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
};

use thiserror::Error;

use super::{
    Latencies, Priority, Transport,
    clock::{Moment, SPIN_NS, Vigil},
    control::TrainReport,
    endpoint::{Endpoint, Received, Sent, sleep},
    give_up_real_time, pin_and_prioritise,
    recorder::{Bounds, Clocks, MOST_OUTSTANDING, MOST_STAMPED, Recorder, Settings},
    responder::{Responder, respond},
    result::{Interval, Stream},
    schedule::{Arrivals, Schedule},
    verdict,
    wire::{self, Kind, Message},
};
use crate::{
    dataplane::sys::monotonic_ns,
    socket::{Level, set_level},
    units::show_ns,
};

/// Probes of one level on one socket.
#[derive(Clone, Debug)]
pub struct Train {
    /// What carries them.
    pub transport: Transport,
    /// Their level, set on the sockets of both sides.
    pub level: Level,
    /// Bytes of a message: UDP payload, or what TCP carries.
    pub payload: usize,
    /// When they are sent.
    pub arrivals: Arrivals,
    /// What one message may take on its way.
    pub bounds: Bounds,
}

/// A run of one or more trains at once.
#[derive(Clone, Debug)]
pub struct Spec {
    /// What is sent.
    pub trains: Vec<Train>,
    /// What is left out at the beginning, ns.
    pub warm_up_ns: u64,
    /// What is measured after that, ns.
    pub duration_ns: u64,
    /// A probe without an answer after so long is lost, ns.
    pub timeout_ns: u64,
    /// Where the thread that sends is pinned, with real-time priority if that is allowed; with `None` it is an ordinary
    /// thread on any CPU.
    pub cpu: Option<usize>,
    /// For so long after a probe its sender watches for the answer without sleeping, ns. Must be 0 if the answer has to
    /// be made on the same CPU.
    pub spin_ns: u64,
    /// How the clocks of the two sides compare.
    pub clocks: Clocks,
    /// For [`Arrivals::Poisson`].
    pub seed: u64,
}

/// A run that makes no sense.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SpecError {
    /// Too small or too large.
    #[error("a message has {least} to {most} bytes, not {0}", least = wire::PLAIN, most = wire::LONGEST)]
    Payload(usize),
    /// Above what one thread can do by far.
    #[error("{0} probes a second are more than one thread can send (it gives up at a million)")]
    Rate(u64),
    /// The ring would be too large.
    #[error("{rate} probes a second that are waited for {} each are more on their way at once than the {MOST_OUTSTANDING} \
             that are kept; lower the rate or the timeout", show_ns(*timeout_ns as f64))]
    Outstanding {
        /// Probes a second.
        rate: u64,
        /// How long each may take.
        timeout_ns: u64,
    },
    /// Sequence numbers have 32 bits.
    #[error("{0} probes are more than a train can number; measure for a shorter time")]
    Count(u64),
    /// Nothing would be measured.
    #[error("there is nothing to measure: {0}")]
    Nothing(&'static str),
}

/// The highest rate of all trains together, probes a second.
const FASTEST: f64 = 1e6;

impl Spec {
    /// Whether the run can be done.
    ///
    /// # Errors
    /// If not, with the reason.
    pub fn check(&self) -> Result<(), SpecError> {
        if self.trains.is_empty() {
            return Err(SpecError::Nothing("no level"));
        }
        if self.duration_ns == 0 {
            return Err(SpecError::Nothing("the time is 0"));
        }
        if self.rate() > FASTEST {
            return Err(SpecError::Rate(self.rate() as u64));
        }
        for train in &self.trains {
            if !(wire::PLAIN..=wire::LONGEST).contains(&train.payload) {
                return Err(SpecError::Payload(train.payload));
            }
            let Some(rate) = train.arrivals.rate() else { continue };
            let seconds = (self.warm_up_ns + self.duration_ns) as f64 / 1e9;
            if rate * seconds > f64::from(u32::MAX / 2) {
                return Err(SpecError::Count((rate * seconds) as u64));
            }
            if rate * (self.timeout_ns as f64 / 1e9) > MOST_OUTSTANDING as f64 {
                return Err(SpecError::Outstanding { rate: rate as u64, timeout_ns: self.timeout_ns });
            }
        }
        Ok(())
    }

    /// Probes a second of all trains.
    fn rate(&self) -> f64 {
        self.trains.iter().filter_map(|train| train.arrivals.rate()).sum()
    }
}

/// What a train did in about a second, for whoever shows it.
pub struct Tick {
    /// Which.
    pub train: usize,
    /// When it ended, ns since the measuring began.
    pub until_ns: u64,
    /// Sent so far.
    pub sent: u64,
    /// Answered so far.
    pub received: u64,
    /// The second.
    pub interval: Interval,
}

/// Ends a run early, and hears how it goes.
pub struct Watch<'a> {
    /// Ends it.
    pub stop: &'a AtomicBool,
    /// Called about once a second for each train, on the thread that called [`drive`] or [`run`].
    pub tick: &'a mut dyn FnMut(&Tick),
}

/// Trains that have been driven to their end.
pub struct Driven {
    recorders: Vec<Recorder>,
    series: Vec<Vec<Interval>>,
    planned: Vec<Option<u64>>,
    priority: Option<Priority>,
    /// What was measured, ns: shorter than it should have been if it was stopped.
    pub duration_ns: u64,
    /// Whether the other side closed a connection.
    pub closed: bool,
}

impl Driven {
    /// The streams of all trains, and what a reader must know. `peers` are the other side's reports, as far as there are any.
    pub fn finish(self, mut peers: Vec<Option<TrainReport>>) -> (Vec<Stream>, Vec<String>) {
        let (mut streams, mut notes) = (Vec::new(), Vec::new());
        match self.priority {
            Some(Priority::Ordinary) => notes.push(
                "no permission for real-time priority (root has it, or CAP_SYS_NICE): others may have held the sender up"
                    .to_owned(),
            ),
            Some(Priority::GivenUp) => notes.push(
                "the sender was always busy, and Linux stops real-time threads that are: it had ordinary priority, nice -20"
                    .to_owned(),
            ),
            Some(Priority::RealTime) | None => {}
        }
        peers.resize(self.recorders.len(), None);
        let trains = self.recorders.into_iter().zip(self.series).zip(self.planned).zip(peers);
        for (((mut recorder, series), planned), peer) in trains {
            peer.iter().flat_map(|peer| &peer.left).for_each(|&left| recorder.peer_left(left));
            let (mut of_train, of_recorder) = recorder.finish(peer.map(|peer| peer.counts));
            if let Some(round_trips) = of_train.first_mut() {
                round_trips.series = series;
                let real_time = self.priority == Some(Priority::RealTime);
                round_trips.generator = Some(verdict::generator(round_trips, planned, real_time));
            }
            streams.append(&mut of_train);
            notes.extend(of_recorder);
        }
        (streams, notes)
    }
}

/// Histograms of seconds that go back and forth between the sending thread and the one that looks at them.
const SPARE: usize = 4;

/// A second of a train as the sending thread hands it over.
struct RawTick {
    train: usize,
    at_ns: u64,
    until_ns: u64,
    lost: u64,
    sent: u64,
    received: u64,
    latencies: Box<Latencies>,
}

impl RawTick {
    fn read(&self) -> Tick {
        let interval = Interval {
            at_ns: self.at_ns,
            samples: self.latencies.samples(),
            lost: self.lost,
            p50_ns: self.latencies.quantile_ns(0.5),
            p99_ns: self.latencies.quantile_ns(0.99),
            max_ns: self.latencies.max_ns(),
        };
        Tick { train: self.train, until_ns: self.until_ns, sent: self.sent, received: self.received, interval }
    }
}

/// Drives all trains over their endpoints, in the order of `spec.trains`, and with these tokens.
///
/// # Errors
/// If a socket fails. That the other side goes away is no error: [`Driven::closed`].
pub fn drive(spec: &Spec, endpoints: Vec<Endpoint>, tokens: &[u32], watch: &mut Watch<'_>) -> io::Result<Driven> {
    let (to_watch, ticks) = mpsc::sync_channel(SPARE * spec.trains.len());
    let (give_back, spare) = mpsc::channel();
    for _ in 0..SPARE * spec.trains.len() {
        give_back.send(Box::new(Latencies::new(None))).expect("the other end is here");
    }
    let stop = watch.stop;
    std::thread::scope(|scope| {
        let driving = std::thread::Builder::new().name("qjump-probe".to_owned()).spawn_scoped(scope, move || {
            let priority = spec.cpu.map(pin_and_prioritise);
            let mut driver = Driver::new(spec, endpoints, tokens, Moment::now().monotonic_ns + LEAD_NS);
            driver.priority = if driver.never_sleeps() { priority.map(|_| give_up_real_time()) } else { priority };
            let ended = driver.run(stop, &to_watch, &spare)?;
            Ok::<_, io::Error>((driver, ended))
        })?;
        let mut series = vec![Vec::new(); spec.trains.len()];
        // Until the thread drops its end.
        for raw in ticks {
            let tick = raw.read();
            let _ = give_back.send(raw.latencies);
            series[tick.train].push(tick.interval);
            (watch.tick)(&tick);
        }
        let (driver, ended_ns) = driving.join().expect("the sender does not panic")?;
        let begun = driver.start_ns + spec.warm_up_ns;
        Ok(Driven {
            duration_ns: ended_ns.saturating_sub(begun).min(spec.duration_ns),
            closed: driver.closed,
            planned: driver.flights.iter().map(|flight| flight.planned(driver.start_ns, driver.end_ns)).collect(),
            recorders: driver.flights.into_iter().map(|flight| flight.recorder).collect(),
            series,
            priority: driver.priority,
        })
    })
}

/// Between setting up and the first probe.
const LEAD_NS: u64 = 10_000_000;
const SECOND_NS: u64 = 1_000_000_000;

/// A train under way.
struct Flight {
    arrivals: Arrivals,
    token: u32,
    endpoint: Endpoint,
    schedule: Schedule,
    /// When the next is due, or `None` if it is not known yet or there is no more.
    due_ns: Option<u64>,
    /// When the kernel had room again for what it had no room for.
    free_ns: u64,
    /// There is no room.
    full: bool,
    /// Probes that were sent since anything else was done.
    row: u32,
    /// Whether there are stamps to fetch.
    unfetched: bool,
    /// When stamps were last asked for.
    stamped_ns: u64,
    recorder: Recorder,
}

impl Flight {
    /// Whether it can send nothing before the kernel has room.
    const fn waits_for_room(&self) -> bool {
        self.full || self.endpoint.is_blocked()
    }

    /// Whether the kernels are to stamp the next probe. The choice must have nothing to do with how long it will take: one of
    /// so many on a schedule; by the time where each follows the answer to the one before.
    fn is_stamped(&self, rate: f64, now_ns: u64) -> bool {
        if self.arrivals == Arrivals::AfterAnswer {
            now_ns >= self.stamped_ns + SECOND_NS / MOST_STAMPED
        } else {
            self.recorder.next_number().is_multiple_of((rate / MOST_STAMPED as f64).ceil().max(1.0) as u64)
        }
    }

    /// How many should have been sent until `end_ns`, without the warm-up; `None` if the answers decide.
    fn planned(&self, start_ns: u64, end_ns: u64) -> Option<u64> {
        let rest = self.schedule.clone().map(|at| start_ns + at).take_while(|&due| due < end_ns).count() as u64;
        let unsent = self.due_ns.map_or(0, |due| if due < end_ns { rest + 1 } else { 0 });
        (self.arrivals != Arrivals::AfterAnswer).then(|| self.recorder.so_far().0 + unsent)
    }
}

struct Driver<'a> {
    spec: &'a Spec,
    flights: Vec<Flight>,
    start_ns: u64,
    counted_ns: u64,
    end_ns: u64,
    /// Probes a second of all trains.
    rate: f64,
    /// How long before a probe is due the thread stops sleeping, ns; `u64::MAX` if it never sleeps.
    ahead_ns: u64,
    closed: bool,
    vigil: Vigil,
    priority: Option<Priority>,
}

/// What a probe takes of its sender's time, with its answer and its stamps, ns: an upper end.
const WORK_NS: u64 = 15_000;
/// Who would be awake for so many ns of a second stays awake.
const BUSY: f64 = 0.9e9;

impl<'a> Driver<'a> {
    fn new(spec: &'a Spec, endpoints: Vec<Endpoint>, tokens: &[u32], start_ns: u64) -> Self {
        let count = spec.trains.len() as u64;
        let flights =
            spec.trains.iter().zip(endpoints).zip(tokens).zip(0..).map(|(((train, endpoint), &token), index)| {
                let rate = train.arrivals.rate();
                // Trains of one rate do not all send at once.
                let offset = rate.map_or(0, |rate| (1e9 / rate) as u64 * index / count);
                let mut schedule = Schedule::new(train.arrivals, offset, spec.seed.wrapping_add(index));
                let outstanding = rate.map_or(16.0, |rate| rate * spec.timeout_ns as f64 / 1e9 * 1.25);
                let settings = Settings {
                    name: format!("{} level {}", train.transport.name(), train.level),
                    level: train.level.number(),
                    bounds: train.bounds,
                    clocks: spec.clocks,
                    stamped: train.payload >= wire::STAMPED,
                    timeout_ns: spec.timeout_ns,
                    outstanding: outstanding as usize + 64,
                    start_ns: start_ns + spec.warm_up_ns,
                };
                Flight {
                    arrivals: train.arrivals,
                    token,
                    endpoint,
                    due_ns: schedule.next().map(|at| start_ns + at),
                    schedule,
                    free_ns: 0,
                    full: false,
                    row: 0,
                    unfetched: false,
                    stamped_ns: 0,
                    recorder: Recorder::new(settings),
                }
            });
        let rate = spec.rate();
        let counted_ns = start_ns + spec.warm_up_ns;
        Self {
            spec,
            flights: flights.collect(),
            start_ns,
            counted_ns,
            end_ns: counted_ns + spec.duration_ns,
            rate,
            ahead_ns: if rate * (SPIN_NS + WORK_NS) as f64 > BUSY { u64::MAX } else { SPIN_NS },
            closed: false,
            vigil: Vigil::new(start_ns),
            priority: None,
        }
    }

    /// Whether the schedules leave no time to sleep: a timer that is late by more than the time between two probes would
    /// make every other one late.
    const fn never_sleeps(&self) -> bool {
        self.ahead_ns == u64::MAX
    }

    /// Until all is sent and answered, or stopped; when that was.
    fn run(
        &mut self,
        stop: &AtomicBool,
        ticks: &mpsc::SyncSender<RawTick>,
        spare: &mpsc::Receiver<Box<Latencies>>,
    ) -> io::Result<u64> {
        let mut second = (self.counted_ns, self.counted_ns + SECOND_NS);
        let mut awake_until = 0;
        let mut stopped = false;
        loop {
            let now = monotonic_ns();
            if self.vigil.look(now) && self.priority == Some(Priority::RealTime) {
                self.priority = Some(give_up_real_time());
            }
            if !stopped && (stop.load(Relaxed) || self.closed) {
                stopped = true;
                self.end_ns = self.end_ns.min(now);
            }
            let sent = self.send_due(now)?;
            if sent {
                awake_until = now + self.spec.spin_ns;
            }
            // One that sends what it is late with must not let its own buffers overflow.
            let crowded = self.flights.iter().any(|flight| flight.row >= CROWD);
            if sent && !crowded {
                continue;
            }
            if self.receive()? && !crowded {
                continue;
            }
            self.fetch_stamps()?;
            if sent {
                continue;
            }
            if now >= second.1 {
                self.tick(second.0, now, ticks, spare);
                second = (now, second.1.max(now - SECOND_NS) + SECOND_NS);
            }
            self.flights.iter_mut().for_each(|flight| flight.recorder.expire(now));
            if now >= self.end_ns && (self.closed || self.is_over(now)) {
                // What is left of a second, unless there was nothing.
                if self.flights.iter().any(|flight| flight.recorder.has_interval()) {
                    self.tick(second.0, now, ticks, spare);
                }
                // Those of packets that a queue has held.
                self.flights.iter_mut().for_each(|flight| flight.unfetched = true);
                self.fetch_stamps()?;
                return Ok(now.min(self.end_ns));
            }
            self.rest(now, awake_until, second.1)?;
        }
    }

    fn is_over(&self, now: u64) -> bool {
        let over = |flight: &Flight| flight.recorder.waiting() == 0 && !flight.waits_for_room();
        self.flights.iter().all(over) || now >= self.end_ns + self.spec.timeout_ns
    }

    /// Sends the probe that has been due for longest. Whether there was one.
    fn send_due(&mut self, now: u64) -> io::Result<bool> {
        let ready =
            |flight: &&mut Flight| flight.due_ns.is_some_and(|due| due <= now && due < self.end_ns) && !flight.full;
        let Some(flight) = self.flights.iter_mut().filter(ready).min_by_key(|flight| flight.due_ns) else {
            return Ok(false);
        };
        let due = flight.due_ns.expect("it is due");
        if flight.endpoint.is_blocked() && flight.endpoint.flush()? == Sent::Full {
            flight.full = true;
            return Ok(true);
        }
        let warm_up = due < self.counted_ns;
        let stamped = flight.is_stamped(self.rate, now);
        let sequence = flight.recorder.next_number() as u32;
        let message = Message { token: flight.token, sequence, kind: Kind::Probe, warm_up, stamped, times: None };
        flight.endpoint.prepare(&message);
        let at = Moment::now();
        let sent = flight.endpoint.send()?;
        if sent == Sent::Full {
            // As any program does, it waits for room; the schedule goes on.
            flight.full = true;
            return Ok(true);
        }
        // What the kernel made it wait for is not its own fault.
        let late = at.monotonic_ns.saturating_sub(due.max(flight.free_ns));
        flight.recorder.sent(due, late, at, warm_up, stamped);
        match sent {
            Sent::Given | Sent::Full => {}
            Sent::Dropped => flight.recorder.refused(),
            Sent::Closed => {
                flight.recorder.refused();
                self.closed |= flight.endpoint.transport() == Transport::Tcp;
            }
        }
        flight.row += 1;
        if stamped {
            (flight.unfetched, flight.stamped_ns) = (true, now);
        }
        flight.due_ns = flight.schedule.next().map(|at| self.start_ns + at);
        Ok(true)
    }

    /// Takes in what has arrived, one message of each train. Whether there was any.
    fn receive(&mut self) -> io::Result<bool> {
        let mut any = false;
        for flight in &mut self.flights {
            // Those that nothing is expected for are looked at before sleeping.
            if flight.recorder.waiting() == 0 {
                continue;
            }
            any |= take_in(flight, &mut self.closed)?;
        }
        Ok(any)
    }

    fn fetch_stamps(&mut self) -> io::Result<()> {
        for flight in &mut self.flights {
            flight.row = 0;
            if std::mem::take(&mut flight.unfetched) {
                let Flight { endpoint, recorder, .. } = flight;
                endpoint.left(|number, left| recorder.left(number, &left))?;
            }
        }
        Ok(())
    }

    fn tick(
        &mut self,
        at_ns: u64,
        now: u64,
        ticks: &mpsc::SyncSender<RawTick>,
        spare: &mpsc::Receiver<Box<Latencies>>,
    ) {
        for (train, flight) in self.flights.iter_mut().enumerate() {
            // Whoever looks is slow: the next second is longer.
            let Ok(empty) = spare.try_recv() else { return };
            let (latencies, lost) = flight.recorder.take_interval(empty);
            let (sent, received) = flight.recorder.so_far();
            let since = |time: u64| time.saturating_sub(self.counted_ns);
            let (at_ns, until_ns) = (since(at_ns), since(now));
            let _ = ticks.try_send(RawTick { train, at_ns, until_ns, lost, sent, received, latencies });
        }
    }

    /// Waits until there may be something to do.
    fn rest(&mut self, now: u64, awake_until: u64, second_ns: u64) -> io::Result<()> {
        for flight in &mut self.flights {
            if flight.arrivals == Arrivals::AfterAnswer && flight.due_ns.is_none() && flight.recorder.waiting() == 0 {
                // Between two probes, so that no sample has it in it.
                flight.due_ns = Some(monotonic_ns() + self.vigil.due_rest_ns(now));
                return Ok(());
            }
        }
        let due = self.flights.iter().filter(|flight| !flight.full).filter_map(|flight| flight.due_ns).min();
        let due = due.filter(|&due| due < self.end_ns).unwrap_or(self.end_ns.max(now + LINGER_NS));
        let deadline = self.flights.iter().filter_map(|flight| flight.recorder.deadline_ns()).min();
        let waiting = self.flights.iter().any(|flight| flight.recorder.waiting() > 0);
        // Who waits for room sleeps, whatever the schedule.
        let full = self.flights.iter().any(Flight::waits_for_room);
        let ahead_ns = if full { SPIN_NS } else { self.ahead_ns };
        let wake = due.saturating_sub(ahead_ns).min(deadline.unwrap_or(u64::MAX)).min(second_ns);
        if !full && (wake <= now || now < awake_until && waiting) {
            std::hint::spin_loop();
            return Ok(());
        }
        // Not for long, so that a stop is seen.
        let sockets = self.flights.iter().map(|flight| (flight.endpoint.as_fd(), flight.waits_for_room()));
        sleep(sockets, wake.saturating_sub(now).min(LOOK_NS))?;
        let woken = monotonic_ns();
        self.vigil.slept(now, woken);
        for flight in &mut self.flights {
            if flight.full {
                flight.full = false;
                flight.free_ns = woken;
            }
            // What woke it may be a stamp or, although nothing is expected, a message.
            flight.unfetched = true;
            if flight.recorder.waiting() == 0 {
                take_in(flight, &mut self.closed)?;
            }
        }
        Ok(())
    }
}

/// Probes that are sent in a row before anything else is done.
const CROWD: u32 = 16;
/// How often the end of a run is looked for.
const LINGER_NS: u64 = 1_000_000;
/// How long it sleeps at most.
const LOOK_NS: u64 = 20_000_000;

/// Takes in a message. Whether there was one.
fn take_in(flight: &mut Flight, closed: &mut bool) -> io::Result<bool> {
    let received = flight.endpoint.receive()?;
    let at = Moment::now();
    match received {
        Received::Message(message, rx) if message.token == flight.token => {
            if message.kind == Kind::Answer {
                flight.recorder.answered(message.sequence, rx, at, message.times);
            }
        }
        // Of a train before, on the same ports.
        Received::Message(..) => {}
        Received::Corrupted => flight.recorder.corrupted(),
        Received::Nothing => return Ok(false),
        Received::Closed => *closed |= flight.endpoint.transport() == Transport::Tcp,
    }
    Ok(true)
}

/// What a run in one process has measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The round trips of each train, and each way alone.
    pub streams: Vec<Stream>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// What was measured, ns.
    pub duration_ns: u64,
    /// Whether the other side went away before the end.
    pub cut_short: bool,
}

/// Connects two UDP sockets with each other. They belong to the namespaces in which they were made, so this may be
/// called from any thread.
///
/// # Errors
/// If one has no address that the other can reach: they must be bound to addresses, not to all of them.
pub fn connect(one: &UdpSocket, other: &UdpSocket) -> io::Result<()> {
    one.connect(other.local_addr()?)?;
    other.connect(one.local_addr()?)
}

/// Runs trains within this process: between sockets of two network namespaces, for example, on the one clock of this
/// host. `sockets` are pairs of connected UDP sockets ([`connect`]), in the order of the trains: who asks, and who answers.
/// The answering thread is pinned to `answering_cpu`; if that is `spec.cpu`, nobody spins.
///
/// # Errors
/// If the spec makes no sense, a level may not be used, or a socket fails.
pub fn run(
    spec: &Spec,
    sockets: Vec<(UdpSocket, UdpSocket)>,
    answering_cpu: Option<usize>,
    watch: &mut Watch<'_>,
) -> io::Result<Measured> {
    spec.check().map_err(io::Error::other)?;
    let shared = spec.cpu.is_some() && spec.cpu == answering_cpu;
    let spec = Spec { clocks: Clocks::Same, spin_ns: if shared { 0 } else { spec.spin_ns }, ..spec.clone() };
    let (mut endpoints, mut responders, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    for ((train, (asking, answering)), token) in spec.trains.iter().zip(sockets).zip(1..) {
        for socket in [&asking, &answering] {
            set_level(socket, train.level).map_err(io::Error::other)?;
        }
        endpoints.push(Endpoint::udp(asking, train.payload)?);
        let answering = Endpoint::udp(answering, train.payload)?;
        responders.push((responders.len(), Responder::new(token, answering, true)));
        tokens.push(token);
    }
    let stop = AtomicBool::new(false);
    let driven = std::thread::scope(|scope| {
        let (responders, stop, spin_ns) = (&mut responders, &stop, spec.spin_ns);
        let answering = scope.spawn(move || respond(responders, None, answering_cpu, spin_ns, stop));
        let driven = drive(&spec, endpoints, &tokens, watch);
        stop.store(true, Relaxed);
        answering.join().expect("the answering thread does not panic")?;
        driven
    })?;
    let duration_ns = driven.duration_ns;
    let reports = responders.into_iter().map(|(_, responder)| {
        let (counts, left) = responder.finish();
        Some(TrainReport { counts, left, limiter_dropped: None })
    });
    let (streams, notes) = driven.finish(reports.collect());
    Ok(Measured { streams, notes, duration_ns, cut_short: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(number: u8) -> Level {
        Level::new(number).expect("a level")
    }

    fn train(number: u8, arrivals: Arrivals) -> Train {
        let bounds = Bounds { up_ns: Some(1_000_000_000), down_ns: Some(500_000_000) };
        Train { transport: Transport::Udp, level: level(number), payload: 64, arrivals, bounds }
    }

    fn spec(trains: Vec<Train>) -> Spec {
        Spec {
            trains,
            warm_up_ns: 50_000_000,
            duration_ns: 300_000_000,
            timeout_ns: 500_000_000,
            cpu: None,
            spin_ns: 0,
            clocks: Clocks::Unknown,
            seed: 1,
        }
    }

    fn pair(host: &str) -> Option<(UdpSocket, UdpSocket)> {
        let sockets = (UdpSocket::bind((host, 0)).ok()?, UdpSocket::bind((host, 0)).ok()?);
        connect(&sockets.0, &sockets.1).unwrap();
        Some(sockets)
    }

    #[test]
    fn several_levels_at_once_lose_nothing_on_loopback() {
        let trains = [(0, Arrivals::Fixed(1e6)), (5, Arrivals::Poisson(1e6)), (3, Arrivals::AfterAnswer)];
        let spec = spec(trains.map(|(number, arrivals)| train(number, arrivals)).into());
        for host in ["127.0.0.1", "::1"] {
            // A machine may be without IPv6.
            let Some(sockets) = trains.iter().map(|_| pair(host)).collect() else { continue };
            let mut ticks = 0;
            let mut watch = Watch { stop: &AtomicBool::new(false), tick: &mut |_| ticks += 1 };
            let measured = run(&spec, sockets, None, &mut watch).unwrap();
            assert_eq!((measured.duration_ns, ticks), (300_000_000, 3));
            let names: Vec<&str> = measured.streams.iter().map(|stream| stream.name.as_str()).collect();
            let of = |number| ["", " up", " down"].map(|way| format!("udp level {number}{way}"));
            assert_eq!(names, [of(0), of(5), of(3)].concat());
            for stream in &measured.streams {
                assert!(stream.response.samples > 200, "{stream:?}");
                let Some(counts) = stream.counts else { continue };
                assert_eq!(counts.sent, counts.received, "{counts:?}");
                assert_eq!((counts.lost, counts.lost_up, counts.lost_down), (0, Some(0), Some(0)));
                assert_eq!(stream.bound_ns, Some(1_500_000_000));
                assert_eq!(stream.violations, Some(0));
                assert_eq!(stream.worst.len(), 10);
                let samples: u64 = stream.series.iter().map(|interval| interval.samples).sum();
                assert_eq!(samples, counts.received);
                // A closed loop on loopback makes more probes than are stamped.
                let closed = stream.level == Some(3);
                for segment in &stream.segments {
                    let whole = segment.times.samples + segment.missing;
                    assert!(whole == counts.received || closed && whole <= 3_001, "{}: {whole}", segment.name);
                    assert!(whole > 200, "{}: {whole}", segment.name);
                    assert!(segment.missing * 10 < whole, "{}: {} missing of {whole}", segment.name, segment.missing);
                }
            }
            // One at a time, the others by their schedules.
            assert_eq!(measured.streams[0].counts.unwrap().sent, 300);
        }
    }

    #[test]
    fn the_parts_of_a_round_trip_make_the_whole() {
        let spec = spec(vec![train(0, Arrivals::Fixed(1e6))]);
        let mut watch = Watch { stop: &AtomicBool::new(false), tick: &mut |_| {} };
        let measured = run(&spec, vec![pair("127.0.0.1").unwrap()], None, &mut watch).unwrap();
        let stream = &measured.streams[0];
        let mean = |name: &str| {
            let segment = stream.segments.iter().find(|segment| segment.name == name);
            segment.unwrap_or_else(|| panic!("no segment {name}")).times.mean_ns.unwrap() as f64
        };
        let parts = ["app-sched", "sched-snd", "snd-rx", "peer rx-app", "peer app-app", "peer app-sched"];
        let parts = parts.into_iter().chain(["peer sched-snd", "snd-rx back", "rx-app"]).map(mean).sum::<f64>();
        let whole = stream.service.as_ref().unwrap().mean_ns.unwrap() as f64;
        assert!((parts / whole - 1.0).abs() < 0.05, "{parts} of {whole}");
    }

    #[test]
    fn a_run_that_is_stopped_keeps_what_it_has() {
        let spec = Spec { duration_ns: 3_600_000_000_000, ..spec(vec![train(0, Arrivals::Fixed(1e6))]) };
        let stop = AtomicBool::new(false);
        let mut watch = Watch { stop: &stop, tick: &mut |_| stop.store(true, Relaxed) };
        let measured = run(&spec, vec![pair("127.0.0.1").unwrap()], None, &mut watch).unwrap();
        let counts = measured.streams[0].counts.unwrap();
        assert!(measured.duration_ns < 60_000_000_000 && counts.sent >= 900 && counts.lost == 0, "{counts:?}");
        let generator = measured.streams[0].generator.as_ref().expect("a verdict");
        // Late it may be on a busy machine, but it sent all that it should have until it was stopped.
        assert!(generator.why.as_ref().is_none_or(|why| why.contains("lateness")), "{generator:?}");
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_sent() {
        let check = |change: &dyn Fn(&mut Spec)| {
            let mut spec = spec(vec![train(0, Arrivals::Fixed(1e6))]);
            change(&mut spec);
            spec.check().unwrap_err().to_string()
        };
        for (error, part) in [
            (check(&|spec| spec.trains.clear()), "no level"),
            (check(&|spec| spec.duration_ns = 0), "the time is 0"),
            (check(&|spec| spec.trains[0].payload = 15), "16 to 65507 bytes, not 15"),
            (check(&|spec| spec.trains[0].payload = 65_508), "not 65508"),
            (check(&|spec| spec.trains[0].arrivals = Arrivals::Fixed(500.0)), "than one thread can send"),
            (check(&|spec| spec.timeout_ns = 600_000_000_000), "lower the rate or the timeout"),
            (check(&|spec| spec.duration_ns = u64::MAX / 4), "for a shorter time"),
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
