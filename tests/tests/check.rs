//! `qjump check`: what it finds on real interfaces, that it agrees with `load`, and that it leaves no trace.

use std::{
    collections::HashSet,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::programs::{LinkOrder, TcAttachType, loaded_programs, tc::TcAttachOptions};
use qjump::qdisc;
use qjump_tests::{
    kernel::{has_compare_exchange, has_tcx, is_guest},
    link::{Link, PLAN, binary, failed, succeeded},
    nobody::{self, Folder},
    program::{classifier, lab},
};
use serde_json::Value;

/// A plan that has nothing to complain about on a [`Link`].
const CLEAN: [&str; 12] = [
    "--hosts",
    "12",
    "--link-rate",
    "10gbit",
    "--max-packet",
    "256",
    "--epsilon",
    "4us",
    "--level",
    "7:1,tolerance=200us",
    "--level",
    "5:4",
];

fn with<'a>(link: &'a Link, plan: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [&["check", "--interface", &link.device][..], plan, more].concat()
}

/// The findings of a check, which must have ended with this status.
fn findings(output: &Output, status: i32) -> Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&output.stdout);
    let code = output.status.code();
    ensure!(code == Some(status), "{code:?}, {}{text}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text)?;
    assert_eq!((&report["schema_version"], &report["holds"]), (&1.into(), &(status == 0).into()));
    report["findings"].as_array().cloned().context("no findings")
}

fn check(link: &Link, plan: &[&str], more: &[&str], status: i32) -> Result<Vec<Value>> {
    let mut arguments = with(link, plan, more);
    arguments.push("--json");
    findings(&link.qjump(&arguments)?, status)
}

/// The one finding with this status and topic whose text and remedy have these parts.
fn expect(findings: &[Value], status: &str, topic: &str, parts: &[&str]) {
    let text = |finding: &Value| format!("{} -> {}", finding["found"], finding["remedy"]);
    let fits = |finding: &&Value| {
        finding["status"] == status
            && finding["topic"] == topic
            && parts.iter().all(|part| text(finding).contains(part))
    };
    let number = findings.iter().filter(fits).count();
    assert_eq!(number, 1, "{status} {topic} {parts:?} in {findings:#?}");
}

fn assert_none(findings: &[Value], status: &str) {
    assert!(findings.iter().all(|finding| finding["status"] != status), "{findings:#?}");
}

#[test]
fn a_clean_interface_is_ok() -> Result<()> {
    let link = Link::new()?;
    let found = check(&link, &CLEAN, &[], 0)?;
    assert_none(&found, "broken");
    let of_interface: Vec<Value> =
        found.iter().filter(|finding| finding["interface"] == *link.device).cloned().collect();
    assert!(of_interface.len() > 4, "{found:#?}");
    assert_none(&of_interface, "warning");
    for (topic, parts) in [
        ("load", &["would attach at"][..]),
        ("queue", &["over a limit, packets wait in"]),
        ("link", &["10gbit"]),
        ("mtu", &["1514"]),
        ("offloads", &["1538"]),
        ("programs", &[]),
    ] {
        expect(&of_interface, "ok", topic, parts);
    }
    expect(&found, "ok", "kernel", &["loaded and verified", "egress"]);
    let clock = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    // An emulated machine has none that is both fast and reliable.
    let status = if matches!(clock.trim(), "hpet" | "acpi_pm") { "warning" } else { "ok" };
    expect(&found, status, "clock", &[clock.trim()]);
    // For people: every finding, and the verdict at the end.
    let text = succeeded(&link.qjump(&with(&link, &CLEAN, &[]))?)?;
    for finding in &found {
        assert!(text.contains(finding["found"].as_str().context("text")?), "{finding} is missing in {text}");
    }
    assert!(text.lines().last().is_some_and(|line| line.starts_with("the guarantee would hold")), "{text}");
    Ok(())
}

