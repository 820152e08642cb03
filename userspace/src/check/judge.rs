//! What the facts mean. Pure.

use qjump_ebpf::{frame::WIRE_OVERHEAD, names::PROGRAM};

use super::{Bypass, Facts, Finding, Host, Interface, Load, Path, Seen, Status};
use crate::{
    dataplane::{Foreseen, Hook, Request, Trial, loses_late_timers},
    plan::{Claims, Delays},
    qdisc::{Available, Queue},
    units::{show_ns, show_rate},
};

/// Bytes of an Ethernet header.
const ETHERNET_HEADER: u32 = 14;

/// What the facts mean for a load of this plan, or for any without one. The host first.
pub fn judge(facts: &Facts, request: Option<&Request<'_>>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let host = About { interface: None, findings: &mut findings };
    judge_host(host, &facts.host, request);
    for interface in &facts.interfaces {
        let about = About { interface: Some(&interface.name), findings: &mut findings };
        judge_interface(about, interface, &facts.host, request);
    }
    if facts.interfaces.len() > 1 {
        let mut about = About { interface: None, findings: &mut findings };
        let number = facts.interfaces.len();
        about.warning(
            "plan",
            format!("{number} interfaces, and each may send what the plan allows a host"),
            format!("count this host {number} times in --hosts, if the interfaces lead to one network"),
        );
    }
    findings
}

/// What findings are about, and where they go.
struct About<'a> {
    interface: Option<&'a str>,
    findings: &'a mut Vec<Finding>,
}

impl About<'_> {
    fn add(&mut self, status: Status, needed: bool, topic: &'static str, found: String, remedy: Option<String>) {
        let interface = self.interface.map(str::to_owned);
        self.findings.push(Finding { status, interface, topic, found, remedy, needed });
    }

    fn ok(&mut self, topic: &'static str, found: impl Into<String>) {
        self.add(Status::Ok, false, topic, found.into(), None);
    }

    fn warning(&mut self, topic: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Status::Warning, false, topic, found.into(), Some(remedy.into()));
    }

    fn broken(&mut self, topic: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Status::Broken, false, topic, found.into(), Some(remedy.into()));
    }

    fn unsupported(&mut self, needed: bool, topic: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.add(Status::Unsupported, needed, topic, found.into(), Some(remedy.into()));
    }

    /// What could not be seen is a warning: the guarantee may hold all the same.
    fn unseen(&mut self, topic: &'static str, what: &str, why: &str) {
        self.add(Status::Warning, false, topic, format!("{what} not looked at: {why}"), None);
    }

    /// A load would refuse. Its messages say what is wrong, and then what to do.
    fn refused(&mut self, topic: &'static str, message: &str) {
        let (found, remedy) = message.split_once("; ").map_or((message, None), |(found, remedy)| (found, Some(remedy)));
        self.add(Status::Broken, false, topic, found.to_owned(), remedy.map(str::to_owned));
    }

    /// The value, or a finding that it could not be seen.
    fn see<'s, T>(&mut self, topic: &'static str, what: &str, seen: &'s Seen<T>) -> Option<&'s T> {
        seen.as_ref().map_err(|why| self.unseen(topic, what, why)).ok()
    }
}

const AS_ROOT: &str = "run it as root, for example with sudo";

fn judge_host(mut about: About<'_>, host: &Host, request: Option<&Request<'_>>) {
    let grants_needed =
        request.is_some_and(|request| request.plan.levels.iter().any(|level| level.spec.claims == Claims::GrantOnly));
    match host.lacks {
        Some(missing) => about.broken(
            "rights",
            format!(
                "{} is missing: a load needs CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and, to try queues, CAP_SYS_ADMIN",
                missing.name()
            ),
            AS_ROOT,
        ),
        None => about.ok("rights", "this user may load programs and set queues"),
    }
    if let Some(trial) = about.see("kernel", "the eBPF programs were", &host.trial) {
        judge_trial(&mut about, trial, request.map(|request| request.hook), grants_needed);
    }
    if !host.has_btf {
        let found = "the kernel does not describe its types (BTF)";
        about.unsupported(false, "kernel", found, "nothing for qjump, which brings its own; bpftool shows less");
    }
    if host.jit == Some(0) {
        let found = "eBPF programs are interpreted, which makes each packet several times as dear";
        about.warning("kernel", found, "sysctl net.core.bpf_jit_enable=1");
    }
    if let Some(queues) = about.see("queue", "the kernel's queues were", &host.queues) {
        judge_queues(&mut about, *queues);
    }
    match &host.bpffs {
        Ok(true) => about.ok("pins", "the BPF file system is mounted at /sys/fs/bpf"),
        Ok(false) => about.ok("pins", "the BPF file system is not mounted; a load mounts it at /sys/fs/bpf"),
        Err(why) => about.refused("pins", why),
    }
    judge_cgroups(&mut about, host, grants_needed);
    judge_clock(&mut about, &host.clock);
    if host.forwards {
        about.warning(
            "forwarding",
            "this host forwards packets: those of containers and virtual machines behind it have level 0, whatever they claim",
            "run what needs a level in the host's network namespace, or load qjump inside, on the container's own interface",
        );
    }
    judge_rewrites(&mut about, host);
    judge_bypasses(&mut about, host);
}

