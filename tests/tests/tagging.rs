//! `qjump run`, `tag`, `untag` and `tags`: programs as they are, and hosts as they should not be.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use qjump::tag::cgroup::Hierarchy;
use qjump_tests::{
    cgroups::{TestCgroup, command_in, sleeper_in},
    kernel::{has_options_of_datagrams, rounds},
    link::{Link, binary, failed, succeeded},
};
use serde_json::Value;

fn qjump(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> Result<Output> {
    let mut all = vec!["run", "--no-scope", "--level", "5"];
    all.extend(arguments);
    Ok(qjump(&all).output()?)
}

/// What `qjump tags` says of the cgroup at `path`.
fn tag(path: &str) -> Result<Option<Value>> {
    let output = succeeded(&qjump(&["tags", "--json"]).output()?)?;
    let tags: Value = serde_json::from_str(&output)?;
    ensure!(tags["schema_version"] == 1);
    Ok(tags["tags"].as_array().context("no tags")?.iter().find(|tag| tag["cgroup"] == path).cloned())
}

/// The cgroup of the program that `qjump run` with this number started.
fn cgroup_of(run: u32) -> Result<PathBuf> {
    let hierarchy = Hierarchy::find()?;
    Ok(hierarchy.of_process(None)?.directory.join(format!("qjump-run-{run}")))
}

fn path_of(directory: &Path) -> Result<String> {
    Ok(Hierarchy::find()?.at(directory)?.path)
}

/// A process that is ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sleep() -> Result<Running> {
    Ok(Running(Command::new("sleep").arg("60").spawn()?))
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        ensure!(Instant::now() < deadline, "{what}: not within 10 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Old kernels count eBPF programs as locked memory, so that loading them can take raising the limit: for qjump alone.
#[test]
fn a_program_has_the_limit_of_locked_memory_that_its_caller_had() -> Result<()> {
    let script = "ulimit -l 64 && exec \"$0\" run --no-scope --level 5 -- sh -c 'ulimit -l'";
    let output = Command::new("sh").args(["-c", script]).arg(binary()).output()?;
    assert_eq!(succeeded(&output)?.trim(), "64");
    Ok(())
}

#[test]
fn exit_statuses_pass_through_and_the_cgroup_goes() -> Result<()> {
    for (command, status) in [
        (["sh", "-c", "exit 0"], Some(0)),
        (["sh", "-c", "exit 7"], Some(7)),
        (["sh", "-c", "exit 255"], Some(255)),
        (["/nonexistent/program", "", ""], Some(127)),
        (["/etc/passwd", "", ""], Some(126)),
    ] {
        let child = qjump(&["run", "--no-scope", "--level", "5", "--"])
            .args(command)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let cgroup = cgroup_of(child.id())?;
        let output = child.wait_with_output()?;
        assert_eq!(output.status.code(), status, "{command:?}");
        assert!(!cgroup.exists(), "{command:?} left {}", cgroup.display());
        if matches!(status, Some(126 | 127)) {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(error.contains(&format!("cannot run {}", command[0])), "{error}");
        }
    }
    // A signal is what it died of, for a shell as well.
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGSEGV] {
        let output = run(&["sh", "-c", &format!("kill -{} $$", signal as i32)])?;
        assert_eq!(output.status.signal(), Some(signal as i32));
        assert!(!output.status.core_dumped());
    }
    assert_eq!(failed(&qjump(&["run", "--level", "8", "true"]).output()?).0, 64);
    assert_eq!(failed(&qjump(&["run", "--level", "3"]).output()?).0, 64);
    Ok(())
}

/// Prints a new UDP socket's SO_PRIORITY and send buffer, and those of both ends of a TCP connection.
const PYTHON: &str = r"
import socket
def show(s): print(s.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY), s.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
for family, address in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    u = socket.socket(family, socket.SOCK_DGRAM); u.connect((address, 9)); show(u)
    u = socket.socket(family, socket.SOCK_DGRAM); u.sendto(b'x', (address, 9)); show(u)
    l = socket.socket(family); l.bind((address, 0)); l.listen()
    c = socket.socket(family); c.connect(l.getsockname()); show(c)
    a = l.accept()[0]; show(a)
";

#[test]
fn every_socket_of_an_interpreted_program_has_level_and_send_buffer() -> Result<()> {
    // The kernel doubles what it is given (socket(7)).
    let text = succeeded(&run(&["--sndbuf", "20000", "--", "python3", "-c", PYTHON])?)?;
    // The second one of each four sends a datagram unconnected.
    let is_set = |number: &usize| has_options_of_datagrams() || number % 4 != 1;
    let buffers: Vec<&str> =
        text.lines().enumerate().filter(|(number, _)| is_set(number)).map(|(_, line)| line).collect();
    assert_eq!(buffers, vec!["5 40000"; if has_options_of_datagrams() { 8 } else { 6 }], "{text}");
    assert_eq!(text.lines().count(), 8);
    let text = succeeded(&run(&["python3", "-c", PYTHON])?)?;
    let levels: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(levels, ["5"; 8]);
    assert!(!text.contains(" 40000"), "{text}");
    Ok(())
}

#[test]
fn a_static_program_is_as_good_as_any() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("qjump-static-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let (source, program) = (folder.join("level.c"), folder.join("level"));
    fs::write(
        &source,
        "#include <stdio.h>\n#include <sys/socket.h>\nint main(void) {\n  int p = -1; socklen_t n = sizeof p;\n  \
         int s = socket(AF_INET, SOCK_DGRAM, 0);\n  getsockopt(s, SOL_SOCKET, SO_PRIORITY, &p, &n);\n  \
         printf(\"%d\\n\", p);\n  p = 2; setsockopt(s, SOL_SOCKET, SO_PRIORITY, &p, n);\n  \
         getsockopt(s, SOL_SOCKET, SO_PRIORITY, &p, &n);\n  printf(\"%d\\n\", p);\n  p = 6;\n  \
         printf(\"%d \", setsockopt(s, SOL_SOCKET, SO_PRIORITY, &p, n));\n  \
         getsockopt(s, SOL_SOCKET, SO_PRIORITY, &p, &n);\n  printf(\"%d\\n\", p);\n}\n",
    )?;
    let built = Command::new("gcc").arg("-static").arg(&source).arg("-o").arg(&program).output()?;
    succeeded(&built)?;
    let text = succeeded(&run(&[program.to_str().context("a path")?])?)?;
    fs::remove_dir_all(folder)?;
    // It may ask for less; and asking for more succeeds and gives what is granted.
    assert_eq!(text, "5\n2\n0 5\n");
    Ok(())
}

#[test]
fn the_program_runs_as_whom_it_should() -> Result<()> {
    let text =
        succeeded(&run(&["--user", "nobody", "--", "sh", "-c", "id -u; id -G; grep CapEff /proc/self/status"])?)?;
    assert_eq!(text, "65534\n65534\nCapEff:\t0000000000000000\n");
    let (status, error) = failed(&run(&["--user", "no-such-user", "--", "true"])?);
    assert_eq!(status, 64);
    assert!(error.contains("there is no user 'no-such-user'"), "{error}");
    Ok(())
}

/// Lets signals do to a new process what they usually do: a test that runs in the background may have been told to ignore
/// some, and a shell cannot trap those. System calls only, for between fork and exec.
fn heed(signals: &[Signal]) -> std::io::Result<()> {
    for &signal in signals {
        // SAFETY: no handler is installed, and none is replaced that anybody counts on in a new process.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }?;
    }
    Ok(())
}

#[test]
fn signals_reach_the_program_once() -> Result<()> {
    let script = "for s in HUP INT QUIT TERM USR1 USR2; do trap \"echo $s\" $s; done; trap 'exit 9' ALRM; echo ready; \
                  while :; do sleep 0.05; done";
    let signals = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];
    let mut command = qjump(&["run", "--no-scope", "--level", "5", "--", "sh", "-c", script]);
    command.stdout(Stdio::piped()).process_group(0);
    // SAFETY: between fork and exec, system calls only.
    unsafe {
        command.pre_exec(move || heed(&signals));
    }
    let mut child = Running(command.spawn()?);
    let mut words = BufReader::new(child.0.stdout.take().context("no stdout")?).lines();
    let mut next = || -> Result<String> { Ok(words.next().context("it has ended")??) };
    assert_eq!(next()?, "ready");
    let pid = Pid::from_raw(child.0.id() as i32);
    for signal in signals {
        kill(pid, signal)?;
        assert_eq!(format!("SIG{}", next()?), signal.as_str());
    }
    kill(pid, Signal::SIGALRM)?;
    assert_eq!(child.0.wait()?.code(), Some(9));
    Ok(())
}

