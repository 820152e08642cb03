//! Archives for the first file system of a Linux kernel ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;

/// An archive that is being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

const FOLDER: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;

impl Archive {
    /// Adds a file of root's. `path` is absolute, `mode` what chmod takes.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, FILE | mode & 0o7777, content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, LINK, target.as_bytes());
    }

    /// Adds a folder and those that it lies in.
    pub fn folder(&mut self, path: &str) {
        self.parents(&format!("{path}/."));
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("/TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// The kernel makes no folders on its own, and a folder must come before what lies in it.
    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/').filter(|(at, _)| *at > 0) {
            let folder = &path[..at];
            if self.folders.insert(folder.to_owned()) {
                self.entry(folder, FOLDER, &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        let name = path.trim_start_matches('/');
        self.entries += 1;
        let links = 1;
        let size = u32::try_from(content.len()).expect("no file of a guest has 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a path is short");
        // inode, mode, uid, gid, nlink, mtime, filesize, device (2), special device (2), namesize, check
        let header = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_once_and_before_what_lies_in_them() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", 0o755, b"xyz");
        archive.link("/a/d", "b/c");
        archive.folder("/e");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let names: Vec<&str> =
            text.split("070701").skip(1).map(|entry| entry[104..].split('\0').next().unwrap()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/d", "e", "TRAILER!!!"]);
    }

    #[test]
    fn a_header_is_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.file("/x", 0o755, b"12345");
        let bytes = archive.finish();
        let header = "070701000000010000\
                      81ED000000000000000000000001000000000000000500000000000000000000000000000000000000020000\
                      0000x\0";
        assert_eq!(&bytes[..header.len()], header.as_bytes());
        // The name ends at a multiple of four, and so does the content.
        assert_eq!(&bytes[112..120], b"12345\0\0\0");
    }
}
