//! A wire that does what it likes with probes, and says what it did.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

/// What was done to packets that count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Probes that were not passed on.
    pub lost_up: u64,
    /// Answers that were not.
    pub lost_down: u64,
    /// Packets that were passed on twice.
    pub duplicated: u64,
    /// Packets that were passed on behind the next.
    pub reordered: u64,
    /// Probes of which a bit was changed.
    pub corrupted_up: u64,
    /// Answers of which one was.
    pub corrupted_down: u64,
}

/// A relay on loopback, TCP and UDP on one port, in front of a server. Its threads end with it.
pub struct Relay {
    /// Where clients find it.
    pub address: SocketAddr,
    done: Arc<Mutex<Done>>,
    stop: Arc<AtomicBool>,
}

impl Relay {
    /// In front of a server.
    pub fn new(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let (done, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let front = UdpSocket::bind(address)?;
        let back = UdpSocket::bind("127.0.0.1:0")?;
        back.connect(server)?;
        for socket in [&front, &back] {
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        }
        listener.set_nonblocking(true)?;
        let relay = Self { address, done, stop };
        let client = Arc::new(Mutex::new(None));
        relay.carry(front.try_clone()?, back.try_clone()?, Arc::clone(&client), true);
        relay.carry(back, front, client, false);
        let stop = Arc::clone(&relay.stop);
        thread::spawn(move || {
            while !stop.load(Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => drop(pipe(client, server, &stop)),
                    Err(_) => thread::sleep(Duration::from_millis(20)),
                }
            }
        });
        Ok(relay)
    }

    /// What was done so far.
    pub fn done(&self) -> Done {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries packets one way.
    fn carry(&self, from: UdpSocket, to: UdpSocket, client: Arc<Mutex<Option<SocketAddr>>>, up: bool) {
        let (done, stop) = (Arc::clone(&self.done), Arc::clone(&self.stop));
        thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            let (mut count, mut held): (u64, Option<Vec<u8>>) = (0, None);
            while !stop.load(Relaxed) {
                let Ok((length, sender)) = from.recv_from(&mut packet) else { continue };
                if up {
                    *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
                }
                let send = |packet: &[u8]| {
                    let client = *client.lock().unwrap_or_else(PoisonError::into_inner);
                    let _ =
                        if up { to.send(packet) } else { client.map_or(Ok(0), |client| to.send_to(packet, client)) };
                };
                let packet = &mut packet[..length];
                // Probes and answers beyond the warm-up: see `measure::wire`.
                if length < 16 || !matches!(packet[12], 1 | 2) || packet[13] & 1 != 0 {
                    send(packet);
                    continue;
                }
                count += 1;
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(held) = held.take() {
                    send(packet);
                    send(&held);
                    done.reordered += 1;
                    continue;
                }
                match count % 50 {
                    5 if up => done.lost_up += 1,
                    15 if !up => done.lost_down += 1,
                    25 => {
                        send(packet);
                        send(packet);
                        done.duplicated += 1;
                    }
                    35 => held = Some(packet.to_vec()),
                    45 => {
                        // Another one each time.
                        let bit = (count as usize / 50 * 7) % (length * 8);
                        packet[bit / 8] ^= 1 << (bit % 8);
                        send(packet);
                        *(if up { &mut done.corrupted_up } else { &mut done.corrupted_down }) += 1;
                    }
                    _ => send(packet),
                }
            }
        });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// A TCP connection, passed on as it is.
fn pipe(client: TcpStream, server: SocketAddr, stop: &Arc<AtomicBool>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    client.set_nonblocking(false)?;
    for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
        from.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::clone(stop);
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !stop.load(Relaxed) {
                match from.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(count) => {
                        if to.write_all(&bytes[..count]).is_err() {
                            break;
                        }
                    }
                    Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                    Err(_) => break,
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
    Ok(())
}
