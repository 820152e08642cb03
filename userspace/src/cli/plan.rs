//! `qjump plan`, and the flags that describe a network.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{Failure, print};
use crate::{
    config::{File, Host, LevelArg, OversizeRule},
    plan::{Delays, Model, Network, Plan, default_wire_overhead},
    units::{Nanos, Rate},
};

/// Compute epochs, rates and bounds; touches nothing
#[derive(Args)]
pub struct PlanCommand {
    #[command(flatten)]
    network: NetworkArgs,
    /// Count the 802.1Q tag that `load --pcp` gives to frames
    #[arg(long)]
    pcp: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A network, from a file or from flags.
#[derive(Args)]
#[command(group = ArgGroup::new("source").required(true).args(["config", "hosts"]))]
pub struct NetworkArgs {
    /// Read the network and its levels from a TOML file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["hosts", "link_rate", "max_packet", "epsilon", "level"])]
    config: Option<PathBuf>,
    /// Hosts that may send: the n of the bound
    #[arg(long, allow_hyphen_values = true, value_name = "N", requires_all = ["link_rate", "max_packet", "epsilon", "level"])]
    hosts: Option<u32>,
    /// Rate of the slowest link, e.g. 10gbit
    #[arg(long, allow_hyphen_values = true, value_name = "RATE")]
    link_rate: Option<Rate>,
    /// Largest packet of guaranteed levels: bytes with the Ethernet header, without FCS
    #[arg(long, allow_hyphen_values = true, value_name = "BYTES")]
    max_packet: Option<u32>,
    /// Sum of the fixed delays of a path, e.g. 4us
    #[arg(long, allow_hyphen_values = true, value_name = "TIME")]
    epsilon: Option<Nanos>,
    /// A level and its throughput factor, e.g. 7:1 (guaranteed), 5:4, or 3:unlimited; repeatable
    #[arg(long, value_name = "LEVEL:FACTOR")]
    level: Vec<LevelArg>,
    /// How the epoch follows from the network
    #[arg(long, value_enum, default_value_t, conflicts_with = "config")]
    model: Model,
    /// Bytes a frame takes on the wire beside its L2 bytes; 0 for published numbers
    #[arg(long, value_name = "BYTES", default_value_t = default_wire_overhead(), conflicts_with = "config")]
    wire_overhead: u32,
    /// What happens to packets larger than their level allows
    #[arg(long, value_enum, default_value_t, conflicts_with = "config")]
    oversize: OversizeRule,
    /// How much earlier than an epoch after the last a packet may come; lengthens the epoch by as much
    #[arg(long, value_name = "TIME", default_value = "0us", conflicts_with = "config")]
    tolerance: Nanos,
}

impl NetworkArgs {
    /// The plan, and what the file says of this host. With `pcp`, frames have a tag that the plan counts.
    pub(super) fn plan(&self, pcp: bool) -> Result<(Plan, Host), Failure> {
        let (mut network, mut host) = match &self.config {
            Some(path) => {
                let file = File::read(path).map_err(|error| Failure::Usage(error.to_string()))?;
                let network = file.network().map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
                (network, file.host)
            }
            None => (self.network()?, Host::default()),
        };
        host.pcp |= pcp;
        if host.pcp && network.wire_overhead > 0 {
            network.wire_overhead += qjump_ebpf::frame::VLAN_TAG as u32;
        }
        let plan = network.plan().map_err(|error| Failure::Usage(error.to_string()))?;
        Ok((plan, host))
    }

    fn network(&self) -> Result<Network, Failure> {
        // clap has made sure of the four; see `requires_all`.
        let (Some(hosts), Some(link_rate), Some(max_packet), Some(epsilon)) =
            (self.hosts, self.link_rate, self.max_packet, self.epsilon)
        else {
            return Err(Failure::Usage("give --config, or --hosts, --link-rate, --max-packet and --epsilon".into()));
        };
        Ok(Network {
            hosts,
            link_rate,
            max_packet,
            delays: Delays::Given(epsilon),
            wire_overhead: self.wire_overhead,
            model: self.model,
            levels: self.level.iter().map(|level| level.spec(self.oversize, self.tolerance)).collect(),
        })
    }
}

impl PlanCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let (plan, _) = self.network.plan(self.pcp)?;
        if self.json { print(format!("{:#}", plan.to_json())) } else { print(plan) }
    }
}
