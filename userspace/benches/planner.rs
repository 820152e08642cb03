//! How long planning takes, forwards and backwards, and how fast the simulator is.

use std::{hint::black_box, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use qjump::{
    plan::{
        Delays, Demand, LevelSpec, Model, Network, Path,
        backward::{App, Unserved},
    },
    sim::{
        limiter::Kind,
        scenario::{Blocking, Destinations, Load, Phases, Scenario},
        topology::{Routing, Shape},
    },
    units::Nanos,
};
use qjump_ebpf::Level;

fn network(hosts: u32, levels: &[(u8, f64)], model: Model, hops: u32) -> Network {
    Network {
        hosts,
        link_rate: "100gbit".parse().expect("a rate"),
        max_packet: 256,
        delays: Delays::Path(Path { hops, switch_delay: Nanos::from_ns(500), mtu: 1_514, host_burst: 0 }),
        wire_overhead: 24,
        tagged: false,
        model,
        levels: levels
            .iter()
            .map(|&(level, factor)| LevelSpec::new(Level::new(level).expect("a level"), Demand::Factor(factor)))
            .collect(),
    }
}

fn scenario(shape: Shape, destinations: Destinations, epochs: u32) -> Scenario {
    let network = network(shape.hosts(), &[(7, 1.0)], Model::FanIn, shape.hops());
    Scenario {
        plan: network.plan().expect("a plan"),
        shape,
        routing: Routing::Destination,
        uplink: 1,
        switch_delay: Nanos::from_ns(500),
        load: Load::Saturating,
        destinations,
        phases: Phases::Random,
        mixed: false,
        limiter: Kind::Gcra,
        mtu: 1_514,
        blocking: Blocking::Whole,
        host_burst: 0,
        best_effort: None,
        everyone: false,
        buffer: None,
        drift_ppm: 0,
        epochs,
        seed: 1,
    }
}

fn apps(count: u32, deadline_us: u32) -> Vec<App> {
    (0..count)
        .map(|i| App {
            name: format!("app{i}"),
            message: 100 + i * 5 % 1_000,
            per_second: 5.0 + f64::from(i % 7),
            deadline: Nanos::from_ns(u64::from(deadline_us + deadline_us * i / 20) * 1_000),
            level: None,
        })
        .collect()
}

fn planning(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    let levels = [(7, 1.0), (6, 1.0), (5, 0.5), (4, 1.0), (3, 4.0), (2, 16.0), (1, 100.0)];
    let large = network(10_000, &levels, Model::Strict, 5);
    assert_eq!(large.plan().map(|plan| plan.levels.len()), Ok(7));
    group.bench_function("forwards, 10000 hosts, 8 levels", |bencher| bencher.iter(|| black_box(&large).plan()));
    let small = network(100, &[], Model::Strict, 3);
    for (name, apps) in [
        ("backwards, 8 applications", apps(8, 500)),
        ("backwards, 200 applications", apps(200, 3_000)),
        ("backwards, 8 applications, impossible", apps(8, 6)),
        ("backwards, 200 applications, impossible", apps(200, 60)),
    ] {
        let late = match small.assign(&apps) {
            Ok(_) => false,
            Err(Unserved::Missed(_)) => true,
            Err(error) => panic!("{name}: {error}"),
        };
        assert_eq!(late, name.ends_with("impossible"), "{name}");
        group.bench_function(name, |bencher| bencher.iter(|| small.assign(black_box(&apps))));
    }
    group.finish();
}

fn simulating(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sim");
    for (name, shape, destinations, epochs) in [
        ("fan-in, 1000 hosts at a switch", "star:1000", Destinations::One, 20),
        ("any to any, 1024 hosts in a fat tree", "fat-tree:16", Destinations::Any, 20),
        ("any to any, 480 hosts in two tiers", "leaf-spine:20x24x8", Destinations::Any, 40),
    ] {
        let scenario = scenario(shape.parse().expect("a shape"), destinations, epochs);
        // Elements are packet-hops: frames that a port sent.
        group.throughput(Throughput::Elements(scenario.run().packet_hops));
        group.bench_function(name, |bencher| bencher.iter_batched(|| &scenario, Scenario::run, BatchSize::LargeInput));
    }
    group.finish();

    // Once, because it is a promise about time and memory and not a rate.
    let large = scenario("star:10000".parse().expect("a shape"), Destinations::One, 100);
    let large = Scenario { phases: Phases::Aligned, ..large };
    let start = std::time::Instant::now();
    let outcome = large.run();
    println!(
        "sim/fan-in, 10000 hosts, 100 epochs: {:.2} s, {} packet-hops, at most {} packets at once, {} of memory at most",
        start.elapsed().as_secs_f64(),
        outcome.packet_hops,
        outcome.most_in_flight,
        peak_memory()
    );
}

/// The most memory that this process ever had, as the kernel tells it.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or("an unknown amount".to_owned(), |value| value.trim().to_owned())
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    targets = planning, simulating
}
criterion_main!(benches);
