//! `qjump sim`: the planner's bounds, attacked.

use std::{fmt::Write as _, fs, path::PathBuf};

use clap::{Args, Subcommand};
use qjump_ebpf::Level;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{Failure, plan::NetworkArgs, print};
use crate::{
    chart::{Axis, Curve, Mark, Picture},
    plan::{Delays, Model, Plan},
    report::write_file,
    sim::{
        adversary::search,
        campaign::{Campaign, MODELS},
        experiment::{Gap, Sensitivity},
        limiter::Kind,
        outcome::{LevelOutcome, Outcome},
        scenario::{Blocking, Destinations, Load, Phases, Scenario},
        topology::{Routing, Shape},
        trace,
    },
    table::Table,
    units::{Nanos, show_ns},
};

/// Attack a plan's bounds in a packet-level simulation; exit 2 if one is broken
///
/// Describe the network as for `plan`. Hosts have the limiter that the kernel runs; switches serve eight levels
/// strictly. Without a topology, all hosts are at one switch. A given epsilon is used up by the switches; with
/// --hops, switches, frames and NICs are the planned ones.
///
/// In the table: `demoted` travelled at level 0, being too large or of a level that the plan does not have; `refused`
/// were too large and dropped; `late` came after the bound; `lost` found a queue full. A level with a bound holds if
/// none is late or lost.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct SimCommand {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Subcommand)]
enum What {
    Campaign(CampaignCommand),
    Sensitivity(SensitivityCommand),
    Witness(WitnessCommand),
}

#[derive(Args)]
struct RunArgs {
    #[command(flatten)]
    network: NetworkArgs,
    /// star:HOSTS, leaf-spine:LEAVESxHOSTSxSPINES, fat-tree:K or chain:N+N [default: star of all hosts]
    #[arg(long, value_name = "SHAPE")]
    topology: Option<Shape>,
    /// How switches choose among equal paths
    #[arg(long, value_enum, default_value_t)]
    routing: Routing,
    /// How many times faster links between switches are
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    uplink: u32,
    /// What hosts send at each limited level: saturating, poisson:SHARE or onoff:SHARE:PACKETS of its rate
    #[arg(long, value_name = "LOAD", default_value = "saturating", value_parser = load)]
    load: Load,
    /// Where it goes: all to the last host, each to the next host, or anywhere
    #[arg(long, value_enum, default_value_t)]
    destinations: Destinations,
    /// When hosts begin
    #[arg(long, value_enum, default_value_t)]
    phases: Phases,
    /// Packets of random sizes instead of the largest
    #[arg(long)]
    mixed: bool,
    /// Send the packets of this file instead: lines of time,source,destination,level,bytes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["load", "destinations", "phases", "mixed", "attack", "best_effort", "runs", "epochs"])]
    trace: Option<PathBuf>,
    /// Let an adversary choose when hosts send and where to, in so many runs
    #[arg(long, value_name = "RUNS", conflicts_with_all = ["load", "phases", "runs", "best_effort", "epochs", "mixed"])]
    attack: Option<u32>,
    /// Write the worst schedule that was found as a trace
    #[arg(long, value_name = "FILE", requires = "attack")]
    save: Option<PathBuf>,
    /// Leave out the lower-level frame that every port has always just begun to send
    #[arg(long)]
    no_blocking: bool,
    /// Best effort from every host to any other, as a share of its link; give --buffer with it
    #[arg(long, value_name = "SHARE", requires = "buffer", value_parser = share)]
    best_effort: Option<f64>,
    /// Wire bytes that each of a port's eight queues can hold [default: any number]
    #[arg(long, value_name = "BYTES")]
    buffer: Option<u64>,
    /// Let every host send at every level, whatever its factor
    #[arg(long)]
    everyone: bool,
    /// The hosts' limiter
    #[arg(long, value_enum, default_value_t)]
    limiter: Kind,
    /// Clocks that run up to so many parts in 10^6 fast or slow
    #[arg(long, allow_hyphen_values = true, value_name = "PPM", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    drift: u32,
    /// How many epochs of the slowest level hosts send
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    epochs: u32,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs with seeds that follow each other, together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Draw the distribution of each level with its bound
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a run may simulate, ns: the clock counts picoseconds, and what is sent must also arrive.
const LONGEST_NS: f64 = 1e15;

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) && share > 0.0 => Ok(share),
        _ => Err("give a share above 0 and at most 1".to_owned()),
    }
}

