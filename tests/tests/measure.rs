//! `qjump measure` as people and scripts use it: between namespaces, beside the limiter, and with everything that can go wrong.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::{
    testbed::{NetNs, Queueing, Rack, RackSpec},
    units::Rate,
};
use qjump_tests::{
    link::{FAR, Link, binary, failed, succeeded},
    measuring::{Server, qjump},
    nobody::{self, Folder},
    relay::Relay,
};
use serde_json::{Value, json};

/// A measurement of a second, its results as JSON.
fn measured(netns: Option<&NetNs>, arguments: &[&str]) -> Result<Value> {
    let short = ["--duration", "1s", "--warm-up", "100ms", "--quiet", "--json", "-"];
    let output = qjump(netns, &[&["measure"], arguments, &short].concat()).output()?;
    let json = succeeded(&output)?;
    Ok(serde_json::from_str(&json)?)
}

fn counts(document: &Value) -> &Value {
    &document["runs"][0]["streams"][0]["counts"]
}

fn notes(document: &Value) -> String {
    document["notes"].to_string()
}

#[test]
fn udp_and_tcp_by_both_families_at_several_levels() -> Result<()> {
    let link = Link::with_ipv6()?;
    let server = Server::new(Some(&link.far))?;
    for (host, tcp) in [
        (FAR.0.to_owned(), false),
        (format!("[{}]", FAR.1), false),
        (FAR.0.to_owned(), true),
        (format!("[{}]", FAR.1), true),
    ] {
        let target = server.at(&host);
        let mut arguments = vec!["probe", &target, "--level", "7,3,0", "--rate", "500", "--poisson"];
        arguments.extend(tcp.then_some("--tcp"));
        let document = measured(Some(&link.near), &arguments)?;
        assert_eq!(document["schema_version"], 1);
        assert_eq!(document["setting"]["interface"], json!(link.device));
        assert_eq!(document["setting"]["same_machine"], true);
        let streams = document["runs"][0]["streams"].as_array().context("no streams")?;
        // Each level: there and back, there, back.
        assert_eq!(streams.len(), 9, "{streams:?}");
        for (number, level) in [7, 3, 0].into_iter().enumerate() {
            let stream = &streams[number * 3];
            let transport = if tcp { "tcp" } else { "udp" };
            assert_eq!(stream["name"], json!(format!("{transport} level {level}")));
            let counts = &stream["counts"];
            let sent = counts["sent"].as_u64().context("no count")?;
            // Poisson with a mean of 500 has a standard deviation of 22.
            assert!((350..650).contains(&sent), "{counts}");
            assert_eq!((&counts["received"], &counts["lost"]), (&json!(sent), &json!(0)), "{stream}");
            assert_eq!((&counts["lost_up"], &counts["corrupted"]), (&json!(0), &json!(0)));
            for segment in stream["segments"].as_array().context("no segments")? {
                let missing = segment["missing"].as_u64().context("no count")?;
                assert!(missing * 20 <= sent, "{host} tcp {tcp}: {} of {sent}: {missing} missing", segment["name"]);
            }
            for way in [1, 2] {
                assert_eq!(streams[number * 3 + way]["sample"], "one-way");
                let samples = streams[number * 3 + way]["response"]["samples"].as_u64();
                assert!(samples.is_some_and(|samples| samples * 20 >= sent * 19), "{samples:?} of {sent}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_closed_loop_is_as_fast_as_its_answers() -> Result<()> {
    let link = Link::new()?;
    let server = Server::new(Some(&link.far))?;
    let document = measured(Some(&link.near), &["pingpong", &server.at(FAR.0)])?;
    let stream = &document["runs"][0]["streams"][0];
    let (sent, mean) = (stream["counts"]["sent"].as_f64(), stream["response"]["mean_ns"].as_f64());
    let busy = sent.zip(mean).map(|(sent, mean)| sent * mean / 1e9).context("no samples")?;
    // Of the second, the answers took most; the rest was between an answer and the next probe.
    assert!((0.2..=1.0).contains(&busy), "{busy}: {sent:?} probes of {mean:?} ns");
    assert_eq!(document["setting"]["closed_loop"], true);
    Ok(())
}

/// 100 Mbit/s for 12 hosts: an epoch of half a millisecond.
const SLOW: [&str; 12] = [
    "--hosts",
    "12",
    "--link-rate",
    "100mbit",
    "--max-packet",
    "256",
    "--epsilon",
    "4us",
    "--level",
    "7:1",
    "--queue",
    "keep",
];

#[test]
fn losses_match_what_the_limiter_dropped() -> Result<()> {
    let link = Link::new()?;
    succeeded(&link.qjump(&[&["load", "--interface", &link.device], &SLOW[..]].concat())?)?;
    let server = Server::new(Some(&link.far))?;
    let target = server.at(FAR.0);
    let arguments = ["probe", &target, "--level", "7,0", "--rate", "4000", "--warm-up", "0us"];
    let short = ["--duration", "1s", "--quiet", "--json", "-"];
    let output = qjump(Some(&link.near), &[&["measure"], &arguments[..], &short].concat()).output()?;
    let document: Value = serde_json::from_str(&succeeded(&output)?)?;
    let streams = &document["runs"][0]["streams"];
    let (limited, free) = (&streams[0]["counts"], &streams[3]["counts"]);
    let dropped = limited["limiter_dropped"].as_u64().context("no limiter")?;
    // One each 0.54 ms passes, of one each 0.25 ms.
    assert!(dropped > 1_500, "{limited}");
    assert_eq!(
        (&limited["lost"], &limited["lost_up"], &limited["lost_down"]),
        (&json!(dropped), &json!(dropped), &json!(0))
    );
    // The kernel told the sender of each.
    assert_eq!(limited["refused"], json!(dropped));
    assert_eq!((&free["lost"], &free["limiter_dropped"]), (&json!(0), &json!(0)));
    let left = format!("udp level 7: {dropped} of the lost probes did not leave this host");
    assert!(notes(&document).contains(&left), "{}", notes(&document));
    Ok(())
}

#[test]
fn a_bound_is_that_of_the_plans_on_the_way() -> Result<()> {
    let link = Link::new()?;
    succeeded(&link.qjump(&[&["load", "--interface", &link.device], &SLOW[..]].concat())?)?;
    let server = Server::new(Some(&link.far))?;
    let target = server.at(FAR.0);
    let slow = ["probe", &target, "--level", "7", "--rate", "500"];

    // Only the way there has a bound.
    let document = measured(Some(&link.near), &slow)?;
    let bounds = |document: &Value| {
        let streams = document["runs"][0]["streams"].as_array().cloned().unwrap_or_default();
        streams.iter().map(|stream| stream["bound_ns"].as_u64()).collect::<Vec<_>>()
    };
    let there = link.status()?["levels"][0]["bound_ns"].as_f64().context("no bound")? as u64;
    assert_eq!(bounds(&document), [None, Some(there), None]);
    assert!(notes(&document).contains("level 7: the way back has no bound"), "{}", notes(&document));
    // A condition that nobody could decide is refused before anything is sent.
    let asserted = qjump(Some(&link.near), &[&["measure"], &slow[..], &["--assert", "max<bound"]].concat()).output()?;
    let (status, said) = failed(&asserted);
    assert!(status == 64 && said.contains("give --bound"), "{status}: {said}");

    // Both have one.
    let mut far = Command::new("nsenter");
    far.arg(format!("--net=/run/netns/{}", link.far.name())).arg(binary()).args([
        "load",
        "--interface",
        &link.far_device,
    ]);
    succeeded(&far.args(SLOW).output()?)?;
    let document = measured(Some(&link.near), &slow)?;
    assert_eq!(bounds(&document), [Some(2 * there), Some(there), Some(there)]);
    // What somebody says counts before that.
    let document = measured(Some(&link.near), &[&slow[..], &["--bound", "1ns"]].concat())?;
    assert_eq!(bounds(&document), [Some(2), Some(1), Some(1)]);
    let stream = &document["runs"][0]["streams"][0];
    assert_eq!(stream["violations"], stream["response"]["samples"]);
    qjump::dataplane::Pins::of(&link.far_device).remove()?;
    Ok(())
}

#[test]
fn conditions_decide_the_exit_status() -> Result<()> {
    let server = Server::new(None)?;
    let target = server.at("127.0.0.1");
    let run = |conditions: &[&str]| {
        let mut arguments = vec!["measure", "probe", &target, "--duration", "500ms", "--warm-up", "0us", "--quiet"];
        arguments.extend(conditions.iter().flat_map(|condition| ["--assert", condition]));
        qjump(None, &arguments).output()
    };
    let output = run(&["p50<10s", "up:max<10s", "loss<100%"])?;
    let said = succeeded(&output)?;
    assert_eq!(said.matches(": holds (").count(), 3, "{said}");
    // 500 samples: too few for this percentile.
    let output = run(&["p50<10s", "p99.9<10s", "0:min<1ns"])?;
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stdout)?;
    assert!(said.contains("p99.9<10s: DOES NOT HOLD (udp level 0: hidden: 500 samples, p99.9 needs 10000)"), "{said}");
    assert!(said.contains("0:min<1ns: DOES NOT HOLD") && said.contains("p50<10s: holds"), "{said}");
    for condition in ["p100<1ms", "p99", "p99<1", "rtt<1ms"] {
        let (status, said) = failed(&run(&[condition])?);
        assert!(status == 64 && said.contains("is no condition"), "{condition}: {status}: {said}");
    }
    Ok(())
}

/// A wire that loses, duplicates, reorders and changes packets is seen through: every count is exact.
#[test]
fn counts_what_a_hostile_wire_does() -> Result<()> {
    let server = Server::listening_on(None, "127.0.0.1:0")?;
    let relay = Relay::new(server.address)?;
    let target = relay.address.to_string();
    let document = measured(None, &["probe", &target, "--rate", "2000"])?;
    let counts = counts(&document);
    let done = relay.done();
    ensure!(done.lost_up > 20 && done.lost_down > 20 && done.reordered > 40, "the wire did little: {done:?}");
    let (up, down) = (done.lost_up + done.corrupted_up, done.lost_down + done.corrupted_down);
    let expected = json!({
        "sent": 2000,
        "received": 2000 - up - down,
        "lost": up + down,
        "lost_up": up,
        "lost_down": down,
        "duplicated": done.duplicated,
        // An answer to a probe that came late is late, too: it is counted on both ways.
        "reordered": counts["reordered"],
        "corrupted": done.corrupted_up + done.corrupted_down,
        "refused": 0,
        "limiter_dropped": null,
    });
    assert_eq!(counts, &expected, "{done:?}");
    let reordered = counts["reordered"].as_u64().context("no count")?;
    assert!((done.reordered..=2 * done.reordered).contains(&reordered), "{reordered}: {done:?}");
    Ok(())
}

#[test]
fn a_server_that_ends_or_stops_half_way_leaves_results() -> Result<()> {
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let server = Server::new(None)?;
        let folder = Folder::new()?;
        let file = folder.path("result.json");
        let path = file.to_string_lossy();
        let target = server.at("127.0.0.1");
        let client =
            qjump(None, &["measure", "probe", &target, "--duration", "3s", "--warm-up", "0us", "--json", &path])
                .spawn()?;
        thread::sleep(Duration::from_millis(1500));
        server.signal(signal)?;
        let output = client.wait_with_output()?;
        let document: Value = serde_json::from_slice(&fs::read(&file)?)?;
        let counts = counts(&document);
        let received = counts["received"].as_u64().context("no count")?;
        assert!((500..2_500).contains(&received), "{counts}");
        assert_eq!(counts["lost_up"], json!(null));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if signal == Signal::SIGKILL {
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("the server went away") && notes(&document).contains("went away after"), "{said}");
            // It did not go on for nothing.
            assert!(document["runs"][0]["duration_ns"].as_u64().is_some_and(|ns| ns < 2_900_000_000));
        } else {
            // The outage is a result.
            assert_eq!(output.status.code(), Some(0), "{said}");
            assert!(notes(&document).contains("does not tell what it counted"), "{}", notes(&document));
            assert!(counts["lost"].as_u64().is_some_and(|lost| lost > 500), "{counts}");
        }
    }
    Ok(())
}

#[test]
fn an_interrupted_measurement_keeps_what_it_has() -> Result<()> {
    let server = Server::new(None)?;
    let target = server.at("127.0.0.1");
    let child = qjump(None, &["measure", "probe", &target, "--duration", "1000s", "--json", "-"]).spawn()?;
    thread::sleep(Duration::from_millis(2500));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
    let output = child.wait_with_output()?;
    let document: Value = serde_json::from_str(&succeeded(&output)?)?;
    let sent = counts(&document)["sent"].as_u64().context("no count")?;
    assert!((100..10_000).contains(&sent) && counts(&document)["lost"] == 0, "{}", counts(&document));
    assert!(notes(&document).contains("interrupted"));
    // And told how it went, meanwhile.
    assert!(String::from_utf8_lossy(&output.stderr).contains("udp level 0: "));
    Ok(())
}

#[test]
fn live_lines_come_each_second_and_a_full_disk_costs_no_result() -> Result<()> {
    let server = Server::new(None)?;
    let target = server.at("127.0.0.1");
    let run = |more: &[&str]| {
        let arguments = ["measure", "probe", &target, "--duration", "2s", "--warm-up", "0us", "--quiet"];
        qjump(None, &[&arguments[..], more].concat()).output()
    };
    let lines = succeeded(&run(&["--live", "-", "--level", "0,1"])?)?;
    let lines: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let samples = |stream: &str| {
        let of_stream = lines.iter().filter(|line| line["stream"] == stream);
        of_stream.map(|line| line["samples"].as_u64().unwrap_or(0)).sum::<u64>()
    };
    assert!(lines.len() >= 4, "{lines:?}");
    assert_eq!((samples("udp level 0"), samples("udp level 1")), (2_000, 2_000));

    // What the file cannot take is not lost.
    let output = run(&["--json", "/dev/full"])?;
    let (status, said) = failed(&output);
    assert!(status == 1 && said.contains("cannot write /dev/full: No space left on device"), "{status}: {said}");
    let shown = String::from_utf8(output.stdout)?;
    let json = shown.lines().find(|line| line.starts_with('{')).context("no JSON")?;
    assert_eq!(counts(&serde_json::from_str(json)?)["sent"], 2_000);
    let output = run(&["--live", "/dev/full"])?;
    let (status, said) = failed(&output);
    assert!(status == 1 && said.contains("cannot write /dev/full"), "{status}: {said}");
    assert!(String::from_utf8(output.stdout)?.contains("udp level 0: 2000 sent"));
    // A folder that is not there is noticed before anything is sent.
    let started = Instant::now();
    let (status, said) = failed(&run(&["--json", "/no/such/folder/result.json"])?);
    assert!(status == 1 && said.contains("/no/such/folder") && started.elapsed() < Duration::from_secs(1), "{said}");
    Ok(())
}

/// Answers the first line of each connection with this, and reads what comes.
fn impostor(answer: &str) -> Result<SocketAddr> {
    let answer = answer.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
            // Long enough for a client that waits.
            let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
            let _ = stream.read(&mut [0; 1]);
        }
    });
    Ok(address)
}

