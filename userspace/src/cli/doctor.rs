//! `qjump doctor`.

use std::net::IpAddr;

use clap::Args;
use serde_json::json;

use super::{Failure, print};
use crate::{
    check::{SCHEMA_VERSION, doctor},
    table::Table,
};

/// Send a probe at each level, and show its mark on the wire and the counter that it moved
///
/// A probe is a UDP datagram of 16 bytes to the discard port. Exit status 2 if a mark is wrong or no counter moved.
#[derive(Args)]
pub struct DoctorCommand {
    /// Interface that qjump is loaded on
    #[arg(long, value_name = "IF")]
    interface: String,
    /// Where probes go: an address that is reached through the interface [default: all hosts of the link, 224.0.0.1]
    #[arg(long, value_name = "ADDRESS", default_value_t = doctor::ALL_HOSTS, hide_default_value = true)]
    to: IpAddr,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl DoctorCommand {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let proofs = doctor::probe(&self.interface, self.to)?;
        let holds = proofs.iter().all(|proof| proof.fault.is_none());
        if self.json {
            let levels: Vec<_> = proofs.iter().map(to_json).collect();
            let report = json!({
                "schema_version": SCHEMA_VERSION,
                "interface": self.interface,
                "holds": holds,
                "levels": levels,
            });
            print(format!("{report:#}"))?;
        } else {
            let mut table = Table::new(["level", "DSCP wanted", "on the wire", "counted", "verdict"]).left(4);
            for proof in &proofs {
                table.row([
                    proof.level.to_string(),
                    proof.expected.to_string(),
                    proof.seen.map_or("-".to_owned(), |mark| mark.to_string()),
                    counted(proof),
                    proof.fault.clone().unwrap_or_else(|| "Ok".to_owned()),
                ]);
            }
            print(table.to_string().trim_end())?;
        }
        if holds { Ok(()) } else { Err(Failure::DoesNotHold) }
    }
}

fn counted(proof: &doctor::Proof) -> String {
    let names: Vec<&str> = proof.moved.iter().map(|reason| reason.name()).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(", ") }
}

fn to_json(proof: &doctor::Proof) -> serde_json::Value {
    json!({
        "level": proof.level.number(),
        "dscp_wanted": proof.expected,
        "dscp_seen": proof.seen,
        "counted": proof.moved.iter().map(|reason| reason.name()).collect::<Vec<_>>(),
        "fault": proof.fault,
    })
}
