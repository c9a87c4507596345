//! The connections: one task reads frames, one writes them.
//!
//! Bounds: connections, the bytes of their buffers, and the bytes of frames that have begun and are not complete. A frame that is not
//! small waits for room before it is read on; one that has room must go on arriving, or its connection is ended, so that
//! those who wait get theirs.
use crate::config::{BUFFER_MIN, Memory, buffer_size};
use crate::node::Node;
use alloc::{collections::VecDeque, rc::Rc, vec::Vec};
use core::cell::{Cell, RefCell};
use fabric::server::ConnectionId;
use fabric::wire::{Encoded, Frame, FrameReader, WireError};
use guest_rt::net::{Buffers, Listener, ReadHalf, WriteHalf};
use guest_rt::spawn;
use guest_rt::sync::Notify;
use guest_rt::time::{Duration, timeout};

/// Connections waiting to be accepted.
pub const BACKLOG: usize = 16;
/// Bytes of a frame that need not wait for room: those without bulk data have fewer.
const SMALL_FRAME: usize = 4 << 10;
/// How long nothing may come of a frame that has room and is not complete.
const FRAME_STALL: Duration = Duration::from_secs(10);
/// How long the last frames of a connection may take to arrive.
const GOODBYE: Duration = Duration::from_secs(5);

/// Frames to be sent on a connection. Their bytes are bounded by the server.
#[derive(Default)]
pub struct Outbox {
    frames: RefCell<VecDeque<Encoded>>,
    closed: Cell<bool>,
    changed: Notify,
}

impl Outbox {
    pub fn send(&self, frame: Encoded) {
        self.frames.borrow_mut().push_back(frame);
        self.changed.notify();
    }

    /// The connection ends after what is in here.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.notify();
    }

    /// The next frame; `None` at the end.
    async fn next(&self) -> Option<Encoded> {
        let mut frame = None;
        self.changed
            .wait_until(|| {
                frame = self.frames.borrow_mut().pop_front();
                frame.is_some() || self.closed.get()
            })
            .await;
        frame
    }
}

/// Accepts connections for ever, as many at a time as there is memory for.
pub async fn accept(node: &Rc<Node>, listener: &Listener, memory: &Memory) {
    let mut last = 0;
    let buffers_used = Rc::new(Cell::new(0));
    loop {
        let (stream, peer) = listener.accept().await;
        if node.connections.borrow().len() >= memory.connections {
            log::warn!("{peer}: {} connections already, as many as there is memory for", memory.connections);
            stream.abort();
            continue;
        }
        last += 1;
        let id = ConnectionId(last);
        log::info!("connection {last} from {peer}");
        let outbox = Rc::new(Outbox::default());
        node.connections.borrow_mut().insert(id, outbox.clone());
        let Buffers { rx, tx } = stream.buffers();
        let used = Used { all: buffers_used.clone(), own: (rx + tx).saturating_sub(2 * BUFFER_MIN) };
        buffers_used.set(buffers_used.get() + used.own);
        let size = buffer_size(memory.buffer_bytes.saturating_sub(buffers_used.get()));
        listener.set_buffers(Buffers { rx: size, tx: size });
        let (reading, writing) = stream.into_split();
        spawn(read(node.clone(), id, reading, outbox.clone()));
        spawn(write(node.clone(), id, writing, outbox, used));
    }
}

/// Bytes of buffers that a connection has beyond the smallest.
struct Used {
    all: Rc<Cell<usize>>,
    own: usize,
}

impl Drop for Used {
    fn drop(&mut self) {
        self.all.set(self.all.get() - self.own);
    }
}

/// What is taken for the frame a connection is at.
struct FrameRoom<'a> {
    node: &'a Node,
    taken: usize,
}

impl FrameRoom<'_> {
    fn take(&mut self, bytes: usize) -> bool {
        if bytes <= SMALL_FRAME {
            return true;
        }
        let taken = self.node.take_frame(bytes);
        self.taken += if taken { bytes } else { 0 };
        taken
    }

    /// The frame is complete, and what it holds is the server's to count.
    fn done(&mut self) {
        self.node.return_frame(core::mem::take(&mut self.taken));
    }
}

impl Drop for FrameRoom<'_> {
    fn drop(&mut self) {
        self.done();
    }
}

/// What some bytes held.
struct Received {
    frames: Vec<Frame>,
    error: Option<WireError>,
    end: bool,
}

async fn read(node: Rc<Node>, id: ConnectionId, mut stream: ReadHalf, outbox: Rc<Outbox>) {
    let mut reader = FrameReader::new();
    let mut room = FrameRoom { node: &node, taken: 0 };
    loop {
        node.room().await;
        if let Some(bytes) = reader.is_waiting() {
            node.frame_room(bytes).await;
        }
        let is_large = room.taken > 0;
        let reading = stream.read_with(|bytes| {
            let mut received = Received { frames: Vec::new(), error: None, end: bytes.is_empty() };
            let mut rest = bytes;
            while !rest.is_empty() {
                match reader.push_if(&mut rest, |bytes| room.take(bytes)) {
                    Ok(Some(frame)) => {
                        room.done();
                        received.frames.push(frame);
                    }
                    Ok(None) if reader.is_waiting().is_some() => break,
                    Ok(None) => {}
                    Err(e) => {
                        received.error = Some(e);
                        rest = &[];
                    }
                }
            }
            (bytes.len() - rest.len(), received)
        });
        let received = if is_large {
            match timeout(FRAME_STALL, reading).await {
                Ok(received) => received,
                Err(_) => {
                    log::warn!("connection {}: a frame that has begun does not go on", id.0);
                    stream.abort();
                    break;
                }
            }
        } else {
            reading.await
        };
        let Ok(Received { frames, error, end }) = received else { break };
        if outbox.closed.get() {
            break;
        }
        for frame in frames {
            node.tell(|server, now| server.frame(id, frame, now));
        }
        if let Some(e) = error {
            node.tell(|server, now| server.broken(id, e, now));
        }
        if end || error.is_some() {
            break;
        }
    }
    drop(room);
    log::info!("connection {} ended", id.0);
    node.tell(|server, now| server.closed(id, now));
    outbox.close();
    node.connections.borrow_mut().remove(&id);
}

async fn write(node: Rc<Node>, id: ConnectionId, mut stream: WriteHalf, outbox: Rc<Outbox>, _used: Used) {
    while let Some(Encoded { head, data }) = outbox.next().await {
        if stream.write_all(&head).await.is_err() || stream.write_all(&data).await.is_err() {
            // The reader sees it too.
            stream.abort();
            break;
        }
        node.tell(|server, now| server.sent(id, head.len() + data.len(), now));
    }
    stream.shutdown();
    if timeout(GOODBYE, stream.drained()).await.is_err() || node.connections.borrow().contains_key(&id) {
        // The peer does not take its leave.
        stream.abort();
    }
}
