//! `qjump top`: what each level sends now, against what it may.

use std::{
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr},
};
use qjump_ebpf::{Level, Reason};
use serde_json::{Map, Value, json};

use super::{Failure, interrupt, print, status};
use crate::{
    dataplane::{self, InterfaceStatus, LevelStatus},
    plan::bound_in_force,
    table::Table,
    tag::{self, Tag},
    units::{Nanos, show_ns, show_rate},
};

/// Version of the JSON.
const SCHEMA_VERSION: u32 = 1;

/// How many senders of a level the table names.
const NAMED: usize = 2;

/// Show what every level sends now, against its limit: drops and their reasons, waits, who sends, and the bound
///
/// On a terminal it replaces itself until q or Ctrl-C; in a pipe, one follows another.
#[derive(Args)]
pub struct TopCommand {
    /// Interface of this network namespace; without it, every one that qjump is loaded on
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
    /// Time between two looks; rates are means of it
    #[arg(long, value_name = "TIME", default_value = "1s")]
    interval: Nanos,
    /// Show it once and end; exit status 2 if nothing is enforced
    #[arg(long)]
    once: bool,
    /// Print JSON, one line a look
    #[arg(long)]
    json: bool,
}

/// One look at the kernel's counters.
struct Look {
    at: Instant,
    interfaces: Vec<InterfaceStatus>,
}

/// What one level did between two looks.
struct Activity<'a> {
    now: &'a LevelStatus,
    before: Option<&'a LevelStatus>,
    seconds: f64,
}

impl Activity<'_> {
    /// So many more, for each second. Counters begin anew with another load.
    fn rate(&self, count: impl Fn(&LevelStatus) -> u64) -> f64 {
        let before = self.before.map_or(0, &count);
        count(self.now).saturating_sub(before) as f64 / self.seconds
    }

    fn bits(&self) -> f64 {
        self.rate(|level| level.passed().bytes) * 8.0
    }

    fn reasons(&self, wanted: fn(Reason) -> bool) -> Vec<(&'static str, f64)> {
        let each = Reason::ALL.into_iter().filter(|&reason| wanted(reason));
        each.map(|reason| (reason.name(), self.rate(|level| level.count(reason).packets)))
            .filter(|(_, rate)| *rate > 0.0)
            .collect()
    }
}

fn total(reasons: &[(&str, f64)]) -> f64 {
    // The sum of nothing is -0 otherwise.
    reasons.iter().map(|(_, rate)| rate).fold(0.0, |sum, rate| sum + rate)
}

/// What there is to show: two looks, and who was granted what.
struct Top<'a> {
    before: &'a Look,
    now: &'a Look,
    tags: &'a [Tag],
}

