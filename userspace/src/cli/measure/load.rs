//! `qjump measure load` and `qjump measure sink`.

use std::{
    io::{IsTerminal, Write},
    net::SocketAddr,
    sync::atomic::Ordering::Relaxed,
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, interrupt},
    compare::{Compare, Measured},
    level,
    output::Results,
    resolve, show,
};
use crate::{
    measure::{
        Transport,
        load::{self, Outcome, PORT, Pattern},
        result::{Document, Run},
    },
    socket::Level,
    units::{Nanos, Rate, show_rate},
};

/// Send bulk to a host that runs `qjump measure sink`, which counts what arrives
///
/// TCP as fast as it goes, unless told otherwise. What is reported was counted where it arrived: goodput of each flow and
/// together, over time, the longest time without any, and how fairly it was shared.
#[derive(Args)]
pub struct Load {
    /// Host that runs `qjump measure sink`, as NAME, ADDRESS, NAME:PORT or [IPV6]:PORT
    target: String,
    /// Datagrams instead of TCP connections
    #[arg(long)]
    udp: bool,
    /// How many flows, at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    flows: usize,
    /// Their level
    #[arg(long, value_name = "N", value_parser = level)]
    level: Option<Level>,
    /// Payload of all flows together, while they send [default: as much as possible]
    #[arg(long, value_name = "RATE")]
    rate: Option<Rate>,
    /// Send for so long, in turns with --off
    #[arg(long, value_name = "TIME", requires = "off", conflicts_with = "burst")]
    on: Option<Nanos>,
    /// Be silent for so long, in turns with --on
    #[arg(long, value_name = "TIME", requires = "on")]
    off: Option<Nanos>,
    /// Send so many bytes of payload in each --period, by each flow
    #[arg(long, value_name = "BYTES", requires = "period")]
    burst: Option<u64>,
    /// From the beginning of one --burst to that of the next
    #[arg(long, value_name = "TIME", requires = "burst")]
    period: Option<Nanos>,
    /// What --on, --off, --burst and --period say are averages of exponential distributions, drawn for each flow
    #[arg(long)]
    random: bool,
    /// How long to measure, after the warm-up
    #[arg(long, value_name = "TIME", default_value = "10s")]
    duration: Nanos,
    /// What is sent before that, and left out
    #[arg(long, value_name = "TIME", default_value = "1s")]
    warm_up: Nanos,
    /// TCP's congestion control, such as cubic [default: the system's]
    #[arg(long, value_name = "NAME", conflicts_with = "udp")]
    congestion: Option<String>,
    /// Bytes of payload of a datagram
    #[arg(long, value_name = "BYTES", default_value_t = 1_400, requires = "udp")]
    size: usize,
    /// Let the kernel cut datagrams from large packets: faster, but such packets are too large for guaranteed levels
    #[arg(long, requires = "udp")]
    segment: bool,
    /// There is no sink: send to whatever listens there (with --udp, also to nobody), and report the sender's figures alone
    #[arg(long)]
    blind: bool,
    /// CPU of the threads that send [default: any]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// What --random draws from
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    results: Results,
    #[command(flatten)]
    compare: Compare,
}

/// Count what `qjump measure load` sends, until interrupted
///
/// Listens on one port, TCP and UDP. There is no authentication: let it run while you measure, on addresses that only your
/// hosts reach.
#[derive(Args)]
pub struct Sink {
    /// Address and port to listen on; port 0 for any that is free
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from(([0; 16], PORT)))]
    listen: SocketAddr,
    /// CPU of its threads [default: any]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// End after so long
    #[arg(long, value_name = "TIME")]
    duration: Option<Nanos>,
}

impl Load {
    fn load(&self) -> Result<load::Load, Failure> {
        let (on, off) = (self.on.map(Nanos::ns), self.off.map(Nanos::ns));
        let pattern = match (on.zip(off), self.burst.zip(self.period)) {
            (Some((on_ns, off_ns)), _) => Pattern::OnOff { on_ns, off_ns, random: self.random },
            (None, Some((bytes, period))) => Pattern::Bursts { bytes, period_ns: period.ns(), random: self.random },
            (None, None) if self.random => {
                return Err(Failure::Usage("--random needs --on and --off, or --burst and --period".to_owned()));
            }
            (None, None) => Pattern::Steady,
        };
        let load = load::Load {
            to: resolve(&self.target, PORT)?,
            transport: if self.udp { Transport::Udp } else { Transport::Tcp },
            flows: self.flows,
            level: self.level,
            rate: self.rate,
            pattern,
            duration: Duration::from_nanos(self.warm_up.ns().saturating_add(self.duration.ns())),
            warm_up: Duration::from_nanos(self.warm_up.ns()),
            congestion: self.congestion.clone(),
            datagram: self.size,
            segment: self.segment,
            blind: self.blind,
            cpu: self.cpu,
            seed: self.seed,
        };
        load.check().map_err(Failure::Usage)?;
        Ok(load)
    }

