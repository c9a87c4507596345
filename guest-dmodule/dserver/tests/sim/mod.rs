//! A D-module's server over a simulated disk that loses unflushed writes.
//!
//! The disk: writes reach it in any order; a crash keeps any of those since the last flush and loses the others. Reads
//! see all writes. A crash may happen between any two transfers.
#![allow(clippy::unwrap_used)] // helpers of tests too
use dserver::{Disk, DiskError, FormatPolicy, Now, Options, Output, OwnersPolicy, Server, mount};
use fabric::fs::Time;
use fabric::id::BootId;
use layout::{Block, BlockNumber, ConsistencyPoint};
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

/// Blocks of the disk.
pub const BLOCKS: u64 = 16384;

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n.max(1)
    }
}

/// The disk: what is on it for certain, and what was written since the last flush.
#[derive(Default)]
pub struct SimDisk {
    pub durable: HashMap<u64, Block>,
    pub written: Vec<(u64, Block)>,
}

impl SimDisk {
    pub fn read(&self, number: u64) -> Block {
        let last = self.written.iter().rev().find(|(n, _)| *n == number).map(|(_, block)| block);
        last.or(self.durable.get(&number)).cloned().unwrap_or_else(Block::zeroed)
    }
    pub fn flush(&mut self) {
        self.durable.extend(self.written.drain(..));
    }
    pub fn crash(&mut self, random: &mut Random) {
        for (number, block) in std::mem::take(&mut self.written) {
            if random.below(2) == 0 {
                self.durable.insert(number, block);
            }
        }
    }
}

pub struct Mounting<'a>(pub &'a RefCell<SimDisk>);

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

pub fn now_or_never<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing here waits"),
    }
}

pub fn start(disk: &RefCell<SimDisk>, boot: u64) -> Server {
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
        sessions: 4,
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

/// Those under way.
#[derive(Default)]
pub struct Transfers(Vec<Io>);

impl Transfers {
    /// Begins what the server asks of the disk; gives anything else back.
    pub fn begin(&mut self, output: Output) -> Option<Output> {
        self.0.push(match output {
            Output::Read { first, count } => Io::Read(first, count),
            Output::ConsistencyPoint(point) => Io::Point(point, 0),
            Output::WriteOwners { number, block } => Io::Owners(number, block, false),
            other => return Some(other),
        });
        None
    }

    /// One transfer goes on by one step.
    pub fn step(&mut self, disk: &RefCell<SimDisk>, server: &mut Server, random: &mut Random, now: Now) {
        if self.0.is_empty() {
            return;
        }
        let at = random.below(self.0.len());
        match self.0.swap_remove(at) {
            Io::Read(first, count) => {
                let blocks = (first.0..first.0 + count as u64).map(|n| disk.borrow().read(n)).collect();
                server.read_done(first, count, Some(blocks), now);
            }
            Io::Point(mut point, stage) => {
                let mut written = disk.borrow_mut();
                let mut stage = stage;
                if point.writes.is_empty() {
                    match stage {
                        0 | 2 => written.flush(),
                        _ => written.written.push((point.fsinfo.0.0, point.fsinfo.1.clone())),
                    }
                    stage += 1;
                } else {
                    for _ in 0..1 + random.below(8) {
                        if !point.writes.is_empty() {
                            let (number, block) = point.writes.swap_remove(random.below(point.writes.len()));
                            written.written.push((number.0, block));
                        }
                    }
                }
                drop(written);
                if stage == 3 {
                    server.consistency_point_done(true, now);
                } else {
                    self.0.push(Io::Point(point, stage));
                }
            }
            Io::Owners(number, block, false) => {
                disk.borrow_mut().written.push((number.0, block.clone()));
                self.0.push(Io::Owners(number, block, true));
            }
            Io::Owners(_, _, true) => {
                disk.borrow_mut().flush();
                server.owners_done(true, now);
            }
        }
    }
}
