//! Results as people want them: a table, a page, a picture, and the formats of other tools.
//!
//! What a file of results says is not trusted: every text of it is escaped where it is shown.

mod compare;
mod csv;
mod file;
mod grid;
mod hdr;
mod html;
mod pictures;
mod read;
mod tables;
mod text;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::Result;
use thiserror::Error;

pub use file::write_file;
pub use text::utc;

use crate::measure::result::{Document, Run, Stream};

/// A request that makes no sense, whatever the results say.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Unusable(String);

/// The text table of these results, as every command prints it.
pub fn text(documents: &[Document]) -> String {
    Report::new(documents.to_vec()).text(false)
}

/// In which form a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A page that needs nothing else.
    Html,
    /// The main picture alone.
    Svg,
    /// A row for each percentile (RFC 4180).
    Csv,
    /// HdrHistogram's percentile distribution, of one stream.
    Hgrm,
    /// HdrHistogram's interval log, with an interval for each stream.
    Hlog,
    /// The text table.
    Text,
}

impl Format {
    /// What the name of a file asks for.
    ///
    /// # Errors
    /// If it ends with none of the known extensions.
    pub fn of(path: &Path) -> Result<Self, Unusable> {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        extension.parse().map_err(|error| Unusable(format!("{}: {error}", path.display())))
    }
}

impl FromStr for Format {
    type Err = Unusable;

    fn from_str(name: &str) -> Result<Self, Unusable> {
        Ok(match name.to_ascii_lowercase().as_str() {
            "html" | "htm" => Self::Html,
            "svg" => Self::Svg,
            "csv" => Self::Csv,
            "hgrm" => Self::Hgrm,
            "hlog" => Self::Hlog,
            "txt" => Self::Text,
            _ => {
                let known = ".html, .svg, .csv, .hgrm, .hlog or .txt";
                return Err(Unusable(format!("'.{name}' is no form of a report; end the name with {known}")));
            }
        })
    }
}

/// One file of results, and how it is called among others.
pub(crate) struct Source {
    label: String,
    document: Document,
}

/// Results that are shown together.
pub struct Report {
    title: Option<String>,
    sources: Vec<Source>,
}

/// One stream and where it belongs.
#[derive(Clone, Copy)]
struct Sampled<'a> {
    source: &'a Source,
    run: &'a Run,
    stream: &'a Stream,
}

impl Report {
    /// Of documents that are told apart by their names.
    pub fn new(documents: Vec<Document>) -> Self {
        let names: Vec<String> = documents.iter().map(|document| document.name.clone()).collect();
        let labels = if distinct(&names) {
            names
        } else {
            names.iter().enumerate().map(|(number, name)| format!("{name} ({})", number + 1)).collect()
        };
        Self::labelled(labels, documents)
    }

