//! The experiments, each in its quick form. Directions are asserted, not figures: those depend on the machine.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::{
    dataplane::Pins,
    measure::result::{Document, Run, Stream},
    tag::cgroup::Hierarchy,
};
use qjump_tests::link::binary;

/// Results of this process's tests; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("qjump-experiments-{}-{name}", std::process::id())))
    }

    fn document(&self, experiment: &str) -> Result<Document> {
        Ok(serde_json::from_str(&fs::read_to_string(self.0.join(format!("{experiment}.json")))?)?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn command(experiment: &str, output: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(["testbed", "run", experiment, "--quick", "--output"]).arg(output).args(more);
    command
}

/// What the experiment of this process has made and not removed: namespaces, pins, cgroups.
fn traces(pid: u32) -> Result<BTreeSet<String>> {
    let names = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let namespaces =
        names(Path::new("/run/netns")).into_iter().filter(|name| name.starts_with(&format!("qjump-{pid}-")));
    let pins = Pins::interfaces()?.into_iter().filter(|name| name.starts_with(&format!("qj{pid:x}h")));
    // What `qjump run` makes for a program.
    let hierarchy = Hierarchy::find()?;
    let own = hierarchy.of_process(None)?.directory;
    let left = |name: &String| {
        let program = name.strip_prefix("qjump-run-");
        program.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    let cgroups = names(&own).into_iter().filter(left);
    Ok(namespaces.chain(pins).chain(cgroups).collect())
}

/// Runs an experiment's quick form and reads what it wrote.
fn quick(experiment: &str) -> Result<Document> {
    let folder = Folder::new(experiment);
    let child = command(experiment, &folder.0, &[]).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let pid = child.id();
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    println!("{text}");
    assert_eq!(traces(pid)?, BTreeSet::new());
    let document = folder.document(experiment)?;
    assert_eq!((document.name.as_str(), document.emulated), (experiment, true));
    assert!(document.setting["rack"]["hosts"].is_u64() && document.setting["quick"] == true);
    // What does not hold is said by the exit status, too.
    let broken = document.claims.iter().any(|claim| claim.holds == Some(false));
    assert_eq!(output.status.code(), Some(if broken { 2 } else { 0 }), "{text}");
    for run in &document.runs {
        assert!(text.contains(&run.name), "{}: {text}", run.name);
        for stream in &run.streams {
            // One way alone has none: they are those of the round trip.
            let Some(counts) = stream.counts else { continue };
            assert_eq!((counts.received, counts.lost), (stream.response.samples, counts.sent - counts.received));
        }
    }
    let page = fs::read_to_string(folder.0.join(format!("{experiment}.md")))?;
    assert!(page.contains("**The paper**") && page.contains("**Why they differ:**"), "{page}");
    Ok(document)
}

fn run<'a>(document: &'a Document, name: &str) -> Result<&'a Run> {
    document.runs.iter().find(|run| run.name == name).with_context(|| format!("no case {name}"))
}

fn stream<'a>(document: &'a Document, case: &str, name: &str) -> Result<&'a Stream> {
    run(document, case)?.streams.iter().find(|stream| stream.name == name).with_context(|| format!("{case}: no {name}"))
}

/// A percentile, ns.
fn percentile(document: &Document, case: &str, name: &str, percent: f64) -> Result<f64> {
    let percentiles = &stream(document, case, name)?.response.percentiles;
    let found = percentiles.iter().find(|one| one.percent == percent);
    found.map(|one| one.ns as f64).with_context(|| format!("{case}: {name} has no p{percent}"))
}

fn figure(document: &Document, case: &str, name: &str) -> Result<f64> {
    let figure = run(document, case)?.figures.iter().find(|figure| figure.name == name);
    figure.map(|figure| figure.value).with_context(|| format!("{case} has no {name}"))
}

fn disturbed(document: &Document) -> bool {
    document.notes.iter().any(|note| note.starts_with("Disturbed"))
}

#[test]
fn switch_queue_needs_both_priorities_and_limits() -> Result<()> {
    let document = quick("switch-queue")?;
    for what in ["udp level 7 up", "udp level 7", "ping"] {
        // In so short a time, ping has too few samples for a p99.
        let percent = if what == "ping" { 50.0 } else { 99.0 };
        let high = |case| percentile(&document, case, what, percent);
        assert!(high("contended")? > 3.0 * high("qjump")?, "{what}");
        let p50 = |case| percentile(&document, case, what, 50.0);
        assert!(p50("contended")? > 10.0 * p50("alone")?, "{what}");
        // Limits alone leave iperf3's queue where it is.
        assert!(p50("limiter")? > 0.5 * p50("contended")?, "{what}");
        assert!(p50("priority")? < 0.2 * p50("contended")?, "{what}");
    }
    // And bulk pays next to nothing.
    assert!(figure(&document, "qjump", "into h1")? > 0.8 * figure(&document, "contended", "into h1")?);
    Ok(())
}

#[test]
fn placement_decides_what_a_probe_waits_for() -> Result<()> {
    let document = quick("placement")?;
    let p50 = |case: &str| percentile(&document, case, "udp level 7 up", 50.0);
    for shared in ["source", "destination", "both"] {
        assert!(p50(shared)? > 3.0 * p50("switch")?, "{shared}");
        assert!(p50(shared)? > 3.0 * p50(&format!("{shared} qjump"))?, "{shared}");
    }
    Ok(())
}

