//! Consistency points: from one consistent file system on disk to the next.
//!
//! Always true: no block the last durable one uses is written; a point's fsinfo goes out only after a flush of all
//! its blocks; at most one is being written. Survives: a crash at any instant, in any order of the writes between
//! two flushes (the older fsinfo still stands).
use crate::block::{Block, BlockNumber, BlockPointer, FANOUT, FANOUT_BITS, put_u64};
use crate::dirty::{DirtyBlock, DirtyFile, LEVELS};
use crate::fs::FileSystem;
use crate::fsinfo::{FIRST_BLOCK, FsInfo, MAP_BITS};
use crate::inode::{BLOCK_MAP, FIRST_INODE, INODE_FILE, INODE_SIZE, INODES_PER_BLOCK, Inode};
use crate::space::{unusable, word};
use alloc::{collections::BTreeMap, vec::Vec};

/// Number of a consistency point: each is one more than the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpNumber(pub u64);

/// What has to be written: all of `writes` in any order, a flush, `fsinfo`, a flush.
#[derive(Clone, Debug)]
pub struct ConsistencyPoint {
    /// Its number.
    pub number: CpNumber,
    /// Blocks, in ascending order of their number.
    pub writes: Vec<(BlockNumber, Block)>,
    /// The root, written last.
    pub fsinfo: (BlockNumber, Block),
}

/// An invariant does not hold in memory. The disk is untouched; the file system stops changing.
#[derive(Debug)]
struct Broken(&'static str);

/// Next-fit over the dirty blocks of the block map.
struct Allocator {
    order: Vec<u64>,
    at: usize,
    /// Word to look at next.
    word: u64,
    blocks: u64,
    taken: u64,
}

impl Allocator {
    fn new(maps: &BTreeMap<u64, DirtyBlock>, cursor: u64, blocks: u64) -> Self {
        let start = cursor / MAP_BITS;
        let mut order: Vec<u64> = maps.range(start..).map(|(map, _)| *map).collect();
        order.extend(maps.range(..start).map(|(map, _)| *map));
        let word = if order.first() == Some(&start) { cursor % MAP_BITS / 64 } else { 0 };
        // The block the cursor is in comes once more at the end, for its part before the cursor.
        if word > 0 {
            order.push(start);
        }
        Allocator { order, at: 0, word, blocks, taken: 0 }
    }

    fn take(&mut self, maps: &mut BTreeMap<u64, DirtyBlock>) -> Result<u64, Broken> {
        while let Some(map) = self.order.get(self.at).copied() {
            let held = maps.get_mut(&map).ok_or(Broken("window of the block map"))?;
            while self.word < MAP_BITS / 64 {
                let used = word(held.block.bytes(), self.word) | unusable(map, self.word, self.blocks);
                if used != u64::MAX {
                    let bit = u64::from(used.trailing_ones());
                    let value = word(held.block.bytes(), self.word) | 1 << bit;
                    put_u64(held.block.bytes_mut(), self.word as usize * 8, value);
                    self.taken += 1;
                    return Ok(map * MAP_BITS + self.word * 64 + bit);
                }
                self.word += 1;
            }
            self.word = 0;
            self.at += 1;
        }
        Err(Broken("no free block in the window"))
    }
}

/// What a consistency point gathers while it is taken.
struct Taking<'a> {
    fs: &'a mut FileSystem,
    number: u64,
    allocator: Allocator,
    /// Dirty blocks of the block map.
    maps: BTreeMap<u64, DirtyBlock>,
    frees: Vec<u64>,
    writes: Vec<(BlockNumber, Block)>,
}

impl FileSystem {
    /// The newest consistency point that is on disk.
    pub fn durable_cp(&self) -> CpNumber {
        self.durable
    }

    /// The consistency point whose becoming durable makes all that has been done so far durable.
    pub fn stable_at(&self) -> CpNumber {
        if self.dirty.count > 0 { CpNumber(self.info.generation + 1) } else { CpNumber(self.info.generation) }
    }

    /// Whether there is anything a consistency point would write.
    pub fn is_dirty(&self) -> bool {
        self.dirty.count > 0
    }

    /// Takes a consistency point: everything dirty gets a place, and is clean from here on. `None` if nothing is dirty
    /// or the last one is still being written; one that failed is returned again.
    pub fn begin_consistency_point(&mut self) -> Option<ConsistencyPoint> {
        if self.broken {
            return None;
        }
        if let Some(cp) = &self.in_flight {
            let again = core::mem::take(&mut self.retry);
            return again.then(|| cp.clone());
        }
        if self.dirty.count == 0 {
            return None;
        }
        match self.take_consistency_point() {
            Ok(cp) => {
                self.in_flight = Some(cp.clone());
                Some(cp)
            }
            Err(Broken(what)) => {
                log::error!("volume {}: no consistency point: {what}", self.info.name);
                self.broken = true;
                None
            }
        }
    }

