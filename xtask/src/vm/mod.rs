//! `cargo xtask vm`

mod boot;
mod cpio;
mod image;
mod kernel;
mod kvm;
mod packages;
mod verdict;

use crate::bpf::Objects;
use crate::workspace::Workspace;
use crate::{apt, build, pins, process, say};
use anyhow::{Context, bail};
use boot::{Clock, Guest, Qemu};
use image::{Contents, Step};
use kernel::Kernel;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use verdict::{Outcome, Verdict};

/// Run the integration tests on the kernels of Debian's releases, in virtual machines.
///
/// Kernels and QEMU are Debian's packages. They are fetched into target/vm once and not installed; afterwards no
/// network is needed. Needs no root rights. Without KVM the machines are emulated, which is some ten times slower.
///
/// What each guest said is in target/vm/results/SERIES: results.log of the tests, console.log of the kernel.
/// Exit status 2 if a test failed or a guest did not do its job, 75 if kernels or QEMU cannot be had now.
#[derive(clap::Args)]
pub struct Args {
    /// A series of kernels; repeatable. Without it: all
    #[arg(long, value_name = "SERIES", value_parser = kernel::SERIES)]
    kernel: Vec<String>,
    /// Test programs to run (tests/tests/NAME.rs). Without any: those that make sense on every kernel
    #[arg(value_name = "NAME")]
    tests: Vec<String>,
    /// Let time go by the instructions executed: slow, and the same figures whatever this machine is doing
    #[arg(long)]
    virtual_time: bool,
    /// What the guest's kernel takes for chance in virtual time
    #[arg(long, value_name = "N", default_value_t = 1, requires = "virtual_time")]
    seed: u64,
    /// CPUs of a guest in real time
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "virtual_time", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of a guest, MiB
    #[arg(long, value_name = "MIB", default_value_t = 640, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// End a guest after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    limit: u64,
    /// Guests that run at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Run an experiment of `qjump testbed` instead of tests; repeatable. Its JSON comes to target/vm/results/SERIES, with
    /// its checksum: in virtual time the same command gives the same one
    #[arg(long, value_name = "NAME", conflicts_with = "tests")]
    experiment: Vec<String>,
    /// Open a shell in the guest instead of running tests; exit ends the guest
    #[arg(long, conflicts_with_all = ["tests", "experiment", "arguments"])]
    shell: bool,
    /// List the kernels, which of them were fetched, and the test programs
    #[arg(long)]
    list: bool,
    /// Look for newer kernels than those that were fetched
    #[arg(long)]
    refresh: bool,
    /// Arguments for the test programs: part of a test's name, or options such as --nocapture
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// Exit status when packages cannot be fetched: EX_TEMPFAIL of sysexits.h.
const NOT_TO_BE_HAD: u8 = 75;

/// The test programs that run on every kernel, unless others are named. The others need a compiler, or compare
/// times, or are about this command's own surroundings.
const EVERYWHERE: &[&str] = &[
    "wire",
    "frames",
    "fixtures",
    "cost",
    "lifecycle",
    "limits",
    "tagging",
    "authority",
    "assign",
    "qdisc",
    "queue",
    "backpressure",
    "devices",
    "check",
    "doctor",
    "events",
    "bad_input",
    "fq",
    "oldest",
];

/// Where experiments leave their results in a guest.
const RESULTS: &str = "/results";

/// Tests that compile a program in C; guests have no compiler.
const NEED_A_COMPILER: &[&str] = &["a_static_program_is_as_good_as_any"];

/// Tests that offer more packets a second than an emulated machine can send, and assert that the limit was reached, or
/// compare how long packets wait for it. What they assert of pacing and of TCP, `fq` does in virtual time.
const NEED_A_FAST_MACHINE: &[&str] = &[
    "a_level_never_gets_more_than_its_rate_and_one_packet",
    "levels_have_strict_priority_on_a_link_that_does_not_push_back",
    "tcp_gets_the_rate_of_its_level",
    "a_message_does_not_wait_behind_bulk_of_its_own_host",
];

/// A test program that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Built {
    name: String,
    path: PathBuf,
    is_test: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let workspace = Workspace::find();
    let vm = workspace.target("vm");
    fs::create_dir_all(&vm).with_context(|| format!("cannot make {}", vm.display()))?;
    if args.list {
        return list(&workspace, &vm);
    }
    kernel::check_tools()?;
    apt::ensure(&[pins::TESTBED, pins::GUESTS].concat())?;
    let series: Vec<&str> = match args.kernel.is_empty() {
        true => kernel::SERIES.to_vec(),
        false => args.kernel.iter().map(String::as_str).collect(),
    };
    let fetched = Qemu::find(&vm).and_then(|qemu| {
        let kernels = series.iter().map(|series| Kernel::find(series, &vm, args.refresh));
        Ok((qemu, kernels.collect::<Result<Vec<_>, _>>()?))
    });
    let (qemu, kernels) = match fetched {
        Ok(fetched) => fetched,
        Err(error) => {
            say!("{error:#}");
            return Ok(ExitCode::from(NOT_TO_BE_HAD));
        }
    };

