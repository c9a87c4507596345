//! An attempt at an operation: sees the file system through an overlay of its own changes, and merges them at the
//! end, or is dropped without a trace.
//!
//! Always true: nothing of the file system changes before [`Txn::commit`] can no longer fail, except the cache of
//! clean blocks. Recursion is at most the height of a tree.
use crate::block::{BLOCK_SIZE, Block, BlockPointer, FANOUT, FANOUT_BITS};
use crate::dirty::{Cut, DirtyBlock, Key};
use crate::fs::FileSystem;
use crate::fsinfo::{Counters, FIRST_BLOCK, MAP_BITS};
use crate::inode::{
    BLOCK_MAP, FIRST_INODE, HEIGHT_MAX, INODE_FILE, INODE_SIZE, INODES_PER_BLOCK, Inode, ROOTS, capacity,
};
use crate::space::Urgency;
use alloc::{collections::BTreeMap, vec::Vec};
use fabric::fs::{Status, Time};

/// Why an attempt ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Blocks are missing; they are in [`Txn::need`].
    Need,
    /// A consistency point has to be taken first.
    Busy,
    /// Refused.
    Fail(Status),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Stop::Fail(status)
    }
}

pub(crate) type Res<T> = Result<T, Stop>;

pub(crate) struct TxnBlock {
    pub block: Block,
    pub replaces: bool,
    /// Not dirty before this attempt.
    pub fresh: bool,
}

struct TxnInode {
    inode: Inode,
    changed: bool,
}

pub(crate) struct Txn<'a> {
    pub fs: &'a mut FileSystem,
    pub now: Time,
    pub urgency: Urgency,
    pub overlay: BTreeMap<Key, TxnBlock>,
    inodes: BTreeMap<u64, TxnInode>,
    pub counters: Counters,
    pub frees: Vec<u64>,
    pub cuts: Vec<Cut>,
    /// Dirty nodes of an orphan that are taken out of its tree.
    pub drops: Vec<Key>,
    /// Blocks of the block map that hold a bit to be cleared.
    pub maps: Vec<u64>,
    /// Free bits in the block-map blocks this attempt makes dirty.
    pub window_free: u64,
    /// Blocks this attempt makes dirty.
    pub fresh: u64,
    pub need: Vec<BlockPointer>,
}

impl<'a> Txn<'a> {
    pub fn new(fs: &'a mut FileSystem, now: Time) -> Self {
        let counters = fs.info.counters;
        Txn {
            fs,
            now,
            urgency: Urgency::Normal,
            overlay: BTreeMap::new(),
            inodes: BTreeMap::new(),
            counters,
            frees: Vec::new(),
            cuts: Vec::new(),
            drops: Vec::new(),
            maps: Vec::new(),
            window_free: 0,
            fresh: 0,
            need: Vec::new(),
        }
    }

    /// Something on disk cannot be: the volume was damaged in a way its checksums do not show.
    pub fn corrupt(&self, what: &str, number: u64) -> Stop {
        log::error!("volume {}: inconsistent: {what} {number}", self.fs.info.name);
        Stop::Fail(Status::ServerFault)
    }

    fn is_cut(&self, key: Key) -> bool {
        self.cuts.iter().any(|cut| cut.covers(key)) || self.drops.contains(&key)
    }

    pub fn is_dirty(&self, key: Key) -> bool {
        self.overlay.contains_key(&key) || (self.fs.dirty.get(key).is_some() && !self.is_cut(key))
    }

    /// The inode as it is now, this attempt's changes included.
    pub fn inode(&mut self, number: u64) -> Res<Inode> {
        if let Some(held) = self.inodes.get(&number) {
            return Ok(held.inode);
        }
        if number < FIRST_INODE {
            let meta = self.counters.meta.get((number as usize).wrapping_sub(1)).copied();
            return meta.ok_or_else(|| self.corrupt("metadata file", number));
        }
        if number >= self.fs.info.inodes_max {
            return Err(self.corrupt("inode number", number));
        }
        let inode = match self.block(INODE_FILE, 0, number / INODES_PER_BLOCK)? {
            None => Inode::FREE,
            Some(block) => {
                let at = (number % INODES_PER_BLOCK) as usize * INODE_SIZE;
                Inode::decode(&block.bytes()[at..at + INODE_SIZE]).ok_or_else(|| self.corrupt("inode", number))?
            }
        };
        self.inodes.insert(number, TxnInode { inode, changed: false });
        Ok(inode)
    }