/// By version, and by trying: what a kernel should have and check does not find, fails here.
#[test]
fn the_kernels_features_are_reported_as_they_are() -> Result<()> {
    let link = Link::new()?;
    let found = check(&link, &CLEAN, &[], 0)?;
    if has_tcx() {
        expect(&found, "ok", "kernel", &["attached to tcx"]);
    } else {
        expect(&found, "unsupported", "kernel", &["no tcx", "6.6", "clsact takes its place"]);
    }
    let locked = found.iter().any(|finding| finding["found"].to_string().contains("eBPF has no compare-exchange"));
    assert_eq!(locked, !has_compare_exchange());
    let hook = if has_tcx() { "at tcx egress" } else { "at clsact egress" };
    expect(&found, "ok", "load", &[hook]);
    let status = check(&link, &CLEAN, &["--hook", "tcx"], if has_tcx() { 0 } else { 2 })?;
    assert_eq!(status.iter().any(|finding| finding["breaks"] == true), !has_tcx());
    expect(&found, "ok", "kernel", &["programs for cgroups"]);

    let kinds = ["htb", "fq", "prio"];
    let has = |kind: &&str| {
        let lines = format!("qdisc add dev {0} root {kind}\nqdisc del dev {0} root\n", link.device);
        link.near.batch("tc", &lines).is_ok()
    };
    let (there, missing): (Vec<&str>, Vec<&str>) = kinds.into_iter().partition(has);
    if is_guest() {
        assert_eq!(there, kinds, "Debian's kernels have them all");
    }
    let list = |kinds: &[&str]| if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
    let said = format!("queues that this kernel has: {}; that it has not: {}", list(&there), list(&missing));
    expect(&found, "ok", "queue", &[&said]);
    let waits = if there.contains(&"fq") && there.contains(&"prio") { "wait in fq" } else { "wait in htb" };
    expect(&found, "ok", "queue", &[waits]);
    let available = link.near.enter(|| Ok(qdisc::available()?))?;
    assert_eq!([available.htb, available.fq, available.prio], kinds.map(|kind| there.contains(&kind)));
    Ok(())
}

#[test]
fn what_it_says_of_the_queue_a_load_does() -> Result<()> {
    let link = Link::new()?;
    for (more, topic_parts) in [
        (&["--queue", "keep"][..], "--queue keep"),
        (&["--queue", "htb"], "wait in htb"),
        (&[], "packets wait in"),
        (&["--queue", "htb", "--host-rate", "1gbit"], "wait in htb"),
    ] {
        let found = check(&link, &CLEAN, more, 0)?;
        expect(&found, "ok", "queue", &["over a limit", topic_parts]);
        let said =
            found.iter().find(|one| one["topic"] == "queue" && one["interface"] == *link.device).context("queue")?;
        let load = [&["load", "--interface", &link.device][..], &CLEAN, more].concat();
        let text = succeeded(&link.qjump(&load)?)?;
        let line = said["found"].as_str().context("text")?;
        assert!(text.contains(line), "'{line}' is missing in {text}");
        // Loaded, it is still clean, and says that it would be replaced.
        expect(&check(&link, &CLEAN, more, 0)?, "ok", "load", &["replace"]);
        link.unload()?;
    }
    Ok(())
}

#[test]
fn whatever_a_load_refuses_is_broken_and_says_the_same() -> Result<()> {
    let link = Link::new()?;
    let queue = format!("qdisc add dev {} root handle 5: htb\n", link.device);
    let filter = format!(
        "qdisc add dev {0} clsact\nfilter add dev {0} egress protocol ip prio 1 u32 match u32 0 0 flowid 1:1\n",
        link.device
    );
    let clean = || link.near.batch("tc", &format!("qdisc del dev {} root\n", link.device));
    let cases: [(&str, &[&str], &[&str]); 5] = [
        ("", &["--max-packet", "1515"], &["MTU of 1500", "ip link set dev"]),
        ("", &["--queue", "fq", "--host-rate", "1gbit"], &["fq has no rate"]),
        ("", &["--queue", "htb", "--host-rate", "1mbit"], &["less than what the levels may send"]),
        (&queue, &["--queue", "htb"], &["somebody else", "tc qdisc del dev"]),
        (&filter, &["--hook", "clsact"], &["first place on clsact is taken", "tc filter del"]),
    ];
    for (setup, more, parts) in cases {
        link.near.batch("tc", setup)?;
        // A flag that is there already is given another value.
        let mut plan: Vec<&str> = CLEAN.to_vec();
        let mut more = more.to_vec();
        if let Some(at) = plan.iter().position(|word| *word == more[0]) {
            plan[at + 1] = more[1];
            more.clear();
        }
        let before = link.tc_state()?;
        let found = check(&link, &plan, &more, 2)?;
        expect(&found, "broken", "load", parts);
        assert_eq!(link.tc_state()?, before);
        let load = [&["load", "--interface", &link.device][..], &plan, &more].concat();
        let (_, error) = failed(&link.qjump(&load)?);
        let said = found.iter().find(|one| one["topic"] == "load").context("load")?;
        for part in ["found", "remedy"].iter().filter_map(|key| said[key].as_str()) {
            assert!(error.contains(part), "'{part}' is missing in {error}");
        }
        if setup == queue {
            clean()?;
        }
    }
    let loopback = [&["check", "--interface", "lo", "--json"][..], &CLEAN].concat();
    expect(&findings(&link.qjump(&loopback)?, 2)?, "broken", "load", &["loopback"]);
    Ok(())
}

