//! What the agent shows, asked for by HTTP as anybody would: by a real Prometheus, by slow clients, by too many.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use qjump::agent::{
    members::Members,
    metrics::{Handle, serve},
    snapshot::{Agent, Reload, Reloads, Snapshot},
};
use qjump_tests::{
    http::{self, get},
    link::{FAR, Link, NEAR, PLAN, succeeded},
    nobody::Folder,
    sender,
};
use serde_json::Value;

/// With those of [`PLAN`], levels of every kind.
const MORE_LEVELS: [&str; 4] = ["--level", "3:unlimited", "--level", "1:10mbit,burst=30000"];

/// An interface that is loaded, and a server that shows it.
struct Shown {
    link: Arc<Link>,
    agent: Arc<Mutex<Agent>>,
    address: SocketAddr,
    // Its tasks end with it.
    _runtime: tokio::runtime::Runtime,
}

impl Shown {
    fn new() -> Result<Self> {
        let link = Arc::new(Link::new()?);
        succeeded(
            &link
                .qjump(&[&["load", "--interface", &link.device, "--queue", "htb"][..], &PLAN, &MORE_LEVELS].concat())?,
        )?;
        let agent = Arc::new(Mutex::new(Agent {
            up_since: SystemTime::now(),
            generation: 1,
            reloads: Reloads { applied: 1, refused: 0, last: Some(Reload { at: SystemTime::now(), result: Ok(()) }) },
            members: Some(Members { answered: Some(Instant::now()), ..Members::fixed(12) }),
            ready: Ok(()),
        }));
        let handle = {
            let (link, agent) = (Arc::clone(&link), Arc::clone(&agent));
            Handle::new(move || {
                let agent = agent.lock().expect("no test fails with it").clone();
                link.near.enter(|| Ok(Snapshot::take(agent))).expect("the namespace is there")
            })
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(serve(listener, handle));
        Ok(Self { link, agent, address, _runtime: runtime })
    }

    fn get(&self, path: &str) -> Result<http::Answer> {
        get(self.address, path, "")
    }

    /// The value of a sample of this test's interface, by a part of its line.
    fn sample(&self, name: &str, labels: &str) -> Result<f64> {
        // The next scrape after the one before is over.
        std::thread::sleep(Duration::from_millis(300));
        let page = self.get("/metrics")?.body;
        let start = format!("{name}{{interface=\"{}\"{labels}}} ", self.link.device);
        let line = page.lines().find_map(|line| line.strip_prefix(&start));
        Ok(line.with_context(|| format!("no {start}in\n{page}"))?.parse()?)
    }

    /// Sends so many messages of this many bytes at a level.
    fn send(&self, level: u32, messages: u32, bytes: usize) -> Result<()> {
        let socket = sender::connected(&self.link.near, NEAR.0, FAR.0, 7000, level)?;
        sender::messages(&socket, messages, bytes);
        Ok(())
    }
}

/// A repository's file.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(name)
}

#[test]
fn what_the_kernel_counts_is_shown() -> Result<()> {
    let shown = Shown::new()?;
    let passed = ",level=\"7\",reason=\"passed\"";
    let before = shown.sample("qjump_tx_packets_total", passed)?;
    shown.send(7, 20, 100)?;
    shown.send(7, 3, 1000)?;
    shown.send(6, 2, 100)?;
    let after = shown.sample("qjump_tx_packets_total", passed)?;
    ensure!((20.0..25.0).contains(&(after - before)), "{before} {after}");
    assert_eq!(shown.sample("qjump_tx_packets_total", ",level=\"7\",reason=\"oversize_demoted\"")?, 3.0);
    assert_eq!(shown.sample("qjump_tx_packets_total", ",level=\"6\",reason=\"not_configured\"")?, 2.0);
    let bytes = shown.sample("qjump_tx_bytes_total", passed)?;
    ensure!(bytes >= 20.0 * f64::from(100 + 42 + 24), "{bytes}");
    // The plan, as status knows it.
    let status = shown.link.status()?;
    let level = &status["levels"][0];
    let bound = level["bound_ns"].as_f64().context("bound")? / 1e9;
    assert!((shown.sample("qjump_bound_seconds", ",level=\"7\"")? - bound).abs() < 1e-12);
    assert_eq!(shown.sample("qjump_bound_senders", ",level=\"7\"")?, 12.0);
    assert_eq!(shown.sample("qjump_plan_hosts", "")?, 12.0);
    assert_eq!(shown.sample("qjump_link_up", "")?, 1.0);
    assert_eq!(shown.sample("qjump_guarantee", "")?, 1.0);
    // An idle second, and one in which a level of 10 Mbit/s was busy.
    std::thread::sleep(Duration::from_millis(1_100));
    shown.sample("qjump_plan_hosts", "")?;
    std::thread::sleep(Duration::from_millis(1_100));
    assert_eq!(shown.sample("qjump_budget_used_ratio", ",level=\"1\"")?, 0.0);
    shown.send(1, 1_000, 500)?;
    let used = shown.sample("qjump_budget_used_ratio", ",level=\"1\"")?;
    ensure!((0.02..=1.1).contains(&used), "{used}");
    Ok(())
}

