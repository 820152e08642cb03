//! A load, a replacement, an unload, a tag or an untag that is killed at any step: what comes next puts everything right,
//! and nothing is left of it afterwards.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};
use qjump::{dataplane::Pins, tag::cgroup::Hierarchy};
use qjump_tests::{
    cgroups::{TestCgroup, sleeper_in},
    interrupt::{End, kill_before_change},
    link::{Link, binary, succeeded},
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
            "{}{}programs {programs}, pins {}, {}",
            self.link.tc_state()?,
            succeeded(&ip.output()?)?,
            self.link.pins().exist(),
            kept()?
        ))
    }

    /// Puts things right, by an unload alone or by a load and an unload.
    fn recover(&self, by_load: bool, what: &str) -> Result<()> {
        if by_load {
            let output = self.load(HTB).output()?;
            ensure!(output.status.success(), "{what}: load: {}", String::from_utf8_lossy(&output.stderr));
            let status = self.link.status()?;
            let (attached, queue) = (&status["attached"], &status["queue_problems"]);
            ensure!(attached == true && queue.as_array().is_some_and(Vec::is_empty), "{what}: {status:#}");
        }
        taken_back(self.unload(), (!by_load).then_some("is not loaded"), what)
    }

    fn is_as_before(&self, what: &str) -> Result<()> {
        becomes(&self.before, || self.state(), what)
    }
}

/// Takes back what a command may have made. One that was killed at its last step, or at its first, has left nothing: then this
/// may fail by saying `nothing`.
fn taken_back(mut command: Command, nothing: Option<&str>, what: &str) -> Result<()> {
    let output = command.output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let excused = nothing.is_some_and(|nothing| error.contains(nothing));
    ensure!(output.status.success() || excused, "{what}: {command:?}: {error}");
    Ok(())
}

