//! A rack: hosts, one or two tiers of switches, and links that take their time.

use std::{fmt::Write as _, sync::Mutex};

use anyhow::{Context, Result, bail};
use qjump_ebpf::Level;

use super::{
    netns::{NetNs, named_interface, rack_interface},
    spec::{Port, Queueing, RackSpec},
};
use crate::{
    config::QueueChoice,
    dataplane::{self, Hook, Loaded, Pins},
    measure::ethtool::Ethtool,
    plan::Plan,
    units::Rate,
};

/// Whose rack it is; decides what its namespaces and interfaces are called.
#[derive(Clone, Debug)]
enum Owner {
    /// This process's.
    Process(u32),
    /// It stands until somebody takes it down.
    Named(String),
}

impl Owner {
    fn name(&self) -> String {
        match self {
            Self::Process(pid) => pid.to_string(),
            Self::Named(name) => name.clone(),
        }
    }
}

/// A rack that is up. Everything is removed when it is dropped, unless it is a standing one.
#[derive(Debug)]
pub struct Rack {
    owner: Owner,
    spec: RackSpec,
    leaves: Vec<NetNs>,
    spines: Vec<NetNs>,
    hosts: Vec<NetNs>,
    loaded: Mutex<Vec<usize>>,
}

/// The port of a switch, seen from the namespace that it is in.
struct SwitchPort<'a> {
    switch: &'a NetNs,
    device: String,
    port: Port,
}

/// The largest frame without FCS: MTU 1500 and an Ethernet header.
const FRAME: u32 = 1514;

impl Rack {
    /// Builds a rack of this process.
    ///
    /// # Errors
    /// If iproute2 is missing, or the kernel lacks veth, bridge or a qdisc.
    pub fn up(spec: RackSpec) -> Result<Self> {
        super::remove_stale();
        Self::build(Owner::Process(std::process::id()), spec)
    }

    /// Builds a rack that outlives this process once [`Self::leave`] has been called.
    pub(super) fn named(name: &str, spec: RackSpec) -> Result<Self> {
        Self::build(Owner::Named(name.to_owned()), spec)
    }

    /// A rack that stands already.
    pub(super) fn standing(name: &str, spec: RackSpec) -> Self {
        let of = |role: &str, count| (1..=count).map(|at| NetNs::standing(name, &format!("{role}{at}"))).collect();
        Self {
            owner: Owner::Named(name.to_owned()),
            spec,
            leaves: of("leaf", spec.leaves()),
            spines: of("spine", spec.spines()),
            hosts: of("h", spec.hosts),
            loaded: Mutex::default(),
        }
    }

    fn build(owner: Owner, spec: RackSpec) -> Result<Self> {
        let name = owner.name();
        let mut rack =
            Self { owner, spec, leaves: Vec::new(), spines: Vec::new(), hosts: Vec::new(), loaded: Mutex::default() };
        for leaf in 1..=spec.leaves() {
            rack.leaves.push(bridge(&name, &format!("leaf{leaf}"))?);
        }
        if let Some(threshold) = spec.ecn_threshold {
            require_queueing(&rack.leaves[0], Queueing::Marking(threshold)).context("ecn-threshold marks packets")?;
        }
        for spine in 1..=spec.spines() {
            rack.spines.push(bridge(&name, &format!("spine{spine}"))?);
        }
        for host in 0..spec.hosts {
            rack.hosts.push(NetNs::of_rack(&name, &format!("h{}", host + 1))?);
            rack.connect(host).with_context(|| format!("cannot connect host {} to its switch", host + 1))?;
        }
        rack.connect_tiers()?;
        rack.introduce()?;
        rack.set_queueing(spec.queueing)?;
        for host in 0..spec.hosts {
            rack.put_card(host)?;
        }
        Ok(rack)
    }

    /// Leaves it standing when this value is dropped.
    pub(super) fn leave(mut self) {
        for netns in self.leaves.iter_mut().chain(&mut self.spines).chain(&mut self.hosts) {
            netns.leave();
        }
    }

    /// What it is made of.
    pub const fn spec(&self) -> &RackSpec {
        &self.spec
    }

