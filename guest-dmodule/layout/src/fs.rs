//! The file system as its caller sees it: operations in, blocks in and out, consistency points.
//!
//! Owns: the state of a mounted volume. Always true: an operation has happened wholly or not at all; what
//! [`FileSystem::begin_consistency_point`] returns is a consistent file system however much happens after it.
use crate::block::{Block, BlockNumber, BlockPointer};
use crate::cache::Cache;
use crate::consistency::{ConsistencyPoint, CpNumber};
use crate::dirty::Dirty;
use crate::error::LayoutError;
use crate::fsinfo::{FsInfo, map_blocks};
use crate::inode::ROOT;
use crate::txn::{Stop, Txn};
use alloc::vec::Vec;
use fabric::{
    fs::{FileHandle, Status, Time, VolumeId},
    id::{Epoch, Sequence, Slot, VmId},
    op::{Failure, Outcome, Request},
};
use hashbrown::{HashMap, HashSet};

/// Most blocks in one [`Step::Need`].
pub const NEED_MAX: usize = 512;
/// Most times an operation may be started again for want of blocks; each time at least one block is new. A caller that
/// counts more gives up with [`Status::Delay`]: the cache is too small for what goes on.
pub const RESTARTS_MAX: u32 = 8192;
/// Reads asked for and not supplied, and failed reads, that are remembered; beyond it they are forgotten and asked for anew.
const WANTED_MAX: usize = 1 << 16;

/// How a volume is mounted.
#[derive(Clone, Copy, Debug)]
pub struct MountOptions {
    /// Write verifier: must differ at each start of the D-module.
    pub verifier: u64,
    /// Bound of the cache of clean blocks, in blocks. At least twice `dirty_blocks`.
    pub cache_blocks: usize,
    /// Dirty blocks at which operations are put off until a consistency point has been taken. Memory is at most
    /// about `cache_blocks` + 2 × `dirty_blocks` (dirty, and unused buffers), and a consistency point's
    /// work on the processor is about a microsecond a block.
    pub dirty_blocks: usize,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions { verifier: 0, cache_blocks: 16384, dirty_blocks: 4096 }
    }
}

/// Under which number the reply of a non-idempotent operation is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepKey {
    /// Whose session.
    pub vm_id: VmId,
    /// Slot.
    pub slot: Slot,
    /// Epoch of the VM's last fresh start.
    pub session: Epoch,
    /// Sequence in the slot.
    pub sequence: Sequence,
}

/// What an attempt at something came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt<T> {
    /// Done.
    Done(T),
    /// Nothing has happened. Read these blocks, [`FileSystem::supply`] each, and start again.
    Need(Vec<BlockNumber>),
    /// Nothing has happened. Run [`FileSystem::work`] until it is idle or busy, take a consistency point, start again.
    Busy,
}

/// Outcome of an operation, and when the reply may leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completed {
    /// What the operation gave.
    pub outcome: Outcome,
    /// The reply may leave as soon as [`FileSystem::durable_cp`] is at least this. Zero: at once.
    pub durable_at: CpNumber,
}

/// What an attempt at an operation came to.
pub type Step = Attempt<Completed>;

/// What a step of deferred work came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing is left to do.
    Idle,
    /// Something was done, more may be left.
    Progress,
}

/// Usage of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks the next consistency point will write.
    pub dirty: u64,
    /// Blocks of the consistency point being written.
    pub writing: u64,
    /// Blocks in the clean cache (with those being written).
    pub cached: u64,
    /// The dirty limit.
    pub dirty_limit: u64,
}

/// A mounted volume.
pub struct FileSystem {
    pub(crate) info: FsInfo,
    pub(crate) verifier: u64,
    pub(crate) dirty: Dirty,
    pub(crate) cache: Cache,
    pub(crate) wanted: HashMap<u64, u64>,
    pub(crate) failed: HashSet<(u64, u64)>,
    /// Free bits in the dirty blocks of the block map: where the next consistency point can allocate.
    pub(crate) window_free: u64,
    /// Free bits of each block of the block map; `u32::MAX`: not known.
    pub(crate) map_free: Vec<u32>,
    pub(crate) in_flight: Option<ConsistencyPoint>,
    pub(crate) retry: bool,
    pub(crate) durable: CpNumber,
    /// A consistency point could not be taken (an inconsistency in memory): nothing is changed any more.
    pub(crate) broken: bool,
    pub(crate) dirty_limit: u64,
    /// Deferred work met a damaged block; it is left alone until the next mount.
    pub(crate) work_failed: bool,
}