fn load(text: &str) -> Result<Load, String> {
    let usage = || "give saturating, poisson:SHARE or onoff:SHARE:PACKETS, for example poisson:0.8".to_owned();
    let parts: Vec<&str> = text.split(':').collect();
    match parts[..] {
        ["saturating"] => Ok(Load::Saturating),
        ["poisson", part] => share(part).map(Load::Poisson),
        ["onoff", part, packets] => {
            let packets = packets.parse().ok().filter(|packets| (1..=1_000_000).contains(packets)).ok_or_else(usage)?;
            Ok(Load::OnOff(share(part)?, packets))
        }
        _ => Err(usage()),
    }
}

impl SimCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        match &self.what {
            Some(What::Campaign(command)) => command.run(),
            Some(What::Sensitivity(command)) => command.run(),
            Some(What::Witness(command)) => command.run(),
            None => self.run.run(),
        }
    }
}

impl RunArgs {
    fn scenario(&self) -> Result<Scenario, Failure> {
        let (answer, _) = self.network.plan(false)?;
        let plan = answer.plan;
        let hosts = plan.network.hosts;
        let shape = self.topology.clone().unwrap_or(Shape::Star { hosts });
        if !(2..=hosts).contains(&shape.hosts()) {
            return Err(Failure::Usage(format!(
                "the topology {shape} has {} hosts and the plan {hosts}; a plan holds for 2 hosts up to as many as it counts",
                shape.hosts()
            )));
        }
        if matches!(shape, Shape::Chain { .. }) && self.destinations != Destinations::One {
            return Err(Failure::Usage(format!("{shape} leads to its last host alone; use --destinations one")));
        }
        let longest_ns = plan.levels.iter().filter_map(|level| level.epoch_ns).fold(0.0, f64::max);
        if longest_ns * f64::from(self.epochs) > LONGEST_NS {
            return Err(Failure::Usage(format!(
                "{} epochs of {} are more than the simulator's clock counts, {}; give fewer --epochs",
                self.epochs,
                show_ns(longest_ns),
                show_ns(LONGEST_NS)
            )));
        }
        let (switch_delay, mtu, host_burst) = self.fixed(&plan, &shape)?;
        Ok(Scenario {
            plan,
            shape,
            routing: self.routing,
            uplink: self.uplink,
            switch_delay,
            load: self.load,
            destinations: self.destinations,
            phases: self.phases,
            mixed: self.mixed,
            limiter: self.limiter,
            mtu,
            blocking: if self.no_blocking { Blocking::None } else { Blocking::Whole },
            host_burst,
            best_effort: self.best_effort,
            everyone: self.everyone,
            buffer: self.buffer,
            drift_ppm: self.drift,
            epochs: self.epochs,
            seed: self.seed,
        })
    }

    /// A switch's delay, the MTU, and what a NIC may have begun to send, that agree with the plan's fixed delays.
    fn fixed(&self, plan: &Plan, shape: &Shape) -> Result<(Nanos, u32, u32), Failure> {
        let hops = shape.hops();
        match plan.network.delays {
            Delays::Path(path) if path.hops >= hops => Ok((path.switch_delay, path.mtu, path.host_burst)),
            Delays::Path(path) => Err(Failure::Usage(format!(
                "the topology {shape} has {hops} switches on its longest path, and the plan counts {}; give --hops {hops}",
                path.hops
            ))),
            Delays::Given(epsilon) => {
                // What is not the switches': store and forward, and lower frames at every port.
                let mtu = plan.network.mtu();
                let path = crate::plan::Path { hops, switch_delay: Nanos::from_ns(0), mtu, host_burst: 0 };
                let wire = f64::from(mtu + plan.network.overhead());
                let largest = plan.levels.iter().map(|level| level.largest_frame(mtu)).max().unwrap_or(mtu);
                let packet = f64::from(largest + plan.network.overhead());
                let lower = if self.no_blocking { 0.0 } else { wire };
                let taken = Delays::Path(path).fixed(packet, lower, plan.network.link_rate).total_ns();
                let left = epsilon.ns() as f64 - taken;
                if left < 0.0 {
                    return Err(Failure::Usage(format!(
                        "epsilon {epsilon} is less than the {} that store and forward and lower frames take on {shape}; \
                         give more, or --hops {hops} --switch-delay TIME and let the plan add them up",
                        show_ns(taken)
                    )));
                }
                Ok((Nanos::from_ns((left / f64::from(hops)) as u64), mtu, 0))
            }
        }
    }