/// A pseudo-terminal: its two ends.
fn terminal() -> Result<(OwnedFd, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: both are places for descriptors; the optional arguments are null.
    let result = unsafe { libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()) };
    ensure!(result == 0, "openpty: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just given these descriptors to us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) })
}

/// What Ctrl-C and Ctrl-Z send, they send to both processes; neither may get it twice, and a shell must be able to
/// stop and continue them.
#[test]
fn a_terminal_controls_it_as_if_it_were_the_program() -> Result<()> {
    let (master, slave) = terminal()?;
    let mut shell = Command::new("bash");
    shell.args(["--norc", "--noprofile", "-i"]).env("PS1", "").env("TERM", "dumb");
    shell.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    // SAFETY: between fork and exec, system calls only.
    unsafe {
        shell.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            heed(&[Signal::SIGINT, Signal::SIGQUIT])
        });
    }
    let mut shell = Running(shell.spawn()?);
    drop(shell.0.stdin.take());
    let mut keyboard = fs::File::from(master.try_clone()?);
    let reader = fs::File::from(master);
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    let mut shown = String::new();
    let mut expect = |text: &str| -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut buffer = [0; 4096];
            if let Ok(length) = (&reader).read(&mut buffer) {
                shown += &String::from_utf8_lossy(&buffer[..length]);
            }
            if let Some(at) = shown.find(text) {
                let rest = shown.split_off(at + text.len());
                return Ok(std::mem::replace(&mut shown, rest));
            }
            ensure!(Instant::now() < deadline, "'{text}' did not appear in: {shown}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let script = "trap 'n=$((n+1)); echo \"int:\"$n' INT; echo \"rea\"dy; while :; do sleep 0.05; done";
    let line = format!(
        "stty -echo; {} run --no-scope --level 5 -- sh -c '{}'\n",
        binary().display(),
        script.replace('\'', "'\\''")
    );
    keyboard.write_all(line.as_bytes())?;
    expect("ready")?;
    keyboard.write_all(b"\x03")?;
    expect("int:1")?;
    std::thread::sleep(Duration::from_millis(300));
    keyboard.write_all(b"\x1a")?;
    let before = expect("Stopped")?;
    assert!(!before.contains("int:2"), "one Ctrl-C came twice: {before}");
    keyboard.write_all(b"fg\n")?;
    expect("run --no-scope")?;
    std::thread::sleep(Duration::from_millis(200));
    keyboard.write_all(b"\x03")?;
    expect("int:2")?;
    // A program that does not trap it is ended by it, and the shell sees that.
    keyboard.write_all(b"\x1a")?;
    expect("Stopped")?;
    keyboard.write_all(b"kill -KILL %1; fg; echo \"sta\"tus\n")?;
    expect("status")?;
    Ok(())
}

