//! The demonstration, in a short form: what it shows, what it writes, and that it cleans up. Directions
//! are asserted, not figures: those depend on the machine.

use std::{
    collections::HashSet,
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::dataplane::Pins;
use qjump_tests::link::{binary, succeeded};
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("qjump-demo-{}-{name}", std::process::id()))
}

fn demo(folder: &PathBuf, probes: u32) -> Command {
    let mut command = Command::new(binary());
    command.args(["testbed", "demo", "--probes", &probes.to_string(), "--output"]).arg(folder);
    command
}

/// What is there before a test, less what an earlier run left that was killed.
fn clean() -> Result<HashSet<String>> {
    qjump::testbed::remove_stale();
    traces()
}

/// Namespaces, pins and iperf3 processes on this machine.
fn traces() -> Result<HashSet<String>> {
    let mut traces: HashSet<String> = Pins::interfaces()?.into_iter().map(|name| format!("pins of {name}")).collect();
    for entry in fs::read_dir("/run/netns").into_iter().flatten() {
        traces.insert(format!("namespace {}", entry?.file_name().display()));
    }
    for entry in fs::read_dir("/proc")?.flatten() {
        // The dead that nobody has buried yet have a name, but no command line.
        if fs::read(entry.path().join("cmdline")).is_ok_and(|line| line.starts_with(b"iperf3\0")) {
            traces.insert(format!("iperf3 {}", entry.file_name().display()));
        }
    }
    Ok(traces)
}

#[test]
fn shows_what_it_promises_and_leaves_nothing() -> Result<()> {
    let before = clean()?;
    let folder = folder("short");
    let output = demo(&folder, 2_000).output()?;
    let text = String::from_utf8(output.stdout)?;
    println!("{text}");
    assert_eq!(traces()?, before);
    for part in ["bound promised", "verdict", "too few samples"] {
        assert!(text.contains(part), "{part}");
    }

    let summary: Value = serde_json::from_str(&fs::read_to_string(folder.join("summary.json"))?)?;
    assert_eq!(summary["schema_version"], 1);
    assert_eq!(summary["latency"], "one-way");
    let bound = summary["bound_ns"].as_u64().context("bound_ns")?;
    let cases = summary["cases"].as_array().context("cases")?;
    let names: Vec<&str> = cases.iter().filter_map(|case| case["name"].as_str()).collect();
    assert_eq!(names, ["alone", "contended", "qjump", "rogue-unlimited", "rogue-limited"]);
    for case in cases {
        let number = |key: &str| case[key].as_u64().with_context(|| format!("{key} of {}", case["name"]));
        assert_eq!(number("samples")? + number("lost")?, 2_000);
        ensure!(number("p50_ns")? <= number("p99_ns")? && number("p99_ns")? <= number("max_ns")?);
        ensure!(number("violations")? == 0 || number("max_ns")? as f64 > bound as f64 * 0.99);
        // Two thousand samples have two beyond p99.9: too few to show.
        assert_eq!(case["p999_ns"], Value::Null);
        assert_eq!(case["bulk_mbps"].is_number(), case["name"] != "alone");
        assert_eq!(case["verdict"].is_string(), case["bound_promised"] == true);
        assert_eq!(case["verdict"] == "held", case["bound_promised"] == true && case["violations"] == 0);
    }
    // A bound that was broken is said, and by the exit status, too.
    let broken: Vec<&Value> = cases.iter().filter(|case| case["verdict"] == "broken").collect();
    assert_eq!(output.status.code(), Some(if broken.is_empty() { 0 } else { 2 }));
    for case in broken {
        let name = case["name"].as_str().context("a name")?;
        assert!(text.contains(&format!("{name}: the promised bound was broken")), "{text}");
    }
    let value = |name: &str, key: &str| {
        let case = cases.iter().find(|case| case["name"] == name).expect("the names above");
        case[key].as_f64().expect("a number")
    };
    // A probe behind a full FIFO waits longer than one that jumps it, and longer than the bound.
    assert!(value("contended", "p50_ns") > 5.0 * value("qjump", "p50_ns"));
    assert!(value("contended", "p50_ns") > bound as f64);
    assert!(value("qjump", "p50_ns") < bound as f64);
    // Priorities alone do not stop a rogue; limits do.
    assert!(value("rogue-unlimited", "p50_ns") > 5.0 * value("rogue-limited", "p50_ns"));
    assert!(value("rogue-limited", "p50_ns") < bound as f64);
    // And bulk pays next to nothing.
    assert!(value("qjump", "bulk_mbps") > 0.8 * value("contended", "bulk_mbps"));

    let svg = fs::read_to_string(folder.join("latency.svg"))?;
    for part in ["contended", "rogue-limited", "bound", "one-way latency"] {
        assert!(svg.contains(part), "{part}");
    }
    fs::remove_dir_all(folder)?;
    Ok(())
}

