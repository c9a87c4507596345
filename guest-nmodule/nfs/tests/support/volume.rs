//! The real data layout over a disk in memory, as a file service.
use fabric::fs::{Credential, Status, Time, VolumeId};
use fabric::op::{Op, Outcome, Request};
use layout::{Attempt, BLOCK_SIZE, Block, BlockNumber, FSINFO_BLOCKS, FileSystem, FormatOptions, MountOptions, Work};
use nfs::service::{FileService, Unreachable};
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// A volume named `vol0`.
pub struct Volume(RefCell<State>);

struct State {
    system: FileSystem,
    /// Blocks that were ever written; all others are zero.
    disk: HashMap<u64, Block>,
}

fn now() -> Time {
    Time(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as i64))
}

impl Volume {
    /// Formats a disk of `blocks` blocks, and mounts it.
    pub fn new(blocks: u64) -> Self {
        let options = FormatOptions {
            blocks,
            volume: VolumeId(1),
            name: "vol0",
            uuid: [1, 2],
            seed: 3,
            root_mode: 0o755,
            root_owner: (0, 0),
            now: now(),
        };
        let format = layout::format(&options).expect("large enough");
        let disk: HashMap<u64, Block> =
            format.first.into_iter().chain([format.last]).map(|(number, block)| (number.0, block)).collect();
        let fsinfo = FSINFO_BLOCKS.map(|number| disk.get(&number.0).map_or(&[0; BLOCK_SIZE], Block::bytes).as_slice());
        let system = FileSystem::mount(fsinfo, blocks, MountOptions { verifier: 5, ..Default::default() })
            .expect("formatted just now");
        Volume(RefCell::new(State { system, disk }))
    }
}

impl State {
    fn supply(&mut self, need: Vec<BlockNumber>) {
        for number in need {
            let block = self.disk.get(&number.0).cloned().unwrap_or_else(Block::zeroed);
            self.system.supply(number, block);
        }
    }

    fn work(&mut self) {
        loop {
            match self.system.work(now()) {
                Attempt::Done(Ok(Work::Progress)) => {}
                Attempt::Need(need) => self.supply(need),
                Attempt::Done(Ok(Work::Idle) | Err(_)) | Attempt::Busy => return,
            }
        }
    }

    fn consistency_point(&mut self) {
        self.work();
        if let Some(point) = self.system.begin_consistency_point() {
            self.disk.extend(point.writes.into_iter().chain([point.fsinfo]).map(|(number, block)| (number.0, block)));
            self.system.consistency_point_done();
        }
    }

    fn execute(&mut self, request: &Request) -> Outcome {
        for _ in 0..layout::RESTARTS_MAX {
            match self.system.execute(request, now(), None) {
                Attempt::Done(done) => {
                    while self.system.durable_cp() < done.durable_at {
                        self.consistency_point();
                    }
                    return done.outcome;
                }
                Attempt::Need(need) => self.supply(need),
                Attempt::Busy => self.consistency_point(),
            }
        }
        Err(Status::Delay.into())
    }
}

impl FileService for Volume {
    async fn call(&self, credential: Credential, op: Op) -> Result<Outcome, Unreachable> {
        Ok(self.0.borrow_mut().execute(&Request { credential, op }))
    }
}