#[test]
fn whoever_is_no_server_is_told_from_one() -> Result<()> {
    let nobody_there = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    for (address, part) in [
        (nobody_there, "is `qjump measure serve` running there?"),
        (
            impostor("{\"message\":\"opened\",\"protocol\":99,\"anything\":1}\n")?,
            &format!("speaks version 99 of the protocol, this side version {PROTOCOL}"),
        ),
        (impostor("HTTP/1.1 400 Bad Request\r\n\r\n")?, "is it `qjump measure serve`?"),
        (impostor("")?, "no answer within 5 s"),
        (
            impostor(&format!("{}\n", json!({"message": "refused", "protocol": PROTOCOL, "why": "not today"})))?,
            "refuses: not today",
        ),
    ] {
        let output = qjump(None, &["measure", "probe", &address.to_string()]).output()?;
        let (status, said) = failed(&output);
        assert!(status == 1 && said.contains(part), "{status}: {said}");
    }
    Ok(())
}

/// The version of the protocol that this qjump speaks.
const PROTOCOL: u32 = 2;

#[test]
fn a_server_says_what_is_wrong_with_its_address_or_its_client() -> Result<()> {
    let server = Server::new(None)?;
    let taken = format!("[::]:{}", server.address.port());
    for (listen, part) in [(taken.as_str(), "another program has the port"), ("192.0.2.1:0", "no address of this host")]
    {
        let (status, said) = failed(&qjump(None, &["measure", "serve", "--listen", listen]).output()?);
        assert!(status == 1 && said.contains(part), "{status}: {said}");
    }
    // A client of another version learns which this is.
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.address.port()))?;
    stream.write_all(b"{\"message\":\"open\",\"protocol\":77}\n")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let answer: Value = serde_json::from_str(&answer)?;
    assert_eq!((&answer["message"], &answer["protocol"]), (&json!("refused"), &json!(PROTOCOL)));
    assert!(answer["why"].to_string().contains("version 77"), "{answer}");
    // Whatever else comes does no harm.
    let attach = format!("{}\n", json!({"message": "attach", "protocol": PROTOCOL, "token": 5}));
    for nonsense in ["\n", "GET / HTTP/1.1\r\n\r\n", "{}\n", &attach, "[[[[[[[["] {
        std::net::TcpStream::connect(("127.0.0.1", server.address.port()))?.write_all(nonsense.as_bytes())?;
    }
    let open = json!({"message": "open", "protocol": PROTOCOL, "boot_id": "", "cpu": null, "trains": [
        {"token": 1, "transport": "udp", "level": 9, "mark": false, "payload": 64, "answered": true}]});
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", server.address.port()))?;
    writeln!(stream, "{open}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    assert!(answer.contains("there is no level 9"), "{answer}");
    measured(None, &["probe", &server.at("127.0.0.1")])?;
    Ok(())
}

