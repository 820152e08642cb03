//! `qjump agent`, `qjump reload` and `qjump drain`.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{Failure, print};
use crate::agent::{self, CONFIG, Failed, Options, SOCKET, client, metrics::DEFAULT_ADDRESS};

/// Keep this host as its configuration wants it: interfaces, queues and rules, whatever comes, goes or is undone
///
/// Reads the configuration, and the files conf.d/*.toml beside it. SIGHUP, or `qjump reload`, reads it again: one that is
/// wrong is refused, and the old one stays. Ended or killed, the limits stay in force; the next agent takes them over.
///
/// The control socket is for root and the members of group qjump. It takes lines of JSON: {"method": "status"},
/// "reload", "drain", "tag" (level, and pid, cgroup or unit) and "untag".
#[derive(Args)]
pub struct AgentCommand {
    /// The configuration
    #[arg(long, value_name = "FILE", default_value = CONFIG)]
    config: PathBuf,
    /// Where to listen
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Where to answer /metrics, /healthz and /ready by HTTP; "none" for nowhere
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_ADDRESS, value_parser = listening)]
    metrics: Listening,
    /// End when everything is in force; exit status 1 if something could not be put in force
    #[arg(long)]
    once: bool,
    /// Say each command
    #[arg(long)]
    verbose: bool,
}

/// An address, or none.
#[derive(Clone, Copy)]
struct Listening(Option<SocketAddr>);

fn listening(text: &str) -> Result<Listening, String> {
    match text {
        "none" => Ok(Listening(None)),
        text => text.parse().map(|address| Listening(Some(address))).map_err(|_| {
            format!("'{text}' is no address; give one with a port, such as {DEFAULT_ADDRESS} or [::1]:9, or none")
        }),
    }
}

impl AgentCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let Self { config, socket, metrics, once, verbose } = self;
        let (config, socket) = (config.clone(), socket.clone());
        let options = Options { config, socket, metrics: metrics.0, once: *once, verbose: *verbose };
        agent::run(&options).map_err(|error| match error {
            Failed::Host(error) => error.into(),
            error => Failure::Failed(error.to_string()),
        })
    }
}

/// Have the agent read its configuration again, and show what changes; exit status 2 if it is refused: the old one stays
#[derive(Args)]
pub struct ReloadCommand {
    #[command(flatten)]
    agent: AgentArgs,
}

/// Have the agent take everything off its interfaces, and leave them alone until the next reload
#[derive(Args)]
pub struct DrainCommand {
    #[command(flatten)]
    agent: AgentArgs,
}

/// A running agent.
#[derive(Args)]
struct AgentArgs {
    /// Where the agent listens
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl AgentArgs {
    fn ask(&self, method: &str) -> Result<Value, Failure> {
        let answer = client::ask(&self.socket, &json!({"method": method}))
            .map_err(|error| Failure::Failed(error.to_string()))?;
        let error = answer["error"].as_str().unwrap_or("it does not say why").to_owned();
        if self.json {
            print(format!("{answer:#}"))?;
        }
        match (answer["ok"].as_bool(), answer["kind"].as_str()) {
            (Some(true), _) => Ok(answer),
            (_, Some("refused")) => {
                eprintln!("qjump: refused, the old configuration stays: {error}");
                Err(Failure::DoesNotHold)
            }
            _ => Err(Failure::Failed(error)),
        }
    }
}

/// What is not as it should be, by interface.
fn problems(answer: &Value) -> Vec<String> {
    let interfaces = answer["agent"]["interfaces"].as_object();
    interfaces
        .into_iter()
        .flatten()
        .filter_map(|(name, problem)| Some(format!("{name}: {}", problem.as_str()?)))
        .collect()
}

impl ReloadCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let answer = self.agent.ask("reload")?;
        if !self.agent.json {
            let changes: Vec<&str> =
                answer["changes"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            print(if changes.is_empty() { "nothing changes".to_owned() } else { changes.join("\n") })?;
        }
        match problems(&answer) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Failure::Failed(format!("not all of it is in force:\n{}", problems.join("\n")))),
        }
    }
}

impl DrainCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let answer = self.agent.ask("drain")?;
        match problems(&answer) {
            problems if problems.is_empty() && self.agent.json => Ok(()),
            problems if problems.is_empty() => print("everything is taken off; `qjump reload` puts it back"),
            problems => Err(Failure::Failed(problems.join("\n"))),
        }
    }
}
