//! Traces: what hosts send, from a file and to a file.
//!
//! A line for each packet: `time,source,destination,level,bytes`, for example `12us,0,3,7,256`. Times
//! ascend, hosts count from 0, bytes are L2 bytes without FCS. Empty lines and what follows a `#` are
//! left out.

use std::{collections::BTreeMap, fmt::Write as _};

use qjump_ebpf::{LEVELS, Level};
use thiserror::Error;

use super::source::{Message, Script};
use crate::units::Nanos;

/// A trace that cannot be used, with its line.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("error at line {line}, column {column}\n{margin} |\n{line} | {text}\n{margin} | {carets}\n{what}")]
pub struct TraceError {
    line: usize,
    column: usize,
    margin: String,
    text: String,
    carets: String,
    what: String,
}

const FIELDS: [&str; 5] = ["time", "source", "destination", "level", "bytes"];

/// Reads a trace for so many hosts: one script for each host and level, and the time of the last packet.
///
/// # Errors
/// What is wrong, with the line and a caret at the place.
pub fn parse(text: &str, hosts: u32) -> Result<(Vec<Script>, Nanos), TraceError> {
    let mut scripts: BTreeMap<(u32, Level), Vec<(u64, Message)>> = BTreeMap::new();
    let mut last = Nanos::from_ns(0);
    for (index, line) in text.lines().enumerate() {
        let data = line.split('#').next().unwrap_or_default();
        if data.trim().is_empty() {
            continue;
        }
        let fail = |start: usize, part: &str, what: String| {
            let trimmed = part.trim();
            let start = start + (part.len() - part.trim_start().len());
            let column = line[..start].chars().count();
            TraceError {
                line: index + 1,
                column: column + 1,
                margin: " ".repeat((index + 1).to_string().len()),
                text: line.to_owned(),
                carets: " ".repeat(column) + &"^".repeat(trimmed.chars().count().max(1)),
                what,
            }
        };
        let mut parts = Vec::with_capacity(FIELDS.len());
        let mut start = 0;
        for part in data.split(',') {
            parts.push((start, part));
            start += part.len() + 1;
        }
        let [time, source, destination, level, bytes] = parts[..] else {
            return Err(fail(0, data, format!("{} fields; a line has {}", parts.len(), FIELDS.join(","))));
        };
        let number = |(start, part): (usize, &str), name: &str, least: u32, below: u32| {
            let value: Option<u32> = part.trim().parse().ok().filter(|value| (least..below).contains(value));
            value.ok_or_else(|| fail(start, part, format!("the {name} is a number from {least} to {}", below - 1)))
        };
        let at: Nanos = time.1.trim().parse().map_err(|error| fail(time.0, time.1, format!("{error}")))?;
        if at < last {
            return Err(fail(time.0, time.1, format!("before the line above, {last}; times ascend")));
        }
        last = at;
        let from = number(source, "source", 0, hosts)?;
        let to = number(destination, "destination", 0, hosts)?;
        if from == to {
            return Err(fail(destination.0, destination.1, "a host does not send to itself".to_owned()));
        }
        let number_of_level = number(level, "level", 0, LEVELS as u32)?;
        let l2_bytes = number(bytes, "packet's size in bytes", 14, 65_536)?;
        let level = Level::new(number_of_level as u8).unwrap_or(Level::BEST_EFFORT);
        let message = Message { destination: to, l2_bytes };
        scripts.entry((from, level)).or_default().push((at.ns(), message));
    }
    if scripts.is_empty() {
        let what = format!("the trace is empty; a line has {}, for example 12us,0,3,7,256", FIELDS.join(","));
        let (margin, carets) = (" ".to_owned(), "^".to_owned());
        return Err(TraceError { line: 1, column: 1, margin, text: String::new(), carets, what });
    }
    let scripts = scripts.into_iter().map(|((host, level), messages)| Script { host, level, messages });
    Ok((scripts.collect(), last))
}

/// The text of a trace that [`parse`] reads back.
pub fn write(scripts: &[Script]) -> String {
    let mut lines: Vec<(u64, u32, Level, Message)> = scripts
        .iter()
        .flat_map(|script| script.messages.iter().map(|&(at, message)| (at, script.host, script.level, message)))
        .collect();
    lines.sort_by_key(|&(at, host, level, _)| (at, host, level));
    let mut text = format!("# {}\n", FIELDS.join(","));
    for (at, host, level, message) in lines {
        let _ = writeln!(text, "{at}ns,{host},{},{level},{}", message.destination, message.l2_bytes);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_lines_into_scripts() {
        let text = "# a comment\n0us,0,3,7,256\n\n 1.5us , 1,3,7,64 # another\n2us,0,2,7,100\n2us,0,2,0,1514\n";
        let (scripts, last) = parse(text, 4).unwrap();
        assert_eq!(last, Nanos::from_ns(2_000));
        let seen: Vec<_> = scripts.iter().map(|s| (s.host, s.level.number(), s.messages.len())).collect();
        assert_eq!(seen, [(0, 0, 1), (0, 7, 2), (1, 7, 1)]);
        assert_eq!(scripts[2].messages, [(1_500, Message { destination: 3, l2_bytes: 64 })]);
        assert_eq!(parse(&write(&scripts), 4).unwrap().0, scripts);
    }

    #[test]
    fn points_at_what_is_wrong() {
        for (text, line, column, part) in [
            ("", 1, 1, "the trace is empty"),
            ("# nothing\n", 1, 1, "the trace is empty"),
            ("0us,0,1,7", 1, 1, "4 fields"),
            ("0,0,1,7,64", 1, 1, "no unit"),
            ("5us,0,1,7,64\n4us,0,1,7,64", 2, 1, "times ascend"),
            ("0us,4,1,7,64", 1, 5, "source is a number from 0 to 3"),
            ("0us,1, x,7,64", 1, 8, "destination is a number"),
            ("0us,1,1,7,64", 1, 7, "itself"),
            ("0us,0,1,8,64", 1, 9, "level is a number from 0 to 7"),
            ("0us,0,1,7,13", 1, 11, "14 to 65535"),
            ("0us,0,1,7,-1", 1, 11, "14 to 65535"),
        ] {
            let error = parse(text, 4).unwrap_err();
            assert_eq!((error.line, error.column), (line, column), "{text}: {error}");
            let shown = error.to_string();
            assert!(shown.contains(part) && shown.contains('^'), "{text}: {shown}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[0-9a-z,.#\\n µ-]{0,200}") {
            let _ = parse(&text, 5);
        }
    }
}
