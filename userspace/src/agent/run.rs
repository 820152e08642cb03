//! The loop: hears, asks the machine, has the worker execute, and says what happened.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};
use qjump_ebpf::Level;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
    time::{Interval, MissedTickBehavior, interval, sleep},
};

use super::{
    control::{Asked, Control, Peer, Request, refusal},
    desired::{Desired, Source},
    events::Events,
    host, log,
    machine::{self, Command, Input, Machine, Outcome, State, Time},
    members::{self, Members},
    metrics,
    notify::Supervisor,
    rare,
    snapshot::{self, Reload, Reloads, Snapshot},
};
use crate::{
    dataplane,
    tag::{self, Selector, Session},
};

/// What `qjump agent` is given.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration.
    pub config: PathBuf,
    /// The control socket; its folder keeps the agent's own notes, too.
    pub socket: PathBuf,
    /// Where /metrics, /healthz and /ready are answered, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// End when everything is in force, or has failed once.
    pub once: bool,
    /// Say each command.
    pub verbose: bool,
}

/// Why an agent could not begin, or did not do what it was to do.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum Failed {
    #[error("another agent holds {path}; stop it first, or give this one a socket of its own: --socket PATH")]
    Another { path: PathBuf },
    #[error("cannot use {path}: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot {doing}: {source}")]
    System { doing: &'static str, source: io::Error },
    #[error(transparent)]
    Host(#[from] dataplane::Error),
    #[error("{0}")]
    NotInForce(String),
}

/// How long a reload waits for what it changes.
const RELOAD_PATIENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether processes have come or gone.
const PROCESSES_EVERY: Duration = Duration::from_secs(1);
/// How long a command may last until the watchdog hears nothing more.
const STUCK: Duration = Duration::from_secs(60);

/// Runs an agent until it is told to end, by SIGTERM or SIGINT. The limits stay.
///
/// # Errors
/// If it cannot begin; with `once`, if something is not in force in the end.
pub fn run(options: &Options) -> Result<(), Failed> {
    log::begin(options.verbose);
    dataplane::require_capabilities("attaching")?;
    let folder = options.socket.parent().unwrap_or(Path::new("."));
    let mut builder = fs::DirBuilder::new();
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Failed::Socket { path, source }
    };
    builder.recursive(true).mode(0o755).create(folder).map_err(failed(folder))?;
    let notes = Notes::open(&options.socket.with_extension("managed"))?;
    dataplane::sys::share_one_heap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Failed::System { doing: "begin", source })?;
    runtime.block_on(async {
        let mut agent = Agent::begin(options, notes)?;
        agent.show().await;
        agent.run().await
    })
}

/// Which interfaces this agent manages, for the one that comes after it; and a lock, so that there is one at a time.
struct Notes {
    file: Flock<File>,
    written: String,
}

impl Notes {
    fn open(path: &Path) -> Result<Self, Failed> {
        let failed = |source| Failed::Socket { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => Failed::Another { path: path.to_owned() },
            errno => failed(errno.into()),
        })?;
        let written = io::read_to_string(&*file).map_err(failed)?;
        Ok(Self { file, written })
    }

    /// The interfaces of the agent before.
    fn managed(&self) -> Vec<String> {
        self.written.lines().map(str::to_owned).collect()
    }

    fn write<'a>(&mut self, managed: impl Iterator<Item = &'a String>) -> io::Result<()> {
        let text: String = managed.map(|name| format!("{name}\n")).collect();
        if text != self.written {
            // An agent that is killed in between leaves a name too many or half a one, and unloading that does nothing.
            io::Seek::rewind(&mut &*self.file)?;
            (&*self.file).write_all(text.as_bytes())?;
            self.file.set_len(text.len() as u64)?;
            self.written = text;
        }
        Ok(())
    }
}

/// What comes back from the worker.
enum Finished {
    Command(Outcome),
    Config(Box<Read>),
}

/// A configuration that was read.
struct Read {
    desired: Result<Arc<Desired>, String>,
    /// Where members are listed; nothing if the file does not say, or cannot be read.
    members: Option<members::Config>,
    /// It is refused for want of a number of hosts, which is still to be counted.
    uncounted: bool,
    /// The number of hosts that limits are planned for already, if another list of members is to be counted.
    in_force: Option<u32>,
    answer: Option<oneshot::Sender<Value>>,
}