fn judge_trial(about: &mut About<'_>, trial: &Trial, hook: Option<Hook>, grants_needed: bool) {
    if let Err(why) = &trial.egress {
        let found = format!("the kernel refuses the egress program: {why}");
        let remedy = "Linux 5.10 or later, with CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT";
        return about.unsupported(true, "kernel", found, remedy);
    }
    about.ok("kernel", "the egress program was loaded and verified");
    if !trial.compare_exchange {
        about.unsupported(
            false,
            "kernel",
            "eBPF has no compare-exchange, which came with Linux 5.12 (arm64: 5.18)",
            "nothing: the program with locks takes its place, some 200 ns dearer for a limited packet",
        );
    }
    match (&trial.tcx, &trial.clsact) {
        (Ok(()), _) => about.ok("kernel", "it was attached to tcx, in a namespace of its own"),
        (Err(_), Ok(())) => about.unsupported(
            hook == Some(Hook::Tcx),
            "kernel",
            "there is no tcx, which came with Linux 6.6",
            "clsact takes its place: --hook auto, the default",
        ),
        (Err(tcx), Err(clsact)) => about.unsupported(
            true,
            "kernel",
            format!("the program can be attached neither to tcx ({tcx}) nor to clsact ({clsact})"),
            "a kernel with CONFIG_NET_CLS_ACT, CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF, or Linux 6.6",
        ),
    }
    if let (Ok(()), Err(why), Some(Hook::Clsact)) = (&trial.tcx, &trial.clsact, hook) {
        about.unsupported(true, "kernel", format!("the program cannot be attached to clsact: {why}"), "--hook auto");
    }
    match &trial.refused[..] {
        [] => about.ok("kernel", "the programs for cgroups (run, tag, assign) were loaded and verified"),
        [(name, why), ..] => {
            let found = format!("the kernel refuses programs for cgroups, {name} first: {why}");
            about.unsupported(
                grants_needed,
                "kernel",
                found,
                "a kernel with CONFIG_CGROUP_BPF; without, no run and no tag",
            );
        }
    }
}

