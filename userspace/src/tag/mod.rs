//! Levels for programs: which processes, sockets and cgroups there are, and which level each gets.

pub mod assign;
pub mod live;
pub mod process;
pub mod rules;