    build::qjump(&workspace, Objects::ProgramAndLab)?;
    let named: BTreeSet<&str> = series.iter().flat_map(|series| tests_for(series, args)).collect();
    let built = build_tests(&workspace, &named)?;
    let images = kernels
        .iter()
        .map(|kernel| image(&contents(&workspace, &built, &kernel.series, args)?, kernel, &vm))
        .collect::<Result<Vec<_>, _>>()?;
    let guests: Vec<(&Kernel, &Path)> = kernels.iter().zip(images.iter().map(PathBuf::as_path)).collect();
    let kvm = !args.virtual_time && kernels.last().is_some_and(|kernel| kvm::works(&qemu, kernel, &vm));
    let verdicts = side_by_side(if args.shell { 1 } else { args.jobs.into() }, &guests, |(kernel, image)| {
        let begun = Instant::now();
        let verdict = guest(&qemu, kernel, image, kvm, args)?;
        // It has everything in it and is quickly made again.
        fs::remove_file(image)?;
        Ok((verdict, begun.elapsed()))
    })?;
    if args.shell {
        return Ok(ExitCode::SUCCESS);
    }
    for (kernel, (verdict, took)) in kernels.iter().zip(&verdicts) {
        println!("{}", row(kernel, verdict, *took));
        if verdict.broken.is_some() {
            let console = boot::read(&vm.join("results").join(&kernel.series).join("console.log"));
            println!("  the end of its console:\n{}", last_lines(&console, 20));
        }
    }
    for (kernel, (verdict, _)) in kernels.iter().zip(&verdicts) {
        for step in &verdict.steps {
            keep(&vm.join("results").join(&kernel.series), step)?;
        }
    }
    let passed = verdicts.iter().all(|(verdict, _)| verdict.passed());
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn list(workspace: &Workspace, vm: &Path) -> anyhow::Result<ExitCode> {
    println!("kernels:");
    for series in kernel::SERIES {
        let release = kernel::fetched(series, vm)?.unwrap_or_else(|| "not fetched yet".to_owned());
        println!("  {series:8} {release}");
    }
    println!("test programs (* on every kernel, unless others are named):");
    for name in test_programs(workspace)? {
        println!("  {name}{}", if EVERYWHERE.contains(&name.as_str()) { " *" } else { "" });
    }
    Ok(ExitCode::SUCCESS)
}

/// The names of the integration tests.
fn test_programs(workspace: &Workspace) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(workspace.root().join("tests/tests"))?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.path().file_stem()?.to_str().map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

/// The test programs that a guest runs.
fn tests_for<'a>(series: &str, args: &'a Args) -> Vec<&'a str> {
    match args.tests.is_empty() {
        true if args.shell || !args.experiment.is_empty() => Vec::new(),
        true if kernel::REFUSED.contains(&series) => vec!["oldest"],
        true => EVERYWHERE.to_vec(),
        false => args.tests.iter().map(String::as_str).collect(),
    }
}

