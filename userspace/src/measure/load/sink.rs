//! The receiving side of a load: counts, and says what it counted.

use std::{
    collections::HashMap,
    io::{self, BufReader, Read},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        setsockopt,
        sockopt::{RcvBuf, RcvBufForce},
    },
};

use super::{
    count::{FlowCount, Received, SLICE_NS, Window},
    datagrams::Receiver,
    wire::{CONTROL, HEADER, Header, Hello, MAX_FLOWS, Order, Reply, VERSION, hear, say},
};
use crate::{
    dataplane::sys::monotonic_ns,
    measure::{Transport, load::MAX_DURATION, threads::pin},
};

/// How often a thread that waits looks whether it is to end.
const GLANCE: Duration = Duration::from_millis(100);
/// Whoever connects says within this time what he wants.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long datagrams may be on their way after the last was sent: what waits for a level may wait for a second.
const LINGER: Duration = Duration::from_millis(1_500);
/// A sender that was to end, and did not say so, is gone.
const OVERTIME: Duration = Duration::from_secs(60);
/// Bytes of a stream that are taken at once.
const CHUNK: usize = 1 << 20;
/// Room for datagrams while the sink's thread is away.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Loads at a time.
const MAX_LOADS: usize = 64;

/// One load that is being received.
struct Receiving {
    hello: Hello,
    /// When its clock began (`CLOCK_MONOTONIC`, ns); 0 until then.
    start_ns: AtomicU64,
    flows: Vec<Mutex<FlowCount>>,
    slices: Vec<AtomicU64>,
    ended: AtomicBool,
}

/// Each thread leaves what it locks in order, even if it ends.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Receiving {
    fn new(hello: Hello) -> Self {
        let slices = hello.window.to_ns.div_ceil(SLICE_NS);
        Self {
            hello,
            start_ns: AtomicU64::new(0),
            flows: (0..hello.flows).map(|_| Mutex::new(FlowCount::new(hello.window))).collect(),
            slices: (0..slices).map(|_| AtomicU64::new(0)).collect(),
            ended: AtomicBool::new(false),
        }
    }

    /// ns since its clock began, at this time of the machine's clock.
    fn elapsed(&self, now_ns: u64) -> Option<u64> {
        let start = self.start_ns.load(Relaxed);
        (start > 0).then(|| now_ns.saturating_sub(start))
    }

    fn arrived(&self, flow: u32, now_ns: u64, bytes: u64, count: impl FnOnce(&mut FlowCount, Window, u64) -> bool) {
        let (Some(flow), Some(at)) = (self.flows.get(flow as usize), self.elapsed(now_ns)) else { return };
        count(&mut lock(flow), self.hello.window, at);
        if let Some(slice) = self.slices.get((at / SLICE_NS) as usize) {
            slice.fetch_add(bytes, Relaxed);
        }
    }

    fn datagrams(&self) -> u64 {
        self.flows.iter().map(|flow| lock(flow).arrived).sum()
    }

    /// What was counted. A load that was stopped early has a shorter window.
    fn received(&self, now_ns: u64) -> Received {
        let Window { from_ns, to_ns } = self.hello.window;
        let window = Window { from_ns, to_ns: to_ns.min(self.elapsed(now_ns).unwrap_or(0)) };
        let mut received = Received::new(window, 0);
        received.flows = self.flows.iter().map(|flow| *lock(flow)).collect();
        received.flows.iter_mut().for_each(|flow| flow.finish(window));
        for (slice, counted) in received.slices.iter_mut().zip(&self.slices) {
            *slice = counted.load(Relaxed);
        }
        received
    }
}

/// Receives loads at a TCP and a UDP port of the same number.
pub struct Sink {
    listener: TcpListener,
    datagrams: UdpSocket,
    loads: Mutex<HashMap<u64, Arc<Receiving>>>,
    cpu: Option<usize>,
}

