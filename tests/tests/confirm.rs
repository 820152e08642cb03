//! A load that goes back by itself: what was before is in force again, whoever is killed, unless somebody confirms.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump_tests::link::{Link, PLAN, binary, failed, succeeded};
use serde_json::Value;

const NOTE: &str = "/run/qjump/confirm/note";

/// Another plan than [`PLAN`].
const OTHER: [&str; 10] =
    ["--hosts", "48", "--link-rate", "1gbit", "--max-packet", "512", "--epsilon", "9us", "--level", "6:1"];

fn arguments<'a>(link: &'a Link, plan: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [&["load", "--interface", &link.device], plan, more].concat()
}

/// A load that waits, once it waits.
struct Waiting {
    front: Child,
}

impl Waiting {
    fn new(mut command: Command) -> Result<Self> {
        let front = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut waiting = Self { front };
        until("nothing is loaded", || {
            if let Some(status) = waiting.front.try_wait()? {
                anyhow::bail!("it ended: {status}: {}", waiting.said()?);
            }
            // The number of the plan is noted when it is loaded.
            let note = fs::read_to_string(NOTE).unwrap_or_default();
            Ok(note.contains("\"loaded\":") && !note.contains("\"loaded\":null"))
        })?;
        Ok(waiting)
    }

    fn of(link: &Link, time: &str, more: &[&str]) -> Result<Self> {
        let mut all = arguments(link, &OTHER, &["--confirm", time]);
        all.extend(more);
        Self::new(link.command(&all))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.front.id() as i32)
    }

    /// The supervisor: its only child.
    fn supervisor(&self) -> Result<Pid> {
        let id = self.front.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        Ok(Pid::from_raw(children.trim().parse().with_context(|| format!("children: '{children}'"))?))
    }

    fn said(&mut self) -> Result<String> {
        let mut text = String::new();
        self.front.stdout.take().context("no stdout")?.read_to_string(&mut text)?;
        self.front.stderr.take().context("no stderr")?.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Its exit status and all that it said.
    fn end(mut self) -> Result<(Option<i32>, String)> {
        let text = self.said()?;
        Ok((self.front.wait()?.code(), text))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.front.kill();
        let _ = self.front.wait();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds()? {
        ensure!(Instant::now() < deadline, "{what}, after 20 s");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn nothing_waits() -> Result<()> {
    until("the note is still there", || Ok(!Path::new(NOTE).exists()))
}

/// The state of the interface, without what every change of plan changes.
fn state(link: &Link) -> Result<(Value, String)> {
    let mut status = link.status()?;
    if let Some(fields) = status.as_object_mut() {
        for changing in ["generation", "loaded_at_unix_ns", "program_id"] {
            fields.remove(changing);
        }
        // Bulk and idle time go on.
        for level in fields.get_mut("levels").and_then(Value::as_array_mut).into_iter().flatten() {
            level["last_activity_ns_ago"] = Value::Null;
        }
    }
    Ok((status, link.tc_state()?))
}

fn gso(link: &Link) -> Result<String> {
    let output = link.near.command("ip").args(["-d", "link", "show", "dev", &link.device]).output()?;
    let text = succeeded(&output)?;
    Ok(text.split_whitespace().skip_while(|word| *word != "gso_max_segs").nth(1).unwrap_or_default().to_owned())
}

#[test]
fn without_a_word_the_interface_is_as_before() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let (status, text) = Waiting::of(&link, "2s", &["--queue", "htb"])?.end()?;
    assert_eq!(status, Some(1), "{text}");
    for part in ["loaded", "Taken back in 2 s", "not confirmed within 2 s", "in force again"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(link.tc_state()?, before);
    assert!(!link.pins().exist());
    nothing_waits()
}

/// Whatever the two plans differ in: levels, marks, queue, segments.
#[test]
fn the_plan_before_is_in_force_again() -> Result<()> {
    let link = Link::new()?;
    let tcp = ["--level", "4:50mbit,burst=30000"];
    let kinds: [&[&str]; 4] = [
        &["--queue", "keep"],
        &["--queue", "htb"],
        &["--queue", "keep", "--pcp", "--oversize", "drop"],
        &["--queue", "htb", "--host-rate", "2gbit"],
    ];
    link.near.ip(&format!("link set {} gso_max_segs 40", link.device))?;
    let bare = (link.tc_state()?, gso(&link)?);
    for before in kinds {
        for after in kinds {
            succeeded(&link.qjump(&arguments(&link, &PLAN, &[&tcp[..], before].concat()))?)?;
            let (expected, segments) = (state(&link)?, gso(&link)?);
            let waiting = Waiting::of(&link, "1s", after)?;
            assert_ne!(state(&link)?.0["hosts"], expected.0["hosts"]);
            assert_eq!(waiting.end()?.0, Some(1));
            assert_eq!(state(&link)?, expected, "{before:?}, then {after:?}");
            assert_eq!(gso(&link)?, segments, "{before:?}, then {after:?}");
            // And what was before that is still known.
            link.unload()?;
            assert_eq!((link.tc_state()?, gso(&link)?), bare, "{before:?}, then {after:?}");
        }
    }
    Ok(())
}

#[test]
fn a_word_from_another_session_keeps_it_or_takes_it_back() -> Result<()> {
    let link = Link::new()?;
    let waiting = Waiting::of(&link, "60s", &[])?;
    // Nothing else may change meanwhile.
    for arguments in
        [arguments(&link, &PLAN, &[]), arguments(&link, &PLAN, &["--confirm", "5s"]), vec!["unload", "--all"]]
    {
        let (status, error) = failed(&link.qjump(&arguments)?);
        assert!(status == 1 && error.contains("`qjump confirm` keeps it"), "{error}");
    }
    let said = succeeded(&Command::new(binary()).arg("confirm").output()?)?;
    assert_eq!(said, "Kept.\n");
    let (status, text) = waiting.end()?;
    assert!(status == Some(0) && text.contains("Kept."), "{text}");
    nothing_waits()?;
    assert_eq!(link.status()?["hosts"], 48);

    let waiting = Waiting::of(&link, "60s", &["--pcp"])?;
    assert_eq!(link.status()?["pcp"], true);
    succeeded(&Command::new(binary()).args(["confirm", "--rollback"]).output()?)?;
    assert_eq!(waiting.end()?.0, Some(1));
    assert_eq!(link.status()?["pcp"], false);
    let (status, error) = failed(&Command::new(binary()).arg("confirm").output()?);
    assert!(status == 1 && error.contains("no load waits"), "{error}");
    link.unload()?;
    Ok(())
}

/// A terminal with the command in it: `script` is its other end.
fn terminal(link: &Link, time: &str) -> Result<Child> {
    let all = arguments(link, &OTHER, &["--confirm", time]);
    let command =
        format!("exec nsenter --net=/run/netns/{} {} {}", link.near.name(), binary().display(), all.join(" "));
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &command, "/dev/null"]);
    let child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    until("nothing is loaded", || Ok(fs::read_to_string(NOTE).is_ok_and(|note| !note.contains("\"loaded\":null"))))?;
    Ok(child)
}

#[test]
fn enter_on_the_terminal_keeps_it() -> Result<()> {
    let link = Link::new()?;
    let mut terminal = terminal(&link, "60s")?;
    terminal.stdin.as_mut().context("no stdin")?.write_all(b"\n")?;
    let output = terminal.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("Enter keeps it") && text.contains("Kept."), "{text}");
    assert_eq!(link.status()?["hosts"], 48);
    link.unload()?;
    Ok(())
}