/// Builds these integration tests and what guests run besides, and says where they are.
fn build_tests(workspace: &Workspace, names: &BTreeSet<&str>) -> anyhow::Result<Vec<Built>> {
    let there = test_programs(workspace)?;
    if let Some(unknown) = names.iter().find(|name| !there.iter().any(|program| program == *name)) {
        bail!("there is no test program '{unknown}'; `cargo xtask vm --list` has their names");
    }
    say!("building the tests");
    let mut cargo = build::cargo(workspace)?;
    cargo.args([
        "test",
        "--package",
        "qjump-tests",
        "--release",
        "--locked",
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--bins",
    ]);
    cargo.args(names.iter().flat_map(|name| ["--test", *name]));
    let output = cargo.stderr(std::process::Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not build");
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect())
}

/// A program that cargo says it has built.
fn executable(line: &str) -> Option<Built> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let target = &message["target"];
    Some(Built {
        path: message["executable"].as_str()?.into(),
        name: target["name"].as_str()?.to_owned(),
        is_test: target["kind"].as_array()?.iter().any(|kind| kind == "test"),
    })
}

/// What the guests have in them, the same for all kernels.
fn contents(workspace: &Workspace, built: &[Built], series: &str, args: &Args) -> anyhow::Result<Contents> {
    let is_program = |name: &str| {
        let found = built
            .iter()
            .find(|built| built.name == name && !built.is_test && built.path.parent() == workspace.binary().parent());
        found.map(|built| built.path.clone()).with_context(|| format!("cargo built no program {name}"))
    };
    let mut steps = Vec::new();
    let mut files = vec![
        workspace.binary(),
        workspace.preload(),
        workspace.program_object(),
        workspace.lab_object(),
        is_program("claimant")?,
    ];
    files.extend(python_library());
    for name in tests_for(series, args) {
        let test = built.iter().find(|built| built.is_test && built.name == name);
        let test = test.with_context(|| format!("cargo built no test program {name}"))?;
        let mut command = vec![test.path.display().to_string(), "--test-threads=1".to_owned()];
        command.extend(
            NEED_A_COMPILER.iter().chain(NEED_A_FAST_MACHINE).flat_map(|test| ["--skip", test]).map(str::to_owned),
        );
        command.extend(args.arguments.iter().cloned());
        steps.push(Step { name: name.to_owned(), command, console: false, file: None });
        files.push(test.path.clone());
    }
    for name in &args.experiment {
        let (binary, seed) = (workspace.binary().display().to_string(), args.seed.to_string());
        let words = [&binary, "testbed", "run", name, "--output", RESULTS, "--seed", &seed];
        let command = words.into_iter().map(str::to_owned).chain(args.arguments.iter().cloned()).collect();
        let file = Some(format!("{RESULTS}/{name}.json"));
        steps.push(Step { name: name.clone(), command, console: false, file });
    }
    if args.shell {
        steps = vec![Step {
            name: "shell".to_owned(),
            command: ["bash", "-i"].map(str::to_owned).into(),
            console: true,
            file: None,
        }];
    }
    let environment = [
        ("PATH", "/usr/bin".to_owned()),
        ("HOME", "/root".to_owned()),
        ("RUST_BACKTRACE", "0".to_owned()),
        // Here no kernel can hide that it lacks what it should have.
        ("QJUMP_GUEST", "1".to_owned()),
        ("QJUMP_BIN", workspace.binary().display().to_string()),
        ("QJUMP_OBJECT", workspace.program_object().display().to_string()),
        ("QJUMP_LAB_OBJECT", workspace.lab_object().display().to_string()),
    ];
    let mut environment: Vec<(String, String)> = environment.map(|(name, value)| (name.to_owned(), value)).into();
    if args.virtual_time {
        // Tests may assert times then.
        environment.push(("QJUMP_VIRTUAL_TIME".to_owned(), "1".to_owned()));
    }
    Ok(Contents { init: is_program("guest")?, files, steps, environment })
}

/// Where this machine's Python has its library; tests run programs in Python.
fn python_library() -> Option<PathBuf> {
    let ask = "import os; print(os.path.dirname(os.__file__))";
    process::ask(std::process::Command::new("/usr/bin/python3").args(["-c", ask])).ok().map(|path| path.trim().into())
}

