//! Space: that a consistency point always finds a place for every dirty block.
//!
//! Always true: free bits in the dirty blocks of the block map (the *window*) ≥ dirty blocks; free blocks ≥ dirty blocks.
//! Both are secured before an operation is merged, so running out of space is refused there, where it costs
//! nothing, and never met in a consistency point. A block freed since the last consistency point has its bit
//! set until the next one is taken, so it is not allocated before the point that frees it is on disk.
//!
//! A part of the volume is only for operations that give space back (removal, truncation, deferred work), so
//! that a full volume can be emptied.
use crate::block::{BLOCK_SIZE, Block};
use crate::dirty::Key;
use crate::fs::FileSystem;
use crate::fsinfo::{FIRST_BLOCK, MAP_BITS};
use crate::inode::BLOCK_MAP;
use crate::txn::{Res, Stop, Txn};
use fabric::fs::Status;

/// How far into the reserve an operation may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Not at all.
    Normal,
    /// It gives space back, or takes none for good.
    Releases,
}

/// Free blocks in the window beyond what is needed.
const WINDOW_SLACK: u64 = 4;
/// Block-map blocks read at once in search of free blocks.
const MAP_READ_AHEAD: u64 = 64;

/// Blocks kept for operations that give space back.
pub(crate) fn reserve(blocks: u64) -> u64 {
    64 + (blocks / 64).min(1024)
}

/// Which 64-bit word bits of a block-map block stand for blocks that cannot be allocated (fixed ones, and
/// beyond the end).
pub(crate) fn unusable(map: u64, word: u64, blocks: u64) -> u64 {
    let first = map * MAP_BITS + word * 64;
    let low = FIRST_BLOCK.saturating_sub(first).min(64);
    let high = blocks.saturating_sub(first).min(64);
    let below = if low == 64 { u64::MAX } else { (1 << low) - 1 };
    let within = if high == 64 { u64::MAX } else { (1 << high) - 1 };
    below | !within
}

pub(crate) fn word(bytes: &[u8; BLOCK_SIZE], word: u64) -> u64 {
    crate::block::get_u64(bytes, word as usize * 8)
}

impl FileSystem {
    /// Free blocks that a block of the block map shows.
    pub(crate) fn free_bits(&self, block: &Block, map: u64) -> u64 {
        let ends = map == 0 || (map + 1) * MAP_BITS > self.info.blocks;
        let bytes = block.bytes();
        (0..MAP_BITS / 64)
            .map(|at| {
                let used = word(bytes, at) | if ends { unusable(map, at, self.info.blocks) } else { 0 };
                u64::from(used.count_zeros())
            })
            .sum()
    }

    /// Blocks an ordinary operation can still use, when all that is pending has been written.
    pub(crate) fn available(&self) -> u64 {
        (self.info.counters.free_blocks + self.dirty.freeing)
            .saturating_sub(self.dirty.count)
            .saturating_sub(reserve(self.info.blocks))
    }
}

impl Txn<'_> {
    /// Makes sure that the next consistency point can place all that is dirty and all this attempt adds.
    pub fn secure_space(&mut self) -> Res<()> {
        self.map_frees()?;
        self.widen_window()?;
        let dirty = self.fs.dirty.count;
        if dirty > 0 && dirty + self.fresh > self.fs.dirty_limit {
            return Err(Stop::Busy);
        }
        if dirty + self.fresh + self.margin() > self.fs.info.counters.free_blocks {
            return Err(self.no_room());
        }
        Ok(())
    }

    /// Makes the block-map blocks of all blocks to be freed dirty.
    fn map_frees(&mut self) -> Res<()> {
        let mut missing = false;
        while !self.maps.is_empty() {
            let mut maps = core::mem::take(&mut self.maps);
            maps.sort_unstable();
            maps.dedup();
            for map in maps {
                match self.touch(BLOCK_MAP, 0, map) {
                    Ok(()) => {}
                    Err(Stop::Need) => missing = true,
                    Err(stop) => return Err(stop),
                }
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }

    fn widen_window(&mut self) -> Res<()> {
        let total = self.fs.map_free.len() as u64;
        let start = self.fs.info.cursor / MAP_BITS;
        let mut next = 0;
        while self.fs.window_free + self.window_free < self.fs.dirty.count + self.fresh + WINDOW_SLACK {
            if next == total {
                return Err(self.no_room());
            }
            let map = (start + next) % total;
            next += 1;
            if self.is_dirty(Key { inode: BLOCK_MAP, level: 0, index: map }) || self.fs.map_free[map as usize] == 0 {
                continue;
            }
            let free = match self.block(BLOCK_MAP, 0, map) {
                Ok(Some(block)) => self.fs.free_bits(&block, map),
                Ok(None) => self.fs.free_bits(&Block::zeroed(), map),
                Err(Stop::Need) => {
                    for ahead in next..(next + MAP_READ_AHEAD).min(total) {
                        let map = (start + ahead) % total;
                        if self.fs.map_free[map as usize] == u32::MAX {
                            // Only to have what is missing on the list.
                            let _ = self.block(BLOCK_MAP, 0, map);
                        }
                    }
                    return Err(Stop::Need);
                }
                Err(stop) => return Err(stop),
            };
            self.fs.map_free[map as usize] = free as u32;
            if free > 0 {
                self.touch(BLOCK_MAP, 0, map)?;
                self.map_frees()?;
            }
        }
        Ok(())
    }

    /// Blocks are short: for now, if enough are about to be freed.
    fn no_room(&self) -> Stop {
        let dirty = &self.fs.dirty;
        let then = (self.fs.info.counters.free_blocks + dirty.freeing).saturating_sub(dirty.count);
        if self.fs.has_work() || (dirty.count > 0 && self.fresh + self.margin() <= then) {
            Stop::Busy
        } else {
            Stop::Fail(Status::NoSpace)
        }
    }

    fn margin(&self) -> u64 {
        if self.urgency == Urgency::Normal { reserve(self.fs.info.blocks) } else { 0 }
    }
}
