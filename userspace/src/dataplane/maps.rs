//! The pinned maps of one interface, and the protocol of a change.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya::{
    Ebpf,
    maps::{Array, Map, MapData, PerCpuArray},
};
use qjump_ebpf::{
    Config, Counters, LEVELS, Level, PlanRecord, State,
    layout::{Count, LevelCounters, VERSION, WORDS},
    limiter::{LevelState, backlog_ns, carry_over},
    names,
};

use super::{
    Error,
    pins::Pins,
    sys::{MapShape, SharedState, grace_period, map_info, map_is_used, monotonic_ns, open_pin},
};

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;

/// What each pinned map must look like to be reused. aya does not check.
fn shapes() -> HashMap<&'static str, MapShape> {
    let shape = |kind, value: usize, max_entries| MapShape { kind, key_size: 4, value_size: value as u32, max_entries };
    HashMap::from([
        (names::CONFIG, shape(ARRAY, size_of::<Config>(), 2)),
        (names::STATE, shape(ARRAY, size_of::<State>(), 1)),
        (names::COUNTERS, shape(PERCPU_ARRAY, size_of::<Counters>(), 1)),
    ])
}

/// The same of [`names::LOCKS`], which is there on old kernels alone (ebpf/src/exchange.rs).
const LOCKS: MapShape = MapShape { kind: HASH, key_size: 8, value_size: 1, max_entries: (LEVELS * WORDS) as u32 };

/// The maps of one interface.
pub struct Maps {
    config: Array<MapData, Config>,
    state: SharedState,
    counters: PerCpuArray<MapData, Counters>,
    /// The number of the state map on this host.
    id: u32,
}

/// The changes, by state map and number, that this process has ended itself: what is in force then needs no end before the
/// next one. Each costs a grace period, some ten milliseconds.
static ENDED: Mutex<BTreeMap<u32, u64>> = Mutex::new(BTreeMap::new());

/// The longest that a change waits for what the old configuration admitted to drain.
const LONGEST_DRAIN: Duration = Duration::from_secs(1);

