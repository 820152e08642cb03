//! Load, replace, survive, unload: on real interfaces, and beside others.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    EbpfLoader,
    maps::{Array, Map, MapData},
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use qjump::{
    agent::desired::Desired,
    config::{File, QueueChoice},
    dataplane::{Hook, Maps, Request, load_each, object},
};
use qjump_ebpf::{Config, names};
use qjump_tests::{
    arrivals::Witness,
    kernel::{has_tcx, rounds},
    link::{FAR, Link, NEAR, failed, succeeded},
    program::{classifier, lab},
    sender,
};

/// The hooks that this kernel has.
fn hooks() -> &'static [&'static str] {
    if has_tcx() { &["tcx", "clsact"] } else { &["clsact"] }
}

/// The names of the programs on the egress of the near interface.
fn programs(link: &Link) -> Result<Vec<String>> {
    if !has_tcx() {
        // `filter … handle 0x1 NAME direct-action …`
        let state = link.tc_state()?;
        let filters = state.lines().filter_map(|line| line.split_once(" direct-action")?.0.split_whitespace().last());
        return Ok(filters.map(str::to_owned).collect());
    }
    link.near.enter(|| {
        let (_, programs) = SchedClassifier::query_tcx(&link.device, TcAttachType::Egress)?;
        Ok(programs.iter().map(|program| program.name_as_str().unwrap_or("?").to_owned()).collect())
    })
}

fn ping(link: &Link) -> Result<()> {
    sender::connected(&link.near, NEAR.0, FAR.0, 7000, 7)?.send(&[0; 64])?;
    Ok(())
}

#[test]
fn the_program_survives_its_loader_and_unload_leaves_nothing() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&[])?;
    ping(&link)?;
    let status = link.status()?;
    assert_eq!(status["attached"], true);
    assert_eq!(status["hook"], hooks()[0]);
    assert_eq!((&status["position"], &status["programs"]), (&1.into(), &1.into()));
    let level = &status["levels"][0];
    assert_eq!((&level["level"], &level["factor"]), (&7.into(), &1.0.into()));
    assert_eq!(level["bound_ns"], 6688.0);
    assert_eq!(level["reasons"]["passed"]["packets"], 1);
    assert_eq!(level["passed_bytes"], 64 + 42 + 24);
    assert!(level["last_activity_ns_ago"].as_u64().is_some_and(|age| age < 60_000_000_000));
    assert_eq!((&level["max_packet_bytes"], &level["oversize"]), (&256.into(), &"demote".into()));
    assert_eq!((&status["pcp"], &level["tolerance_ns"]), (&false.into(), &0.into()));
    link.load(&["--pcp", "--tolerance", "1us", "--oversize", "drop"])?;
    let status = link.status()?;
    let level = &status["levels"][0];
    assert_eq!(
        (&status["pcp"], &level["tolerance_ns"], &level["oversize"]),
        (&true.into(), &1_000.into(), &"drop".into())
    );
    let text = succeeded(&link.qjump(&["status", "--interface", &link.device])?)?;
    for part in
        ["epoch", "tolerance", "1us", "max packet", "256 B", "drop", "wire bytes", "notes", "802.1p priority written"]
    {
        assert!(text.contains(part), "{part} is missing in {text}");
    }

    link.unload()?;
    assert_eq!(programs(&link)?, [""; 0]);
    assert!(!link.pins().exist());
    assert_eq!(link.tc_state()?, before);
    let (status, error) = failed(&link.qjump(&["unload", "--interface", &link.device])?);
    assert_eq!(status, 1);
    assert!(error.contains("is not loaded"), "{error}");
    Ok(())
}

