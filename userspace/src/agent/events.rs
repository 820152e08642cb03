//! What the kernel says of interfaces and queues by itself: rtnetlink's multicast groups.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, RawFd},
};

use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::net::if_::if_nameindex;
use tokio::io::{Interest, unix::AsyncFd};

use crate::qdisc::encode::attribute;

/// `RTNLGRP_LINK` and `RTNLGRP_TC` (include/uapi/linux/rtnetlink.h).
const GROUPS: [u32; 2] = [1, 4];

/// Its length, type, flags, sequence and port; then `struct ifinfomsg` or `struct tcmsg`, which both have the index of the
/// interface as their second word.
const HEADER: usize = 16;
const INDEX_AT: usize = HEADER + 4;
const LINK_ATTRIBUTES_AT: usize = HEADER + 16;
const IFLA_IFNAME: u16 = 3;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Heard {
    index: u32,
    /// The name that the interface has now; `None` of queues, and of an interface that has gone.
    name: Option<String>,
    gone: bool,
}

/// The messages of one read. What cannot be understood is left out.
fn parse(mut bytes: &[u8]) -> Vec<Heard> {
    let mut heard = Vec::new();
    while let Some(length) = word(bytes, 0).map(|length| length as usize).filter(|&length| length >= HEADER) {
        let (message, rest) = bytes.split_at(length.min(bytes.len()));
        let kind = word(message, 4).unwrap_or(0) as u16;
        if let Some(index) = word(message, INDEX_AT) {
            let name = || {
                let name = attribute(message.get(LINK_ATTRIBUTES_AT..)?, IFLA_IFNAME)?;
                Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
            };
            match kind {
                libc::RTM_NEWLINK => heard.push(Heard { index, name: name(), gone: false }),
                libc::RTM_DELLINK => heard.push(Heard { index, name: None, gone: true }),
                libc::RTM_NEWQDISC | libc::RTM_DELQDISC | libc::RTM_NEWTCLASS | libc::RTM_DELTCLASS => {
                    heard.push(Heard { index, name: None, gone: false })
                }
                _ => {}
            }
        }
        bytes = rest.get(length.next_multiple_of(4) - length..).unwrap_or_default();
    }
    heard
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

struct Listening(Socket);

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Listens to the kernel, in the network namespace of the thread that began it.
pub struct Events {
    socket: AsyncFd<Listening>,
    names: HashMap<u32, String>,
}

impl Events {
    /// From now on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn begin() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self { socket: readable(Listening(socket))?, names: names() })
    }

    /// Waits until something is said of an interface whose name, now or before, is `wanted`, or of one that is not known.
    ///
    /// # Errors
    /// If the kernel cannot be listened to any more.
    pub async fn heard(&mut self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        loop {
            let mut ready = self.socket.readable_mut().await?;
            let read = ready.try_io(|socket| socket.get_ref().0.recv_from_full());
            match read {
                Err(_) => {}
                Ok(Ok((bytes, _))) => {
                    let mut matters = false;
                    for heard in parse(&bytes) {
                        matters |= self.learn(heard, &wanted);
                    }
                    if matters {
                        return Ok(());
                    }
                }
                // Some of it was lost.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.names = names();
                    return Ok(());
                }
                Ok(Err(error)) => return Err(error),
            }
        }
    }

    /// Whether it matters.
    fn learn(&mut self, heard: Heard, wanted: impl Fn(&str) -> bool) -> bool {
        let before = match heard.name {
            _ if heard.gone => self.names.remove(&heard.index),
            Some(name) => self.names.insert(heard.index, name),
            None => None,
        };
        before.iter().chain(self.names.get(&heard.index)).any(|name| wanted(name))
    }
}

fn readable(socket: Listening) -> io::Result<AsyncFd<Listening>> {
    // SAFETY: the socket is its own descriptor's only owner, and gives the same one for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

fn names() -> HashMap<u32, String> {
    let found = if_nameindex();
    found.iter().flatten().map(|one| (one.index(), one.name().to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, index: u32, name: Option<&str>) -> Vec<u8> {
        let mut bytes = vec![0; if name.is_some() { LINK_ATTRIBUTES_AT } else { HEADER + 20 }];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[INDEX_AT..INDEX_AT + 4].copy_from_slice(&index.to_ne_bytes());
        if let Some(name) = name {
            bytes.extend((name.len() as u16 + 5).to_ne_bytes());
            bytes.extend(IFLA_IFNAME.to_ne_bytes());
            bytes.extend(name.as_bytes());
            bytes.push(0);
        }
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn messages_are_told_apart() {
        let all = [
            message(libc::RTM_NEWLINK, 7, Some("eth0")),
            message(libc::RTM_NEWQDISC, 7, None),
            message(libc::RTM_NEWADDR, 7, None),
            message(libc::RTM_DELLINK, 7, Some("eth0")),
        ];
        let heard = |name: Option<&str>, gone| Heard { index: 7, name: name.map(str::to_owned), gone };
        let expected = [heard(Some("eth0"), false), heard(None, false), heard(None, true)];
        assert_eq!(parse(&all.concat()), expected);
        // Whatever is cut off.
        let all = all.concat();
        for end in 0..all.len() {
            assert!(parse(&all[..end]).len() <= 3);
        }
        assert_eq!(parse(&[0; 64]), []);
    }
}
