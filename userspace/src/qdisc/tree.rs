//! The queue that is wanted, as data, and how it differs from another.

use std::fmt;

use qjump_ebpf::{
    LEVELS, Level,
    frame::{MIN_FRAME, VLAN_TAG, WIRE_OVERHEAD},
    layout::{QUEUE_MAJOR, class_id, fq_priority},
};

use super::{
    Queue, Setup,
    encode::{Fifo, Fq, Htb, HtbClass, Options, Prio, RateSpec, ticks},
    rate::lowered,
};

/// The handle of our root qdisc.
pub const ROOT: u32 = (QUEUE_MAJOR as u32) << 16;

/// The class through which all share the link. Leaf classes are numbered from 1.
const LINK_CLASS: u32 = ROOT | 0x10;

/// `TC_H_ROOT`: the parent of a root qdisc, and of the classes directly below it.
pub(super) const ABOVE_ROOT: u32 = u32::MAX;

/// What a class counts for a packet at least: its bytes on the wire.
const LEAST: u16 = (MIN_FRAME + WIRE_OVERHEAD) as u16;

/// Bytes/s that no device reaches (8 Tbit/s), with [`DEEP_NS`] of it at once: never shapes.
const UNSHAPED: u64 = 1_000_000_000_000;
const DEEP_NS: u64 = 1_000_000;

/// How much of the link's time may be made up for after a late timer, ns. At full load the queue behind the
/// link holds as much. Without it, every late timer would cost capacity for good.
pub const LINK_BURST_NS: u64 = 100_000;

/// Packets in the queue of a limited level, and in an fq. Not meant to be reached: what the sockets may have in
/// flight bounds the queue, and packets that wait too long for the limiter are its own to drop.
const DEEP_QUEUE: u32 = 1_000_000;

/// Packets in the queue of a level without a limit: the kernel's default for a device (`DEFAULT_TX_QUEUE_LEN`).
const DEFAULT_QUEUE: u32 = 1_000;

/// Only matters among classes of the same priority, of which there are none; but without it the kernel warns.
const QUANTUM: u32 = 60_000;

/// fq's own default, us (net/sched/sch_fq.c, `fq_init`): never set below.
const FQ_HORIZON_US: u64 = 10_000_000;

/// A queueing discipline in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// Its number: `major:0`.
    pub handle: u32,
    /// The class that it is the leaf of, or `TC_H_ROOT`.
    pub parent: u32,
    /// Kind and options.
    pub options: Options,
}

/// A class of HTB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its number: `major:minor`.
    pub id: u32,
    /// The class that it borrows from, or `TC_H_ROOT`.
    pub parent: u32,
    /// Its options.
    pub options: HtbClass,
}

/// A root qdisc and what is below it, in the order in which it can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The root.
    pub root: Qdisc,
    /// HTB's classes; parents come before their children.
    pub classes: Vec<Class>,
    /// The qdiscs at the leaves.
    pub leaves: Vec<Qdisc>,
}

/// The tree of a set-up; `None` for [`Queue::Keep`].
pub fn tree(setup: &Setup) -> Option<Tree> {
    match setup.queue {
        Queue::Keep => None,
        Queue::Htb => Some(htb(setup)),
        Queue::Fq => Some(fq(setup)),
    }
}