    /// The name of a host's interface, unique on this machine.
    pub fn interface(&self, host: usize) -> String {
        match &self.owner {
            Owner::Process(pid) => rack_interface(*pid, host),
            Owner::Named(name) => named_interface(name, host),
        }
    }

    /// A host's IPv4 address.
    pub fn address(&self, host: usize) -> String {
        format!("10.0.0.{}", host + 1)
    }

    /// A host's IPv6 address, if the rack has such.
    pub fn address6(&self, host: usize) -> Option<String> {
        self.spec.ipv6.then(|| format!("fd00:716a::{:x}", host + 1))
    }

    fn mac(&self, host: usize) -> String {
        format!("02:00:00:00:00:{:02x}", host + 1)
    }

    /// A host's namespace.
    pub fn host(&self, host: usize) -> &NetNs {
        &self.hosts[host]
    }

    /// The namespace of a host (`h3` or `3`) or a switch (`leaf1`, `spine1`), and the number of the host from 0.
    ///
    /// # Errors
    /// If there is no such.
    pub fn find(&self, name: &str) -> Result<(&NetNs, Option<usize>)> {
        let number = |prefix: &str, all: usize| {
            let number: usize = name.strip_prefix(prefix)?.parse().ok()?;
            (1..=all).contains(&number).then(|| number - 1)
        };
        if let Some(host) = number("h", self.hosts.len()).or_else(|| number("", self.hosts.len())) {
            return Ok((&self.hosts[host], Some(host)));
        }
        let switches = [("leaf", &self.leaves), ("spine", &self.spines)];
        let found = switches.iter().find_map(|(prefix, all)| Some(&all[number(prefix, all.len())?]));
        if let Some(switch) = found {
            return Ok((switch, None));
        }
        let mut known = format!("h1 to h{}, leaf1", self.hosts.len());
        if self.leaves.len() > 1 {
            known += &format!(" to leaf{}, spine1", self.leaves.len());
        }
        bail!(
            "there is no '{name}' in this rack; there are {known}{}",
            match self.spines.len() {
                0 | 1 => String::new(),
                more => format!(" to spine{more}"),
            }
        )
    }