impl Sink {
    /// Listens at an address; port 0 finds a free one. Its threads run on `cpu`, if given.
    ///
    /// # Errors
    /// If the address is not this host's, or the port is taken.
    pub fn bind(address: SocketAddr, cpu: Option<usize>) -> Result<Self> {
        let taken = |what: &str, at: SocketAddr| format!("cannot listen at {what} {at}");
        let listener = TcpListener::bind(address).with_context(|| taken("TCP", address))?;
        let at = SocketAddr::new(address.ip(), listener.local_addr()?.port());
        let datagrams = UdpSocket::bind(at).with_context(|| taken("UDP", at))?;
        datagrams.set_read_timeout(Some(GLANCE))?;
        listener.set_nonblocking(true)?;
        // More than the system's limit takes CAP_NET_ADMIN; without, there is room for less.
        if setsockopt(&datagrams, RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&datagrams, RcvBuf, &RECEIVE_BUFFER)?;
        }
        Ok(Self { listener, datagrams, loads: Mutex::default(), cpu })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Receives until `stop`. `say` is told, in a line each, what happens.
    ///
    /// # Errors
    /// If the sockets fail; not if a sender does.
    pub fn run(&self, stop: &AtomicBool, say: &(impl Fn(&str) + Sync)) -> Result<()> {
        std::thread::scope(|scope| {
            let datagrams = scope.spawn(|| self.receive_datagrams(stop));
            let result = self.accept(stop, |stream, from| {
                scope.spawn(move || {
                    self.pin();
                    if let Err(error) = self.serve(stream, from, stop, say) {
                        say(&format!("{from}: {error:#}"));
                    }
                });
            });
            if result.is_err() {
                stop.store(true, Relaxed);
            }
            datagrams.join().expect("the receiver does not panic")?;
            result
        })
    }

    fn pin(&self) {
        if let Some(cpu) = self.cpu {
            pin(cpu);
        }
    }

    fn accept(&self, stop: &AtomicBool, mut serve: impl FnMut(TcpStream, SocketAddr)) -> Result<()> {
        while !stop.load(Relaxed) {
            match self.listener.accept() {
                Ok((stream, from)) => serve(stream, from),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    readable(self.listener.as_fd());
                }
                // A peer that has gone away already, or too many open files: the next may be luckier.
                Err(_) => std::thread::sleep(GLANCE),
            }
        }
        Ok(())
    }

    fn receive_datagrams(&self, stop: &AtomicBool) -> Result<()> {
        self.pin();
        let mut receiver = Receiver::new();
        let mut current: Option<(u64, Arc<Receiving>)> = None;
        while !stop.load(Relaxed) {
            let arrived = match receiver.receive(&self.datagrams) {
                Ok(arrived) => arrived,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    current = None;
                    continue;
                }
                Err(error) => return Err(error).context("cannot receive datagrams"),
            };
            let now = monotonic_ns();
            for (header, bytes) in arrived {
                if current.as_ref().is_none_or(|(number, _)| *number != header.load) {
                    current = lock(&self.loads).get(&header.load).map(|load| (header.load, Arc::clone(load)));
                }
                if let Some((_, load)) = &current {
                    load.arrived(header.flow, now, bytes, |flow, window, at| {
                        flow.datagram(window, at, bytes, header.number)
                    });
                }
            }
        }
        Ok(())
    }

    fn serve(
        &self,
        mut stream: TcpStream,
        from: SocketAddr,
        stop: &AtomicBool,
        say: &(impl Fn(&str) + Sync),
    ) -> Result<()> {
        // Linux lets accepted sockets block, whatever the listener does (accept(2)).
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).context("it connected and did not say what for")?;
        let header = Header::from_bytes(&header).context("it is no sender of a load")?;
        if header.flow == CONTROL {
            return self.control(stream, from, header.load, stop, say);
        }
        let load = lock(&self.loads).get(&header.load).map(Arc::clone).context("a flow of a load that is not there")?;
        receive_stream(&stream, header.flow, &load, stop)
    }

    fn control(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        number: u64,
        stop: &AtomicBool,
        tell: &(impl Fn(&str) + Sync),
    ) -> Result<()> {
        stream.set_write_timeout(Some(HELLO_TIMEOUT))?;
        let mut control = BufReader::new(stream);
        let hello: Hello = hear(&mut control)?.context("it hung up")?;
        if let Err(why) = acceptable(&hello) {
            say(control.get_mut(), &Reply::Refused(why.clone()))?;
            return Err(anyhow::Error::msg(why));
        }
        let load = Arc::new(Receiving::new(hello));
        {
            let mut loads = lock(&self.loads);
            ensure!(loads.len() < MAX_LOADS, "there are {MAX_LOADS} loads already");
            loads.insert(number, Arc::clone(&load));
        }
        let result = receive(&mut control, &load, stop);
        load.ended.store(true, Relaxed);
        lock(&self.loads).remove(&number);
        let received = result?;
        tell(&format!(
            "{from}: {} {} flows, {:.1} Mbit/s for {:.1} s",
            hello.flows,
            hello.transport.name(),
            received.goodput_bps() / 1e6,
            received.window.length_ns() as f64 / 1e9,
        ));
        Ok(())
    }
}

