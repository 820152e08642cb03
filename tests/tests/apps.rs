//! The experiments with whole applications, in their quick forms: programs that run as they are, and the direction of what
//! they show. Figures depend on the machine.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use qjump::{
    measure::result::{Document, Run, Stream},
    testbed::remove_stale,
};
use qjump_tests::link::{binary, failed};

/// A folder of this process, removed with this value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("qjump-apps-{}-{name}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start(name: &str, folder: &Folder) -> Result<Output> {
    remove_stale();
    let mut command = Command::new(binary());
    command.args(["testbed", "run", name, "--quick", "--output"]).arg(&folder.0);
    Ok(command.output()?)
}

/// Runs an experiment to its end. Whether its claims hold is for a quiet machine.
fn run(name: &str) -> Result<Document> {
    let folder = Folder::new(name);
    let output = start(name, &folder)?;
    println!("{}", String::from_utf8_lossy(&output.stdout));
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(matches!(output.status.code(), Some(0 | 2)), "{name}: {}: {complaint}", output.status);
    let file = folder.0.join(format!("{name}.json"));
    Ok(serde_json::from_slice(&std::fs::read(file)?)?)
}

fn case<'a>(document: &'a Document, name: &str) -> Result<&'a Run> {
    document.runs.iter().find(|run| run.name == name).with_context(|| format!("there is no case {name}"))
}

fn stream<'a>(document: &'a Document, case_name: &str, name: &str) -> Result<&'a Stream> {
    let streams = &case(document, case_name)?.streams;
    streams.iter().find(|stream| stream.name == name).with_context(|| format!("{case_name} has no stream {name}"))
}

/// The median, ns.
fn median(stream: &Stream) -> Result<f64> {
    let found = stream.response.percentiles.iter().find(|one| one.percent == 50.0);
    Ok(found.with_context(|| format!("too few samples of {}", stream.name))?.ns as f64)
}

fn figure(document: &Document, case_name: &str, name: &str) -> Result<f64> {
    let figures = &case(document, case_name)?.figures;
    let found = figures.iter().find(|figure| figure.name == name);
    Ok(found.with_context(|| format!("{case_name} has no figure {name}"))?.value)
}

#[test]
fn barriers_beside_bulk_are_near_those_of_an_idle_network() -> Result<()> {
    let document = run("barrier")?;
    let [alone, contended, qjump] =
        ["alone", "contended", "qjump"].map(|case| stream(&document, case, "barrier").and_then(median));
    let (alone, contended, qjump) = (alone?, contended?, qjump?);
    assert!(contended > 3.0 * qjump && contended > 3.0 * alone, "{alone} {contended} {qjump}");
    // Each barrier was seen, but those of the warm-up.
    assert_eq!(stream(&document, "qjump", "barrier")?.response.samples, 1_900);
    Ok(())
}

#[test]
fn a_barrier_that_is_not_there_is_said() -> Result<()> {
    let folder = Folder::new("no-barrier");
    let mut command = Command::new(binary());
    command.args(["testbed", "run", "barrier", "--quick", "--output"]).arg(&folder.0);
    let (status, error) = failed(&command.env("QJUMP_BARRIER", "/qjump/no/such/barrier").output()?);
    assert_eq!(status, 1);
    assert!(error.contains("QJUMP_BARRIER is /qjump/no/such/barrier"), "{error}");
    Ok(())
}

#[test]
fn clocks_beside_bulk_agree_as_on_an_idle_network() -> Result<()> {
    let document = run("ptp")?;
    let [alone, contended, qjump] =
        ["alone", "contended", "qjump"].map(|case| stream(&document, case, "clock offset").and_then(median));
    let (alone, contended, qjump) = (alone?, contended?, qjump?);
    assert!(contended > 5.0 * qjump && contended > 5.0 * alone, "{alone} {contended} {qjump}");
    for case in ["alone", "contended", "qjump"] {
        assert!(stream(&document, case, "memcached")?.response.samples > 500);
        assert_eq!(figure(&document, case, "misses")?, 0.0);
    }
    Ok(())
}

#[test]
fn memcached_beside_bulk_is_near_what_it_is_on_an_idle_network() -> Result<()> {
    let document = run("memcached")?;
    let p50 = |case: &str| stream(&document, case, "memcached").and_then(median);
    let (alone, contended, qjump) = (p50("alone")?, p50("contended")?, p50("qjump")?);
    assert!(contended > 5.0 * qjump && contended > 5.0 * alone, "{alone} {contended} {qjump}");
    for case in ["alone", "contended", "qjump"] {
        let counts = stream(&document, case, "memcached")?.counts.context("counts")?;
        assert!(counts.sent > 1_000 && counts.corrupted == 0, "{counts:?}");
        assert_eq!(figure(&document, case, "misses")?, 0.0);
    }
    // And bulk pays for what memcached says, no more.
    let into = "into h1, h2";
    assert!(figure(&document, "qjump", into)? > 0.8 * figure(&document, "contended", into)?);
    Ok(())
}

#[test]
fn memcached_gets_the_rate_of_its_level_and_waits_where_that_is_too_little() -> Result<()> {
    let document = run("rate-sweep")?;
    let answered = |mbit: u32| figure(&document, &format!("{mbit} Mbit/s"), "requests answered");
    // Twice the rate, twice the requests; and then what is offered.
    assert!((1.5..2.5).contains(&(answered(20)? / answered(10)?)), "{} {}", answered(10)?, answered(20)?);
    assert!(answered(60)? > 1.1 * answered(20)?, "{} {}", answered(20)?, answered(60)?);
    let p50 = |case: &str| stream(&document, case, "memcached").and_then(median);
    assert!(p50("20 Mbit/s")? > 5.0 * p50("60 Mbit/s")?);
    assert!(p50("contended")? > p50("60 Mbit/s")?);
    assert_eq!(document.curves.len(), 3);
    Ok(())
}

#[test]
fn bursts_do_not_slow_commits_at_level_7() -> Result<()> {
    let document = run("two-phase-commit")?;
    let share = |way: &str| -> Result<f64> {
        let commits = |buffers: u32| figure(&document, &format!("{way}, {buffers} buffers"), "commits");
        Ok(commits(10)? / commits(0)?)
    };
    let (qjump, retries, tcp) = (share("qjump")?, share("udp with retries")?, share("tcp")?);
    assert!(qjump > 0.7 && retries < 0.5 && tcp < 0.5, "{qjump} {retries} {tcp}");
    // Nothing is lost: what fails does so because this machine was away for longer than a vote may take.
    let lost = figure(&document, "qjump, 10 buffers", "transactions that failed")?;
    assert!(lost < 0.02 * stream(&document, "qjump, 10 buffers", "transaction")?.response.samples as f64, "{lost}");
    Ok(())
}