#[test]
fn clsact_is_used_when_asked_and_removed_if_it_was_ours() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&["--hook", "clsact"])?;
    ping(&link)?;
    let status = link.status()?;
    assert_eq!((&status["attached"], &status["hook"]), (&true.into(), &"clsact".into()));
    assert_eq!(status["levels"][0]["reasons"]["passed"]["packets"], 1);
    // Replaced in place: same hook, no second filter, counters kept.
    link.load(&[])?;
    let status = link.status()?;
    assert_eq!((&status["hook"], &status["programs"], &status["generation"]), (&"clsact".into(), &1.into(), &2.into()));
    assert_eq!(status["levels"][0]["reasons"]["passed"]["packets"], 1);
    link.unload()?;
    assert_eq!(link.tc_state()?, before);

    // Somebody else's clsact, and his filter on it, stay.
    link.near.batch("tc", &format!("qdisc add dev {} clsact\n", link.device))?;
    let filter = "protocol all prio 9 u32 match u32 0 0 flowid 1:1";
    link.near.batch("tc", &format!("filter add dev {} egress {filter}\n", link.device))?;
    let before = link.tc_state()?;
    link.load(&["--hook", "clsact"])?;
    ping(&link)?;
    assert_eq!(link.status()?["levels"][0]["reasons"]["passed"]["packets"], 1);
    link.unload()?;
    assert_eq!(link.tc_state()?, before);
    Ok(())
}

#[test]
fn the_hook_does_not_change_under_a_load() -> Result<()> {
    let link = Link::new()?;
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(qjump_tests::link::PLAN);
    if !has_tcx() {
        arguments.extend(["--hook", "tcx"]);
        let (status, error) = failed(&link.qjump(&arguments)?);
        assert_eq!(status, 1);
        assert!(error.contains("--hook clsact"), "{error}");
        return Ok(());
    }
    link.load(&[])?;
    arguments.extend(["--hook", "clsact"]);
    let (status, error) = failed(&link.qjump(&arguments)?);
    assert_eq!(status, 1);
    assert!(error.contains("qjump unload --interface"), "{error}");
    assert_eq!(link.status()?["generation"], 1);
    Ok(())
}

#[test]
fn another_program_on_the_egress_keeps_running() -> Result<()> {
    if !has_tcx() {
        // Filters of a clsact have their order by priority, and no link says who came first.
        return Ok(());
    }
    let link = Link::new()?;
    let mut other = lab("qj_empty")?;
    let attach = |order| TcAttachOptions::TcxOrder(order);
    link.near.enter(|| {
        let program = classifier(&mut other, "qj_empty")?;
        program.attach_with_options(&link.device, TcAttachType::Egress, attach(LinkOrder::first()))?;
        Ok(())
    })?;
    link.load(&[])?;
    assert_eq!(programs(&link)?, [names::PROGRAM, "qj_empty"]);
    ping(&link)?;
    assert_eq!(link.status()?["levels"][0]["reasons"]["passed"]["packets"], 1);

    // One that comes later and goes first is shown.
    let mut bully = lab("qj_clock")?;
    link.near.enter(|| {
        let program = classifier(&mut bully, "qj_clock")?;
        program.attach_with_options(&link.device, TcAttachType::Egress, attach(LinkOrder::first()))?;
        Ok(())
    })?;
    assert_eq!(link.status()?["position"], 2);
    let text = succeeded(&link.qjump(&["status", "--interface", &link.device])?)?;
    assert!(text.contains("a program before it may pass packets around it"), "{text}");
    link.unload()?;
    assert_eq!(programs(&link)?, ["qj_clock", "qj_empty"]);
    Ok(())
}

#[test]
fn a_hundred_replacements_under_load_lose_no_packet() -> Result<()> {
    let link = Link::new()?;
    // Two plans with other epochs, rates and bursts, and both wide enough for the traffic below.
    let plans =
        [["--hosts", "12", "--epsilon", "4us", "7:1", "5:4"], ["--hosts", "40", "--epsilon", "60us", "7:0.5", "5:9"]];
    let load = |plan: &[&'static str; 6]| {
        let mut arguments = vec!["load", "--interface", &link.device, "--link-rate", "10gbit", "--max-packet", "256"];
        arguments.extend(&plan[..4]);
        arguments.extend(["--level", plan[4], "--level", plan[5]]);
        succeeded(&link.qjump(&arguments)?)
    };
    load(&plans[0])?;
    let replacements = rounds(100);
    let mut witness = Witness::new(&link.far, &link.far_device)?;
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| -> Result<()> {
        // Level 7 a packet a millisecond: conforms to both plans. Levels 5 and 0 as well.
        for (level, pause) in [(7, 1_000), (5, 200), (0, 20)] {
            let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, level)?;
            let (stop, sent) = (&stop, &sent);
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    match socket.send(&[0; 100]) {
                        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
                        _ => sent.fetch_add(1, Relaxed),
                    };
                    std::thread::sleep(Duration::from_micros(pause));
                }
            });
        }
        // All the time, for a change of plan may take long on a busy machine, and the witness holds only so much.
        let collecting = scope.spawn(|| {
            while !stop.load(Relaxed) {
                witness.collect();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let result = (0..replacements as usize).try_for_each(|number| load(&plans[(number + 1) % 2]).map(drop));
        stop.store(true, Relaxed);
        drop(collecting.join());
        result
    })?;
    std::thread::sleep(Duration::from_millis(200));
    let (sent, arrived) = (sent.into_inner(), witness.collect().len() as u64);
    println!("{sent} packets sent during {replacements} replacements, {arrived} arrived");
    let status = link.status()?;
    assert_eq!(status["generation"], replacements + 1);
    assert_eq!(programs(&link)?, [names::PROGRAM]);
    assert!(sent > 5_000, "too little traffic to tell: {sent}");
    assert_eq!(arrived, sent, "{status:#}");
    Ok(())
}

