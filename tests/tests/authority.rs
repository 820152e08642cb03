//! Every way in which an unprivileged process could have its packets leave at a level, against what arrives.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use qjump_tests::{
    capture::{Capture, Seen},
    cgroups::{TestCgroup, command_in},
    kernel::{has_priority_message, raw_may_claim_all},
    link::{FAR, Link, NEAR, binary, succeeded},
};

const CLAIMANT: &str = env!("CARGO_BIN_EXE_claimant");

/// Whether the ways under test are for grants alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claims {
    Allow,
    GrantOnly,
}

struct Host {
    link: Link,
    capture: Capture,
}

impl Host {
    /// A host whose levels are all marked and not limited.
    fn new(claims: Claims) -> Result<Self> {
        let link = Link::with_ipv6()?;
        let levels: Vec<String> = (1..8)
            .map(|level| match claims {
                Claims::Allow => format!("{level}:unlimited"),
                Claims::GrantOnly => format!("{level}:unlimited,claims=grant-only"),
            })
            .collect();
        let mut arguments = vec!["load", "--interface", &link.device, "--hosts", "2", "--link-rate", "10gbit"];
        arguments.extend(["--max-packet", "1514", "--epsilon", "4us"]);
        arguments.extend(levels.iter().flat_map(|level| ["--level", level]));
        succeeded(&link.qjump(&arguments)?)?;
        let capture = Capture::new(&link)?;
        Ok(Self { link, capture })
    }

    /// A command in the near namespace, at a granted level or without a grant.
    fn command(&self, grant: Option<u8>, program: &str) -> Command {
        match grant {
            Some(level) => self.link.command(&["run", "--no-scope", "--level", &level.to_string(), "--", program]),
            None => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{}", self.link.near.name())).arg(program);
                command
            }
        }
    }

    /// Has the claimant go one way, and returns the codepoints that arrived, as levels.
    fn go(&self, grant: Option<u8>, way: &str, ipv6: bool) -> Result<BTreeSet<u8>> {
        let (near, far) = ends(ipv6);
        self.capture.take();
        let mut command = self.command(grant, CLAIMANT);
        command.args([way, near, far]).stdout(Stdio::piped()).stderr(Stdio::piped());
        // What it connects to, and who connects to it.
        let server = (way == "tcp").then(|| self.serve(far)).transpose()?;
        let mut child = command.spawn()?;
        if way == "accept" {
            let mut words = BufReader::new(child.stdout.take().context("no stdout")?);
            ensure!(next(&mut words)? == "ready");
            for _ in 0..8 {
                let mut stream = self.link.far.enter(|| Ok(TcpStream::connect((near, 7002))?))?;
                stream.write_all(b"question")?;
                stream.shutdown(std::net::Shutdown::Write)?;
                stream.read_to_end(&mut Vec::new())?;
            }
        }
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{way}: {}", String::from_utf8_lossy(&output.stderr));
        if let Some(server) = server {
            server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        }
        let seen = self.capture.take();
        ensure!(seen.iter().any(|packet| packet.ipv6 == ipv6), "{way}: nothing arrived");
        Ok(levels(&seen))
    }

    /// Reads from eight connections, one after the other, to their ends.
    fn serve(&self, far: &str) -> Result<std::thread::JoinHandle<Result<()>>> {
        let listener = self.link.far.enter(|| Ok(TcpListener::bind((far, 7001))?))?;
        Ok(std::thread::spawn(move || {
            for _ in 0..8 {
                listener.accept()?.0.read_to_end(&mut Vec::new())?;
            }
            Ok(())
        }))
    }
}

/// The addresses of the two ends.
const fn ends(ipv6: bool) -> (&'static str, &'static str) {
    if ipv6 { (NEAR.1, FAR.1) } else { (NEAR.0, FAR.0) }
}

/// Codepoints as levels; one that is no class selector shows as itself, above 7.
fn levels(seen: &[Seen]) -> BTreeSet<u8> {
    seen.iter().map(|packet| if packet.dscp % 8 == 0 { packet.dscp / 8 } else { packet.dscp | 0x80 }).collect()
}

fn next(words: &mut BufReader<ChildStdout>) -> Result<String> {
    let mut line = String::new();
    ensure!(words.read_line(&mut line)? > 0, "the claimant has ended");
    Ok(line.trim().to_owned())
}

