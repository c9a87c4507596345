//! All connections of a vsock device, and the host's side of them.
//!
//! Owns the listening socket, one epoll set for everything the host may do (the device shows that set as its one
//! descriptor), and whose turn it is to send to the guest. Always true: a connection with something for the guest is in the
//! queue of turns, once; every descriptor in the set is edge-triggered and each connection remembers what it was told; the
//! timer runs only while there is a deadline.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::connection::{Connection, Phase, Step};
use super::packet::Header;
use crate::error::{Result, host};
use crate::socket_file::{SocketFile, connect};
use crate::stats::Counter;
use crate::virtio::timer::Timer;

/// Most connections at a time, those that have not yet said where they want to go among them.
pub const CONNECTIONS_MAX: usize = 256;
/// Ports of the host for connections that come from it begin here, above those programs choose.
const FIRST_PORT: u32 = 1 << 30;
/// Events taken from the set at once.
const BATCH: usize = 32;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(500);
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;

/// See the module.
#[derive(Debug)]
pub struct Streams {
    path: PathBuf,
    listener: SocketFile,
    epoll: OwnedFd,
    timer: Timer,
    ticking: bool,
    /// Somebody may wait to be accepted.
    knock: bool,
    connections: HashMap<u64, Connection>,
    /// Connections by (host's port, guest's port).
    ports: HashMap<(u32, u32), u64>,
    turns: VecDeque<u64>,
    next_id: u64,
    next_port: u32,
    refused: Counter,
}