#[test]
fn two_loads_at_once_take_turns() -> Result<()> {
    let link = Link::new()?;
    for _ in 0..rounds(10) {
        let mut arguments = vec!["load", "--interface", &link.device];
        arguments.extend(qjump_tests::link::PLAN);
        let children = [0; 4].map(|_| link.command(&arguments).stdout(Stdio::null()).spawn());
        for child in children {
            assert!(child?.wait()?.success());
        }
        assert_eq!(programs(&link)?, [names::PROGRAM]);
        assert_eq!(link.status()?["generation"], 4);
        link.unload()?;
    }
    Ok(())
}

#[test]
fn an_interface_that_vanishes_is_reported_and_replaced() -> Result<()> {
    let link = Link::new()?;
    link.load(&[])?;
    link.near.ip(&format!("link delete {}", link.device))?;
    let output = link.qjump(&["status", "--interface", &link.device])?;
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("NOT ENFORCED") && text.contains("no interface"), "{text}");
    // A new device with the old name is not mistaken for the old one.
    link.plug()?;
    assert_eq!(link.status()?["attached"], false);
    let text = link.load(&[])?;
    assert!(text.contains("after removing what an earlier load had left behind"), "{text}");
    assert_eq!(link.status()?["attached"], true);
    // Unloading works for one that is gone, too.
    link.near.ip(&format!("link delete {}", link.device))?;
    link.unload()?;
    assert!(!link.pins().exist());
    Ok(())
}

#[test]
fn a_detached_program_is_not_called_enforced() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&["--hook", "clsact"])?;
    link.near.batch("tc", &format!("filter del dev {} egress\n", link.device))?;
    let status = link.status()?;
    assert_eq!(status["attached"], false);
    assert!(status["problem"].as_str().context("a problem")?.contains("gone from clsact"), "{status}");
    // Loading again repairs it, and remembers that the qdisc is ours.
    link.load(&["--hook", "clsact"])?;
    assert_eq!(link.status()?["attached"], true);
    link.unload()?;
    assert_eq!(link.tc_state()?, before);
    Ok(())
}

#[test]
fn corrupt_pins_are_refused_with_the_remedy_and_unload_clears_them() -> Result<()> {
    let link = Link::new()?;
    let load = || {
        let mut arguments = vec!["load", "--interface", &link.device];
        arguments.extend(qjump_tests::link::PLAN);
        link.qjump(&arguments)
    };
    // A map of another shape under the name of ours; a program where the link should be; a missing map.
    let lab = lab("qj_arrivals")?;
    let spoil: [&dyn Fn() -> Result<()>; 3] = [
        &|| {
            fs::remove_file(link.pins().map(names::STATE))?;
            lab.map("qj_tap").context("qj_tap")?.pin(link.pins().map(names::STATE))?;
            Ok(())
        },
        &|| {
            fs::remove_file(link.pins().link())?;
            lab.map("qj_tap").context("qj_tap")?.pin(link.pins().link())?;
            Ok(())
        },
        &|| Ok(fs::remove_file(link.pins().map(names::CONFIG))?),
    ];
    // A filter of clsact has no link.
    for (_, spoil) in spoil.into_iter().enumerate().filter(|(number, _)| *number != 1 || has_tcx()) {
        link.load(&[])?;
        spoil()?;
        for output in [load()?, link.qjump(&["status", "--interface", &link.device])?, link.qjump(&["status"])?] {
            let (status, error) = failed(&output);
            assert_eq!(status, 1, "{error}");
            assert!(error.contains("/sys/fs/bpf/qjump/") && error.contains("qjump unload"), "{error}");
        }
        link.unload()?;
        assert!(!link.pins().exist());
        assert_eq!(programs(&link)?, [""; 0]);
    }
    link.load(&[])?;
    assert_eq!(link.status()?["attached"], true);
    Ok(())
}

