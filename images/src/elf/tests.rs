use super::*;

/// An ELF with the given loadable segments (address, bytes, flags) and notes.
fn image(loads: &[(u64, u64, u32)], with_notes: &[(&[u8], u32)]) -> Vec<u8> {
    let mut note = Vec::new();
    for (name, kind) in with_notes {
        note.extend((name.len() as u32).to_le_bytes());
        note.extend(4u32.to_le_bytes());
        note.extend(kind.to_le_bytes());
        note.extend(*name);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend([0; 4]);
    }
    let mut headers = Vec::new();
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, file: u64, memory: u64| {
        headers.extend(kind.to_le_bytes());
        headers.extend(flags.to_le_bytes());
        for v in [offset, address, address, file, memory, 4096] {
            headers.extend(v.to_le_bytes());
        }
    };
    for (address, bytes, flags) in loads {
        header(PT_LOAD, *flags, 0, *address, 0, *bytes);
    }
    let note_at = 64 + 56 * (loads.len() as u64 + 1);
    header(PT_NOTE, 4, note_at, 0, note.len() as u64, note.len() as u64);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(64, 0);
    elf[16] = 2;
    elf[18] = 62;
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = loads.len() as u8 + 1;
    elf.extend(headers);
    elf.extend(note);
    elf
}

const NOTES: &[(&[u8], u32)] = &[PVH_NOTE, DIRECT_NOTE];

#[test]
fn a_good_image_passes() {
    let segments = check_bytes(&image(&[(0x40_0000, 0x1000, 5), (0x10_0000, 0x2000, 7)], NOTES)).unwrap();
    assert_eq!(segments.iter().map(|s| s.address).collect::<Vec<_>>(), [0x10_0000, 0x40_0000]);
    assert!(segments[0].write && segments[1].execute && !segments[1].write);
}

#[test]
fn bad_images_are_refused_with_a_reason() {
    for (elf, reason) in [
        (image(&[(0x40_0000, 0x1000, 7)], NOTES), "writable and executable"),
        (image(&[(0x40_0000, 0x1000, 5), (0x40_0800, 0x1000, 6)], NOTES), "overlaps"),
        (image(&[(0x40_0000, MAX_MEMORY_BYTES + 1, 6)], NOTES), "at most"),
        (image(&[], NOTES), "0 segments"),
        (image(&[(0x40_0000, 0x1000, 5)], &[DIRECT_NOTE]), "no PVH note"),
        (image(&[(0x40_0000, 0x1000, 5)], &[PVH_NOTE]), "direct start"),
        (b"\x7fELF\x01\x01".to_vec(), "64-bit"),
    ] {
        let error = check_bytes(&elf).unwrap_err();
        assert!(error.contains(reason), "{error:?} should mention {reason:?}");
    }
}

#[test]
fn no_cut_or_changed_image_panics() {
    let good = image(&[(0x40_0000, 0x1000, 5)], NOTES);
    for len in 0..good.len() {
        let _ = check_bytes(&good[..len]);
    }
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut elf = good.clone();
            elf[at] = value;
            let _ = check_bytes(&elf);
        }
    }
}
