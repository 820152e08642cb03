//! What became of the probes of one train. Pure: every time is an argument.
//!
//! Memory does not grow with the number of probes: what is known of a probe is kept in a ring until the probe's time is
//! up, and goes into histograms.

use super::{
    Latencies,
    clock::Moment,
    result::{Counts, Sample, Segment, Stream, Worst},
    stamping::{Left, Place, Stamp},
    wire,
};

/// How the clocks of the two sides compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clocks {
    /// They are one clock.
    Same,
    /// They differ by at most so much, ns, as somebody has said.
    Within(u64),
    /// Nobody knows. Times from one side to the other are not reported then.
    Unknown,
}

/// What the samples of a train are held against, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// One message to the other side.
    pub up_ns: Option<u64>,
    /// One message back.
    pub down_ns: Option<u64>,
}

impl Bounds {
    /// A round trip has a bound only if both ways have.
    pub fn round_trip_ns(self) -> Option<u64> {
        Some(self.up_ns? + self.down_ns?)
    }
}

/// What the other side counted of a train, without the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PeerCounts {
    /// Probes, each once.
    pub received: u64,
    /// Came again.
    pub duplicated: u64,
    /// Came after a later one.
    pub reordered: u64,
    /// Came changed.
    pub corrupted: u64,
    /// Answers that its kernel refused to send.
    pub refused: u64,
}

/// What is known of a probe.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    due_ns: u64,
    sent: Moment,
    late_ns: u64,
    warm_up: bool,
    stamped: bool,
    sched_ns: Option<u64>,
    snd: Stamp,
    answer: Option<Answer>,
    peer_left: Option<wire::Left>,
}

#[derive(Clone, Copy, Debug)]
struct Answer {
    at: Moment,
    rx: Stamp,
    peer: Option<wire::Times>,
    /// Whether the clocks went on evenly since the probe was sent.
    steady: bool,
}

/// The parts of a probe's way, in its order. `peer` is the other side.
const SEGMENTS: [&str; SEGMENT_COUNT] = [
    "app-sched",
    "sched-snd",
    "snd-rx",
    "peer rx-app",
    "peer app-app",
    "peer app-sched",
    "peer sched-snd",
    "snd-rx back",
    "rx-app",
    "snd-rx both ways",
    "app-sched and rx-app",
    "hardware both ways",
];
const SEGMENT_COUNT: usize = 12;
/// From here on they are made of those before.
const FIRST_SUM: usize = 9;
/// Those that compare the clocks of the two sides.
const ACROSS: [usize; 2] = [2, 7];
/// Those that need the other side's times.
const PEER: [usize; 7] = [2, 3, 4, 5, 6, 7, 9];
const HARDWARE: usize = 11;

/// The largest samples that are kept.
const WORST: usize = 10;

/// How a train is to be recorded.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `udp level 7`.
    pub name: String,
    /// The level.
    pub level: u8,
    /// What it is held against.
    pub bounds: Bounds,
    /// How the clocks compare.
    pub clocks: Clocks,
    /// Whether answers carry the other side's times.
    pub stamped: bool,
    /// A probe that is not answered after so long is lost, ns.
    pub timeout_ns: u64,
    /// Probes that may be on their way at once: as many as are sent in `timeout_ns`.
    pub outstanding: usize,
    /// When the run began, `CLOCK_MONOTONIC`, ns.
    pub start_ns: u64,
}

/// Probes a second that the kernels are asked to stamp.
pub const MOST_STAMPED: u64 = 10_000;

/// The largest [`Settings::outstanding`].
pub const MOST_OUTSTANDING: usize = 1 << 18;

/// See the module.
pub struct Recorder {
    settings: Settings,
    ring: Box<[Slot]>,
    /// The numbers in the ring: from the first to before the second.
    oldest: u64,
    next: u64,
    waiting: u64,
    highest_answered: Option<u64>,
    counts: Counts,
    late_answers: u64,
    dropped_here: u64,
    clock_steps: u64,
    unstamped: u64,
    response: Latencies,
    service: Latencies,
    lateness: Latencies,
    up: Latencies,
    up_service: Latencies,
    down: Latencies,
    segments: Vec<(Latencies, u64)>,
    worst: Vec<Worst>,
    interval: Box<Latencies>,
    interval_lost: u64,
}

