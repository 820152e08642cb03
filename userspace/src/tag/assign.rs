//! Applying rules to the sockets that are there: first all of the host's sockets are looked at, then those are moved
//! that have another level than their rule says.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    io,
    os::fd::RawFd,
};

use thiserror::Error;

use super::{
    live::{LiveError, LiveSocket, each_socket},
    process::Process,
    rules::{Match, Rules},
};
use crate::socket::set_level;

/// Why the sockets of this host could not be looked at.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the message is the documentation")]
pub enum AssignError {
    #[error("cannot list the processes: {0}; /proc must be mounted")]
    Processes(io::Error),
    #[error(transparent)]
    Sockets(#[from] LiveError),
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
}

impl Assigned {
    /// Whether the socket has its level already.
    pub fn is_settled(&self) -> bool {
        self.socket.priority == u32::from(self.found.level.number())
    }
}

/// What rules are about on this host at one moment.
#[derive(Debug, Default)]
pub struct Assignment {
    /// The sockets that rules match, by process and descriptor.
    pub sockets: Vec<Assigned>,
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
    /// Looks at all sockets of all processes; changes nothing.
    ///
    /// # Errors
    /// If /proc is not there, or the kernel lacks what this needs.
    pub fn find(rules: &Rules) -> Result<Self, AssignError> {
        let mut assignment = Self::default();
        let mut best: HashMap<u64, Assigned> = HashMap::new();
        for pid in Process::all().map_err(AssignError::Processes)? {
            // It has ended since.
            let Ok(process) = Process::read(pid) else { continue };
            let count = each_socket(pid, |_, socket| {
                if let Some(found) = rules.find(&process, socket) {
                    let assigned = || Assigned { process: process.clone(), socket: socket.clone(), found };
                    match best.entry(socket.inode) {
                        Entry::Vacant(entry) => drop(entry.insert(assigned())),
                        Entry::Occupied(mut entry) if entry.get().found.precedence < found.precedence => {
                            entry.insert(assigned());
                        }
                        Entry::Occupied(_) => {}
                    }
                }
                Ok(())
            });
            match count {
                Ok(count) => assignment.failed.extend(count.failed),
                Err(LiveError::NoProcess { .. }) => {}
                Err(LiveError::Permission { pid }) => assignment.refused.push(pid),
                Err(error) => return Err(error.into()),
            }
        }
        assignment.sockets = best.into_values().collect();
        assignment.sockets.sort_unstable_by_key(|assigned| (assigned.socket.pid, assigned.socket.fd));
        Ok(assignment)
    }

    /// Sets the level of each socket that has another one than its rule says. That a process has ended meanwhile, or
    /// closed a socket, is no failure.
    pub fn apply(&self) -> Moved {
        let mut by_process: BTreeMap<u32, HashMap<u64, &Assigned>> = BTreeMap::new();
        for assigned in self.sockets.iter().filter(|assigned| !assigned.is_settled()) {
            by_process.entry(assigned.socket.pid).or_default().insert(assigned.socket.inode, assigned);
        }
        let mut result = Moved::default();
        for (pid, mut wanted) in by_process {
            let mut moved = 0;
            let count = each_socket(pid, |duplicate, socket| {
                if let Some(assigned) = wanted.remove(&socket.inode) {
                    set_level(&duplicate, assigned.found.level).map_err(io::Error::other)?;
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
