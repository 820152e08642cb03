//! Reports of results, whatever these say: nothing panics, no text leaves its place, and the page is well-formed.

#[path = "../../tests/src/results.rs"]
mod results;

use proptest::{collection::vec, option, prelude::*};
use qjump::{
    measure::result::{
        Claim, Counts, Curve, Distribution, Document, Figure, Generator, Interval, Percentile, Run, SCHEMA_VERSION,
        Sample, Segment, Stream, Worst,
    },
    report::{Format, Report},
};
use serde_json::{Value, json};

const FORMATS: [Format; 5] = [Format::Html, Format::Svg, Format::Csv, Format::Hlog, Format::Text];

/// Names and sentences, among them such as want to be something else.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "\\PC{0,12}",
        Just("<script>alert(1)</script>".to_owned()),
        Just("\"><img src=x onerror=alert(1)>".to_owned()),
        Just("' onload='alert(1)".to_owned()),
        Just("</title></style></svg><b>&amp;".to_owned()),
        Just("]]>\u{0}\u{1b}[31m\u{fffe}\r\n".to_owned()),
        Just("a very long name that goes on and on ".repeat(9)),
    ]
}

fn distribution() -> impl Strategy<Value = Distribution> {
    let pairs = vec((any::<u64>(), 0u64..1 << 40), 0..12);
    let percentile = (prop_oneof![Just(50.0), Just(99.0), Just(99.9), any::<f64>()], any::<(u64, u64, Option<u64>)>());
    (pairs, vec(percentile, 0..6), any::<[Option<u64>; 3]>()).prop_map(|(mut pairs, percentiles, extremes)| {
        pairs.sort_unstable();
        pairs.dedup_by_key(|pair| pair.0);
        let [min_ns, mean_ns, max_ns] = extremes;
        Distribution {
            samples: pairs.iter().map(|pair| pair.1).sum(),
            min_ns,
            mean_ns,
            max_ns,
            percentiles: percentiles
                .into_iter()
                .map(|(percent, (ns, low_ns, high_ns))| Percentile { percent, ns, low_ns, high_ns })
                .collect(),
            histogram: pairs,
        }
    })
}

fn sample() -> impl Strategy<Value = Sample> {
    prop_oneof![
        Just(Sample::Rtt),
        Just(Sample::OneWay),
        Just(Sample::Request),
        Just(Sample::ClockOffset),
        Just(Sample::Step)
    ]
}

fn interval() -> impl Strategy<Value = Interval> {
    any::<(u64, u64, u64, Option<u64>, Option<u64>, Option<u64>)>().prop_map(
        |(at_ns, samples, lost, p50_ns, p99_ns, max_ns)| Interval { at_ns, samples, lost, p50_ns, p99_ns, max_ns },
    )
}

fn counts() -> impl Strategy<Value = Counts> {
    any::<([u64; 7], [Option<u64>; 3])>().prop_map(|(counts, split)| Counts {
        sent: counts[0],
        received: counts[1],
        lost: counts[2],
        lost_up: split[0],
        lost_down: split[1],
        duplicated: counts[3],
        reordered: counts[4],
        corrupted: counts[5],
        refused: counts[6],
        limiter_dropped: split[2],
    })
}

fn stream() -> impl Strategy<Value = Stream> {
    let segment = (text(), distribution(), any::<u64>());
    let segment = segment.prop_map(|(name, times, missing)| Segment { name, sum: false, times, missing });
    let worst =
        any::<[u64; 4]>().prop_map(|[sequence, at_ns, ns, lateness_ns]| Worst { sequence, at_ns, ns, lateness_ns });
    let generator = (any::<(bool, bool)>(), option::of(text())).prop_map(|((limited, real_time), why)| Generator {
        limited,
        why,
        real_time,
    });
    let times = (distribution(), option::of(distribution()), option::of(distribution()), vec(segment, 0..4));
    let more = (option::of(counts()), vec(worst, 0..3), vec(interval(), 0..5), option::of(generator));
    let about = (text(), sample(), any::<(Option<u8>, Option<u64>, Option<u64>)>());
    (about, times, more).prop_map(|((name, sample, (level, bound_ns, violations)), times, more)| {
        let (response, service, lateness, segments) = times;
        let (counts, worst, series, generator) = more;
        Stream {
            name,
            sample,
            level,
            bound_ns,
            violations,
            response,
            service,
            lateness,
            segments,
            counts,
            worst,
            series,
            generator,
        }
    })
}

