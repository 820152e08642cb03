//! `qjump measure probe` and `qjump measure pingpong`.

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, interrupt},
    choose_cpu,
    compare::Compare,
    level,
    output::{Output, Reporter},
    resolve, show,
};
use crate::{
    measure::{
        Arrivals, Assertion, Bounds, Clocks, Transport,
        control::PORT,
        result::{Document, Run, Sample},
        session::{Plan, Session, SessionError},
        train::{Spec, Train},
    },
    socket::Level,
    units::Nanos,
};

/// Send probes at fixed or random times, whatever becomes of them, at one or more levels at once
///
/// The schedule is never moved: what is sent late counts from when it was to be sent.
///
/// What the bound is held against: the plan's bound is that of one message, one way, from the host's queues to the other
/// host. A round trip has a bound only if both ways have: the sum of the bound in force on this host's interface and of that
/// on the server's, or twice --bound. Where the clocks are known to agree (the same machine, or --clock-offset-bound), each
/// way is reported, too, and held against its own bound. Both count from the intended send and to the receiving
/// application, so they have the times of two hosts' programs in them, which the plan's epsilon must allow for; the
/// segment snd-rx has the network's alone.
#[derive(Args)]
pub struct Probe {
    #[command(flatten)]
    common: Common,
    /// Probes a second, at each level
    #[arg(long, value_name = "N", default_value_t = 1000.0, value_parser = rate)]
    rate: f64,
    /// At random times (a Poisson process) instead of equal distances: meets what is periodic with the network fairly
    #[arg(long)]
    poisson: bool,
    #[command(flatten)]
    compare: Compare,
}

/// Send each probe when the answer to the one before has come: a closed loop
///
/// Each probe waits for the network before it is sent, so that a stall is seen by one probe alone: for idle networks and
/// comparison with other tools. `probe` measures what users meet.
#[derive(Args)]
pub struct PingPong {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    compare: Compare,
}

/// What both have.
#[derive(Args)]
pub(super) struct Common {
    /// Host that runs `qjump measure serve`, as NAME, ADDRESS, NAME:PORT or [IPV6]:PORT
    target: String,
    /// Level of the probes, and of their answers; several by commas, each in a train of its own, all at once
    #[arg(long, value_name = "N", value_parser = level, value_delimiter = ',', default_value = "0")]
    pub level: Vec<Level>,
    /// Over TCP connections instead of UDP
    #[arg(long)]
    tcp: bool,
    /// Bytes of a probe and of its answer: UDP payload, or what TCP carries. With less than 56 the server's times are
    /// not known
    #[arg(long, value_name = "BYTES", default_value_t = 64)]
    pub size: usize,
    /// How long to measure, after the warm-up
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub duration: Nanos,
    /// What is sent before that, and left out
    #[arg(long, value_name = "TIME", default_value = "1s")]
    warm_up: Nanos,
    /// A probe that is not answered after so long is lost
    #[arg(long, value_name = "TIME", default_value = "1s")]
    timeout: Nanos,
    /// CPU for the thread that sends [default: the last that this process may run on]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// Watch for an answer for so long after a probe before sleeping: without the time to be woken, at the price of a CPU
    #[arg(long, value_name = "TIME", default_value = "100us")]
    spin: Nanos,
    /// The clocks of the two hosts differ by at most so much: report one-way times
    #[arg(long, value_name = "TIME")]
    clock_offset_bound: Option<Nanos>,
    /// Bound of one message, one way, at every level [default: that of the plan in force on the way]
    #[arg(long, value_name = "TIME")]
    bound: Option<Nanos>,
    /// Write the level's codepoint on this host and on the server, where qjump is not loaded
    #[arg(long)]
    mark: bool,
    /// Condition, else exit status 2: [LEVEL:][up:|down:]WHAT<VALUE, where WHAT is p50, p99.9 …, min, mean, max or
    /// loss, and VALUE is a time, 'bound' or a share such as 0.1%. Repeatable; of round trips unless up or down is said
    #[arg(long = "assert", value_name = "CONDITION")]
    assertions: Vec<Assertion>,
    #[command(flatten)]
    pub output: Output,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        _ => Err("a rate is a number of probes a second, above 0".to_owned()),
    }
}

impl Probe {
    pub(super) fn run(self) -> Result<(), Failure> {
        let interval = 1e9 / self.rate;
        let arrivals = if self.poisson { Arrivals::Poisson(interval) } else { Arrivals::Fixed(interval) };
        self.common.run(arrivals, &self.compare)
    }
}

impl PingPong {
    pub(super) fn run(self) -> Result<(), Failure> {
        self.common.run(Arrivals::AfterAnswer, &self.compare)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Spec(_) => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl Common {
    /// The session that was asked for, with these arrivals.
    pub fn plan(&self, arrivals: Arrivals) -> Result<Plan, Failure> {
        let mut levels = self.level.clone();
        levels.sort_by_key(|level| level.number());
        if levels.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Failure::Usage("--level names a level twice".to_owned()));
        }
        let transport = if self.tcp { Transport::Tcp } else { Transport::Udp };
        let train =
            |&level: &Level| Train { transport, level, payload: self.size, arrivals, bounds: Bounds::default() };
        let spec = Spec {
            trains: self.level.iter().map(train).collect(),
            warm_up_ns: self.warm_up.ns(),
            duration_ns: self.duration.ns(),
            timeout_ns: self.timeout.ns(),
            cpu: choose_cpu(self.cpu, 0)?,
            spin_ns: self.spin.ns(),
            clocks: Clocks::Unknown,
            seed: 1,
        };
        spec.check().map_err(|error| Failure::Usage(error.to_string()))?;
        Ok(Plan {
            target: resolve(&self.target, PORT)?,
            spec,
            bound_ns: self.bound.map(Nanos::ns),
            clock_offset_ns: self.clock_offset_bound.map(Nanos::ns),
            mark: self.mark,
            sinks: Vec::new(),
        })
    }