fn entries(folder: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// What qjump may keep on a host beside what it does to an interface: programs in the kernel, cgroups, mounts.
fn kept() -> Result<String> {
    let is_own = |name: &str| name.starts_with("qj_");
    let programs = loaded_programs().filter_map(|program| program.ok()?.name_as_str().map(is_own)).filter(|own| *own);
    // Namespaces that have names are mounts, too: those of the tests. The file system of pins is mounted where nobody
    // has done it yet, and stays: others may use it by then.
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let is_compared = |line: &&str| !line.starts_with("nsfs ") && !line.contains(" /sys/fs/bpf ");
    let mounts: Vec<&str> = mounts.lines().filter(is_compared).collect();
    let cgroups = entries(Hierarchy::find()?.mount());
    Ok(format!("{} programs of ours, cgroups {cgroups:?}, mounts {mounts:#?}", programs.count()))
}

/// Waits until the host is again as it was, with nothing pinned: the kernel takes its time to free programs.
fn becomes(before: &str, state: impl Fn() -> Result<String>, what: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let after = state()?;
        if after == before {
            return nothing_is_pinned(what);
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "{what}: was\n{before}\nis\n{after}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn nothing_is_pinned(what: &str) -> Result<()> {
    if Pins::interfaces()?.is_empty() {
        for left in ["/sys/fs/bpf/qjump", "/sys/fs/bpf/qjump-tags"] {
            ensure!(!Path::new(left).exists(), "{what}: {left} is left: {:?}", entries(left));
        }
    }
    Ok(())
}

/// A process that is tagged, and so gets a cgroup of its own below the one that it is in.
struct Tagged {
    cgroup: TestCgroup,
    process: Child,
    before: String,
}

impl Tagged {
    fn new() -> Result<Self> {
        let cgroup = TestCgroup::new()?;
        let process = sleeper_in(&cgroup.directory)?;
        let mut tagged = Self { cgroup, process, before: String::new() };
        tagged.before = tagged.state()?;
        Ok(tagged)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(binary());
        command.args([verb, "--pid", &self.process.id().to_string()]);
        command
    }

    fn tag(&self, level: u64) -> Command {
        let mut command = self.command("tag");
        command.args(["--level", &level.to_string()]);
        command
    }

    fn untag(&self) -> Command {
        self.command("untag")
    }

    /// The cgroup that the process is in.
    fn place(&self) -> Result<String> {
        let lines = fs::read_to_string(format!("/proc/{}/cgroup", self.process.id()))?;
        Ok(lines.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned())
    }

    fn state(&self) -> Result<String> {
        let below = entries(&self.cgroup.directory).into_iter().filter(|name| !name.contains('.'));
        Ok(format!("in {}, below that {:?}, {}", self.place()?, below.collect::<Vec<_>>(), kept()?))
    }

    /// Puts things right, by an untag alone or by a tag and an untag.
    fn recover(&self, by_tag: bool, what: &str) -> Result<()> {
        if by_tag {
            succeeded(&self.tag(6).output()?)?;
            let tags = succeeded(&Command::new(binary()).args(["tags", "--json"]).output()?)?;
            let tags: serde_json::Value = serde_json::from_str(&tags)?;
            let place = self.place()?;
            let own = tags["tags"].as_array().into_iter().flatten().filter(|tag| tag["cgroup"] == place.as_str());
            let levels: Vec<_> = own.map(|tag| tag["level"].clone()).collect();
            ensure!(levels == [6], "{what}: in {place}: {tags:#}");
        }
        taken_back(self.untag(), (!by_tag).then_some("grant"), what)
    }

    fn is_as_before(&self, what: &str) -> Result<()> {
        becomes(&self.before, || self.state(), what)
    }
}

impl Drop for Tagged {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Brings the host into a state, and then runs a command that is killed before each of its changes in turn.
fn at_each_change(prepare: Option<&[&str]>, command: impl Fn(&Host) -> Command, what: &str) -> Result<()> {
    let host = Host::new()?;
    let prepare = || prepare.map(|form| succeeded(&host.load(form).output()?)).transpose().map(drop);
    let recover = |by_load, what: &str| {
        host.recover(by_load, what)?;
        host.is_as_before(what)
    };
    killed_at_each(prepare, || command(&host), recover, what)
}

fn killed_at_each(
    prepare: impl Fn() -> Result<()>,
    command: impl Fn() -> Command,
    recover: impl Fn(bool, &str) -> Result<()>,
    what: &str,
) -> Result<()> {
    for nth in 0.. {
        prepare()?;
        let end = kill_before_change(&mut command(), nth)?;
        recover(nth % 2 == 0, &format!("{what}, killed before change {nth}"))?;
        match end {
            End::Killed => {}
            End::Done(well) => {
                println!("{what}: killed at each of {nth} steps");
                assert!(well && nth > 5, "{what} ended by itself, having made {nth} changes");
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn a_name_makes_no_cgroup_qjumps() -> Result<()> {
    let cgroup = TestCgroup::new()?;
    let directory = cgroup.below("qjump-1")?;
    let mut process = sleeper_in(&directory)?;
    let procs = || Ok::<_, std::io::Error>(fs::read_to_string(directory.join("cgroup.procs"))?.trim().to_owned());
    let qjump = |words: &[&str]| Command::new(binary()).args(words).arg("--cgroup").arg(&directory).output();
    let result = (|| {
        for words in [&["tag", "--level", "5"][..], &["untag"]] {
            succeeded(&qjump(words)?)?;
            ensure!(procs()? == process.id().to_string(), "after {words:?}: '{}'", procs()?);
        }
        Ok(())
    })();
    process.kill()?;
    process.wait()?;
    result
}

#[test]
fn a_tag_that_is_killed_at_any_step() -> Result<()> {
    let tagged = Tagged::new()?;
    let tag = |level: u64| succeeded(&tagged.tag(level).output()?).map(drop);
    let recover = |by_tag, what: &str| {
        tagged.recover(by_tag, what)?;
        tagged.is_as_before(what)
    };
    killed_at_each(|| Ok(()), || tagged.tag(5), recover, "tag")?;
    killed_at_each(|| tag(3), || tagged.tag(5), recover, "another level")?;
    killed_at_each(|| tag(5), || tagged.untag(), recover, "untag")
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
    // In this order: its cgroup is there from the beginning.
    let tagged = Tagged::new()?;
    let host = Host::new()?;
    let rounds: u64 = std::env::var("QJUMP_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(20);
    // What is left of the one belongs to what the other finds.
    let recover = |by_load, by_tag, what: &str| {
        host.recover(by_load, what)?;
        tagged.recover(by_tag, what)?;
        host.is_as_before(what)?;
        tagged.is_as_before(what)
    };
    let (mut killed, mut begun) = (0, 0);
    while killed < rounds {
        begun += 1;
        let forms = [HTB, OTHER_RATES, SHAPED, KEEP];
        let mut command = match below(7) {
            0 => tagged.untag(),
            1 | 2 => tagged.tag(below(8)),
            3 => host.unload(),
            _ => host.load(forms[below(4) as usize]),
        };
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_micros(below(200_000)));
        killed += u64::from(child.try_wait()?.is_none());
        child.kill()?;
        child.wait()?;
        // Now and then several are killed one after the other.
        if below(3) > 0 {
            recover(below(2) == 0, below(2) == 0, &format!("round {begun}"))?;
        }
    }
    recover(true, true, "at the end")?;
    println!("{killed} killed while they ran, of {begun}");
    Ok(())
}