    fn connect(&self, host: usize) -> Result<()> {
        let (interface, netns) = (self.interface(host), &self.hosts[host]);
        let (leaf, port) = (&self.leaves[self.spec.leaf_of(host)], host_port(host));
        // Segments leave one by one: a 64 KB super-packet would hold a 100 Mbit/s port for 5 ms at a time.
        netns.ip(&format!(
            "link add {interface} address {} gso_max_segs 1 type veth peer name {port} gso_max_segs 1 netns {}",
            self.mac(host),
            leaf.name()
        ))?;
        leaf.ip(&format!("link set {port} master br0 up"))?;
        if let Some(address) = self.address6(host) {
            netns.enter(|| Ok(std::fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "0")?))?;
            netns.ip(&format!("link set {interface} addrgenmode none"))?;
            netns.ip(&format!("addr add {address}/64 dev {interface} nodad"))?;
        }
        netns.ip(&format!("addr add {}/24 broadcast + dev {interface}", self.address(host)))?;
        netns.ip(&format!("link set {interface} up"))
    }

    fn connect_tiers(&self) -> Result<()> {
        for (number, leaf) in self.leaves.iter().enumerate() {
            for (above, spine) in self.spines.iter().enumerate() {
                let (up, down) = (up_port(above), down_port(number));
                leaf.ip(&format!(
                    "link add {up} gso_max_segs 1 type veth peer name {down} gso_max_segs 1 netns {}",
                    spine.name()
                ))?;
                leaf.ip(&format!("link set {up} master br0 up"))?;
                spine.ip(&format!("link set {down} master br0 up"))?;
                // What goes to everybody goes through the first spine alone, or it would go round and round.
                if above > 0 {
                    let quiet = |port: &str| format!("link set dev {port} flood off mcast_flood off bcast_flood off\n");
                    leaf.batch("bridge", &quiet(&up))?;
                    spine.batch("bridge", &quiet(&down))?;
                }
            }
        }
        Ok(())
    }

    /// Nobody has to ask who is where: questions would be dropped where the test drops. Between tiers, the destination
    /// decides the way, so packets that part do not meet again.
    fn introduce(&self) -> Result<()> {
        let everybody = 0..self.spec.hosts;
        for host in everybody.clone() {
            let interface = self.interface(host);
            let mut lines = String::new();
            for other in everybody.clone().filter(|&other| other != host) {
                for address in [Some(self.address(other)), self.address6(other)].into_iter().flatten() {
                    let mac = self.mac(other);
                    let _ = writeln!(lines, "neigh replace {address} lladdr {mac} dev {interface} nud permanent");
                }
            }
            self.hosts[host].batch("ip", &lines)?;
        }
        let entries = |to: &dyn Fn(usize) -> String| {
            everybody.clone().fold(String::new(), |mut lines, host| {
                let _ = writeln!(lines, "fdb replace {} dev {} master static", self.mac(host), to(host));
                lines
            })
        };
        for (number, leaf) in self.leaves.iter().enumerate() {
            let to = |host: usize| match self.spec.leaf_of(host) == number {
                true => host_port(host),
                false => up_port(host % self.spines.len()),
            };
            leaf.batch("bridge", &entries(&to))?;
        }
        for spine in &self.spines {
            spine.batch("bridge", &entries(&|host| down_port(self.spec.leaf_of(host))))?;
        }
        Ok(())
    }

    /// All ports of all switches.
    fn ports(&self) -> Vec<SwitchPort<'_>> {
        let to_hosts = (0..self.spec.hosts).map(|host| SwitchPort {
            switch: &self.leaves[self.spec.leaf_of(host)],
            device: host_port(host),
            port: self.spec.leaf,
        });
        let between = self.spec.spine.into_iter().flat_map(|spec| {
            let port = spec.port;
            self.leaves.iter().enumerate().flat_map(move |(number, leaf)| {
                self.spines.iter().enumerate().flat_map(move |(above, spine)| {
                    [
                        SwitchPort { switch: leaf, device: up_port(above), port },
                        SwitchPort { switch: spine, device: down_port(number), port },
                    ]
                })
            })
        });
        to_hosts.chain(between).collect()
    }

    /// What holds the packets of a queue where nobody says otherwise.
    fn usual(&self) -> Queueing {
        self.spec.ecn_threshold.map_or(Queueing::Fifo, Queueing::Marking)
    }

    /// A port with a single queue of this kind.
    fn single(device: &str, port: &Port, queueing: Queueing) -> String {
        let rate = port.rate;
        format!("qdisc add dev {device} root handle 1: htb default 1\n")
            + &shaped(device, "1:", "1:1", &format!("rate {rate} ceil {rate}"))
            + &format!("qdisc add dev {device} parent 1:1 handle 10: {}\n", queue(port, queueing))
    }

    fn strict(&self, device: &str, port: &Port) -> String {
        let rate = port.rate;
        let mut lines = format!("qdisc add dev {device} root handle 1: htb default 10\n")
            + &shaped(device, "1:", "1:1", &format!("rate {rate} ceil {rate}"));
        for level in Level::strictest_first() {
            let (class, handle) = (format!("1:1{level}"), format!("1{level}:"));
            // What a class has of its own it sends before any priority counts, so it has next to nothing
            // and borrows the rest, by priority.
            let share = format!("rate 1kbit ceil {rate} prio {}", 7 - level.number());
            lines += &shaped(device, "1:1", &class, &share);
            let queue = queue(port, self.usual());
            let _ = writeln!(lines, "qdisc add dev {device} parent {class} handle {handle} {queue}");
            let traffic_class = level.traffic_class(0);
            let filter = format!("filter add dev {device} parent 1: protocol");
            let _ = writeln!(lines, "{filter} ip prio 1 u32 match ip tos {traffic_class:#04x} 0xe0 flowid {class}");
            if self.spec.ipv6 {
                // Version, then the traffic class, which spans two bytes.
                let bits = u16::from(traffic_class) << 4;
                let _ = writeln!(lines, "{filter} ipv6 prio 2 u32 match u16 {bits:#06x} 0x0e00 at 0 flowid {class}");
            }
        }
        lines
    }

    /// Sets how the switches' ports queue, for all of them.
    ///
    /// # Errors
    /// If the kernel lacks a qdisc; then they are as they were.
    pub fn set_queueing(&self, queueing: Queueing) -> Result<()> {
        require_queueing(&self.leaves[0], queueing)?;
        for SwitchPort { switch, device, port } in self.ports() {
            // The first time there is none to delete.
            let _ = switch.batch("tc", &format!("qdisc del dev {device} root\n"));
            let lines = match queueing {
                Queueing::Fifo => Self::single(&device, &port, self.usual()),
                Queueing::Strict => self.strict(&device, &port),
                other => Self::single(&device, &port, other),
            };
            switch.batch("tc", &lines)?;
        }
        Ok(())
    }

    /// How a host's TCP reacts to congestion, by the route to all others: whatever programs ask for, accepted connections too.
    /// It learns of the network's queues by their losses, marks and times alone.
    ///
    /// # Errors
    /// If the kernel lacks the algorithm.
    pub fn set_tcp(&self, host: usize, congestion: &str, ecn: bool) -> Result<()> {
        let (netns, interface, address) = (&self.hosts[host], self.interface(host), self.address(host));
        let route = format!("route replace 10.0.0.0/24 dev {interface} proto kernel scope link src {address}");
        netns.ip(&format!("{route} congctl {congestion}")).with_context(|| {
            format!("this kernel lacks the congestion control '{congestion}'; try `modprobe tcp_{congestion}`")
        })?;
        netns.enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/tcp_ecn", if ecn { "1" } else { "2" })?))?;
        self.part(host).with_context(|| format!("cannot set the offloads between {interface} and its switch"))
    }

    /// Has the switch let go of what a host sends. The kernel keeps a packet's socket across a pair of veth, so that TCP would
    /// take what waits in the switch for its own host's queue, and keep that to a millisecond (TCP small queues): no queue
    /// would build up that congestion control has an influence on. TCP's packets lose their socket on their way into GRO
    /// (`skb_prepare_for_gro`, include/linux/skbuff.h), where a veth takes those of a peer without TSO
    /// (`veth_skb_is_eligible_for_gro`, drivers/net/veth.c). GRO must not put any together, which the switch would take for one.
    fn part(&self, host: usize) -> Result<()> {
        let (leaf, port) = (&self.leaves[self.spec.leaf_of(host)], host_port(host));
        leaf.ip(&format!("link set {port} gro_max_size 1"))?;
        self.hosts[host].enter(|| Ok(Ethtool::new()?.set_tso(&self.interface(host), false)?))?;
        leaf.enter(|| Ok(Ethtool::new()?.set_gro(&port, true)?))
    }

    /// Shapes all that a host sends, in one queue of so many bytes, until [`Self::unshape`]: what an operator can do without
    /// priorities.
    ///
    /// # Errors
    /// If something is there already.
    pub fn shape(&self, host: usize, port: Port) -> Result<()> {
        self.hosts[host].batch("tc", &Self::single(&self.interface(host), &port, Queueing::Fifo))
    }

    /// Undoes [`Self::shape`], and takes a network card off.
    ///
    /// # Errors
    /// If nothing was there.
    pub fn unshape(&self, host: usize) -> Result<()> {
        self.hosts[host].batch("tc", &format!("qdisc del dev {} root\n", self.interface(host)))
    }

    /// Gives a host its own network card, if the rack has such: a FIFO at the end of the host's queue.
    fn put_card(&self, host: usize) -> Result<()> {
        match &self.spec.host {
            None => Ok(()),
            Some(card) => self.hosts[host].batch("tc", &Self::single(&self.interface(host), card, self.usual())),
        }
    }

    /// Loads a plan on a host, as `qjump load` does. A queue of qjump's takes the place of the host's network card, and
    /// is as fast.
    ///
    /// # Errors
    /// Those of [`dataplane::load`].
    pub fn load(&self, host: usize, plan: &Plan, queue: QueueChoice) -> Result<Vec<Loaded>> {
        let interface = self.interface(host);
        let card = self.spec.host.filter(|_| queue != QueueChoice::Keep);
        if card.is_some() {
            self.unshape(host)?;
        }
        let loaded = self.hosts[host].enter(|| {
            let request = dataplane::Request {
                interfaces: &[interface],
                plan,
                pcp: false,
                hook: Hook::Auto,
                queue,
                host_rate: card.map(|card| card.rate),
            };
            Ok(dataplane::load(&request)?)
        })?;
        self.lock().push(host);
        Ok(loaded)
    }

    /// Unloads every host.
    ///
    /// # Errors
    /// Those of [`dataplane::unload`].
    pub fn unload_all(&self) -> Result<()> {
        let loaded: std::collections::BTreeSet<usize> = self.lock().drain(..).collect();
        for host in loaded {
            let interface = self.interface(host);
            self.hosts[host].enter(|| Ok(dataplane::unload(&interface, false)?))?;
            if self.spec.host.is_some() {
                let _ = self.unshape(host);
                self.put_card(host)?;
            }
        }
        Ok(())
    }

    /// Whether a plan is loaded on a host, by whomever.
    pub fn is_loaded(&self, host: usize) -> bool {
        Pins::of(&self.interface(host)).exist()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.loaded.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        // The pins lie outside the namespaces and would stay.
        let _ = self.unload_all();
    }
}

