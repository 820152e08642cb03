//! Files that are either written whole or not at all.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Writes a file: all of it, or nothing, and then what was there before stays. A device or a pipe is written to as it
/// is.
///
/// # Errors
/// If it cannot be written, with its name.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => Err(io::Error::from(io::ErrorKind::IsADirectory)).with_context(failed),
        // To replace a device would be to remove it.
        Ok(there) if !there.is_file() => {
            File::options().write(true).open(path).and_then(|mut file| file.write_all(bytes)).with_context(failed)
        }
        // Who names a link means the file.
        Ok(there) => {
            let target = fs::canonicalize(path).with_context(failed)?;
            replace(&target, bytes, Some(there.permissions())).with_context(failed)
        }
        Err(_) => replace(path, bytes, None).with_context(failed),
    }
}

fn replace(path: &Path, bytes: &[u8], permissions: Option<fs::Permissions>) -> io::Result<()> {
    let temporary = beside(path)?;
    let write = || {
        let mut file = File::create_new(&temporary)?;
        file.write_all(bytes)?;
        if let Some(permissions) = permissions {
            file.set_permissions(permissions)?;
        }
        // Some file systems learn only now that they are full.
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|error| {
        // What somebody else has left there is his.
        if error.kind() != io::ErrorKind::AlreadyExists {
            let _ = fs::remove_file(&temporary);
        }
    })
}

/// A name in the same folder, because a file can be renamed only within its file system.
fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(hidden))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("qjump-file-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_and_through_links() {
        let folder = folder("replace");
        let (file, link) = (folder.join("file"), folder.join("link"));
        write_file(&file, b"first").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        symlink(&file, &link).unwrap();
        write_file(&link, b"second").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"second");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "no temporary file is left");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let full = write_file(Path::new("/dev/full"), b"x").unwrap_err();
        assert!(format!("{full:#}").contains("cannot write /dev/full: No space left"), "{full:#}");
        write_file(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        let folder = folder("fails");
        let inside = folder.join("none/file");
        assert!(format!("{:#}", write_file(&inside, b"x").unwrap_err()).contains("No such file"));
        assert!(format!("{:#}", write_file(&folder, b"x").unwrap_err()).contains("directory"));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir_all(folder).unwrap();
    }
}
