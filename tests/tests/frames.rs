//! A million random and mutated frames through the egress program, against a second opinion.

use std::collections::HashMap;

use anyhow::Result;
use qjump_ebpf::{
    Config, LevelLimit, Reason,
    layout::FLAG_PRIORITY_TAG,
    limiter::Oversize::{Demote, Drop},
};
use qjump_tests::{
    frames::{Random, Rule, ethernet, expected, ipv4, ipv6, tagged},
    kernel::rounds,
    program::{DROP, NEXT, Shim, SkBuff},
};

const FRAMES: u32 = 1_000_000;

fn rules() -> [Rule; 8] {
    [
        Rule::Unlimited,
        Rule::Absent,
        Rule::Exhausted { largest: 300 },
        Rule::Bytes { largest: 20_000, burst: 20_024, drop_larger: true },
        Rule::Bytes { largest: 2_976, burst: 3_000, drop_larger: false },
        Rule::Packets { largest: 128, drop_larger: true },
        Rule::Unlimited,
        Rule::Packets { largest: 256, drop_larger: false },
    ]
}

fn config(flags: u64) -> Result<Config> {
    let mut config = Config { flags, ..Config::EMPTY };
    config.limits[2] = LevelLimit::per_packet(1 << 37, 0, 300, Demote)?;
    // Rates so high that the next packet always finds a full burst.
    config.limits[3] = LevelLimit::per_byte(8_000_000_000_000_000, 20_024, 20_000, Drop)?;
    config.limits[4] = LevelLimit::per_byte(8_000_000_000_000_000, 3_000, 2_976, Demote)?;
    config.limits[5] = LevelLimit::per_packet(1, 0, 128, Drop)?;
    config.limits[6] = LevelLimit::UNLIMITED;
    config.limits[7] = LevelLimit::per_packet(1, 0, 256, Demote)?;
    Ok(config)
}

fn frame(random: &mut Random) -> Vec<u8> {
    let class = random.next_u64() as u8;
    let longest = if random.below(4) == 0 { 1_400 } else { 120 };
    let payload = random.below(longest) as usize;
    let mut frame = match random.below(8) {
        0..3 => ethernet(0x0800, &ipv4(class, payload)),
        3..6 => ethernet(0x86dd, &ipv6(class, payload)),
        6 => ethernet(random.next_u64() as u16, &ipv4(class, payload)),
        _ => (0..14 + random.below(100)).map(|_| random.next_u64() as u8).collect(),
    };
    for _ in 0..random.below(12).saturating_sub(8) {
        let tag = if random.below(2) == 0 { 0x8100 } else { 0x88a8 };
        frame = tagged(&frame, tag, random.next_u64() as u16);
    }
    for _ in 0..random.below(8).saturating_sub(4) {
        let at = random.below(frame.len().min(60) as u64) as usize;
        frame[at] = random.next_u64() as u8;
    }
    if random.below(8) == 0 {
        // The kernel takes no frame without an Ethernet header.
        let length = 14 + random.below(frame.len() as u64 - 13) as usize;
        frame.truncate(length.min(frame.len()));
    }
    frame
}

fn skb(random: &mut Random, frame: &[u8]) -> SkBuff {
    let priority = if random.below(16) == 0 { random.next_u64() as u32 } else { random.below(9) as u32 };
    let mut skb = SkBuff::priority(priority);
    if random.below(8) == 0 {
        skb.wire_len = (frame.len() as u64 + random.below(60_000)) as u32;
        skb.gso_segs = random.below(45) as u32;
        skb.gso_size = random.below(1_449) as u32;
    }
    skb
}

#[test]
fn a_million_frames_get_the_verdict_of_the_reference() -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (frames, mut refused) = (rounds(FRAMES), 0);
    for flags in [0, FLAG_PRIORITY_TAG] {
        let pcp = flags == FLAG_PRIORITY_TAG;
        let mut shim = Shim::load(&config(flags)?)?;
        // Level 2 has one packet in two minutes; it goes now.
        let first = ethernet(0x0800, &ipv4(0, 10));
        assert_eq!(shim.run(&first, SkBuff::priority(2))?.action, NEXT);
        let mut counted: HashMap<(usize, Reason), (u64, u64)> = HashMap::from([((2, Reason::Passed), (1, 84))]);

        for number in 0..frames / 2 {
            let frame = frame(&mut random);
            let skb = skb(&mut random, &frame);
            let outcome = match shim.run(&frame, skb) {
                Ok(outcome) => outcome,
                // Newer kernels refuse to make a packet of a frame that is cut off in its IP header.
                Err(_) => {
                    refused += 1;
                    continue;
                }
            };
            let want = expected(&frame, skb, &rules(), pcp);
            let context =
                || format!("frame {number}, pcp {pcp}, {skb:?}, {want:?}\n{frame:02x?}\n{:02x?}", outcome.packet);
            assert_eq!(outcome.action, if want.passes { NEXT } else { DROP }, "verdict of {}", context());
            assert_eq!(outcome.packet, want.frame, "bytes of {}", context());
            assert_eq!(outcome.context.priority, want.priority, "priority of {}", context());
            let sum = counted.entry((want.level, want.reason)).or_default();
            *sum = (sum.0 + want.packets, sum.1 + want.bytes);
        }

        for (level, reason, packets, bytes) in shim.counted()? {
            assert_eq!(counted.remove(&(level, reason)), Some((packets, bytes)), "level {level} {}", reason.name());
        }
        assert!(counted.is_empty(), "the program did not count {counted:?}");
    }
    assert!(refused < frames / 20, "the kernel refused {refused} frames; the test has lost its subject");
    println!("{frames} frames, {refused} of them refused by the kernel");
    Ok(())
}
