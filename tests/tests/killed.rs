//! A load, a replacement or an unload that is killed at any step: what comes next puts everything right.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use qjump::dataplane::Pins;
use qjump_tests::{
    interrupt::{End, kill_before_change},
    link::{Link, succeeded},
};

/// A plan with a level that a queue paces, so that GSO is capped and the queue is set up.
const PLAN: [&str; 12] = [
    "--hosts",
    "4",
    "--link-rate",
    "1gbit",
    "--max-packet",
    "256",
    "--epsilon",
    "40us",
    "--level",
    "7:1",
    "--level",
    "5:50mbit,burst=30000",
];

/// What `load` is given: a first plan, the same with a change in place, with another form of queue, and without any.
const HTB: &[&str] = &["--queue", "htb"];
const OTHER_RATES: &[&str] = &["--queue", "htb", "--tolerance", "100us"];
const SHAPED: &[&str] = &["--queue", "htb", "--host-rate", "500mbit"];
const KEEP: &[&str] = &["--queue", "keep"];
const CLSACT: &[&str] = &["--queue", "htb", "--hook", "clsact"];

struct Host {
    link: Link,
    before: String,
}

impl Host {
    /// An interface with a queue of somebody else's, and GSO as a device has it.
    fn new() -> Result<Self> {
        let link = Link::new()?;
        link.near.ip(&format!("link set {} gso_max_segs 65535", link.device))?;
        link.near.batch("tc", &format!("qdisc replace dev {} root handle 7: pfifo limit 321\n", link.device))?;
        let mut host = Self { link, before: String::new() };
        host.before = host.state()?;
        Ok(host)
    }

    fn load(&self, form: &[&str]) -> Command {
        self.link.command(&[&["load", "--interface", &self.link.device][..], &PLAN, form].concat())
    }

    fn unload(&self) -> Command {
        self.link.command(&["unload", "--interface", &self.link.device])
    }

    /// What a load changes on the interface, and what it leaves in the file system.
    fn state(&self) -> Result<String> {
        let mut ip = Command::new("ip");
        ip.args(["-n", self.link.near.name(), "-d", "link", "show", "dev", &self.link.device]);
        let programs = self.link.near.enter(|| {
            let (_, programs) = SchedClassifier::query_tcx(&self.link.device, TcAttachType::Egress)?;
            Ok(programs.len())
        })?;
        Ok(format!(
            "{}{}programs {programs}, pins {}",
            self.link.tc_state()?,
            succeeded(&ip.output()?)?,
            self.link.pins().exist()
        ))
    }

    /// Puts things right, by an unload alone or by a load and an unload, and compares.
    fn recover(&self, by_load: bool, what: &str) -> Result<()> {
        if by_load {
            let output = self.load(HTB).output()?;
            ensure!(output.status.success(), "{what}: load: {}", String::from_utf8_lossy(&output.stderr));
            let status = self.link.status()?;
            let (attached, queue) = (&status["attached"], &status["queue_problems"]);
            ensure!(attached == true && queue.as_array().is_some_and(Vec::is_empty), "{what}: {status:#}");
        }
        let output = self.unload().output()?;
        // An unload that was killed at its last step, or a load at its first, has left nothing to unload.
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() || !by_load && error.contains("is not loaded"), "{what}: unload: {error}");
        let after = self.state()?;
        ensure!(after == self.before, "{what}: was\n{}\nis\n{after}", self.before);
        if Pins::interfaces()?.is_empty() {
            for left in ["/sys/fs/bpf/qjump", "/sys/fs/bpf/qjump-tags"] {
                ensure!(!Path::new(left).exists(), "{what}: {left} is left: {:?}", entries(left));
            }
        }
        Ok(())
    }
}

fn entries(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Brings the host into a state, and then runs a command that is killed before each of its changes in turn.
fn at_each_change(prepare: Option<&[&str]>, command: impl Fn(&Host) -> Command, what: &str) -> Result<()> {
    let host = Host::new()?;
    for nth in 0.. {
        if let Some(form) = prepare {
            succeeded(&host.load(form).output()?)?;
        }
        let end = kill_before_change(&mut command(&host), nth)?;
        host.recover(nth % 2 == 0, &format!("{what}, killed before change {nth}"))?;
        match end {
            End::Killed => {}
            End::Done(well) => {
                println!("{what}: killed at each of {nth} steps");
                assert!(well && nth > 10, "{what} ended by itself, having made {nth} changes");
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn a_load_that_is_killed_at_any_step() -> Result<()> {
    at_each_change(None, |host| host.load(HTB), "load")
}

#[test]
fn a_load_on_clsact_that_is_killed_at_any_step() -> Result<()> {
    at_each_change(None, |host| host.load(CLSACT), "load on clsact")
}

#[test]
fn a_replacement_that_is_killed_at_any_step() -> Result<()> {
    at_each_change(Some(HTB), |host| host.load(OTHER_RATES), "replacement")
}

#[test]
fn a_change_of_queue_that_is_killed_at_any_step() -> Result<()> {
    at_each_change(Some(HTB), |host| host.load(SHAPED), "another form of queue")?;
    at_each_change(Some(HTB), |host| host.load(KEEP), "the queue given up")?;
    at_each_change(Some(KEEP), |host| host.load(HTB), "a queue for the first time")
}

#[test]
fn an_unload_that_is_killed_at_any_step() -> Result<()> {
    at_each_change(Some(HTB), Host::unload, "unload")?;
    at_each_change(Some(CLSACT), Host::unload, "unload from clsact")
}

#[test]
fn whatever_is_killed_at_any_moment() -> Result<()> {
    // A linear congruential generator will do (Knuth, MMIX).
    let mut random = 0x71_6a75_6d70_u64;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let host = Host::new()?;
    let rounds: u64 = std::env::var("QJUMP_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let mut killed = 0;
    for round in 0..rounds {
        let forms = [HTB, OTHER_RATES, SHAPED, KEEP];
        let mut command = if below(4) == 0 { host.unload() } else { host.load(forms[below(4) as usize]) };
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_micros(below(400_000)));
        killed += u32::from(child.try_wait()?.is_none());
        child.kill()?;
        child.wait()?;
        // Now and then several are killed one after the other.
        if below(3) > 0 {
            host.recover(below(2) == 0, &format!("round {round}"))?;
        }
    }
    host.recover(true, "at the end")?;
    println!("{killed} of {rounds} killed while they ran");
    Ok(())
}
