//! The server itself.
//!
//! Owns: the sessions, the mounted file system, what is being executed, and when a consistency point is taken.
//!
//! A consistency point is taken when one is asked for (a stable operation waits for it, or an operation for room), when
//! half of the dirty limit is reached, or [`CP_INTERVAL_NS`] after the first change; one at a time, so that what
//! comes meanwhile shares the next. While a port is expected they are small and written little by little, since a
//! compare-and-swap that comes has to wait for what the disk is doing.
//!
//! Bounds: requests by the sessions'; bytes of requests and of replies held by
//! `held_bytes` of the options each (then nothing more is read
//! from connections, or reads wait); one job of deferred work, [`admission::READ_AHEADS_MAX`] of read-ahead.
mod admission;

use crate::jobs::{JobId, Jobs, Kind};
use crate::owners::Owners;
use crate::readahead::ReadAhead;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use fabric::fs::{FileHandle, Status, Time};
use fabric::op::{Outcome, Request};
use fabric::server::{Action, ConnectionId, KeepKey, Sessions, Token};
use fabric::wire::{Encoded, Frame, WireError};
use layout::{
    Attempt, Block, BlockNumber, Completed, ConsistencyPoint, CpNumber, FileSystem, OwnerStore, RESTARTS_MAX, Work,
};

/// A change is durable at the latest this long after it, even if nobody asks for it (if the disk keeps up).
pub const CP_INTERVAL_NS: u64 = 1_000_000_000;
/// After a failed consistency point the next attempt waits this long.
const CP_RETRY_NS: u64 = 1_000_000_000;
/// Fewest bytes of `held_bytes`: a few of the largest requests.
pub const HELD_BYTES_MIN: usize = 4 << 20;
/// How long after a VMM has asked for an ownership record its compare-and-swap is expected: a port is under way.
const PORT_EXPECTED_NS: u64 = 5_000_000_000;
/// Dirty blocks at which a consistency point is taken while one is expected: the smaller, the less is in its way.
const PORT_DIRTY_BLOCKS: u64 = 1024;
/// Steps of deferred work at a time.
const WORK_STEPS: usize = 4;
/// Times a piece of read-ahead asks for blocks.
const READ_AHEAD_RESTARTS: u32 = 8;
/// Times an operation that finds no room tries again after a consistency point that made none.
pub(crate) const BUSY_MAX: u32 = 1000;

/// What the clocks say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Monotonic, nanoseconds.
    pub mono_ns: u64,
    /// For the files' attributes.
    pub real: Time,
}

/// What the caller is to do.
#[derive(Debug)]
pub enum Output {
    /// Send a frame, then [`Server::sent`].
    Send(ConnectionId, Encoded),
    /// End the connection once what was sent has left.
    Close(ConnectionId),
    /// Read blocks, then [`Server::read_done`].
    Read {
        /// The first.
        first: BlockNumber,
        /// How many, at most [`crate::RUN_MAX`].
        count: usize,
    },
    /// Write all of `writes` in any order ([`crate::runs()`]), flush, write fsinfo, flush, then
    /// [`Server::consistency_point_done`]. None other comes before that.
    ConsistencyPoint(ConsistencyPoint),
    /// Write the block and flush, before anything else, then [`Server::owners_done`]. None other comes before that.
    WriteOwners {
        /// Where.
        number: BlockNumber,
        /// What.
        block: Block,
    },
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests executed.
    pub executed: u64,
    /// Consistency points made durable.
    pub consistency_points: u64,
    /// Blocks they wrote.
    pub blocks_written: u64,
    /// Blocks read from the disk.
    pub blocks_read: u64,
    /// Times a request was started again for want of blocks.
    pub restarts: u64,
}

