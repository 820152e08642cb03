//! Would the guarantee hold on this host? Asked before anything is touched, and without touching anything.
//!
//! [`look`] gathers [`Facts`]; [`judge`] is pure and says what they mean for a plan. What a load would refuse is found by
//! the load's own code ([`crate::dataplane::foresee`], [`crate::dataplane::trial`]), so the two cannot disagree.

mod bypass;
pub mod doctor;
pub(crate) mod ethtool;
mod facts;
mod judge;
mod look;
mod rules;

use serde_json::{Value, json};

pub use bypass::{Bypass, Path};
pub use facts::{Cgroups, Facts, Host, Interface, Link, Load, Seen};
pub use judge::judge;
pub use look::look;
pub use rules::Rewrite;

/// Version of the JSON of `qjump check`.
pub const SCHEMA_VERSION: u32 = 1;

/// What a finding means for the guarantee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// As it should be.
    Ok,
    /// The guarantee holds, but something is lost, or could not be seen.
    Warning,
    /// This kernel or device does not have it.
    Unsupported,
    /// The guarantee would not hold.
    Broken,
}

impl Status {
    /// As it is printed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "Ok",
            Self::Warning => "Warning",
            Self::Unsupported => "Unsupported",
            Self::Broken => "Broken",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it means.
    pub status: Status,
    /// The interface; `None` for the whole host.
    pub interface: Option<String>,
    /// What was looked at, in a word.
    pub topic: &'static str,
    /// What was found.
    pub found: String,
    /// What to do about it; `None` if there is nothing to do, or `found` says it.
    pub remedy: Option<String>,
    /// Whether the plan needs what is unsupported.
    pub needed: bool,
}

impl Finding {
    /// Whether the guarantee would not hold because of it.
    pub fn breaks(&self) -> bool {
        self.status == Status::Broken || (self.status == Status::Unsupported && self.needed)
    }

    fn to_json(&self) -> Value {
        json!({
            "status": self.status.name().to_lowercase(),
            "interface": self.interface,
            "topic": self.topic,
            "found": self.found,
            "remedy": self.remedy,
            "breaks": self.breaks(),
        })
    }
}

/// Whether the guarantee would hold.
pub fn holds(findings: &[Finding]) -> bool {
    !findings.iter().any(Finding::breaks)
}

/// The findings as JSON.
pub fn to_json(findings: &[Finding]) -> Value {
    json!({
        "schema_version": SCHEMA_VERSION,
        "holds": holds(findings),
        "findings": findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
    })
}
