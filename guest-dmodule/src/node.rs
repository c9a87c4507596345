//! The server with its disk: does what it asks for.
//!
//! Owns the [`Server`] and the tasks of its disk. Always true: the server is told of everything it asked for exactly once;
//! while an ownership record is on its way, no further write of a consistency point is begun. A port waits for it.
use crate::connection::Outbox;
use crate::disk::VirtioDisk;
use alloc::{
    collections::{BTreeMap, VecDeque},
    rc::Rc,
};
use core::cell::{Cell, RefCell};
use dserver::{Disk, DiskError, Now, Output, Run, Server, runs};
use fabric::fs::Time;
use fabric::server::ConnectionId;
use guest_rt::sync::Notify;
use guest_rt::time::{Instant, realtime_ns, timeout};
use guest_rt::{spawn, yield_now};
use layout::{Block, BlockNumber, ConsistencyPoint};

/// Transfers of a consistency point under way at a time.
const WRITES: usize = 4;
/// Blocks of each while a port is expected, one at a time: an ownership record waits for what is under way.
const PORT_RUN: usize = 64;

/// Rounds of the executor after which an answer is with the network device: the writer of its connection, then the stack.
const ANSWER_FIRST: usize = 3;

pub struct Node {
    server: RefCell<Server>,
    disk: VirtioDisk,
    pub connections: RefCell<BTreeMap<ConnectionId, Rc<Outbox>>>,
    /// An ownership record is being written.
    owners_busy: Cell<bool>,
    owners_done: Notify,
    /// The server may take requests again.
    room: Notify,
    /// Bytes that frames which are not complete may still take.
    frame_bytes: Cell<usize>,
    frame_room: Notify,
    /// When the ticker wakes.
    armed: Cell<Option<u64>>,
    rearm: Notify,
}

fn now() -> Now {
    Now { mono_ns: Instant::now().as_nanos(), real: Time(realtime_ns() as i64) }
}

impl Node {
    /// Takes a server over and starts its clock; frames that are not complete may have so many bytes.
    pub fn new(server: Server, disk: VirtioDisk, frame_bytes: usize) -> Rc<Node> {
        let node = Rc::new(Node {
            server: RefCell::new(server),
            disk,
            connections: RefCell::default(),
            owners_busy: Cell::new(false),
            owners_done: Notify::new(),
            room: Notify::new(),
            frame_bytes: Cell::new(frame_bytes),
            frame_room: Notify::new(),
            armed: Cell::new(None),
            rearm: Notify::new(),
        });
        spawn(tick(node.clone()));
        node
    }

    /// Tells the server something, then does what it says.
    pub fn tell(self: &Rc<Self>, what: impl FnOnce(&mut Server, Now)) {
        what(&mut self.server.borrow_mut(), now());
        loop {
            let output = self.server.borrow_mut().poll_output();
            match output {
                None => break,
                Some(output) => self.carry_out(output),
            }
        }
        if self.takes_requests() {
            self.room.notify();
        }
        if self.server.borrow().next_tick() != self.armed.get() {
            self.rearm.notify();
        }
    }

    fn takes_requests(&self) -> bool {
        self.server.borrow().takes_requests()
    }

    fn expects_port(&self) -> bool {
        self.server.borrow().expects_port(now())
    }

    /// Waits until the server takes more requests.
    pub async fn room(&self) {
        self.room.wait_until(|| self.takes_requests()).await;
    }

    /// Takes bytes for a frame, if they are there.
    pub fn take_frame(&self, bytes: usize) -> bool {
        let left = self.frame_bytes.get().checked_sub(bytes);
        self.frame_bytes.set(left.unwrap_or(self.frame_bytes.get()));
        left.is_some()
    }

    /// Gives them back.
    pub fn return_frame(&self, bytes: usize) {
        self.frame_bytes.set(self.frame_bytes.get() + bytes);
        self.frame_room.notify();
    }

    /// Waits until there is room for a frame.
    pub async fn frame_room(&self, bytes: usize) {
        self.frame_room.wait_until(|| self.frame_bytes.get() >= bytes).await;
    }

