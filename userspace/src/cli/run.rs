//! `qjump run`.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus},
};

use clap::Args;
use nix::{
    sys::{
        resource::{Resource, getrlimit, rlim_t, setrlimit},
        signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, raise, sigaction, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{Gid, Pid, Uid, User, getgrouplist, setgid, setgroups, setuid, write},
};

use super::{Failure, tag::GrantArgs};
use crate::tag::{
    Session,
    cgroup::{Cgroup, has_systemd},
};

/// Run an unmodified program at a level
///
/// The program starts in a cgroup of its own, which goes away when it has ended. Its exit status and signals pass
/// through: 126 if it cannot be executed, 127 if it is not there.
#[derive(Args)]
pub struct RunCommand {
    #[command(flatten)]
    grant: GrantArgs,
    /// User to run the program as; without it, the caller's (with sudo, that is root)
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Make the cgroup below the caller's own, even where systemd runs and would make a scope
    #[arg(long)]
    no_scope: bool,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// Signals that somebody sends to a program when he means what it runs.
const FORWARDED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGWINCH,
];

impl RunCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        if has_systemd() && !self.no_scope {
            return Err(in_scope().into());
        }
        let user = self.user.as_deref().map(Credentials::of).transpose()?;
        let signals = Signals::take()?;
        // Before Linux 5.11 loading eBPF programs can take raising it.
        let memlock = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(io::Error::from)?;
        let mut session = Session::begin()?;
        self.grant.warn_if_ignored();
        let parent = session.hierarchy().of_process(None)?;
        let cgroup = session.make(&parent, &format!("qjump-run-{}", std::process::id()), &self.grant.request())?;
        let child = match self.spawn(&cgroup, user, &signals, memlock) {
            Ok(child) => child,
            Err(error) => {
                session.remove(&cgroup)?;
                eprintln!("qjump: cannot run {}: {error}", self.command[0].display());
                // As a shell does (POSIX, 2.8.2 Exit Status for Commands).
                return Err(Failure::Status(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }));
            }
        };
        // Others may change grants while it runs.
        drop(session);
        let status = signals.wait(child)?;
        clean_up(&cgroup);
        signals.end_like(status)
    }

    fn spawn(
        &self,
        cgroup: &Cgroup,
        user: Option<Credentials>,
        signals: &Signals,
        (soft, hard): (rlim_t, rlim_t),
    ) -> io::Result<Child> {
        let procs = File::options().write(true).open(cgroup.directory.join("cgroup.procs"))?;
        let before = signals.before;
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        let prepare = move || -> io::Result<()> {
            // The program must not tell a failure here from one of its own start, so it is said here and now.
            join(procs.as_fd()).unwrap_or_else(|_| give_up(c"qjump: cannot move the program into its cgroup\n"));
            setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)?;
            if let Some(user) = &user {
                user.assume().unwrap_or_else(|_| give_up(c"qjump: cannot become the user of --user\n"));
            }
            Ok(sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?)
        };
        // SAFETY: between fork and exec only system calls are made, on memory that was there before.
        unsafe { command.pre_exec(prepare) };
        command.spawn()
    }
}

/// Moves the calling process into the cgroup of this cgroup.procs.
fn join(procs: BorrowedFd<'_>) -> nix::Result<()> {
    write(procs, b"0").map(drop)
}

/// Ends a process between fork and exec.
fn give_up(message: &std::ffi::CStr) -> ! {
    // SAFETY: standard error may be closed, which is no harm.
    let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
    let _ = write(stderr, message.to_bytes());
    // SAFETY: ends the process without running what belongs to its parent.
    unsafe { libc::_exit(1) }
}

/// Starts this very command again in a scope of systemd's, whose cgroup it may then divide.
fn in_scope() -> anyhow::Error {
    let own: Vec<OsString> = std::env::args_os().skip(1).collect();
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return anyhow::Error::new(error).context("cannot find out where qjump is"),
    };
    // The new option goes right behind the verb: what follows may be the program's.
    let mut command = Command::new("systemd-run");
    command.args(["--scope", "--quiet", "--collect", "--property=Delegate=yes", "--"]).arg(program);
    command.arg(&own[0]).arg("--no-scope").args(&own[1..]);
    anyhow::Error::new(command.exec()).context(
        "cannot start systemd-run, which makes a scope for the program; with --no-scope the cgroup is made below the caller's",
    )
}

