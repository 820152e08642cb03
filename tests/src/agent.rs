//! An agent in the near namespace of a cable, with a configuration of its own.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    link::{Link, succeeded},
    measuring::memory,
};

/// An agent, running or not. It is ended and its files go when this is dropped.
pub struct Agent<'a> {
    link: &'a Link,
    /// Where its files are.
    pub folder: PathBuf,
    child: Option<Child>,
}

/// A network that is wide enough for tests, with level 5 at this rate and burst.
pub fn network(rate: &str, burst: u32) -> String {
    format!(
        "[cluster]\nhosts = 4\nlink-rate = \"1gbit\"\nmax-packet = 256\nepsilon = \"40us\"\n\n\
         [[level]]\nlevel = 5\nrate = \"{rate}\"\nburst = {burst}\n\n"
    )
}

impl<'a> Agent<'a> {
    /// One that has not begun.
    pub fn new(link: &'a Link) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("qjump-agent-{}", link.device));
        fs::create_dir_all(folder.join("run"))?;
        Ok(Self { link, folder, child: None })
    }

    /// The configuration.
    pub fn config(&self) -> PathBuf {
        self.folder.join("qjump.toml")
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("run/agent.sock")
    }

    /// Both, as words of a command line.
    pub fn paths(&self) -> [String; 2] {
        [self.config(), self.socket()].map(|path| path.display().to_string())
    }

    /// Writes the configuration.
    pub fn write(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.config(), text)?)
    }

    /// Writes a configuration with this level 5 for the near interface, the queue left alone.
    pub fn plan(&self, rate: &str, burst: u32) -> Result<()> {
        let device = &self.link.device;
        self.write(&format!("{}[host]\ninterfaces = [\"{device}\"]\nqueue = \"keep\"\n", network(rate, burst)))
    }

    /// Begins, and does not wait.
    pub fn spawn(&mut self) -> Result<()> {
        let [config, socket] = self.paths();
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let mut command = self.link.command(&["agent", "--verbose", "--config", &config, "--socket", &socket]);
        self.child = Some(command.stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    /// Begins, and waits until it is ready.
    pub fn start(&mut self) -> Result<()> {
        self.spawn()?;
        self.until("the agent is ready", |agent| agent.state().is_ok_and(|state| state["ready"] == true))
    }

    /// Ends it, as systemd does; the limits stay.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM)?;
        let status = child.wait()?;
        ensure!(status.success(), "{status}: {}", self.log());
        Ok(())
    }

    /// Kills it, wherever it is.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// `qjump` with a word for this agent, and more words.
    pub fn ask(&self, word: &str, more: &[&str]) -> Result<Output> {
        let socket = self.socket().display().to_string();
        let mut words = vec![word, "--socket", &socket];
        words.extend(more);
        self.link.qjump(&words)
    }

    /// `qjump reload`.
    pub fn reload(&self) -> Result<String> {
        succeeded(&self.ask("reload", &[])?).with_context(|| self.log())
    }

    /// How it sees things.
    pub fn state(&self) -> Result<Value> {
        let request = serde_json::json!({"method": "status"});
        let mut answer = qjump::agent::client::ask(&self.socket(), &request)?;
        ensure!(answer["ok"] == true, "{answer}");
        Ok(answer["agent"].take())
    }

    /// Its process.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.child.as_ref().context("it does not run")?.id())
    }

    /// Bytes of memory that it has, KiB, and the time that it has worked, ticks.
    pub fn usage(&self) -> Result<(u64, u64)> {
        let pid = self.pid()?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok((memory(pid)?, ticks))
    }

    /// Waits, at most half a minute.
    pub fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(30);
        while !holds(self) {
            if Instant::now() > end {
                bail!("not within half a minute: {what}; its log:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until the near interface is enforced, and the queue as it should be.
    pub fn until_enforced(&self) -> Result<()> {
        let link = self.link;
        self.until("the interface is limited", |_| {
            link.status()
                .is_ok_and(|status| status["attached"] == true && status["queue_problems"] == serde_json::json!([]))
        })
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = self.link.qjump(&["unload", "--interface", &self.link.device]);
        let _ = fs::remove_dir_all(&self.folder);
    }
}
