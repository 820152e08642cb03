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
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use verdict::{Counts, Verdict};

/// Run the integration tests on the kernels of Debian's releases, in virtual machines.
///
/// Kernels and QEMU are Debian's packages. They are fetched into target/vm once and not installed; afterwards no
/// network is needed. Needs no root rights. Without KVM the machines are emulated, which is some ten times slower.
///
/// What each guest said is in target/vm/results/SERIES: results.log of the tests, console.log of the kernel, and what
/// experiments leave: NAME.json with its checksum, NAME.md, NAME.svg. With several seeds or repeats each guest has a folder there.
///
/// In virtual time, time goes by the instructions that the guest executes: nothing in it comes from this machine's clock or
/// load, and the same command gives the same files, byte by byte. --repeat 2 holds it to that. --seed changes what its
/// kernel takes for chance, and in experiments the phases of probes, bursts and epochs, and the times and sizes of requests
/// and transfers. Another kernel, build, or size of memory changes figures as another seed does.
///
/// Exit status 2 if a test failed, a claim of an experiment does not hold, repeats differ, or a guest did not do its job; 75
/// if kernels or QEMU cannot be had now.
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
    /// What chance begins with in virtual time; repeatable: a guest for each
    #[arg(long, value_name = "N", default_value = "1", requires = "virtual_time")]
    seed: Vec<u64>,
    /// Run each guest so many times, and compare the checksums of what experiments leave
    #[arg(long, value_name = "N", default_value_t = 1, requires_all = ["virtual_time", "experiment"], value_parser = clap::value_parser!(u8).range(1..=100))]
    repeat: u8,
    /// CPUs of a guest in real time
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "virtual_time", value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of a guest, MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u32).range(256..))]
    memory: u32,
    /// End a guest after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    limit: u64,
    /// Guests that run at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Run an experiment of `qjump testbed` instead of tests; repeatable
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