fn acceptable(hello: &Hello) -> Result<(), String> {
    if hello.version != VERSION {
        return Err(format!("this sink speaks version {VERSION}, the sender version {}", hello.version));
    }
    if hello.flows > MAX_FLOWS || hello.window.to_ns > MAX_DURATION.as_nanos() as u64 {
        return Err(format!("at most {MAX_FLOWS} flows and {} s", MAX_DURATION.as_secs()));
    }
    Ok(())
}

/// From the first order to the result.
fn receive(control: &mut BufReader<TcpStream>, load: &Receiving, stop: &AtomicBool) -> Result<Received> {
    say(control.get_mut(), &Reply::Ready)?;
    // All flows connect meanwhile.
    let order = next_order(control, OVERTIME, stop)?.context("it hung up before the load began")?;
    ensure!(order == Order::Start, "it said {order:?} in place of starting");
    load.start_ns.store(monotonic_ns(), Relaxed);
    say(control.get_mut(), &Reply::Started)?;
    let longest = Duration::from_nanos(load.hello.window.to_ns) + OVERTIME;
    let order = next_order(control, longest, stop)?.context("it hung up before the load was over")?;
    let Order::Stop { datagrams } = order else { bail!("it said {order:?} in place of stopping") };
    let received_at = monotonic_ns();
    let linger = Instant::now() + LINGER;
    while load.hello.transport == Transport::Udp
        && load.datagrams() < datagrams
        && Instant::now() < linger
        && !stop.load(Relaxed)
    {
        std::thread::sleep(Duration::from_millis(10));
    }
    let received = load.received(received_at);
    say(control.get_mut(), &Reply::Received(received.clone()))?;
    Ok(received)
}

/// Waits for an order, for so long. At the end of the sink a sender whose flows have ended may still ask for the result.
fn next_order(control: &mut BufReader<TcpStream>, longest: Duration, stop: &AtomicBool) -> Result<Option<Order>> {
    let mut deadline = Instant::now() + longest;
    let mut stopping = false;
    while control.buffer().is_empty() && !readable(control.get_ref().as_fd()) {
        if stop.load(Relaxed) && !stopping {
            stopping = true;
            deadline = deadline.min(Instant::now() + LINGER);
        }
        ensure!(Instant::now() < deadline, "it has not said anything for too long");
    }
    hear(control)
}

/// Waits for something to read, for a moment.
fn readable(socket: BorrowedFd<'_>) -> bool {
    let mut wait = [PollFd::new(socket, PollFlags::POLLIN)];
    poll(&mut wait, PollTimeout::from(GLANCE.as_millis() as u16)).is_ok_and(|ready| ready > 0)
}