/// Starts a demonstration and waits until its rack carries bulk traffic.
fn started(folder: &PathBuf, before: &HashSet<String>) -> Result<Child> {
    let child =
        demo(folder, 100_000).args(["--case", "rogue-limited"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while traces()?.difference(before).filter(|trace| trace.starts_with("iperf3")).count() < 4 {
        ensure!(Instant::now() < deadline, "no iperf3 within 30 s");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(child)
}

#[test]
fn interrupted_or_terminated_it_takes_its_rack_down() -> Result<()> {
    let before = clean()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let folder = folder("signal");
        let mut child = started(&folder, &before)?;
        kill(Pid::from_raw(child.id() as i32), signal)?;
        let status = child.wait()?;
        assert_eq!(status.code(), Some(1), "{signal}");
        assert_eq!(traces()?, before, "{signal}");
        assert_eq!(fs::read_dir(&folder)?.count(), 0);
        fs::remove_dir_all(folder)?;
    }
    Ok(())
}

#[test]
fn what_a_killed_one_leaves_the_next_one_removes() -> Result<()> {
    let before = clean()?;
    let first = folder("killed");
    let mut child = started(&first, &before)?;
    child.kill()?;
    child.wait()?;
    std::thread::sleep(Duration::from_millis(300));
    let left = traces()?;
    assert!(left.len() > before.len() && !left.iter().any(|trace| trace.starts_with("iperf3")), "{left:?}");
    succeeded(&demo(&first, 100).args(["--case", "alone"]).output()?)?;
    assert_eq!(traces()?, before);
    // A run of some cases leaves the results of a run of all alone.
    assert!(first.join("summary-alone.json").exists() && first.join("latency-alone.svg").exists());
    assert!(!first.join("summary.json").exists());
    fs::remove_dir_all(first)?;
    Ok(())
}

#[test]
fn mistakes_are_said_before_anything_is_built() -> Result<()> {
    let before = clean()?;
    for (arguments, status, part) in [
        (["--case", "lonely"], 64, "[possible values: alone, contended, qjump"),
        (["--epsilon", "9ms"], 64, "lower --epsilon"),
        (["--epsilon", "99999s"], 64, "too long"),
        (["--case", "alone"], 1, "cannot create /proc/nowhere"),
    ] {
        let output = demo(&PathBuf::from("/proc/nowhere"), 100).args(arguments).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
        assert!(error.contains(part), "{arguments:?}: {error}");
    }
    let copy = std::env::temp_dir().join(format!("qjump-demo-bin-{}", std::process::id()));
    fs::copy(binary(), &copy)?;
    let mut unprivileged = Command::new("setpriv");
    unprivileged.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&copy).args(["testbed", "demo"]);
    let output = unprivileged.current_dir("/").output()?;
    fs::remove_file(copy)?;
    let error = String::from_utf8(output.stderr)?;
    assert!(output.status.code() == Some(1) && output.stdout.is_empty() && error.contains("as root"), "{error}");
    assert_eq!(traces()?, before);
    Ok(())
}
