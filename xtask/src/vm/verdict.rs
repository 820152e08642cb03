//! What a guest's results say.

use super::boot::End;
use std::fmt;

/// Begins each line of a guest that is about its job (tests/src/bin/guest.rs).
const MARK: &str = "@@qjump ";

/// What became of a guest and its steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The kernel's release, once it was up.
    pub release: Option<String>,
    /// The steps that ended, in their order.
    pub steps: Vec<Outcome>,
    /// Why this is all there is; `None` if the guest did all of its job.
    pub broken: Option<String>,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Its exit status.
    pub status: u8,
    /// Tests that passed, failed and were ignored, as libtest counts them.
    pub tests: Counts,
    /// The files that it was to leave and that came over whole: name and text.
    pub files: Vec<(String, String)>,
}

/// Tests of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
    /// Ignored.
    pub ignored: u32,
}

impl Verdict {
    /// Reads the results of a guest that ended like this. `console` is what its kernel said.
    pub fn read(results: &str, console: &str, end: End) -> Self {
        let mut verdict = Self { release: None, steps: Vec::new(), broken: None };
        let (mut under_way, mut test, mut counts, mut done) = (None, None, Counts::default(), false);
        let (mut arriving, mut files) = (None, Vec::new());
        // The guest's own word on what went wrong comes on its console.
        let mut failed =
            console.lines().rev().find_map(|line| marked(line)?.strip_prefix("failed ").map(str::to_owned));
        for line in results.lines() {
            match marked(line).and_then(|line| line.split_once(' ').or(Some((line, "")))) {
                Some(("up", release)) => verdict.release = Some(release.to_owned()),
                Some(("begin", name)) => {
                    (under_way, counts) = (Some(name.to_owned()), Counts::default());
                    (arriving, files) = (None, Vec::new());
                }
                Some(("file", name)) => arriving = Some((name.to_owned(), String::new())),
                Some(("whole", _)) => files.extend(arriving.take()),
                Some(("end", rest)) => {
                    let (status, name) = rest.split_once(' ').unwrap_or((rest, ""));
                    let status = status.parse().unwrap_or(u8::MAX);
                    let files = std::mem::take(&mut files);
                    verdict.steps.push(Outcome { name: name.to_owned(), status, tests: counts, files });
                    (under_way, test) = (None, None);
                }
                Some(("done", _)) => done = true,
                Some(("failed", why)) => failed = Some(why.to_owned()),
                _ => match &mut arriving {
                    Some((_, text)) => *text += &format!("{}\n", line.trim_end_matches('\r')),
                    None => {
                        count(line, &mut counts);
                        test = name_of_test(line).map(str::to_owned).or(test);
                    }
                },
            }
        }
        if !done {
            let place = match (&under_way, &verdict.release) {
                (Some(step), _) => {
                    let test = test.map_or_else(String::new, |test| format!(", test {test}"));
                    format!("during {step}{test}")
                }
                (None, Some(_)) => "between two steps".to_owned(),
                (None, None) => "before it was up".to_owned(),
            };
            let what = match (failed, panic(console), end) {
                (Some(why), ..) => why,
                (None, Some(panic), _) => panic.to_owned(),
                (None, None, End::TimeOut) => "its time was over, and it was ended".to_owned(),
                (None, None, End::Off) => "it was off before its job was done".to_owned(),
            };
            verdict.broken = Some(format!("{place}: {what}"));
        }
        verdict
    }

    /// Whether everything was done and passed.
    pub fn passed(&self) -> bool {
        self.broken.is_none() && !self.steps.is_empty() && self.steps.iter().all(|step| step.status == 0)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.ignored > 0 { write!(f, ", {} ignored", self.ignored) } else { Ok(()) }
    }
}

fn marked(line: &str) -> Option<&str> {
    line.split_once(MARK).map(|(_, rest)| rest.trim())
}

/// `test result: ok. 3 passed; 1 failed; 0 ignored; …`
fn count(line: &str, counts: &mut Counts) {
    let Some((_, rest)) = line.split_once("test result: ") else { return };
    let number = |word: &str| {
        let before = rest.split(&[';', '.']).find_map(|part| part.trim().strip_suffix(word));
        before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
    };
    counts.passed += number("passed");
    counts.failed += number("failed");
    counts.ignored += number("ignored");
}

/// The test that a line begins: `test name ... `.
fn name_of_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.split_once(" ... ").map(|(name, _)| name)
}

fn panic(console: &str) -> Option<&str> {
    let at = console.find("Kernel panic").or_else(|| console.find("BUG: ")).or_else(|| console.find("Oops: "))?;
    console[at..].lines().next().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: &str = "@@qjump up 6.1.0\r\n@@qjump begin wire\r\ntest a ... ok\n";
    const END: &str =
        "test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n@@qjump end 0 wire\n";

    #[test]
    fn a_job_that_was_done_is_counted() {
        let verdict = Verdict::read(&format!("{UP}{END}@@qjump done\n"), "", End::Off);
        assert_eq!(verdict.release.as_deref(), Some("6.1.0"));
        let tests = Counts { passed: 2, failed: 0, ignored: 1 };
        assert_eq!(verdict.steps, [Outcome { name: "wire".into(), status: 0, tests, files: Vec::new() }]);
        assert!(verdict.passed());
    }

    #[test]
    fn files_come_over_whole_or_not_at_all() {
        let files = |text: &str| {
            let results =
                format!("@@qjump up 6.1.0\r\n@@qjump begin bound\r\n{text}@@qjump end 0 bound\r\n@@qjump done\r\n");
            Verdict::read(&results, "", End::Off).steps.remove(0).files
        };
        let whole = "said\r\n@@qjump file a.json\r\n{\r\n  \"a\": 1\r\n}\r\n@@qjump whole\r\n";
        let json = ("a.json".to_owned(), "{\n  \"a\": 1\n}\n".to_owned());
        assert_eq!(files(whole), std::slice::from_ref(&json));
        let second = "@@qjump file a.md\r\n# a\r\n@@qjump whole\r\n";
        assert_eq!(files(&format!("{whole}{second}")), [json, ("a.md".to_owned(), "# a\n".to_owned())]);
        assert_eq!(files("@@qjump file a.json\r\n{\r\n"), []);
        assert_eq!(files("said\r\n"), []);
    }

    #[test]
    fn what_was_not_done_names_the_test_and_the_reason() {
        let broken = |results: &str, console: &str, end| Verdict::read(results, console, end).broken.unwrap();
        assert_eq!(broken(UP, "", End::TimeOut), "during wire, test a: its time was over, and it was ended");
        let console = "[ 1.0] Kernel panic - not syncing: Fatal\n[ 1.1] CPU: 0\n";
        assert_eq!(broken(UP, console, End::Off), "during wire, test a: Kernel panic - not syncing: Fatal");
        assert_eq!(
            broken(&format!("{UP}{END}"), "", End::Off),
            "between two steps: it was off before its job was done"
        );
        assert_eq!(broken("", "@@qjump failed no /job.json", End::Off), "before it was up: no /job.json");
    }

    #[test]
    fn a_failed_step_and_an_empty_job_are_no_success() {
        assert!(!Verdict::read(&format!("{UP}@@qjump end 101 wire\n@@qjump done\n"), "", End::Off).passed());
        assert!(!Verdict::read("@@qjump up 6.1.0\n@@qjump done\n", "", End::Off).passed());
    }
}