    fn run(&self) -> Result<(), Failure> {
        let scenario = self.scenario()?;
        for path in [&self.svg, &self.save].into_iter().flatten() {
            check_folder(path)?;
        }
        if self.svg.is_some() && self.svg == self.save {
            return Err(Failure::Usage("--svg and --save name the same file; give two".to_owned()));
        }
        let outcome = if let Some(path) = &self.trace {
            let shown = path.display();
            let text = fs::read_to_string(path)
                .map_err(|error| Failure::Usage(format!("cannot read the trace {shown}: {error}")))?;
            let (scripts, last) = trace::parse(&text, scenario.shape.hosts())
                .map_err(|error| Failure::Usage(format!("{shown}: {error}")))?;
            // What the limiter holds goes later.
            scenario.run_scripts(scripts, (last.ns() + 1).saturating_mul(1_000).saturating_add(scenario.length_ps()))
        } else if let Some(steps) = self.attack {
            let found = search(&scenario, steps.max(1));
            if let Some(path) = &self.save {
                let command: Vec<String> = std::env::args().collect();
                save(path, &command.join(" "), &found.scripts)?;
            }
            scenario.run_scripts(found.scripts, u64::MAX)
        } else {
            let mut outcomes: Vec<Outcome> = (0..self.runs)
                .into_par_iter()
                .map(|run| Scenario { seed: self.seed.wrapping_add(run), ..scenario.clone() }.run())
                .collect();
            // In the order of seeds, so that the number of threads does not show.
            let mut all = outcomes.remove(0);
            outcomes.iter().for_each(|outcome| all.merge(outcome));
            all
        };
        if let Some(path) = &self.svg {
            picture(path, &scenario, &outcome)?;
        }
        if self.json {
            print(format!("{:#}", to_json(&scenario, &outcome, self.seed)))?;
        } else {
            show(&scenario, &outcome)?;
        }
        let broken = outcome.levels.iter().zip(scenario.bounds_ps()).any(|(level, bound)| level.broken(bound));
        if broken { Err(Failure::DoesNotHold) } else { Ok(()) }
    }
}

/// Says before the work, not after it, that a file cannot be written.
fn check_folder(path: &std::path::Path) -> Result<(), Failure> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder {
        Some(folder) if !folder.is_dir() => {
            Err(Failure::Failed(format!("cannot write {}: there is no folder {}", path.display(), folder.display())))
        }
        _ if path.is_dir() => Err(Failure::Failed(format!("cannot write {}: it is a folder", path.display()))),
        _ => Ok(()),
    }
}

/// Writes a trace with the command that made it.
fn save(path: &std::path::Path, command: &str, scripts: &[crate::sim::source::Script]) -> Result<(), Failure> {
    fs::write(path, format!("# {command}\n{}", trace::write(scripts)))
        .map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))
}

fn seen(outcome: &Outcome) -> impl Iterator<Item = Level> {
    let seen: Vec<Level> = (0..qjump_ebpf::LEVELS as u8)
        .rev()
        .filter_map(Level::new)
        .filter(|level| {
            let level = &outcome.levels[level.index()];
            level.sent + level.refused + level.demoted > 0
        })
        .collect();
    seen.into_iter()
}

fn ns(ps: u64) -> f64 {
    ps as f64 / 1e3
}