#[test]
fn a_lost_terminal_takes_it_back() -> Result<()> {
    let link = Link::new()?;
    let mut terminal = terminal(&link, "600s")?;
    assert!(link.pins().exist());
    terminal.kill()?;
    terminal.wait()?;
    nothing_waits()?;
    assert!(!link.pins().exist());
    Ok(())
}

#[test]
fn whoever_is_killed_it_is_taken_back() -> Result<()> {
    let link = Link::new()?;
    for signal in [Signal::SIGKILL, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT] {
        let waiting = Waiting::of(&link, "600s", &[])?;
        kill(waiting.pid(), signal)?;
        nothing_waits()?;
        assert!(!link.pins().exist(), "{signal}");
    }
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let waiting = Waiting::of(&link, "600s", &[])?;
        kill(waiting.supervisor()?, signal)?;
        let (status, text) = waiting.end()?;
        assert!(status == Some(1) && text.contains("in force again"), "{signal}: {text}");
        assert!(!link.pins().exist(), "{signal}");
        nothing_waits()?;
    }
    Ok(())
}

#[test]
fn if_both_are_killed_at_once_the_note_is_left() -> Result<()> {
    let link = Link::new()?;
    for (word, kept) in [("--rollback", false), ("", true)] {
        let waiting = Waiting::of(&link, "600s", &[])?;
        // Stopped, it cannot take the place of the supervisor.
        kill(waiting.pid(), Signal::SIGSTOP)?;
        kill(waiting.supervisor()?, Signal::SIGKILL)?;
        drop(waiting);
        assert!(link.pins().exist() && Path::new(NOTE).exists());
        let (_, error) = failed(&link.qjump(&arguments(&link, &PLAN, &[]))?);
        assert!(error.contains("`qjump confirm --rollback` takes it back"), "{error}");
        let words: Vec<&str> = ["confirm", word].into_iter().filter(|word| !word.is_empty()).collect();
        succeeded(&link.qjump(&words)?)?;
        assert_eq!(link.pins().exist(), kept);
        nothing_waits()?;
    }
    link.unload()?;
    Ok(())
}

#[test]
fn what_is_refused_leaves_no_trace() -> Result<()> {
    let link = Link::new()?;
    let wrong = arguments(
        &link,
        &["--hosts", "0"],
        &["--link-rate", "1gbit", "--max-packet", "256", "--epsilon", "1us", "--level", "7:1", "--confirm", "5s"],
    );
    for (arguments, status) in [
        (wrong, 64),
        (arguments(&link, &OTHER, &["--confirm", "0s"]), 64),
        (arguments(&link, &OTHER, &["--confirm", "5"]), 64),
        (["load", "--interface", "nosuch0"].into_iter().chain(OTHER).chain(["--confirm", "5s"]).collect(), 1),
    ] {
        let (code, message) = failed(&link.qjump(&arguments)?);
        assert_eq!(code, status, "{arguments:?}: {message}");
        assert!(!Path::new(NOTE).exists() && !link.pins().exist());
    }
    Ok(())
}
