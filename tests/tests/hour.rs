//! A run of an hour in constant memory: in virtual time, in which waiting costs nothing (`cargo xtask vm --virtual-time hour`).
//! Elsewhere it takes some seconds.

use std::{
    io::Read as _,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::measure::result::Document;
use qjump_tests::{
    kernel::is_virtual,
    link::{FAR, Link},
    measuring::{Server, memory, qjump},
};

/// What the list of seconds may take, KiB: 80 bytes each, and its vector doubles.
const SERIES: u64 = 1_024;

#[test]
fn memory_does_not_grow_with_time() -> Result<()> {
    let seconds = if is_virtual() { 3_600 } else { 10 };
    let link = Link::new()?;
    let server = Server::new(Some(&link.far))?;
    let (target, time) = (server.at(FAR.0), format!("{seconds}s"));
    let arguments = ["measure", "probe", &target, "--rate", "10", "--duration", &time, "--quiet", "--json", "-"];
    let mut probe = qjump(Some(&link.near), &arguments).spawn()?;
    let mut sizes = Vec::new();
    let began = Instant::now();
    // After a tenth of the time it has all that it begins with.
    let step = Duration::from_secs(seconds) / 10;
    for number in 1..10 {
        thread::sleep((began + step * number).saturating_duration_since(Instant::now()));
        ensure!(probe.try_wait()?.is_none(), "it ended early");
        sizes.push([memory(probe.id())?, server.memory()?]);
    }
    let mut text = String::new();
    probe.stdout.take().context("its output")?.read_to_string(&mut text)?;
    ensure!(probe.wait()?.success(), "{text}");
    println!("{seconds} s, the probe's and the server's memory, KiB: {sizes:?}");
    let document: Document = serde_json::from_str(&text)?;
    let counts = document.runs[0].streams[0].counts.context("no counts")?;
    assert_eq!((counts.sent, counts.lost), (seconds * 10, 0));
    let grown = |which: usize| sizes[sizes.len() - 1][which].saturating_sub(sizes[0][which]);
    assert!(grown(0) <= SERIES && grown(1) <= SERIES / 4, "{sizes:?}");
    Ok(())
}
