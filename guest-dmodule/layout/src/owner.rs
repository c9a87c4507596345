//! The ownership table on disk: two fixed blocks, written alternately and outside of consistency points, because
//! a compare-and-swap of an epoch lies inside the blackout of a port.
//!
//! Always true: an image is written over the older one of the two, so a torn write leaves the newer; a table
//! is only replaced in memory by who has made its image durable.
//!
//! Image: magic u32, version u32, sequence u64, count u32, zero u32, then records of 56 bytes {vm_id, epoch, session,
//! owner\[2\], heir\[2\] (zero: none)} in ascending order of vm_id, and the xxh3-64 of all bytes before it in the last 8
//! bytes. Version 1, which is still read, had records of 40 bytes, without the heir.
use crate::block::{BLOCK_SIZE, Block, BlockNumber, get_u32, get_u64, put_u32, put_u64};
use crate::error::LayoutError;
use fabric::{
    id::{Epoch, Owner, VmId},
    owner::{OwnerRecord, OwnerTable, VMS_MAX},
};
use xxhash_rust::xxh3::xxh3_64;

/// Where the two images are.
pub const OWNER_BLOCKS: [BlockNumber; 2] = [BlockNumber(2), BlockNumber(3)];

const MAGIC: u32 = u32::from_le_bytes(*b"OROW");
const VERSION: u32 = 2;
const HEADER: usize = 24;
const RECORD: usize = 56;
/// Bytes of a record of version 1.
const RECORD_1: usize = 40;
const HASH_AT: usize = BLOCK_SIZE - 8;
const _: () = assert!(HEADER + RECORD * VMS_MAX <= HASH_AT);

/// The table as it is on disk.
#[derive(Clone, Debug, Default)]
pub struct OwnerStore {
    table: OwnerTable,
    sequence: u64,
}

/// A table that is not durable yet: write `block` to `number`, flush, then [`OwnerStore::commit`].
#[derive(Debug)]
pub struct OwnerWrite {
    /// Where.
    pub number: BlockNumber,
    /// What.
    pub block: Block,
    next: OwnerStore,
}

impl OwnerStore {
    /// The newer valid one of the two images (the contents of [`OWNER_BLOCKS`]). An image that is whole and cannot be read is an
    /// error, whatever the other says: it may be the newer one. Neither valid is an error too: a new file system has one, and a
    /// torn write leaves the other; taken for empty, epochs would begin anew, and a VM that was ported away could write again.
    pub fn load(images: [&[u8]; 2]) -> Result<Self, LayoutError> {
        let [a, b] = images.map(decode);
        Ok(match (a?, b?) {
            (Some(a), Some(b)) => {
                if a.sequence >= b.sequence {
                    a
                } else {
                    b
                }
            }
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return Err(LayoutError::OwnersDamaged),
        })
    }

    /// The records.
    pub fn table(&self) -> &OwnerTable {
        &self.table
    }

    /// The image of another table, to be written next. The store stays as it is until [`Self::commit`]. One
    /// write at a time: the next is prepared after this one is committed or has failed.
    pub fn prepare(&self, table: OwnerTable) -> OwnerWrite {
        let next = OwnerStore { table, sequence: self.sequence + 1 };
        OwnerWrite { number: place(next.sequence), block: encode(&next), next }
    }

    /// The write is durable.
    pub fn commit(&mut self, write: OwnerWrite) {
        debug_assert_eq!(write.next.sequence, self.sequence + 1);
        *self = write.next;
    }
}

pub(crate) fn place(sequence: u64) -> BlockNumber {
    OWNER_BLOCKS[(sequence % 2) as usize]
}

fn encode(store: &OwnerStore) -> Block {
    let mut block = Block::zeroed();
    let bytes = block.bytes_mut();
    put_u32(bytes, 0, MAGIC);
    put_u32(bytes, 4, VERSION);
    put_u64(bytes, 8, store.sequence);
    let mut at = HEADER;
    let mut count = 0;
    for (record, heir) in store.table.entries().take(VMS_MAX) {
        let heir = heir.unwrap_or_default();
        put_u64(bytes, at, record.vm_id.0);
        put_u64(bytes, at + 8, record.epoch.0);
        put_u64(bytes, at + 16, record.session.0);
        put_u64(bytes, at + 24, record.owner.0[0]);
        put_u64(bytes, at + 32, record.owner.0[1]);
        put_u64(bytes, at + 40, heir.0[0]);
        put_u64(bytes, at + 48, heir.0[1]);
        at += RECORD;
        count += 1;
    }
    put_u32(bytes, 16, count);
    let hash = xxh3_64(&bytes[..HASH_AT]);
    put_u64(bytes, HASH_AT, hash);
    block
}