    /// The inode, to change.
    pub fn inode_mut(&mut self, number: u64) -> Res<&mut Inode> {
        self.inode(number)?;
        if number < FIRST_INODE {
            return Ok(&mut self.counters.meta[number as usize - 1]);
        }
        match self.inodes.get_mut(&number) {
            Some(held) => {
                held.changed = true;
                Ok(&mut held.inode)
            }
            None => Err(Stop::Fail(Status::ServerFault)),
        }
    }

    /// Reads through a pointer.
    pub fn fetch(&mut self, pointer: BlockPointer) -> Res<Block> {
        if pointer.block < FIRST_BLOCK || pointer.block >= self.fs.info.blocks {
            return Err(self.corrupt("pointer to block", pointer.block));
        }
        if let Some(block) = self.fs.cache.get(pointer) {
            return Ok(block.clone());
        }
        // What the cache has is what is on disk: a pointer that expects something else is wrong, and reading again would
        // not end.
        if self.fs.cache.contains(pointer.block) {
            log::error!("volume {}: block {} has a wrong checksum", self.fs.info.name, pointer.block);
            return Err(Stop::Fail(Status::Io));
        }
        if self.fs.failed.contains(&(pointer.block, pointer.hash)) {
            return Err(Stop::Fail(Status::Io));
        }
        self.need.push(pointer);
        Err(Stop::Need)
    }

    /// A block of a file's tree; `None` in a hole.
    pub fn block(&mut self, inode: u64, level: u8, index: u64) -> Res<Option<Block>> {
        let key = Key { inode, level, index };
        if let Some(held) = self.overlay.get(&key) {
            return Ok(Some(held.block.clone()));
        }
        if let Some(dirty) = self.fs.dirty.get(key)
            && !self.is_cut(key)
        {
            return Ok(Some(dirty.block.clone()));
        }
        let pointer = self.pointer(inode, level, index)?;
        if pointer.is_hole() { Ok(None) } else { self.fetch(pointer).map(Some) }
    }

    /// Where the last consistency point has put a block.
    pub fn pointer(&mut self, inode: u64, level: u8, index: u64) -> Res<BlockPointer> {
        let held = self.inode(inode)?;
        if level > held.height || index >= capacity(held.height - level) {
            return Ok(BlockPointer::HOLE);
        }
        if level == held.height {
            return Ok(held.roots[index as usize]);
        }
        Ok(match self.block(inode, level + 1, index >> FANOUT_BITS)? {
            None => BlockPointer::HOLE,
            Some(parent) => parent.pointer((index % FANOUT) as usize),
        })
    }

    /// Makes a block dirty with the content it has (zeroes in a hole).
    pub fn touch(&mut self, inode: u64, level: u8, index: u64) -> Res<()> {
        let key = Key { inode, level, index };
        if self.is_dirty(key) {
            return Ok(());
        }
        if level == 0 {
            self.grow(inode, index)?;
        }
        let content = self.block(inode, level, index)?;
        self.admit(key, content.unwrap_or_else(Block::zeroed))
    }

    /// A block of a file, to change.
    pub fn modify(&mut self, inode: u64, level: u8, index: u64) -> Res<&mut [u8; BLOCK_SIZE]> {
        self.touch(inode, level, index)?;
        let key = Key { inode, level, index };
        if !self.overlay.contains_key(&key) {
            let Some(dirty) = self.fs.dirty.get(key) else {
                return Err(self.corrupt("dirty block", index));
            };
            let DirtyBlock { block, replaces } = dirty.clone();
            self.overlay.insert(key, TxnBlock { block, replaces, fresh: false });
        }
        match self.overlay.get_mut(&key) {
            Some(held) => Ok(held.block.bytes_mut()),
            None => Err(Stop::Fail(Status::ServerFault)),
        }
    }