#[test]
fn a_load_of_several_interfaces_is_all_or_nothing() -> Result<()> {
    let link = Link::new()?;
    link.near.ip("link add qjtall type veth peer name qjtall2")?;
    let mut arguments = vec!["load", "--interface", &link.device, "--interface", "qjtall"];
    arguments.extend(qjump_tests::link::PLAN);
    succeeded(&link.qjump(&arguments)?)?;
    assert_eq!(link.status()?["attached"], true);
    succeeded(&link.qjump(&["unload", "--interface", &link.device, "--interface", "qjtall"])?)?;

    // The second cannot be loaded: clsact's first place is taken by a filter for another protocol.
    let other = "protocol ip prio 1 u32 match u32 0 0 flowid 1:1";
    link.near.batch("tc", &format!("qdisc add dev qjtall clsact\nfilter add dev qjtall egress {other}\n"))?;
    let before = link.tc_state()?;
    arguments.extend(["--hook", "clsact"]);
    let (status, error) = failed(&link.qjump(&arguments)?);
    assert_eq!(status, 1);
    assert!(error.contains("qjtall"), "{error}");
    assert_eq!(link.tc_state()?, before);
    assert!(!link.pins().exist(), "the first interface is as it was");
    assert!(!qjump::dataplane::Pins::of("qjtall").exist());
    Ok(())
}

#[test]
fn loads_side_by_side_have_nothing_to_do_with_each_other() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let other = format!("{}o", link.device);
    link.near.batch("ip", &format!("link add {other} type veth peer name {other}p\n"))?;
    // By another name it is the same device.
    let alias = format!("{}a", link.device);
    link.near.batch("ip", &format!("link property add dev {} altname {alias}\n", link.device))?;
    let text = "cluster = { hosts = 4, link-rate = \"1gbit\", max-packet = 256, epsilon = \"4us\" }\n\
                host = { interfaces = [] }\n[[level]]\nlevel = 7\nfactor = 1\n";
    let plan = File::parse(text).and_then(|file| Desired::of(file, None)).map_err(anyhow::Error::msg)?.plan;
    let names = [link.device.clone(), "nowhere".to_owned(), other.clone(), alias];
    let requests = names.each_ref().map(|name| Request {
        interfaces: std::slice::from_ref(name),
        plan: &plan,
        pcp: false,
        hook: Hook::Auto,
        queue: QueueChoice::Keep,
        host_rate: None,
    });
    let results = link.near.enter(|| Ok(load_each(&requests)?))?;
    // Before anything is asserted: what is pinned would outlive the test.
    let unloaded = link.qjump(&["unload", "--interface", &other])?;
    let said: Vec<String> = results
        .iter()
        .map(|result| match result {
            Ok(loaded) => loaded[0].interface.clone(),
            Err(error) => error.to_string(),
        })
        .collect();
    assert_eq!((&said[0], &said[2]), (&link.device, &other), "{said:?}");
    assert!(said[1].contains("no interface 'nowhere'") && said[3].contains("given twice"), "{said:?}");
    assert_eq!(link.status()?["attached"], true);
    succeeded(&unloaded)?;
    link.unload()?;
    assert_eq!(link.tc_state()?, before);
    Ok(())
}

