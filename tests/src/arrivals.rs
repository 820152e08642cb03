//! The independent witness on the receiving side, and what it can prove.
//!
//! A program on the far ingress notes each packet's arrival by the kernel's clock. A packet's payload has
//! the time just before the sender's system call. So each packet was admitted at some time between the
//! two, whatever delayed it before or after. Of packets i..j in the order of arrival, all were certainly
//! admitted between the earliest of their send times and the last arrival. If that is more than the limit
//! allows for that time, the limiter has admitted too much: no jitter of this machine can excuse it.

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, RingBuf},
    programs::{
        LinkOrder, TcAttachType,
        tc::{self, NlOptions, TcAttachOptions},
    },
};
use qjump::testbed::NetNs;

use crate::{
    kernel::has_tcx,
    program::{classifier, lab},
};

/// One packet that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Arrival {
    /// The sender's clock just before it asked the kernel to send; 0 of TCP, which does not say.
    pub sent_ns: u64,
    /// The clock on arrival.
    pub arrived_ns: u64,
    /// L2 bytes.
    pub len: u32,
    /// IPv4 TOS.
    pub tos: u32,
}

/// A witness at work.
pub struct Witness {
    _lab: Ebpf,
    ring: RingBuf<MapData>,
    counted: PerCpuArray<MapData, u64>,
    arrivals: Vec<Arrival>,
}

impl Witness {
    /// Watches the ingress of `device` in `netns`.
    pub fn new(netns: &NetNs, device: &str) -> Result<Self> {
        let mut lab = lab("qj_arrivals")?;
        netns.enter(|| {
            let how = if has_tcx() {
                TcAttachOptions::TcxOrder(LinkOrder::first())
            } else {
                // The one of an earlier witness stays.
                let _ = tc::qdisc_add_clsact(device);
                TcAttachOptions::Netlink(NlOptions::default())
            };
            classifier(&mut lab, "qj_arrivals")?.attach_with_options(device, TcAttachType::Ingress, how)?;
            Ok(())
        })?;
        let ring = RingBuf::try_from(lab.take_map("qj_tap").context("no map qj_tap")?)?;
        let counted = PerCpuArray::try_from(lab.take_map("qj_counted").context("no map qj_counted")?)?;
        Ok(Self { _lab: lab, ring, counted, arrivals: Vec::new() })
    }

    /// Takes in what has arrived so far. Called often enough, the ring never fills up.
    pub fn collect(&mut self) -> &[Arrival] {
        while let Some(item) = self.ring.next() {
            let field = |at: usize| u64::from_ne_bytes(item[at..at + 8].try_into().expect("eight bytes"));
            self.arrivals.push(Arrival {
                sent_ns: field(0),
                arrived_ns: field(8),
                len: field(16) as u32,
                tos: (field(16) >> 32) as u32,
            });
        }
        &self.arrivals
    }

    /// How many packets came whose payload begins with eight bytes of ones, in place of a time: they are only counted.
    pub fn counted(&self) -> Result<u64> {
        Ok(self.counted.get(&0, 0)?.iter().sum())
    }
}

/// The most by which any interval of at least `at_least_ns` exceeds `rate` in bit/s times its length, in
/// bytes on the wire: the burst that the limiter must have had.
/// `start` gives the earliest time at which an arrival may have been admitted.
pub fn burst_seen(arrivals: &[Arrival], rate: f64, at_least_ns: u64, start: impl Fn(&Arrival) -> u64) -> f64 {
    let arrivals = in_order(arrivals);
    let Some(first) = arrivals.first() else { return 0.0 };
    let per_ns = rate / 8e9;
    let mut starts: Vec<u64> = arrivals.iter().map(start).collect();
    // Interval i.. begins with the earliest start among i.. (a stalled sender's packet comes late).
    for i in (0..starts.len() - 1).rev() {
        starts[i] = starts[i].min(starts[i + 1]);
    }
    let time = |ns: u64| ns as f64 - first.arrived_ns as f64;
    let (mut sum, mut worst) = (0.0, f64::NEG_INFINITY);
    // The lowest level of the sum at the start of any interval that is long enough to end now.
    let (mut lowest, mut next, mut before_next) = (f64::INFINITY, 0, 0.0);
    for (n, arrival) in arrivals.iter().enumerate() {
        sum += f64::from(wire(arrival.len));
        while next <= n && starts[next] + at_least_ns <= arrival.arrived_ns {
            lowest = f64::min(lowest, before_next - per_ns * time(starts[next]));
            before_next += f64::from(wire(arrivals[next].len));
            next += 1;
        }
        worst = f64::max(worst, sum - per_ns * time(arrival.arrived_ns) - lowest);
    }
    worst
}

