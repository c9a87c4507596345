//! Making a session: rustls over a non-blocking socket, within a time.
//!
//! Always true: exactly the handshake is read from the socket, record by record: what follows is left for the session's own keys. A peer
//! that gives or takes nothing, or byte by byte, costs at most the time given.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::message::{Message, TEXT_MAX};
use migration::wire::{FrameType, HEADER_LEN as FRAME_HEADER_LEN, Receiver};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConnection, Connection, ServerConnection};

use super::record::{self, Opener, Sealer};
use super::{ALPN, Cipher, Credentials, TlsError};
use crate::port::wait::{Interest, wait};

/// Longest handshake of a destination: a source is at work or is none.
pub const ACCEPT_MAX: Duration = Duration::from_secs(2);
/// Longest handshake of a source: longer, so that one idle stranger before it does not make it fail.
pub const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest time for a refused peer to read why.
pub const GOODBYE_MAX: Duration = Duration::from_millis(200);
/// Most bytes thrown away meanwhile.
const GOODBYE_BYTES: usize = 16 << 20;
/// How often it is looked whether the caller still wants it.
const STOP_CHECK: Duration = Duration::from_millis(50);

/// A session: both directions, and who is there.
#[derive(Debug)]
pub struct Session {
    /// Seals what is sent.
    pub sealer: Sealer,
    /// Opens what comes.
    pub opener: Opener,
    /// The peer's certificate, checked.
    pub peer: CertificateDer<'static>,
}

/// A limited time with a socket.
struct Patience<'a> {
    socket: &'a TcpStream,
    until: Instant,
    limit: Duration,
    stop: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    /// How much of the time is left.
    fn left(&self) -> Result<Duration, TlsError> {
        if (self.stop)() {
            return Err(TlsError::Stopped);
        }
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(TlsError::Slow(self.limit)),
            left => Ok(left),
        }
    }

    fn wait(&self, interest: Interest) -> Result<(), TlsError> {
        let left = self.left()?;
        wait(&[(self.socket.as_raw_fd(), interest)], Some(left.min(STOP_CHECK))).map_err(TlsError::Io)?;
        Ok(())
    }

    fn read_exact(&self, buffer: &mut [u8]) -> Result<(), TlsError> {
        let mut done = 0;
        while done < buffer.len() {
            let mut socket = self.socket;
            match socket.read(&mut buffer[done..]) {
                Ok(0) => return Err(TlsError::Io(ErrorKind::UnexpectedEof.into())),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(Interest::Read)?,
                Err(e) => return Err(TlsError::Io(e)),
            }
        }
        Ok(())
    }

    /// One record, whole. A peer without TLS is told apart.
    fn read_record(&self, record: &mut Vec<u8>) -> Result<(), TlsError> {
        record.resize(record::HEADER_LEN, 0);
        self.read_exact(record)?;
        let length = match record::length(record) {
            Err(TlsError::Plain(_)) => return Err(TlsError::Plain(self.refusal(record).ok().flatten())),
            length => length?.unwrap_or(record::HEADER_LEN),
        };
        record.resize(length, 0);
        self.read_exact(&mut record[record::HEADER_LEN..])
    }

    /// What a peer says that speaks the protocol without TLS. Anybody can say that, so it is good for a message only.
    fn refusal(&self, begin: &[u8]) -> Result<Option<String>, TlsError> {
        let mut header = [0; FRAME_HEADER_LEN];
        header[..begin.len()].copy_from_slice(begin);
        self.read_exact(&mut header[begin.len()..])?;
        let Ok(header) = Receiver::new().header(&header) else { return Ok(None) };
        if header.frame_type != FrameType::Refuse || header.length > TEXT_MAX + 64 {
            return Ok(None);
        }
        let mut payload = vec![0; header.length];
        self.read_exact(&mut payload)?;
        Ok(match Message::parse(header.frame_type, &payload) {
            Ok(Message::Refuse(reason)) if header.verify(&payload).is_ok() => Some(reason.text),
            _ => None,
        })
    }

    fn flush(&self, tls: &mut Connection) -> Result<(), TlsError> {
        while tls.wants_write() {
            let mut socket = self.socket;
            match tls.write_tls(&mut socket) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(Interest::Write)?,
                Err(e) => return Err(TlsError::Io(e)),
            }
        }
        Ok(())
    }

    fn shake(&self, tls: &mut Connection) -> Result<(), TlsError> {
        let mut record = Vec::new();
        loop {
            self.flush(tls)?;
            if !tls.is_handshaking() {
                return Ok(());
            }
            // Also with a peer that never lets us wait.
            self.left()?;
            self.read_record(&mut record)?;
            let mut rest = &record[..];
            while !rest.is_empty() {
                // Of a session that is over rustls takes nothing, without an error.
                if tls.read_tls(&mut rest).map_err(TlsError::Io)? == 0 {
                    return Err(TlsError::Closed);
                }
                if let Err(e) = tls.process_new_packets() {
                    // The alert, as far as the peer takes it.
                    let _ = self.flush(tls);
                    return Err(e.into());
                }
            }
        }
    }
}

/// The source's half. `name` must be in the destination's certificate.
pub fn connect(
    socket: &TcpStream,
    credentials: &Credentials,
    name: &ServerName<'static>,
    cipher: Cipher,
    stop: &dyn Fn() -> bool,
) -> Result<Session, TlsError> {
    let config = Arc::new(credentials.client(cipher)?);
    let tls = ClientConnection::new(config, name.clone())?;
    establish(tls.into(), socket, CONNECT_MAX, stop)
}

/// The destination's half.
pub fn accept(socket: &TcpStream, credentials: &Credentials, stop: &dyn Fn() -> bool) -> Result<Session, TlsError> {
    let tls = ServerConnection::new(Arc::new(credentials.server()?))?;
    let session = establish(tls.into(), socket, ACCEPT_MAX, stop);
    if let Err(TlsError::Handshake(_)) = &session {
        say_goodbye(socket, GOODBYE_MAX, stop);
    }
    session
}

fn establish(
    mut tls: Connection,
    socket: &TcpStream,
    limit: Duration,
    stop: &dyn Fn() -> bool,
) -> Result<Session, TlsError> {
    Patience { socket, until: Instant::now() + limit, limit, stop }.shake(&mut tls)?;
    if tls.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Record("of another protocol"));
    }
    let peer = tls.peer_certificates().and_then(|chain| chain.first()).cloned();
    let peer = peer.ok_or(TlsError::Handshake(rustls::Error::NoCertificatesPresented))?;
    let secrets = tls.dangerous_extract_secrets()?;
    Ok(Session { sealer: Sealer::new(secrets.tx)?, opener: Opener::new(secrets.rx)?, peer })
}

/// Lets a peer read what was said last, within this time: a socket that is closed with unread bytes takes back what was sent.
pub fn say_goodbye(socket: &TcpStream, limit: Duration, stop: &dyn Fn() -> bool) {
    let _ = socket.shutdown(Shutdown::Write);
    let patience = Patience { socket, until: Instant::now() + limit, limit, stop };
    let mut buffer = [0; 4096];
    let mut left = GOODBYE_BYTES;
    while left > 0 && patience.left().is_ok() {
        let mut socket = socket;
        match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => left = left.saturating_sub(n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                if patience.wait(Interest::Read).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
