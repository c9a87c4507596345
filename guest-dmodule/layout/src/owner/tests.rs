use super::*;
use crate::block::Block;
use alloc::vec;
use fabric::owner::claim;

fn record(vm: u64, epoch: u64) -> OwnerRecord {
    OwnerRecord { vm_id: VmId(vm), epoch: Epoch(epoch), session: Epoch(1), owner: Owner([3, epoch]) }
}

fn set(vm: u64, epoch: u64) -> OwnerChange {
    OwnerChange::Set(record(vm, epoch), None)
}

/// The two blocks.
type Images = [Block; 2];

fn new_disk() -> Images {
    let mut disk = [Block::zeroed(), Block::zeroed()];
    put(&mut disk, &OwnerStore::default().image(None));
    disk
}

fn put(disk: &mut Images, write: &OwnerWrite) {
    disk[(write.number.0 - 2) as usize] = write.block.clone();
}

fn load(disk: &Images) -> Result<OwnerJournal, LayoutError> {
    OwnerJournal::load([disk[0].as_ref(), disk[1].as_ref()])
}

/// As it is found with this in the file, at this consistency point.
fn found(disk: &Images, file: &[PlacedRecord], at: u64) -> Result<OwnerStore, LayoutError> {
    OwnerStore::new(load(disk)?, file, CpNumber(at))
}

fn sealed(block: &Block, change: impl FnOnce(&mut [u8; BLOCK_SIZE])) -> Block {
    let mut block = block.clone();
    let bytes = block.bytes_mut();
    change(bytes);
    let hash = xxh3_64(&bytes[..HASH_AT]);
    put_u64(bytes, HASH_AT, hash);
    block
}

fn change(disk: &mut Images, store: &mut OwnerStore, change: OwnerChange) {
    let write = store.prepare(change).unwrap();
    put(disk, &write);
    store.commit(write);
}

#[test]
fn survives_a_torn_write_at_every_sector() {
    let mut disk = new_disk();
    let mut store = found(&disk, &[], 1).unwrap();
    for epoch in 1..20 {
        let write = store
            .prepare(if epoch % 5 == 0 { OwnerChange::Release(VmId(7), Epoch::UNCLAIMED) } else { set(7, epoch) })
            .unwrap();
        let slot = (write.number.0 - 2) as usize;
        for sectors in 0..8 {
            let mut torn = disk.clone();
            torn[slot].bytes_mut()[..sectors * 512].copy_from_slice(&write.block.bytes()[..sectors * 512]);
            let found = found(&torn, &[], 1).unwrap();
            assert_eq!(found.table(), store.table(), "epoch {epoch}, {sectors} sectors");
        }
        put(&mut disk, &write);
        store.commit(write);
        assert_eq!(found(&disk, &[], 1).unwrap().table(), store.table());
    }
    assert_eq!(store.table().floor(), Epoch(14));
}

/// The D-module gave an epoch whose record the disk did not take, and the VM was released at it.
#[test]
fn an_epoch_that_was_never_written_does_not_come_again_after_its_release() {
    let mut disk = new_disk();
    let mut store = found(&disk, &[], 1).unwrap();
    change(&mut disk, &mut store, set(7, 4));
    change(&mut disk, &mut store, OwnerChange::Release(VmId(7), Epoch(5)));
    assert_eq!(store.table().floor(), Epoch(5));
    assert_eq!(found(&disk, &[], 1).unwrap().table().floor(), Epoch(5));
}

#[test]
fn the_bytes_of_version_3() {
    let mut store = OwnerStore::empty(Epoch(0x51));
    store.base = CpNumber(9);
    store.table.apply(&OwnerChange::Set(OwnerRecord { session: Epoch(4), ..record(5, 6) }, Some(Owner([7, 8]))));
    store.table.apply(&set(6, 0x99));
    store.journal = [VmId(5), VmId(6)].into();
    let write = store.prepare(OwnerChange::Release(VmId(6), Epoch::UNCLAIMED)).unwrap();
    assert_eq!(write.number, BlockNumber(3));
    let bytes = write.block.bytes();
    assert_eq!(bytes[..8], *b"OROW\x03\0\0\0");
    let numbers: Vec<u64> = (8..HASH_AT).step_by(8).map(|at| get_u64(bytes, at)).collect();
    // Sequence, count, consistency point, floor; a record with its heir; one released.
    assert_eq!(numbers[..4], [1, 2, 9, 0x99]);
    assert_eq!(numbers[4..18], [5, 6, 4, 3, 6, 7, 8, 6, 0, 0, 0, 0, 0, 0]);
    assert!(numbers[18..].iter().all(|n| *n == 0));
    assert_eq!(get_u64(bytes, HASH_AT), xxh3_64(&bytes[..HASH_AT]));
    store.commit(write);
    let mut disk = [Block::zeroed(), Block::zeroed()];
    disk[0] = store.image(None).block;
    assert_eq!(found(&disk, &[], 9).unwrap().table(), store.table());
}

