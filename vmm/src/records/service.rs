//! Questions about the records, answered over TCP: a thread for each connection, one question at a time.
//!
//! Always true: what a question changes is written while nobody else is answered. Bounds: [`CONNECTIONS_MAX`] connections, one more ends the one
//! that has been silent longest; [`QUESTION_MAX`] bytes of a question; [`WRITE_MAX`] for a peer that does not read.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fabric::id::BootId;
use fabric::owner::OwnerChange;
use fabric::server::{Action, ConnectionId, Sessions};
use fabric::wire::{Encoded, Farewell, Frame, FrameReader, encode};

use super::Store;
use crate::error::{Result, host};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 256;
/// Longest question, in bytes; the longest there is takes less.
const QUESTION_MAX: usize = 256;
/// How long a peer may keep an answer waiting that finds no room.
const WRITE_MAX: Duration = Duration::from_millis(200);
/// Pause where no connection can be taken (no descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const THREAD_STACK: usize = 128 << 10;

/// See the module.
#[derive(Debug)]
pub struct Service {
    listener: TcpListener,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    sessions: Sessions,
    store: Store,
    connections: BTreeMap<ConnectionId, Connection>,
    /// Connections so far.
    count: u64,
}

#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    heard: Instant,
}

impl Service {
    /// Listens.
    pub fn listen(address: SocketAddr, store: Store) -> Result<Service> {
        let listener = TcpListener::bind(address).map_err(host(format!("cannot listen on {address}")))?;
        // No session is ever opened: nobody sees the boot id.
        let sessions = Sessions::new(BootId(0), store.table().clone(), 1);
        let state = State { sessions, store, connections: BTreeMap::new(), count: 0 };
        Ok(Service { listener, state: Arc::new(Mutex::new(state)) })
    }

    /// Where.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(host("the socket"))
    }

    /// Answers for as long as the process lives.
    pub fn run(&self) -> ! {
        loop {
            let served = self.listener.accept().and_then(|(stream, _)| self.serve(stream));
            if let Err(e) = served {
                log::warn!("a connection cannot be served: {e}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_MAX))?;
        let reading = stream.try_clone()?;
        let id = lock(&self.state).admit(stream);
        let state = self.state.clone();
        let thread = std::thread::Builder::new().name("question".into()).stack_size(THREAD_STACK);
        let spawned = thread.spawn(move || {
            let ended = hear(reading, id, &state);
            log::debug!("connection {}: {ended}", id.0);
            lock(&state).forget(id);
        });
        spawned.map(|_| ()).inspect_err(|_| lock(&self.state).forget(id))
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hears questions until the connection ends; why it has.
fn hear(mut stream: TcpStream, id: ConnectionId, state: &Mutex<State>) -> String {
    let (mut reader, mut buffer) = (FrameReader::new(), [0; 4096]);
    loop {
        let n = match stream.read(&mut buffer) {
            Ok(0) => return "closed".into(),
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return e.to_string(),
        };
        let mut bytes = &buffer[..n];
        while !bytes.is_empty() {
            match reader.push_if(&mut bytes, |length| length <= QUESTION_MAX) {
                Ok(Some(frame)) if is_question(&frame) => {
                    if !lock(state).question(id, frame) {
                        return "ended here".into();
                    }
                }
                Ok(None) if reader.is_waiting().is_none() => {}
                wrong => {
                    lock(state).end(id, Farewell::Protocol);
                    return format!("no question: {wrong:?}").chars().take(200).collect();
                }
            }
        }
    }
}

fn is_question(frame: &Frame) -> bool {
    matches!(
        frame,
        Frame::OwnerGet { .. }
            | Frame::OwnerCas { .. }
            | Frame::OwnerReserve { .. }
            | Frame::OwnerRelease { .. }
            | Frame::Ping { .. }
            | Frame::Goodbye { .. }
    )
}

impl State {
    fn admit(&mut self, stream: TcpStream) -> ConnectionId {
        if self.connections.len() >= CONNECTIONS_MAX
            && let Some(id) = self.connections.iter().min_by_key(|(_, c)| c.heard).map(|(id, _)| *id)
        {
            self.end(id, Farewell::Full);
        }
        self.count += 1;
        let id = ConnectionId(self.count);
        self.connections.insert(id, Connection { stream, heard: Instant::now() });
        id
    }

    /// Whether the connection goes on.
    fn question(&mut self, id: ConnectionId, frame: Frame) -> bool {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.heard = Instant::now();
            self.sessions.frame(id, frame);
            // What is written, before what is said.
            let mut answers = Vec::new();
            while let Some(action) = self.sessions.poll_action() {
                match action {
                    Action::WriteOwners(change) => self.write(&change),
                    answer => answers.push(answer),
                }
            }
            answers.into_iter().for_each(|answer| self.answer(answer));
        }
        self.connections.contains_key(&id)
    }

    fn write(&mut self, change: &OwnerChange) {
        let written = self.store.write(change);
        if let Err(e) = &written {
            log::error!("the record of VM {} cannot be written: {e}", change.vm_id().0);
        }
        self.sessions.owners_written(written.is_ok());
    }

    fn answer(&mut self, answer: Action) {
        match answer {
            Action::Send(id, encoded) => self.send(id, encoded),
            Action::Close(id) => self.forget(id),
            // Writes are not among the answers, and nobody can open a session.
            other => log::error!("{other:?} without a session"),
        }
    }

    fn send(&mut self, id: ConnectionId, encoded: Encoded) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let Err(e) = connection.stream.write_all(&encoded.into_vec()) {
            log::debug!("connection {}: {e}", id.0);
            self.forget(id);
        }
    }

    /// Ends a connection, saying why.
    fn end(&mut self, id: ConnectionId, reason: Farewell) {
        if let Ok(encoded) = encode(Frame::Goodbye { reason }) {
            self.send(id, encoded);
        }
        self.forget(id);
    }

    fn forget(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.remove(&id) {
            // Its thread hears the end.
            let _ = connection.stream.shutdown(Shutdown::Both);
            self.sessions.closed(id);
        }
    }
}
