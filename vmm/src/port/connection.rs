//! One side's end of the porting connection: frames over a TCP socket, in TLS records or in the clear.
//!
//! Owns the socket, the session's keys and both frame sequences. Always true: a frame handed out is whole, checked and in order; no more
//! is allocated for it than its type allows. Writes give up when the peer takes nothing for [`STALL_MAX`], or
//! when the caller's `stop` says so, so that a pulled cable or a cancel never blocks for good. What TLS needs is allocated with the
//! session: sealing and opening records allocate nothing.
//!
//! Survives: a peer that says something and closes while this side writes. A write that fails is not the end: [`Connection::poll`] first
//! gives the whole frames that had come (Linux keeps them through a reset), and then the loss.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use migration::message::{Message, Reason, ReasonCode};
use migration::wire::{FrameType, HEADER_LEN, Header, Receiver, Sender};

use super::faults;
use super::tls::handshake::GOODBYE_MAX;
use super::tls::record::{self, Opener, Parts, Sealer};
use super::tls::{Cipher, Protection, Route, TlsError, handshake};
use super::wait::{Interest, wait};
use rustls::pki_types::CertificateDer;

/// Longest time to establish the connection.
pub const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Longest time without the peer taking or giving a byte in the middle of something.
pub const STALL_MAX: Duration = Duration::from_secs(3);
/// How often a blocked write looks whether it is still wanted.
const STOP_CHECK: Duration = Duration::from_millis(50);
/// Room asked for in the kernel's socket buffers, in bytes.
const SOCKET_BUFFER: libc::c_int = 4 << 20;
/// Bytes asked for in one read when no frame is under way.
const READ_AHEAD: usize = 256 << 10;
/// Bytes of TLS records sealed before they are written: while the kernel and the peer have those, the next are sealed.
const SEAL_AHEAD: usize = 256 << 10;

/// Most frames still handed out of what had come before a write failed.
const LAST_FRAMES_MAX: usize = 1024;

/// Why the connection can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket.
    #[error("connection to {peer}: {source}")]
    Io {
        /// The other side.
        peer: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The peer does not speak the protocol.
    #[error("{peer}: {source}")]
    Protocol {
        /// The other side.
        peer: SocketAddr,
        /// What was wrong.
        source: migration::Error,
    },
    /// TLS.
    #[error("{peer}: {source}")]
    Tls {
        /// The other side.
        peer: SocketAddr,
        /// What was wrong.
        source: TlsError,
    },
    /// A write failed before, and why.
    #[error("{0}")]
    Broken(String),
    /// The caller did not want to go on.
    #[error("stopped")]
    Stopped,
}

impl ConnectionError {
    fn tls(peer: SocketAddr) -> impl Fn(TlsError) -> ConnectionError {
        move |source| match source {
            TlsError::Stopped => ConnectionError::Stopped,
            TlsError::Io(source) => ConnectionError::Io { peer, source },
            source => ConnectionError::Tls { peer, source },
        }
    }
}

/// A frame, checked. Its payload is in [`Connection::payload`] until the next one is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Incoming {
    /// Its type.
    pub frame_type: FrameType,
}

/// What a connection has of its TLS session.
#[derive(Debug)]
struct Session {
    sealer: Sealer,
    opener: Opener,
    peer: CertificateDer<'static>,
    /// Records sealed and not yet written.
    sealed: Vec<u8>,
}

/// A write has failed.
#[derive(Debug)]
struct Broken {
    why: String,
    /// How many more frames are handed out.
    left: usize,
}

impl Broken {
    fn error(&self) -> ConnectionError {
        ConnectionError::Broken(self.why.clone())
    }
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    socket: TcpStream,
    peer: SocketAddr,
    sender: Sender,
    receiver: Receiver,
    tls: Option<Session>,
    broken: Option<Broken>,
    /// Frames, then a gap, then records that have not been opened.
    input: Vec<u8>,
    /// Start and end of what has been read, and opened, and not handed out.
    start: usize,
    end: usize,
    /// Where the records are; empty, and at `end`, without TLS.
    records: std::ops::Range<usize>,
    /// The frame under way.
    header: Option<Header>,
    payload: std::ops::Range<usize>,
    /// Bytes sent, headers included.
    pub sent: u64,
    /// Bytes received, headers included.
    pub received: u64,
}