#[test]
fn daemons_keep_their_level_and_are_mentioned() -> Result<()> {
    // What stays behind must not hold our pipes.
    let child =
        qjump(&["run", "--no-scope", "--level", "4", "--", "sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
    let cgroup = cgroup_of(child.id())?;
    let output = child.wait_with_output()?;
    assert_eq!(output.status.code(), Some(0));
    let daemon: i32 = String::from_utf8(output.stdout)?.trim().parse()?;
    let error = String::from_utf8(output.stderr)?;
    assert!(error.contains("1 process(es) that the program has started still run"), "{error}");
    let path = path_of(&cgroup)?;
    let shown = tag(&path)?.context("it is not tagged any more")?;
    assert_eq!((&shown["level"], &shown["processes"], &shown["over"]), (&4.into(), &1.into(), &false.into()));
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    wait_until("the daemon ends", || {
        !fs::read_to_string(cgroup.join("cgroup.events")).unwrap().contains("populated 1")
    })?;
    assert_eq!(tag(&path)?.context("gone too soon")?["over"], true);
    // The next change of any kind removes it.
    succeeded(&run(&["true"])?)?;
    assert!(!cgroup.exists());
    assert_eq!(tag(&path)?, None);
    Ok(())
}

#[test]
fn tags_say_what_is_tagged_by_whom_and_how_many_sockets_there_are() -> Result<()> {
    let top = TestCgroup::new()?;
    let script = "import socket,sys\n\
                  s=[socket.socket(socket.AF_INET,socket.SOCK_DGRAM) for _ in range(3)]\n\
                  print('ready',flush=True); sys.stdin.readline()\n\
                  s[0].setsockopt(socket.SOL_SOCKET,socket.SO_PRIORITY,1)\n\
                  print([x.getsockopt(socket.SOL_SOCKET,socket.SO_PRIORITY) for x in s],flush=True); sys.stdin.readline()\n\
                  print([x.getsockopt(socket.SOL_SOCKET,socket.SO_PRIORITY) for x in s],flush=True); sys.stdin.readline()\n";
    let mut command = command_in(&top.directory, "python3");
    let child = command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut child = Running(child);
    let mut words = BufReader::new(child.0.stdout.take().context("no stdout")?).lines();
    let mut keyboard = child.0.stdin.take().context("no stdin")?;
    assert_eq!(words.next().context("ended")??, "ready");

    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    let mut tagging = qjump(&["tag", "--level", "6", "--sndbuf", "30000", "--cgroup", &top.path()]);
    let text = succeeded(&tagging.env("SUDO_UID", "1234").output()?)?;
    assert!(text.contains("at level 6; 3 live socket(s) moved"), "{text}");
    keyboard.write_all(b"\n")?;
    assert_eq!(words.next().context("ended")??, "[1, 6, 6]");
    let shown = tag(&top.path())?.context("it is not shown")?;
    assert_eq!(shown["granted_by_uid"], 1234);
    assert!(shown["granted_at_unix_ns"].as_u64().is_some_and(|time| time >= before), "{shown}");
    assert_eq!(
        (&shown["sndbuf_bytes"], &shown["owns_cgroup"], &shown["processes"]),
        (&30_000.into(), &false.into(), &1.into())
    );
    assert_eq!(
        (&shown["sockets"]["6"], &shown["sockets"]["1"], &shown["sockets"]["0"]),
        (&2.into(), &1.into(), &0.into())
    );
    let text = succeeded(&qjump(&["tags"]).output()?)?;
    assert!(text.contains(&top.path()) && text.contains("2 at level 6, 1 at level 1"), "{text}");

    let text = succeeded(&qjump(&["untag", "--cgroup", &top.path()]).output()?)?;
    assert!(text.contains("untagged; 3 live socket(s) moved"), "{text}");
    keyboard.write_all(b"\n")?;
    assert_eq!(words.next().context("ended")??, "[0, 0, 0]");
    assert_eq!(tag(&top.path())?, None);
    let (status, error) = failed(&qjump(&["untag", "--cgroup", &top.path()]).output()?);
    assert_eq!(status, 1);
    assert!(error.contains("has no grant of its own"), "{error}");
    Ok(())
}

#[test]
fn a_process_gets_a_cgroup_of_its_own_and_returns_to_its_old_one() -> Result<()> {
    let top = TestCgroup::new()?;
    let process = Running(sleeper_in(&top.directory)?);
    let pid = process.0.id();
    let at =
        || fs::read_to_string(format!("/proc/{pid}/cgroup")).map(|text| text.lines().last().unwrap_or("").to_owned());
    for level in ["3", "7"] {
        succeeded(&qjump(&["tag", "--pid", &pid.to_string(), "--level", level]).output()?)?;
        assert_eq!(at()?, format!("0::{}/qjump-{pid}", top.path()));
    }
    let shown = tag(&format!("{}/qjump-{pid}", top.path()))?.context("it is not shown")?;
    assert_eq!((&shown["level"], &shown["owns_cgroup"]), (&7.into(), &true.into()));
    succeeded(&qjump(&["untag", "--pid", &pid.to_string()]).output()?)?;
    assert_eq!(at()?, format!("0::{}", top.path()));
    assert!(!top.directory.join(format!("qjump-{pid}")).exists());

    // One that has its level from a cgroup cannot be untagged alone.
    succeeded(&qjump(&["tag", "--cgroup", &top.path(), "--level", "2"]).output()?)?;
    let (status, error) = failed(&qjump(&["untag", "--pid", &pid.to_string()]).output()?);
    assert_eq!(status, 1);
    assert!(error.contains(&format!("qjump untag --cgroup {}", top.path())), "{error}");
    // Its cgroup and tag go when it has ended.
    succeeded(&qjump(&["tag", "--pid", &pid.to_string(), "--level", "4"]).output()?)?;
    drop(process);
    succeeded(&run(&["true"])?)?;
    assert!(!top.directory.join(format!("qjump-{pid}")).exists());
    Ok(())
}

#[test]
fn a_unit_is_found_by_its_cgroup() -> Result<()> {
    let top = TestCgroup::new()?;
    let unit = format!("qjtest-{}.service", std::process::id());
    let directory = top.below(&unit)?;
    let text = succeeded(&qjump(&["tag", "--unit", &unit, "--level", "5"]).output()?)?;
    assert!(text.contains(&format!("{}/{unit}: at level 5", top.path())), "{text}");
    succeeded(&qjump(&["untag", "--unit", unit.trim_end_matches(".service")]).output()?)?;
    // Twice is one too many.
    let other = top.below("user")?.join(&unit);
    fs::create_dir(&other)?;
    let (status, error) = failed(&qjump(&["tag", "--unit", &unit, "--level", "5"]).output()?);
    assert_eq!(status, 1);
    assert!(error.contains("more than once") && error.contains(&format!("{}/{unit}", top.path())), "{error}");
    fs::remove_dir(other)?;
    fs::remove_dir(directory)?;
    let (status, error) = failed(&qjump(&["tag", "--unit", &unit, "--level", "5"]).output()?);
    assert_eq!(status, 1);
    assert!(error.contains("is the unit") && error.contains("systemctl status"), "{error}");
    Ok(())
}

#[test]
fn a_thread_of_the_kernel_is_no_program() -> Result<()> {
    // kthreadd has this number in every PID namespace that shows threads of the kernel.
    if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        let (status, error) = failed(&qjump(&["tag", "--pid", "2", "--level", "5"]).output()?);
        assert_eq!(status, 1);
        assert!(error.contains("thread of the kernel") && error.contains("ps -p 2"), "{error}");
        assert!(tag("/qjump-2")?.is_none());
    }
    Ok(())
}

#[test]
fn a_level_that_no_interface_knows_is_warned_of() -> Result<()> {
    let link = Link::new()?;
    let warning = |level: &str| -> Result<String> {
        let output = qjump(&["run", "--no-scope", "--level", level, "--", "true"]).output()?;
        succeeded(&output)?;
        Ok(String::from_utf8(output.stderr)?)
    };
    // Others of this host may be loaded; then the advice is another.
    let none = warning("3")?;
    assert!(none.contains("level 3 does nothing"), "{none}");
    assert_eq!(warning("0")?, "");
    link.load(&[])?;
    assert_eq!(warning("5")?, "");
    let unknown = warning("3")?;
    assert!(unknown.contains("has no level 3") && unknown.contains(&link.device), "{unknown}");
    let mut process = sleep()?;
    let pid = process.0.id().to_string();
    let output = qjump(&["tag", "--pid", &pid, "--level", "3"]).output()?;
    succeeded(&output)?;
    assert!(String::from_utf8(output.stderr)?.contains("has no level 3"));
    succeeded(&qjump(&["untag", "--pid", &pid]).output()?)?;
    process.0.kill()?;
    Ok(())
}

#[test]
fn under_ip_netns_exec_the_advice_is_nsenter() -> Result<()> {
    let link = Link::new()?;
    for verb in [&["run", "--no-scope", "--level", "5", "--", "true"][..], &["tag", "--pid", "1", "--level", "5"]] {
        let output = link.near.command(&binary().to_string_lossy()).args(verb).output()?;
        let (status, error) = failed(&output);
        assert_eq!(status, 1);
        assert!(error.contains("ip netns exec") && error.contains("nsenter --net="), "{error}");
    }
    Ok(())
}

#[test]
fn what_is_not_there_is_refused_and_nothing_is_left() -> Result<()> {
    let before = succeeded(&qjump(&["tags", "--json"]).output()?)?;
    let mut ended = sleep()?;
    ended.0.kill()?;
    ended.0.wait()?;
    let gone = ended.0.id().to_string();
    for (arguments, status, part) in [
        (["tag", "--pid", &gone, "--level", "5"], 1, "there is no process"),
        (["tag", "--pid", "x", "--level", "5"], 64, "invalid value"),
        (["tag", "--cgroup", "/no/such", "--level", "5"], 1, "no cgroup of version 2"),
        (["tag", "--cgroup", "/../etc", "--level", "5"], 1, "no cgroup of version 2"),
        (["tag", "--unit", "a/b.service", "--level", "5"], 64, "no name of a unit"),
        (["tag", "--unit", "no-such-unit", "--level", "5"], 1, "systemctl status"),
        (["tag", "--cgroup", "/", "--level", "9"], 64, "levels are 0 to 7"),
        (["tag", "--cgroup", "/", "--sndbuf", "0"], 64, "--sndbuf"),
        (["tag", "--level", "5", "--sndbuf", "9"], 64, "say what"),
        (["tag", "--pid", "1", "--unit", "x"], 64, "cannot be used with"),
    ] {
        let (code, error) = failed(&qjump(&arguments).output()?);
        assert!(code == status && error.contains(part), "{arguments:?}: {code}, {error}");
    }
    // A zombie still has a number, but nothing that could be tagged.
    let mut zombie = sleep()?;
    kill(Pid::from_raw(zombie.0.id() as i32), Signal::SIGKILL)?;
    let pid = zombie.0.id().to_string();
    wait_until("it is a zombie", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    })?;
    let output = qjump(&["tag", "--pid", &pid, "--level", "5"]).output()?;
    println!("a zombie: {:?} {}", output.status, String::from_utf8_lossy(&output.stderr));
    zombie.0.wait()?;
    succeeded(&run(&["true"])?)?;
    assert_eq!(succeeded(&qjump(&["tags", "--json"]).output()?)?, before);
    Ok(())
}

