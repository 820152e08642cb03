//! Files of results, and what is wrong with them.

use std::{collections::HashSet, path::Path};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use crate::measure::result::{Distribution, Document, SCHEMA_VERSION, Stream};

/// Reads a file of results; `-` is standard input.
///
/// # Errors
/// If it cannot be read, is no file of results, is of another version, or broken: with its name, line, column, and what
/// was expected there.
pub(super) fn read(path: &Path) -> Result<Document> {
    let standard_input = path.as_os_str() == "-";
    let shown = if standard_input { "standard input".to_owned() } else { path.display().to_string() };
    let bytes = if standard_input {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin().lock(), &mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    let bytes = bytes.with_context(|| format!("cannot read {shown}"))?;
    parse(&bytes).with_context(|| shown)
}

/// As much of a file as tells what it is.
#[derive(Deserialize)]
struct Head {
    schema_version: Option<Value>,
    runs: Option<IgnoredAny>,
    /// Of `qjump testbed demo`'s summary.
    cases: Option<IgnoredAny>,
    /// Of `qjump plan --json`, `qjump sim --json`.
    levels: Option<IgnoredAny>,
}

fn parse(bytes: &[u8]) -> Result<Document> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => bail!("{}", not_results(kind_of_bytes(bytes))),
    };
    if !text.trim_start().starts_with('{') {
        bail!("{}", not_results(kind_of_text(text)));
    }
    let head: Head = serde_json::from_str(text).map_err(|error| broken(text, &error))?;
    let other = match (&head.schema_version, &head.runs) {
        (_, None) if head.cases.is_some() => Some("the summary of a demonstration (`qjump testbed demo`)"),
        (_, None) if head.levels.is_some() => Some("a plan, a simulation or a status"),
        (None, _) => Some("JSON of something else, without a schema_version"),
        _ => None,
    };
    if let Some(other) = other {
        bail!("{}", not_results(other));
    }
    match head.schema_version.as_ref().map(Value::as_u64) {
        Some(Some(version)) if version == u64::from(SCHEMA_VERSION) => {}
        Some(Some(version)) => bail!(
            "these results are of schema version {version}, and this qjump reads version {SCHEMA_VERSION}; {}",
            if version > u64::from(SCHEMA_VERSION) {
                "use the qjump that wrote them (their \"tool\" says which), or a newer one"
            } else {
                "use the qjump that wrote them (their \"tool\" says which), or measure again"
            }
        ),
        _ => bail!("schema_version is not a whole number; expected {SCHEMA_VERSION}"),
    }
    let document = serde_json::from_str(text).map_err(|error| broken(text, &error))?;
    check(&document)?;
    Ok(document)
}

fn not_results(what: &str) -> String {
    format!("this is {what}, not results; expected the JSON that `qjump measure` and `qjump testbed run` write")
}

fn kind_of_bytes(bytes: &[u8]) -> &'static str {
    match bytes {
        [0x1f, 0x8b, ..] => "compressed (gzip); unpack it first",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "compressed (zstd); unpack it first",
        [0x89, b'P', b'N', b'G', ..] => "a picture",
        _ => "binary",
    }
}

fn kind_of_text(text: &str) -> &'static str {
    let start = text.trim_start();
    let starts = |with: &str| start.get(..with.len()).is_some_and(|head| head.eq_ignore_ascii_case(with));
    match () {
        () if start.is_empty() => "empty",
        () if starts("<svg") => "a picture",
        () if starts("<!doctype html") => "a report already",
        () if starts("Value ") => "a percentile distribution (.hgrm)",
        () if starts("#[") || starts("\"StartTimestamp\"") => "an interval log (.hlog)",
        () if starts("results,run,stream,") => "CSV",
        () if starts("[[") || starts("[cluster]") => "a configuration",
        () if starts("[") => "a JSON list",
        () => "text",
    }
}