    /// Puts a whole data block in place without reading the old one.
    pub fn replace(&mut self, inode: u64, index: u64, block: Block) -> Res<()> {
        let key = Key { inode, level: 0, index };
        if let Some(held) = self.overlay.get_mut(&key) {
            held.block = block;
            return Ok(());
        }
        if let Some(dirty) = self.fs.dirty.get(key)
            && !self.is_cut(key)
        {
            let replaces = dirty.replaces;
            self.overlay.insert(key, TxnBlock { block, replaces, fresh: false });
            return Ok(());
        }
        self.grow(inode, index)?;
        self.admit(key, block)
    }

    /// Puts whole data blocks in place, from block `first` on; the last one may be shorter and is zero behind. Asks for all
    /// that is missing at once.
    pub fn replace_run(&mut self, inode: u64, first: u64, data: &[u8]) -> Res<()> {
        let blocks = data.len().div_ceil(BLOCK_SIZE) as u64;
        let Some(last) = (first + blocks).checked_sub(1).filter(|_| blocks > 0) else { return Ok(()) };
        self.grow(inode, last)?;
        let (mut pieces, mut missing) = (data.chunks(BLOCK_SIZE), false);
        for parent in first >> FANOUT_BITS..=last >> FANOUT_BITS {
            let from = first.max(parent << FANOUT_BITS);
            let to = last.min((parent << FANOUT_BITS) + FANOUT - 1);
            let pieces = pieces.by_ref().take((to - from + 1) as usize);
            match self.replace_under(inode, parent, from, pieces) {
                Ok(()) => {}
                Err(Stop::Need) => missing = true,
                Err(stop) => return Err(stop),
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }

    /// Puts whole data blocks in place that have the same parent.
    fn replace_under<'d>(
        &mut self,
        inode: u64,
        parent: u64,
        first: u64,
        pieces: impl Iterator<Item = &'d [u8]>,
    ) -> Res<()> {
        let held = self.inode(inode)?;
        let above = if held.height > 0 {
            // Its place in the iteration is lost when something is missing; the attempt is over then anyway.
            self.touch(inode, 1, parent)?;
            self.block(inode, 1, parent)?
        } else {
            None
        };
        let mut fresh = 0;
        let mut created = 0;
        for (index, piece) in (first..).zip(pieces) {
            let key = Key { inode, level: 0, index };
            let block = self.fs.cache.new_block(piece);
            if let Some(held) = self.overlay.get_mut(&key) {
                held.block = block;
                continue;
            }
            if let Some(dirty) = self.fs.dirty.get(key)
                && !self.is_cut(key)
            {
                let replaces = dirty.replaces;
                self.overlay.insert(key, TxnBlock { block, replaces, fresh: false });
                continue;
            }
            let old = match &above {
                Some(above) => above.pointer((index % FANOUT) as usize),
                None => held.roots.get(index as usize).copied().unwrap_or(BlockPointer::HOLE),
            };
            if old.is_hole() {
                created += 1;
            } else {
                self.frees_bit_of(old.block)?;
            }
            self.overlay.insert(key, TxnBlock { block, replaces: !old.is_hole(), fresh: true });
            fresh += 1;
        }
        self.fresh += fresh;
        self.inode_mut(inode)?.used += created;
        Ok(())
    }

    /// Makes a block dirty that was not: its ancestors and its inode become dirty as well.
    fn admit(&mut self, key: Key, block: Block) -> Res<()> {
        let old = self.pointer(key.inode, key.level, key.index)?;
        if key.inode == BLOCK_MAP && key.level == 0 {
            self.window_free += self.fs.free_bits(&block, key.index);
        }
        self.overlay.insert(key, TxnBlock { block, replaces: !old.is_hole(), fresh: true });
        self.fresh += 1;
        self.adopt(key, old)
    }

    /// What a block that has become dirty entails; `old` is its place so far.
    pub fn adopt(&mut self, key: Key, old: BlockPointer) -> Res<()> {
        let inode = self.inode_mut(key.inode)?;
        let height = inode.height;
        if old.is_hole() {
            inode.used += 1;
        } else {
            self.frees_bit_of(old.block)?;
        }
        if key.level < height {
            self.touch(key.inode, key.level + 1, key.index >> FANOUT_BITS)
        } else if key.level == height && key.index < ROOTS {
            Ok(())
        } else {
            Err(self.corrupt("tree of inode", key.inode))
        }
    }

    /// The block will be freed by the next consistency point, which then needs its block-map block.
    pub fn frees_bit_of(&mut self, block: u64) -> Res<()> {
        if block < FIRST_BLOCK || block >= self.fs.info.blocks {
            return Err(self.corrupt("pointer to block", block));
        }
        let map = block / MAP_BITS;
        if self.maps.last() != Some(&map) {
            self.maps.push(map);
        }
        Ok(())
    }

    /// Frees a block nothing points to any more.
    pub fn free(&mut self, pointer: BlockPointer) -> Res<()> {
        if !pointer.is_hole() {
            self.frees_bit_of(pointer.block)?;
            self.frees.push(pointer.block);
        }
        Ok(())
    }

    /// Makes the tree tall enough for a data block.
    pub fn grow(&mut self, number: u64, index: u64) -> Res<()> {
        loop {
            let inode = self.inode(number)?;
            if index < capacity(inode.height) {
                return Ok(());
            }
            if inode.height >= HEIGHT_MAX {
                return Err(Stop::Fail(Status::TooLarge));
            }
            let height = inode.height + 1;
            let empty = inode.roots.iter().all(BlockPointer::is_hole)
                && self.fs.dirty.files.get(&number).is_none_or(|file| file.levels.iter().all(BTreeMap::is_empty))
                && self.overlay.range(Key { inode: number, level: 0, index: 0 }..).next().map(|(key, _)| key.inode)
                    != Some(number);
            let changed = self.inode_mut(number)?;
            changed.height = height;
            if !empty {
                changed.used += 1;
                changed.roots = [BlockPointer::HOLE; ROOTS as usize];
                let mut block = Block::zeroed();
                for (at, root) in inode.roots.iter().enumerate() {
                    root.write(block.bytes_mut(), at * BlockPointer::SIZE);
                }
                let key = Key { inode: number, level: height, index: 0 };
                self.overlay.insert(key, TxnBlock { block, replaces: false, fresh: true });
                self.fresh += 1;
            }
        }
    }

    /// Merges the attempt into the file system; says whether it changed anything.
    pub fn commit(&mut self) -> Res<bool> {
        self.store_inodes()?;
        if self.overlay.is_empty() && self.cuts.is_empty() && self.frees.is_empty() {
            return Ok(false);
        }
        self.secure_space()?;
        let dirty = &mut self.fs.dirty;
        for cut in core::mem::take(&mut self.cuts) {
            dirty.cut(cut);
        }
        for key in core::mem::take(&mut self.drops) {
            dirty.drop_block(key);
        }
        for (key, TxnBlock { block, replaces, .. }) in core::mem::take(&mut self.overlay) {
            dirty.insert(key, DirtyBlock { block, replaces });
        }
        dirty.freeing += self.frees.len() as u64;
        dirty.frees.append(&mut self.frees);
        self.fs.window_free += self.window_free;
        self.fs.info.counters = self.counters;
        Ok(true)
    }

    fn store_inodes(&mut self) -> Res<()> {
        let changed: Vec<(u64, Inode)> =
            self.inodes.iter().filter(|(_, held)| held.changed).map(|(number, held)| (*number, held.inode)).collect();
        let mut missing = false;
        for (number, inode) in changed {
            let at = (number % INODES_PER_BLOCK) as usize * INODE_SIZE;
            match self.modify(INODE_FILE, 0, number / INODES_PER_BLOCK) {
                Ok(bytes) => inode.encode(&mut bytes[at..at + INODE_SIZE]),
                Err(Stop::Need) => missing = true,
                Err(stop) => return Err(stop),
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }
}