impl Streams {
    /// Listens at `path`.
    pub fn open(path: &Path) -> Result<Streams> {
        let listener = SocketFile::bind("vsock.path", path)?;
        // SAFETY: no memory is involved; the result is checked.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(host("epoll")(io::Error::last_os_error()));
        }
        let streams = Streams {
            path: path.to_owned(),
            listener,
            // SAFETY: the descriptor was just made and has no other owner.
            epoll: unsafe { OwnedFd::from_raw_fd(fd) },
            timer: Timer::new()?,
            ticking: false,
            knock: true,
            connections: HashMap::new(),
            ports: HashMap::new(),
            turns: VecDeque::new(),
            next_id: FIRST_ID,
            next_port: FIRST_PORT,
            refused: Counter::default(),
        };
        streams.watch(streams.listener.as_raw_fd(), LISTENER).map_err(host("epoll"))?;
        streams.watch(streams.timer.as_raw_fd(), TIMER).map_err(host("epoll"))?;
        Ok(streams)
    }

    fn watch(&self, fd: RawFd, id: u64) -> io::Result<()> {
        let events = libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET;
        let mut event = libc::epoll_event { events: events as u32, u64: id };
        // SAFETY: the event is valid for the call.
        let rc = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut event) };
        if rc != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The set of all descriptors.
    pub fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Connections that were refused because there were too many.
    pub fn refused(&self) -> &Counter {
        &self.refused
    }

    /// Port of the host the next connection has.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with a saved number.
    pub fn set_next_port(&mut self, port: u32) {
        self.next_port = port.max(FIRST_PORT);
    }

    /// Ends all connections.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.ports.clear();
        self.turns.clear();
    }

    /// Ends one connection. The set forgets its descriptor when it is closed.
    pub fn forget(&mut self, id: u64) {
        self.release(id);
        self.connections.remove(&id);
    }

    /// The guest knows a connection no more: it may use the ports for another.
    pub fn release(&mut self, id: u64) {
        if let Some(gone) = self.connections.get(&id) {
            let ports = (gone.host_port, gone.guest_port);
            if self.ports.get(&ports) == Some(&id) {
                self.ports.remove(&ports);
            }
        }
    }

    /// The connection a packet of the guest belongs to.
    pub fn of_guest(&mut self, header: &Header) -> Option<(u64, &mut Connection)> {
        let id = *self.ports.get(&(header.dst_port, header.src_port))?;
        self.connections.get_mut(&id).map(|c| (id, c))
    }

    /// The guest asks for a port of the host; false if there is nobody or no room.
    pub fn connect(&mut self, request: &Header) -> bool {
        if self.connections.len() >= CONNECTIONS_MAX {
            self.refused.inc();
            return false;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", request.dst_port));
        match connect(Path::new(&path)) {
            Ok(stream) => self.add(Connection::connected(stream, request)),
            Err(e) => {
                log::debug!("vsock: {}: {e}", path.display());
                false
            }
        }
    }

    fn add(&mut self, connection: Connection) -> bool {
        let id = self.next_id;
        if let Err(e) = self.watch(connection.stream().as_raw_fd(), id) {
            log::warn!("vsock: epoll: {e}");
            return false;
        }
        self.next_id += 1;
        if connection.phase != Phase::Hello {
            self.ports.insert((connection.host_port, connection.guest_port), id);
        }
        self.connections.insert(id, connection);
        self.settle(id);
        true
    }

    /// After something happened to a connection: gives it a turn if it has something for the guest.
    pub fn settle(&mut self, id: u64) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.queued
            && connection.has_something()
        {
            connection.queued = true;
            self.turns.push_back(id);
        }
    }

    /// Takes note of everything the host has done. Nobody is accepted or asked while `stopped`.
    pub fn collect(&mut self, now: Instant, stopped: bool) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        loop {
            // SAFETY: the buffer holds BATCH events.
            let n = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), BATCH as i32, 0) };
            let n = usize::try_from(n).unwrap_or(0);
            for event in &events[..n] {
                match event.u64 {
                    LISTENER => self.knock = true,
                    TIMER => self.look_at_deadlines(now),
                    id => {
                        if let Some(connection) = self.connections.get_mut(&id) {
                            connection.ready(event.events);
                            connection.flush();
                            if connection.phase == Phase::Drained {
                                self.forget(id);
                            }
                            self.settle(id);
                            if !stopped {
                                self.greet(id, now);
                            }
                        }
                    }
                }
            }
            if n < BATCH {
                break;
            }
        }
        if !stopped && std::mem::take(&mut self.knock) {
            self.accept(now);
        }
    }

    fn accept(&mut self, now: Instant) {
        // Bounded by the backlog of the socket: those accepted beyond the limit are closed at once.
        loop {
            match self.listener.accept() {
                Ok(Some(_)) if self.connections.len() >= CONNECTIONS_MAX => self.refused.inc(),
                Ok(Some(stream)) => {
                    let id = self.next_id;
                    if self.add(Connection::accepted(stream, now)) {
                        self.greet(id, now);
                    }
                }
                Ok(None) => break,
                Err(e) => {
                    // Out of descriptors, say: looked at again when the next one comes.
                    log::warn!("vsock: {}: {e}", self.path.display());
                    break;
                }
            }
        }
    }

    /// A connection of the host that may have said where it wants to go.
    fn greet(&mut self, id: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id).filter(|c| c.phase == Phase::Hello) else { return };
        match connection.read_hello() {
            Step::Done | Step::Drains => {}
            Step::Gone => self.forget(id),
            Step::Wants(guest_port) => {
                let host_port = self.free_port(guest_port);
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.request(host_port, guest_port, now);
                    self.ports.insert((host_port, guest_port), id);
                    self.settle(id);
                }
            }
        }
    }

    /// A port of the host that has no connection with this port of the guest. There are fewer connections than ports.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.wrapping_add(1).max(FIRST_PORT);
            if !self.ports.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// Whether a connection has its turn.
    pub fn has_something(&self) -> bool {
        !self.turns.is_empty()
    }

    /// The next packet for the guest; connections take turns.
    pub fn say(&mut self, guest_cid: u64, room: usize, bytes: &mut Vec<u8>, now: Instant) -> Option<Header> {
        // Each at most once.
        for _ in 0..self.turns.len() {
            let id = self.turns.pop_front()?;
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            let header = connection.say(guest_cid, room, bytes, now);
            if header.is_some() && connection.phase == Phase::Closed {
                self.forget(id);
            } else {
                self.settle(id);
            }
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Gives up what has been waited for long enough.
    fn look_at_deadlines(&mut self, now: Instant) {
        // Else the timer would not be seen again: it is edge-triggered.
        self.timer.expired();
        let late: Vec<u64> =
            self.connections.iter().filter(|(_, c)| c.deadline.is_some_and(|d| d <= now)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.deadline = None;
            match connection.phase {
                Phase::Hello | Phase::Draining => self.forget(id),
                _ => {
                    connection.close();
                    self.settle(id);
                }
            }
        }
    }

    /// Lets the timer run if there is a deadline.
    pub fn watch_deadlines(&mut self) {
        let wanted = self.connections.values().any(|c| c.deadline.is_some());
        if wanted != self.ticking {
            self.ticking = wanted;
            if let Err(e) = self.timer.every(if wanted { TICK } else { Duration::ZERO }) {
                log::warn!("vsock: {e}");
            }
        }
    }
}