fn run() -> impl Strategy<Value = Run> {
    let unit = prop_oneof![Just("bit/s".to_owned()), Just("ns".to_owned()), text()];
    let figure = (text(), any::<f64>(), unit).prop_map(|(name, value, unit)| Figure { name, value, unit });
    (text(), text(), any::<(u64, u64)>(), vec(stream(), 0..4), vec(figure, 0..3)).prop_map(
        |(name, about, (duration_ns, warm_up_ns), streams, figures)| Run {
            name,
            about,
            duration_ns,
            warm_up_ns,
            streams,
            figures,
        },
    )
}

fn value() -> impl Strategy<Value = Value> {
    (text(), text(), any::<Option<i64>>()).prop_map(
        |(name, text, number)| json!({ name.clone(): text.clone(), "list": [text, number, { name: ["deep"] }] }),
    )
}

fn document() -> impl Strategy<Value = Document> {
    let points = vec(any::<(f64, f64)>(), 0..10);
    let picture = prop_oneof![Just("one".to_owned()), text()];
    let labels = prop_oneof![Just(Vec::new()), vec(text(), 0..4)];
    // Where there are labels, x counts them.
    let points = (labels, points).prop_map(|(labels, mut points)| {
        if !labels.is_empty() {
            points.iter_mut().enumerate().for_each(|(at, point)| point.0 = at as f64);
        }
        (labels, points)
    });
    let curve = (picture, text(), text(), text(), points).prop_map(|(picture, name, x, y, (labels, points))| Curve {
        picture,
        name,
        x,
        y,
        points,
        labels,
    });
    let claim =
        (text(), any::<Option<bool>>(), text()).prop_map(|(claim, holds, measured)| Claim { claim, holds, measured });
    let about = (text(), text(), text(), any::<(u64, bool)>(), vec(text(), 0..4), value(), value());
    let results = (vec(run(), 0..4), vec(curve, 0..12), vec(claim, 0..3), vec(text(), 0..3));
    (about, results).prop_map(|(about, (runs, curves, claims, notes))| {
        let (tool, name, title, (started_unix_ns, emulated), command, host, setting) = about;
        Document {
            schema_version: SCHEMA_VERSION,
            tool,
            name,
            title,
            started_unix_ns,
            command,
            host,
            emulated,
            setting,
            runs,
            curves,
            claims,
            notes,
        }
    })
}

/// All tags of a page, as written; a `<` of a text would begin one.
fn tags(html: &str) -> Vec<&str> {
    let style = html.find("</style>").unwrap_or(0);
    let tags = html[style..].split('<').skip(1);
    tags.map(|tag| tag.split('>').next().expect("a split has a part")).collect()
}

const ELEMENTS: [&str; 40] = [
    "body", "caption", "circle", "dd", "desc", "details", "div", "dl", "dt", "figure", "h1", "h2", "head", "header",
    "html", "li", "line", "main", "ol", "p", "polyline", "polygon", "pre", "rect", "section", "small", "strong",
    "style", "summary", "svg", "table", "tbody", "td", "text", "th", "thead", "title", "tr", "ul", "!DOCTYPE",
];

