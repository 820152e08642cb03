//! A rack: hosts, one switch, and links that take their time.

use anyhow::{Context, Result};
use qjump_ebpf::Level;

use super::netns::{NetNs, rack_interface};
use crate::{
    config::QueueChoice,
    dataplane::{self, Hook, Loaded},
    plan::Plan,
    units::Rate,
};

/// What a rack is made of.
#[derive(Clone, Copy, Debug)]
pub struct RackSpec {
    /// Hosts.
    pub hosts: usize,
    /// Rate of every switch port. Hosts send as fast as they can: the model asks only that no link be
    /// slower than this.
    pub rate: Rate,
    /// Bytes that a switch port can hold for each of its queues.
    pub buffer: u32,
}

/// How the switch serves the packets that wait for a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queueing {
    /// In the order of their arrival.
    Fifo,
    /// Eight queues by the packets' DSCP, the highest first, each in the order of arrival.
    Strict,
}

/// A rack that is up. Everything is removed when it is dropped.
#[derive(Debug)]
pub struct Rack {
    spec: RackSpec,
    switch: NetNs,
    hosts: Vec<NetNs>,
    loaded: std::cell::RefCell<Vec<usize>>,
}

/// The largest frame without FCS: MTU 1500 and an Ethernet header.
const FRAME: u32 = 1514;

impl Rack {
    /// Builds a rack with FIFO ports.
    ///
    /// # Errors
    /// If iproute2 is missing, or the kernel lacks veth, bridge or HTB.
    pub fn up(spec: RackSpec) -> Result<Self> {
        super::remove_stale();
        let switch = NetNs::new("switch")?;
        switch.ip("link add br0 type bridge stp_state 0 mcast_snooping 0")?;
        switch.ip("link set br0 up")?;
        let mut rack = Self { spec, switch, hosts: Vec::new(), loaded: Vec::new().into() };
        for host in 0..spec.hosts {
            let netns = NetNs::new(&format!("h{}", host + 1))?;
            rack.hosts.push(netns);
            rack.connect(host).with_context(|| format!("cannot connect host {} to the switch", host + 1))?;
        }
        for host in 0..spec.hosts {
            rack.introduce(host)?;
        }
        rack.set_queueing(Queueing::Fifo)?;
        Ok(rack)
    }

    /// The name of a host's interface, unique on this machine.
    pub fn interface(&self, host: usize) -> String {
        rack_interface(std::process::id(), host)
    }

    fn port(&self, host: usize) -> String {
        format!("p{}", host + 1)
    }

    /// A host's IPv4 address.
    pub fn address(&self, host: usize) -> String {
        format!("10.0.0.{}", host + 1)
    }

    fn mac(&self, host: usize) -> String {
        format!("02:00:00:00:00:{:02x}", host + 1)
    }

    /// A host's namespace.
    pub fn host(&self, host: usize) -> &NetNs {
        &self.hosts[host]
    }

    fn connect(&self, host: usize) -> Result<()> {
        let (interface, port, netns) = (self.interface(host), self.port(host), &self.hosts[host]);
        // Segments leave one by one: a 64 KB super-packet would hold a 100 Mbit/s port for 5 ms at a time.
        netns.ip(&format!(
            "link add {interface} address {} gso_max_segs 1 type veth peer name {port} gso_max_segs 1 netns {}",
            self.mac(host),
            self.switch.name()
        ))?;
        netns.ip(&format!("addr add {}/24 dev {interface}", self.address(host)))?;
        self.switch.ip(&format!("link set {port} master br0 up"))?;
        netns.ip(&format!("link set {interface} up"))
    }

    /// Nobody has to ask who is where: questions would be dropped where the test drops.
    fn introduce(&self, host: usize) -> Result<()> {
        let interface = self.interface(host);
        for other in (0..self.spec.hosts).filter(|&other| other != host) {
            self.hosts[host].ip(&format!(
                "neigh replace {} lladdr {} dev {interface} nud permanent",
                self.address(other),
                self.mac(other)
            ))?;
        }
        let entry = format!("fdb replace {} dev {} master static\n", self.mac(host), self.port(host));
        self.switch.batch("bridge", &entry)
    }

