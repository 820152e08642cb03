//! The agent on a real cable: restarts, reloads under traffic, what comes, goes and is undone, and hostile callers.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::UdpSocket,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixStream,
    },
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use qjump::measure::flood;
use qjump_tests::{
    agent::{Agent, network},
    arrivals::{Witness, burst_seen},
    cgroups::TestCgroup,
    frames::Random,
    link::{FAR, Link, NEAR, failed, succeeded},
    sender,
};
use serde_json::{Value, json};

fn count(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A plan with a queue for the near interface.
fn paced(link: &Link, queue: &str) -> String {
    format!("{}[host]\ninterfaces = [\"{}\"]\nqueue = \"{queue}\"\n", network("50mbit", 30_000), link.device)
}

fn passed(status: &Value) -> u64 {
    status["levels"].as_array().into_iter().flatten().filter_map(|level| level["passed_packets"].as_u64()).sum()
}

#[test]
fn a_restart_adopts_what_is_there_and_changes_nothing() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let mut agent = Agent::new(&link)?;
    agent.write(&paced(&link, "auto"))?;
    agent.start()?;
    let socket = sender::connected(&link.near, NEAR.0, FAR.0, 7000, 5)?;
    let _ = socket.send(b"hello");
    let (first, tc) = (link.status()?, link.tc_state()?);
    assert!(passed(&first) > 0, "{first:#}");
    for hard in [false, true] {
        if hard {
            agent.kill()?
        } else {
            agent.stop()?
        }
        let alone = link.status()?;
        assert_eq!(
            (&alone["attached"], &alone["program_id"]),
            (&json!(true), &first["program_id"]),
            "nobody is needed"
        );
        agent.start()?;
        let status = link.status()?;
        for key in ["program_id", "generation", "programs"] {
            assert_eq!(status[key], first[key], "{key}: {}", agent.log());
        }
        assert!(passed(&status) >= passed(&first));
        assert_eq!(link.tc_state()?, tc);
    }
    assert_eq!(agent.log().matches("DEBUG load").count(), 1, "{}", agent.log());
    // A second one is refused, and the first goes on.
    let [config, socket] = agent.paths();
    let (status, error) = failed(&link.qjump(&["agent", "--config", &config, "--socket", &socket])?);
    assert!(status == 1 && error.contains("another agent"), "{error}");
    assert_eq!(agent.state()?["ready"], true);
    // By other means, too, everything goes.
    succeeded(&agent.ask("drain", &[])?)?;
    agent.stop()?;
    assert_eq!(link.tc_state()?, before);
    assert!(!link.pins().exist());
    Ok(())
}

#[test]
fn once_says_whether_all_is_in_force() -> Result<()> {
    let link = Link::new()?;
    let agent = Agent::new(&link)?;
    let [config, socket] = agent.paths();
    let once = ["agent", "--once", "--config", &config, "--socket", &socket];
    agent.plan("50mbit", 30_000)?;
    succeeded(&link.qjump(&once)?)?;
    assert_eq!(link.status()?["attached"], true);
    agent.write("[cluster]\nhosts = 0\n")?;
    let (status, error) = failed(&link.qjump(&once)?);
    assert!(status == 1 && error.contains("line 2"), "{error}");
    assert_eq!(link.status()?["attached"], true, "the old one stays");
    // What is dropped from the configuration is left.
    agent.write(&format!("{}[host]\ninterfaces = []\n", network("50mbit", 30_000)))?;
    succeeded(&link.qjump(&once)?)?;
    assert!(!link.pins().exist());
    Ok(())
}

