//! Embeds the eBPF objects.
//!
//! Plain `cargo build` must work for anyone, and most machines cannot compile eBPF. So this script
//! compiles nothing: `cargo xtask build` makes the objects, packagers hand them in with
//! `QJUMP_BPF_OBJECT`, and without either the binary is built all the same and says, when it is asked
//! to load, what is missing. The object for old kernels lies beside the other.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo:rerun-if-env-changed=QJUMP_BPF_OBJECT");
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/qjump.o");
    let prebuilt = env::var_os("QJUMP_BPF_OBJECT").map(PathBuf::from);
    if let Some(path) = &prebuilt {
        assert!(path.exists(), "QJUMP_BPF_OBJECT names {}, which does not exist", path.display());
    }
    let object = prebuilt.unwrap_or(built);
    embed(&object, "qjump.o");
    embed(&object.with_file_name("qjump-old.o"), "qjump-old.o");
}

/// Copies an object to where `include_bytes` finds it; an empty one if there is none.
fn embed(object: &Path, name: &str) {
    println!("cargo:rerun-if-changed={}", object.display());
    let embedded = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);
    if object.exists() {
        fs::copy(object, &embedded).expect("the eBPF object is readable");
    } else {
        fs::write(&embedded, b"").expect("OUT_DIR is writable");
    }
}
