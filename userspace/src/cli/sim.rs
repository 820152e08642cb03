//! `qjump sim`: the planner's bounds, attacked.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Failure, print};
use crate::{
    plan::Model,
    sim::campaign::{Campaign, MODELS},
    table::Table,
};

/// Attack a plan's bounds in a packet-level simulation
#[derive(Args)]
pub struct SimCommand {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Campaign(CampaignCommand),
}

/// Attack random networks of all models; exit 2 if a promise is broken
#[derive(Args)]
struct CampaignCommand {
    /// How many networks
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    networks: u64,
    /// Seed of the first network
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs of the adversary on each network
    #[arg(long, value_name = "N", default_value_t = 40)]
    steps: u32,
    /// One model alone
    #[arg(long, value_enum)]
    model: Option<Model>,
    /// Beyond the promise: many destinations for every model, and epochs so many times as long
    #[arg(long, value_name = "FACTOR")]
    stretch: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl SimCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        match &self.what {
            What::Campaign(command) => command.run(),
        }
    }
}

impl CampaignCommand {
    fn run(&self) -> Result<(), Failure> {
        if let Some(stretch) = self.stretch.filter(|stretch| !(0.01..=100.0).contains(stretch)) {
            return Err(Failure::Usage(format!("--stretch {stretch}: give a number from 0.01 to 100")));
        }
        let campaign = Campaign {
            networks: self.networks,
            seed: self.seed,
            steps: self.steps,
            model: self.model,
            stretch: self.stretch,
        };
        let verdicts = campaign.run(|_| ());
        let rows: Vec<_> = MODELS.iter().zip(&verdicts).filter(|(_, verdict)| verdict.networks > 0).collect();
        if self.json {
            let models: Vec<_> = rows
                .iter()
                .map(|(model, verdict)| {
                    json!({
                        "model": model,
                        "networks": verdict.networks,
                        "runs": verdict.runs,
                        "broken": verdict.broken,
                        "within_10_percent": verdict.tight,
                        "worst": verdict.worst.0,
                        "worst_network": verdict.worst.1,
                    })
                })
                .collect();
            print(format!("{:#}", json!({ "schema_version": 1, "seed": self.seed, "models": models })))?;
        } else {
            let mut table =
                Table::new(["model", "networks", "runs", "worst time / bound", "in network", "above 0.9", "broken"]);
            for (model, verdict) in rows {
                table.row([
                    json!(model).as_str().unwrap_or_default().to_owned(),
                    verdict.networks.to_string(),
                    verdict.runs.to_string(),
                    format!("{:.3}", verdict.worst.0),
                    verdict.worst.1.to_string(),
                    verdict.tight.to_string(),
                    verdict.broken.to_string(),
                ]);
            }
            print(table)?;
        }
        if verdicts.iter().any(|verdict| verdict.broken > 0) { Err(Failure::DoesNotHold) } else { Ok(()) }
    }
}