/// The test programs that run on every kernel, unless others are named: what a load, its limits, marks, tags and queues are on
/// each, in less than half an hour for all. The others need a compiler, or compare times (`fq` does in virtual time), or try out at
/// length what `tagging` does in short (`authority`, `assign`), or what is the same on every kernel.
const EVERYWHERE: &[&str] = &[
    "wire",
    "frames",
    "fixtures",
    "cost",
    "lifecycle",
    "limits",
    "objects",
    "tagging",
    "qdisc",
    "queue",
    "backpressure",
    "devices",
    "check",
    "doctor",
    "events",
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
    let named: BTreeSet<&str> = tests_of(args).into_iter().collect();
    let built = build_tests(&workspace, &named)?;
    let kvm = !args.virtual_time && kernels.last().is_some_and(|kernel| kvm::works(&qemu, kernel, &vm));
    let jobs = jobs(args, &kernels, &vm);
    // What is wrong with any of them is said before the first one runs.
    let contents = jobs.iter().map(|job| contents(&workspace, &built, job, args)).collect::<Result<Vec<_>, _>>()?;
    let jobs: Vec<(Job<'_>, Contents)> = jobs.into_iter().zip(contents).collect();
    let verdicts = side_by_side(if args.shell { 1 } else { args.jobs.into() }, &jobs, |(job, contents)| {
        let image = image(contents, job, &vm)?;
        let begun = Instant::now();
        let verdict = guest(&qemu, job, &image, kvm, args);
        // It has everything in it and is quickly made again.
        fs::remove_file(image)?;
        Ok((verdict?, begun.elapsed()))
    })?;
    if args.shell {
        return Ok(ExitCode::SUCCESS);
    }
    let mut passed = true;
    for ((job, _), (verdict, took)) in jobs.iter().zip(&verdicts) {
        println!("{}", row(job, verdict, *took));
        if verdict.broken.is_some() {
            let console = boot::read(&job.folder.join("console.log"));
            println!("  the end of its console:\n{}", last_lines(&console, 20));
        }
        passed &= verdict.passed();
    }
    let mut sums = BTreeMap::new();
    for ((job, _), (verdict, _)) in jobs.iter().zip(&verdicts) {
        for (experiment, sum) in keep(job, verdict)? {
            sums.entry((job.seed, &job.kernel.series, experiment)).or_insert_with(BTreeSet::new).insert(sum);
        }
    }
    if args.repeat > 1 {
        for ((seed, series, experiment), sums) in sums {
            passed &= sums.len() == 1;
            let what = if sums.len() == 1 { "the same each time" } else { "NOT the same each time" };
            println!("{series}, seed {seed}, {experiment}: {what} of {}", args.repeat);
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

/// A guest that is to be run.
#[derive(Debug)]
struct Job<'a> {
    kernel: &'a Kernel,
    seed: u64,
    /// What tells it apart from the other ones.
    name: String,
    /// Where what it says is kept.
    folder: PathBuf,
}

/// The guests: each kernel with each seed, as often as is asked for.
fn jobs<'a>(args: &Args, kernels: &'a [Kernel], vm: &Path) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for kernel in kernels {
        for seed in args.seed.iter().copied().collect::<BTreeSet<_>>() {
            for turn in 1..=args.repeat {
                let mut parts = vec![kernel.series.clone()];
                parts.extend((args.seed.len() > 1).then(|| format!("seed-{seed}")));
                parts.extend((args.repeat > 1).then(|| format!("repeat-{turn}")));
                let folder = vm.join("results").join(parts.join("/"));
                jobs.push(Job { kernel, seed, name: parts.join(", "), folder });
            }
        }
    }
    jobs
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
fn tests_of(args: &Args) -> Vec<&str> {
    match args.tests.is_empty() {
        true if args.shell || !args.experiment.is_empty() => Vec::new(),
        true => EVERYWHERE.to_vec(),
        false => args.tests.iter().map(String::as_str).collect(),
    }
}

/// Builds the programs of guests and these integration tests, and says where they are.
fn build_tests(workspace: &Workspace, names: &BTreeSet<&str>) -> anyhow::Result<Vec<Built>> {
    let there = test_programs(workspace)?;
    if let Some(unknown) = names.iter().find(|name| !there.iter().any(|program| program == *name)) {
        bail!("there is no test program '{unknown}'; `cargo xtask vm --list` has their names");
    }
    say!("building {}", if names.is_empty() { "the programs of guests" } else { "the tests" });
    let mut cargo = build::cargo(workspace)?;
    cargo.args(if names.is_empty() { &["build", "--bins"][..] } else { &["test", "--no-run", "--bins"] });
    cargo.args(["--package", "qjump-tests", "--release", "--locked", "--message-format=json-render-diagnostics"]);
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

/// What a guest has in it.
fn contents(workspace: &Workspace, built: &[Built], job: &Job<'_>, args: &Args) -> anyhow::Result<Contents> {
    let is_program = |name: &str| {
        let found = built
            .iter()
            .find(|built| built.name == name && !built.is_test && built.path.parent() == workspace.binary().parent());
        found.map(|built| built.path.clone()).with_context(|| format!("cargo built no program {name}"))
    };
    let mut steps = Vec::new();
    let mut files = vec![workspace.binary(), workspace.preload(), workspace.lab_object(), is_program("claimant")?];
    files.extend(python_library());
    for name in tests_of(args) {
        let test = built.iter().find(|built| built.is_test && built.name == name);
        let test = test.with_context(|| format!("cargo built no test program {name}"))?;
        let mut command = vec![test.path.display().to_string(), "--test-threads=1".to_owned()];
        command.extend(
            NEED_A_COMPILER.iter().chain(NEED_A_FAST_MACHINE).flat_map(|test| ["--skip", test]).map(str::to_owned),
        );
        command.extend(args.arguments.iter().cloned());
        steps.push(Step { name: name.to_owned(), command, console: false, files: Vec::new() });
        files.push(test.path.clone());
    }
    for name in &args.experiment {
        let (binary, seed) = (workspace.binary().display().to_string(), job.seed.to_string());
        let words = [&binary, "testbed", "run", name, "--output", RESULTS, "--seed", &seed];
        let command = words.into_iter().map(str::to_owned).chain(args.arguments.iter().cloned()).collect();
        let files = ["json", "md", "svg"].map(|kind| format!("{RESULTS}/{name}.{kind}")).into();
        steps.push(Step { name: name.clone(), command, console: false, files });
    }
    if args.shell {
        steps = vec![Step {
            name: "shell".to_owned(),
            command: ["bash", "-i"].map(str::to_owned).into(),
            console: true,
            files: Vec::new(),
        }];
    }
    let environment = [
        ("PATH", "/usr/bin".to_owned()),
        ("HOME", "/root".to_owned()),
        ("RUST_BACKTRACE", "0".to_owned()),
        ("QJUMP_BIN", workspace.binary().display().to_string()),
        ("QJUMP_LAB_OBJECT", workspace.lab_object().display().to_string()),
        // Here no kernel can hide that it lacks what it should have; and results say where they come from.
        ("QJUMP_GUEST", command_of(job, args)),
    ];
    let mut environment: Vec<(String, String)> = environment.map(|(name, value)| (name.to_owned(), value)).into();
    if args.virtual_time {
        // Tests may assert times then.
        environment.push(("QJUMP_VIRTUAL_TIME".to_owned(), "1".to_owned()));
    }
    Ok(Contents { init: is_program("guest")?, files, steps, environment })
}

/// The command that runs this guest alone, for whoever reads its results.
fn command_of(job: &Job<'_>, args: &Args) -> String {
    let mut words = format!("cargo xtask vm --kernel {}", job.kernel.series);
    match args.virtual_time {
        true => words += &format!(" --virtual-time --seed {}", job.seed),
        false => words += &format!(" --cpus {}", args.cpus),
    }
    words += &format!(" --memory {}", args.memory);
    words.extend(args.experiment.iter().map(|name| format!(" --experiment {name}")));
    words.extend(args.tests.iter().map(|name| format!(" {name}")));
    if !args.arguments.is_empty() {
        words += &format!(" -- {}", args.arguments.join(" "));
    }
    words
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

/// Puts a guest's image together, one after the other: they share programs without debug information.
fn image(contents: &Contents, job: &Job<'_>, vm: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(&job.folder).with_context(|| format!("cannot make {}", job.folder.display()))?;
    let image = job.folder.join("image.cpio");
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let begun = Instant::now();
    // Half an image is of no use, and may be what has filled the disk.
    image::write(contents, job.kernel, &vm.join("stripped"), &image).inspect_err(|_| drop(fs::remove_file(&image)))?;
    let size = fs::metadata(&image)?.len() >> 20;
    say!(
        "{}: {} ({size} MiB of files, put together in {:.1} s)",
        job.name,
        job.kernel.release,
        begun.elapsed().as_secs_f64()
    );
    Ok(image)
}

/// Runs one guest and keeps what it said.
fn guest(qemu: &Qemu, job: &Job<'_>, image: &Path, kvm: bool, args: &Args) -> anyhow::Result<Verdict> {
    let Job { kernel, folder, .. } = job;
    let clock = match args.virtual_time {
        true => Clock::Virtual { seed: job.seed },
        false => Clock::Real { cpus: args.cpus, kvm },
    };
    let guest =
        Guest { kernel: &kernel.image(), image: Some(image), folder, memory: args.memory, clock, shell: args.shell };
    let mut shown = 0;
    let end = qemu.run(&guest, Duration::from_secs(args.limit), |results| {
        // Whole lines only; the rest comes with its end.
        let whole = &results[..results.rfind('\n').map_or(0, |at| at + 1)];
        for line in whole.lines().skip(shown).filter(|line| is_news(line, &args.experiment)) {
            say!("{}: {line}", job.name);
        }
        shown = whole.lines().count();
    })?;
    let log = |name: &str| boot::read(&folder.join(name));
    Ok(Verdict::read(&log("results.log"), &log("console.log"), end))
}

/// Whether a line of a guest tells somebody who waits how far it is.
fn is_news(line: &str, experiments: &[String]) -> bool {
    let of_experiment = || line.split_once(": ").is_some_and(|(name, _)| experiments.iter().any(|one| one == name));
    line.starts_with("test ") || line.starts_with("@@qjump") || of_experiment()
}

/// Keeps the files that the steps of a guest have left, and says what the checksum of each JSON is. Names and sums.
fn keep(job: &Job<'_>, verdict: &Verdict) -> anyhow::Result<Vec<(String, String)>> {
    let mut sums = Vec::new();
    for step in &verdict.steps {
        for (name, text) in &step.files {
            let path = job.folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            if name.ends_with(".json") {
                let sum =
                    process::ask(std::process::Command::new("sha256sum").arg(&path)).map_err(anyhow::Error::msg)?;
                let sum = sum.split_whitespace().next().unwrap_or_default().to_owned();
                println!("{}: {}: sha256 {sum}; `qjump report {}` shows it", job.name, step.name, path.display());
                sums.push((step.name.clone(), sum));
            }
        }
    }
    Ok(sums)
}

/// So many lines from the end, indented.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let lines = lines[lines.len().saturating_sub(count)..].iter().map(|line| format!("    {}", line.trim_end()));
    lines.collect::<Vec<_>>().join("\n")
}

/// What a guest did, for people.
fn row(job: &Job<'_>, verdict: &Verdict, took: Duration) -> String {
    let name = verdict.release.as_deref().unwrap_or(&job.kernel.release);
    let mark = job.name.strip_prefix(&job.kernel.series).unwrap_or_default();
    let mut text =
        format!("{name}{mark}: {} in {} s", if verdict.passed() { "passed" } else { "FAILED" }, took.as_secs());
    for step in &verdict.steps {
        text += &match step.tests == Counts::default() {
            true => format!("\n  {} (exit status {})", step.name, step.status),
            false => format!("\n  {:12} {} (exit status {})", step.name, step.tests, step.status),
        };
    }
    if let Some(why) = &verdict.broken {
        text += &format!("\n  {why}\n  see console.log and results.log in {}", job.folder.display());
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

    fn args(words: &str) -> Args {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            args: Args,
        }
        clap::Parser::try_parse_from(std::iter::once("vm").chain(words.split_whitespace()))
            .map(|command: Command| command.args)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn each_seed_and_each_repeat_is_a_guest_with_a_folder_of_its_own() {
        let kernels = [Kernel::of("6.12", "6.12.1-cloud-amd64")];
        let folders = |words: &str| -> Vec<String> {
            let jobs = jobs(&args(words), &kernels, Path::new("/vm"));
            jobs.iter().map(|job| job.folder.display().to_string()).collect()
        };
        assert_eq!(folders(""), ["/vm/results/6.12"]);
        assert_eq!(
            folders("--virtual-time --experiment bound --seed 1 --seed 7 --repeat 2"),
            ["seed-1/repeat-1", "seed-1/repeat-2", "seed-7/repeat-1", "seed-7/repeat-2"]
                .map(|folder| format!("/vm/results/6.12/{folder}"))
        );
    }

    #[test]
    fn the_command_in_results_is_that_of_one_guest_and_the_same_for_its_repeats() {
        let kernels = [Kernel::of("6.12", "6.12.1-cloud-amd64")];
        let args = args("--virtual-time --experiment bound --seed 7 --repeat 2 --jobs 1 -- --quick");
        let jobs = jobs(&args, &kernels, Path::new("/vm"));
        let commands: BTreeSet<String> = jobs.iter().map(|job| command_of(job, &args)).collect();
        let command = "cargo xtask vm --kernel 6.12 --virtual-time --seed 7 --memory 512 --experiment bound -- --quick";
        assert_eq!(commands.into_iter().collect::<Vec<_>>(), [command]);
    }

    #[test]
    fn progress_of_tests_and_experiments_is_news() {
        let experiments = ["bound".to_owned()];
        assert!(is_news("bound: 1 of 6, aligned", &experiments) && is_news("test a ... ok", &[]));
        assert!(is_news("@@qjump up 6.12", &[]) && !is_news("  \"bound\": 1", &experiments));
    }
}
