//! The ownership table on disk: the records changed last in two fixed blocks (the *journal*), all others in a file of the
//! volume.
//!
//! A compare-and-swap of an epoch lies inside the blackout of a port, so a change costs one block and a flush, outside of
//! consistency points, however many VMs there are: an image of the journal is written over the older one of the two. When the
//! journal has [`SETTLE_AT`] records they are put into the file (`owner_file.rs`) like any other change of the file
//! system, and leave the journal when the consistency point that holds them is durable.
//!
//! Always true:
//! - a torn write of an image leaves the newer one, whole;
//! - a record is in the journal as long as the durable consistency point has it otherwise than it is; an image says
//!   which point that is, and is refused beside an older one: epochs would go back;
//! - a record with an heir stays in the journal, so that the heir's compare-and-swap never waits for room in it;
//! - the table is only changed in memory by who has made the image durable.
//!
//! Image: magic u32, version u32, sequence u64, count u32, zero u32, consistency point u64, floor u64, then entries of 56
//! bytes {vm_id, epoch, session, owner\[2\], heir\[2\] (zero: none)} in ascending order of vm_id, an epoch of 0 meaning that the
//! record is released, and the xxh3-64 of all bytes before it in the last 8 bytes. Versions 1 and 2, which are still read, had
//! all records, at most 64, from byte 24 on, neither consistency point nor floor, and version 1 no heirs (40 bytes).
use crate::block::{BLOCK_SIZE, Block, BlockNumber, get_u32, get_u64, put_u32, put_u64};
use crate::consistency::CpNumber;
use crate::error::LayoutError;
use crate::owner_file::{PLACES, PlacedRecord};
use alloc::{
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};
use fabric::{
    id::{Epoch, Owner, VmId},
    owner::{OwnerChange, OwnerRecord, OwnerTable, VMS_MAX},
};
use xxhash_rust::xxh3::xxh3_64;

/// Where the two images are.
pub const OWNER_BLOCKS: [BlockNumber; 2] = [BlockNumber(2), BlockNumber(3)];
/// Most records in the journal.
pub const JOURNAL_MAX: usize = 72;
/// Records in the journal at which those that can are put into the file.
pub const SETTLE_AT: usize = 32;

const MAGIC: u32 = u32::from_le_bytes(*b"OROW");
const VERSION: u32 = 3;
const HEADER: usize = 40;
const RECORD: usize = 56;
const HASH_AT: usize = BLOCK_SIZE - 8;
/// Of versions 1 and 2.
const HEADER_2: usize = 24;
const RECORD_1: usize = 40;
const RECORDS_2: usize = 64;
const _: () = assert!(HEADER + RECORD * JOURNAL_MAX <= HASH_AT && RECORDS_2 <= JOURNAL_MAX);
// There is a place for every record, and for every one released whose place is not free yet.
const _: () = assert!(VMS_MAX + JOURNAL_MAX <= PLACES);

/// The newer image of the journal, as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerJournal {
    version: u32,
    sequence: u64,
    /// The consistency point whose file has all other records.
    base: CpNumber,
    floor: Epoch,
    entries: Vec<OwnerChange>,
}

impl OwnerJournal {
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
}

/// The table as it is on disk.
#[derive(Clone, Debug, Default)]
pub struct OwnerStore {
    table: OwnerTable,
    /// Whose records are in the journal; who is not in the table is released.
    journal: BTreeSet<VmId>,
    /// Who has which place in the file.
    places: BTreeMap<VmId, u32>,
    sequence: u64,
    base: CpNumber,
    /// In the file as of a consistency point that is not durable yet.
    settling: Option<(CpNumber, Vec<PlacedRecord>)>,
    /// The images are of an older version, or say what is not to be known any more.
    old: bool,
}

/// An image that is not durable yet: write `block` to `number`, flush, then [`OwnerStore::commit`].
#[derive(Debug)]
pub struct OwnerWrite {
    /// Where.
    pub number: BlockNumber,
    /// What.
    pub block: Block,
    sequence: u64,
    change: Option<OwnerChange>,
}

impl OwnerStore {
    /// Without records; no epoch up to `floor` will be given.
    fn empty(floor: Epoch) -> Self {
        OwnerStore { table: OwnerTable::above(floor), ..OwnerStore::default() }
    }

    /// Nothing is known, but that no VM that had an epoch runs: no records, and above this floor it begins anew. To be made
    /// durable by [`Self::upgrade`].
    pub fn forgotten(journal: Option<&OwnerJournal>, floor: Epoch) -> Self {
        let (sequence, former) = journal.map_or((0, Epoch::UNCLAIMED), |j| (j.sequence, j.floor));
        OwnerStore { sequence, old: true, ..OwnerStore::empty(former.max(floor)) }
    }

