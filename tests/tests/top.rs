//! What `qjump top` shows: in a pipe, as JSON, and on a terminal.

use std::{
    net::UdpSocket,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::socket::{Level, set_level};
use qjump_tests::link::{FAR, Link, binary, failed, succeeded};
use serde_json::Value;

/// Sends at a level, more than it may, until told to stop.
fn flood<T>(link: &Link, level: u8, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let socket = link.near.enter(|| Ok(UdpSocket::bind(("0.0.0.0", 0))?))?;
    set_level(&socket, Level::new(level).context("a level")?)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Relaxed) {
                let _ = socket.send_to(&[0; 100], (FAR.0, 7_200));
                thread::sleep(Duration::from_micros(500));
            }
        });
        let result = work();
        stop.store(true, Relaxed);
        result
    })
}

/// Level 5 has a packet each 10 ms or so, and twenty are sent.
const SLOW: [&str; 14] = [
    "--hosts",
    "50",
    "--link-rate",
    "1mbit",
    "--max-packet",
    "256",
    "--epsilon",
    "1ms",
    "--level",
    "5:1",
    "--level",
    "3:unlimited",
    "--queue",
    "keep",
];

fn load(link: &Link) -> Result<String> {
    succeeded(&link.qjump(&[&["load", "--interface", &link.device], &SLOW[..]].concat())?)
}

fn level(top: &Value, number: u8) -> Result<&Value> {
    let levels = top["interfaces"][0]["levels"].as_array().context("levels")?;
    levels.iter().find(|level| level["level"] == number).context("the level")
}

#[test]
fn rates_are_those_of_the_moment() -> Result<()> {
    let link = Link::new()?;
    load(&link)?;
    let arguments = ["top", "--interface", &link.device, "--once", "--json"];
    let top: Value = flood(&link, 5, || Ok(serde_json::from_str(&succeeded(&link.qjump(&arguments)?)?)?))?;
    assert!(top["interval_ns"].as_u64().is_some_and(|ns| ns >= 1_000_000_000), "{top}");
    let busy = level(&top, 5)?;
    let number = |field: &str| busy[field].as_f64().with_context(|| format!("{field} in {busy}"));
    let (rate, limit) = (number("rate_bps")?, number("limit_bps")?);
    // It may have begun with an epoch's credit.
    assert!(rate > 0.0 && rate < limit * 2.0, "{busy}");
    let dropped = busy["dropped_per_s"]["over_limit"].as_f64().context("over_limit")?;
    assert!(dropped > number("packets_per_s")?, "{busy}");
    assert_eq!(level(&top, 3)?["rate_bps"], 0.0);
    // Nobody sends: rates fall to nothing, whatever the counters say.
    let top: Value = serde_json::from_str(&succeeded(&link.qjump(&arguments)?)?)?;
    let idle = level(&top, 5)?;
    assert_eq!(
        (&idle["rate_bps"], idle["dropped_per_s"].as_object().map(|all| all.len())),
        (&0.0.into(), Some(0)),
        "{idle}"
    );
    link.unload()?;
    let (status, _) = failed(&link.qjump(&["top", "--once", "--interface", &link.device])?);
    assert_eq!(status, 1);
    Ok(())
}

#[test]
fn the_table_names_reasons_and_senders() -> Result<()> {
    let link = Link::new()?;
    load(&link)?;
    let mut sleeper = link.command(&["run", "--level", "5", "--", "sleep", "30"]).spawn()?;
    let arguments = ["top", "--interface", &link.device, "--once", "--interval", "300ms"];
    let text = flood(&link, 5, || {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let text = succeeded(&link.qjump(&arguments)?)?;
            if text.contains("(0)") {
                return Ok(text);
            }
            ensure!(Instant::now() < deadline, "no sender: {text}");
        }
    });
    sleeper.kill()?;
    sleeper.wait()?;
    let text = text?;
    for part in ["enforced at", "granted to", "level 5 dropped: over_limit", "bound", "%"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    Ok(())
}

/// tmux is the terminal, and says what is on it.
struct Tmux {
    socket: String,
}

impl Tmux {
    fn run(&self, arguments: &[&str]) -> Result<String> {
        succeeded(&Command::new("tmux").args(["-L", &self.socket, "-f", "/dev/null"]).args(arguments).output()?)
    }

    fn screen(&self) -> Result<String> {
        self.run(&["capture-pane", "-p", "-t", "top"])
    }

    fn until(&self, holds: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let screen = self.screen()?;
            if holds(&screen) {
                return Ok(screen);
            }
            ensure!(Instant::now() < deadline, "the screen is still:\n{screen}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.run(&["kill-server"]);
    }
}

#[test]
fn a_terminal_shows_it_live_and_is_given_back() -> Result<()> {
    let link = Link::new()?;
    load(&link)?;
    let tmux = Tmux { socket: format!("qjump-top-{}", std::process::id()) };
    tmux.run(&["new-session", "-d", "-s", "top", "-x", "100", "-y", "12", "sh"])?;
    let command = format!(
        "clear; echo before; nsenter --net=/run/netns/{} {} top --interface {} --interval 200ms; echo status $?",
        link.near.name(),
        binary().display(),
        link.device
    );
    tmux.run(&["send-keys", "-t", "top", &command, "Enter"])?;
    let quiet = tmux.until(|screen| screen.starts_with(&link.device))?;
    assert!(!quiet.contains("before") && !quiet.contains("over_limit"), "{quiet}");
    flood(&link, 5, || tmux.until(|screen| screen.contains("over_limit")))?;
    // What is no longer so goes from the screen.
    tmux.until(|screen| screen.starts_with(&link.device) && !screen.contains("over_limit"))?;
    tmux.run(&["send-keys", "-t", "top", "q"])?;
    let after = tmux.until(|screen| screen.contains("status 0"))?;
    assert!(after.contains("before") && !after.contains("enforced at"), "{after}");
    Ok(())
}
