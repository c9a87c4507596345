//! Taking blocks from files: truncation, removal, and the deferred freeing of large trees.
//!
//! A tree of height 0 has at most eight blocks; they are freed at once. Of a taller one, the part to go is cut off in
//! a step that only follows the path to the cut (at most five blocks) and given to an *orphan*: an inode of its own (or
//! that of the removed file), in a list that begins in fsinfo. [`crate::FileSystem::work`] frees orphans in bounded
//! steps, from the last block to the first, each step as durable and atomic as any operation; a restart goes on with
//! what the list holds.
use crate::block::{BLOCK_SIZE, Block, BlockPointer, FANOUT, FANOUT_BITS};
use crate::dirty::{Cut, Key};
use crate::inode::{Inode, Kind, ROOTS, span};
use crate::space::Urgency;
use crate::txn::{Res, Stop, Txn, TxnBlock};
use alloc::vec::Vec;

/// Pointers freed in a step of deferred work.
const FREES_PER_STEP: usize = 1024;
/// Block-map blocks made dirty in a step of deferred work.
const MAPS_PER_STEP: usize = 32;
/// Indirect blocks emptied in a step of deferred work.
const NODES_PER_STEP: usize = 16;
/// Blocks a tree may keep count of: data and indirect ones of a file of this many blocks, at most.
fn full_tree(blocks: u64, height: u8) -> u64 {
    (1..=height).map(|level| blocks.div_ceil(span(level))).sum::<u64>() + blocks
}