/// What happened to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is a sample, or one of the warm-up: the round trip, ns.
    Answered(u64),
    /// It came before.
    Duplicate,
    /// Its probe counts as lost already, or there was no such.
    Late,
}

/// Further than this, and a thousandth of the time between, the clocks do not go on evenly: reading both is not
/// atomic, and NTP turns one of them by up to 500 parts in a million.
const STEP_NS: u64 = 20_000;

impl Recorder {
    /// Nothing sent yet.
    pub fn new(settings: Settings) -> Self {
        let size = settings.outstanding.clamp(16, MOST_OUTSTANDING).next_power_of_two();
        Self {
            ring: vec![Slot::default(); size].into(),
            oldest: 0,
            next: 0,
            waiting: 0,
            highest_answered: None,
            counts: Counts::default(),
            late_answers: 0,
            dropped_here: 0,
            clock_steps: 0,
            unstamped: 0,
            response: Latencies::new(settings.bounds.round_trip_ns()),
            service: Latencies::new(None),
            lateness: Latencies::new(None),
            up: Latencies::new(settings.bounds.up_ns),
            up_service: Latencies::new(None),
            down: Latencies::new(settings.bounds.down_ns),
            segments: vec![(Latencies::new(None), 0); SEGMENT_COUNT],
            worst: Vec::with_capacity(WORST + 1),
            interval: Box::new(Latencies::new(None)),
            interval_lost: 0,
            settings,
        }
    }

    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let index = (number % self.ring.len() as u64) as usize;
        (self.oldest..self.next).contains(&number).then(|| &mut self.ring[index])
    }

    /// The next probe goes out: it was due at `due_ns`, and `late_ns` of what it is late is the sender's own fault. Only one
    /// that is to be `stamped` counts for the segments.
    pub fn sent(&mut self, due_ns: u64, late_ns: u64, at: Moment, warm_up: bool, stamped: bool) {
        if self.next - self.oldest == self.ring.len() as u64 {
            self.settle_oldest();
        }
        let number = self.next;
        self.next += 1;
        self.waiting += 1;
        let slot = Slot { due_ns, sent: at, late_ns, warm_up, stamped, ..Slot::default() };
        *self.slot(number).expect("there is room") = slot;
        if !warm_up {
            self.counts.sent += 1;
            self.unstamped += u64::from(!stamped);
            self.lateness.record(late_ns);
        }
    }

    /// The kernel dropped the latest probe before it left.
    pub fn refused(&mut self) {
        if self.next > 0 && self.slot(self.next - 1).is_some_and(|slot| !slot.warm_up) {
            self.counts.refused += 1;
        }
    }

    /// The kernel stamped a probe on its way out.
    pub fn left(&mut self, number: u64, left: &Left) {
        let Some(slot) = self.slot(number) else { return };
        match left.place {
            Place::Sched => slot.sched_ns = slot.sched_ns.or(left.stamp.software_ns),
            // Software and hardware report one after the other; a segment that TCP sends again is stamped again.
            Place::Snd => {
                slot.snd.software_ns = slot.snd.software_ns.or(left.stamp.software_ns);
                slot.snd.hardware_ns = slot.snd.hardware_ns.or(left.stamp.hardware_ns);
            }
        }
    }

    /// Something came that is no whole message.
    pub const fn corrupted(&mut self) {
        self.counts.corrupted += 1;
    }

    /// An answer came.
    pub fn answered(&mut self, sequence: u32, rx: Stamp, at: Moment, peer: Option<wire::Times>) -> Outcome {
        if let Some(left) = peer.and_then(|times| times.left) {
            self.peer_left(left);
        }
        let number = u64::from(sequence);
        let Some(slot) = self.slot(number) else {
            self.late_answers += 1;
            return Outcome::Late;
        };
        if slot.answer.is_some() {
            let counted = !slot.warm_up;
            self.counts.duplicated += u64::from(counted);
            return Outcome::Duplicate;
        }
        let round_trip = at.monotonic_ns.saturating_sub(slot.sent.monotonic_ns);
        let by_the_other = at.real_ns.checked_sub(slot.sent.real_ns);
        let steady = by_the_other.is_some_and(|time| time.abs_diff(round_trip) <= STEP_NS + round_trip / 1000);
        slot.answer = Some(Answer { at, rx, peer, steady });
        let slot = *slot;
        self.waiting -= 1;
        if !slot.warm_up {
            self.sample(number, &slot, at, round_trip, steady);
        }
        Outcome::Answered(round_trip)
    }

    fn sample(&mut self, number: u64, slot: &Slot, at: Moment, round_trip: u64, steady: bool) {
        self.counts.received += 1;
        if self.highest_answered.is_some_and(|highest| number < highest) {
            self.counts.reordered += 1;
        }
        self.highest_answered = self.highest_answered.max(Some(number));
        self.clock_steps += u64::from(!steady);
        let response = at.monotonic_ns.saturating_sub(slot.due_ns);
        self.response.record(response);
        self.interval.record(response);
        self.service.record(round_trip);
        if self.worst.len() < WORST || self.worst.last().is_some_and(|least| response > least.ns) {
            let place = self.worst.partition_point(|worse| worse.ns >= response);
            let at_ns = slot.due_ns.saturating_sub(self.settings.start_ns);
            self.worst.insert(place, Worst { sequence: number, at_ns, ns: response, lateness_ns: slot.late_ns });
            self.worst.truncate(WORST);
        }
    }

    /// The other side says when it sent an answer.
    pub fn peer_left(&mut self, left: wire::Left) {
        if let Some(slot) = self.slot(u64::from(left.sequence)) {
            slot.peer_left = Some(left);
        }
    }

    /// Probes whose answers may still come.
    pub const fn waiting(&self) -> u64 {
        self.waiting
    }

    /// The number of the next probe.
    pub const fn next_number(&self) -> u64 {
        self.next
    }

    /// When the oldest probe's time will be up, `CLOCK_MONOTONIC`, ns.
    pub fn deadline_ns(&self) -> Option<u64> {
        let oldest = &self.ring[(self.oldest % self.ring.len() as u64) as usize];
        (self.oldest < self.next).then_some(oldest.sent.monotonic_ns + self.settings.timeout_ns)
    }

    /// Settles the probes whose time is up.
    pub fn expire(&mut self, now_ns: u64) {
        while self.deadline_ns().is_some_and(|deadline| deadline <= now_ns) {
            self.settle_oldest();
        }
    }

    fn settle_oldest(&mut self) {
        let slot = *self.slot(self.oldest).expect("there is one");
        self.oldest += 1;
        self.waiting -= u64::from(slot.answer.is_none());
        if slot.warm_up {
            return;
        }
        let Some(answer) = slot.answer else {
            self.interval_lost += 1;
            self.dropped_here += u64::from(slot.sched_ns.is_some() && slot.snd.software_ns.is_none());
            return;
        };
        let times = if answer.steady { segments(&slot, &answer, self.settings.clocks) } else { [None; SEGMENT_COUNT] };
        for ((latencies, missing), time) in self.segments.iter_mut().zip(times).filter(|_| slot.stamped) {
            match time {
                Some(time) => latencies.record(time),
                None => *missing += 1,
            }
        }
        if let Some(peer) = answer.peer.filter(|_| answer.steady) {
            self.one_way(&slot, &answer, &peer);
        }
    }

    fn one_way(&mut self, slot: &Slot, answer: &Answer, peer: &wire::Times) {
        let between = |from, to| across(self.settings.clocks, Some(from), Some(to));
        // The intended time, on the clock that both sides know.
        let due = slot.sent.real_ns - slot.sent.monotonic_ns.saturating_sub(slot.due_ns);
        if let (Some(response), Some(service)) =
            (between(due, peer.received_ns), between(slot.sent.real_ns, peer.received_ns))
        {
            self.up.record(response);
            self.up_service.record(service);
        }
        if let Some(time) = between(peer.sending_ns, answer.at.real_ns) {
            self.down.record(time);
        }
    }

    /// The samples and losses since the last call. `empty` takes the place of the histogram.
    pub fn take_interval(&mut self, mut empty: Box<Latencies>) -> (Box<Latencies>, u64) {
        empty.clear();
        (std::mem::replace(&mut self.interval, empty), std::mem::take(&mut self.interval_lost))
    }

    /// Whether there were samples or losses since the last call of [`Self::take_interval`].
    pub fn has_interval(&self) -> bool {
        self.interval.samples() > 0 || self.interval_lost > 0
    }

    /// What has been sent and answered so far, without the warm-up.
    pub const fn so_far(&self) -> (u64, u64) {
        (self.counts.sent, self.counts.received)
    }

    /// Ends the recording: what has no answer is lost. First the round trips, then, as far as the clocks are known, each
    /// way alone; and what a reader must know.
    pub fn finish(mut self, peer: Option<PeerCounts>) -> (Vec<Stream>, Vec<String>) {
        while self.oldest < self.next {
            self.settle_oldest();
        }
        let notes = self.notes(peer);
        let counts = self.final_counts(peer);
        let mut streams = vec![Stream {
            name: self.settings.name.clone(),
            sample: Sample::Rtt,
            level: Some(self.settings.level),
            bound_ns: self.settings.bounds.round_trip_ns(),
            violations: self.settings.bounds.round_trip_ns().map(|_| self.response.violations()),
            response: self.response.distribution(),
            service: Some(self.service.distribution()),
            lateness: Some(self.lateness.distribution()),
            segments: self.final_segments(),
            counts: Some(counts),
            worst: std::mem::take(&mut self.worst),
            series: Vec::new(),
            generator: None,
        }];
        let bounds = self.settings.bounds;
        // An answer is sent when it is made: there is no schedule that it could be late for.
        let ways = [("up", &self.up, Some(&self.up_service), bounds.up_ns), ("down", &self.down, None, bounds.down_ns)];
        let ways = ways.into_iter().filter(|(_, response, ..)| response.samples() > 0);
        streams.extend(ways.map(|(way, response, service, bound_ns)| Stream {
            name: format!("{} {way}", self.settings.name),
            sample: Sample::OneWay,
            level: Some(self.settings.level),
            bound_ns,
            violations: bound_ns.map(|_| response.violations()),
            response: response.distribution(),
            service: service.map(Latencies::distribution),
            ..Stream::default()
        }));
        (streams, notes)
    }

    fn final_counts(&self, peer: Option<PeerCounts>) -> Counts {
        let own = self.counts;
        let peer_or_none = peer.unwrap_or_default();
        Counts {
            lost: own.sent - own.received,
            lost_up: peer.map(|peer| own.sent.saturating_sub(peer.received)),
            lost_down: peer.map(|peer| peer.received.saturating_sub(own.received)),
            duplicated: own.duplicated + peer_or_none.duplicated,
            reordered: own.reordered + peer_or_none.reordered,
            corrupted: own.corrupted + peer_or_none.corrupted,
            ..own
        }
    }

    fn final_segments(&self) -> Vec<Segment> {
        let Settings { clocks, stamped, .. } = self.settings;
        let applies = |index: &usize| {
            (clocks != Clocks::Unknown || !ACROSS.contains(index))
                && (stamped || !PEER.contains(index))
                && (*index != HARDWARE || self.segments[HARDWARE].0.samples() > 0)
        };
        (0..SEGMENT_COUNT)
            .filter(applies)
            .map(|index| {
                let (times, missing) = &self.segments[index];
                Segment {
                    name: SEGMENTS[index].to_owned(),
                    sum: index >= FIRST_SUM,
                    times: times.distribution(),
                    missing: *missing,
                }
            })
            .collect()
    }

    fn notes(&self, peer: Option<PeerCounts>) -> Vec<String> {
        let name = &self.settings.name;
        let mut notes = Vec::new();
        let mut note = |count: u64, text: &str| {
            if count > 0 {
                notes.push(format!("{name}: {count} {text}"));
            }
        };
        note(self.late_answers, "answers came after their probes counted as lost; a longer --timeout counts them");
        let lost = if self.unstamped > 0 { "of the lost probes that were stamped" } else { "of the lost probes" };
        note(self.dropped_here, &format!("{lost} did not leave this host: they reached its queues, and no device"));
        note(
            self.clock_steps,
            "probes met a step of this host's clock; they are no part of the segments and the one-way times",
        );
        note(peer.map_or(0, |peer| peer.refused), "answers were refused by the other side's kernel");
        if self.unstamped > 0 {
            notes.push(format!(
                "{name}: the segments are those of {} of {} probes: the stamps of more than {MOST_STAMPED} a second \
                 would take much of the time that is measured",
                self.counts.sent - self.unstamped,
                self.counts.sent
            ));
        }
        if !self.settings.stamped {
            notes.push(format!(
                "{name}: messages of less than {} bytes do not carry the other side's times",
                wire::STAMPED
            ));
        }
        notes
    }
}

