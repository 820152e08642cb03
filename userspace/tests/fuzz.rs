//! No configuration and no trace makes the program panic, however broken.
//!
//! Every file of the corpus is mutated: bytes changed, cut out, doubled, taken from other files. So many
//! times as QJUMP_FUZZ_RUNS says, from the seed QJUMP_FUZZ_SEED.

use std::{fs, path::PathBuf};

use qjump::{config::File, sim::trace, tag::rules::needs_tag};
use rand::RngExt as _;
use rand_xoshiro::{Xoshiro256PlusPlus, rand_core::SeedableRng as _};

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

/// The files of one corpus.
fn corpus(kind: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(kind);
    let mut files: Vec<PathBuf> =
        fs::read_dir(&folder).expect("the corpus").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{} has {files:?}", folder.display());
    files.iter().map(|file| fs::read(file).expect("a file")).collect()
}

/// Words that mean something, or too much.
const WORDS: [&str; 16] = [
    "0",
    "-1",
    "1e308",
    "nan",
    "99999999999999999999",
    "65536",
    "\"10gbit\"",
    "\"0us\"",
    "\"\"",
    "[[app]]\n",
    "[[level]]\n",
    "level = 0\n",
    "rate = \"1tbit\"\n",
    "µ",
    "=",
    "\n",
];

fn mutate(text: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Xoshiro256PlusPlus) {
    let at = random.random_range(0..=text.len());
    let end = (at + random.random_range(0..20)).min(text.len());
    match random.random_range(0..6) {
        0 if at < text.len() => text[at] = random.random(),
        1 => drop(text.drain(at..end)),
        2 => {
            let copy = text[at..end].to_vec();
            text.splice(at..at, copy);
        }
        3 => {
            let other = &others[random.random_range(0..others.len())];
            let from = random.random_range(0..=other.len());
            let to = (from + random.random_range(0..60)).min(other.len());
            text.splice(at..end, other[from..to].iter().copied());
        }
        4 => drop(text.splice(at..end, WORDS[random.random_range(0..WORDS.len())].bytes())),
        _ => {
            // A digit for a digit keeps the rest valid.
            if let Some(digit) = text[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                *digit = b'0' + random.random_range(0..10);
            }
        }
    }
}

/// Runs `check` on mutations of a corpus; how many of them it accepted.
fn fuzz(kind: &str, check: impl Fn(&str) -> bool) -> u64 {
    let corpus = corpus(kind);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(from_environment("QJUMP_FUZZ_SEED", 1));
    let mut accepted = 0;
    for _ in 0..from_environment("QJUMP_FUZZ_RUNS", 20_000) {
        let mut text = corpus[random.random_range(0..corpus.len())].clone();
        for _ in 0..random.random_range(1..6) {
            mutate(&mut text, &corpus, &mut random);
        }
        // What is no text is refused before the parsers.
        accepted += u64::from(check(&String::from_utf8_lossy(&text)));
    }
    accepted
}

#[test]
fn configurations_are_planned_or_refused() {
    let accepted = fuzz("config", |text| match File::parse(text).and_then(|file| file.plan(|_| Ok(()))) {
        Ok(answer) => {
            for level in &answer.plan.levels {
                assert!(level.bound_ns.is_none_or(|bound| bound.is_finite() && bound >= 0.0), "{text}");
                assert!(level.limit().is_ok(), "{text}");
                assert!(!level.guaranteed || level.bound_ns.is_some(), "{text}");
            }
            // What can be printed is printed.
            assert!(!answer.plan.to_string().contains("NaN"), "{text}");
            serde_json::to_string(&answer.plan.to_json()).expect("JSON");
            true
        }
        Err(message) => {
            assert!(!message.is_empty(), "{text}");
            false
        }
    });
    assert!(accepted > 100, "{accepted} accepted: the mutations break everything");
}

#[test]
fn rules_are_read_or_refused() {
    let accepted = fuzz("config", |text| match File::parse(text) {
        Ok(file) => match file.rules(|name| (name == "root").then_some(0)) {
            Ok(rules) => needs_tag(&rules).len() <= rules.iter().len() && rules.iter().len() > 0,
            Err(message) => {
                assert!(message.contains('^'), "{text}");
                false
            }
        },
        Err(_) => false,
    });
    assert!(accepted > 100, "{accepted} accepted: the mutations break everything");
}

#[test]
fn traces_are_read_or_refused() {
    let accepted = fuzz("trace", |text| match trace::parse(text, 24) {
        Ok((scripts, last)) => {
            assert!(scripts.iter().all(|script| script.messages.iter().all(|(at, _)| *at <= last.ns())), "{text}");
            assert_eq!(trace::parse(&trace::write(&scripts), 24).expect("what was written").0, scripts);
            true
        }
        Err(error) => {
            assert!(error.to_string().contains('^'), "{text}");
            false
        }
    });
    assert!(accepted > 100, "{accepted} accepted: the mutations break everything");
}
