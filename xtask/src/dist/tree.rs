//! The files of a package, as they lie in the system that gets it.

use super::Release;
use crate::process;
use crate::workspace::Workspace;
use anyhow::Context;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Where each shell of Debian looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/qjump"),
    ("zsh", "usr/share/zsh/vendor-completions/_qjump"),
    ("fish", "usr/share/fish/vendor_completions.d/qjump.fish"),
];

const DOCUMENTATION: &str = "usr/share/doc/qjump";

/// Lays all of them below `root`.
pub fn lay(workspace: &Workspace, release: &Release, root: &Path) -> anyhow::Result<()> {
    let binary = workspace.binary();
    // Line tables stay in target/release: they are five times the program.
    for (file, to, mode) in [
        (&binary, "usr/bin/qjump".to_owned(), 0o755),
        (&workspace.preload(), format!("usr/lib/{}/libqjump_preload.so", release.multiarch), 0o644),
    ] {
        let to = place(root, &to)?;
        process::run(Command::new("strip").args(["--strip-debug", "-o"]).arg(&to).arg(file))?;
        fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    }
    for (shell, to) in COMPLETIONS {
        write(root, to, &ask(&binary, &["completions", shell])?)?;
    }
    write(root, "usr/share/qjump/qjump.schema.json", &ask(&binary, &["schema"])?)?;

    let pages = root.join("usr/share/man/man1");
    fs::create_dir_all(&pages)?;
    process::run(Command::new(&binary).arg("man").arg(&pages))?;
    for page in fs::read_dir(&pages)? {
        process::run(Command::new("gzip").arg("-9n").arg(page?.path()))?;
    }

    let scripts = workspace.root().join("scripts");
    copy(&scripts.join("systemd/qjump.service"), root, "usr/lib/systemd/system/qjump.service")?;
    for example in ["qjump.toml", "apps.toml"] {
        copy(&scripts.join(example), root, &format!("{DOCUMENTATION}/examples/{example}"))?;
    }
    copy(&scripts.join("debian/copyright"), root, &format!("{DOCUMENTATION}/copyright"))?;
    for (file, to) in
        [("CHANGELOG.md", "changelog"), ("LICENSE-MIT", "LICENSE-MIT"), ("LICENSE-APACHE", "LICENSE-APACHE")]
    {
        copy(&workspace.root().join(file), root, &format!("{DOCUMENTATION}/{to}"))?;
        process::run(Command::new("gzip").arg("-9n").arg(root.join(DOCUMENTATION).join(to)))?;
    }
    // Empty: what is to be enforced, only the owner of the machine knows.
    fs::create_dir_all(root.join("etc/qjump/conf.d"))?;
    open_folders(root)
}

/// The place of a file, whose folder is made.
fn place(root: &Path, to: &str) -> anyhow::Result<std::path::PathBuf> {
    let path = root.join(to);
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(path)
}

fn write(root: &Path, to: &str, text: &str) -> anyhow::Result<()> {
    let path = place(root, to)?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o644))?)
}

fn copy(from: &Path, root: &Path, to: &str) -> anyhow::Result<()> {
    let text = fs::read_to_string(from).with_context(|| format!("cannot read {}", from.display()))?;
    write(root, to, &text)
}

fn ask(binary: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    process::ask(Command::new(binary).args(arguments)).map_err(anyhow::Error::msg)
}

/// Modes that do not depend on the umask of whoever builds.
fn open_folders(folder: &Path) -> anyhow::Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        } else if entry.metadata()?.permissions().mode() & 0o100 == 0 {
            fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o644))?;
        }
    }
    Ok(())
}
