//! The control socket.
//!
//! A unix stream socket, for root and the members of group qjump (if there is one): by its mode, and by asking the kernel who
//! calls. A request is one line of JSON of at most 64 KiB, and so is its answer; a connection may ask again.
//!
//! | request | answer, beside `"ok": true` |
//! |---|---|
//! | `{"method": "status"}` | `"agent"`: generation, refused, hosts and their source, ready, drained, and the problem of each interface, `null` where there is none |
//! | `{"method": "reload"}` | `"changes"`: what the configuration changes, line by line; then as status. Comes when it is in force, or has failed once |
//! | `{"method": "drain"}` | as status: everything is taken off all interfaces, until the next reload |
//! | `{"method": "tag", "level": 5, "pid": 1}` | `"cgroup"`, `"level"` that it has now or `null`, `"sockets"` moved, and `"problems"` with others; in the place of `pid`: `cgroup` or `unit`; also `sndbuf` |
//! | `{"method": "untag", "pid": 1}` | the same |
//!
//! What fails is answered with `"ok": false`, `"error"`, and as `"kind"` `"usage"`, `"refused"` (a configuration; the old one
//! stays) or `"failed"`. Who does not send his line within two seconds is disconnected, and so is, when there are too many
//! connections, the one that has been idle for longest.

use std::{
    collections::VecDeque,
    fs, io,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream, unix::UCred},
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

/// The longest request, bytes.
pub const LONGEST: u64 = 64 * 1024;
/// Connections at once.
pub const MOST: usize = 64;
/// How long a request may take to come, and an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(2);
/// Whose members may ask.
const GROUP: &str = "qjump";

/// What may be asked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "method", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// How things are.
    Status {},
    /// Read the configuration again.
    Reload {},
    /// Take everything off.
    Drain {},
    /// Give a level.
    Tag {
        /// The level.
        level: u8,
        /// To a process.
        pid: Option<u32>,
        /// To a cgroup.
        cgroup: Option<PathBuf>,
        /// To a unit.
        unit: Option<String>,
        /// Send buffer, bytes.
        sndbuf: Option<u32>,
    },
    /// Take a level back.
    Untag {
        /// From a process.
        pid: Option<u32>,
        /// From a cgroup.
        cgroup: Option<PathBuf>,
        /// From a unit.
        unit: Option<String>,
    },
}

/// A request on its way, whose it is, and where its answer goes.
pub type Asked = (Request, Peer, oneshot::Sender<Value>);

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// The user.
    pub user: u32,
    /// Whether his processes have the numbers that they have here: whoever is in a PID namespace of his own means others.
    pub is_near: bool,
}

impl Peer {
    fn of(cred: &UCred) -> Self {
        let status = cred.pid().and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
        let numbers = status.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("NSpid:")));
        Self { user: cred.uid(), is_near: numbers.is_some_and(|numbers| numbers.split_whitespace().count() == 1) }
    }
}

/// An answer that something did not work.
pub fn refusal(kind: &str, error: impl std::fmt::Display) -> Value {
    json!({"ok": false, "kind": kind, "error": error.to_string()})
}

/// The socket, which goes when this is dropped.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
    group: Option<Gid>,
}

impl Control {
    /// Listens. The caller has made sure that no other agent does; what one has left there is replaced.
    ///
    /// # Errors
    /// If the folder or the socket cannot be made.
    pub fn begin(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let group = Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
        // Nobody may connect before the rights are what they should be.
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        nix::sys::stat::umask(before);
        let control = Self { listener: listener?, path: path.to_owned(), group };
        if let Some(group) = group {
            chown(path, None, Some(group.as_raw()))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        }
        Ok(control)
    }

