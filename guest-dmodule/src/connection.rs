//! The connections: one task reads frames, one writes them.
use crate::node::Node;
use alloc::{collections::VecDeque, rc::Rc, vec::Vec};
use core::cell::{Cell, RefCell};
use fabric::server::ConnectionId;
use fabric::wire::{Encoded, Frame, FrameReader, WireError};
use guest_rt::net::{Listener, ReadHalf, WriteHalf};
use guest_rt::spawn;
use guest_rt::sync::Notify;
use guest_rt::time::{Duration, timeout};

/// Connections waiting to be accepted.
pub const BACKLOG: usize = 8;
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

/// Accepts connections for ever, `most` at a time.
pub async fn accept(node: &Rc<Node>, listener: &Listener, most: usize) {
    let mut last = 0;
    loop {
        let (stream, peer) = listener.accept().await;
        if node.connections.borrow().len() >= most {
            log::warn!("{peer}: too many connections");
            stream.abort();
            continue;
        }
        last += 1;
        let id = ConnectionId(last);
        log::info!("connection {last} from {peer}");
        let outbox = Rc::new(Outbox::default());
        node.connections.borrow_mut().insert(id, outbox.clone());
        let (reading, writing) = stream.into_split();
        spawn(read(node.clone(), id, reading, outbox.clone()));
        spawn(write(node.clone(), id, writing, outbox));
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
    loop {
        node.room().await;
        let received = stream
            .read_with(|bytes| {
                let mut received = Received { frames: Vec::new(), error: None, end: bytes.is_empty() };
                let mut rest = bytes;
                while !rest.is_empty() {
                    match reader.push(&mut rest) {
                        Ok(frame) => received.frames.extend(frame),
                        Err(e) => {
                            received.error = Some(e);
                            break;
                        }
                    }
                }
                (bytes.len(), received)
            })
            .await;
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
    log::info!("connection {} ended", id.0);
    node.tell(|server, now| server.closed(id, now));
    outbox.close();
    node.connections.borrow_mut().remove(&id);
}

async fn write(node: Rc<Node>, id: ConnectionId, mut stream: WriteHalf, outbox: Rc<Outbox>) {
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