/// Who the program runs as.
struct Credentials {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Credentials {
    fn of(name: &str) -> Result<Self, Failure> {
        let failed = |error: nix::Error| Failure::Failed(format!("cannot look up user '{name}': {error}"));
        let user = User::from_name(name).map_err(failed)?;
        let user =
            user.ok_or_else(|| Failure::Usage(format!("there is no user '{name}'; `getent passwd` lists them")))?;
        let c_name = CString::new(name).map_err(|error| Failure::Usage(error.to_string()))?;
        let groups = getgrouplist(&c_name, user.gid).map_err(failed)?;
        Ok(Self { uid: user.uid, gid: user.gid, groups })
    }

    /// Becomes this user. The groups first: afterwards nobody may change them.
    fn assume(&self) -> nix::Result<()> {
        setgroups(&self.groups)?;
        setgid(self.gid)?;
        setuid(self.uid)
    }
}

/// The signals of this process while the program runs: held back, and read one by one.
///
/// The program is in the process group of this one. What the terminal sends (Ctrl-C, Ctrl-\\, Ctrl-Z, hang-up), it
/// sends to both, and stopping and continuing needs no help.
struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    fn take() -> io::Result<Self> {
        // Somebody may have started us with SIGCHLD ignored: then nobody learns how a child ended.
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler of anybody's is replaced by one that could run.
        unsafe { sigaction(Signal::SIGCHLD, &default) }?;
        let held: SigSet = FORWARDED.into_iter().chain([Signal::SIGCHLD]).collect();
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&held), Some(&mut before))?;
        Ok(Self { fd: SignalFd::with_flags(&held, SfdFlags::SFD_CLOEXEC)?, before })
    }

    /// Waits until the program has ended, and hands it what is sent to this process alone meanwhile.
    fn wait(&self, mut child: Child) -> io::Result<ExitStatus> {
        let pid = Pid::from_raw(child.id() as i32);
        loop {
            let Some(signal) = self.fd.read_signal()? else { continue };
            if signal.ssi_signo == libc::SIGCHLD as u32 {
                if let Some(status) = child.try_wait()? {
                    return Ok(status);
                }
                continue;
            }
            let from_terminal = signal.ssi_code == libc::SI_KERNEL;
            let from_child = signal.ssi_pid == child.id();
            if !from_terminal && !from_child {
                // It may have ended just now.
                let _ = kill(pid, Signal::try_from(signal.ssi_signo as i32).ok());
            }
        }
    }

    /// Ends as the program has ended.
    fn end_like(self, status: ExitStatus) -> Result<(), Failure> {
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(code), _) => Err(Failure::Status(code as u8)),
            (None, Some(number)) => {
                self.die_of(number);
                Err(Failure::Status(128 + number as u8))
            }
            (None, None) => {
                Err(Failure::Failed(format!("the program ended in a way that this system does not know: {status}")))
            }
        }
    }

    /// Has this process end by the signal, too, so that a shell sees what has happened. Returns if it does not.
    fn die_of(self, number: i32) {
        // The program has left its core already.
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        if let Ok(signal) = Signal::try_from(number) {
            let only: SigSet = [signal].into_iter().collect();
            // SAFETY: the default action runs no code of ours.
            let _ = unsafe { sigaction(signal, &default) };
            let _ = raise(signal);
            let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), None);
        }
    }
}

/// Takes the grant back, unless processes that the program has left behind still need it. The program's status counts
/// more than a failure here.
fn clean_up(cgroup: &Cgroup) {
    let remaining = Session::remaining(cgroup);
    if remaining > 0 {
        eprintln!(
            "qjump: {remaining} process(es) that the program has started still run; they keep their level, and {} goes \
             with the next change of tags after they have ended",
            cgroup.path
        );
        return;
    }
    if let Err(error) = Session::begin().and_then(|mut session| session.remove(cgroup)) {
        eprintln!("qjump: {} stays: {error}", cgroup.path);
    }
}
