//! One request to netlink and its answers.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Sends one request to rtnetlink, in the network namespace of the calling thread, and collects the answers to it.
///
/// `flags` besides `NLM_F_REQUEST`: with `NLM_F_DUMP` or `NLM_F_ACK` until the kernel says that it is done,
/// else one answer.
pub(crate) fn ask<M: NetlinkSerializable + NetlinkDeserializable>(message: M, flags: u16) -> io::Result<Vec<M>> {
    ask_of(NETLINK_ROUTE, message, flags)
}

/// The same of another protocol of netlink.
pub(crate) fn ask_of<M: NetlinkSerializable + NetlinkDeserializable>(
    protocol: isize,
    message: M,
    flags: u16,
) -> io::Result<Vec<M>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;

    let mut answers = Vec::new();
    loop {
        let (data, _) = socket.recv_from_full()?;
        let mut rest = &data[..];
        while !rest.is_empty() {
            let length = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?.length() as usize;
            let answer = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
            match answer.payload {
                NetlinkPayload::Done(_) => return Ok(answers),
                NetlinkPayload::Error(error) => {
                    return if error.code.is_none() { Ok(answers) } else { Err(error.to_io()) };
                }
                NetlinkPayload::InnerMessage(message) => answers.push(message),
                _ => {}
            }
            if flags & (NLM_F_DUMP | NLM_F_ACK) == 0 {
                return Ok(answers);
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}
