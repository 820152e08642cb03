//! `qjump assign`: rules move the live sockets of real programs, in whatever network namespace and cgroup.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use anyhow::{Context, Result, ensure};
use qjump::{
    config::File,
    tag::{
        assign::{AssignError, Host},
        live::{Family, Kind, LiveError, Walk, each_socket, processes_of},
    },
    testbed::NetNs,
};
use qjump_tests::{
    capture::Capture,
    cgroups::command_in,
    link::{Link, binary, failed, succeeded},
    nobody::{self, Folder},
};
use serde_json::Value;

/// A cgroup with one below it, removed when dropped.
struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = fields.find(|fields| fields[2] == "cgroup2").context("no cgroup2 is mounted")?[1].to_owned();
        let name = format!("qjump-assign-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let cgroup = Self { path: Path::new(&mount).join(name) };
        fs::create_dir_all(cgroup.inner())?;
        Ok(cgroup)
    }

    fn inner(&self) -> PathBuf {
        self.path.join("inner.service")
    }

    /// As it is written in rules.
    fn name(&self) -> Result<String> {
        Ok(format!("/{}", self.path.file_name().context("no name")?.to_string_lossy()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for directory in [self.inner(), self.path.clone()] {
            // It may have no tag.
            let _ = Command::new(binary()).args(["untag", "--cgroup"]).arg(directory).output();
        }
        // The deepest first.
        let mut directories = vec![self.path.clone()];
        for at in 0.. {
            let Some(directory) = directories.get(at) else { break };
            let below = fs::read_dir(directory).into_iter().flatten().flatten();
            let below: Vec<_> = below.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
            directories.extend(below);
        }
        for directory in directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// A program with a UDP socket on port 7000, a TCP connection to itself from port 7001 to port 7002, and the listener. When
/// told to, it sends a byte through the connection and says what levels its sockets have.
const PROGRAM: &str = r#"
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 7000))
listener = socket.create_server(("127.0.0.1", 7002))
client = socket.create_connection(("127.0.0.1", 7002), source_address=("127.0.0.1", 7001))
server = listener.accept()[0]
for line in sys.stdin:
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    sockets = (udp, listener, client, server)
    print(*(s.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) for s in sockets), flush=True)
"#;