#[test]
fn reloads_under_traffic_lose_nothing_and_never_admit_more_than_the_looser_plan() -> Result<()> {
    // The same rate with two bursts: each change alone could hand out another burst.
    const RATE: f64 = 20e6;
    const BURSTS: [u32; 2] = [4_000, 8_000];
    // Without a limit, beside those of the level that has one.
    const PACKETS_PER_S: u64 = 200_000;
    let link = Link::new()?;
    let mut agent = Agent::new(&link)?;
    agent.plan("20mbit", BURSTS[0])?;
    agent.start()?;
    let mut witness = Witness::new(&link.far, &link.far_device)?;
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let storm = count("QJUMP_RELOADS", 100);
    let (mut random, mut bad, mut memory) = (Random(7), 0, Vec::new());
    let took = std::thread::scope(|scope| -> Result<Duration> {
        // Level 5 beyond its limit, level 0 without one.
        let flooded = sender::connected(&link.near, NEAR.0, FAR.0, 7000, 5)?;
        let free = sender::connected(&link.near, NEAR.0, FAR.0, 7001, 0)?;
        // Nobody reads there, and nobody says that nobody listens.
        let _receiver = link.far.enter(|| Ok(UdpSocket::bind((FAR.0, 7001))?))?;
        let (stop, sent) = (&stop, &sent);
        scope.spawn(move || {
            let mut random = Random(3);
            sender::flood(&flooded, stop, || {
                std::thread::sleep(Duration::from_micros(50));
                18 + random.below(700) as usize
            })
        });
        scope.spawn(move || {
            const PAYLOAD: usize = 64;
            let bps = PACKETS_PER_S * PAYLOAD as u64 * 8;
            sent.store(flood(&free, PAYLOAD, bps, stop).expect("the socket works"), Relaxed);
        });
        let began = Instant::now();
        let mut reloads = || -> Result<()> {
            for number in 0..storm {
                if random.below(3) == 0 {
                    let broken = ["hosts = -1", "[[level]]", "link-rate = \"10gbps\"", "nonsense"];
                    agent.write(&format!("{}{}", network("20mbit", 4_000), broken[random.below(4) as usize]))?;
                    let (status, error) = failed(&agent.ask("reload", &[])?);
                    ensure!(status == 2 && error.contains("line "), "{status}: {error}");
                    bad += 1;
                } else {
                    agent.plan("20mbit", BURSTS[random.below(2) as usize])?;
                    agent.reload()?;
                }
                witness.collect();
                if number % 10 == 9 {
                    memory.push(agent.usage()?.0);
                }
            }
            Ok(())
        };
        let result = reloads();
        stop.store(true, Relaxed);
        result.map(|()| began.elapsed())
    })?;
    std::thread::sleep(Duration::from_millis(200));
    let arrived = witness.counted()?;
    let limited = witness.collect();
    assert!(limited.iter().all(|one| one.tos == 0xa0), "no other marks");
    let burst = burst_seen(limited, RATE, 0, |arrival| arrival.sent_ns);
    let sent = sent.into_inner();
    println!(
        "{storm} reloads, {bad} of them refused, in {took:.1?}, beside {:.0} packets a second without a limit, of which {arrived} of \
         {sent} arrived; bursts of {burst:.0} of {} bytes; memory {memory:?} KiB",
        sent as f64 / took.as_secs_f64(),
        BURSTS[1]
    );
    assert_eq!(arrived, sent);
    assert!(burst <= f64::from(BURSTS[1]), "bursts of {burst} bytes");
    assert!(burst > f64::from(BURSTS[0]) / 2.0, "the limit was never reached: {burst}");
    assert!(memory.last() <= memory.first().map(|first| first + 2_048).as_ref(), "it grows: {memory:?}");
    assert_eq!(link.status()?["programs"], 1);
    Ok(())
}

#[test]
fn the_plan_is_for_as_many_hosts_as_the_list_has() -> Result<()> {
    let link = Link::new()?;
    let mut agent = Agent::new(&link)?;
    let list = agent.folder.join("hosts");
    let members = |count| fs::write(&list, (0..count).map(|host| format!("h{host}\n")).collect::<String>());
    // Nothing can be planned before the list is there.
    agent.write(&format!(
        "[cluster]\nlink-rate = \"1gbit\"\nmax-packet = 256\nepsilon = \"40us\"\n\
         [cluster.members]\nfile = \"{}\"\ninterval = \"1s\"\nhold = \"2s\"\n\
         [[level]]\nlevel = 7\nfactor = 1\n[host]\ninterfaces = [\"{}\"]\nqueue = \"keep\"\n",
        list.display(),
        link.device
    ))?;
    agent.spawn()?;
    agent.until("it waits for the list", |agent| agent.log().contains("until members are counted"))?;
    assert!(!link.pins().exist());
    let hosts = |count: usize| {
        agent.until(&format!("{count} hosts"), |_| link.status().is_ok_and(|status| status["hosts"] == count))
    };
    members(3)?;
    hosts(3)?;
    members(5)?;
    hosts(5)?;
    // Fewer count after the hold, and a list that is gone changes nothing.
    members(2)?;
    std::thread::sleep(Duration::from_millis(1_200));
    assert_eq!(link.status()?["hosts"], 5, "{}", agent.log());
    hosts(2)?;
    fs::remove_file(&list)?;
    agent.until("it knows that the list is gone", |agent| {
        agent.state().is_ok_and(|state| state["hosts_failure"].is_string())
    })?;
    assert_eq!(link.status()?["hosts"], 2);
    let state = agent.state()?;
    assert!(state["hosts_failure"].is_string() && state["hosts_age_s"].is_u64(), "{state:#}");
    succeeded(&agent.ask("drain", &[])?)?;
    Ok(())
}

