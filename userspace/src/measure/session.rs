//! A client's session with a server: opens the ways of all trains, drives them, and asks what the server counted.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use rand::Rng as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};
use thiserror::Error;

use super::{
    Transport,
    clock::real_ns,
    control::{self, Control, ControlError, PATIENCE, PROTOCOL, Reply, Request, TrainReport, TrainRequest},
    endpoint::{Endpoint, set_mark},
    recorder::{Bounds, Clocks},
    route::{self, Managed, Route},
    train::{Measured, Spec, SpecError, Tick, Watch, drive},
    wire::{self, Kind, Message},
};
use crate::{
    socket::{Level, SocketError, set_level},
    units::show_ns,
};

/// Between two greetings that are not answered.
const GREETING: Duration = Duration::from_millis(200);

/// What a session is for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub target: SocketAddr,
    /// What is measured. Its clocks and the bounds of its trains are found out.
    pub spec: Spec,
    /// What one message may take, ns, each way and at every level, whatever the plans in force say.
    pub bound_ns: Option<u64>,
    /// By how much the clocks of two hosts may differ, ns, if somebody knows.
    pub clock_offset_ns: Option<u64>,
    /// Whether the sockets write the levels' codepoints themselves.
    pub mark: bool,
    /// Levels of UDP sockets that bulk may be sent by, to a server that never reads it.
    pub sinks: Vec<Level>,
}

/// Bytes of a message of bulk: a frame of 1,442.
pub const BULK_PAYLOAD: usize = 1400;