impl Txn<'_> {
    /// Cuts a file's tree off from data block `from` on.
    pub fn cut(&mut self, number: u64, from: u64) -> Res<()> {
        let inode = self.inode(number)?;
        if inode.height == 0 {
            for index in from..ROOTS {
                let root = inode.roots[index as usize];
                if !root.is_hole() {
                    self.free(root)?;
                    self.inode_mut(number)?.roots[index as usize] = BlockPointer::HOLE;
                }
            }
            self.push_cut(Cut { inode: number, from, to: None });
        } else if !self.is_sparse_from(number, from)? {
            let orphan = self.take_inode(Kind::Orphan)?;
            self.split_tree(number, from, orphan)?;
            self.list_orphan(orphan)?;
            self.push_cut(Cut { inode: number, from, to: Some(orphan) });
        }
        let left = full_tree(from, inode.height);
        let changed = self.inode_mut(number)?;
        changed.used = changed.used.min(left);
        if from == 0 {
            changed.height = 0;
        }
        Ok(())
    }

    /// Notes a cut, and applies it to what this attempt itself has changed.
    fn push_cut(&mut self, cut: Cut) {
        let first = Key { inode: cut.inode, level: 0, index: 0 };
        let end = Key { inode: cut.inode + 1, level: 0, index: 0 };
        let gone: Vec<Key> =
            self.overlay.range(first..end).map(|(key, _)| *key).filter(|key| cut.covers(*key)).collect();
        for key in gone {
            let Some(held) = self.overlay.remove(&key) else { continue };
            match cut.to {
                Some(orphan) if key.level > 0 => {
                    self.overlay.insert(Key { inode: orphan, ..key }, held);
                }
                _ => self.fresh -= u64::from(held.fresh),
            }
        }
        self.cuts.push(cut);
    }

    /// Whether nothing of the tree lies at or behind `from`, as far as that can be told from the roots.
    fn is_sparse_from(&mut self, number: u64, from: u64) -> Res<bool> {
        let inode = self.inode(number)?;
        let first = from / span(inode.height);
        for index in first..ROOTS {
            let dirty = self.is_dirty(Key { inode: number, level: inode.height, index });
            if dirty || !inode.roots[index as usize].is_hole() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moves all pointers behind `from` to the orphan: whole subtrees as they are, of the blocks on the path to the cut the part
    /// behind it.
    fn split_tree(&mut self, number: u64, from: u64, orphan: u64) -> Res<()> {
        let inode = self.inode(number)?;
        let mut level = inode.height;
        let first = from.div_ceil(span(level));
        let mut moved = [BlockPointer::HOLE; ROOTS as usize];
        for index in first..ROOTS {
            moved[index as usize] = inode.roots[index as usize];
            self.inode_mut(number)?.roots[index as usize] = BlockPointer::HOLE;
        }
        let taken = self.inode_mut(orphan)?;
        (taken.height, taken.roots) = (inode.height, moved);
        while level > 0 && !from.is_multiple_of(span(level)) {
            let index = from / span(level);
            if self.block(number, level, index)?.is_none() {
                return Ok(());
            }
            let below = span(level - 1);
            let keep = (from.div_ceil(below) - (index << FANOUT_BITS)) as usize;
            let bytes = self.modify(number, level, index)?;
            let mut behind = Block::zeroed();
            let at = keep.min(FANOUT as usize) * BlockPointer::SIZE;
            behind.bytes_mut()[at..].copy_from_slice(&bytes[at..]);
            bytes[at..].fill(0);
            // Its ancestors in the orphan are dirty already: made just so, one level up.
            let key = Key { inode: orphan, level, index };
            self.overlay.insert(key, TxnBlock { block: behind, replaces: false, fresh: true });
            self.fresh += 1;
            level -= 1;
        }
        Ok(())
    }

    fn list_orphan(&mut self, number: u64) -> Res<()> {
        let next = self.counters.first_orphan;
        self.inode_mut(number)?.next_orphan = next;
        self.counters.first_orphan = number;
        Ok(())
    }

    /// The file has lost its last name: frees it, or leaves that to deferred work.
    pub fn discard(&mut self, number: u64) -> Res<()> {
        let inode = self.inode(number)?;
        if inode.height == 0 {
            self.cut(number, 0)?;
            return self.give_inode(number);
        }
        let changed = self.inode_mut(number)?;
        *changed = Inode {
            kind: Kind::Orphan,
            generation: inode.generation,
            height: inode.height,
            roots: inode.roots,
            used: inode.used,
            ..Inode::FREE
        };
        self.push_cut(Cut { inode: number, from: 0, to: Some(number) });
        self.list_orphan(number)
    }

    /// Cuts a regular file to `size` bytes, or makes it end there with a hole.
    pub fn set_size(&mut self, number: u64, size: u64) -> Res<()> {
        let inode = self.inode(number)?;
        if size < inode.size {
            let block = BLOCK_SIZE as u64;
            let tail = (size % block) as usize;
            self.cut(number, size.div_ceil(block))?;
            // What is behind the end is always zero, so that the file can grow without a look at it.
            if tail > 0 && self.block(number, 0, size / block)?.is_some() {
                self.modify(number, 0, size / block)?[tail..].fill(0);
            }
        }
        self.inode_mut(number)?.size = size;
        Ok(())
    }

    /// A step of deferred work on the first orphan.
    pub fn free_orphans(&mut self) -> Res<()> {
        self.urgency = Urgency::Releases;
        let number = self.counters.first_orphan;
        let orphan = self.inode(number)?;
        if orphan.kind != Kind::Orphan {
            return Err(self.corrupt("orphan", number));
        }
        for _ in 0..NODES_PER_STEP {
            if !self.free_last_node(number)? {
                self.counters.first_orphan = orphan.next_orphan;
                self.inode_mut(number)?.roots = [BlockPointer::HOLE; ROOTS as usize];
                return self.give_inode(number);
            }
            if self.step_is_full() {
                break;
            }
        }
        Ok(())
    }

    fn step_is_full(&self) -> bool {
        self.frees.len() >= FREES_PER_STEP || self.maps.len() >= MAPS_PER_STEP
    }

    /// Frees what the last node just above the data points to, from its end; a node above it that has become
    /// empty. False if the tree is empty.
    fn free_last_node(&mut self, number: u64) -> Res<bool> {
        let orphan = self.inode(number)?;
        let mut level = orphan.height;
        let Some(mut index) = self.last_root(number, &orphan) else { return Ok(false) };
        loop {
            if level == 0 {
                // A tree of height 0: its roots are the data.
                self.free(orphan.roots[index as usize])?;
                self.inode_mut(number)?.roots[index as usize] = BlockPointer::HOLE;
                return Ok(true);
            }
            let Some(block) = self.block(number, level, index)? else {
                return Err(self.corrupt("tree of orphan", number));
            };
            let last = self.last_child(number, level, index, &block);
            let Some(last) = last else {
                self.unlink_node(number, level, index)?;
                return Ok(true);
            };
            if level == 1 {
                self.free_data(number, index, last)?;
                return Ok(true);
            }
            self.read_ahead_nodes(number, level - 1, (index << FANOUT_BITS) + last, &block)?;
            level -= 1;
            index = (index << FANOUT_BITS) + last;
        }
    }

    fn last_root(&mut self, number: u64, orphan: &Inode) -> Option<u64> {
        (0..ROOTS).rev().find(|index| {
            !orphan.roots[*index as usize].is_hole()
                || (orphan.height > 0 && self.is_dirty(Key { inode: number, level: orphan.height, index: *index }))
        })
    }

    fn last_child(&mut self, number: u64, level: u8, index: u64, block: &Block) -> Option<u64> {
        (0..FANOUT).rev().find(|at| {
            let child = Key { inode: number, level: level - 1, index: (index << FANOUT_BITS) + at };
            !block.pointer(*at as usize).is_hole() || (level > 1 && self.is_dirty(child))
        })
    }

    /// Frees the data blocks of a level-1 node, from `last` down.
    fn free_data(&mut self, number: u64, index: u64, last: u64) -> Res<()> {
        for at in (0..=last as usize).rev() {
            let bytes = self.modify(number, 1, index)?;
            let pointer = BlockPointer::read(bytes, at * BlockPointer::SIZE);
            BlockPointer::HOLE.write(bytes, at * BlockPointer::SIZE);
            self.free(pointer)?;
            if self.step_is_full() {
                return Ok(());
            }
        }
        self.unlink_node(number, 1, index)
    }

    /// Takes an empty node out of the tree.
    fn unlink_node(&mut self, number: u64, level: u8, index: u64) -> Res<()> {
        let old = self.pointer(number, level, index)?;
        self.free(old)?;
        let key = Key { inode: number, level, index };
        if self.overlay.remove(&key).is_some_and(|held| held.fresh) {
            self.fresh -= 1;
        }
        if self.fs.dirty.get(key).is_some() {
            self.drops.push(key);
        }
        let inode = self.inode(number)?;
        if level == inode.height {
            self.inode_mut(number)?.roots[index as usize] = BlockPointer::HOLE;
        } else {
            let bytes = self.modify(number, level + 1, index >> FANOUT_BITS)?;
            BlockPointer::HOLE.write(bytes, (index % FANOUT) as usize * BlockPointer::SIZE);
        }
        Ok(())
    }

    /// Asks for the nodes before the one needed next along with it.
    fn read_ahead_nodes(&mut self, number: u64, level: u8, last: u64, parent: &Block) -> Res<()> {
        let first = (last >> FANOUT_BITS) << FANOUT_BITS;
        let mut missing = false;
        for index in (first..=last).rev().take(NODES_PER_STEP) {
            if parent.pointer((index % FANOUT) as usize).is_hole() {
                continue;
            }
            match self.block(number, level, index) {
                Err(Stop::Need) => missing = true,
                Err(stop) if index == last => return Err(stop),
                _ => {}
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }
}