#[test]
fn links_and_sizes_that_the_plan_does_not_count_on_are_broken() -> Result<()> {
    let link = Link::new()?;
    let path = |rate: &'static str, more: &[&'static str]| {
        let plan = [
            "--hosts",
            "12",
            "--link-rate",
            rate,
            "--max-packet",
            "256",
            "--level",
            "7:1,tolerance=200us",
            "--hops",
            "1",
            "--switch-delay",
            "500ns",
        ];
        [&plan[..], more].concat()
    };
    assert_none(&check(&link, &path("10gbit", &[]), &[], 0)?, "broken");
    // A veth says 10 Gbit/s.
    expect(&check(&link, &path("25gbit", &[]), &[], 2)?, "broken", "link", &["10gbit", "25gbit", "--link-rate 10gbit"]);
    link.near.ip(&format!("link set {} mtu 9000", link.device))?;
    expect(&check(&link, &path("10gbit", &[]), &[], 2)?, "broken", "mtu", &["9014", "1514", "--mtu 9014", "mtu 1500"]);
    assert_none(&check(&link, &path("10gbit", &["--mtu", "9014"]), &[], 0)?, "broken");
    // 9 kB take 7.2 us at 10 Gbit/s.
    expect(&check(&link, &CLEAN, &[], 2)?, "broken", "mtu", &["epsilon", "--hops"]);
    link.near.ip(&format!("link set {} mtu 1500 gso_max_segs 65535", link.device))?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "offloads", &["65536 bytes", "gso_max_segs 1"]);
    assert_none(&check(&link, &path("10gbit", &[]), &[], 0)?, "broken");
    let capped = path("10gbit", &["--host-burst", "1538"]);
    expect(
        &check(&link, &capped, &[], 2)?,
        "broken",
        "offloads",
        &["65536 bytes", "gso_max_segs 1", "--host-burst 65536"],
    );
    link.near.ip(&format!("link set {} gso_max_segs 1", link.device))?;
    assert_none(&check(&link, &capped, &[], 0)?, "broken");
    link.near.ip(&format!("link set {} down", link.device))?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "link", &["down", "up"]);
    Ok(())
}

#[test]
fn other_peoples_queues_programs_and_filters_are_named() -> Result<()> {
    let link = Link::new()?;
    let device = &link.device;
    // Another manager's queue: left in charge by auto, which says so.
    link.near.batch("tc", &format!("qdisc add dev {device} root handle 9: htb\n"))?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "queue", &["dropped", "htb 9: of somebody else"]);
    link.near.batch("tc", &format!("qdisc replace dev {device} root handle 7: pfifo limit 100\n"))?;
    expect(&check(&link, &CLEAN, &["--queue", "htb"], 0)?, "ok", "queue", &["in the place of pfifo until the unload"]);
    link.near.batch("tc", &format!("qdisc del dev {device} root\n"))?;

    let filter = "protocol all prio 9 u32 match u32 0 0 flowid 1:1";
    link.near.batch("tc", &format!("qdisc add dev {device} clsact\nfilter add dev {device} egress {filter}\n"))?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "programs", &["u32 pref 9", "tc filter show"]);
    link.near.batch("tc", &format!("qdisc del dev {device} clsact\n"))?;

    if !has_tcx() {
        return Ok(());
    }
    let mut others = [lab("qj_empty")?, lab("qj_clock")?];
    let mut attach = |at: usize, name: &'static str| {
        let other = &mut others[at];
        link.near.enter(|| {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            classifier(other, name)?.attach_with_options(device, TcAttachType::Egress, options)?;
            Ok(())
        })
    };
    attach(0, "qj_empty")?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "programs", &["qj_empty", "after qjump's"]);
    link.load(&[])?;
    attach(1, "qj_clock")?;
    let found = check(&link, &CLEAN, &[], 0)?;
    expect(&found, "warning", "programs", &["qj_clock", "before qjump's"]);
    expect(&found, "warning", "programs", &["qj_empty", "after qjump's"]);
    Ok(())
}

