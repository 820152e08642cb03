//! Before the measurement: whether it is memcached, and a value for each key. One blocking connection, without a level.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    engine::Progress,
    protocol::{self, Answer},
    workload::Content,
};
use crate::measure::tcp::Options;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(5);
/// Values that are stored without waiting for an answer.
const BATCH: u64 = 64;

/// A connection that waits for answers.
pub(super) struct Setup {
    stream: TcpStream,
    to: SocketAddr,
    input: Vec<u8>,
}

impl Setup {
    pub fn connect(to: SocketAddr) -> Result<Self> {
        let stream = Options::default().connect(to, CONNECT_TIMEOUT)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        Ok(Self { stream, to, input: Vec::new() })
    }

    /// The server's version.
    pub fn version(&mut self) -> Result<String> {
        self.stream.write_all(b"version\r\n")?;
        while !self.input.ends_with(b"\n") && self.input.len() < 1_024 {
            self.read().context("it did not answer to 'version'")?;
        }
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.input)).trim_end().to_owned();
        match text.strip_prefix("VERSION ") {
            Some(version) => Ok(version.to_owned()),
            None => bail!(
                "what listens at {} is no memcached: it answered '{}' to 'version'",
                self.to,
                text.chars().take(80).collect::<String>().escape_debug()
            ),
        }
    }

    /// Stores the value of each key. Whether it came to the end, because nobody stopped it.
    pub fn populate(&mut self, content: &Content, progress: &Progress) -> Result<bool> {
        let keys = content.workload().keys;
        let mut out = Vec::new();
        for first in (0..keys).step_by(BATCH as usize) {
            if progress.stop.load(Relaxed) {
                return Ok(false);
            }
            let batch = first..keys.min(first + BATCH);
            out.clear();
            for key in batch.clone() {
                protocol::set(&mut out, &content.key(key), content.value(key));
            }
            self.stream.write_all(&out).context("the server does not take the values")?;
            for key in batch {
                self.stored(key, content.value(key).len())?;
                progress.populated.fetch_add(1, Relaxed);
            }
        }
        Ok(true)
    }

    fn stored(&mut self, key: u64, bytes: usize) -> Result<()> {
        loop {
            match protocol::answer_to_set(&self.input)? {
                Some((Answer::ServerError(why), _)) => bail!(
                    "the server does not take the value of key {key} ({bytes} bytes): {}; give it more memory \
                     (memcached -m), or use fewer keys or smaller values",
                    String::from_utf8_lossy(why)
                ),
                Some((_, length)) => {
                    self.input.drain(..length);
                    return Ok(());
                }
                None => self.read()?,
            }
        }
    }

    fn read(&mut self) -> Result<()> {
        let mut room = [0; 4_096];
        let read = self.stream.read(&mut room).with_context(|| format!("no answer from {}", self.to))?;
        ensure!(read > 0, "{} hung up", self.to);
        self.input.extend_from_slice(&room[..read]);
        Ok(())
    }
}
