//! A plan for people.

use std::fmt::{self, Display, Write as _};

use qjump_ebpf::{Charge, Level, frame::WIRE_OVERHEAD};

use super::{
    Delays, LevelPlan, Model, Network, Plan, Terms,
    backward::{Assigned, Placed},
    delays::{Fixed, on_wire},
};
use crate::{
    table::Table,
    units::{show_ns, show_rate},
};

impl LevelPlan {
    pub(super) fn charge_name(&self) -> &'static str {
        match self.charge {
            Charge::Packet => "packet",
            Charge::Byte => "bytes",
            Charge::Unlimited | Charge::NotConfigured => "unlimited",
        }
    }

    fn holds(&self, plan: &Plan) -> String {
        let depends = |above: &&Self| above.spec.level > self.spec.level && above.is_conditional(plan);
        match (self.guaranteed, self.bound_ns, self.max_senders) {
            (true, ..) => "guaranteed".to_owned(),
            (_, None, _) | (_, _, None) => "no bound".to_owned(),
            (_, _, Some(senders)) if senders < plan.network.hosts => format!("while <= {senders} hosts send"),
            _ => match plan.levels.iter().find(depends) {
                Some(above) => format!("while level {}'s does", above.spec.level),
                None => "as published".to_owned(),
            },
        }
    }

    /// Whether its bound counts fewer than all hosts.
    fn is_conditional(&self, plan: &Plan) -> bool {
        self.max_senders.is_some_and(|senders| senders < plan.network.hosts)
    }

    fn show_factor(&self) -> String {
        self.factor.map_or("unlimited".to_owned(), show_factor)
    }
}

/// A factor for people: `1`, `0.226`, `2.5e-5`.
pub fn show_factor(factor: f64) -> String {
    if factor < 0.001 {
        return format!("{factor:.1e}");
    }
    let text = format!("{factor:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Model {
    fn equation(self) -> &'static str {
        match self {
            Self::Strict => "strict: at factor 1 an epoch is twice the bound",
            Self::Paper => "as published in 2015: an epoch is 2nP/R + eps",
            Self::FanIn => "fan-in: at factor 1 an epoch is the bound",
        }
    }
}

impl Plan {
    /// What the bounds of this plan depend on, a sentence each.
    pub fn conditions(&self) -> Vec<String> {
        let network = &self.network;
        let link_bps = network.link_rate.bps() as f64;
        let mut conditions = vec![
            format!("the limiter on every host, no more than {} hosts, and clocks that do not run fast", network.hosts),
            "switches that serve the eight levels strictly, and routes on which packets that part do not meet again"
                .to_owned(),
            format!("no link slower than {}", network.link_rate),
        ];
        let queued = |terms: &Terms| terms.own_ns + terms.above.iter().map(|(_, ns)| ns).sum::<f64>();
        let most_ns = self.levels.iter().filter_map(|level| level.terms.as_ref()).map(queued).fold(0.0, f64::max);
        if most_ns > 0.0 {
            conditions.push(format!(
                "room for {:.0} B of these levels at every port, whatever lower levels do",
                (most_ns * link_bps / 8e9).ceil()
            ));
        }
        match network.delays {
            Delays::Given(_) => conditions.push(
                "an epsilon that covers switches, store and forward, and a lower-level frame at every port".to_owned(),
            ),
            Delays::Path(path) => conditions.push(format!(
                "no frame larger than {} B, and at most {} B of lower levels ahead in the sender's NIC",
                network.mtu(),
                path.host_burst.max(on_wire(network.mtu(), network.overhead().max(WIRE_OVERHEAD)))
            )),
        }
        conditions.push("a bound begins when a packet leaves the host's own queues for its NIC".to_owned());
        match network.model {
            Model::Strict => {}
            Model::Paper => conditions.push(
                "as published: fixed delays that vary by no more than half of epsilon, between paths and from packet to \
                 packet; levels below the strictest by the published reasoning"
                    .to_owned(),
            ),
            Model::FanIn => conditions.push(
                "proven for contending packets that go to one destination over links of one rate; for several \
                 destinations no counter-example is known"
                    .to_owned(),
            ),
        }
        for level in self.levels.iter().filter(|level| level.is_conditional(self)) {
            let (Some(own_ns), Some(senders)) = (level.bound_ns, level.max_senders) else { continue };
            let below = self.levels.iter().filter(|below| below.spec.level <= level.spec.level);
            let longest_ns = below.filter_map(|below| below.bound_ns).fold(0.0, f64::max);
            let lower = self.levels.iter().any(|below| below.spec.level < level.spec.level && below.bound_ns.is_some());
            conditions.push(format!(
                "for level {}{}: at most {senders} different hosts of {} send at it within any {}",
                level.spec.level,
                if lower { " and those below" } else { "" },
                network.hosts,
                show_ns(own_ns + longest_ns),
            ));
        }
        conditions
    }

