//! Racks that outlive the process that built them: `qjump testbed up`, `down`, `exec`, `status`.
//!
//! What a rack is, the kernel shows: namespaces called `qjump-NAME-…`, pins of interfaces called `qj-NAME-…`. A small file
//! beside it, /run/qjump/testbed/NAME, says what it was made from and whether it was finished. It is written before
//! anything is built and locked while somebody builds or removes, so what a killed `up` has left is told from a rack that
//! is just being built, and removed by the next `up` or `down`.

use std::{
    fs::{self, File},
    io::{Read, Seek, Write},
    os::unix::{fs::DirBuilderExt, process::CommandExt},
    path::PathBuf,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    sched::{CloneFlags, setns},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    NamedRack, Rack,
    netns::{self, named_interface},
    spec::MAX_HOSTS,
};
use crate::dataplane::Pins;

const DIRECTORY: &str = "/run/qjump/testbed";

/// The kernel takes 15 characters for an interface: `qj-`, the name, `-h64`.
const LONGEST_NAME: usize = 8;

/// What is noted of a standing rack.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Version of this form.
    version: u32,
    /// Whether it was finished.
    complete: bool,
    /// When, ns since 1970.
    since_unix_ns: u64,
    /// The text that it was made from.
    text: String,
}

const VERSION: u32 = 1;

/// The file of a rack, locked.
struct Note {
    file: Flock<File>,
}

/// What a file says.
enum State {
    /// It is there, and finished.
    Complete(NamedRack, u64),
    /// Somebody has begun to build it, and did not end.
    Partial,
}

/// Refuses what cannot be the name of a rack: interfaces and namespaces carry it.
///
/// # Errors
/// If it is too long, or has other characters than lower-case letters and digits.
pub fn check_name(name: &str) -> Result<()> {
    let fits = (1..=LONGEST_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    ensure!(
        fits,
        "'{name}' cannot be the name of a rack: a lower-case letter, and up to {} more or digits, because the names of \
         interfaces have it in them; give another one with --name",
        LONGEST_NAME - 1
    );
    Ok(())
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(name)
}

fn require_root() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "racks are network namespaces; run this as root, for example with sudo");
    Ok(())
}

impl Note {
    /// Opens and locks the file of a rack, made if there is none. A rack that somebody else is building or removing is left
    /// to him.
    fn take(name: &str) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(DIRECTORY)
            .context("cannot make /run/qjump/testbed")?;
        loop {
            let file = File::options().read(true).write(true).create(true).truncate(false).open(path(name));
            let file = file.with_context(|| format!("cannot open {}", path(name).display()))?;
            let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
                bail!("rack {name} is just being built or removed by somebody else; wait until that is done");
            };
            // The holder before may have removed it.
            let same = |there: fs::Metadata| {
                use std::os::unix::fs::MetadataExt;
                file.metadata().is_ok_and(|ours| ours.ino() == there.ino())
            };
            if fs::metadata(path(name)).is_ok_and(same) {
                return Ok(Self { file });
            }
        }
    }

    /// What it says; `None` if it was made just now.
    fn read(&mut self, name: &str) -> Result<Option<State>> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(if text.is_empty() { None } else { Some(state(name, &text)) })
    }

    fn write(&mut self, record: &Record) -> Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(serde_json::to_string(record)?.as_bytes())?;
        Ok(())
    }
}

/// What the text of a file says. One that was cut short is of a rack that was not finished.
fn state(name: &str, text: &str) -> State {
    let record: Option<Record> = serde_json::from_str(text).ok();
    let complete = record.filter(|record| record.complete && record.version == VERSION);
    match complete.and_then(|record| Some((NamedRack::parse(name, &record.text).ok()?, record.since_unix_ns))) {
        Some((rack, since)) => State::Complete(rack, since),
        None => State::Partial,
    }
}