#[test]
fn an_interface_of_the_same_name_elsewhere_is_left_alone() -> Result<()> {
    let link = Link::new()?;
    link.load(&[])?;
    // A second namespace with a device of the same name, and the same index if fate wills it.
    let other = Link::new()?;
    other.near.ip(&format!("link add {} type veth peer name qjtsame2", link.device))?;
    let run = |arguments: &[&str]| other.qjump(arguments);
    let mut load = vec!["load", "--interface", &link.device];
    load.extend(qjump_tests::link::PLAN);
    for arguments in [&load[..], &["unload", "--interface", &link.device]] {
        let (status, error) = failed(&run(arguments)?);
        assert_eq!(status, 1);
        assert!(error.contains("another network namespace"), "{error}");
        // A filter cannot be taken away from elsewhere.
        assert_eq!(error.contains("--force"), has_tcx(), "{error}");
    }
    // Seen from there, it is enforced all the same, and shown as what it is; but the one there is not.
    let output = run(&["status", "--interface", &link.device])?;
    let (status, error) = failed(&output);
    assert_eq!(status, 2);
    assert!(error.contains("nothing is loaded on an interface of this name here"), "{error}");
    let text = String::from_utf8(output.stdout)?;
    let netns = link.status()?["netns"].as_u64().context("a namespace")?;
    for part in [
        &format!("in namespace net:[{netns}], seen from another namespace"),
        &format!("enforced at {} egress", hooks()[0]),
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    let text = String::from_utf8(run(&["status"])?.stdout)?;
    assert!(text.contains(&format!("{} in namespace net:[{netns}]", link.device)), "{text}");
    assert_eq!((&link.status()?["attached"], &link.status()?["generation"]), (&true.into(), &1.into()));
    if has_tcx() {
        succeeded(&run(&["unload", "--interface", &link.device, "--force"])?)?;
    } else {
        link.unload()?;
    }
    assert_eq!(programs(&link)?, [""; 0]);
    Ok(())
}

#[test]
fn a_clsact_filter_elsewhere_is_removed_only_there() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&["--hook", "clsact"])?;
    let other = Link::new()?;
    other.near.ip(&format!("link add {} type veth peer name qjtsame3", link.device))?;
    for force in [&[][..], &["--force"]] {
        let (status, error) = failed(&other.qjump(&[&["unload", "--interface", &link.device][..], force].concat())?);
        assert_eq!(status, 1);
        let remedy =
            format!("`nsenter --net=/run/netns/{} qjump unload --interface {}`", link.near.name(), link.device);
        assert!(error.contains(&remedy), "{error}");
    }
    let text = String::from_utf8(other.qjump(&["status"])?.stdout)?;
    assert!(text.contains("seen from another namespace: enforced at clsact egress"), "{text}");
    assert_eq!(link.status()?["attached"], true);
    // Once its interface is gone, its record can go from anywhere.
    link.near.ip(&format!("link delete {}", link.device))?;
    until("the kernel has freed the program", || !Maps::in_use(&link.pins()))?;
    assert_eq!(failed(&other.qjump(&["status", "--interface", &link.device])?).0, 2);
    succeeded(&other.qjump(&["unload", "--interface", &link.device])?)?;
    link.plug()?;
    assert_eq!(link.tc_state()?, before);
    Ok(())
}

/// Waits for what the kernel does in its own time.
fn until(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    for _ in 0..300 {
        if holds() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("30 s have passed before {what}")
}

#[test]
fn a_filter_without_pins_is_named_with_its_remedy() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&["--hook", "clsact"])?;
    link.pins().remove()?;
    let mut load = vec!["load", "--interface", &link.device];
    load.extend(qjump_tests::link::PLAN);
    let mut remedies = String::new();
    for arguments in [
        &[&load[..], &["--hook", "clsact"]].concat()[..],
        &[&load[..], &["--hook", hooks()[0]]].concat(),
        &["unload", "--interface", &link.device],
        &["status", "--interface", &link.device],
    ] {
        let (status, error) = failed(&link.qjump(arguments)?);
        assert_eq!(status, 1);
        remedies = error.split('`').filter_map(|part| Some(part.strip_prefix("tc ")?.to_owned() + "\n")).collect();
    }
    assert!(!link.pins().exist());
    link.near.batch("tc", &remedies)?;
    assert_eq!(link.tc_state()?, before, "{remedies}");
    link.load(&[])?;
    assert_eq!(programs(&link)?, [names::PROGRAM]);
    Ok(())
}

