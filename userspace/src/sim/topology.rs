//! Hosts, switches and the ports between them, and which ports a packet crosses.

use std::str::FromStr;

use super::scenario::scramble;

/// Most ports on a path: up and down three tiers of switches, and the host's own.
pub const MAX_HOPS: usize = 6;

/// Time, in picoseconds: a byte at 400 Gbit/s takes 20 of them.
pub type Picos = u64;

/// A network's shape. Hosts are numbered from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All hosts at one switch.
    Star {
        /// Number of hosts.
        hosts: u32,
    },
    /// Two tiers: every leaf switch is connected with every spine switch.
    LeafSpine {
        /// Leaf switches.
        leaves: u32,
        /// Hosts at each.
        hosts_per_leaf: u32,
        /// Spine switches. Fewer than `hosts_per_leaf` is oversubscription.
        spines: u32,
    },
    /// Three tiers: the k-ary fat tree of Al-Fares et al. (SIGCOMM 2008), k^3/4 hosts.
    FatTree {
        /// Ports of a switch, even.
        k: u32,
    },
    /// Switches in a row, each with a group of hosts; everything goes to the last host of the last switch.
    Chain {
        /// Hosts at each switch.
        groups: Vec<u32>,
    },
}

/// How switches choose among equal paths upwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Routing {
    /// By the switch of the destination: packets that part do not meet again.
    #[default]
    Destination,
    /// By source and destination, as ECMP does: in three tiers, packets that part may meet again.
    Flow,
}

/// A port: the sending end of a link.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Rate in bit/s.
    pub rate_bps: u64,
    /// From the last bit sent to the packet in the next queue.
    pub delay_ps: Picos,
}

/// A shape with rates and delays.
#[derive(Clone, Debug)]
pub struct Topology {
    shape: Shape,
    routing: Routing,
    links: Vec<Link>,
}

/// The ports that a packet crosses, first the host's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Port numbers; the first `len` count.
    pub ports: [u32; MAX_HOPS],
    /// How many.
    pub len: u8,
}

impl Route {
    fn push(&mut self, port: u32) {
        self.ports[usize::from(self.len)] = port;
        self.len += 1;
    }
}

impl Shape {
    /// Number of hosts.
    pub fn hosts(&self) -> u32 {
        match self {
            Self::Star { hosts } => *hosts,
            Self::LeafSpine { leaves, hosts_per_leaf, .. } => leaves * hosts_per_leaf,
            Self::FatTree { k } => k * k * k / 4,
            Self::Chain { groups } => groups.iter().sum(),
        }
    }

    /// Switches on the longest path.
    pub fn hops(&self) -> u32 {
        match self {
            Self::Star { .. } => 1,
            Self::LeafSpine { leaves, .. } => {
                if *leaves > 1 {
                    3
                } else {
                    1
                }
            }
            Self::FatTree { .. } => 5,
            Self::Chain { groups } => groups.len() as u32,
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Star { hosts } => write!(f, "star:{hosts}"),
            Self::LeafSpine { leaves, hosts_per_leaf, spines } => {
                write!(f, "leaf-spine:{leaves}x{hosts_per_leaf}x{spines}")
            }
            Self::FatTree { k } => write!(f, "fat-tree:{k}"),
            Self::Chain { groups } => {
                write!(f, "chain:{}", groups.iter().map(u32::to_string).collect::<Vec<_>>().join("+"))
            }
        }
    }
}