impl Top<'_> {
    fn activities<'a>(&'a self, status: &'a InterfaceStatus) -> impl Iterator<Item = Activity<'a>> {
        let seconds = self.now.at.duration_since(self.before.at).as_secs_f64();
        let same = |other: &&InterfaceStatus| {
            (&other.interface, other.config.plan.ifindex) == (&status.interface, status.config.plan.ifindex)
        };
        let before = self.before.interfaces.iter().find(same);
        status.levels.iter().map(move |now| Activity {
            now,
            before: before.and_then(|before| before.levels.iter().find(|level| level.level == now.level)),
            seconds,
        })
    }

    fn senders(&self, level: Level) -> impl Iterator<Item = &Tag> {
        self.tags.iter().filter(move |tag| tag.grant.level == u32::from(level.number()) && !tag.is_over)
    }

    fn named_senders(&self, level: Level) -> String {
        let mut names: Vec<String> =
            self.senders(level).take(NAMED).map(|tag| format!("{} ({})", name(tag), sockets(tag))).collect();
        match self.senders(level).count().saturating_sub(NAMED) {
            0 => {}
            more => names.push(format!("{more} more")),
        }
        if names.is_empty() { "-".to_owned() } else { names.join(", ") }
    }

    fn interface(&self, text: &mut String, status: &InterfaceStatus) {
        use std::fmt::Write as _;
        let state = match (&status.problem, status.queue_problems.first()) {
            (Some(problem), _) => format!("NOT ENFORCED: {problem}"),
            (None, Some(problem)) => format!("QUEUE NOT AS IT SHOULD BE: {problem}"),
            (None, None) => format!("enforced at {} egress, queue {}", status.hook, status.queue.name()),
        };
        let _ = writeln!(text, "{}: {state}", status.interface);
        let mut table = Table::new([
            "level",
            "rate",
            "limit",
            "used",
            "packets/s",
            "dropped/s",
            "demoted/s",
            "waited/s",
            "longest wait",
            "bound",
            "granted to (sockets)",
        ])
        .left(10);
        let mut reasons = String::new();
        for activity in self.activities(status) {
            let level = activity.now.level;
            let (bits, limit) = (activity.bits(), status::rate(&status.config, level));
            let (dropped, demoted) = (activity.reasons(Reason::is_drop), activity.reasons(Reason::is_demotion));
            table.row([
                level.to_string(),
                show_rate(bits),
                limit.map_or("-".to_owned(), show_rate),
                limit.map_or("-".to_owned(), |limit| format!("{:.0} %", bits / limit * 100.0)),
                format!("{:.0}", activity.rate(|level| level.passed().packets)),
                format!("{:.0}", total(&dropped)),
                format!("{:.0}", total(&demoted)),
                format!("{:.0}", activity.rate(|level| level.counters.waited_packets)),
                match activity.now.counters.worst_wait_ns {
                    0 => "-".to_owned(),
                    wait => show_ns(wait as f64),
                },
                status::bound(&status.config, level),
                self.named_senders(level),
            ]);
            for (what, all) in [("dropped", dropped), ("demoted", demoted)] {
                let words: Vec<String> = all.iter().map(|(name, rate)| format!("{name} {rate:.0}/s")).collect();
                if !words.is_empty() {
                    let _ = writeln!(reasons, "level {level} {what}: {}", words.join(", "));
                }
            }
        }
        let _ = write!(text, "{table}{reasons}");
    }

    fn text(&self) -> String {
        if self.now.interfaces.is_empty() {
            return "not enforced: qjump is not loaded on any interface\n".to_owned();
        }
        let mut text = String::new();
        for status in &self.now.interfaces {
            self.interface(&mut text, status);
        }
        text
    }

    fn json(&self) -> Value {
        let interval = self.now.at.duration_since(self.before.at);
        let interfaces: Vec<Value> = self.now.interfaces.iter().map(|status| self.interface_json(status)).collect();
        json!({
            "schema_version": SCHEMA_VERSION,
            "at_unix_ns": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64),
            "interval_ns": interval.as_nanos() as u64,
            "interfaces": interfaces,
        })
    }

    fn interface_json(&self, status: &InterfaceStatus) -> Value {
        let by_reason = |reasons: Vec<(&str, f64)>| -> Map<String, Value> {
            reasons.into_iter().map(|(name, rate)| (name.to_owned(), rate.into())).collect()
        };
        let level_json = |activity: Activity<'_>| {
            let level = activity.now.level;
            let senders: Vec<Value> = self
                .senders(level)
                .map(|tag| json!({"cgroup": name(tag), "sockets": sockets(tag), "processes": tag.processes}))
                .collect();
            json!({
                "level": level.number(),
                "rate_bps": activity.bits(),
                "limit_bps": status::rate(&status.config, level),
                "packets_per_s": activity.rate(|level| level.passed().packets),
                "dropped_per_s": by_reason(activity.reasons(Reason::is_drop)),
                "demoted_per_s": by_reason(activity.reasons(Reason::is_demotion)),
                "waited_per_s": activity.rate(|level| level.counters.waited_packets),
                "worst_wait_ns": activity.now.counters.worst_wait_ns,
                "bound_ns": bound_in_force(&status.config, level),
                "guaranteed": status.config.plan.levels[level.index()].guaranteed == 1,
                "granted_to": senders,
            })
        };
        json!({
            "interface": status.interface,
            "netns": status.config.plan.netns,
            "attached": status.attached,
            "problem": status.problem,
            "queue_problems": status.queue_problems,
            "levels": self.activities(status).map(level_json).collect::<Vec<_>>(),
        })
    }
}