#[test]
fn interfaces_come_go_and_get_other_names() -> Result<()> {
    let mut link = Link::new()?;
    link.near.ip(&format!("link del {}", link.device))?;
    let device = link.device.clone();
    {
        let mut agent = Agent::new(&link)?;
        agent.plan("50mbit", 30_000)?;
        agent.start()?;
        assert!(agent.state()?["interfaces"][&device].as_str().is_some_and(|why| why.contains("no such interface")));
        for _ in 0..2 {
            link.plug()?;
            agent.until_enforced()?;
            link.near.ip(&format!("link del {device}"))?;
            agent.until("it has noticed", |agent| {
                agent.state().is_ok_and(|state| state["interfaces"][&device].is_string())
            })?;
        }
        link.plug()?;
        agent.until_enforced()?;
        // The device keeps its limits under another name, and under that one when the configuration says so.
        let other = format!("{device}x");
        let rename = |from: &str, to: &str| {
            link.near.batch("ip", &format!("link set {from} down\nlink set {from} name {to}\nlink set {to} up\n"))
        };
        rename(&device, &other)?;
        agent.write(&format!("{}[host]\ninterfaces = [\"{other}\"]\nqueue = \"keep\"\n", network("50mbit", 30_000)))?;
        agent.reload()?;
        let status = succeeded(&link.qjump(&["status", "--interface", &other])?)?;
        assert!(status.contains("1 of 1 there"), "{status}");
        assert!(!link.pins().exist(), "nothing is left of the old name");
        succeeded(&agent.ask("drain", &[])?)?;
        rename(&other, &device)?;
    }
    link.device = device;
    Ok(())
}

#[test]
fn what_others_undo_is_repaired_and_said_once() -> Result<()> {
    let link = Link::new()?;
    let mut agent = Agent::new(&link)?;
    agent.write(&paced(&link, "htb"))?;
    agent.start()?;
    let settled = |number: usize| {
        agent.until("it is repaired", |agent| {
            agent.log().matches("somebody has undone it").count() == number
                && agent.state().is_ok_and(|state| state["interfaces"][&link.device].is_null())
        })?;
        agent.until_enforced()
    };
    fs::remove_file(link.pins().link())?;
    settled(1)?;
    link.near.batch("tc", &format!("qdisc del dev {} root\n", link.device))?;
    settled(2)?;
    link.pins().remove()?;
    settled(3)?;
    link.near.batch("tc", &format!("class change dev {} classid 716a:6 htb rate 1gbit\n", link.device))?;
    settled(4)?;
    assert_eq!(link.status()?["programs"], 1);
    // Somebody else's queue stays, though the configuration asks for htb.
    link.near.batch("tc", &format!("qdisc replace dev {} root handle 9: pfifo limit 77\n", link.device))?;
    agent.until("it gives way", |_| link.status().is_ok_and(|status| status["queue"] == "keep"))?;
    std::thread::sleep(Duration::from_secs(3));
    let log = agent.log();
    assert_eq!(log.matches("somebody has put a queue of his own").count(), 1, "{log}");
    assert_eq!(log.matches("somebody has undone it").count(), 4, "{log}");
    assert!(link.tc_state()?.contains("pfifo 9: root"), "{}", link.tc_state()?);
    let state = agent.state()?;
    assert!(
        state["interfaces"][&link.device].as_str().is_some_and(|why| why.contains("queue of his own")),
        "{state:#}"
    );
    Ok(())
}

