//! Rules of nftables that change a packet's priority, which is its level, or its codepoint: asked from the kernel, no
//! `nft` needed. Rules that came by iptables-nft are there, too, as extensions by name.

use std::io;

use netlink_packet_core::{DecodeError, NLM_F_DUMP, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::{netlink::ask_of, qdisc::encode::attribute};

/// `NFNL_SUBSYS_NFTABLES`, the upper half of a message type.
const NFTABLES: u16 = 10 << 8;
const GET_RULE: u16 = NFTABLES | 7;
/// `struct nfgenmsg`: family (all), version, resource.
const HEADER: [u8; 4] = [0; 4];

const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_KEY: u16 = 2;
const META_SOURCE: u16 = 3;
/// `NFT_META_PRIORITY`.
const PRIORITY: u32 = 2;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_SOURCE: u16 = 5;
/// `NFT_PAYLOAD_NETWORK_HEADER`.
const NETWORK_HEADER: u32 = 1;
const TARGET_NAME: u16 = 1;

/// A rule that changes what qjump goes by, or what it writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Table and chain.
    pub place: String,
    /// Whether it changes the priority; else the codepoint.
    pub priority: bool,
}

struct Message(Vec<u8>);

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        GET_RULE
    }

    fn buffer_len(&self) -> usize {
        self.0.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.0);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(_: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(payload.get(HEADER.len()..).unwrap_or_default().to_vec()))
    }
}

/// The rules of this network namespace that change priorities or codepoints.
///
/// # Errors
/// Without CAP_NET_ADMIN. A kernel without nftables has none.
pub fn rewrites() -> io::Result<Vec<Rewrite>> {
    match ask_of(NETLINK_NETFILTER, Message(HEADER.to_vec()), NLM_F_DUMP) {
        Ok(rules) => Ok(rules.iter().flat_map(|rule| rewrites_of(&rule.0)).collect()),
        // No such subsystem, or no such protocol.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPROTONOSUPPORT)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// What a rule, given as its attributes, changes.
fn rewrites_of(rule: &[u8]) -> Vec<Rewrite> {
    let name = |kind| text(attribute(rule, kind).unwrap_or_default());
    let place = format!("{} {}", name(RULE_TABLE), name(RULE_CHAIN));
    let expressions = attribute(rule, RULE_EXPRESSIONS).unwrap_or_default();
    let mut changes: Vec<bool> = each(expressions).filter_map(changes_priority).collect();
    changes.dedup();
    changes.into_iter().map(|priority| Rewrite { place: place.clone(), priority }).collect()
}

/// Whether an expression changes the priority (`true`), the codepoint (`false`), or neither.
fn changes_priority(expression: &[u8]) -> Option<bool> {
    let data = attribute(expression, EXPRESSION_DATA)?;
    let number = |kind| Some(u32::from_be_bytes(attribute(data, kind)?.get(..4)?.try_into().ok()?));
    match text(attribute(expression, EXPRESSION_NAME)?).as_str() {
        "meta" => (number(META_KEY)? == PRIORITY && attribute(data, META_SOURCE).is_some()).then_some(true),
        // IPv4 has its codepoint in the second byte, IPv6 in the first two; `nft` writes two at once.
        "payload" => {
            let writes = attribute(data, PAYLOAD_SOURCE).is_some() && number(PAYLOAD_BASE)? == NETWORK_HEADER;
            (writes && number(PAYLOAD_OFFSET)? <= 1).then_some(false)
        }
        "target" => match text(attribute(data, TARGET_NAME)?).as_str() {
            "CLASSIFY" => Some(true),
            "DSCP" | "TOS" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// The values of the attributes in a list.
fn each(mut list: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(list.get(..2)?.try_into().ok()?));
        let value = list.get(4..length)?;
        list = list.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(value)
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(value.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn number(kind: u16, value: u32) -> Vec<u8> {
        nla(kind, &value.to_be_bytes())
    }

    fn rule(expressions: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let list: Vec<u8> = expressions
            .iter()
            .flat_map(|(name, data)| {
                let text = [name.as_bytes(), b"\0"].concat();
                nla(1, &[nla(EXPRESSION_NAME, &text), nla(EXPRESSION_DATA, data)].concat())
            })
            .collect();
        [nla(RULE_TABLE, b"mine\0"), nla(RULE_CHAIN, b"out\0"), nla(RULE_EXPRESSIONS, &list)].concat()
    }

    fn found(expressions: &[(&str, Vec<u8>)]) -> Vec<bool> {
        let rewrites = rewrites_of(&rule(expressions));
        assert!(rewrites.iter().all(|rewrite| rewrite.place == "mine out"));
        rewrites.into_iter().map(|rewrite| rewrite.priority).collect()
    }

    #[test]
    fn tells_what_a_rule_changes() {
        let read = [number(META_KEY, PRIORITY), number(1, 1)].concat();
        let write = [number(META_KEY, PRIORITY), number(META_SOURCE, 1)].concat();
        let mark = [number(META_KEY, 3), number(META_SOURCE, 1)].concat();
        assert_eq!(found(&[("meta", read.clone()), ("cmp", Vec::new())]), [false; 0]);
        assert_eq!(found(&[("meta", mark)]), [false; 0]);
        assert_eq!(found(&[("meta", read), ("immediate", Vec::new()), ("meta", write)]), [true]);
        let payload = |offset, kind| {
            [number(PAYLOAD_BASE, NETWORK_HEADER), number(PAYLOAD_OFFSET, offset), number(kind, 1)].concat()
        };
        assert_eq!(found(&[("payload", payload(0, PAYLOAD_SOURCE))]), [false]);
        // Reading it, or writing the time to live.
        assert_eq!(found(&[("payload", payload(0, 1)), ("payload", payload(8, PAYLOAD_SOURCE))]), [false; 0]);
        for (name, changes) in [("DSCP", vec![false]), ("CLASSIFY", vec![true]), ("MASQUERADE", vec![])] {
            assert_eq!(found(&[("target", nla(TARGET_NAME, &[name.as_bytes(), b"\0"].concat()))]), changes);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            rewrites_of(&bytes);
        }
    }
}