fn name(tag: &Tag) -> String {
    tag.cgroup.as_ref().map_or_else(|| format!("number {}", tag.id), |cgroup| cgroup.path.clone())
}

fn sockets(tag: &Tag) -> u64 {
    tag.sockets.iter().map(|&count| count as u64).sum()
}

impl TopCommand {
    fn look(&self) -> Result<Look, Failure> {
        let names = match &self.interface {
            Some(name) => vec![name.clone()],
            None => dataplane::loaded_interfaces()?,
        };
        let mut interfaces = Vec::new();
        for name in names {
            match dataplane::status(&name) {
                Ok(status) => interfaces.push(status),
                // From the list, it has just been unloaded.
                Err(dataplane::Error::NotLoaded(_)) if self.interface.is_none() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Look { at: Instant::now(), interfaces })
    }

    pub(super) fn run(&self) -> Result<(), Failure> {
        let interval = Duration::from_nanos(self.interval.ns());
        if interval < Duration::from_millis(10) {
            return Err(Failure::Usage("--interval: looking takes time itself; give 10ms or more".to_owned()));
        }
        let mut before = self.look()?;
        let screen = if self.once || self.json { None } else { Screen::open()? };
        loop {
            if wait(interval, screen.is_some()) {
                return Ok(());
            }
            let now = self.look()?;
            // A host without cgroups has no grants.
            let tags = tag::list().unwrap_or_default();
            let top = Top { before: &before, now: &now, tags: &tags };
            match &screen {
                _ if self.json => print(top.json())?,
                Some(screen) => screen.show(&top.text())?,
                None => print(top.text())?,
            }
            if self.once {
                let holds = now.interfaces.iter().all(|status| status.attached && status.queue_problems.is_empty());
                return if holds && !now.interfaces.is_empty() { Ok(()) } else { Err(Failure::DoesNotHold) };
            }
            before = now;
        }
    }
}

/// Waits; whether the person has had enough. Keys count only on a screen of ours.
fn wait(interval: Duration, has_keys: bool) -> bool {
    let (interrupted, end) = (interrupt::flag(), Instant::now() + interval);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if interrupted.load(Relaxed) {
            return true;
        }
        if left.is_zero() {
            return false;
        }
        let stdin = io::stdin();
        let mut sources = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        let sources = if has_keys { &mut sources[..] } else { &mut [] };
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        if let Ok(1..) = poll(sources, timeout) {
            let mut keys = [0; 16];
            match nix::unistd::read(stdin.as_fd(), &mut keys) {
                Ok(count) if count > 0 && !keys[..count].contains(&b'q') => {}
                _ => return true,
            }
        }
    }
}

/// The terminal's other screen, without a cursor, and keys that need no Enter. As it was when this is dropped.
struct Screen {
    before: Termios,
}

impl Screen {
    /// `None` if there is no terminal at both ends.
    fn open() -> Result<Option<Self>, Failure> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        if !(stdin.is_terminal() && stdout.is_terminal()) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).map_err(io::Error::from)?;
        let mut keys = before.clone();
        keys.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSANOW, &keys).map_err(io::Error::from)?;
        let screen = Self { before };
        // The other screen; no cursor; long lines are cut.
        put("\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        Ok(Some(screen))
    }

    fn show(&self, text: &str) -> Result<(), Failure> {
        let mut page = String::from("\x1b[H");
        // The last line is left free: a line's end there would move everything up.
        for line in text.lines().take(usize::from(rows()).saturating_sub(1)) {
            page += line;
            page += "\x1b[K\r\n";
        }
        page += "\x1b[J";
        put(&page)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = put("\x1b[?7h\x1b[?25h\x1b[?1049l");
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

fn put(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Lines of the terminal; those of the oldest ones if it does not say.
fn rows() -> u16 {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one `winsize` to where it is told.
    let answer = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if answer == 0 && size.ws_row > 0 { size.ws_row } else { 24 }
}