#[test]
fn rules_of_nftables_that_change_levels_are_found() -> Result<()> {
    let link = Link::new()?;
    let nft = |words: &str| -> Result<()> {
        let mut command = link.near.command("nft");
        succeeded(&command.args(words.split(' ')).output().context("nft; `cargo xtask test` installs it")?).map(drop)
    };
    nft("add table inet qjt")?;
    nft("add chain inet qjt out { type filter hook output priority 0 ; }")?;
    nft("add rule inet qjt out udp dport 9 meta mark set 7")?;
    expect(&check(&link, &CLEAN, &[], 0)?, "ok", "marks", &["no rule"]);
    nft("add rule inet qjt out udp dport 9 ip dscp set cs3")?;
    nft("add rule inet qjt out udp dport 9 meta priority set 0:5")?;
    let found = check(&link, &CLEAN, &[], 0)?;
    expect(&found, "warning", "marks", &["set the priority", "qjt out", "nft list ruleset"]);
    expect(&found, "ok", "marks", &["rewrite codepoints (qjt out)"]);
    Ok(())
}

/// A socket of this process inside the near namespace.
fn socket(link: &Link, family: libc::c_int, protocol: libc::c_int) -> Result<OwnedFd> {
    link.near.enter(|| {
        // SAFETY: plain values.
        let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        ensure!(fd >= 0, "socket: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just given this descriptor to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    })
}

#[test]
fn sockets_that_send_around_the_program_are_named() -> Result<()> {
    const PACKET_QDISC_BYPASS: libc::c_int = 20;
    let link = Link::new()?;
    let packet = socket(&link, libc::AF_PACKET, 0)?;
    assert_none(&check(&link, &CLEAN, &[], 0)?, "broken");
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(packet.as_raw_fd(), libc::SOL_PACKET, PACKET_QDISC_BYPASS, (&raw const on).cast(), 4)
    };
    ensure!(result == 0, "PACKET_QDISC_BYPASS: {}", io::Error::last_os_error());
    let own = format!("(process {})", std::process::id());
    expect(&check(&link, &CLEAN, &[], 2)?, "broken", "bypass", &[&own, "PACKET_QDISC_BYPASS"]);
    // In another network namespace it is of no account.
    let other = Link::new()?;
    assert_none(&check(&other, &CLEAN, &[], 0)?, "broken");
    drop(packet);
    assert_none(&check(&link, &CLEAN, &[], 0)?, "broken");
    let _xdp = socket(&link, libc::AF_XDP, 0)?;
    expect(&check(&link, &CLEAN, &[], 0)?, "warning", "bypass", &[&own, "AF_XDP"]);
    assert!(check(&other, &CLEAN, &[], 0)?.iter().all(|finding| finding["topic"] != "bypass"));
    Ok(())
}

#[test]
fn stacked_interfaces_say_where_the_limiter_belongs() -> Result<()> {
    let link = Link::new()?;
    link.near.ip("link add qjckbr type bridge")?;
    link.near.ip(&format!("link set {} master qjckbr", link.device))?;
    link.near.ip("link set qjckbr up")?;
    // The uplink of a bridge is the right place, the bridge is not.
    expect(&check(&link, &CLEAN, &[], 0)?, "ok", "place", &["veth"]);
    let arguments = [&["check", "--interface", "qjckbr", "--json"][..], &CLEAN].concat();
    let found = findings(&link.qjump(&arguments)?, 0)?;
    expect(&found, "warning", "place", &["bridge over", &link.device, "load qjump on"]);
    // Two interfaces are two hosts.
    let arguments = [&arguments[..], &["--interface", &link.device]].concat();
    expect(&findings(&link.qjump(&arguments)?, 0)?, "warning", "plan", &["2 interfaces", "--hosts"]);
    Ok(())
}

#[test]
fn without_rights_it_shows_what_it_can_and_says_what_it_could_not() -> Result<()> {
    let link = Link::new()?;
    let folder = Folder::new()?;
    let binary = folder.take(&binary())?;
    let run = |binary: &std::path::Path, plan: &[&str]| -> Result<Vec<Value>> {
        let mut arguments = with(&link, plan, &["--json"]);
        arguments.insert(0, binary.to_str().context("path")?);
        let output = link.near.enter(|| Ok(nobody::command(arguments[0]).args(&arguments[1..]).output()?))?;
        findings(&output, 2)
    };
    let found = run(&binary, &CLEAN)?;
    expect(&found, "broken", "rights", &["CAP_BPF", "sudo"]);
    assert_eq!(found.iter().filter(|finding| finding["breaks"] == true).count(), 1);
    for (topic, parts) in [
        ("kernel", &["not looked at", "CAP_BPF"][..]),
        ("queue", &["not looked at", "CAP_SYS_ADMIN"]),
        ("load", &["not looked at"]),
        ("programs", &["not looked at", "CAP_NET_ADMIN"]),
        ("marks", &["nftables", "not looked at"]),
    ] {
        expect(&found, "warning", topic, parts);
    }
    expect(&found, "ok", "link", &["10gbit"]);
    // What needs no rights is judged all the same.
    let mut large = CLEAN;
    large[5] = "1515";
    expect(&run(&binary, &large)?, "broken", "load", &["MTU of 1500"]);
    Ok(())
}

#[test]
fn mistakes_have_the_statuses_of_load() -> Result<()> {
    let link = Link::new()?;
    let run = |arguments: &[&str]| link.qjump(&[&["check"][..], arguments].concat());
    let status = |arguments: &[&str]| -> Result<i32> { Ok(failed(&run(arguments)?).0) };
    assert_eq!(status(&[&["--interface", "qjnone"][..], &PLAN].concat())?, 1);
    assert_eq!(status(&[&["--interface", "a/b"][..], &PLAN].concat())?, 64);
    assert_eq!(status(&[&["--interface", &link.device, "--interface", &link.device][..], &PLAN].concat())?, 64);
    assert_eq!(status(&PLAN)?, 64, "a plan without an interface");
    assert_eq!(status(&["--config", "/nonexistent.toml"])?, 64);
    assert_eq!(status(&["--hosts", "12"])?, 64);
    // Without a plan, the host alone.
    let text = succeeded(&run(&[])?)?;
    assert!(text.contains("qjump can run here") && text.contains("--config"), "{text}");
    let text = succeeded(&run(&["--interface", &link.device])?)?;
    assert!(text.contains(&link.device) && !text.contains("would attach"), "{text}");
    Ok(())
}

/// All that a check could leave behind, but for programs.
fn traces(link: &Link) -> Result<String> {
    let show = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program).args(["-n", link.near.name()]).args(arguments).output()?;
        succeeded(&output)
    };
    let state = [
        link.tc_state()?,
        show("ip", &["-d", "link"])?,
        show("tc", &["class", "show", "dev", &link.device])?,
        fs::read_to_string("/proc/self/mounts")?,
        format!("pins: {}", link.pins().exist()),
    ];
    Ok(state.concat())
}

fn loaded() -> HashSet<u32> {
    loaded_programs().flatten().map(|program| program.id()).collect()
}

#[test]
fn it_leaves_no_trace() -> Result<()> {
    let link = Link::new()?;
    for after_load in [false, true] {
        if after_load {
            link.load(&[])?;
        }
        let (before, programs) = (traces(&link)?, loaded());
        check(&link, &CLEAN, &[], 0)?;
        check(&link, &CLEAN, &["--queue", "htb", "--hook", if after_load && has_tcx() { "tcx" } else { "clsact" }], 0)?;
        let mut new: HashSet<u32> = &loaded() - &programs;
        assert_eq!(traces(&link)?, before);
        // What a process has loaded goes a moment after it has ended.
        for _ in 0..200 {
            new = &new & &loaded();
            if new.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(new.is_empty(), "programs {new:?} stay");
    }
    Ok(())
}