/// Why there is no session.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The plan makes no sense.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Nobody listens there.
    #[error("cannot connect to {target}: {source}; is `qjump measure serve` running there?")]
    Connect {
        /// The server.
        target: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The conversation failed.
    #[error("{target}: {source}")]
    Control {
        /// The server.
        target: SocketAddr,
        /// Why.
        source: ControlError,
    },
    /// The server does not want.
    #[error("{target} refuses: {why}")]
    Refused {
        /// The server.
        target: SocketAddr,
        /// Its reason.
        why: String,
    },
    /// UDP does not get through.
    #[error("{target} answers over TCP, but no UDP packet at level {level} has come back from it in {} s; does a firewall or \
             the limiter drop it?", PATIENCE.as_secs())]
    NoUdp {
        /// The server.
        target: SocketAddr,
        /// The train's level.
        level: Level,
    },
    /// The level may not be used.
    #[error(transparent)]
    Level(#[from] SocketError),
    /// A socket.
    #[error("{action}: {source}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> SessionError {
    move |source| SessionError::Io { action, source }
}

/// An open session.
pub struct Session {
    target: SocketAddr,
    control: Control,
    spec: Spec,
    trains: Vec<TrainRequest>,
    endpoints: Vec<Endpoint>,
    sinks: Vec<UdpSocket>,
    route: Result<Route, String>,
    /// The server's name for itself.
    pub host: String,
    /// Whether it is on this machine.
    pub same_machine: bool,
}

impl Session {
    /// Opens a session, and the way of each train.
    ///
    /// # Errors
    /// If the plan makes no sense, nobody is there, or a way does not open.
    pub fn open(plan: &Plan) -> Result<Self, SessionError> {
        let (target, mut spec) = (plan.target, plan.spec.clone());
        spec.check()?;
        let stream =
            TcpStream::connect_timeout(&target, PATIENCE).map_err(|source| SessionError::Connect { target, source })?;
        let mut control = Control::new(stream).map_err(failed("preparing the connection"))?;
        let mut random = Xoshiro256PlusPlus::seed_from_u64(real_ns() ^ u64::from(std::process::id()) << 32);
        let mut request = |transport, level: Level, payload, answered| TrainRequest {
            token: random.next_u32(),
            transport,
            level: level.number(),
            mark: plan.mark,
            payload,
            answered,
        };
        let mut trains: Vec<TrainRequest> =
            spec.trains.iter().map(|train| request(train.transport, train.level, train.payload, true)).collect();
        trains.extend(plan.sinks.iter().map(|&level| request(Transport::Udp, level, BULK_PAYLOAD, false)));
        let opened = converse(&mut control, target, &open_request(&spec, trains.clone()))?;
        let Reply::Opened { boot_id, host, cpu, bounds_ns, .. } = opened else {
            return Err(SessionError::Control { target, source: ControlError::Stranger });
        };
        let same_machine = !boot_id.is_empty() && boot_id == control::boot_id();
        if !control::are_apart(&boot_id, (spec.cpu, cpu)) {
            spec.spin_ns = 0;
        }
        let route = route::to(target.ip());
        spec.clocks = match plan.clock_offset_ns {
            _ if same_machine => Clocks::Same,
            Some(bound) => Clocks::Within(bound),
            None => Clocks::Unknown,
        };
        let managed = route.as_ref().ok().and_then(|route| route.managed.as_ref());
        for train in &mut spec.trains {
            let up = managed.and_then(|managed: &Managed| managed.bounds_ns[train.level.index()]);
            let down = bounds_ns[train.level.index()];
            train.bounds = Bounds { up_ns: plan.bound_ns.or(up), down_ns: plan.bound_ns.or(down) };
        }
        let (endpoints, sinks) = (Vec::new(), Vec::new());
        let mut session = Self { target, control, endpoints, sinks, trains, route, host, same_machine, spec };
        for request in session.trains.clone() {
            if request.answered {
                session.endpoints.push(session.open_way(&request)?);
            } else {
                session.sinks.push(greet(target, &request, Level::masked(request.level))?);
            }
        }
        Ok(session)
    }

    /// The sockets for bulk, in the order of [`Plan::sinks`]. The server drops what is sent by them.
    pub fn take_sinks(&mut self) -> Vec<UdpSocket> {
        std::mem::take(&mut self.sinks)
    }

    /// The way to the server, or why it is not known.
    pub const fn route(&self) -> Result<&Route, &String> {
        self.route.as_ref()
    }

    /// What will be measured, with the clocks and bounds that hold.
    pub const fn spec(&self) -> &Spec {
        &self.spec
    }

    fn open_way(&self, request: &TrainRequest) -> Result<Endpoint, SessionError> {
        let level = Level::masked(request.level);
        match request.transport {
            Transport::Udp => {
                let socket = greet(self.target, request, level)?;
                Endpoint::udp(socket, request.payload).map_err(failed("preparing a UDP socket"))
            }
            Transport::Tcp => {
                let stream = attach(self.target, request, level)?;
                Endpoint::tcp(stream, request.payload).map_err(failed("preparing a TCP socket"))
            }
        }
    }

    /// Measures. What was measured before something went wrong is kept, with a note of that.
    ///
    /// # Errors
    /// If a socket of this host fails.
    pub fn run(mut self, stop: &AtomicBool, tick: &mut dyn FnMut(&Tick)) -> Result<Measured, SessionError> {
        let dropped_before = self.limiter_drops();
        let tokens: Vec<u32> = self.trains.iter().map(|train| train.token).collect();
        let endpoints = std::mem::take(&mut self.endpoints);
        let [over, ended, gone] = [const { AtomicBool::new(false) }; 3];
        let driven = std::thread::scope(|scope| {
            let watching = scope.spawn({
                let (control, over, ended, gone) = (&self.control, &over, &ended, &gone);
                move || watch(control, stop, over, ended, gone)
            });
            let driven = drive(&self.spec, endpoints, &tokens, &mut Watch { stop: &ended, tick });
            over.store(true, Relaxed);
            watching.join().expect("the watching thread does not panic");
            driven
        })
        .map_err(failed("measuring"))?;

        let mut notes = self.notes();
        let duration_ns = driven.duration_ns;
        let mut reports = Vec::new();
        let cut_short = gone.load(Relaxed) || driven.closed;
        if cut_short {
            notes.push(format!(
                "{} went away after {} of measuring; what there was until then is kept",
                self.target,
                show_ns(duration_ns as f64)
            ));
        } else {
            match self.ask_for_reports() {
                Ok(of_trains) => reports = of_trains,
                Err(error) => notes.push(format!("{} does not tell what it counted: {error}", self.target)),
            }
        }
        for (request, report) in self.trains.iter().zip(&reports) {
            if let Some(dropped) = report.limiter_dropped.filter(|&dropped| dropped > 0) {
                notes.push(format!("the other side's limiter dropped {dropped} packets at level {}", request.level));
            }
        }
        let (mut streams, of_trains) = driven.finish(reports.into_iter().map(Some).collect());
        notes.extend(of_trains);
        if let Some((before, after)) = dropped_before.zip(self.limiter_drops()) {
            for stream in &mut streams {
                if let (Some(counts), Some(level)) = (&mut stream.counts, stream.level) {
                    let level = usize::from(level);
                    counts.limiter_dropped = Some(after[level].saturating_sub(before[level]));
                }
            }
        }
        Ok(Measured { streams, notes, duration_ns, cut_short })
    }

    fn limiter_drops(&self) -> Option<[u64; 8]> {
        self.route.as_ref().ok()?.managed.as_ref()?;
        Some(route::to(self.target.ip()).ok()?.managed?.dropped)
    }

    fn ask_for_reports(&mut self) -> Result<Vec<TrainReport>, SessionError> {
        match converse(&mut self.control, self.target, &Request::Finish { protocol: PROTOCOL })? {
            Reply::Finished { mut trains, .. } if trains.len() == self.trains.len() => {
                trains.truncate(self.spec.trains.len());
                Ok(trains)
            }
            _ => Err(SessionError::Control { target: self.target, source: ControlError::Stranger }),
        }
    }

    /// What a reader must know of the set-up.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        match self.spec.clocks {
            Clocks::Same => {}
            Clocks::Within(bound) => notes.push(format!(
                "times from one host to the other are as good as their clocks, which differ by at most {}, as was said",
                show_ns(bound as f64)
            )),
            Clocks::Unknown => notes.push(
                "the two hosts' clocks are not known to agree: no one-way times; --clock-offset-bound says how well they do"
                    .to_owned(),
            ),
        }
        if let Err(why) = &self.route {
            notes.push(format!("no bound and no limiter's counters: {why}"));
        }
        for train in &self.spec.trains {
            let side = match (train.bounds.up_ns, train.bounds.down_ns) {
                (Some(_), None) => "the way back",
                (None, Some(_)) => "the way there",
                _ => continue,
            };
            notes.push(format!(
                "level {}: {side} has no bound by the plan in force there, so a round trip has none",
                train.level
            ));
        }
        notes
    }
}

