//! Whether the processor's help (KVM) works here: not whether its device is there, but whether a kernel boots with it. Inside some
//! virtual machines such a guest stands still.

use super::boot::{Clock, End, Guest, Qemu};
use super::kernel::Kernel;
use crate::say;
use std::fs::{self, OpenOptions};
use std::path::Path;
use std::time::Duration;

/// A kernel boots in a second or two. Without a file system it gives up then, and is off.
const LIMIT: Duration = Duration::from_secs(15);
/// Changes with each boot of this machine, and so may what it can do.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
const DEVICE: &str = "/dev/kvm";

/// Whether guests can have it. Tried once in each boot of this machine; the answer is kept in the build folder.
pub fn works(qemu: &Qemu, kernel: &Kernel, vm: &Path) -> bool {
    let may_use = OpenOptions::new().read(true).write(true).open(DEVICE).is_ok();
    let boot = fs::read_to_string(BOOT).unwrap_or_default();
    let file = vm.join("kvm");
    let known = fs::read_to_string(&file).unwrap_or_default();
    may_use
        && remembered(&known, &boot).unwrap_or_else(|| {
            let works = tried(qemu, &kernel.image(), &vm.join("partial/kvm"));
            if !works {
                say!(
                    "KVM is there and does not work ({} s were not enough to boot): guests are emulated",
                    LIMIT.as_secs()
                );
            }
            // What cannot be kept is tried again.
            let _ = fs::write(&file, format!("{} {works}\n", boot.trim()));
            works
        })
}

/// An answer from before, if it is of this boot.
fn remembered(known: &str, boot: &str) -> Option<bool> {
    let (of, works) = known.trim().split_once(' ')?;
    if of == boot.trim() { works.parse().ok() } else { None }
}

/// Boots the kernel with nothing else, and sees whether it comes to its end in time, having said why.
fn tried(qemu: &Qemu, kernel: &Path, folder: &Path) -> bool {
    if fs::create_dir_all(folder).is_err() {
        return false;
    }
    let clock = Clock::Real { cpus: 1, kvm: true };
    let guest = Guest { kernel, image: None, folder, memory: 256, clock, shell: false };
    let end = qemu.run(&guest, LIMIT, |_| {});
    let came_up = fs::read_to_string(folder.join("console.log")).is_ok_and(|console| console.contains("Kernel panic"));
    matches!(end, Ok(End::Off)) && came_up
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_holds_for_one_boot() {
        assert_eq!(remembered("1-2 true\n", "1-2\n"), Some(true));
        assert_eq!(remembered("1-2 false\n", "1-2\n"), Some(false));
        assert_eq!(remembered("1-2 true\n", "1-3\n"), None);
        assert_eq!(remembered("", "1-2\n"), None);
        assert_eq!(remembered("1-2 perhaps", "1-2"), None);
    }
}