    /// All of the consistency point is on disk, fsinfo and the last flush included.
    pub fn consistency_point_done(&mut self) {
        if let Some(cp) = self.in_flight.take() {
            self.durable = cp.number;
            self.retry = false;
        }
    }

    /// A write or flush of the consistency point failed. The next [`Self::begin_consistency_point`] gives it again.
    pub fn consistency_point_failed(&mut self) {
        if let Some(cp) = &self.in_flight {
            log::error!("volume {}: consistency point {} was not written", self.info.name, cp.number.0);
            self.retry = true;
        }
    }

    fn take_consistency_point(&mut self) -> Result<ConsistencyPoint, Broken> {
        let number = self.info.generation + 1;
        let mut files = core::mem::take(&mut self.dirty.files);
        let frees = core::mem::take(&mut self.dirty.frees);
        let count = self.dirty.count;
        self.dirty.count = 0;
        self.dirty.freeing = 0;
        self.window_free = 0;
        let mut map_file = files.remove(&BLOCK_MAP).ok_or(Broken("no block map"))?;
        // Absent if nothing but a reply was kept.
        let mut inode_file = files.remove(&INODE_FILE).unwrap_or_default();
        let maps = core::mem::take(&mut map_file.levels[0]);
        let allocator = Allocator::new(&maps, self.info.cursor, self.info.blocks);
        let writes = Vec::with_capacity(count as usize);
        let mut taking = Taking { fs: self, number, allocator, maps, frees, writes };
        for (file, mut blocks) in files {
            taking.place_file(file, &mut blocks, &mut inode_file)?;
        }
        let mut inode = taking.fs.info.counters.meta[INODE_FILE as usize - 1];
        taking.place(&mut inode_file, &mut inode)?;
        taking.fs.info.counters.meta[INODE_FILE as usize - 1] = inode;
        taking.place_block_map(map_file)?;
        let mut writes = taking.writes;
        writes.sort_unstable_by_key(|(number, _)| *number);
        self.info.generation = number;
        Ok(ConsistencyPoint { number: CpNumber(number), writes, fsinfo: (FsInfo::place(number), self.info.encode()) })
    }
}