/// Sets `ended` when the user wants it, and, with `gone`, when the server has closed the conversation: that is seen at
/// once, and not by its silence.
fn watch(control: &Control, stop: &AtomicBool, over: &AtomicBool, ended: &AtomicBool, gone: &AtomicBool) {
    while !over.load(Relaxed) && !ended.load(Relaxed) {
        let closed = control.is_closed();
        if closed {
            gone.store(true, Relaxed);
        }
        if closed || stop.load(Relaxed) {
            ended.store(true, Relaxed);
        }
        std::thread::sleep(LOOK);
    }
}

/// How often the server is looked after.
const LOOK: Duration = Duration::from_millis(20);

fn open_request(spec: &Spec, trains: Vec<TrainRequest>) -> Request {
    Request::Open { protocol: PROTOCOL, boot_id: control::boot_id(), cpu: spec.cpu, trains }
}

/// A request and its reply.
fn converse(control: &mut Control, target: SocketAddr, request: &Request) -> Result<Reply, SessionError> {
    let reply = control.send(request).and_then(|()| control.receive(control::REPLY, PATIENCE));
    match reply.map_err(|source| SessionError::Control { target, source })? {
        Reply::Refused { why, .. } => Err(SessionError::Refused { target, why }),
        reply => Ok(reply),
    }
}

/// Opens the way of a UDP train: neighbours are found, and the server learns our address.
fn greet(target: SocketAddr, request: &TrainRequest, level: Level) -> Result<UdpSocket, SessionError> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).map_err(failed("opening a UDP socket"))?;
    prepare(&socket, request, level)?;
    socket.connect(target).map_err(failed("connecting a UDP socket"))?;
    socket.set_read_timeout(Some(GREETING)).map_err(failed("preparing a UDP socket"))?;
    let (clean, mut hello) = (wire::buffer(request.payload), wire::buffer(request.payload));
    // Its number is none of a probe's.
    let message = Message {
        token: request.token,
        sequence: u32::MAX,
        kind: Kind::Hello,
        warm_up: true,
        stamped: false,
        times: None,
    };
    message.write(&mut hello);
    let mut answer = wire::buffer(request.payload);
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        // Lost or refused, it is sent again; one that is too large for the path never arrives.
        match socket.send(&hello) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                return Err(failed("sending a message of this size")(error));
            }
            _ => {}
        }
        while let Ok(length) = socket.recv(&mut answer) {
            let welcome = Message::read(&mut answer[..length], &clean);
            if welcome.is_some_and(|welcome| welcome.kind == Kind::Welcome && welcome.token == request.token) {
                return Ok(socket);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(SessionError::NoUdp { target, level })
}

/// Opens the way of a TCP train.
fn attach(target: SocketAddr, request: &TrainRequest, level: Level) -> Result<TcpStream, SessionError> {
    let stream =
        TcpStream::connect_timeout(&target, PATIENCE).map_err(|source| SessionError::Connect { target, source })?;
    prepare(&stream, request, level)?;
    let mut control = Control::new(stream).map_err(failed("preparing a connection"))?;
    match converse(&mut control, target, &Request::Attach { protocol: PROTOCOL, token: request.token })? {
        Reply::Attached { .. } => control.into_stream().map_err(|source| SessionError::Control { target, source }),
        _ => Err(SessionError::Control { target, source: ControlError::Stranger }),
    }
}

fn prepare(socket: &impl AsFd, request: &TrainRequest, level: Level) -> Result<(), SessionError> {
    if request.mark {
        set_mark(socket, level).map_err(failed("marking packets"))?;
    }
    Ok(set_level(socket, level)?)
}