#[test]
fn without_privilege_it_measures_and_says_what_is_missing() -> Result<()> {
    let folder = Folder::new()?;
    let program = folder.take(&binary())?;
    let server = Server::new(None)?;
    let target = server.at("127.0.0.1");
    let run = |level: &str| -> Result<Output> {
        let short = ["--duration", "300ms", "--warm-up", "0us", "--quiet", "--json", "-"];
        let mut command = nobody::command(&program);
        Ok(command.args(["measure", "probe", &target, "--level", level]).args(short).output()?)
    };
    let document: Value = serde_json::from_str(&succeeded(&run("5")?)?)?;
    assert_eq!(document["runs"][0]["streams"][0]["generator"]["real_time"], false);
    assert!(notes(&document).contains("no permission for real-time priority"), "{}", notes(&document));
    assert_eq!(counts(&document)["received"], 300);
    let (status, said) = failed(&run("7")?);
    assert!(status == 1 && said.contains("level 7 is refused") && said.contains("CAP_NET_ADMIN"), "{status}: {said}");
    Ok(())
}

#[test]
fn nonsense_is_refused_before_anything_is_sent() -> Result<()> {
    for (arguments, part) in [
        (&["probe", "127.0.0.1", "--size", "8"][..], "16 to 65507 bytes"),
        (&["probe", "127.0.0.1", "--rate", "0"], "above 0"),
        (&["probe", "127.0.0.1", "--rate", "2000000"], "than one thread can send"),
        (&["probe", "127.0.0.1", "--rate", "500000", "--timeout", "10s"], "lower the rate or the timeout"),
        (&["probe", "127.0.0.1", "--duration", "0s"], "nothing to measure"),
        (&["probe", "127.0.0.1", "--level", "7,7"], "twice"),
        (&["probe", "127.0.0.1", "--level", "8"], "from 0 to 7"),
        (&["probe", "127.0.0.1", "--cpu", "100000"], "may not run on CPU"),
        (&["probe", "127.0.0.1", "--json", "-", "--live", "-"], "cannot share standard output"),
        (&["ladder", "127.0.0.1"], "--rates"),
        (&["ladder", "127.0.0.1", "--rates", "10,0"], "above 0"),
        (&["ladder", "127.0.0.1", "--sizes", "64,8"], "16 to 65507 bytes"),
        (&["switch-check", "127.0.0.1"], "--rate"),
        (&["switch-check", "127.0.0.1", "--rate", "1gbit", "--level", "3"], "two levels or more"),
    ] {
        let output = qjump(None, &[&["measure"], arguments].concat()).output()?;
        let (status, said) = failed(&output);
        assert!(status == 64 && said.contains(part), "{arguments:?}: {status}: {said}");
    }
    Ok(())
}