/// `None`: torn, damaged, or never written.
fn decode(bytes: &[u8]) -> Result<Option<OwnerStore>, LayoutError> {
    if bytes.len() != BLOCK_SIZE || get_u32(bytes, 0) != MAGIC || get_u64(bytes, HASH_AT) != xxh3_64(&bytes[..HASH_AT])
    {
        return Ok(None);
    }
    let size = match get_u32(bytes, 4) {
        1 => RECORD_1,
        VERSION => RECORD,
        other => return Err(LayoutError::OwnersVersion(other)),
    };
    let count = get_u32(bytes, 16) as usize;
    if count > VMS_MAX {
        return Err(LayoutError::Owners("too many records"));
    }
    let mut table = OwnerTable::default();
    for index in 0..count {
        let at = HEADER + index * size;
        let record = OwnerRecord {
            vm_id: VmId(get_u64(bytes, at)),
            epoch: Epoch(get_u64(bytes, at + 8)),
            session: Epoch(get_u64(bytes, at + 16)),
            owner: Owner([get_u64(bytes, at + 24), get_u64(bytes, at + 32)]),
        };
        table.set(record).map_err(|_| LayoutError::Owners("a record of VM 0"))?;
        if size == RECORD {
            let heir = Owner([get_u64(bytes, at + 40), get_u64(bytes, at + 48)]);
            table.set_heir(record.vm_id, (heir != Owner::default()).then_some(heir));
        }
    }
    Ok(Some(OwnerStore { table, sequence: get_u64(bytes, 8) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(epoch: u64) -> OwnerTable {
        let mut table = OwnerTable::default();
        let record = OwnerRecord { vm_id: VmId(7), epoch: Epoch(epoch), session: Epoch(1), owner: Owner([3, epoch]) };
        table.set(record).unwrap();
        table
    }

    #[test]
    fn survives_a_torn_write_at_every_sector() {
        // As a new file system has it.
        let mut disk = [Block::zeroed(), Block::zeroed()];
        let first = OwnerStore::default().prepare(OwnerTable::default());
        disk[(first.number.0 - 2) as usize] = first.block;
        let mut store = OwnerStore::load([disk[0].as_ref(), disk[1].as_ref()]).unwrap();
        for epoch in 1..20 {
            let write = store.prepare(table(epoch));
            let slot = (write.number.0 - 2) as usize;
            for sectors in 0..8 {
                let mut torn = disk.clone();
                torn[slot].bytes_mut()[..sectors * 512].copy_from_slice(&write.block.bytes()[..sectors * 512]);
                let found = OwnerStore::load([torn[0].as_ref(), torn[1].as_ref()]).unwrap();
                assert_eq!(found.table(), store.table(), "epoch {epoch}, {sectors} sectors");
            }
            disk[slot] = write.block.clone();
            store.commit(write);
            let found = OwnerStore::load([disk[0].as_ref(), disk[1].as_ref()]).unwrap();
            assert_eq!(found.table(), &table(epoch));
        }
    }

    #[test]
    fn the_largest_table_fits_and_garbage_is_refused() {
        let mut full = OwnerTable::default();
        for vm in 1..=VMS_MAX as u64 {
            let record = OwnerRecord { vm_id: VmId(vm), epoch: Epoch(vm), session: Epoch(1), owner: Owner([vm, 9]) };
            full.set(record).unwrap();
            full.set_heir(VmId(vm), (vm % 2 == 0).then_some(Owner([vm, 10])));
        }
        let write = OwnerStore::default().prepare(full.clone());
        assert_eq!(OwnerStore::load([write.block.as_ref(), &[0xff; BLOCK_SIZE]]).unwrap().table(), &full);
        let mut bad = write.block.clone();
        bad.bytes_mut()[30] ^= 1;
        for other in [&[][..], &[0; BLOCK_SIZE], bad.as_ref()] {
            assert_eq!(OwnerStore::load([bad.as_ref(), other]).unwrap_err(), LayoutError::OwnersDamaged);
        }
    }

    #[test]
    fn a_table_of_version_1_is_read() {
        let mut block = Block::zeroed();
        let bytes = block.bytes_mut();
        put_u32(bytes, 0, MAGIC);
        put_u32(bytes, 4, 1);
        put_u64(bytes, 8, 9);
        put_u32(bytes, 16, 1);
        for (i, value) in [7, 5, 1, 3, 5].into_iter().enumerate() {
            put_u64(bytes, HEADER + 8 * i, value);
        }
        let hash = xxh3_64(&bytes[..HASH_AT]);
        put_u64(bytes, HASH_AT, hash);
        assert_eq!(OwnerStore::load([block.as_ref(), &[]]).unwrap().table(), &table(5));
    }

    #[test]
    fn a_whole_table_that_cannot_be_read_is_refused() {
        let known = OwnerStore::default().prepare(table(5)).block;
        let changed = |at: usize, value: u32| {
            let mut block = known.clone();
            let bytes = block.bytes_mut();
            put_u32(bytes, at, value);
            let hash = xxh3_64(&bytes[..HASH_AT]);
            put_u64(bytes, HASH_AT, hash);
            block
        };
        let cases = [
            (changed(4, VERSION + 1), LayoutError::OwnersVersion(VERSION + 1)),
            (changed(4, 0), LayoutError::OwnersVersion(0)),
            (changed(16, VMS_MAX as u32 + 1), LayoutError::Owners("too many records")),
            (changed(HEADER, 0), LayoutError::Owners("a record of VM 0")),
        ];
        for (block, why) in cases {
            // Alone, and beside one that can be read, which may be the older one.
            for other in [&[][..], known.as_ref()] {
                assert_eq!(OwnerStore::load([block.as_ref(), other]).unwrap_err(), why);
                assert_eq!(OwnerStore::load([other, block.as_ref()]).unwrap_err(), why);
            }
            // Torn it is no table at all.
            let mut torn = block.clone();
            torn.bytes_mut()[40] ^= 1;
            assert_eq!(OwnerStore::load([torn.as_ref(), known.as_ref()]).unwrap().table(), &table(5));
        }
    }
}
