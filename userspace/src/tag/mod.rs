//! Levels for programs: which processes, sockets and cgroups there are, and which level each gets.

pub mod live;
