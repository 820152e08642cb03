//! `cargo xtask vm` where its packages cannot be had: what it says, what it goes on with, and what it leaves.
//!
//! The machine is a folder with a build tree, and with programs in the place of apt, dpkg and QEMU.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

struct Machine(PathBuf);

/// What Debian's servers and the disk do.
struct World {
    has_qemu: bool,
    /// Shell that is run for `apt-get update`.
    update: &'static str,
    /// Shell that is run for each package `$1` that is fetched, where it is to lie.
    fetch: &'static str,
    /// Shell that is run for each archive `$1` that is unpacked into the folder `$2`.
    unpack: &'static str,
}

const WELL: World = World { has_qemu: true, update: "", fetch: FETCHED, unpack: UNPACKED };
const FETCHED: &str = "echo package > $1.deb";
const UNPACKED: &str = "/bin/mkdir -p $2/boot";

impl Machine {
    fn new(name: &str, world: &World) -> Self {
        let machine = Self(std::env::temp_dir().join(format!("xtask-guests-{name}-{}", std::process::id())));
        let World { has_qemu, update, fetch, unpack } = world;
        machine.program(
            "apt-get",
            &format!(
                "fetch() {{ {fetch}\n}}\n\
                 case \" $* \" in\n\
                 *' --version '*) ;;\n\
                 *' --simulate '*) echo 'E: Unable to locate package qemu-system-x86' >&2; exit 100 ;;\n\
                 *' update '*) {update}\n;;\n\
                 *' download '*) for word; do case $word in linux-*) fetch $word || exit 100 ;; esac; done ;;\n\
                 esac"
            ),
        );
        machine.program("apt-cache", "for n in 56 57 9; do echo linux-image-6.1.0-$n-cloud-amd64; done");
        machine.program(
            "dpkg-deb",
            &format!("unpack() {{ {unpack}\n}}\ncase $1 in -x) shift; unpack \"$@\" || exit 2 ;; esac"),
        );
        for program in ["ip", "tc", "iperf3", "ping", "xz", "strip"] {
            machine.program(program, "");
        }
        if *has_qemu {
            machine.program("qemu-system-x86_64", "exit 1");
        }
        machine
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.0.join("bin").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Exit status and standard error. A kernel that no mirror has is always among those that are asked for, so
    /// that nothing is built.
    fn vm(&self, arguments: &[&str]) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["vm", "--kernel", "6.1", "--kernel", "6.12"])
            .args(arguments)
            .env("PATH", self.0.join("bin"))
            .env("CARGO_MANIFEST_DIR", self.0.join("xtask"))
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// What lies in a folder of target/vm.
    fn kept(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join("target/vm").join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// EX_TEMPFAIL of sysexits.h.
const NOT_TO_BE_HAD: i32 = 75;

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
}

#[test]
fn without_qemu_the_remedy_is_named() {
    let (status, said) = Machine::new("qemu", &World { has_qemu: false, ..WELL }).vm(&[]);
    assert_eq!(status, NOT_TO_BE_HAD, "{said}");
    has(&said, &["guests need QEMU", "Unable to locate package", "sudo apt-get install qemu-system-x86"]);
}

#[test]
fn without_a_network_the_first_kernel_cannot_be_had_and_a_fetched_one_still_can() {
    const NO_NETWORK: &str = "echo \"E: Temporary failure resolving 'deb.debian.org'\" >&2; exit 100";
    let (status, said) = Machine::new("network", &World { update: NO_NETWORK, ..WELL }).vm(&[]);
    assert_eq!(status, NOT_TO_BE_HAD, "{said}");
    has(&said, &["cannot get a kernel 6.1:", "lists of packages", "Temporary failure resolving"]);

    let machine = Machine::new("offline", &World { update: NO_NETWORK, ..WELL });
    fs::create_dir_all(machine.0.join("target/vm/kernels/6.1.0-9-cloud-amd64")).unwrap();
    let (status, said) = machine.vm(&["--refresh"]);
    assert_eq!(status, NOT_TO_BE_HAD, "{said}");
    has(
        &said,
        &["cannot look for a newer kernel 6.1", "going on with 6.1.0-9-cloud-amd64", "cannot get a kernel 6.12:"],
    );
    // And without being asked for a newer one, nobody is asked for 6.1 at all.
    assert!(!machine.vm(&[]).1.contains("kernel 6.1:"));
}

#[test]
fn a_kernel_that_has_vanished_or_is_broken_is_said_and_the_next_one_taken() {
    let gone = World {
        fetch: "case $1 in *.0-57-cloud*) echo 'E: Failed to fetch http://deb.debian.org/57.deb  404  Not Found' >&2; return 100 ;; esac
            echo package > $1.deb",
        ..WELL
    };
    let truncated = World {
        unpack: "case $1 in *.0-57-cloud*) echo 'dpkg-deb: error: unexpected end of file' >&2; return 2 ;; esac
            /bin/mkdir -p $2/boot",
        ..WELL
    };
    for (name, world, why) in [("gone", gone, "404  Not Found"), ("truncated", truncated, "unexpected end of file")] {
        let machine = Machine::new(name, &world);
        let (status, said) = machine.vm(&[]);
        assert_eq!(status, NOT_TO_BE_HAD, "{said}");
        has(&said, &["6.1.0-57-cloud-amd64 cannot be had", why, "trying the next one of the series"]);
        has(&said, &["the mirror has no package linux-image-6.12"]);
        assert_eq!(machine.kept("kernels"), ["6.1.0-56-cloud-amd64"], "{said}");
        assert_eq!(machine.kept("partial"), [""; 0], "{said}");
    }
}

#[test]
fn a_full_disk_ends_it_at_once_and_leaves_nothing_half() {
    let full = World { unpack: "echo 'tar: vmlinuz: Cannot write: No space left on device' >&2; return 2", ..WELL };
    let machine = Machine::new("full", &full);
    let (status, said) = machine.vm(&[]);
    assert_eq!(status, NOT_TO_BE_HAD, "{said}");
    has(&said, &["No space left on device", "make room", machine.0.to_str().unwrap()]);
    assert!(!said.contains("trying the next"), "{said}");
    assert_eq!((machine.kept("kernels"), machine.kept("partial")), (vec![], vec![]));
}
