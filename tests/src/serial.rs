//! A cable that takes its time. A veth hands frames over at once and takes any number; here they go through a switch whose port
//! sends one after the other, for as long as each has bytes (netem's rate). What pushes back is a token bucket of the
//! same rate in front of the host's queue: so a frame that arrives while another is on the wire waits for that one alone.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qjump::{testbed::NetNs, units::Rate};
use serde_json::Value;

use crate::{
    kernel::is_guest,
    link::{FAR, Link, NEAR},
};
use qjump_ebpf::frame::WIRE_OVERHEAD;

/// What a frame takes on the wire beyond its bytes.
const WIRE: u64 = WIRE_OVERHEAD as u64;

/// The largest frame on the wire, bytes.
pub const LARGEST: u64 = 1_514 + WIRE;

/// The rate of the token bucket, as a share of the cable's: what stands in the port's queue drains.
pub const BUCKET: f64 = 0.97;

/// A link of a rate.
pub struct Serial {
    /// Its ends.
    pub link: Link,
    /// Of both directions.
    pub rate: Rate,
    switch: NetNs,
}

impl Serial {
    /// Both ends up; `None` on a kernel that has no netem.
    pub fn new(rate: Rate) -> Result<Option<Self>> {
        let link = Link::new()?;
        let switch = NetNs::new("switch")?;
        let (device, far) = (&link.far_device, link.far.name());
        // The far end of the cable becomes a port of the switch, and the far host gets another one of the same name.
        link.far.ip(&format!("link set {device} netns {}", switch.name()))?;
        switch.ip("link add br0 type bridge stp_state 0 mcast_snooping 0")?;
        switch.ip("link set br0 up")?;
        switch.ip(&format!("link set {device} address 02:00:00:00:09:03 master br0 up"))?;
        switch.ip(&format!(
            "link add port type veth peer name {device} address 02:00:00:00:09:02 gso_max_segs 1 netns {far}"
        ))?;
        switch.ip("link set port master br0 up")?;
        link.far.ip(&format!("link set {device} addrgenmode none up"))?;
        link.far.ip(&format!("addr add {}/24 dev {device}", FAR.0))?;
        link.far.ip(&format!("neigh replace {} lladdr 02:00:00:00:09:01 dev {device} nud permanent", NEAR.0))?;
        let serialise =
            |device: &str| format!("qdisc add dev {device} root netem rate {}bit {WIRE} limit 100000\n", rate.bps());
        if switch.batch("tc", &(serialise("port") + &serialise(device))).is_err() {
            assert!(!is_guest(), "a guest has sch_netem");
            return Ok(None);
        }
        let cable = Self { link, rate, switch };
        cable.wait_until_up()?;
        Ok(Some(cable))
    }

    /// A device that was set up carries packets once the kernel has looked at its carrier, which it may do a moment later.
    fn wait_until_up(&self) -> Result<()> {
        let is_up = |netns: &NetNs| -> Result<bool> {
            let output = netns.command("ip").args(["-j", "link", "show", "up"]).output()?;
            let devices: Vec<Value> = serde_json::from_slice(&output.stdout)?;
            Ok(devices.iter().all(|device| device["ifname"] == "lo" || device["operstate"] == "UP"))
        };
        for _ in 0..500 {
            if is_up(&self.link.near)? && is_up(&self.switch)? && is_up(&self.link.far)? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the cable does not come up")
    }

    /// The rate of what pushes back, bit/s.
    pub fn bucket_bps(&self) -> u64 {
        (self.rate.bps() as f64 * BUCKET) as u64
    }

    /// Puts the queue that a load has made behind a token bucket, a frame deep. The kernel moves no queue,
    /// so it is made again, and compared.
    pub fn push_back(&self) -> Result<()> {
        let (device, bucket) = (&self.link.device, LARGEST + WIRE);
        let (root, leaves) = self.queue()?;
        let word = |qdisc: &Value, name: &str| qdisc[name].as_str().map(str::to_owned).context("a word is missing");
        ensure!(root["kind"] == "prio" && leaves.len() == 8, "not qjump's queue: {root:#} {leaves:#?}");
        let map = root["options"]["priomap"].as_array().context("no map")?;
        let map: Vec<String> = map.iter().map(Value::to_string).collect();
        let mut lines = format!(
            "qdisc replace dev {device} root handle 1: tbf rate {}bit burst {bucket} limit 100000 overhead {WIRE}\n\
             qdisc add dev {device} parent 1:1 handle {} prio bands 8 priomap {}\n",
            self.bucket_bps(),
            word(&root, "handle")?,
            map.join(" ")
        );
        for leaf in &leaves {
            let options = &leaf["options"];
            lines += &format!(
                "qdisc add dev {device} parent {} handle {} fq limit {} flow_limit {}\n",
                word(leaf, "parent")?,
                word(leaf, "handle")?,
                options["limit"],
                options["flow_limit"]
            );
        }
        self.link.near.batch("tc", &lines)?;
        let (again, leaves_again) = self.queue()?;
        ensure!((&root["options"], &leaves) == (&again["options"], &leaves_again), "{leaves:#?} {leaves_again:#?}");
        Ok(())
    }

    /// The prio of the near interface and what is below it.
    fn queue(&self) -> Result<(Value, Vec<Value>)> {
        let output = self.link.near.command("tc").args(["-j", "qdisc", "show", "dev", &self.link.device]).output()?;
        let mut qdiscs: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let at = qdiscs.iter().position(|qdisc| qdisc["kind"] == "prio").context("no prio")?;
        let root = qdiscs.remove(at);
        qdiscs.retain(|qdisc| qdisc["kind"] == "fq");
        qdiscs.sort_by_key(|qdisc| qdisc["handle"].to_string());
        Ok((root, qdiscs))
    }
}
