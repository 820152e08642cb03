//! Reading and marking the packet at hand. All pointer arithmetic on packets is in [`Packet::bytes`].

use core::marker::PhantomData;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM},
    helpers::{bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push},
    programs::TcContext,
};
use qjump_ebpf::{
    Level,
    frame::{
        ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, IPV4, IPV6, VLAN_TAG, checksum_after,
        ipv6_marked,
    },
};

use crate::grants;

/// A packet on its way out.
pub struct Packet<'a> {
    skb: *mut __sk_buff,
    context: PhantomData<&'a TcContext>,
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ipv4,
    Ipv6,
    NonIp,
    Malformed,
}

/// What a frame carries, as far as marking needs to know. A struct whose fields are always set, rather
/// than an enum with fields: the compiler would move fields that are not set through registers, and the
/// verifier refuses to read those.
#[derive(Clone, Copy)]
pub struct Header {
    pub kind: Kind,
    /// Offset of the IP header.
    at: usize,
    /// Its first bytes: of an IPv4 header, those to the end of the checksum.
    start: [u8; START],
}

/// Bytes of an IP header that marking reads or writes.
const START: usize = 12;

impl Header {
    const fn without_ip(kind: Kind) -> Self {
        Self { kind, at: 0, start: [0; START] }
    }

    /// Whether it is IP straight behind the Ethernet header.
    #[inline(always)]
    pub const fn is_untagged_ip(&self) -> bool {
        self.at == ETHERNET
    }
}

impl<'a> Packet<'a> {
    #[inline(always)]
    pub fn new(context: &'a TcContext) -> Self {
        Self { skb: context.skb.skb, context: PhantomData }
    }

    /// The context itself, for helpers that look up its socket.
    #[inline(always)]
    pub const fn skb(&self) -> *mut __sk_buff {
        self.skb
    }

    /// Whether a socket of this host sent it.
    #[inline(always)]
    pub fn has_socket(&self) -> bool {
        !grants::socket_of(self.skb).is_null()
    }

    #[inline(always)]
    pub fn priority(&self) -> u32 {
        // SAFETY: the kernel hands the program a valid context for as long as it runs.
        unsafe { (*self.skb).priority }
    }

    /// Sets what the queue goes by: a level, or a class.
    #[inline(always)]
    pub fn set_priority(&self, priority: u32) {
        // SAFETY: as in `priority`; the field is writable for this program type.
        unsafe { (*self.skb).priority = priority }
    }

    /// Whether the sender has asked for a time of departure.
    #[inline(always)]
    pub fn has_departure(&self) -> bool {
        // SAFETY: as in `priority`.
        unsafe { (*self.skb).tstamp != 0 }
    }

    /// Sets when fq lets the packet go: `CLOCK_MONOTONIC`, ns.
    #[inline(always)]
    pub fn set_departure(&self, at_ns: u64) {
        // SAFETY: as in `set_priority`.
        unsafe { (*self.skb).tstamp = at_ns }
    }

    /// L2 bytes, the headers of every segment included; the number of segments; and whether a tag in the
    /// packet's metadata is among the bytes.
    #[inline(always)]
    pub fn size(&self) -> (u32, u32, bool) {
        // SAFETY: as in `priority`.
        let (wire_len, gso_segs, gso_size, tagged) =
            unsafe { ((*self.skb).wire_len, (*self.skb).gso_segs, (*self.skb).gso_size, (*self.skb).vlan_present) };
        // The kernel leaves gso_segs at 0 for single packets, and for GSO packets from guests.
        let segments = if gso_segs > 1 {
            gso_segs
        } else if gso_size > 0 {
            wire_len / gso_size + 1
        } else {
            1
        };
        // A tag in the packet's metadata is not in its length, but it is on the wire.
        let tag = if tagged != 0 { VLAN_TAG as u32 } else { 0 };
        (wire_len + tag * segments, segments, tagged != 0)
    }

    /// `N` bytes of the packet's linear part from `at`.
    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        // SAFETY: as in `priority`; the verifier knows the two as the bounds of the packet.
        let (start, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        if start + at + N > end {
            return None;
        }
        // SAFETY: the N bytes lie within the packet, as just checked; byte arrays need no alignment.
        Some(unsafe { *((start + at) as *const [u8; N]) })
    }

