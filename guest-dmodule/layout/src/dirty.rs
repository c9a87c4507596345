//! Blocks that operations have changed since the last consistency point was taken, by file, level and index.
//!
//! Always true: with a block its ancestors are here too, up to the root of its file, and (for a file of the inode file)
//! the block of its inode; and so is every block-map block that has a bit of a block to be freed. Hence a
//! consistency point needs no reading.
use crate::block::Block;
use crate::inode::{HEIGHT_MAX, span};
use alloc::collections::BTreeMap;

pub(crate) const LEVELS: usize = HEIGHT_MAX as usize + 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub inode: u64,
    pub level: u8,
    pub index: u64,
}

#[derive(Clone)]
pub(crate) struct DirtyBlock {
    pub block: Block,
    /// Whether it replaces one on disk, which is freed with the consistency point.
    pub replaces: bool,
}

#[derive(Default)]
pub(crate) struct DirtyFile {
    pub levels: [BTreeMap<u64, DirtyBlock>; LEVELS],
}

#[derive(Default)]
pub(crate) struct Dirty {
    pub files: BTreeMap<u64, DirtyFile>,
    /// Blocks in `files`: each will need a place.
    pub count: u64,
    /// Blocks on disk that the next consistency point frees: those replaced, and those let go of by truncation.
    pub freeing: u64,
    /// Blocks let go of by truncation and removal.
    pub frees: alloc::vec::Vec<u64>,
}

/// Blocks at and behind a data block are cut off a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    pub inode: u64,
    /// First data block that goes.
    pub from: u64,
    /// The orphan that takes the indirect blocks over; `None` if there are none.
    pub to: Option<u64>,
}

impl Cut {
    /// First index of a level that is wholly cut off.
    pub fn first(&self, level: u8) -> u64 {
        self.from.div_ceil(span(level))
    }

    pub fn covers(&self, key: Key) -> bool {
        self.inode == key.inode && key.index >= self.first(key.level) && (key.level == 0 || self.to != Some(self.inode))
    }
}

impl Dirty {
    pub fn get(&self, key: Key) -> Option<&DirtyBlock> {
        self.files.get(&key.inode)?.levels[usize::from(key.level)].get(&key.index)
    }

    pub fn insert(&mut self, key: Key, block: DirtyBlock) {
        let replaces = block.replaces;
        if self.files.entry(key.inode).or_default().levels[usize::from(key.level)].insert(key.index, block).is_none() {
            self.count += 1;
            self.freeing += u64::from(replaces);
        }
    }

    /// Takes a block out; what it replaced must be freed by other means.
    pub fn drop_block(&mut self, key: Key) {
        let file = self.files.get_mut(&key.inode);
        if let Some(block) = file.and_then(|file| file.levels[usize::from(key.level)].remove(&key.index)) {
            self.count -= 1;
            self.freeing -= u64::from(block.replaces);
        }
    }

    /// Drops the data blocks that are cut off and hands the indirect blocks to the orphan.
    pub fn cut(&mut self, cut: Cut) {
        let Some(file) = self.files.get_mut(&cut.inode) else { return };
        let mut moved = DirtyFile::default();
        for level in 0..LEVELS {
            if level > 0 && cut.to == Some(cut.inode) {
                break;
            }
            moved.levels[level] = file.levels[level].split_off(&cut.first(level as u8));
        }
        for (_, block) in core::mem::take(&mut moved.levels[0]) {
            self.count -= 1;
            // What it replaced is still in its parent's pointer and is freed with that.
            self.freeing -= u64::from(block.replaces);
        }
        if let Some(to) = cut.to
            && to != cut.inode
        {
            let orphan = self.files.entry(to).or_default();
            for (level, blocks) in moved.levels.into_iter().enumerate() {
                orphan.levels[level].extend(blocks);
            }
        }
    }
}
