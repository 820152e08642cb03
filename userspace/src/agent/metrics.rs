//! `/metrics`, `/healthz` and `/ready` over HTTP/1.1.
//!
//! Whoever asks gets a [`Snapshot`], taken for him on a thread that may wait, and shared by all who ask within [`SHARED_FOR`].
//! Nobody can hold the server: a connection is for one request, has a time, and gives way when there are too many.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes},
    header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use qjump_ebpf::Reason;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Mutex,
    task::AbortHandle,
};

use super::{
    guarantee::{self, Doubt},
    snapshot::{Interface, LevelState, Snapshot},
};

/// Where the agent listens unless it is told otherwise: this host's own programs alone can ask there.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:9927";

/// How long a snapshot is good enough for the next who asks.
pub const SHARED_FOR: Duration = Duration::from_millis(250);

/// Shares of budgets are of at least so long.
const LEAST_SPAN: Duration = Duration::from_secs(1);

/// Connections at once. Prometheus needs one.
const CONNECTIONS: usize = 32;
/// For the whole of a request's headers.
const HEADERS_WITHIN: Duration = Duration::from_secs(2);
/// For a connection, from accepting to closing it.
const CONNECTION_WITHIN: Duration = Duration::from_secs(15);
/// Bytes of a request's headers.
const HEADER_BYTES: usize = 8192;
/// Lines of a request's headers.
const HEADER_LINES: usize = 32;

/// Where snapshots come from.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

struct Shared {
    take: Box<dyn Fn() -> Snapshot + Send + Sync>,
    last: Mutex<Last>,
}

/// The last snapshot, and one that was taken at least [`LEAST_SPAN`] before it.
#[derive(Clone, Default)]
struct Last {
    now: Option<Arc<Snapshot>>,
    before: Option<Arc<Snapshot>>,
    /// What becomes `before` when it is old enough.
    mark: Option<Arc<Snapshot>>,
}

impl Last {
    fn is_fresh(&self, at: Instant) -> bool {
        self.now.as_ref().is_some_and(|now| at.saturating_duration_since(now.taken) < SHARED_FOR)
    }

    fn replace(&mut self, new: Snapshot) {
        let new = Arc::new(new);
        let is_young = |mark: &Arc<Snapshot>| new.taken.saturating_duration_since(mark.taken) < LEAST_SPAN;
        if !self.mark.as_ref().is_some_and(is_young) {
            self.before = self.mark.replace(Arc::clone(&new));
        }
        self.now = Some(new);
    }
}

impl Handle {
    /// From a function that takes one, on a thread that may wait.
    pub fn new(take: impl Fn() -> Snapshot + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared { take: Box::new(take), last: Mutex::default() }))
    }

    /// The last snapshot, if it is fresh enough, or a new one.
    async fn last(&self) -> Option<Last> {
        let shared = Arc::clone(&self.0);
        // A task of its own: whoever asked may go away, and the next would ask again while this one is still at it.
        let task = tokio::spawn(async move {
            let mut last = shared.last.lock().await;
            if !last.is_fresh(Instant::now()) {
                let of = Arc::clone(&shared);
                last.replace(tokio::task::spawn_blocking(move || (of.take)()).await.ok()?);
            }
            Some(last.clone())
        });
        task.await.ok().flatten()
    }

    /// A snapshot that is at most [`SHARED_FOR`] old; `None` if taking it failed.
    pub async fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.last().await?.now
    }
}

/// Answers until the task is aborted.
pub async fn serve(listener: TcpListener, handle: Handle) {
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, most likely.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        open.retain(|connection| !connection.is_finished());
        if open.len() >= CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            // It had its time. Refusing the new one instead would let those that say nothing keep everybody out.
            oldest.abort();
        }
        open.push_back(tokio::spawn(converse(stream, handle.clone())).abort_handle());
    }
}