    #[inline(always)]
    fn ethertype(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    /// What the frame carries.
    #[inline(always)]
    pub fn header(&self) -> Header {
        match self.parse() {
            Some(header) => header,
            // The headers of frames from packet sockets and tunnels may lie outside the linear part.
            None => {
                // SAFETY: as in `priority`.
                let needed = (ETHERNET + 2 * VLAN_TAG + IPV6) as u32;
                let len = unsafe { (*self.skb).len };
                // SAFETY: the helper copies into the linear part; all pointers are read anew afterwards.
                unsafe { bpf_skb_pull_data(self.skb, if len < needed { len } else { needed }) };
                self.parse().unwrap_or(Header::without_ip(Kind::Malformed))
            }
        }
    }

    /// `None` if a header does not lie in the linear part.
    #[inline(always)]
    fn parse(&self) -> Option<Header> {
        let is_tag = |ethertype| ethertype == ETHERTYPE_VLAN || ethertype == ETHERTYPE_QINQ;
        let first = self.ethertype(ETHERNET - 2)?;
        if !is_tag(first) {
            return self.network_header(first, ETHERNET);
        }
        let second = self.ethertype(ETHERNET + VLAN_TAG - 2)?;
        if !is_tag(second) {
            return self.network_header(second, ETHERNET + VLAN_TAG);
        }
        let third = self.ethertype(ETHERNET + 2 * VLAN_TAG - 2)?;
        self.network_header(third, ETHERNET + 2 * VLAN_TAG)
    }

    #[inline(always)]
    fn network_header(&self, ethertype: u16, at: usize) -> Option<Header> {
        match ethertype {
            ETHERTYPE_IPV4 => {
                let header = self.bytes::<IPV4>(at)?;
                if header[0] >> 4 != 4 || header[0] & 0xf < 5 {
                    return Some(Header::without_ip(Kind::Malformed));
                }
                Some(Header { kind: Kind::Ipv4, at, start: first(header) })
            }
            ETHERTYPE_IPV6 => {
                let header = self.bytes::<IPV6>(at)?;
                if header[0] >> 4 != 6 {
                    return Some(Header::without_ip(Kind::Malformed));
                }
                Some(Header { kind: Kind::Ipv6, at, start: first(header) })
            }
            _ => Some(Header::without_ip(Kind::NonIp)),
        }
    }

    /// Writes the codepoint of `level`, and its PCP when asked to. Touches nothing that is already right:
    /// writing makes the kernel copy the headers of packets that TCP keeps for a retransmission.
    #[inline(always)]
    pub fn mark(&self, header: &Header, level: Level, tags_priority: bool) -> Result<(), ()> {
        let at = header.at;
        match header.kind {
            Kind::Ipv4 => {
                let mut start = header.start;
                let class = start[1];
                let marked = level.traffic_class(class);
                if marked != class {
                    let old = u16::from_be_bytes([start[0], class]);
                    let new = u16::from_be_bytes([start[0], marked]);
                    let checksum = checksum_after(u16::from_be_bytes([start[10], start[11]]), old, new);
                    start[1] = marked;
                    [start[10], start[11]] = checksum.to_be_bytes();
                    // One store for both. The header still adds up to what it did, so a checksum over the
                    // whole packet, where the kernel has one, stays right.
                    self.store(at, &start, 0)?;
                }
            }
            Kind::Ipv6 => {
                let first_two = [header.start[0], header.start[1]];
                let marked = ipv6_marked(first_two, level);
                if marked != first_two {
                    self.store(at, &marked, u64::from(BPF_F_RECOMPUTE_CSUM))?;
                }
            }
            Kind::NonIp | Kind::Malformed => {}
        }
        if tags_priority { self.tag(level) } else { Ok(()) }
    }

    /// Writes the PCP of `level` into the outermost tag; gives an untagged frame of a level above 0 a
    /// tag with VLAN 0 (a priority tag, IEEE 802.1Q clause 6.9).
    #[inline(always)]
    fn tag(&self, level: Level) -> Result<(), ()> {
        // SAFETY: as in `priority`.
        let (present, tci, proto) =
            unsafe { ((*self.skb).vlan_present, (*self.skb).vlan_tci as u16, (*self.skb).vlan_proto) };
        let pcp = u16::from(level.number()) << 13;
        if present != 0 {
            let marked = (tci & 0x1fff) | pcp;
            if marked == tci {
                return Ok(());
            }
            // SAFETY: the helpers change the packet's metadata alone, as the tag is not in its bytes.
            return ok(unsafe { bpf_skb_vlan_pop(self.skb) })
                .and_then(|()| ok(unsafe { bpf_skb_vlan_push(self.skb, proto as u16, marked) }));
        }
        match self.ethertype(ETHERNET - 2) {
            Some(ETHERTYPE_VLAN | ETHERTYPE_QINQ) => {
                // A frame that ends within its tag is malformed, and passes as it is.
                let Some(tci) = self.bytes::<2>(ETHERNET) else {
                    return Ok(());
                };
                let marked = (tci[0] & 0x1f) | (level.number() << 5);
                if marked == tci[0] { Ok(()) } else { self.store(ETHERNET, &[marked], u64::from(BPF_F_RECOMPUTE_CSUM)) }
            }
            _ if level == Level::BEST_EFFORT => Ok(()),
            // SAFETY: the helper puts the tag into the packet's metadata; the device or the kernel writes it.
            _ => ok(unsafe { bpf_skb_vlan_push(self.skb, ETHERTYPE_VLAN.to_be(), pcp) }),
        }
    }

    /// Stores through the helper rather than in place: in-place writes anywhere in a program make the
    /// kernel copy every cloned packet's headers before it runs (`bpf_unclone_prologue`,
    /// net/core/filter.c), and TCP sends clones.
    #[inline(always)]
    fn store<const N: usize>(&self, at: usize, bytes: &[u8; N], flags: u64) -> Result<(), ()> {
        // SAFETY: `bytes` is N bytes long; the helper checks the offset against the packet.
        ok(unsafe { bpf_skb_store_bytes(self.skb, at as u32, bytes.as_ptr().cast(), N as u32, flags) })
    }
}

#[inline(always)]
fn first<const N: usize>(header: [u8; N]) -> [u8; START] {
    let mut start = [0; START];
    start.copy_from_slice(&header[..START]);
    start
}

#[inline(always)]
fn ok(code: impl Into<i64>) -> Result<(), ()> {
    if code.into() == 0 { Ok(()) } else { Err(()) }
}
