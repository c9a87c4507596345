//! QEMU's machine protocol, as much as the comparisons need: one command at a time over a unix socket (QMP specification).
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// QEMU answers within this time whatever the VM does.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Longest line read.
const LINE_MAX: u64 = 1 << 20;
/// Most events between a command and its answer.
const EVENTS_MAX: usize = 1000;

/// A connection to a QEMU.
pub struct Qmp {
    socket: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and leaves the negotiation behind.
    pub fn connect(path: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        let mut qmp = Qmp { socket: BufReader::new(stream) };
        let greeting = qmp.line()?;
        if greeting["QMP"].is_null() {
            bail!("not a QEMU: {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.socket.get_mut().write_all(line.as_bytes())?;
        for _ in 0..EVENTS_MAX {
            let mut answer = self.line()?;
            if !answer["error"].is_null() {
                bail!("QEMU refuses {command}: {}", answer["error"]["desc"]);
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
        bail!("QEMU does not answer {command}")
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = (&mut self.socket).take(LINE_MAX).read_line(&mut line)?;
        if read == 0 {
            bail!("QEMU has closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))
    }
}