struct Program {
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Program {
    fn start(netns: &NetNs, cgroup: &Path) -> Result<Self> {
        let mut child = netns.enter(|| {
            let mut command = Command::new("/usr/bin/python3");
            Ok(command.args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
        })?;
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string())?;
        let (say, hear) = child.stdin.take().zip(child.stdout.take()).context("no pipes")?;
        let mut program = Self { child, say, hear: BufReader::new(hear) };
        // From now on its sockets are there.
        ensure!(program.levels()? == "0 0 0 0", "not at level 0");
        Ok(program)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The levels of UDP socket, listener, client and server, as the program itself sees them.
    fn levels(&mut self) -> Result<String> {
        let mut line = String::new();
        writeln!(self.say, "levels?")?;
        self.hear.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CLUSTER: &str = "[cluster]\nhosts = 12\nlink-rate = \"10gbit\"\nmax-packet = 256\nepsilon = \"4us\"\n\n\
                       [[level]]\nlevel = 7\nfactor = 1\n\n[[level]]\nlevel = 5\nfactor = 4\n\n";

/// A configuration file with these rules, the first of which begins on line 15.
fn config(folder: &Folder, rules: &[String]) -> Result<PathBuf> {
    let path = folder.path("qjump.toml");
    let text: String = rules.iter().map(|rule| format!("[[assign]]\n{rule}\n\n")).collect();
    fs::write(&path, format!("{CLUSTER}{text}"))?;
    Ok(path)
}

fn assign(config: &Path, more: &[&str]) -> Result<Output> {
    Ok(Command::new(binary()).arg("assign").arg("--config").arg(config).args(more).output()?)
}

fn json(config: &Path, more: &[&str]) -> Result<Value> {
    let output = assign(config, &[&["--json"], more].concat())?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[test]
fn rules_move_live_sockets_and_a_dry_run_does_not() -> Result<()> {
    let (folder, cgroup) = (Folder::new()?, Cgroup::new()?);
    let (one, other) = (NetNs::new("assign0")?, NetNs::new("assign1")?);
    let mut outer = Program::start(&one, &cgroup.path)?;
    let mut inner = Program::start(&other, &cgroup.inner())?;
    let name = cgroup.name()?;
    // The same ports in two network namespaces: told apart by their cgroups, the nearest of which counts.
    let file = config(
        &folder,
        &[
            format!("level = 3\ncgroup = \"{name}\""),
            format!("level = 5\ncgroup = \"{name}/inner.service\""),
            format!("level = 7\ncgroup = \"{name}\"\nremote = \"127.0.0.0/8\"\nremote-port = 7002"),
            format!("level = 1\ncgroup = \"{name}\"\nlocal-port = 9"),
        ],
    )?;
    let seen = json(&file, &["--dry-run"])?;
    let sockets = seen["sockets"].as_array().context("no sockets")?;
    let mut rows: Vec<_> = sockets
        .iter()
        .map(|socket| {
            let number = |key: &str| socket[key].as_u64().unwrap_or(u64::MAX);
            let local = socket["local"].as_str().unwrap_or_default().to_owned();
            let remote = socket["remote"].as_str().unwrap_or("-").to_owned();
            assert_eq!((socket["program"].as_str(), number("priority")), (Some("python3"), 0));
            (number("pid") == u64::from(inner.pid()), local, remote, number("level"), number("rule_line"))
        })
        .collect();
    rows.sort();
    let row = |inner: bool, local: u16, remote: u16, level: u64, line: u64| {
        let address = |port: u16| format!("127.0.0.1:{port}");
        (inner, address(local), if remote == 0 { "-".to_owned() } else { address(remote) }, level, line)
    };
    let expected = [
        row(false, 7000, 0, 3, 15),
        row(false, 7001, 7002, 7, 23),
        row(false, 7002, 0, 3, 15),
        row(false, 7002, 7001, 3, 15),
        row(true, 7000, 0, 5, 19),
        row(true, 7001, 7002, 7, 23),
        row(true, 7002, 0, 5, 19),
        row(true, 7002, 7001, 5, 19),
    ];
    assert_eq!(rows, expected);
    let warnings = seen["warnings"].to_string();
    assert_eq!(seen["warnings"].as_array().map(Vec::len), Some(3), "{warnings}");
    for part in ["plan has no level 3", "plan has no level 1", "line 29", "no live socket", "^"] {
        assert!(warnings.contains(part), "{part}: {warnings}");
    }
    let text = assign(&file, &["--dry-run"])?;
    let table = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(table.contains("0 -> 7") && table.contains("would move 8 sockets; 0 have"), "{table}");
    assert!(table.contains("none -> 5") && table.contains("would tag 2 cgroups; 0 have"), "{table}");
    let warned = String::from_utf8_lossy(&text.stderr).into_owned();
    assert!(text.status.success() && warned.contains("qjump: warning: at line 29,"), "{warned}");
    assert_eq!((outer.levels()?, inner.levels()?), ("0 0 0 0".into(), "0 0 0 0".into()), "a dry run changes nothing");

    let done = json(&file, &[])?;
    assert_eq!(
        (&done["moved"], &done["settled"], &done["failed"], &done["closed"]),
        (&2.into(), &6.into(), &0.into(), &0.into())
    );
    assert_eq!((done["cgroups"].as_array().map(Vec::len), &done["settled_cgroups"]), (Some(2), &0.into()));
    assert_eq!((outer.levels()?, inner.levels()?), ("3 3 7 3".into(), "5 5 7 5".into()));
    let again = json(&file, &[])?;
    assert_eq!((&again["moved"], &again["settled"]), (&0.into(), &8.into()));
    assert_eq!((again["cgroups"].as_array().map(Vec::len), &again["settled_cgroups"]), (Some(0), &2.into()));
    Ok(())
}

/// A socket-activated service: somebody else holds its socket, too.
#[test]
fn of_the_processes_that_share_a_socket_the_most_specific_rule_counts() -> Result<()> {
    let (folder, cgroup) = (Folder::new()?, Cgroup::new()?);
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let holder = |within: &Path| -> Result<Child> {
        let child = Command::new("sleep").arg("60").stdin(Stdio::from(OwnedFd::from(socket.try_clone()?))).spawn()?;
        fs::write(within.join("cgroup.procs"), child.id().to_string())?;
        Ok(child)
    };
    let mut holders = [holder(&cgroup.path)?, holder(&cgroup.inner())?, holder(&cgroup.path)?];
    let name = cgroup.name()?;
    let rules = [format!("level = 5\ncgroup = \"{name}/inner.service\""), format!("level = 7\ncgroup = \"{name}\"")];
    let done = config(&folder, &rules).and_then(|file| json(&file, &[]));
    let pids = processes_of(&cgroup.path);
    let expected = holders.each_ref().map(Child::id);
    let walked = Walk::default().cgroup(&cgroup.path, |_, socket| {
        assert_eq!(socket.priority, 5);
        Ok(())
    });
    for holder in &mut holders {
        holder.kill()?;
        holder.wait()?;
    }
    done?;
    assert_eq!(qjump::socket::level(&socket)?.number(), 5);
    assert_eq!(pids?.into_iter().collect::<Vec<_>>(), expected);
    assert_eq!(walked?.visited, 1);
    Ok(())
}

/// A program with UDP sockets on ports 7000 and 7001. When told to, it sends a packet from each, and one from a new socket
/// on port 7002.
const SENDER: &str = r#"
import socket, sys
def udp(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("10.9.0.1", port))
    return s
old = [udp(7000), udp(7001)]
for line in sys.stdin:
    new = udp(7002)
    for s in old + [new]: s.sendto(b"x", ("10.9.0.2", 9))
    new.close()
    print(flush=True)
"#;

/// The sender in a cgroup of its own, on a host whose levels are all for grants alone.
struct Wire {
    link: Link,
    capture: Capture,
    sender: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
    // After the sender.
    cgroup: Cgroup,
    folder: Folder,
}

impl Wire {
    fn new() -> Result<Self> {
        let (link, cgroup, folder) = (Link::new()?, Cgroup::new()?, Folder::new()?);
        let levels: Vec<String> = (1..8).map(|level| format!("{level}:unlimited,claims=grant-only")).collect();
        let mut load = vec!["load", "--interface", &link.device, "--queue", "keep", "--hosts", "2"];
        load.extend(["--link-rate", "10gbit", "--max-packet", "1514", "--epsilon", "4us"]);
        load.extend(levels.iter().flat_map(|level| ["--level", level]));
        succeeded(&link.qjump(&load)?)?;
        let mut command = command_in(&cgroup.path, "nsenter");
        command.arg(format!("--net=/run/netns/{}", link.near.name())).args(["python3", "-c", SENDER]);
        let mut sender = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (say, hear) = sender.stdin.take().zip(sender.stdout.take()).context("no pipes")?;
        let capture = Capture::new(&link)?;
        let mut wire = Self { link, capture, sender, say, hear: BufReader::new(hear), cgroup, folder };
        ensure!(wire.levels()? == [0, 0, 0], "not at level 0");
        Ok(wire)
    }

    /// The levels of what arrives from the two old sockets and the new one.
    fn levels(&mut self) -> Result<[u8; 3]> {
        self.capture.take();
        writeln!(self.say, "send")?;
        self.hear.read_line(&mut String::new())?;
        let mut seen: Vec<_> = self.capture.take().iter().map(|packet| (packet.from, packet.dscp)).collect();
        seen.sort_unstable();
        let ports: Vec<u16> = seen.iter().map(|&(port, _)| port).collect();
        ensure!(ports == [7000, 7001, 7002] && seen.iter().all(|(_, dscp)| dscp % 8 == 0), "{seen:?}");
        Ok([seen[0].1 / 8, seen[1].1 / 8, seen[2].1 / 8])
    }

    /// A configuration with a level for the cgroup and one for its port 7001.
    fn rules(&self, cgroup: Option<u8>, port: Option<u8>) -> Result<PathBuf> {
        let name = self.cgroup.name()?;
        let cgroup = cgroup.map(|level| format!("level = {level}\ncgroup = \"{name}\""));
        let port = port.map(|level| format!("level = {level}\ncgroup = \"{name}\"\nlocal-port = 7001"));
        config(&self.folder, &cgroup.into_iter().chain(port).collect::<Vec<_>>())
    }

    /// What `qjump tags` says of the cgroup.
    fn tag(&self) -> Result<Option<Value>> {
        let tags: Value = serde_json::from_str(&succeeded(&self.link.qjump(&["tags", "--json"])?)?)?;
        let name = self.cgroup.name()?;
        Ok(tags["tags"].as_array().context("no tags")?.iter().find(|tag| tag["cgroup"] == *name).cloned())
    }

    fn by_hand(&self, arguments: &[&str]) -> Result<String> {
        succeeded(&self.link.qjump(&[arguments, &["--cgroup", &self.cgroup.name()?]].concat())?)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.sender.kill();
        let _ = self.sender.wait();
    }
}

#[test]
fn what_the_rules_say_is_what_arrives() -> Result<()> {
    let mut wire = Wire::new()?;
    let file = wire.rules(Some(5), Some(7))?;
    let seen = json(&file, &["--dry-run"])?;
    assert_eq!(seen["cgroups"][0]["level_before"], Value::Null);
    assert_eq!((&seen["cgroups"][0]["level"], &seen["cgroups"][0]["rule_line"]), (&5.into(), &15.into()));
    assert_eq!(seen["sockets"].as_array().map(Vec::len), Some(2), "{seen}");
    assert!(wire.tag()?.is_none());
    assert_eq!(wire.levels()?, [0, 0, 0], "a dry run changes nothing");

    assert_eq!(json(&file, &[])?["moved"], 1);
    assert_eq!(wire.levels()?, [5, 7, 5]);
    let tag = wire.tag()?.context("no tag")?;
    assert_eq!((&tag["level"], &tag["by_rule"]), (&5.into(), &true.into()));
    assert_eq!((&tag["sockets"]["5"], &tag["sockets"]["7"]), (&1.into(), &1.into()), "{tag}");
    let again = json(&file, &[])?;
    assert_eq!((&again["moved"], &again["settled"], &again["settled_cgroups"]), (&0.into(), &2.into(), &1.into()));
    assert_eq!(wire.tag()?.context("no tag")?["granted_at_unix_ns"], tag["granted_at_unix_ns"], "it is the same tag");

    // What rules gave, rules change.
    json(&wire.rules(Some(3), Some(1))?, &[])?;
    assert_eq!(wire.levels()?, [3, 1, 3]);
    json(&wire.rules(Some(3), None)?, &[])?;
    assert_eq!(wire.levels()?, [3, 3, 3]);
    // A socket's own rule holds while the tag of its cgroup comes and goes.
    json(&wire.rules(Some(3), Some(6))?, &[])?;
    wire.by_hand(&["untag"])?;
    assert_eq!(wire.levels()?, [0, 6, 0]);
    assert_eq!(json(&wire.rules(None, Some(2))?, &[])?["moved"], 1);
    assert_eq!(wire.levels()?, [0, 2, 0]);
    Ok(())
}

#[test]
fn what_a_person_granted_no_rule_changes_nor_exceeds() -> Result<()> {
    let mut wire = Wire::new()?;
    json(&wire.rules(Some(3), Some(7))?, &[])?;
    wire.by_hand(&["tag", "--level", "4"])?;
    assert_eq!(wire.levels()?, [4, 4, 4]);
    let name = wire.cgroup.name()?;
    let untag = format!("`qjump untag --cgroup {name}`");
    let conflict = wire.rules(Some(3), Some(7))?;
    let (code, error) = failed(&assign(&conflict, &[])?);
    let parts = ["line 15", "stays at level 4", "line 19", "1 socket(s) stay at level 4, not 7", &untag];
    for part in parts {
        assert!(code == 1 && error.contains(part), "{part}: {error}");
    }
    let dry = assign(&conflict, &["--dry-run"])?;
    let (shown, warned) = (succeeded(&dry)?, String::from_utf8_lossy(&dry.stderr).into_owned());
    assert!(shown.contains("stays at 4") && shown.contains("would tag 0 cgroups"), "{shown}");
    assert!(parts.iter().all(|part| warned.contains(part)), "{warned}");
    assert_eq!(wire.levels()?, [4, 4, 4]);
    let tag = wire.tag()?.context("no tag")?;
    assert_eq!((&tag["level"], &tag["by_rule"]), (&4.into(), &false.into()));

    // Less than the grant is for a rule to say, and so is the same.
    assert_eq!(json(&wire.rules(Some(4), Some(2))?, &[])?["moved"], 1);
    assert_eq!(wire.levels()?, [4, 2, 4]);
    assert_eq!(wire.tag()?.context("no tag")?["by_rule"], false, "it is still a person's");
    wire.by_hand(&["untag"])?;
    assert_eq!(wire.levels()?, [0, 2, 0]);
    Ok(())
}

#[test]
fn one_cgroup_that_cannot_be_tagged_leaves_all_as_they_were() -> Result<()> {
    let mut wire = Wire::new()?;
    let name = wire.cgroup.name()?;
    // Deeper than a grant can be, so that it is found, and refused when its turn comes.
    let deep = format!("inner.service{}", "/d".repeat(31));
    fs::create_dir_all(wire.cgroup.path.join(&deep))?;
    let check = |first: u8| -> Result<()> {
        let rules = [format!("level = {first}\ncgroup = \"{name}\""), format!("level = 6\ncgroup = \"{name}/{deep}\"")];
        let (code, error) = failed(&assign(&config(&wire.folder, &rules)?, &[])?);
        for part in ["line 19", "33 cgroups deep", "nothing was changed"] {
            assert!(code == 1 && error.contains(part), "{part}: {error}");
        }
        Ok(())
    };
    check(5)?;
    assert!(wire.tag()?.is_none());
    json(&wire.rules(Some(2), Some(7))?, &[])?;
    let before = wire.tag()?.context("no tag")?;
    check(5)?;
    assert_eq!(wire.tag()?.context("no tag")?, before);
    assert_eq!(wire.levels()?, [2, 7, 2]);
    Ok(())
}

#[test]
fn a_rule_whose_cgroup_is_not_there_does_not_stop_the_others() -> Result<()> {
    let mut wire = Wire::new()?;
    let name = wire.cgroup.name()?;
    let unit = format!("unit = \"qjump-none-{}\"", std::process::id());
    for (first, (wrong, why)) in
        [(5u8, (unit, "no cgroup below")), (4, (format!("cgroup = \"{name}/gone\""), "is no cgroup"))]
    {
        let rules = [format!("level = 6\n{wrong}"), format!("level = {first}\ncgroup = \"{name}\"")];
        let config = config(&wire.folder, &rules)?;
        let dry = assign(&config, &["--dry-run"])?;
        succeeded(&dry)?;
        assert!(String::from_utf8_lossy(&dry.stderr).contains(why), "{dry:?}");
        let output = assign(&config, &[])?;
        let (code, error) = failed(&output);
        assert!(code == 1 && error.contains(why) && error.contains("line "), "{code}: {error}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("tagged 1 cgroups"), "{text}");
        assert_eq!(wire.tag()?.context("no tag")?["level"], first);
        assert_eq!(wire.levels()?, [first; 3]);
    }
    Ok(())
}

#[test]
fn a_cgroup_that_is_removed_meanwhile_leaves_all_as_they_were() -> Result<()> {
    let mut wire = Wire::new()?;
    let name = wire.cgroup.name()?;
    let rules = [format!("level = 5\ncgroup = \"{name}\""), format!("level = 6\ncgroup = \"{name}/inner.service\"")];
    let rules = File::read(&config(&wire.folder, &rules)?)?.rules(|_| None).map_err(anyhow::Error::msg)?;
    let mut host = Host::change(&rules)?;
    let places = host.places(&rules)?.found;
    fs::remove_dir(wire.cgroup.inner())?;
    let error = host.tag(&places).expect_err("the second cgroup is gone");
    assert!(matches!(error, AssignError::Place { rule: 1, .. }), "{error}");
    drop(host);
    assert!(wire.tag()?.is_none());
    assert_eq!(wire.levels()?, [0, 0, 0]);
    Ok(())
}

/// Linux writes other things where ports are. Only root may have such sockets.
#[test]
fn raw_and_packet_sockets_have_no_ports() -> Result<()> {
    let netns = NetNs::new("assign3")?;
    let sockets: Vec<OwnedFd> = netns.enter(|| {
        let raw = |family: i32, protocol: i32| -> Result<OwnedFd> {
            // SAFETY: plain values.
            let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
            ensure!(fd >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: the kernel has just given this descriptor to us alone.
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        Ok(vec![raw(libc::AF_INET, libc::IPPROTO_ICMP)?, raw(libc::AF_INET6, 89)?, raw(libc::AF_PACKET, 0)?])
    })?;
    let mut found = Vec::new();
    each_socket(std::process::id(), |_, socket| {
        if sockets.iter().any(|own| own.as_raw_fd() == socket.fd) {
            found.push((socket.family, socket.kind, socket.local, socket.remote));
        }
        Ok(())
    })?;
    let expected = [(Family::V4, Kind::Raw), (Family::V6, Kind::Raw), (Family::Packet, Kind::Packet)];
    assert_eq!(found, expected.map(|(family, kind)| (family, kind, None, None)));
    Ok(())
}

#[test]
fn cgroups_that_are_threaded_or_gone() -> Result<()> {
    let cgroup = Cgroup::new()?;
    let netns = NetNs::new("assign2")?;
    fs::write(cgroup.inner().join("cgroup.type"), "threaded")?;
    let program = Program::start(&netns, &cgroup.path)?;
    fs::write(cgroup.inner().join("cgroup.threads"), program.pid().to_string())?;
    let mut visited = Vec::new();
    let count = Walk::default().cgroup(&cgroup.path, |_, socket| {
        visited.push(socket.local.map(|at| at.port()));
        Ok(())
    })?;
    assert_eq!((count.visited, count.failed.len(), count.unreachable), (4, 0, 0));
    visited.sort_unstable();
    assert_eq!(visited, [7000, 7001, 7002, 7002].map(Some));
    drop(program);
    let path = cgroup.path.clone();
    drop(cgroup);
    assert!(matches!(processes_of(&path), Err(LiveError::NoCgroup { .. })));
    Ok(())
}

#[test]
fn mistakes() -> Result<()> {
    let folder = Folder::new()?;
    let check = |rules: &[&str], status: i32, parts: &[&str]| -> Result<()> {
        let rules: Vec<String> = rules.iter().map(|&rule| rule.to_owned()).collect();
        let file = config(&folder, &rules)?;
        for mode in [&["--dry-run"][..], &[]] {
            let (code, error) = failed(&assign(&file, mode)?);
            assert_eq!(code, status, "{error}");
            for part in parts {
                assert!(error.contains(part), "'{part}' is missing in: {error}");
            }
        }
        Ok(())
    };
    check(&[], 64, &["qjump.toml", "no [[assign]] section"])?;
    check(&["level = 5"], 64, &["qjump.toml: error at line 15,", "^", "every socket of the host"])?;
    check(&["level = 8\nuser = 0"], 64, &["line 16", "^", "no level 8"])?;
    check(
        &["level = 5\nuser = \"nobody-of-this-name\""],
        64,
        &["line 15,", "no user 'nobody-of-this-name'", "getent"],
    )?;
    check(&["level = 5\nlocal-port = \"9-8\""], 64, &["line 17", "^", "'9-8' is neither"])?;
    check(&["level = 5\nprot = 9"], 64, &["line 17", "^", "unknown field"])?;
    check(
        &["level = 5\nlocal-port = \"80-90\"", "level = 6\nlocal-port = \"85-95\""],
        64,
        &["line 19,", "line 15,", "in conflict", "equal precedence", "^"],
    )?;
    let (code, error) = failed(&assign(Path::new("/nonexistent.toml"), &[])?);
    assert!(code == 64 && error.contains("/nonexistent.toml"), "{error}");

    // Without privileges there is only oneself to look into.
    let program = folder.take(&binary())?;
    let file = config(&folder, &["level = 5\nlocal-port = 9".to_owned()])?;
    let run = |more: &[&str]| nobody::command(&program).arg("assign").arg("--config").arg(&file).args(more).output();
    let output = run(&["--dry-run"])?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && error.contains("CAP_SYS_PTRACE"), "{error}");
    let (code, error) = failed(&run(&[])?);
    assert!(code == 1 && error.contains("CAP_SYS_PTRACE") && error.contains("sudo"), "{error}");
    Ok(())
}
