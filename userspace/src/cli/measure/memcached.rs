//! `qjump measure memcached`.

use std::{sync::atomic::Ordering::Relaxed, thread, time::Duration};

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, interrupt},
    choose_cpu,
    compare::Compare,
    level,
    load::{end_line, tell},
    output::{Output, Reporter},
    resolve, show,
};
use crate::{
    measure::{
        Assertion,
        memcached::{Client, Outcome, PORT, Popularity, Progress, Sizes, Workload},
        result::{Document, Run},
        train::Tick,
    },
    socket::Level,
    units::Nanos,
};

/// Ask a memcached server at fixed or random times, whatever becomes of the requests, and check every value
///
/// The schedule is never moved: a request that is held up, by the server, the network, this host's limiter or a connection
/// without room, counts from when it was to be sent. First each key gets its value, at level 0.
#[derive(Args)]
pub struct Memcached {
    /// Host that runs memcached, as NAME, ADDRESS, NAME:PORT or [IPV6]:PORT
    target: String,
    /// Requests a second
    #[arg(long, value_name = "N", default_value_t = 1000.0)]
    rate: f64,
    /// At random times (a Poisson process) instead of equal distances
    #[arg(long)]
    poisson: bool,
    /// Level of the connections; the answers have the server's
    #[arg(long, value_name = "N", value_parser = level)]
    level: Option<Level>,
    /// How many connections
    #[arg(long, value_name = "N", default_value_t = 16)]
    connections: usize,
    /// How many answers a connection may owe; what finds no room waits, and its time runs
    #[arg(long, value_name = "N", default_value_t = 16)]
    depth: usize,
    /// How many threads, each with connections and a CPU of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// How many keys
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    keys: u64,
    /// Share of requests that store, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    sets: f64,
    /// How often keys are asked for: uniform, zipf, or zipf:EXPONENT
    #[arg(long, value_name = "WHICH", default_value = "zipf")]
    popularity: Popularity,
    /// Bytes of a value, or etc: as in Facebook's pool of that name (SIGMETRICS 2012)
    #[arg(long, value_name = "BYTES", default_value = "etc")]
    values: Sizes,
    /// The keys have their values already, from an earlier run with the same --keys, --values and --seed
    #[arg(long)]
    no_populate: bool,
    /// How long to measure, after the warm-up
    #[arg(long, value_name = "TIME", default_value = "10s")]
    duration: Nanos,
    /// What is asked before that, and left out
    #[arg(long, value_name = "TIME", default_value = "1s")]
    warm_up: Nanos,
    /// A connection that owes an answer for so long is given up and made again
    #[arg(long, value_name = "TIME", default_value = "5s")]
    timeout: Nanos,
    /// TCP's congestion control, such as cubic [default: the system's]
    #[arg(long, value_name = "NAME")]
    congestion: Option<String>,
    /// CPU of the first thread; the next has the next [default: the last that this process may run on]
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
    /// What is random follows from it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Condition, else exit status 2: WHAT<VALUE, where WHAT is p50, p99.9 …, min, mean, max or loss, and VALUE is a time or
    /// a share such as 0.1%. Repeatable; with --compare, of the runs with qjump
    #[arg(long = "assert", value_name = "CONDITION")]
    assertions: Vec<Assertion>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    compare: Compare,
}

impl Memcached {
    fn client(&self) -> Result<Client, Failure> {
        let client = Client {
            to: resolve(&self.target, PORT)?,
            level: self.level,
            congestion: self.congestion.clone(),
            connections: self.connections,
            depth: self.depth,
            threads: self.threads,
            cpu: choose_cpu(self.cpu, self.threads.saturating_sub(1))?,
            real_time: true,
            rate: self.rate,
            poisson: self.poisson,
            duration: Duration::from_nanos(self.warm_up.ns().saturating_add(self.duration.ns())),
            warm_up: Duration::from_nanos(self.warm_up.ns()),
            timeout: Duration::from_nanos(self.timeout.ns()),
            populate: !self.no_populate,
            workload: Workload {
                keys: self.keys,
                sets: self.sets,
                popularity: self.popularity,
                sizes: self.values,
                seed: self.seed,
            },
            seed: self.seed,
        };
        client.check().map_err(Failure::Usage)?;
        if self.assertions.iter().any(|assertion| assertion.needs_bound().is_some()) {
            return Err(Failure::Usage("a request to a server has no bound; hold it against a time".to_owned()));
        }
        Ok(client)
    }

    pub(super) fn run(self) -> Result<(), Failure> {
        let client = self.client()?;
        self.output.check()?;
        let mut reporter = self.output.reporter()?;
        let mut document = Document::new("measurement", &format!("memcached at {}", client.to));
        document.setting = self.setting(&client);
        let mut samples = true;
        let found = self.compare.run(&mut document, "memcached", text, |name| {
            let outcome = self.once(&client, name, &mut reporter)?;
            samples &= outcome.has_samples();
            Ok((outcome.run(name), outcome.notes()))
        })?;
        let streams = self.compare.judged(&document.runs);
        document.claims = self.assertions.iter().map(|assertion| assertion.check(&streams)).collect();
        let text = format!("{}{}", found.text, show::remarks(&document));
        let live = reporter.finish();
        self.output.finish(&document, &text)?;
        live?;
        if let Some(failure) = found.failure {
            return Err(failure);
        }
        if !samples {
            return Err(Failure::Failed("no request was answered as it should be".to_owned()));
        }
        if document.claims.iter().any(|claim| claim.holds != Some(true)) {
            eprintln!("qjump: a condition does not hold");
            return Err(Failure::DoesNotHold);
        }
        Ok(())
    }

    /// Measures once, and says how it goes.
    fn once(&self, client: &Client, name: &str, reporter: &mut Reporter) -> Result<Outcome, Failure> {
        let (progress, over) = (Progress::default(), std::sync::atomic::AtomicBool::new(false));
        let names = ["memcached".to_owned()];
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    thread::sleep(Duration::from_millis(20));
                    if interrupt::flag().load(Relaxed) {
                        progress.stop();
                    }
                    if progress.sent() == 0 && client.populate && !self.output.results.quiet {
                        tell(&format!("{} of {} keys have their values", progress.populated(), self.keys));
                    }
                }
                end_line(!self.output.results.quiet);
            });
            let outcome = client.run(&progress, &mut |second| {
                reporter.tick(
                    name,
                    &names,
                    &Tick {
                        train: 0,
                        until_ns: second.at_ns + 1_000_000_000,
                        sent: progress.sent(),
                        received: progress.answered(),
                        interval: *second,
                    },
                );
            });
            over.store(true, Relaxed);
            Ok(outcome?)
        })
    }

    fn setting(&self, client: &Client) -> serde_json::Value {
        json!({
            "target": client.to.to_string(),
            "rate_per_s": client.rate,
            "poisson": client.poisson,
            "level": client.level.map(Level::number),
            "connections": client.connections,
            "depth": client.depth,
            "threads": client.threads,
            "keys": client.workload.keys,
            "share_of_sets": client.workload.sets,
            "popularity": format!("{:?}", client.workload.popularity),
            "values": format!("{:?}", client.workload.sizes),
            "populated": client.populate,
            "timeout_ns": self.timeout.ns(),
            "congestion": client.congestion,
            "cpu": client.cpu,
            "seed": client.seed,
        })
    }
}

fn text(run: &Run) -> String {
    format!("{}\n{}\n{}\n\n", run.about, show::run(run), show::figures(run))
}
