//! SONiC. Tables and keys: "SONiC Configuration Database Manual" (sonic-buildimage, src/sonic-yang-models/doc/Configuration.md).
//! What the factory does: the template of `config qos reload` (sonic-buildimage, files/build_templates/qos_config.j2), and for
//! buffers that of the manual's section "Buffer queue".

use serde::{Serialize, Serializer};

use super::{CODEPOINTS, Classes, Configuration, Request, Unusable, common_notes, list};

/// The factory's lossless classes: `LOSSLESS_TC` of the template.
const LOSSLESS: [u8; 2] = [3, 4];

/// The factory's map AZURE.
const fn factory_class(dscp: u8) -> u8 {
    match dscp {
        3 => 3,
        4 => 4,
        5 => 2,
        8 => 0,
        46 => 5,
        48 => 6,
        _ => 1,
    }
}

/// JSON whose keys stay in the order in which they were written: codepoints by number.
enum Node {
    Text(String),
    Map(Vec<(String, Node)>),
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Map(entries) => serializer.collect_map(entries.iter().map(|(key, value)| (key, value))),
        }
    }
}

fn text(value: impl ToString) -> Node {
    Node::Text(value.to_string())
}

fn map<K: ToString>(entries: impl IntoIterator<Item = (K, Node)>) -> Node {
    Node::Map(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
}

/// One entry with the name of our maps. The factory's are left as they are: other ports may use them.
fn ours(entries: impl IntoIterator<Item = (u8, u8)>) -> Node {
    map([("QJUMP", map(entries.into_iter().map(|(key, value)| (key, text(value)))))])
}

pub(super) fn configure(request: &Request<'_>) -> Result<Configuration, Unusable> {
    if request.ports.is_empty() {
        return Err(Unusable::NoPorts { example: "Ethernet0,Ethernet4", how: "`show interfaces status`" });
    }
    let classes = Classes::of(request.plan);
    let paused = classes.below(&LOSSLESS);
    // What the factory sends to a lossless class below all levels keeps it: RoCE there goes on, and delays no level.
    let class =
        |dscp: u8| if paused.contains(&factory_class(dscp)) { factory_class(dscp) } else { classes.of_dscp(dscp) };
    let port_map = || {
        let mut entries = vec![
            ("dscp_to_tc_map", text("QJUMP")),
            ("tc_to_queue_map", text("QJUMP")),
            ("tc_to_pg_map", text("QJUMP")),
        ];
        if !paused.is_empty() {
            let paused: Vec<String> = paused.iter().map(u8::to_string).collect();
            entries.push(("pfc_enable", text(paused.join(","))));
            entries.push(("pfcwd_sw_enable", text(paused.join(","))));
        }
        map(entries)
    };
    let queue = |port: &str, class: u8| {
        let scheduler = if classes.has(class) { "qjump_strict" } else { "qjump_rest" };
        (format!("{port}|{class}"), map([("scheduler", text(scheduler))]))
    };
    let root = map([
        ("DSCP_TO_TC_MAP", ours((0..CODEPOINTS).map(|dscp| (dscp, class(dscp))))),
        ("TC_TO_QUEUE_MAP", ours((0..8).map(|class| (class, class)))),
        // A lossless priority group pauses its senders; the levels are in the lossy one.
        (
            "TC_TO_PRIORITY_GROUP_MAP",
            ours((0..8).map(|class| (class, if paused.contains(&class) { class } else { 0 }))),
        ),
        (
            "SCHEDULER",
            map([
                ("qjump_strict", map([("type", text("STRICT"))])),
                ("qjump_rest", map([("type", text("DWRR")), ("weight", text(1))])),
            ]),
        ),
        // The map of the whole switch, which some chips have instead of one a port.
        (
            "PORT_QOS_MAP",
            map([("global".to_owned(), map([("dscp_to_tc_map", text("QJUMP"))]))]
                .into_iter()
                .chain(request.ports.iter().map(|port| (port.clone(), port_map())))),
        ),
        (
            "QUEUE",
            map(request
                .ports
                .iter()
                .flat_map(|port| (0..8).map(move |class| (port, class)))
                .map(|(port, class)| queue(port, class))),
        ),
    ]);
    let mut text = serde_json::to_string_pretty(&root).unwrap_or_default();
    text.push('\n');
    Ok(Configuration { text, notes: notes(request, &classes, &paused), has_comments: false })
}

fn notes(request: &Request<'_>, classes: &Classes, paused: &[u8]) -> Vec<String> {
    let mut notes = common_notes(request.plan, classes);
    notes.push(format!(
        "Factory: {}, all of them DWRR: marks collapse into one queue, and what is left apart is served by weight and not \
         strictly. Nothing says so.",
        classes.under(factory_class)
    ));
    notes.push("Apply: sudo config load -y FILE; then sudo config save. Take back: sudo config qos reload.".to_owned());
    let taken: Vec<String> = LOSSLESS.iter().filter(|class| !paused.contains(class)).map(u8::to_string).collect();
    if !taken.is_empty() {
        notes.push(format!(
            "PFC: the factory pauses classes 3 and 4, for RoCE at DSCP 3 and 4. Class {} is one of the plan, or above one, and \
             must never be paused: it is lossy here, and so is RoCE that used it. `config load` adds and changes, and removes \
             nothing, so where it was lossless also run, for each PORT and each of these classes N: sonic-db-cli CONFIG_DB HDEL \
             'QUEUE|PORT|N' wred_profile{}",
            list(&taken),
            if paused.is_empty() { "; and: sonic-db-cli CONFIG_DB HDEL 'PORT_QOS_MAP|PORT' pfc_enable pfcwd_sw_enable." } else { "." }
        ));
    }
    if classes.has(7) {
        notes.push(
            "Buffers: the factory's BUFFER_QUEUE has entries for queues 0-2, 3-4 and 5-6, and none for 7. If `show queue \
             counters` has drops at UC7, give it one: sonic-db-cli CONFIG_DB HSET 'BUFFER_QUEUE|PORT|7' profile \
             egress_lossy_profile (or what queues 5-6 have there)."
                .to_owned(),
        );
    }
    notes.push("References are plain names, as since 202111; releases before write [DSCP_TO_TC_MAP|QJUMP].".to_owned());
    notes
}
