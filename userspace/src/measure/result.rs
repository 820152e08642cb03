//! What a measurement leaves behind: the one form of results that is written, read, compared and drawn.
//!
//! Times are whole nanoseconds and rates bit/s, and names end with their unit. What was not measured is
//! absent (`null`), never zero.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::host;

/// The version of [`Document`]. A file of another version is refused, with both numbers.
pub const SCHEMA_VERSION: u32 = 1;

/// A file of results: one call of `qjump measure`, or one experiment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// [`SCHEMA_VERSION`] of whoever wrote it.
    pub schema_version: u32,
    /// What wrote it: `qjump 0.1.0`.
    pub tool: String,
    /// `measurement`, or the name of the experiment.
    pub name: String,
    /// One line for people.
    pub title: String,
    /// When it began, ns since 1970 (UTC).
    pub started_unix_ns: u64,
    /// The command that made it, word by word.
    pub command: Vec<String>,
    /// The machine, as far as it can decide a result.
    pub host: Value,
    /// Whether namespaces or virtual machines stood for hosts and switches.
    pub emulated: bool,
    /// The rack, the load and the plan, as far as there were any.
    pub setting: Value,
    /// The cases, in the order in which they ran.
    pub runs: Vec<Run>,
    /// What an experiment shows across its cases.
    pub curves: Vec<Curve>,
    /// What was claimed, and whether it held.
    pub claims: Vec<Claim>,
    /// What a reader must know before he believes the figures: interruptions, missing rights, noise.
    pub notes: Vec<String>,
}

impl Document {
    /// A document without results, begun now, with what is to be known of this process and this machine: the interfaces
    /// are those of the calling thread's network namespace.
    pub fn new(name: &str, title: &str) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            tool: concat!("qjump ", env!("CARGO_PKG_VERSION")).to_owned(),
            name: name.to_owned(),
            title: title.to_owned(),
            started_unix_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64),
            command: std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect(),
            host: host::metadata(),
            emulated: false,
            setting: Value::Null,
            runs: Vec::new(),
            curves: Vec::new(),
            claims: Vec::new(),
            notes: Vec::new(),
        }
    }
}

/// One case: `alone`, `contended`, `qjump`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its name, unique within the document.
    pub name: String,
    /// One line for people.
    pub about: String,
    /// How long was measured, without the warm-up, ns.
    pub duration_ns: u64,
    /// What was left out at the beginning, ns.
    pub warm_up_ns: u64,
    /// What was sampled, one entry for each level or application.
    pub streams: Vec<Stream>,
    /// Single figures: throughput, operations a second.
    pub figures: Vec<Figure>,
}

/// What one sample is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sample {
    /// From a send to the answer's arrival. Never halved.
    #[default]
    Rtt,
    /// From a send to the arrival at the other side, by clocks that are known to agree.
    OneWay,
    /// From a request to its answer, with the server's work.
    Request,
    /// The distance of two clocks, without its sign.
    ClockOffset,
    /// The time that a step of a computation took.
    Step,
}

/// Samples of one kind: one level of one target, or one application.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stream {
    /// Its name, unique within the run: `udp level 7`.
    pub name: String,
    /// What one sample is.
    pub sample: Sample,
    /// The level at which it was sent.
    pub level: Option<u8>,
    /// What the plan promises for one sample, ns.
    pub bound_ns: Option<u64>,
    /// Samples above the bound.
    pub violations: Option<u64>,
    /// From the intended send: what a user waits.
    pub response: Distribution,
    /// From the actual send: what the network takes. The gap to `response` is what held the sender up.
    pub service: Option<Distribution>,
    /// How late the sender's own sends were.
    pub lateness: Option<Distribution>,
    /// The way of a message, split by the kernel's time stamps.
    pub segments: Vec<Segment>,
    /// What became of the messages.
    pub counts: Option<Counts>,
    /// The largest samples, the largest first.
    pub worst: Vec<Worst>,
    /// How the samples went over time.
    pub series: Vec<Interval>,
    /// Whether the sender decided the result.
    pub generator: Option<Generator>,
}

