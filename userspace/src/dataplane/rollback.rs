//! What was in force before a load, and the way back to it.

use qjump_ebpf::{
    Config, PlanRecord,
    layout::{QUEUE_KEEP, VERSION},
};

use super::{
    Error, enforce,
    load::{before_load, find_interface, put_queue_back, queue_form, require_capabilities, unload},
    maps::Maps,
    pins::{Lock, Pins, has_bpffs},
};
use crate::qdisc;

/// What one interface had before a load.
#[derive(Clone, Debug, PartialEq)]
pub struct Before {
    /// Its name.
    pub interface: String,
    /// The plan in force, if qjump was loaded.
    pub loaded: Option<Loaded>,
}

/// A plan in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Box<Config>,
    /// Most segments of a GSO packet.
    pub gso_max_segs: u32,
}

impl Before {
    /// What the interface has now.
    ///
    /// # Errors
    /// If there is no such interface, or its pins are not readable or not ours.
    pub fn of(interface: &str) -> Result<Self, Error> {
        let device = find_interface(interface)?;
        let pins = Pins::of(interface);
        // Without a file system for pins there is none.
        let config = if has_bpffs()? && pins.find()? { Some(Maps::open(interface, &pins)?.in_force()) } else { None };
        // Pins of a device that is gone are nothing to go back to.
        let config = config.filter(|config| config.plan.ifindex == device.index);
        let loaded = match config {
            Some(config) => Some(Loaded { config: Box::new(config), gso_max_segs: qdisc::gso_max_segs(device.index)? }),
            None => None,
        };
        Ok(Self { interface: interface.to_owned(), loaded })
    }

    /// Goes back: the plan that was in force is again, with its queue, or the program is gone.
    ///
    /// # Errors
    /// If the interface is gone, or the kernel refuses.
    pub fn restore(&self) -> Result<(), Error> {
        match &self.loaded {
            Some(loaded) => loaded.restore(&self.interface),
            None => match unload(&self.interface, false) {
                // A load that was killed before it did anything.
                Err(Error::NotLoaded(_)) => Ok(()),
                result => result,
            },
        }
    }
}

impl Loaded {
    fn restore(&self, interface: &str) -> Result<(), Error> {
        require_capabilities("going back")?;
        let index = find_interface(interface)?.index;
        let _lock = Lock::take()?;
        let mut maps = Maps::open(interface, &Pins::of(interface))?;
        let now = maps.in_force().plan;
        if now.ifindex != index {
            return Err(Error::OtherNamespace { interface: interface.to_owned(), netns: now.netns });
        }
        let changing = || Error::io(interface, "going back to the plan before");
        let was = &self.config.plan;
        if queue_form(&now) != queue_form(was) {
            // While there is another queue, or none, what is over a limit must not be let go. The record still says what
            // the interface had before the first load, for whoever has to go on from here.
            let mut unpaced = enforce::unpaced(&self.config);
            unpaced.plan.gso_before = now.gso_before.max(was.gso_before);
            if was.queue == QUEUE_KEEP {
                unpaced.plan.queue_before = now.queue_before;
                unpaced.plan.queue_before_len = now.queue_before_len;
            }
            maps.put_in_force(&unpaced).map_err(changing())?;
        }
        if was.queue == QUEUE_KEEP {
            put_queue_back(index, &PlanRecord { gso_before: 0, ..now })?;
        } else {
            qdisc::apply(index, &enforce::setup(&self.config), &before_load(was))?;
        }
        qdisc::set_gso_max_segs(index, self.gso_max_segs)?;
        maps.put_in_force(&self.config).map_err(changing())
    }

    /// The configuration as bytes, and back; it is the layout of the pinned maps.
    pub fn to_bytes(&self) -> Vec<u8> {
        let config: *const Config = &raw const *self.config;
        // SAFETY: `Config` is `Pod`: `repr(C)` without padding, so all of its bytes are initialised, and the box keeps them
        // where they are while the slice lives.
        let bytes = unsafe { std::slice::from_raw_parts(config.cast::<u8>(), size_of::<Config>()) };
        [bytes, &self.gso_max_segs.to_ne_bytes()].concat()
    }

    /// What [`Self::to_bytes`] has written; `None` if it was another version's.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (config, segments) = bytes.split_at_checked(size_of::<Config>())?;
        let gso_max_segs = u32::from_ne_bytes(segments.try_into().ok()?);
        // SAFETY: the slice has the size of a `Config`, every bit pattern of which is a value (`Pod`), and need not be aligned.
        let config = unsafe { config.as_ptr().cast::<Config>().read_unaligned() };
        (config.plan.version == VERSION).then(|| Self { config: Box::new(config), gso_max_segs })
    }
}

/// The number of the plan in force on an interface; `None` if there is none.
pub fn generation(interface: &str) -> Option<u64> {
    Maps::open(interface, &Pins::of(interface)).ok().map(|maps| maps.in_force().plan.generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_in_force_survives_as_bytes() {
        let mut config = Config::EMPTY;
        config.flags = 5;
        config.plan.hosts = 12;
        let loaded = Loaded { config: Box::new(config), gso_max_segs: 65_535 };
        let bytes = loaded.to_bytes();
        assert_eq!(Loaded::from_bytes(&bytes).as_ref(), Some(&loaded));
        assert_eq!(Loaded::from_bytes(&bytes[1..]), None);
        config.plan.version += 1;
        let other = Loaded { config: Box::new(config), ..loaded };
        assert_eq!(Loaded::from_bytes(&other.to_bytes()), None);
    }
}
