//! What arrived of a load, and when: pure, with time as an argument.

use serde::{Deserialize, Serialize};

/// Goodput over time is counted in slices of this length, ns.
pub const SLICE_NS: u64 = 100_000_000;

/// The part of a load that counts, ns since it began: what comes before is warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Where it begins.
    pub from_ns: u64,
    /// Where it ends.
    pub to_ns: u64,
}

impl Window {
    /// Its length, ns.
    pub const fn length_ns(self) -> u64 {
        self.to_ns.saturating_sub(self.from_ns)
    }
}

/// One flow, as its receiver saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCount {
    /// Payload bytes within the window.
    pub bytes: u64,
    /// Datagrams of UDP within the window.
    pub datagrams: u64,
    /// Datagrams that came after a later one, in and before the window.
    pub reordered: u64,
    /// Datagrams, in and before the window: what of those that were sent is not among them was lost.
    pub arrived: u64,
    /// The longest time within the window in which nothing arrived, ns.
    pub longest_gap_ns: u64,
    last_ns: u64,
    next_number: u64,
}

impl FlowCount {
    /// Nothing yet.
    pub const fn new(window: Window) -> Self {
        Self {
            bytes: 0,
            datagrams: 0,
            reordered: 0,
            arrived: 0,
            longest_gap_ns: 0,
            last_ns: window.from_ns,
            next_number: 0,
        }
    }

    /// Some bytes of a stream arrived. Whether they are within the window.
    pub fn stream(&mut self, window: Window, at_ns: u64, bytes: u64) -> bool {
        if bytes == 0 || at_ns < window.from_ns || at_ns >= window.to_ns {
            return false;
        }
        self.bytes += bytes;
        self.longest_gap_ns = self.longest_gap_ns.max(at_ns.saturating_sub(self.last_ns));
        self.last_ns = self.last_ns.max(at_ns);
        true
    }

    /// A datagram arrived: of this number, the first of the flow being 0. Whether it is within the window.
    pub fn datagram(&mut self, window: Window, at_ns: u64, bytes: u64, number: u64) -> bool {
        self.arrived += 1;
        self.reordered += u64::from(number < self.next_number);
        self.next_number = self.next_number.max(number.saturating_add(1));
        let counts = self.stream(window, at_ns, bytes);
        self.datagrams += u64::from(counts);
        counts
    }

    /// The window is over: what came last may have been long ago.
    pub fn finish(&mut self, window: Window) {
        self.longest_gap_ns = self.longest_gap_ns.max(window.to_ns.saturating_sub(self.last_ns));
    }
}

/// What a receiver counted of a load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// What was counted.
    pub window: Window,
    /// Each flow.
    pub flows: Vec<FlowCount>,
    /// Payload bytes of all flows in each slice of [`SLICE_NS`] since the beginning, the warm-up too.
    pub slices: Vec<u64>,
}

impl Received {
    /// Nothing yet, of so many flows.
    pub fn new(window: Window, flows: usize) -> Self {
        let slices = window.to_ns.div_ceil(SLICE_NS) as usize;
        Self { window, flows: vec![FlowCount::new(window); flows], slices: vec![0; slices] }
    }

    /// Adds to the slice of this time.
    pub fn slice(&mut self, at_ns: u64, bytes: u64) {
        if let Some(slice) = self.slices.get_mut((at_ns / SLICE_NS) as usize) {
            *slice += bytes;
        }
    }

    /// Payload of all flows in the window, bit/s.
    pub fn goodput_bps(&self) -> f64 {
        self.flows.iter().map(|flow| self.flow_bps(flow)).sum()
    }

    /// Payload of a flow in the window, bit/s.
    pub fn flow_bps(&self, flow: &FlowCount) -> f64 {
        match self.window.length_ns() {
            0 => 0.0,
            length => flow.bytes as f64 * 8e9 / length as f64,
        }
    }

