//! One page that needs nothing else: no network, no script.

use serde_json::Value;

use super::{Report, grid::Grid, pictures, tables, text::utc};
use crate::chart::escape;

/// A browser that obeys it loads and runs nothing, even if a text of the results got past the escaping.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";
const STYLE: &str = include_str!("style.css");
/// A longer table is folded.
const FOLDED: usize = 40;

pub(super) fn page(report: &Report) -> String {
    let title = escape(&report.title());
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n"
    );
    html += &about(report);
    html += "</header>\n<main>\n";
    html += &list("Read this first", "notes", &tables::notes(report));
    let tables = tables::all(report);
    let table = |title: &str| tables.iter().find(|grid| grid.title == title).map(folded).unwrap_or_default();
    let drawn = |pictures: Vec<crate::chart::Picture>, class: &str| {
        pictures.iter().map(|picture| figure(&picture.svg(), class)).collect::<String>()
    };
    let experiment = pictures::experiment(report).iter().map(|(_, svg)| figure(svg, "")).collect::<String>();
    let verdicts = list("", "verdicts", &tables::verdicts(report));
    html += &section("Summary", &[table(tables::CLAIMS), table(tables::SUMMARY), verdicts, table(tables::FIGURES)]);
    html += &section("Experiment", &[experiment]);
    html += &section("Distributions", &[drawn(pictures::distributions(report), "")]);
    html += &section("Comparison of runs", &[table(tables::COMPARISON), table(tables::FIGURE_COMPARISON)]);
    html += &section("Over time", &[drawn(pictures::over_time(report), "small")]);
    let segments = pictures::segments(report).map(|svg| figure(&svg, "")).unwrap_or_default();
    html += &section("Where the time goes", &[segments, table(tables::SEGMENTS), table(tables::SENDER)]);
    html += &section("Largest samples", &[table(tables::WORST)]);
    html += &section("Setting and machine", &[settings(report)]);
    html += "</main>\n</body>\n</html>\n";
    html
}

/// Who measured when, and with which command.
fn about(report: &Report) -> String {
    let mut html = String::new();
    for source in &report.sources {
        let document = &source.document;
        let title = match report.sources.len() {
            1 => String::new(),
            _ => format!("<strong>{}</strong>: {}. ", escape(&source.label), escape(&document.title)),
        };
        html += &format!(
            "<p class=\"meta\">{title}{}, {}</p>\n<pre class=\"command\">{}</pre>\n",
            escape(&document.tool),
            utc(document.started_unix_ns),
            escape(&document.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "))
        );
    }
    html
}

/// As a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_alphanumeric() || "-_./:,=@%+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

fn section(title: &str, parts: &[String]) -> String {
    if parts.iter().all(String::is_empty) {
        return String::new();
    }
    let id = title.to_lowercase().replace(' ', "-");
    format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n{}</section>\n", parts.concat())
}

fn figure(svg: &str, class: &str) -> String {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    format!("<figure{class}>{svg}</figure>\n")
}

fn folded(grid: &Grid) -> String {
    if grid.len() <= FOLDED {
        return grid.html();
    }
    format!("<details><summary>{}: {} rows</summary>\n{}</details>\n", grid.title, grid.len(), grid.html())
}

fn list(title: &str, class: &str, lines: &[String]) -> String {
    if lines.is_empty() {
        return String::new();
    }
    let items: String = lines.iter().map(|line| format!("<li>{}</li>\n", escape(line))).collect();
    let title = if title.is_empty() { String::new() } else { format!("<strong>{title}</strong>") };
    format!("<div class=\"{class}\">{title}<ul>\n{items}</ul></div>\n")
}

/// The runs in words, the rack and load, and the machine: folded, because they are long.
fn settings(report: &Report) -> String {
    let mut html = String::new();
    for source in &report.sources {
        let document = &source.document;
        let label = if report.sources.len() > 1 { format!(" of {}", escape(&source.label)) } else { String::new() };
        let runs: Vec<Value> = document
            .runs
            .iter()
            .map(|run| {
                serde_json::json!({
                    "run": run.name,
                    "about": run.about,
                    "measured s": run.duration_ns as f64 / 1e9,
                    "warm-up s": run.warm_up_ns as f64 / 1e9,
                })
            })
            .collect();
        for (name, value) in
            [("Runs", &Value::Array(runs)), ("Setting", &document.setting), ("Machine", &document.host)]
        {
            if !is_empty(value) {
                html += &format!("<details><summary>{name}{label}</summary>\n{}</details>\n", tree(value));
            }
        }
    }
    html
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Any value as lists of names and values. The reader of files limits how deep it can be.
fn tree(value: &Value) -> String {
    match value {
        Value::Object(fields) => {
            let fields =
                fields.iter().map(|(name, value)| format!("<dt>{}</dt><dd>{}</dd>", escape(name), tree(value)));
            format!("<dl>{}</dl>", fields.collect::<Vec<_>>().join("\n"))
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            let items = items.iter().map(|item| format!("<li>{}</li>", tree(item)));
            format!("<ol>{}</ol>", items.collect::<Vec<_>>().join("\n"))
        }
        Value::Array(items) => items.iter().map(tree).collect::<Vec<_>>().join(", "),
        Value::String(text) if text.contains('\n') => format!("<pre>{}</pre>", lines(text)),
        Value::String(text) => escape(text),
        other => escape(&other.to_string()),
    }
}

/// Of a text with line ends, which are its only control characters worth keeping.
fn lines(text: &str) -> String {
    text.lines().map(escape).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_quoted_as_for_a_shell() {
        assert_eq!(quoted("--assert"), "--assert");
        assert_eq!(quoted("p99<300us"), "'p99<300us'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn values_become_lists_and_stay_text() {
        let value = serde_json::json!({"<k>": ["<v>", 1], "deep": [{"a": null}], "lines": "one\n<two>"});
        let html = tree(&value);
        assert!(html.contains("<dt>&lt;k&gt;</dt><dd>&lt;v&gt;, 1</dd>"), "{html}");
        assert!(html.contains("<ol><li><dl><dt>a</dt><dd>null</dd></dl></li></ol>"), "{html}");
        assert!(html.contains("<pre>one\n&lt;two&gt;</pre>"), "{html}");
    }
}