#[test]
fn whatever_is_killed_the_next_one_makes_good() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let cgroup = TestCgroup::new()?;
    let mut agent = Agent::new(&link)?;
    let configs = [
        paced(&link, "auto"),
        paced(&link, "keep"),
        paced(&link, "auto").replace("50mbit", "70mbit"),
        paced(&link, "auto") + "rate = \"500mbit\"\n",
    ]
    .map(|config| format!("{config}\n[[assign]]\nlevel = 5\ncgroup = \"{}\"\n", cgroup.path()));
    let mut random = Random(11);
    let rounds = count("QJUMP_KILLS", 20);
    for round in 0..rounds {
        agent.write(&configs[random.below(4) as usize])?;
        agent.spawn()?;
        std::thread::sleep(Duration::from_micros(u64::from(random.below(300_000) as u32)));
        if random.below(2) == 0 {
            agent.write(&configs[random.below(4) as usize])?;
            // It may not listen yet, and it may be killed at any moment.
            if let Ok(mut stream) = UnixStream::connect(agent.socket()) {
                let method = if random.below(4) == 0 { "drain" } else { "reload" };
                let _ = writeln!(stream, "{{\"method\": \"{method}\"}}");
                std::thread::sleep(Duration::from_micros(u64::from(random.below(60_000) as u32)));
            }
        }
        agent.kill()?;
        if round % 4 == 3 || round + 1 == rounds {
            let wanted = fs::read_to_string(agent.config())?;
            agent.start()?;
            let status = link.status()?;
            assert_eq!(
                (&status["attached"], &status["programs"]),
                (&json!(true), &json!(1)),
                "round {round}: {}",
                agent.log()
            );
            assert_eq!(status["queue_problems"], json!([]), "round {round}");
            assert_eq!(status["queue"] == "keep", wanted.contains("\"keep\""), "round {round}: {status:#}");
            agent.until("the rule is applied", |_| {
                link.qjump(&["tags", "--json"])
                    .is_ok_and(|tags| String::from_utf8_lossy(&tags.stdout).contains(&cgroup.path()))
            })?;
            agent.kill()?;
        }
    }
    agent.start()?;
    succeeded(&agent.ask("drain", &[])?)?;
    agent.stop()?;
    assert_eq!(link.tc_state()?, before);
    assert!(!link.pins().exist());
    Ok(())
}