    fn carry_out(self: &Rc<Self>, output: Output) {
        match output {
            Output::Send(id, frame) => {
                if let Some(outbox) = self.connections.borrow().get(&id) {
                    outbox.send(frame);
                }
            }
            Output::Close(id) => {
                if let Some(outbox) = self.connections.borrow().get(&id) {
                    outbox.close();
                }
            }
            Output::Read { first, count } => {
                spawn(read(self.clone(), first, count));
            }
            Output::ConsistencyPoint(point) => {
                spawn(consistency_point(self.clone(), point));
            }
            Output::WriteOwners { number, block } => {
                self.owners_busy.set(true);
                spawn(write_owners(self.clone(), number, block));
            }
        }
    }

    async fn write_point(&self, point: ConsistencyPoint) -> Result<(), DiskError> {
        let mut under_way = VecDeque::new();
        let mut result = Ok(());
        let mut left: VecDeque<Run> = runs(point.writes).into();
        while let Some(Run { first, mut blocks }) = left.pop_front() {
            let most = if self.expects_port() { 1 } else { WRITES };
            while under_way.len() >= most
                && let Some(write) = under_way.pop_front()
            {
                result = result.and(write.await);
            }
            self.owners_done.wait_until(|| !self.owners_busy.get()).await;
            if self.expects_port() && blocks.len() > PORT_RUN {
                let rest = blocks.split_off(PORT_RUN);
                left.push_front(Run { first: BlockNumber(first.0 + PORT_RUN as u64), blocks: rest });
            }
            let disk = self.disk.clone();
            under_way.push_back(spawn(async move { disk.write(first, blocks).await }));
        }
        for write in under_way {
            result = result.and(write.await);
        }
        result?;
        self.disk.flush().await?;
        let (number, fsinfo) = point.fsinfo;
        self.disk.write(number, alloc::vec![fsinfo]).await?;
        self.disk.flush().await
    }
}

async fn read(node: Rc<Node>, first: BlockNumber, count: usize) {
    let blocks = node.disk.read(first, count).await.map_err(|e| log::error!("{e}")).ok();
    node.tell(|server, now| server.read_done(first, count, blocks, now));
}

async fn consistency_point(node: Rc<Node>, point: ConsistencyPoint) {
    let start = Instant::now();
    let (number, blocks) = (point.number, point.writes.len());
    let result = node.write_point(point).await;
    match &result {
        Ok(()) => log::debug!("consistency point {}: {blocks} blocks in {} us", number.0, start.elapsed().as_micros()),
        Err(e) => log::error!("consistency point {}: {e}", number.0),
    }
    node.tell(|server, now| server.consistency_point_done(result.is_ok(), now));
}

async fn write_owners(node: Rc<Node>, number: BlockNumber, block: Block) {
    let start = Instant::now();
    // An answer that does not wait for the disk leaves first: the host does one after the other, and a VM stands still for it.
    for _ in 0..ANSWER_FIRST {
        yield_now().await;
    }
    let written = async {
        node.disk.write(number, alloc::vec![block]).await?;
        node.disk.flush().await
    };
    let result: Result<(), DiskError> = written.await;
    match &result {
        Ok(()) => log::debug!("ownership records: {} us", start.elapsed().as_micros()),
        Err(e) => log::error!("ownership records: {e}"),
    }
    node.owners_busy.set(false);
    node.owners_done.notify();
    node.tell(|server, now| server.owners_done(result.is_ok(), now));
}

/// Calls the server when it wants to be.
async fn tick(node: Rc<Node>) {
    loop {
        let next = node.server.borrow().next_tick();
        node.armed.set(next);
        let rearmed = node.rearm.notified();
        match next {
            None => rearmed.await,
            Some(at) => {
                let left = Instant::from_nanos(at).since(Instant::now());
                if !left.is_zero() && timeout(left, rearmed).await.is_ok() {
                    continue;
                }
                // Others first: what is due at once is work that can wait.
                yield_now().await;
                node.tell(|server, now| server.tick(now));
            }
        }
    }
}
