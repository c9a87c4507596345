//! NFS, MOUNT and portmap over TCP.
//!
//! One task a connection reads records, one a call executes it, one a connection writes the replies. Always true: the
//! bytes of all records and replies are within the budgets of [`Limits`]; a record is read on only when there is room for
//! it; small calls do not wait for bulk data. Survives: clients that send nothing, half a record or too much, that do not read their replies, or that go away.
use crate::link::Link;
use crate::race::race;
use alloc::{rc::Rc, string::String, vec::Vec};
use core::cell::{Cell, RefCell};
use core::net::{IpAddr, SocketAddr};
use core::pin::pin;
use guest_nmodule::budget::{Budget, Permit};
use guest_nmodule::limits::{CALLS_PER_CONNECTION, Limits};
use guest_rt::net::{Listener, ReadHalf, SocketAddrV4, Stack, TcpError, TcpStream, WriteHalf};
use guest_rt::spawn;
use guest_rt::sync::{Notify, channel};
use guest_rt::time::{Duration, Instant, sleep, timeout};
use nfs::engine::{Engine, Peer};
use nfs::nfs3::arguments::{SMALL_REPLY, cost, write_split};
use nfs::record::{Event, RECORD_MAX, Record, RecordReader, Reply};

/// How long a record may take from its first byte to its last.
const RECORD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client may take to take a reply in.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// A connection idle for so long may be closed to make room for another; its client connects again when it needs to.
const IDLE: Duration = Duration::from_secs(5);
/// How often a full server looks for an idle connection.
const FULL_RETRY: Duration = Duration::from_millis(100);
/// When memory is short, a connection that holds some and has got on with nothing for so long is ended.
const STALLED: Duration = Duration::from_secs(3);
/// How often that is looked at.
const STALL_CHECK: Duration = Duration::from_millis(500);
/// Longest record of a small call.
const SMALL_RECORD_MAX: usize = 4096;

/// The services, with the limits they share.
pub struct Server {
    engine: Engine<Rc<Link>>,
    local: IpAddr,
    /// Memory of small calls, and of those with bulk data.
    small: Budget,
    bulk: Budget,
    limits: Limits,
    connections: RefCell<Vec<Rc<Connection>>>,
}

/// What is known of a connection from outside its tasks.
struct Connection {
    client: SocketAddrV4,
    /// Port of the service.
    port: u16,
    last_active: Cell<Instant>,
    /// Permits for calls; those taken are being executed or written.
    calls: Budget,
    /// Whether a record is on its way in, or a reply on its way out.
    receiving: Cell<bool>,
    sending: Cell<bool>,
    /// Whether the client has sent all it will; replies may still be due.
    finished: Cell<bool>,
    /// When last a byte of either went.
    progress: Cell<Instant>,
    /// Set to end it.
    closing: Cell<Option<Eviction>>,
    close: Notify,
}

/// Why a connection is ended for the sake of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Eviction {
    Idle,
    Stalled,
}

impl Connection {
    fn evict(&self, why: Eviction) {
        self.closing.set(Some(why));
        self.close.notify();
    }
}