/// Most hosts of a simulated network.
const MAX_HOSTS: u64 = 200_000;

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || {
            format!(
                "'{text}' is no topology; write star:HOSTS, leaf-spine:LEAVESxHOSTSxSPINES, fat-tree:K or chain:N+N"
            )
        };
        let number = |part: &str| {
            let number: u32 = part.parse().map_err(|_| usage())?;
            if (1..=100_000).contains(&number) {
                Ok(number)
            } else {
                Err(format!("'{text}': {part} is not in 1 to 100000"))
            }
        };
        let (kind, rest) = text.split_once(':').ok_or_else(usage)?;
        let shape = match kind {
            "star" => Self::Star { hosts: number(rest)? },
            "leaf-spine" => {
                let parts: Vec<&str> = rest.split('x').collect();
                let [leaves, hosts, spines] = parts[..] else { return Err(usage()) };
                Self::LeafSpine { leaves: number(leaves)?, hosts_per_leaf: number(hosts)?, spines: number(spines)? }
            }
            "fat-tree" => match number(rest)? {
                k if k % 2 == 0 && k <= 64 => Self::FatTree { k },
                k => return Err(format!("fat-tree:{k}: k is even and at most 64")),
            },
            "chain" => {
                let groups = rest.split('+').map(number).collect::<Result<Vec<u32>, String>>()?;
                if groups.len() >= MAX_HOPS {
                    return Err(format!("'{text}': a chain has at most {} switches", MAX_HOPS - 1));
                }
                Self::Chain { groups }
            }
            _ => return Err(usage()),
        };
        let hosts = match &shape {
            Self::LeafSpine { leaves, hosts_per_leaf, .. } => u64::from(*leaves) * u64::from(*hosts_per_leaf),
            Self::Chain { groups } => groups.iter().map(|&n| u64::from(n)).sum(),
            other => u64::from(other.hosts()),
        };
        let ports = match &shape {
            Self::LeafSpine { leaves, spines, .. } => u64::from(*leaves) * u64::from(*spines),
            _ => 0,
        };
        if !(2..=MAX_HOSTS).contains(&hosts) || ports > 10_000_000 {
            return Err(format!("'{text}' has {hosts} hosts; a simulated network has 2 to {MAX_HOSTS}"));
        }
        Ok(shape)
    }
}