/// From a time of one side to one of the other, if the clocks are known to agree well enough for it.
fn across(clocks: Clocks, from: Option<u64>, to: Option<u64>) -> Option<u64> {
    let (from, to) = (from?, to?);
    match clocks {
        Clocks::Same => to.checked_sub(from),
        Clocks::Within(bound) => (to + bound).checked_sub(from).map(|time| time.saturating_sub(bound)),
        Clocks::Unknown => None,
    }
}

fn segments(slot: &Slot, answer: &Answer, clocks: Clocks) -> [Option<u64>; SEGMENT_COUNT] {
    let after = |from: Option<u64>, to: Option<u64>| to?.checked_sub(from?);
    let (sent, received) = (Some(slot.sent.real_ns), Some(answer.at.real_ns));
    let (sched, snd, rx) = (slot.sched_ns, slot.snd.software_ns, answer.rx.software_ns);
    let peer_rx = answer.peer.and_then(|peer| peer.rx_ns);
    let peer_received = answer.peer.map(|peer| peer.received_ns);
    let peer_sending = answer.peer.map(|peer| peer.sending_ns);
    let peer_left = |ns: fn(&wire::Left) -> Option<u32>| slot.peer_left.as_ref().and_then(ns).map(u64::from);
    let (peer_sched, peer_snd) = (peer_left(|left| left.sched_ns), peer_left(|left| left.snd_ns));
    let peer_snd_at = peer_sending.zip(peer_snd).map(|(sending, snd)| sending + snd);
    let sum = |one: Option<u64>, other: Option<u64>| Some(one? + other?);
    [
        after(sent, sched),
        after(sched, snd),
        across(clocks, snd, peer_rx),
        after(peer_rx, peer_received),
        after(peer_received, peer_sending),
        peer_sched,
        after(peer_sched, peer_snd),
        across(clocks, peer_snd_at, rx),
        after(rx, received),
        // The other side's clock only measures its own time: no clocks need to agree.
        after(after(peer_rx, peer_snd_at), after(snd, rx)),
        sum(after(sent, sched), after(rx, received)),
        after(slot.snd.hardware_ns, answer.rx.hardware_ns),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    /// What the real clock shows when the monotonic one shows 0.
    const EPOCH: u64 = 1_700_000_000_000 * MS;

    fn at(ns: u64) -> Moment {
        Moment { monotonic_ns: ns, real_ns: EPOCH + ns }
    }

    fn software(ns: u64) -> Stamp {
        Stamp { software_ns: Some(EPOCH + ns), hardware_ns: None }
    }

    fn recorder(clocks: Clocks) -> Recorder {
        Recorder::new(Settings {
            name: "udp level 7".to_owned(),
            level: 7,
            bounds: Bounds { up_ns: Some(10_000), down_ns: Some(20_000) },
            clocks,
            stamped: true,
            timeout_ns: 100 * MS,
            outstanding: 16,
            start_ns: 0,
        })
    }

    /// The other side's times: its clock shows `offset` more than ours.
    fn peer(received: u64, sending: u64, offset: u64) -> Option<wire::Times> {
        let (received_ns, sending_ns) = (EPOCH + received + offset, EPOCH + sending + offset);
        Some(wire::Times { rx_ns: Some(received_ns - 2_000), received_ns, sending_ns, left: None })
    }

    /// A probe that was due at `due`, sent 500 ns late, and took 20 us and 1 us over there.
    fn round_trip(recorder: &mut Recorder, due: u64, offset: u64) {
        let (number, sent) = (recorder.next_number(), due + 500);
        recorder.sent(due, 500, at(sent), false, true);
        let stamp = |place, ns| Left { id: 0, place, stamp: software(sent + ns) };
        recorder.left(number, &stamp(Place::Sched, 1_000));
        recorder.left(number, &stamp(Place::Snd, 2_500));
        let times = peer(sent + 10_000, sent + 11_000, offset);
        recorder.answered(number as u32, software(sent + 17_000), at(sent + 20_000), times);
        recorder.peer_left(wire::Left { sequence: number as u32, sched_ns: Some(700), snd_ns: Some(1_900) });
    }

    fn segment<'a>(stream: &'a Stream, name: &str) -> Option<&'a Segment> {
        stream.segments.iter().find(|segment| segment.name == name)
    }

    #[test]
    fn splits_the_way_of_a_message() {
        let mut recorder = recorder(Clocks::Same);
        round_trip(&mut recorder, 5 * MS, 0);
        let (streams, notes) = recorder.finish(None);
        assert!(notes.is_empty(), "{notes:?}");
        let [both, up, down] = &streams[..] else { panic!("{streams:?}") };
        assert_eq!((both.response.max_ns, both.service.as_ref().unwrap().max_ns), (Some(20_500), Some(20_000)));
        assert_eq!((up.response.max_ns, up.service.as_ref().unwrap().max_ns), (Some(10_500), Some(10_000)));
        assert_eq!(down.response.max_ns, Some(9_000));
        // The bounds are 10 us there, 20 us back, 30 us both.
        assert_eq!([both, up, down].map(|stream| stream.bound_ns), [Some(30_000), Some(10_000), Some(20_000)]);
        assert_eq!([both, up, down].map(|stream| stream.violations), [Some(0), Some(1), Some(0)]);
        for (name, ns) in [
            ("app-sched", 1_000),
            ("sched-snd", 1_500),
            ("snd-rx", 5_500),
            ("peer rx-app", 2_000),
            ("peer app-app", 1_000),
            ("peer app-sched", 700),
            ("peer sched-snd", 1_200),
            ("snd-rx back", 4_100),
            ("rx-app", 3_000),
            ("snd-rx both ways", 9_600),
            ("app-sched and rx-app", 4_000),
        ] {
            assert_eq!(segment(both, name).map(|segment| segment.times.max_ns), Some(Some(ns)), "{name}");
        }
        assert_eq!(segment(both, "hardware both ways"), None);
        assert_eq!(both.worst, [Worst { sequence: 0, at_ns: 5 * MS, ns: 20_500, lateness_ns: 500 }]);
    }

    #[test]
    fn clocks_that_nobody_vouches_for_are_not_compared() {
        // The other side's clock is a second ahead.
        const AHEAD: u64 = 1_000 * MS;
        let mut unknown = recorder(Clocks::Unknown);
        round_trip(&mut unknown, 0, AHEAD);
        let (streams, _) = unknown.finish(None);
        assert_eq!(streams.len(), 1);
        assert_eq!((segment(&streams[0], "snd-rx"), segment(&streams[0], "snd-rx back")), (None, None));
        // Times on one clock are as good as ever, and so is the network's share of both ways.
        let both_ways = segment(&streams[0], "snd-rx both ways").unwrap();
        assert_eq!((both_ways.times.max_ns, both_ways.missing), (Some(9_600), 0));
    }

    #[test]
    fn clocks_that_differ_more_than_was_said_give_no_times() {
        // 7 us ahead, so that the way back seems to take less than nothing.
        for (said, missing) in [(4_000, 0), (1_000, 1)] {
            let mut recorder = recorder(Clocks::Within(said));
            round_trip(&mut recorder, 0, 7_000);
            let (streams, _) = recorder.finish(None);
            assert_eq!(segment(&streams[0], "snd-rx").unwrap().times.max_ns, Some(12_500));
            let back = segment(&streams[0], "snd-rx back").unwrap();
            assert_eq!((back.missing, back.times.samples), (missing, 1 - missing));
        }
    }

    #[test]
    fn a_clock_that_is_set_spoils_no_round_trip() {
        let mut recorder = recorder(Clocks::Same);
        for step in [-3_600_000_000_000_i64, 30_000, 0] {
            let number = recorder.next_number();
            let sent = number * MS;
            recorder.sent(sent, 0, at(sent), false, true);
            let mut answered = at(sent + 50_000);
            answered.real_ns = answered.real_ns.wrapping_add_signed(step);
            let times = peer(sent + 20_000, sent + 21_000, 0);
            recorder.answered(
                number as u32,
                Stamp { software_ns: Some(answered.real_ns), hardware_ns: None },
                answered,
                times,
            );
        }
        let (streams, notes) = recorder.finish(None);
        assert_eq!((streams[0].response.samples, streams[0].response.max_ns), (3, Some(50_000)));
        assert_eq!(
            segment(&streams[0], "rx-app").map(|segment| (segment.times.samples, segment.missing)),
            Some((1, 2))
        );
        assert_eq!(streams[1].response.samples, 1);
        assert!(notes.iter().any(|note| note.contains("2 probes met a step of this host's clock")), "{notes:?}");
    }

    #[test]
    fn counts_each_probe_once_whatever_comes() {
        let mut recorder = recorder(Clocks::Unknown);
        for number in 0..6 {
            recorder.sent(number * MS, 0, at(number * MS), number == 0, true);
        }
        let mut answer = |number, ms: u64| recorder.answered(number, Stamp::default(), at(ms * MS), None);
        assert_eq!(answer(0, 6), Outcome::Answered(6 * MS));
        assert_eq!(answer(2, 7), Outcome::Answered(5 * MS));
        assert_eq!((answer(2, 7), answer(0, 7)), (Outcome::Duplicate, Outcome::Duplicate));
        assert_eq!(answer(1, 8), Outcome::Answered(7 * MS));
        assert_eq!(answer(99, 8), Outcome::Late);
        recorder.corrupted();
        // 3 and 4 are lost; 5's time is not up.
        recorder.expire(104 * MS);
        assert_eq!((recorder.waiting(), recorder.deadline_ns()), (1, Some(105 * MS)));
        assert_eq!(recorder.answered(3, Stamp::default(), at(104 * MS), None), Outcome::Late);
        let (interval, lost) = recorder.take_interval(Box::new(Latencies::new(None)));
        assert_eq!((interval.samples(), lost), (2, 2));
        let peer = PeerCounts { received: 4, duplicated: 1, reordered: 2, corrupted: 1, refused: 0 };
        let (streams, notes) = recorder.finish(Some(peer));
        let expected = Counts {
            sent: 5,
            received: 2,
            lost: 3,
            lost_up: Some(1),
            lost_down: Some(2),
            duplicated: 2,
            reordered: 3,
            corrupted: 2,
            refused: 0,
            limiter_dropped: None,
        };
        assert_eq!(streams[0].counts, Some(expected));
        assert!(
            notes.iter().any(|note| note.contains("2 answers came after their probes counted as lost")),
            "{notes:?}"
        );
    }

    #[test]
    fn a_probe_that_died_before_the_wire_is_told_from_others() {
        let mut recorder = recorder(Clocks::Unknown);
        for number in 0..3 {
            recorder.sent(0, 0, at(0), false, true);
            let stamp = |place| Left { id: 0, place, stamp: software(1_000) };
            recorder.left(number, &stamp(Place::Sched));
            if number == 1 {
                recorder.left(number, &stamp(Place::Snd));
            }
        }
        recorder.refused();
        let (streams, notes) = recorder.finish(None);
        assert_eq!(streams[0].counts.map(|counts| (counts.lost, counts.lost_up, counts.refused)), Some((3, None, 1)));
        assert!(notes.iter().any(|note| note.contains("2 of the lost probes did not leave this host")), "{notes:?}");
    }

    #[test]
    fn memory_is_that_of_the_beginning_after_a_million_probes() {
        let mut recorder = recorder(Clocks::Same);
        let size = |recorder: &Recorder| (recorder.ring.len(), recorder.worst.capacity());
        let before = size(&recorder);
        for number in 0..1_000_000 {
            round_trip(&mut recorder, number * 20_000, 0);
            recorder.expire(number * 20_000);
        }
        assert_eq!(size(&recorder), before);
        let (streams, _) = recorder.finish(None);
        assert_eq!(streams[0].response.samples, 1_000_000);
        // What does not fit into the ring is settled early, and the stamps of all were in time.
        assert_eq!(segment(&streams[0], "peer sched-snd").map(|segment| segment.missing), Some(0));
        assert_eq!(streams[0].worst.len(), WORST);
    }
}