/// Every element is one of ours, is closed where it should be, and has no attribute that runs anything.
fn check_markup(html: &str) -> Result<(), TestCaseError> {
    let mut open = Vec::new();
    for tag in tags(html) {
        let name = tag.trim_start_matches('/').split([' ', '/']).next().expect("a split has a part");
        prop_assert!(ELEMENTS.contains(&name), "<{}>", tag);
        for (number, part) in tag.split('"').enumerate() {
            // Outside quotes there are names of attributes alone.
            prop_assert!(number % 2 == 1 || !part.contains(" on"), "<{}>", tag);
        }
        if let Some(name) = tag.strip_prefix('/') {
            let last = open.pop();
            prop_assert!(last == Some(name) || ["style", "head"].contains(&name) || ["body", "html"].contains(&name));
        } else if !tag.ends_with('/') && !["body", "!DOCTYPE"].contains(&name) {
            open.push(name);
        }
    }
    prop_assert!(open.is_empty(), "{:?} are not closed", open);
    prop_assert!(!html.chars().any(|letter| letter.is_control() && letter != '\n'));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_results_say_the_report_is_a_report(documents in vec(document(), 0..3)) {
        let report = Report::new(documents.clone());
        for format in FORMATS {
            report.render(format).expect("every format but .hgrm holds everything");
        }
        let html = report.html();
        check_markup(&html)?;
        check_markup(&report.svg(None).expect("the main picture"))?;
        // Of the formats of other tools and the terminal, no line is anybody's but ours.
        prop_assert!(!report.text(true).chars().any(|letter| letter.is_control() && letter != '\n'));
        for sampled in documents.iter().flat_map(|document| &document.runs).flat_map(|run| &run.streams) {
            let only = Document { runs: vec![Run { streams: vec![sampled.clone()], ..Run::default() }], ..documents[0].clone() };
            prop_assert!(Report::new(vec![only]).render(Format::Hgrm).is_ok());
        }
        let _ = report.json();
    }
}

#[test]
fn the_table_has_one_unit_a_column_and_hides_what_is_chance() {
    let text = Report::new(vec![results::experiment(1, 5_000)]).text(false);
    let header = text.lines().find(|line| line.starts_with("run ")).expect("a header");
    for part in ["p50 us", "p99 us", "p99.9 us", "max us", "bound us", "over bound", "lost up", "lost down"] {
        assert!(header.contains(part), "{part}: {header}");
    }
    let row = text.lines().find(|line| line.starts_with("qjump  ")).expect("a row");
    let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
    // 5,000 samples have five beyond p99.9.
    assert_eq!((cells[0], cells[1], cells[2], cells[10]), ("qjump", "udp level 7", "rtt", "-"), "{row}");
    for part in [
        "note: Emulated:",
        "fewer than ten samples",
        "Measured for 10s after a warm-up of 1s.",
        "does not hold  max < bound with qjump",
        "undecided",
        "contended, udp level 7: ",
        "samples over the bound of 2.843ms",
        "bulk throughput Mbit/s",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("–") && Report::new(vec![results::experiment(1, 5_000)]).text(true).contains("–"));
}

#[test]
fn files_are_compared_run_by_run() {
    let mut other = results::experiment(2, 5_000);
    other.name = "again".to_owned();
    let report = Report::new(vec![results::experiment(1, 5_000), other]);
    let json = report.json();
    let comparisons = json["comparisons"].as_array().expect("a list");
    // Two within each file, and three across.
    assert_eq!(comparisons.len(), 7);
    let across = comparisons.iter().find(|pair| pair["run"]["name"] == pair["against"]["name"]).expect("one across");
    assert_eq!((&across["run"]["results"], &across["against"]["results"]), (&json!("again"), &json!("switch-queue")));
    let ratio = &across["streams"][0]["p50"];
    assert!(ratio["low"].as_f64() < ratio["value"].as_f64() && ratio["value"].as_f64() < ratio["high"].as_f64());
    // The same network: the ratio can be 1.
    assert!(ratio["low"].as_f64() < Some(1.0) && ratio["high"].as_f64() > Some(1.0), "{ratio}");
    let slower = comparisons.iter().find(|pair| pair["run"]["name"] == "contended").expect("contended");
    assert!(slower["streams"][0]["p50"]["low"].as_f64() > Some(100.0), "{slower}");
    assert!(
        json["documents"][0]["runs"][0]["streams"][0]["response"]["histogram"].as_array().is_some_and(Vec::is_empty)
    );
}

