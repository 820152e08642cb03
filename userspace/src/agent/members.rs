//! How many hosts there are: the n of the plan, counted from a list of members that somebody else keeps.
//!
//! The plan errs on the safe side. A list that has grown counts at once; one that has shrunk counts when it has not been longer for
//! the time `hold`. An answer that cannot be had, or cannot be right, changes nothing: the last one stays in force, and
//! its age is shown. [`Hold`] is pure; [`watch`] asks.

use std::{
    collections::{HashSet, VecDeque},
    fs::File,
    io::{self, Read},
    net::{IpAddr, ToSocketAddrs},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, StatusCode, Uri,
    body::Bytes,
    client::conn::http1,
    header::{ACCEPT, CONNECTION, HOST, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{oneshot, watch::Sender},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::rustls::ClientConfig;

use super::tls;
use crate::{plan::MAX_HOSTS, units::Nanos};

/// The longest list, bytes: a million names of sixteen.
const LONGEST_LIST: usize = 16 << 20;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// After so many questions without an answer nobody knows how many hosts there are.
const UNANSWERED: u32 = 3;

/// Where members are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file with one member a line.
    File(PathBuf),
    /// A name with an address for each member.
    Dns(String),
    /// An address of the web that gives a list: lines, or an array of JSON.
    Url(Uri),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Dns(name) => write!(f, "dns {name}"),
            // Without the query, which may hold what is not for everybody to see.
            Self::Url(url) => {
                let (scheme, at) = (url.scheme_str().unwrap_or("http"), url.authority().map_or("", |at| at.as_str()));
                write!(f, "url {scheme}://{at}{}", url.path())
            }
        }
    }
}

/// Section `[cluster.members]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Section")]
pub struct Config {
    /// Where to ask.
    pub source: Source,
    /// Certificates (PEM) of the authorities that a server of https must have its own from, if those of this host do not do.
    pub ca: Option<PathBuf>,
    /// How often.
    pub interval: Duration,
    /// How long a list must have been shorter until that counts.
    pub hold: Duration,
    /// An answer below is not believed.
    pub least: u32,
    /// An answer above is not believed.
    pub most: u32,
}

/// The section as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    file: Option<PathBuf>,
    dns: Option<String>,
    url: Option<String>,
    ca: Option<PathBuf>,
    interval: Option<Nanos>,
    hold: Option<Nanos>,
    least: Option<u32>,
    most: Option<u32>,
}

impl TryFrom<Section> for Config {
    type Error = String;

    fn try_from(section: Section) -> Result<Self, String> {
        let source = match (section.file, section.dns, section.url) {
            (Some(path), None, None) if path.is_absolute() => Source::File(path),
            (Some(path), None, None) => {
                return Err(format!("file = \"{}\" must be an absolute path", path.display()));
            }
            (None, Some(name), None) if !name.is_empty() => Source::Dns(name),
            (None, None, Some(text)) => Source::Url(url(&text)?),
            _ => return Err("say where members are listed: one of file, dns and url".to_owned()),
        };
        if let Some(ca) = &section.ca {
            if !matches!(&source, Source::Url(url) if is_https(url)) {
                return Err("ca is for a url with https://".to_owned());
            }
            if !ca.is_absolute() {
                return Err(format!("ca = \"{}\" must be an absolute path", ca.display()));
            }
        }
        let span = |given: Option<Nanos>, default| given.map_or(default, |span| Duration::from_nanos(span.ns()));
        let config = Self {
            source,
            ca: section.ca,
            interval: span(section.interval, Duration::from_secs(10)),
            hold: span(section.hold, Duration::from_secs(600)),
            least: section.least.unwrap_or(1),
            most: section.most.unwrap_or(MAX_HOSTS),
        };
        if config.interval < Duration::from_secs(1) {
            return Err("interval must be at least 1s".to_owned());
        }
        if config.least < 1 || config.least > config.most || config.most > MAX_HOSTS {
            return Err(format!("least and most must be 1 to {MAX_HOSTS}, least not above most"));
        }
        Ok(config)
    }
}