impl Maps {
    /// Opens the pinned maps, if their shape and version are ours.
    pub fn open(interface: &str, pins: &Pins) -> Result<Self, Error> {
        let corrupt =
            |name: &str, why: String| Error::CorruptPin { path: pins.map(name), why, interface: interface.to_owned() };
        let other_version = |id| Error::OtherVersion { interface: interface.to_owned(), in_force: map_is_used(id) };
        let mut state_id = 0;
        let locks = pins.map(names::LOCKS).exists().then_some((names::LOCKS, LOCKS));
        for (name, wanted) in shapes().into_iter().chain(locks) {
            let path = pins.map(name);
            let fd = open_pin(&path).map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => Error::Permission { path },
                _ => corrupt(name, format!("cannot be opened: {error}")),
            })?;
            let map = map_info(fd.as_fd()).map_err(|error| corrupt(name, error.to_string()))?;
            if map.shape != wanted {
                // A map that was made with our name is ours, of another layout.
                return Err(if map.name == name {
                    other_version(map.id)
                } else {
                    corrupt(name, format!("it is another map, '{}'", map.name))
                });
            }
            if name == names::STATE {
                state_id = map.id;
            }
        }
        let open = |name| {
            MapData::from_pin(pins.map(name)).map_err(|error| corrupt(name, format!("cannot be opened: {error}")))
        };
        let maps = Self::from_data(open(names::CONFIG)?, open(names::STATE)?, open(names::COUNTERS)?)
            .map_err(|error| corrupt(names::STATE, error.to_string()))?;
        let version = maps.in_force().plan.version;
        if version != VERSION {
            return Err(other_version(state_id));
        }
        Ok(maps)
    }

    /// Whether a program still uses the pinned maps, in whatever network namespace it is attached.
    pub fn in_use(pins: &Pins) -> bool {
        open_pin(&pins.map(names::STATE)).and_then(|fd| map_info(fd.as_fd())).is_ok_and(|state| map_is_used(state.id))
    }

    /// The maps of an object that has just been loaded.
    pub fn of(object: &mut Ebpf) -> io::Result<Self> {
        let mut take = |name| match object.take_map(name) {
            Some(Map::Array(data) | Map::PerCpuArray(data)) => Ok(data),
            _ => Err(io::Error::other(format!("the eBPF object has no map {name}"))),
        };
        Self::from_data(take(names::CONFIG)?, take(names::STATE)?, take(names::COUNTERS)?)
    }

    fn from_data(config: MapData, state: MapData, counters: MapData) -> io::Result<Self> {
        let state_fd = state.fd().as_fd().try_clone_to_owned()?;
        Ok(Self {
            id: map_info(state_fd.as_fd())?.id,
            config: Array::try_from(Map::Array(config)).map_err(io::Error::other)?,
            state: SharedState::new(state_fd)?,
            counters: PerCpuArray::try_from(Map::PerCpuArray(counters)).map_err(io::Error::other)?,
        })
    }

    fn slot(&self, slot: u64) -> Config {
        self.config.get(&(slot as u32), 0).unwrap_or(Config::EMPTY)
    }

    /// The configuration in force.
    pub fn in_force(&self) -> Config {
        self.slot(self.state.active())
    }

    /// Fills maps that no packet has seen yet.
    pub fn initialise(&mut self, config: &Config) -> io::Result<()> {
        self.config.set(1, Config::EMPTY, 0).map_err(io::Error::other)?;
        self.config.set(0, stamped(config, 1), 0).map_err(io::Error::other)?;
        self.state.activate(0);
        Ok(())
    }

    /// Notes in the configuration in force what is about to be done to the host, for whoever has to undo it.
    /// The limits stay what they are.
    pub fn note(&mut self, plan: &PlanRecord) -> io::Result<()> {
        let active = self.state.active();
        let noted = Config { plan: *plan, ..self.slot(active) };
        self.config.set(active as u32, noted, 0).map_err(io::Error::other)
    }

    /// Puts `config` in force for all levels at one instant, under traffic. Only the holder of the
    /// host's lock may call it. See [`qjump_ebpf::limiter`] for why each step is there.
    pub fn put_in_force(&mut self, config: &Config) -> io::Result<()> {
        let old = self.in_force();
        // A loader that was killed half-way may have left words of the slot that is about to be written.
        if lock(&ENDED).remove(&self.id) != Some(old.plan.generation) {
            self.settle();
        }

        let mut new = stamped(config, old.plan.generation + 1);
        for (limit, old) in new.limits.iter_mut().zip(&old.limits) {
            *limit = limit.replacing(old);
        }
        let idle = 1 - self.state.active();
        self.config.set(idle as u32, new, 0).map_err(io::Error::other)?;
        self.state.activate(idle);
        self.settle();
        lock(&ENDED).insert(self.id, new.plan.generation);
        Ok(())
    }

    /// Ends a change: no word and no packet on its way belongs to the other slot afterwards, and what
    /// exceeded the new bursts (with their horizons) has drained, so that the next change can count it exactly.
    fn settle(&self) {
        self.carry_all_over();
        grace_period();
        // Where packets exchange words under a lock (ebpf/src/exchange.rs), one that was about to may have undone it. Once nothing is
        // left to do after a grace period, nobody holds an old word any more.
        while self.carry_all_over() {
            grace_period();
        }
        let config = self.in_force();
        let deadline = Instant::now() + LONGEST_DRAIN;
        let exceeds = |level: Level| {
            let limit = &config.limits[level.index()];
            limit.burst_ns() > 0 && backlog_ns(self.state.level(level).load(), monotonic_ns()) > limit.reach_ns()
        };
        while Level::strictest_first().any(exceeds) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether there was anything to do.
    fn carry_all_over(&self) -> bool {
        let slot = self.state.active();
        let config = self.slot(slot);
        let carry =
            |level: Level| carry_over(&self.state.level(level), slot, &config.limits[level.index()], monotonic_ns());
        Level::strictest_first().fold(false, |any, level| any | carry(level))
    }

    /// What happened to each level's packets, all CPUs together.
    pub fn counters(&self) -> io::Result<[LevelCounters; LEVELS]> {
        let per_cpu = self.counters.get(&0, 0).map_err(io::Error::other)?;
        let mut sum =
            [LevelCounters { reasons: [Count::default(); _], last_ns: 0, waited_packets: 0, worst_wait_ns: 0 }; LEVELS];
        for counters in per_cpu.iter() {
            for (sum, level) in sum.iter_mut().zip(&counters.levels) {
                sum.last_ns = sum.last_ns.max(level.last_ns);
                sum.waited_packets += level.waited_packets;
                sum.worst_wait_ns = sum.worst_wait_ns.max(level.worst_wait_ns);
                for (sum, count) in sum.reasons.iter_mut().zip(&level.reasons) {
                    sum.packets += count.packets;
                    sum.bytes += count.bytes;
                }
            }
        }
        Ok(sum)
    }
}

/// What a panicking holder left is taken as it is.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stamped(config: &Config, generation: u64) -> Config {
    let mut config = *config;
    config.plan.generation = generation;
    config.plan.loaded_at_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    config
}
