//! Directories: extendible hashing in the blocks of the directory's file.
//!
//! A name's *cookie* is its 63-bit hash (keyed with the volume's seed, so nobody can choose names that collide) with
//! the low three bits telling apart names of the same hash. The first `depth` bits of the hash index the table, which has
//! the block of the leaf. Depth 0: no table, one leaf. A table of up to 1024 entries grows in its block; a larger one is
//! written anew at the end, and its old blocks become leaves (`spare`).
//!
//! Always true: walking the table walks the cookies in ascending order, so a listing continues behind any cookie,
//! whether its entry is still there or not. Entries never move to another cookie. `.` and `..` are not stored: they have the
//! cookies 1 and 2, and `parent` in the inode.
use crate::block::{BLOCK_SIZE, Block, get_u32, put_u32};
use crate::inode::{DEPTH_MAX, FILE_SIZE_MAX, Kind};
use crate::leaf::{self, Entry, Leaf};
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::fs::Status;
use xxhash_rust::xxh3::xxh3_64_with_seed;

const HASH_BITS: u32 = 63;
/// Names of the same hash a directory can hold.
const SAME_HASH_MAX: u64 = 8;
/// Cookies below this are `.` and `..` and the beginning.
pub(crate) const FIRST_COOKIE: u64 = 16;
/// Cookie of `.`.
pub(crate) const DOT: u64 = 1;
/// Cookie of `..`.
pub(crate) const DOT_DOT: u64 = 2;
/// Table entries in a block.
const PER_BLOCK: u64 = (BLOCK_SIZE / 4) as u64;
const PER_BLOCK_BITS: u32 = 10;
/// Leaves read at once by a listing.
const LEAF_READ_AHEAD: usize = 32;

/// An entry found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub cookie: u64,
    pub inode: u64,
    pub kind: u8,
}

pub(crate) fn hash(seed: u64, name: &[u8]) -> u64 {
    let hash = (xxh3_64_with_seed(name, seed) >> 1) & !(SAME_HASH_MAX - 1);
    hash.max(FIRST_COOKIE)
}

/// The part of a hash that indexes a table of this depth.
pub(crate) fn prefix(hash: u64, depth: u32) -> u64 {
    if depth == 0 { 0 } else { hash >> (HASH_BITS - depth) }
}

