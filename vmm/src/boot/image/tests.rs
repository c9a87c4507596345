use super::*;
use zerocopy::IntoBytes;

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut v = Vec::new();
    v.extend((name.len() as u32).to_le_bytes());
    v.extend((desc.len() as u32).to_le_bytes());
    v.extend(kind.to_le_bytes());
    v.extend(name);
    v.resize(v.len().next_multiple_of(4), 0);
    v.extend(desc);
    v.resize(v.len().next_multiple_of(4), 0);
    v
}

fn start() -> DirectStart {
    let mut d = DirectStart::read_from_bytes(&[0; 80]).unwrap();
    d.version = NOTE_VERSION;
    d.entry = 0x40_0000;
    d.boot_info = 0x20_0000;
    d
}

#[test]
fn note_is_found_behind_others() {
    let mut notes = note(b"Xen\0", 18, &0x10_0000u32.to_le_bytes());
    notes.extend(note(NOTE_NAME, NOTE_TYPE, start().as_bytes()));
    assert_eq!(find_note(&notes), Some(start()));
}

#[test]
fn damaged_notes_are_not_read_past_their_end() {
    let whole = note(NOTE_NAME, NOTE_TYPE, start().as_bytes());
    for n in 0..whole.len() {
        assert_eq!(find_note(&whole[..n]), None, "cut at {n}");
    }
    let mut huge = whole.clone();
    huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(find_note(&huge), None);
    huge[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(find_note(&huge), None);
}

#[test]
fn addresses_outside_memory_are_refused() {
    let memory = Memory::new(crate::memory::HUGE_PAGE * 4).unwrap();
    assert!(check(start(), &memory).is_ok());
    for broken in [
        DirectStart { entry: u64::MAX, ..start() },
        DirectStart { cr3: memory.size() as u64, ..start() },
        DirectStart { boot_info: 0x20_0800, ..start() },
        DirectStart { version: NOTE_VERSION + 1, ..start() },
    ] {
        assert!(check(broken, &memory).is_err(), "{broken:?}");
    }
}

#[test]
fn other_files_are_refused_by_name() {
    let memory = Memory::new(crate::memory::HUGE_PAGE).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinuz");
    let refused = |mode| Image::load(&BootFile::open("image", &path).unwrap(), &memory, mode).unwrap_err().to_string();
    let mut bz = vec![0u8; 4096];
    bz[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(&path, &bz).unwrap();
    let e = refused(BootMode::Pvh);
    assert!(e.contains("bzImage") && e.contains("vmlinuz") && e.contains("boot"), "{e}");
    assert!(!refused(BootMode::Linux).contains("boot must be"));
    std::fs::write(&path, b"text").unwrap();
    assert!(refused(BootMode::Auto).contains("neither an ELF"));
    std::fs::write(&path, [b"\x7fELF".as_slice(), &[0; 100]].concat()).unwrap();
    assert!(refused(BootMode::Linux).contains("boot must be auto or pvh"));
}
