//! Where results go.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{
    super::{Failure, print},
    show,
};
use crate::measure::{result::Document, train::Tick};

/// How results are shown and kept.
#[derive(Args)]
pub struct Results {
    /// Write the results as JSON into a file, or to standard output (-) instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Show no progress on standard error
    #[arg(long)]
    pub quiet: bool,
}

/// The same of what is told second by second.
#[derive(Args)]
pub struct Output {
    #[command(flatten)]
    pub results: Results,
    /// Write a line of JSON a second and stream while it runs, into a file or to standard output (-)
    #[arg(long, value_name = "FILE")]
    live: Option<PathBuf>,
}

fn is_stdout(path: &Path) -> bool {
    path == Path::new("-")
}

fn cannot_write(path: &Path, error: &io::Error) -> String {
    format!("cannot write {}: {error}", path.display())
}

/// Opens a file before anything is measured, and leaves what it holds.
fn can_write(path: &Option<PathBuf>) -> Result<(), Failure> {
    let Some(path) = path.as_deref().filter(|path| !is_stdout(path)) else { return Ok(()) };
    let opened = OpenOptions::new().write(true).create(true).truncate(false).open(path);
    opened.map(drop).map_err(|error| Failure::Failed(cannot_write(path, &error)))
}

impl Results {
    /// Whether the results can be written.
    pub fn check(&self) -> Result<(), Failure> {
        can_write(&self.json)
    }

    fn is_stdout(&self) -> bool {
        self.json.as_deref().is_some_and(is_stdout)
    }

    /// Shows the results and writes them. They are not lost with a file that cannot be written.
    pub fn finish(&self, document: &Document, text: &str) -> Result<(), Failure> {
        if !self.is_stdout() {
            print(text.trim_end())?;
        }
        self.write(document)
    }

    fn write(&self, document: &Document) -> Result<(), Failure> {
        let Some(path) = &self.json else { return Ok(()) };
        let json = serde_json::to_string(document).map_err(|error| Failure::Failed(error.to_string()))?;
        if is_stdout(path) {
            return print(json);
        }
        let written = File::create(path).and_then(|mut file| {
            writeln!(file, "{json}")?;
            file.sync_all()
                .or_else(|error| if error.kind() == io::ErrorKind::InvalidInput { Ok(()) } else { Err(error) })
        });
        written.map_err(|error| {
            let _ = print(&json);
            Failure::Failed(format!("{}; the results went to standard output instead", cannot_write(path, &error)))
        })
    }
}

impl Output {
    /// Whether all can be written.
    pub fn check(&self) -> Result<(), Failure> {
        if self.results.is_stdout() && self.live.as_deref().is_some_and(is_stdout) {
            return Err(Failure::Usage(
                "--json - and --live - cannot share standard output; give one a file".to_owned(),
            ));
        }
        self.results.check()?;
        can_write(&self.live)
    }

    /// Who hears how it goes.
    pub fn reporter(&self) -> Result<Reporter, Failure> {
        let live: Option<(PathBuf, Box<dyn Write>)> = match &self.live {
            Some(path) if is_stdout(path) => Some((path.clone(), Box::new(io::stdout()))),
            Some(path) => {
                let file = File::create(path).map_err(|error| Failure::Failed(cannot_write(path, &error)))?;
                Some((path.clone(), Box::new(file)))
            }
            None => None,
        };
        Ok(Reporter { live, progress: show::Progress::new(!self.results.quiet), failed: None })
    }

    /// Shows the results and writes them.
    pub fn finish(&self, document: &Document, text: &str) -> Result<(), Failure> {
        if self.live.as_deref().is_some_and(is_stdout) {
            return self.results.write(document);
        }
        self.results.finish(document, text)
    }
}

/// Hears how a measurement goes, and tells.
pub struct Reporter {
    live: Option<(PathBuf, Box<dyn Write>)>,
    progress: show::Progress,
    failed: Option<String>,
}

impl Reporter {
    /// A second of a stream, called `names[tick.train]`, is over.
    pub fn tick(&mut self, run: &str, names: &[String], tick: &Tick) {
        let name = &names[tick.train];
        if let Some((path, live)) = &mut self.live {
            let interval = &tick.interval;
            let line = json!({
                "schema_version": 1,
                "run": run,
                "stream": name,
                "at_ns": interval.at_ns,
                "until_ns": tick.until_ns,
                "sent": tick.sent,
                "received": tick.received,
                "samples": interval.samples,
                "lost": interval.lost,
                "p50_ns": interval.p50_ns,
                "p99_ns": interval.p99_ns,
                "max_ns": interval.max_ns,
            });
            if let Err(error) = writeln!(live, "{line}").and_then(|()| live.flush()) {
                let message = cannot_write(path, &error);
                eprintln!("\nqjump: {message}; the measurement goes on");
                self.failed = Some(message);
                self.live = None;
            }
        }
        self.progress.tick(run, names, tick);
    }

    /// Ends the progress line; fails if the live lines could not be written.
    pub fn finish(&mut self) -> Result<(), Failure> {
        self.progress.finish();
        self.failed.take().map_or(Ok(()), |message| Err(Failure::Failed(message)))
    }
}