#[test]
fn a_ladder_finds_where_the_limiter_holds_the_sender() -> Result<()> {
    let link = Link::new()?;
    succeeded(&link.qjump(&[&["load", "--interface", &link.device], &SLOW[..]].concat())?)?;
    let server = Server::new(Some(&link.far))?;
    let target = server.at(FAR.0);
    let document = measured(Some(&link.near), &["ladder", &target, "--level", "7", "--rates", "250,500,8000"])?;
    let runs = document["runs"].as_array().context("no runs")?;
    let names: Vec<&str> = runs.iter().filter_map(|run| run["name"].as_str()).collect();
    assert_eq!(names, ["250/s", "500/s", "8000/s"]);
    assert_eq!(document["setting"]["knee"], "8000/s");
    Ok(())
}

/// Two hosts on a switch of 100 Mbit/s.
fn rack() -> Result<Rack> {
    let rack = Rack::up(RackSpec::star(2, Rate::from_bps(100_000_000), 64 * 1024))?;
    rack.set_queueing(Queueing::Fifo)?;
    Ok(rack)
}

#[test]
fn a_switch_check_tells_which_levels_share_a_queue() -> Result<()> {
    let rack = rack()?;
    let server = Server::new(Some(rack.host(1)))?;
    let target = server.at(&rack.address(1));
    let check = || {
        let arguments = ["measure", "switch-check", &target, "--rate", "130mbit", "--level", "0,4,7", "--step", "1s"];
        qjump(Some(rack.host(0)), &[&arguments[..], &["--quiet", "--json", "-"]].concat()).output()
    };
    let output = check()?;
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(document["setting"]["queues"], json!(["0+4+7"]));
    rack.set_queueing(Queueing::Strict)?;
    let document: Value = serde_json::from_str(&succeeded(&check()?)?)?;
    assert_eq!(document["setting"]["queues"], json!(["0", "4", "7"]), "{}", document["notes"]);
    Ok(())
}