async fn converse(stream: TcpStream, handle: Handle) {
    let service = service_fn(move |request| {
        let handle = handle.clone();
        async move { Ok::<_, Infallible>(answer(&request, &handle).await) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEADER_BYTES)
        .max_headers(HEADER_LINES)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .serve_connection(TokioIo::new(stream), service);
    // What a client does wrong is not worth a line in the log.
    let _ = tokio::time::timeout(CONNECTION_WITHIN, connection).await;
}

async fn answer<B: Body>(request: &Request<B>, handle: &Handle) -> Response<Full<Bytes>> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut refusal = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered here\n".to_owned());
        refusal.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match request.uri().path() {
        "/healthz" => plain(StatusCode::OK, "ok\n".to_owned()),
        "/ready" => match handle.snapshot().await.map(|snapshot| snapshot.agent.ready.clone()) {
            Some(Ok(())) => plain(StatusCode::OK, "ready\n".to_owned()),
            Some(Err(why)) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
            None => unavailable(),
        },
        "/metrics" => match handle.last().await {
            Some(last) => metrics(last, request.headers()),
            None => unavailable(),
        },
        _ => plain(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /ready\n".to_owned()),
    }
}

fn unavailable() -> Response<Full<Bytes>> {
    plain(StatusCode::INTERNAL_SERVER_ERROR, "the state could not be collected; see the agent's log\n".to_owned())
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", text)
}

fn respond(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    response
}

fn metrics(last: Last, headers: &HeaderMap) -> Response<Full<Bytes>> {
    let accepts =
        |kind: &str| headers.get_all(ACCEPT).iter().any(|value| value.to_str().is_ok_and(|value| value.contains(kind)));
    let Some(page) = open_metrics(last) else { return unavailable() };
    if accepts("application/openmetrics-text") {
        respond(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", page)
    } else {
        respond(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", classic(&page))
    }
}

fn open_metrics(last: Last) -> Option<String> {
    let mut registry = Registry::with_prefix("qjump");
    registry.register_collector(Box::new(Page { now: last.now?, before: last.before }));
    let mut page = String::new();
    text::encode(&mut page, &registry).ok()?;
    Some(page)
}

/// A page of OpenMetrics in the older text format, for `curl` and for collectors that know no other: there a
/// counter's family has the name of its samples, infos are gauges, and units are part of names alone.
/// (<https://prometheus.io/docs/instrumenting/exposition_formats/>)
fn classic(page: &str) -> String {
    let kind_of = |name: &str| {
        let declared = format!("# TYPE {name} ");
        page.lines().find_map(|line| line.strip_prefix(&declared)).unwrap_or_default()
    };
    let mut text = String::with_capacity(page.len());
    for line in page.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), ..) => continue,
            (Some("#"), Some(keyword), Some(name), Some(rest)) => {
                let (suffix, kind) = match kind_of(name) {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    kind => ("", kind),
                };
                let rest = if keyword == "TYPE" { kind } else { rest };
                text += &format!("# {keyword} {name}{suffix} {rest}");
            }
            _ => text += line,
        }
        text.push('\n');
    }
    text
}

/// What is shown of a snapshot.
#[derive(Debug)]
struct Page {
    now: Arc<Snapshot>,
    before: Option<Arc<Snapshot>>,
}

type Labels = Vec<(&'static str, String)>;

impl Collector for Page {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        self.traffic(&mut families)?;
        self.plan(&mut families)?;
        self.guarantee(&mut families)?;
        self.interfaces(&mut families)?;
        self.agent(&mut families)
    }
}

impl Page {
    fn levels(&self) -> impl Iterator<Item = (&Interface, &LevelState)> {
        self.now.interfaces.iter().flat_map(|interface| interface.levels.iter().map(move |level| (interface, level)))
    }

    /// A sample for each level and each of these reasons: zeros too, or the first increase would not be seen.
    fn by_reason(
        &self,
        wanted: fn(Reason) -> bool,
        value: fn(&LevelState, Reason) -> u64,
    ) -> impl Iterator<Item = (Labels, u64)> {
        self.levels().flat_map(move |(interface, level)| {
            let reasons = Reason::ALL.into_iter().filter(move |&reason| wanted(reason));
            reasons.map(move |reason| {
                let mut labels = of_level(interface, level);
                labels.push(("reason", reason.name().to_owned()));
                (labels, value(level, reason))
            })
        })
    }

