//! The way to a target: the interface, and what is in force there.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage},
};
use nix::net::if_::if_indextoname;
use qjump_ebpf::LEVELS;

use crate::{
    dataplane::{self, Error, InterfaceStatus},
    netlink::ask,
    plan::bound_in_force,
    socket::Level,
};

/// The way to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The interface that packets to it leave by.
    pub interface: String,
    /// What is in force there; `None` if qjump is not loaded on it.
    pub managed: Option<Managed>,
}

/// What is in force on an interface, by level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Managed {
    /// The bound of one message, ns.
    pub bounds_ns: [Option<u64>; LEVELS],
    /// Whether the plan has the level.
    pub planned: [bool; LEVELS],
    /// Packets dropped so far.
    pub dropped: [u64; LEVELS],
}

/// The way to an address from the calling thread's network namespace. Reading what is in force needs the rights that
/// `qjump status` needs; without them the answer is an error.
///
/// # Errors
/// If there is no way, or something is loaded and cannot be read.
pub fn to(target: IpAddr) -> Result<Route, String> {
    let interface = interface(target).map_err(|error| format!("there is no route to {target}: {error}"))?;
    let managed = match dataplane::status(&interface) {
        Ok(status) if status.elsewhere || !status.attached => None,
        Ok(status) => Some(Managed::of(&status)),
        Err(Error::NotLoaded(_)) => None,
        Err(error) => return Err(format!("cannot see what is in force on {interface}: {error}")),
    };
    Ok(Route { interface, managed })
}

impl Managed {
    fn of(status: &InterfaceStatus) -> Self {
        let mut managed = Self { bounds_ns: [None; LEVELS], planned: [false; LEVELS], dropped: [0; LEVELS] };
        for level in Level::strictest_first() {
            let bound = bound_in_force(&status.config, level);
            managed.bounds_ns[level.index()] = bound.map(|bound| bound as u64);
        }
        for level in &status.levels {
            managed.planned[level.level.index()] = true;
            managed.dropped[level.level.index()] = level.dropped().packets;
        }
        managed
    }
}

fn interface(target: IpAddr) -> io::Result<String> {
    let target = target.to_canonical();
    let mut route = RouteMessage::default();
    (route.header.address_family, route.header.destination_prefix_length) =
        if target.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    route.attributes.push(RouteAttribute::Destination(target.into()));
    let answers = ask(RouteNetlinkMessage::GetRoute(route), 0)?;
    let index = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewRoute(route) => route.attributes.into_iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(index),
            _ => None,
        }),
        _ => None,
    });
    let index = index.ok_or_else(|| io::Error::other("the kernel names no interface"))?;
    Ok(if_indextoname(index)?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_leads_to_itself() {
        for target in ["127.0.0.1", "::ffff:127.0.0.1"] {
            assert_eq!(interface(target.parse().unwrap()).unwrap(), "lo", "{target}");
        }
    }
}