/// A D-module's server.
pub struct Server {
    pub(crate) sessions: Sessions,
    pub(crate) fs: FileSystem,
    pub(crate) owners: Owners,
    pub(crate) jobs: Jobs,
    readahead: ReadAhead,
    /// Executed; to be answered when the consistency point is durable.
    durable: VecDeque<(CpNumber, Token, Outcome)>,
    pub(crate) outputs: VecDeque<Output>,
    /// Blocks of the consistency point being written; `None`: none is.
    writing: Option<u64>,
    dirty_since: Option<u64>,
    retry_at: Option<u64>,
    /// A compare-and-swap is expected until then.
    port_until: u64,
    /// Deferred work failed: not tried again before the next consistency point.
    work_failed: bool,
    /// Bytes of requests being executed.
    held: usize,
    held_max: usize,
    /// Bytes of replies being made, and handed out and not yet sent.
    unsent: BTreeMap<ConnectionId, usize>,
    /// Reads that wait for replies to be sent.
    waiting_reads: VecDeque<(Token, Request)>,
    statistics: Statistics,
}

impl Server {
    pub(crate) fn new(sessions: Sessions, fs: FileSystem, owners: OwnerStore, held_bytes: usize) -> Self {
        Server {
            sessions,
            fs,
            owners: Owners::new(owners),
            jobs: Jobs::default(),
            readahead: ReadAhead::default(),
            durable: VecDeque::new(),
            outputs: VecDeque::new(),
            writing: None,
            dirty_since: None,
            retry_at: None,
            port_until: 0,
            work_failed: false,
            held: 0,
            held_max: held_bytes.max(HELD_BYTES_MIN),
            unsent: BTreeMap::new(),
            waiting_reads: VecDeque::new(),
            statistics: Statistics::default(),
        }
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Counters.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Whether a compare-and-swap is expected soon: what is written should be in small pieces, one after the other.
    pub fn expects_port(&self, now: Now) -> bool {
        now.mono_ns < self.port_until
    }

    /// A frame has come.
    pub fn frame(&mut self, connection: ConnectionId, frame: Frame, now: Now) {
        if let Frame::OwnerGet { .. } | Frame::OwnerReserve { .. } = frame {
            self.port_until = now.mono_ns + PORT_EXPECTED_NS;
        }
        self.sessions.frame(connection, frame);
        self.run(now);
    }

    /// The connection carries bytes that are no frames.
    pub fn broken(&mut self, connection: ConnectionId, error: WireError, now: Now) {
        self.sessions.broken(connection, error);
        self.run(now);
    }

    /// The connection is gone, also after [`Output::Close`].
    pub fn closed(&mut self, connection: ConnectionId, now: Now) {
        self.unsent.remove(&connection);
        self.sessions.closed(connection);
        self.run(now);
    }

    /// Blocks have been read, from `first` on; or cannot be.
    pub fn read_done(&mut self, first: BlockNumber, count: usize, blocks: Option<Vec<Block>>, now: Now) {
        let mut blocks = blocks.map(Vec::into_iter);
        for number in (first.0..first.0 + count as u64).map(BlockNumber) {
            match blocks.as_mut().and_then(Iterator::next) {
                Some(block) => self.fs.supply(number, block),
                None => self.fs.supply_failed(number),
            }
            self.jobs.block_read(number);
        }
        self.statistics.blocks_read += count as u64;
        self.run(now);
    }

    /// The consistency point is durable, or a write or flush of it failed.
    pub fn consistency_point_done(&mut self, durable: bool, now: Now) {
        let Some(blocks) = self.writing.take() else { return };
        if durable {
            self.fs.consistency_point_done();
            self.owners_settled();
            self.statistics.consistency_points += 1;
            self.statistics.blocks_written += blocks;
            self.work_failed = false;
            self.answer_durable();
            self.jobs.resume();
        } else {
            log::error!("a consistency point could not be written; it is tried again");
            self.fs.consistency_point_failed();
            self.owners_unsettled();
            self.retry_at = Some(now.mono_ns + CP_RETRY_NS);
        }
        self.run(now);
    }

    /// The ownership record is durable, or its write failed.
    pub fn owners_done(&mut self, durable: bool, now: Now) {
        if self.owners_written(durable) {
            self.port_until = 0;
            self.run(now);
        }
    }

    /// When [`Self::tick`] is to be called at the latest, on the monotonic clock.
    pub fn next_tick(&self) -> Option<u64> {
        if self.has_work() {
            return Some(0);
        }
        if self.writing.is_some() {
            return None;
        }
        self.retry_at.or(self.dirty_since.map(|at| at + CP_INTERVAL_NS))
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Now) {
        self.run(now);
    }

    /// Does all that can be done now.
    fn run(&mut self, now: Now) {
        let mut worked = false;
        loop {
            self.take_actions();
            self.admit_reads();
            self.begin_settling();
            if let Some(id) = self.jobs.ready.pop_front() {
                self.attempt(id, now);
            } else if !worked && self.begin_work() {
                // Once, so that others have their turn.
                worked = true;
            } else if !self.begin_consistency_point(now) {
                break;
            }
        }
    }

    fn take_actions(&mut self) {
        while let Some(action) = self.sessions.poll_action() {
            match action {
                Action::Send(connection, frame) => {
                    *self.unsent.entry(connection).or_default() += frame.head.len() + frame.data.len();
                    self.outputs.push_back(Output::Send(connection, frame));
                }
                Action::Close(connection) => {
                    self.unsent.remove(&connection);
                    self.outputs.push_back(Output::Close(connection));
                }
                Action::WriteOwners(change) => self.write_owners(change),
                Action::ReadKept(read) => {
                    self.jobs.add(Kind::Kept { read, next: 0, found: Vec::new() });
                }
                Action::Execute { token, request, keep } => self.admit(token, request, keep),
            }
        }
    }

    /// Starts a job, for the first time or again.
    fn attempt(&mut self, id: JobId, now: Now) {
        let Some(job) = self.jobs.get(id) else { return };
        let restarts = job.restarts;
        job.restarts += 1;
        let attempt = match &job.kind {
            Kind::Request { token, .. } if !self.sessions.is_wanted(*token) => Attempt::Done(refusal(Status::Delay)),
            Kind::Request { .. } if restarts > RESTARTS_MAX => {
                log::warn!("an operation was started {restarts} times: the cache is too small");
                Attempt::Done(refusal(Status::Delay))
            }
            Kind::Request { request, keep, .. } => self.fs.execute(request, now.real, keep.map(layout_key)),
            Kind::ReadAhead { handle, offset, length } => {
                let (handle, offset, length) = (*handle, *offset, *length);
                return self.attempt_read_ahead(id, restarts, handle, offset, length);
            }
            Kind::Work => return self.attempt_work(id, now),
            Kind::Settle { .. } => return self.attempt_settling(id, restarts, now),
            Kind::Kept { .. } => return self.attempt_kept(id, restarts),
        };
        self.note_dirt(now);
        match attempt {
            Attempt::Done(completed) => self.done(id, completed),
            Attempt::Need(blocks) => self.need(id, blocks),
            Attempt::Busy if restarts > BUSY_MAX => self.done(id, refusal(Status::Delay)),
            Attempt::Busy => self.jobs.stall(id),
        }
    }

    fn done(&mut self, id: JobId, completed: Completed) {
        let Some(job) = self.jobs.remove(id) else { return };
        let Completed { outcome, durable_at } = completed;
        let Kind::Request { token, held, .. } = job.kind else { return };
        self.release(held);
        self.statistics.executed += 1;
        if durable_at <= self.fs.durable_cp() {
            self.sessions.complete(token, outcome);
        } else {
            self.durable.push_back((durable_at, token, outcome));
        }
    }

    fn attempt_read_ahead(&mut self, id: JobId, restarts: u32, handle: FileHandle, offset: u64, length: u32) {
        match self.fs.prefetch(&handle, offset, length) {
            // Once for each level of the file, and then it is not worth it.
            Attempt::Need(blocks) if restarts < READ_AHEAD_RESTARTS => return self.need(id, blocks),
            Attempt::Done(Ok(false)) | Attempt::Need(_) | Attempt::Busy => {}
            Attempt::Done(Ok(true) | Err(_)) => self.readahead.at_end(handle),
        }
        self.jobs.remove(id);
    }

    pub(crate) fn need(&mut self, id: JobId, blocks: Vec<BlockNumber>) {
        self.statistics.restarts += 1;
        for run in self.jobs.wait(id, blocks) {
            self.outputs.push_back(Output::Read { first: run.first, count: run.count });
        }
    }

    /// Begins a round of deferred work, if there is any and nothing else to do.
    fn begin_work(&mut self) -> bool {
        let begin = self.has_work();
        if begin {
            self.jobs.add(Kind::Work);
        }
        begin
    }

    /// Whether there is deferred work that waits for nothing.
    fn has_work(&self) -> bool {
        self.jobs.work.is_none() && !self.work_failed && self.fs.has_work()
    }

    fn attempt_work(&mut self, id: JobId, now: Now) {
        for _ in 0..WORK_STEPS {
            match self.fs.work(now.real) {
                Attempt::Done(Ok(Work::Progress)) => self.note_dirt(now),
                Attempt::Done(Ok(Work::Idle)) => break,
                Attempt::Done(Err(status)) => {
                    log::error!("freeing the blocks of removed files: {status}");
                    self.work_failed = true;
                    break;
                }
                Attempt::Need(blocks) => return self.need(id, blocks),
                Attempt::Busy => return self.jobs.stall(id),
            }
        }
        self.jobs.remove(id);
    }

    pub(crate) fn note_dirt(&mut self, now: Now) {
        if self.dirty_since.is_none() && self.fs.is_dirty() {
            self.dirty_since = Some(now.mono_ns);
        }
    }

    /// Takes a consistency point if it is time; true if anything has changed.
    fn begin_consistency_point(&mut self, now: Now) -> bool {
        if self.writing.is_some() || self.retry_at.is_some_and(|at| now.mono_ns < at) {
            return false;
        }
        let usage = self.fs.usage();
        let asked = self.jobs.is_stalled() || !self.durable.is_empty() || self.owners.waits_for_point();
        let due = self.dirty_since.is_some_and(|at| now.mono_ns >= at + CP_INTERVAL_NS);
        let half = usage.dirty_limit / 2;
        let enough = if self.expects_port(now) { half.min(PORT_DIRTY_BLOCKS) } else { half };
        if !(asked || due || self.retry_at.is_some() || usage.dirty >= enough) {
            return false;
        }
        self.retry_at = None;
        self.dirty_since = None;
        match self.fs.begin_consistency_point() {
            Some(point) => {
                self.writing = Some(point.writes.len() as u64);
                self.outputs.push_back(Output::ConsistencyPoint(point));
                // What is dirty from here on is the next one's: there is room again.
                self.jobs.resume();
                true
            }
            // Nothing to write, yet somebody waits: for what is durable, or for room there is none of.
            None => {
                let waits = self.jobs.is_stalled();
                self.jobs.resume();
                self.answer_durable();
                if !self.durable.is_empty() {
                    // Only a file system that has given up has no next one.
                    log::error!("there are no consistency points any more: {} operations fail", self.durable.len());
                    for (_, token, _) in core::mem::take(&mut self.durable) {
                        self.sessions.complete(token, Err(Status::ServerFault.into()));
                    }
                }
                waits
            }
        }
    }

    /// Answers those whose consistency point is durable.
    fn answer_durable(&mut self) {
        let durable = self.fs.durable_cp();
        while let Some((_, token, outcome)) = self.durable.pop_front_if(|(at, ..)| *at <= durable) {
            self.sessions.complete(token, outcome);
        }
    }
}

fn refusal(status: Status) -> Completed {
    Completed { outcome: Err(status.into()), durable_at: CpNumber(0) }
}

fn layout_key(keep: KeepKey) -> layout::KeepKey {
    let KeepKey { vm_id, slot, session, sequence } = keep;
    layout::KeepKey { vm_id, slot, session, sequence }
}
