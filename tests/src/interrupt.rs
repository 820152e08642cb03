//! Kills a command at a chosen change of the host: before the nth system call by which it would change something.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// How a command that was to be killed ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Killed before its nth change.
    Killed,
    /// By itself, since it makes fewer changes than that; whether it succeeded.
    Done(bool),
}

/// Runs a command until it is about to make its nth change (from 0) of the host, and kills it there.
///
/// Changes are what its main thread does to the BPF file system, to links and maps of eBPF, and to interfaces by
/// netlink; questions by netlink count as well, being sent in the same way.
pub fn kill_before_change(command: &mut Command, nth: usize) -> Result<End> {
    let stop_at_start = || {
        // SAFETY: the call has no memory arguments.
        match unsafe { libc::ptrace(libc::PTRACE_TRACEME) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: between fork and exec one system call is made.
    unsafe { command.pre_exec(stop_at_start) };
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot run it")?;
    let mut changes = 0;
    let mut entering = true;
    while let Some(stop) = next_stop(&child)? {
        // Signals and the exec itself stop it, too. None of those that matter here is worth handing on.
        if stop == (libc::SIGTRAP | SYSCALL_STOP) {
            if entering && is_change(&child)? {
                if changes == nth {
                    child.kill()?;
                    child.wait()?;
                    return Ok(End::Killed);
                }
                changes += 1;
            }
            entering = !entering;
        }
        proceed(&child)?;
    }
    Ok(End::Done(child.wait()?.success()))
}

/// Added to SIGTRAP where a system call stops (`PTRACE_O_TRACESYSGOOD`).
const SYSCALL_STOP: libc::c_int = 0x80;

/// The signal by which the child has stopped; `None` if it has ended, which [`Child::wait`] then tells.
fn next_stop(child: &Child) -> Result<Option<libc::c_int>> {
    // SAFETY: all zeros are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let (flags, id) = (libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT, child.id());
    // SAFETY: `info` is a place for the answer.
    let result = unsafe { libc::waitid(libc::P_PID, id, &raw mut info, flags) };
    ensure!(result == 0, "waitid: {}", io::Error::last_os_error());
    if matches!(info.si_code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED) {
        return Ok(None);
    }
    let mut status = 0;
    // SAFETY: `status` is a place for the answer.
    let result = unsafe { libc::waitpid(id as libc::pid_t, &raw mut status, 0) };
    ensure!(result > 0, "waitpid: {}", io::Error::last_os_error());
    let signal = libc::WSTOPSIG(status);
    // Set at every stop rather than at the first one alone: that is simpler.
    request(child, libc::PTRACE_SETOPTIONS, 0, libc::PTRACE_O_TRACESYSGOOD as usize)?;
    Ok(Some(signal))
}

fn proceed(child: &Child) -> Result<()> {
    match request(child, libc::PTRACE_SYSCALL, 0, 0) {
        // It has been ended meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => Ok(other?),
    }
}

fn request(child: &Child, kind: libc::c_uint, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: these requests take numbers, or an address and a length that belong together.
    let result = unsafe { libc::ptrace(kind, child.id() as libc::pid_t, address, data) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the system call at which the child has stopped may change the host.
fn is_change(child: &Child) -> Result<bool> {
    // struct ptrace_syscall_info: op, pads and arch in the first word, instruction and stack pointer, then the number of
    // the call and its arguments.
    const ENTRY: u8 = 1;
    let mut info = [0u64; 11];
    request(child, libc::PTRACE_GET_SYSCALL_INFO, size_of_val(&info), info.as_mut_ptr().expose_provenance())?;
    ensure!(info[0].to_ne_bytes()[0] == ENTRY, "the stop is no entry into a system call");
    let (number, command) = (info[3] as libc::c_long, info[4]);
    // BPF_MAP_UPDATE_ELEM, OBJ_PIN, LINK_CREATE, LINK_UPDATE, LINK_DETACH.
    const COMMANDS: [u64; 5] = [2, 6, 28, 29, 34];
    Ok(match number {
        libc::SYS_bpf => COMMANDS.contains(&command),
        libc::SYS_sendto | libc::SYS_sendmsg | libc::SYS_mkdirat | libc::SYS_unlinkat | libc::SYS_mount => true,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_mkdir | libc::SYS_unlink | libc::SYS_rmdir => true,
        _ => false,
    })
}