#[test]
fn processes_that_end_while_they_are_tagged_do_no_harm() -> Result<()> {
    let top = TestCgroup::new()?;
    let rounds = rounds(40);
    for delay in (0..rounds).map(|round| Duration::from_millis(80) * round / rounds) {
        let process = Running(command_in(&top.directory, "sleep").arg("60").spawn()?);
        let pid = process.0.id().to_string();
        let tagging =
            qjump(&["tag", "--pid", &pid, "--level", "5"]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        std::thread::sleep(delay);
        drop(process);
        let output = tagging.wait_with_output()?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(error.contains("there is no process"), "{error}");
        }
    }
    succeeded(&run(&["true"])?)?;
    assert!(!fs::read_dir(&top.directory)?.flatten().any(|entry| entry.path().is_dir()), "a cgroup was left");
    Ok(())
}

#[test]
fn a_cgroup_that_is_removed_takes_its_tag_along() -> Result<()> {
    let top = TestCgroup::new()?;
    let below = top.below("short")?;
    let id = Hierarchy::find()?.at(&below)?.id;
    succeeded(&qjump(&["tag", "--level", "5", "--cgroup"]).arg(&below).output()?)?;
    fs::remove_dir(&below)?;
    // The kernel takes a moment to let go of it.
    wait_until("the tag is over", || {
        let tags: Value = serde_json::from_slice(&qjump(&["tags", "--json"]).output().unwrap().stdout).unwrap();
        let shown = tags["tags"].as_array().unwrap().iter().find(|tag| tag["cgroup_id"] == id);
        shown.is_some_and(|shown| shown["over"] == true && shown["cgroup"].is_null())
    })?;
    // One of the same name is another cgroup.
    let again = top.below("short")?;
    let (_, error) = failed(&qjump(&["untag", "--cgroup"]).arg(&again).output()?);
    assert!(error.contains("has no grant of its own"), "{error}");
    let tags = succeeded(&qjump(&["tags", "--json"]).output()?)?;
    assert!(!tags.contains(&format!("\"cgroup_id\": {id},")), "{tags}");
    Ok(())
}

