//! One connection between a port of the guest and a unix socket of the host.
//!
//! Owns the socket, the credit of both sides and what the guest has sent and the host not taken yet. Always true: that is at
//! most [`BUFFER`] bytes, for that is what the guest was allowed to send; what the host has sent stays in its socket until the
//! guest has room for it; nothing waits.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::packet::{Header, PAYLOAD_MAX, op, shutdown};

/// Bytes the guest may send before the host has taken them.
pub const BUFFER: usize = 64 << 10;
/// The guest is told of room in the buffer when so much was taken since it was last told.
const CREDIT_STEP: u32 = BUFFER as u32 / 4;
/// How long the host may take to say which port it wants.
pub const HELLO_TIME: Duration = Duration::from_secs(5);
/// How long the guest may take to answer a request.
pub const REQUEST_TIME: Duration = Duration::from_secs(2);
/// How long a connection that one side has closed waits for the other.
pub const LINGER_TIME: Duration = Duration::from_secs(8);
/// How long what a guest has sent before it closed waits for the host to take it.
pub const DRAIN_TIME: Duration = Duration::from_secs(60);
/// Longest `CONNECT <port>` with its line end.
const HELLO_MAX: usize = 32;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host has connected and not yet said to which port.
    Hello,
    /// The guest was asked and has not answered.
    Requested,
    /// Bytes flow.
    Open,
    /// Nothing but a reset is still to be said to the guest.
    Closed,
    /// The guest has closed and forgotten it; the host still takes what was sent before.
    Draining,
    /// The host has taken all of it.
    Drained,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing special.
    Done,
    /// The host wants this port of the guest.
    Wants(u32),
    /// The guest knows it no more, the host still does.
    Drains,
    /// The connection is to be forgotten.
    Gone,
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    pub phase: Phase,
    pub host_port: u32,
    pub guest_port: u32,
    /// Waits for its turn to send to the guest.
    pub queued: bool,
    /// When it has been waited for long enough.
    pub deadline: Option<Instant>,
    hello: Vec<u8>,
    readable: bool,
    writable: bool,
    /// The host's side is closed in both directions.
    hung_up: bool,
    /// What the guest has sent and the host not taken.
    out: VecDeque<u8>,
    /// Bytes of the guest the host has taken; modulo 2^32, as on the wire.
    taken: u32,
    taken_told: u32,
    /// Bytes sent to the guest, and what it says of them and of its room.
    sent: u32,
    guest_taken: u32,
    guest_room: u32,
    /// Directions the guest has closed (flags of a SHUTDOWN), those the host has, those the guest was told of.
    guest_closed: u32,
    host_closed: u32,
    host_closed_told: u32,
    /// Packets without bytes that are to be sent.
    tell_request: bool,
    tell_response: bool,
    tell_credit: bool,
    ask_credit: bool,
}

impl Connection {
    fn new(stream: UnixStream, phase: Phase, host_port: u32, guest_port: u32) -> Connection {
        Connection {
            stream,
            phase,
            host_port,
            guest_port,
            queued: false,
            deadline: None,
            hello: Vec::new(),
            readable: true,
            writable: true,
            hung_up: false,
            out: VecDeque::new(),
            taken: 0,
            taken_told: 0,
            sent: 0,
            guest_taken: 0,
            guest_room: 0,
            guest_closed: 0,
            host_closed: 0,
            host_closed_told: 0,
            tell_request: false,
            tell_response: false,
            tell_credit: false,
            ask_credit: false,
        }
    }

    /// The host has connected.
    pub fn accepted(stream: UnixStream, now: Instant) -> Connection {
        Connection { deadline: Some(now + HELLO_TIME), ..Connection::new(stream, Phase::Hello, 0, 0) }
    }