/// Members that are being counted.
struct Counting {
    config: members::Config,
    found: watch::Receiver<Members>,
    task: AbortHandle,
    /// Why there was no answer the last time, so that it is said once.
    failure: Option<String>,
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The next news of members; never, if nobody counts.
async fn counted(counting: &mut Option<Counting>) -> Members {
    if let Some(counting) = counting
        && counting.found.changed().await.is_ok()
    {
        return counting.found.borrow_and_update().clone();
    }
    std::future::pending().await
}

type Work = Box<dyn FnOnce() + Send>;

/// A reload that waits for what it changes.
struct Waiting {
    answer: oneshot::Sender<Value>,
    changes: Vec<String>,
    until: Time,
}

struct Agent<'a> {
    options: &'a Options,
    began: Instant,
    machine: Machine,
    notes: Notes,
    supervisor: Supervisor,
    worker: std::sync::mpsc::Sender<Work>,
    /// When the worker was given the command that it is at.
    working_since: Option<Instant>,
    finished: (mpsc::UnboundedSender<Finished>, mpsc::UnboundedReceiver<Finished>),
    requests: mpsc::Receiver<Asked>,
    counting: Option<Counting>,
    /// As of the last time that something was begun.
    state: State,
    /// What metrics show of the agent.
    shown: Arc<Mutex<snapshot::Agent>>,
    waiting: Vec<Waiting>,
    status: String,
}

impl<'a> Agent<'a> {
    fn begin(options: &'a Options, notes: Notes) -> Result<Self, Failed> {
        let control = Control::begin(&options.socket)
            .map_err(|source| Failed::Socket { path: options.socket.clone(), source })?;
        let (asked, requests) = mpsc::channel(1);
        tokio::spawn(control.serve(asked));
        let (worker, work) = std::sync::mpsc::channel::<Work>();
        let thread = std::thread::Builder::new().name("qjump-worker".to_owned());
        thread
            .spawn(move || work.into_iter().for_each(|work| work()))
            .map_err(|source| Failed::System { doing: "begin a thread", source })?;
        let shown = snapshot::Agent {
            up_since: SystemTime::now(),
            generation: 0,
            reloads: Reloads::default(),
            members: None,
            ready: Err("it has only begun".to_owned()),
        };
        Ok(Self {
            options,
            began: Instant::now(),
            machine: Machine::new(notes.managed()),
            notes,
            supervisor: Supervisor::find(),
            worker,
            working_since: None,
            finished: mpsc::unbounded_channel(),
            requests,
            counting: None,
            state: State::default(),
            shown: Arc::new(Mutex::new(shown)),
            waiting: Vec::new(),
            status: String::new(),
        })
    }