    /// From the journal and the records in the file, of a file system mounted at this consistency point.
    pub fn new(journal: OwnerJournal, placed: &[PlacedRecord], mounted: CpNumber) -> Result<Self, LayoutError> {
        if journal.base > mounted {
            return Err(LayoutError::OwnersAhead { journal: journal.base.0, volume: mounted.0 });
        }
        let mut store = OwnerStore::empty(journal.floor);
        for PlacedRecord { vm_id, place, record } in placed {
            let (Some(place), Some(record)) = (place, record) else { continue };
            if store.places.insert(*vm_id, *place).is_some() {
                return Err(LayoutError::Owners("a VM has two records"));
            }
            store.table.apply(&OwnerChange::Set(*record, None));
        }
        for entry in &journal.entries {
            store.journal.insert(entry.vm_id());
            // A newer record in the file: the newest image has rotted, and this is the one before.
            let older = match entry {
                OwnerChange::Set(record, _) => store.table.get(record.vm_id).is_some_and(|r| r.epoch > record.epoch),
                OwnerChange::Release(..) => false,
            };
            if !older {
                store.table.apply(entry);
            }
        }
        if store.table.len() > VMS_MAX {
            return Err(LayoutError::Owners("too many records"));
        }
        store.sequence = journal.sequence;
        store.base = journal.base;
        store.old = journal.version < VERSION;
        Ok(store)
    }

    /// The records.
    pub fn table(&self) -> &OwnerTable {
        &self.table
    }

    /// The image with a change, to be written next; `None`: the journal is full, and [`Self::to_settle`] says what is to be put
    /// into the file first. The store stays as it is until [`Self::commit`]. One write at a time: the next is prepared after
    /// this one is committed or has failed.
    pub fn prepare(&self, change: OwnerChange) -> Option<OwnerWrite> {
        let room = self.journal.contains(&change.vm_id()) || self.journal.len() < JOURNAL_MAX;
        room.then(|| self.image(Some(change)))
    }

    /// The image to replace one of an older version with, or one that was forgotten, to be written before anything else, so that whoever only
    /// knows that does not take its part of the records for all.
    pub fn upgrade(&self) -> Option<OwnerWrite> {
        self.old.then(|| self.image(None))
    }

    /// The image as it is, for a new file system.
    pub(crate) fn image(&self, change: Option<OwnerChange>) -> OwnerWrite {
        let sequence = self.sequence + 1;
        OwnerWrite { number: place(sequence), block: self.encode(sequence, change), sequence, change }
    }

    /// The write is durable.
    pub fn commit(&mut self, write: OwnerWrite) {
        debug_assert_eq!(write.sequence, self.sequence + 1);
        self.sequence = write.sequence;
        self.old = false;
        if let Some(change) = write.change {
            self.journal.insert(change.vm_id());
            self.table.apply(&change);
        }
    }

    /// What is to be put into the file now, if the journal is filling up; then [`Self::settling`].
    pub fn to_settle(&self) -> Option<Vec<PlacedRecord>> {
        // Those with an heir are all in the journal.
        let only_heirs = self.journal.len() <= self.table.heirs();
        if self.settling.is_some() || self.journal.len() < SETTLE_AT || only_heirs {
            return None;
        }
        let taken: BTreeSet<u32> = self.places.values().copied().collect();
        let mut free = (0..PLACES as u32).filter(|place| !taken.contains(place));
        let settle = |vm_id: &VmId| {
            let record = self.table.get(*vm_id);
            let place = self.places.get(vm_id).copied().or_else(|| record.and_then(|_| free.next()));
            PlacedRecord { vm_id: *vm_id, place, record }
        };
        Some(self.journal.iter().filter(|vm_id| self.table.heir(**vm_id).is_none()).map(settle).collect())
    }

    /// Whether there is something in the file that waits for a consistency point.
    pub fn is_settling(&self) -> bool {
        self.settling.is_some()
    }

    /// They are in the file as of this consistency point.
    pub fn settling(&mut self, at: CpNumber, records: Vec<PlacedRecord>) {
        self.settling = Some((at, records));
    }

    /// This consistency point is durable: what it has in the file, and has not changed since, is not needed in the journal.
    pub fn settled(&mut self, durable: CpNumber) {
        let Some((at, records)) = self.settling.take_if(|(at, _)| *at <= durable) else { return };
        for PlacedRecord { vm_id, place, record } in records {
            match (place, record) {
                (Some(place), Some(_)) => self.places.insert(vm_id, place),
                _ => self.places.remove(&vm_id),
            };
            if self.table.get(vm_id) == record && self.table.heir(vm_id).is_none() {
                self.journal.remove(&vm_id);
            }
        }
        self.base = at;
    }