#[test]
fn many_tagged_cgroups_cost_next_to_nothing_at_rest() -> Result<()> {
    let link = Link::new()?;
    let cgroups = TestCgroup::new()?;
    let mut agent = Agent::new(&link)?;
    let many = count("QJUMP_CGROUPS", 50);
    let mut config = paced(&link, "keep");
    for number in 0..many {
        cgroups.below(&number.to_string())?;
        config += &format!("\n[[assign]]\nlevel = 5\ncgroup = \"{}/{number}\"\n", cgroups.path());
    }
    agent.write(&config)?;
    agent.start()?;
    let tagged = || -> Result<u64> {
        let tags = succeeded(&link.qjump(&["tags", "--json"])?)?;
        let tags: Value = serde_json::from_str(&tags)?;
        let own = |tag: &&Value| tag["cgroup"].as_str().is_some_and(|path| path.starts_with(&cgroups.path()));
        Ok(tags["tags"].as_array().into_iter().flatten().filter(own).count() as u64)
    };
    let began = Instant::now();
    while tagged()? < many {
        ensure!(began.elapsed() < Duration::from_secs(120), "{} of {many} are tagged: {}", tagged()?, agent.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("{many} cgroups are tagged after {:.1?}", began.elapsed());
    std::thread::sleep(Duration::from_secs(2));
    let (_, before) = agent.usage()?;
    std::thread::sleep(Duration::from_secs(10));
    let (memory, after) = agent.usage()?;
    println!("at rest: {} ticks of 10 ms in 10 s, {memory} KiB", after - before);
    // Others' processes come and go meanwhile, and each time it looks.
    assert!(after - before < 50, "{} ticks of 10 ms in 10 s", after - before);
    agent.write(&paced(&link, "keep"))?;
    agent.reload()?;
    agent.until("the grants are taken back", |_| tagged().is_ok_and(|left| left == 0))?;
    succeeded(&agent.ask("drain", &[])?)?;
    Ok(())
}

#[test]
fn hostile_callers_stop_nobody() -> Result<()> {
    let link = Link::new()?;
    let mut agent = Agent::new(&link)?;
    agent.plan("50mbit", 30_000)?;
    agent.start()?;
    assert_eq!(fs::metadata(agent.socket())?.permissions().mode() & 0o007, 0);
    let mut random = Random(5);
    let (before, _) = agent.usage()?;
    let words: [&[u8]; 8] = [
        b"{\"method\": \"tag\", \"level\": 9, \"unit\": \"/\"}",
        b"{\"method\": \"tag\", \"level\": 5}",
        b"{\"method\": \"untag\", \"pid\": 4294967294}",
        b"{\"method\": \"reload\", \"x\": 1}",
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        b"\"\\ud800\"",
        b"\0\0\0\0",
        b"{\"method\":",
    ];
    let mut refused = 0;
    for _ in 0..100 {
        let mut stream = UnixStream::connect(agent.socket())?;
        let mut all = Vec::new();
        for _ in 0..100 {
            let mut line = words[random.below(8) as usize].to_vec();
            let at = random.below(line.len() as u64) as usize;
            line[at] = (random.below(255) as u8).max(11);
            all.extend(line);
            all.push(b'\n');
        }
        stream.write_all(&all)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answers = String::new();
        stream.read_to_string(&mut answers)?;
        refused += answers.lines().filter(|line| line.contains("\"ok\":false")).count();
    }
    assert_eq!(refused, 10_000);
    // One that sends a byte now and then, many that send nothing, and one line without an end.
    let mut idle = Vec::new();
    for _ in 0..1_000 {
        idle.push(UnixStream::connect(agent.socket())?);
    }
    let mut endless = UnixStream::connect(agent.socket())?;
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);
    let began = Instant::now();
    for _ in 0..20 {
        let _ = idle[999].write_all(b"{");
        assert_eq!(agent.state()?["ready"], true);
    }
    println!("20 others were served in {:?} beside 1,000 connections", began.elapsed());
    drop(idle);
    let (after, _) = agent.usage()?;
    println!("memory: {before} KiB, {after} KiB after 10,000 malformed requests and 1,000 connections");
    assert!(after < before + 4_096, "it grows");
    assert_eq!(link.status()?["attached"], true);
    Ok(())
}

#[test]
fn only_its_owner_may_write_a_configuration() -> Result<()> {
    let link = Link::new()?;
    let mut agent = Agent::new(&link)?;
    agent.plan("50mbit", 30_000)?;
    agent.start()?;
    let refused = |part: &str| -> Result<()> {
        let (status, error) = failed(&agent.ask("reload", &[])?);
        assert!(status == 2 && error.contains(part), "{status}: {error}");
        Ok(())
    };
    let mode = |path: &std::path::Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    mode(&agent.config(), 0o666)?;
    refused("may be written by everybody (mode 666)")?;
    mode(&agent.config(), 0o644)?;
    mode(&agent.folder, 0o777)?;
    refused("chmod o-w")?;
    mode(&agent.folder, 0o755)?;
    let part = agent.folder.join("conf.d");
    fs::create_dir(&part)?;
    fs::write(part.join("a.toml"), "[[assign]]\nlevel = 5\nlocal-port = 11211\n")?;
    // It is somebody's own affair until it gives programs levels.
    chown(agent.config(), Some(65_534), None)?;
    refused("belongs to user 65534")?;
    fs::remove_file(part.join("a.toml"))?;
    agent.reload()?;
    chown(agent.config(), Some(0), None)?;
    fs::remove_file(agent.config())?;
    refused("cannot look at")?;
    assert_eq!(link.status()?["attached"], true);
    Ok(())
}

#[test]
fn many_interfaces_are_ready_soon_and_a_change_is_quick() -> Result<()> {
    const MANY: usize = 64;
    let link = Link::new()?;
    let name = |number: usize| format!("{}m{number}", link.device);
    let lines: String = (0..MANY)
        .map(|number| {
            format!("link add {0} type veth peer name {0}p\nlink set {0} up\nlink set {0}p up\n", name(number))
        })
        .collect();
    link.near.batch("ip", &lines)?;
    let names: Vec<String> = (0..MANY).map(name).collect();
    let mut agent = Agent::new(&link)?;
    let config = |names: &[String], rate: &str| format!("{}[host]\ninterfaces = {names:?}\n", network(rate, 30_000));
    agent.write(&config(&names, "50mbit"))?;
    let ready = |agent: &Agent<'_>| {
        let log = agent.log();
        let last = log.lines().rfind(|line| line.contains("ready after")).map(str::to_owned);
        last.unwrap_or(log)
    };
    let work = (|| -> Result<()> {
        agent.start()?;
        println!("{MANY} interfaces, nothing loaded: {}", ready(&agent));
        agent.stop()?;
        agent.start()?;
        println!("{MANY} interfaces, all as wanted: {}", ready(&agent));
        // At rest it costs next to nothing.
        std::thread::sleep(Duration::from_secs(1));
        let (_, before) = agent.usage()?;
        std::thread::sleep(Duration::from_secs(5));
        let (memory, after) = agent.usage()?;
        println!("at rest with {MANY} interfaces: {} ticks of 10 ms in 5 s, {memory} KiB", after - before);
        assert!(memory < 64 * 1024, "{memory} KiB");
        agent.write(&config(&names, "52mbit"))?;
        let began = Instant::now();
        // A slow machine may take longer than the command waits.
        drop(agent.ask("reload", &[])?);
        agent.until("all are changed", |agent| {
            let state = agent.state().unwrap_or_default();
            let problems = state["interfaces"].as_object();
            state["generation"] == 2 && problems.is_some_and(|all| all.values().all(Value::is_null))
        })?;
        println!("a change on {MANY} interfaces: {:?}", began.elapsed());
        agent.write(&config(&names[..1], "52mbit"))?;
        agent.reload()?;
        for rate in ["53mbit", "54mbit", "55mbit", "56mbit"] {
            agent.write(&config(&names[..1], rate))?;
            let began = Instant::now();
            agent.reload()?;
            println!("a change on one interface, with the command that asks for it: {:?}", began.elapsed());
            let status = succeeded(&link.qjump(&["status", "--interface", &names[0], "--json"])?)?;
            let status: Value = serde_json::from_str(&status)?;
            let in_force = status["interfaces"][0]["levels"][0]["rate_bps"].as_f64().unwrap_or(0.0);
            let asked = rate.strip_suffix("mbit").and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
            assert!((in_force / 1e6 - asked).abs() < 0.01, "{in_force} bit/s, not {rate}");
        }
        succeeded(&agent.ask("drain", &[])?)?;
        Ok(())
    })();
    for name in &names {
        let _ = qjump::dataplane::Pins::of(name).remove();
    }
    work
}

