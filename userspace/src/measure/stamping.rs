//! Sockets whose packets the kernel stamps (Documentation/networking/timestamping.rst).

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::clock::timespec_ns;

/// What arrives is stamped in software, and in hardware where the device does that anyway. `OPT_ID` numbers the stamps,
/// `OPT_TSONLY` spares the copy of the packet.
const FLAGS: libc::c_uint = libc::SOF_TIMESTAMPING_RX_SOFTWARE
    | libc::SOF_TIMESTAMPING_SOFTWARE
    | libc::SOF_TIMESTAMPING_OPT_ID
    | libc::SOF_TIMESTAMPING_OPT_TSONLY;
const HARDWARE: libc::c_uint =
    libc::SOF_TIMESTAMPING_RX_HARDWARE | libc::SOF_TIMESTAMPING_RAW_HARDWARE | libc::SOF_TIMESTAMPING_OPT_TX_SWHW;
/// What leaves is stamped at every place, if that is asked for with the message.
const LEAVING: u32 =
    libc::SOF_TIMESTAMPING_TX_SCHED | libc::SOF_TIMESTAMPING_TX_SOFTWARE | libc::SOF_TIMESTAMPING_TX_HARDWARE;

/// When a packet passed a place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// `CLOCK_REALTIME`, ns since 1970.
    pub software_ns: Option<u64>,
    /// The device's own clock, ns.
    pub hardware_ns: Option<u64>,
}

/// Where a packet that leaves was stamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before the limiter and the queues.
    Sched,
    /// At the device.
    Snd,
}

/// A packet that left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// Its number: stamped datagrams from 0 for UDP; for TCP the last byte's, from 0.
    pub id: u32,
    /// Where.
    pub place: Place,
    /// When.
    pub stamp: Stamp,
}

/// Asks the kernel to stamp what this socket receives from now on, and what it sends with [`send`]'s `stamped`. Numbers
/// begin anew.
pub fn enable(socket: BorrowedFd<'_>, tcp: bool) -> io::Result<()> {
    let flags = if tcp { FLAGS | libc::SOF_TIMESTAMPING_OPT_ID_TCP } else { FLAGS };
    set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 0)?;
    set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, flags | HARDWARE)
        // A kernel before 6.2 does not know OPT_ID_TCP; its numbers for TCP begin with what is not yet acknowledged.
        .or_else(|_| set(socket, libc::SOL_SOCKET, libc::SO_TIMESTAMPING, FLAGS))
}

/// Makes the kernel say when it drops a datagram on the way to the device (`ENOBUFS`).
pub fn report_drops(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1)
    }
}

fn set(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: libc::c_uint) -> io::Result<()> {
    // SAFETY: the option's value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_uint>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Room for the control messages of one packet, aligned as they need.
type Control = [u64; 32];

/// Gives a message to the kernel without waiting. To have it `stamped` costs its sender two more messages on the socket's
/// error queue, which [`left`] fetches: 2 us and more.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], stamped: bool) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let count = if stamped {
        let mut control: Control = [0; 32];
        let mut header = header(&mut control);
        let mut data = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        header.msg_iov = &raw mut data;
        header.msg_iovlen = 1;
        const SIZE: libc::c_uint = size_of::<u32>() as libc::c_uint;
        // SAFETY: the control space has room for one message of four bytes, and the first is at its beginning; the kernel
        // reads it and the data, which outlive the call, and writes nothing.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(SIZE) as _;
            let message = libc::CMSG_FIRSTHDR(&raw const header);
            (*message).cmsg_level = libc::SOL_SOCKET;
            (*message).cmsg_type = libc::SO_TIMESTAMPING;
            (*message).cmsg_len = libc::CMSG_LEN(SIZE) as _;
            libc::CMSG_DATA(message).cast::<u32>().write_unaligned(LEAVING);
            libc::sendmsg(socket.as_raw_fd(), &raw const header, flags)
        }
    } else {
        // SAFETY: the buffer is valid for its length during the call.
        unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) }
    };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok(count as usize) }
}

/// Receives what is there without waiting, and when the kernel got it. A datagram that is larger than the buffer is cut.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Stamp)> {
    let mut control: Control = [0; 32];
    let mut data = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut header = header(&mut control);
    header.msg_iov = &raw mut data;
    header.msg_iovlen = 1;
    // SAFETY: the header points to the buffer and the control space, which outlive the call.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((length as usize, stamp_and_error(&header).0))
}

/// Stamps that are fetched at once.
const BATCH: usize = 16;