    /// A sample for each level that has this.
    fn by_level<V>(&self, value: impl Fn(&Interface, &LevelState) -> Option<V>) -> impl Iterator<Item = (Labels, V)> {
        self.levels().filter_map(move |(interface, level)| Some((of_level(interface, level), value(interface, level)?)))
    }

    fn traffic(&self, families: &mut Families<'_>) -> fmt::Result {
        let leaves = |reason: Reason| !reason.is_drop();
        families.counter(
            "tx",
            "Packets that left, by the level that they asked for; those that were demoted, at a lower one",
            Unit::Other("packets".into()),
            self.by_reason(leaves, |level, reason| level.count(reason).packets),
        )?;
        families.counter(
            "tx",
            "Bytes on the wire of packets that left, by the level that they asked for",
            Unit::Bytes,
            self.by_reason(leaves, |level, reason| level.count(reason).bytes),
        )?;
        families.counter(
            "dropped",
            "Packets that were dropped, by the level that they asked for",
            Unit::Other("packets".into()),
            self.by_reason(Reason::is_drop, |level, reason| level.count(reason).packets),
        )?;
        families.counter(
            "delayed",
            "Packets that had to wait for their level's budget",
            Unit::Other("packets".into()),
            self.by_level(|_, level| Some(level.waited_packets)),
        )?;
        families.gauge(
            "longest_wait",
            "The longest that a packet had to wait for its level's budget since the first load",
            Some(Unit::Seconds),
            self.by_level(|_, level| Some(level.worst_wait_ns as f64 / 1e9)),
        )?;
        families.gauge(
            "budget_used",
            "Share of its budget that a level used between the last two looks, at least a second apart",
            Some(Unit::Other("ratio".into())),
            self.by_level(|interface, level| {
                let before = self.before.as_ref()?;
                let elapsed = self.now.taken.saturating_duration_since(before.taken);
                level.budget_used(before.interface(&interface.name)?.level(level.level)?, elapsed)
            }),
        )
    }

    fn plan(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauge(
            "bound",
            "The longest that a packet of the level is in the network",
            Some(Unit::Seconds),
            self.by_level(|_, level| level.bound_ns.map(|ns| ns / 1e9)),
        )?;
        families.gauge(
            "bound_senders",
            "How many hosts may send at the level at once for its bound to hold",
            None,
            self.by_level(|interface, level| level.bound_ns.map(|_| level.senders.unwrap_or(interface.plan.hosts))),
        )?;
        families.gauge(
            "epoch",
            "Time between the budgets of a level",
            Some(Unit::Seconds),
            self.by_level(|_, level| level.epoch_ns.map(|ns| ns / 1e9)),
        )?;
        families.gauge(
            "level_rate",
            "Bytes on the wire that a level may send in a second",
            Some(Unit::Bytes),
            self.by_level(|_, level| level.rate_bps.map(|bps| bps / 8.0)),
        )?;
        families.gauge(
            "plan_hosts",
            "Hosts that the plan in force is for",
            None,
            self.by_interface(|interface| Some(interface.plan.hosts)),
        )?;
        families.gauge(
            "plan_number",
            "Changes of the plan since the first load",
            None,
            self.by_interface(|interface| Some(interface.plan.number)),
        )
    }

    fn guarantee(&self, families: &mut Families<'_>) -> fmt::Result {
        let found = guarantee::all(&self.now);
        families.gauge(
            "guarantee",
            "1 if nothing that this host can see speaks against the bounds, else 0",
            None,
            found
                .iter()
                .map(|(name, guarantee)| (vec![("interface", (*name).to_owned())], u32::from(guarantee.holds()))),
        )?;
        families.gauge(
            "guarantee_doubt",
            "1 if this speaks against the bounds, else 0",
            None,
            found.iter().flat_map(|(name, guarantee)| {
                Doubt::NAMES.into_iter().map(move |doubt| {
                    let labels = vec![("interface", (*name).to_owned()), ("doubt", doubt.to_owned())];
                    (labels, u32::from(guarantee.doubts.iter().any(|one| one.name() == doubt)))
                })
            }),
        )
    }

