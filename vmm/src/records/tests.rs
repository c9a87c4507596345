use super::image::{ImageError, decode, encode};
use super::*;
use fabric::id::{Epoch, Owner, VmId};
use fabric::owner::{OwnerChange, OwnerRecord, OwnerTable};

fn record(vm: u64, epoch: u64) -> OwnerRecord {
    OwnerRecord { vm_id: VmId(vm), epoch: Epoch(epoch), session: Epoch(2), owner: Owner([0x11, 0x12]) }
}

fn table() -> OwnerTable {
    let mut table = OwnerTable::above(Epoch(0x51));
    table.apply(&OwnerChange::Set(record(7, 3), Some(Owner([0x21, 0x22]))));
    table.apply(&OwnerChange::Set(record(9, 4), None));
    table
}

#[test]
fn the_bytes_of_version_1() {
    let bytes = encode(&table());
    assert_eq!(bytes[..8], *b"OROF\x01\0\0\0");
    let (numbers, rest) = bytes[8..].as_chunks::<8>();
    assert!(rest.is_empty());
    let numbers: Vec<u64> = numbers.iter().map(|n| u64::from_le_bytes(*n)).collect();
    // Floor, count; a record with an heir, one without.
    assert_eq!(numbers[..2], [0x51, 2]);
    assert_eq!(numbers[2..16], [7, 3, 2, 0x11, 0x12, 0x21, 0x22, 9, 4, 2, 0x11, 0x12, 0, 0]);
    assert_eq!(numbers[16..], [0x26d2_3831_ddf8_9e35]);
    assert_eq!(decode(&bytes), Ok(table()));
    assert_eq!(decode(&encode(&OwnerTable::default())), Ok(OwnerTable::default()));
}

#[test]
fn what_is_cut_off_damaged_newer_or_foreign_is_refused() {
    let bytes = encode(&table());
    for length in 0..bytes.len() {
        assert!(decode(&bytes[..length]).is_err(), "the first {length} bytes");
    }
    for at in 8..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        assert_eq!(decode(&bytes), Err(ImageError::Damaged), "byte {at}");
    }
    let mut newer = bytes.clone();
    newer[4] = 2;
    assert_eq!(decode(&newer), Err(ImageError::Version(2)));
    assert_eq!(decode(b"#!/bin/sh\n"), Err(ImageError::Foreign));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let sealed = |change: fn(&mut Vec<u8>)| {
        let mut bytes = encode(&table());
        bytes.truncate(bytes.len() - 8);
        change(&mut bytes);
        let mut digest = migration::wire::Digest::default();
        digest.update(&bytes);
        bytes.extend_from_slice(&digest.finish().to_le_bytes());
        decode(&bytes)
    };
    assert_eq!(sealed(|_| {}), Ok(table()));
    let wrong: [fn(&mut Vec<u8>); 6] = [
        |bytes| bytes[16] = 3,
        |bytes| bytes.truncate(bytes.len() - 1),
        |bytes| bytes[20] = 1,
        // The same VM twice, an epoch before its session, a session of no epoch.
        |bytes| bytes[24 + 56] = 7,
        |bytes| bytes[24 + 8] = 1,
        |bytes| bytes[24 + 16] = 0,
    ];
    for (which, change) in wrong.into_iter().enumerate() {
        assert!(matches!(sealed(change), Err(ImageError::Content(_))), "{which}");
    }
}

#[test]
fn a_change_is_there_for_the_next_process_or_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("records");
    let mut store = Store::open(&path).unwrap();
    assert!(store.table().is_empty());
    store.write(&OwnerChange::Set(record(7, 3), None)).unwrap();
    let busy = Store::open(&path).unwrap_err().to_string();
    assert!(busy.contains("another process"), "{busy}");
    // Nothing can be written.
    std::fs::create_dir(path.join("owners.next")).unwrap();
    let failed = store.write(&OwnerChange::Set(record(9, 4), None)).unwrap_err().to_string();
    assert!(failed.contains("owners.next"), "{failed}");
    assert_eq!(store.table().get(VmId(9)), None);
    drop(store);
    let mut store = Store::open(&path).unwrap();
    assert_eq!((store.table().get(VmId(7)), store.table().get(VmId(9))), (Some(record(7, 3)), None));
    std::fs::remove_dir(path.join("owners.next")).unwrap();
    store.write(&OwnerChange::Release(VmId(7), Epoch(3))).unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!((store.table().len(), store.table().floor()), (0, Epoch(3)));
    drop(store);
    std::fs::write(path.join("owners"), b"OROF").unwrap();
    let refused = Store::open(&path).unwrap_err().to_string();
    assert!(refused.contains("owners: this is no file of ownership records"), "{refused}");
}
