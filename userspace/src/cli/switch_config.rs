//! `qjump switch-config`.

use clap::Args;

use super::{Failure, plan::NetworkArgs, print};
use crate::{
    switch::{Configuration, Nos, Request, configure},
    units::Rate,
};

/// Print what switches must be told for the plan to hold: DSCP trust, strict priority, no pausing of its levels
///
/// Says what the factory's configuration would do to the levels: in comments, and for SONiC, whose JSON has none, on standard
/// error. Changes nothing; `qjump measure switch-check` shows whether a switch does it.
#[derive(Args)]
pub struct SwitchConfigCommand {
    /// What runs on the switch
    #[arg(long, value_enum)]
    nos: Nos,
    /// Ports, as the switch calls them, by commas; without it all of them, where it has a word for that
    #[arg(long, value_name = "PORT", value_delimiter = ',')]
    ports: Vec<String>,
    /// Rate of the ports, which Linux without the prio qdisc has to know [default: the plan's slowest link]
    #[arg(long, value_name = "RATE")]
    port_rate: Option<Rate>,
    /// Print the notes alone
    #[arg(long)]
    notes: bool,
    #[command(flatten)]
    network: NetworkArgs,
}

impl SwitchConfigCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let (answer, _) = self.network.plan(false)?;
        let plan = &answer.plan;
        let port_rate = self.port_rate.unwrap_or(plan.network.link_rate);
        let Configuration { text, notes, has_comments } =
            configure(self.nos, &Request { plan, ports: &self.ports, port_rate })
                .map_err(|error| Failure::Usage(error.to_string()))?;
        if self.notes {
            return print(notes.join("\n"));
        }
        if !has_comments {
            notes.iter().for_each(|note| eprintln!("qjump: {note}"));
        }
        print(text.trim_end())
    }
}
