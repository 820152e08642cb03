//! The library for LD_PRELOAD, in real programs that nobody in particular runs.

use std::{
    fs,
    net::UdpSocket,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::{
    tag::live::{Kind, LiveSocket, each_socket},
    testbed::NetNs,
};
use qjump_tests::{
    link::{FAR, Link, binary, succeeded},
    nobody::{self, Folder},
};

/// The library, where nobody may read it.
fn library(folder: &Folder) -> Result<PathBuf> {
    folder.take(&binary().with_file_name("libqjump_preload.so")).context("`cargo xtask build` makes it")
}

/// A program of nobody's, with the library and a level.
fn with_level(program: impl AsRef<std::ffi::OsStr>, library: &Path, level: &str) -> Command {
    let mut command = nobody::command(program);
    command.env("LD_PRELOAD", library).env("QJUMP_LEVEL", level);
    command
}

fn streams(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// What `programs/sockets.c` says when the library gives level L, or, with `None`, when Linux alone decides.
fn expected(level: Option<u8>) -> String {
    let given = level.unwrap_or(0);
    let (low_delay, class_selector) = level.map_or((6, 0), |level| (level, level));
    let after_own = level.map_or(0, |_| 2);
    format!(
        "inherited 0, duplicated {given}\n\
         tcp v4 {given}\ntcp v6 {given}\nudp v4 {given}\nudp v6 {given}\nunix 0\n\
         accept {given}\naccept4 {given}\ndup2 {given}\ndup3 {given}\n\
         after IP_TOS 0x10: {low_delay}, tos 0x10\nafter IP_TOS 0xe0: {class_selector}, tos 0xe0\n\
         own SO_PRIORITY 2, then connect and IP_TOS: {after_own}\n\
         errno after success 42\ndup(-1): -1, Bad file descriptor\naccept(udp): -1, Operation not supported\n\
         setsockopt(stdout): -1, Socket operation on non-socket\nconnect: -1, Connection refused\n\
         threads: 0 wrong\ncancelled in accept: yes\nafter vfork {given}\n"
    )
}

#[test]
fn every_way_to_a_socket_leads_to_the_level() -> Result<()> {
    let folder = Folder::new()?;
    let library = library(&folder)?;
    let program = folder.compile(&Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/sockets.c"))?;
    let run = |command: &mut Command| -> Result<(String, String)> {
        let inherited = OwnedFd::from(UdpSocket::bind("127.0.0.1:0")?);
        let output = command.stdin(Stdio::from(inherited)).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(streams(&output))
    };
    for level in 0..=6 {
        let said = run(&mut with_level(&program, &library, &level.to_string()))?;
        assert_eq!(said, (expected(Some(level)), String::new()), "level {level}");
    }
    // Without the library, and with it but without a level: as Linux has it.
    assert_eq!(run(&mut nobody::command(&program))?, (expected(None), String::new()));
    let mut unset = nobody::command(&program);
    assert_eq!(run(unset.env("LD_PRELOAD", &library))?, (expected(None), String::new()));
    // What is no level is said once, and changes nothing.
    for (value, parts) in [
        ("7", ["QJUMP_LEVEL=7 does nothing", "CAP_NET_ADMIN", "qjump run --level 7"]),
        ("8", ["QJUMP_LEVEL='8' does nothing", "0 to 6", "qjump: "]),
        ("", ["QJUMP_LEVEL='' does nothing", "0 to 6", "qjump: "]),
        ("5 ", ["QJUMP_LEVEL='5 ' does nothing", "0 to 6", "qjump: "]),
        ("-1", ["QJUMP_LEVEL='-1' does nothing", "0 to 6", "qjump: "]),
    ] {
        let (out, error) = run(&mut with_level(&program, &library, value))?;
        assert_eq!(out, expected(None));
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    Ok(())
}

/// A web server and its client, each a Python program with an event loop or threads of its own.
#[test]
fn a_server_in_python_answers_at_its_level() -> Result<()> {
    let folder = Folder::new()?;
    let program = r#"
import asyncio, socket
def level(writer):
    return writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
async def answer(reader, writer):
    writer.write(b"%d" % level(writer))
    writer.close()
async def main():
    server = await asyncio.start_server(answer, "localhost", 0)
    for listener in server.sockets:
        reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        print(level(writer), (await reader.read()).decode())
asyncio.run(main())
"#;
    let output = with_level("/usr/bin/python3", &library(&folder)?, "4").args(["-c", program]).output()?;
    let (out, error) = streams(&output);
    assert!(output.status.success() && error.is_empty(), "{error}");
    assert!(!out.is_empty() && out.lines().all(|line| line == "4 4"), "{out}");
    Ok(())
}

/// A child of ours, ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The TCP sockets of a process, as soon as so many of them are connected.
fn connected(program: &Running, count: usize) -> Result<Vec<LiveSocket>> {
    let patience = Instant::now() + Duration::from_secs(20);
    loop {
        let mut sockets = Vec::new();
        each_socket(program.0.id(), |_, socket| {
            if socket.kind == Kind::Tcp {
                sockets.push(socket.clone());
            }
            Ok(())
        })?;
        if sockets.iter().filter(|socket| socket.remote.is_some()).count() >= count {
            return Ok(sockets);
        }
        ensure!(Instant::now() < patience, "not {count} connections: {sockets:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The control connection and four streams, with `--tos` set by the program itself, seen from outside.
#[test]
fn iperf3_has_its_level_on_both_sides() -> Result<()> {
    let (folder, netns) = (Folder::new()?, NetNs::new("preload")?);
    let library = library(&folder)?;
    let start = |level: &str, arguments: &[&str]| -> Result<Running> {
        netns.enter(|| {
            let mut command = with_level("/usr/bin/iperf3", &library, level);
            Ok(Running(command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
        })
    };
    let server = start("3", &["--server"])?;
    let patience = Instant::now() + Duration::from_secs(20);
    let listening = || -> Result<bool> {
        let mut found = false;
        each_socket(server.0.id(), |_, socket| {
            found |= socket.local.is_some();
            Ok(())
        })?;
        Ok(found)
    };
    while !listening()? {
        ensure!(Instant::now() < patience, "iperf3 does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let client =
        start("5", &["--client", "127.0.0.1", "--time", "30", "--parallel", "4", "--bitrate", "1M", "--tos", "0x10"])?;
    for (program, level) in [(&client, 5), (&server, 3)] {
        let sockets = connected(program, 5)?;
        assert!(sockets.iter().all(|socket| socket.priority == level), "{sockets:?}");
    }
    Ok(())
}

/// What it is for: the limiter marks the packets of an unprivileged program with its level.
#[test]
fn packets_arrive_with_the_mark_of_the_level() -> Result<()> {
    let (folder, link) = (Folder::new()?, Link::new()?);
    let library = library(&folder)?;
    link.load(&[])?;
    let receiver = link.far.enter(|| {
        let socket = UdpSocket::bind((FAR.0, 7000))?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpRecvTos, &true)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(socket)
    })?;
    // Before it sends, the program asks for low delay itself.
    let program = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
         s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10); s.sendto(b'x', ('{}', 7000))",
        FAR.0
    );
    for (level, mark) in [("5", 0xa0), ("0", 0), ("7", 0)] {
        link.near.enter(|| {
            succeeded(&with_level("/usr/bin/python3", &library, level).args(["-c", &program]).output()?)?;
            Ok(())
        })?;
        assert_eq!(tos_of_next(&receiver)?, mark, "level {level}");
    }
    Ok(())
}

fn tos_of_next(socket: &UdpSocket) -> Result<u8> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::AsRawFd;
    let mut buffer = [0; 16];
    let mut parts = [std::io::IoSliceMut::new(&mut buffer)];
    let mut control = nix::cmsg_space!(u8);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let tos = message.cmsgs()?.find_map(|one| match one {
        ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
        _ => None,
    });
    tos.context("no TOS came with the packet")
}

/// The documentation says which programs are not covered; this is the reason for one of them.
#[test]
fn static_programs_are_not_covered() -> Result<()> {
    let folder = Folder::new()?;
    let source = folder.path("static.c");
    fs::write(
        &source,
        "#include <stdio.h>\n#include <sys/socket.h>\nint main(void) { int level = -1; socklen_t length = sizeof level; \
         getsockopt(socket(AF_INET, SOCK_DGRAM, 0), SOL_SOCKET, SO_PRIORITY, &level, &length); printf(\"%d\", level); }\n",
    )?;
    let program = folder.path("static");
    ensure!(Command::new("gcc").arg("-static").arg("-o").arg(&program).arg(&source).status()?.success(), "gcc");
    let output = with_level(&program, &library(&folder)?, "5").output()?;
    assert_eq!(streams(&output), ("0".to_owned(), String::new()));
    Ok(())
}