fn htb(setup: &Setup) -> Tree {
    // A tag that is given to frames on their way is not among the bytes that qdiscs count.
    let overhead = WIRE_OVERHEAD as u16 + if setup.tagged { VLAN_TAG as u16 } else { 0 };
    let spec = |bytes_per_s, mpu| RateSpec { bytes_per_s, overhead, mpu };
    let unshaped = spec(UNSHAPED, LEAST);
    let mut classes = Vec::new();
    if let Some(rate) = setup.link_rate {
        let link = spec(lowered(rate.bps() / 8, LEAST), LEAST);
        let burst = ticks(LINK_BURST_NS);
        classes.push(Class { id: LINK_CLASS, parent: ABOVE_ROOT, options: class(link, burst, link, burst, 0) });
    }
    for level in Level::strictest_first() {
        let (ceil, cbuffer) = match &setup.shapes[level.index()] {
            Some(shape) => {
                (spec(lowered(shape.rate_bytes, shape.least_bytes), shape.least_bytes), ticks(shape.burst_ns))
            }
            None => (unshaped, ticks(DEEP_NS)),
        };
        let prio = u32::from(Level::STRICTEST.number() - level.number());
        classes.push(match setup.link_rate {
            // HTB sends what classes have of their own before it looks at who may borrow, so for strict priority
            // all must borrow everything. A rate of 0 is refused. At 1 byte/s a packet puts the class 60 s into
            // debt (`mbuffer`, the most that HTB keeps books of): once a minute, one packet of a level may go
            // before its turn, within its ceil.
            Some(_) => Class {
                id: class_id(level),
                parent: LINK_CLASS,
                options: class(spec(1, LEAST), 0, ceil, cbuffer, prio),
            },
            None => {
                Class { id: class_id(level), parent: ABOVE_ROOT, options: class(ceil, cbuffer, ceil, cbuffer, prio) }
            }
        });
    }
    let leaves = Level::strictest_first().map(|level| Qdisc {
        handle: leaf_handle(level),
        parent: class_id(level),
        options: Options::Pfifo(Fifo {
            limit: if setup.shapes[level.index()].is_some() { DEEP_QUEUE } else { DEFAULT_QUEUE },
        }),
    });
    let default_class = class_id(Level::BEST_EFFORT) & 0xffff;
    // rate2quantum is what tc sets; every class has a quantum.
    let root = Options::Htb(Htb { default_class, rate2quantum: 10 });
    Tree { root: Qdisc { handle: ROOT, parent: ABOVE_ROOT, options: root }, classes, leaves: leaves.collect() }
}

fn fq(setup: &Setup) -> Tree {
    let band = |level: Level| Level::STRICTEST.number() - level.number();
    let mut map = [band(Level::BEST_EFFORT); 16];
    for level in Level::strictest_first() {
        // What the program writes, and what the kernel sends of its own around it.
        map[fq_priority(level) as usize] = band(level);
        map[level.index()] = band(level);
    }
    let horizon_us = setup.horizon_ns.div_ceil(1_000).max(FQ_HORIZON_US);
    let options = Options::Fq(Fq {
        limit: Some(DEEP_QUEUE),
        flow_limit: Some(DEEP_QUEUE),
        horizon_us: Some(u32::try_from(horizon_us).unwrap_or(u32::MAX)),
        horizon_drop: Some(true),
        ..Fq::default()
    });
    Tree {
        root: Qdisc { handle: ROOT, parent: ABOVE_ROOT, options: Options::Prio(Prio { bands: LEVELS as u32, map }) },
        classes: Vec::new(),
        leaves: Level::strictest_first()
            .map(|level| Qdisc {
                handle: leaf_handle(level),
                parent: ROOT | (u32::from(band(level)) + 1),
                options: options.clone(),
            })
            .collect(),
    }
}

const fn leaf_handle(level: Level) -> u32 {
    (0x7170 + level.number() as u32) << 16
}

const fn class(rate: RateSpec, buffer: u32, ceil: RateSpec, cbuffer: u32, prio: u32) -> HtbClass {
    HtbClass { rate, ceil, buffer, cbuffer, quantum: QUANTUM, prio }
}

