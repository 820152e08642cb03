//! Applying rules. A cgroup that a rule is about as a whole is tagged, so that its later sockets have the level, too. Then
//! the sockets are looked at, and those are moved that have another level than their rule says.
//!
//! What a rule gives to a single socket is a grant, too: the socket is adopted by the grant of rules at that level
//! ([`rule_grant`]). A grant that a person made (`qjump tag`, `qjump run`) is never changed, and no rule gives the
//! sockets below it more than it does.

use std::{
    cell::LazyCell,
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::RawFd,
};

use qjump_ebpf::{
    Level,
    grant::{GRANT_BY_RULE, Grant, MaybeLevel, decide, rule_grant},
};
use thiserror::Error;

use super::{
    Error, Request, Session,
    cgroup::{Cgroup, Hierarchy},
    grants::{Grants, tagged},
    live::{LiveError, LiveSocket, each_socket},
    new_grant,
    process::Process,
    rules::{CgroupSelector, Match, Rules, needs_tag},
};
use crate::socket::set_level;

/// Why rules could not be applied.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum AssignError {
    #[error("cannot list the processes: {0}; /proc must be mounted")]
    Processes(io::Error),
    #[error(transparent)]
    Sockets(#[from] LiveError),
    #[error(transparent)]
    Host(#[from] Error),
    #[error("{source}; nothing was changed")]
    Place {
        /// The rule, from 0.
        rule: usize,
        source: Error,
    },
}

/// The grants of this host.
pub struct Host {
    access: Access,
    /// Why they cannot be read, if they cannot: this user lacks the rights. Then sockets are moved as if there were none.
    pub unreadable: Option<Error>,
}

enum Access {
    Change(Session),
    /// Nothing of it is to be changed, or there are no grants and no interface that asks for them.
    Read {
        hierarchy: Option<Hierarchy>,
        grants: Option<Grants>,
    },
}

impl Host {
    /// To see what rules would do.
    ///
    /// # Errors
    /// If the grants are another version's.
    pub fn read() -> Result<Self, AssignError> {
        let (grants, unreadable) = match Grants::open() {
            Ok(grants) => (grants, None),
            Err(error @ Error::Host(crate::dataplane::Error::Permission { .. })) => (None, Some(error)),
            Err(error) => return Err(error.into()),
        };
        Ok(Self { access: Access::Read { hierarchy: Hierarchy::find().ok(), grants }, unreadable })
    }

    /// To apply rules: nobody else changes grants as long as it lives.
    ///
    /// # Errors
    /// Those of [`Session::begin`], unless neither the rules nor the host have anything to do with grants.
    pub fn change(rules: &Rules) -> Result<Self, AssignError> {
        let host = Self::read()?;
        let without_cgroups = rules.iter().len() == 0 && host.hierarchy().is_none();
        if without_cgroups || needs_tag(rules).is_empty() && host.grants().is_none() {
            return Ok(host);
        }
        Ok(Self { access: Access::Change(Session::begin()?), unreadable: None })
    }

    const fn hierarchy(&self) -> Option<&Hierarchy> {
        match &self.access {
            Access::Change(session) => Some(&session.hierarchy),
            Access::Read { hierarchy, .. } => hierarchy.as_ref(),
        }
    }

    const fn grants(&self) -> Option<&Grants> {
        match &self.access {
            Access::Change(session) => Some(&session.grants),
            Access::Read { grants, .. } => grants.as_ref(),
        }
    }

    /// Finds the cgroups that rules are about as a whole.
    ///
    /// # Errors
    /// If there are no cgroups at all.
    pub fn places(&self, rules: &Rules) -> Result<Places, AssignError> {
        let mut places = Places::default();
        for (rule, place, level) in needs_tag(rules) {
            let Some(hierarchy) = self.hierarchy() else {
                return Err(Hierarchy::find().err().unwrap_or(Error::NoCgroup2).into());
            };
            let cgroup = match place {
                CgroupSelector::Path(path) => hierarchy.at(path),
                CgroupSelector::Unit(name) => hierarchy.unit(name),
            };
            match cgroup {
                Ok(cgroup) => {
                    let before = self.grants().and_then(|grants| grants.get(cgroup.id));
                    places.found.push(Place { rule, cgroup, level, before });
                }
                Err(why) => places.missing.push((rule, why)),
            }
        }
        Ok(places)
    }

    /// Tags the cgroups that are not as their rules say, except for those that a person has tagged. Returns how many of their
    /// processes are in PID namespaces that cannot be seen from here, so that their sockets were not moved.
    ///
    /// # Errors
    /// If one cannot be tagged; then none is.
    pub fn tag(&mut self, places: &[Place]) -> Result<usize, AssignError> {
        let Access::Change(session) = &mut self.access else { return Ok(0) };
        let mut done: Vec<&Place> = Vec::new();
        let mut unreachable = 0;
        for place in places.iter().filter(|place| place.needs_tag()) {
            match session.tag_cgroup(place.cgroup.clone(), &place.request(), GRANT_BY_RULE) {
                Ok(changed) => unreachable += changed.sockets.unreachable,
                Err(source) => {
                    for place in done.into_iter().rev() {
                        session.revert(&place.cgroup, place.before);
                    }
                    return Err(AssignError::Place { rule: place.rule, source });
                }
            }
            done.push(place);
        }
        Ok(unreachable)
    }

    /// Takes back what rules granted to cgroups as a whole that `places` does not find. What a person granted stays.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn release(&mut self, places: &Places) -> Result<(), AssignError> {
        let Access::Change(session) = &mut self.access else { return Ok(()) };
        let wanted: HashSet<u64> = places.found.iter().map(|place| place.cgroup.id).collect();
        let mut unwanted = tagged().unwrap_or_default();
        unwanted.retain(|id| !wanted.contains(id) && session.grants.get(*id).is_some_and(|grant| !is_by_person(grant)));
        if unwanted.is_empty() {
            return Ok(());
        }
        // A user may make a cgroup of a service's name: nobody loses his level by that.
        let unsure = |at: &Cgroup| {
            let ambiguous = |why: &Error| matches!(why, Error::ManyUnits { paths, .. } if paths.contains(&at.path));
            places.missing.iter().any(|(_, why)| ambiguous(why))
        };
        let cgroups = session.hierarchy.all();
        let mut failed = None;
        for id in unwanted {
            let released = match cgroups.get(&id) {
                Some(cgroup) if unsure(cgroup) => Ok(()),
                Some(cgroup) => session.remove(cgroup).map(drop),
                None => session.remove_gone(id),
            };
            failed = failed.or(released.err());
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }
}

/// The cgroups that rules are about as a whole.
#[derive(Debug, Default)]
pub struct Places {
    /// Those that are there.
    pub found: Vec<Place>,
    /// The rules, from 0, whose cgroup is not there, and why. They do not stop the others.
    pub missing: Vec<(usize, Error)>,
}

/// A cgroup that a rule is about as a whole.
#[derive(Clone, Debug)]
pub struct Place {
    /// The rule, from 0.
    pub rule: usize,
    /// The cgroup.
    pub cgroup: Cgroup,
    /// The level that the rule gives it.
    pub level: Level,
    /// The grant that it had of its own.
    pub before: Option<Grant>,
}

impl Place {
    /// Whether it has its level already.
    pub fn is_settled(&self) -> bool {
        self.before.is_some_and(|grant| grant.level == u32::from(self.level.number()))
    }

    /// Whether a person has granted it another level, which stays.
    pub fn is_overruled(&self) -> bool {
        !self.is_settled() && self.before.is_some_and(is_by_person)
    }

    /// Whether the rule is to tag it.
    pub fn needs_tag(&self) -> bool {
        !self.is_settled() && !self.is_overruled()
    }

    const fn request(&self) -> Request {
        Request { level: self.level, send_buffer: None, by: None }
    }
}

fn is_by_person(grant: Grant) -> bool {
    grant.flags & GRANT_BY_RULE == 0
}

/// A socket, and the rule that counts for it.
#[derive(Clone, Debug)]
pub struct Assigned {
    /// The process that the rule matches; of those that share the socket, the one with the most specific rule.
    pub process: Process,
    /// The socket.
    pub socket: LiveSocket,
    /// The rule.
    pub found: Match,
    /// The level that the socket is to have.
    pub level: Level,
    /// The cgroup whose grant keeps the socket from the level that the rule says.
    pub overruled_by: Option<Cgroup>,
    /// The cgroup whose grant gives it the level; else it has it from the rule itself.
    granted_by: Option<(u64, Grant)>,
    settled: bool,
}

impl Assigned {
    /// Whether the socket has its level already.
    pub const fn is_settled(&self) -> bool {
        self.settled
    }
}

/// What rules are about on this host at one moment.
#[derive(Debug, Default)]
pub struct Assignment {
    /// The sockets that rules match, by process and descriptor.
    pub sockets: Vec<Assigned>,
    /// Those that have their level from a rule, and that no rule matches: by process and inode, with the grant that they
    /// are under.
    released: BTreeMap<u32, HashMap<u64, Option<(u64, Grant)>>>,
    /// Processes that this user may not look into.
    pub refused: Vec<u32>,
    /// Sockets that could not be read: process, descriptor, why.
    pub failed: Vec<(u32, RawFd, io::Error)>,
}

/// What became of the sockets to be moved.
#[derive(Debug, Default)]
pub struct Moved {
    /// Sockets that have their level now.
    pub moved: usize,
    /// Sockets that were closed before their turn came.
    pub closed: usize,
    /// Sockets that could not be moved: process, descriptor, why.
    pub failed: Vec<(u32, RawFd, io::Error)>,
}

impl Assignment {
    /// Looks at all sockets of all processes as if `places` were tagged; changes nothing.
    ///
    /// # Errors
    /// If /proc is not there, or the kernel lacks what this needs.
    pub fn find(rules: &Rules, host: &Host, places: &[Place]) -> Result<Self, AssignError> {
        let wanted = places.iter().filter(|place| place.needs_tag());
        let planned: HashMap<u64, Grant> =
            wanted.map(|place| (place.cgroup.id, new_grant(&place.request(), GRANT_BY_RULE))).collect();
        let grant_of = |id: u64| planned.get(&id).copied().or_else(|| host.grants()?.get(id));
        let keeps_records = host.grants().is_some() || !planned.is_empty();
        let mut assignment = Self::default();
        let mut best: HashMap<u64, Assigned> = HashMap::new();
        for pid in Process::all().map_err(AssignError::Processes)? {
            // It has ended since.
            let Ok(process) = Process::read(pid) else { continue };
            let governing = LazyCell::new(|| {
                let hierarchy = host.hierarchy()?;
                let at = hierarchy.of_process(Some(pid)).ok()?;
                hierarchy.upwards(&at).find_map(|above| grant_of(above.id).map(|grant| (above, grant)))
            });
            let count = each_socket(pid, |descriptor, socket| {
                let Some(found) = rules.find(&process, socket) else {
                    if host.grants().is_some_and(|grants| grants.is_granted_by_rule(descriptor)) {
                        let above = governing.as_ref().map(|(cgroup, grant)| (cgroup.id, *grant));
                        assignment.released.entry(pid).or_default().insert(socket.inode, above);
                    }
                    return Ok(());
                };
                let before = best.get(&socket.inode);
                if before.is_some_and(|before| before.found.precedence >= found.precedence) {
                    return Ok(());
                }
                let record = host.grants().and_then(|grants| grants.record(descriptor)).unwrap_or_default();
                let by_place = rules.is_place_alone(found.rule);
                let stays = governing.as_ref().filter(|(_, grant)| {
                    by_place || is_by_person(*grant) && grant.level < u32::from(found.level.number())
                });
                let (level, settled) = match stays {
                    Some((_, grant)) => {
                        let level = decide(MaybeLevel::from_number(grant.level), record.asked);
                        (level.level().unwrap_or(Level::BEST_EFFORT), true)
                    }
                    None => (found.level, !keeps_records || record.adopted_by == rule_grant(found.level)),
                };
                let overruled = stays.filter(|(_, grant)| grant.level != u32::from(found.level.number()));
                best.insert(
                    socket.inode,
                    Assigned {
                        process: process.clone(),
                        settled: settled && socket.priority == u32::from(level.number()),
                        socket: socket.clone(),
                        found,
                        level,
                        overruled_by: overruled.map(|(cgroup, _)| cgroup.clone()),
                        granted_by: stays.map(|(cgroup, grant)| (cgroup.id, *grant)),
                    },
                );
                Ok(())
            });
            match count {
                Ok(count) => assignment.failed.extend(count.failed),
                Err(LiveError::NoProcess { .. }) => {}
                Err(LiveError::Permission { pid }) => assignment.refused.push(pid),
                Err(error) => return Err(error.into()),
            }
        }
        // A process that shares the socket may be matched.
        assignment.released.values_mut().for_each(|sockets| sockets.retain(|inode, _| !best.contains_key(inode)));
        assignment.sockets = best.into_values().collect();
        assignment.sockets.sort_unstable_by_key(|assigned| (assigned.socket.pid, assigned.socket.fd));
        Ok(assignment)
    }

    /// Takes back the levels that rules gave to sockets which none matches any more.
    pub fn release(&self, host: &mut Host) {
        let Access::Change(session) = &mut host.access else { return };
        for (pid, sockets) in &self.released {
            // That one ends or is closed meanwhile is no failure.
            let _ = each_socket(*pid, |duplicate, socket| match sockets.get(&socket.inode) {
                Some(governing) => session.follow(duplicate, *governing),
                None => Ok(()),
            });
        }
    }

    /// Sets the level of each socket that has another one than it should. That a process has ended meanwhile, or
    /// closed a socket, is no failure.
    pub fn apply(&self, host: &mut Host) -> Moved {
        let mut by_process: BTreeMap<u32, HashMap<u64, &Assigned>> = BTreeMap::new();
        for assigned in self.sockets.iter().filter(|assigned| !assigned.is_settled()) {
            by_process.entry(assigned.socket.pid).or_default().insert(assigned.socket.inode, assigned);
        }
        let mut result = Moved::default();
        for (pid, mut wanted) in by_process {
            let mut moved = 0;
            let count = each_socket(pid, |duplicate, socket| {
                if let Some(assigned) = wanted.remove(&socket.inode) {
                    match (&mut host.access, assigned.granted_by) {
                        (Access::Change(session), None) => session.assign(duplicate, assigned.level)?,
                        (Access::Change(session), governing) => session.follow(duplicate, governing)?,
                        (Access::Read { .. }, _) => set_level(&duplicate, assigned.level).map_err(io::Error::other)?,
                    }
                    moved += 1;
                }
                Ok(())
            });
            match count {
                Ok(count) => result.failed.extend(count.failed),
                Err(LiveError::NoProcess { .. }) => {}
                Err(error) => {
                    let left = wanted.drain().map(|(_, assigned)| assigned.socket.fd);
                    result.failed.extend(left.map(|fd| (pid, fd, io::Error::other(error.to_string()))));
                }
            }
            result.moved += moved;
            result.closed += wanted.len();
        }
        result
    }
}