#[test]
fn what_speaks_against_the_guarantee_is_shown() -> Result<()> {
    let shown = Shown::new()?;
    let device = &shown.link.device;
    assert_eq!(shown.sample("qjump_guarantee", "")?, 1.0);
    let doubt = |name: &str| shown.sample("qjump_guarantee_doubt", &format!(",doubt=\"{name}\""));
    shown.link.near.ip(&format!("link set {device} mtu 9000"))?;
    assert_eq!((doubt("long_frame")?, shown.sample("qjump_guarantee", "")?), (1.0, 0.0));
    shown.link.near.ip(&format!("link set {device} mtu 1500"))?;
    assert_eq!(doubt("long_frame")?, 0.0);
    shown.link.near.batch("tc", &format!("qdisc replace dev {device} root pfifo\n"))?;
    assert_eq!((doubt("queue")?, doubt("detached")?), (1.0, 0.0));
    {
        let mut agent = shown.agent.lock().expect("nothing failed with it");
        let members = agent.members.as_mut().context("members")?;
        members.counted = Some(20);
    }
    assert_eq!(doubt("more_hosts")?, 1.0);
    shown.link.near.ip(&format!("link set {device} down"))?;
    assert_eq!(shown.sample("qjump_link_up", "")?, 0.0);
    // The device goes, and its pins are what is left of it.
    shown.link.near.ip(&format!("link del {device}"))?;
    assert_eq!((doubt("detached")?, shown.sample("qjump_guarantee", "")?), (1.0, 0.0));
    succeeded(&shown.link.qjump(&["unload", "--interface", device])?)?;
    std::thread::sleep(Duration::from_millis(300));
    let page = shown.get("/metrics")?.body;
    ensure!(!page.contains(device.as_str()) && page.contains("qjump_build_info"), "{page}");
    Ok(())
}