impl Taking<'_> {
    fn place_file(&mut self, file: u64, blocks: &mut DirtyFile, inode_file: &mut DirtyFile) -> Result<(), Broken> {
        if blocks.levels.iter().all(BTreeMap::is_empty) {
            return Ok(());
        }
        if file < FIRST_INODE {
            let mut inode = self.fs.info.counters.meta[file as usize - 1];
            self.place(blocks, &mut inode)?;
            self.fs.info.counters.meta[file as usize - 1] = inode;
            return Ok(());
        }
        let at = (file % INODES_PER_BLOCK) as usize * INODE_SIZE;
        let held = inode_file.levels[0].get_mut(&(file / INODES_PER_BLOCK)).ok_or(Broken("inode not dirty"))?;
        let mut inode =
            Inode::decode(&held.block.bytes()[at..at + INODE_SIZE]).ok_or(Broken("inode cannot be read"))?;
        self.place(blocks, &mut inode)?;
        inode.encode(&mut held.block.bytes_mut()[at..at + INODE_SIZE]);
        Ok(())
    }

    /// Places the dirty blocks of a file, the lowest level first, so that a parent is hashed after its children.
    fn place(&mut self, file: &mut DirtyFile, inode: &mut Inode) -> Result<(), Broken> {
        let height = usize::from(inode.height);
        for level in 0..LEVELS {
            let blocks = core::mem::take(&mut file.levels[level]);
            if level > height && !blocks.is_empty() {
                return Err(Broken("block above the root"));
            }
            let mut blocks = blocks.into_iter().peekable();
            while let Some((index, _)) = blocks.peek() {
                if level == height {
                    let Some((index, dirty)) = blocks.next() else { break };
                    let root = inode.roots.get_mut(index as usize).ok_or(Broken("block beyond the roots"))?;
                    let old = *root;
                    *root = self.write(old, dirty.block)?;
                    continue;
                }
                let parent = index >> FANOUT_BITS;
                let held = file.levels[level + 1].get_mut(&parent).ok_or(Broken("parent not dirty"))?;
                let bytes = held.block.bytes_mut();
                while let Some((index, dirty)) = blocks.next_if(|(index, _)| index >> FANOUT_BITS == parent) {
                    let at = (index % FANOUT) as usize * BlockPointer::SIZE;
                    let old = BlockPointer::read(bytes, at);
                    self.write(old, dirty.block)?.write(bytes, at);
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, old: BlockPointer, block: Block) -> Result<BlockPointer, Broken> {
        let place = self.allocator.take(&mut self.maps)?;
        Ok(self.write_at(place, old, block))
    }

    fn write_at(&mut self, place: u64, old: BlockPointer, block: Block) -> BlockPointer {
        let pointer = BlockPointer { block: place, hash: block.hash() };
        if !old.is_hole() {
            self.frees.push(old.block);
            self.fs.cache.remove(old.block);
        }
        self.fs.wanted.remove(&place);
        self.writes.push((BlockNumber(place), block.clone()));
        self.fs.cache.insert(pointer, block, self.number, self.fs.durable.0);
        pointer
    }

    /// The block map last: first all of its blocks get their places, then what was freed is cleared, then they are
    /// hashed. So the map on disk shows itself as it is.
    fn place_block_map(&mut self, mut file: DirtyFile) -> Result<(), Broken> {
        let mut inode = self.fs.info.counters.meta[BLOCK_MAP as usize - 1];
        let indexes: Vec<u64> = self.maps.keys().copied().collect();
        let mut places: [BTreeMap<u64, u64>; LEVELS] = Default::default();
        for index in indexes {
            let place = self.allocator.take(&mut self.maps)?;
            places[0].insert(index, place);
        }
        for (level, at) in places.iter_mut().enumerate().skip(1) {
            let indexes: Vec<u64> = file.levels[level].keys().copied().collect();
            for index in indexes {
                at.insert(index, self.allocator.take(&mut self.maps)?);
            }
        }
        // Old places of the map's own blocks.
        let height = usize::from(inode.height);
        for (level, at) in places.iter().enumerate() {
            for index in at.keys() {
                let old = if level == height {
                    *inode.roots.get(*index as usize).ok_or(Broken("block beyond the roots of the block map"))?
                } else {
                    let parent = file.levels.get(level + 1).and_then(|blocks| blocks.get(&(index >> FANOUT_BITS)));
                    parent.ok_or(Broken("parent of a block map block"))?.block.pointer((index % FANOUT) as usize)
                };
                if !old.is_hole() {
                    self.frees.push(old.block);
                    self.fs.cache.remove(old.block);
                }
            }
        }
        let next = self.allocator.order.get(self.allocator.at).map(|map| map * MAP_BITS + self.allocator.word * 64);
        self.fs.info.cursor = next.unwrap_or(FIRST_BLOCK).min(self.fs.info.blocks - 1);
        let freed = self.clear_freed()?;
        let free = &mut self.fs.info.counters.free_blocks;
        *free = (*free + freed).saturating_sub(self.allocator.taken);
        for (map, held) in &self.maps {
            self.fs.map_free[*map as usize] = self.fs.free_bits(&held.block, *map) as u32;
        }
        file.levels[0] = core::mem::take(&mut self.maps);
        for (level, at) in places.iter().enumerate() {
            for (index, dirty) in core::mem::take(&mut file.levels[level]) {
                let place = *at.get(&index).ok_or(Broken("place of a block map block"))?;
                let pointer = self.write_at(place, BlockPointer::HOLE, dirty.block);
                if level == height {
                    inode.roots[index as usize] = pointer;
                } else {
                    let parent = file.levels[level + 1].get_mut(&(index >> FANOUT_BITS));
                    let bytes = parent.ok_or(Broken("parent of a block map block"))?.block.bytes_mut();
                    pointer.write(bytes, (index % FANOUT) as usize * BlockPointer::SIZE);
                }
            }
        }
        self.fs.info.counters.meta[BLOCK_MAP as usize - 1] = inode;
        Ok(())
    }

    /// Clears the bits of freed blocks; says how many were set.
    fn clear_freed(&mut self) -> Result<u64, Broken> {
        let mut frees = core::mem::take(&mut self.frees);
        frees.sort_unstable();
        let mut freed = 0;
        let mut frees = frees.into_iter().peekable();
        while let Some(first) = frees.peek() {
            let map = first / MAP_BITS;
            let held = self.maps.get_mut(&map).ok_or(Broken("block map block of a freed block"))?;
            let bytes = held.block.bytes_mut();
            while let Some(block) = frees.next_if(|block| block / MAP_BITS == map) {
                let at = (block % MAP_BITS / 8) as usize;
                let bit = 1 << (block % 8);
                if bytes[at] & bit != 0 {
                    bytes[at] &= !bit;
                    freed += 1;
                } else {
                    log::error!("volume {}: block {block} freed twice", self.fs.info.name);
                }
            }
        }
        Ok(freed)
    }
}
