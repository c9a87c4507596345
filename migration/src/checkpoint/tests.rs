use super::*;
use crate::message::CpuLeaf;
use crate::section::Section;
use proptest::prelude::*;

fn sample() -> Checkpoint {
    let mut sections = Sections::new();
    sections.push(Section { name: "clock".into(), version: 1, bytes: vec![1, 2, 3] }).unwrap();
    let mut pages = PageTable::new();
    for page in [1, 2, 3, 7, 8, 100] {
        pages.push(page, Content::Raw(page * 3));
    }
    pages.push(101, Content::Zero);
    Checkpoint {
        id: CheckpointId([7; 16]),
        created_ns: 5,
        limit: 8 << 20,
        flags: AT_REST,
        writer: "vmm 0.1.0".into(),
        parent: None,
        description: Description {
            memory_size: 8 << 20,
            vcpus: 1,
            tsc_khz: 2_000_000,
            cpu: vec![CpuLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }],
            config: b"{}".to_vec(),
        },
        sections,
        pages,
    }
}

/// Puts the checksums right again after a change, as an attacker would.
fn reseal(bytes: &mut [u8]) {
    let (header, body) = bytes.split_at_mut(HEADER_LEN);
    header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[24..32].copy_from_slice(&sum(body).to_le_bytes());
    let seal = sum(&header[..56]);
    header[56..].copy_from_slice(&seal.to_le_bytes());
}

#[test]
fn golden_header_and_table() {
    let bytes = sample().encode().unwrap();
    assert_eq!(&bytes[..16], b"OUTRCKPT\x01\0\0\0\0\0\0\0");
    assert_eq!(u64::from_le_bytes(bytes[16..24].try_into().unwrap()), bytes.len() as u64 - 64);
    let mut table = vec![4, 0, 0, 0];
    for (first, pages, kind) in [(1u64, 3u32, 1u32), (7, 2, 1), (100, 1, 1), (101, 1, 2)] {
        table.extend(first.to_le_bytes());
        table.extend(pages.to_le_bytes());
        table.extend(kind.to_le_bytes());
    }
    for sum in [3u64, 6, 9, 21, 24, 300] {
        table.extend(sum.to_le_bytes());
    }
    assert!(bytes.ends_with(&table));
    assert_eq!(Checkpoint::parse(&bytes), Ok(sample()));
    assert_eq!(sample().pages.memory_file_len(), 101 * 4096);
    assert_eq!(sample().pages.iter().count(), 7);
}

#[test]
fn every_kind_of_unfit_file_is_named() {
    let good = sample().encode().unwrap();
    assert_eq!(Checkpoint::parse(b""), Err(Error::Foreign));
    assert_eq!(Checkpoint::parse(b"\x7fELF\x02\x01\x01\0aaaaaaaa"), Err(Error::Foreign));
    assert_eq!(Checkpoint::parse(&good[..40]), Err(Error::Short("state file")));
    assert_eq!(Checkpoint::parse(&good[..good.len() - 1]), Err(Error::Short("state file")));
    let mut longer = good.clone();
    longer.push(0);
    assert_eq!(Checkpoint::parse(&longer), Err(Error::Trailing("state file", 1)));
    let mut newer = good.clone();
    newer[8] = 2;
    assert_eq!(Checkpoint::parse(&newer), Err(Error::Format { got: 2, known: 1 }));
    let mut damaged = good.clone();
    damaged[17] ^= 1;
    assert_eq!(Checkpoint::parse(&damaged), Err(Error::Damaged("header")));
    let mut damaged = good.clone();
    damaged[100] ^= 1;
    assert_eq!(Checkpoint::parse(&damaged), Err(Error::Damaged("body")));
    let mut featured = good.clone();
    featured[12] = 4;
    reseal(&mut featured);
    assert_eq!(Checkpoint::parse(&featured), Err(Error::Features(4)));
}

#[test]
fn a_table_that_lies_is_refused() {
    let good = sample().encode().unwrap();
    let table = good.len() - 6 * 8 - 4 * 16 - 4;
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[table + at..][..value.len()].copy_from_slice(value);
        reseal(&mut bytes);
        Checkpoint::parse(&bytes)
    };
    // far more runs than there are bytes
    assert!(matches!(with(0, &u32::MAX.to_le_bytes()), Err(Error::Bound { .. })));
    assert!(matches!(with(0, &(RUNS_MAX as u32).to_le_bytes()), Err(Error::Short(_))));
    // beyond the memory, and beyond the numbers there are
    assert!(matches!(with(4, &(2048u64 - 2).to_le_bytes()), Err(Error::OutsideMemory { .. })));
    assert!(matches!(with(4, &u64::MAX.to_le_bytes()), Err(Error::OutsideMemory { .. })));
    // overlapping, empty, of no kind
    assert!(matches!(with(20, &3u64.to_le_bytes()), Err(Error::Value { .. })));
    assert!(matches!(with(12, &0u32.to_le_bytes()), Err(Error::Value { .. })));
    assert!(matches!(with(16, &9u32.to_le_bytes()), Err(Error::Value { .. })));
    // more pages than checksums
    assert!(matches!(with(12, &6u32.to_le_bytes()), Err(Error::Short(_))));
}

proptest! {
    #[test]
    fn any_bytes_behind_a_right_header(body in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut bytes = sample().encode().unwrap()[..HEADER_LEN].to_vec();
        bytes.extend(body);
        reseal(&mut bytes);
        let _ = Checkpoint::parse(&bytes);
    }

    #[test]
    fn a_changed_file_is_read_the_same_or_refused(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in any::<prop::sample::Index>()) {
        let mut bytes = sample().encode().unwrap();
        for (at, value) in &changes {
            let at = HEADER_LEN + at.index(bytes.len() - HEADER_LEN);
            bytes[at] = *value;
        }
        reseal(&mut bytes);
        if let Ok(read) = Checkpoint::parse(&bytes) {
            prop_assert_eq!(read.encode().unwrap(), bytes.clone());
            prop_assert!(read.pages.memory_file_len() <= read.limit);
        }
        bytes.truncate(HEADER_LEN + cut.index(bytes.len() - HEADER_LEN));
        reseal(&mut bytes);
        prop_assert!(Checkpoint::parse(&bytes).is_err());
    }

    #[test]
    fn without_the_checksums_put_right_nothing_passes(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = sample().encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(Checkpoint::parse(&bytes).is_err());
    }

    #[test]
    fn tables_keep_their_pages(pages in prop::collection::btree_map(0u64..2000, prop::option::of(any::<u64>()), 0..200)) {
        let mut checkpoint = sample();
        checkpoint.pages = PageTable::new();
        for (page, sum) in &pages {
            checkpoint.pages.push(*page, sum.map_or(Content::Zero, Content::Raw));
        }
        let read = Checkpoint::parse(&checkpoint.encode().unwrap()).unwrap();
        let back: Vec<_> = read.pages.iter().collect();
        let there: Vec<_> = pages.iter().map(|(p, s)| (*p, s.map_or(Content::Zero, Content::Raw))).collect();
        prop_assert_eq!(back, there);
    }
}
