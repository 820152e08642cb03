//! Frames, and a second opinion on what the egress program must do with them: written from the rules in
//! the README, sharing no code with the program but the names of the reasons.

use qjump_ebpf::Reason;

use crate::program::SkBuff;

/// An Ethernet frame of this type.
pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 2, 0x02, 0, 0, 0, 0, 1];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The same frame behind a VLAN tag of this type.
pub fn tagged(frame: &[u8], tag_type: u16, tci: u16) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    out.extend(tag_type.to_be_bytes());
    out.extend(tci.to_be_bytes());
    out.extend(&frame[12..]);
    out
}

/// An IPv4 packet of UDP with this many bytes of payload, its header checksum right.
pub fn ipv4(tos: u8, payload: usize) -> Vec<u8> {
    let length = 28 + payload;
    let mut packet =
        vec![0x45, tos, (length >> 8) as u8, length as u8, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let checksum = ipv4_checksum(&packet);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend([0x1b, 0x58, 0x1b, 0x58, ((8 + payload) >> 8) as u8, (8 + payload) as u8, 0, 0]);
    packet.resize(length, 0xaa);
    packet
}

/// An IPv6 packet of UDP.
pub fn ipv6(class: u8, payload: usize) -> Vec<u8> {
    let length = 8 + payload;
    let mut packet = vec![0x60 | class >> 4, class << 4 | 0x5, 0x67, 0x89, (length >> 8) as u8, length as u8, 17, 64];
    packet.extend([0x20; 32]);
    packet.extend([0x1b, 0x58, 0x1b, 0x58, (length >> 8) as u8, length as u8, 0, 0]);
    packet.resize(40 + length, 0xbb);
    packet
}

/// The checksum that an IPv4 header should have, computed from all of it.
pub fn ipv4_checksum(header: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for at in (0..20).step_by(2).filter(|&at| at != 10) {
        sum += u32::from(u16::from_be_bytes([header[at], header[at + 1]]));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What a level does with a packet that it may carry, in the reference's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant says what its fields are")]
pub enum Rule {
    /// The plan has no such level.
    Absent,
    /// Everything passes.
    Unlimited,
    /// Every packet up to `largest` L2 bytes passes, if it is a single one.
    Packets { largest: usize, drop_larger: bool },
    /// Everything of at most this many bytes on the wire passes.
    Bytes { largest: usize, burst: usize, drop_larger: bool },
    /// The level has used up its budget for longer than the test takes.
    Exhausted { largest: usize },
}

/// The verdict that is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Whether the packet passes.
    pub passes: bool,
    /// The frame afterwards. Not for frames to which a tag was added outside their bytes.
    pub frame: Vec<u8>,
    /// `skb->priority` afterwards.
    pub priority: u32,
    /// The level under which it is counted.
    pub level: usize,
    /// And the reason.
    pub reason: Reason,
    /// Frames counted.
    pub packets: u64,
    /// Bytes counted.
    pub bytes: u64,
}

enum Kind {
    V4(usize),
    V6(usize),
    Other,
    Broken,
}

fn kind(frame: &[u8]) -> Kind {
    let mut at = 12;
    for _ in 0..2 {
        match frame.get(at..at + 2) {
            Some([0x81, 0x00] | [0x88, 0xa8]) => at += 4,
            _ => break,
        }
    }
    let ip = at + 2;
    match frame.get(at..ip) {
        None => Kind::Broken,
        Some([0x08, 0x00]) => match frame.get(ip..ip + 20) {
            Some(header) if header[0] / 16 == 4 && header[0] % 16 >= 5 => Kind::V4(ip),
            _ => Kind::Broken,
        },
        Some([0x86, 0xdd]) => match frame.get(ip..ip + 40) {
            Some(header) if header[0] / 16 == 6 => Kind::V6(ip),
            _ => Kind::Broken,
        },
        Some(_) => Kind::Other,
    }
}

/// What must become of `frame`, with these rules for levels 0 to 7.
pub fn expected(frame: &[u8], skb: SkBuff, rules: &[Rule; 8], pcp: bool) -> Expected {
    let l2 = if skb.wire_len == 0 { frame.len() } else { skb.wire_len as usize };
    let segments = match (skb.gso_segs as usize, skb.gso_size as usize) {
        (count, _) if count > 1 => count,
        (_, 0) => 1,
        (_, size) => l2 / size + 1,
    };
    let kind = kind(frame);
    let has_tag = matches!(frame.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8]));
    let adds_tag = pcp && !has_tag && (1..8).contains(&skb.priority) && matches!(kind, Kind::V4(_) | Kind::V6(_));
    let on_wire = l2 + if adds_tag { 4 * segments } else { 0 };
    let padded = if segments > 1 { on_wire + 17 } else { on_wire };
    let wire = padded.max(60 * segments) + 24 * segments;

    let asked = skb.priority as usize;
    let (level, reason, marked) = match kind {
        Kind::Other => (0, Reason::NonIp, 0),
        Kind::Broken => (0, Reason::Malformed, 0),
        _ if asked > 7 => (0, Reason::UnknownPriority, 0),
        _ if asked == 0 => (0, Reason::Passed, 0),
        _ => {
            let too_large = |drop| {
                if drop { (asked, Reason::OversizeDropped, asked) } else { (asked, Reason::OversizeDemoted, 0) }
            };
            match rules[asked] {
                Rule::Absent => (asked, Reason::NotConfigured, 0),
                Rule::Unlimited => (asked, Reason::Passed, asked),
                Rule::Packets { largest, drop_larger } if segments > 1 || l2 > largest => too_large(drop_larger),
                Rule::Packets { .. } => (asked, Reason::Passed, asked),
                Rule::Bytes { largest, burst, drop_larger } if wire > burst || (segments == 1 && l2 > largest) => {
                    too_large(drop_larger)
                }
                Rule::Bytes { .. } => (asked, Reason::Passed, asked),
                Rule::Exhausted { largest } if segments > 1 || l2 > largest => too_large(false),
                Rule::Exhausted { .. } => (asked, Reason::OverLimit, asked),
            }
        }
    };
    let mut out = frame.to_vec();
    if reason != Reason::OversizeDropped {
        match kind {
            Kind::V4(at) => {
                let before = out[at + 1];
                out[at + 1] = (marked as u8) * 32 + before % 4;
                if before != out[at + 1] {
                    // A checksum that was wrong stays wrong by as much.
                    let error = ones_subtract(u16::from_be_bytes([out[at + 10], out[at + 11]]), {
                        let mut header = out[at..at + 20].to_vec();
                        header[1] = before;
                        ipv4_checksum(&header)
                    });
                    let checksum = ones_add(ipv4_checksum(&out[at..at + 20]), error);
                    out[at + 10..at + 12].copy_from_slice(&checksum.to_be_bytes());
                }
            }
            Kind::V6(at) => {
                let class = (out[at] % 16) * 16 + out[at + 1] / 16;
                let class = (marked as u8) * 32 + class % 4;
                out[at] = (out[at] / 16) * 16 + class / 16;
                out[at + 1] = (class % 16) * 16 + out[at + 1] % 16;
            }
            Kind::Other | Kind::Broken => {}
        }
        if pcp && has_tag && out.len() >= 16 {
            out[14] = (marked as u8) * 32 + out[14] % 32;
        }
    }
    let demoted = matches!(reason, Reason::NotConfigured | Reason::OversizeDemoted | Reason::NonIp | Reason::Malformed);
    Expected {
        passes: !matches!(reason, Reason::OverLimit | Reason::OversizeDropped),
        frame: out,
        priority: if demoted && skb.priority < 8 { 0 } else { skb.priority },
        level,
        reason,
        packets: segments as u64,
        bytes: wire as u64,
    }
}

fn ones_add(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    (sum as u16).wrapping_add((sum >> 16) as u16)
}

fn ones_subtract(a: u16, b: u16) -> u16 {
    ones_add(a, !b)
}

/// A small generator of pseudo-random numbers (xorshift64*): the same ones for the same seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_u64() % limit
    }
}