    fn by_interface<V>(&self, value: impl Fn(&Interface) -> Option<V>) -> impl Iterator<Item = (Labels, V)> {
        let interfaces = self.now.interfaces.iter();
        interfaces.filter_map(move |one| Some((vec![("interface", one.name.clone())], value(one)?)))
    }

    fn interfaces(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauge(
            "link_up",
            "1 if the interface is up and has a carrier, else 0",
            None,
            self.by_interface(|interface| Some(u32::from(interface.link.is_some_and(|link| link.is_up)))),
        )?;
        families.gauge(
            "link_rate",
            "Bytes that the link carries in a second, if its driver says",
            Some(Unit::Bytes),
            self.by_interface(|interface| Some(interface.link?.speed_bps? as f64 / 8.0)),
        )
    }

    fn agent(&self, families: &mut Families<'_>) -> fmt::Result {
        let Snapshot { agent, taken, .. } = &*self.now;
        families.info("build", "The agent", &vec![("version", env!("CARGO_PKG_VERSION").to_owned())])?;
        let alone = |value| [(Labels::new(), value)].into_iter();
        let started = alone(unix(agent.up_since));
        families.gauge("start_time", "When the agent started, Unix time", Some(Unit::Seconds), started)?;
        families.gauge(
            "ready",
            "1 if all is as the configuration wants it",
            None,
            alone(f64::from(agent.ready.is_ok())),
        )?;
        families.gauge(
            "config_generation",
            "Number of the configuration in force",
            None,
            alone(agent.generation as f64),
        )?;
        let result = |word: &str| vec![("result", word.to_owned())];
        let reloads = [(result("applied"), agent.reloads.applied), (result("refused"), agent.reloads.refused)];
        families.counter("reloads", "Configurations that were read", None, reloads.into_iter())?;
        let last = agent.reloads.last.iter();
        families.gauge(
            "last_reload_timestamp",
            "When a configuration was last read, Unix time",
            Some(Unit::Seconds),
            last.clone().map(|reload| (Labels::new(), unix(reload.at))),
        )?;
        families.gauge(
            "last_reload_applied",
            "1 if the configuration that was last read is in force, 0 if it was refused",
            None,
            last.map(|reload| (Labels::new(), f64::from(reload.result.is_ok()))),
        )?;
        let members = || agent.members.iter();
        let source = |of: &super::members::Members| vec![("source", of.source.clone())];
        families.gauge(
            "cluster_hosts",
            "Hosts that may send, as the plan is to count them",
            None,
            members().filter_map(|members| Some((source(members), members.hosts?))),
        )?;
        families.gauge(
            "cluster_counted_hosts",
            "Hosts on the list of members when it was last read; less than those planned for while a shorter list is on hold",
            None,
            members().filter_map(|members| Some((source(members), members.counted?))),
        )?;
        families.gauge(
            "cluster_age",
            "Time since the list of members was last read",
            Some(Unit::Seconds),
            members().filter_map(|members| Some((source(members), members.age(*taken)?.as_secs_f64()))),
        )
    }
}

