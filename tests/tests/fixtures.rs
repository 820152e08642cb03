//! What the egress program does with one packet: a table of packet and context, verdict, mark and
//! counters, through BPF_PROG_TEST_RUN. Every reason has a row.

use std::collections::HashSet;

use anyhow::{Context, Result};
use qjump_ebpf::{
    Config, LevelLimit, Reason,
    layout::{FLAG_PRIORITY_TAG, GRANT_ONLY_SHIFT},
    limiter::Oversize::{Demote, Drop},
};
use qjump_tests::{
    frames::{ethernet, ipv4, ipv6, tagged},
    program::{DROP, NEXT, Shim, SkBuff},
};

struct Row {
    about: &'static str,
    frame: Vec<u8>,
    skb: SkBuff,
    action: i32,
    /// The TOS or traffic class afterwards.
    class: Option<u8>,
    priority: u32,
    counted: (usize, Reason, u64, u64),
}

/// Longer than the test takes.
const NEVER: u64 = 1 << 37;

fn config() -> Result<Config> {
    let mut config = Config::EMPTY;
    config.limits[7] = LevelLimit::per_packet(1, 0, 256, Demote)?;
    // Its second packet would have to wait for two minutes, and may not for more than a moment.
    config.limits[6] = LevelLimit::per_packet(NEVER, 0, 256, Drop)?.paced(1_000)?;
    config.limits[5] = LevelLimit::per_byte(1_000_000, 3_000, 2_976, Demote)?;
    config.limits[4] = LevelLimit::UNLIMITED;
    config.limits[2] = LevelLimit::UNLIMITED;
    config.limits[1] = LevelLimit::per_packet(NEVER, 0, 256, Drop)?.demoting();
    config.flags = 1 << (GRANT_ONLY_SHIFT + 2);
    Ok(config)
}

fn gso(priority: u32, wire_len: u32, gso_segs: u32, gso_size: u32) -> SkBuff {
    SkBuff { priority, wire_len, gso_segs, gso_size }
}

fn class(frame: &[u8]) -> Option<u8> {
    let mut at = 12;
    while frame[at..at + 2] == [0x81, 0x00] || frame[at..at + 2] == [0x88, 0xa8] {
        at += 4;
    }
    match frame[at..at + 2] {
        [0x08, 0x00] => Some(frame[at + 3]),
        [0x86, 0xdd] => Some(frame[at + 2] << 4 | frame[at + 3] >> 4),
        _ => None,
    }
}

