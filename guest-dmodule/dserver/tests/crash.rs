//! The whole of the D-module but its devices, with a disk that loses unflushed writes: from seeds. A client makes,
//! renames and removes; whatever is lost in a crash of the D-module, each operation happens once and says that it did.
//!
//! The disk: writes reach it in any order; a crash keeps any of those since the last flush and loses the others. Reads
//! see all writes. A crash may happen between any two transfers.
#![allow(clippy::unwrap_used)] // helpers of tests too
use dserver::{Disk, DiskError, FormatPolicy, Now, Options, Output, OwnersPolicy, Server, mount};
use fabric::client::{ClientSession, Event, Ticket};
use fabric::fs::*;
use fabric::id::{BootId, Epoch, Owner, VmId};
use fabric::op::{Op, Reply, Request};
use fabric::server::ConnectionId;
use fabric::wire::FrameReader;
use layout::{Block, BlockNumber, ConsistencyPoint};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

const BLOCKS: u64 = 16384;
const FILES: u64 = 3;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n.max(1)
    }
}

/// The disk: what is on it for certain, and what was written since the last flush.
#[derive(Default)]
struct SimDisk {
    durable: HashMap<u64, Block>,
    written: Vec<(u64, Block)>,
}

impl SimDisk {
    fn read(&self, number: u64) -> Block {
        let last = self.written.iter().rev().find(|(n, _)| *n == number).map(|(_, block)| block);
        last.or(self.durable.get(&number)).cloned().unwrap_or_else(Block::zeroed)
    }
    fn flush(&mut self) {
        self.durable.extend(self.written.drain(..));
    }
    fn crash(&mut self, random: &mut Random) {
        for (number, block) in std::mem::take(&mut self.written) {
            if random.below(2) == 0 {
                self.durable.insert(number, block);
            }
        }
    }
}

struct Mounting<'a>(&'a RefCell<SimDisk>);

impl Disk for Mounting<'_> {
    fn blocks(&self) -> u64 {
        BLOCKS
    }
    async fn read(&self, first: BlockNumber, count: usize) -> Result<Vec<Block>, DiskError> {
        Ok((first.0..first.0 + count as u64).map(|n| self.0.borrow().read(n)).collect())
    }
    async fn write(&self, first: BlockNumber, blocks: Vec<Block>) -> Result<(), DiskError> {
        self.0.borrow_mut().written.extend((first.0..).zip(blocks));
        Ok(())
    }
    async fn flush(&self) -> Result<(), DiskError> {
        self.0.borrow_mut().flush();
        Ok(())
    }
}

fn now_or_never<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing here waits"),
    }
}

fn start(disk: &RefCell<SimDisk>, boot: u64) -> Server {
    let options = Options {
        volume: "vol0".into(),
        format: FormatPolicy::IfBlank,
        owners: OwnersPolicy::Keep,
        boot_id: BootId(boot),
        random: [1, 2, 3],
        now: Time(1),
        cache_blocks: 256,
        dirty_blocks: 128,
        held_bytes: 0,
    };
    now_or_never(mount(&Mounting(disk), &options)).unwrap().server
}

/// Transfers under way.
enum Io {
    Read(BlockNumber, usize),
    /// Blocks left to write, and how far it is.
    Point(ConsistencyPoint, u8),
    Owners(BlockNumber, Block, bool),
}

/// What becomes of a name.
#[derive(Clone, Debug)]
enum Asked {
    Root,
    Make(u64),
    Rename(u64),
    Remove,
    Write(u64, Vec<u8>),
    Read(u64),
}

