//! Asking a running agent.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::Value;
use thiserror::Error;

/// Why there is no answer.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum ClientError {
    #[error("no agent listens at {path} ({source}); `systemctl status qjump`, or start one: `qjump agent`")]
    NoAgent { path: String, source: io::Error },
    #[error("{path} is for root and the members of group qjump alone")]
    Permission { path: String },
    #[error("the agent at {path} does not answer: {source}")]
    NoAnswer { path: String, source: io::Error },
}

/// How long an answer may take: a reload waits until everything is in force.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends one request and waits for its answer.
///
/// # Errors
/// If there is no agent, it may not be asked, or does not answer.
pub fn ask(socket: &Path, request: &Value) -> Result<Value, ClientError> {
    let path = || socket.display().to_string();
    let stream = UnixStream::connect(socket).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => ClientError::Permission { path: path() },
        _ => ClientError::NoAgent { path: path(), source },
    })?;
    let answer = || -> io::Result<Value> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        writeln!(&stream, "{request}")?;
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    answer().map_err(|source| ClientError::NoAnswer { path: path(), source })
}
