use super::*;
use proptest::prelude::*;

fn section(name: &str, version: u32, bytes: &[u8]) -> Section {
    Section { name: name.into(), version, bytes: bytes.to_vec() }
}

#[test]
fn golden() {
    let mut sections = Sections::new();
    sections.push(section("cpu", 2, &[0xaa, 0xbb])).unwrap();
    let mut out = Vec::new();
    sections.encode(&mut out);
    assert_eq!(out, [1, 0, 0, 0, 3, 0, 0, 0, b'c', b'p', b'u', 2, 0, 0, 0, 2, 0, 0, 0, 0xaa, 0xbb]);
    assert_eq!(Sections::parse(&out), Ok(sections));
}

#[test]
fn newer_sections_are_refused_by_name() {
    let mut sections = Sections::new();
    sections.push(section("net/lan", 3, &[])).unwrap();
    assert!(sections.get("net/lan", 3).is_ok());
    assert_eq!(
        sections.get("net/lan", 2).unwrap_err(),
        Error::SectionVersion { name: "net/lan".into(), got: 3, known: 2 }
    );
    assert_eq!(sections.get("blk", 1).unwrap_err(), Error::MissingSection("blk".into()));
    assert_eq!(sections.push(section("net/lan", 1, &[])).unwrap_err(), Error::DuplicateSection("net/lan".into()));
}

#[test]
fn hostile_lengths_are_bounded() {
    assert!(matches!(Sections::parse(&u32::MAX.to_le_bytes()), Err(Error::Bound { .. })));
    let mut bytes = vec![1, 0, 0, 0];
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(Sections::parse(&bytes), Err(Error::Bound { .. })));
    let bytes = [1, 0, 0, 0, 1, 0, 0, 0, b'x', 1, 0, 0, 0, 0, 0, 0x10, 0];
    assert_eq!(Sections::parse(&bytes), Err(Error::Short("STATE")));
}

proptest! {
    #[test]
    fn round_trip(parts in prop::collection::btree_map("[a-z/0-9]{1,20}", (any::<u32>(), prop::collection::vec(any::<u8>(), 0..100)), 0..20)) {
        let mut sections = Sections::new();
        for (name, (version, bytes)) in parts {
            sections.push(Section { name, version, bytes }).unwrap();
        }
        let mut out = Vec::new();
        sections.encode(&mut out);
        prop_assert_eq!(Sections::parse(&out), Ok(sections));
        for cut in 0..out.len() {
            prop_assert!(Sections::parse(&out[..cut]).is_err());
        }
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Sections::parse(&bytes);
    }
}
