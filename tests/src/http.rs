//! HTTP as far as tests need it: a request and its answer, and a server that answers what it is told to.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};

/// The status and the body of an answer, and its headers as they came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// 200 is good.
    pub status: u16,
    /// Lines, with the status line.
    pub headers: String,
    /// What follows them.
    pub body: String,
}

/// Asks for a path, with more lines of headers.
pub fn get(address: SocketAddr, path: &str, headers: &str) -> Result<Answer> {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}\r\n"))
}

/// Sends these bytes, and reads until the server closes.
pub fn ask(address: SocketAddr, request: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (headers, body) = text.split_once("\r\n\r\n").with_context(|| format!("no whole answer: {text}"))?;
    let status = headers.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no status")?;
    let body = if headers.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        unchunked(body).context("bad chunks")?
    } else {
        body.to_owned()
    };
    Ok(Answer { status, headers: headers.to_owned(), body })
}

/// The data of a body in chunks (RFC 9112, section 7.1).
fn unchunked(mut body: &str) -> Option<String> {
    let mut data = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n")?;
        let size = usize::from_str_radix(size.trim(), 16).ok()?;
        if size == 0 {
            return Some(data);
        }
        data += rest.get(..size)?;
        body = rest.get(size..)?.strip_prefix("\r\n")?;
    }
}

/// A word as part of a query.
pub fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// A server on loopback that answers every request with the same bytes, which can be changed; ends when dropped.
pub struct Server {
    /// Where it is.
    pub address: SocketAddr,
    answer: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts one with this answer, headers and all.
    pub fn new(answer: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, stop) = (listener.local_addr()?, Arc::new(AtomicBool::new(false)));
        let answer = Arc::new(Mutex::new(answer.as_bytes().to_vec()));
        let (stopped, bytes) = (Arc::clone(&stop), Arc::clone(&answer));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                let _ = stream.read(&mut [0; 4096]);
                let _ = stream.write_all(&bytes.lock().expect("a test failed while it changed the answer"));
            }
        });
        Ok(Self { address, answer, stop, thread: Some(thread) })
    }

    /// Answers this from now on.
    pub fn say(&self, answer: &str) {
        *self.answer.lock().expect("the server failed") = answer.as_bytes().to_vec();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        // It waits for a connection.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