#[test]
fn many_at_once_take_turns() -> Result<()> {
    let runs: Vec<_> = (0..8)
        .map(|number| {
            qjump(&["run", "--no-scope", "--level", &number.to_string(), "--", "python3", "-c", PYTHON])
                .stdout(Stdio::piped())
                .spawn()
        })
        .collect();
    for (number, child) in runs.into_iter().enumerate() {
        let text = succeeded(&child?.wait_with_output()?)?;
        let level = format!("{number} ");
        // A connection that is accepted while somebody else's grant changes may read 0; its packets have their level.
        let is_right =
            |(place, line): (usize, &str)| line.starts_with(&level) || place % 4 == 3 && line.starts_with("0 ");
        assert!(text.lines().count() == 8 && text.lines().enumerate().all(is_right), "{text}");
    }
    Ok(())
}

/// `script` in mount, cgroup or other namespaces of its own, with $QJUMP.
fn unshared(options: &[&str], script: &str) -> Result<Output> {
    let mut command = Command::new("unshare");
    command.args(options).args(["sh", "-ec", script]).env("QJUMP", binary());
    Ok(command.output()?)
}

#[test]
fn hosts_without_usable_cgroups_are_told_so() -> Result<()> {
    let mount = Hierarchy::find()?.mount().display().to_string();
    for command in ["$QJUMP run --no-scope --level 5 true", "$QJUMP tag --level 5 --pid $$"] {
        let (status, error) = failed(&unshared(&["--mount"], &format!("umount {mount}; {command}"))?);
        assert_eq!(status, 1);
        assert!(error.contains("no cgroup2 file system that this command can see"), "{error}");

        let (status, error) = failed(&unshared(&["--mount"], &format!("mount -o remount,bind,ro {mount}; {command}"))?);
        assert_eq!(status, 1);
        assert!(error.contains("cgroups are mounted read-only here"), "{error}");
    }
    // In a cgroup namespace, a process outside of it has a path with "..".
    let top = TestCgroup::new()?;
    let outside = sleep()?;
    let script = format!(
        "echo 0 > {}/cgroup.procs; exec unshare --cgroup --mount sh -c 'umount {mount}; mount -t cgroup2 none {mount}; $QJUMP \
         tag --level 5 --pid {}'",
        top.directory.display(),
        outside.0.id()
    );
    let (status, error) = failed(&unshared(&["--mount"], &script)?);
    assert_eq!(status, 1);
    assert!(error.contains("outside of what is mounted here"), "{error}");
    Ok(())
}