struct World {
    random: Random,
    disk: RefCell<SimDisk>,
    server: Server,
    boots: u64,
    io: Vec<Io>,
    client: ClientSession,
    connection: Option<ConnectionId>,
    connections: u64,
    reader: FrameReader,
    up: VecDeque<u8>,
    down: VecDeque<u8>,
    asked: BTreeMap<Ticket, Asked>,
    root: Option<FileHandle>,
    next: u64,
    /// Names made, renamed; free to be changed again.
    made: Vec<u64>,
    renamed: Vec<u64>,
    files: BTreeMap<u64, (FileHandle, Vec<u8>)>,
    busy: BTreeSet<u64>,
    clock: u64,
    done: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let disk = RefCell::default();
        let server = start(&disk, 1);
        let mut world = World {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            disk,
            server,
            boots: 1,
            io: Vec::new(),
            client: ClientSession::new(VmId(1), Epoch::UNCLAIMED, Owner([1, 1])),
            connection: None,
            connections: 0,
            reader: FrameReader::new(),
            up: VecDeque::new(),
            down: VecDeque::new(),
            asked: BTreeMap::new(),
            root: None,
            next: 0,
            made: Vec::new(),
            renamed: Vec::new(),
            files: BTreeMap::new(),
            busy: BTreeSet::new(),
            clock: 0,
            done: 0,
        };
        world.ask(Op::OpenVolume { name: "vol0".into() }, Asked::Root);
        world
    }

    fn now(&mut self) -> Now {
        self.clock += 20_000_000;
        Now { mono_ns: self.clock, real: Time(self.clock as i64) }
    }

    fn ask(&mut self, op: Op, asked: Asked) -> bool {
        let ticket = self.client.submit(Request { credential: Credential::ROOT, op });
        if let Ok(ticket) = ticket {
            self.asked.insert(ticket, asked);
        }
        self.client.outstanding() < 64
    }

    fn submit(&mut self) {
        let Some(dir) = self.root else { return };
        if self.client.outstanding() >= 40 {
            return;
        }
        match self.random.below(8) {
            0..3 => {
                self.next += 1;
                let (n, set) = (self.next, SetAttr::default());
                let how = CreateHow::Guarded(set);
                let name = format!("made{n}").into_bytes();
                let op = if n > FILES { Op::MakeDir { dir, name, set } } else { Op::Create { dir, name, how } };
                self.ask(op, Asked::Make(n));
            }
            3 | 4 if !self.made.is_empty() => {
                let n = self.made.swap_remove(self.random.below(self.made.len()));
                let (from_name, to_name) = (format!("made{n}").into(), format!("renamed{n}").into());
                self.ask(Op::Rename { from_dir: dir, from_name, to_dir: dir, to_name }, Asked::Rename(n));
            }
            5 if !self.renamed.is_empty() => {
                let n = self.renamed.swap_remove(self.random.below(self.renamed.len()));
                self.ask(Op::RemoveDir { dir, name: format!("renamed{n}").into() }, Asked::Remove);
            }
            6 | 7 if !self.files.is_empty() => {
                let n = 1 + self.random.next() % FILES;
                let Some((handle, data)) = self.files.get(&n).cloned() else { return };
                if !self.busy.insert(n) {
                    return;
                }
                if self.random.below(3) == 0 {
                    let length = data.len() as u32 + 1;
                    self.ask(Op::Read { handle, offset: 0, length }, Asked::Read(n));
                } else {
                    self.next += 1000;
                    let data: Vec<u8> = (self.next..self.next + 3000).flat_map(u64::to_le_bytes).collect();
                    let stability = Stability::FileSync;
                    self.ask(Op::Write { handle, offset: 0, stability, data: data.clone() }, Asked::Write(n, data));
                }
            }
            _ => {}
        }
    }

    fn completed(&mut self, ticket: Ticket, outcome: fabric::op::Outcome) {
        self.done += 1;
        match (self.asked.remove(&ticket).unwrap(), outcome) {
            (Asked::Root, Ok(Reply::Node { attr, .. })) => self.root = Some(attr.handle),
            (Asked::Make(n), Ok(Reply::Created { attr, .. })) if n <= FILES => {
                self.files.insert(n, (attr.handle, Vec::new()));
            }
            (Asked::Make(n), Ok(Reply::Created { .. })) => self.made.push(n),
            (Asked::Rename(n), Ok(Reply::Wcc2(..))) => self.renamed.push(n),
            (Asked::Remove, Ok(Reply::Wcc(_))) => {}
            (Asked::Write(n, data), Ok(Reply::Written { .. })) => {
                self.busy.remove(&n);
                self.files.get_mut(&n).unwrap().1 = data;
            }
            (Asked::Read(n), Ok(Reply::Data { data, eof: true, .. })) => {
                self.busy.remove(&n);
                assert!(data == self.files[&n].1, "file {n}");
            }
            other => panic!("an operation done once is not refused: {other:?}"),
        }
    }

    fn outputs(&mut self) {
        while let Some(output) = self.server.poll_output() {
            match output {
                Output::Send(id, frame) => {
                    if self.connection == Some(id) {
                        let bytes = frame.into_vec();
                        let (now, n) = (self.now(), bytes.len());
                        self.down.extend(bytes);
                        self.server.sent(id, n, now);
                    }
                }
                Output::Close(id) => {
                    if self.connection == Some(id) {
                        self.cut();
                    }
                }
                Output::Read { first, count } => self.io.push(Io::Read(first, count)),
                Output::ConsistencyPoint(point) => self.io.push(Io::Point(point, 0)),
                Output::WriteOwners { number, block } => self.io.push(Io::Owners(number, block, false)),
            }
        }
    }

    /// One transfer goes on by one step.
    fn transfer(&mut self) {
        if self.io.is_empty() {
            return;
        }
        let at = self.random.below(self.io.len());
        let now = self.now();
        match self.io.swap_remove(at) {
            Io::Read(first, count) => {
                let blocks = (first.0..first.0 + count as u64).map(|n| self.disk.borrow().read(n)).collect();
                self.server.read_done(first, count, Some(blocks), now);
            }
            Io::Point(mut point, stage) => {
                let mut disk = self.disk.borrow_mut();
                let mut stage = stage;
                if point.writes.is_empty() {
                    match stage {
                        0 | 2 => disk.flush(),
                        _ => disk.written.push((point.fsinfo.0.0, point.fsinfo.1.clone())),
                    }
                    stage += 1;
                } else {
                    for _ in 0..1 + self.random.below(8) {
                        if !point.writes.is_empty() {
                            let (number, block) = point.writes.swap_remove(self.random.below(point.writes.len()));
                            disk.written.push((number.0, block));
                        }
                    }
                }
                drop(disk);
                if stage == 3 {
                    self.server.consistency_point_done(true, now);
                } else {
                    self.io.push(Io::Point(point, stage));
                }
            }
            Io::Owners(number, block, false) => {
                self.disk.borrow_mut().written.push((number.0, block.clone()));
                self.io.push(Io::Owners(number, block, true));
            }
            Io::Owners(_, _, true) => {
                self.disk.borrow_mut().flush();
                self.server.owners_done(true, now);
            }
        }
    }

    fn cut(&mut self) {
        self.connection = None;
        self.client.disconnected();
        self.up.clear();
        self.down.clear();
        self.reader = FrameReader::new();
    }

    fn crash(&mut self) {
        self.disk.borrow_mut().crash(&mut self.random);
        self.io.clear();
        self.boots += 1;
        self.server = start(&self.disk, self.boots);
        self.cut();
    }

    fn step(&mut self, faults: bool) {
        match self.random.below(if faults { 400 } else { 396 }) {
            0..40 if faults => self.submit(),
            0..120 => {
                if self.connection.is_none() {
                    self.connections += 1;
                    self.connection = Some(ConnectionId(self.connections));
                    self.client.connected();
                }
                while let Some(chunk) = self.client.poll_transmit() {
                    self.up.extend(chunk.as_ref());
                }
            }
            120..200 => {
                let n = self.up.len().min(1 + self.random.below(30_000));
                let piece: Vec<u8> = self.up.drain(..n).collect();
                let mut rest = &piece[..];
                while let Some(frame) = self.reader.push(&mut rest).unwrap() {
                    let now = self.now();
                    self.server.frame(self.connection.unwrap(), frame, now);
                }
            }
            200..280 => {
                let n = self.down.len().min(1 + self.random.below(30_000));
                let piece: Vec<u8> = self.down.drain(..n).collect();
                self.client.receive(&piece).unwrap();
                while let Some(event) = self.client.poll_event() {
                    if let Event::Completed(ticket, outcome) = event {
                        self.completed(ticket, outcome);
                    }
                }
            }
            280..390 => self.transfer(),
            390..396 => {
                let now = self.now();
                self.server.tick(now);
            }
            396..398 => {
                if let Some(id) = self.connection {
                    self.cut();
                    let now = self.now();
                    self.server.closed(id, now);
                }
            }
            _ => self.crash(),
        }
        self.outputs();
    }

    fn settle(&mut self) {
        let mut steps = 0;
        while self.client.outstanding() > 0 {
            self.step(false);
            steps += 1;
            assert!(steps < 1_000_000, "it ends");
        }
    }

    /// Names in the root directory.
    fn list(&mut self) -> BTreeSet<String> {
        let dir = self.root.unwrap();
        let mut names = BTreeSet::new();
        let mut cookie = 0;
        loop {
            let op = Op::ReadDir { dir, cookie, max_entries: 1000, max_bytes: 100_000, plus: false };
            self.client.submit(Request { credential: Credential::ROOT, op }).unwrap();
            let outcome = loop {
                while let Some(chunk) = self.client.poll_transmit() {
                    self.up.extend(chunk.as_ref());
                }
                self.step_quietly();
                if let Some(Event::Completed(_, outcome)) = self.client.poll_event() {
                    break outcome;
                }
            };
            let Ok(Reply::Entries { entries, eof, .. }) = outcome else { panic!("{outcome:?}") };
            cookie = entries.last().unwrap().cookie;
            names.extend(entries.into_iter().map(|e| String::from_utf8(e.name).unwrap()));
            if eof {
                return names;
            }
        }
    }

    fn step_quietly(&mut self) {
        let bytes: Vec<u8> = self.up.drain(..).collect();
        let mut rest = &bytes[..];
        while let Some(frame) = self.reader.push(&mut rest).unwrap() {
            let now = self.now();
            self.server.frame(self.connection.unwrap(), frame, now);
        }
        self.transfer();
        self.outputs();
        let bytes: Vec<u8> = self.down.drain(..).collect();
        self.client.receive(&bytes).unwrap();
    }
}

#[test]
fn operations_happen_once_over_crashes() {
    let (mut boots, mut done, mut made) = (0, 0, 0);
    for seed in 1..=60 {
        let mut world = World::new(seed);
        for _ in 0..6000 {
            world.step(true);
        }
        world.settle();
        world.crash();
        world.ask(Op::OpenVolume { name: "vol0".into() }, Asked::Root);
        world.settle();
        let wanted: BTreeSet<String> = [".".into(), "..".into()]
            .into_iter()
            .chain(world.files.keys().map(|n| format!("made{n}")))
            .chain(world.made.iter().map(|n| format!("made{n}")))
            .chain(world.renamed.iter().map(|n| format!("renamed{n}")))
            .collect();
        assert_eq!(world.list(), wanted, "seed {seed}");
        boots += world.boots;
        done += world.done;
        made += wanted.len();
    }
    println!("{boots} starts, {done} operations, {made} names at the end");
    assert!(boots > 300 && done > 5_000);
}