/// One step from a tree to another of the same form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    /// This class is missing or has other options.
    Class(&'a Class),
    /// This leaf is missing or has other options.
    Leaf(&'a Qdisc),
}

/// How to get from one tree to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Difference<'a> {
    /// In place, without loss; nothing at all if they are the same.
    InPlace(Vec<Change<'a>>),
    /// Only from scratch: another root, or something below it that is not wanted there.
    Rebuild,
}

impl Tree {
    /// How to get from `self`, as the kernel reports it, to `wanted`.
    pub(super) fn difference<'a>(&self, wanted: &'a Self) -> Difference<'a> {
        let alien_class = self.classes.iter().any(|class| !wanted.classes.iter().any(|other| other.same_place(class)));
        let alien_leaf = self.leaves.iter().any(|leaf| !wanted.leaves.iter().any(|other| other.same_place(leaf)));
        if self.root != wanted.root || alien_class || alien_leaf {
            return Difference::Rebuild;
        }
        let classes = wanted.classes.iter().filter(|class| !self.classes.contains(class)).map(Change::Class);
        let leaves = wanted.leaves.iter().filter(|leaf| !self.has_leaf(leaf)).map(Change::Leaf);
        Difference::InPlace(classes.chain(leaves).collect())
    }

    fn has_leaf(&self, wanted: &Qdisc) -> bool {
        self.leaves.iter().any(|leaf| leaf.same_place(wanted) && leaf.options.holds(&wanted.options))
    }

    /// What differs from `wanted`, for people; empty if nothing does.
    pub(super) fn complaints(&self, wanted: &Self) -> Vec<String> {
        let mut complaints = Vec::new();
        if self.root != wanted.root {
            complaints.push(format!("the root is {}, wanted is {}", self.root, wanted.root));
        }
        for class in &wanted.classes {
            match self.classes.iter().find(|other| other.id == class.id) {
                None => complaints.push(format!("{class} is missing")),
                Some(other) if other != class => complaints.push(format!("there is {other}, wanted is {class}")),
                Some(_) => {}
            }
        }
        for class in self.classes.iter().filter(|class| !wanted.classes.iter().any(|other| other.id == class.id)) {
            complaints.push(format!("{class} is not ours"));
        }
        for leaf in wanted.leaves.iter().filter(|leaf| !self.has_leaf(leaf)) {
            match self.leaves.iter().find(|other| other.parent == leaf.parent) {
                None => complaints.push(format!("{leaf} is missing")),
                Some(other) => complaints.push(format!("there is {other}, wanted is {leaf}")),
            }
        }
        for leaf in self.leaves.iter().filter(|leaf| !wanted.leaves.iter().any(|other| other.parent == leaf.parent)) {
            complaints.push(format!("{leaf} is not ours"));
        }
        complaints
    }
}

impl Class {
    fn same_place(&self, other: &Self) -> bool {
        (self.id, self.parent) == (other.id, other.parent)
    }
}

impl Qdisc {
    fn same_place(&self, other: &Self) -> bool {
        (self.handle, self.parent, self.options.kind()) == (other.handle, other.parent, other.options.kind())
    }
}

/// A handle or class number, as `tc` writes it.
pub(super) struct Handle(pub u32);

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (self.0 >> 16, self.0 & 0xffff);
        match (self.0, minor) {
            (ABOVE_ROOT, _) => f.write_str("root"),
            (_, 0) => write!(f, "{major:x}:"),
            _ => write!(f, "{major:x}:{minor:x}"),
        }
    }
}