#[test]
fn without_rights_there_is_a_clear_error() -> Result<()> {
    for arguments in [["run", "--no-scope", "--level", "5", "true"], ["tag", "--level", "5", "--cgroup", "/"]] {
        let mut command = qjump(&arguments);
        // SAFETY: between fork and exec, system calls only.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setgid(nix::unistd::Gid::from_raw(65_534))?;
                Ok(nix::unistd::setuid(nix::unistd::Uid::from_raw(65_534))?)
            });
        }
        let (status, error) = failed(&command.output()?);
        assert_eq!(status, 1);
        assert!(error.contains("missing CAP_BPF") && error.contains("sudo"), "{error}");
    }
    Ok(())
}

/// Where systemd runs, a scope of its makes the cgroup. Here it is a stand-in that says what it was asked for.
#[test]
fn where_systemd_runs_it_is_asked_for_a_scope() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("qjump-systemd-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let stand_in = folder.join("systemd-run");
    fs::write(&stand_in, "#!/bin/sh\necho \"$@\"\nwhile [ \"$1\" != -- ]; do shift; done; shift; exec \"$@\"\n")?;
    succeeded(&Command::new("chmod").arg("755").arg(&stand_in).output()?)?;
    let script = format!(
        "mount -t tmpfs none /run/systemd 2>/dev/null || (mkdir -p /run/systemd; mount -t tmpfs none /run/systemd); \
         mkdir /run/systemd/system; PATH={}:$PATH; $QJUMP run --level 5 -- sh -c 'echo \"$1\"; exit 3' sh 'a  b'",
        folder.display()
    );
    let output = unshared(&["--mount"], &script)?;
    fs::remove_dir_all(folder)?;
    let text = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(3), "{text} {}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("--scope --quiet --collect --property=Delegate=yes -- "), "{text}");
    assert!(text.ends_with("\na  b\n"), "{text}");
    Ok(())
}

