//! `qjump plan`, and the flags that describe a network.

use std::{path::PathBuf, str::FromStr};

use clap::{ArgGroup, Args};
use qjump_ebpf::Level;
use serde_json::json;

use super::{Failure, print};
use crate::{
    config::{Answer, File, Host, LevelArg, OversizeRule, delays},
    plan::{Delays, Explanation, Model, Network, default_wire_overhead, difference},
    units::{self, Nanos, Rate},
};

/// Compute epochs, rates and bounds; touches nothing
#[derive(Args)]
pub struct PlanCommand {
    #[command(flatten)]
    network: NetworkArgs,
    /// Count the 802.1Q tag that `load --pcp` gives to frames
    #[arg(long)]
    pcp: bool,
    /// Say what the bound of a level is made of, term by term
    #[arg(long, value_name = "LEVEL", conflicts_with_all = ["json", "what_if"])]
    explain: Option<u8>,
    /// Show what a change would do, e.g. hosts=300; also link-rate, max-packet, epsilon, model and level;
    /// repeatable
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "json")]
    what_if: Vec<WhatIf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A network, from a file or from flags.
#[derive(Args, Clone)]
#[command(group = ArgGroup::new("source").required(true).args(["config", "hosts"]))]
#[command(group = ArgGroup::new("delays").args(["epsilon", "hops"]))]
pub struct NetworkArgs {
    /// Read the network and its levels or applications from a TOML file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["hosts", "link_rate", "max_packet", "delays", "level"])]
    pub(super) config: Option<PathBuf>,
    /// Hosts that may send: the n of the bound
    #[arg(long, allow_hyphen_values = true, value_name = "N", requires_all = ["link_rate", "max_packet", "delays", "level"])]
    pub(super) hosts: Option<u32>,
    /// Rate of the slowest link, e.g. 10gbit
    #[arg(long, allow_hyphen_values = true, value_name = "RATE")]
    link_rate: Option<Rate>,
    /// Largest packet of guaranteed levels: bytes with the Ethernet header, without FCS
    #[arg(long, allow_hyphen_values = true, value_name = "BYTES", value_parser = units::bytes)]
    max_packet: Option<u32>,
    /// Sum of the fixed delays of a path, e.g. 4us
    #[arg(long, allow_hyphen_values = true, value_name = "TIME")]
    epsilon: Option<Nanos>,
    /// Instead of epsilon: switches on the longest path, and so the fixed delays from what is on it
    #[arg(long, value_name = "N", requires = "switch_delay")]
    hops: Option<u32>,
    /// Forwarding delay of one switch with its cable, e.g. 500ns
    #[arg(long, value_name = "TIME", requires = "hops")]
    switch_delay: Option<Nanos>,
    /// Largest frame of lower levels, which may be on the wire already [default: 1514]
    #[arg(long, value_name = "BYTES", requires = "hops", value_parser = units::bytes)]
    mtu: Option<u32>,
    /// Wire bytes of lower levels that the sender's NIC may have begun to send; give 1538 if GSO is capped to one
    /// frame [default: a GSO burst, 65536]
    #[arg(long, value_name = "BYTES", requires = "hops", value_parser = units::bytes)]
    host_burst: Option<u32>,
    /// A level and its throughput factor, e.g. 7:1 (guaranteed), 5:4 or 3:unlimited, or its rate, 5:100mbit;
    /// then ,max-packet=BYTES ,charge=packet|bytes ,burst=BYTES ,tolerance=TIME ,oversize=drop|demote
    /// ,over=police|pace|demote ,claims=grant-only; repeatable
    #[arg(long, value_name = "LEVEL:FACTOR")]
    level: Vec<LevelArg>,
    /// How the epoch follows from the network
    #[arg(long, value_enum, default_value_t, conflicts_with = "config")]
    model: Model,
    /// Bytes a frame takes on the wire beside its L2 bytes; 0 for published numbers
    #[arg(long, value_name = "BYTES", default_value_t = default_wire_overhead(), conflicts_with = "config", value_parser = units::bytes)]
    wire_overhead: u32,
    /// What happens to packets larger than their level allows
    #[arg(long, value_enum, default_value_t, conflicts_with = "config")]
    oversize: OversizeRule,
    /// How much earlier than an epoch after the last a packet may come; lengthens the epoch by as much
    #[arg(long, value_name = "TIME", default_value = "0us", conflicts_with = "config")]
    tolerance: Nanos,
}

/// One change of a network.
#[derive(Clone, Debug)]
enum WhatIf {
    Hosts(u32),
    LinkRate(Rate),
    MaxPacket(u32),
    Epsilon(Nanos),
    Model(Model),
    Level(LevelArg),
}