/// Why a connection is ended from this side, or what ended it.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("closed by the client")]
    Closed,
    #[error("{0}")]
    Tcp(#[from] TcpError),
    #[error("{0}")]
    Record(#[from] nfs::record::RecordError),
    #[error("a record took longer than {} s", RECORD_TIMEOUT.as_secs())]
    SlowRecord,
    #[error("a reply was not taken in for {} s", REPLY_TIMEOUT.as_secs())]
    SlowReply,
    #[error("a record of {0} bytes for a call of a few")]
    Oversize(usize),
    #[error("idle, and others need the room")]
    Idle,
    #[error("stuck in a record or a reply for {} s, and others need the memory", STALLED.as_secs())]
    Stalled,
}

impl Server {
    /// A server over `engine`, known to clients as `local`.
    pub fn new(engine: Engine<Rc<Link>>, local: IpAddr, limits: Limits) -> Rc<Server> {
        let (small, bulk) = (Budget::new(limits.small_bytes), Budget::new(limits.call_bytes));
        Rc::new(Server { engine, local, small, bulk, limits, connections: RefCell::default() })
    }

    /// The paths that may be mounted, for people.
    pub fn exports(&self) -> String {
        let paths: Vec<&str> = self.engine.exports().iter().map(|export| export.path.as_str()).collect();
        paths.join(", ")
    }

    /// Accepts connections for ever, at most `most` of this listener at a time.
    pub async fn accept(self: Rc<Self>, stack: Stack, listener: Listener, most: usize) {
        let places = Budget::new(most);
        loop {
            while places.free() == 0 && !self.close_idle(listener.port(), most) {
                sleep(FULL_RETRY).await;
            }
            let place = places.acquire(1).await;
            // Sockets whose clients do not say goodbye keep their buffers for a while.
            while stack.sockets() >= self.limits.sockets {
                sleep(FULL_RETRY).await;
            }
            let (stream, client) = listener.accept().await;
            spawn(self.clone().serve(stream, (client, listener.port()), place));
        }
    }

    /// Ends the connection of a port that has been idle longest, if long enough. The place it had is free a little later.
    fn close_idle(&self, port: u16, most: usize) -> bool {
        let connections = self.connections.borrow();
        let open = connections.iter().filter(|c| c.port == port && c.closing.get().is_none());
        let mut idle: Vec<_> = open.filter(|c| c.finished.get() || c.calls.taken() == 0).collect();
        // Those that only wait for replies nobody may want go first.
        idle.sort_by_key(|c| (!c.finished.get(), c.last_active.get()));
        let Some(oldest) = idle.first() else { return false };
        if !oldest.finished.get() && oldest.last_active.get().elapsed() < IDLE {
            return false;
        }
        log::info!("port {port}: {most} connections are the limit, {} has been idle longest", oldest.client);
        oldest.evict(Eviction::Idle);
        true
    }

    /// Ends, for ever, connections that are stuck with memory others wait for.
    pub async fn relieve(self: Rc<Self>) {
        loop {
            sleep(STALL_CHECK).await;
            if !self.small.is_short() && !self.bulk.is_short() {
                continue;
            }
            for connection in self.connections.borrow().iter() {
                let stuck = connection.receiving.get() || connection.sending.get();
                if stuck && connection.closing.get().is_none() && connection.progress.get().elapsed() >= STALLED {
                    connection.evict(Eviction::Stalled);
                }
            }
        }
    }

    async fn serve(self: Rc<Self>, stream: TcpStream, (client, port): (SocketAddrV4, u16), place: Permit) {
        let connection = Rc::new(Connection {
            client,
            port,
            last_active: Cell::new(Instant::now()),
            calls: Budget::new(CALLS_PER_CONNECTION),
            receiving: Cell::new(false),
            sending: Cell::new(false),
            finished: Cell::new(false),
            progress: Cell::new(Instant::now()),
            closing: Cell::new(None),
            close: Notify::new(),
        });
        self.connections.borrow_mut().push(connection.clone());
        let (mut input, mut output) = stream.into_split();
        let (replies, queue) = channel::bounded(CALLS_PER_CONNECTION);
        let evicted = async || {
            connection.close.wait_until(|| connection.closing.get().is_some()).await;
            if connection.closing.get() == Some(Eviction::Stalled) { End::Stalled } else { End::Idle }
        };
        let reading = race(self.read(&mut input, &connection, replies), evicted());
        let end = {
            let mut writing = pin!(write(&mut output, &connection, queue));
            let end = race(reading, writing.as_mut()).await;
            if matches!(end, End::Closed) {
                // A client may shut its side down and wait for the replies.
                connection.finished.set(true);
                let writing = timeout(REPLY_TIMEOUT, writing);
                race(async { writing.await.unwrap_or(End::SlowReply) }, evicted()).await
            } else {
                end
            }
        };
        match end {
            End::Closed | End::Idle => {
                log::debug!("{client}: {end}");
                output.shutdown();
            }
            // Many clients end with a reset.
            End::Tcp(_) => {
                log::debug!("{client}: {end}");
                output.abort();
            }
            end => {
                log::warn!("{client}: {end}");
                output.abort();
            }
        }
        self.connections.borrow_mut().retain(|other| !Rc::ptr_eq(other, &connection));
        drop(place);
    }

    /// Reads records and starts their calls, to the end of the connection.
    async fn read(
        self: &Rc<Self>,
        input: &mut ReadHalf,
        connection: &Rc<Connection>,
        replies: channel::Sender<Outgoing>,
    ) -> End {
        let mut records = RecordReader::new(write_split);
        let mut deadline = None;
        let mut memory: Option<Permit> = None;
        loop {
            let fed = input.read_with(|bytes| match bytes {
                [] => (0, Err(End::Closed)),
                bytes => match records.feed(bytes) {
                    Ok((used, event)) => (used, Ok(event)),
                    Err(error) => (0, Err(error.into())),
                },
            });
            let fed = match deadline {
                None => fed.await,
                Some(at) => match timeout(at - Instant::now(), fed).await {
                    Ok(fed) => fed,
                    Err(_) => return End::SlowRecord,
                },
            };
            let event = match fed {
                Ok(Ok(event)) => event,
                Ok(Err(end)) => return end,
                Err(error) => return error.into(),
            };
            connection.progress.set(Instant::now());
            match event {
                Event::Starved => {}
                Event::Fragment { .. } if memory.is_some() => {}
                Event::Fragment { record_bytes, last } => {
                    memory = Some(if last && record_bytes <= SMALL_RECORD_MAX {
                        self.small.acquire(record_bytes + SMALL_REPLY).await
                    } else {
                        // For more fragments to come it takes all a record can need now: whoever waited for more
                        // while it holds some might wait for others that do the same.
                        let bytes = if last { record_bytes } else { RECORD_MAX };
                        self.bulk.acquire(bytes + SMALL_REPLY).await
                    });
                    // From here on: waiting for room is not the client's fault.
                    connection.progress.set(Instant::now());
                    connection.receiving.set(true);
                    deadline = Some(Instant::now() + RECORD_TIMEOUT);
                }
                Event::Record(record) => {
                    connection.receiving.set(false);
                    deadline = None;
                    let Some(memory) = memory.take() else { continue };
                    let mut permits = Permits { memory, bulk: None, call: None };
                    let more = cost(&record.head);
                    if more > 0 {
                        // Whoever waits here for much must hold little, or all might wait for each other.
                        if record.len() > SMALL_RECORD_MAX {
                            return End::Oversize(record.len());
                        }
                        permits.bulk = Some(self.bulk.acquire(more).await);
                    }
                    permits.call = Some(connection.calls.acquire(1).await);
                    connection.last_active.set(Instant::now());
                    spawn(self.clone().call(connection.clone(), record, replies.clone(), permits));
                }
            }
        }
    }

    async fn call(
        self: Rc<Self>,
        connection: Rc<Connection>,
        record: Record,
        replies: channel::Sender<Outgoing>,
        mut permits: Permits,
    ) {
        let peer = Peer { client: SocketAddr::V4(connection.client), local: self.local };
        if let Some(reply) = self.engine.handle(peer, record).await {
            permits.shrink(reply.len());
            // The connection may be gone: then nobody waits for the reply.
            let _ = replies.send(Outgoing { reply, _permits: permits }).await;
        }
    }
}

/// What a call holds of the limits.
struct Permits {
    /// For its record and a small reply.
    memory: Permit,
    /// For a large reply.
    bulk: Option<Permit>,
    call: Option<Permit>,
}

impl Permits {
    /// Only a reply of `bytes` is left.
    fn shrink(&mut self, bytes: usize) {
        match &mut self.bulk {
            Some(bulk) => {
                bulk.shrink(bytes);
                self.memory.shrink(0);
            }
            None => self.memory.shrink(bytes),
        }
    }
}

/// A reply, with what it holds of the limits until it is written.
struct Outgoing {
    reply: Reply,
    _permits: Permits,
}

/// Writes replies, each whole, until the reader and all calls are gone or it is no longer possible.
async fn write(output: &mut WriteHalf, connection: &Connection, mut queue: channel::Receiver<Outgoing>) -> End {
    while let Some(outgoing) = queue.recv().await {
        connection.progress.set(Instant::now());
        connection.sending.set(true);
        match timeout(REPLY_TIMEOUT, send(output, connection, &outgoing.reply)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return End::SlowReply,
        }
        connection.sending.set(false);
        connection.last_active.set(Instant::now());
    }
    End::Closed
}

async fn send(output: &mut WriteHalf, connection: &Connection, reply: &Reply) -> Result<(), TcpError> {
    for mut slice in reply.slices() {
        while !slice.is_empty() {
            let copied = output.write_with(|space| {
                let length = space.len().min(slice.len());
                space[..length].copy_from_slice(&slice[..length]);
                (length, length)
            });
            slice = &slice[copied.await?..];
            connection.progress.set(Instant::now());
        }
    }
    Ok(())
}