impl FileSystem {
    /// Mounts a volume from its two fsinfo blocks ([`crate::FSINFO_BLOCKS`]) on a disk of `disk_blocks` blocks. Reads
    /// nothing else: it can serve at once.
    pub fn mount(fsinfo: [&[u8]; 2], disk_blocks: u64, options: MountOptions) -> Result<Self, LayoutError> {
        let info = FsInfo::newest(fsinfo)?;
        if info.blocks > disk_blocks {
            return Err(LayoutError::DiskTooSmall { disk: disk_blocks, volume: info.blocks });
        }
        Ok(Self::new(info, options))
    }

    pub(crate) fn new(info: FsInfo, options: MountOptions) -> Self {
        let maps = map_blocks(info.blocks) as usize;
        let dirty_limit = options.dirty_blocks.max(64);
        FileSystem {
            durable: CpNumber(info.generation),
            info,
            verifier: options.verifier,
            dirty: Dirty::default(),
            cache: Cache::new(options.cache_blocks.max(2 * dirty_limit), dirty_limit),
            wanted: HashMap::new(),
            failed: HashSet::new(),
            window_free: 0,
            map_free: alloc::vec![u32::MAX; maps],
            in_flight: None,
            retry: false,
            broken: false,
            dirty_limit: dirty_limit as u64,
            work_failed: false,
        }
    }

    /// The volume's id.
    pub fn volume(&self) -> VolumeId {
        self.info.volume
    }

    /// The volume's name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Blocks of the volume.
    pub fn blocks(&self) -> u64 {
        self.info.blocks
    }

    /// The root directory.
    pub fn root(&self) -> FileHandle {
        FileHandle { volume: self.info.volume, generation: 1, inode: ROOT }
    }

    /// The write verifier given at mount.
    pub fn verifier(&self) -> u64 {
        self.verifier
    }

    /// Tries to execute an operation at time `now`. With `keep`, its reply is kept on disk in the same consistency
    /// point as its effect; the reply of a refused operation is not kept, since the operation has no effect.
    pub fn execute(&mut self, request: &Request, now: Time, keep: Option<KeepKey>) -> Step {
        if self.broken {
            return Step::Done(Completed { outcome: Err(Status::ServerFault.into()), durable_at: CpNumber(0) });
        }
        match self.try_execute(request, now, keep) {
            Ok((reply, durable_at)) => Step::Done(Completed { outcome: Ok(reply), durable_at }),
            Err((Stop::Need, need)) => Step::Need(self.want(need)),
            Err((Stop::Busy, _)) => Step::Busy,
            Err((Stop::Fail(status), _)) => {
                self.forget_failed(status);
                let failure = self.describe_failure(request, status);
                Step::Done(Completed { outcome: Err(failure), durable_at: CpNumber(0) })
            }
        }
    }

    fn describe_failure(&mut self, request: &Request, status: Status) -> Failure {
        let mut txn = Txn::new(self, Time(0));
        let (wcc, wcc2) = txn.failure_attributes(&request.op);
        Failure { status, wcc, wcc2 }
    }

    /// The reply kept for a slot, as [`fabric::wire::decode_kept`] reads it.
    pub fn kept(&mut self, vm_id: VmId, slot: Slot) -> Attempt<Result<Option<Vec<u8>>, Status>> {
        let mut txn = Txn::new(self, Time(0));
        match txn.kept_reply(vm_id, slot) {
            Ok(found) => Attempt::Done(Ok(found)),
            Err(Stop::Fail(status)) => {
                self.forget_failed(status);
                Attempt::Done(Err(status))
            }
            Err(Stop::Busy) => Attempt::Busy,
            Err(Stop::Need) => {
                let need = core::mem::take(&mut txn.need);
                Attempt::Need(self.want(need))
            }
        }
    }