fn show(scenario: &Scenario, outcome: &Outcome) -> Result<(), Failure> {
    let mut table = Table::new([
        "level",
        "sent",
        "demoted",
        "refused",
        "lost",
        "p50",
        "p99",
        "p99.9",
        "max",
        "bound",
        "max / bound",
        "late",
    ]);
    for level in seen(outcome) {
        let result = &outcome.levels[level.index()];
        let bound = scenario.plan.level(level).and_then(|plan| plan.bound_ns);
        let at = |quantile: f64| result.quantile_ns(quantile).map_or("-".to_owned(), show_ns);
        table.row([
            level.to_string(),
            result.sent.to_string(),
            result.demoted.to_string(),
            result.refused.to_string(),
            result.lost.to_string(),
            at(0.5),
            at(0.99),
            at(0.999),
            longest(result).map_or("-".to_owned(), show_ns),
            bound.map_or("-".to_owned(), show_ns),
            bound.zip(longest(result)).map_or("-".to_owned(), |(bound, longest)| format!("{:.3}", longest / bound)),
            bound.map_or("-".to_owned(), |_| result.violations.to_string()),
        ]);
    }
    let mut text = format!(
        "{table}\nSimulated: {} of {} hosts, {} frames sent by ports, at most {} packets at once.",
        scenario.shape,
        scenario.shape.hosts(),
        outcome.packet_hops,
        outcome.most_in_flight
    );
    if let Delays::Path(path) = scenario.plan.network.delays
        && path.hops > scenario.shape.hops()
    {
        let _ = write!(
            text,
            " The plan counts {} switches on a path, the longest here has {}.",
            path.hops,
            scenario.shape.hops()
        );
    }
    let bounds = scenario.bounds_ps();
    for level in seen(outcome).filter(|level| outcome.levels[level.index()].broken(bounds[level.index()])) {
        let result = &outcome.levels[level.index()];
        let _ = write!(text, "\nBROKEN: level {level}: {} late, {} lost", result.violations, result.lost);
        if result.violations > 0 {
            let worst = result.worst;
            let sent = show_ns(ns(worst.sent_ps));
            let _ =
                write!(text, "; the worst from host {} to host {}, sent at {sent}", worst.source, worst.destination);
        }
    }
    print(text)
}

/// The longest time in the network, ns, if any packet arrived.
fn longest(result: &LevelOutcome) -> Option<f64> {
    (result.delivered_count() > 0).then(|| ns(result.max_ps))
}

fn to_json(scenario: &Scenario, outcome: &Outcome, seed: u64) -> Value {
    let levels: Vec<Value> = seen(outcome)
        .map(|level| {
            let result = &outcome.levels[level.index()];
            let bound = scenario.plan.level(level).and_then(|plan| plan.bound_ns);
            let at = |quantile: f64| result.quantile_ns(quantile);
            json!({
                "level": level.number(),
                "sent": result.sent,
                "delivered": result.delivered_count(),
                "lost": result.lost,
                "demoted": result.demoted,
                "refused": result.refused,
                "p50_ns": at(0.5),
                "p99_ns": at(0.99),
                "p999_ns": at(0.999),
                "max_ns": longest(result),
                "bound_ns": bound,
                "tightness": bound.zip(longest(result)).map(|(bound, longest)| longest / bound),
                "violations": bound.map(|_| result.violations),
                "held": bound.map(|_| !result.broken(scenario.bounds_ps()[level.index()])),
                "worst": longest(result).map(|_| json!({
                    "source": result.worst.source,
                    "destination": result.worst.destination,
                    "sent_ns": ns(result.worst.sent_ps),
                })),
            })
        })
        .collect();
    json!({
        "schema_version": 1,
        "topology": scenario.shape.to_string(),
        "hosts": scenario.shape.hosts(),
        "model": scenario.plan.network.model,
        "seed": seed,
        "packet_hops": outcome.packet_hops,
        "most_in_flight": outcome.most_in_flight,
        "levels": levels,
    })
}