fn rows() -> Vec<Row> {
    let v4 = |tos, payload| ethernet(0x0800, &ipv4(tos, payload));
    let v6 = |class, payload| ethernet(0x86dd, &ipv6(class, payload));
    let p = SkBuff::priority;
    let row = |about, frame, skb, action, class, priority, counted| Row {
        about,
        frame,
        skb,
        action,
        class,
        priority,
        counted,
    };
    vec![
        row("best effort", v4(0, 100), p(0), NEXT, Some(0), 0, (0, Reason::Passed, 1, 166)),
        row(
            "best effort loses a foreign codepoint",
            v4(0xb8, 100),
            p(0),
            NEXT,
            Some(0),
            0,
            (0, Reason::Passed, 1, 166),
        ),
        row("best effort keeps ECN", v4(0xb9, 100), p(0), NEXT, Some(1), 0, (0, Reason::Passed, 1, 166)),
        row("level 7 gets CS7", v4(0, 100), p(7), NEXT, Some(0xe0), 7, (7, Reason::Passed, 1, 166)),
        row("level 7, IPv6", v6(3, 100), p(7), NEXT, Some(0xe3), 7, (7, Reason::Passed, 1, 186)),
        row("a small frame counts as padded", v4(0, 1), p(7), NEXT, Some(0xe0), 7, (7, Reason::Passed, 1, 84)),
        row("level 4 is unlimited and marked", v4(0, 1400), p(4), NEXT, Some(0x80), 4, (4, Reason::Passed, 1, 1466)),
        row("a level that is not planned", v4(0, 100), p(3), NEXT, Some(0), 0, (3, Reason::NotConfigured, 1, 166)),
        row("a level that was not granted", v4(0x40, 100), p(2), NEXT, Some(0), 0, (2, Reason::NotGranted, 1, 166)),
        row("no level at all", v4(0, 100), p(0x1_0007), NEXT, Some(0), 0x1_0007, (0, Reason::UnknownPriority, 1, 166)),
        row("priority 8 is no level", v4(0xe0, 100), p(8), NEXT, Some(0), 8, (0, Reason::UnknownPriority, 1, 166)),
        row("the largest packet of level 7", v4(0, 214), p(7), NEXT, Some(0xe0), 7, (7, Reason::Passed, 1, 280)),
        row("one byte more is demoted", v4(0xe0, 215), p(7), NEXT, Some(0), 0, (7, Reason::OversizeDemoted, 1, 281)),
        row("one byte more is dropped", v4(0, 215), p(6), DROP, Some(0), 6, (6, Reason::OversizeDropped, 1, 281)),
        row("the budget of level 6", v4(0, 100), p(6), NEXT, Some(0xc0), 6, (6, Reason::Passed, 1, 166)),
        row("and no more of it", v4(0, 100), p(6), DROP, Some(0xc0), 6, (6, Reason::BeyondHorizon, 1, 166)),
        row("the budget of level 1", v4(0, 100), p(1), NEXT, Some(0x20), 1, (1, Reason::Passed, 1, 166)),
        row("and then it steps down", v4(0x20, 100), p(1), NEXT, Some(0), 0, (1, Reason::OverDemoted, 1, 166)),
        row(
            "a GSO packet never rides level 7",
            v4(0, 200),
            gso(7, 700, 3, 186),
            NEXT,
            Some(0),
            0,
            (7, Reason::OversizeDemoted, 3, 789),
        ),
        row(
            "a GSO packet without a count",
            v4(0, 200),
            gso(7, 700, 0, 200),
            NEXT,
            Some(0),
            0,
            (7, Reason::OversizeDemoted, 4, 813),
        ),
        row(
            "a burst for level 5",
            v4(0, 1400),
            gso(5, 2_900, 2, 1_400),
            NEXT,
            Some(0xa0),
            5,
            (5, Reason::Passed, 2, 2_965),
        ),
        row("level 5 has used its burst", v4(0, 1400), p(5), DROP, Some(0xa0), 5, (5, Reason::OverLimit, 1, 1_466)),
        row(
            "larger than the burst of level 5",
            v4(0, 1400),
            gso(5, 2_970, 3, 1_000),
            NEXT,
            Some(0),
            0,
            (5, Reason::OversizeDemoted, 3, 3_059),
        ),
        row("VLAN", tagged(&v4(0, 100), 0x8100, 0x0064), p(7), NEXT, Some(0xe0), 7, (7, Reason::Passed, 1, 170)),
        row(
            "QinQ",
            tagged(&tagged(&v6(0, 100), 0x8100, 5), 0x88a8, 6),
            p(7),
            NEXT,
            Some(0xe0),
            7,
            (7, Reason::Passed, 1, 194),
        ),
        row("ARP", ethernet(0x0806, &[0; 46]), p(7), NEXT, None, 0, (0, Reason::NonIp, 1, 84)),
        row(
            "three tags",
            tagged(&tagged(&tagged(&v4(0xb8, 100), 0x8100, 1), 0x8100, 2), 0x8100, 3),
            p(7),
            NEXT,
            Some(0xb8),
            0,
            (0, Reason::NonIp, 1, 178),
        ),
        row(
            "IPv4 that says it is version 5",
            {
                let mut f = v4(0xb8, 100);
                f[14] = 0x55;
                f
            },
            p(7),
            NEXT,
            Some(0xb8),
            0,
            (0, Reason::Malformed, 1, 166),
        ),
        row(
            "IPv4 with a header of 16 bytes",
            {
                let mut f = v4(0xb8, 100);
                f[14] = 0x44;
                f
            },
            p(7),
            NEXT,
            Some(0xb8),
            0,
            (0, Reason::Malformed, 1, 166),
        ),
        row(
            "IPv6 that says it is version 4",
            {
                let mut f = v6(0xb8, 100);
                f[14] = 0x4b;
                f
            },
            p(7),
            NEXT,
            Some(0xb8),
            0,
            (0, Reason::Malformed, 1, 186),
        ),
        row(
            // Behind a tag, because the kernel takes no test packet that is cut off in an IP header it can see.
            "IPv6 cut off in its header",
            tagged(&v6(0xb8, 0)[..50], 0x8100, 1),
            p(7),
            NEXT,
            Some(0xb8),
            0,
            (0, Reason::Malformed, 1, 84),
        ),
        row(
            "IPv4 with options",
            {
                let mut f = v4(0, 100);
                f[14] = 0x46;
                f
            },
            p(7),
            NEXT,
            Some(0xe0),
            7,
            (7, Reason::Passed, 1, 166),
        ),
    ]
}