#[test]
fn the_bound_is_true_up_to_a_factor_of_one_and_not_far_above() -> Result<()> {
    let document = quick("bound")?;
    for phases in ["aligned", "drifting"] {
        for factor in ["0.8", "1"] {
            let case = format!("{phases} f={factor}");
            // Those while a CPU of this machine was away are counted, and excused. On a machine that does something else
            // at the same time nothing is decided.
            if !disturbed(&document) {
                assert_eq!(figure(&document, &case, "over the bound, not excused")?, 0.0, "{case}");
            }
            assert_eq!(figure(&document, &case, "lost in the network")?, 0.0, "{case}");
            let counts = stream(&document, &case, "udp level 7")?.counts.context("counts")?;
            // Each sender offers twice what its limiter lets through.
            assert!(counts.limiter_dropped.context("counters")? >= counts.sent / 3, "{case}: {counts:?}");
            assert!(counts.received >= counts.sent / 3, "{case}: {counts:?}");
        }
        let over = stream(&document, &format!("{phases} f=3.5"), "udp level 7")?;
        assert!(over.violations.context("violations")? > over.response.samples / 2);
    }
    // All senders at once fill most of what the bound allows: it is not true for want of trying.
    let full = stream(&document, "aligned f=1", "udp level 7")?;
    assert!(full.response.max_ns.context("a maximum")? as f64 > 0.7 * full.bound_ns.context("a bound")? as f64);
    assert_eq!(document.curves.len(), 2);
    Ok(())
}

/// Starts an experiment and waits until it has finished its first case.
fn started(folder: &Folder) -> Result<Child> {
    let mut child = command("switch-queue", &folder.0, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while folder.document("switch-queue").map_or(0, |document| document.runs.len()) < 1 {
        ensure!(Instant::now() < deadline && child.try_wait()?.is_none(), "no case has ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    // The second one has its servers and clients now.
    std::thread::sleep(Duration::from_millis(1_500));
    Ok(child)
}

/// The programs that run in what the experiment of this process has made.
fn programs(pid: u32) -> Result<usize> {
    let mut inodes = BTreeSet::new();
    for name in traces(pid)?.iter().filter(|name| name.starts_with("qjump-")) {
        use std::os::unix::fs::MetadataExt;
        inodes.insert(fs::metadata(Path::new("/run/netns").join(name)).map_or(0, |file| file.ino()));
    }
    let inside = |entry: &fs::DirEntry| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(entry.path().join("ns/net")).is_ok_and(|file| inodes.contains(&file.ino()))
    };
    Ok(fs::read_dir("/proc")?.flatten().filter(inside).count())
}

#[test]
fn interrupted_it_keeps_what_was_measured_and_takes_its_rack_down() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let folder = Folder::new("interrupted");
        let mut child = started(&folder)?;
        assert!(programs(child.id())? >= 4);
        kill(Pid::from_raw(child.id() as i32), signal)?;
        assert_eq!(child.wait()?.code(), Some(1), "{signal}");
        assert_eq!(traces(child.id())?, BTreeSet::new(), "{signal}");
        let document = folder.document("switch-queue")?;
        assert_eq!(document.runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>(), ["alone"]);
        assert!(document.notes.iter().any(|note| note.contains("interrupted")), "{:?}", document.notes);
        assert!(document.claims.iter().all(|claim| claim.holds.is_none()));
    }
    Ok(())
}

#[test]
fn what_a_killed_one_leaves_the_next_rack_removes() -> Result<()> {
    let folder = Folder::new("killed");
    let mut child = started(&folder)?;
    child.kill()?;
    child.wait()?;
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(programs(child.id())?, 0);
    assert!(!traces(child.id())?.is_empty());
    qjump::testbed::remove_stale();
    assert_eq!(traces(child.id())?, BTreeSet::new());
    assert_eq!(folder.document("switch-queue")?.runs.len(), 1);
    Ok(())
}

#[test]
fn mistakes_are_said_before_anything_is_built() -> Result<()> {
    let folder = Folder::new("mistakes");
    fs::create_dir_all(&folder.0)?;
    let small = folder.0.join("small.toml");
    fs::write(&small, "hosts = 2\n[leaf]\nrate = \"100mbit\"\nbuffer = 65536\n")?;
    let fast = folder.0.join("slow.toml");
    fs::write(&fast, "hosts = 64\n[leaf]\nrate = \"100kbit\"\nbuffer = 65536\n")?;
    let [small, slow] = [small, fast].map(|path| path.display().to_string());
    let nowhere = PathBuf::from("/proc/nowhere");
    for (experiment, output, more, status, part) in [
        ("swich-queue", &folder.0, vec![], 64, "'switch-queue'"),
        ("switch-queue", &folder.0, vec!["--rack", "eigt"], 64, "did you mean 'eight'?"),
        ("switch-queue", &folder.0, vec!["--rack", small.as_str()], 64, "needs 8 hosts"),
        ("bound", &folder.0, vec!["--rack", slow.as_str()], 64, "the limiter counts from"),
        ("bound", &folder.0, vec!["--repeat", "0"], 64, "1..=100"),
        ("bound", &nowhere, vec![], 1, "cannot create /proc/nowhere"),
    ] {
        let output = command(experiment, output, &more).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{experiment} {more:?}: {error}");
        assert!(error.contains(part), "{experiment} {more:?}: {error}");
    }
    Ok(())
}
