//! Questions to rtnetlink, and the one request that aya has no call for: removing clsact.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption},
};

use crate::netlink::ask;

/// What `load` needs to know of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in this network namespace.
    pub index: u32,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// Whether its packets start with an Ethernet header.
    pub is_ethernet: bool,
    /// Whether it is the loopback device.
    pub is_loopback: bool,
    /// Whether it is a VLAN of another device.
    pub is_vlan: bool,
    /// Whether it is up and has a carrier.
    pub is_up: bool,
}

/// A filter on the egress of clsact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressFilter {
    /// `TCA_KIND`: `"bpf"` for a program.
    pub kind: String,
    /// Its place: lower ones run first.
    pub priority: u16,
    /// The protocol that it is for, as in an Ethernet header.
    pub protocol: u16,
    /// Its handle.
    pub handle: u32,
    /// The program, if the kernel says.
    pub program_id: Option<u32>,
}

impl EgressFilter {
    /// Whether a program for all protocols may have the same place: the kernel keeps filters of one kind and protocol
    /// together (`tcf_proto_lookup`, net/sched/cls_api.c).
    pub fn shares_with_programs(&self) -> bool {
        self.kind == "bpf" && self.protocol == libc::ETH_P_ALL as u16
    }
}

const CLSACT: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };
const CLSACT_INGRESS: u16 = 0xfff2;
const CLSACT_EGRESS: u16 = 0xfff3;

/// Looks an interface up by name; `None` if there is none in this network namespace.
pub fn interface(name: &str) -> io::Result<Option<Interface>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let answers = match ask(RouteNetlinkMessage::GetLink(request), 0) {
        Ok(answers) => answers,
        // ERANGE and EINVAL: longer than any interface name can be.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ERANGE | libc::EINVAL)) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(link) => Some(Interface {
            name: name.to_owned(),
            index: link.header.index,
            mtu: link
                .attributes
                .iter()
                .find_map(|a| if let LinkAttribute::Mtu(mtu) = a { Some(*mtu) } else { None })?,
            is_up: link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
            is_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            is_loopback: link.header.link_layer_type == LinkLayerType::Loopback,
            is_vlan: link.attributes.iter().any(
                |a| matches!(a, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Vlan))),
            ),
        }),
        _ => None,
    }))
}

fn tc_header(ifindex: u32, parent: TcHandle) -> TcMessage {
    let header = TcHeader { index: ifindex as i32, parent, ..TcHeader::default() };
    TcMessage::from_parts(header, Vec::new())
}

/// Whether the interface has a clsact qdisc.
pub fn has_clsact(ifindex: u32) -> io::Result<bool> {
    let answers = ask(RouteNetlinkMessage::GetQueueDiscipline(tc_header(ifindex, TcHandle::UNSPEC)), NLM_F_DUMP)?;
    Ok(answers.iter().any(|answer| match answer {
        // Old kernels ignore the index in a dump request.
        RouteNetlinkMessage::NewQueueDiscipline(qdisc) if qdisc.header.index == ifindex as i32 => {
            qdisc.attributes.iter().any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "clsact"))
        }
        _ => false,
    }))
}

/// The filters on the ingress or egress side of clsact, in the order in which they run.
fn filters(ifindex: u32, side: u16) -> io::Result<Vec<EgressFilter>> {
    let parent = TcHandle { major: CLSACT.major, minor: side };
    let answers = ask(RouteNetlinkMessage::GetTrafficFilter(tc_header(ifindex, parent)), NLM_F_DUMP)?;
    let mut filters: Vec<EgressFilter> = answers
        .iter()
        .filter_map(|answer| match answer {
            // A dump names each (priority, kind) once more without a handle.
            RouteNetlinkMessage::NewTrafficFilter(filter) if u32::from(filter.header.handle) != 0 => {
                let program_id = filter.attributes.iter().find_map(|attribute| match attribute {
                    TcAttribute::Options(options) => options.iter().find_map(|option| match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
                        _ => None,
                    }),
                    _ => None,
                });
                let kind = filter.attributes.iter().find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
                Some(EgressFilter {
                    kind: kind.unwrap_or_default(),
                    priority: (filter.header.info >> 16) as u16,
                    protocol: u16::from_be(filter.header.info as u16),
                    handle: filter.header.handle.into(),
                    program_id,
                })
            }
            _ => None,
        })
        .collect();
    filters.sort_by_key(|filter| filter.priority);
    Ok(filters)
}

/// The filters on the egress side of clsact, in the order in which they run.
pub fn egress_filters(ifindex: u32) -> io::Result<Vec<EgressFilter>> {
    filters(ifindex, CLSACT_EGRESS)
}

/// Removes clsact if no filter of anybody is left on it.
pub fn remove_unused_clsact(ifindex: u32) -> io::Result<()> {
    if !has_clsact(ifindex)? {
        return Ok(());
    }
    if !egress_filters(ifindex)?.is_empty() || !filters(ifindex, CLSACT_INGRESS)?.is_empty() {
        return Ok(());
    }
    let mut message = tc_header(ifindex, CLSACT);
    message.header.handle = TcHandle { major: CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    ask(RouteNetlinkMessage::DelQueueDiscipline(message), NLM_F_ACK).map(|_| ())
}