/// An image of version 1 or 2 with one record, and its heir in version 2.
fn old(version: u32) -> Block {
    sealed(&Block::zeroed(), |bytes| {
        put_u32(bytes, 0, MAGIC);
        put_u32(bytes, 4, version);
        put_u64(bytes, 8, 9);
        put_u32(bytes, 16, 1);
        let record = [7, 5, 1, 3, 5, 21, 22];
        for (i, value) in record.into_iter().take(if version == 1 { 5 } else { 7 }).enumerate() {
            put_u64(bytes, HEADER_2 + 8 * i, value);
        }
    })
}

#[test]
fn older_versions_are_read_and_replaced() {
    for version in [1, 2] {
        let mut disk = [old(version), Block::zeroed()];
        let mut store = found(&disk, &[], 4).unwrap();
        assert_eq!(store.table().get(VmId(7)), Some(record(7, 5)));
        assert_eq!(store.table().heir(VmId(7)), (version == 2).then_some(Owner([21, 22])));
        let write = store.upgrade().unwrap();
        assert_eq!(write.number, place(10));
        put(&mut disk, &write);
        store.commit(write);
        assert!(store.upgrade().is_none());
        assert_eq!(load(&disk).unwrap().version, VERSION);
        assert_eq!(found(&disk, &[], 4).unwrap().table(), store.table());
    }
    assert!(found(&new_disk(), &[], 1).unwrap().upgrade().is_none());
}

#[test]
fn a_journal_that_fills_up_is_put_into_the_file() {
    let mut disk = new_disk();
    let mut store = found(&disk, &[], 1).unwrap();
    for vm in 1..=JOURNAL_MAX as u64 {
        assert_eq!(store.to_settle().is_some(), vm > SETTLE_AT as u64);
        change(&mut disk, &mut store, set(vm, vm));
    }
    change(&mut disk, &mut store, OwnerChange::Set(record(3, 4), Some(Owner([1, 2]))));
    change(&mut disk, &mut store, OwnerChange::Release(VmId(4), Epoch::UNCLAIMED));
    assert!(store.prepare(set(500, 1)).is_none(), "full");
    assert!(store.prepare(set(3, 5)).is_some(), "not for who is in it");
    let file = store.to_settle().unwrap();
    // The one with an heir stays; the one that was never in the file needs no place.
    assert_eq!(file.len(), JOURNAL_MAX - 1);
    assert_eq!(file[2], PlacedRecord { vm_id: VmId(4), place: None, record: None });
    store.settling(CpNumber(8), file.clone());
    assert!(store.to_settle().is_none(), "one at a time");
    change(&mut disk, &mut store, set(9, 10));
    store.settled(CpNumber(7));
    assert!(store.prepare(set(500, 1)).is_none());
    // Before the point is durable and after it the same is found.
    assert_eq!(found(&disk, &[], 7).unwrap().table(), store.table());
    assert_eq!(found(&disk, &file, 8).unwrap().table(), store.table());
    store.settled(CpNumber(8));
    // The heir's, and what has changed since.
    assert_eq!(store.journal.iter().copied().collect::<Vec<_>>(), [VmId(3), VmId(9)]);
    change(&mut disk, &mut store, set(500, 1));
    change(&mut disk, &mut store, OwnerChange::Release(VmId(20), Epoch::UNCLAIMED));
    let after = found(&disk, &file, 8).unwrap();
    assert_eq!((after.table(), &after.journal, &after.places), (store.table(), &store.journal, &store.places));
    assert_eq!(found(&disk, &[], 7).unwrap_err(), LayoutError::OwnersAhead { journal: 8, volume: 7 });
    // A place that is given back is used again, after it is.
    for vm in 600..600 + SETTLE_AT as u64 {
        change(&mut disk, &mut store, set(vm, 1));
    }
    let places = store.to_settle().unwrap();
    let gone = *places.iter().find(|p| p.record.is_none()).unwrap();
    assert!(gone.vm_id == VmId(20) && places.iter().all(|p| p.vm_id == VmId(20) || p.place != gone.place));
    store.settling(CpNumber(9), places);
    store.settled(CpNumber(9));
    for vm in 700..700 + SETTLE_AT as u64 {
        change(&mut disk, &mut store, set(vm, 1));
    }
    assert!(store.to_settle().unwrap().iter().any(|p| p.place == gone.place));
}

