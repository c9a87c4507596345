//! A volume on a simulated disk, driven the way a D-module drives it.
#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of it; tests may panic")]
pub mod model;

use fabric::fs::{Attr, CreateHow, Credential, FileHandle, SetAttr, Stability, Status, Time, VolumeId};
use fabric::id::{Slot, VmId};
use fabric::op::{Op, Outcome, Reply, Request};
use layout::{
    Attempt, Block, BlockNumber, Completed, CpNumber, FSINFO_BLOCKS, FileSystem, FormatOptions, KeepKey, MountOptions,
    RESTARTS_MAX, Work, format,
};
use std::collections::{HashMap, VecDeque};

/// xorshift: one seed, one course of events.
pub struct Random(pub u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound.max(1)
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// How many seeds a randomised test runs: `LAYOUT_SEEDS`, else the given number.
pub fn seeds(usual: u64) -> u64 {
    std::env::var("LAYOUT_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// What reached the disk, in order.
#[derive(Clone, Debug)]
pub enum Event {
    Write(BlockNumber, Block),
    Flush,
    /// The volume was told that a consistency point is on disk.
    Durable(CpNumber),
}

/// A disk: blocks never written are zero.
#[derive(Clone, Default)]
pub struct Disk {
    pub blocks: HashMap<u64, Block>,
    pub size: u64,
}

impl Disk {
    pub fn read(&self, number: BlockNumber) -> Block {
        assert!(number.0 < self.size, "read beyond the end of the disk");
        self.blocks.get(&number.0).cloned().unwrap_or_else(Block::zeroed)
    }

    pub fn write(&mut self, number: BlockNumber, block: Block) {
        assert!(number.0 < self.size, "write beyond the end of the disk");
        self.blocks.insert(number.0, block);
    }
}

/// The file system's log goes to the test's output.
struct Console;

impl log::Log for Console {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        println!("{}", record.args());
    }

    fn flush(&self) {}
}

pub struct Volume {
    pub fs: FileSystem,
    pub disk: Disk,
    pub now: i64,
    /// Everything written since [`Volume::record`].
    pub events: Option<Vec<Event>>,
    pub options: MountOptions,
    pub reads: u64,
    /// What is left to write of the consistency point under way.
    pub under_way: VecDeque<Event>,
    /// Consistency points taken since the list was last emptied.
    pub begun: Vec<CpNumber>,
}

pub const SMALL: MountOptions = MountOptions { verifier: 1, cache_blocks: 256, dirty_blocks: 128 };

pub fn format_options(blocks: u64) -> FormatOptions<'static> {
    FormatOptions {
        blocks,
        volume: VolumeId(1),
        name: "vol0",
        uuid: [1, 2],
        seed: 42,
        root_mode: 0o777,
        root_owner: (0, 0),
        now: Time(1000),
    }
}

impl Volume {
    pub fn new(blocks: u64, options: MountOptions) -> Self {
        let mut disk = Disk { blocks: HashMap::new(), size: blocks };
        let made = format(&format_options(blocks)).unwrap();
        for (number, block) in made.first {
            disk.write(number, block);
        }
        disk.write(made.last.0, made.last.1);
        Self::mount(disk, options)
    }

    pub fn mount(disk: Disk, options: MountOptions) -> Self {
        if log::set_logger(&Console).is_ok() {
            log::set_max_level(log::LevelFilter::Error);
        }
        let fsinfo = FSINFO_BLOCKS.map(|number| disk.read(number));
        let fs = FileSystem::mount([fsinfo[0].as_ref(), fsinfo[1].as_ref()], disk.size, options).unwrap();
        Volume {
            fs,
            disk,
            now: 1_000_000,
            events: None,
            options,
            reads: 0,
            under_way: VecDeque::new(),
            begun: Vec::new(),
        }
    }

    /// Forgets everything in memory.
    pub fn remount(self) -> Self {
        let now = self.now;
        Volume { now, ..Self::mount(self.disk, self.options) }
    }

    pub fn record(&mut self) {
        self.events = Some(Vec::new());
    }

    pub fn supply(&mut self, need: Vec<BlockNumber>) {
        assert!(!need.is_empty(), "Need of nothing");
        for number in need {
            self.reads += 1;
            let block = self.disk.read(number);
            self.fs.supply(number, block);
        }
    }

    /// Takes a consistency point, if there is something to write and none is under way.
    pub fn begin(&mut self) {
        if let Some(cp) = self.fs.begin_consistency_point() {
            self.begun.push(cp.number);
            self.under_way.extend(cp.writes.into_iter().map(|(number, block)| Event::Write(number, block)));
            self.under_way.push_back(Event::Flush);
            self.under_way.push_back(Event::Write(cp.fsinfo.0, cp.fsinfo.1));
            self.under_way.push_back(Event::Flush);
            self.under_way.push_back(Event::Durable(cp.number));
        }
    }

    /// Does the next thing of the consistency point under way.
    pub fn write_on(&mut self) -> bool {
        let Some(event) = self.under_way.pop_front() else { return false };
        match &event {
            Event::Write(number, block) => self.disk.write(*number, block.clone()),
            Event::Flush => {}
            Event::Durable(number) => {
                self.fs.consistency_point_done();
                assert_eq!(self.fs.durable_cp(), *number);
            }
        }
        if let Some(events) = &mut self.events {
            events.push(event);
        }
        true
    }

    /// Everything that has been done is on disk.
    pub fn sync(&mut self) {
        while self.write_on() {}
        self.begin();
        while self.write_on() {}
    }

    /// Deferred work until there is none left.
    pub fn settle(&mut self) {
        while self.fs.has_work() {
            match self.fs.work(Time(self.now)) {
                Attempt::Done(Ok(Work::Idle)) => break,
                Attempt::Done(Ok(Work::Progress)) => {}
                Attempt::Done(Err(status)) => panic!("deferred work: {status}"),
                Attempt::Need(need) => self.supply(need),
                Attempt::Busy => self.sync(),
            }
        }
    }

    pub fn try_execute(&mut self, request: &Request, keep: Option<KeepKey>) -> Completed {
        self.now += 1000;
        let mut busy = 0;
        for _ in 0..RESTARTS_MAX {
            match self.fs.execute(request, Time(self.now), keep) {
                Attempt::Done(done) => return done,
                Attempt::Need(need) => self.supply(need),
                Attempt::Busy => {
                    busy += 1;
                    assert!(busy < 100, "busy for ever");
                    self.settle();
                    self.sync();
                }
            }
        }
        panic!("too many restarts");
    }

    /// The kept reply of a slot.
    pub fn kept(&mut self, vm_id: VmId, slot: Slot) -> Option<Vec<u8>> {
        loop {
            match self.fs.kept(vm_id, slot) {
                Attempt::Done(kept) => break kept.unwrap(),
                Attempt::Need(need) => self.supply(need),
                Attempt::Busy => panic!("busy"),
            }
        }
    }

    pub fn as_user(&mut self, credential: Credential, op: Op) -> Outcome {
        self.try_execute(&Request { credential, op }, None).outcome
    }

    pub fn run(&mut self, op: Op) -> Outcome {
        self.as_user(Credential::ROOT, op)
    }

    pub fn durable_at(&mut self, op: Op) -> CpNumber {
        let done = self.try_execute(&Request { credential: Credential::ROOT, op }, None);
        done.outcome.unwrap();
        done.durable_at
    }

    pub fn root(&self) -> FileHandle {
        self.fs.root()
    }

    pub fn create(&mut self, dir: FileHandle, name: &str) -> Attr {
        let how = CreateHow::Guarded(SetAttr { mode: Some(0o644), ..SetAttr::default() });
        match self.run(Op::Create { dir, name: name.into(), how }) {
            Ok(Reply::Created { attr, .. }) => attr,
            other => panic!("create {name}: {other:?}"),
        }
    }

    pub fn make_dir(&mut self, dir: FileHandle, name: &str) -> Attr {
        let set = SetAttr { mode: Some(0o755), ..SetAttr::default() };
        match self.run(Op::MakeDir { dir, name: name.into(), set }) {
            Ok(Reply::Created { attr, .. }) => attr,
            other => panic!("mkdir {name}: {other:?}"),
        }
    }

    pub fn write(&mut self, handle: FileHandle, offset: u64, data: &[u8]) {
        let written = self.try_write(handle, offset, data);
        assert_eq!(written, Ok(()), "write at {offset}");
    }

    pub fn try_write(&mut self, handle: FileHandle, offset: u64, data: &[u8]) -> Result<(), Status> {
        let op = Op::Write { handle, offset, stability: Stability::Unstable, data: data.to_vec() };
        match self.run(op) {
            Ok(Reply::Written { count, .. }) if count as usize == data.len() => Ok(()),
            Err(failure) => Err(failure.status),
            other => panic!("write: {other:?}"),
        }
    }

    pub fn read(&mut self, handle: FileHandle, offset: u64, length: u32) -> Vec<u8> {
        match self.run(Op::Read { handle, offset, length }) {
            Ok(Reply::Data { data, .. }) => data,
            other => panic!("read: {other:?}"),
        }
    }

    pub fn lookup(&mut self, dir: FileHandle, name: &str) -> Result<Attr, Status> {
        match self.run(Op::Lookup { dir, name: name.into() }) {
            Ok(Reply::Node { attr, .. }) => Ok(attr),
            Err(failure) => Err(failure.status),
            other => panic!("lookup: {other:?}"),
        }
    }

    pub fn attr(&mut self, handle: FileHandle) -> Attr {
        match self.run(Op::GetAttr { handle }) {
            Ok(Reply::Attr(attr)) => attr,
            other => panic!("getattr: {other:?}"),
        }
    }

    pub fn remove(&mut self, dir: FileHandle, name: &str) {
        self.run(Op::Remove { dir, name: name.into() }).unwrap_or_else(|e| panic!("remove {name}: {e:?}"));
    }

    pub fn set_size(&mut self, handle: FileHandle, size: u64) {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.run(Op::SetAttr { handle, set, guard: None }).unwrap_or_else(|e| panic!("truncate: {e:?}"));
    }

    pub fn free_bytes(&mut self) -> u64 {
        let handle = self.root();
        match self.run(Op::VolumeStat { handle }) {
            Ok(Reply::Stat { stat, .. }) => stat.free_bytes,
            other => panic!("statfs: {other:?}"),
        }
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..length).map(|_| random.next() as u8).collect()
}

impl Disk {
    /// The volume on this disk is consistent.
    pub fn check(&self) -> layout::Report {
        let report = layout::check(&mut |number| Some(self.read(number))).unwrap();
        assert_eq!(report.faults, Vec::<String>::new());
        report
    }
}

impl Volume {
    /// Writes all, and has the result checked.
    pub fn check(&mut self) -> layout::Report {
        self.sync();
        self.disk.check()
    }
}
