//! Reports as people get them: what the command writes, what a browser makes of it, and what it says to mistakes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use qjump::measure::result::{Document, SCHEMA_VERSION};
use qjump_tests::{
    link::{binary, failed, succeeded},
    png::share_not_white,
    results,
};
use serde_json::Value;

/// A folder that goes when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("qjump-report-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn results(&self, name: &str, document: &Document) -> Result<PathBuf> {
        let file = self.file(name);
        fs::write(&file, serde_json::to_string(document)?)?;
        Ok(file)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn report(files: &[&Path], more: &[&str]) -> Result<Output> {
    Ok(Command::new(binary()).arg("report").args(files).args(more).output()?)
}

fn written(files: &[&Path], output: &Path) -> Result<String> {
    succeeded(&report(files, &["--output", &output.to_string_lossy()])?)?;
    Ok(fs::read_to_string(output)?)
}

/// Runs a browser that has no network, not even loopback.
fn browser(folder: &Folder, arguments: &[&str], page: &Path) -> Result<Output> {
    let profile = format!("--user-data-dir={}", folder.file("profile").display());
    let output = Command::new("timeout")
        .args([
            "120",
            "unshare",
            "--net",
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        // What pages say to the console goes to standard error.
        .args(["--enable-logging=stderr", &profile])
        .args(arguments)
        .arg(format!("file://{}", page.display()))
        .output()?;
    ensure!(output.status.success(), "chromium: {output:?}");
    Ok(output)
}

/// What the page said to the console; the browser's own pages speak there, too.
fn console(output: &Output) -> Vec<String> {
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let ours = |line: &&str| line.contains("CONSOLE") && !line.contains("source: chrome://");
    lines.lines().filter(ours).map(str::to_owned).collect()
}

/// Asks the page about itself: the numbers of things, what is wider than the page, labels that are cut off, and those
/// that lie on each other.
const QUESTIONS: &str = r#"<script>
const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".t") && !e.closest("svg")
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName);
const cut = [], overlapping = [];
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect();
  const labels = [...svg.querySelectorAll("text")].map(e => [e.textContent.trim(), e.getBoundingClientRect()]);
  for (const [name, a] of labels) {
    if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1) cut.push(name);
    for (const [other, b] of labels)
      if (name < other && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        overlapping.push(name + " / " + other);
  }
}
const answer = JSON.stringify({
  title: document.title, scripts: document.scripts.length, wide, cut, overlapping,
  scroll: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
document.body.innerHTML = "";
document.body.append("<<" + answer + ">>");
</script></body>"#;

/// What a copy of the page that asks itself answers, in a window of this width.
fn ask(folder: &Folder, html: &str, width: u32) -> Result<Value> {
    let policy = html.find("<meta http-equiv").context("a policy")?;
    let end = policy + html[policy..].find('>').context("its end")?;
    let copy = format!("{}{}", &html[..policy], &html[end + 1..]).replace("</body>", QUESTIONS);
    let file = folder.file("asked.html");
    fs::write(&file, copy)?;
    let dumped = browser(folder, &[&format!("--window-size={width},2000"), "--dump-dom"], &file)?;
    let dom = String::from_utf8(dumped.stdout)?;
    let answer = dom.split("&lt;&lt;").nth(1).and_then(|rest| rest.split("&gt;&gt;").next()).context("no answer")?;
    Ok(serde_json::from_str(&answer.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))?)
}

#[test]
fn a_browser_without_network_shows_all_of_it() -> Result<()> {
    let folder = Folder::new("page")?;
    let mut first = results::experiment(1, 20_000);
    first.runs[2].name = "<script>alert(1)</script>".to_owned();
    first.curves = results::sweep(3).curves;
    let mut second = results::experiment(2, 20_000);
    second.name = "another day".to_owned();
    let files = [folder.results("first.json", &first)?, folder.results("second.json", &second)?];
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    for (name, files, pictures) in [
        // Two of the experiment, distributions in one picture, six streams over time, their segments.
        ("one.html", &files[..1], 2 + 1 + 6 + 1),
        ("two.html", &files[..], 2 + 2 + 12 + 1),
    ] {
        let page = folder.file(name);
        let html = written(files, &page)?;
        let shown = browser(&folder, &["--dump-dom"], &page)?;
        assert_eq!(console(&shown), [""; 0]);
        let dom = String::from_utf8(shown.stdout)?;
        for part in
            ["alone", "contended", "&lt;script&gt;alert(1)&lt;/script&gt;", "udp level 7", "does not hold", "Emulated"]
        {
            assert!(dom.contains(part), "{part}");
        }
        assert_eq!(dom.matches("<svg").count(), pictures, "{name}");
        assert!(!html.contains("http://") || html.matches("http://").count() == pictures, "only SVG's own namespace");
        assert!(!html.contains("https://"));
        for width in [1280, 400] {
            let answer = ask(&folder, &html, width)?;
            println!("{name} {width}: {answer}");
            assert_eq!(answer["scripts"], 1, "the question's own");
            assert!(answer["title"].as_str().is_some_and(|title| !title.is_empty()));
            for what in ["wide", "cut", "overlapping"] {
                assert_eq!(answer[what], serde_json::json!([]), "{what} at {width}");
            }
            assert!(answer["scroll"].as_i64() <= Some(0), "{answer}");
        }
        let picture = folder.file("page.png");
        let screenshot = format!("--screenshot={}", picture.display());
        let shown = browser(&folder, &[&screenshot, "--window-size=1280,3000"], &page)?;
        assert_eq!(console(&shown), [""; 0]);
        let share = share_not_white(&fs::read(&picture)?)?;
        assert!((0.01..0.5).contains(&share), "{share} of the page is not white");
    }
    Ok(())
}

#[test]
fn the_checks_of_the_page_can_fail() -> Result<()> {
    let folder = Folder::new("checks")?;
    let file = folder.results("results.json", &results::experiment(1, 2_000))?;
    let html = written(&[&file], &folder.file("page.html"))?;
    // The page's own policy stops a script that got in, and the console says so.
    let broken = folder.file("broken.html");
    fs::write(&broken, html.replace("</main>", "<script>document.title = 'taken'</script></main>"))?;
    let shown = browser(&folder, &["--dump-dom"], &broken)?;
    assert_eq!(console(&shown).len(), 1);
    assert!(!String::from_utf8(shown.stdout)?.contains("<title>taken"));
    let wide = html.replace("</main>", "<div style=\"width: 3000px\">wide</div></main>");
    assert_eq!(ask(&folder, &wide, 1280)?["wide"], serde_json::json!(["DIV"]));
    let moved = ask(&folder, &html.replace("<text x=\"", "<text x=\"-"), 1280)?;
    assert!(moved["cut"].as_array().is_some_and(|cut| cut.len() > 10), "{moved}");
    let heaped = ask(&folder, &html.replace("<text x=\"", "<text x=\"9\" class=\""), 1280)?;
    assert!(heaped["overlapping"].as_array().is_some_and(|pairs| pairs.len() > 10), "{heaped}");
    let blank = folder.file("blank.html");
    fs::write(&blank, "<!DOCTYPE html>")?;
    let picture = folder.file("blank.png");
    browser(&folder, &[&format!("--screenshot={}", picture.display())], &blank)?;
    assert_eq!(share_not_white(&fs::read(&picture)?)?, 0.0);
    Ok(())
}

#[test]
fn pictures_alone_are_whole() -> Result<()> {
    let folder = Folder::new("pictures")?;
    let mut many = results::experiment(1, 5_000);
    many.name = "<b>&\"'".to_owned();
    many.runs[0].name = "a ]]> & <b>".to_owned();
    let distributions = folder.results("distributions.json", &many)?;
    let curves = folder.results("curves.json", &results::sweep(1))?;
    for (file, words) in [(&distributions, "round-trip time, us"), (&curves, "rate of the level, Mbit/s")] {
        let picture = file.with_extension("svg");
        assert!(written(&[file], &picture)?.contains(words));
        let shown = browser(&folder, &["--dump-dom"], &picture)?;
        assert!(!String::from_utf8(shown.stdout)?.contains("parsererror"), "{}", picture.display());
        let seen = folder.file("seen.png");
        browser(&folder, &[&format!("--screenshot={}", seen.display()), "--window-size=1100,600"], &picture)?;
        let share = share_not_white(&fs::read(&seen)?)?;
        assert!((0.01..0.3).contains(&share), "{share} of {} is not white", picture.display());
    }
    let named = folder.file("latency.svg");
    succeeded(&report(&[&curves], &["--picture", "latency", "--output", &named.to_string_lossy()])?)?;
    assert!(fs::read_to_string(named)?.contains("time of a request, us"));
    Ok(())
}

#[test]
fn every_form_is_written_and_results_come_from_a_pipe_too() -> Result<()> {
    let folder = Folder::new("forms")?;
    let file = folder.results("results.json", &results::experiment(1, 5_000))?;
    for (name, start) in [
        ("a.html", "<!DOCTYPE html>"),
        ("a.svg", "<svg"),
        ("a.csv", "results,run,stream,"),
        ("a.hlog", "#"),
        ("a.txt", "Probes beside iperf3"),
    ] {
        assert!(written(&[&file], &folder.file(name))?.starts_with(start), "{name}");
    }
    let output = folder.file("a.hgrm").to_string_lossy().into_owned();
    succeeded(&report(&[&file], &["--run", "qjump", "--stream", "udp level 7", "--output", &output])?)?;
    assert!(fs::read_to_string(&output)?.starts_with("       Value     Percentile TotalCount"));
    let json: Value = serde_json::from_str(&succeeded(&report(&[&file], &["--json"])?)?)?;
    assert_eq!(
        (&json["schema_version"], &json["documents"][0]["name"]),
        (&SCHEMA_VERSION.into(), &"switch-queue".into())
    );
    let piped =
        Command::new(binary()).args(["report", "-", "--title", "My own"]).stdin(fs::File::open(&file)?).output()?;
    assert!(succeeded(&piped)?.starts_with("My own\n"));
    assert_eq!(fs::read_dir(&folder.0)?.count(), 7, "no temporary file is left");
    Ok(())
}

#[test]
fn what_cannot_be_read_is_named_with_the_place() -> Result<()> {
    let folder = Folder::new("mistakes")?;
    let good = folder.results("good.json", &results::experiment(1, 500))?;
    let text = fs::read_to_string(&good)?;
    let bad = folder.file("bad.json");
    let output = folder.file("out.html");
    let check = |arguments: &[&str], status: i32, parts: &[&str]| -> Result<()> {
        let (code, error) = failed(&report(&[&good, &bad], arguments)?);
        assert_eq!(code, status, "{error}");
        for part in parts {
            assert!(error.contains(part), "'{part}' is missing in: {error}");
        }
        assert!(!error.contains("panicked") && !output.exists(), "{error}");
        Ok(())
    };
    let into = ["--output", &output.to_string_lossy()];
    check(&into, 1, &["bad.json", "No such file"])?;
    for (content, parts) in [
        (text[..text.len() / 2].to_owned(), vec!["bad.json", "line 1, column", "EOF", "^"]),
        (
            text.replace("\"schema_version\":1", "\"schema_version\":2"),
            vec!["bad.json", "version 2", "version 1", "tool"],
        ),
        (text.replace("\"samples\":500", "\"samples\":\"many\""), vec!["line 1, column", "\"many\"", "expected u64"]),
        (text.replace("\"sample\":\"rtt\"", "\"sample\":\"half\""), vec!["`half`", "one-way"]),
        (text.replace("\"name\":\"contended\"", "\"name\":\"alone\""), vec!["runs[1]", "second run", "alone"]),
        (text.replace("\"runs\":", "\"cases\":"), vec!["bad.json", "demonstration", "not results"]),
        (String::new(), vec!["bad.json", "empty"]),
        ("<svg></svg>".to_owned(), vec!["bad.json", "a picture", "not results"]),
        ("[".repeat(100_000), vec!["bad.json", "not results"]),
        (
            text.replace("\"host\":{", &format!("\"host\":{{\"deep\":{}{},", "[".repeat(1_000), "]".repeat(1_000))),
            vec!["bad.json", "recursion limit"],
        ),
    ] {
        fs::write(&bad, content)?;
        check(&into, 1, &parts)?;
    }
    fs::write(&bad, [0xff, 0xfe, 0x00])?;
    check(&into, 1, &["bad.json", "binary"])?;
    fs::copy(&good, &bad)?;
    check(&["--output", "out.pdf"], 64, &["out.pdf", ".html", ".hgrm"])?;
    check(&["--run", "jump"], 64, &["'jump'", "'alone', 'contended', 'qjump'"])?;
    check(&["--output", "out.hgrm"], 64, &["12", "--run 'alone'"])?;
    check(&["--output", "out.html", "--picture", "latency"], 64, &[".svg alone"])?;
    check(&["--output", "/nonexistent/out.html"], 1, &["/nonexistent/out.html", "No such file"])?;
    // Two of a name are told apart by their files.
    let text = succeeded(&report(&[&good, &bad], &[])?)?;
    assert!(text.contains("Comparison of good, bad"), "{text}");
    assert!(!Path::new("out.hgrm").exists() && !Path::new("out.pdf").exists());
    Ok(())
}

/// A file system of 64 KiB that goes when it is dropped.
struct Small(PathBuf);

impl Small {
    fn new(folder: &Folder) -> Result<Self> {
        let path = folder.file("small");
        fs::create_dir(&path)?;
        succeeded(&Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none"]).arg(&path).output()?)?;
        Ok(Self(path))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_what_was_there() -> Result<()> {
    let folder = Folder::new("full")?;
    let small = Small::new(&folder)?;
    let file = folder.results("results.json", &results::experiment(1, 5_000))?;
    let page = small.0.join("page.html");
    fs::write(&page, "the last report")?;
    for output in [page.as_path(), Path::new("/dev/full")] {
        let link = folder.file("full.html");
        std::os::unix::fs::symlink(output, &link)?;
        let (code, error) = failed(&report(&[&file], &["--output", &link.to_string_lossy()])?);
        fs::remove_file(&link)?;
        assert!(code == 1 && error.contains("cannot write") && error.contains("No space left"), "{error}");
    }
    assert_eq!(fs::read_to_string(&page)?, "the last report");
    assert_eq!(fs::read_dir(&small.0)?.count(), 1, "no half file is left");
    assert!(!fs::metadata("/dev/full")?.is_file());
    Ok(())
}
