//! Many datagrams with one system call.

use std::{io, net::UdpSocket, os::fd::AsRawFd};

use super::wire::{HEADER, Header};

/// Datagrams in one call. With segmentation the kernel takes at most 64 (UDP_MAX_SEGMENTS in Linux before 6.9).
pub const BATCH: usize = 64;
/// The longest payload of an IPv4 datagram, and so of what is to be segmented.
const MAX_PAYLOAD: usize = 65_507;

/// Sends datagrams that are numbered and otherwise alike.
pub struct Sender<'a> {
    socket: &'a UdpSocket,
    /// Bytes of payload, the header included.
    payload: usize,
    /// Whether the kernel cuts them from a large one (`UDP_SEGMENT` is set).
    segment: bool,
    header: Header,
    body: Vec<u8>,
}

impl<'a> Sender<'a> {
    /// Datagrams of `payload` bytes, at least [`HEADER`], through a connected socket.
    pub fn new(socket: &'a UdpSocket, payload: usize, segment: bool, header: Header) -> Self {
        let body = vec![0xa5; payload.saturating_sub(HEADER)];
        Self { socket, payload, segment, header, body }
    }

    /// The most datagrams that [`Self::send`] takes.
    pub fn batch(&self) -> usize {
        if self.segment { BATCH.min(MAX_PAYLOAD / self.payload).max(1) } else { BATCH }
    }

    /// Offers `count` datagrams to the kernel; how many it took.
    pub fn send(&mut self, count: usize) -> io::Result<usize> {
        let count = count.clamp(1, self.batch());
        let mut headers = [[0; HEADER]; BATCH];
        let number = self.header.number;
        for (header, number) in headers[..count].iter_mut().zip(number..) {
            *header = Header { number, ..self.header }.to_bytes();
        }
        let part = |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut parts = [part(&[]); 2 * BATCH];
        for (parts, header) in parts.chunks_exact_mut(2).zip(&headers[..count]) {
            parts.copy_from_slice(&[part(header), part(&self.body)]);
        }
        let each = if self.segment { 2 * count } else { 2 };
        // SAFETY: the structure consists of integers and pointers, for which zero means "none".
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        let used = 2 * count / each;
        for (message, parts) in messages[..used].iter_mut().zip(parts[..2 * count].chunks_exact_mut(each)) {
            message.msg_hdr.msg_iov = parts.as_mut_ptr();
            message.msg_hdr.msg_iovlen = parts.len();
        }
        // SAFETY: all that the messages point to is borrowed above, outlives the call, and is only read.
        let result = unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), used as u32, 0) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let taken = result as usize * (count / used);
        self.header.number += taken as u64;
        Ok(taken)
    }

    /// Whether the kernel takes all datagrams of a call or none.
    pub const fn segments(&self) -> bool {
        self.segment
    }

    /// The kernel refused some: their numbers are used up, as if they had been lost.
    pub const fn skip(&mut self, count: u64) {
        self.header.number += count;
    }
}

/// Receives datagrams, of which only the header is of interest.
pub struct Receiver {
    headers: [[u8; HEADER]; BATCH],
}

impl Receiver {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { headers: [[0; HEADER]; BATCH] }
    }

    /// Waits for datagrams, for as long as the socket's timeout says: their headers and their bytes of payload.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<impl Iterator<Item = (Header, u64)> + '_> {
        let mut parts = self
            .headers
            .each_mut()
            .map(|header| libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() });
        // SAFETY: the structure consists of integers and pointers, for which zero means "none".
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        for (message, part) in messages.iter_mut().zip(&mut parts) {
            message.msg_hdr.msg_iov = part;
            message.msg_hdr.msg_iovlen = 1;
        }
        // With MSG_TRUNC the length is that of the datagram, not of what there was room for (recvmsg(2)).
        let flags = libc::MSG_WAITFORONE | libc::MSG_TRUNC;
        // SAFETY: each message points to one part, each part to one header; they outlive the call.
        let result = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, flags as _, std::ptr::null_mut())
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let headers: &[[u8; HEADER]] = &self.headers;
        Ok(messages.into_iter().take(result as usize).zip(headers).filter_map(|(message, header)| {
            (message.msg_len as usize >= HEADER).then_some(())?;
            Some((Header::from_bytes(header)?, u64::from(message.msg_len)))
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

    use super::*;

    #[test]
    fn datagrams_arrive_with_their_numbers_whoever_cuts_them() {
        for segment in [false, true] {
            let far = UdpSocket::bind("127.0.0.1:0").unwrap();
            far.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let near = UdpSocket::bind("127.0.0.1:0").unwrap();
            near.connect(far.local_addr().unwrap()).unwrap();
            if segment {
                setsockopt(&near, UdpGsoSegment, &1000).unwrap();
            }
            let mut sender = Sender::new(&near, 1000, segment, Header { load: 9, flow: 2, number: 0 });
            assert_eq!(sender.send(1).unwrap(), 1);
            assert_eq!(sender.send(40).unwrap(), 40);
            sender.skip(9);
            assert_eq!(sender.send(3).unwrap(), 3);
            let (mut receiver, mut numbers) = (Receiver::new(), Vec::new());
            while numbers.len() < 44 {
                for (header, bytes) in receiver.receive(&far).unwrap() {
                    assert_eq!((header.load, header.flow, bytes), (9, 2, 1000));
                    numbers.push(header.number);
                }
            }
            assert_eq!(numbers, (0..41).chain(50..53).collect::<Vec<u64>>(), "{segment}");
        }
    }

    #[test]
    fn what_is_no_datagram_of_a_load_is_left_out() {
        let far = UdpSocket::bind("127.0.0.1:0").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let near = UdpSocket::bind("127.0.0.1:0").unwrap();
        near.connect(far.local_addr().unwrap()).unwrap();
        for garbage in [&b""[..], b"hello", &[0; 2000]] {
            near.send(garbage).unwrap();
        }
        Sender::new(&near, HEADER, false, Header { load: 1, flow: 0, number: 5 }).send(1).unwrap();
        let mut receiver = Receiver::new();
        let seen: Vec<_> = receiver.receive(&far).unwrap().collect();
        assert_eq!(seen, [(Header { load: 1, flow: 0, number: 5 }, HEADER as u64)]);
        assert!(receiver.receive(&far).map(|_| ()).is_err());
    }
}
