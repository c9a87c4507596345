//! The client's side of the control socket: one request, one connection.
//!
//! HTTP/1.0 is spoken, so that an answer ends with its connection and nothing needs to be decoded. Always true: nothing is
//! read without a bound or waited for without an end.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

/// Longest silence of the other side: longer than the longest request takes, and than the pause between the signs of life of an
/// event stream.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// The same for what may take long: an hour.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Largest answer.
const ANSWER_MAX: u64 = 16 << 20;
/// Longest line of a head or an event.
const LINE_MAX: u64 = 64 << 10;
/// Most lines of a head.
const HEAD_MAX: usize = 64;

/// Why a command did not do what it says.
#[derive(Debug)]
pub enum Failure {
    /// Nobody answers at the socket.
    Unreachable(String),
    /// The answer is a problem document.
    Refused(Value),
    /// What was asked for was begun and failed.
    Failed(String),
    /// Nobody can say yet whether it was done.
    InDoubt(String),
    /// Given up by the user.
    Cancelled(String),
    /// Standard output is gone.
    Output(io::Error),
}

impl Failure {
    /// Exit status.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => 0,
            Failure::Refused(_) | Failure::Failed(_) | Failure::Output(_) => 1,
            Failure::Unreachable(_) => 3,
            Failure::InDoubt(_) => 4,
            Failure::Cancelled(_) => 130,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused(problem) => match problem["errors"].as_array() {
                Some(errors) if !errors.is_empty() => {
                    for (i, e) in errors.iter().enumerate() {
                        let (field, detail) = (&e["field"], &e["detail"]);
                        let newline = if i == 0 { "" } else { "\n" };
                        write!(f, "{newline}{}: {}", field.as_str().unwrap_or("?"), detail.as_str().unwrap_or("?"))?;
                    }
                    Ok(())
                }
                _ => match problem["detail"].as_str() {
                    Some(detail) if !detail.is_empty() => f.write_str(detail),
                    _ => write!(f, "refused: {problem}"),
                },
            },
            Failure::Unreachable(s) | Failure::Failed(s) | Failure::InDoubt(s) | Failure::Cancelled(s) => {
                f.write_str(s)
            }
            Failure::Output(e) => write!(f, "standard output: {e}"),
        }
    }
}

/// A control socket by its path.
pub struct Client {
    sock: PathBuf,
    silence: Duration,
}

impl Client {
    /// Not connected yet.
    pub fn new(sock: &Path) -> Client {
        Client { sock: sock.to_owned(), silence: SILENCE_MAX }
    }

    /// For a request that takes as long as a disk needs for all of a guest's memory.
    pub fn patient(&self) -> Client {
        Client { sock: self.sock.clone(), silence: PATIENCE }
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.sock)?;
        stream.set_read_timeout(Some(self.silence))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        Ok(stream)
    }

    /// What to do when there is nobody at the socket.
    fn unreachable(&self, e: &io::Error) -> Failure {
        let sock = self.sock.display();
        Failure::Unreachable(match e.kind() {
            io::ErrorKind::NotFound => {
                format!("{sock}: no such socket; was vmm started with --api-sock {sock}, and does it still run?")
            }
            io::ErrorKind::ConnectionRefused => {
                format!("{sock}: nobody listens; the vmm that made it is gone, or this is not its control socket")
            }
            io::ErrorKind::PermissionDenied => {
                format!("{sock}: permission denied; only the user who started vmm may use it")
            }
            _ => format!("{sock}: {e}"),
        })
    }

    /// The body of a successful answer, to be read as it comes.
    pub fn open(&self, method: &str, path: &str, body: Option<&Value>) -> Result<BufReader<UnixStream>, Failure> {
        let mut stream = self.connect().map_err(|e| self.unreachable(&e))?;
        let broken = |e: io::Error| {
            let silent = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            Failure::Unreachable(match silent {
                true => format!("{}: no answer within {:?}", self.sock.display(), self.silence),
                false => format!("{}: the connection broke: {e}", self.sock.display()),
            })
        };
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).map_err(broken)?;
        let mut reader = BufReader::new(stream);
        let status = head_of(&mut reader).map_err(broken)?;
        if (200..300).contains(&status) {
            return Ok(reader);
        }
        let text = text(reader).map_err(broken)?;
        Err(Failure::Refused(
            serde_json::from_str(&text).unwrap_or_else(|_| serde_json::json!({ "status": status, "detail": text })),
        ))
    }

    /// The body of a successful answer.
    pub fn text(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String, Failure> {
        let reader = self.open(method, path, body)?;
        text(reader).map_err(|e| Failure::Unreachable(format!("{}: {e}", self.sock.display())))
    }

    /// The body of a successful answer that is JSON.
    pub fn json(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let text = self.text(method, path, body)?;
        serde_json::from_str(&text)
            .map_err(|e| Failure::Unreachable(format!("{}: the answer is not JSON: {e}", self.sock.display())))
    }
}

/// Reads a head; its status.
fn head_of(reader: &mut impl BufRead) -> io::Result<u16> {
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "the answer is not HTTP; is this vmm's control socket?");
    let first = line(reader)?.ok_or_else(bad)?;
    let status = first.strip_prefix("HTTP/1.").and_then(|s| s.split(' ').nth(1)?.parse().ok()).ok_or_else(bad)?;
    for _ in 0..HEAD_MAX {
        match line(reader)? {
            Some(line) if line.is_empty() => return Ok(status),
            Some(_) => {}
            None => return Err(bad()),
        }
    }
    Err(bad())
}

/// The next line without its end; `None` at the end of all.
pub fn line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if reader.take(LINE_MAX).read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') && bytes.len() as u64 == LINE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned()))
}

fn text(reader: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    reader.take(ANSWER_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_bounded() {
        let status = |s: &str| head_of(&mut s.as_bytes()).ok();
        assert_eq!(status("HTTP/1.0 202 Accepted\r\nA: b\r\n\r\n"), Some(202));
        assert_eq!(status("HTTP/1.1 404 Not Found\r\n\r\n"), Some(404));
        assert_eq!(status("HTTP/1.1 404 Not Found\r\n"), None);
        assert_eq!(status("SSH-2.0\r\n\r\n"), None);
        assert_eq!(status(""), None);
        assert_eq!(status(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(HEAD_MAX))), None);
        assert_eq!(status(&format!("HTTP/1.1 200 {}\r\n\r\n", "x".repeat(LINE_MAX as usize))), None);
    }
}