impl FromStr for WhatIf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        fn read<T: FromStr>(value: &str) -> Result<T, String>
        where
            T::Err: std::fmt::Display,
        {
            value.parse().map_err(|error: T::Err| error.to_string())
        }
        let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, for example hosts=300")?;
        match key {
            "hosts" => units::bytes(value).map(Self::Hosts).map_err(|_| format!("'{value}' is no number of hosts")),
            "link-rate" => read(value).map(Self::LinkRate),
            "max-packet" => units::bytes(value).map(Self::MaxPacket).map_err(|error| error.to_string()),
            "epsilon" => read(value).map(Self::Epsilon),
            "model" => clap::ValueEnum::from_str(value, true).map(Self::Model),
            "level" => read(value).map(Self::Level),
            _ => Err(format!("'{key}' is none of hosts, link-rate, max-packet, epsilon, model and level")),
        }
    }
}

impl WhatIf {
    fn apply(&self, network: &mut Network) {
        match self {
            Self::Hosts(hosts) => network.hosts = *hosts,
            Self::LinkRate(rate) => network.link_rate = *rate,
            Self::MaxPacket(bytes) => network.max_packet = *bytes,
            Self::Epsilon(epsilon) => network.delays = Delays::Given(*epsilon),
            Self::Model(model) => network.model = *model,
            Self::Level(level) => {
                let spec = level.spec(OversizeRule::default(), Nanos::from_ns(0));
                network.levels.retain(|other| other.level != spec.level);
                network.levels.push(spec);
            }
        }
    }
}

impl NetworkArgs {
    /// The plan, and what the file says of this host. With `pcp`, frames have a tag that the plan counts.
    pub(super) fn plan(&self, pcp: bool) -> Result<(Answer, Host), Failure> {
        self.changed(pcp, |_| Ok(()))
    }

    /// The same after a change of the network.
    pub(super) fn changed(
        &self,
        pcp: bool,
        change: impl Fn(&mut Network) -> Result<(), String>,
    ) -> Result<(Answer, Host), Failure> {
        let change = |network: &mut Network, pcp: bool| {
            network.tagged = pcp;
            change(network)
        };
        let Some(path) = &self.config else {
            let mut network = self.network().map_err(Failure::Usage)?;
            change(&mut network, pcp).map_err(Failure::Usage)?;
            let plan = network.plan().map_err(|error| Failure::Usage(error.to_string()))?;
            return Ok((Answer { plan, assigned: None }, Host { pcp, ..Host::default() }));
        };
        let mut file = File::read(path).map_err(|error| Failure::Usage(error.to_string()))?;
        file.host.pcp |= pcp;
        let pcp = file.host.pcp;
        let answer = file
            .plan(|network| change(network, pcp))
            .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
        Ok((answer, file.host))
    }

    fn network(&self) -> Result<Network, String> {
        // clap has made sure of the three; see `requires_all`.
        let (Some(hosts), Some(link_rate), Some(max_packet)) = (self.hosts, self.link_rate, self.max_packet) else {
            return Err("give --config, or --hosts, --link-rate and --max-packet".into());
        };
        Ok(Network {
            hosts,
            link_rate,
            max_packet,
            delays: delays(self.epsilon, self.hops, self.switch_delay, self.mtu, self.host_burst)?,
            wire_overhead: self.wire_overhead,
            tagged: false,
            model: self.model,
            levels: self.level.iter().map(|level| level.spec(self.oversize, self.tolerance)).collect(),
        })
    }
}

impl PlanCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let (answer, _) = self.network.plan(self.pcp)?;
        let plan = &answer.plan;
        if !self.what_if.is_empty() {
            let changed = self.network.changed(self.pcp, |network| {
                self.what_if.iter().for_each(|change| change.apply(network));
                Ok(())
            });
            let (changed, _) = changed.map_err(|failure| match failure {
                Failure::Usage(message) => Failure::Usage(format!("there is a plan now, but what if: {message}")),
                other => other,
            })?;
            return print(difference(plan, &changed.plan).trim_end());
        }
        if let Some(number) = self.explain {
            let level = Level::new(number).and_then(|level| plan.level(level)).ok_or_else(|| {
                Failure::Usage(format!(
                    "--explain {number}: there is no such level in the plan; run it without --explain"
                ))
            })?;
            return print(Explanation(plan, level));
        }
        match (&answer.assigned, self.json) {
            (None, false) => print(plan),
            (None, true) => print(format!("{:#}", plan.to_json())),
            (Some(assigned), false) => print(format!("{assigned}\n{plan}")),
            (Some(assigned), true) => {
                let mut json = plan.to_json();
                json["apps"] = json!(assigned.to_json());
                json["exhaustive"] = json!(assigned.exhaustive);
                print(format!("{json:#}"))
            }
        }
    }
}
