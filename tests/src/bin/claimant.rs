//! An unprivileged process that tries one way to have its packets leave at a level. `tests/tests/authority.rs` looks
//! at what arrives.
//!
//! `claimant WAY NEAR FAR [ARGUMENT]`: it gives up its rights first, all but CAP_NET_RAW for the ways that need it.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::{
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt, sockopt},
        wait::waitpid,
    },
    unistd::{ForkResult, Gid, Uid, fork, setgid, setgroups, setuid},
};

/// Where the datagrams go; nobody listens there.
const PORT: u16 = 7000;
/// "nobody", as far as the kernel is concerned.
const UID: u32 = 65_534;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [way, near, far, rest @ ..] = arguments.as_slice() else { bail!("claimant WAY NEAR FAR [ARGUMENT]") };
    let (near, far): (IpAddr, IpAddr) = (near.parse()?, far.parse()?);
    let argument = || rest.first().context("this way needs an argument");
    give_up_rights(matches!(way.as_str(), "raw" | "packet"))?;
    match way.as_str() {
        "so_priority" => for_levels(|level| {
            let socket = udp(near)?;
            claim(&socket, level);
            datagram(&socket, far)
        }),
        "connect" => for_levels(|level| {
            let socket = udp(near)?;
            socket.connect((far, PORT))?;
            claim(&socket, level);
            let _ = socket.send(b"connected");
            Ok(())
        }),
        "tos" => for_classes(|class| {
            let socket = udp(near)?;
            set_class(&socket, near, class)?;
            datagram(&socket, far)
        }),
        "cmsg_tos" => {
            let socket = udp(near)?;
            for_classes(|class| {
                let (level, name) = class_option(near);
                with_control(&socket, far, level, name, class.into())
            })
        }
        "cmsg_priority" => {
            let socket = udp(near)?;
            // Kernels before 6.14 refuse it, and 7 takes a capability.
            for_levels(|level| with_control(&socket, far, libc::SOL_SOCKET, libc::SO_PRIORITY, level as i32).or(Ok(())))
        }
        "tcp" => for_levels(|level| {
            let mut stream = TcpStream::connect((far, PORT + 1))?;
            claim(&stream, level);
            stream.write_all(b"first")?;
            set_class(&stream, near, (level << 5) as u8 | 0x10)?;
            talk(stream)
        }),
        "accept" => {
            let listener = TcpListener::bind((near, PORT + 2))?;
            say("ready");
            for_levels(|level| {
                let mut stream = listener.accept()?.0;
                stream.write_all(b"as accepted")?;
                claim(&stream, level);
                talk(stream)
            })
        }
        "fork" => {
            let inherited = udp(near)?;
            // SAFETY: this process has one thread.
            if let ForkResult::Parent { child } = unsafe { fork() }? {
                waitpid(child, None)?;
                return Ok(());
            }
            claim(&inherited, 6);
            datagram(&inherited, far)?;
            let own = udp(near)?;
            claim(&own, 6);
            datagram(&own, far)
        }
        "dup" => {
            let socket = udp(near)?;
            let copy = socket.try_clone()?;
            claim(&copy, 6);
            set_class(&copy, near, 0x10)?;
            datagram(&copy, far)?;
            datagram(&socket, far)
        }
        "raw" => for_levels(|level| raw(near, far, level)),
        "packet" => for_levels(|level| packet(near, far, level)),
        "pass_on" => pass_on(&udp(near)?, argument()?),
        "receive" => {
            let listener = UnixListener::bind(argument()?)?;
            say("ready");
            // Held until the end: the giver waits for that, because its grant goes with it.
            let giver = listener.accept()?.0;
            let socket = receive(&giver)?;
            for_levels(|level| {
                claim(&socket, level);
                set_class(&socket, near, 0x10)?;
                datagram(&socket, far)
            })
        }
        "move" => {
            let old = UdpSocket::bind((near, 7100))?;
            say(match std::fs::write(format!("{}/cgroup.procs", argument()?), "0") {
                Ok(()) => "moved",
                Err(_) => "refused",
            });
            for socket in [old, UdpSocket::bind((near, 7101))?] {
                claim(&socket, 6);
                datagram(&socket, far)?;
            }
            Ok(())
        }
        "hold" => hold(near, far),
        other => bail!("no way '{other}'"),
    }
}