fn picture(path: &std::path::Path, scenario: &Scenario, outcome: &Outcome) -> Result<(), Failure> {
    let mut curves = Vec::new();
    let mut bounds = Vec::new();
    for level in seen(outcome) {
        let Some(times) = outcome.levels[level.index()].times() else { continue };
        let total = times.len() as f64;
        let mut above = total;
        let mut points = Vec::new();
        for value in times.iter_recorded() {
            points.push((value.value_iterated_to().max(1) as f64, above / total));
            above -= value.count_since_last_iteration() as f64;
        }
        curves.push(Curve { name: format!("level {level}"), points });
        if let Some(bound) = scenario.plan.level(level).and_then(|plan| plan.bound_ns) {
            bounds.push((format!("bound {level}:"), bound));
        }
    }
    let title = format!("Simulated: {} of {} hosts", scenario.shape, scenario.shape.hosts());
    let picture = Picture::ccdf(&title, "time in the network", "share of packets that took longer", curves, &bounds);
    Ok(write_file(path, picture.svg().as_bytes())?)
}

/// Attack random networks of all models; exit 2 if a promise is broken
///
/// Networks that cannot be planned are left out, so the counts add up to a little less.
#[derive(Args)]
struct CampaignCommand {
    /// How many networks
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    networks: u64,
    /// Seed of the first network
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs of the adversary on each network
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// One model alone
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Beyond the promise: level 7 alone, many destinations, and an epoch of so many times the bound
    #[arg(long, value_name = "FACTOR")]
    stretch: Option<f64>,
    /// Attack the network of this number alone, and describe it
    #[arg(long, value_name = "NUMBER", conflicts_with = "json")]
    network: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn name(value: impl serde::Serialize) -> String {
    json!(value).as_str().unwrap_or_default().to_owned()
}

fn describe(campaign: &Campaign, index: u64) -> Result<(), Failure> {
    let scenario = campaign
        .network(index)
        .map_err(|error| Failure::Usage(format!("network {index} has no plan and was left out: {error}")))?;
    let (worst, runs) = campaign.attack(&scenario);
    let network = &scenario.plan.network;
    let mut table = Table::new(["level", "factor", "charge", "max packet", "epoch", "bound"]);
    for level in &scenario.plan.levels {
        table.row([
            level.spec.level.to_string(),
            level.factor.map_or("-".to_owned(), |factor| format!("{factor:.3}")),
            format!("{:?}", level.charge).to_lowercase(),
            format!("{} B", level.max_packet),
            level.epoch_ns.map_or("-".to_owned(), show_ns),
            level.bound_ns.map_or("-".to_owned(), show_ns),
        ]);
    }
    print(format!(
        "Network {index}: {}, links of {} (between switches {} times as fast), switches of {}, frames of up to {} B{}, \
         destinations: {:?}, model {}.\n{table}Worst time over bound: {worst:.3}, of {runs} runs.",
        scenario.shape,
        network.link_rate,
        scenario.uplink,
        scenario.switch_delay,
        network.mtu(),
        match scenario.blocking {
            Blocking::None => "",
            Blocking::Whole => ", lower frames in the way",
            Blocking::Part => ", parts of lower frames in the way",
        },
        scenario.destinations,
        name(network.model),
    ))?;
    if worst > 1.0 { Err(Failure::DoesNotHold) } else { Ok(()) }
}

impl CampaignCommand {
    fn run(&self) -> Result<(), Failure> {
        if let Some(stretch) = self.stretch.filter(|stretch| !(0.01..=100.0).contains(stretch)) {
            return Err(Failure::Usage(format!("--stretch {stretch}: give a number from 0.01 to 100")));
        }
        if self.stretch.is_some() && self.model.is_some_and(|model| model != Model::FanIn) {
            return Err(Failure::Usage(
                "--stretch is for the model fan-in, which promises least beyond one destination".to_owned(),
            ));
        }
        let campaign = Campaign {
            networks: self.networks,
            seed: self.seed,
            steps: self.steps,
            model: self.stretch.map_or(self.model, |_| Some(Model::FanIn)),
            stretch: self.stretch,
        };
        if let Some(index) = self.network {
            return describe(&campaign, index);
        }
        let every = (self.networks / 20).max(1);
        let verdicts = campaign.run(|done| {
            if done % every == 0 {
                eprintln!("{done} of {} networks", self.networks);
            }
        });
        let rows: Vec<_> = MODELS.iter().zip(&verdicts).filter(|(_, verdict)| verdict.networks > 0).collect();
        if self.json {
            let models: Vec<_> = rows
                .iter()
                .map(|(model, verdict)| {
                    json!({
                        "model": model,
                        "networks": verdict.networks,
                        "runs": verdict.runs,
                        "broken": verdict.broken,
                        "within_10_percent": verdict.tight,
                        "worst": verdict.worst.0,
                        "worst_network": verdict.worst.1,
                    })
                })
                .collect();
            print(format!("{:#}", json!({ "schema_version": 1, "seed": self.seed, "models": models })))?;
        } else {
            let mut table =
                Table::new(["model", "networks", "runs", "worst time / bound", "in network", "above 0.9", "broken"]);
            for (model, verdict) in rows {
                table.row([
                    name(model),
                    verdict.networks.to_string(),
                    verdict.runs.to_string(),
                    format!("{:.3}", verdict.worst.0),
                    verdict.worst.1.to_string(),
                    verdict.tight.to_string(),
                    verdict.broken.to_string(),
                ]);
            }
            print(table.to_string().trim_end())?;
        }
        if verdicts.iter().any(|verdict| verdict.broken > 0) { Err(Failure::DoesNotHold) } else { Ok(()) }
    }
}

/// The longest time in the network against the factor, as in the last figure of the paper
#[derive(Args)]
struct SensitivityCommand {
    /// Hosts that send to one more
    #[arg(long, value_name = "N", default_value_t = 66, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    hosts: u32,
    /// L2 bytes of every packet, on links of 10 Gbit/s
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u32).range(64..=9_000))]
    max_packet: u32,
    /// Fixed delays, all of which the network uses up
    #[arg(long, value_name = "TIME", default_value = "12us")]
    epsilon: Nanos,
    /// Seed of the random phases
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Draw it
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl SensitivityCommand {
    fn run(&self) -> Result<(), Failure> {
        let usage = |error: crate::plan::PlanError| Failure::Usage(error.to_string());
        let factors = std::iter::successors(Some(0.84), |factor| Some(factor + 0.07)).take_while(|&f| f < 3.51);
        let sensitivity = Sensitivity {
            hosts: self.hosts,
            max_packet: self.max_packet,
            epsilon: self.epsilon,
            // 1 itself, too: there is the edge of the promise.
            factors: factors
                .flat_map(|f: f64| if f < 1.0 && f + 0.07 > 1.0 { vec![f, 1.0] } else { vec![f] })
                .collect(),
            seed: self.seed,
        };
        let least_ns = sensitivity.store_and_forward_ns();
        if (sensitivity.epsilon.ns() as f64) < least_ns {
            return Err(Failure::Usage(format!(
                "epsilon {} is less than the {} that store and forward takes; give more",
                sensitivity.epsilon,
                show_ns(least_ns)
            )));
        }
        if let Some(path) = &self.svg {
            check_folder(path)?;
        }
        let bound_ns = sensitivity.bound_ns().map_err(usage)?;
        let points = sensitivity.run().map_err(usage)?;
        if let Some(path) = &self.svg {
            let curve = |name: &str, value: fn(&crate::sim::experiment::Point) -> f64| Curve {
                name: name.to_owned(),
                points: points.iter().map(|point| (point.factor, value(point) / 1e3)).collect(),
            };
            let curves = vec![
                curve("random phases", |point| point.random_ns),
                curve("aligned, window", |point| point.window_ns),
                curve("aligned", |point| point.aligned_ns),
            ];
            let title = format!("Simulated: {} hosts send to one, each f packets an epoch", self.hosts);
            let bound = Mark { name: format!("bound at f = 1: {}", show_ns(bound_ns)), at: bound_ns / 1e3 };
            let longest =
                curves.iter().flat_map(|curve| curve.points.iter()).map(|point| point.1).fold(bound.at, f64::max);
            // What grows without end leaves the picture rather than flattening the rest.
            let top = longest.min(4.0 * bound.at) * 1.05;
            let (x, y) = (Axis::linear("factor f"), Axis::linear("longest time in the network, us").over(0.0, top));
            let picture = Picture { across: vec![bound], ..Picture::new(title, x, y, curves) };
            write_file(path, picture.svg().as_bytes())?;
        }
        if self.json {
            let points: Vec<Value> = points
                .iter()
                .map(|point| {
                    json!({
                        "factor": point.factor,
                        "aligned_ns": point.aligned_ns,
                        "random_ns": point.random_ns,
                        "window_ns": point.window_ns,
                        "at_once_bytes": point.at_once,
                        "window_at_once_bytes": point.window_at_once,
                    })
                })
                .collect();
            return print(format!("{:#}", json!({ "schema_version": 1, "bound_ns": bound_ns, "points": points })));
        }
        let mut table = Table::new([
            "factor",
            "aligned",
            "random phases",
            "aligned, window limiter",
            "bound at f = 1",
            "one host at once",
            "across a window's edge",
        ]);
        for point in &points {
            let mark = |ns: f64| format!("{}{}", show_ns(ns), if ns > bound_ns { " !" } else { "  " });
            table.row([
                format!("{:.2}", point.factor),
                mark(point.aligned_ns),
                mark(point.random_ns),
                mark(point.window_ns),
                show_ns(bound_ns),
                format!("{} B", point.at_once),
                format!("{} B", point.window_at_once),
            ]);
        }
        let last = |value: fn(&crate::sim::experiment::Point) -> f64| {
            let holding = points.iter().take_while(|point| value(point) <= bound_ns).last();
            holding.map_or("none".to_owned(), |point| format!("{:.2}", point.factor))
        };
        print(format!(
            "{table}\nThe bound of f = 1 holds up to f = {} with the worst phases and up to f = {} with random ones (!: broken).",
            last(|point| point.aligned_ns),
            last(|point| point.random_ns)
        ))
    }
}