impl Connection {
    /// Connects to a destination, for a guest with so many bytes of memory.
    pub fn connect(
        peer: SocketAddr,
        route: &Route,
        memory: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<Connection, ConnectionError> {
        let socket = TcpStream::connect_timeout(&peer, faults::limit(CONNECT_MAX))
            .map_err(|source| ConnectionError::Io { peer, source })?;
        let mut connection = Connection::new(socket, peer)?;
        if let Route::Tls { credentials, name, .. } = route {
            let session = handshake::connect(&connection.socket, credentials, name, Cipher::for_memory(memory), stop);
            connection.protect(session.map_err(ConnectionError::tls(peer))?);
        }
        Ok(connection)
    }

    /// Makes the destination's end of an accepted socket.
    pub fn accept(
        socket: TcpStream,
        peer: SocketAddr,
        protection: &Protection,
        stop: &dyn Fn() -> bool,
    ) -> Result<Connection, ConnectionError> {
        let mut connection = Connection::new(socket, peer)?;
        if let Protection::Tls(credentials) = protection {
            match handshake::accept(&connection.socket, credentials, stop) {
                Ok(session) => connection.protect(session),
                Err(source) => {
                    if let TlsError::Plain(_) = source {
                        let text = "ports come here by TLS only: give the source's vmm keys (--tls)";
                        connection.refuse(Reason::new(ReasonCode::Permission, text));
                    }
                    return Err(ConnectionError::tls(peer)(source));
                }
            }
        }
        Ok(connection)
    }

    fn protect(&mut self, session: handshake::Session) {
        let handshake::Session { sealer, opener, peer } = session;
        self.tls = Some(Session { sealer, opener, peer, sealed: Vec::with_capacity(SEAL_AHEAD) });
    }

    /// The peer's certificate, if it had to show one.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.tls.as_ref().map(|tls| &tls.peer)
    }

    /// Takes over an accepted or connected socket, in the clear.
    pub fn new(socket: TcpStream, peer: SocketAddr) -> Result<Connection, ConnectionError> {
        let io = |source| ConnectionError::Io { peer, source };
        socket.set_nodelay(true).map_err(io)?;
        socket.set_nonblocking(true).map_err(io)?;
        for option in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            set_option(&socket, libc::SOL_SOCKET, option, SOCKET_BUFFER);
        }
        // A peer that vanished without a word is noticed also while nothing is sent.
        set_option(
            &socket,
            libc::IPPROTO_TCP,
            libc::TCP_USER_TIMEOUT,
            faults::limit(STALL_MAX).as_millis() as libc::c_int,
        );
        set_option(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        for option in [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL] {
            set_option(&socket, libc::IPPROTO_TCP, option, 1);
        }
        Ok(Connection {
            socket,
            peer,
            sender: Sender::new(),
            receiver: Receiver::new(),
            tls: None,
            broken: None,
            input: Vec::new(),
            start: 0,
            end: 0,
            records: 0..0,
            header: None,
            payload: 0..0,
            sent: 0,
            received: 0,
        })
    }

    /// The other side.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Appends a control message to `out`, sealed; it must be the next thing sent.
    pub fn seal_message(&mut self, message: &Message, out: &mut Vec<u8>) {
        faults::sends(message.frame_type());
        let mut payload = Vec::new();
        message.encode(&mut payload);
        self.sender.frame(message.frame_type(), &payload, out);
    }

    /// Header of a frame whose payload is `parts`; both must be the next things sent.
    pub fn seal(&mut self, frame_type: FrameType, parts: &[&[u8]]) -> [u8; HEADER_LEN] {
        faults::sends(frame_type);
        self.sender.seal(frame_type, parts)
    }