/// iperf3, as the distribution ships it: every one of its connections, of either side, leaves at the level.
#[test]
fn iperf3_runs_at_a_level() -> Result<()> {
    use qjump_tests::{capture::Capture, link::Link};
    let link = Link::new()?;
    let load = ["load", "--interface", &link.device, "--hosts", "2", "--link-rate", "10gbit", "--max-packet", "1514"];
    let mut load = load.to_vec();
    load.extend(["--epsilon", "4us", "--level", "6:unlimited,claims=grant-only"]);
    succeeded(&link.qjump(&load)?)?;
    let near = ["run", "--no-scope", "--level", "6", "--", "iperf3"];
    let mut far = link.far.command("iperf3");
    let mut server = Running(far.args(["-s", "-1", "-p", "5300", "--forceflush"]).stdout(Stdio::piped()).spawn()?);
    // The server's first line says that it listens.
    let mut lines = BufReader::new(server.0.stdout.take().context("no stdout")?).lines();
    while !lines.next().context("the server has ended")??.contains("Server listening") {}
    let capture = Capture::new(&link)?;
    let mut client = link.command(&near);
    client.args(["-c", qjump_tests::link::FAR.0, "-p", "5300", "-P", "4", "-n", "1M", "--bidir"]);
    succeeded(&client.output()?)?;
    let seen = capture.take();
    let below = seen.iter().filter(|packet| packet.dscp != 48).count();
    println!("{} packets, {below} of them not at level 6", seen.len());
    assert!(seen.len() > 100);
    // What is left of a connection after its end has no grant.
    assert!(seen.iter().all(|packet| matches!(packet.dscp, 0 | 48)) && below <= 20, "{below} of {}", seen.len());
    Ok(())
}