fn receive_stream(stream: &TcpStream, flow: u32, load: &Receiving, stop: &AtomicBool) -> Result<()> {
    ensure!((flow as usize) < load.flows.len(), "there is no flow {flow}");
    stream.set_read_timeout(Some(GLANCE))?;
    let mut room = vec![0; CHUNK];
    while !load.ended.load(Relaxed) && !stop.load(Relaxed) {
        match discard(stream, &mut room) {
            Ok(0) => break,
            Ok(bytes) => {
                load.arrived(flow, monotonic_ns(), bytes, |flow, window, at| flow.stream(window, at, bytes));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            // A sender ends its flows that way, so that what they have not sent does not go on.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error).context("a flow broke off"),
        }
    }
    Ok(())
}

/// Takes bytes of a stream without copying them: how many.
fn discard(stream: &TcpStream, room: &mut [u8]) -> io::Result<u64> {
    // With MSG_TRUNC TCP throws the bytes away (tcp(7)).
    // SAFETY: there is room for as many bytes as are asked for, even if none is written.
    let result = unsafe { libc::recv(stream.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), libc::MSG_TRUNC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u64) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::{
        measure::load::{Load, Pattern, Progress},
        units::Rate,
    };

    /// Runs `work` beside a sink on loopback: its result and what the sink said.
    fn beside<T>(address: &str, work: impl FnOnce(SocketAddr) -> T) -> (T, Vec<String>) {
        let sink = Sink::bind(address.parse().unwrap(), None).unwrap();
        let (stop, said) = (AtomicBool::new(false), Mutex::new(Vec::new()));
        let result = std::thread::scope(|scope| {
            scope.spawn(|| sink.run(&stop, &|line: &str| lock(&said).push(line.to_owned())).unwrap());
            let guard = StopOnDrop(&stop);
            let result = work(sink.address().unwrap());
            drop(guard);
            result
        });
        (result, said.into_inner().unwrap())
    }

    struct StopOnDrop<'a>(&'a AtomicBool);
    impl Drop for StopOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }

    fn short(to: SocketAddr) -> Load {
        Load { duration: Duration::from_millis(400), warm_up: Duration::from_millis(100), ..Load::new(to) }
    }

    #[test]
    fn tcp_flows_are_counted_where_they_arrive() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (outcome, said) =
                beside(address, |to| Load { flows: 3, ..short(to) }.run(&Progress::default()).unwrap());
            assert_eq!(outcome.trouble, [""; 0]);
            let received = outcome.received.as_ref().unwrap();
            assert_eq!(received.window, Window { from_ns: 100_000_000, to_ns: 400_000_000 });
            assert_eq!((received.flows.len(), received.slices.len()), (3, 4));
            assert!(received.flows.iter().all(|flow| flow.bytes > 0), "{received:?}");
            let arrived: u64 = received.slices.iter().sum();
            let sent: u64 = outcome.sent.iter().map(|sent| sent.bytes).sum();
            assert!(arrived <= sent && arrived > 0);
            let run = outcome.run("load");
            let names: Vec<&str> = run.figures.iter().map(|figure| figure.name.as_str()).collect();
            for name in ["goodput", "goodput of flow 2", "fairness (Jain)", "longest gap of a flow", "retransmits"] {
                assert!(names.contains(&name), "{names:?}");
            }
            assert!(said.len() == 1 && said[0].contains("3 tcp flows"), "{said:?}");
        }
    }

    #[test]
    fn datagrams_are_counted_and_a_rate_is_kept() {
        for segment in [false, true] {
            let rate = Some(Rate::from_bps(22_400_000));
            let load = |to| Load { transport: Transport::Udp, rate, flows: 2, segment, ..short(to) };
            let (outcome, _) = beside("127.0.0.1:0", |to| load(to).run(&Progress::default()).unwrap());
            assert_eq!(outcome.trouble, [""; 0]);
            let received = outcome.received.unwrap();
            let sent: u64 = outcome.sent.iter().map(|sent| sent.datagrams).sum();
            assert_eq!(received.flows.iter().map(|flow| flow.arrived).sum::<u64>(), sent);
            assert!(received.flows.iter().all(|flow| flow.reordered == 0));
            // 2000 a second for 400 ms; a machine that was away has sent less, but never more.
            assert!(sent > 100 && sent <= 802, "{sent}");
        }
    }

    #[test]
    fn bursts_arrive_as_they_were_ordered() {
        let pattern = Pattern::Bursts { bytes: 100_000, period_ns: 50_000_000, random: false };
        let load = |to| Load { pattern, warm_up: Duration::ZERO, ..short(to) };
        let (outcome, _) = beside("127.0.0.1:0", |to| load(to).run(&Progress::default()).unwrap());
        // Eight, unless the machine was away.
        let bytes = outcome.sent[0].bytes;
        assert!(bytes.is_multiple_of(100_000) && (200_000..=800_000).contains(&bytes), "{bytes}");
        let received = outcome.received.unwrap();
        assert!(received.flows[0].longest_gap_ns > 20_000_000, "{received:?}");
    }

    #[test]
    fn a_load_that_is_stopped_keeps_what_was_measured() {
        let (outcome, _) = beside("127.0.0.1:0", |to| {
            let progress = Progress::default();
            let load = Load { duration: Duration::from_secs(60), warm_up: Duration::ZERO, ..short(to) };
            std::thread::scope(|scope| {
                let running = scope.spawn(|| load.run(&progress).unwrap());
                while progress.bytes() < 1_000_000 {
                    std::thread::sleep(Duration::from_millis(10));
                }
                progress.stop();
                running.join().unwrap()
            })
        });
        assert!(outcome.trouble[0].contains("stopped after"), "{:?}", outcome.trouble);
        let received = outcome.received.unwrap();
        assert!(received.window.to_ns < 30_000_000_000 && received.goodput_bps() > 0.0);
        assert_eq!(received.slices.len() as u64, received.window.to_ns.div_ceil(SLICE_NS));
    }

    #[test]
    fn without_a_sink_the_error_says_what_to_do() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        // Somebody else listens there.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(b"220 mail.example.net ESMTP\r\n").unwrap();
                // Who closes before he has read resets the connection, and what he said may be lost.
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let error = format!("{:#}", short(to).run(&Progress::default()).unwrap_err());
            assert!(error.contains("is `qjump measure sink` running") && error.contains("language"), "{error}");
        });
        drop(listener);
        let error = format!("{:#}", short(to).run(&Progress::default()).unwrap_err());
        assert!(error.contains("is `qjump measure sink` running") && error.contains("refused"), "{error}");
    }

    #[test]
    fn a_sink_that_goes_away_is_said_and_the_rest_is_kept() {
        let sink = Sink::bind("127.0.0.1:0".parse().unwrap(), None).unwrap();
        let load = Load { duration: Duration::from_secs(60), ..short(sink.address().unwrap()) };
        let (stop, progress) = (AtomicBool::new(false), Progress::default());
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| sink.run(&stop, &|_: &str| {}).unwrap());
            let running = scope.spawn(|| load.run(&progress).unwrap());
            while progress.bytes() < 1_000_000 {
                std::thread::sleep(Duration::from_millis(10));
            }
            stop.store(true, Relaxed);
            // Its end of the control connection hangs until the sender is done.
            running.join().unwrap()
        });
        assert!(outcome.sent[0].bytes >= 1_000_000);
        assert!(outcome.sent[0].broken.is_some() && !outcome.trouble.is_empty(), "{:?}", outcome.trouble);
    }

    #[test]
    fn strangers_do_not_disturb() {
        let ((), said) = beside("127.0.0.1:0", |to| {
            let knock = |bytes: &[u8]| {
                let mut stream = TcpStream::connect(to).unwrap();
                stream.write_all(bytes).unwrap();
                stream
            };
            let control = Header { load: 1, flow: CONTROL, number: 0 }.to_bytes();
            let _silent = knock(b"");
            drop(knock(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"));
            drop(knock(&Header { load: 77, flow: 0, number: 0 }.to_bytes()));
            drop(knock(&[&control[..], b"{}\n"].concat()));
            let mut old = knock(&control);
            let window = Window { from_ns: 0, to_ns: 1 };
            say(&mut old, &Hello { version: 99, transport: Transport::Tcp, flows: 1, window }).unwrap();
            let Some(Reply::Refused(why)) = hear(&mut BufReader::new(old)).unwrap() else { panic!("not refused") };
            assert!(why.contains("version 1") && why.contains("version 99"), "{why}");
            let outcome = short(to).run(&Progress::default()).unwrap();
            assert_eq!(outcome.trouble, [""; 0]);
        });
        for part in ["no sender of a load", "a load that is not there", "language", "version 99", "1 tcp flows"] {
            assert!(said.iter().any(|line| line.contains(part)), "{part}: {said:?}");
        }
    }
}