    /// The settings, for the document.
    pub fn setting(&self, plan: &Plan, session: &Session) -> serde_json::Value {
        json!({
            "target": plan.target.to_string(),
            "server": session.host,
            "same_machine": session.same_machine,
            "interface": session.route().ok().map(|route| &route.interface),
            "transport": if self.tcp { "tcp" } else { "udp" },
            "levels": self.level.iter().map(|level| level.number()).collect::<Vec<_>>(),
            "payload_bytes": self.size,
            "timeout_ns": self.timeout.ns(),
            "cpu": plan.spec.cpu,
            "spin_ns": plan.spec.spin_ns,
            "mark": self.mark,
        })
    }

    /// Nothing is sent for a condition that cannot be decided.
    fn check_bounds(&self, session: &Session) -> Result<(), Failure> {
        let missing = |level: Option<u8>| {
            let trains = session.spec().trains.iter();
            trains
                .filter(|train| level.is_none_or(|level| level == train.level.number()))
                .any(|train| train.bounds.round_trip_ns().is_none())
        };
        if self.assertions.iter().filter_map(Assertion::needs_bound).any(missing) {
            return Err(Failure::Usage(
                "a condition needs a bound, and there is none: no plan is in force on both ways; give --bound"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn run(self, arrivals: Arrivals, compare: &Compare) -> Result<(), Failure> {
        let plan = self.plan(arrivals)?;
        self.output.check()?;
        let mut reporter = self.output.reporter()?;
        let session = Session::open(&plan)?;
        let closed_loop = arrivals == Arrivals::AfterAnswer;
        let title = format!("{} to {}", if closed_loop { "Ping-pong" } else { "Probes" }, plan.target);
        let mut document = Document::new("measurement", &title);
        document.setting = self.setting(&plan, &session);
        document.setting["closed_loop"] = closed_loop.into();
        document.setting["poisson"] = matches!(arrivals, Arrivals::Poisson(_)).into();
        document.setting["rate_per_s"] = arrivals.rate().into();
        // A comparison changes what is in force on the way, so each of its runs asks again.
        let mut first = (!compare.is_wanted()).then_some(session);
        if let Some(session) = &first {
            self.check_bounds(session)?;
        }
        let mut cut_short = false;
        let found = compare.run(&mut document, "probe", show::run, |name| {
            let session = match first.take() {
                Some(session) => session,
                None => Session::open(&plan)?,
            };
            let taken = measure(session, name, &mut reporter)?;
            cut_short |= taken.cut_short;
            Ok((taken.run, taken.notes))
        })?;
        let streams = compare.judged(&document.runs);
        document.claims = self.assertions.iter().map(|assertion| assertion.check(&streams)).collect();
        let text = format!("{}{}", found.text, show::remarks(&document));
        let live = reporter.finish();
        self.output.finish(&document, &text)?;
        live?;
        if let Some(failure) = found.failure {
            return Err(failure);
        }
        if document.claims.iter().any(|claim| claim.holds != Some(true)) {
            eprintln!("qjump: a condition does not hold");
            return Err(Failure::DoesNotHold);
        }
        if cut_short {
            return Err(Failure::Failed(
                "the server went away before the end; the results are of what came before".to_owned(),
            ));
        }
        if document.runs.iter().flat_map(|run| &run.streams).all(|stream| stream.response.samples == 0) {
            return Err(Failure::Failed("no probe was answered".to_owned()));
        }
        Ok(())
    }
}

/// A run that was measured.
pub(super) struct Taken {
    pub run: Run,
    pub notes: Vec<String>,
    /// Whether the server went away before the end.
    pub cut_short: bool,
}

/// Measures one run, called `name`, and says how it goes.
pub(super) fn measure(session: Session, name: &str, reporter: &mut Reporter) -> Result<Taken, Failure> {
    let trains = session.spec().trains.iter();
    let names: Vec<String> = trains.map(|train| format!("{} level {}", train.transport.name(), train.level)).collect();
    let warm_up_ns = session.spec().warm_up_ns;
    let stop = interrupt::flag();
    let measured = session.run(stop, &mut |tick| reporter.tick(name, &names, tick))?;
    let run = Run {
        name: name.to_owned(),
        about: names.join(", "),
        duration_ns: measured.duration_ns,
        warm_up_ns,
        streams: measured.streams,
        figures: Vec::new(),
    };
    Ok(Taken { run, notes: measured.notes, cut_short: measured.cut_short })
}

/// The round trips of a run's first train.
pub(super) fn round_trips(run: &Run) -> Option<&crate::measure::result::Stream> {
    run.streams.iter().find(|stream| stream.sample == Sample::Rtt)
}
