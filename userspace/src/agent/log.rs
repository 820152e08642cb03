//! Where what the agent says goes.

use std::env;

use tracing_subscriber::{filter::LevelFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use super::machine::{Report, Urgency};

/// Sends what is said to the journal, if that is what standard error is, else to standard error.
pub fn begin(verbose: bool) {
    let level = if verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let journal = env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    let text = journal.is_none().then(|| {
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(false).without_time()
    });
    // Somebody else may have begun already, who then has it.
    let _ = tracing_subscriber::registry().with(level).with(journal).with(text).try_init();
}

/// Says what the machine has to say.
pub fn say(report: &Report) {
    let Report { urgency, interface, text } = report;
    let about = interface.as_ref().map_or_else(String::new, |interface| format!("{interface}: "));
    match urgency {
        Urgency::Info => tracing::info!(interface, "{about}{text}"),
        Urgency::Warning => tracing::warn!(interface, "{about}{text}"),
        Urgency::Error => tracing::error!(interface, "{about}{text}"),
    }
}
