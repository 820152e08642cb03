//! A plan for people.

use super::{LevelPlan, Plan};
use crate::{
    table::Table,
    units::{show_ns, show_rate},
};

impl LevelPlan {
    fn guarantee(&self) -> String {
        match (self.guaranteed, self.bound_ns, self.max_senders) {
            (true, ..) => "guaranteed".to_owned(),
            (_, Some(_), Some(senders)) => format!("while <= {senders} hosts send"),
            _ => "none".to_owned(),
        }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut table = Table::new(["level", "factor", "epoch", "rate", "burst", "bound", "bound holds"]);
        for level in &self.levels {
            table.row([
                level.spec.level.to_string(),
                level.factor().map_or("unlimited".to_owned(), |factor| factor.to_string()),
                level.epoch_ns.map_or("-".to_owned(), show_ns),
                level.rate_bps.map_or("-".to_owned(), show_rate),
                level.burst_bytes.map_or("-".to_owned(), |burst| format!("{burst:.0} B")),
                level.bound_ns.map_or("-".to_owned(), show_ns),
                level.guarantee(),
            ]);
        }
        table.row(["0", "-", "-", "-", "-", "-", "best effort, unlimited"].map(str::to_owned));
        writeln!(f, "{table}")?;
        let network = &self.network;
        let packet_ns = network.packet_time_ns();
        write!(
            f,
            "Bound: {} hosts x {} (one packet of {} B takes {} B on a {} link) + {} of fixed delays = {}. ",
            network.hosts,
            show_ns(packet_ns),
            network.max_packet,
            network.packet_on_wire(),
            network.link_rate,
            network.epsilon,
            show_ns(f64::from(network.hosts) * packet_ns + network.epsilon.ns() as f64),
        )?;
        write!(
            f,
            "As published (2015): it holds with strict priority in every switch, links that do not get slower towards \
             the core, and this limiter on every host; it begins when a packet leaves its host's own queues."
        )?;
        if self.levels.iter().any(|level| level.bound_ns.is_some() && !level.guaranteed) {
            write!(f, " A bound that is not guaranteed leaves out what the levels above it send.")?;
        }
        Ok(())
    }
}
