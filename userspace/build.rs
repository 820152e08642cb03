//! Embeds the eBPF object.
//!
//! Plain `cargo build` must work for anyone, and most machines cannot compile eBPF. So this script
//! compiles nothing: `cargo xtask build` makes the object, packagers hand one in with
//! `QJUMP_BPF_OBJECT`, and without either the binary is built all the same and says, when it is asked
//! to load, what is missing.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-env-changed=QJUMP_BPF_OBJECT");
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/qjump.o");
    let object = env::var_os("QJUMP_BPF_OBJECT").map_or(built, PathBuf::from);
    println!("cargo:rerun-if-changed={}", object.display());
    let embedded = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("qjump.o");
    if object.exists() {
        fs::copy(&object, &embedded).expect("the eBPF object is readable");
    } else {
        assert!(
            env::var_os("QJUMP_BPF_OBJECT").is_none(),
            "QJUMP_BPF_OBJECT names {}, which does not exist",
            object.display()
        );
        fs::write(&embedded, b"").expect("OUT_DIR is writable");
    }
}