    pub(super) fn run(self) -> Result<(), Failure> {
        let load = self.load()?;
        self.results.check()?;
        let mut document = Document::new("measurement", &format!("Load to {}", load.to));
        document.setting = self.setting(&load);
        let mut curves = Vec::new();
        let mut broken = false;
        let found = self.compare.run(&mut document, "load", figures, |name| {
            let outcome = self.once(&load)?;
            curves.extend(outcome.curve(name));
            broken |= !outcome.trouble.is_empty() && !interrupt::flag().load(Relaxed);
            let run = outcome.run(name);
            Measured::Ok((run, outcome.trouble))
        })?;
        document.curves = curves;
        let text = format!("{}\n{}", found.text, show::remarks(&document));
        self.results.finish(&document, &text)?;
        match found.failure {
            Some(failure) => Err(failure),
            None if broken => Err(Failure::Failed("the load did not run as it should have; see the notes".to_owned())),
            None => Ok(()),
        }
    }

    /// Sends the load once, and says how it goes.
    fn once(&self, load: &load::Load) -> Result<Outcome, Failure> {
        let progress = load::Progress::default();
        thread::scope(|scope| {
            let running = scope.spawn(|| load.run(&progress));
            let mut shown = (Instant::now(), 0);
            while !running.is_finished() {
                thread::sleep(Duration::from_millis(20));
                if interrupt::flag().load(Relaxed) {
                    progress.stop();
                }
                let elapsed = shown.0.elapsed();
                if elapsed >= Duration::from_secs(1) && !self.results.quiet {
                    let bytes = progress.bytes();
                    tell(&format!(
                        "{} to the kernel",
                        show_rate((bytes - shown.1) as f64 * 8.0 / elapsed.as_secs_f64())
                    ));
                    shown = (Instant::now(), bytes);
                }
            }
            end_line(!self.results.quiet);
            Ok(running.join().expect("a load does not panic")?)
        })
    }

    fn setting(&self, load: &load::Load) -> serde_json::Value {
        json!({
            "target": load.to.to_string(),
            "transport": load.transport.name(),
            "flows": load.flows,
            "level": load.level.map(Level::number),
            "rate_bps": load.rate.map(Rate::bps),
            "on_ns": self.on.map(Nanos::ns),
            "off_ns": self.off.map(Nanos::ns),
            "burst_bytes": self.burst,
            "period_ns": self.period.map(Nanos::ns),
            "random": self.random,
            "congestion": load.congestion,
            "datagram_bytes": self.udp.then_some(load.datagram),
            "segment": load.segment,
            "blind": load.blind,
            "cpu": load.cpu,
            "seed": load.seed,
        })
    }
}

fn figures(run: &Run) -> String {
    format!("{}\n\n{}", run.about, show::figures(run))
}

/// A line of progress, on a terminal in place of the last one.
pub(super) fn tell(line: &str) {
    let mut out = std::io::stderr();
    if out.is_terminal() {
        let _ = write!(out, "\r\x1b[K{line}");
    }
}

/// The progress is over.
pub(super) fn end_line(shown: bool) {
    if shown && std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

impl Sink {
    pub(super) fn run(self) -> Result<(), Failure> {
        let sink = load::Sink::bind(self.listen, self.cpu)
            // A host may be without IPv6.
            .or_else(|error| match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
                Some(libc::EAFNOSUPPORT) if self.listen.ip().is_unspecified() => {
                    load::Sink::bind(SocketAddr::from(([0; 4], self.listen.port())), self.cpu)
                }
                _ => Err(error),
            })?;
        eprintln!("qjump: counting at {}, TCP and UDP", sink.address()?);
        let stop = interrupt::flag();
        thread::scope(|scope| {
            if let Some(duration) = self.duration {
                let end = Instant::now() + Duration::from_nanos(duration.ns());
                scope.spawn(move || {
                    while !stop.load(Relaxed) && Instant::now() < end {
                        thread::sleep(Duration::from_millis(50));
                    }
                    stop.store(true, Relaxed);
                });
            }
            let result = sink.run(stop, &|line: &str| eprintln!("qjump: {line}"));
            stop.store(true, Relaxed);
            Ok(result?)
        })
    }
}
