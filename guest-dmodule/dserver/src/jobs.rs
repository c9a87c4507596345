//! What is being executed and waits for blocks.
//!
//! Owns: the jobs (requests, read-ahead, deferred work, records and replies) and which blocks are being read for whom.
//! Always true: a job waits for as many blocks as are being read for it; a block is read once at a time.
use crate::runs::RUN_MAX;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use fabric::fs::FileHandle;
use fabric::id::Slot;
use fabric::op::Request;
use fabric::server::{ConnectionId, KeepKey, KeptRead, Token};
use layout::{BlockNumber, PlacedRecord};

/// Number of a job; not used again.
pub(crate) type JobId = u64;

#[allow(clippy::large_enum_variant)] // nearly all are requests
pub(crate) enum Kind {
    Request {
        token: Token,
        request: Request,
        keep: Option<KeepKey>,
        held: Held,
    },
    ReadAhead {
        handle: FileHandle,
        offset: u64,
        length: u32,
    },
    Work,
    /// Ownership records are put into their file.
    Settle {
        records: Vec<PlacedRecord>,
    },
    /// A VM's kept replies are read: from this slot on, those found so far.
    Kept {
        read: KeptRead,
        next: u16,
        found: Vec<(Slot, Vec<u8>)>,
    },
}

/// What a request keeps from others until it is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Held {
    Nothing,
    /// Bytes of its own.
    Request(usize),
    /// Bytes its reply may have, and where that will go.
    Reply(Option<ConnectionId>, usize),
}

pub(crate) struct Job {
    pub kind: Kind,
    /// Times it was started again.
    pub restarts: u32,
    /// Blocks it waits for.
    missing: usize,
}

/// Blocks to read, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadRun {
    pub first: BlockNumber,
    pub count: usize,
}

#[derive(Default)]
pub(crate) struct Jobs {
    next: JobId,
    jobs: BTreeMap<JobId, Job>,
    /// By block being read.
    waiters: BTreeMap<u64, Vec<JobId>>,
    pub ready: VecDeque<JobId>,
    /// Wait for room: for a consistency point.
    stalled: Vec<JobId>,
    pub work: Option<JobId>,
    pub settle: Option<JobId>,
    pub read_aheads: usize,
}

impl Jobs {
    pub fn add(&mut self, kind: Kind) -> JobId {
        self.next += 1;
        match kind {
            Kind::Work => self.work = Some(self.next),
            Kind::Settle { .. } => self.settle = Some(self.next),
            Kind::ReadAhead { .. } => self.read_aheads += 1,
            Kind::Request { .. } | Kind::Kept { .. } => {}
        }
        self.jobs.insert(self.next, Job { kind, restarts: 0, missing: 0 });
        self.ready.push_back(self.next);
        self.next
    }

    pub fn get(&mut self, id: JobId) -> Option<&mut Job> {
        self.jobs.get_mut(&id)
    }

    pub fn remove(&mut self, id: JobId) -> Option<Job> {
        let job = self.jobs.remove(&id)?;
        match job.kind {
            Kind::Work => self.work = None,
            Kind::Settle { .. } => self.settle = None,
            Kind::ReadAhead { .. } => self.read_aheads -= 1,
            Kind::Request { .. } | Kind::Kept { .. } => {}
        }
        Some(job)
    }

    pub fn stall(&mut self, id: JobId) {
        self.stalled.push(id);
    }

    pub fn is_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// Those stalled try again.
    pub fn resume(&mut self) {
        self.ready.extend(self.stalled.drain(..));
    }

    /// Makes a job wait for blocks; returns what is to be read that is not being read yet.
    pub fn wait(&mut self, id: JobId, mut blocks: Vec<BlockNumber>) -> Vec<ReadRun> {
        blocks.sort_unstable();
        let mut runs: Vec<ReadRun> = Vec::new();
        let Some(job) = self.jobs.get_mut(&id) else { return runs };
        for block in blocks {
            job.missing += 1;
            let waiters = self.waiters.entry(block.0).or_default();
            waiters.push(id);
            if waiters.len() > 1 {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.count < RUN_MAX && run.first.0 + run.count as u64 == block.0 => run.count += 1,
                _ => runs.push(ReadRun { first: block, count: 1 }),
            }
        }
        if job.missing == 0 {
            // It asked for nothing: it would never go on.
            self.ready.push_back(id);
        }
        runs
    }

    /// A block was read, or cannot be.
    pub fn block_read(&mut self, block: BlockNumber) {
        for id in self.waiters.remove(&block.0).unwrap_or_default() {
            if let Some(job) = self.jobs.get_mut(&id) {
                job.missing -= 1;
                if job.missing == 0 {
                    self.ready.push_back(id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_read_once_for_all_who_wait() {
        let mut jobs = Jobs::default();
        let (a, b) = (jobs.add(Kind::Work), jobs.add(Kind::Work));
        jobs.ready.clear();
        let blocks = |numbers: &[u64]| numbers.iter().map(|n| BlockNumber(*n)).collect::<Vec<_>>();
        let run = |first, count| ReadRun { first: BlockNumber(first), count };
        assert_eq!(jobs.wait(a, blocks(&[7, 5, 6, 9])), [run(5, 3), run(9, 1)]);
        assert_eq!(jobs.wait(b, blocks(&[6, 7, 8])), [run(8, 1)]);
        for block in [8, 6, 7] {
            jobs.block_read(BlockNumber(block));
        }
        assert_eq!(jobs.ready, [b]);
        jobs.block_read(BlockNumber(9));
        jobs.block_read(BlockNumber(5));
        assert_eq!(jobs.ready, [b, a]);
        assert_eq!(jobs.wait(a, blocks(&[5])), [run(5, 1)], "it is not being read any more");
    }
}