/// A switch: a bridge in a namespace of its own.
fn bridge(rack: &str, role: &str) -> Result<NetNs> {
    let switch = NetNs::of_rack(rack, role)?;
    switch.ip("link add br0 type bridge stp_state 0 mcast_snooping 0")?;
    switch.ip("link set br0 up")?;
    Ok(switch)
}

/// The qdisc that holds the packets of one queue.
fn queue(port: &Port, queueing: Queueing) -> String {
    let Port { rate, buffer } = port;
    match queueing {
        Queueing::Fifo | Queueing::Strict => format!("bfifo limit {buffer}"),
        // From the threshold on, every packet is marked, by the queue's length now and not by its average: tc wants a burst
        // of at least min / avpkt, and a short one makes for a short memory. What cannot be marked (SYNs, and all of UDP)
        // waits with the rest; without nodrop it would be dropped, and connections could not be made.
        Queueing::Marking(threshold) => format!(
            "red limit {buffer} min {threshold} max {} avpkt {FRAME} burst {} bandwidth {rate} probability 1 ecn nodrop",
            threshold + 1,
            threshold / FRAME + 1
        ),
        // Its own times, 5 and 100 ms, are those that it has everywhere.
        Queueing::FairFlows => format!("fq_codel limit {} quantum {FRAME} ecn", (buffer / FRAME).max(1)),
    }
}