/// What closed loops and stamps of the actual send leave out: a sender that its own limiter holds up.
#[test]
fn a_response_counts_from_when_it_was_to_be_sent() -> Result<()> {
    let link = Link::new()?;
    let paced = [&["load", "--interface", &link.device], &SLOW[..10], &["--queue", "htb"]].concat();
    succeeded(&link.qjump(&paced)?)?;
    let server = Server::new(Some(&link.far))?;
    let target = server.at(FAR.0);
    // One each 0.54 ms leaves, of one each 0.33 ms: the queue grows, until the socket is full.
    let arguments = ["probe", &target, "--level", "7", "--rate", "3000", "--timeout", "5s"];
    let document = measured(Some(&link.near), &arguments)?;
    let stream = &document["runs"][0]["streams"][0];
    let percentile = |distribution: &Value| {
        distribution["percentiles"].as_array().and_then(|all| all.iter().find(|p| p["percent"] == 90.0)?["ns"].as_u64())
    };
    let (response, service) = (percentile(&stream["response"]), percentile(&stream["service"]));
    let held = response.zip(service).map(|(response, service)| response - service).context("too few samples")?;
    assert!(held > 50_000_000, "response {response:?}, service {service:?}: {}", stream["counts"]);
    // That is not the sender's own fault.
    assert_eq!(stream["generator"]["limited"], false, "{}", stream["generator"]);
    let closed = measured(Some(&link.near), &["pingpong", &target, "--level", "7"])?;
    let closed = percentile(&closed["runs"][0]["streams"][0]["response"]).context("too few samples")?;
    assert!(closed * 20 < held, "closed loop {closed}, held up {held}");
    Ok(())
}