    /// Of files, told apart by the names of documents, or else of files.
    ///
    /// # Errors
    /// If one cannot be read, or is no file of results.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let documents = files.iter().map(|file| read::read(file)).collect::<Result<Vec<Document>>>()?;
        let names = documents.iter().map(|document| document.name.clone()).collect();
        let stems = files.iter().map(|file| file.file_stem().unwrap_or_default().display().to_string()).collect();
        let paths = files.iter().map(|file| file.display().to_string()).collect();
        let labels = [names, stems, paths].into_iter().find(|labels: &Vec<String>| distinct(labels));
        Ok(match labels {
            Some(labels) => Self::labelled(labels, documents),
            // The same file twice.
            None => Self::new(documents),
        })
    }

    fn labelled(labels: Vec<String>, documents: Vec<Document>) -> Self {
        let sources = labels.into_iter().zip(documents).map(|(label, document)| Source { label, document }).collect();
        Self { title: None, sources }
    }

    /// With this title instead of the documents' own.
    #[must_use]
    pub fn titled(mut self, title: Option<String>) -> Self {
        self.title = title;
        self
    }

    /// With these runs and streams alone; an empty list stands for all.
    ///
    /// # Errors
    /// If there is none of a name, with those that are there.
    pub fn only(mut self, runs: &[String], streams: &[String]) -> Result<Self, Unusable> {
        let all = |name: fn(Sampled<'_>) -> &str| self.streams().map(name).map(str::to_owned).collect::<Vec<_>>();
        let known = self.sources.iter().flat_map(|source| source.document.runs.iter().map(|run| run.name.clone()));
        known_or_error("run", runs, &known.collect::<Vec<_>>())?;
        known_or_error("stream", streams, &all(|sampled| &sampled.stream.name))?;
        for document in self.sources.iter_mut().map(|source| &mut source.document) {
            document.runs.retain(|run| runs.is_empty() || runs.contains(&run.name));
            for run in &mut document.runs {
                run.streams.retain(|stream| streams.is_empty() || streams.contains(&stream.name));
            }
        }
        Ok(self)
    }

    /// In this form.
    ///
    /// # Errors
    /// If the form cannot hold these results, and what to do.
    pub fn render(&self, format: Format) -> Result<Vec<u8>, Unusable> {
        Ok(match format {
            Format::Html => self.html().into_bytes(),
            Format::Svg => self.svg(None)?.into_bytes(),
            Format::Csv => csv::csv(self).into_bytes(),
            Format::Hgrm => hdr::hgrm(&self.single()?.stream.response).into_bytes(),
            Format::Hlog => hdr::hlog(self).into_bytes(),
            Format::Text => self.text(false).into_bytes(),
        })
    }

    /// The text table, if wished with the confidence intervals of percentiles.
    pub fn text(&self, intervals: bool) -> String {
        text::text(self, intervals)
    }

    /// A page that needs nothing else.
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// One picture: that of this name, or the experiment's own, or all distributions.
    ///
    /// # Errors
    /// If there is none of this name, with those that are there.
    pub fn svg(&self, picture: Option<&str>) -> Result<String, Unusable> {
        pictures::single(self, picture)
    }

    /// The results without what takes space: no histograms, no series; and the comparisons.
    pub fn json(&self) -> serde_json::Value {
        let documents: Vec<Document> = self.sources.iter().map(|source| text::summary(&source.document)).collect();
        serde_json::json!({
            "schema_version": crate::measure::result::SCHEMA_VERSION,
            "documents": documents,
            "comparisons": text::comparisons_json(self),
        })
    }

    /// What it is about.
    fn title(&self) -> String {
        match (&self.title, self.sources.as_slice()) {
            (Some(title), _) => title.clone(),
            (None, [only]) => only.document.title.clone(),
            (None, several) => {
                let labels: Vec<&str> = several.iter().map(|source| source.label.as_str()).collect();
                format!("Comparison of {}", labels.join(", "))
            }
        }
    }

    fn streams(&self) -> impl Iterator<Item = Sampled<'_>> {
        let runs = self.sources.iter().flat_map(|source| source.document.runs.iter().map(move |run| (source, run)));
        runs.flat_map(|(source, run)| run.streams.iter().map(move |stream| Sampled { source, run, stream }))
    }

    /// The only stream.
    fn single(&self) -> Result<Sampled<'_>, Unusable> {
        let all: Vec<Sampled<'_>> = self.streams().collect();
        match all.as_slice() {
            [one] => Ok(*one),
            [] => Err(Unusable("there is no stream of which the file could be made".to_owned())),
            several => {
                let names: Vec<String> = several
                    .iter()
                    .map(|sampled| format!("--run '{}' --stream '{}'", sampled.run.name, sampled.stream.name))
                    .collect();
                Err(Unusable(format!(
                    "a .hgrm file holds one distribution, and there are {}; choose one (.hlog holds all):\n  {}",
                    several.len(),
                    names.join("\n  ")
                )))
            }
        }
    }

    /// What tells a stream from the others: no more than is needed.
    fn label(&self, sampled: &Sampled<'_>) -> String {
        let mut parts = Vec::new();
        if self.sources.len() > 1 {
            parts.push(sampled.source.label.as_str());
        }
        if self.sources.iter().any(|source| source.document.runs.len() > 1) {
            parts.push(&sampled.run.name);
        }
        let names: HashSet<&str> = self.streams().map(|other| other.stream.name.as_str()).collect();
        if parts.is_empty() || names.len() > 1 {
            parts.push(&sampled.stream.name);
        }
        parts.join(", ")
    }
}

fn distinct(names: &[String]) -> bool {
    names.iter().all(|name| !name.is_empty()) && names.iter().collect::<HashSet<_>>().len() == names.len()
}

fn known_or_error(what: &str, wanted: &[String], known: &[String]) -> Result<(), Unusable> {
    let Some(unknown) = wanted.iter().find(|name| !known.contains(name)) else { return Ok(()) };
    let mut seen = HashSet::new();
    let names: Vec<String> = known.iter().filter(|name| seen.insert(*name)).map(|name| format!("'{name}'")).collect();
    let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(Unusable(format!("there is no {what} '{unknown}'; there are: {names}")))
}
