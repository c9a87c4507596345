//! The whole of the D-module but its devices, with a disk that loses unflushed writes: from seeds. A client makes,
//! renames and removes; whatever is lost in a crash of the D-module, each operation happens once and says that it did.
#![allow(clippy::unwrap_used)] // helpers of tests too
mod sim;
use dserver::{Now, Output, Server};
use fabric::client::{ClientSession, Event, Ticket};
use fabric::fs::*;
use fabric::id::{Epoch, Owner, VmId};
use fabric::op::{Op, Reply, Request};
use fabric::server::ConnectionId;
use fabric::wire::FrameReader;
use sim::{Random, SimDisk, Transfers, start};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const FILES: u64 = 3;

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
    io: Transfers,
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
            io: Transfers::default(),
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
            match self.io.begin(output) {
                Some(Output::Send(id, frame)) if self.connection == Some(id) => {
                    let bytes = frame.into_vec();
                    let (now, n) = (self.now(), bytes.len());
                    self.down.extend(bytes);
                    self.server.sent(id, n, now);
                }
                Some(Output::Close(id)) if self.connection == Some(id) => self.cut(),
                _ => {}
            }
        }
    }

    /// One transfer goes on by one step.
    fn transfer(&mut self) {
        let now = self.now();
        self.io.step(&self.disk, &mut self.server, &mut self.random, now);
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
        self.io = Transfers::default();
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