/// A network in which published reasoning breaks: a window limiter, or counting bytes
#[derive(Args)]
struct WitnessCommand {
    /// What is overlooked
    #[arg(value_enum)]
    gap: Gap,
    /// Runs of the adversary
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    steps: u32,
    /// Seed of the adversary
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the schedule as a trace
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

impl WitnessCommand {
    fn run(&self) -> Result<(), Failure> {
        if let Some(path) = &self.save {
            check_folder(path)?;
        }
        let (scenario, found) = self.gap.witness(self.seed, self.steps.max(1));
        let again = format!(
            "qjump sim --model paper --hosts {} --link-rate {} --max-packet {} --epsilon {}ns --no-blocking --topology {} {} \
             --trace FILE",
            scenario.shape.hosts(),
            scenario.plan.network.link_rate,
            scenario.plan.network.max_packet,
            scenario.plan.epsilon_ns(),
            scenario.shape,
            match self.gap {
                Gap::Window => "--level 7:1 --limiter window",
                Gap::Bytes => "--level 7:1,charge=bytes",
            }
        );
        if let Some(path) = &self.save {
            save(path, &again, &found.scripts)?;
        }
        let bound_ns = scenario.plan.levels.first().and_then(|level| level.bound_ns).unwrap_or(f64::NAN);
        print(format!(
            "{}, {} hosts, {} B at {}: the published bound is {}. Host {}'s packet of {} to host {} took {}: {:.3} of it.\n\
             It is the worst of a built-in schedule and {} runs of the adversary from there on. Saved (--save FILE), it can \
             be run again:\n{again}",
            scenario.shape,
            scenario.shape.hosts(),
            scenario.plan.network.max_packet,
            scenario.plan.network.link_rate,
            show_ns(bound_ns),
            found.worst.source,
            show_ns(ns(found.worst.sent_ps)),
            found.worst.destination,
            show_ns(found.ratio * bound_ns),
            found.ratio,
            found.runs
        ))
    }
}