/// What serde_json says, with the line and a mark below the place.
fn broken(text: &str, error: &serde_json::Error) -> anyhow::Error {
    const BEFORE: usize = 50;
    const AFTER: usize = 30;
    let said = error.to_string();
    let what = said.split(" at line ").next().unwrap_or(&said);
    let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or("");
    // The column counts bytes.
    let before = line.get(..error.column().saturating_sub(1)).unwrap_or(line).chars().count();
    let from = before.saturating_sub(BEFORE);
    let excerpt: String = line.chars().skip(from).take(BEFORE + AFTER).collect();
    let hint = if what == "trailing characters" { " (one object was expected; these may be JSON lines)" } else { "" };
    anyhow!(
        "line {}, column {}: {what}{hint}\n  {}\n  {:>width$}",
        error.line(),
        error.column(),
        crate::chart::clean(&excerpt),
        "^",
        width = before - from + 1
    )
}

/// What the form does not say, but whoever draws it relies on.
fn check(document: &Document) -> Result<()> {
    let mut runs = HashSet::new();
    for (at, run) in document.runs.iter().enumerate() {
        if !runs.insert(&run.name) {
            bail!("runs[{at}]: a second run is called '{}'; names of runs must differ", run.name);
        }
        let mut streams = HashSet::new();
        for (number, stream) in run.streams.iter().enumerate() {
            let place = || format!("runs[{at}].streams[{number}] ('{}', '{}')", run.name, stream.name);
            if !streams.insert(&stream.name) {
                bail!("{}: a second stream of this name; names of streams must differ within a run", place());
            }
            for (name, distribution) in distributions(stream) {
                check_distribution(distribution).with_context(|| format!("{}.{name}", place()))?;
            }
        }
    }
    Ok(())
}

/// All distributions of a stream, with their names.
pub(super) fn distributions(stream: &Stream) -> impl Iterator<Item = (&str, &Distribution)> {
    let more = [("service", &stream.service), ("lateness", &stream.lateness)];
    let more = more.into_iter().filter_map(|(name, distribution)| Some((name, distribution.as_ref()?)));
    let segments = stream.segments.iter().map(|segment| (segment.name.as_str(), &segment.times));
    [("response", &stream.response)].into_iter().chain(more).chain(segments)
}