#[test]
fn pins_of_another_version_are_named_and_hide_no_others() -> Result<()> {
    let (link, other) = (Link::new()?, Link::new()?);
    other.load(&[])?;
    link.load(&[])?;
    let path = link.pins().map(names::CONFIG);
    let mut slots: Array<_, Config> = Array::try_from(Map::Array(MapData::from_pin(&path)?))?;
    let mut config = slots.get(&0, 0)?;
    config.plan.version += 1;
    slots.set(0, config, 0)?;
    let check = |part: &str| -> Result<()> {
        let output = link.qjump(&["status"])?;
        let (status, error) = failed(&output);
        assert_eq!(status, 1);
        let message = format!("{} was loaded by another version of qjump{part}; unload and load it again", link.device);
        assert!(error.contains(&message), "{error}");
        assert!(String::from_utf8(output.stdout)?.contains(&other.device));
        Ok(())
    };
    check(" and is still in force")?;
    // The same with a map that has our name and another shape, which no program uses.
    let mut wrong = EbpfLoader::new().map_max_entries(names::STATE, 2).load(object()?)?;
    fs::remove_file(link.pins().map(names::STATE))?;
    wrong.map_mut(names::STATE).context("the map")?.pin(link.pins().map(names::STATE))?;
    check(", and is in force no more")?;
    link.unload()?;
    assert_eq!(programs(&link)?, [""; 0]);
    link.load(&[])?;
    Ok(())
}

#[test]
fn a_load_killed_at_any_moment_is_made_good_by_the_next() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(qjump_tests::link::PLAN);
    let began = Instant::now();
    succeeded(&link.qjump(&arguments)?)?;
    let takes = began.elapsed();
    link.unload()?;
    let (mut killed, rounds) = (0, rounds(60));
    for round in 0..rounds {
        let hook = hooks()[round as usize % hooks().len()];
        let mut with_hook = arguments.clone();
        with_hook.extend(["--hook", hook]);
        // First loads and replacements, killed at all moments of a load.
        if round % 4 >= 2 {
            succeeded(&link.qjump(&with_hook)?)?;
        }
        let mut child = link.command(&with_hook).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(takes * round / rounds);
        child.kill()?;
        killed += u32::from(!child.wait()?.success());
        succeeded(&link.qjump(&with_hook)?).with_context(|| format!("round {round}"))?;
        let status = link.status()?;
        assert_eq!((&status["attached"], &status["programs"]), (&true.into(), &1.into()), "round {round}: {status}");
        link.unload()?;
        assert_eq!(link.tc_state()?, before, "round {round}");
        assert!(!link.pins().exist());
    }
    assert!(killed * 4 > rounds, "only {killed} of {rounds} loads were killed before they ended");
    Ok(())
}

#[test]
fn a_renamed_interface_gets_no_second_program() -> Result<()> {
    for hook in hooks() {
        renamed(hook)?;
    }
    Ok(())
}

fn renamed(hook: &str) -> Result<()> {
    let mut link = Link::new()?;
    let before = link.tc_state()?;
    link.load(&["--hook", hook])?;
    let (old, new) = (link.device.clone(), format!("{}r", link.device));
    for command in [format!("link set {old} down"), format!("link set {old} name {new}"), format!("link set {new} up")]
    {
        link.near.ip(&command)?;
    }
    link.device = new;
    let mut load = vec!["load", "--interface", &link.device];
    load.extend(qjump_tests::link::PLAN);
    let (status, error) = failed(&link.qjump(&load)?);
    assert_eq!(status, 1);
    assert!(error.contains(&format!("qjump unload --interface {old}")), "{error}");
    succeeded(&link.qjump(&["unload", "--interface", &old])?)?;
    assert_eq!(link.tc_state()?, before);
    assert_eq!(programs(&link)?, [""; 0]);
    link.load(&[])?;
    assert_eq!(programs(&link)?, [names::PROGRAM]);
    Ok(())
}

#[test]
fn a_vlan_name_with_a_dot_can_be_pinned() -> Result<()> {
    // The BPF file system refuses dots in names; this kernel may lack 802.1Q, but any device can have one.
    let link = Link::new()?;
    let name = format!("q{:x}.100", std::process::id());
    link.near.ip(&format!("link add {name} type veth peer name qjtdot2"))?;
    let mut arguments = vec!["load", "--interface", &name];
    arguments.extend(qjump_tests::link::PLAN);
    succeeded(&link.qjump(&arguments)?)?;
    let status = succeeded(&link.qjump(&["status", "--interface", &name])?)?;
    assert!(status.contains(&name) && status.contains("enforced"), "{status}");
    succeeded(&link.qjump(&["unload", "--interface", &name])?)?;
    Ok(())
}