#[test]
fn runs_and_streams_can_be_chosen() {
    let report = || Report::new(vec![results::experiment(1, 2_000)]);
    let one = report().only(&["qjump".to_owned()], &["udp level 7".to_owned()]).expect("both are there");
    let text = one.text(false);
    assert!(text.contains("qjump") && !text.contains("udp level 0") && !text.contains("\ncontended"), "{text}");
    assert!(one.render(Format::Hgrm).is_ok());
    let error = report().render(Format::Hgrm).expect_err("six streams").to_string();
    assert!(error.contains("there are 6") && error.contains("--run 'qjump' --stream 'udp level 7'"), "{error}");
    let error = report().only(&["jump".to_owned()], &[]).err().expect("no such run").to_string();
    assert!(error.contains("'jump'") && error.contains("'alone', 'contended', 'qjump'"), "{error}");
    let error = report().svg(Some("x")).expect_err("no such picture").to_string();
    assert!(error.contains("'distribution'"), "{error}");
}

#[test]
fn every_percentile_has_its_row() {
    let document = results::experiment(1, 2_000);
    let csv = String::from_utf8(Report::new(vec![document.clone()]).render(Format::Csv).expect("CSV")).expect("text");
    let rows: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert!(csv.lines().count() == csv.matches("\r\n").count() && rows.iter().all(|row| row.len() == rows[0].len()));
    let response = &document.runs[2].streams[0].response;
    let mine: Vec<&Vec<&str>> =
        rows.iter().filter(|row| row[1..3] == ["qjump", "udp level 7"] && row[5] == "response").collect();
    assert_eq!(mine.len(), response.percentiles.len());
    for (row, percentile) in mine.iter().zip(&response.percentiles) {
        assert_eq!((row[14].parse(), row[15].parse()), (Ok(percentile.percent), Ok(percentile.ns)));
    }
}

#[test]
fn many_streams_stay_readable() {
    let mut document = results::experiment(1, 500);
    let run = document.runs[0].clone();
    document.runs = (0..30).map(|number| Run { name: format!("run {number}"), ..run.clone() }).collect();
    let report = Report::new(vec![document]);
    let main = report.svg(None).expect("a picture");
    assert!(main.contains("(36 more not shown)") && main.contains("24: "), "more than can be drawn are counted");
    let html = report.html();
    for number in 0..30 {
        assert!(html.contains(&format!("run {number}")), "{number}");
    }
    // 60 streams in pictures of at most eight, of one stream's name each; and how each went over time; and one of segments.
    assert_eq!(html.matches("<svg").count(), 4 + 4 + 60 + 1);
}

#[test]
fn a_run_without_samples_is_said_and_drawn_as_empty() {
    let mut document = results::experiment(1, 500);
    document.runs.truncate(1);
    document.runs[0].streams = vec![Stream { name: "nobody".to_owned(), ..Stream::default() }];
    document.runs.push(Run { name: "nothing".to_owned(), ..Run::default() });
    let report = Report::new(vec![document]);
    let (html, text) = (report.html(), report.text(false));
    assert!(html.contains("no samples") && html.contains("alone: no samples."), "{html}");
    assert!(text.contains("alone: no samples.") && text.contains("run 'nothing' has no results"), "{text}");
}

#[test]
fn an_experiments_curves_are_its_picture() {
    let report = Report::new(vec![results::sweep(1)]);
    let (first, latency) = (report.svg(None).expect("the first"), report.svg(Some("latency")).expect("by its name"));
    assert!(first.contains("requests, 1/s") && !first.contains("p99"), "{first}");
    // Linear from 0 to a round number; and a log axis where values span decades.
    assert!(first.contains(">\n40000\n<") && first.contains(">\n10000\n<") && first.contains(">\n0\n<"), "{first}");
    for label in ["100", "1000", "10000", "p50", "p99", "rate of the level, Mbit/s"] {
        assert!(latency.contains(&format!(">\n{label}\n<")), "{label}: {latency}");
    }
    let distribution = report.svg(Some("distribution")).expect("always there");
    assert!(distribution.contains("round-trip time, us") && distribution.contains("bound"), "{distribution}");
    assert_eq!(report.html().matches("<svg").count(), 2 + 1 + 2 + 1);
}
