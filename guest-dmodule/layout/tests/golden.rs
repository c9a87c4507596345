//! The format's bytes. A change here is a change of the format: it takes a new version.
#![allow(clippy::unwrap_used, reason = "tests may panic")]
mod rig;
use fabric::fs::{CreateHow, SetAttr};
use fabric::op::Op;
use layout::BlockNumber;
use rig::*;
use xxhash_rust::xxh3::xxh3_64;

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_new_volume() {
    let mut volume = Volume::new(1024, SMALL);
    let (dir, set) = (volume.root(), SetAttr { mode: Some(0o640), ..SetAttr::default() });
    volume.run(Op::Create { dir, name: b"file".to_vec(), how: CreateHow::Guarded(set) }).unwrap();
    volume.sync();
    // Consistency point 2 is in block 0.
    let fsinfo = volume.disk.read(BlockNumber(0));
    let bytes = fsinfo.bytes();
    assert_eq!(bytes[..16], *b"ORFSINFO\x02\0\0\0\x01\0\0\0");
    let fields: Vec<u64> = (16..104).step_by(8).map(|at| number(bytes, at)).collect();
    // Generation, uuid, seed, blocks, free blocks, most inodes, in use, first orphan, next block, inode hint.
    assert_eq!(fields, [2, 1, 2, 42, 1024, 1016, 1024, 2, 0, 0, 18]);
    assert_eq!(bytes[104..109], *b"\x04vol0");
    assert_eq!(number(bytes, 4088), xxh3_64(&bytes[..4088]));
    // The inode file's inode: kind 254, height 0, two blocks at first: number 0 is a hole, 1 has inodes 16 to 31.
    assert_eq!(bytes[1024..1026], [254, 0]);
    assert_eq!((number(bytes, 1024 + 32), number(bytes, 1024 + 128)), (1, 0));
    let inodes = volume.disk.read(BlockNumber(number(bytes, 1024 + 128 + 16)));
    assert_eq!(number(bytes, 1024 + 128 + 24), xxh3_64(inodes.bytes()));
    let (root, file) = (&inodes.bytes()[..256], &inodes.bytes()[256..512]);
    assert_eq!(root[..24], [2, 0, 0xff, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((number(root, 24), number(root, 80), number(root, 96)), (4096, 16, 1));
    assert_eq!(file[..8], [1, 0, 0xa0, 1, 1, 0, 0, 0]);
    assert_eq!((number(file, 24), number(file, 48), number(file, 64)), (0, 1_001_000, 1_001_000));
    let leaf = volume.disk.read(BlockNumber(number(root, 128)));
    let hash = volume_hash(b"file");
    assert_eq!(leaf.bytes()[..16], *b"DIRL\0\0\x01\0\x26\0\0\0\0\0\0\0");
    assert_eq!((number(leaf.bytes(), 16), number(leaf.bytes(), 24)), (hash, 17));
    assert_eq!(leaf.bytes()[32..38], *b"\x01\x04file");
    assert!(leaf.bytes()[38..].iter().all(|byte| *byte == 0));
    // The block map has the bits of the blocks in use, and none of the fixed ones.
    let map = volume.disk.read(BlockNumber(number(bytes, 1536 + 128)));
    let used: u32 = map.bytes().iter().map(|byte| byte.count_ones()).sum();
    assert_eq!((u64::from(used), map.bytes()[0] & 15), (1024 - 4 - 1016, 0));
}

fn volume_hash(name: &[u8]) -> u64 {
    (xxhash_rust::xxh3::xxh3_64_with_seed(name, 42) >> 1) & !7
}
