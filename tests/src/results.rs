//! Results as a measurement could have left them, for tests of what is made of them. The same seed makes the same.

use qjump::measure::{
    Latencies,
    result::{Claim, Counts, Curve, Document, Figure, Generator, Interval, Run, Sample, Segment, Stream, Worst},
};
use serde_json::json;

/// A source of random numbers: xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators").
pub struct Random(u64);

impl Random {
    /// Begins with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to 1, neither included.
    pub fn share(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Log-normal, by Box and Muller's transform.
    pub fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        let normal = (-2.0 * self.share().ln()).sqrt() * (std::f64::consts::TAU * self.share()).cos();
        median * (sigma * normal).exp()
    }
}

/// How a network delays.
#[derive(Clone, Copy)]
pub struct Network {
    /// The usual time, ns.
    pub median_ns: f64,
    /// How it scatters.
    pub sigma: f64,
    /// The share of messages that the machine holds up, and for how long, ns.
    pub stalls: (f64, f64),
    /// The share that is lost.
    pub loss: f64,
}

/// An idle network.
pub const ALONE: Network = Network { median_ns: 22e3, sigma: 0.25, stalls: (4e-4, 9e5), loss: 0.0 };
/// Behind full queues.
pub const CONTENDED: Network = Network { median_ns: 19e6, sigma: 0.06, stalls: (4e-4, 2e6), loss: 2e-3 };
/// In front of them.
pub const QJUMP: Network = Network { median_ns: 125e3, sigma: 0.3, stalls: (4e-4, 8e5), loss: 1e-4 };

/// Ten seconds of messages at a level.
pub fn stream(random: &mut Random, level: u8, samples: u64, network: Network, bound_ns: Option<u64>) -> Stream {
    const SECONDS: u64 = 10;
    let bound = bound_ns;
    let mut response = Latencies::new(bound);
    let (mut service, mut lateness) = (Latencies::new(None), Latencies::new(None));
    let mut parts = ["app-sched", "sched-snd", "snd-rx", "rx-app"].map(|name| (name, Latencies::new(None)));
    let (mut worst, mut series, mut lost) = (Vec::new(), Vec::new(), 0);
    for second in 0..SECONDS {
        let mut here = Latencies::new(None);
        let mut lost_here = 0;
        for number in second * samples / SECONDS..(second + 1) * samples / SECONDS {
            if random.share() < network.loss {
                lost_here += 1;
                continue;
            }
            let late = random.log_normal(1_500.0, 0.6) as u64;
            let stall = if random.share() < network.stalls.0 { random.log_normal(network.stalls.1, 0.5) } else { 0.0 };
            let took = (random.log_normal(network.median_ns, network.sigma) + stall) as u64;
            for (latencies, time) in [(&mut response, took + late), (&mut here, took + late), (&mut service, took)] {
                latencies.record(time);
            }
            lateness.record(late);
            for ((_, latencies), share) in parts.iter_mut().zip([0.04, 0.06, 0.7, 0.2]) {
                latencies.record((took as f64 * share) as u64 + 300);
            }
            let at_ns = number * SECONDS * 1_000_000_000 / samples;
            worst.push(Worst { sequence: number, at_ns, ns: took + late, lateness_ns: late });
            worst.sort_by_key(|worst| std::cmp::Reverse(worst.ns));
            worst.truncate(10);
        }
        lost += lost_here;
        series.push(Interval {
            at_ns: second * 1_000_000_000,
            samples: here.samples(),
            lost: lost_here,
            p50_ns: here.quantile_ns(0.5),
            p99_ns: here.quantile_ns(0.99),
            max_ns: here.max_ns(),
        });
    }
    let segments = parts.map(|(name, times)| Segment {
        name: name.to_owned(),
        sum: false,
        times: times.distribution(),
        missing: 3,
    });
    Stream {
        name: format!("udp level {level}"),
        sample: Sample::Rtt,
        level: Some(level),
        bound_ns: bound,
        violations: bound.map(|_| response.violations()),
        response: response.distribution(),
        service: Some(service.distribution()),
        lateness: Some(lateness.distribution()),
        segments: segments.to_vec(),
        counts: Some(Counts {
            sent: samples,
            received: samples - lost,
            lost,
            lost_up: Some(lost / 3),
            lost_down: Some(lost - lost / 3),
            ..Counts::default()
        }),
        worst,
        series,
        generator: Some(Generator { limited: false, why: None, real_time: true }),
    }
}