/// Members of group qjump, who have no rights of their own, tag by an agent that has those of its unit; others do not.
#[test]
fn members_of_the_group_tag_by_the_agent() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("qjump-group-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let path = |name: &str| folder.join(name);
    fs::copy(qjump_tests::link::binary(), path("qjump"))?;
    fs::write(path("group"), fs::read_to_string("/etc/group")? + "qjump:x:60001:\n")?;
    fs::write(path("qjump.toml"), format!("{}[host]\ninterfaces = []\n", network("50mbit", 30_000)))?;
    let (top, mut process) = (TestCgroup::new()?, Command::new("sleep").arg("60").spawn()?);
    fs::write(top.directory.join("cgroup.procs"), process.id().to_string())?;
    // In mounts of its own, where the group is known and the socket in its usual place.
    let script = r#"
        mount -t tmpfs none /run; mkdir -m 755 /run/qjump; mount --bind group /etc/group
        setpriv --regid 60001 --clear-groups --bounding-set -all,+bpf,+net_admin,+perfmon ./qjump agent --config "$PWD/qjump.toml" --metrics none 2>log &
        agent=$!; trap 'kill $agent; wait $agent || true' EXIT
        for turn in $(seq 200); do [ -S /run/qjump/agent.sock ] && break; sleep 0.05; done
        as() { group=$1; shift; setpriv --reuid 65534 --regid $group --clear-groups --bounding-set -all ./qjump "$@"; }
        as 60001 tag --pid $1 --level 5
        ./qjump tags --json
        if as 65534 tag --pid $1 --level 6 2>&1; then exit 1; fi
        if as 60001 tag --cgroup /nowhere --level 6 2>&1; then exit 1; fi
        if unshare --pid --fork setpriv --regid 60001 --clear-groups --bounding-set -all ./qjump tag --pid $1 --level 6 2>&1; then exit 1; fi
        as 60001 untag --pid $1
        ./qjump tags --json
    "#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-ec", script, "sh", &process.id().to_string()])
        .current_dir(&folder)
        .output()?;
    process.kill()?;
    process.wait()?;
    let log = fs::read_to_string(path("log")).unwrap_or_default();
    fs::remove_dir_all(&folder)?;
    let text = succeeded(&output).map_err(|error| error.context(log))?;
    println!("{text}");
    // The agent may not look into other processes; who asks is told.
    assert!(text.contains("at level 5; 0 live socket(s) moved") && text.contains("CAP_SYS_PTRACE"), "{text}");
    assert!(text.contains("\"granted_by_uid\": 65534"), "{text}");
    assert!(text.contains("is for root and the members of group qjump alone"), "{text}");
    assert!(text.contains("PID namespace of its own"), "{text}");
    assert!(text.contains(": untagged;") && text.contains("\"tags\": []"), "{text}");
    Ok(())
}