/// Refuses what the kernel has no qdisc for.
fn require_queueing(scratch: &NetNs, queueing: Queueing) -> Result<()> {
    let (kind, option) = match queueing {
        // Everything here stands on HTB and bfifo.
        Queueing::Fifo | Queueing::Strict => return Ok(()),
        Queueing::Marking(_) => ("red", "CONFIG_NET_SCH_RED"),
        Queueing::FairFlows => ("fq_codel", "CONFIG_NET_SCH_FQ_CODEL"),
    };
    let port = Port { rate: Rate::from_bps(1_000_000), buffer: 60_000 };
    let lines = format!("qdisc add dev lo root {}\nqdisc del dev lo root\n", queue(&port, queueing));
    scratch.batch("tc", &lines).with_context(|| {
        format!(
            "this kernel lacks the qdisc '{kind}'; try `modprobe sch_{kind}`, boot a kernel with {option}, or do without it"
        )
    })
}

/// The port of a leaf towards a host.
fn host_port(host: usize) -> String {
    format!("p{}", host + 1)
}

/// The port of a leaf towards a spine.
fn up_port(spine: usize) -> String {
    format!("up{}", spine + 1)
}

/// The port of a spine towards a leaf.
fn down_port(leaf: usize) -> String {
    format!("down{}", leaf + 1)
}

/// A shaped class: HTB counts what a frame takes on the wire, and its burst is one frame.
fn shaped(device: &str, parent: &str, class: &str, rest: &str) -> String {
    format!(
        "class add dev {device} parent {parent} classid {class} htb {rest} burst {FRAME} cburst {FRAME} \
         overhead 24 mpu 84 quantum {FRAME}\n"
    )
}
