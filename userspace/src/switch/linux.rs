//! Linux that forwards by its CPU, as bridge or router: tc. See tc-prio(8), tc-htb(8), tc-u32(8).

use std::fmt::Write as _;

use qjump_ebpf::Level;

use super::{Classes, Configuration, Request, Unusable, comments, common_notes};

/// How much of a link's time one HTB burst may take, ns: timers are some 10 us late.
const BURST_NS: u64 = 20_000;

/// Largest frame, L2 bytes without FCS.
const FRAME: u64 = 1_514;

/// How long a full queue may make a packet wait, ns.
const QUEUE_NS: u64 = 10_000_000;

/// A queue holds some frames, whatever the rate, and no more than a large switch has.
const QUEUE_BYTES: std::ops::RangeInclusive<u64> = 65_536..=4_194_304;

pub(super) fn configure(request: &Request<'_>) -> Result<Configuration, Unusable> {
    if request.ports.is_empty() {
        return Err(Unusable::NoPorts { example: "swp1,swp2", how: "`ip -br link`" });
    }
    let classes = Classes::of(request.plan);
    let notes = notes(request, &classes);
    let rate = request.port_rate;
    let bytes_in = |ns: u64| (u128::from(rate.bps()) * u128::from(ns) / 8_000_000_000) as u64;
    let burst = bytes_in(BURST_NS).max(FRAME);
    let limit = bytes_in(QUEUE_NS).clamp(*QUEUE_BYTES.start(), *QUEUE_BYTES.end());
    // Band 1 is the strictest level, the last band best effort.
    let bands = classes.levels.len() + 1;
    let last = bands - 1;
    let map = vec![last.to_string(); 16].join(" ");
    let mut text = format!("#!/bin/sh\n{}set -eu\n", comments("#", &notes));
    let _ = write!(
        text,
        "
# Bands of strict priority where the kernel has prio. Else HTB, whose classes have next to nothing of their
# own and borrow the rest by priority; it has to know the rate of the port.
bands() {{
    tc qdisc del dev \"$1\" root 2>/dev/null || :
    if tc qdisc add dev \"$1\" root handle 1: prio bands {bands} priomap {map} 2>/dev/null; then
        return
    fi
    tc qdisc add dev \"$1\" root handle 1: htb default {bands}
    tc class add dev \"$1\" parent 1: classid 1:100 htb rate {rate} ceil {rate} \\
        burst {burst} cburst {burst} overhead 24 mpu 84 quantum {FRAME}
    for band in {numbers}; do
        tc class add dev \"$1\" parent 1:100 classid 1:$band htb rate 1kbit ceil {rate} \\
            prio $((band - 1)) burst {burst} cburst {burst} overhead 24 mpu 84 quantum {FRAME}
        tc qdisc add dev \"$1\" parent 1:$band bfifo limit {limit}
    done
}}

# PORT BAND, and the first 16 bits of an IPv4 and of an IPv6 header with this mark; ECN bits do not count.
# VLAN tags have been taken off when filters run, but the protocol is still that of the tag.
mark() {{
    tc filter add dev \"$1\" parent 1: protocol ip prio 1 u32 match u16 $3 0xf0fc at 0 flowid 1:$2
    tc filter add dev \"$1\" parent 1: protocol ipv6 prio 2 u32 match u16 $4 0xffc0 at 0 flowid 1:$2
    tc filter add dev \"$1\" parent 1: protocol 802.1Q prio 3 u32 match u16 $3 0xf0fc at 0 flowid 1:$2
    tc filter add dev \"$1\" parent 1: protocol 802.1Q prio 3 u32 match u16 $4 0xffc0 at 0 flowid 1:$2
}}

for port in {ports}; do
    bands \"$port\"
",
        numbers = (1..=bands).map(|band| band.to_string()).collect::<Vec<_>>().join(" "),
        ports = request.ports.join(" "),
    );
    for (at, &level) in classes.levels.iter().enumerate() {
        let (ipv4, ipv6) = first_bits(level);
        let _ = writeln!(text, "    mark \"$port\" {} {ipv4:#06x} {ipv6:#06x} # level {level}, CS{level}", at + 1);
    }
    let off: Vec<String> = classes.levels.iter().map(|level| format!("{level}:off")).collect();
    let _ = write!(
        text,
        "    # Where the card has priority flow control, it must not pause a level.
    if command -v dcb >/dev/null; then
        dcb pfc set dev \"$port\" prio-pfc {} 2>/dev/null || :
    fi
done
",
        off.join(" ")
    );
    Ok(Configuration { text, notes, has_comments: true })
}

/// Version, header length left out, and mark, as an IPv4 and an IPv6 header begin with them (RFC 791, RFC 8200).
fn first_bits(level: Level) -> (u16, u16) {
    let traffic_class = u16::from(level.traffic_class(0));
    (0x4000 | traffic_class, 0x6000 | traffic_class << 4)
}

fn notes(request: &Request<'_>, classes: &Classes) -> Vec<String> {
    let mut notes = common_notes(request.plan, classes);
    notes.push(format!(
        "Factory: a bridge does not look at DSCP, and a router takes the priority from bits that class selectors leave 0: {}.",
        classes.under(|_| 0)
    ));
    notes.push(
        "For a switch that forwards by its CPU. A chip that forwards by itself does not pass tc, unless its driver offloads \
         these queues (`tc qdisc show` then says so)."
            .to_owned(),
    );
    notes.push(
        "802.3x link pause stops all levels at once: `ethtool -A PORT rx off tx off`. Take back: `tc qdisc del dev PORT root`."
            .to_owned(),
    );
    notes
}