    /// The guest has asked for a port of the host, and somebody is there.
    pub fn connected(stream: UnixStream, request: &Header) -> Connection {
        let mut connection = Connection::new(stream, Phase::Open, request.dst_port, request.src_port);
        connection.hear_credit(request);
        connection.tell_response = true;
        connection
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The socket has become ready for something (flags of epoll).
    pub fn ready(&mut self, events: u32) {
        let any = |flags: i32| events & flags as u32 != 0;
        self.readable |= any(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR);
        self.writable |= any(libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR);
        self.hung_up |= any(libc::EPOLLHUP);
        // Whatever is still to be read is read first, if the guest wants it.
        if self.hung_up && (self.host_closed & shutdown::SEND != 0 || self.guest_closed & shutdown::RECEIVE != 0) {
            self.host_closed = shutdown::BOTH;
        }
    }

    /// Reads the host's greeting. Not a byte beyond it is taken.
    pub fn read_hello(&mut self) -> Step {
        while self.readable {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    return parse_hello(&self.hello).map_or(Step::Gone, Step::Wants);
                }
                Ok(1) if self.hello.len() < HELLO_MAX => self.hello.extend(byte),
                Ok(_) => return Step::Gone,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Step::Gone,
            }
        }
        Step::Done
    }

    /// The guest is asked for its port.
    pub fn request(&mut self, host_port: u32, guest_port: u32, now: Instant) {
        self.phase = Phase::Requested;
        (self.host_port, self.guest_port) = (host_port, guest_port);
        self.tell_request = true;
        self.deadline = Some(now + REQUEST_TIME);
        self.hello = Vec::new();
    }

    /// A packet from the guest with its bytes.
    pub fn hear(&mut self, header: &Header, bytes: &[u8], now: Instant) -> Step {
        self.hear_credit(header);
        match (self.phase, header.op) {
            (_, op::RST) => {
                self.flush();
                if self.phase != Phase::Open || self.guest_closed & shutdown::SEND == 0 || self.out.is_empty() {
                    return Step::Gone;
                }
                self.phase = Phase::Draining;
                self.deadline = Some(now + DRAIN_TIME);
                return Step::Drains;
            }
            (Phase::Requested, op::RESPONSE) => {
                self.phase = Phase::Open;
                self.deadline = None;
                // The socket is fresh: there is room for one line.
                if self.stream.write_all(format!("OK {}\n", self.host_port).as_bytes()).is_err() {
                    self.close();
                }
            }
            (Phase::Open, op::RW) => {
                if bytes.len() > BUFFER - self.out.len() || self.guest_closed & shutdown::SEND != 0 {
                    // More than it was allowed.
                    self.close();
                } else {
                    self.out.extend(bytes);
                    self.flush();
                }
            }
            (Phase::Open, op::SHUTDOWN) => {
                self.guest_closed |= header.flags & shutdown::BOTH;
                self.flush();
                if self.guest_closed == shutdown::BOTH {
                    self.deadline.get_or_insert(now + DRAIN_TIME);
                }
            }
            (Phase::Open, op::CREDIT_REQUEST) => self.tell_credit = true,
            (Phase::Open, op::CREDIT_UPDATE) => {}
            _ => self.close(),
        }
        Step::Done
    }

    fn hear_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
    }

    /// Bytes the guest has room for.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_taken);
        self.guest_room.saturating_sub(under_way) as usize
    }

    /// Writes to the host what it takes.
    pub fn flush(&mut self) {
        if !matches!(self.phase, Phase::Open | Phase::Draining) {
            return;
        }
        while self.writable && !self.out.is_empty() {
            match self.stream.write(self.out.as_slices().0) {
                Ok(n) => self.take(n),
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    // The host receives no more; what it has sent is still there.
                    self.host_closed |= shutdown::RECEIVE;
                    self.take(self.out.len());
                }
            }
        }
        if self.out.is_empty() {
            if self.out.capacity() > BUFFER / 4 {
                self.out = VecDeque::new();
            }
            if self.phase == Phase::Draining {
                self.phase = Phase::Drained;
            } else if self.guest_closed == shutdown::BOTH {
                self.close();
            } else if self.guest_closed & shutdown::SEND != 0 {
                let _ = self.stream.shutdown(std::net::Shutdown::Write);
            }
        }
    }

    fn take(&mut self, n: usize) {
        self.out.drain(..n);
        self.taken = self.taken.wrapping_add(n as u32);
        self.tell_credit |= self.taken.wrapping_sub(self.taken_told) >= CREDIT_STEP;
    }

    /// Nothing is taken or given any more; the guest is to be told.
    pub fn close(&mut self) {
        self.phase = Phase::Closed;
        self.out = VecDeque::new();
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Whether the guest may have to be sent something.
    pub fn has_something(&self) -> bool {
        match self.phase {
            Phase::Hello | Phase::Draining | Phase::Drained => false,
            Phase::Requested => self.tell_request,
            Phase::Closed => true,
            Phase::Open => {
                self.tell_response
                    || self.tell_credit
                    || self.host_closed != self.host_closed_told
                    || self.may_read() && (self.credit() > 0 || !self.ask_credit)
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && self.host_closed & shutdown::SEND == 0 && self.guest_closed & shutdown::RECEIVE == 0
    }

    /// The next packet for the guest, at most `room` bytes long without its header; its bytes are put into `bytes`.
    pub fn say(&mut self, guest_cid: u64, room: usize, bytes: &mut Vec<u8>, now: Instant) -> Option<Header> {
        bytes.clear();
        let (op, flags) = self.next(room, bytes, now)?;
        self.tell_credit = false;
        self.taken_told = self.taken;
        Some(Header {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len: bytes.len() as u32,
            kind: super::packet::STREAM,
            op,
            flags,
            buf_alloc: BUFFER as u32,
            fwd_cnt: self.taken,
        })
    }

    fn next(&mut self, room: usize, bytes: &mut Vec<u8>, now: Instant) -> Option<(u16, u32)> {
        match self.phase {
            Phase::Hello | Phase::Draining | Phase::Drained => return None,
            Phase::Closed => return Some((op::RST, 0)),
            Phase::Requested => return std::mem::take(&mut self.tell_request).then_some((op::REQUEST, 0)),
            Phase::Open => {}
        }
        if std::mem::take(&mut self.tell_response) {
            return Some((op::RESPONSE, 0));
        }
        if self.may_read() {
            let n = room.min(self.credit()).min(PAYLOAD_MAX);
            if n > 0 {
                self.ask_credit = false;
                if let Some(packet) = self.read(n, bytes) {
                    return Some(packet);
                }
            } else if room > 0 && !self.ask_credit {
                // The guest may have room it has not told of.
                self.ask_credit = true;
                return Some((op::CREDIT_REQUEST, 0));
            }
        }
        if self.host_closed != self.host_closed_told {
            self.host_closed_told = self.host_closed;
            if self.host_closed == shutdown::BOTH {
                self.deadline.get_or_insert(now + LINGER_TIME);
            }
            return Some((op::SHUTDOWN, self.host_closed));
        }
        std::mem::take(&mut self.tell_credit).then_some((op::CREDIT_UPDATE, 0))
    }

    /// Reads up to `n` bytes of the host.
    fn read(&mut self, n: usize, bytes: &mut Vec<u8>) -> Option<(u16, u32)> {
        bytes.resize(n, 0);
        let result = loop {
            match self.stream.read(bytes) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        bytes.truncate(*result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => {
                self.host_closed |= if self.hung_up { shutdown::BOTH } else { shutdown::SEND };
                None
            }
            Ok(n) => {
                self.sent = self.sent.wrapping_add(n as u32);
                Some((op::RW, 0))
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.close();
                Some((op::RST, 0))
            }
        }
    }
}

/// `CONNECT <port>`, without its line end.
fn parse_hello(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    (word.eq_ignore_ascii_case("connect") && words.next().is_none()).then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings() {
        for (line, port) in [
            ("CONNECT 52", Some(52)),
            ("connect  4294967295\r", Some(u32::MAX)),
            ("CONNECT", None),
            ("CONNECT 4294967296", None),
            ("CONNECT -1", None),
            ("CONNECT 1 2", None),
            ("GET 1", None),
            ("", None),
        ] {
            assert_eq!(parse_hello(line.as_bytes()), port, "{line:?}");
        }
        assert_eq!(parse_hello(b"\xff\xfe 1"), None);
    }
}
