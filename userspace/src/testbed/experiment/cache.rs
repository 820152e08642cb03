//! Debian's memcached on one host, and our open-loop client on another.

use std::{
    fs,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use anyhow::Result;
use qjump_ebpf::Level;
use serde_json::{Value, json};

use super::lab::{Lab, PROBE_CPU};
use crate::measure::memcached::{Client, Outcome, Progress, Workload};

const PORT: u16 = 11_211;
/// Until TCP has found its pace.
pub const WARM_UP: Duration = Duration::from_secs(2);
/// Of the server: the one that any namespace may choose. The machine's default may be BBR, which takes a request now and
/// then for a slow network, and answers late on an idle one.
const CONGESTION: &str = "reno";

/// Who asks whom, and how.
#[derive(Clone, Debug)]
pub struct Cache {
    /// Where memcached runs.
    pub server: usize,
    /// Where it is asked from.
    pub client: usize,
    /// Requests a second, as a Poisson process.
    pub rate: f64,
    /// How many connections.
    pub connections: usize,
    /// How many answers each may owe.
    pub depth: usize,
    /// What is asked.
    pub workload: Workload,
    /// How long is measured, after [`WARM_UP`].
    pub duration: Duration,
}

impl Cache {
    /// As it is written into results.
    pub fn to_json(&self) -> Value {
        json!({
            "server": format!("h{}", self.server + 1),
            "client": format!("h{}", self.client + 1),
            "requests_per_s": self.rate,
            "connections": self.connections,
            "depth": self.depth,
            "keys": self.workload.keys,
            "share_of_sets": self.workload.sets,
            "values": format!("{:?}", self.workload.sizes),
            "congestion": CONGESTION,
        })
    }

    /// Starts memcached under `qjump run`, if there is a level, and asks it. Calls back after each second that is measured.
    ///
    /// # Errors
    /// If it cannot be started or asked, or somebody asked for the end.
    pub fn ask(&self, lab: &Lab<'_>, level: Option<Level>, on_second: &mut (dyn FnMut() + Send)) -> Result<Outcome> {
        let (address, port) = (lab.rack.address(self.server), PORT.to_string());
        lab.rack.host(self.server).enter(|| Ok(fs::write("/proc/sys/net/ipv4/tcp_congestion_control", CONGESTION)?))?;
        // A change of user would make it outlive whoever is killed (PR_SET_PDEATHSIG of prctl(2)).
        let words = ["-u", "root", "-l", &address, "-p", &port, "-t", "1"];
        let _server = lab.program(self.server, "memcached").args(words).level(level).cpu(PROBE_CPU).start()?;
        lab.listening(self.server, PORT)?;
        let to = (address.parse::<Ipv4Addr>()?, PORT).into();
        let client = Client {
            level,
            congestion: Some(CONGESTION.into()),
            connections: self.connections,
            depth: self.depth,
            rate: self.rate,
            duration: WARM_UP + self.duration,
            warm_up: WARM_UP,
            cpu: Some(PROBE_CPU),
            workload: self.workload.clone(),
            seed: lab.setup.seed,
            ..Client::new(to)
        };
        let (progress, over) = (Progress::default(), AtomicBool::new(false));
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    if lab.check().is_err() {
                        progress.stop();
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let outcome = lab.rack.host(self.client).enter(|| client.run(&progress, &mut |_| on_second()));
            over.store(true, Relaxed);
            outcome
        })?;
        lab.check()?;
        Ok(outcome)
    }
}
