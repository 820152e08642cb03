//! `qjump load --confirm` and `qjump confirm`: a load that goes back by itself unless somebody says that it is good.
//!
//! The command at the terminal (the *front*) starts itself once more as *supervisor*, in a session of its own, which loads and
//! then waits. They share a socket, and the front's end closes when it ends, however it ends: that takes the load back, as the
//! end of the time does. If the supervisor is killed, the front takes the load back from what the supervisor has noted in
//! [`DIRECTORY`]; only if both are killed at once, the load stays, and the note with it, for `qjump confirm --rollback`.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, IsTerminal, Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Args;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::setsid,
};
use serde::{Deserialize, Serialize};

use super::{Failure, interrupt, print};
use crate::{
    dataplane::rollback::{Before, Loaded, generation},
    units::Nanos,
};

/// What a load that waits is noted in. Root's alone.
const DIRECTORY: &str = "/run/qjump/confirm";

/// Version of the note.
const VERSION: u32 = 1;

/// Who asks by the socket has said what he wants within this.
const PATIENCE: Duration = Duration::from_secs(2);

/// Keep what `qjump load --confirm` has loaded, or take it back at once
#[derive(Args)]
pub struct ConfirmCommand {
    /// Take it back instead
    #[arg(long)]
    rollback: bool,
}

/// The note of a load that waits for its confirmation.
#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    until_unix_ms: u64,
    interfaces: Vec<Entry>,
}

/// One interface of such a load.
#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    /// What was in force ([`Loaded::to_bytes`]).
    before: Option<Vec<u8>>,
    /// The number of the plan that was loaded; `None` before it was.
    loaded: Option<u64>,
}

/// What happens to a load that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Keep,
    RollBack,
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::RollBack => "rollback",
        }
    }

    fn of(word: &str) -> Option<Self> {
        [Self::Keep, Self::RollBack].into_iter().find(|verdict| verdict.word() == word.trim())
    }
}

/// What the supervisor tells, a line of JSON each.
#[derive(Serialize, Deserialize)]
enum Report {
    /// It is loaded; this is to be shown.
    Loaded(String),
    /// It was not loaded, and nothing has changed: whether the request is wrong, and why.
    Refused(bool, String),
    /// It stays.
    Kept,
    /// What was before is in force again.
    RolledBack,
    /// Not all of it could be taken back.
    Stuck(String),
}

fn note_path() -> PathBuf {
    Path::new(DIRECTORY).join("note")
}

fn socket_path() -> PathBuf {
    Path::new(DIRECTORY).join("socket")
}

fn cannot(what: &str) -> impl FnOnce(io::Error) -> Failure {
    let what = what.to_owned();
    move |error| Failure::Failed(format!("cannot {what} {DIRECTORY}: {error}"))
}

/// The note, locked by whoever decides about it.
struct Held(Flock<File>);

impl Held {
    /// Opens and locks the note; `None` if somebody else holds it.
    fn take() -> Result<Option<Self>, Failure> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY).map_err(cannot("make"))?;
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(note_path());
        match Flock::lock(file.map_err(cannot("write in"))?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self(lock))),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(cannot("lock")(errno.into())),
        }
    }

    fn read(&mut self) -> Option<Note> {
        let mut text = String::new();
        self.0.rewind().ok()?;
        self.0.read_to_string(&mut text).ok()?;
        serde_json::from_str(&text).ok().filter(|note: &Note| note.version == VERSION)
    }

    fn write(&mut self, note: &Note) -> io::Result<()> {
        let text = serde_json::to_string(note)?;
        self.0.rewind()?;
        self.0.set_len(0)?;
        self.0.write_all(text.as_bytes())
    }

    /// The matter is closed. The lock is held to the end, so nobody writes into a file that has no name any more.
    fn forget(self) {
        let _ = fs::remove_file(socket_path());
        let _ = fs::remove_file(note_path());
        let _ = fs::remove_dir(DIRECTORY);
    }
}