    fn table(&self) -> Table {
        let mut table =
            Table::new(["level", "factor", "charge", "max packet", "epoch", "rate", "burst", "bound", "bound holds"]);
        for level in &self.levels {
            table.row([
                level.spec.level.to_string(),
                level.show_factor(),
                level.charge_name().to_owned(),
                level.epoch_ns.map_or("-".to_owned(), |_| format!("{} B", level.max_packet)),
                level.epoch_ns.map_or("-".to_owned(), show_ns),
                level.rate_bps.map_or("-".to_owned(), show_rate),
                level.burst_bytes.map_or("-".to_owned(), |burst| format!("{burst:.0} B")),
                level.bound_ns.map_or("-".to_owned(), show_ns),
                level.holds(self),
            ]);
        }
        table.row(["0", "-", "-", "-", "-", "-", "-", "-", "best effort, unlimited"].map(str::to_owned));
        table
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.table())?;
        write!(f, "Model {}.", self.network.model.equation())?;
        if let Some((level, terms)) = self.levels.iter().find_map(|l| l.terms.as_ref().map(|terms| (l, terms))) {
            write!(
                f,
                " The bound of level {}, {}, is {} ({} B on the wire each, {}) + {} of fixed delays.",
                level.spec.level,
                show_ns(level.bound_ns.unwrap_or_default()),
                own(level, terms),
                wire(&self.network, level, terms),
                self.network.link_rate,
                show_ns(terms.fixed.total_ns())
            )?;
        }
        write!(f, " It needs:")?;
        for condition in self.conditions() {
            write!(f, "\n- {condition}")?;
        }
        if self.levels.iter().any(|level| level.bound_ns.is_none() && level.epoch_ns.is_some()) {
            write!(
                f,
                "\nA level without a bound is limited and marked all the same; --explain LEVEL says why it has none."
            )?;
        }
        Ok(())
    }
}

/// What each sender puts on the wire within the bound of a level, bytes: a packet, or a burst and what follows it.
fn wire(network: &Network, level: &LevelPlan, terms: &Terms) -> f64 {
    let senders = f64::from(level.max_senders.unwrap_or_default().max(1));
    (terms.own_ns / senders * network.link_rate.bps() as f64 / 8e9).round()
}

fn own(level: &LevelPlan, terms: &Terms) -> String {
    let senders = level.max_senders.unwrap_or_default();
    format!("{senders} hosts x {} = {}", show_ns(terms.own_ns / f64::from(senders.max(1))), show_ns(terms.own_ns))
}

impl Display for Assigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table =
            Table::new(["application", "level", "message", "per second", "wait at host", "latency", "deadline"]);
        for placed in &self.apps {
            table.row([
                placed.app.name.clone(),
                placed.level.to_string(),
                format!("{} B", placed.app.message),
                format!("{:.0}", placed.app.per_second),
                show_ns(placed.wait_ns),
                show_ns(placed.latency_ns),
                placed.app.deadline.to_string(),
            ]);
        }
        write!(f, "{}", table.left(0))
    }
}

impl Assigned {
    /// The applications as JSON.
    pub fn to_json(&self) -> Vec<serde_json::Value> {
        let json = |placed: &Placed| {
            serde_json::json!({
                "name": placed.app.name,
                "level": placed.level.number(),
                "message_bytes": placed.app.message,
                "per_second": placed.app.per_second,
                "wait_ns": placed.wait_ns,
                "latency_ns": placed.latency_ns,
                "deadline_ns": placed.app.deadline.ns(),
            })
        };
        self.apps.iter().map(json).collect()
    }
}

/// `--explain`: every term of one level's bound with its number.
pub struct Explanation<'a>(pub &'a Plan, pub &'a LevelPlan);

impl Fixed {
    fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("fixed delays, as given", self.given_ns),
            ("switches and cables", self.switch_ns),
            ("store and forward: the packet once a switch", self.store_and_forward_ns),
            ("blocking: one lower frame a switch", self.blocking_ns),
            ("the sender's own NIC: what it has begun to send", self.host_ns),
        ]
    }
}

