//! Making a file system.
//!
//! The block map of a new volume is all holes, and a hole in it means free blocks: making one writes a handful of
//! blocks whatever its size.
use crate::block::{Block, BlockNumber};
use crate::error::LayoutError;
use crate::fs::{FileSystem, MountOptions};
use crate::fsinfo::{
    Counters, FIRST_BLOCK, FSINFO_BLOCKS, FsInfo, META_FILES, VOLUME_BLOCKS_MAX, VOLUME_BLOCKS_MIN, VOLUME_NAME_MAX,
    inodes_for, map_blocks,
};
use crate::inode::{BLOCK_MAP, FIRST_INODE, Inode, Kind, ROOT, capacity};
use crate::owner::{OWNER_BLOCKS, OwnerStore};
use crate::txn::{Stop, Txn};
use alloc::{string::ToString, vec::Vec};
use fabric::fs::{FileKind, Time, VolumeId};

/// What volume to make.
#[derive(Clone, Copy, Debug)]
pub struct FormatOptions<'a> {
    /// Blocks of the volume, from block 0 of the disk.
    pub blocks: u64,
    /// Id of the volume: part of every handle.
    pub volume: VolumeId,
    /// Name of the volume.
    pub name: &'a str,
    /// Random: tells this volume from all others.
    pub uuid: [u64; 2],
    /// Random and secret: keys the hash of directory entries.
    pub seed: u64,
    /// Permission bits of the root directory.
    pub root_mode: u32,
    /// Owner and group of the root directory.
    pub root_owner: (u32, u32),
    /// Time of creation.
    pub now: Time,
}

/// What to write to make the file system: all of `first` in any order, a flush, `last`, a flush.
#[derive(Clone, Debug)]
pub struct Format {
    /// Everything but the root.
    pub first: Vec<(BlockNumber, Block)>,
    /// fsinfo.
    pub last: (BlockNumber, Block),
}

/// Makes an empty file system.
pub fn format(options: &FormatOptions<'_>) -> Result<Format, LayoutError> {
    let blocks = options.blocks;
    if !(VOLUME_BLOCKS_MIN..=VOLUME_BLOCKS_MAX).contains(&blocks) {
        return Err(LayoutError::Size(blocks));
    }
    if options.name.is_empty() || options.name.len() > VOLUME_NAME_MAX {
        return Err(LayoutError::Name);
    }
    let mut meta = [Inode::meta(0); META_FILES];
    let map = &mut meta[BLOCK_MAP as usize - 1];
    while capacity(map.height) < map_blocks(blocks) {
        map.height += 1;
    }
    let info = FsInfo {
        volume: options.volume,
        name: options.name.to_string(),
        generation: 0,
        uuid: options.uuid,
        seed: options.seed,
        counters: Counters {
            free_blocks: blocks - FIRST_BLOCK,
            inodes_used: 0,
            first_orphan: 0,
            inode_hint: FIRST_INODE,
            meta,
        },
        blocks,
        inodes_max: inodes_for(blocks),
        cursor: FIRST_BLOCK,
    };
    let mut fs = FileSystem::new(info, MountOptions::default());
    let mut txn = Txn::new(&mut fs, options.now);
    make_root(&mut txn, options).map_err(|_| LayoutError::Size(blocks))?;
    let cp = fs.begin_consistency_point().ok_or(LayoutError::Inconsistent("first consistency point"))?;
    let mut first = cp.writes;
    // Whatever was on the disk before must not be found in place of this.
    first.extend(
        FSINFO_BLOCKS.into_iter().filter(|number| *number != cp.fsinfo.0).map(|number| (number, Block::zeroed())),
    );
    let owners = OwnerStore::default().image(None);
    first.extend(OWNER_BLOCKS.into_iter().filter(|n| *n != owners.number).map(|number| (number, Block::zeroed())));
    first.push((owners.number, owners.block));
    first.sort_unstable_by_key(|(number, _)| *number);
    Ok(Format { first, last: cp.fsinfo })
}

fn make_root(txn: &mut Txn<'_>, options: &FormatOptions<'_>) -> Result<(), Stop> {
    let number = txn.take_inode(Kind::File(FileKind::Directory))?;
    debug_assert_eq!(number, ROOT);
    let now = options.now;
    let root = txn.inode_mut(number)?;
    (root.mode, root.links, root.parent) = (options.root_mode & 0o7777, 2, ROOT);
    (root.uid, root.gid) = options.root_owner;
    (root.atime, root.mtime, root.ctime) = (now, now, now);
    txn.commit()?;
    Ok(())
}