#[test]
fn a_place_is_kept_for_every_vm() {
    let mut disk = new_disk();
    let mut store = found(&disk, &[], 1).unwrap();
    let mut file: BTreeMap<u32, PlacedRecord> = BTreeMap::new();
    let mut point = 1;
    // More VMs than places come and go, in waves.
    for vm in 1..=3 * PLACES as u64 {
        let floor = store.table().floor();
        let first = claim(None, floor, VmId(vm), floor, false, Owner([1, 1])).unwrap();
        let gone = vm.checked_sub(VMS_MAX as u64).filter(|gone| *gone > 0);
        for next in gone
            .map(|gone| OwnerChange::Release(VmId(gone), Epoch::UNCLAIMED))
            .into_iter()
            .chain([OwnerChange::Set(first, None)])
        {
            assert_eq!(store.table().admits(&next), Ok(()));
            change(&mut disk, &mut store, next);
        }
        if let Some(records) = store.to_settle() {
            for p in &records {
                match (p.place, p.record) {
                    (Some(place), Some(_)) => drop(file.insert(place, *p)),
                    (Some(place), None) => drop(file.remove(&place)),
                    (None, record) => assert_eq!(record, None),
                }
            }
            point += 1;
            store.settling(CpNumber(point), records);
            store.settled(CpNumber(point));
            let placed: Vec<_> = file.values().copied().collect();
            assert_eq!(found(&disk, &placed, point).unwrap().table(), store.table());
        }
    }
    assert_eq!(store.table().len(), VMS_MAX);
}

#[test]
fn an_old_image_does_not_hide_what_the_file_has() {
    // The newest image rots after its records are in the file.
    let mut disk = new_disk();
    let mut store = found(&disk, &[], 1).unwrap();
    change(&mut disk, &mut store, set(7, 5));
    change(&mut disk, &mut store, set(7, 6));
    let rotten = place(store.sequence);
    disk[(rotten.0 - 2) as usize].bytes_mut()[100] ^= 1;
    let file = [PlacedRecord { vm_id: VmId(7), place: Some(0), record: Some(record(7, 6)) }];
    assert_eq!(found(&disk, &file, 2).unwrap().table().get(VmId(7)), Some(record(7, 6)));
}

#[test]
fn garbage_is_refused() {
    let good = OwnerStore::default().prepare(set(7, 5)).unwrap().block;
    let mut bad = good.clone();
    bad.bytes_mut()[50] ^= 1;
    for other in [&[][..], &[0; BLOCK_SIZE], bad.as_ref()] {
        assert_eq!(OwnerJournal::load([bad.as_ref(), other]).unwrap_err(), LayoutError::OwnersDamaged);
    }
    let twice = [0, 1].map(|place| PlacedRecord { vm_id: VmId(8), place: Some(place), record: Some(record(8, 1)) });
    let journal = OwnerJournal::load([good.as_ref(), &[]]).unwrap();
    assert!(OwnerStore::new(journal.clone(), &twice, CpNumber(1)).is_err());
    let many: Vec<_> = (100..100 + VMS_MAX as u64)
        .map(|vm| PlacedRecord { vm_id: VmId(vm), place: Some(vm as u32), record: Some(record(vm, 1)) })
        .collect();
    let full = OwnerStore::new(journal, &many, CpNumber(1));
    assert_eq!(full.unwrap_err(), LayoutError::Owners("too many records"));
}

#[test]
fn a_whole_table_that_cannot_be_read_is_refused() {
    let known = OwnerStore::default().prepare(set(7, 5)).unwrap().block;
    let changed = |at: usize, value: u32| sealed(&known, |bytes| put_u32(bytes, at, value));
    let impossible = || LayoutError::Owners("a session of no epoch");
    let cases = vec![
        (changed(4, VERSION + 1), LayoutError::OwnersVersion(VERSION + 1)),
        (changed(4, 0), LayoutError::OwnersVersion(0)),
        (changed(16, JOURNAL_MAX as u32 + 1), LayoutError::Owners("too many records")),
        (changed(HEADER, 0), LayoutError::Owners("a record of VM 0")),
        (changed(HEADER + 8, 0), impossible()),
        (changed(HEADER + 16, 6), impossible()),
        (changed(HEADER + 16, 0), impossible()),
        (
            sealed(&known, |b| {
                put_u32(b, 16, 2);
                b.copy_within(HEADER..HEADER + RECORD, HEADER + RECORD)
            }),
            LayoutError::Owners("records out of order"),
        ),
        (sealed(&old(2), |b| put_u32(b, 16, RECORDS_2 as u32 + 1)), LayoutError::Owners("too many records")),
        (sealed(&old(2), |b| b[HEADER_2 + 8..HEADER_2 + RECORD].fill(0)), impossible()),
    ];
    for (block, why) in cases {
        // Alone, and beside one that can be read, which may be the older one.
        for other in [&[][..], known.as_ref()] {
            assert_eq!(OwnerJournal::load([block.as_ref(), other]).unwrap_err(), why);
            assert_eq!(OwnerJournal::load([other, block.as_ref()]).unwrap_err(), why);
        }
        // Torn it is no table at all.
        let mut torn = block.clone();
        torn.bytes_mut()[45] ^= 1;
        let found = OwnerJournal::load([torn.as_ref(), known.as_ref()]).unwrap();
        assert_eq!(found.entries, [set(7, 5)]);
    }
}
