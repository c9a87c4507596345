//! A unix socket as console: one client at a time, the next waits until it has gone.
//!
//! Always true: nothing waits for a client; text a client does not read is lost when the kernel's buffer is full, and so is
//! text while there is none.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::error::Result;
use crate::event::{EventSet, Token};
use crate::socket_file::SocketFile;

/// See the module.
#[derive(Debug)]
pub(super) struct Socket {
    listener: SocketFile,
    client: Option<UnixStream>,
    /// Listener and client.
    events: EventSet,
}

impl Socket {
    pub fn bind(path: &Path) -> Result<Socket> {
        let listener = SocketFile::bind("serial.socket", path)?;
        let events = EventSet::new()?;
        events.add(listener.as_raw_fd(), Token::Wake, libc::EPOLLET)?;
        Ok(Socket { listener, client: None, events })
    }

    /// The client there is, or the next one.
    fn client(&mut self) -> Option<&mut UnixStream> {
        if self.client.is_none() {
            let next = self.listener.accept().unwrap_or_else(|e| {
                log::warn!("serial.socket: {e}");
                None
            })?;
            match self.events.add(next.as_raw_fd(), Token::Wake, libc::EPOLLET | libc::EPOLLRDHUP) {
                Ok(()) => self.client = Some(next),
                Err(e) => log::warn!("serial.socket: {e}"),
            }
        }
        self.client.as_mut()
    }

    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        // What is ready is looked at below, whatever it is.
        while self.events.wait(Some(Duration::ZERO)).is_full() {}
        while let Some(client) = self.client() {
            match client.read(buffer) {
                Ok(n @ 1..) => return n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return 0,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Gone: the next one's turn. Each turn uses one up, and so few can wait that this ends.
                Ok(_) | Err(_) => self.client = None,
            }
        }
        0
    }

    pub fn write(&mut self, text: &[u8]) {
        if let Some(client) = self.client() {
            let _ = client.write_all(text);
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}