#[test]
fn answers_are_as_http_wants_them() -> Result<()> {
    let shown = Shown::new()?;
    let status = |path| shown.get(path).map(|answer| answer.status);
    for (path, wanted) in [("/metrics", 200), ("/healthz", 200), ("/ready", 200), ("/", 404), ("/metrics/", 404)] {
        assert_eq!(status(path)?, wanted, "{path}");
    }
    let request = |text: &str| http::ask(shown.address, text).map(|answer| (answer.status, answer.headers));
    let (refused, headers) = request("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")?;
    ensure!(refused == 405 && headers.to_ascii_lowercase().contains("allow: get, head"), "{headers}");
    assert_eq!(request("HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?.0, 200);
    let many: String = (0..200).map(|number| format!("X-{number}: y\r\n")).collect();
    assert_eq!(get(shown.address, "/healthz", &many)?.status, 431);
    // Who does not say what he wants gets what everybody understands.
    let plain = shown.get("/metrics")?;
    ensure!(plain.headers.contains("text/plain; version=0.0.4") && !plain.body.contains("# EOF"), "{}", plain.headers);
    let open = get(shown.address, "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n")?;
    ensure!(open.headers.contains("application/openmetrics-text; version=1.0.0"), "{}", open.headers);
    ensure!(open.body.ends_with("# EOF\n"), "{}", open.body);
    shown.agent.lock().expect("nothing failed with it").ready = Err("eth7 is not there".to_owned());
    std::thread::sleep(Duration::from_millis(300));
    let ready = shown.get("/ready")?;
    assert_eq!((ready.status, ready.body.as_str()), (503, "not ready: eth7 is not there\n"));
    assert_eq!(status("/healthz")?, 200);
    Ok(())
}

#[test]
fn nobody_can_keep_others_out() -> Result<()> {
    let shown = Shown::new()?;
    let threads = || fs::read_dir("/proc/self/task").map(Iterator::count);
    let before = threads()?;
    // A thousand that say nothing, or a little, and stay.
    let mut idle = Vec::new();
    for number in 0..1_000 {
        let mut stream = TcpStream::connect(shown.address)?;
        if number % 2 == 0 {
            // A connection that was given up already says so.
            let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
        }
        idle.push(stream);
        if number % 100 == 99 {
            assert_eq!(shown.get("/metrics")?.status, 200, "beside {} idle connections", idle.len());
        }
    }
    // Those that are too many were closed.
    let closed = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            // hyper may still say that the request came too late.
            Ok(_) => anyhow::Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    closed(&mut idle[0])?;
    // And those that are not, after a while.
    closed(idle.last_mut().context("the last")?)?;
    // Who sends more than headers can have is not read to the end.
    let mut endless = TcpStream::connect(shown.address)?;
    let line = [b'x'; 1024];
    let sent = (0..100_000).take_while(|_| endless.write_all(&line).is_ok()).count();
    ensure!(sent < 20_000, "{sent} KiB of headers were taken");
    // Who does not read his answer neither.
    let unread: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = TcpStream::connect(shown.address)?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    assert_eq!(shown.get("/metrics")?.status, 200);
    drop(unread);
    ensure!(threads()? < before + 20, "{} threads, before {before}", threads()?);
    Ok(())
}

/// `promtool` with these words, which must succeed.
fn promtool(arguments: &[&str], input: Option<&str>) -> Result<()> {
    let mut child = Command::new("promtool")
        .args(arguments)
        .current_dir(shipped("prometheus"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run promtool; `cargo xtask test` installs it")?;
    child.stdin.take().context("stdin")?.write_all(input.unwrap_or_default().as_bytes())?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "promtool {arguments:?}: {text}");
    Ok(())
}

#[test]
fn promtool_has_nothing_to_complain_about() -> Result<()> {
    promtool(&["check", "rules", "rules.yml"], None)?;
    promtool(&["test", "rules", "rules.test.yml"], None)?;
    let shown = Shown::new()?;
    promtool(&["check", "metrics"], Some(&shown.get("/metrics")?.body))?;
    // It would complain.
    ensure!(promtool(&["check", "metrics"], Some("# TYPE a_ms counter\na_ms 1\n")).is_err(), "promtool takes anything");
    Ok(())
}

/// A Prometheus that scrapes this server every second; ended when dropped.
struct Prometheus {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
    _folder: Folder,
}

impl Prometheus {
    fn new(target: SocketAddr) -> Result<Self> {
        let folder = Folder::new()?;
        let config = folder.path("prometheus.yml");
        let rules = shipped("prometheus/rules.yml").canonicalize()?;
        fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
                 rule_files: [\"{}\"]\n\
                 scrape_configs: [{{job_name: qjump, static_configs: [{{targets: [\"{target}\"]}}]}}]\n",
                rules.display()
            ),
        )?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = folder.path("log");
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("cannot run prometheus; `cargo xtask test` installs it")?;
        Ok(Self { child, address, log, _folder: folder })
    }

    /// What it answers to a call of its API: the data.
    fn ask(&self, path: &str) -> Result<Value> {
        let body = get(self.address, path, "")?.body;
        let answer: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        ensure!(answer["status"] == "success", "{path}: {answer}");
        Ok(answer["data"].clone())
    }

    fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let answer = self.ask(&format!("/api/v1/query?query={}", http::escape(expression)))?;
        answer["result"].as_array().cloned().context("no result")
    }

    /// Waits until it has so many samples of every scrape.
    fn wait_for(&self, scrapes: f64) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let found = self.query("count_over_time(up{job=\"qjump\"}[5m])").unwrap_or_default();
            let number = found.first().and_then(|one| one["value"][1].as_str()?.parse().ok()).unwrap_or(0.0);
            if number >= scrapes {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{number} scrapes: {}", fs::read_to_string(&self.log)?);
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The queries of the dashboard, each with the title of its panel, variables filled in.
fn dashboard() -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(shipped("grafana/qjump.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let filled = |expression: &Value| -> Result<String> {
        let expression = expression.as_str().context("an expression")?.replace("$__rate_interval", "15s");
        Ok(["$instance", "$interface"].iter().fold(expression, |text, name| text.replace(name, ".*")))
    };
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().context("panels")? {
        let title = panel["title"].as_str().context("a title")?;
        for target in panel["targets"].as_array().context("targets")? {
            queries.push((title.to_owned(), filled(&target["expr"])?));
        }
    }
    for annotation in dashboard["annotations"]["list"].as_array().context("annotations")? {
        queries.push(("annotation".to_owned(), filled(&annotation["expr"])?));
    }
    ensure!(queries.iter().all(|(_, query)| !query.contains('$')), "{queries:?}");
    Ok(queries)
}

#[test]
fn a_prometheus_reads_it_and_the_dashboard_has_something_to_show() -> Result<()> {
    let shown = Shown::new()?;
    let prometheus = Prometheus::new(shown.address)?;
    // All that the dashboard shows happens: traffic, packets that are too large, a budget that is used up, a new plan, a doubt.
    prometheus.wait_for(2.0)?;
    shown.send(7, 50, 100)?;
    shown.send(7, 5, 1000)?;
    shown.send(1, 200, 1400)?;
    let device = &shown.link.device;
    let other = ["load", "--interface", device, "--queue", "htb", "--tolerance", "50us"];
    succeeded(&shown.link.qjump(&[&other[..], &PLAN, &MORE_LEVELS].concat())?)?;
    shown.link.near.ip(&format!("link set {device} mtu 9000"))?;
    shown.agent.lock().expect("nothing failed with it").reloads.refused += 1;
    prometheus.wait_for(8.0)?;

    // Its parser of OpenMetrics is strict: a scrape with a mistake in it counts as none.
    let targets = prometheus.ask("/api/v1/targets")?;
    let target = &targets["activeTargets"][0];
    ensure!(target["health"] == "up" && target["lastError"] == "", "{target}");
    assert_eq!(prometheus.query("min_over_time(up{job=\"qjump\"}[5m]) == 0")?, [] as [Value; 0]);
    for (title, query) in dashboard()? {
        let found = prometheus.query(&query).with_context(|| title.clone())?;
        ensure!(!found.is_empty(), "'{title}' has nothing to show: {query}");
    }
    // What Grafana asks for the units and descriptions of every family.
    let metadata = prometheus.ask("/api/v1/metadata")?;
    let families: HashSet<&String> =
        metadata.as_object().context("metadata")?.keys().filter(|name| name.starts_with("qjump_")).collect();
    ensure!(families.len() > 20, "{families:?}");
    for family in families {
        let about = &metadata[family][0];
        ensure!(about["help"].as_str().is_some_and(|help| !help.is_empty()), "{family}: {about}");
    }
    // Every rule can be evaluated, and what is wrong is pending.
    let rules = prometheus.ask("/api/v1/rules")?;
    let rules = rules["groups"][0]["rules"].as_array().context("rules")?;
    for rule in rules {
        ensure!(rule["health"] == "ok", "{rule}");
    }
    let pending: Vec<&Value> =
        rules.iter().filter(|rule| rule["state"] != "inactive").map(|rule| &rule["name"]).collect();
    ensure!(pending.contains(&&Value::from("QjumpGuaranteeNotProvable")), "{pending:?}");
    ensure!(!pending.contains(&&Value::from("QjumpNotEnforced")), "{pending:?}");
    Ok(())
}
