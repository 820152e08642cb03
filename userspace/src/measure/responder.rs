//! The other side of a train: answers each probe once.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd,
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
};

use super::{
    Priority,
    clock::{Vigil, real_ns},
    endpoint::{Endpoint, Received, Sent, sleep},
    give_up_real_time, pin_and_prioritise,
    recorder::PeerCounts,
    stamping::{Place, Stamp},
    window::{Arrival, Window},
    wire::{Kind, Left, Message, Times},
};
use crate::dataplane::sys::monotonic_ns;

/// Answers whose stamps have not been told yet.
const UNTOLD: usize = 1024;

/// An answer that is on its way out.
#[derive(Clone, Copy, Debug, Default)]
struct Leaving {
    number: u64,
    sequence: u32,
    sending_ns: u64,
    sched_ns: Option<u32>,
}

/// Answers the probes of one train.
pub struct Responder {
    token: u32,
    /// Otherwise what comes is not even read.
    answering: bool,
    endpoint: Endpoint,
    window: Window,
    counts: PeerCounts,
    answers: u64,
    leaving: Box<[Leaving]>,
    untold: VecDeque<Left>,
    /// Answers whose stamps have not been fetched.
    unfetched: u32,
    closed: bool,
}

impl Responder {
    /// For the train with this token; one that is not `answering` only takes up what is sent to it.
    pub fn new(token: u32, endpoint: Endpoint, answering: bool) -> Self {
        Self {
            token,
            answering,
            endpoint,
            window: Window::new(),
            counts: PeerCounts::default(),
            answers: 0,
            leaving: vec![Leaving::default(); UNTOLD].into(),
            untold: VecDeque::with_capacity(UNTOLD),
            unfetched: 0,
            closed: false,
        }
    }

    /// Answers a greeting that another socket got.
    pub fn welcome(&mut self, hello: &Message) -> io::Result<()> {
        self.message(hello, Stamp::default())
    }

    /// What it counted, and the stamps that no answer has carried.
    pub fn finish(mut self) -> (PeerCounts, Vec<Left>) {
        // What is still missing now was dropped.
        let _ = self.fetch_stamps();
        (self.counts, self.untold.into())
    }

    /// Answers the next probe, if there is one. Whether there was anything.
    fn turn(&mut self) -> io::Result<bool> {
        if self.closed || !self.answering || (self.endpoint.is_blocked() && self.endpoint.flush()? == Sent::Full) {
            return Ok(false);
        }
        match self.endpoint.receive()? {
            Received::Message(message, rx) if message.token == self.token => self.message(&message, rx)?,
            // Not of this train; perhaps of one before on the same ports.
            Received::Message(..) => {}
            Received::Corrupted => self.counts.corrupted += 1,
            Received::Nothing => return Ok(false),
            // Over UDP, the client may come back.
            Received::Closed => self.closed = self.endpoint.transport() == super::Transport::Tcp,
        }
        Ok(true)
    }

    fn message(&mut self, message: &Message, rx: Stamp) -> io::Result<()> {
        let received_ns = real_ns();
        let answer = match message.kind {
            Kind::Probe => Kind::Answer,
            Kind::Hello => Kind::Welcome,
            Kind::Answer | Kind::Welcome => return Ok(()),
        };
        if answer == Kind::Answer && !self.count(message) {
            return Ok(());
        }
        let left = if answer == Kind::Answer { self.untold.pop_front() } else { None };
        let sending_ns = real_ns();
        let times = Times { rx_ns: rx.software_ns, received_ns, sending_ns, left };
        self.endpoint.prepare(&Message { kind: answer, times: Some(times), ..*message });
        match self.endpoint.send()? {
            Sent::Given => {}
            Sent::Dropped => self.counts.refused += 1,
            sent @ (Sent::Full | Sent::Closed) => {
                self.counts.refused += 1;
                self.answers += u64::from(sent == Sent::Closed);
                self.untold.extend(left);
                return Ok(());
            }
        }
        let number = self.answers;
        self.answers += 1;
        if message.stamped {
            let leaving = Leaving { number, sequence: message.sequence, sending_ns, sched_ns: None };
            self.leaving[number as usize % UNTOLD] = leaving;
            self.unfetched += 1;
        }
        Ok(())
    }

