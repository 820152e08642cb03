//! Rare events that the programs tell of: the first packet of each plan, level and reason.
//!
//! The programs write them with aya-log into a ring buffer, which is pinned with the maps of the interface, so they wait there
//! for an agent that is not running. `EbpfLogger::init_from_id` would take CAP_SYS_ADMIN (`bpf_prog_get_fd_by_id`,
//! kernel/bpf/syscall.c), so the buffer is opened by its pin: by way of an object whose map is the pinned one and
//! whose programs are never loaded.

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::{Arc, Mutex},
    time::Duration,
};

use aya::EbpfLoader;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use qjump_ebpf::{Reason, names};
use tracing::{debug, warn};

use crate::dataplane::{self, Pins, loaded_interfaces, sys};

/// How often to look. Events wait in their buffer.
const PERIOD: Duration = Duration::from_secs(2);

/// The first packet of a plan that something rare happened to, at its level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where it left, or would have.
    pub interface: String,
    /// The level that it was counted at.
    pub level: u8,
    /// What happened.
    pub reason: Reason,
    /// Its size, L2 bytes with the headers of every segment.
    pub bytes: u32,
    /// As in an Ethernet header.
    pub protocol: u16,
}

impl Event {
    /// "LEVEL REASON BYTES PROTOCOL", the protocol in network byte order: `qj_tell` in ebpf/src/events.rs.
    fn parse(interface: &str, text: &str) -> Option<Self> {
        let numbers: Vec<u32> = text.split(' ').map(|word| word.parse().ok()).collect::<Option<_>>()?;
        let [level, reason, bytes, protocol] = numbers[..] else { return None };
        Some(Self {
            interface: interface.to_owned(),
            level: u8::try_from(level).ok()?,
            reason: *Reason::ALL.get(reason as usize)?,
            bytes,
            protocol: u16::from_be(u16::try_from(protocol).ok()?),
        })
    }

    /// What it means, and what to do about it.
    pub const fn meaning(&self) -> &'static str {
        match self.reason {
            Reason::OversizeDropped => {
                "a packet is larger than its level's largest and was dropped: make messages smaller, or plan with a larger max-packet"
            }
            Reason::OversizeDemoted => {
                "a packet is larger than its level's largest and left at level 0: make messages smaller, or plan with a larger max-packet"
            }
            Reason::NotConfigured => "a packet asks for a level that the plan does not have, and left at level 0",
            Reason::UnknownPriority => "a packet has a priority that names no level, and left at level 0",
            Reason::NonIp => "a frame is neither IP nor ARP, and left at level 0",
            Reason::Malformed => "a frame has a header that contradicts itself, and left as it was",
            Reason::Contended => {
                "a packet was dropped because CPUs were in each other's way at its level, or the plan changed"
            }
            Reason::MarkFailed => "a packet was dropped because its header could not be written",
            Reason::BeyondHorizon => {
                "a packet was dropped because it would have had to wait too long: more is sent at its level than the level may send"
            }
            Reason::NotGranted => "a packet asks for a level that its socket was not granted, and left at level 0",
            Reason::Passed | Reason::OverLimit | Reason::OverDemoted => "a packet was counted",
        }
    }
}

/// Takes what a program of this interface tells.
struct Teller {
    interface: String,
    told: Arc<Mutex<Vec<Event>>>,
}

impl Log for Teller {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        match (Event::parse(&self.interface, &text), self.told.lock()) {
            (Some(event), Ok(mut told)) => told.push(event),
            _ => warn!(interface = self.interface, "an event of another version of the program: {text}"),
        }
    }

    fn flush(&self) {}
}

/// The buffers of the interfaces of this host.
#[derive(Default)]
pub struct Buffers {
    open: HashMap<String, Buffer>,
    told: Arc<Mutex<Vec<Event>>>,
    /// Once it was needed.
    loader: Option<EbpfLoader<'static>>,
}

struct Buffer {
    /// Of its pin: another load after an unload makes another one.
    inode: u64,
    events: EbpfLogger<Teller>,
}

