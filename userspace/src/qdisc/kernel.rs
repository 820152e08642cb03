//! The requests: rtnetlink's traffic control messages, with their options as raw bytes.

use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE,
    NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    tc::TcHeader,
};

use super::{
    encode::{Options, attribute, attributes},
    tree::{ABOVE_ROOT, Class, Qdisc},
};
use crate::netlink::ask;

const KIND: u16 = libc::TCA_KIND;
const OPTIONS: u16 = libc::TCA_OPTIONS;
const STAB: u16 = libc::TCA_STAB;

/// `TC_H_INGRESS`, `TC_H_CLSACT`: the parent of those two, which are no queues.
const INGRESS: u32 = 0xffff_fff1;

/// Creates, and fails if there is one already.
pub const ADD: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// Creates, or puts this in the place of what is there, or changes it if only its options are others.
pub const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// A qdisc, class or filter message. netlink-packet-route would read the options of some kinds and not of others;
/// what is to be put back as it was must not go through that.
struct Message {
    kind: u16,
    header: TcHeader,
    attributes: Vec<u8>,
}

impl Message {
    fn new(kind: u16, ifindex: u32, parent: u32, handle: u32) -> Self {
        let header = TcHeader {
            index: ifindex.cast_signed(),
            parent: parent.into(),
            handle: handle.into(),
            ..TcHeader::default()
        };
        Self { kind, header, attributes: Vec::new() }
    }

    fn with(mut self, kind: &str, options: &[u8]) -> Self {
        let mut all = vec![DefaultNla::new(KIND, [kind.as_bytes(), b"\0"].concat())];
        if !options.is_empty() {
            all.push(DefaultNla::new(OPTIONS, options.to_vec()));
        }
        self.attributes = attributes(&all);
        self
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.header.buffer_len() + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (header, rest) = buffer.split_at_mut(self.header.buffer_len());
        self.header.emit(header);
        rest.copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let tc = TcHeader::parse(payload)?;
        let attributes = payload[tc.buffer_len()..].to_vec();
        Ok(Self { kind: header.message_type, header: tc, attributes })
    }
}

/// A qdisc or class, as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number; 0 for a qdisc that the kernel put there by itself.
    pub handle: u32,
    /// Where it is.
    pub parent: u32,
    /// `TCA_KIND`.
    pub kind: String,
    /// `TCA_OPTIONS`.
    pub options: Vec<u8>,
    /// Whether packets have other sizes for it (`TCA_STAB`): a table that the kernel does not report in full.
    pub has_size_table: bool,
}

impl Entry {
    fn new(message: &Message) -> Self {
        let value = |kind| attribute(&message.attributes, kind);
        let name = value(KIND).unwrap_or_default();
        Self {
            handle: message.header.handle.into(),
            parent: message.header.parent.into(),
            kind: String::from_utf8_lossy(name).trim_end_matches('\0').to_owned(),
            options: value(OPTIONS).unwrap_or_default().to_vec(),
            has_size_table: value(STAB).is_some(),
        }
    }
}

/// All that decides where the packets of an interface queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// The root, unless it is the kernel's default.
    pub root: Option<Entry>,
    /// The qdiscs below it.
    pub leaves: Vec<Entry>,
    /// The classes of HTB. Other kinds of qdisc report their flows as classes, too.
    pub classes: Vec<Entry>,
    /// Whether the root has filters.
    pub has_filters: bool,
}

fn dump(kind: u16, ifindex: u32, parent: u32) -> io::Result<Vec<Message>> {
    let answers = ask(Message::new(kind, ifindex, parent, 0), NLM_F_DUMP)?;
    // A dump of qdiscs is one of all interfaces.
    Ok(answers.into_iter().filter(|answer| answer.header.index == ifindex.cast_signed()).collect())
}