    /// Whether the probe is the first of its number.
    fn count(&mut self, message: &Message) -> bool {
        let arrival = self.window.insert(u64::from(message.sequence));
        let counted = u64::from(!message.warm_up);
        match arrival {
            Arrival::InOrder => self.counts.received += counted,
            Arrival::Reordered => {
                self.counts.received += counted;
                self.counts.reordered += counted;
            }
            Arrival::Duplicate | Arrival::TooOld => self.counts.duplicated += counted,
        }
        matches!(arrival, Arrival::InOrder | Arrival::Reordered)
    }

    fn fetch_stamps(&mut self) -> io::Result<()> {
        self.unfetched = 0;
        let Self { endpoint, leaving, untold, .. } = self;
        endpoint.left(|number, left| {
            let answer = &mut leaving[number as usize % UNTOLD];
            let Some(at) = left.stamp.software_ns.filter(|_| answer.number == number && answer.sending_ns > 0) else {
                return;
            };
            let since = at.checked_sub(answer.sending_ns).and_then(|ns| u32::try_from(ns).ok());
            match left.place {
                Place::Sched => answer.sched_ns = answer.sched_ns.or(since),
                Place::Snd => {
                    if untold.len() == UNTOLD {
                        untold.pop_front();
                    }
                    untold.push_back(Left { sequence: answer.sequence, sched_ns: answer.sched_ns, snd_ns: since });
                    // Once only.
                    answer.sending_ns = 0;
                }
            }
        })?;
        Ok(())
    }
}

/// Probes that are answered in a row before stamps are fetched.
const CROWD: u32 = 16;
/// How often a sleeping server looks whether it is to end.
const LOOK_NS: u64 = 50_000_000;

/// Answers until `stop`, for those in `responders` and those who join them; each comes with the number of its train.
/// After each probe the thread watches its sockets for `spin_ns` before it sleeps. It is pinned to `cpu`, with real-time
/// priority if that is allowed, unless there is none.
///
/// # Errors
/// If a socket fails.
pub fn respond(
    responders: &mut Vec<(usize, Responder)>,
    joining: Option<&mut mpsc::Receiver<(usize, Responder)>>,
    cpu: Option<usize>,
    spin_ns: u64,
    stop: &AtomicBool,
) -> io::Result<Option<Priority>> {
    let mut priority = cpu.map(pin_and_prioritise);
    let (mut busy_until, mut vigil) = (0, Vigil::new(monotonic_ns()));
    while !stop.load(Relaxed) {
        let mut busy = false;
        for (_, responder) in responders.iter_mut() {
            busy |= responder.turn()?;
        }
        // In a row of probes the stamps must not fill the socket's buffer.
        let most = if busy { CROWD } else { 0 };
        for (_, responder) in responders.iter_mut().filter(|(_, responder)| responder.unfetched > most) {
            responder.fetch_stamps()?;
        }
        let now = monotonic_ns();
        if vigil.look(now) && priority == Some(Priority::RealTime) {
            priority = Some(give_up_real_time());
        }
        if busy {
            busy_until = now + spin_ns;
            continue;
        }
        if now < busy_until {
            std::hint::spin_loop();
            continue;
        }
        responders.extend(joining.iter().flat_map(|joining| joining.try_iter()));
        let read = responders.iter().map(|(_, responder)| responder);
        let read = read.filter(|responder| responder.answering && !responder.closed);
        sleep(read.map(|responder| (responder.endpoint.as_fd(), responder.endpoint.is_blocked())), LOOK_NS)?;
        vigil.slept(now, monotonic_ns());
        // A report of a packet that left ends the sleep, too.
        responders.iter_mut().for_each(|(_, responder)| responder.unfetched += 1);
    }
    Ok(priority)
}