/// One case: level 7, which has a bound, and best effort.
pub fn run(random: &mut Random, name: &str, samples: u64, network: Network, bulk_bps: Option<f64>) -> Run {
    let slower = Network { median_ns: network.median_ns.max(60e3) * 1.8, ..network };
    let figure = |value| Figure { name: "bulk throughput".to_owned(), value, unit: "bit/s".to_owned() };
    Run {
        name: name.to_owned(),
        about: format!("probes, {name}"),
        duration_ns: 10_000_000_000,
        warm_up_ns: 1_000_000_000,
        streams: vec![stream(random, 7, samples, network, Some(2_843_000)), stream(random, 0, samples, slower, None)],
        figures: bulk_bps.map(figure).into_iter().collect(),
    }
}

/// An experiment in three cases, with everything that one can have but curves.
pub fn experiment(seed: u64, samples: u64) -> Document {
    let random = &mut Random::new(seed);
    let mut document = Document::new("switch-queue", "Probes beside iperf3 through one 100 Mbit/s switch port");
    document.command =
        ["qjump", "testbed", "run", "switch-queue", "--assert", "p99.9<300us"].map(str::to_owned).to_vec();
    document.started_unix_ns = 1_795_391_999_000_000_000 + seed;
    document.emulated = true;
    document.host =
        json!({"kernel": "6.18.0", "cpus": 2, "governor": null, "interfaces": [{"name": "eth0", "driver": "veth"}]});
    document.setting =
        json!({"rack": {"hosts": 8, "link_rate_bps": 100_000_000u64, "queueing": "strict"}, "bulk": ["iperf3"]});
    document.runs = vec![
        run(random, "alone", samples, ALONE, None),
        run(random, "contended", samples, CONTENDED, Some(93.6e6)),
        run(random, "qjump", samples, QJUMP, Some(93.5e6)),
    ];
    let claim =
        |claim: &str, holds, measured: &str| Claim { claim: claim.to_owned(), holds, measured: measured.to_owned() };
    document.claims = vec![
        claim("p99 with qjump at least 5 times better than contended", Some(true), "74 times"),
        claim("max < bound with qjump", Some(false), "2.9 ms of 2.843 ms"),
        claim("no CPU of the machine was away for longer than epsilon", None, "not measured"),
    ];
    document.notes = vec!["The probe threads had no CPU of their own.".to_owned()];
    document
}

/// An experiment that is about curves: one over linear axes, one that spans decades.
pub fn sweep(seed: u64) -> Document {
    let random = &mut Random::new(seed);
    let mut document = Document::new("rate-sweep", "memcached against the rate of its level");
    document.emulated = true;
    let mut curve = |picture: &str, name: &str, x: &str, y: &str, value: fn(f64) -> f64| Curve {
        picture: picture.to_owned(),
        name: name.to_owned(),
        x: x.to_owned(),
        y: y.to_owned(),
        points: (1..=20)
            .map(|step| f64::from(step) * 5.0)
            .map(|rate| (rate, value(rate) * random.log_normal(1.0, 0.03)))
            .collect(),
        labels: Vec::new(),
    };
    let rate = "rate of the level, Mbit/s";
    document.curves = vec![
        curve("throughput", "requests", rate, "requests, 1/s", |rate| 40_000.0 * (1.0 - (-rate / 30.0).exp())),
        curve("latency", "p50", rate, "time of a request, us", |rate| 150.0 + 60_000.0 * (-rate / 8.0).exp()),
        curve("latency", "p99", rate, "time of a request, us", |rate| 400.0 + 300_000.0 * (-rate / 8.0).exp()),
    ];
    document.runs = vec![run(random, "50mbit", 5_000, QJUMP, None)];
    document
}