impl Buffers {
    /// What was told since the last time, of all interfaces that qjump is loaded on now.
    pub fn read(&mut self) -> Vec<Event> {
        match loaded_interfaces() {
            Ok(names) => {
                self.open.retain(|name, _| names.contains(name));
                let mut tried = false;
                for name in &names {
                    tried |= self.follow(name);
                }
                if tried {
                    sys::give_memory_back();
                }
            }
            Err(error) => debug!("the loaded interfaces cannot be listed: {error}"),
        }
        self.open.values_mut().for_each(|buffer| buffer.events.flush());
        self.told.lock().map(|mut told| std::mem::take(&mut *told)).unwrap_or_default()
    }

    /// Opens the buffer of an interface, unless it is open already. Whether it tried.
    fn follow(&mut self, name: &str) -> bool {
        let path = Pins::of(name).map(names::EVENTS);
        // Pins of an older qjump have none.
        let Ok(inode) = fs::metadata(&path).map(|pin| pin.ino()) else { return false };
        if self.open.get(name).is_some_and(|open| open.inode == inode) {
            return false;
        }
        let Ok(map) = sys::open_pin(&path).and_then(|fd| sys::map_info(fd.as_fd())) else { return false };
        let teller = Teller { interface: name.to_owned(), told: Arc::clone(&self.told) };
        let loader = self.loader.get_or_insert_with(dataplane::loader);
        match open(loader, map.shape.max_entries, teller) {
            Ok(events) => drop(self.open.insert(name.to_owned(), Buffer { inode, events })),
            Err(error) => debug!(interface = name, "its events cannot be read: {error}"),
        }
        true
    }
}

/// Opens the pinned buffer, which has so many bytes: aya would take it to have as many as the object says.
fn open(loader: &mut EbpfLoader<'_>, bytes: u32, teller: Teller) -> io::Result<EbpfLogger<Teller>> {
    let interface = &teller.interface;
    let mut object = loader
        .map_pin_path(names::EVENTS, Pins::of(interface).map(names::EVENTS))
        .map_max_entries(names::EVENTS, bytes)
        .load(dataplane::object().map_err(io::Error::other)?)
        .map_err(io::Error::other)?;
    EbpfLogger::init_with_logger(&mut object, teller).map_err(io::Error::other)
}

/// Writes events to the log until the task is aborted.
pub async fn watch() {
    let mut buffers = Buffers::default();
    loop {
        let read = tokio::task::spawn_blocking(move || {
            let told = buffers.read();
            (buffers, told)
        });
        let told;
        (buffers, told) = read.await.unwrap_or_default();
        for event in told {
            warn!(
                interface = event.interface,
                level = event.level,
                reason = event.reason.name(),
                bytes = event.bytes,
                protocol = format_args!("{:#06x}", event.protocol),
                "first of this plan: {}",
                event.meaning()
            );
        }
        tokio::time::sleep(PERIOD).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_program_tells() {
        let protocol = 0x88cc_u16.to_be();
        let interface = "eth0".to_owned();
        let event = Event { interface, level: 5, reason: Reason::OversizeDropped, bytes: 1514, protocol: 0x88cc };
        assert_eq!(Event::parse("eth0", &format!("5 2 1514 {protocol}")), Some(event));
        for text in ["", "5 2 1514", "5 99 1514 8", "5 2 1514 8 1", "5 2 -1 8", "300 2 1 8", "5 2 1 70000"] {
            assert_eq!(Event::parse("eth0", text), None, "{text}");
        }
    }

    #[test]
    fn every_rare_reason_has_a_meaning() {
        let meaning = |reason| Event { interface: String::new(), level: 1, reason, bytes: 1, protocol: 0 }.meaning();
        for reason in Reason::ALL.into_iter().filter(|reason| reason.is_rare()) {
            assert_ne!(meaning(reason), meaning(Reason::Passed), "{}", reason.name());
        }
    }
}