impl Topology {
    /// Every link of `rate_bps`, but those between switches `uplink` times as fast (1 or more); every
    /// switch, with the cable before it, adds `switch_delay_ps`.
    pub fn new(shape: Shape, routing: Routing, rate_bps: u64, uplink: u32, switch_delay_ps: Picos) -> Self {
        let hosts = shape.hosts();
        let edge_up = Link { rate_bps, delay_ps: switch_delay_ps };
        let edge_down = Link { rate_bps, delay_ps: 0 };
        let between = Link { rate_bps: rate_bps * u64::from(uplink.max(1)), delay_ps: switch_delay_ps };
        let mut links = vec![edge_up; hosts as usize];
        links.resize(2 * hosts as usize, edge_down);
        let rest = match &shape {
            Shape::Star { .. } => 0,
            Shape::LeafSpine { leaves, spines, .. } => 2 * leaves * spines,
            // Edge to aggregation and back, aggregation to core and back: k^3/4 links each.
            Shape::FatTree { k } => k * k * k,
            Shape::Chain { groups } => groups.len() as u32 - 1,
        };
        links.resize((2 * hosts + rest) as usize, between);
        Self { shape, routing, links }
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// All ports. First every host's own, then those towards every host.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The port that leads to a host.
    pub fn port_to(&self, host: u32) -> u32 {
        self.shape.hosts() + host
    }

    /// The host that a port of [`Self::port_to`] leads to.
    pub fn host_behind(&self, port: u32) -> u32 {
        port - self.shape.hosts()
    }

    /// The ports from one host to another; `flow` chooses among equal paths with [`Routing::Flow`].
    pub fn route(&self, source: u32, destination: u32, flow: u32) -> Route {
        let hosts = self.shape.hosts();
        let mut route = Route::default();
        route.push(source);
        let first = 2 * hosts;
        let spread = |key: u32, ways: u32| match self.routing {
            Routing::Destination => key % ways,
            Routing::Flow => {
                (scramble(u64::from(source) << 32 | u64::from(destination), u64::from(flow)) % u64::from(ways)) as u32
            }
        };
        match &self.shape {
            Shape::Star { .. } => {}
            &Shape::LeafSpine { leaves, hosts_per_leaf, spines } => {
                let (from, to) = (source / hosts_per_leaf, destination / hosts_per_leaf);
                if from != to {
                    // Any function of the destination host will do here; a host's packets spread over spines.
                    let spine = spread(destination, spines);
                    route.push(first + from * spines + spine);
                    route.push(first + leaves * spines + to * spines + spine);
                }
            }
            &Shape::FatTree { k } => {
                let half = k / 2;
                let (from_edge, to_edge) = (source / half, destination / half);
                let (from_pod, to_pod) = (from_edge / half, to_edge / half);
                if from_edge != to_edge {
                    // Aggregation switch and core switch by the destination's edge switch.
                    let up = spread(to_edge, half * half);
                    let (agg, core) = (up % half, up / half);
                    let tier = k * k * k / 4;
                    route.push(first + from_edge * half + agg);
                    if from_pod != to_pod {
                        route.push(first + tier + (from_pod * half + agg) * half + core);
                        route.push(first + 2 * tier + (to_pod * half + agg) * half + core);
                    }
                    route.push(first + 3 * tier + to_edge * half + agg);
                }
            }
            Shape::Chain { groups } => {
                let at = |host: u32| {
                    let mut left = host;
                    groups.iter().position(|&size| {
                        let here = left < size;
                        left = left.wrapping_sub(if here { 0 } else { size });
                        here
                    })
                };
                let (from, to) = (at(source).unwrap_or(0), at(destination).unwrap_or(0));
                for switch in from..to {
                    route.push(first + switch as u32);
                }
            }
        }
        route.push(self.port_to(destination));
        route
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    fn shapes() -> Vec<Shape> {
        ["star:5", "leaf-spine:3x4x2", "leaf-spine:1x4x2", "fat-tree:4", "fat-tree:6", "chain:3+2+2"]
            .map(|text| text.parse().unwrap())
            .into()
    }

    fn routes(topology: &Topology) -> Vec<(u32, u32, Vec<u32>)> {
        let hosts = topology.shape().hosts();
        let mut all = Vec::new();
        for source in 0..hosts {
            for destination in (0..hosts).filter(|&d| d != source) {
                // A chain leads one way.
                if matches!(topology.shape(), Shape::Chain { .. }) && destination != hosts - 1 {
                    continue;
                }
                let route = topology.route(source, destination, 0);
                all.push((source, destination, route.ports[..usize::from(route.len)].to_vec()));
            }
        }
        all
    }

    #[test]
    fn every_port_has_one_place() {
        for shape in shapes() {
            let topology = Topology::new(shape.clone(), Routing::Destination, 1_000_000, 1, 0);
            let mut next: HashMap<u32, HashSet<u32>> = HashMap::new();
            for (source, destination, ports) in routes(&topology) {
                assert_eq!((ports[0], *ports.last().unwrap()), (source, topology.port_to(destination)), "{shape}");
                assert!(ports.len() as u32 <= shape.hops() + 1, "{shape} {ports:?}");
                assert!(ports.iter().all(|&port| (port as usize) < topology.links().len()));
                for pair in ports.windows(2) {
                    next.entry(pair[0]).or_default().insert(pair[1]);
                }
            }
            // Feed-forward: ports can be numbered so that every route climbs.
            let mut depth: HashMap<u32, u32> = HashMap::new();
            for _ in 0..MAX_HOPS {
                for (from, tos) in &next {
                    let d = depth.get(from).copied().unwrap_or(0);
                    for to in tos {
                        let entry = depth.entry(*to).or_default();
                        *entry = (*entry).max(d + 1);
                    }
                }
            }
            assert!(depth.values().all(|&d| d < MAX_HOPS as u32 + 1), "{shape}: {depth:?}");
        }
    }

    /// The condition of the proof.
    fn meet_again(topology: &Topology) -> bool {
        let all = routes(topology);
        all.iter().any(|(source, _, a)| {
            all.iter().any(|(other, _, b)| {
                // Packets of one host are an epoch apart.
                let shared: Vec<(usize, usize)> = a
                    .iter()
                    .enumerate()
                    .filter_map(|(i, port)| b.iter().position(|p| p == port).map(|j| (i, j)))
                    .collect();
                source != other && shared.windows(2).any(|w| w[1].0 != w[0].0 + 1 || w[1].1 != w[0].1 + 1)
            })
        })
    }

    #[test]
    fn packets_that_part_do_not_meet_again_unless_three_tiers_route_by_flow() {
        for shape in shapes() {
            let topology = Topology::new(shape.clone(), Routing::Destination, 1_000_000, 1, 0);
            assert!(!meet_again(&topology), "{shape}");
        }
        for (shape, meets) in [("leaf-spine:3x4x2", false), ("fat-tree:4", true)] {
            let topology = Topology::new(shape.parse().unwrap(), Routing::Flow, 1_000_000, 1, 0);
            assert_eq!(meet_again(&topology), meets, "{shape}");
        }
    }

    #[test]
    fn reads_and_shows_shapes() {
        for shape in shapes() {
            assert_eq!(shape.to_string().parse(), Ok(shape));
        }
        for (text, part) in [
            ("star", "star:HOSTS"),
            ("ring:5", "star:HOSTS"),
            ("star:0", "not in 1 to"),
            ("star:1", "2 to"),
            ("leaf-spine:3x4", "star:HOSTS"),
            ("fat-tree:5", "even"),
            ("chain:1+1+1+1+1+1", "at most 5"),
            ("leaf-spine:100000x100000x1", "2 to"),
        ] {
            let error = text.parse::<Shape>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
