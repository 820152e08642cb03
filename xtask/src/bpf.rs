//! The eBPF objects: `target/bpf/qjump.o` and `qjump-old.o`, for newer and older kernels, which
//! userspace/build.rs puts into the qjump command, and `target/bpf/lab.o`, which only tests and benchmarks load.

use crate::toolchain::Compiler;
use crate::workspace::Workspace;
use crate::{linker, pins, process, say};
use anyhow::{Context, bail, ensure};
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names a ready-made `qjump.o`, for packagers and for machines without an eBPF compiler; a `qjump-old.o` beside it is taken,
/// too. userspace/build.rs knows the variable as well.
pub const PREBUILT: &str = "QJUMP_BPF_OBJECT";

/// Which objects a task needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objects {
    /// Enough to build and run qjump. The other is made as well when there is a compiler at work anyway.
    Program,
    /// Both.
    ProgramAndLab,
}

/// Makes the objects, or takes the prebuilt one.
pub fn build(workspace: &Workspace, objects: Objects) -> anyhow::Result<()> {
    match prebuilt()? {
        None => {
            let compiler = Compiler::find(objects == Objects::Program)?;
            compile(
                workspace,
                &compiler,
                "program",
                &[("qjump", workspace.program_object()), ("lab", workspace.lab_object())],
            )?;
            compile(workspace, &compiler, "old", &[("qjump", workspace.old_object())])
        }
        Some(object) => {
            say!("eBPF programs: {}, as {PREBUILT} says", object.display());
            let bytes = read_object(&object).with_context(|| format!("{PREBUILT} names {}", object.display()))?;
            replace(&workspace.program_object(), &bytes)?;
            let beside = object.with_file_name(workspace.old_object().file_name().expect("it is a file"));
            if beside.exists() {
                replace(&workspace.old_object(), &read_object(&beside)?)?;
            }
            if objects == Objects::Program {
                say!("target/bpf/lab.o is not made: only tests and benchmarks need it");
                return Ok(());
            }
            let compiler = Compiler::find(false)
                .context("tests and benchmarks need target/bpf/lab.o too, which has to be compiled")?;
            compile(workspace, &compiler, "program", &[("lab", workspace.lab_object())])
        }
    }
}

/// The prebuilt object that the user names, as an absolute path: the programs that read the variable next run in
/// other folders.
pub fn prebuilt() -> anyhow::Result<Option<PathBuf>> {
    let Some(path) = env::var_os(PREBUILT) else { return Ok(None) };
    ensure!(!path.is_empty(), "{PREBUILT} is set and empty: unset it, or give the path of a qjump.o");
    Ok(Some(std::path::absolute(path)?))
}

/// Compiles programs of the crate qjump-ebpf, with one of its features, and puts each where it belongs.
fn compile(
    workspace: &Workspace,
    compiler: &Compiler,
    feature: &str,
    programs: &[(&str, PathBuf)],
) -> anyhow::Result<()> {
    let linker = linker::ensure(workspace)?;
    let names: Vec<_> = programs.iter().filter_map(|(_, object)| Some(object.file_name()?.to_string_lossy())).collect();
    say!("building the eBPF programs with {compiler}: {}", names.join(", "));
    let folder = workspace.target("bpf");
    let mut cargo = compiler.cargo(workspace, &linker)?;
    cargo.args(["--locked", "--release", "--package", "qjump-ebpf", "--features", feature]);
    cargo.args(["--target", pins::BPF_TARGET, "--target-dir"]).arg(&folder);
    for (name, _) in programs {
        cargo.args(["--bin", name]);
    }
    process::run(&mut cargo).context("cannot build the eBPF programs")?;
    for (name, object) in programs {
        let built = folder.join(pins::BPF_TARGET).join("release").join(name);
        let bytes = read_object(&built).with_context(|| format!("cannot use {}", built.display()))?;
        replace(object, &bytes)?;
    }
    Ok(())
}

/// Reads a file and makes sure that it is an eBPF object for this machine.
fn read_object(path: &Path) -> anyhow::Result<Vec<u8>> {
    let bytes = fs::read(path).context("cannot read it")?;
    check_object(&bytes)?;
    Ok(bytes)
}

/// Checks what the header of an ELF file says: the byte order, and the machine that it is for.
fn check_object(bytes: &[u8]) -> anyhow::Result<()> {
    const EM_BPF: u16 = 247;
    const OWN_ORDER: u8 = if cfg!(target_endian = "big") { 2 } else { 1 };
    // The header begins with the magic number, the class and the byte order; the machine stands at offset 18.
    let Some((&[b'\x7f', b'E', b'L', b'F', _class, order, ..], machine)) =
        bytes.first_chunk::<18>().zip(bytes[18.min(bytes.len())..].first_chunk::<2>())
    else {
        bail!("this is not an ELF file");
    };
    let machine = if order == 2 { u16::from_be_bytes(*machine) } else { u16::from_le_bytes(*machine) };
    ensure!(machine == EM_BPF, "this is an ELF file for machine {machine}, not for eBPF ({EM_BPF})");
    ensure!(order == OWN_ORDER, "this is an eBPF object of the other byte order: it is not for this machine");
    Ok(())
}

/// Writes a file unless it has these bytes already: a new time of change would make cargo build qjump again. The
/// file is replaced in one step, so that nobody reads half of it.
fn replace(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let write = || {
        fs::create_dir_all(path.parent().expect("the file lies in a folder"))?;
        let new = path.with_extension(format!("new-{}", std::process::id()));
        fs::write(&new, bytes)?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bytes of an ELF file.
    fn header(order: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut header = b"\x7fELF\x02".to_vec();
        header.push(order);
        header.resize(18, 0);
        header.extend(machine);
        header.resize(64, 0);
        header
    }

    fn complaint(bytes: &[u8]) -> String {
        check_object(bytes).unwrap_err().to_string()
    }

    #[test]
    fn only_bpf_objects_of_this_byte_order_are_taken() {
        let (own, other) = if cfg!(target_endian = "big") { (2, 1) } else { (1, 2) };
        let bpf = |order| header(order, if order == 2 { [0, 247] } else { [247, 0] });
        check_object(&bpf(own)).unwrap();
        assert!(complaint(&bpf(other)).contains("the other byte order"));
        assert!(complaint(&header(1, [62, 0])).contains("machine 62"));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(complaint(b""), "this is not an ELF file");
        assert_eq!(complaint(b"\x7fELF"), "this is not an ELF file");
        assert_eq!(complaint(&[0; 64]), "this is not an ELF file");
        assert!(check_object(&fs::read(env::current_exe().unwrap()).unwrap()).is_err());
    }

    #[test]
    fn an_unchanged_object_keeps_its_time() {
        let folder = env::temp_dir().join(format!("qjump-xtask-{}", std::process::id()));
        let path = folder.join("deep/qjump.o");
        replace(&path, b"one").unwrap();
        let past = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&path).unwrap().set_modified(past).unwrap();
        replace(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), past);
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file was left");
        fs::remove_dir_all(folder).unwrap();
    }
}
