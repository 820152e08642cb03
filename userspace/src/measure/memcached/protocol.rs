//! memcached's text protocol, as far as a client needs it that gets and sets (doc/protocol.txt of memcached).

use thiserror::Error;

/// The longest line that a server may answer with.
const MAX_LINE: usize = 2_048;
/// The longest value that one may store (`memcached -I` goes to 1 GB; nobody here asks for more than 1 MB).
const MAX_VALUE: usize = 16 << 20;

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// To a get: the value.
    Value(&'a [u8]),
    /// To a get: there is none.
    Miss,
    /// To a set: done.
    Stored,
    /// To either: the server could not, for a reason of its own. The connection goes on.
    ServerError(&'a [u8]),
}

/// What a connection cannot recover from.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Broken {
    /// Not an answer of memcached, or not to this request.
    #[error("the server said '{0}', which is no answer to the request")]
    Unexpected(String),
    /// More than any answer has.
    #[error("the server said more than {0} bytes where an answer was due")]
    TooLong(usize),
}

/// Asks for a value.
pub fn get(out: &mut Vec<u8>, key: &[u8]) {
    out.extend_from_slice(b"get ");
    out.extend_from_slice(key);
    out.extend_from_slice(b"\r\n");
}

/// Stores a value, for good.
pub fn set(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    out.extend_from_slice(b"set ");
    out.extend_from_slice(key);
    out.extend_from_slice(format!(" 0 0 {}\r\n", value.len()).as_bytes());
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Reads the answer to a get of `key` from the beginning of what has come: the answer and its length in bytes;
/// `None` if it has not come whole.
///
/// # Errors
/// If it is none, or of another key: answers come in the order of the requests.
pub fn answer_to_get<'a>(bytes: &'a [u8], key: &[u8]) -> Result<Option<(Answer<'a>, usize)>, Broken> {
    const END: &[u8] = b"END\r\n";
    let Some(line) = line(bytes)? else { return Ok(None) };
    let head = line.len() + 2;
    let rest = &bytes[head..];
    if line == b"END" {
        return Ok(Some((Answer::Miss, head)));
    }
    if let Some(answer) = server_error(line) {
        return Ok(Some((answer, head)));
    }
    let length = value_length(line, key).ok_or_else(|| unexpected(line))?;
    if length > MAX_VALUE {
        return Err(Broken::TooLong(MAX_VALUE));
    }
    let Some(tail) = rest.get(length..length + 2 + END.len()) else { return Ok(None) };
    if tail.strip_prefix(b"\r\n") != Some(END) {
        return Err(unexpected(tail));
    }
    Ok(Some((Answer::Value(&rest[..length]), head + length + tail.len())))
}

/// The same for the answer to a set.
///
/// # Errors
/// If it is none.
pub fn answer_to_set(bytes: &[u8]) -> Result<Option<(Answer<'_>, usize)>, Broken> {
    let Some(line) = line(bytes)? else { return Ok(None) };
    let answer = if line == b"STORED" { Answer::Stored } else { server_error(line).ok_or_else(|| unexpected(line))? };
    Ok(Some((answer, line.len() + 2)))
}

/// The first line, without its end of two bytes.
fn line(bytes: &[u8]) -> Result<Option<&[u8]>, Broken> {
    let seen = &bytes[..bytes.len().min(MAX_LINE)];
    match seen.windows(2).position(|pair| pair == b"\r\n") {
        Some(end) => Ok(Some(&bytes[..end])),
        None if seen.len() < MAX_LINE => Ok(None),
        None => Err(Broken::TooLong(MAX_LINE)),
    }
}

/// Out of `VALUE key flags bytes`.
fn value_length(line: &[u8], key: &[u8]) -> Option<usize> {
    let rest = line.strip_prefix(b"VALUE ")?.strip_prefix(key)?.strip_prefix(b" ")?;
    let (_flags, length) = std::str::from_utf8(rest).ok()?.split_once(' ')?;
    length.parse().ok()
}

fn server_error(line: &[u8]) -> Option<Answer<'_>> {
    line.strip_prefix(b"SERVER_ERROR").map(|reason| Answer::ServerError(reason.trim_ascii_start()))
}

fn unexpected(text: &[u8]) -> Broken {
    let start = &text[..text.len().min(80)];
    Broken::Unexpected(String::from_utf8_lossy(start).escape_debug().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_as_the_protocol_says() {
        let mut out = Vec::new();
        get(&mut out, b"a");
        set(&mut out, b"b", b"x\r\ny");
        assert_eq!(out, b"get a\r\nset b 0 0 4\r\nx\r\ny\r\n");
    }

    #[test]
    fn answers_are_understood() {
        let value = b"VALUE key 0 7\r\nEND\r\n\r\n\r\nEND\r\nVALUE";
        assert_eq!(answer_to_get(value, b"key"), Ok(Some((Answer::Value(b"END\r\n\r\n"), 29))));
        assert_eq!(answer_to_get(b"END\r\nEND\r\n", b"key"), Ok(Some((Answer::Miss, 5))));
        assert_eq!(answer_to_get(b"VALUE key 0 0\r\n\r\nEND\r\n", b"key"), Ok(Some((Answer::Value(b""), 22))));
        assert_eq!(answer_to_set(b"STORED\r\n"), Ok(Some((Answer::Stored, 8))));
        let full = b"SERVER_ERROR out of memory storing object\r\n";
        let error = Answer::ServerError(b"out of memory storing object");
        assert_eq!(answer_to_set(full), Ok(Some((error, full.len()))));
        assert_eq!(answer_to_get(full, b"key"), Ok(Some((error, full.len()))));
    }

    #[test]
    fn what_has_not_come_whole_is_waited_for() {
        let whole = b"VALUE key 0 5\r\nhello\r\nEND\r\n";
        for length in 0..whole.len() {
            assert_eq!(answer_to_get(&whole[..length], b"key"), Ok(None), "{length}");
        }
        assert_eq!(answer_to_set(b"STORED\r"), Ok(None));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for garbage in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"ERROR\r\n",
            b"CLIENT_ERROR bad command line format\r\n",
            b"STORED\r\n",
            b"VALUE other 0 5\r\nhello\r\nEND\r\n",
            b"VALUE keys 0 5\r\nhello\r\nEND\r\n",
            b"VALUE key 0 -5\r\nhello\r\nEND\r\n",
            b"VALUE key 0 5\r\nhello world\r\nEND\r\n",
            b"VALUE key 0 99999999999\r\n",
            &[b'x'; MAX_LINE],
        ] {
            assert!(answer_to_get(garbage, b"key").is_err(), "{}", String::from_utf8_lossy(garbage));
        }
        assert!(answer_to_set(b"END\r\n").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = answer_to_get(&bytes, b"key");
            let _ = answer_to_set(&bytes);
        }

        #[test]
        fn any_value_survives(value in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut answer = format!("VALUE key 0 {}\r\n", value.len()).into_bytes();
            answer.extend_from_slice(&value);
            answer.extend_from_slice(b"\r\nEND\r\n");
            prop_assert_eq!(answer_to_get(&answer, b"key"), Ok(Some((Answer::Value(&value), answer.len()))));
        }
    }
}
