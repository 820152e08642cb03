//! `qjump report`.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, print};
use crate::report::{Format, Report, write_file};

/// Show results: as a table, as a page with pictures, or for other tools
///
/// Takes the JSON files that `measure` and `testbed run` write. Within a file, runs are compared with its first one; of
/// several files, runs of the same name are compared, too. Without --output, prints the table.
#[derive(Args)]
pub struct ReportCommand {
    /// Files of results; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Where to write, and what: .html a page that needs no network, .svg the main picture, .csv a row for each
    /// percentile, .hgrm or .hlog for HdrHistogram's tools, .txt the table. Written whole or not at all
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Show this run alone; repeatable
    #[arg(long, value_name = "NAME")]
    run: Vec<String>,
    /// Show this stream alone; repeatable
    #[arg(long, value_name = "NAME")]
    stream: Vec<String>,
    /// The title, instead of the results' own
    #[arg(long, value_name = "TEXT")]
    title: Option<String>,
    /// Of an .svg, which picture: one of the experiment's, or `distribution`
    #[arg(long, value_name = "NAME", requires = "output")]
    picture: Option<String>,
    /// In the table, show the intervals in which percentiles and ratios lie (95 %)
    #[arg(long, conflicts_with_all = ["output", "json"])]
    intervals: bool,
    /// Print the results without histograms and series, and the comparisons, as JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl ReportCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        // What cannot be written need not be read.
        let format = self.output.as_deref().map(Format::of).transpose()?;
        if self.picture.is_some() && format != Some(Format::Svg) {
            return Err(Failure::Usage("--picture is for an .svg alone; a page has all pictures".to_owned()));
        }
        let report = Report::read(&self.files)?.only(&self.run, &self.stream)?.titled(self.title);
        let Some((path, format)) = self.output.as_deref().zip(format) else {
            return if self.json {
                print(format!("{:#}", report.json()))
            } else {
                print(report.text(self.intervals).trim_end())
            };
        };
        let bytes = match format {
            Format::Svg => report.svg(self.picture.as_deref())?.into_bytes(),
            other => report.render(other)?,
        };
        Ok(write_file(path, &bytes)?)
    }
}