fn judge_queues(about: &mut About<'_>, queues: Available) {
    let Available { htb, fq, prio } = queues;
    let all = [("htb", htb), ("fq", fq), ("prio", prio)];
    let list = |there: bool| {
        let names: Vec<&str> = all.iter().filter(|(_, has)| *has == there).map(|(name, _)| *name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let found = format!("queues that this kernel has: {}; that it has not: {}", list(true), list(false));
    if htb || (fq && prio) {
        about.ok("queue", found);
    } else {
        about.unsupported(
            false,
            "queue",
            found,
            "modprobe sch_fq sch_prio, or sch_htb; without, what is over a limit is dropped",
        );
    }
}

fn judge_cgroups(about: &mut About<'_>, host: &Host, needed: bool) {
    let cgroups = match &host.cgroups {
        Ok(cgroups) => cgroups,
        Err(why) => return about.add(Status::Unsupported, needed, "cgroups", why.clone(), None),
    };
    let beside = if cgroups.hybrid { ", beside those of version 1" } else { "" };
    let found = format!("cgroup2 is mounted at {}{beside}", cgroups.mount);
    match (cgroups.writable, cgroups.whole) {
        (true, true) => about.ok("cgroups", found),
        (false, _) => about.warning(
            "cgroups",
            format!("{found}, read-only as in a container: no run, and no tag of a process"),
            "run qjump on the host for those",
        ),
        (true, false) => about.warning(
            "cgroups",
            format!("{found}, and only a part of the host's hierarchy can be seen, as in a container"),
            "run qjump with the cgroup namespace of the host: nsenter --cgroup=/proc/1/ns/cgroup",
        ),
    }
}

/// The limiter reads the clock for each packet of a limited level.
fn judge_clock(about: &mut About<'_>, clock: &Seen<String>) {
    let Some(clock) = about.see("clock", "the clock source was", clock) else { return };
    match clock.as_str() {
        "jiffies" | "refined-jiffies" => about.broken(
            "clock",
            format!("the clock source is {clock}, which stands still for milliseconds: spacing by it is none"),
            "use another one: /sys/devices/system/clocksource/clocksource0/available_clocksource lists what there is",
        ),
        "hpet" | "acpi_pm" | "pit" => about.warning(
            "clock",
            format!(
                "the clock source is {clock}: each reading takes about a microsecond, and so does each limited packet"
            ),
            "use tsc or kvm-clock, if available_clocksource in /sys/devices/system/clocksource/clocksource0 lists it",
        ),
        _ => about.ok("clock", format!("the clock source is {clock}")),
    }
}

fn judge_rewrites(about: &mut About<'_>, host: &Host) {
    if let Some(rewrites) = about.see("marks", "the rules of nftables were", &host.rewrites) {
        let places = |priority: bool| {
            let mut places: Vec<&str> =
                rewrites.iter().filter(|rule| rule.priority == priority).map(|rule| rule.place.as_str()).collect();
            places.dedup();
            places.join(", ")
        };
        match places(true) {
            places if places.is_empty() => {}
            places => about.warning(
                "marks",
                format!("rules of nftables set the priority of packets, which is their level ({places})"),
                "have them leave out what has a level; `nft list ruleset` shows them",
            ),
        }
        match places(false) {
            places if places.is_empty() => about.ok("marks", "no rule of nftables rewrites codepoints"),
            places => about.ok(
                "marks",
                format!(
                    "rules of nftables rewrite codepoints ({places}): before qjump's program, which writes its own mark"
                ),
            ),
        }
    }
    match &host.has_mangle {
        Ok(false) => {}
        Ok(true) => about.warning(
            "marks",
            "legacy iptables has a mangle table, whose rules were not read; one with CLASSIFY changes levels",
            "look at it: iptables-legacy -t mangle -S | grep CLASSIFY",
        ),
        Err(why) => about.unseen("marks", "the tables of legacy iptables were", why),
    }
}

fn judge_bypasses(about: &mut About<'_>, host: &Host) {
    if let Some(bypasses) = about.see("bypass", "sockets that can send around the program were", &host.bypasses) {
        for socket in bypasses.iter().filter(|socket| socket.path == Path::Xdp) {
            about.warning(
                "bypass",
                format!(
                    "{} has an AF_XDP socket: what it sends is neither limited nor marked, on whichever interface",
                    who(socket)
                ),
                "end it, or make sure that it sends through an interface of another network",
            );
        }
    }
    if !host.xdp.is_empty() {
        about.warning(
            "bypass",
            format!(
                "XDP programs run on {}: frames that they redirect are neither limited nor marked",
                host.xdp.join(", ")
            ),
            "see what they do: bpftool net; ip link show",
        );
    }
    if !host.rdma.is_empty() {
        about.warning(
            "bypass",
            format!("RDMA devices ({}): what they send, the kernel does not see", host.rdma.join(", ")),
            "let no RDMA traffic use the priorities and codepoints of the levels, or plan it as a lower level",
        );
    }
}

fn who(socket: &Bypass) -> String {
    format!("{} (process {})", socket.program, socket.pid)
}

fn judge_interface(mut about: About<'_>, interface: &Interface, host: &Host, request: Option<&Request<'_>>) {
    let foreseen = match &interface.load {
        None => None,
        Some(Load::Foreseen(foreseen)) => Some(foreseen),
        Some(Load::Refused(why)) => {
            about.refused("load", why);
            None
        }
        Some(Load::Unseen(why)) => {
            about.unseen("load", "what a load would do was", why);
            None
        }
    };
    if let (Some(foreseen), Some(request)) = (foreseen, request) {
        judge_load(&mut about, foreseen, request);
    }
    judge_link(&mut about, interface, request);
    if let Some(request) = request {
        judge_sizes(&mut about, interface, request, foreseen.and_then(|foreseen| foreseen.gso_cap));
    }
    judge_place(&mut about, interface, foreseen, request);
    judge_programs(&mut about, interface, foreseen);
    for socket in host.bypasses.iter().flatten() {
        if let Path::QdiscBypass(bound) = socket.path
            && (bound == 0 || bound == interface.link.index)
        {
            about.broken(
                "bypass",
                format!(
                    "{} has a packet socket with PACKET_QDISC_BYPASS: what it sends is neither limited nor marked",
                    who(socket)
                ),
                "end it, or have it send without that option",
            );
        }
    }
    if interface.link.virtual_functions > 0 {
        about.warning(
            "bypass",
            format!(
                "{} virtual functions (SR-IOV) send through the same port, unlimited and with marks of their own",
                interface.link.virtual_functions
            ),
            "limit them in what they are given to, and count each as a host",
        );
    }
    if interface.has_ipv6 {
        about.ok("ipv6", "on: now and then the kernel sends a multicast report of its own at level 7");
    }
}

fn judge_load(about: &mut About<'_>, foreseen: &Foreseen, request: &Request<'_>) {
    let Foreseen { hook, replaces, queue, displaces, gso_cap, removes_stale } = foreseen;
    let what = if *replaces { "a load would replace plan and program at" } else { "a load would attach at" };
    let stale = if *removes_stale { ", after removing what an earlier load had left behind" } else { "" };
    about.ok("load", format!("{what} {hook} egress{stale}"));
    let name = queue.queue.name();
    match (queue.queue, queue.falls_short) {
        (Queue::Keep, true) => about.warning(
            "queue",
            format!("over a limit, packets are dropped: {}", queue.why),
            "drops are wrong for TCP, and messages need a tolerance (--tolerance) instead; give the interface a queue if it can have one",
        ),
        (Queue::Keep, false) => about.ok("queue", format!("over a limit, packets are dropped: {}", queue.why)),
        _ => {
            let displaced = displaces.as_ref().map_or(String::new(), |kind| format!(", in the place of {kind} until the unload"));
            about.ok("queue", format!("over a limit, packets wait in {name}: {}{displaced}", queue.why));
        }
    }
    if let Some(level) = loses_late_timers(request.plan, queue.queue) {
        about.warning(
            "queue",
            format!("level {level} has no tolerance, so what late timers cost a packet that waits in htb is lost"),
            "--tolerance 200us buys it back",
        );
    }
    if let Some(cap) = gso_cap {
        about.ok(
            "offloads",
            format!("a load would cap GSO packets at {cap} segment(s), so that bursts stay within the plan"),
        );
    }
}

fn judge_link(about: &mut About<'_>, interface: &Interface, request: Option<&Request<'_>>) {
    let link = &interface.link;
    if !link.is_up {
        about.warning(
            "link",
            "down, or without a carrier",
            format!("ip link set dev {} up, and look at its cable", interface.name),
        );
    }
    if link.half_duplex {
        about.broken(
            "link",
            "half duplex: frames collide and are sent again, for as long as it takes",
            "set both ends to autonegotiate",
        );
    }
    let Some(request) = request else { return };
    let (needed, host_rate) = (request.plan.network.link_rate, request.host_rate);
    let Some(speed) = link.speed_mbit.map(|mbit| u64::from(mbit) * 1_000_000) else {
        let found = format!("it does not say how fast it is, and the plan needs {needed}");
        return about.warning(
            "link",
            found,
            "make sure of it; a virtual link that stands for a slower one needs --host-rate",
        );
    };
    let shown = show_rate(speed as f64);
    if speed < needed.bps() {
        return about.broken(
            "link",
            format!("{shown}, and the plan says that no link is slower than {needed}"),
            format!("plan with --link-rate {shown}, or find out why the link is so slow"),
        );
    }
    match host_rate.filter(|rate| rate.bps() > speed) {
        Some(rate) => about.warning(
            "link",
            format!("{shown}, so that --host-rate {rate} shapes nothing: packets wait behind the queue"),
            format!("--host-rate {shown}, or none if the device pushes back"),
        ),
        None => about.ok("link", format!("{shown}; the plan needs {needed}")),
    }
}

/// MTU and GSO bursts against what the plan counts on.
fn judge_sizes(about: &mut About<'_>, interface: &Interface, request: &Request<'_>, cap: Option<u32>) {
    let network = &request.plan.network;
    let link = &interface.link;
    let tag = if request.pcp { 4 } else { 0 };
    let frame = link.mtu + ETHERNET_HEADER;
    let wire = frame + tag + WIRE_OVERHEAD;
    let segments = link.gso_max_segs.min(cap.unwrap_or(u32::MAX)).max(1);
    // What bounds a GSO packet is its L3 bytes; headers and gaps of its frames are not counted in the plan's burst either.
    let burst = if segments == 1 { wire } else { segments.saturating_mul(wire).min(link.gso_max_size.max(wire)) };
    let time = |bytes: u32| show_ns(network.time_ns(f64::from(bytes)));
    let cut = match link.tso {
        Some(true) => ", cut by the device (TSO)",
        Some(false) => ", cut by the kernel",
        None => "",
    };
    let bursts = format!("GSO packets of up to {burst} bytes{cut}");
    match network.delays {
        Delays::Path(path) => {
            let allowed = network.mtu();
            if frame > allowed {
                about.broken(
                    "mtu",
                    format!("frames of up to {frame} bytes leave here, and the plan counts on {allowed} at most"),
                    format!(
                        "plan with --mtu {frame}, or `ip link set dev {} mtu {}`",
                        interface.name,
                        allowed - ETHERNET_HEADER
                    ),
                );
            } else {
                about.ok("mtu", format!("frames of up to {frame} bytes; the plan counts on {allowed}"));
            }
            let room = path.host_burst.max(wire);
            if burst > room {
                about.broken(
                    "offloads",
                    format!(
                        "{bursts} may be in the device before a packet, and the plan counts on {}",
                        path.host_burst
                    ),
                    format!(
                        "`ip link set dev {} gso_max_segs {}`, or plan with --host-burst {burst}",
                        interface.name,
                        (room / wire).max(1)
                    ),
                );
            } else {
                about.ok("offloads", format!("{bursts}; the plan counts on {}", path.host_burst));
            }
        }
        Delays::Given(epsilon) => {
            let epsilon_ns = epsilon.ns() as f64;
            if network.time_ns(f64::from(wire)) > epsilon_ns {
                about.broken(
                    "mtu",
                    format!("a frame of {frame} bytes takes {} on the slowest link, longer than all fixed delays ({epsilon})", time(wire)),
                    "give an epsilon that counts one such frame a switch, or have it computed: --hops and --switch-delay",
                );
            } else {
                about.ok(
                    "mtu",
                    format!(
                        "frames of up to {frame} bytes, {} on the slowest link, within epsilon {epsilon}",
                        time(wire)
                    ),
                );
            }
            if network.time_ns(f64::from(burst)) > epsilon_ns {
                about.warning(
                    "offloads",
                    format!("{bursts} take {}, longer than epsilon {epsilon}: one in the device may be in front of a packet", time(burst)),
                    format!("`ip link set dev {} gso_max_segs 1`, or --hops, which counts it", interface.name),
                );
            } else {
                about
                    .ok("offloads", format!("{bursts}, {} on the slowest link, within epsilon {epsilon}", time(burst)));
            }
        }
    }
}

/// Where the interface is among others, and what that means for limiter and queue.
fn judge_place(
    about: &mut About<'_>,
    interface: &Interface,
    foreseen: Option<&Foreseen>,
    request: Option<&Request<'_>>,
) {
    let link = &interface.link;
    let kind = if link.kind.is_empty() { "a device of its own" } else { &link.kind };
    if let Some((master, of)) = &link.master
        && matches!(of.as_str(), "bond" | "team")
    {
        return about.broken(
            "place",
            format!("a port of the {of} {master}, whose other ports would send as much again"),
            format!("load qjump on {master}"),
        );
    }
    let tunnels = ["vxlan", "geneve", "gretap", "ip6gretap", "erspan", "ip6erspan"];
    if tunnels.contains(&kind) {
        return about.warning(
            "place",
            format!("a tunnel ({kind}): its packets leave through another interface, unlimited by what that one's levels send"),
            "load qjump on the interface that the tunnel's packets leave through",
        );
    }
    let shaped = request.is_some_and(|request| request.host_rate.is_some());
    if !link.lower.is_empty() && !shaped {
        let lower = link.lower.join(", ");
        let better = if kind == "bond" || kind == "team" {
            "give --host-rate, so that packets wait here, by level".to_owned()
        } else {
            format!("load qjump on {lower}")
        };
        about.warning(
            "place",
            format!("{kind} over {lower}, in whose queue packets wait without regard to levels"),
            better,
        );
    } else {
        about.ok("place", kind);
    }
    let queue = foreseen.map_or(Queue::Keep, |foreseen| foreseen.queue.queue);
    let root = about.see("queue", "the queue at its root was", &interface.root).map_or("", String::as_str);
    if queue != Queue::Keep && matches!(root, "mq" | "mqprio") {
        about.warning(
            "queue",
            format!("{} with one lock takes the place of {root} with {} queues", queue.name(), link.tx_queues),
            "where CPUs together send more packets than one can, use --queue keep and a tolerance",
        );
    }
}

fn judge_programs(about: &mut About<'_>, interface: &Interface, foreseen: Option<&Foreseen>) {
    let hook = foreseen.map_or("tcx", |foreseen| foreseen.hook);
    if let Some(programs) = about.see("programs", "the programs on its egress were", &interface.programs) {
        let at = programs.iter().position(|name| name == PROGRAM);
        let before = match (at, hook) {
            (Some(at), _) => &programs[..at],
            (None, "clsact") => &programs[..],
            (None, _) => &[],
        };
        let after = &programs[at.map_or(before.len(), |at| at + 1)..];
        if !before.is_empty() {
            about.warning(
                "programs",
                format!("{} on tcx run before qjump's program, and may pass packets around it", before.join(", ")),
                "unload and load qjump: on tcx it puts itself first",
            );
        }
        if !after.is_empty() {
            about.warning(
                "programs",
                format!("{} on tcx run after qjump's program, and may change marks", after.join(", ")),
                "make sure that they leave DSCP, 802.1p and skb->priority alone",
            );
        }
        if before.is_empty() && after.is_empty() {
            about.ok("programs", "nobody else's program is on its tcx egress");
        }
    }
    if let Some(filters) = about.see("programs", "the filters of its clsact were", &interface.filters)
        && !filters.is_empty()
    {
        let list: Vec<String> =
            filters.iter().map(|filter| format!("{} pref {}", filter.kind, filter.priority)).collect();
        about.warning(
            "programs",
            format!(
                "filters on its clsact egress ({}) run after qjump's program, and may change marks",
                list.join(", ")
            ),
            format!(
                "make sure that they leave DSCP, 802.1p and skb->priority alone: `tc filter show dev {} egress`",
                interface.name
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        check::{Cgroups, Link, Rewrite, holds},
        config::QueueChoice,
        dataplane::{Capability, Chosen, Why, netlink::EgressFilter},
        plan::{Demand, LevelSpec, Model, Network, Plan},
        units::{Nanos, Rate},
    };
    use qjump_ebpf::Level;

    const NAME: &str = "eth0";

    fn plan(claims: Claims) -> Plan {
        let mut level = LevelSpec::new(Level::STRICTEST, Demand::Factor(1.0));
        level.tolerance = Nanos::from_ns(200_000);
        level.claims = claims;
        let network = Network {
            hosts: 12,
            link_rate: Rate::from_bps(10_000_000_000),
            max_packet: 256,
            delays: Delays::Given(Nanos::from_ns(4_000)),
            wire_overhead: 24,
            tagged: false,
            model: Model::Strict,
            levels: vec![level],
        };
        network.plan().expect("a plan")
    }

    /// A host and an interface without any fault.
    fn good() -> Facts {
        let queue = Chosen { queue: Queue::Fq, reason: Why::Best, why: "the best".to_owned(), falls_short: false };
        let foreseen =
            Foreseen { hook: "tcx", replaces: false, queue, displaces: None, gso_cap: None, removes_stale: false };
        let trial = Trial { compare_exchange: true, egress: Ok(()), refused: Vec::new(), tcx: Ok(()), clsact: Ok(()) };
        Facts {
            host: Host {
                lacks: None,
                trial: Ok(trial),
                has_btf: true,
                jit: Some(1),
                queues: Ok(Available { htb: true, fq: true, prio: true }),
                bpffs: Ok(true),
                cgroups: Ok(Cgroups { mount: "/sys/fs/cgroup".into(), hybrid: false, writable: true, whole: true }),
                clock: Ok("tsc".to_owned()),
                forwards: false,
                rewrites: Ok(Vec::new()),
                has_mangle: Ok(false),
                bypasses: Ok(Vec::new()),
                rdma: Vec::new(),
                xdp: Vec::new(),
            },
            interfaces: vec![Interface {
                name: NAME.to_owned(),
                load: Some(Load::Foreseen(foreseen)),
                link: Link {
                    index: 2,
                    mtu: 1_500,
                    is_up: true,
                    speed_mbit: Some(10_000),
                    gso_max_segs: 1,
                    gso_max_size: 65_536,
                    tx_queues: 8,
                    ..Link::default()
                },
                root: Ok("fq_codel".to_owned()),
                programs: Ok(Vec::new()),
                filters: Ok(Vec::new()),
                has_ipv6: false,
            }],
        }
    }

    fn judged(facts: &Facts, plan: &Plan, change: impl FnOnce(&mut Request<'_>)) -> Vec<Finding> {
        let interfaces = [NAME.to_owned()];
        let mut request = Request {
            interfaces: &interfaces,
            plan,
            pcp: false,
            hook: Hook::Auto,
            queue: QueueChoice::Auto,
            host_rate: None,
        };
        change(&mut request);
        judge(facts, Some(&request))
    }

    /// The findings that are not Ok, once the facts are changed.
    fn faults(change: impl FnOnce(&mut Host, &mut Interface)) -> Vec<(Status, &'static str)> {
        let mut facts = good();
        change(&mut facts.host, &mut facts.interfaces[0]);
        let findings = judged(&facts, &plan(Claims::Allow), |_| {});
        let faults: Vec<&Finding> = findings.iter().filter(|finding| finding.status != Status::Ok).collect();
        let broken = faults.iter().any(|finding| finding.status == Status::Broken);
        assert!(!broken || !holds(&findings));
        faults.iter().map(|finding| (finding.status, finding.topic)).collect()
    }

    #[test]
    fn nothing_is_wrong_with_a_good_host() {
        assert_eq!(faults(|_, _| {}), []);
        assert!(judge(&good(), None).iter().all(|finding| finding.status == Status::Ok));
    }

    type Change = fn(&mut Host, &mut Interface);

    #[test]
    fn each_fault_of_the_host_is_found() {
        use Status::{Broken, Unsupported, Warning};
        let cases: [(Change, Status, &str); 22] = [
            (|host, _| host.lacks = Some(Capability::Bpf), Broken, "rights"),
            (|host, _| host.trial = Err("no".into()), Warning, "kernel"),
            (|host, _| host.trial.as_mut().unwrap().egress = Err("no".into()), Unsupported, "kernel"),
            (|host, _| host.trial.as_mut().unwrap().compare_exchange = false, Unsupported, "kernel"),
            (|host, _| host.trial.as_mut().unwrap().tcx = Err("no".into()), Unsupported, "kernel"),
            (|host, _| host.trial.as_mut().unwrap().refused = vec![("x", "no".into())], Unsupported, "kernel"),
            (|host, _| host.has_btf = false, Unsupported, "kernel"),
            (|host, _| host.jit = Some(0), Warning, "kernel"),
            (|host, _| host.queues = Err("no".into()), Warning, "queue"),
            (|host, _| host.queues = Ok(Available { htb: false, fq: true, prio: false }), Unsupported, "queue"),
            (|host, _| host.bpffs = Err("no; mount it".into()), Broken, "pins"),
            (|host, _| host.cgroups = Err("no".into()), Unsupported, "cgroups"),
            (|host, _| host.cgroups.as_mut().unwrap().writable = false, Warning, "cgroups"),
            (|host, _| host.cgroups.as_mut().unwrap().whole = false, Warning, "cgroups"),
            (|host, _| host.clock = Ok("acpi_pm".into()), Warning, "clock"),
            (|host, _| host.clock = Ok("refined-jiffies".into()), Broken, "clock"),
            (|host, _| host.forwards = true, Warning, "forwarding"),
            (|host, _| host.rewrites = Ok(vec![Rewrite { place: "a b".into(), priority: true }]), Warning, "marks"),
            (|host, _| host.has_mangle = Ok(true), Warning, "marks"),
            (|host, _| host.bypasses = Err("no".into()), Warning, "bypass"),
            (|host, _| host.rdma = vec!["uverbs0".into()], Warning, "bypass"),
            (|host, _| host.xdp = vec!["eth1".into()], Warning, "bypass"),
        ];
        for (number, (change, status, topic)) in cases.into_iter().enumerate() {
            assert_eq!(faults(change), [(status, topic)], "case {number}, {topic}");
        }
    }

    #[test]
    fn each_fault_of_an_interface_is_found() {
        use Status::{Broken, Warning};
        fn foreseen(interface: &mut Interface) -> &mut Foreseen {
            match &mut interface.load {
                Some(Load::Foreseen(foreseen)) => foreseen,
                other => panic!("{other:?}"),
            }
        }
        let cases: [(Change, Status, &str); 20] = [
            (|_, one| one.load = Some(Load::Refused("no; do".into())), Broken, "load"),
            (|_, one| one.load = Some(Load::Unseen("no".into())), Warning, "load"),
            (
                |_, one| {
                    foreseen(one).queue =
                        Chosen { queue: Queue::Keep, reason: Why::Foreign, why: "no".into(), falls_short: true }
                },
                Warning,
                "queue",
            ),
            (|_, one| one.root = Ok("mq".into()), Warning, "queue"),
            (|_, one| one.link.is_up = false, Warning, "link"),
            (|_, one| one.link.half_duplex = true, Broken, "link"),
            (|_, one| one.link.speed_mbit = None, Warning, "link"),
            (|_, one| one.link.speed_mbit = Some(1_000), Broken, "link"),
            (|_, one| one.link.mtu = 9_000, Broken, "mtu"),
            (|_, one| one.link.gso_max_segs = 65_535, Warning, "offloads"),
            (|_, one| one.link.master = Some(("bond0".into(), "bond".into())), Broken, "place"),
            (|_, one| one.link.kind = "vxlan".into(), Warning, "place"),
            (|_, one| one.link.lower = vec!["eth1".into()], Warning, "place"),
            (|_, one| one.programs = Ok(vec!["a".into()]), Warning, "programs"),
            (|_, one| one.programs = Ok(vec!["a".into(), PROGRAM.into()]), Warning, "programs"),
            (|_, one| one.programs = Err("no".into()), Warning, "programs"),
            (
                |_, one| {
                    let filter =
                        EgressFilter { kind: "u32".into(), priority: 9, protocol: 3, handle: 1, program_id: None };
                    one.filters = Ok(vec![filter]);
                },
                Warning,
                "programs",
            ),
            (|_, one| one.link.virtual_functions = 4, Warning, "bypass"),
            (
                |host, _| {
                    host.bypasses = Ok(vec![Bypass { path: Path::QdiscBypass(2), pid: 1, program: "x".into() }]);
                },
                Broken,
                "bypass",
            ),
            (
                |host, _| host.bypasses = Ok(vec![Bypass { path: Path::Xdp, pid: 1, program: "x".into() }]),
                Warning,
                "bypass",
            ),
        ];
        for (number, (change, status, topic)) in cases.into_iter().enumerate() {
            let found = faults(change);
            // A frame of 9014 bytes is a burst that takes as long.
            let (first, rest) = found.split_first().expect("a finding");
            assert_eq!(*first, (status, topic), "case {number}");
            assert!(rest.is_empty() || topic == "mtu", "case {number}: {found:?}");
        }
        let elsewhere = Bypass { path: Path::QdiscBypass(3), pid: 1, program: "x".into() };
        assert_eq!(faults(|host, _| host.bypasses = Ok(vec![elsewhere])), [], "bound to another interface");
        assert_eq!(faults(|_, one| one.link.master = Some(("br0".into(), "bridge".into()))), []);
        // A cap that the load sets counts.
        assert_eq!(faults(|_, one| (one.link.gso_max_segs, foreseen(one).gso_cap) = (65_535, Some(1))), []);
    }

    #[test]
    fn what_the_plan_needs_must_be_there() {
        let mut facts = good();
        facts.host.cgroups = Err("no".into());
        facts.host.trial.as_mut().unwrap().tcx = Err("no".into());
        assert!(holds(&judged(&facts, &plan(Claims::Allow), |_| {})));
        assert!(!holds(&judged(&facts, &plan(Claims::GrantOnly), |_| {})));
        assert!(!holds(&judged(&facts, &plan(Claims::Allow), |request| request.hook = Hook::Tcx)));
        let mut facts = good();
        facts.host.trial.as_mut().unwrap().clsact = Err("no".into());
        assert!(holds(&judged(&facts, &plan(Claims::Allow), |_| {})));
        assert!(!holds(&judged(&facts, &plan(Claims::Allow), |request| request.hook = Hook::Clsact)));
    }

    #[test]
    fn a_host_rate_is_held_against_the_link() {
        let rate = |bps| move |request: &mut Request<'_>| request.host_rate = Some(Rate::from_bps(bps));
        let warnings = |facts: &Facts, bps| {
            let findings = judged(facts, &plan(Claims::Allow), rate(bps));
            findings.iter().filter(|finding| finding.status == Status::Warning).count()
        };
        assert_eq!(warnings(&good(), 5_000_000_000), 0);
        assert_eq!(warnings(&good(), 20_000_000_000), 1);
        // It makes up for a queue below that knows no levels.
        let mut facts = good();
        facts.interfaces[0].link.lower = vec!["eth1".into()];
        assert_eq!(warnings(&facts, 5_000_000_000), 0);
    }

    #[test]
    fn two_interfaces_are_two_hosts() {
        let mut facts = good();
        facts.interfaces.push(facts.interfaces[0].clone());
        let findings = judged(&facts, &plan(Claims::Allow), |_| {});
        assert_eq!(findings.last().map(|finding| (finding.status, finding.topic)), Some((Status::Warning, "plan")));
    }
}
