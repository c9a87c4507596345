//! The REST control socket of a `vmm`: HTTP/1.1 and JSON over a unix socket.
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest answer read.
const MAX_ANSWER: u64 = 4 << 20;
/// A VMM answers its control socket within this time whatever the VM does.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A control socket.
#[derive(Clone, Debug)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// The control socket at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Api { socket }
    }

    /// Where it is.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether a VMM listens there.
    pub fn is_up(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// GET of a JSON resource.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.call("GET", path, None)
    }

    /// POST.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.call("POST", path, Some(body))
    }

    /// PUT.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.call("PUT", path, Some(body))
    }

    /// DELETE.
    pub fn delete(&self, path: &str) -> Result<Value> {
        self.call("DELETE", path, None)
    }

    /// GET of a text.
    pub fn text(&self, path: &str) -> Result<String> {
        self.exchange("GET", path, None)
    }

    /// The same request as a command to type.
    pub fn curl(&self, method: &str, path: &str, body: Option<&Value>) -> String {
        let body = body.map(|b| format!(" -H 'Content-Type: application/json' -d '{b}'")).unwrap_or_default();
        format!("curl --unix-socket {} -X {method}{body} http://vmm{path}", self.socket.display())
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let text = self.exchange(method, path, body)?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("{method} {path}: not JSON: {text}"))
    }

    fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<String> {
        let what = || format!("{method} {path} at {}", self.socket.display());
        let answer = self.send(method, path, body).with_context(what)?;
        let (status, body) = parse(&answer).with_context(what)?;
        if !(200..300).contains(&status) {
            bail!("{} was refused with {status}: {}", what(), body.trim());
        }
        Ok(body)
    }

    fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// Status and body of a whole answer ("Connection: close", so the body ends with it; or in chunks).
fn parse(answer: &[u8]) -> Result<(u16, String)> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("an answer without an end of its head")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok()).context("an answer without a status")?;
    let body = &answer[end + 4..];
    let chunked = head.lines().any(|l| l.to_ascii_lowercase().replace(' ', "") == "transfer-encoding:chunked");
    let body = if chunked { unchunk(body)? } else { body.to_vec() };
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").context("a chunk without a length")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line])?.trim(), 16)?;
        let begin = line + 2;
        let end = begin.saturating_add(size);
        body.extend(rest.get(begin..end).context("a chunk cut short")?);
        if size == 0 {
            return Ok(body);
        }
        rest = rest.get(end + 2..).context("a chunk cut short")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let plain = b"HTTP/1.1 202 Accepted\r\ncontent-length: 8\r\n\r\n{\"id\":1}";
        assert_eq!(parse(plain).unwrap(), (202, "{\"id\":1}".into()));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        assert_eq!(parse(chunked).unwrap(), (200, "abcde".into()));
        assert!(parse(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc").is_err());
        assert!(parse(b"nonsense").is_err());
    }

    #[test]
    fn a_command_to_type_is_shown() {
        let api = Api::new("/run/x.sock".into());
        let body = serde_json::json!({"to": "10.77.0.2:7000"});
        assert_eq!(
            api.curl("POST", "/v1/migrations", Some(&body)),
            "curl --unix-socket /run/x.sock -X POST -H 'Content-Type: application/json' \
             -d '{\"to\":\"10.77.0.2:7000\"}' http://vmm/v1/migrations"
        );
    }
}