/// A distribution of times, ns. Kept whole: percentiles can be computed again, and files merged.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many.
    pub samples: u64,
    /// The smallest.
    pub min_ns: Option<u64>,
    /// The average.
    pub mean_ns: Option<u64>,
    /// The largest, exactly.
    pub max_ns: Option<u64>,
    /// Those that have at least ten samples beyond them.
    pub percentiles: Vec<Percentile>,
    /// The histogram, three significant digits: pairs of a value and how many samples had it, ascending.
    pub histogram: Vec<(u64, u64)>,
}

/// One percentile, with the interval in which it lies with a confidence of 95 % (order statistics; samples
/// that depend on each other make it too narrow).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Percentile {
    /// 50, 99, 99.9.
    pub percent: f64,
    /// Its value.
    pub ns: u64,
    /// The lower end of its interval.
    pub low_ns: u64,
    /// The upper end; absent if it lies beyond the last sample.
    pub high_ns: Option<u64>,
}

/// A part of a message's way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Segment {
    /// `app-sched`, `sched-snd`, `snd-rx` …: from which stamp to which.
    pub name: String,
    /// It is made of others, and not a part beside them.
    #[serde(default)]
    pub sum: bool,
    /// How long it took.
    pub times: Distribution,
    /// Messages for which one of the two stamps did not come.
    pub missing: u64,
}

/// What became of messages. Where it is not known which way they were lost, `lost` alone counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Handed to the kernel, after the warm-up.
    pub sent: u64,
    /// Answered (or arrived, one-way), each once.
    pub received: u64,
    /// Not answered.
    pub lost: u64,
    /// Those of `lost` that did not reach the other side.
    pub lost_up: Option<u64>,
    /// Those of `lost` whose answer was lost.
    pub lost_down: Option<u64>,
    /// Came again.
    pub duplicated: u64,
    /// Came after a later one.
    pub reordered: u64,
    /// Came changed, and were not counted as received.
    pub corrupted: u64,
    /// The kernel refused to send.
    pub refused: u64,
    /// Dropped by this host's limiter, by its own counters; absent without a limiter.
    pub limiter_dropped: Option<u64>,
}

impl Counts {
    /// Those of `lost` that this host's limiter did not drop.
    pub fn lost_in_network(&self) -> u64 {
        self.lost.saturating_sub(self.limiter_dropped.unwrap_or(0))
    }
}

/// One of the largest samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worst {
    /// Its number in the stream.
    pub sequence: u64,
    /// When it was to be sent, ns since the run began.
    pub at_ns: u64,
    /// Response time.
    pub ns: u64,
    /// How late it was sent.
    pub lateness_ns: u64,
}

/// What happened in one second of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// When it began, ns since the run began.
    pub at_ns: u64,
    /// Samples.
    pub samples: u64,
    /// Lost.
    pub lost: u64,
    /// Median.
    pub p50_ns: Option<u64>,
    /// 99th percentile.
    pub p99_ns: Option<u64>,
    /// Largest.
    pub max_ns: Option<u64>,
}

/// The health of whoever sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generator {
    /// The sender itself, not the network, decided the result.
    pub limited: bool,
    /// Why, for people; absent if not.
    pub why: Option<String>,
    /// Whether its threads had real-time priority.
    pub real_time: bool,
}

/// A single figure of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `bulk throughput`.
    pub name: String,
    /// How much.
    pub value: f64,
    /// `bit/s`, `1/s`, `ns`, `1`.
    pub unit: String,
}

/// A line that an experiment draws across its runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Which of the document's pictures it belongs to.
    pub picture: String,
    /// Its name in the legend.
    pub name: String,
    /// What the axis across shows, with its unit.
    pub x: String,
    /// What the axis upwards shows, with its unit.
    pub y: String,
    /// The points, ascending.
    pub points: Vec<(f64, f64)>,
    /// What the points are about, if x has no unit but only counts them from 0: bars are drawn then.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
}

/// Something that was claimed of the results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// `p99 with qjump at most 2 x alone + bound`, `max<bound`.
    pub claim: String,
    /// Whether it held; absent if the run could not decide it.
    pub holds: Option<bool>,
    /// The measured side, for people.
    pub measured: String,
}
