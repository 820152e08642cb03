//! Our own probe between two hosts of a rack, with each way alone by the machine's one clock and the kernel's stamps.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::RngExt;

use super::lab::{Lab, PROBE_CPU};
use crate::{
    measure::{
        Arrivals, Bounds, Clocks, Transport,
        result::{Run, Stream},
        train::{self, Spec, Watch},
    },
    socket::Level,
    units::Nanos,
};

/// UDP probes from one host to another, and answers at the same level.
#[derive(Clone, Copy, Debug)]
pub struct Train {
    /// Who asks.
    pub from: usize,
    /// Who answers.
    pub to: usize,
    /// At which level.
    pub level: Level,
    /// Between two probes: no shorter than the level's epoch.
    pub interval: Nanos,
    /// How many.
    pub count: u64,
    /// What is promised for one way.
    pub bound_ns: Option<u64>,
}

/// Bytes of UDP payload.
const PAYLOAD: usize = 64;
/// How early a packet of a level that drops may come: timers are not exact, and what is early would be lost.
pub const TOLERANCE: Nanos = Nanos::from_ns(200_000);
/// Until threads and caches are warm.
const WARM_UP_NS: u64 = 200_000_000;
/// No queue of a rack is as long.
const TIMEOUT_NS: u64 = 1_000_000_000;

impl Train {
    /// How long it takes, ns.
    pub const fn duration_ns(&self) -> u64 {
        self.count * self.interval.ns()
    }

    /// Runs it: the way from asker to answerer, which is what is promised something, and the round trip.
    ///
    /// # Errors
    /// If a socket fails, or no probe arrives.
    pub fn run(&self, lab: &Lab<'_>) -> Result<Vec<Stream>> {
        let sockets = (lab.socket(self.from, 0, self.level)?, lab.socket(self.to, 0, self.level)?);
        train::connect(&sockets.0, &sockets.1)?;
        let spec = Spec {
            trains: vec![train::Train {
                transport: Transport::Udp,
                level: self.level,
                payload: PAYLOAD,
                arrivals: Arrivals::Fixed(self.interval.ns() as f64),
                bounds: Bounds { up_ns: self.bound_ns, down_ns: None },
            }],
            warm_up_ns: WARM_UP_NS,
            duration_ns: self.duration_ns(),
            timeout_ns: TIMEOUT_NS,
            cpu: Some(PROBE_CPU),
            spin_ns: 0,
            clocks: Clocks::Same,
            seed: lab.setup.seed,
        };
        // The seed decides how probes lie to what else goes on at fixed times.
        let phase = lab.random(self.from as u64).random_range(0..self.interval.ns());
        lab.pause(Duration::from_nanos(phase))?;
        let mut watch = Watch { stop: lab.cancelled, tick: &mut |_| {} };
        let mut measured = train::run(&spec, vec![sockets], Some(PROBE_CPU), &mut watch)?;
        lab.check()?;
        let name = format!("udp level {}", self.level);
        let mut take = |name: &str| {
            let found = measured.streams.iter().position(|stream| stream.name == name);
            found.map(|at| measured.streams.swap_remove(at)).with_context(|| format!("no stream {name}"))
        };
        let streams = vec![take(&format!("{name} up"))?, take(&name)?];
        ensure!(streams[0].response.samples > 0, "no probe arrived");
        Ok(streams)
    }

    /// A run with these streams.
    pub fn as_run(&self, streams: Vec<Stream>, load: &super::load::Load) -> Run {
        let warm_up_ns = load.warm_up().as_nanos() as u64 + WARM_UP_NS;
        Run { duration_ns: self.duration_ns(), warm_up_ns, streams, ..Run::default() }
    }
}