/// A long-lived service: a UDP socket, a TCP connection and a listener, which it uses when told to on standard input.
fn hold(near: IpAddr, far: IpAddr) -> Result<()> {
    let socket = udp(near)?;
    let mut stream = TcpStream::connect((far, PORT + 1))?;
    let listener = TcpListener::bind((near, PORT + 2))?;
    say("ready");
    for line in io::stdin().lines() {
        match line?.as_str() {
            "send" => {
                datagram(&socket, far)?;
                stream.write_all(b"still here")?;
            }
            "accept" => listener.accept()?.0.write_all(b"accepted")?,
            other => bail!("cannot '{other}'"),
        }
        say("done");
    }
    Ok(())
}

fn say(word: &str) {
    println!("{word}");
}

fn for_levels(mut each: impl FnMut(u32) -> Result<()>) -> Result<()> {
    (0..8).try_for_each(&mut each)
}

fn for_classes(mut each: impl FnMut(u8) -> Result<()>) -> Result<()> {
    (0..=u8::MAX).try_for_each(&mut each)
}

fn udp(near: IpAddr) -> Result<UdpSocket> {
    Ok(UdpSocket::bind((near, 0))?)
}

fn datagram(socket: &UdpSocket, far: IpAddr) -> Result<()> {
    // An error is the report that nobody listened to the one before; it is sent again.
    if socket.send_to(b"hello", (far, PORT)).is_err() {
        socket.send_to(b"hello", (far, PORT))?;
    }
    Ok(())
}

/// Asks for a level. That the kernel may refuse is part of the trial.
fn claim(socket: &impl AsFd, level: u32) {
    let _ = setsockopt(socket, sockopt::Priority, &(level as i32));
}

const fn class_option(near: IpAddr) -> (i32, i32) {
    match near {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    }
}

fn set_class(socket: &impl AsRawFd, near: IpAddr, class: u8) -> Result<()> {
    let (level, name) = class_option(near);
    set_option(socket.as_raw_fd(), level, name, class.into())
}

fn set_option(socket: RawFd, level: i32, name: i32, value: i32) -> Result<()> {
    // SAFETY: the value is an int that outlives the call.
    let result = unsafe { libc::setsockopt(socket, level, name, (&raw const value).cast(), 4) };
    ensure!(result == 0, "option {level}/{name} = {value}: {}", io::Error::last_os_error());
    Ok(())
}

/// Sends a datagram with one control message, an int.
fn with_control(socket: &UdpSocket, far: IpAddr, level: i32, name: i32, value: i32) -> Result<()> {
    let address: nix::sys::socket::SockaddrStorage = SocketAddr::new(far, PORT).into();
    let mut data = libc::iovec { iov_base: b"hello".as_ptr().cast_mut().cast(), iov_len: 5 };
    let mut control = [0u64; 4];
    // SAFETY: all zero is a valid message header; its pointers are set next and outlive the call.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw const address).cast_mut().cast();
    message.msg_namelen = match far {
        IpAddr::V4(_) => size_of::<libc::sockaddr_in>(),
        IpAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
    } as u32;
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a size.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
    // SAFETY: the control buffer has room for one message with an int.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = level;
        (*header).cmsg_type = name;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(value);
    }
    for _ in 0..2 {
        // SAFETY: as above. The first try may report that nobody listened to the one before.
        if unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) } >= 0 {
            return Ok(());
        }
    }
    bail!("sendmsg: {}", io::Error::last_os_error())
}