    /// Sends a control message.
    pub fn send(&mut self, message: &Message) -> Result<(), ConnectionError> {
        let mut out = Vec::new();
        self.seal_message(message, &mut out);
        self.write(&[&out], &|| false)
    }

    /// Says why nothing will come of it, and waits a moment for the peer to read that.
    pub fn refuse(&mut self, reason: Reason) {
        let _ = self.send(&Message::Refuse(reason));
        handshake::say_goodbye(&self.socket, GOODBYE_MAX, &|| false);
    }

    /// Ends an orderly connection so that what was sent last arrives: a socket that is closed with unread bytes, or that gets some
    /// afterwards, takes back what the peer's kernel does not have yet. Waits for the peer's end, at most so long.
    pub fn end(self, limit: Duration) {
        if self.broken.is_none() {
            handshake::say_goodbye(&self.socket, limit, &|| false);
        }
    }

    /// Writes sealed bytes, all of them, in as few system calls as the kernel takes them with. When that has failed nothing more can be
    /// sent, and [`Connection::poll`] reports it, behind what had come before: only who was [`ConnectionError::Stopped`] has to see to
    /// the end itself.
    pub fn write(&mut self, parts: &[&[u8]], stop: &dyn Fn() -> bool) -> Result<(), ConnectionError> {
        if let Some(broken) = &self.broken {
            return Err(broken.error());
        }
        let result = self.put_sealed(parts, stop);
        if let Err(e) = &result
            && !matches!(e, ConnectionError::Stopped)
        {
            self.broken = Some(Broken { why: e.to_string(), left: LAST_FRAMES_MAX });
        }
        result
    }

    fn put_sealed(&mut self, parts: &[&[u8]], stop: &dyn Fn() -> bool) -> Result<(), ConnectionError> {
        let Some(mut tls) = self.tls.take() else { return self.put(parts, stop) };
        let mut rest = Parts::new(parts);
        let result = loop {
            tls.sealed.clear();
            if let Err(source) = tls.sealer.fill(&mut rest, &mut tls.sealed) {
                break Err(ConnectionError::tls(self.peer)(source));
            }
            if tls.sealed.is_empty() {
                break Ok(());
            }
            if let Err(e) = self.put(&[&tls.sealed], stop) {
                break Err(e);
            }
        };
        self.tls = Some(tls);
        result
    }