/// Does `work` for each of `items`, so many at once; the results in the order of the items.
fn side_by_side<I: Sync, R: Send>(
    jobs: usize,
    items: &[I],
    work: impl Fn(&I) -> anyhow::Result<R> + Sync,
) -> anyhow::Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<anyhow::Result<R>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((item, result)) = {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    items.get(number).zip(results.get(number))
                } {
                    *result.lock().expect("no holder panics") = Some(work(item));
                }
            });
        }
    });
    results
        .into_iter()
        .map(|result| result.into_inner().expect("no holder panics").expect("each was worked on"))
        .collect()
}

/// Puts a guest's image together.
fn image(contents: &Contents, kernel: &Kernel, vm: &Path) -> anyhow::Result<PathBuf> {
    let folder = vm.join("results").join(&kernel.series);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = folder.join("image.cpio");
    let begun = Instant::now();
    // Half an image is of no use, and may be what has filled the disk.
    image::write(contents, kernel, &vm.join("stripped"), &image).inspect_err(|_| drop(fs::remove_file(&image)))?;
    let size = fs::metadata(&image)?.len() >> 20;
    say!(
        "{}: {} ({size} MiB of files, put together in {:.1} s)",
        kernel.series,
        kernel.release,
        begun.elapsed().as_secs_f64()
    );
    Ok(image)
}

/// Runs one guest and keeps what it said.
fn guest(qemu: &Qemu, kernel: &Kernel, image: &Path, kvm: bool, args: &Args) -> anyhow::Result<Verdict> {
    let folder = image.parent().context("an image lies in the folder of its results")?;
    let clock = match args.virtual_time {
        true => Clock::Virtual { seed: args.seed },
        false => Clock::Real { cpus: args.cpus, kvm },
    };
    let guest =
        Guest { kernel: &kernel.image(), image: Some(image), folder, memory: args.memory, clock, shell: args.shell };
    let mut shown = 0;
    let end = qemu.run(&guest, Duration::from_secs(args.limit), |results| {
        // Whole lines only; the rest comes with its end.
        let whole = &results[..results.rfind('\n').map_or(0, |at| at + 1)];
        for line in whole.lines().skip(shown).filter(|line| line.starts_with("test ") || line.starts_with("@@qjump")) {
            say!("{}: {line}", kernel.series);
        }
        shown = whole.lines().count();
    })?;
    let log = |name: &str| boot::read(&folder.join(name));
    Ok(Verdict::read(&log("results.log"), &log("console.log"), end))
}

/// Keeps the file that a step has left, and says what its checksum is.
fn keep(folder: &Path, step: &Outcome) -> anyhow::Result<()> {
    let Some(text) = &step.file else { return Ok(()) };
    let path = folder.join(format!("{}.json", step.name));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    let sum = process::ask(std::process::Command::new("sha256sum").arg(&path)).map_err(anyhow::Error::msg)?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    println!("{}: sha256 {sum}; `qjump report {}` shows it", step.name, path.display());
    Ok(())
}

/// So many lines from the end, indented.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let lines = lines[lines.len().saturating_sub(count)..].iter().map(|line| format!("    {}", line.trim_end()));
    lines.collect::<Vec<_>>().join("\n")
}

/// What a guest did, for people.
fn row(kernel: &Kernel, verdict: &Verdict, took: Duration) -> String {
    let name = verdict.release.as_deref().unwrap_or(&kernel.release);
    let mut text = format!("{name}: {} in {} s", if verdict.passed() { "passed" } else { "FAILED" }, took.as_secs());
    for step in &verdict.steps {
        text += &format!("\n  {:12} {} (exit status {})", step.name, step.tests, step.status);
    }
    if let Some(why) = &verdict.broken {
        text += &format!("\n  {why}\n  see target/vm/results/{}/console.log and results.log", kernel.series);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_console_is_its_last_lines() {
        assert_eq!(last_lines("a\r\nb\nc\n", 2), "    b\n    c");
        assert_eq!(last_lines("a", 2), "    a");
        assert_eq!(last_lines("", 2), "");
    }

    #[test]
    fn cargo_says_what_it_built() {
        let line =
            r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"wire"},"executable":"/t/wire-1"}"#;
        assert_eq!(executable(line), Some(Built { name: "wire".into(), path: "/t/wire-1".into(), is_test: true }));
        assert_eq!(
            executable(r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x"},"executable":null}"#),
            None
        );
        assert_eq!(executable("Compiling x"), None);
    }
}