    /// Serves whoever comes, for ever.
    pub async fn serve(self, requests: mpsc::Sender<Asked>) {
        let mut open: VecDeque<(Arc<AtomicBool>, JoinHandle<()>)> = VecDeque::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                // No descriptors left: those of others come back.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            open.retain(|(_, task)| !task.is_finished());
            if open.len() >= MOST {
                let idle = open.iter().position(|(busy, _)| !busy.load(Relaxed));
                match idle.and_then(|idle| open.remove(idle)) {
                    Some((_, task)) => task.abort(),
                    // Everybody waits for an answer.
                    None => continue,
                }
            }
            let peer = stream.peer_cred().ok().filter(|peer| self.allows(peer)).map(|peer| Peer::of(&peer));
            let (busy, requests) = (Arc::new(AtomicBool::new(false)), requests.clone());
            let task = tokio::spawn(converse(stream, peer, requests, Arc::clone(&busy)));
            open.push_back((busy, task));
        }
    }

    fn allows(&self, peer: &UCred) -> bool {
        let is_member = |group: Gid| {
            let user = User::from_uid(Uid::from_raw(peer.uid())).ok().flatten()?;
            let name = std::ffi::CString::new(user.name).ok()?;
            Some(getgrouplist(&name, user.gid).ok()?.contains(&group))
        };
        peer.uid() == 0
            || self.group.is_some_and(|group| peer.gid() == group.as_raw() || is_member(group).unwrap_or(false))
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Answers one connection, until it ends or asks nothing for a while. `peer` is who may ask.
async fn converse(stream: UnixStream, peer: Option<Peer>, requests: mpsc::Sender<Asked>, busy: Arc<AtomicBool>) {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut stream).take(LONGEST);
        match timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await {
            Ok(Ok(length)) if length > 0 => {}
            _ => return,
        }
        busy.store(true, Relaxed);
        let whole = line.last() == Some(&b'\n');
        let answer = match (peer, whole) {
            (None, _) => refusal("failed", format!("only root and the members of group {GROUP} may ask")),
            (_, false) if line.len() as u64 >= LONGEST => refusal("usage", format!("more than {LONGEST} bytes")),
            // It ended in the middle of a line.
            (_, false) => return,
            (Some(peer), true) => match serde_json::from_slice(&line) {
                Ok(request) => {
                    let (sender, receiver) = oneshot::channel();
                    if requests.send((request, peer, sender)).await.is_err() {
                        return;
                    }
                    receiver.await.unwrap_or_else(|_| refusal("failed", "the agent is stopping"))
                }
                Err(error) => refusal("usage", error),
            },
        };
        let written = timeout(PATIENCE, stream.get_mut().write_all(format!("{answer}\n").as_bytes())).await;
        busy.store(false, Relaxed);
        if !matches!(written, Ok(Ok(()))) || peer.is_none() || !whole {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_or_refused() {
        let read = |text: &str| serde_json::from_str::<Request>(text);
        assert_eq!(read(r#"{"method": "reload"}"#).unwrap(), Request::Reload {});
        let tag = read(r#"{"method": "tag", "level": 5, "unit": "x.service"}"#).unwrap();
        let expected = Request::Tag { level: 5, pid: None, cgroup: None, unit: Some("x.service".into()), sndbuf: None };
        assert_eq!(tag, expected);
        for wrong in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"method": "explode"}"#,
            r#"{"method": "reload", "now": true}"#,
            r#"{"method": "tag", "pid": 1}"#,
            r#"{"method": "tag", "level": 300, "pid": 1}"#,
            r#"{"method": "untag", "pid": -1}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn others_are_served_beside_a_thousand_idle_connections() {
        let folder = std::env::temp_dir().join(format!("qjump-control-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("socket");
        let control = Control::begin(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o007, 0);
        let (sender, mut requests) = mpsc::channel::<Asked>(1);
        let serving = tokio::spawn(control.serve(sender));
        tokio::spawn(async move {
            while let Some((_, _, answer)) = requests.recv().await {
                let _ = answer.send(json!({"ok": true}));
            }
        });
        let ask = async |bytes: &[u8]| {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            // Who is refused may be disconnected before he has written all.
            let _ = stream.write_all(bytes).await;
            let mut answer = String::new();
            let _ = BufReader::new(stream).read_line(&mut answer).await;
            answer
        };
        let mut idle = Vec::new();
        for number in 0..1000 {
            idle.push(UnixStream::connect(&path).await.unwrap());
            if number % 100 == 0 {
                assert_eq!(ask(b"{\"method\":\"status\"}\n").await, "{\"ok\":true}\n");
            }
        }
        assert!(ask(&vec![b' '; LONGEST as usize + 1]).await.contains("more than 65536 bytes"));
        assert!(ask(b"\xff\n").await.contains("usage"));
        serving.abort();
        let _ = serving.await;
        assert!(!path.exists(), "the socket goes with the agent");
        fs::remove_dir_all(folder).unwrap();
    }
}
