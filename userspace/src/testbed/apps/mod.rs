//! Applications of the experiments that Debian does not have, and what it takes to read those that it has.

pub mod commit;
pub mod ptpd;
pub mod timely;
pub mod watch;
