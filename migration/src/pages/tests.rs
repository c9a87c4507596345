use super::*;
use proptest::prelude::*;

const MEMORY: u64 = 64 << 20;
const HIGH: u64 = 4 << 30;
/// Two regions with a hole between them.
const MAP: [Range<u64>; 2] = [0..MEMORY, HIGH..HIGH + MEMORY];

fn table(entries: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    for (address, pages, kind) in entries {
        out.extend_from_slice(&address.to_le_bytes());
        out.extend_from_slice(&pages.to_le_bytes());
        out.extend_from_slice(&kind.to_le_bytes());
    }
    out
}

#[test]
fn golden_table() {
    let mut t = Table::new();
    for (address, kind) in [
        (0x1000, RunKind::Raw),
        (0x2000, RunKind::Raw),
        (0x5000, RunKind::Zero),
        (0x4000, RunKind::Zero),
        (0x6000, RunKind::Skipped),
        (0x7000, RunKind::Skipped),
    ] {
        assert!(t.push(address, kind));
    }
    let mut out = Vec::new();
    t.encode(&mut out);
    assert_eq!(out, table(&[(0x1000, 2, 0), (0x5000, 1, 1), (0x4000, 1, 1), (0x6000, 2, 2)]));
    assert_eq!(out[..12], [4, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]);
}

#[test]
fn runs_outside_of_memory_are_refused() {
    for (address, pages) in [
        (MEMORY, 1),
        (MEMORY - 4096, 2),
        (HIGH - 4096, 2),
        (HIGH + MEMORY, 1),
        (0, ((HIGH + MEMORY) / 4096) as u32),
        (u64::MAX - 4095, 1),
        (1 << 63, u32::MAX),
        (0, u32::MAX),
        (0, 0),
    ] {
        let bytes = table(&[(address, pages, 1)]);
        assert!(
            matches!(Pages::parse(&bytes, &MAP, feature::SKIP), Err(Error::OutsideMemory { .. })),
            "{address:#x} {pages}"
        );
    }
    assert!(Pages::parse(&table(&[(0, (MEMORY / 4096) as u32, 1)]), &MAP, feature::SKIP).is_ok());
    assert!(matches!(Pages::parse(&table(&[(5, 1, 1)]), &MAP, feature::SKIP), Err(Error::Value { .. })));
    assert!(matches!(Pages::parse(&table(&[(0, 1, 3)]), &MAP, feature::SKIP), Err(Error::Value { .. })));
}

#[test]
fn no_page_comes_twice_in_a_frame() {
    let all = (MEMORY / 4096) as u32;
    for runs in [
        &[(0, all, 1), (0, all, 1)][..],
        &[(0x3000, 1, 1), (0x2000, 1, 1)],
        &[(0x2000, 2, 1), (0x3000, 1, 2)],
        &[(HIGH, 1, 1), (0, 1, 1)],
    ] {
        let refused = Pages::parse(&table(runs), &MAP, feature::SKIP).err();
        assert_eq!(refused, Some(Error::Value { what: "page run address", value: runs[1].0 }), "{runs:x?}");
    }
    assert!(Pages::parse(&table(&[(0x2000, 2, 1), (0x4000, 1, 2), (HIGH, 1, 1)]), &MAP, feature::SKIP).is_ok());
}

#[test]
fn pages_are_skipped_only_if_agreed_on() {
    let mut bytes = table(&[(0, 1, 0), (4096, 7, 2)]);
    bytes.extend_from_slice(&[7; PAGE_SIZE]);
    for (features, known) in [(feature::SKIP, true), (feature::OFFERED, true), (0, false), (feature::ORDER, false)] {
        let parsed = Pages::parse(&bytes, &MAP, features);
        assert_eq!(parsed.is_ok(), known);
        assert!(known || parsed.err() == Some(Error::Value { what: "kind of a page run", value: 2 }));
    }
    let runs: Vec<_> =
        Pages::parse(&bytes, &MAP, feature::SKIP).unwrap().runs().map(|(r, data)| (r.kind, data.len())).collect();
    assert_eq!(runs, [(RunKind::Raw, PAGE_SIZE), (RunKind::Skipped, 0)]);
    // They must lie in memory like any others.
    let outside = table(&[(MEMORY, 1, 2)]);
    assert!(matches!(Pages::parse(&outside, &MAP, feature::SKIP), Err(Error::OutsideMemory { .. })));
}

#[test]
fn data_must_fit_the_table() {
    let mut bytes = table(&[(0, 2, 0)]);
    bytes.extend_from_slice(&[7; 2 * PAGE_SIZE]);
    assert!(Pages::parse(&bytes, &MAP, feature::SKIP).is_ok());
    bytes.push(0);
    assert_eq!(Pages::parse(&bytes, &MAP, feature::SKIP).err(), Some(Error::Trailing("PAGES", 1)));
    bytes.truncate(bytes.len() - 2);
    assert_eq!(Pages::parse(&bytes, &MAP, feature::SKIP).err(), Some(Error::Short("PAGES")));
}

#[test]
fn a_full_table_says_so() {
    let mut t = Table::new();
    for i in 0..RAW_PAGES_MAX as u64 {
        assert!(t.push(i * 4096, RunKind::Raw));
    }
    assert!(!t.push(0, RunKind::Raw));
    assert_eq!(t.runs().len(), 1);
    t.clear();
    for i in 0..RUNS_MAX as u64 {
        assert!(t.push(i * 8192, RunKind::Zero));
    }
    assert!(!t.push(0, RunKind::Zero));
    let mut out = Vec::new();
    t.encode(&mut out);
    assert_eq!(out.len(), TABLE_MAX);
    assert!(Pages::parse(&out, &MAP, feature::SKIP).is_ok());
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0u8..6) {
        let mut bytes = bytes;
        if bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&[count, 0, 0, 0, 0, 0, 0, 0]);
        }
        if let Ok(pages) = Pages::parse(&bytes, &MAP, feature::SKIP) {
            for (run, data) in pages.runs() {
                prop_assert!(MAP.iter().any(|m| m.start <= run.address && run.address + run.bytes() <= m.end));
                prop_assert_eq!(data.len() as u64, if run.kind == RunKind::Raw { run.bytes() } else { 0 });
            }
        }
    }

    #[test]
    fn memory_arrives_as_it_was(pages in prop::collection::btree_map(0u64..300, 0u8..4, 1..200)) {
        let mut sent = std::collections::BTreeMap::new();
        let mut t = Table::new();
        let mut data = Vec::new();
        for (page, fill) in pages {
            let kind = [RunKind::Zero, RunKind::Raw, RunKind::Raw, RunKind::Skipped][usize::from(fill)];
            if !t.push(page * 4096, kind) {
                break;
            }
            sent.insert(page, fill);
            if kind == RunKind::Raw {
                data.extend_from_slice(&[fill; PAGE_SIZE]);
            }
        }
        let mut payload = Vec::new();
        t.encode(&mut payload);
        payload.extend_from_slice(&data);
        let mut got = std::collections::BTreeMap::new();
        for (run, data) in Pages::parse(&payload, &MAP, feature::SKIP).unwrap().runs() {
            for i in 0..u64::from(run.pages) {
                let fill = match run.kind {
                    RunKind::Zero => 0,
                    RunKind::Raw => data[i as usize * PAGE_SIZE],
                    RunKind::Skipped => 3,
                };
                prop_assert!(got.insert(run.address / 4096 + i, fill).is_none());
            }
        }
        prop_assert_eq!(got, sent);
    }
}
