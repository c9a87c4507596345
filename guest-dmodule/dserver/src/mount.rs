//! From a disk to a server: find the file system, or make one on a blank disk; take the ownership records from it.
use crate::runs::{RUN_MAX, runs};
use crate::server::Server;
use alloc::{collections::BTreeSet, string::String, vec::Vec};
use fabric::fs::{Status, Time, VolumeId};
use fabric::id::{BootId, Epoch};
use fabric::server::Sessions;
use layout::{
    Attempt, Block, BlockNumber, FileSystem, FormatOptions, LayoutError, MountOptions, OWNER_BLOCKS, OwnerJournal,
    OwnerStore, RESTARTS_MAX, format,
};

/// A disk that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("disk: {0}")]
pub struct DiskError(pub String);

/// What mounting does to a disk.
#[allow(async_fn_in_trait)] // one executor, nothing is sent to other threads
pub trait Disk {
    /// Size in blocks.
    fn blocks(&self) -> u64;
    /// Reads blocks.
    async fn read(&self, first: BlockNumber, count: usize) -> Result<Vec<Block>, DiskError>;
    /// Writes blocks.
    async fn write(&self, first: BlockNumber, blocks: Vec<Block>) -> Result<(), DiskError>;
    /// Makes durable what was written before.
    async fn flush(&self) -> Result<(), DiskError>;
}

/// What to do when no ownership record can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnersPolicy {
    /// Do not start.
    Keep,
    /// Begin with none: the operator knows that nobody who had an epoch runs.
    Forget,
}

/// What to do with a disk without a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatPolicy {
    /// Refuse it.
    Never,
    /// Make a file system if the disk's first MiB is all zeros.
    IfBlank,
}

/// How to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume's name.
    pub volume: String,
    /// If there is none.
    pub format: FormatPolicy,
    /// If its ownership records cannot be read.
    pub owners: OwnersPolicy,
    /// Random: this start of the D-module.
    pub boot_id: BootId,
    /// Random, for a new file system.
    pub random: [u64; 3],
    /// Time, for a new file system, and for records that are forgotten.
    pub now: Time,
    /// Blocks of cache.
    pub cache_blocks: usize,
    /// Most dirty blocks.
    pub dirty_blocks: usize,
    /// Bytes of requests held, and of replies not yet sent, beyond which no more are taken on (each).
    pub held_bytes: usize,
    /// Most sessions in memory.
    pub sessions: usize,
}

/// Why it did not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The file system is not usable.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// All zeros.
    #[error("the disk is blank; start with format=if-blank to make a volume on it")]
    Blank,
    /// Something else is on it.
    #[error("the disk holds something that is not a volume of ours; it is left alone. Erase its first MiB to use it")]
    Foreign,
    /// Another volume.
    #[error("the disk holds volume {found:?}, not {wanted:?}")]
    WrongVolume {
        /// Its name.
        found: String,
        /// The one asked for.
        wanted: String,
    },
    /// The file of ownership records cannot be read.
    #[error(
        "the file of ownership records cannot be read ({0}): nobody knows which epochs were given. If no VM that used this volume runs \
         anywhere, start with owners=forget"
    )]
    Owners(Status),
}

/// What came of it.
pub struct Mounted {
    /// Ready to serve.
    pub server: Server,
    /// The file system was made just now.
    pub formatted: bool,
    /// VMs with an ownership record.
    pub vms: usize,
}

/// Blocks that must be zero for a disk to be blank.
const BLANK_BLOCKS: usize = 256;
/// Blocks at fixed places: fsinfo and ownership.
const FIXED_BLOCKS: usize = 4;

/// Mounts the volume of a disk.
pub async fn mount(disk: &impl Disk, options: &Options) -> Result<Mounted, StartError> {
    let mut fixed = read_fixed(disk).await?;
    let mount_options = MountOptions {
        verifier: options.boot_id.0,
        cache_blocks: options.cache_blocks,
        dirty_blocks: options.dirty_blocks,
    };
    let mut formatted = false;
    let mut fs = match mount_fixed(&fixed, disk, mount_options) {
        Err(LayoutError::NoFileSystem) => {
            make(disk, options).await?;
            formatted = true;
            fixed = read_fixed(disk).await?;
            mount_fixed(&fixed, disk, mount_options)?
        }
        other => other?,
    };
    if fs.name() != options.volume {
        return Err(StartError::WrongVolume { found: fs.name().into(), wanted: options.volume.clone() });
    }
    let [a, b] = OWNER_BLOCKS.map(|n| fixed[n.0 as usize].bytes().as_slice());
    let mut owners = match owners(disk, &mut fs, OwnerJournal::load([a, b])).await {
        Err(
            StartError::Layout(LayoutError::OwnersDamaged | LayoutError::OwnersAhead { .. }) | StartError::Owners(_),
        ) if options.owners == OwnersPolicy::Forget => {
            forget(disk, &mut fs, OwnerJournal::load([a, b]).ok(), options.now).await?
        }
        other => other?,
    };
    if let Some(write) = owners.upgrade() {
        disk.write(write.number, alloc::vec![write.block.clone()]).await?;
        disk.flush().await?;
        owners.commit(write);
    }
    let vms = owners.table().len();
    let sessions = Sessions::new(options.boot_id, owners.table().clone(), options.sessions);
    Ok(Mounted { server: Server::new(sessions, fs, owners, options.held_bytes), formatted, vms })
}

