//! Running other programs.

use anyhow::{Context, bail};
use nix::libc::{SI_USER, c_int, c_void, siginfo_t};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};

/// Tells the person at the terminal what the task does now, on stderr: stdout belongs to the programs it runs.
#[macro_export]
macro_rules! say {
    ($($message:tt)*) => { eprintln!("xtask: {}", format_args!($($message)*)) };
}

/// Runs a step that must succeed for the task to go on. What it prints goes to stderr: it is no result of the task.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    command.stdout(std::io::stderr());
    let status = command.status().with_context(|| format!("cannot run {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a program for its answer: its stdout, or the reason why there is none, in one line.
pub fn ask(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("cannot run {name}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(complaint
        .lines()
        .find(|line| !line.trim().is_empty())
        .map_or_else(|| format!("{name} failed: {}", output.status), |line| format!("{name} says: {}", line.trim())))
}

/// Runs the program that a task is for, and hands its exit status on.
///
/// Such a program makes network namespaces and must take them down again when it is interrupted. So xtask does
/// not die before it: on Ctrl-C the terminal tells both and xtask waits; a signal sent to xtask alone, as by
/// `kill` or a service manager, is passed on.
pub fn attend(command: &mut Command) -> anyhow::Result<ExitCode> {
    let mut child = command.spawn().with_context(|| format!("cannot run {}", shown(command)))?;
    let pid = i32::try_from(child.id()).context("a process id out of range")?;
    CHILD.store(pid, Ordering::Relaxed);
    // A handler and not SIG_IGN: a program inherits what is ignored, but not what is handled.
    let action = SigAction::new(SigHandler::SigAction(pass_on), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only reads an atomic and calls kill, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    let status = child.wait().with_context(|| format!("cannot wait for {}", shown(command)));
    // From here on the process id may be another program's.
    CHILD.store(0, Ordering::Relaxed);
    Ok(ExitCode::from(exit_code(status?)))
}

/// The program that [`attend`] waits for, or 0.
static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel calls a handler that was set with SA_SIGINFO, as nix sets this one, with a valid pointer.
    let sender = unsafe { (*info).si_code };
    let child = CHILD.load(Ordering::Relaxed);
    // Codes up to SI_USER are signals that a process sent; those of the terminal reached the child as well.
    if sender <= SI_USER
        && child > 0
        && let Ok(signal) = Signal::try_from(signal)
    {
        // It fails when the child runs as root by sudo and xtask does not; there is nothing better to do then.
        let _ = kill(Pid::from_raw(child), signal);
    }
}

/// The exit status as a shell would report it: 128 + n for a program that signal n ended.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// The command as one would type it, for messages.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    format!("`{}`", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_pass_through() {
        assert_eq!(exit_code(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_code(ExitStatus::from_raw(64 << 8)), 64);
        assert_eq!(exit_code(ExitStatus::from_raw(Signal::SIGINT as i32)), 130);
    }

    #[test]
    fn a_failed_step_names_its_command() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert_eq!(error, "`sh -c exit 3` failed: exit status: 3");
    }

    #[test]
    fn an_answer_is_stdout_and_a_refusal_the_first_line_of_stderr() {
        assert_eq!(ask(Command::new("echo").arg("yes")).as_deref(), Ok("yes\n"));
        let refusal = ask(Command::new("sh").args(["-c", "echo >&2; echo no such thing >&2; echo more >&2; exit 1"]));
        assert_eq!(refusal, Err("sh says: no such thing".into()));
        assert!(ask(&mut Command::new("qjump-no-such-program")).unwrap_err().starts_with("cannot run"));
    }
}