/// Builds a rack that stands until [`down`].
///
/// # Errors
/// If it stands already, or cannot be built; then nothing of it is left.
pub fn up(rack: &NamedRack) -> Result<Rack> {
    let name = &rack.name;
    check_name(name)?;
    require_root()?;
    let mut note = Note::take(name)?;
    match note.read(name)? {
        Some(State::Complete(..)) => {
            bail!("rack {name} is up already; take it down first: qjump testbed down {name}")
        }
        Some(State::Partial) => {
            clear(name)?;
        }
        None => {
            // Without a file, somebody has removed that alone.
            if let Err(error) = clear(name) {
                let _ = fs::remove_file(path(name));
                return Err(error);
            }
        }
    }
    let since_unix_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let mut record = Record { version: VERSION, complete: false, since_unix_ns, text: rack.text.clone() };
    note.write(&record)?;
    let built = Rack::named(name, rack.spec).and_then(|built| {
        record.complete = true;
        note.write(&record)?;
        Ok(built)
    });
    match built {
        Ok(built) => {
            built.leave();
            Ok(Rack::standing(name, rack.spec))
        }
        Err(error) => {
            let _ = fs::remove_file(path(name));
            Err(error)
        }
    }
}

/// Removes a rack, finished or not. The processes that are still in it: they keep their namespaces until they end.
///
/// # Errors
/// If there is none, or it cannot be removed.
pub fn down(name: &str) -> Result<Vec<u32>> {
    check_name(name)?;
    require_root()?;
    if !path(name).exists() && netns::of_rack(name).is_empty() {
        bail!("there is no rack {name}{}", standing());
    }
    let _note = Note::take(name)?;
    let remaining = clear(name)?;
    fs::remove_file(path(name)).with_context(|| format!("cannot remove {}", path(name).display()))?;
    Ok(remaining)
}

/// Removes all that there is of a rack in the kernel; returns the processes that go on in its namespaces.
fn clear(name: &str) -> Result<Vec<u32>> {
    for host in 0..MAX_HOSTS {
        let pins = Pins::of(&named_interface(name, host));
        if pins.exist() {
            pins.remove().with_context(|| format!("cannot remove {}", pins.directory().display()))?;
        }
    }
    let mut remaining = Vec::new();
    for netns in netns::of_rack(name) {
        remaining.extend(netns::processes(&netns));
        netns::remove(&netns)?;
    }
    Ok(remaining)
}

/// The names of racks that somebody has begun to build, in order.
///
/// # Errors
/// If they cannot be read.
pub fn names() -> Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(format!("cannot read {DIRECTORY}")),
    };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| check_name(name).is_ok());
    names.sort();
    Ok(names)
}

/// For messages: what stands.
fn standing() -> String {
    match names().unwrap_or_default().as_slice() {
        [] => "; none stands. `qjump testbed list` shows those that `qjump testbed up` can build".to_owned(),
        names => format!("; those that stand: {}", names.join(", ")),
    }
}

/// A rack that stands.
///
/// # Errors
/// If there is none of this name, or it was not finished.
pub fn open(name: &str) -> Result<Rack> {
    check_name(name)?;
    let text = fs::read_to_string(path(name)).ok();
    match text.as_deref().map(|text| state(name, text)) {
        Some(State::Complete(rack, _)) => Ok(Rack::standing(name, rack.spec)),
        Some(State::Partial) => {
            bail!("rack {name} was not finished; remove what there is of it: qjump testbed down {name}")
        }
        None => bail!("there is no rack {name}{}", standing()),
    }
}