/// Fetches the stamps of packets that left, as far as they are there, and returns how many messages there were.
pub fn left(socket: BorrowedFd<'_>, mut take: impl FnMut(Left)) -> io::Result<usize> {
    let mut controls: [Control; BATCH] = [[0; 32]; BATCH];
    let mut all = 0;
    loop {
        let mut headers: [libc::mmsghdr; BATCH] =
            std::array::from_fn(|at| libc::mmsghdr { msg_hdr: header(&mut controls[at]), msg_len: 0 });
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: each header points to a control space of its own, and all outlive the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                flags as _,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(all) } else { Err(error) };
        }
        all += count as usize;
        for received in &headers[..count as usize] {
            let (stamp, error) = stamp_and_error(&received.msg_hdr);
            // Other messages are ICMP's.
            let Some(error) = error.filter(|error| error.ee_origin == libc::SO_EE_ORIGIN_TIMESTAMPING) else {
                continue;
            };
            let place = match error.ee_info {
                0 => Place::Snd,
                1 => Place::Sched,
                _ => continue,
            };
            take(Left { id: error.ee_data, place, stamp });
        }
        if (count as usize) < BATCH {
            return Ok(all);
        }
    }
}

fn header(control: &mut Control) -> libc::msghdr {
    // SAFETY: all bytes zero are a valid `msghdr`: no name, no data, no control messages.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>() as _;
    header
}

/// What the control messages say; the header is one that the kernel has filled in.
fn stamp_and_error(header: &libc::msghdr) -> (Stamp, Option<libc::sock_extended_err>) {
    let (mut stamp, mut error) = (Stamp::default(), None);
    // SAFETY: the kernel has written `msg_controllen` bytes of control messages where the header points to, which is
    // still there; each is read whole only if it has the kind, and so the size, of what is read.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = at.as_ref() {
            let data = libc::CMSG_DATA(at);
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_TIMESTAMPING) => {
                    // `struct scm_timestamping`: software, a dead one, hardware.
                    let times: [libc::timespec; 3] = data.cast::<[libc::timespec; 3]>().read_unaligned();
                    let known = |time: &libc::timespec| Some(timespec_ns(time)).filter(|&ns| ns != 0);
                    // A transmission is reported once for each kind of stamp.
                    stamp.software_ns = stamp.software_ns.or(known(&times[0]));
                    stamp.hardware_ns = stamp.hardware_ns.or(known(&times[2]));
                }
                (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR) => {
                    error = Some(data.cast::<libc::sock_extended_err>().read_unaligned());
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
    (stamp, error)
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd, time::Duration};

    use super::*;
    use crate::measure::clock::real_ns;

    fn pair(host: &str) -> Option<(UdpSocket, UdpSocket)> {
        let (one, other) = (UdpSocket::bind((host, 0)).ok()?, UdpSocket::bind((host, 0)).ok()?);
        one.connect(other.local_addr().unwrap()).unwrap();
        other.connect(one.local_addr().unwrap()).unwrap();
        Some((one, other))
    }

    #[test]
    fn stamps_both_ends_in_order() {
        for host in ["127.0.0.1", "::1"] {
            // A machine may be without IPv6.
            let Some((one, other)) = pair(host) else { continue };
            enable(one.as_fd(), false).unwrap();
            enable(other.as_fd(), false).unwrap();
            // Numbers begin anew.
            send(one.as_fd(), b"x", true).unwrap();
            enable(one.as_fd(), false).unwrap();
            other.recv(&mut [0; 1]).unwrap();
            while left(one.as_fd(), drop).unwrap() > 0 {}
            // The kernel begins to stamp what it receives a little after it was asked to.
            std::thread::sleep(Duration::from_millis(100));

            let before = real_ns();
            // Those without stamps have no number.
            for stamped in [true, false, true, true] {
                send(one.as_fd(), b"probe", stamped).unwrap();
            }
            let mut buffer = [0; 100];
            let mut arrived = Vec::new();
            while arrived.len() < 4 {
                match receive(other.as_fd(), &mut buffer) {
                    Ok((length, stamp)) => {
                        assert_eq!(length, 5);
                        arrived.push(stamp.software_ns.expect("a stamp"));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            let mut stamps = Vec::new();
            left(one.as_fd(), |stamp| stamps.push(stamp)).unwrap();
            arrived.remove(1);
            assert!(stamps.iter().all(|left| left.id < 3), "{stamps:?}");
            for id in 0..3 {
                let at = |place| {
                    let of = stamps.iter().find(|left| left.id == id && left.place == place);
                    of.unwrap_or_else(|| panic!("{host}: no {place:?} of {id}: {stamps:?}")).stamp.software_ns.unwrap()
                };
                let (sched, snd) = (at(Place::Sched), at(Place::Snd));
                assert!(before <= sched && sched <= snd && snd <= arrived[id as usize], "{host}");
            }
        }
    }
}