fn url(text: &str) -> Result<Uri, String> {
    let form = "must be of the form http://host:port/path or https://host:port/path";
    let url: Uri = text.parse().map_err(|error| format!("url = \"{text}\" {form}: {error}"))?;
    match (url.scheme_str(), url.authority()) {
        (_, Some(authority)) if authority.as_str().contains('@') => {
            Err("the url has a password in it, which logs would show; let the server know hosts by their addresses"
                .into())
        }
        (Some("http" | "https"), Some(_)) => Ok(url),
        _ => Err(format!("url = \"{text}\" {form}")),
    }
}

fn is_https(url: &Uri) -> bool {
    url.scheme_str() == Some("https")
}

impl Config {
    /// What is known before the first answer.
    pub fn unknown(&self) -> Members {
        Members {
            hosts: None,
            source: self.source.to_string(),
            counted: None,
            answered: None,
            failure: None,
            stale_after: Some(self.interval * UNANSWERED + PATIENCE),
            asked_since: Some(Instant::now()),
        }
    }

    /// An answer, if it can be right.
    fn believed(&self, count: u32) -> Result<u32, String> {
        let Self { least, most, .. } = self;
        match count {
            0 if *least == 1 => Err("it lists no member".to_owned()),
            count if count < *least => Err(format!("it lists {count}, and there are at least {least}")),
            count if count > *most => Err(format!("it lists {count}, and there are at most {most}")),
            count => Ok(count),
        }
    }
}

/// How many hosts there are, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    /// The n to plan with; `None` before the first answer.
    pub hosts: Option<u32>,
    /// Who says so.
    pub source: String,
    /// The last answer, which is less than `hosts` while a shorter list is on hold.
    pub counted: Option<u32>,
    /// When the last answer came.
    pub answered: Option<Instant>,
    /// Why there was none since.
    pub failure: Option<String>,
    /// The age from which on nobody knows how many hosts there are; `None` for a number that does not age.
    pub stale_after: Option<Duration>,
    /// Since when the source is asked; `None` for a number that nobody is asked for.
    pub asked_since: Option<Instant>,
}

impl Members {
    /// The number of the configuration.
    pub fn fixed(hosts: u32) -> Self {
        Self {
            hosts: Some(hosts),
            source: "configuration".to_owned(),
            counted: Some(hosts),
            answered: None,
            failure: None,
            stale_after: None,
            asked_since: None,
        }
    }

    /// How old the last answer is; `None` before the first, and for a number that does not age.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.answered.map(|at| now.saturating_duration_since(at))
    }

    /// For how long nobody has known how many hosts there are; `None` if it is known.
    pub fn unknown_for(&self, now: Instant) -> Option<Duration> {
        let since = now.saturating_duration_since(self.answered.or(self.asked_since)?);
        (since > self.stale_after?).then_some(since)
    }
}

/// When a smaller number of hosts counts.
#[derive(Clone, Debug)]
pub struct Hold {
    hold: Duration,
    current: Option<u32>,
    /// What was current before, with when it ended. Both grow smaller and newer: the first is the largest that still counts.
    before: VecDeque<(Instant, u32)>,
}

impl Hold {
    /// With a number that is in force already, from before a restart, as if it had been the answer until now.
    pub fn new(hold: Duration, in_force: Option<u32>) -> Self {
        Self { hold, current: in_force, before: VecDeque::new() }
    }

    /// Takes an answer; gives the number that is in force from now on: the largest that was current within the last `hold`.
    ///
    /// Nothing shrinks without an answer: while nobody answers, the list may have grown again.
    pub fn answer(&mut self, count: u32, now: Instant) -> u32 {
        if let Some(ended) = self.current.replace(count) {
            while self.before.back().is_some_and(|(_, older)| *older <= ended) {
                self.before.pop_back();
            }
            self.before.push_back((now, ended));
        }
        while self.before.front().is_some_and(|(end, _)| now.saturating_duration_since(*end) >= self.hold) {
            self.before.pop_front();
        }
        self.before.front().map_or(count, |(_, largest)| count.max(*largest))
    }
}