/// Becomes a program inside a host or a switch. File systems stay the machine's, so that the program sees pins.
///
/// # Errors
/// If the rack or the host is not there, or the program cannot be executed.
pub fn exec(name: &str, place: &str, command: &[std::ffi::OsString]) -> Result<std::convert::Infallible> {
    require_root()?;
    let rack = open(name)?;
    let (netns, host) = rack.find(place)?;
    let (program, arguments) = command.split_first().context("give a program to run")?;
    setns(netns.open()?, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", netns.name()))?;
    let mut command = Command::new(program);
    command.args(arguments);
    if let Some(host) = host {
        command.env("QJUMP_INTERFACE", rack.interface(host));
    }
    // Dropping it would be no harm, but what follows does not return.
    rack.leave();
    Err(command.exec()).with_context(|| format!("cannot run {}", program.display()))
}

/// What there is of a rack.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// `up`, `half-built`, or what is wrong.
    pub state: String,
    /// The rack, if it was finished.
    pub rack: Option<NamedRack>,
    /// When it was built, ns since 1970.
    pub since_unix_ns: Option<u64>,
    /// Its hosts.
    pub hosts: Vec<HostStatus>,
}

/// One host of a rack.
#[derive(Clone, Debug, Serialize)]
pub struct HostStatus {
    /// `h1`.
    pub name: String,
    /// As `ip netns` calls it.
    pub namespace: String,
    /// Its interface.
    pub interface: String,
    /// Its IPv4 address.
    pub address: String,
    /// Its IPv6 address.
    pub address6: Option<String>,
    /// Whether a plan is loaded there.
    pub loaded: bool,
    /// Processes in it.
    pub processes: usize,
}

impl Status {
    /// Whether it is as it was built.
    pub fn is_up(&self) -> bool {
        self.state == "up"
    }

    /// For scripts.
    pub fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "state": self.state,
            "about": self.rack.as_ref().map(|rack| &rack.about),
            "since_unix_ns": self.since_unix_ns,
            "rack": self.rack.as_ref().map(|rack| rack.spec.to_json()),
            "hosts": self.hosts,
        })
    }
}

/// What there is of a rack.
pub fn status(name: &str) -> Status {
    let text = fs::read_to_string(path(name)).unwrap_or_default();
    let State::Complete(named, since) = state(name, &text) else {
        let state = "half-built".to_owned();
        return Status { name: name.to_owned(), state, rack: None, since_unix_ns: None, hosts: Vec::new() };
    };
    let rack = Rack::standing(name, named.spec);
    let hosts: Vec<HostStatus> = (0..named.spec.hosts)
        .map(|host| HostStatus {
            name: format!("h{}", host + 1),
            namespace: rack.host(host).name().to_owned(),
            interface: rack.interface(host),
            address: rack.address(host),
            address6: rack.address6(host),
            loaded: rack.is_loaded(host),
            processes: netns::processes(rack.host(host).name()).len(),
        })
        .collect();
    let wanted = named.spec.hosts + named.spec.leaves() + named.spec.spines();
    let there = netns::of_rack(name).len();
    let state = match there == wanted {
        true => "up".to_owned(),
        false => format!("broken: {there} of {wanted} namespaces"),
    };
    Status { name: name.to_owned(), state, rack: Some(named), since_unix_ns: Some(since), hosts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_into_those_of_interfaces() {
        for name in ["a", "eight", "abcdefgh", "r2d2"] {
            check_name(name).unwrap();
            assert!(named_interface(name, MAX_HOSTS - 1).len() <= 15);
        }
        for name in ["", "abcdefghi", "2d", "Eight", "a-b", "a.b", "../x", "a b", "\u{e4}"] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_file_that_was_cut_short_is_of_a_rack_that_was_not_finished() {
        let text = super::super::spec::stock().next().unwrap().text;
        let record = Record { version: VERSION, complete: true, since_unix_ns: 5, text };
        let whole = serde_json::to_string(&record).unwrap();
        assert!(matches!(state("x", &whole), State::Complete(rack, 5) if rack.spec.hosts == 2));
        for length in 1..whole.len() {
            assert!(matches!(state("x", &whole[..length]), State::Partial), "{length}");
        }
        let other = serde_json::to_string(&Record { version: VERSION + 1, ..record }).unwrap();
        assert!(matches!(state("x", &other), State::Partial));
    }
}
