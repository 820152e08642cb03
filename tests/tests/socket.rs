//! A program's own choice of level, as the documentation shows it: in C and in Python, without privileges.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::Result;
use qjump_tests::nobody::{self, Folder};

/// The line of the README.
const PYTHON: &str = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); \
                      s.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 5); s.sendto(b'hello', ('127.0.0.1', 7000))";

fn streams(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_example_in_c() -> Result<()> {
    let folder = Folder::new()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/examples/level.c");
    let program = folder.compile(&source)?;
    for host in ["127.0.0.1", "::1"] {
        for level in 0..=7 {
            let arguments = [&level.to_string(), host, "7000", "hello"];
            if level < 7 {
                let output = nobody::command(&program).args(arguments).output()?;
                assert_eq!(streams(&output), (format!("sent at level {level}\n"), String::new()));
            }
            let output = Command::new(&program).args(arguments).output()?;
            assert_eq!(streams(&output), (format!("sent at level {level}\n"), String::new()), "as root");
        }
    }
    let refused = nobody::command(&program).args(["7", "127.0.0.1", "7000", "hello"]).output()?;
    assert_eq!(refused.status.code(), Some(1));
    let (out, error) = streams(&refused);
    assert!(out.is_empty() && error.contains("CAP_NET_ADMIN") && error.contains("qjump run --level 7"), "{error}");
    for wrong in ["8", "-1", "", "x"] {
        let output = nobody::command(&program).args([wrong, "127.0.0.1", "7000", "hello"]).output()?;
        assert_eq!(output.status.code(), Some(64), "{wrong}");
    }
    Ok(())
}

#[test]
fn the_line_of_python() -> Result<()> {
    let line = format!("{PYTHON}; print(s.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY))");
    let output = nobody::command("/usr/bin/python3").args(["-c", &line]).output()?;
    assert_eq!(streams(&output), ("5\n".to_owned(), String::new()));
    let refused =
        nobody::command("/usr/bin/python3").args(["-c", &PYTHON.replace("PRIORITY, 5", "PRIORITY, 7")]).output()?;
    assert!(!refused.status.success() && streams(&refused).1.contains("PermissionError"), "{refused:?}");
    Ok(())
}