/// The note of a load that waits, whoever holds it.
fn waiting() -> Option<Note> {
    let note: Note = serde_json::from_slice(&fs::read(note_path()).ok()?).ok()?;
    (note.version == VERSION).then_some(note)
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Refuses to change anything while a load waits: what it would go back to would be neither.
pub(super) fn refuse_while_waiting() -> Result<(), Failure> {
    let Some(note) = waiting() else { return Ok(()) };
    let names: Vec<&str> = note.interfaces.iter().map(|entry| entry.name.as_str()).collect();
    let left = note.until_unix_ms.saturating_sub(unix_ms()) / 1_000;
    Err(Failure::Failed(format!(
        "the load of {} waits for its confirmation ({left} s left): `qjump confirm` keeps it, `qjump confirm --rollback` \
         takes it back",
        names.join(", ")
    )))
}

impl Note {
    fn of(interfaces: &[String], within: Duration) -> Result<Self, Failure> {
        let entry = |name: &String| {
            let before = Before::of(name)?;
            Ok(Entry { name: name.clone(), before: before.loaded.as_ref().map(Loaded::to_bytes), loaded: None })
        };
        let interfaces = interfaces.iter().map(entry).collect::<Result<_, Failure>>()?;
        Ok(Self { version: VERSION, until_unix_ms: unix_ms() + within.as_millis() as u64, interfaces })
    }

    /// Puts everything back as it was; what could not be, is told in the end.
    fn roll_back(&self) -> Result<(), String> {
        let failures: Vec<String> = self.interfaces.iter().filter_map(|entry| entry.roll_back().err()).collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

impl Entry {
    fn roll_back(&self) -> Result<(), String> {
        let Self { name, before, loaded } = self;
        let now = generation(name);
        if loaded.is_some() && now != *loaded {
            return match now {
                Some(_) => Err(format!("{name}: somebody has loaded another plan meanwhile, which stays")),
                None => Err(format!("{name}: somebody has unloaded it meanwhile")),
            };
        }
        let loaded = match before {
            None => None,
            Some(bytes) => Some(Loaded::from_bytes(bytes).ok_or(format!("{name}: the note is another version's"))?),
        };
        Before { interface: name.clone(), loaded }.restore().map_err(|error| error.to_string())
    }
}

/// How long to wait before looking again whether a signal has come, ms: one that comes between the look and the wait does not
/// end the wait.
const LOOK_MS: u16 = 100;

/// The command at the terminal: has a supervisor load, and asks.
pub(super) fn front(within: Nanos) -> Result<(), Failure> {
    refuse_while_waiting()?;
    let within = Duration::from_nanos(within.ns());
    let (ours, theirs) = UnixStream::pair()?;
    let mut supervisor = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .arg("--supervise")
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Failure::Failed(format!("cannot start the supervisor: {error}")))?;
    let interrupted = interrupt::flag();
    let mut reports = BufReader::new(ours.try_clone()?);
    let result = match next(&mut reports) {
        Some(Report::Loaded(text)) => {
            print(text.trim_end())?;
            let terminal = io::stdin().is_terminal();
            let how = if terminal { "Enter keeps it, and so does `qjump confirm`" } else { "`qjump confirm` keeps it" };
            print(format!("Taken back in {} s unless confirmed: {how}.", within.as_secs_f64()))?;
            let mut told = false;
            while !told {
                let mut sources = vec![PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
                let stdin = io::stdin();
                if terminal {
                    sources.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
                }
                let _ = poll(&mut sources, PollTimeout::from(LOOK_MS));
                let ready = |at: usize| sources.get(at).is_some_and(|source| source.any() == Some(true));
                if ready(0) {
                    break;
                }
                let mut line = String::new();
                if ready(1) && stdin.read_line(&mut line).is_ok_and(|length| length > 0) {
                    writeln!(&ours, "{}", Verdict::Keep.word())?;
                    told = true;
                } else if ready(1) || interrupted.load(Relaxed) {
                    // Closing it is the answer; the end of the terminal is one, too.
                    let _ = ours.shutdown(std::net::Shutdown::Write);
                    told = true;
                }
            }
            next(&mut reports)
        }
        other => other,
    };
    let _ = supervisor.wait();
    let not_confirmed = || {
        let why = if interrupted.load(Relaxed) {
            "interrupted".to_owned()
        } else {
            format!("not confirmed within {} s", within.as_secs_f64())
        };
        Failure::Failed(format!("{why}: what was before is in force again"))
    };
    match result {
        Some(Report::Kept) => print("Kept."),
        Some(Report::RolledBack) => Err(not_confirmed()),
        Some(Report::Stuck(why)) => Err(Failure::Failed(format!("not all of it could be taken back: {why}"))),
        Some(Report::Refused(true, message)) => Err(Failure::Usage(message)),
        Some(Report::Refused(false, message)) => Err(Failure::Failed(message)),
        Some(Report::Loaded(_)) | None => orphaned(),
    }
}

/// The next thing that the supervisor tells; `None` if it has gone away.
fn next(reports: &mut impl BufRead) -> Option<Report> {
    let mut line = String::new();
    loop {
        match reports.read_line(&mut line) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(length) if length > 0 => return serde_json::from_str(&line).ok(),
            _ => return None,
        }
    }
}

/// The supervisor was killed: what it can no longer take back, this does.
fn orphaned() -> Result<(), Failure> {
    let mut held =
        Held::take()?.ok_or_else(|| Failure::Failed("the supervisor is stuck; try `qjump status`".to_owned()))?;
    let note = held.read();
    let result = note.map_or(Ok(()), |note| note.roll_back());
    held.forget();
    match result {
        Ok(()) => Err(Failure::Failed("the supervisor was killed: what was before is in force again".to_owned())),
        Err(why) => {
            Err(Failure::Failed(format!("the supervisor was killed, and not all of it could be taken back: {why}")))
        }
    }
}

/// The supervisor: loads, waits, and keeps or goes back. Its standard output is the front's socket; its standard input is the
/// front's, for a configuration that comes from there. `work` is the interfaces, and what loads them and says what it did.
pub(super) fn supervise(
    within: Nanos,
    work: Result<(Vec<String>, impl FnOnce() -> Result<String, Failure>), Failure>,
) -> Result<(), Failure> {
    // Out of reach of the terminal's signals. It fails for the leader of a process group, which this is not.
    let _ = setsid();
    interrupt::flag();
    let front = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    // The terminal can be closed without waiting for this.
    if let Ok(nothing) = File::open("/dev/null") {
        let _ = nix::unistd::dup2_stdin(nothing);
    }
    let tell = |report: &Report| -> io::Result<()> { writeln!(&front, "{}", serde_json::to_string(report)?) };
    let within = Duration::from_nanos(within.ns());
    let report = work.and_then(|(interfaces, load)| wait(&interfaces, within, load, &front, &tell));
    let report = report.unwrap_or_else(|failure| match failure {
        Failure::Usage(message) => Report::Refused(true, message),
        Failure::Failed(message) => Report::Refused(false, message),
        Failure::DoesNotHold | Failure::Status(_) => Report::Refused(false, "it did not hold".to_owned()),
    });
    // Nobody may be there to be told.
    let _ = tell(&report);
    Ok(())
}

fn wait(
    interfaces: &[String],
    within: Duration,
    load: impl FnOnce() -> Result<String, Failure>,
    front: &UnixStream,
    tell: &impl Fn(&Report) -> io::Result<()>,
) -> Result<Report, Failure> {
    let taken = Held::take()?;
    // Held by somebody, or left by a front and a supervisor that were killed together.
    refuse_while_waiting()?;
    let Some(mut held) = taken else {
        return Err(Failure::Failed(
            "another load is just beginning to wait for its confirmation; try again".to_owned(),
        ));
    };
    let deadline = Instant::now() + within;
    let prepared = Note::of(interfaces, within).and_then(|note| {
        held.write(&note).map_err(cannot("write in"))?;
        let _ = fs::remove_file(socket_path());
        let listener = UnixListener::bind(socket_path()).map_err(cannot("listen in"))?;
        Ok((note, listener, load()?))
    });
    let (mut note, listener, text) = match prepared {
        Ok(prepared) => prepared,
        Err(failure) => {
            held.forget();
            return Err(failure);
        }
    };
    for entry in &mut note.interfaces {
        entry.loaded = generation(&entry.name);
    }
    // Without the number it goes back all the same. A front that is not there is found out in the loop.
    let _ = held.write(&note);
    let _ = tell(&Report::Loaded(text));
    let (verdict, asker) = verdict(deadline, front, &listener);
    let report = match verdict {
        Verdict::Keep => Report::Kept,
        Verdict::RollBack => match note.roll_back() {
            Ok(()) => Report::RolledBack,
            Err(why) => Report::Stuck(why),
        },
    };
    held.forget();
    if let Some(mut asker) = asker {
        let _ = writeln!(asker, "{}", serde_json::to_string(&report).unwrap_or_default());
    }
    Ok(report)
}

/// Waits for what is to happen, and who is to be told, beside the front.
fn verdict(deadline: Instant, front: &UnixStream, listener: &UnixListener) -> (Verdict, Option<UnixStream>) {
    let interrupted = interrupt::flag();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || interrupted.load(Relaxed) {
            return (Verdict::RollBack, None);
        }
        let mut sources =
            [front.as_fd(), listener.as_fd()].map(|fd: BorrowedFd<'_>| PollFd::new(fd, PollFlags::POLLIN));
        // Rounded up, so that the last millisecond is not spent in circles.
        let timeout = PollTimeout::from((left.as_millis() + 1).min(LOOK_MS.into()) as u16);
        if !matches!(poll(&mut sources, timeout), Ok(1..)) {
            continue;
        }
        let [from_front, from_others] = sources.map(|source| source.any() == Some(true));
        if from_front {
            return (asked(front).unwrap_or(Verdict::RollBack), None);
        }
        if from_others
            && let Ok((asker, _)) = listener.accept()
            && let Some(verdict) = asked(&asker)
        {
            return (verdict, Some(asker));
        }
    }
}

/// What somebody wants; `None` if he goes away or says something else.
fn asked(stream: &UnixStream) -> Option<Verdict> {
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut line = String::new();
    // No word is longer.
    BufReader::new(stream.take(16)).read_line(&mut line).ok()?;
    Verdict::of(&line)
}

impl ConfirmCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let verdict = if self.rollback { Verdict::RollBack } else { Verdict::Keep };
        if let Err(error) = fs::metadata(note_path()) {
            return Err(Failure::Failed(match error.kind() {
                io::ErrorKind::PermissionDenied => format!("{DIRECTORY} is root's; run this as root"),
                _ => "no load waits for a confirmation".to_owned(),
            }));
        }
        let report = match UnixStream::connect(socket_path()) {
            Ok(mut stream) => {
                writeln!(stream, "{}", verdict.word())?;
                next(&mut BufReader::new(&stream))
            }
            Err(_) => None,
        };
        match report.map_or_else(|| abandoned(verdict), Ok)? {
            Report::Kept => print("Kept."),
            Report::RolledBack => print("What was before is in force again."),
            Report::Stuck(why) => Err(Failure::Failed(format!("not all of it could be taken back: {why}"))),
            Report::Loaded(_) | Report::Refused(..) => Err(Failure::Failed("the supervisor gave no answer".to_owned())),
        }
    }
}

/// A load whose front and supervisor were killed together.
fn abandoned(verdict: Verdict) -> Result<Report, Failure> {
    let Some(mut held) = Held::take()? else {
        return Err(Failure::Failed(
            "its supervisor does not answer; try again, and look with `qjump status`".to_owned(),
        ));
    };
    let report = match (verdict, held.read()) {
        (Verdict::Keep, _) | (_, None) => Report::Kept,
        (Verdict::RollBack, Some(note)) => note.roll_back().map_or_else(Report::Stuck, |()| Report::RolledBack),
    };
    held.forget();
    Ok(report)
}