#[test]
fn every_row_of_the_table() -> Result<()> {
    let mut shim = Shim::load(&config()?)?;
    let mut seen = HashSet::new();
    for row in rows() {
        let before = shim.counters()?;
        let outcome = shim.run(&row.frame, row.skb).with_context(|| row.about)?;
        assert_eq!(outcome.action, row.action, "{}: verdict", row.about);
        assert_eq!(outcome.packet.len(), row.frame.len(), "{}: length", row.about);
        assert_eq!(class(&outcome.packet), row.class, "{}: mark", row.about);
        assert_eq!(outcome.context.priority, row.priority, "{}: skb->priority", row.about);
        let after = shim.counters()?;
        let mut counted = Vec::new();
        for level in 0..8 {
            for reason in Reason::ALL {
                let (old, new) = (before[level].reasons[reason.index()], after[level].reasons[reason.index()]);
                if new != old {
                    counted.push((level, reason, new.packets - old.packets, new.bytes - old.bytes));
                }
            }
        }
        assert_eq!(counted, [row.counted], "{}: counters", row.about);
        seen.insert(row.counted.1);
    }
    // Two need what no single packet can provoke: another CPU that is faster sixteen times in a row (see
    // a_packet_that_never_wins_the_race in ebpf/tests/limiter_curve.rs), or a kernel out of memory.
    for reason in Reason::ALL {
        let unreachable = matches!(reason, Reason::Contended | Reason::MarkFailed);
        assert_eq!(seen.contains(&reason), !unreachable, "{}", reason.name());
    }
    Ok(())
}

#[test]
fn only_limited_levels_read_the_clock() -> Result<()> {
    let mut shim = Shim::load(&config()?)?;
    for priority in [0, 3, 4, 7] {
        shim.run(&ethernet(0x0800, &ipv4(0, 50)), SkBuff::priority(priority))?;
    }
    let timed: Vec<bool> = shim.counters()?.iter().map(|level| level.last_ns != 0).collect();
    assert_eq!(timed, [false, false, false, false, false, false, false, true]);
    Ok(())
}

#[test]
fn the_tag_in_the_frame_gets_the_level_when_asked() -> Result<()> {
    let frame = tagged(&ethernet(0x0800, &ipv4(0, 50)), 0x8100, 0x6123);
    for (flags, pcp) in [(0, 3), (FLAG_PRIORITY_TAG, 7)] {
        let mut shim = Shim::load(&Config { flags, ..config()? })?;
        let out = shim.run(&frame, SkBuff::priority(7))?.packet;
        assert_eq!(out[14] >> 5, pcp);
        assert_eq!(out[14] & 0x1f, 0x01);
        assert_eq!(out[15], 0x23);
    }
    Ok(())
}

#[test]
fn a_packet_of_the_largest_size_still_fits_when_it_gets_a_tag() -> Result<()> {
    let mut shim = Shim::load(&Config { flags: FLAG_PRIORITY_TAG, ..config()? })?;
    for (payload, counted) in [(214, (7, Reason::Passed, 1, 284)), (215, (7, Reason::OversizeDemoted, 1, 285))] {
        shim.run(&ethernet(0x0800, &ipv4(0, payload)), SkBuff::priority(7))?;
        assert!(shim.counted()?.contains(&counted), "{:?}", shim.counted()?);
    }
    Ok(())
}