/// Asks the source again and again, until nobody listens any more. `in_force` is the number that limits are planned with already, if
/// somebody else put them there.
pub async fn watch(config: Config, in_force: Option<u32>, sender: Sender<Members>) {
    let mut hold = Hold::new(config.hold, in_force);
    let mut asked = Asked::default();
    loop {
        let answer = asked.count(&config).await.and_then(|count| config.believed(count));
        sender.send_modify(|members| match answer {
            Ok(count) => {
                let now = Instant::now();
                members.hosts = Some(hold.answer(count, now));
                (members.counted, members.answered, members.failure) = (Some(count), Some(now), None);
            }
            Err(why) => members.failure = Some(why),
        });
        tokio::select! {
            () = tokio::time::sleep(config.interval) => {}
            () = sender.closed() => return,
        }
    }
}

/// What has been asked.
#[derive(Default)]
struct Asked {
    members: Question<u32>,
    trust: Question<Arc<ClientConfig>>,
}

impl Asked {
    /// Asks once.
    async fn count(&mut self, config: &Config) -> Result<u32, String> {
        match config.source.clone() {
            Source::Url(url) => {
                let trust = match config.ca.clone() {
                    // Each time: certificates are renewed.
                    ca if is_https(&url) => Some(self.trust.blocking(move || tls::trust(ca.as_deref())).await?),
                    _ => None,
                };
                within(fetch(&url, trust)).await?.and_then(|text| count_list(&text))
            }
            Source::File(path) => {
                self.members.blocking(move || read_file(&path).and_then(|text| count_list(&text))).await
            }
            Source::Dns(name) => self.members.blocking(move || resolve(&name)).await,
        }
    }
}

/// A question that a thread waits with: neither a resolver nor a file system can be told to give up. The next question
/// takes the answer to this one, so that there is never more than one thread.
struct Question<T>(Option<oneshot::Receiver<Result<T, String>>>);

impl<T> Default for Question<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> Question<T> {
    async fn blocking(&mut self, ask: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
        let mut answer = match self.0.take() {
            Some(answer) => answer,
            None => on_a_thread(ask)?,
        };
        match within(&mut answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err("the question was lost".to_owned())),
            Err(late) => {
                self.0 = Some(answer);
                Err(late)
            }
        }
    }
}

async fn within<T>(answer: impl Future<Output = T>) -> Result<T, String> {
    timeout(PATIENCE, answer).await.map_err(|_| format!("no answer within {} s", PATIENCE.as_secs()))
}

/// A thread of its own rather than one of the runtime's, which waits for those when it ends.
fn on_a_thread<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T, String>>, String> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name("members".to_owned())
        .spawn(move || drop(sender.send(ask())))
        .map_err(|error| format!("cannot start a thread: {error}"))?;
    Ok(receiver)
}

/// Reads a file that decides what hosts may send.
///
/// # Errors
/// If it is none, is too long, or anybody may write it.
pub fn read_file(path: &Path) -> Result<String, String> {
    let read = || -> io::Result<String> {
        let file = File::open(path)?;
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        if about.mode() & 0o002 != 0 {
            return Err(io::Error::other("anybody may write it, and so decide what hosts may send; chmod o-w"));
        }
        let mut text = String::new();
        file.take(LONGEST_LIST as u64 + 1).read_to_string(&mut text)?;
        if text.len() > LONGEST_LIST {
            return Err(io::Error::other(format!("it is longer than {LONGEST_LIST} bytes")));
        }
        Ok(text)
    };
    read().map_err(|error| format!("cannot read it: {error}"))
}

fn resolve(name: &str) -> Result<u32, String> {
    let addresses = (name, 0).to_socket_addrs().map_err(|error| format!("cannot be resolved: {error}"))?;
    let members: HashSet<IpAddr> = addresses.map(|address| address.ip()).collect();
    Ok(members.len() as u32)
}

