//! The .deb, by dpkg-deb: every Debian has it. (cargo-deb would have to be installed, and builds what cargo builds; here the eBPF
//! object, the library, pages and completions come first.)

use super::Release;
use crate::process;
use crate::workspace::Workspace;
use anyhow::{Context, bail};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Packs the files below `root`, which has nothing else.
pub fn build(workspace: &Workspace, release: &Release, root: &Path, deb: &Path) -> anyhow::Result<()> {
    let (scripts, control) = (workspace.root().join("scripts/debian"), root.join("DEBIAN"));
    fs::create_dir(&control)?;
    fs::set_permissions(&control, fs::Permissions::from_mode(0o755))?;
    let programs = ["usr/bin/qjump".to_owned(), format!("usr/lib/{}/libqjump_preload.so", release.multiarch)];
    let programs = programs.iter().map(|program| fs::read(root.join(program))).collect::<Result<Vec<_>, _>>()?;
    let Some(glibc) = programs.iter().filter_map(|program| newest_glibc(program)).max() else {
        bail!("the command names no version of glibc; was it built for another C library?");
    };
    let template = fs::read_to_string(scripts.join("control")).context("cannot read scripts/debian/control")?;
    let text = template
        .replace("@VERSION@", release.version)
        .replace("@ARCHITECTURE@", release.architecture)
        .replace("@GLIBC@", &format!("{}.{}", glibc.0, glibc.1))
        .replace("@KIB@", &(bytes(root)?.div_ceil(1024)).to_string());
    fs::write(control.join("control"), text)?;
    for script in ["postinst", "prerm", "postrm"] {
        let to = control.join(script);
        fs::copy(scripts.join(script), &to).with_context(|| format!("cannot copy scripts/debian/{script}"))?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    }
    let mut pack = Command::new("dpkg-deb");
    pack.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
    process::run(pack.args(["--root-owner-group", "-Zxz", "--build"]).arg(root).arg(deb))?;
    Ok(fs::remove_dir_all(control)?)
}

/// The newest version of glibc that a program asks for, by the names of its symbols' versions: GLIBC_2.34.
fn newest_glibc(program: &[u8]) -> Option<(u32, u32)> {
    const MARK: &[u8] = b"GLIBC_";
    let places = program.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK);
    let version = |at: usize| {
        let rest = &program[at + MARK.len()..];
        let end = rest.iter().position(|byte| !(byte.is_ascii_digit() || *byte == b'.'))?;
        let (major, minor) = std::str::from_utf8(&rest[..end]).ok()?.split_once('.')?;
        // 2.2.5 is 2.2, which everybody has.
        Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
    };
    places.filter_map(|(at, _)| version(at)).max()
}

/// The bytes of all files below a folder.
fn bytes(folder: &Path) -> anyhow::Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        sum += if entry.file_type()?.is_dir() { bytes(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_symbol_decides() {
        assert_eq!(newest_glibc(b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4\0GLIBC_PRIVATE\0"), Some((2, 34)));
        assert_eq!(newest_glibc(b"nothing"), None);
    }
}