/// The ways that need no rights, and those that need CAP_NET_RAW.
const WAYS: [&str; 9] = ["so_priority", "connect", "tos", "cmsg_tos", "cmsg_priority", "tcp", "accept", "fork", "dup"];
const RAW_WAYS: [&str; 2] = ["raw", "packet"];

/// What a sender with CAP_NET_RAW, and without CAP_NET_ADMIN, may claim by itself.
fn raw() -> Vec<u8> {
    if raw_may_claim_all() { (0..8).collect() } else { (0..7).collect() }
}

/// Goes every way, in both versions of IP, and compares what arrives with what `expected` says of the way.
fn every_way(claims: Claims, grant: Option<u8>, expected: impl Fn(&str, bool) -> Vec<u8>) -> Result<()> {
    let host = Host::new(claims)?;
    let mut wrong = Vec::new();
    let there = |way: &&str| *way != "cmsg_priority" || has_priority_message();
    for way in WAYS.into_iter().chain(RAW_WAYS).filter(there) {
        for ipv6 in [false, true] {
            let seen = host.go(grant, way, ipv6)?;
            let expected = BTreeSet::from_iter(expected(way, ipv6));
            println!("{way}, IPv{}: {seen:?}", if ipv6 { 6 } else { 4 });
            if seen != expected {
                wrong.push(format!("{way}, IPv6 {ipv6}: {seen:?} arrived, and should have been {expected:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{claims:?}, granted {grant:?}:\n{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn without_a_grant_no_way_leads_above_best_effort() -> Result<()> {
    every_way(Claims::GrantOnly, None, |_, _| vec![0])
}

#[test]
fn with_a_grant_every_way_leads_to_it_or_lower() -> Result<()> {
    every_way(Claims::GrantOnly, Some(3), |way, _| match way {
        // Who asks for less gets less.
        "so_priority" | "connect" | "raw" => vec![0, 1, 2, 3],
        // A connection begins with the grant. IP_TOS, which says 6 for every second packet, says nothing.
        "tcp" | "accept" => vec![0, 1, 2, 3],
        // No cgroup program sees these packets: a claim of at most the grant is honoured, the others are not.
        "packet" => vec![0, 1, 2, 3],
        _ => vec![3],
    })
}

#[test]
fn the_strictest_level_needs_no_capability_once_it_is_granted() -> Result<()> {
    every_way(Claims::GrantOnly, Some(7), |way, _| match way {
        "so_priority" | "connect" | "raw" | "tcp" | "accept" => (0..8).collect(),
        // The cgroup does not see these sockets.
        "packet" => raw(),
        // They claim 6, which is asking for less.
        "fork" | "dup" => vec![6],
        _ => vec![7],
    })
}

#[test]
fn a_grant_of_best_effort_is_a_ceiling_too() -> Result<()> {
    every_way(Claims::Allow, Some(0), |way, _| match way {
        // Any process may claim these levels, and a packet socket is the one way around the cgroup.
        "packet" => raw(),
        _ => vec![0],
    })
}

/// What the ways lead to when nothing is in the way: without this, the tests above might have tried nothing.
#[test]
fn where_claims_are_allowed_the_kernels_own_rules_remain() -> Result<()> {
    every_way(Claims::Allow, None, |way, ipv6| match way {
        // The kernel makes 0, 2, 4 or 6 of a TOS (rt_tos2priority), and nothing of a traffic class.
        "tos" | "cmsg_tos" if !ipv6 => vec![0, 2, 4, 6],
        "tos" | "cmsg_tos" => vec![0],
        "fork" | "dup" => vec![6],
        "raw" | "packet" => raw(),
        // 7 takes CAP_NET_RAW or CAP_NET_ADMIN (sk_set_prio_allowed, net/core/sock.c).
        _ => (0..7).collect(),
    })
}

#[test]
fn a_socket_keeps_its_grant_and_no_more_in_other_hands() -> Result<()> {
    let host = Host::new(Claims::GrantOnly)?;
    for (given, taken, expected) in [(Some(4), None, vec![0, 1, 2, 3, 4]), (None, Some(4), vec![0])] {
        for ipv6 in [false, true] {
            let (near, far) = ends(ipv6);
            let folder = std::env::temp_dir().join(format!("qjump-authority-{}", std::process::id()));
            std::fs::create_dir_all(&folder)?;
            std::os::unix::fs::chown(&folder, Some(65_534), Some(65_534))?;
            let path = folder.join("socket");
            let path = path.to_str().context("a path")?;
            let mut receiver = host.command(taken, CLAIMANT);
            let mut receiver = receiver.args(["receive", near, far, path]).stdout(Stdio::piped()).spawn()?;
            let mut words = BufReader::new(receiver.stdout.take().context("no stdout")?);
            ensure!(next(&mut words)? == "ready");
            host.capture.take();
            let sender = host.command(given, CLAIMANT).args(["pass_on", near, far, path]).output()?;
            succeeded(&sender)?;
            ensure!(receiver.wait()?.success());
            assert_eq!(levels(&host.capture.take()), BTreeSet::from_iter(expected.clone()), "{given:?} to {taken:?}");
            std::fs::remove_dir_all(&folder)?;
        }
    }
    Ok(())
}

/// Starts the claimant in `from`, has it move to `to`, and returns what it says of that, and the levels of its old
/// and of its new socket.
fn moved(host: &Host, from: &std::path::Path, to: &std::path::Path) -> Result<(String, [BTreeSet<u8>; 2])> {
    host.capture.take();
    let mut command = command_in(from, "nsenter");
    command.arg(format!("--net=/run/netns/{}", host.link.near.name())).arg(CLAIMANT);
    let output = command.args(["move", NEAR.0, FAR.0]).arg(to).output()?;
    let said = succeeded(&output)?;
    let seen = host.capture.take();
    let of_port = |port: u16| levels(&seen.iter().copied().filter(|one| one.from == port).collect::<Vec<_>>());
    Ok((said.trim().to_owned(), [of_port(7100), of_port(7101)]))
}

#[test]
fn moving_to_another_cgroup_takes_rights_and_moves_new_sockets_alone() -> Result<()> {
    let host = Host::new(Claims::GrantOnly)?;
    let top = TestCgroup::new()?;
    let (granted, plain) = (top.below("granted")?, top.below("plain")?);
    let tag = Command::new(binary()).args(["tag", "--level", "5", "--cgroup"]).arg(&granted).output()?;
    succeeded(&tag)?;
    let only = |level: u8| BTreeSet::from([level]);
    // Claims of 6, so 5 is the grant.
    assert_eq!(moved(&host, &plain, &granted)?, ("refused".to_owned(), [only(0), only(0)]));
    assert_eq!(moved(&host, &granted, &plain)?, ("refused".to_owned(), [only(5), only(5)]));
    // Whoever was given the cgroups may go where he likes; so giving away a tagged cgroup is giving away its level.
    for directory in [&top.directory, &granted, &plain] {
        TestCgroup::delegate(directory, 65_534)?;
    }
    assert_eq!(moved(&host, &plain, &granted)?, ("moved".to_owned(), [only(0), only(5)]));
    assert_eq!(moved(&host, &granted, &plain)?, ("moved".to_owned(), [only(5), only(0)]));
    // The nearest grant wins, above as below.
    let tag = Command::new(binary()).args(["tag", "--level", "2", "--cgroup"]).arg(&top.directory).output()?;
    succeeded(&tag)?;
    assert_eq!(moved(&host, &plain, &granted)?, ("moved".to_owned(), [only(2), only(5)]));
    let untag = Command::new(binary()).args(["untag", "--cgroup"]).arg(&granted).output()?;
    assert!(succeeded(&untag)?.contains("at level 2 with the cgroup above"));
    assert_eq!(moved(&host, &plain, &granted)?, ("moved".to_owned(), [only(2), only(2)]));
    Ok(())
}

#[test]
fn what_is_not_granted_is_counted() -> Result<()> {
    let host = Host::new(Claims::GrantOnly)?;
    host.go(None, "so_priority", false)?;
    let status = host.link.status()?;
    let levels = status["levels"].as_array().context("no levels")?;
    let refused: Vec<u64> =
        levels.iter().filter_map(|level| level["reasons"]["not_granted"]["packets"].as_u64()).collect();
    // Level 7 was refused by the kernel: the socket stayed at 0.
    assert_eq!(refused[1..], [1, 1, 1, 1, 1, 1, 0], "{status:#}");
    assert_eq!(levels[3]["claims"], "grant-only");
    assert_eq!(levels[3]["demoted_packets"], 1);
    Ok(())
}

/// The kernel makes a priority out of the TOS of what it forwards, and nobody on this host claimed that.
#[test]
fn forwarded_packets_have_no_level_whatever_their_tos() -> Result<()> {
    for claims in [Claims::Allow, Claims::GrantOnly] {
        let host = Host::new(claims)?;
        let inner = qjump::testbed::NetNs::new("inner")?;
        let (near, far) = (&host.link.near, &host.link.far);
        near.ip(&format!("link add qjinner type veth peer name qjouter netns {}", inner.name()))?;
        near.ip("addr add 10.8.0.1/24 dev qjinner")?;
        near.ip("link set qjinner up")?;
        inner.ip("addr add 10.8.0.2/24 dev qjouter")?;
        inner.ip("link set qjouter up")?;
        inner.ip("route add default via 10.8.0.1")?;
        far.ip(&format!("route add 10.8.0.0/24 via {}", NEAR.0))?;
        near.enter(|| Ok(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
        let socket = inner.enter(|| Ok(std::net::UdpSocket::bind("10.8.0.2:0")?))?;
        host.capture.take();
        for tos in [0x10, 0x08, 0x18, 0xe0] {
            qjump_tests::sender::set_tos(&socket, tos)?;
            socket.send_to(b"hello", (FAR.0, 7000))?;
        }
        let seen = host.capture.take();
        assert_eq!(seen.len(), 4, "{seen:?}");
        assert_eq!(levels(&seen), BTreeSet::from([0]), "{claims:?}");
    }
    Ok(())
}

/// A claimant that holds sockets and uses them on demand.
struct Service {
    child: Child,
    words: BufReader<ChildStdout>,
}

impl Service {
    fn start(host: &Host, ipv6: bool) -> Result<(Self, TcpStream)> {
        let (near, far) = ends(ipv6);
        let listener = host.link.far.enter(|| Ok(TcpListener::bind((far, 7001))?))?;
        let mut command = host.command(None, CLAIMANT);
        let mut child = command.args(["hold", near, far]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let words = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut service = Self { child, words };
        ensure!(next(&mut service.words)? == "ready");
        Ok((service, listener.accept()?.0))
    }

    /// The levels of what its old sockets send.
    fn sends(&mut self, host: &Host) -> Result<BTreeSet<u8>> {
        host.capture.take();
        self.tell("send")?;
        Ok(levels(&host.capture.take()))
    }

    /// The levels of a connection that its old listener accepts now.
    fn accepts(&mut self, host: &Host, ipv6: bool) -> Result<BTreeSet<u8>> {
        host.capture.take();
        let mut stream = host.link.far.enter(|| Ok(TcpStream::connect((ends(ipv6).0, 7002))?))?;
        self.tell("accept")?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read_to_end(&mut Vec::new())?;
        Ok(levels(&host.capture.take()))
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        writeln!(self.child.stdin.as_mut().context("no stdin")?, "{word}")?;
        ensure!(next(&mut self.words)? == "done");
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The running service has sockets from before: they change their mark, and so do connections that its old listener
/// accepts; and all of it comes back.
#[test]
fn a_running_process_keeps_its_connections_and_changes_their_mark() -> Result<()> {
    let host = Host::new(Claims::GrantOnly)?;
    for ipv6 in [false, true] {
        let (mut service, mut peer) = Service::start(&host, ipv6)?;
        let pid = service.child.id().to_string();
        let only = |level: u8| BTreeSet::from([level]);
        assert_eq!(service.sends(&host)?, only(0));

        let text = succeeded(&host.link.qjump(&["tag", "--pid", &pid, "--level", "6"])?)?;
        assert!(text.contains("3 live socket(s) moved"), "{text}");
        assert_eq!(service.sends(&host)?, only(6));
        // The answer to the last FIN may come from what is left of the connection, which has no grant.
        let accepted = service.accepts(&host, ipv6)?;
        assert!(accepted.contains(&6) && accepted.is_subset(&BTreeSet::from([0, 6])), "{accepted:?}");
        let text = succeeded(&host.link.qjump(&["tag", "--pid", &pid, "--level", "2"])?)?;
        assert!(text.contains("3 live socket(s) moved"), "{text}");
        assert_eq!(service.sends(&host)?, only(2));

        let text = succeeded(&host.link.qjump(&["untag", "--pid", &pid])?)?;
        assert!(text.contains("untagged; 3 live socket(s) moved"), "{text}");
        assert_eq!(service.sends(&host)?, only(0));
        assert_eq!(service.accepts(&host, ipv6)?, only(0));
        // It is the same connection all the time.
        drop(service);
        let mut received = Vec::new();
        let _ = peer.read_to_end(&mut received);
        assert_eq!(received, b"still here".repeat(4));
    }
    Ok(())
}