    /// A shaped class: HTB counts what a frame takes on the wire, and its burst is one frame.
    fn shaped(&self, device: &str, parent: &str, class: &str, rest: &str) -> String {
        format!(
            "class add dev {device} parent {parent} classid {class} htb {rest} burst {FRAME} cburst {FRAME} \
             overhead 24 mpu 84 quantum {FRAME}\n"
        )
    }

    fn fifo(&self, device: &str) -> String {
        let rate = self.spec.rate;
        format!("qdisc add dev {device} root handle 1: htb default 1\n")
            + &self.shaped(device, "1:", "1:1", &format!("rate {rate} ceil {rate}"))
            + &format!("qdisc add dev {device} parent 1:1 handle 10: bfifo limit {}\n", self.spec.buffer)
    }

    fn strict(&self, device: &str) -> String {
        let rate = self.spec.rate;
        let mut lines = format!("qdisc add dev {device} root handle 1: htb default 10\n")
            + &self.shaped(device, "1:", "1:1", &format!("rate {rate} ceil {rate}"));
        for level in Level::strictest_first() {
            let (class, handle) = (format!("1:1{level}"), format!("1{level}:"));
            // What a class has of its own it sends before any priority counts, so it has next to nothing
            // and borrows the rest, by priority.
            let share = format!("rate 1kbit ceil {rate} prio {}", 7 - level.number());
            lines += &self.shaped(device, "1:1", &class, &share);
            lines +=
                &format!("qdisc add dev {device} parent {class} handle {handle} bfifo limit {}\n", self.spec.buffer);
            lines += &format!(
                "filter add dev {device} parent 1: protocol ip prio 1 u32 match ip tos {:#04x} 0xe0 flowid {class}\n",
                level.traffic_class(0)
            );
        }
        lines
    }

    /// Sets how the switch's ports queue, for all of them.
    ///
    /// # Errors
    /// If the kernel lacks a qdisc.
    pub fn set_queueing(&self, queueing: Queueing) -> Result<()> {
        for host in 0..self.spec.hosts {
            let port = self.port(host);
            // The first time there is none to delete.
            let _ = self.switch.batch("tc", &format!("qdisc del dev {port} root\n"));
            let lines = match queueing {
                Queueing::Fifo => self.fifo(&port),
                Queueing::Strict => self.strict(&port),
            };
            self.switch.batch("tc", &lines)?;
        }
        Ok(())
    }

    /// Loads a plan on a host, as `qjump load` does.
    ///
    /// # Errors
    /// Those of [`dataplane::load`].
    pub fn load(&self, host: usize, plan: &Plan, queue: QueueChoice) -> Result<Vec<Loaded>> {
        let interface = self.interface(host);
        let loaded = self.hosts[host].enter(|| {
            let request = dataplane::Request {
                interfaces: &[interface],
                plan,
                pcp: false,
                hook: Hook::Auto,
                queue,
                host_rate: None,
            };
            Ok(dataplane::load(&request)?)
        })?;
        self.loaded.borrow_mut().push(host);
        Ok(loaded)
    }

    /// Unloads every host.
    ///
    /// # Errors
    /// Those of [`dataplane::unload`].
    pub fn unload_all(&self) -> Result<()> {
        let loaded: std::collections::BTreeSet<usize> = self.loaded.borrow_mut().drain(..).collect();
        for host in loaded {
            let interface = self.interface(host);
            self.hosts[host].enter(|| Ok(dataplane::unload(&interface, false)?))?;
        }
        Ok(())
    }
}

impl Drop for Rack {
    fn drop(&mut self) {
        // The pins lie outside the namespaces and would stay.
        let _ = self.unload_all();
    }
}