impl Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(plan, level) = *self;
        let number = level.spec.level;
        let (Some(bound), Some(terms)) = (level.bound_ns, &level.terms) else {
            let why = match plan.levels.iter().find(|above| above.spec.level >= number && above.epoch_ns.is_none()) {
                Some(above) if above.spec.level == number => "it is unlimited".to_owned(),
                Some(above) => format!("level {} above it is unlimited", above.spec.level),
                None => "with one sender already, it and the levels above could fill the link for ever".to_owned(),
            };
            return write!(f, "Level {number} has no bound: {why}.");
        };
        writeln!(f, "Level {number}: bound {}, {}.", show_ns(bound), level.holds(plan))?;
        let mut rows: Vec<(String, f64)> = vec![(format!("level {number}: {}", own(level, terms)), terms.own_ns)];
        for (above, ns) in &terms.above {
            let senders = plan.level(*above).and_then(|level| level.max_senders).unwrap_or_default();
            rows.push((
                format!("level {above} meanwhile: {senders} hosts x {}", show_ns(ns / f64::from(senders.max(1)))),
                *ns,
            ));
        }
        rows.extend(
            terms.fixed.parts().into_iter().filter(|(_, ns)| *ns > 0.0).map(|(name, ns)| (name.to_owned(), ns)),
        );
        let mut table = Table::new(["time", "share", "what"]);
        for (what, ns) in &rows {
            table.row([show_ns(*ns), format!("{:.0}%", 100.0 * ns / bound), what.clone()]);
        }
        // The last column reads better from the left.
        write!(f, "{}", table.left(2))?;
        let largest = rows.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|row| row.0.as_str()).unwrap_or_default();
        writeln!(f, "Most of it: {largest}.")?;
        if let (Some(epoch), Some(rate)) = (level.epoch_ns, level.rate_bps) {
            let spacing = epoch - level.spec.tolerance.ns() as f64;
            write!(
                f,
                "A host may send {} at this level: {}.",
                show_rate(rate),
                match level.charge {
                    Charge::Packet if level.spec.tolerance.ns() > 0 =>
                        format!("a packet each {}, never two within {}", show_ns(epoch), show_ns(spacing)),
                    Charge::Packet => format!("a packet each {}", show_ns(epoch)),
                    _ => format!("bursts of {:.0} wire bytes", level.burst_bytes.unwrap_or_default()),
                }
            )?;
        }
        Ok(())
    }
}

/// `--what-if`: both plans and what differs, as text.
pub fn difference(before: &Plan, after: &Plan) -> String {
    let mut out = format!("Now: {}\n{}\n", inputs(&before.network), before.table());
    let _ = writeln!(out, "What if: {}\n{}", inputs(&after.network), after.table());
    let levels: Vec<Level> = {
        let mut all: Vec<Level> = before.levels.iter().chain(&after.levels).map(|level| level.spec.level).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.dedup();
        all
    };
    let mut table = Table::new(["level", "bound", "epoch", "rate", "bound holds"]);
    for number in levels {
        let change = |value: fn(&LevelPlan) -> Option<f64>, show: fn(f64) -> String| match (
            before.level(number).and_then(value),
            after.level(number).and_then(value),
        ) {
            (Some(a), Some(b)) if (a - b).abs() <= 1e-9 * a => "same".to_owned(),
            (Some(a), Some(b)) => format!("{} -> {} (x{:.2})", show(a), show(b), b / a),
            (Some(a), None) => format!("{} -> none", show(a)),
            (None, Some(b)) => format!("none -> {}", show(b)),
            (None, None) => "-".to_owned(),
        };
        let holds = |plan: &Plan| plan.level(number).map_or("no such level".to_owned(), |level| level.holds(plan));
        let (a, b) = (holds(before), holds(after));
        table.row([
            number.to_string(),
            change(|level| level.bound_ns, show_ns),
            change(|level| level.epoch_ns, show_ns),
            change(|level| level.rate_bps, show_rate),
            if a == b { a } else { format!("{a} -> {b}") },
        ]);
    }
    let _ = write!(out, "Difference:\n{table}");
    out
}

fn inputs(network: &Network) -> String {
    let delays = match network.delays {
        Delays::Given(epsilon) => format!("epsilon {epsilon}"),
        Delays::Path(path) => format!(
            "{} switches of {}, frames of {} B, host bursts of {} B",
            path.hops, path.switch_delay, path.mtu, path.host_burst
        ),
    };
    format!("{} hosts, {}, P = {} B, {delays}", network.hosts, network.link_rate, network.max_packet)
}