/// Gets a list by HTTP/1.1, inside TLS if it is known whom to trust: one request, no redirections.
async fn fetch(url: &Uri, trust: Option<Arc<ClientConfig>>) -> Result<String, String> {
    let authority = url.authority().ok_or("the url has no host")?;
    let host = authority.host().trim_matches(['[', ']']);
    let port = authority.port_u16().unwrap_or(if trust.is_some() { 443 } else { 80 });
    let stream = TcpStream::connect((host, port)).await.map_err(|error| format!("cannot connect: {error}"))?;
    let request = Request::get(url.path_and_query().map_or("/", |path| path.as_str()))
        .header(HOST, authority.as_str())
        .header(USER_AGENT, concat!("qjump/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "application/json, text/plain")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("cannot ask for it: {error}"))?;
    match trust {
        Some(trust) => get(tls::connect(stream, host, trust).await?, request).await,
        None => get(stream, request).await,
    }
}

async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<String, String> {
    let failed = |error: hyper::Error| format!("no proper answer: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Ends with this function, whatever the other side does.
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let response = sender.send_request(request).await.map_err(failed)?;
    if response.status() != StatusCode::OK {
        return Err(format!("the server says {}", response.status()));
    }
    let body = Limited::new(response.into_body(), LONGEST_LIST).collect().await;
    let bytes = body.map_err(|error| format!("no whole answer: {error}"))?.to_bytes();
    String::from_utf8(bytes.into()).map_err(|_| "the answer is no text".to_owned())
}

/// Counts the members of a list, each once: an array of JSON, or lines with a member each. What follows its name, and
/// what follows a #, does not count.
fn count_list(text: &str) -> Result<u32, String> {
    let number = match text.trim_start().chars().next() {
        Some('[') => {
            let list: Vec<serde_json::Value> =
                serde_json::from_str(text).map_err(|error| format!("it begins like an array of JSON: {error}"))?;
            list.iter().map(ToString::to_string).collect::<HashSet<_>>().len()
        }
        Some(first @ ('<' | '{')) => return Err(format!("it begins with {first}: neither lines nor an array of JSON")),
        _ => {
            let name = |line: &str| line.split('#').next()?.split_whitespace().next().map(str::to_ascii_lowercase);
            text.lines().filter_map(name).collect::<HashSet<_>>().len()
        }
    };
    Ok(number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn section(text: &str) -> Result<Config, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_the_section() {
        let config = section("file = \"/etc/qjump/hosts\"").unwrap();
        assert_eq!(config.source, Source::File("/etc/qjump/hosts".into()));
        assert_eq!((config.interval, config.hold), (Duration::from_secs(10), Duration::from_secs(600)));
        assert_eq!((config.least, config.most), (1, MAX_HOSTS));
        let config =
            section("url = \"http://[::1]:8080/m?key=secret\"\ninterval = \"1s\"\nleast = 3\nmost = 9").unwrap();
        assert_eq!((config.least, config.most), (3, 9));
        assert_eq!(config.source.to_string(), "url http://[::1]:8080/m");
        assert!(section("dns = \"racks.example\"").is_ok());
        assert_eq!(section("url = \"https://a/b\"\nca = \"/c\"").unwrap().ca, Some("/c".into()));
        for (text, part) in [
            ("", "one of file, dns and url"),
            ("dns = \"\"", "one of file, dns and url"),
            ("dns = \"a\"\nfile = \"/b\"", "one of file, dns and url"),
            ("file = \"hosts\"", "absolute"),
            ("url = \"ftp://a/b\"", "or https://host:port/path"),
            ("url = \"http://a/b\"\nca = \"/c\"", "ca is for a url with https://"),
            ("file = \"/b\"\nca = \"/c\"", "ca is for a url with https://"),
            ("url = \"https://a/b\"\nca = \"c\"", "absolute"),
            ("url = \"http://me:secret@a/b\"", "password"),
            ("url = \"a/b\"", "of the form http://host:port/path"),
            ("url = \"http://\"", "url = "),
            ("dns = \"a\"\ninterval = \"5ms\"", "at least 1s"),
            ("dns = \"a\"\nleast = 0", "1 to"),
            ("dns = \"a\"\nleast = 5\nmost = 4", "least not above most"),
            ("dns = \"a\"\nmost = 9999999", "1 to"),
            ("dns = \"a\"\nintervall = \"5s\"", "unknown field"),
        ] {
            let error = section(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn counts_members_once() {
        for (text, wanted) in [
            ("", 0),
            ("# nobody\n\n", 0),
            ("a\nb # spare\n  c rack=3\n#d\na\nA\n", 3),
            ("10.0.0.1\r\n10.0.0.2\r\n", 2),
            ("[]", 0),
            (" [\"a\", \"b\", \"a\"]", 2),
            ("[{\"name\": \"a\"}, {\"name\": \"b\"}]", 2),
        ] {
            assert_eq!(count_list(text), Ok(wanted), "{text}");
        }
        for text in ["<html>", "{\"a\": 1}", "[\"a\", "] {
            assert!(count_list(text).is_err(), "{text}");
        }
    }

    #[test]
    fn does_not_believe_everything() {
        let config = section("dns = \"a\"\nleast = 3\nmost = 5").unwrap();
        let believed: Vec<bool> = (0..8).map(|count| config.believed(count).is_ok()).collect();
        assert_eq!(believed, [false, false, false, true, true, true, false, false]);
        assert!(section("dns = \"a\"").unwrap().believed(0).is_err());
    }

    #[test]
    fn knows_for_how_long_nobody_knows() {
        let config = section("dns = \"a\"\ninterval = \"20s\"").unwrap();
        let mut members = config.unknown();
        let start = members.asked_since.unwrap();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(members.unknown_for(at(70)), None);
        assert_eq!(members.unknown_for(at(71)), Some(Duration::from_secs(71)));
        members.answered = Some(at(50));
        assert_eq!((members.unknown_for(at(120)), members.age(at(120))), (None, Some(Duration::from_secs(70))));
        assert_eq!(members.unknown_for(at(121)), Some(Duration::from_secs(71)));
        let fixed = Members::fixed(3);
        assert_eq!((fixed.unknown_for(at(1_000_000)), fixed.age(at(9))), (None, None));
    }

    #[test]
    fn grows_at_once_and_shrinks_later() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut hold = Hold::new(Duration::from_secs(60), None);
        for (seconds, answer, in_force) in [
            (0, 8, 8),
            (10, 6, 8),
            (20, 12, 12),
            (30, 5, 12),
            (60, 7, 12),
            (89, 5, 12),
            (90, 5, 7),
            (148, 5, 7),
            (149, 5, 5),
            (150, 6, 6),
            // Nobody has answered for a day: the first answer is no reason to believe that it was so all the time.
            (86_400, 2, 6),
            (86_459, 2, 6),
            (86_460, 2, 2),
        ] {
            assert_eq!(hold.answer(answer, at(seconds)), in_force, "at {seconds}");
        }
        let mut after_restart = Hold::new(Duration::from_secs(60), Some(9));
        assert_eq!([0, 59, 60].map(|seconds| after_restart.answer(4, at(seconds))), [9, 9, 4]);
    }

    proptest! {
        /// Against the definition: the largest of the numbers that were current at some moment of the last `hold`.
        #[test]
        fn is_the_largest_of_the_last_while(
            hold_s in 0u64..30,
            in_force in proptest::option::of(1u32..20),
            answers in prop::collection::vec((0u64..20, 1u32..20), 1..60),
        ) {
            let start = Instant::now();
            let mut hold = Hold::new(Duration::from_secs(hold_s), in_force);
            // What was current, with its end.
            let mut past: Vec<(u64, u32)> = Vec::new();
            let (mut now, mut current) = (0, in_force);
            for (pause, count) in answers {
                now += pause;
                past.extend(current.replace(count).map(|ended| (now, ended)));
                let held = past.iter().filter(|(end, _)| now - end < hold_s).map(|(_, count)| *count);
                let wanted = held.chain([count]).max();
                prop_assert_eq!(Some(hold.answer(count, start + Duration::from_secs(now))), wanted);
            }
        }
    }
}
