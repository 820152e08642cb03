//! How messages travel.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::AsFd,
};

use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::time::TimeSpec,
};

use super::{MESSAGE_BYTES, Message, Recipients};
use crate::dataplane::sys::monotonic_ns;

/// Takes messages to participants, or a participant's to the coordinator, who is then number 0.
pub trait Transport {
    /// Sends a message. That it was sent does not say that it arrives.
    ///
    /// # Errors
    /// If the socket fails.
    fn send(&mut self, to: Recipients, message: Message) -> io::Result<()>;

    /// The next message, if one comes before this time of the monotonic clock.
    ///
    /// # Errors
    /// If the socket fails.
    fn receive(&mut self, until_ns: u64) -> io::Result<Option<Message>>;
}

/// UDP: a datagram for each recipient, or one for all.
#[derive(Debug)]
pub struct Udp {
    socket: UdpSocket,
    peers: Vec<SocketAddr>,
    broadcast: Option<SocketAddr>,
}

impl Udp {
    /// To peers one by one.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(socket: UdpSocket, peers: Vec<SocketAddr>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, peers, broadcast: None })
    }

    /// To everybody at once: the switch makes the copies.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn broadcast(socket: UdpSocket, to: SocketAddr) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_broadcast(true)?;
        Ok(Self { socket, peers: Vec::new(), broadcast: Some(to) })
    }
}

impl Transport for Udp {
    fn send(&mut self, to: Recipients, message: Message) -> io::Result<()> {
        let peers = to.numbers().filter_map(|number| self.peers.get(number));
        for address in self.broadcast.iter().chain(peers) {
            match self.socket.send_to(&message.to_bytes(), address) {
                Ok(_) => {}
                // A limiter that drops says so to some senders: the message is lost, as any may be.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn receive(&mut self, until_ns: u64) -> io::Result<Option<Message>> {
        // Larger than a message: what is cut off to its length is none.
        let mut bytes = [0; MESSAGE_BYTES + 1];
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(length) => {
                    let message = Message::from_bytes(&bytes[..length]);
                    if message.is_some() {
                        return Ok(message);
                    }
                }
                // A participant that has gone away answers with ICMP.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !readable(&[&self.socket], until_ns)? {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// TCP: a connection for each peer.
#[derive(Debug)]
pub struct Tcp {
    streams: Vec<(TcpStream, Vec<u8>)>,
    arrived: VecDeque<Message>,
}

impl Tcp {
    /// Over connections that stand.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(streams: Vec<TcpStream>) -> io::Result<Self> {
        for stream in &streams {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        let streams = streams.into_iter().map(|stream| (stream, Vec::new())).collect();
        Ok(Self { streams, arrived: VecDeque::new() })
    }

    /// Takes what has arrived on all connections.
    fn take(&mut self) -> io::Result<()> {
        for (stream, bytes) in &mut self.streams {
            let mut part = [0; 64 * MESSAGE_BYTES];
            match stream.read(&mut part) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => bytes.extend_from_slice(&part[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            let whole = bytes.len() - bytes.len() % MESSAGE_BYTES;
            for message in bytes.drain(..whole).as_slice().chunks_exact(MESSAGE_BYTES) {
                let message = Message::from_bytes(message);
                self.arrived.push_back(message.ok_or(io::ErrorKind::InvalidData)?);
            }
        }
        Ok(())
    }
}

impl Transport for Tcp {
    fn send(&mut self, to: Recipients, message: Message) -> io::Result<()> {
        for number in to.numbers() {
            if let Some((stream, _)) = self.streams.get_mut(number) {
                // Never more than some messages are on their way, and socket buffers hold thousands.
                stream.write_all(&message.to_bytes())?;
            }
        }
        Ok(())
    }

    fn receive(&mut self, until_ns: u64) -> io::Result<Option<Message>> {
        loop {
            if let Some(message) = self.arrived.pop_front() {
                return Ok(Some(message));
            }
            self.take()?;
            if self.arrived.is_empty() {
                let streams: Vec<&TcpStream> = self.streams.iter().map(|(stream, _)| stream).collect();
                if !readable(&streams, until_ns)? {
                    return Ok(None);
                }
            }
        }
    }
}

/// Waits until there is something to read; `false` if there is not before this time of the monotonic clock.
fn readable(sockets: &[&impl AsFd], until_ns: u64) -> io::Result<bool> {
    let left = until_ns.saturating_sub(monotonic_ns());
    let timeout = TimeSpec::new((left / 1_000_000_000) as i64, (left % 1_000_000_000) as i64);
    let mut waiting: Vec<PollFd<'_>> =
        sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    match ppoll(&mut waiting, Some(timeout), None) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Duration};

    use super::*;
    use crate::testbed::apps::commit::Kind;

    fn soon() -> u64 {
        monotonic_ns() + 2_000_000_000
    }

    fn question(transaction: u64) -> Message {
        Message { kind: Kind::Prepare, participant: 0, transaction }
    }

    fn udp() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    #[test]
    fn udp_goes_to_the_recipients_alone_and_what_is_no_message_is_left_out() {
        let (sockets, addresses): (Vec<UdpSocket>, Vec<SocketAddr>) = (0..3).map(|_| udp()).unzip();
        let mut coordinator = Udp::new(udp().0, addresses.clone()).unwrap();
        let (stranger, _) = udp();
        let mut participants: Vec<Udp> =
            sockets.into_iter().map(|socket| Udp::new(socket, Vec::new()).unwrap()).collect();
        for address in &addresses {
            stranger.send_to(b"neither long enough nor ours", address).unwrap();
        }
        coordinator.send(Recipients(0b101), question(7)).unwrap();
        assert_eq!(participants[0].receive(soon()).unwrap(), Some(question(7)));
        assert_eq!(participants[2].receive(soon()).unwrap(), Some(question(7)));
        assert_eq!(participants[1].receive(monotonic_ns()).unwrap(), None);
    }

    #[test]
    fn tcp_puts_messages_together_from_parts() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut near = Tcp::new(vec![listener.accept().unwrap().0]).unwrap();
        let bytes = [question(1).to_bytes(), question(2).to_bytes()].concat();
        let (first, rest) = bytes.split_at(5);
        far.write_all(first).unwrap();
        assert_eq!(near.receive(monotonic_ns() + 20_000_000).unwrap(), None);
        let sender = std::thread::spawn({
            let rest = rest.to_vec();
            move || {
                std::thread::sleep(Duration::from_millis(20));
                far.write_all(&rest).unwrap();
                far
            }
        });
        assert_eq!(near.receive(soon()).unwrap(), Some(question(1)));
        assert_eq!(near.receive(soon()).unwrap(), Some(question(2)));

        let mut far = sender.join().unwrap();
        near.send(Recipients(0b1), question(3)).unwrap();
        let mut answer = [0; MESSAGE_BYTES];
        far.read_exact(&mut answer).unwrap();
        assert_eq!(Message::from_bytes(&answer), Some(question(3)));
        drop(far);
        assert_eq!(near.receive(soon()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