fn check_distribution(distribution: &Distribution) -> Result<()> {
    let pairs = &distribution.histogram;
    if let Some(at) = pairs.windows(2).position(|pair| pair[0].0 >= pair[1].0) {
        bail!(
            "histogram[{}]: the value {} does not ascend; expected more than {}",
            at + 1,
            pairs[at + 1].0,
            pairs[at].0
        );
    }
    let counted = pairs.iter().try_fold(0u64, |sum, pair| sum.checked_add(pair.1));
    if counted != Some(distribution.samples) {
        let counted = counted.map_or("more than 2^64".to_owned(), |sum| sum.to_string());
        bail!("the histogram has {counted} samples; expected {}, as \"samples\" says", distribution.samples);
    }
    for percentile in &distribution.percentiles {
        if !(percentile.percent > 0.0 && percentile.percent < 100.0) {
            bail!("a percentile is {}; expected a number between 0 and 100", percentile.percent);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn small() -> Value {
        let response = json!({
            "samples": 3, "min_ns": 5, "mean_ns": 6, "max_ns": 7, "percentiles": [], "histogram": [[5, 2], [7, 1]],
        });
        let stream = json!({
            "name": "s", "sample": "rtt", "level": null, "bound_ns": null, "violations": null, "response": response,
            "service": null, "lateness": null, "segments": [], "counts": null, "worst": [], "series": [],
            "generator": null,
        });
        let run = json!({
            "name": "one", "about": "", "duration_ns": 1, "warm_up_ns": 0, "streams": [stream], "figures": [],
        });
        json!({
            "schema_version": 1, "tool": "qjump 0.1.0", "name": "measurement", "title": "A title", "started_unix_ns": 0,
            "command": ["qjump"], "host": {}, "emulated": false, "setting": null, "runs": [run], "curves": [],
            "claims": [], "notes": [],
        })
    }

    fn refused(bytes: &[u8]) -> String {
        format!("{:#}", parse(bytes).unwrap_err())
    }

    fn with(change: impl FnOnce(&mut Value)) -> String {
        let mut value = small();
        change(&mut value);
        refused(value.to_string().as_bytes())
    }

    #[test]
    fn reads_what_is_right() {
        let document = parse(small().to_string().as_bytes()).unwrap();
        assert_eq!(document.runs[0].streams[0].response.histogram, [(5, 2), (7, 1)]);
    }

    #[test]
    fn says_where_and_what_was_expected() {
        let pretty = format!("{:#}", small());
        let line = 1 + pretty.lines().position(|line| line.contains("\"started_unix_ns\"")).unwrap();
        let error = refused(pretty.replace("\"started_unix_ns\": 0", "\"started_unix_ns\": \"now\"").as_bytes());
        for part in [&format!("line {line}, column "), "\"now\"", "expected u64", "\n", "^"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        // The mark is below the end of what is wrong.
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines[2].find('^'), lines[1].rfind('"'), "{error}");
        let half = &pretty[..pretty.len() / 2];
        assert!(refused(half.as_bytes()).contains("EOF while parsing"), "{}", refused(half.as_bytes()));
        let twice = format!("{}\n{}", small(), small());
        assert!(refused(twice.as_bytes()).contains("JSON lines"));
        assert!(refused("{\"ü\": ü}".as_bytes()).contains("line 1"));
    }

    #[test]
    fn versions_are_named_both() {
        for version in [0, 2] {
            let error = with(|value| value["schema_version"] = version.into());
            assert!(error.contains(&format!("version {version}")) && error.contains("version 1"), "{error}");
            assert!(error.contains("use the qjump that wrote them"), "{error}");
        }
        assert!(with(|value| value["schema_version"] = "one".into()).contains("expected 1"));
    }

    #[test]
    fn other_files_are_named() {
        for (text, name) in [
            ("", "empty"),
            ("  <svg>", "a picture"),
            ("<!DOCTYPE html>", "a report already"),
            ("       Value     Percentile", "hgrm"),
            ("#[StartTime: 1 (seconds since epoch)]", "hlog"),
            ("[cluster]\nhosts = 12", "a configuration"),
            ("[1]", "a JSON list"),
            ("hello", "text"),
            ("{\"a\": 1}", "something else"),
            ("{\"schema_version\": 1, \"cases\": []}", "demonstration"),
            ("{\"levels\": []}", "a plan"),
        ] {
            let error = refused(text.as_bytes());
            assert!(error.contains(name) && error.contains("not results"), "{text}: {error}");
        }
        assert!(refused(&[0x1f, 0x8b, 8, 0]).contains("unpack"));
        assert!(refused(&[0xff, 0xfe]).contains("binary"));
    }

    #[test]
    fn contradictions_are_found() {
        let response = |value: &mut Value| value["runs"][0]["streams"][0]["response"].take();
        for (part, error) in [
            ("a second run is called 'one'", with(|v| v["runs"] = json!([v["runs"][0], v["runs"][0]]))),
            ("expected 4", with(|v| v["runs"][0]["streams"][0]["response"]["samples"] = 4.into())),
            (
                "does not ascend",
                with(|v| v["runs"][0]["streams"][0]["response"]["histogram"] = json!([[7, 1], [5, 2]])),
            ),
            (
                "more than 2^64",
                with(|v| v["runs"][0]["streams"][0]["response"]["histogram"] = json!([[7, u64::MAX], [8, 2]])),
            ),
            (
                "between 0 and 100",
                with(|v| {
                    let percentile = json!({"percent": 100.0, "ns": 1, "low_ns": 1, "high_ns": null});
                    v["runs"][0]["streams"][0]["response"]["percentiles"] = json!([percentile]);
                }),
            ),
            ("expected struct Distribution", with(|v| drop(response(v)))),
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_damage_panics(cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..6)) {
            let mut bytes = small().to_string().into_bytes();
            for (at, byte, kind) in cuts {
                if bytes.is_empty() {
                    break;
                }
                let at = at.index(bytes.len());
                match kind {
                    0 => bytes[at] = byte,
                    1 => bytes.truncate(at),
                    _ => bytes.insert(at, byte),
                }
            }
            if let Err(error) = parse(&bytes) {
                let error = format!("{error:#}");
                prop_assert!(!error.is_empty() && !error.chars().any(|letter| letter.is_control() && letter != '\n'), "{}", error);
            }
        }
    }
}