    /// Reads ahead: asks for what is missing of a part of a file. Done says whether the part reaches the file's end.
    pub fn prefetch(&mut self, handle: &FileHandle, offset: u64, length: u32) -> Attempt<Result<bool, Status>> {
        let mut txn = Txn::new(self, Time(0));
        match txn.prefetch(handle, offset, length) {
            Ok(at_end) => Attempt::Done(Ok(at_end)),
            Err(Stop::Fail(status)) => {
                self.forget_failed(status);
                Attempt::Done(Err(status))
            }
            Err(Stop::Busy) => Attempt::Busy,
            Err(Stop::Need) => {
                let need = core::mem::take(&mut txn.need);
                Attempt::Need(self.want(need))
            }
        }
    }

    /// Whether [`Self::work`] has something to do.
    pub fn has_work(&self) -> bool {
        self.info.counters.first_orphan != 0 && !self.work_failed && !self.broken
    }

    /// A bounded step of deferred work: frees blocks of removed and truncated files. Survives a restart.
    pub fn work(&mut self, now: Time) -> Attempt<Result<Work, Status>> {
        if !self.has_work() {
            return Attempt::Done(Ok(Work::Idle));
        }
        let mut txn = Txn::new(self, now);
        let result = txn.free_orphans().and_then(|()| txn.commit());
        match result {
            Ok(_) => Attempt::Done(Ok(Work::Progress)),
            Err(Stop::Busy) if txn.fs.dirty.count > 0 => Attempt::Busy,
            Err(Stop::Busy) => {
                log::error!("volume {}: no space left to free space with", self.info.name);
                self.work_failed = true;
                Attempt::Done(Err(Status::NoSpace))
            }
            Err(Stop::Fail(status)) => {
                log::error!("volume {}: what is to be freed cannot be: {status}", self.info.name);
                self.work_failed = true;
                self.forget_failed(status);
                Attempt::Done(Err(status))
            }
            Err(Stop::Need) => {
                let need = core::mem::take(&mut txn.need);
                Attempt::Need(self.want(need))
            }
        }
    }

    /// A block that was asked for, as read from disk. One whose hash is wrong is logged and fails the operations
    /// that need it with [`Status::Io`]. Blocks not asked for are ignored.
    pub fn supply(&mut self, number: BlockNumber, block: Block) {
        let Some(hash) = self.wanted.remove(&number.0) else { return };
        if block.hash() == hash {
            self.cache.insert(BlockPointer { block: number.0, hash }, block, 0, self.durable.0);
        } else {
            log::error!("volume {}: block {} has a wrong checksum", self.info.name, number.0);
            self.fail_read(number.0, hash);
        }
    }

    /// A block that was asked for and cannot be read: fails the operations that need it with [`Status::Io`].
    pub fn supply_failed(&mut self, number: BlockNumber) {
        if let Some(hash) = self.wanted.remove(&number.0) {
            log::error!("volume {}: block {} cannot be read", self.info.name, number.0);
            self.fail_read(number.0, hash);
        }
    }

    fn fail_read(&mut self, number: u64, hash: u64) {
        if self.failed.len() >= WANTED_MAX {
            self.failed.clear();
        }
        self.failed.insert((number, hash));
    }

    /// A failed read has been reported: the next operation tries anew. Until then it must stay failed, however
    /// often the operation meets it, or reading would not end.
    pub(crate) fn forget_failed(&mut self, status: Status) {
        if status == Status::Io {
            self.failed.clear();
        }
    }

    pub(crate) fn want(&mut self, mut need: Vec<BlockPointer>) -> Vec<BlockNumber> {
        need.sort_unstable_by_key(|pointer| pointer.block);
        need.dedup_by_key(|pointer| pointer.block);
        need.truncate(NEED_MAX);
        if self.wanted.len() + need.len() > WANTED_MAX {
            self.wanted.clear();
        }
        for pointer in &need {
            self.wanted.insert(pointer.block, pointer.hash);
        }
        need.into_iter().map(|pointer| BlockNumber(pointer.block)).collect()
    }

    /// Memory in use.
    pub fn usage(&self) -> Usage {
        Usage {
            dirty: self.dirty.count,
            writing: self.in_flight.as_ref().map_or(0, |cp| cp.writes.len() as u64),
            cached: self.cache.len() as u64,
            dirty_limit: self.dirty_limit,
        }
    }
}
