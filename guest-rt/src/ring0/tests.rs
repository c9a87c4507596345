use super::*;

/// Walks the tables as the CPU does: (present, writable, user, executable).
fn walk(address: u64) -> Option<(bool, bool, bool)> {
    let tables = page_tables();
    let table = |entry: u64| &tables.0[((entry & 0x000f_ffff_ffff_f000) - PT) as usize / 4096];
    let mut entry = PT | PRESENT | WRITE | USER;
    let (mut writable, mut user, mut executable) = (true, true, true);
    for level in (0..4).rev() {
        entry = table(entry)[(address >> (12 + 9 * level)) as usize & 511];
        if entry & 1 == 0 {
            return None;
        }
        assert_eq!(entry & 0x60 & 0x20, 0x20, "accessed bit preset");
        writable &= entry & WRITE != 0;
        user &= entry & USER != 0;
        executable &= entry & NO_EXEC == 0;
        if level == 0 || entry & LARGE != 0 {
            let mask = (1u64 << (12 + 9 * level)) - 1;
            let page = entry & 0x000f_ffff_ffff_f000;
            assert_eq!(page | address & mask, address, "mapped one to one");
            assert!(level == 0 || entry & LARGE != 0);
            return Some((writable, user, executable));
        }
    }
    unreachable!("level 0 returns")
}

#[test]
fn every_page_has_the_rights_the_map_says() {
    let none = None;
    let ring0 = Some((true, false, true));
    let read = Some((false, true, false));
    let code = Some((false, true, true));
    let data = Some((true, true, false));
    for (address, rights) in [
        (0, none),
        (0xfff, none),
        (0x1000, read),
        (0xf_ffff, read),
        (0x10_0000, ring0),
        (0x1f_ffff, ring0),
        (BOOT_INFO, data),
        (BOOT_INFO + 0x1000, none),
        (STACK_TOP - 8, data),
        (STACKS + 0x2000, data),
        (STACK_TOP, none),
        (STACK_TOP + 0x1000, data),
        (FAULT_STACK_TOP - 8, data),
        (FAULT_STACK_TOP, none),
        (0x3f_ffff, none),
        (0x40_0000, code),
        (0x5f_ffff, code),
        (0x60_0000, read),
        (0x7f_ffff, read),
        (0x80_0000, data),
        (MEMORY_END - 1, data),
        (0xd000_0000, data),
        (0xfeb0_0000, data),
        (LAPIC, Some((true, false, false))),
        (0xffff_ffff, data),
    ] {
        assert_eq!(walk(address), rights, "{address:#x}");
    }
}

#[test]
fn nothing_ring_3_may_write_can_be_executed() {
    for page in 0..(4u64 << 30 >> 21) {
        for address in [page << 21, (page << 21) + 0x1000, (page << 21) + 0x10_0000] {
            if let Some((writable, user, executable)) = walk(address) {
                assert!(!(writable && user && executable), "{address:#x}");
            }
        }
    }
}

#[test]
fn the_tss_opens_ports_only_with_its_long_limit() {
    let t = tables();
    let bytes: Vec<u8> = t.tss.iter().flat_map(|w| w.to_le_bytes()).collect();
    assert!(bytes.len() as u64 > TSS_LIMIT);
    assert!(bytes[0x68..0x68 + IO_PORTS / 8].iter().all(|&b| b == 0));
    // The byte that closes the bitmap is inside the limit; the direct start's limit ends before the bitmap.
    assert_eq!(bytes[TSS_LIMIT as usize], 0xff);
    assert_eq!(t.gdt[6] & 0xffff, TSS_LIMIT);
    let base = (t.gdt[6] >> 16 & 0xff_ffff) | (t.gdt[6] >> 56) << 24 | t.gdt[7] << 32;
    assert_eq!(base, TSS);
}

#[test]
fn every_vector_has_its_stub() {
    let idt = idt();
    for (v, [low, high]) in idt.0.iter().enumerate() {
        let handler = low & 0xffff | (low >> 48) << 16 | high << 32;
        assert_eq!(handler, STUBS + 16 * v as u64);
        assert_eq!(low >> 40 & 0xff, 0x8e, "interrupt gate of ring 0: int n from ring 3 faults");
        assert_eq!(low >> 32 & 7, u64::from(v == 8), "only a double fault changes stacks");
    }
}
