//! The sending side of a load.

use std::{
    hash::{BuildHasher, RandomState},
    io::{self, BufReader, Write},
    net::{TcpStream, UdpSocket},
    os::fd::AsRawFd,
    sync::{Barrier, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{
    setsockopt,
    sockopt::{Linger, UdpGsoSegment},
};

use super::{
    Load, Outcome, Pattern, Progress, Sent,
    count::Received,
    datagrams,
    gate::{Allowed, Gate},
    wire::{CONTROL, Header, Hello, Order, Reply, VERSION, hear, say},
};
use crate::{
    dataplane::sys::monotonic_ns,
    measure::{
        Transport,
        tcp::{self, Options},
        threads::{pin, precise_timers, sleep_until},
    },
    socket::set_level,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a sink may take to answer, over a link that is full of our own packets.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a blocked or waiting flow looks whether it is to stop.
const GLANCE: Duration = Duration::from_millis(100);
/// What a TCP flow gives to the kernel at once: large enough that system calls cost nothing.
const CHUNK: usize = 262_144;
/// Flows that are not greedy leave no more than this in the kernel unsent, so that they stop when they should.
static NOT_SENT_BYTES: u32 = 131_072;

enum Flow {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// The control connection to a sink.
struct Control {
    from: BufReader<TcpStream>,
}

impl Control {
    fn open(load: &Load, number: u64) -> Result<Self> {
        let missing = |error: anyhow::Error| {
            anyhow!(
                "{error:#}; is `qjump measure sink` running there, at port {}? For another program, or none, give --blind",
                load.to.port()
            )
        };
        let mut stream = Options::default().connect(load.to, CONNECT_TIMEOUT).map_err(missing)?;
        stream.set_read_timeout(Some(CONNECT_TIMEOUT))?;
        stream.write_all(&Header { load: number, flow: CONTROL, number: 0 }.to_bytes())?;
        let mut control = Self { from: BufReader::new(stream) };
        let hello = Hello { version: VERSION, transport: load.transport, flows: load.flows, window: load.window() };
        control.say(&hello)?;
        match control.hear().map_err(missing)? {
            Reply::Ready => Ok(control),
            Reply::Refused(why) => bail!("the sink at {} refuses: {why}", load.to),
            other => bail!("the sink at {} said {other:?} at the beginning", load.to),
        }
    }

    fn say(&mut self, message: &impl serde::Serialize) -> Result<()> {
        say(self.from.get_mut(), message)
    }

    fn hear(&mut self) -> Result<Reply> {
        hear(&mut self.from)?.context("the sink hung up")
    }

    fn start(&mut self) -> Result<()> {
        self.say(&Order::Start)?;
        match self.hear()? {
            Reply::Started => Ok(()),
            other => bail!("the sink said {other:?} in place of starting"),
        }
    }

    fn stop(&mut self, datagrams: u64) -> Result<Received> {
        self.from.get_ref().set_read_timeout(Some(ANSWER_TIMEOUT))?;
        self.say(&Order::Stop { datagrams })?;
        match self.hear()? {
            Reply::Received(received) => Ok(received),
            other => bail!("the sink said {other:?} in place of its result"),
        }
    }
}

impl Load {
    /// Sends the load, from the network namespace of the calling thread.
    ///
    /// # Errors
    /// If it cannot begin. What goes wrong later is in [`Outcome::trouble`], beside what was measured until then.
    pub fn run(&self, progress: &Progress) -> Result<Outcome> {
        self.check().map_err(anyhow::Error::msg)?;
        let number = RandomState::new().hash_one(monotonic_ns());
        let mut control = if self.blind { None } else { Some(Control::open(self, number)?) };
        let flows = (0..self.flows as u32)
            .map(|flow| self.open(Header { load: number, flow, number: 0 }))
            .collect::<Result<Vec<_>>>()?;

        // The sink's clock begins before ours, so its window ends before we do.
        if let Some(control) = &mut control {
            control.start()?;
        }
        let start = monotonic_ns();
        let end = start + self.duration.as_nanos() as u64;
        let together = &Barrier::new(flows.len());
        let sent: Vec<Sent> = std::thread::scope(|scope| {
            let threads: Vec<_> = flows
                .iter()
                .enumerate()
                .map(|(flow, socket)| {
                    scope.spawn(move || {
                        self.prepare_thread();
                        together.wait();
                        let header = Header { load: number, flow: flow as u32, number: 0 };
                        self.send(socket, header, start, end, progress)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a flow does not panic")).collect()
        });
        let duration_ns = (monotonic_ns() - start).min(self.duration.as_nanos() as u64);

        let mut trouble: Vec<String> = sent
            .iter()
            .enumerate()
            .filter_map(|(flow, sent)| Some(format!("flow {flow} broke off: {}", sent.broken.as_ref()?)))
            .collect();
        if progress.stopped() {
            trouble.push(format!("it was stopped after {:.1} s", duration_ns as f64 / 1e9));
        }
        // What the kernel still holds is nobody's any more: at a low rate it would take long.
        drop(flows);
        let datagrams = sent.iter().map(|sent| sent.datagrams).sum();
        let received = control.and_then(|mut control| match control.stop(datagrams) {
            Ok(received) => Some(received),
            Err(error) => {
                trouble.push(format!("the sink at {} did not say what arrived: {error:#}", self.to));
                None
            }
        });
        Ok(Outcome { load: self.clone(), duration_ns, sent, received, trouble })
    }

    fn open(&self, header: Header) -> Result<Flow> {
        match self.transport {
            Transport::Tcp => {
                let options = Options { level: self.level, congestion: self.congestion.as_deref() };
                let mut stream = options.connect(self.to, CONNECT_TIMEOUT)?;
                stream.set_write_timeout(Some(GLANCE))?;
                setsockopt(&stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
                if self.rate.is_some() || self.pattern != Pattern::Steady {
                    limit_unsent(&stream)?;
                }
                if !self.blind {
                    stream.write_all(&header.to_bytes())?;
                }
                Ok(Flow::Tcp(stream))
            }
            Transport::Udp => {
                let any = if self.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect(self.to).with_context(|| format!("cannot send to {}", self.to))?;
                socket.set_write_timeout(Some(GLANCE))?;
                if let Some(level) = self.level {
                    set_level(&socket, level)?;
                }
                if self.segment {
                    setsockopt(&socket, UdpGsoSegment, &(self.datagram as i32))
                        .context("this kernel does not cut datagrams (UDP_SEGMENT)")?;
                }
                Ok(Flow::Udp(socket))
            }
        }
    }

    fn prepare_thread(&self) {
        precise_timers();
        if let Some(cpu) = self.cpu {
            pin(cpu);
        }
    }

    fn send(&self, flow: &Flow, header: Header, start: u64, end: u64, progress: &Progress) -> Sent {
        let rate = self.rate.map(|rate| (rate.bps() / self.flows as u64).max(1));
        let unit = if self.transport == Transport::Udp { self.datagram as u64 } else { 1 };
        let gate = Gate::new(rate, self.pattern, unit, self.seed.wrapping_add(header.flow.into()));
        let mut sent = Sent::default();
        let mut pacer = Pacer { gate, start, end, progress };
        let result = match flow {
            Flow::Tcp(stream) => send_stream(stream, &mut pacer, &mut sent),
            Flow::Udp(socket) => {
                let mut sender = datagrams::Sender::new(socket, self.datagram, self.segment, header);
                send_datagrams(&mut sender, self.datagram, &mut pacer, &mut sent)
            }
        };
        if let Flow::Tcp(stream) = flow {
            sent.retransmits = tcp::retransmits(stream).ok();
        }
        if let Err(error) = result {
            sent.broken = Some(format!("{error} after {:.1} s", (monotonic_ns() - start) as f64 / 1e9));
        }
        sent
    }
}

fn limit_unsent(stream: &TcpStream) -> Result<()> {
    // SAFETY: the option's value is a u32 that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const NOT_SENT_BYTES).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    ensure!(result == 0, "cannot set TCP_NOTSENT_LOWAT: {}", io::Error::last_os_error());
    Ok(())
}

/// A flow's gate, and the clock.
struct Pacer<'a> {
    gate: Gate,
    start: u64,
    end: u64,
    progress: &'a Progress,
}

impl Pacer<'_> {
    /// Waits until something may be sent: how many bytes. `None` at the end.
    fn wait(&mut self) -> Option<u64> {
        loop {
            let now = monotonic_ns();
            if now >= self.end || self.progress.stopped() {
                return None;
            }
            match self.gate.poll(now - self.start) {
                Allowed::Send(bytes) => return Some(bytes),
                Allowed::Wait(until) => {
                    let glance = now + GLANCE.as_nanos() as u64;
                    sleep_until(self.start.saturating_add(until).min(self.end).min(glance));
                }
            }
        }
    }

    fn sent(&mut self, bytes: u64) {
        self.gate.sent(bytes);
        self.progress.bytes.fetch_add(bytes, Relaxed);
    }
}

fn send_stream(mut stream: &TcpStream, pacer: &mut Pacer<'_>, sent: &mut Sent) -> io::Result<()> {
    let chunk = vec![0xa5; CHUNK];
    while let Some(allowed) = pacer.wait() {
        match stream.write(&chunk[..allowed.min(CHUNK as u64) as usize]) {
            Ok(written) => {
                sent.bytes += written as u64;
                pacer.sent(written as u64);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn send_datagrams(
    sender: &mut datagrams::Sender<'_>,
    payload: usize,
    pacer: &mut Pacer<'_>,
    sent: &mut Sent,
) -> io::Result<()> {
    while let Some(allowed) = pacer.wait() {
        let count = (allowed / payload as u64).min(sender.batch() as u64);
        match sender.send(count as usize) {
            Ok(taken) => {
                sent.datagrams += taken as u64;
                sent.bytes += (taken * payload) as u64;
                pacer.sent((taken * payload) as u64);
            }
            Err(error) => match error.raw_os_error() {
                // No room for now.
                Some(libc::EAGAIN | libc::EINTR) => {}
                // A limiter or a queue that drops says so; and a host without a listener. The load goes on.
                Some(libc::ENOBUFS | libc::EPERM | libc::ECONNREFUSED) => {
                    let refused = if sender.segments() { count } else { 1 };
                    sent.refused += refused;
                    sender.skip(refused);
                    pacer.sent(refused * payload as u64);
                }
                _ => return Err(error),
            },
        }
    }
    Ok(())
}
