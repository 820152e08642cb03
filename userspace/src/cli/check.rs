//! `qjump check`.

use clap::Args;

use super::{Failure, load::TargetArgs, print};
use crate::check::{self, Finding, Status};

/// Say whether the guarantee would hold on this host, and what to do if not; changes nothing
///
/// Takes what `load` takes. Without a network it looks at the host and at the interfaces alone. Exit status 2 if the
/// guarantee would not hold, 0 if it would, also with warnings.
#[derive(Args)]
#[command(mut_group("source", |group| group.required(false)))]
pub struct CheckCommand {
    #[command(flatten)]
    target: TargetArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CheckCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let target = if self.target.has_plan() { Some(self.target.read()?) } else { None };
        let request = target.as_ref().map(super::load::Target::request);
        let interfaces = request.as_ref().map_or(self.target.interfaces(), |request| request.interfaces);
        let facts = check::look(interfaces, request.as_ref())?;
        let findings = check::judge(&facts, request.as_ref());
        if self.json {
            print(format!("{:#}", check::to_json(&findings)))?;
        } else {
            print(text(&findings, request.is_some()))?;
        }
        if check::holds(&findings) { Ok(()) } else { Err(Failure::DoesNotHold) }
    }
}

fn text(findings: &[Finding], planned: bool) -> String {
    let mut text = String::new();
    let mut about: Option<Option<&str>> = None;
    let topics = findings.iter().map(|finding| finding.topic.len()).max().unwrap_or(0);
    for finding in findings {
        let now = finding.interface.as_deref();
        if about != Some(now) {
            let gap = if text.is_empty() { "" } else { "\n" };
            text += &format!("{gap}{}\n", now.unwrap_or("this host"));
            about = Some(now);
        }
        text += &format!("  {:<11}  {:<topics$}  {}\n", finding.status.name(), finding.topic, finding.found);
        if let Some(remedy) = &finding.remedy {
            text += &format!("  {:<11}  {:<topics$}  -> {remedy}\n", "", "");
        }
    }
    text + "\n" + &verdict(findings, planned)
}

fn verdict(findings: &[Finding], planned: bool) -> String {
    let count = |status: Status| findings.iter().filter(|finding| finding.status == status).count();
    let warnings = match count(Status::Warning) {
        0 => String::new(),
        1 => ", with 1 warning".to_owned(),
        number => format!(", with {number} warnings"),
    };
    let reasons = findings.iter().filter(|finding| finding.breaks()).count();
    match (reasons, planned) {
        (0, true) => format!("the guarantee would hold{warnings}"),
        (0, false) => {
            format!("qjump can run here{warnings}; give --config, or a network as to `qjump load`, to check a plan")
        }
        (1, _) => format!("the guarantee would NOT hold, for 1 reason{warnings}"),
        _ => format!("the guarantee would NOT hold, for {reasons} reasons{warnings}"),
    }
}
