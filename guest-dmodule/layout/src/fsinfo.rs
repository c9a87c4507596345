//! fsinfo: the root of the file system, in two fixed places written alternately.
//!
//! Always true: the newest valid one describes a consistent file system whose every block is on disk, because it
//! is written only after a flush of all it leads to. Consistency point n writes to block n mod 2, so a torn
//! write leaves n−1, which nothing has overwritten.
//!
//! | at | | at | |
//! |---|---|---|---|
//! | 0 | magic "ORFSINFO" | 96 | inode search hint u64 |
//! | 8 | version u32, volume id u32 | 104 | name length u8, name |
//! | 16 | generation u64 (number of the consistency point) | 1024 | inode of the inode file |
//! | 24 | uuid 16 bytes | 1280 | inode of the inode map |
//! | 40 | hash seed u64 | 1536 | inode of the block map |
//! | 48 | blocks u64 | 1792 | inode of the session file |
//! | 56 | free blocks u64 | 2048 | inode of the file of ownership records (zeroes in version 1) |
//! | 64 | most inodes u64 | | |
//! | 72 | inodes in use u64 | | |
//! | 80 | first orphan u64 | | |
//! | 88 | next block to allocate u64 | 4088 | xxh3-64 of all before |
use crate::block::{BLOCK_SIZE, Block, BlockNumber, get_u32, get_u64, put_u32, put_u64};
use crate::error::LayoutError;
use crate::inode::{FIRST_INODE, INODE_SIZE, Inode, Kind, OWNER_FILE, SESSION_FILE, capacity};
use alloc::string::{String, ToString};
use fabric::fs::VolumeId;
use xxhash_rust::xxh3::xxh3_64;

/// Where the two copies are.
pub const FSINFO_BLOCKS: [BlockNumber; 2] = [BlockNumber(0), BlockNumber(1)];
/// First block that is allocated; those below are at fixed places.
pub(crate) const FIRST_BLOCK: u64 = 4;
/// Fewest blocks of a file system: 1 MiB.
pub const VOLUME_BLOCKS_MIN: u64 = 256;
/// Most blocks of a file system: 1 PiB.
pub const VOLUME_BLOCKS_MAX: u64 = 1 << 38;
/// Longest volume name, in bytes.
pub const VOLUME_NAME_MAX: usize = 255;

const MAGIC: u64 = u64::from_le_bytes(*b"ORFSINFO");
const VERSION: u32 = 2;
const NAME_AT: usize = 104;
const META_AT: usize = 1024;
const HASH_AT: usize = BLOCK_SIZE - 8;
/// Metadata files, whose inodes are numbered from 1.
pub(crate) const META_FILES: usize = OWNER_FILE as usize;
/// Those that version 1 had.
const META_FILES_1: usize = SESSION_FILE as usize;
const _: () = assert!(META_AT + META_FILES * INODE_SIZE <= HASH_AT);

#[derive(Clone, Debug)]
pub(crate) struct FsInfo {
    pub volume: VolumeId,
    pub name: String,
    pub generation: u64,
    pub uuid: [u64; 2],
    pub seed: u64,
    pub counters: Counters,
    pub blocks: u64,
    pub inodes_max: u64,
    /// Next block to allocate.
    pub cursor: u64,
}

/// What operations change beside blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counters {
    /// As of the last consistency point taken.
    pub free_blocks: u64,
    pub inodes_used: u64,
    pub first_orphan: u64,
    pub inode_hint: u64,
    /// Inodes of the metadata files; index = number − 1.
    pub meta: [Inode; META_FILES],
}

impl FsInfo {
    pub fn place(generation: u64) -> BlockNumber {
        FSINFO_BLOCKS[(generation % 2) as usize]
    }

    pub fn encode(&self) -> Block {
        let mut block = Block::zeroed();
        let bytes = block.bytes_mut();
        put_u64(bytes, 0, MAGIC);
        put_u32(bytes, 8, VERSION);
        put_u32(bytes, 12, self.volume.0);
        put_u64(bytes, 16, self.generation);
        put_u64(bytes, 24, self.uuid[0]);
        put_u64(bytes, 32, self.uuid[1]);
        put_u64(bytes, 40, self.seed);
        put_u64(bytes, 48, self.blocks);
        put_u64(bytes, 56, self.counters.free_blocks);
        put_u64(bytes, 64, self.inodes_max);
        put_u64(bytes, 72, self.counters.inodes_used);
        put_u64(bytes, 80, self.counters.first_orphan);
        put_u64(bytes, 88, self.cursor);
        put_u64(bytes, 96, self.counters.inode_hint);
        let name = self.name.as_bytes();
        bytes[NAME_AT] = name.len() as u8;
        bytes[NAME_AT + 1..NAME_AT + 1 + name.len()].copy_from_slice(name);
        for (index, inode) in self.counters.meta.iter().enumerate() {
            let at = META_AT + index * INODE_SIZE;
            inode.encode(&mut bytes[at..at + INODE_SIZE]);
        }
        let hash = xxh3_64(&bytes[..HASH_AT]);
        put_u64(bytes, HASH_AT, hash);
        block
    }