/// The ownership records: those in the journal, and those in the file.
async fn owners(
    disk: &impl Disk,
    fs: &mut FileSystem,
    journal: Result<OwnerJournal, LayoutError>,
) -> Result<OwnerStore, StartError> {
    let journal = journal?;
    let placed = complete(disk, fs, FileSystem::owner_records).await?.map_err(StartError::Owners)?;
    Ok(OwnerStore::new(journal, &placed, fs.durable_cp())?)
}

/// Nobody runs who ever had an epoch: nothing is kept of them, and the epochs go on beyond any that can have been given.
async fn forget(
    disk: &impl Disk,
    fs: &mut FileSystem,
    journal: Option<OwnerJournal>,
    now: Time,
) -> Result<OwnerStore, StartError> {
    complete(disk, fs, |fs| fs.forget_owners(now)).await?.map_err(StartError::Owners)?;
    if let Some(point) = fs.begin_consistency_point() {
        for run in runs(point.writes) {
            disk.write(run.first, run.blocks).await?;
        }
        disk.flush().await?;
        disk.write(point.fsinfo.0, alloc::vec![point.fsinfo.1]).await?;
        disk.flush().await?;
        fs.consistency_point_done();
    }
    // They count starts and ports: by the second there are none.
    let seconds = u64::try_from(now.0).unwrap_or(0) / 1_000_000_000;
    log::warn!("the ownership records are forgotten; epochs go on from {seconds}");
    Ok(OwnerStore::forgotten(journal.as_ref(), Epoch(seconds)))
}

async fn read_fixed(disk: &impl Disk) -> Result<Vec<Block>, StartError> {
    if disk.blocks() < FIXED_BLOCKS as u64 {
        return Err(LayoutError::Size(disk.blocks()).into());
    }
    let blocks = disk.read(BlockNumber(0), FIXED_BLOCKS).await?;
    if blocks.len() != FIXED_BLOCKS {
        return Err(DiskError("short read".into()).into());
    }
    Ok(blocks)
}

fn mount_fixed(fixed: &[Block], disk: &impl Disk, options: MountOptions) -> Result<FileSystem, LayoutError> {
    FileSystem::mount([fixed[0].bytes(), fixed[1].bytes()], disk.blocks(), options)
}

/// Makes the file system, if the disk is blank and it is wanted.
async fn make(disk: &impl Disk, options: &Options) -> Result<(), StartError> {
    let count = BLANK_BLOCKS.min(usize::try_from(disk.blocks()).unwrap_or(BLANK_BLOCKS));
    let begin = disk.read(BlockNumber(0), count).await?;
    if begin.iter().any(|block| block.bytes().iter().any(|b| *b != 0)) {
        return Err(StartError::Foreign);
    }
    if options.format == FormatPolicy::Never {
        return Err(StartError::Blank);
    }
    let [a, b, seed] = options.random;
    let made = format(&FormatOptions {
        blocks: disk.blocks(),
        volume: VolumeId(1),
        name: &options.volume,
        uuid: [a, b],
        seed,
        root_mode: 0o777,
        root_owner: (0, 0),
        now: options.now,
    })?;
    for run in runs(made.first) {
        disk.write(run.first, run.blocks).await?;
    }
    disk.flush().await?;
    disk.write(made.last.0, alloc::vec![made.last.1]).await?;
    disk.flush().await?;
    Ok(())
}

/// Reads what an attempt asks for until it is done.
async fn complete<T>(
    disk: &impl Disk,
    fs: &mut FileSystem,
    mut attempt: impl FnMut(&mut FileSystem) -> Attempt<Result<T, Status>>,
) -> Result<Result<T, Status>, StartError> {
    for _ in 0..RESTARTS_MAX {
        let need = match attempt(fs) {
            Attempt::Done(result) => return Ok(result),
            Attempt::Busy => break,
            Attempt::Need(blocks) => blocks.into_iter().collect(),
        };
        for (first, count) in neighbours(need) {
            let mut blocks = disk.read(first, count).await?.into_iter();
            for number in first.0..first.0 + count as u64 {
                match blocks.next() {
                    Some(block) => fs.supply(BlockNumber(number), block),
                    None => fs.supply_failed(BlockNumber(number)),
                }
            }
        }
    }
    Ok(Err(Status::Delay))
}

/// Neighbours together: first block and how many.
fn neighbours(blocks: BTreeSet<BlockNumber>) -> Vec<(BlockNumber, usize)> {
    let mut runs: Vec<(BlockNumber, usize)> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some((first, count)) if *count < RUN_MAX && first.0 + *count as u64 == block.0 => *count += 1,
            _ => runs.push((block, 1)),
        }
    }
    runs
}