    fn put(&mut self, parts: &[&[u8]], stop: &dyn Fn() -> bool) -> Result<(), ConnectionError> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|p| IoSlice::new(p)).collect();
        let mut rest = &mut slices[..];
        let mut moved = Instant::now();
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            match (&self.socket).write_vectored(rest) {
                Ok(0) => return Err(self.io(ErrorKind::WriteZero.into())),
                Ok(n) => {
                    self.sent += n as u64;
                    IoSlice::advance_slices(&mut rest, n);
                    moved = Instant::now();
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if stop() {
                        return Err(ConnectionError::Stopped);
                    }
                    if moved.elapsed() > faults::limit(STALL_MAX) {
                        return Err(self.io(ErrorKind::TimedOut.into()));
                    }
                    let _ = wait(&[(self.socket.as_raw_fd(), Interest::Write)], Some(STOP_CHECK));
                }
                Err(e) => return Err(self.io(e)),
            }
        }
        Ok(())
    }

    /// The next frame if it is there as a whole; does not wait. After a write that failed: those that are there, then the loss.
    pub fn poll(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        let Some(broken) = &mut self.broken else { return self.next() };
        let Some(left) = broken.left.checked_sub(1) else { return Err(broken.error()) };
        broken.left = left;
        let next = self.next();
        match (next, &mut self.broken) {
            // The first error is the one to show.
            (Ok(None) | Err(ConnectionError::Io { .. }), Some(broken)) => {
                broken.left = 0;
                Err(broken.error())
            }
            (next, _) => next,
        }
    }

    fn next(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            if let Some(incoming) = self.take()? {
                return Ok(Some(incoming));
            }
            if self.open()? {
                continue;
            }
            self.make_room();
            match (&self.socket).read(&mut self.input[self.records.end..]) {
                Ok(0) => return Err(self.io(ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    self.records.end += n;
                    self.received += n as u64;
                    if self.tls.is_none() {
                        self.end = self.records.end;
                        self.records.start = self.end;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.io(e)),
            }
        }
    }

    /// Payload of the frame [`Connection::poll`] gave last.
    pub fn payload(&self) -> &[u8] {
        &self.input[self.payload.clone()]
    }

    /// The control message in the frame [`Connection::poll`] gave last.
    pub fn message(&self, incoming: Incoming) -> Result<Message, ConnectionError> {
        Message::parse(incoming.frame_type, self.payload()).map_err(|e| self.protocol(e))
    }

    /// The peer sent something wrong.
    pub fn protocol(&self, source: migration::Error) -> ConnectionError {
        ConnectionError::Protocol { peer: self.peer, source }
    }

    fn io(&self, source: io::Error) -> ConnectionError {
        ConnectionError::Io { peer: self.peer, source }
    }

    fn take(&mut self) -> Result<Option<Incoming>, ConnectionError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                let Some(bytes) = self.input[self.start..self.end].first_chunk::<HEADER_LEN>() else {
                    return Ok(None);
                };
                let header = self.receiver.header(bytes).map_err(|e| self.protocol(e))?;
                self.start += HEADER_LEN;
                self.header = Some(header);
                header
            }
        };
        if self.end - self.start < header.length {
            return Ok(None);
        }
        self.header = None;
        self.payload = self.start..self.start + header.length;
        self.start = self.payload.end;
        header.verify(self.payload()).map_err(|e| self.protocol(e))?;
        faults::receives(header.frame_type);
        Ok(Some(Incoming { frame_type: header.frame_type }))
    }

    /// Opens the next record, if it is there as a whole: its content comes behind what has been opened before.
    fn open(&mut self) -> Result<bool, ConnectionError> {
        let Some(tls) = &mut self.tls else { return Ok(false) };
        let tls_error = ConnectionError::tls(self.peer);
        let records = &self.input[self.records.clone()];
        let length = match record::length(records).map_err(&tls_error)? {
            Some(length) if length <= records.len() => length,
            _ => return Ok(false),
        };
        let next = self.records.start + length;
        let content = tls.opener.open(&mut self.input[self.end..next], self.records.start - self.end);
        self.end += content.map_err(&tls_error)?;
        self.records.start = next;
        Ok(true)
    }

    /// Makes room for the frame under way, and for some read-ahead.
    fn make_room(&mut self) {
        let frame = self.header.map_or(0, |h| h.length);
        let wanted = match self.tls {
            // A record is opened into the place of its frame, so what is read stands behind that.
            Some(_) => frame + READ_AHEAD + record::RECORD_MAX,
            None => frame.max(READ_AHEAD),
        };
        let (frames, records) = (self.end - self.start, self.records.len());
        if frames + records == 0 {
            (self.start, self.end, self.records) = (0, 0, 0..0);
        }
        // Not each time a little: moving costs.
        let short = match self.tls {
            Some(_) => self.input.len() - self.records.end < READ_AHEAD,
            None => self.input.len() - self.start < wanted,
        };
        if short {
            self.input.copy_within(self.start..self.end, 0);
            self.input.copy_within(self.records.clone(), frames);
            (self.start, self.end, self.records) = (0, frames, frames..frames + records);
            if self.input.len() < wanted {
                self.input.resize(wanted, 0);
            }
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Sets an option that makes things better; without it they still work.
fn set_option(socket: &TcpStream, level: libc::c_int, option: libc::c_int, value: libc::c_int) {
    // SAFETY: the value is an int, as all options used here take, and valid for the call.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if rc != 0 {
        log::debug!("socket option {level}/{option}: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests;