    /// The newest valid one of the two. One of an unknown version may be the newer: then the other is not taken.
    pub fn newest(copies: [&[u8]; 2]) -> Result<FsInfo, LayoutError> {
        match (FsInfo::decode(copies[0]), FsInfo::decode(copies[1])) {
            (Err(LayoutError::Version(version)), _) | (_, Err(LayoutError::Version(version))) => {
                Err(LayoutError::Version(version))
            }
            (Ok(a), Ok(b)) => Ok(if a.generation >= b.generation { a } else { b }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(LayoutError::NoFileSystem), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    fn decode(bytes: &[u8]) -> Result<FsInfo, LayoutError> {
        if bytes.len() != BLOCK_SIZE
            || get_u64(bytes, 0) != MAGIC
            || get_u64(bytes, HASH_AT) != xxh3_64(&bytes[..HASH_AT])
        {
            return Err(LayoutError::NoFileSystem);
        }
        let version = get_u32(bytes, 8);
        let files = match version {
            1 => META_FILES_1,
            VERSION => META_FILES,
            other => return Err(LayoutError::Version(other)),
        };
        let length = usize::from(bytes[NAME_AT]);
        let name = core::str::from_utf8(&bytes[NAME_AT + 1..NAME_AT + 1 + length])
            .map_err(|_| LayoutError::Inconsistent("volume name"))?;
        let mut meta = [Inode::meta(0); META_FILES];
        for (index, inode) in meta.iter_mut().enumerate().take(files) {
            let at = META_AT + index * INODE_SIZE;
            *inode = Inode::decode(&bytes[at..at + INODE_SIZE])
                .filter(|inode| inode.kind == Kind::Meta)
                .ok_or(LayoutError::Inconsistent("inode of a metadata file"))?;
        }
        let info = FsInfo {
            volume: VolumeId(get_u32(bytes, 12)),
            name: name.to_string(),
            generation: get_u64(bytes, 16),
            uuid: [get_u64(bytes, 24), get_u64(bytes, 32)],
            seed: get_u64(bytes, 40),
            blocks: get_u64(bytes, 48),
            counters: Counters {
                free_blocks: get_u64(bytes, 56),
                inodes_used: get_u64(bytes, 72),
                first_orphan: get_u64(bytes, 80),
                inode_hint: get_u64(bytes, 96),
                meta,
            },
            inodes_max: get_u64(bytes, 64),
            cursor: get_u64(bytes, 88),
        };
        info.validate()?;
        Ok(info)
    }

    fn validate(&self) -> Result<(), LayoutError> {
        let counters = &self.counters;
        if !(VOLUME_BLOCKS_MIN..=VOLUME_BLOCKS_MAX).contains(&self.blocks) {
            return Err(LayoutError::Inconsistent("number of blocks"));
        }
        if counters.free_blocks > self.blocks - FIRST_BLOCK {
            return Err(LayoutError::Inconsistent("number of free blocks"));
        }
        if self.inodes_max < INODES_MIN
            || self.inodes_max > inodes_for(VOLUME_BLOCKS_MAX)
            || counters.inodes_used > self.inodes_max - FIRST_INODE
        {
            return Err(LayoutError::Inconsistent("number of inodes"));
        }
        if capacity(counters.meta[crate::inode::BLOCK_MAP as usize - 1].height) < map_blocks(self.blocks) {
            return Err(LayoutError::Inconsistent("height of the block map"));
        }
        if self.generation == 0 || self.generation > u64::MAX / 2 {
            return Err(LayoutError::Inconsistent("generation"));
        }
        Ok(())
    }
}

/// Bits in a block of a map file.
pub(crate) const MAP_BITS: u64 = (BLOCK_SIZE * 8) as u64;

/// Blocks of the block map of a volume.
pub(crate) fn map_blocks(blocks: u64) -> u64 {
    blocks.div_ceil(MAP_BITS)
}

/// Fewest inodes of a volume.
const INODES_MIN: u64 = 256;

/// Most inodes of a volume: one for every block, within reason.
pub(crate) fn inodes_for(blocks: u64) -> u64 {
    blocks.clamp(INODES_MIN, 1 << 32)
}