/// What there is on an interface.
pub fn observe(ifindex: u32) -> io::Result<Observed> {
    let qdiscs: Vec<Entry> = dump(libc::RTM_GETQDISC, ifindex, 0)?.iter().map(Entry::new).collect();
    let root = qdiscs.iter().find(|qdisc| qdisc.parent == ABOVE_ROOT && qdisc.handle != 0).cloned();
    let Some(root) = root else {
        return Ok(Observed { root: None, leaves: Vec::new(), classes: Vec::new(), has_filters: false });
    };
    let leaves = qdiscs.into_iter().filter(|qdisc| !matches!(qdisc.parent, ABOVE_ROOT | INGRESS)).collect();
    let classes = dump(libc::RTM_GETTCLASS, ifindex, 0)?;
    let classes = classes.iter().map(Entry::new).filter(|class| class.kind == "htb").collect();
    let has_filters = !dump(libc::RTM_GETTFILTER, ifindex, root.handle)?.is_empty();
    Ok(Observed { root: Some(root), leaves, classes, has_filters })
}

/// See [`super::root_kind`].
pub fn root_kind(ifindex: u32) -> io::Result<String> {
    let qdiscs = dump(libc::RTM_GETQDISC, ifindex, 0)?;
    let root = qdiscs.iter().map(Entry::new).find(|qdisc| qdisc.parent == ABOVE_ROOT);
    // A device that is down has none yet.
    Ok(root.map_or("none".to_owned(), |root| root.kind))
}

/// Puts a qdisc in its place. `mode` is [`ADD`] or [`REPLACE`].
pub fn set_qdisc(ifindex: u32, qdisc: &Qdisc, mode: u16) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWQDISC, ifindex, qdisc.parent, qdisc.handle);
    ask(message.with(qdisc.options.kind(), &qdisc.options.encode()), NLM_F_ACK | mode).map(drop)
}

/// Makes a class, or changes it in place: its queue stays as it is.
pub fn set_class(ifindex: u32, class: &Class) -> io::Result<()> {
    let message = Message::new(libc::RTM_NEWTCLASS, ifindex, class.parent, class.id);
    ask(message.with("htb", &class.options.encode()), NLM_F_ACK | REPLACE).map(drop)
}

/// Removes the root, if it still has this handle. The kernel puts its default there.
pub fn delete_root(ifindex: u32, handle: u32) -> io::Result<()> {
    ask(Message::new(libc::RTM_DELQDISC, ifindex, ABOVE_ROOT, handle), NLM_F_ACK).map(drop)
}

/// Whether this kernel has this kind of qdisc: tried at the root of `ifindex`.
pub fn has_kind(ifindex: u32, options: &Options) -> io::Result<bool> {
    let qdisc = Qdisc { handle: 1 << 16, parent: ABOVE_ROOT, options: options.clone() };
    match set_qdisc(ifindex, &qdisc, ADD) {
        Ok(()) => delete_root(ifindex, qdisc.handle).map(|()| true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether this kernel has this kind of qdisc, by asking for one at the root of `ifindex` with options that it must refuse.
pub fn knows_kind(ifindex: u32, refused: &Options) -> io::Result<bool> {
    let qdisc = Qdisc { handle: 1 << 16, parent: ABOVE_ROOT, options: refused.clone() };
    match set_qdisc(ifindex, &qdisc, ADD).map_err(|error| (error.raw_os_error(), error)) {
        Err((Some(libc::ENOENT), _)) => Ok(false),
        Err((Some(libc::EINVAL | libc::ERANGE), _)) => Ok(true),
        Err((_, error)) => Err(error),
        // It was not refused after all.
        Ok(()) => delete_root(ifindex, qdisc.handle).map(|()| true),
    }
}

fn link(ifindex: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = ifindex;
    link
}

/// See [`super::gso_max_segs`].
pub fn gso_max_segs(ifindex: u32) -> io::Result<u32> {
    let answers = ask(RouteNetlinkMessage::GetLink(link(ifindex)), 0)?;
    answers
        .iter()
        .find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::GsoMaxSegs(segments) => Some(*segments),
                _ => None,
            }),
            _ => None,
        })
        .ok_or_else(|| io::Error::other("the kernel does not say"))
}

/// See [`super::set_gso_max_segs`].
pub fn set_gso_max_segs(ifindex: u32, segments: u32) -> io::Result<()> {
    let mut link = link(ifindex);
    link.attributes.push(LinkAttribute::GsoMaxSegs(segments));
    ask(RouteNetlinkMessage::SetLink(link), NLM_F_ACK).map(drop)
}
