//! Results as a page of Markdown, for documentation.

use crate::{
    measure::result::{Claim, Curve, Document, Figure, Run, Stream},
    report::utc,
    units::{show_ns, show_rate},
};

use super::{Experiment, claims::percentile};

/// Header and rows.
type Rows = (Vec<&'static str>, Vec<Vec<String>>);

/// One line for each stream of each run; the last column is the p99 in units of nP/R.
fn streams(document: &Document) -> Rows {
    let header = vec![
        "case",
        "what",
        "samples",
        "lost",
        "dropped by limiter",
        "p50",
        "p99",
        "p99.9",
        "max",
        "bound",
        "over bound",
        "p99 in nP/R",
    ];
    let unit_ns = document.setting["unit_ns"].as_f64();
    let rows = document.runs.iter().flat_map(|run| run.streams.iter().map(move |stream| row(run, stream, unit_ns)));
    (header, rows.collect())
}

fn row(run: &Run, stream: &Stream, unit_ns: Option<f64>) -> Vec<String> {
    let time = |ns: Option<u64>| ns.map_or("-".to_owned(), |ns| format!("{:.1} us", ns as f64 / 1e3));
    let number = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
    let percent = |percent| time(percentile(&stream.response, percent));
    vec![
        run.name.clone(),
        stream.name.clone(),
        stream.response.samples.to_string(),
        number(stream.counts.map(|counts| counts.lost_in_network())),
        number(stream.counts.and_then(|counts| counts.limiter_dropped)),
        percent(50.0),
        percent(99.0),
        percent(99.9),
        time(stream.response.max_ns),
        time(stream.bound_ns),
        number(stream.violations),
        percentile(&stream.response, 99.0)
            .zip(unit_ns)
            .map_or("-".to_owned(), |(ns, unit)| format!("{:.2}", ns as f64 / unit)),
    ]
}

/// One line for each single figure.
fn figures(runs: &[Run]) -> Rows {
    let rows = runs
        .iter()
        .flat_map(|run| run.figures.iter().map(|figure| vec![run.name.clone(), figure.name.clone(), value(figure)]));
    (vec!["case", "figure", "value"], rows.collect())
}

fn value(figure: &Figure) -> String {
    match figure.unit.as_str() {
        "ns" => show_ns(figure.value),
        "bit/s" => show_rate(figure.value),
        "1" => format!("{:.3}", figure.value),
        unit => format!("{:.1} {unit}", figure.value),
    }
}

/// One line for each point of the curves.
fn curves(curves: &[Curve]) -> Rows {
    let rows = curves.iter().flat_map(|curve| {
        curve.points.iter().map(|(x, y)| {
            let label = curve.labels.get(*x as usize).cloned();
            vec![curve.name.clone(), label.unwrap_or_else(|| format!("{x:.2}")), format!("{y:.3}")]
        })
    });
    (vec!["curve", "x", "y"], rows.collect())
}

const fn verdict(claim: &Claim) -> &'static str {
    match claim.holds {
        Some(true) => "holds",
        Some(false) => "DOES NOT HOLD",
        None => "not decided",
    }
}

fn axes(document: &Document) -> String {
    document.curves.first().map_or(String::new(), |curve| format!("x: {}; y: {}", curve.x, curve.y))
}

/// On what, and when.
fn machine(document: &Document) -> String {
    let Document { host, .. } = document;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("unknown").to_owned();
    let virtual_machine = host["cpu"]["virtual"].as_bool() == Some(true);
    let (kind, when) = match document.setting["guest"]["virtual_time"].as_bool() {
        // Its clock begins anew in each guest.
        Some(true) => ("a guest in virtual time, ", String::new()),
        Some(false) => ("a guest in real time, ", format!(", {}", utc(document.started_unix_ns))),
        None => (
            if virtual_machine { "a virtual machine with " } else { "" },
            format!(", {}", utc(document.started_unix_ns)),
        ),
    };
    format!(
        "{kind}{} x {}, Linux {}{when}; hosts and switches are network namespaces",
        host["cpu"]["count"],
        text(&host["cpu"]["model"]),
        text(&host["kernel"]),
    )
}

/// A page of Markdown: what the paper saw, what was seen here, and why they differ.
pub(super) fn page(experiment: &Experiment, document: &Document) -> String {
    let mut text = format!(
        "# {}\n\n{}.\n\n**The paper** ({}): {}\n\n**Here**, by `{}` ({}):\n",
        document.name,
        document.title,
        experiment.figure,
        experiment.paper,
        document.setting["guest"]["command"].as_str().map_or_else(|| document.command.join(" "), str::to_owned),
        machine(document)
    );
    for (header, rows) in [streams(document), figures(&document.runs), curves(&document.curves)] {
        if !rows.is_empty() {
            text += &format!("\n| {} |\n|{}\n", header.join(" | "), "---|".repeat(header.len()));
            for row in rows {
                text += &format!("| {} |\n", row.join(" | "));
            }
        }
    }
    if !document.curves.is_empty() {
        text += &format!("\n{}\n", axes(document));
    }
    if !document.claims.is_empty() {
        text += "\n";
    }
    for claim in &document.claims {
        text += &format!("* {}: {} ({})\n", verdict(claim), claim.claim, claim.measured);
    }
    text += &format!("\n**Why they differ:** {}\n\n", experiment.differs);
    for note in &document.notes {
        text += &format!("* {note}\n");
    }
    text
}
