//! Which inodes are in use: a bit for each in a file. A number is taken again with the next generation, which the
//! inode's slot keeps, so no two files ever have the same handle.
use crate::block::get_u64;
use crate::fsinfo::MAP_BITS;
use crate::inode::{FIRST_INODE, INODE_MAP, Inode, Kind};
use crate::txn::{Res, Stop, Txn};
use fabric::fs::Status;

/// Inodes only for orphans: a file can be truncated when no other can be created.
pub(crate) const ORPHANS_RESERVED: u64 = 16;
/// Blocks of the inode map read at once in search of a free inode.
const READ_AHEAD: u64 = 16;

impl Txn<'_> {
    /// Takes an inode: its number. The slot keeps only the generation, one more than before.
    pub fn take_inode(&mut self, kind: Kind) -> Res<u64> {
        let number = self.free_inode(if kind == Kind::Orphan { 0 } else { ORPHANS_RESERVED })?;
        let bytes = self.modify(INODE_MAP, 0, number / MAP_BITS)?;
        bytes[(number % MAP_BITS / 8) as usize] |= 1 << (number % 8);
        self.counters.inodes_used += 1;
        self.counters.inode_hint = number + 1;
        let inode = self.inode_mut(number)?;
        if inode.kind != Kind::Free {
            return Err(self.corrupt("inode marked free", number));
        }
        *inode = Inode { kind, generation: inode.generation.wrapping_add(1).max(1), ..Inode::FREE };
        Ok(number)
    }

    fn free_inode(&mut self, reserved: u64) -> Res<u64> {
        let max = self.fs.info.inodes_max;
        if self.counters.inodes_used + FIRST_INODE + reserved >= max {
            // Orphans that will soon be gone count as well.
            return Err(if self.fs.has_work() { Stop::Busy } else { Stop::Fail(Status::NoSpace) });
        }
        let maps = max.div_ceil(MAP_BITS);
        let hint = self.counters.inode_hint.clamp(FIRST_INODE, max - 1);
        for step in 0..=maps {
            let map = (hint / MAP_BITS + step) % maps;
            // The block of the hint is searched from the hint, and once more from its beginning at last.
            let from = if step == 0 { hint % MAP_BITS } else { 0 };
            let block = match self.block(INODE_MAP, 0, map) {
                Ok(None) => return Ok((map * MAP_BITS + from).max(FIRST_INODE)),
                Ok(Some(block)) => block,
                Err(stop) => {
                    for ahead in 1..READ_AHEAD.min(maps) {
                        // Only to have what is missing on the list.
                        let _ = self.block(INODE_MAP, 0, (map + ahead) % maps);
                    }
                    return Err(stop);
                }
            };
            let mut bit = from;
            while bit < MAP_BITS {
                let word = get_u64(block.bytes(), (bit / 64 * 8) as usize);
                let free = !word & (u64::MAX << (bit % 64));
                let number = map * MAP_BITS + bit / 64 * 64 + u64::from(free.trailing_zeros());
                if free != 0 && number >= FIRST_INODE && number < max {
                    return Ok(number);
                }
                let reserved = free != 0 && number < FIRST_INODE;
                bit = if reserved { bit + 1 } else { (bit / 64 + 1) * 64 };
            }
        }
        Err(Stop::Fail(Status::NoSpace))
    }

    /// Gives an inode back. Its tree must be empty.
    pub fn give_inode(&mut self, number: u64) -> Res<()> {
        let bytes = self.modify(INODE_MAP, 0, number / MAP_BITS)?;
        bytes[(number % MAP_BITS / 8) as usize] &= !(1 << (number % 8));
        self.counters.inodes_used = self.counters.inodes_used.saturating_sub(1);
        self.counters.inode_hint = self.counters.inode_hint.min(number);
        let inode = self.inode_mut(number)?;
        *inode = Inode { generation: inode.generation, ..Inode::FREE };
        Ok(())
    }
}
