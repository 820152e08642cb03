//! `qjump measure serve`: answers the probes of whoever opens a session.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt::ReuseAddr,
};

use super::{
    Priority, Transport,
    control::{
        self, Control, ControlError, MOST_TRAINS, PATIENCE, PROTOCOL, Reply, Request, TrainReport, TrainRequest,
    },
    endpoint::{Endpoint, set_mark},
    responder::{Responder, respond},
    route,
    wire::{self, Kind, Message},
};
use crate::socket::{Level, set_level};

/// Sessions at once.
const MOST_SESSIONS: usize = 64;

/// Where and how to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen, TCP and UDP; port 0 for any that is free.
    pub listen: SocketAddr,
    /// Where answering threads are pinned.
    pub cpu: Option<usize>,
    /// For so long after a probe an answering thread watches for the next without sleeping, ns.
    pub spin_ns: u64,
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    greetings: UdpSocket,
    shared: Arc<Shared>,
}

struct Shared {
    options: Options,
    port: u16,
    sessions: AtomicUsize,
    /// Trains that nobody has attached yet.
    awaited: Mutex<HashMap<u32, Awaited>>,
    stop: AtomicBool,
}

struct Awaited {
    request: TrainRequest,
    level: Level,
    /// The address that the client knows this host by.
    local: IpAddr,
    joining: mpsc::Sender<(usize, Responder)>,
    index: usize,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// If the address is not this host's or the port is taken.
    pub fn new(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen)?;
        let address = listener.local_addr()?;
        // Each train will have a socket of its own on the same port.
        let greetings = reusable(address)?;
        greetings.set_read_timeout(Some(LOOK))?;
        listener.set_nonblocking(true)?;
        let shared = Shared {
            options,
            port: address.port(),
            sessions: AtomicUsize::new(0),
            awaited: Mutex::default(),
            stop: AtomicBool::new(false),
        };
        Ok(Self { listener, greetings, shared: Arc::new(shared) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`. `say` gets a line for people at the beginning and the end of each session.
    ///
    /// # Errors
    /// If a listening socket fails.
    pub fn run(self, stop: &AtomicBool, say: impl Fn(&str) + Send + Clone + 'static) -> io::Result<()> {
        let greetings = self.greetings;
        let shared = Arc::clone(&self.shared);
        let greeting = thread::spawn(move || greet(&greetings, &shared));
        while !stop.load(Relaxed) && !greeting.is_finished() {
            match self.listener.accept() {
                Ok((stream, client)) => {
                    let (shared, say) = (Arc::clone(&self.shared), say.clone());
                    thread::spawn(move || {
                        if let Err(error) = talk(stream, &shared, &say) {
                            say(&format!("{client}: {error}"));
                        }
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(LOOK),
                // The client has gone, or there are too many files: the next one may do.
                Err(error) => {
                    say(&format!("cannot accept a connection: {error}"));
                    thread::sleep(LOOK);
                }
            }
        }
        self.shared.stop.store(true, Relaxed);
        greeting.join().expect("the greeting thread does not panic")
    }
}

/// How often a thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// A UDP socket whose port others may share.
fn reusable(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, ReuseAddr, &true)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrStorage::from(address))?;
    Ok(fd.into())
}

/// An IPv4 client of an IPv6 socket, as an IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Waits for the greetings of UDP trains, and opens a socket for each.
fn greet(socket: &UdpSocket, shared: &Shared) -> io::Result<()> {
    let clean = wire::buffer(wire::LONGEST);
    let mut buffer = vec![0; wire::LONGEST];
    while !shared.stop.load(Relaxed) {
        let (length, client) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            // An ICMP error of a client that has gone.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error),
        };
        let Some(message) = Message::read(&mut buffer[..length], &clean) else { continue };
        if message.kind != Kind::Hello {
            continue;
        }
        let Some(awaited) = shared.take(message.token, Transport::Udp, Some(length)) else { continue };
        // Without an answer the client asks again, and then gives up: nothing else can be told it here.
        let opened = reusable(SocketAddr::new(awaited.local, shared.port)).and_then(|socket| {
            socket.connect(canonical(client))?;
            awaited.prepare(&socket)?;
            let mut responder = Responder::new(message.token, Endpoint::udp(socket, length)?, awaited.request.answered);
            responder.welcome(&message).map(|()| responder)
        });
        match opened {
            Ok(responder) => drop(awaited.joining.send((awaited.index, responder))),
            Err(_) => shared.put_back(message.token, awaited),
        }
    }
    Ok(())
}

impl Shared {
    fn awaited(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The train of a token, if it is awaited, with messages of this length.
    fn take(&self, token: u32, transport: Transport, length: Option<usize>) -> Option<Awaited> {
        let mut awaited = self.awaited();
        let request = &awaited.get(&token)?.request;
        let fits = request.transport == transport && length.is_none_or(|length| length == request.payload);
        if fits { awaited.remove(&token) } else { None }
    }

    fn put_back(&self, token: u32, train: Awaited) {
        self.awaited().insert(token, train);
    }
}

impl Awaited {
    fn prepare(&self, socket: &impl AsFd) -> io::Result<()> {
        if self.request.mark {
            set_mark(socket, self.level)?;
        }
        set_level(socket, self.level).map_err(io::Error::other)
    }
}

/// What a client says first decides what its connection is for.
fn talk(stream: TcpStream, shared: &Shared, say: &impl Fn(&str)) -> Result<(), ControlError> {
    let mut control = Control::new(stream)?;
    match control.receive(control::REQUEST, PATIENCE) {
        Ok(Request::Attach { token, .. }) => attach(control, token, shared),
        Ok(Request::Open { boot_id, cpu, trains, .. }) => {
            let number = shared.sessions.fetch_add(1, Relaxed);
            let result = if number < MOST_SESSIONS {
                serve(&mut control, shared, say, &boot_id, cpu, trains)
            } else {
                refuse(&mut control, say, format!("{MOST_SESSIONS} sessions are open already"))
            };
            shared.sessions.fetch_sub(1, Relaxed);
            result
        }
        Ok(Request::Finish { .. }) => Err(ControlError::Stranger),
        Err(error) => {
            // It learns which version this is.
            let _ = control.send(&Reply::Refused { protocol: PROTOCOL, why: error.to_string() });
            Err(error)
        }
    }
}

fn refuse(control: &mut Control, say: &impl Fn(&str), why: String) -> Result<(), ControlError> {
    say(&format!("{}: refused: {why}", control.stream().peer_addr()?));
    control.send(&Reply::Refused { protocol: PROTOCOL, why })
}

fn serve(
    control: &mut Control,
    shared: &Shared,
    say: &impl Fn(&str),
    boot_id: &str,
    cpu: Option<usize>,
    trains: Vec<TrainRequest>,
) -> Result<(), ControlError> {
    match Session::new(control.stream(), shared, boot_id, cpu, trains) {
        Ok(session) => session.run(control, say),
        Err(why) => refuse(control, say, why),
    }
}

/// Gives a connection to the session that awaits it.
fn attach(mut control: Control, token: u32, shared: &Shared) -> Result<(), ControlError> {
    let Some(awaited) = shared.take(token, Transport::Tcp, None) else {
        let why = "no session awaits this train".to_owned();
        return control.send(&Reply::Refused { protocol: PROTOCOL, why });
    };
    awaited.prepare(control.stream())?;
    control.send(&Reply::Attached { protocol: PROTOCOL })?;
    let endpoint = Endpoint::tcp(control.into_stream()?, awaited.request.payload)?;
    let _ = awaited.joining.send((awaited.index, Responder::new(token, endpoint, awaited.request.answered)));
    Ok(())
}

struct Session<'a> {
    shared: &'a Shared,
    client: SocketAddr,
    trains: Vec<TrainRequest>,
    tokens: Vec<u32>,
    joined: mpsc::Receiver<(usize, Responder)>,
    spin_ns: u64,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        let mut awaited = self.shared.awaited();
        for token in &self.tokens {
            awaited.remove(token);
        }
    }
}

impl<'a> Session<'a> {
    /// Awaits the trains, or says why not.
    fn new(
        stream: &TcpStream,
        shared: &'a Shared,
        client_boot_id: &str,
        client_cpu: Option<usize>,
        trains: Vec<TrainRequest>,
    ) -> Result<Self, String> {
        if trains.is_empty() || trains.len() > MOST_TRAINS {
            return Err(format!("a session has 1 to {MOST_TRAINS} trains, not {}", trains.len()));
        }
        let addresses = stream.peer_addr().and_then(|client| Ok((client, stream.local_addr()?.ip().to_canonical())));
        let (client, local) = addresses.map_err(|error| error.to_string())?;
        let client = canonical(client);
        let apart = control::are_apart(client_boot_id, (client_cpu, shared.options.cpu));
        let (joining, joined) = mpsc::channel();
        let spin_ns = if apart { shared.options.spin_ns } else { 0 };
        let mut session = Self { shared, client, tokens: Vec::new(), joined, spin_ns, trains: trains.clone() };
        for (index, request) in trains.into_iter().enumerate() {
            let level = request.check()?;
            allowed(level)?;
            let token = request.token;
            let mut awaited = shared.awaited();
            if awaited.contains_key(&token) {
                return Err("a train of this token is there already; try again".to_owned());
            }
            awaited.insert(token, Awaited { request, level, local, joining: joining.clone(), index });
            drop(awaited);
            session.tokens.push(token);
        }
        Ok(session)
    }

    /// Answers until the client says that it is over, or has gone.
    fn run(mut self, control: &mut Control, say: &impl Fn(&str)) -> Result<(), ControlError> {
        let names: Vec<String> =
            self.trains.iter().map(|train| format!("{} level {}", train.transport.name(), train.level)).collect();
        say(&format!("{}: {}", self.client, names.join(", ")));
        let managed = route::to(self.client.ip()).ok().and_then(|route| route.managed);
        control.send(&Reply::Opened {
            protocol: PROTOCOL,
            boot_id: control::boot_id(),
            host: control::host_name(),
            cpu: self.shared.options.cpu,
            bounds_ns: managed.as_ref().map_or([None; 8], |managed| managed.bounds_ns),
        })?;
        let stop = AtomicBool::new(false);
        let mut responders = Vec::new();
        let (finished, answering) = thread::scope(|scope| {
            let (cpu, spin_ns) = (self.shared.options.cpu, self.spin_ns);
            let (stop, joined, responders) = (&stop, &mut self.joined, &mut responders);
            let answering = scope.spawn(move || respond(responders, Some(joined), cpu, spin_ns, stop));
            let finished = wait_for_end(control, &self.shared.stop);
            stop.store(true, Relaxed);
            (finished, answering.join().expect("the answering thread does not panic"))
        });
        let real_time = answering? == Some(Priority::RealTime);
        let dropped = managed.map(|before| before.dropped).zip(self.limiter_drops());
        let mut reports = vec![TrainReport::default(); self.trains.len()];
        for (index, responder) in responders {
            let (counts, left) = responder.finish();
            let level = usize::from(self.trains[index].level);
            let limiter_dropped = dropped.map(|(before, after)| after[level].saturating_sub(before[level]));
            reports[index] = TrainReport { counts, left, limiter_dropped };
        }
        let received: u64 = reports.iter().map(|report| report.counts.received).sum();
        match finished {
            Ok(()) => {
                say(&format!("{}: over, {received} probes", self.client));
                control.send(&Reply::Finished { protocol: PROTOCOL, trains: reports, real_time })
            }
            Err(error) => {
                say(&format!("{}: gone after {received} probes: {error}", self.client));
                Ok(())
            }
        }
    }

    fn limiter_drops(&self) -> Option<[u64; 8]> {
        route::to(self.client.ip()).ok()?.managed.map(|managed| managed.dropped)
    }
}

/// Until the client says that all trains are over.
fn wait_for_end(control: &mut Control, stop: &AtomicBool) -> Result<(), ControlError> {
    loop {
        match control.receive(control::REQUEST, LOOK) {
            Ok(Request::Finish { .. }) => return Ok(()),
            Ok(_) => return Err(ControlError::Stranger),
            Err(ControlError::Silent) if !stop.load(Relaxed) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether this process may use a level: tried on a socket that sends nothing.
fn allowed(level: Level) -> Result<(), String> {
    // To no address in particular: in some namespaces the loopback device is down.
    let socket = UdpSocket::bind("0.0.0.0:0").or_else(|_| UdpSocket::bind("[::]:0"));
    let socket = socket.map_err(|error| error.to_string())?;
    set_level(&socket, level).map_err(|error| format!("on the server, {error}"))
}
