//! Clean blocks in memory, by their place on disk, with a bound; evicted by the clock rule.
//!
//! Always true: a block here has the hash its number is filed with; a block that a consistency point is still writing
//! is not evicted (the disk does not have it yet). Everything here can be thrown away and read again.
use crate::block::{Block, BlockPointer};
use alloc::vec::Vec;
use hashbrown::HashMap;

struct Slot {
    pointer: BlockPointer,
    block: Block,
    /// Consistency point that writes it; evictable once that is durable.
    written_by: u64,
    referenced: bool,
}

/// Slots looked at in search of a victim while the cache is not far above its size.
const SWEEP: usize = 64;

pub(crate) struct Cache {
    slots: Vec<Slot>,
    index: HashMap<u64, usize>,
    hand: usize,
    capacity: usize,
    /// Buffers let go of that nobody else has, to be used again: memory already touched, no allocation.
    spare: Vec<Block>,
    spare_max: usize,
}

impl Cache {
    /// Holds `capacity` blocks, and besides up to `spare_max` unused buffers.
    pub fn new(capacity: usize, spare_max: usize) -> Self {
        Cache {
            slots: Vec::new(),
            index: HashMap::new(),
            hand: 0,
            capacity: capacity.max(1),
            spare: Vec::new(),
            spare_max,
        }
    }

    /// A block that begins with `bytes` and is zero behind them.
    pub fn new_block(&mut self, bytes: &[u8]) -> Block {
        if let Some(mut block) = self.spare.pop()
            && let Some(buf) = block.bytes_unshared()
        {
            let length = bytes.len().min(buf.len());
            buf[..length].copy_from_slice(&bytes[..length]);
            buf[length..].fill(0);
            return block;
        }
        Block::from_prefix(bytes)
    }

    fn recycle(&mut self, mut block: Block) {
        if self.spare.len() < self.spare_max && block.bytes_unshared().is_some() {
            self.spare.push(block);
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn get(&mut self, pointer: BlockPointer) -> Option<&Block> {
        let slot = &mut self.slots[*self.index.get(&pointer.block)?];
        if slot.pointer.hash != pointer.hash {
            return None;
        }
        slot.referenced = true;
        Some(&slot.block)
    }

    pub fn contains(&self, number: u64) -> bool {
        self.index.contains_key(&number)
    }

    pub fn insert(&mut self, pointer: BlockPointer, block: Block, written_by: u64, durable: u64) {
        let slot = Slot { pointer, block, written_by, referenced: true };
        if let Some(at) = self.index.get(&pointer.block).copied() {
            let old = core::mem::replace(&mut self.slots[at], slot);
            self.recycle(old.block);
            return;
        }
        if self.slots.len() < self.capacity {
            self.push(slot);
            return;
        }
        match self.victim(durable) {
            Some(at) => {
                self.index.remove(&self.slots[at].pointer.block);
                self.index.insert(pointer.block, at);
                let old = core::mem::replace(&mut self.slots[at], slot);
                self.recycle(old.block);
                // Above its size because all was pinned for a while: shrink again.
                if self.slots.len() > self.capacity
                    && let Some(at) = self.victim(durable)
                {
                    self.take(at);
                }
            }
            None => self.push(slot),
        }
    }

    pub fn remove(&mut self, number: u64) {
        if let Some(at) = self.index.get(&number).copied() {
            self.take(at);
        }
    }

    fn push(&mut self, slot: Slot) {
        self.index.insert(slot.pointer.block, self.slots.len());
        self.slots.push(slot);
    }

    fn take(&mut self, at: usize) {
        let slot = self.slots.swap_remove(at);
        self.index.remove(&slot.pointer.block);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.pointer.block, at);
        }
        self.recycle(slot.block);
    }

    fn victim(&mut self, durable: u64) -> Option<usize> {
        let steps = if self.slots.len() < self.capacity + self.capacity / 2 { SWEEP } else { 2 * self.slots.len() };
        for _ in 0..steps {
            self.hand = if self.hand + 1 >= self.slots.len() { 0 } else { self.hand + 1 };
            let slot = &mut self.slots[self.hand];
            if slot.written_by > durable {
                continue;
            }
            if !slot.referenced {
                return Some(self.hand);
            }
            slot.referenced = false;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer(block: u64) -> BlockPointer {
        BlockPointer { block, hash: block * 3 }
    }

    #[test]
    fn stays_within_its_bound_and_keeps_what_is_being_written() {
        let mut cache = Cache::new(100, 10);
        for block in 1..=50 {
            cache.insert(pointer(block), Block::zeroed(), 7, 6);
        }
        for block in 51..=1000 {
            cache.insert(pointer(block), Block::zeroed(), 0, 6);
        }
        assert!(cache.len() <= 150, "{}", cache.len());
        assert!((1..=50).all(|block| cache.get(pointer(block)).is_some()));
        for block in 1001..=3000 {
            cache.insert(pointer(block), Block::zeroed(), 0, 7);
        }
        assert_eq!(cache.len(), 100);
        assert!((1..=50).all(|block| cache.get(pointer(block)).is_none()));
        assert!(cache.get(BlockPointer { block: 3000, hash: 1 }).is_none());
    }
}
