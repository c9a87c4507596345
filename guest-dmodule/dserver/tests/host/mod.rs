//! The D-module's server on the host: a file as the disk, threads, TCP. For tests, and to test N-modules against.
//!
//! Nothing is shut down in order: what the last consistency point does not hold is gone when it is dropped.
#![allow(dead_code, clippy::unwrap_used)] // each test uses some of it

pub mod client;

use dserver::{
    Disk, DiskError, FormatPolicy, Mounted, Now, Options, Output, OwnersPolicy, Server, StartError, mount, runs,
};
use fabric::fs::Time;
use fabric::id::BootId;
use fabric::server::ConnectionId;
use fabric::wire::{Encoded, FrameReader};
use layout::{BLOCK_SIZE, Block, BlockBuf, BlockNumber};
use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// A file as a disk.
pub struct FileDisk(File);

impl FileDisk {
    pub fn open(path: &Path) -> Self {
        FileDisk(File::options().read(true).write(true).open(path).unwrap())
    }

    fn read_blocks(&self, first: BlockNumber, count: usize) -> std::io::Result<Vec<Block>> {
        let mut blocks = Vec::with_capacity(count);
        for at in first.0..first.0 + count as u64 {
            let mut buf = Box::new(BlockBuf([0; BLOCK_SIZE]));
            self.0.read_exact_at(buf.as_mut().as_mut(), at * BLOCK_SIZE as u64)?;
            blocks.push(buf.into());
        }
        Ok(blocks)
    }

    fn write_blocks(&self, first: BlockNumber, blocks: &[Block]) -> std::io::Result<()> {
        let bytes: Vec<u8> = blocks.iter().flat_map(|b| b.bytes().iter().copied()).collect();
        self.0.write_all_at(&bytes, first.0 * BLOCK_SIZE as u64)
    }
}

fn failed(e: std::io::Error) -> DiskError {
    DiskError(e.to_string())
}

impl Disk for FileDisk {
    fn blocks(&self) -> u64 {
        self.0.metadata().unwrap().len() / BLOCK_SIZE as u64
    }
    async fn read(&self, first: BlockNumber, count: usize) -> Result<Vec<Block>, DiskError> {
        self.read_blocks(first, count).map_err(failed)
    }
    async fn write(&self, first: BlockNumber, blocks: Vec<Block>) -> Result<(), DiskError> {
        self.write_blocks(first, &blocks).map_err(failed)
    }
    async fn flush(&self) -> Result<(), DiskError> {
        self.0.sync_data().map_err(failed)
    }
}

/// Runs a future that never waits.
pub fn now_or_never<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing here waits"),
    }
}

pub fn options(volume: &str, boot: u64) -> Options {
    Options {
        volume: volume.into(),
        format: FormatPolicy::IfBlank,
        owners: OwnersPolicy::Keep,
        boot_id: BootId(boot),
        random: [boot, 2, 3],
        now: Time(1_700_000_000_000_000_000),
        cache_blocks: 8192,
        dirty_blocks: 2048,
        held_bytes: 16 << 20,
        sessions: 256,
    }
}

enum ToWriter {
    Frame(Encoded),
    Close,
}

enum Io {
    Read(BlockNumber, usize),
    ConsistencyPoint(layout::ConsistencyPoint),
    Owners(BlockNumber, Block),
}

struct State {
    server: Server,
    connections: HashMap<ConnectionId, (Sender<ToWriter>, TcpStream)>,
    last: u64,
    reads: Sender<Io>,
    points: Sender<Io>,
    owners: Sender<Io>,
}

struct Shared {
    state: Mutex<State>,
    /// Room for requests.
    room: Condvar,
    started: Instant,
    stop: AtomicBool,
}

impl Shared {
    fn now(&self) -> Now {
        let real = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        Now { mono_ns: self.started.elapsed().as_nanos() as u64, real: Time(real.as_nanos() as i64) }
    }

    /// Tells the server something, then does what it says.
    fn tell<T>(&self, what: impl FnOnce(&mut Server, Now) -> T) -> T {
        let mut state = self.state.lock().unwrap();
        let now = self.now();
        let result = what(&mut state.server, now);
        while let Some(output) = state.server.poll_output() {
            // Who does not listen any more is being stopped.
            let _ = match output {
                Output::Send(id, frame) => {
                    if let Some((writer, _)) = state.connections.get(&id) {
                        let _ = writer.send(ToWriter::Frame(frame));
                    }
                    Ok(())
                }
                Output::Close(id) => {
                    if let Some((writer, _)) = state.connections.get(&id) {
                        let _ = writer.send(ToWriter::Close);
                    }
                    Ok(())
                }
                Output::Read { first, count } => state.reads.send(Io::Read(first, count)),
                Output::ConsistencyPoint(point) => state.points.send(Io::ConsistencyPoint(point)),
                Output::WriteOwners { number, block } => state.owners.send(Io::Owners(number, block)),
            };
        }
        self.room.notify_all();
        result
    }