/// Sends, closes its side, and waits for the other one.
fn talk(mut stream: TcpStream) -> Result<()> {
    stream.write_all(&[0; 4000])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A UDP datagram with headers of our own, every codepoint set.
fn headers(near: IpAddr, far: IpAddr) -> Vec<u8> {
    let udp = [0x1b, 0xbc, 0x1b, 0x58, 0, 12, 0, 0, 1, 2, 3, 4];
    let mut packet = match (near, far) {
        (IpAddr::V4(near), IpAddr::V4(far)) => {
            let mut header = vec![0x45, 0xe0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0];
            header.extend(near.octets());
            header.extend(far.octets());
            let checksum = qjump_tests::frames::ipv4_checksum(&header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            header
        }
        (IpAddr::V6(near), IpAddr::V6(far)) => {
            let mut header = vec![0x6e, 0, 0, 0, 0, 12, 17, 64];
            header.extend(near.octets());
            header.extend(far.octets());
            header
        }
        _ => unreachable!("both ends have the same version"),
    };
    packet.extend(udp);
    packet
}

fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: plain values.
    let fd = unsafe { libc::socket(family, kind, protocol) };
    ensure!(fd >= 0, "socket: {}", io::Error::last_os_error());
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(near: IpAddr, far: IpAddr, level: u32) -> Result<()> {
    let family = if near.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    claim(&socket, level);
    let to: nix::sys::socket::SockaddrStorage = SocketAddr::new(far, 0).into();
    nix::sys::socket::sendto(socket.as_raw_fd(), &headers(near, far), &to, MsgFlags::empty())?;
    Ok(())
}

/// A whole frame, on the interface that the address belongs to.
fn packet(near: IpAddr, far: IpAddr, level: u32) -> Result<()> {
    let ethertype = if near.is_ipv4() { 0x0800u16 } else { 0x86dd };
    let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    claim(&socket, level);
    let device = nix::ifaddrs::getifaddrs()?
        .find(|one| one.address.is_some_and(|at| at.to_string().trim_start_matches('[').starts_with(&near.to_string())))
        .context("no interface has the address")?
        .interface_name;
    let mut frame = vec![2, 0, 0, 0, 9, 2, 2, 0, 0, 0, 9, 1];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(headers(near, far));
    // SAFETY: all zero is a valid address; the fields that count are set next.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = ethertype.to_be();
    to.sll_ifindex = nix::net::if_::if_nametoindex(device.as_str())? as i32;
    // SAFETY: frame and address outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as u32,
        )
    };
    ensure!(sent >= 0, "packet socket: {}", io::Error::last_os_error());
    Ok(())
}

fn pass_on(socket: &UdpSocket, path: &str) -> Result<()> {
    let to = UnixStream::connect(path)?;
    let descriptors = [socket.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(b"x")], &control, MsgFlags::empty(), None)?;
    // The taker never writes: this ends when it does.
    let _ = std::io::Read::read(&mut &to, &mut [0])?;
    Ok(())
}

fn receive(from: &UnixStream) -> Result<UdpSocket> {
    let mut data = [0; 1];
    let mut parts = [IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            // SAFETY: the kernel has just given this descriptor to us alone.
            return Ok(unsafe { UdpSocket::from_raw_fd(descriptors[0]) });
        }
    }
    bail!("no socket came")
}

/// Becomes nobody, with CAP_NET_RAW or without any capability.
fn give_up_rights(keep_net_raw: bool) -> Result<()> {
    const CAP_NET_RAW: u32 = 13;
    const VERSION_3: u32 = 0x2008_0522;
    // SAFETY: plain values. Keeps the permitted capabilities over the change of user.
    ensure!(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) } == 0, "prctl: {}", io::Error::last_os_error());
    setgroups(&[])?;
    setgid(Gid::from_raw(UID))?;
    setuid(Uid::from_raw(UID))?;
    let kept = if keep_net_raw { 1 << CAP_NET_RAW } else { 0 };
    let header = [VERSION_3, 0];
    // Effective, permitted, inheritable: first the lower 32 capabilities, then the upper.
    let sets = [kept, kept, 0, 0, 0, 0];
    // SAFETY: both are as long as this version of the call says, and outlive it.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    ensure!(result == 0, "capset: {}", io::Error::last_os_error());
    Ok(())
}