impl Txn<'_> {
    /// Block of the leaf for a table index.
    fn leaf_place(&mut self, dir: u64, index: u64) -> Res<u64> {
        let inode = self.inode(dir)?;
        let place = if inode.depth == 0 {
            u64::from(inode.table)
        } else {
            let table = self.block(dir, 0, u64::from(inode.table) + index / PER_BLOCK)?;
            let table = table.ok_or_else(|| self.corrupt("hash table of directory", dir))?;
            u64::from(get_u32(table.bytes(), (index % PER_BLOCK) as usize * 4))
        };
        if place >= inode.size / BLOCK_SIZE as u64 || inode.depth > DEPTH_MAX {
            return Err(self.corrupt("hash table of directory", dir));
        }
        Ok(place)
    }

    fn leaf<'b>(&self, dir: u64, block: &'b Option<Block>) -> Res<Leaf<'b>> {
        let leaf = block.as_ref().and_then(|block| Leaf::parse(block.bytes()));
        leaf.ok_or_else(|| self.corrupt("leaf of directory", dir))
    }

    /// Finds a name (not `.` or `..`).
    pub fn find(&mut self, dir: u64, name: &[u8]) -> Res<Option<Found>> {
        let inode = self.inode(dir)?;
        if inode.size == 0 {
            return Ok(None);
        }
        let hash = hash(self.fs.info.seed, name);
        let place = self.leaf_place(dir, prefix(hash, inode.depth))?;
        let block = self.block(dir, 0, place)?;
        let leaf = self.leaf(dir, &block)?;
        let found = leaf.entries().find(|e| e.cookie & !(SAME_HASH_MAX - 1) == hash && e.name == name);
        Ok(found.map(|e| Found { cookie: e.cookie, inode: e.inode, kind: e.kind }))
    }

    /// Adds a name that is not there.
    pub fn add_entry(&mut self, dir: u64, name: &[u8], inode: u64, kind: u8) -> Res<()> {
        let hash = hash(self.fs.info.seed, name);
        if self.inode(dir)?.size == 0 {
            let mut block = Block::zeroed();
            leaf::build(block.bytes_mut(), 0, core::iter::empty());
            self.replace(dir, 0, block)?;
            let changed = self.inode_mut(dir)?;
            (changed.size, changed.depth, changed.table, changed.spare) = (BLOCK_SIZE as u64, 0, 0, (0, 0));
        }
        // Each round makes the leaf's depth one more.
        for _ in 0..=DEPTH_MAX {
            let depth = self.inode(dir)?.depth;
            let place = self.leaf_place(dir, prefix(hash, depth))?;
            let block = self.block(dir, 0, place)?;
            let leaf = self.leaf(dir, &block)?;
            if leaf.has_room(name) {
                let same = leaf.entries().map(|e| e.cookie).filter(|c| c & !(SAME_HASH_MAX - 1) == hash);
                let taken = same.fold(0_u64, |taken, cookie| taken | 1 << (cookie - hash));
                let cookie = (0..SAME_HASH_MAX).find(|at| taken >> at & 1 == 0).map(|at| hash + at);
                let cookie = cookie.ok_or(Stop::Fail(Status::NoSpace))?;
                let bytes = self.modify(dir, 0, place)?;
                if leaf::insert(bytes, Entry { cookie, inode, kind, name }).is_none() {
                    return Err(self.corrupt("leaf of directory", dir));
                }
                self.inode_mut(dir)?.entries += 1;
                return Ok(());
            }
            if leaf.depth > depth {
                return Err(self.corrupt("leaf of directory", dir));
            }
            if leaf.depth == depth {
                self.double_table(dir)?;
            }
            self.split(dir, hash, place)?;
        }
        Err(Stop::Fail(Status::NoSpace))
    }

    /// A block number within the directory's file that is not in use.
    fn new_place(&mut self, dir: u64) -> Res<u64> {
        let inode = self.inode_mut(dir)?;
        if inode.spare.1 > 0 {
            let place = inode.spare.0;
            inode.spare = (place.saturating_add(1), inode.spare.1 - 1);
            return Ok(u64::from(place));
        }
        self.extend(dir, 1)
    }

    fn extend(&mut self, dir: u64, blocks: u64) -> Res<u64> {
        let inode = self.inode_mut(dir)?;
        let place = inode.size / BLOCK_SIZE as u64;
        let size = inode.size + blocks * BLOCK_SIZE as u64;
        if size > FILE_SIZE_MAX || place + blocks > u64::from(u32::MAX) {
            return Err(Stop::Fail(Status::NoSpace));
        }
        inode.size = size;
        Ok(place)
    }

    fn double_table(&mut self, dir: u64) -> Res<()> {
        let inode = self.inode(dir)?;
        if inode.depth >= DEPTH_MAX {
            return Err(Stop::Fail(Status::NoSpace));
        }
        if inode.depth < PER_BLOCK_BITS {
            let entries = 1 << inode.depth;
            let mut places = Vec::with_capacity(entries);
            for index in 0..entries as u64 {
                places.push(self.leaf_place(dir, index)? as u32);
            }
            let table = if inode.depth == 0 { self.new_place(dir)? as u32 } else { inode.table };
            let mut block = Block::zeroed();
            for (index, place) in places.into_iter().enumerate() {
                put_u32(block.bytes_mut(), index * 8, place);
                put_u32(block.bytes_mut(), index * 8 + 4, place);
            }
            self.replace(dir, u64::from(table), block)?;
            let changed = self.inode_mut(dir)?;
            (changed.table, changed.depth) = (table, inode.depth + 1);
            return Ok(());
        }
        let blocks = 1 << (inode.depth - PER_BLOCK_BITS);
        self.load(dir, u64::from(inode.table), blocks)?;
        let table = self.extend(dir, 2 * blocks)?;
        for at in 0..blocks {
            let old = self.block(dir, 0, u64::from(inode.table) + at)?;
            let old = old.ok_or_else(|| self.corrupt("hash table of directory", dir))?;
            for half in 0..2 {
                let mut block = Block::zeroed();
                for index in 0..PER_BLOCK as usize {
                    let place = get_u32(old.bytes(), half * BLOCK_SIZE / 2 + index / 2 * 4);
                    put_u32(block.bytes_mut(), index * 4, place);
                }
                self.replace(dir, table + 2 * at + half as u64, block)?;
            }
        }
        let changed = self.inode_mut(dir)?;
        changed.spare = (inode.table, blocks as u32);
        (changed.table, changed.depth) = (table as u32, inode.depth + 1);
        Ok(())
    }

    /// Splits the leaf that a hash leads to in two; the table must be deeper than it.
    fn split(&mut self, dir: u64, hash: u64, place: u64) -> Res<()> {
        let block = self.block(dir, 0, place)?;
        let leaf = self.leaf(dir, &block)?;
        let depth = leaf.depth + 1;
        let table_depth = self.inode(dir)?.depth;
        if depth > table_depth {
            return Err(self.corrupt("leaf of directory", dir));
        }
        let upper = self.new_place(dir)?;
        let goes_up = |entry: &Entry<'_>| entry.cookie >> (HASH_BITS - depth) & 1 == 1;
        let mut above = Block::zeroed();
        leaf::build(above.bytes_mut(), depth, leaf.entries().filter(goes_up));
        self.replace(dir, upper, above)?;
        let mut below = Block::zeroed();
        leaf::build(below.bytes_mut(), depth, leaf.entries().filter(|entry| !goes_up(entry)));
        self.replace(dir, place, below)?;
        let half = 1 << (table_depth - depth);
        let first = (prefix(hash, depth) | 1) * half;
        let table = u64::from(self.inode(dir)?.table);
        let mut index = first;
        while index < first + half {
            let bytes = self.modify(dir, 0, table + index / PER_BLOCK)?;
            let end = (first + half).min((index / PER_BLOCK + 1) * PER_BLOCK);
            for slot in index..end {
                put_u32(bytes, (slot % PER_BLOCK) as usize * 4, upper as u32);
            }
            index = end;
        }
        Ok(())
    }

    /// Removes a name that [`Self::find`] has found.
    pub fn remove_entry(&mut self, dir: u64, name: &[u8], found: Found) -> Res<()> {
        let place = self.place_of(dir, name)?;
        let bytes = self.modify(dir, 0, place)?;
        if leaf::remove(bytes, found.cookie).is_none() {
            return Err(self.corrupt("leaf of directory", dir));
        }
        let inode = self.inode_mut(dir)?;
        inode.entries = inode.entries.saturating_sub(1);
        Ok(())
    }

    /// Makes a name that [`Self::find`] has found lead to another inode.
    pub fn redirect_entry(&mut self, dir: u64, name: &[u8], found: Found, inode: u64, kind: u8) -> Res<()> {
        let place = self.place_of(dir, name)?;
        let bytes = self.modify(dir, 0, place)?;
        leaf::redirect(bytes, found.cookie, inode, kind).ok_or_else(|| self.corrupt("leaf of directory", dir))
    }

    fn place_of(&mut self, dir: u64, name: &[u8]) -> Res<u64> {
        let depth = self.inode(dir)?.depth;
        let hash = hash(self.fs.info.seed, name);
        self.leaf_place(dir, prefix(hash, depth))
    }

    /// Calls `visit` with the entries whose cookie is above `cookie`, in order, until it returns false. Says whether
    /// the end was reached.
    pub fn walk(&mut self, dir: u64, cookie: u64, mut visit: impl FnMut(Entry<'_>) -> bool) -> Res<bool> {
        let inode = self.inode(dir)?;
        if inode.size == 0 {
            return Ok(true);
        }
        let entries = 1 << inode.depth.min(DEPTH_MAX);
        let mut index = prefix(cookie.min((1 << HASH_BITS) - 1), inode.depth);
        let mut ahead = 0;
        while index < entries {
            if index >= ahead {
                ahead = self.read_ahead(dir, index, entries)?;
            }
            let place = self.leaf_place(dir, index)?;
            let block = self.block(dir, 0, place)?;
            let leaf = self.leaf(dir, &block)?;
            if leaf.depth > inode.depth {
                return Err(self.corrupt("leaf of directory", dir));
            }
            let within = prefix(index << (HASH_BITS - inode.depth.max(1)), leaf.depth);
            for entry in leaf.entries().filter(|entry| entry.cookie > cookie) {
                if inode.depth > 0 && prefix(entry.cookie, leaf.depth) != within {
                    return Err(self.corrupt("leaf of directory", dir));
                }
                if !visit(entry) {
                    return Ok(false);
                }
            }
            let step = 1 << (inode.depth - leaf.depth);
            index = (index / step + 1) * step;
        }
        Ok(true)
    }

    /// Has the next leaves in memory; returns the table index up to which.
    fn read_ahead(&mut self, dir: u64, first: u64, entries: u64) -> Res<u64> {
        let (mut index, mut last, mut leaves, mut missing) = (first, None, 0, false);
        while index < entries && leaves < LEAF_READ_AHEAD {
            let place = self.leaf_place(dir, index)?;
            index += 1;
            if last == Some(place) {
                continue;
            }
            last = Some(place);
            leaves += 1;
            match self.block(dir, 0, place) {
                Ok(_) => {}
                Err(Stop::Need) => missing = true,
                // Reported when the leaf's turn comes, if it does.
                Err(_) => break,
            }
        }
        if missing { Err(Stop::Need) } else { Ok(index) }
    }

    /// Whether the walk up from `dir` meets `inode`.
    pub fn is_below(&mut self, dir: u64, inode: u64) -> Res<bool> {
        /// Most directories above one another.
        const DIRS_DEEP_MAX: u32 = 4096;
        let mut at = dir;
        for _ in 0..DIRS_DEEP_MAX {
            if at == inode {
                return Ok(true);
            }
            if at == crate::inode::ROOT {
                return Ok(false);
            }
            let held = self.inode(at)?;
            if held.kind != Kind::File(fabric::fs::FileKind::Directory) {
                return Err(self.corrupt("parent of directory", at));
            }
            at = held.parent;
        }
        Err(Stop::Fail(Status::Invalid))
    }
}