impl fmt::Display for Qdisc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qdisc {} {} at {}", self.options.kind(), Handle(self.handle), Handle(self.parent))?;
        match &self.options {
            Options::Htb(htb) => write!(f, " with default class {:x}", htb.default_class),
            Options::Pfifo(fifo) => write!(f, " with a limit of {} packets", fifo.limit),
            Options::Bfifo(fifo) => write!(f, " with a limit of {} bytes", fifo.limit),
            Options::Prio(prio) => write!(f, " with {} bands, map {:?}", prio.bands, prio.map),
            Options::Fq(fq) => {
                let fields = [
                    ("limit", fq.limit),
                    ("flow_limit", fq.flow_limit),
                    ("horizon_us", fq.horizon_us),
                    ("horizon_drop", fq.horizon_drop.map(u32::from)),
                ];
                fields
                    .iter()
                    .filter_map(|(name, value)| Some((name, (*value)?)))
                    .try_for_each(|(name, value)| write!(f, " {name} {value}"))
            }
            Options::Mqprio(_) | Options::Clsact | Options::Other { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HtbClass { rate, ceil, buffer, cbuffer, prio, .. } = &self.options;
        write!(
            f,
            "class htb {} at {} (priority {prio}, {} bytes/s and at most {} bytes/s, buckets of {buffer} and {cbuffer} \
             ticks, a packet counts at least {} bytes)",
            Handle(self.id),
            Handle(self.parent),
            rate.bytes_per_s,
            ceil.bytes_per_s,
            ceil.mpu
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{qdisc::Shape, units::Rate};

    const LEVEL: [Level; LEVELS] = {
        let mut levels = [Level::BEST_EFFORT; LEVELS];
        let mut n = 0;
        while n < LEVELS {
            levels[n] = Level::new(n as u8).expect("below 8");
            n += 1;
        }
        levels
    };

    /// Level 7: packets of 280 bytes, one a millisecond. Level 5: 50 Mbit/s with a burst of 1 ms.
    fn setup(queue: Queue) -> Setup {
        let mut shapes = [None; LEVELS];
        shapes[7] = Some(Shape { rate_bytes: 280_000, burst_ns: 0, least_bytes: 280 });
        shapes[5] = Some(Shape { rate_bytes: 6_250_000, burst_ns: 1_000_000, least_bytes: 84 });
        Setup { queue, shapes, link_rate: None, tagged: false, horizon_ns: 0 }
    }

    fn wanted(setup: &Setup) -> Tree {
        tree(setup).expect("a tree")
    }

    fn class_of(tree: &Tree, level: usize) -> Class {
        *tree.classes.iter().find(|class| class.id == class_id(LEVEL[level])).expect("a class")
    }

    #[test]
    fn nothing_is_wanted_where_everything_stays() {
        assert_eq!(tree(&setup(Queue::Keep)), None);
    }

    #[test]
    fn htb_has_a_class_a_level_in_strict_order() {
        let tree = wanted(&setup(Queue::Htb));
        assert_eq!(tree.root.handle, 0x716a_0000);
        assert_eq!(tree.root.options, Options::Htb(Htb { default_class: 1, rate2quantum: 10 }));
        assert_eq!(tree.classes.len(), 8);
        for (number, level) in LEVEL.into_iter().enumerate() {
            let class = class_of(&tree, number);
            assert_eq!(class.id, 0x716a_0001 + number as u32);
            assert_eq!(class.parent, ABOVE_ROOT);
            assert_eq!(class.options.prio, 7 - number as u32);
            assert_eq!((class.options.rate, class.options.buffer), (class.options.ceil, class.options.cbuffer));
            let leaf = tree.leaves.iter().find(|leaf| leaf.parent == class_id(level)).expect("a leaf");
            let limit = if matches!(number, 5 | 7) { 1_000_000 } else { 1_000 };
            assert_eq!(leaf.options, Options::Pfifo(Fifo { limit }));
        }
        let (seven, five, three) = (class_of(&tree, 7).options, class_of(&tree, 5).options, class_of(&tree, 3).options);
        assert_eq!(seven.rate, RateSpec { bytes_per_s: 279_998, overhead: 24, mpu: 280 });
        assert_eq!(seven.buffer, 0);
        assert_eq!(five.rate, RateSpec { bytes_per_s: lowered(6_250_000, 84), overhead: 24, mpu: 84 });
        assert_eq!(five.buffer, 15_625);
        assert_eq!(three.rate.bytes_per_s, 1_000_000_000_000);
    }

    #[test]
    fn with_a_link_rate_all_borrow_from_the_link() {
        let tree = wanted(&Setup { link_rate: Some(Rate::from_bps(100_000_000)), ..setup(Queue::Htb) });
        let link = tree.classes[0];
        assert_eq!((link.id, link.parent), (0x716a_0010, ABOVE_ROOT));
        assert_eq!(link.options.rate, RateSpec { bytes_per_s: lowered(12_500_000, 84), overhead: 24, mpu: 84 });
        assert_eq!(link.options.ceil, link.options.rate);
        assert_eq!(link.options.buffer, 1_562);
        assert_eq!(tree.classes.len(), 9);
        let direct = wanted(&setup(Queue::Htb));
        for level in 0..8 {
            let (class, shaped) = (class_of(&tree, level), class_of(&direct, level).options);
            assert_eq!(class.parent, link.id);
            // Nothing of its own, or it would go before its turn.
            assert_eq!((class.options.rate.bytes_per_s, class.options.buffer), (1, 0));
            let Class { options, .. } = class;
            assert_eq!((options.ceil, options.cbuffer, options.prio), (shaped.rate, shaped.buffer, shaped.prio));
        }
        assert_eq!(tree.leaves, direct.leaves);
    }

    #[test]
    fn fq_has_a_band_a_level_and_drops_nothing_in_the_limiters_horizon() {
        let tree = wanted(&Setup { horizon_ns: 30_000_000_001, ..setup(Queue::Fq) });
        let map = [7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0];
        assert_eq!(tree.root.handle, 0x716a_0000);
        assert_eq!(tree.root.options, Options::Prio(Prio { bands: 8, map }));
        assert!(tree.classes.is_empty());
        let mut parents: Vec<u32> = tree.leaves.iter().map(|leaf| leaf.parent).collect();
        parents.sort_unstable();
        assert_eq!(parents, (0x716a_0001..=0x716a_0008).collect::<Vec<_>>());
        for leaf in &tree.leaves {
            let Options::Fq(fq) = leaf.options else { panic!("{leaf} is no fq") };
            assert_eq!((fq.limit, fq.flow_limit), (Some(1_000_000), Some(1_000_000)));
            assert_eq!((fq.horizon_us, fq.horizon_drop), (Some(30_000_001), Some(true)));
        }
        // Not below the kernel's own.
        let Options::Fq(fq) = wanted(&setup(Queue::Fq)).leaves[0].options else { panic!("no fq") };
        assert_eq!(fq.horizon_us, Some(10_000_000));
    }

    #[test]
    fn the_same_tree_needs_no_change() {
        for queue in [Queue::Htb, Queue::Fq] {
            let tree = wanted(&setup(queue));
            let mut shuffled = tree.clone();
            shuffled.classes.reverse();
            shuffled.leaves.reverse();
            assert_eq!(shuffled.difference(&tree), Difference::InPlace(Vec::new()));
            assert_eq!(shuffled.complaints(&tree), [""; 0]);
        }
    }

    #[test]
    fn other_rates_are_set_in_place_and_named() {
        let before = wanted(&setup(Queue::Htb));
        let mut setup = setup(Queue::Htb);
        setup.shapes[7] = Some(Shape { rate_bytes: 560_000, burst_ns: 0, least_bytes: 280 });
        setup.shapes[3] = Some(Shape { rate_bytes: 1_000_000, burst_ns: 0, least_bytes: 84 });
        let after = wanted(&setup);
        let leaf = after.leaves.iter().find(|leaf| leaf.parent == class_id(LEVEL[3])).expect("a leaf");
        let (seven, three) = (class_of(&after, 7), class_of(&after, 3));
        let changes = vec![Change::Class(&seven), Change::Class(&three), Change::Leaf(leaf)];
        assert_eq!(before.difference(&after), Difference::InPlace(changes));
        let complaints = before.complaints(&after);
        assert_eq!(complaints.len(), 3, "{complaints:?}");
        assert!(complaints[0].contains("716a:8") && complaints[0].contains("279998 bytes/s"), "{}", complaints[0]);
    }

    #[test]
    fn what_is_missing_or_too_much_is_found() {
        let tree = wanted(&setup(Queue::Htb));
        let mut damaged = tree.clone();
        damaged.leaves.pop();
        assert_eq!(damaged.difference(&tree), Difference::InPlace(vec![Change::Leaf(&tree.leaves[7])]));
        assert_eq!(damaged.complaints(&tree).len(), 1);
        damaged.classes.pop();
        let changes = vec![Change::Class(&tree.classes[7]), Change::Leaf(&tree.leaves[7])];
        assert_eq!(damaged.difference(&tree), Difference::InPlace(changes));
        assert_eq!(damaged.complaints(&tree).len(), 2);
        // What is too much can only go with the tree.
        damaged = tree.clone();
        damaged.classes.push(Class { id: ROOT | 0x99, ..tree.classes[0] });
        assert_eq!(damaged.difference(&tree), Difference::Rebuild);
        assert_eq!(damaged.complaints(&tree).len(), 1);
        damaged = tree.clone();
        damaged.leaves[0].options = Options::Bfifo(Fifo { limit: 1 });
        assert_eq!(damaged.difference(&tree), Difference::Rebuild);
        assert_eq!(damaged.complaints(&tree).len(), 1);
        assert_eq!(tree.difference(&wanted(&setup(Queue::Fq))), Difference::Rebuild);
    }
}