/// Runs a script with `$0` = qjump and `$@` = a load, with mounts of its own.
fn with_own_mounts(link: &Link, script: &str) -> Result<std::process::Output> {
    let mut load = vec!["load", "--interface", &link.device];
    load.extend(qjump_tests::link::PLAN);
    Ok(std::process::Command::new("nsenter")
        .arg(format!("--net=/run/netns/{}", link.near.name()))
        .args(["unshare", "--mount", "--propagation", "private"])
        .args(["sh", "-c", script])
        .arg(qjump_tests::link::binary())
        .args(&load)
        .output()?)
}

#[test]
fn bpffs_is_mounted_when_it_is_not() -> Result<()> {
    let link = Link::new()?;
    let script = format!(
        "umount /sys/fs/bpf && \"$0\" \"$@\" && mountpoint /sys/fs/bpf && stat -c 'mode %a' /sys/fs/bpf && \
         ls /sys/fs/bpf/qjump/{0} && \"$0\" unload --interface {0}",
        link.device
    );
    let text = succeeded(&with_own_mounts(&link, &script)?)?;
    for part in ["is a mountpoint", "mode 1700", "maps"] {
        ensure!(text.contains(part), "{part} is missing: {text}");
    }
    // A load that fails takes the mount back.
    let script = "umount /sys/fs/bpf && ! \"$0\" \"$@\" --interface nothere && ! mountpoint -q /sys/fs/bpf && \
                  tc qdisc add dev $3 clsact && tc filter add dev $3 egress protocol ip prio 1 u32 match u32 0 0 flowid 1:1 && \
                  ! \"$0\" \"$@\" --hook clsact && ! mountpoint -q /sys/fs/bpf && tc qdisc del dev $3 clsact && echo undone";
    let text = succeeded(&with_own_mounts(&link, script)?)?;
    ensure!(text.contains("undone"), "{text}");
    Ok(())
}

#[test]
fn pins_that_would_vanish_with_the_command_are_refused() -> Result<()> {
    let link = Link::new()?;
    let binary = qjump_tests::link::binary();
    let binary = binary.to_str().context("a path in UTF-8")?;
    let ip_netns_exec = |arguments: &[&str]| link.near.command(binary).args(arguments).output();
    let mut load = vec!["load", "--interface", &link.device];
    load.extend(qjump_tests::link::PLAN);
    // The same for what is pinned already, and cannot be seen from there.
    for arguments in [&load[..], &["status"], &["status", "--interface", &link.device], &["unload", "--all"]] {
        let (status, error) = failed(&ip_netns_exec(arguments)?);
        assert_eq!(status, 1);
        assert!(error.contains("nsenter --net"), "{error}");
    }
    assert_eq!(programs(&link)?, [""; 0]);
    Ok(())
}

#[test]
fn where_nothing_is_loaded_status_does_not_hold() -> Result<()> {
    let link = Link::new()?;
    let output = with_own_mounts(&link, "mount -t bpf bpf /sys/fs/bpf && exec \"$0\" status")?;
    assert_eq!(failed(&output).0, 2);
    let text = String::from_utf8(output.stdout)?;
    assert!(text.contains("not enforced: qjump is not loaded on any interface"), "{text}");
    Ok(())
}

#[test]
fn a_watch_in_json_is_one_line_a_time_with_its_time() -> Result<()> {
    let link = Link::new()?;
    link.load(&[])?;
    let arguments = ["status", "--interface", &link.device, "--watch", "--json"];
    let mut watch = link.command(&arguments).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(watch.stdout.take().context("stdout")?).lines();
    let mut times = Vec::new();
    for line in lines.take(2) {
        let status: serde_json::Value = serde_json::from_str(&line?)?;
        times.push(status["at_unix_ns"].as_u64().context("a time")?);
    }
    watch.kill()?;
    watch.wait()?;
    assert!(times[1] > times[0], "{times:?}");
    Ok(())
}

#[test]
fn a_directory_that_others_may_write_is_refused() -> Result<()> {
    let link = Link::new()?;
    let script = "mount -t bpf bpf /sys/fs/bpf && mkdir -m 777 /sys/fs/bpf/qjump && exec \"$0\" \"$@\"";
    let output = with_own_mounts(&link, script)?;
    let (status, error) = failed(&output);
    assert_eq!(status, 1);
    assert!(error.contains("/sys/fs/bpf/qjump") && error.contains("mode 777"), "{error}");
    Ok(())
}