fn of_level(interface: &Interface, level: &LevelState) -> Labels {
    vec![("interface", interface.name.clone()), ("level", level.level.number().to_string())]
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Writes families of samples.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn family<M: EncodeMetric>(
        &mut self,
        (name, help, kind): (&str, &str, MetricType),
        unit: Option<&Unit>,
        samples: impl Iterator<Item = (Labels, M)>,
    ) -> fmt::Result {
        let mut encoder = self.0.encode_descriptor(name, help, unit, kind)?;
        for (labels, metric) in samples {
            metric.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn counter<V>(
        &mut self,
        name: &str,
        help: &str,
        unit: impl Into<Option<Unit>>,
        samples: impl Iterator<Item = (Labels, V)>,
    ) -> fmt::Result
    where
        V: EncodeCounterValue,
        ConstCounter<V>: EncodeMetric,
    {
        let samples = samples.map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.family((name, help, MetricType::Counter), unit.into().as_ref(), samples)
    }

    fn gauge<V>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        samples: impl Iterator<Item = (Labels, V)>,
    ) -> fmt::Result
    where
        V: EncodeGaugeValue,
        ConstGauge<V>: EncodeMetric,
    {
        let samples = samples.map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family((name, help, MetricType::Gauge), unit.as_ref(), samples)
    }

    fn info(&mut self, name: &str, help: &str, labels: &Labels) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(labels)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use qjump_ebpf::layout::Count;

    use super::*;
    use crate::agent::{
        members::Members,
        snapshot::{Reload, tests::snapshot},
    };

    fn page(now: Snapshot, before: Option<Snapshot>) -> String {
        open_metrics(Last { now: Some(Arc::new(now)), before: before.map(Arc::new), mark: None }).unwrap()
    }

    /// Whether the page has this line; numbers may be written in another way.
    fn has(page: &str, line: &str) {
        let parts = |line: &str| {
            let (sample, value) = line.rsplit_once(' ').unwrap_or((line, ""));
            (sample.to_owned(), value.parse::<f64>().map_err(|_| value.to_owned()))
        };
        assert!(page.lines().any(|one| parts(one) == parts(line)), "'{line}' is missing in\n{page}");
    }

    #[test]
    fn a_page_says_what_the_snapshot_says() {
        let before = snapshot();
        let mut now = before.clone();
        now.taken += Duration::from_secs(2);
        let level = &mut now.interfaces[0].levels[0];
        level.counts[Reason::Passed.index()] = Count { packets: 50_000, bytes: 14_000_000 };
        level.counts[Reason::OverLimit.index()] = Count { packets: 3, bytes: 840 };
        (level.waited_packets, level.worst_wait_ns) = (7, 1_500);
        now.interfaces[0].position = Some(2);
        now.agent.reloads.refused = 4;
        now.agent.reloads.last =
            Some(Reload { at: UNIX_EPOCH + Duration::from_secs(9), result: Err("level 8".to_owned()) });
        let mut members = Members::fixed(12);
        (members.source, members.counted) = ("file \"x\"".to_owned(), Some(9));
        members.answered = Some(now.taken - Duration::from_secs(30));
        now.agent.members = Some(members);
        let page = page(now, Some(before));
        for line in [
            "# TYPE qjump_tx_packets counter",
            "# UNIT qjump_tx_packets packets",
            "qjump_tx_packets_total{interface=\"eth0\",level=\"7\",reason=\"passed\"} 50000",
            "qjump_tx_packets_total{interface=\"eth0\",level=\"5\",reason=\"oversize_demoted\"} 0",
            "qjump_tx_bytes_total{interface=\"eth0\",level=\"7\",reason=\"passed\"} 14000000",
            "qjump_dropped_packets_total{interface=\"eth0\",level=\"7\",reason=\"over_limit\"} 3",
            "qjump_delayed_packets_total{interface=\"eth0\",level=\"7\"} 7",
            "qjump_longest_wait_seconds{interface=\"eth0\",level=\"7\"} 1.5e-6",
            "qjump_budget_used_ratio{interface=\"eth0\",level=\"7\"} 0.25",
            "qjump_bound_seconds{interface=\"eth0\",level=\"7\"} 6.688e-6",
            "qjump_bound_senders{interface=\"eth0\",level=\"7\"} 12",
            "qjump_bound_senders{interface=\"eth0\",level=\"5\"} 3",
            "qjump_epoch_seconds{interface=\"eth0\",level=\"7\"} 1e-5",
            "qjump_level_rate_bytes{interface=\"eth0\",level=\"5\"} 1000000.0",
            "qjump_guarantee{interface=\"eth0\"} 0",
            "qjump_guarantee_doubt{interface=\"eth0\",doubt=\"not_first\"} 1",
            "qjump_guarantee_doubt{interface=\"eth0\",doubt=\"detached\"} 0",
            "qjump_link_up{interface=\"eth0\"} 1",
            "qjump_link_rate_bytes{interface=\"eth0\"} 1250000000.0",
            "qjump_reloads_total{result=\"refused\"} 4",
            "qjump_last_reload_timestamp_seconds{} 9.0",
            "qjump_last_reload_applied{} 0.0",
            "qjump_cluster_hosts{source=\"file \\\"x\\\"\"} 12",
            "qjump_cluster_counted_hosts{source=\"file \\\"x\\\"\"} 9",
            "qjump_cluster_age_seconds{source=\"file \\\"x\\\"\"} 30.0",
            concat!("qjump_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            has(&page, line);
        }
        assert!(!page.contains("level=\"3\"} NaN") && page.ends_with("# EOF\n"), "{page}");
        // What has no limit has neither an epoch nor a share of one.
        for name in ["epoch_seconds", "budget_used_ratio", "bound_seconds", "level_rate_bytes"] {
            assert!(!page.contains(&format!("qjump_{name}{{interface=\"eth0\",level=\"3\"}}")), "{name}");
        }
    }

    #[test]
    fn families_are_declared_once_and_samples_are_unique() {
        let page = page(snapshot(), None);
        let mut names = HashSet::new();
        let mut samples = HashSet::new();
        let mut family = String::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(names.insert(name.to_owned()) && help.len() > 5, "{line}");
                family = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# UNIT ") {
                let (name, unit) = rest.split_once(' ').unwrap();
                assert!(name == family && name.ends_with(&format!("_{unit}")), "{line}");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family) && samples.insert(line.split_once("} ").unwrap().0), "{line}");
            }
        }
        assert!(names.len() > 20, "{names:?}");
    }

    #[test]
    fn the_older_format_has_the_same_samples() {
        let page = page(snapshot(), None);
        let text = classic(&page);
        let samples =
            |text: &str| text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(samples(&page), samples(&text));
        for line in [
            "# TYPE qjump_tx_packets_total counter",
            "# HELP qjump_delayed_packets_total Packets that had to wait for their level's budget",
            "# TYPE qjump_build_info gauge",
            "# TYPE qjump_bound_seconds gauge",
        ] {
            has(&text, line);
        }
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
    }

    #[test]
    fn spans_are_long_enough() {
        let start = snapshot();
        let mut last = Last::default();
        let mut spans = Vec::new();
        for tenths in [0, 3, 6, 9, 12, 15, 24, 27, 177] {
            last.replace(Snapshot { taken: start.taken + Duration::from_millis(tenths * 100), ..start.clone() });
            let span = last.before.as_ref().map(|before| last.now.as_ref().unwrap().taken - before.taken);
            spans.push(span.map(|span| span.as_millis() / 100));
        }
        assert_eq!(spans, [None, None, None, None, Some(12), Some(15), Some(12), Some(15), Some(153)]);
    }

    #[tokio::test]
    async fn snapshots_are_shared() {
        use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
        let taken = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&taken);
        let handle = Handle::new(move || {
            counted.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_millis(50));
            snapshot()
        });
        let asking: Vec<_> = (0..50)
            .map(|_| {
                let handle = handle.clone();
                tokio::spawn(async move { handle.snapshot().await.is_some() })
            })
            .collect();
        // Some of those who ask go away while it is taken.
        asking.iter().step_by(2).for_each(tokio::task::JoinHandle::abort);
        for asked in asking.into_iter().skip(1).step_by(2) {
            assert!(asked.await.unwrap());
        }
        assert_eq!(taken.load(Relaxed), 1);
        tokio::time::sleep(SHARED_FOR).await;
        assert!(handle.snapshot().await.is_some());
        assert_eq!(taken.load(Relaxed), 2);
        let failing = Handle::new(|| panic!("as a test"));
        assert!(failing.snapshot().await.is_none());
    }
}