    fn encode(&self, sequence: u64, change: Option<OwnerChange>) -> Block {
        let changed = change.map(|c| c.vm_id());
        let mut floor = self.table.floor();
        if let Some(OwnerChange::Release(vm_id, epoch)) = change {
            floor = floor.max(self.table.get(vm_id).map_or(epoch, |r| r.epoch.max(epoch)));
        }
        let mut block = Block::zeroed();
        let bytes = block.bytes_mut();
        put_u32(bytes, 0, MAGIC);
        put_u32(bytes, 4, VERSION);
        put_u64(bytes, 8, sequence);
        put_u64(bytes, 24, self.base.0);
        put_u64(bytes, 32, floor.0);
        let mut vms = self.journal.clone();
        vms.extend(changed);
        for (index, vm_id) in vms.iter().take(JOURNAL_MAX).enumerate() {
            let entry = match change.filter(|c| c.vm_id() == *vm_id) {
                Some(change) => change,
                None => match self.table.get(*vm_id) {
                    Some(record) => OwnerChange::Set(record, self.table.heir(*vm_id)),
                    None => OwnerChange::Release(*vm_id, Epoch::UNCLAIMED),
                },
            };
            put_entry(bytes, HEADER + index * RECORD, &entry);
        }
        put_u32(bytes, 16, vms.len() as u32);
        let hash = xxh3_64(&bytes[..HASH_AT]);
        put_u64(bytes, HASH_AT, hash);
        block
    }
}

pub(crate) fn place(sequence: u64) -> BlockNumber {
    OWNER_BLOCKS[(sequence % 2) as usize]
}

fn put_entry(bytes: &mut [u8; BLOCK_SIZE], at: usize, entry: &OwnerChange) {
    let (record, heir) = match *entry {
        OwnerChange::Set(record, heir) => (record, heir.unwrap_or_default()),
        OwnerChange::Release(vm_id, _) => (OwnerRecord { vm_id, ..OwnerRecord::default() }, Owner::default()),
    };
    put_record(bytes, at, &record);
    put_u64(bytes, at + 40, heir.0[0]);
    put_u64(bytes, at + 48, heir.0[1]);
}

/// The 40 bytes of a record.
pub(crate) fn put_record(bytes: &mut [u8; BLOCK_SIZE], at: usize, record: &OwnerRecord) {
    put_u64(bytes, at, record.vm_id.0);
    put_u64(bytes, at + 8, record.epoch.0);
    put_u64(bytes, at + 16, record.session.0);
    put_u64(bytes, at + 24, record.owner.0[0]);
    put_u64(bytes, at + 32, record.owner.0[1]);
}

pub(crate) fn get_record(bytes: &[u8], at: usize) -> OwnerRecord {
    OwnerRecord {
        vm_id: VmId(get_u64(bytes, at)),
        epoch: Epoch(get_u64(bytes, at + 8)),
        session: Epoch(get_u64(bytes, at + 16)),
        owner: Owner([get_u64(bytes, at + 24), get_u64(bytes, at + 32)]),
    }
}

/// Whether a record can be: of a VM, with a session that began at one of its epochs.
pub(crate) fn is_possible(record: &OwnerRecord) -> bool {
    record.vm_id.0 != 0 && record.session.0 != 0 && record.session <= record.epoch
}

/// `None`: torn, damaged, or never written.
fn decode(bytes: &[u8]) -> Result<Option<OwnerJournal>, LayoutError> {
    if bytes.len() != BLOCK_SIZE || get_u32(bytes, 0) != MAGIC || get_u64(bytes, HASH_AT) != xxh3_64(&bytes[..HASH_AT])
    {
        return Ok(None);
    }
    let version = get_u32(bytes, 4);
    let (header, size, most) = match version {
        1 => (HEADER_2, RECORD_1, RECORDS_2),
        2 => (HEADER_2, RECORD, RECORDS_2),
        VERSION => (HEADER, RECORD, JOURNAL_MAX),
        other => return Err(LayoutError::OwnersVersion(other)),
    };
    let count = get_u32(bytes, 16) as usize;
    if count > most {
        return Err(LayoutError::Owners("too many records"));
    }
    let mut entries: Vec<OwnerChange> = Vec::with_capacity(count);
    for at in (0..count).map(|index| header + index * size) {
        let record = get_record(bytes, at);
        let heir = if size == RECORD { [get_u64(bytes, at + 40), get_u64(bytes, at + 48)] } else { [0; 2] };
        if record.vm_id.0 == 0 {
            return Err(LayoutError::Owners("a record of VM 0"));
        }
        if entries.last().is_some_and(|last| last.vm_id() >= record.vm_id) {
            return Err(LayoutError::Owners("records out of order"));
        }
        let released = OwnerRecord { vm_id: record.vm_id, ..OwnerRecord::default() };
        entries.push(if version == VERSION && record == released && heir == [0; 2] {
            // Its epoch is in the floor.
            OwnerChange::Release(record.vm_id, Epoch::UNCLAIMED)
        } else if is_possible(&record) {
            OwnerChange::Set(record, (heir != [0; 2]).then_some(Owner(heir)))
        } else {
            return Err(LayoutError::Owners("a session of no epoch"));
        });
    }
    let (base, floor) = if version == VERSION { (get_u64(bytes, 24), get_u64(bytes, 32)) } else { (0, 0) };
    let sequence = get_u64(bytes, 8);
    Ok(Some(OwnerJournal { version, sequence, base: CpNumber(base), floor: Epoch(floor), entries }))
}

#[cfg(test)]
mod tests;