    fn disk(&self, disk: &FileDisk, queue: &Receiver<Io>) {
        while let Ok(io) = queue.recv() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            match io {
                Io::Read(first, count) => {
                    let blocks = disk.read_blocks(first, count).ok();
                    self.tell(|server, now| server.read_done(first, count, blocks, now));
                }
                Io::ConsistencyPoint(point) => {
                    let done = write_point(disk, point);
                    self.tell(|server, now| server.consistency_point_done(done.is_ok(), now));
                }
                Io::Owners(number, block) => {
                    let done = disk.write_blocks(number, &[block]).and_then(|()| disk.0.sync_data());
                    self.tell(|server, now| server.owners_done(done.is_ok(), now));
                }
            }
        }
    }

    fn connection(self: &Arc<Self>, mut stream: TcpStream) {
        let (sender, receiver) = channel();
        let id = {
            let mut state = self.state.lock().unwrap();
            state.last += 1;
            let id = ConnectionId(state.last);
            state.connections.insert(id, (sender, stream.try_clone().unwrap()));
            id
        };
        let (shared, writing) = (self.clone(), stream.try_clone().unwrap());
        let writer = std::thread::spawn(move || shared.write(id, writing, &receiver));
        let (mut reader, mut buffer) = (FrameReader::new(), vec![0; 256 << 10]);
        'all: while let Ok(n @ 1..) = stream.read(&mut buffer) {
            let mut rest = &buffer[..n];
            loop {
                match reader.push(&mut rest) {
                    Ok(Some(frame)) => self.tell(|server, now| server.frame(id, frame, now)),
                    Ok(None) => break,
                    Err(e) => {
                        self.tell(|server, now| server.broken(id, e, now));
                        break 'all;
                    }
                }
            }
            let state = self.state.lock().unwrap();
            drop(
                self.room
                    .wait_while(state, |s| !s.server.takes_requests() && !self.stop.load(Ordering::Relaxed))
                    .unwrap(),
            );
        }
        self.tell(|server, now| server.closed(id, now));
        self.state.lock().unwrap().connections.remove(&id);
        let _ = writer.join();
    }

    fn write(&self, id: ConnectionId, mut stream: TcpStream, queue: &Receiver<ToWriter>) {
        while let Ok(ToWriter::Frame(frame)) = queue.recv() {
            if stream.write_all(&frame.head).and_then(|()| stream.write_all(&frame.data)).is_err() {
                break;
            }
            self.tell(|server, now| server.sent(id, frame.head.len() + frame.data.len(), now));
        }
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn write_point(disk: &FileDisk, point: layout::ConsistencyPoint) -> std::io::Result<()> {
    for run in runs(point.writes) {
        disk.write_blocks(run.first, &run.blocks)?;
    }
    disk.0.sync_data()?;
    disk.write_blocks(point.fsinfo.0, &[point.fsinfo.1])?;
    disk.0.sync_data()
}

/// A D-module on the host.
pub struct Host {
    pub address: SocketAddr,
    pub formatted: bool,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Host {
    pub fn start(path: &Path, listen: SocketAddr, options: &Options) -> Result<Host, StartError> {
        let disk = FileDisk::open(path);
        let Mounted { server, formatted, .. } = now_or_never(mount(&disk, options))?;
        let disk = Arc::new(disk);
        let (reads, read_queue) = channel();
        let (points, point_queue) = channel();
        let (owners, owner_queue) = channel();
        let state = State { server, connections: HashMap::new(), last: 0, reads, points, owners };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            room: Condvar::new(),
            started: Instant::now(),
            stop: AtomicBool::new(false),
        });
        for queue in [read_queue, point_queue, owner_queue] {
            let (shared, disk) = (shared.clone(), disk.clone());
            std::thread::spawn(move || shared.disk(&disk, &queue));
        }
        let ticker = shared.clone();
        std::thread::spawn(move || {
            while !ticker.stop.load(Ordering::Relaxed) {
                let wait = {
                    let next = ticker.state.lock().unwrap().server.next_tick();
                    next.map_or(u64::MAX, |at| at.saturating_sub(ticker.now().mono_ns))
                };
                std::thread::sleep(
                    Duration::from_nanos(wait).clamp(Duration::from_micros(100), Duration::from_millis(20)),
                );
                if wait == 0 {
                    ticker.tell(|server, now| server.tick(now));
                }
            }
        });
        let listener = TcpListener::bind(listen).unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = shared.clone();
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.stop.load(Ordering::Relaxed) {
                    return;
                }
                stream.set_nodelay(true).unwrap();
                let shared = accepting.clone();
                std::thread::spawn(move || shared.connection(stream));
            }
        });
        Ok(Host { address, formatted, shared, acceptor: Some(acceptor) })
    }

    pub fn statistics(&self) -> dserver::Statistics {
        self.shared.state.lock().unwrap().server.statistics()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        {
            let mut guard = self.shared.state.lock().unwrap();
            let state = &mut *guard;
            self.shared.stop.store(true, Ordering::Relaxed);
            for (writer, stream) in std::mem::take(&mut state.connections).into_values() {
                let _ = writer.send(ToWriter::Close);
                let _ = stream.shutdown(Shutdown::Both);
            }
            // Ends the disk threads.
            for queue in [&mut state.reads, &mut state.points, &mut state.owners] {
                *queue = channel().0;
            }
        }
        self.shared.room.notify_all();
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        // A disk thread in the middle of a consistency point has to end before the file is opened again.
        while Arc::strong_count(&self.shared) > 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