    /// The longest time in which one of the flows got nothing, ns.
    pub fn longest_gap_ns(&self) -> u64 {
        self.flows.iter().map(|flow| flow.longest_gap_ns).max().unwrap_or(0)
    }

    /// Jain's index of fairness (Jain, Chiu and Hawe, 1984): 1 if all flows got the same, 1/n if one got everything.
    /// `None` if nothing arrived.
    pub fn fairness(&self) -> Option<f64> {
        let bytes = || self.flows.iter().map(|flow| flow.bytes as f64);
        let (sum, squares) = (bytes().sum::<f64>(), bytes().map(|bytes| bytes * bytes).sum::<f64>());
        (squares > 0.0).then(|| sum * sum / (self.flows.len() as f64 * squares))
    }

    /// Goodput over time: (middle of the slice in s, Mbit/s).
    pub fn over_time(&self) -> Vec<(f64, f64)> {
        self.slices
            .iter()
            .enumerate()
            .map(|(number, &bytes)| {
                let from = number as u64 * SLICE_NS;
                let length = SLICE_NS.min(self.window.to_ns - from);
                ((from + length / 2) as f64 / 1e9, bytes as f64 * 8e3 / length as f64)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const WINDOW: Window = Window { from_ns: 100 * MS, to_ns: 350 * MS };

    #[test]
    fn only_the_window_counts() {
        let mut flow = FlowCount::new(WINDOW);
        for at in [0, 99 * MS, 100 * MS, 349 * MS, 350 * MS] {
            flow.stream(WINDOW, at, 10);
        }
        assert_eq!(flow.bytes, 20);
    }

    #[test]
    fn the_longest_gap_is_found_wherever_it_is() {
        let gap = |arrivals: &[u64]| {
            let mut flow = FlowCount::new(WINDOW);
            for at in arrivals {
                flow.stream(WINDOW, at * MS, 1);
            }
            flow.finish(WINDOW);
            flow.longest_gap_ns / MS
        };
        assert_eq!(gap(&[]), 250);
        assert_eq!(gap(&[180, 200, 300]), 100);
        assert_eq!(gap(&[50, 190, 250, 300, 340]), 90);
        assert_eq!(gap(&[110, 120, 130]), 220);
        // What arrives after the end does not end the last gap.
        assert_eq!(gap(&[110, 120, 130, 360]), 220);
    }

    #[test]
    fn datagrams_are_counted_by_their_numbers() {
        let mut flow = FlowCount::new(WINDOW);
        for (at, number) in [(10, 0), (110, 1), (120, 3), (130, 2), (140, 7)] {
            flow.datagram(WINDOW, at * MS, 100, number);
        }
        assert_eq!((flow.arrived, flow.datagrams, flow.reordered, flow.bytes), (5, 4, 1, 400));
    }

    #[test]
    fn fairness_is_jains() {
        let fairness = |bytes: &[u64]| {
            let mut received = Received::new(WINDOW, bytes.len());
            received.flows.iter_mut().zip(bytes).for_each(|(flow, bytes)| flow.bytes = *bytes);
            received.fairness()
        };
        assert_eq!(fairness(&[5, 5, 5, 5]), Some(1.0));
        assert_eq!(fairness(&[8, 0, 0, 0]), Some(0.25));
        assert_eq!(fairness(&[0, 0]), None);
        assert_eq!(fairness(&[]), None);
    }

    #[test]
    fn goodput_over_time_knows_that_the_last_slice_is_shorter() {
        let mut received = Received::new(WINDOW, 1);
        for at in [0, 50, 320, 400] {
            received.slice(at * MS, 125_000);
        }
        assert_eq!(received.over_time(), [(0.05, 20.0), (0.15, 0.0), (0.25, 0.0), (0.325, 20.0)]);
        received.flows[0].stream(WINDOW, 200 * MS, 125_000);
        assert_eq!(received.goodput_bps(), 4e6);
    }
}