/// The shortest time within which `n` packets, for any n, were certainly admitted, less (n - 1) T: at
/// least 0 if no two were admitted closer than T.
pub fn spacing_slack(arrivals: &[Arrival], epoch_ns: u64, start: impl Fn(&Arrival) -> u64) -> i64 {
    let arrivals = in_order(arrivals);
    let mut starts: Vec<u64> = arrivals.iter().map(start).collect();
    for i in (0..starts.len().saturating_sub(1)).rev() {
        starts[i] = starts[i].min(starts[i + 1]);
    }
    let (mut latest, mut slack) = (i64::MIN, i64::MAX);
    for (n, (arrival, &start)) in arrivals.iter().zip(&starts).enumerate() {
        let tick = n as i64 * epoch_ns as i64;
        if n > 0 {
            slack = slack.min(arrival.arrived_ns as i64 - tick - latest);
        }
        latest = latest.max(start as i64 - tick);
    }
    slack
}

/// By the time of arrival. A CPU may be away between its look at the clock and the note that it takes, and others take theirs
/// meanwhile.
fn in_order(arrivals: &[Arrival]) -> Vec<Arrival> {
    let mut arrivals = arrivals.to_vec();
    arrivals.sort_by_key(|arrival| arrival.arrived_ns);
    arrivals
}

/// What a frame of so many L2 bytes takes on the wire.
pub fn wire(l2: u32) -> u32 {
    l2.max(60) + 24
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(sent_ns: u64, arrived_ns: u64) -> Arrival {
        Arrival { sent_ns, arrived_ns, len: 60, tos: 0 }
    }

    #[test]
    fn two_packets_too_close_are_found_and_jitter_is_not_blamed() {
        let even: Vec<_> = (0..10).map(|n| arrival(n * 1000, n * 1000 + 5)).collect();
        assert_eq!(spacing_slack(&even, 1000, |a| a.sent_ns), 5);
        let mut close = even.clone();
        close[5].arrived_ns = 4_900;
        close[5].sent_ns = 4_890;
        assert!(spacing_slack(&close, 1000, |a| a.sent_ns) < 0);
        // The same arrival time, but sent long before: it may have waited behind the limiter.
        close[5].sent_ns = 3_000;
        assert!(spacing_slack(&close[4..], 1000, |a| a.sent_ns) >= 0);
        // Noted late by a CPU that was away.
        let mut late = even;
        late[3..8].rotate_left(1);
        assert_eq!(spacing_slack(&late, 1000, |a| a.sent_ns), 5);
        assert!(burst_seen(&late, 672e6, 0, |a| a.sent_ns) < 85.0);
    }

    #[test]
    fn bursts_are_measured_over_every_interval() {
        // 84 bytes each on the wire: 672 bits. At 672 Mbit/s one packet a microsecond.
        let even: Vec<_> = (0..100).map(|n| arrival(n * 1000, n * 1000)).collect();
        assert!((burst_seen(&even, 672e6, 0, |a| a.sent_ns) - 84.0).abs() < 1e-6);
        let mut burst = even;
        burst[50..53].fill(arrival(50_000, 50_000));
        assert!((burst_seen(&burst, 672e6, 0, |a| a.sent_ns) - 3.0 * 84.0).abs() < 1e-6);
        // Over at least ten microseconds, the burst has its neighbours' gaps on one side.
        assert!((burst_seen(&burst, 672e6, 10_000, |a| a.sent_ns) - 3.0 * 84.0).abs() < 1e-6);
        assert!(burst_seen(&burst, 672e6, 200_000, |a| a.sent_ns) < 84.0);
    }
}
