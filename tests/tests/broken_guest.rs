//! What `cargo xtask vm` makes of a guest that ends badly. They are to fail, so they run when they are asked for alone:
//! `cargo xtask vm --kernel 6.1 --limit 60 broken_guest -- --ignored panics` (or `hangs`), and what it says is the result.

use anyhow::{Result, ensure};
use qjump_tests::kernel::is_guest;

#[test]
#[ignore = "ends the machine"]
fn panics() -> Result<()> {
    ensure!(is_guest(), "this is for a virtual machine of `cargo xtask vm`");
    std::fs::write("/proc/sysrq-trigger", "c")?;
    unreachable!("the kernel has given up");
}

#[test]
#[ignore = "never ends"]
fn hangs() -> Result<()> {
    ensure!(is_guest(), "this is for a virtual machine of `cargo xtask vm`");
    loop {
        std::thread::park();
    }
}