    /// Begins what others look at: metrics, and the log of rare events. What fails here is no reason not to limit.
    async fn show(&self) {
        tokio::spawn(rare::watch());
        let Some(address) = self.options.metrics else { return };
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let shown = Arc::clone(&self.shown);
                let take = move || Snapshot::take(shown.lock().unwrap_or_else(PoisonError::into_inner).clone());
                tokio::spawn(metrics::serve(listener, metrics::Handle::new(take)));
            }
            Err(error) => {
                tracing::warn!("no metrics: cannot listen on {address}: {error}; --metrics ADDRESS chooses another")
            }
        }
    }

    fn now(&self) -> Time {
        self.began.elapsed()
    }

    async fn run(&mut self) -> Result<(), Failed> {
        let listening = |source| Failed::System { doing: "listen", source };
        let mut events = Events::begin().map_err(listening)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(listening)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(listening)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(listening)?;
        let mut processes = every(PROCESSES_EVERY);
        let watchdog = self.supervisor.watchdog();
        let mut watchdog_tick = every(watchdog.unwrap_or(Duration::from_secs(3600)));
        self.reload(None);
        loop {
            self.proceed();
            if self.options.once
                && self.state.generation + u64::from(self.state.refused.is_some()) > 0
                && self.machine.is_settled()
            {
                return self.verdict();
            }
            let now = self.now();
            let waits = self.waiting.iter().map(|waiting| waiting.until);
            let deadline = self.machine.deadline(now).into_iter().chain(waits).min();
            let pause = sleep(deadline.map_or(Duration::from_secs(3600), |at| at.saturating_sub(now)));
            let (machine, has_rules) = (&self.machine, self.machine.has_rules());
            let input = tokio::select! {
                () = pause => continue,
                heard = events.heard(|name| machine.managed().any(|managed| managed == name)) => {
                    heard.map_err(listening)?;
                    Input::Event
                }
                Some(finished) = self.finished.1.recv() => match self.finish(finished) {
                    Some(input) => input,
                    None => continue,
                },
                Some((request, peer, answer)) = self.requests.recv() => {
                    self.serve(request, peer, answer);
                    continue;
                }
                members = counted(&mut self.counting) => match self.hosts_are(members) {
                    Some(input) => input,
                    None => continue,
                },
                _ = hangup.recv() => {
                    self.reload(None);
                    continue;
                }
                _ = processes.tick(), if has_rules => Input::Processes(host::processes()),
                _ = watchdog_tick.tick(), if watchdog.is_some() => {
                    if self.working_since.is_none_or(|since| since.elapsed() < STUCK) {
                        self.supervisor.say("WATCHDOG=1");
                    }
                    continue;
                }
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            };
            self.put_in(input);
        }
        self.supervisor.say("STOPPING=1");
        tracing::info!("stopping; the limits stay in force, `qjump unload --all` takes them off");
        Ok(())
    }

    fn put_in(&mut self, input: Input) {
        let now = self.now();
        self.machine.input(now, input).iter().for_each(log::say);
    }

    /// Begins what is to be done, and tells others how things are.
    fn proceed(&mut self) {
        let now = self.now();
        if let Some(command) = self.machine.next(now) {
            // Before the command, so that whoever comes after this agent knows of what it may leave.
            if let Err(error) = self.notes.write(self.machine.managed()) {
                tracing::warn!("cannot note which interfaces are managed: {error}");
            }
            self.execute(command);
        }
        let state = self.machine.state();
        if state.ready && !self.state.ready {
            self.supervisor.say("READY=1");
            tracing::info!("ready after {} ms", self.began.elapsed().as_millis());
            // For the first change to be a quick one.
            let _ = self.worker.send(Box::new(|| {
                drop(dataplane::recognise());
                dataplane::sys::give_memory_back();
            }));
        }
        let broken = state.interfaces.values().flatten().count();
        let status = format!("STATUS={} interfaces, {broken} not as they should be", state.interfaces.len());
        if status != self.status {
            self.supervisor.say(&status);
            self.status = status;
        }
        let ended: Vec<Waiting> = {
            let settled = self.machine.is_settled();
            self.waiting.extract_if(.., |waiting| settled || waiting.until <= now).collect()
        };
        for Waiting { answer, changes, .. } in ended {
            // Who has gone meanwhile does not want it any more.
            let _ =
                answer.send(json!({"ok": true, "changes": changes, "agent": to_json(&state, self.members().as_ref())}));
        }
        self.tell(&state);
        self.state = state;
    }

    /// Lets metrics know.
    fn tell(&self, state: &State) {
        let wrong = state.problems();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.generation = state.generation;
        shown.ready = match (state.ready, state.drained, wrong.is_empty()) {
            (_, true, _) => Err("everything was taken off".to_owned()),
            (false, ..) => {
                Err(state.refused.clone().unwrap_or_else(|| "not every interface has had its turn".to_owned()))
            }
            (true, _, true) => Ok(()),
            (true, _, false) => Err(wrong.join("; ")),
        };
        shown.members = self.members().or_else(|| (state.hosts > 0).then(|| Members::fixed(state.hosts)));
    }

    /// What is known of the members, if somebody counts them.
    fn members(&self) -> Option<Members> {
        self.counting.as_ref().map(|counting| counting.found.borrow().clone())
    }

    /// News of the members.
    fn hosts_are(&mut self, members: Members) -> Option<Input> {
        let counting = self.counting.as_mut()?;
        if counting.failure != members.failure {
            if let Some(why) = &members.failure {
                tracing::warn!("the number of hosts stays as it is: {}: {why}", members.source);
            }
            counting.failure.clone_from(&members.failure);
        }
        let hosts = members.hosts?;
        let input = Input::Members(Some(machine::Members { hosts, source: members.source }));
        if self.machine.desired().is_none() {
            // What could not be planned for want of a number.
            self.put_in(input);
            self.reload(None);
            return None;
        }
        Some(input)
    }

    /// Counts members where the configuration says, from now on.
    fn count_by(&mut self, config: Option<members::Config>, in_force: Option<u32>) {
        if self.counting.as_ref().map(|counting| &counting.config) == config.as_ref() {
            return;
        }
        self.counting = None;
        self.put_in(Input::Members(None));
        if let Some(config) = config {
            let (sender, found) = watch::channel(config.unknown());
            let task = tokio::spawn(members::watch(config.clone(), in_force, sender)).abort_handle();
            self.counting = Some(Counting { config, found, task, failure: None });
        }
    }

    fn execute(&mut self, command: Command) {
        tracing::debug!("{}", name(&command));
        self.working_since = Some(Instant::now());
        let finished = self.finished.0.clone();
        let _ = self.worker.send(Box::new(move || drop(finished.send(Finished::Command(host::execute(&command))))));
    }

    fn finish(&mut self, finished: Finished) -> Option<Input> {
        match finished {
            Finished::Command(outcome) => {
                self.working_since = None;
                Some(Input::Done(outcome, chance()))
            }
            Finished::Config(read) => {
                self.take_over(*read);
                None
            }
        }
    }

    /// Takes a configuration that was read, or goes on with the one before.
    fn take_over(&mut self, read: Read) {
        let Read { desired, members, uncounted, in_force, answer } = read;
        if self.state.ready {
            // The end of RELOADING.
            self.supervisor.say("READY=1");
        }
        let first = self.machine.desired().is_none();
        if desired.is_ok() || first {
            self.count_by(members, in_force);
        }
        match desired {
            Ok(new) => {
                let changes = self.machine.desired().map_or_else(Vec::new, |old| old.difference(&new));
                for change in &changes {
                    tracing::info!("the configuration changes: {change}");
                }
                self.put_in(Input::Config(Ok(new)));
                self.note_reload(Ok(()));
                if let Some(answer) = answer {
                    self.waiting.push(Waiting { answer, changes, until: self.now() + RELOAD_PATIENCE });
                }
            }
            Err(why) => {
                if let Some(answer) = answer {
                    let _ = answer.send(refusal("refused", &why));
                }
                if first && uncounted {
                    tracing::info!("there is no plan until members are counted");
                } else {
                    self.note_reload(Err(why.clone()));
                    self.put_in(Input::Config(Err(why)));
                }
            }
        }
    }

    fn note_reload(&self, result: Result<(), String>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) => shown.reloads.applied += 1,
            Err(_) => shown.reloads.refused += 1,
        }
        shown.reloads.last = Some(Reload { at: SystemTime::now(), result });
    }

    /// Reads the configuration, for as many hosts as there are known to be.
    fn reload(&mut self, answer: Option<oneshot::Sender<Value>>) {
        if self.machine.desired().is_some() {
            let usec = dataplane::sys::monotonic_ns() / 1000;
            self.supervisor.say(&format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
        }
        let (finished, path) = (self.finished.0.clone(), self.options.config.clone());
        let known = self.counting.as_ref().map(|counting| (counting.config.clone(), counting.found.borrow().hosts));
        let _ = self.worker.send(Box::new(move || {
            let source = Source::read(&path);
            let file = source.as_ref().ok().map(|source| &source.file);
            let members = file.and_then(|file| file.members().cloned());
            // A number of another list says nothing.
            let (is_known, hosts) = match known {
                Some((config, hosts)) if Some(&config) == members.as_ref() => (true, hosts),
                _ => (false, None),
            };
            let uncounted = members.is_some() && hosts.is_none() && file.is_some_and(|file| file.hosts().is_none());
            let in_force = members.as_ref().filter(|_| !is_known).and_then(|_| host::hosts_in_force());
            let desired = source.and_then(|source| source.plan(hosts)).map_err(|error| error.to_string());
            let desired = desired.and_then(|desired| host::rehearse(&desired).map(|()| desired));
            let _ = finished.send(Finished::Config(Box::new(Read { desired, members, uncounted, in_force, answer })));
        }));
    }

    fn serve(&mut self, request: Request, peer: Peer, answer: oneshot::Sender<Value>) {
        match request {
            Request::Status {} => {
                let _ =
                    answer.send(json!({"ok": true, "agent": to_json(&self.machine.state(), self.members().as_ref())}));
            }
            Request::Reload {} => self.reload(Some(answer)),
            Request::Drain {} => {
                self.put_in(Input::Drain);
                self.waiting.push(Waiting { answer, changes: Vec::new(), until: self.now() + RELOAD_PATIENCE });
            }
            Request::Tag { level, pid, cgroup, unit, sndbuf } => {
                self.change_tags(peer, answer, pid, cgroup, unit, move |session, selector| {
                    let level =
                        Level::new(level).ok_or_else(|| refusal("usage", format!("there is no level {level}")))?;
                    if sndbuf.is_some_and(|bytes| !(1..=tag::MOST_SEND_BUFFER).contains(&bytes)) {
                        return Err(refusal("usage", "sndbuf is not between 1 and 2^30 bytes"));
                    }
                    let request = tag::Request { level, send_buffer: sndbuf, by: Some(peer.user) };
                    session.tag(selector, &request).map_err(refuse)
                });
            }
            Request::Untag { pid, cgroup, unit } => {
                self.change_tags(peer, answer, pid, cgroup, unit, |session, selector| {
                    session.untag(selector).map_err(refuse)
                });
            }
        }
    }

    fn change_tags(
        &self,
        peer: Peer,
        answer: oneshot::Sender<Value>,
        pid: Option<u32>,
        cgroup: Option<PathBuf>,
        unit: Option<String>,
        change: impl FnOnce(&mut Session, &Selector) -> Result<tag::Changed, Value> + Send + 'static,
    ) {
        let selector = match (pid, cgroup, unit) {
            (None, None, Some(unit)) => Selector::Unit(unit),
            (Some(_), None, None) | (None, Some(_), None) if !peer.is_near => {
                let why = "whoever asks from a PID namespace of its own means other processes and cgroups than the agent; give a unit, \
                           or ask from the host";
                let _ = answer.send(refusal("usage", why));
                return;
            }
            (Some(pid), None, None) => Selector::Process(pid),
            (None, Some(path), None) => Selector::Cgroup(path),
            _ => {
                let _ = answer.send(refusal("usage", "give one of pid, cgroup and unit"));
                return;
            }
        };
        let _ = self.worker.send(Box::new(move || {
            if answer.is_closed() {
                // Who has gone meanwhile does not want it any more.
                return;
            }
            let changed =
                Session::begin().map_err(refuse).and_then(|session| change(&mut session.tolerant(), &selector));
            let _ = answer.send(changed.map_or_else(
                |refusal| refusal,
                |changed| {
                    json!({
                        "ok": true,
                        "cgroup": changed.cgroup.path,
                        "level": changed.level.map(Level::number),
                        "sockets": changed.sockets.visited,
                        "problems": changed.problems(),
                    })
                },
            ));
        }));
    }

    /// Of an agent that runs once.
    fn verdict(&self) -> Result<(), Failed> {
        let state = self.machine.state();
        let problems: Vec<String> = state.problems().into_iter().chain(state.refused).collect();
        if problems.is_empty() { Ok(()) } else { Err(Failed::NotInForce(problems.join("\nqjump: "))) }
    }
}

fn refuse(error: tag::Error) -> Value {
    refusal(if error.is_usage() { "usage" } else { "failed" }, error)
}

fn name(command: &Command) -> String {
    match command {
        Command::Observe(wanted) => format!("look at {} interface(s)", wanted.len()),
        Command::Load(wanted) => {
            let names: Vec<&str> = wanted.iter().map(|wanted| wanted.interface.as_str()).collect();
            format!("load {}", names.join(", "))
        }
        Command::Unload(pins, _) => format!("unload {pins}"),
        Command::Assign(_) => "apply the rules".to_owned(),
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// A number from 0 to 1 that other hosts do not have at the same time.
fn chance() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(()) as f64 / u64::MAX as f64
}

/// As the control socket answers.
fn to_json(state: &State, members: Option<&Members>) -> Value {
    json!({
        "generation": state.generation,
        "refused": state.refused,
        "hosts": state.hosts,
        "hosts_source": state.hosts_source,
        "hosts_age_s": members.and_then(|members| members.age(Instant::now())).map(|age| age.as_secs()),
        "hosts_failure": members.and_then(|members| members.failure.clone()),
        "ready": state.ready,
        "drained": state.drained,
        "rules": state.rules,
        "interfaces": state.interfaces,
    })
}
