use super::*;
use crate::memory::HUGE_PAGE;
use std::io::Write;

/// A bzImage of nothing: a setup header and `payload` bytes of kernel.
fn bzimage(change: impl FnOnce(&mut setup_header), payload: usize) -> File {
    let mut header = setup_header {
        setup_sects: 4,
        boot_flag: BOOT_FLAG,
        header: u32::from_le_bytes(*MAGIC),
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x100_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0u8; 5 * 512];
    // SAFETY: a packed struct of integers has no padding; it is read for its size.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const header).cast::<u8>(), size_of::<setup_header>()) };
    image[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
    image.resize(image.len() + payload, 0xcc);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn memory(mib: usize) -> Memory {
    Memory::new(mib << 20).unwrap()
}

#[test]
fn a_kernel_is_loaded_and_told_of_its_machine() {
    let memory = memory(64);
    let kernel = Kernel::load(&mut bzimage(|_| {}, 10_000), &memory).unwrap();
    assert_eq!((kernel.entry, kernel.end, kernel.cmdline_max()), (0x10_0200, 0x200_0000, 2047));
    assert_eq!(kernel.initrd_end(), 0x8000_0000);
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x10_0000 + 9999)).unwrap(), 0xcc);
    let payload = Payload { cmdline: "x".into(), initrd: Some(0x300_0000..0x300_1234) };
    kernel.prepare(&memory, &payload).unwrap();
    let word = |at: u64| memory.ram().read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
    let long = |at: u64| memory.ram().read_obj::<u64>(GuestAddress(ZERO_PAGE + at)).unwrap();
    assert_eq!((word(0x218), word(0x21c), word(0x228)), (0x300_0000, 0x1234, CMDLINE as u32));
    assert_eq!(long(0x70), RSDP);
    // e820: entries of 20 bytes
    let entries = memory.ram().read_obj::<u8>(GuestAddress(ZERO_PAGE + 0x1e8)).unwrap();
    let map: Vec<_> =
        (0..u64::from(entries)).map(|i| 0x2d0 + 20 * i).map(|at| (long(at), long(at + 8), word(at + 16))).collect();
    assert_eq!(map, [(0, 0x9_fc00, E820_RAM), (0x9_fc00, 0x6_0400, E820_RESERVED), (0x10_0000, 63 << 20, E820_RAM)]);
}

#[test]
fn the_identity_map_covers_four_gib() {
    let tables = page_tables();
    let entry = |n: usize| tables[n];
    assert_eq!(entry(0), 0xa003);
    for (gib, directory) in (0..4usize).zip([0xb003u64, 0xc003, 0xd003, 0xe003]) {
        assert_eq!(entry(512 + gib), directory);
        assert_eq!(entry(1024 + 512 * gib), ((gib as u64) << 30) | 0x83);
    }
    assert_eq!(entry(1024 + 2047), ((4u64 << 30) - LARGE_PAGE) | 0x83);
    assert_eq!(tables.len(), 6 * 512);
}

#[test]
fn what_cannot_be_booted_is_refused_with_the_reason() {
    let refused = |change: fn(&mut setup_header), payload: usize, mib: usize| {
        Kernel::load(&mut bzimage(change, payload), &memory(mib)).unwrap_err()
    };
    assert!(refused(|h| h.version = 0x0206, 512, 64).contains("2.06"));
    assert!(refused(|h| h.xloadflags = 0, 512, 64).contains("64-bit"));
    assert!(refused(|_| {}, 512, 16).contains("unpack"));
    assert!(refused(|_| {}, 3 << 20, 2).contains("memory"));
    assert!(!refused(|h| h.code32_start = 0x8000, 512, 64).is_empty());
    assert!(!refused(|h| h.header = 0, 512, 64).is_empty());
    assert!(refused(|h| h.init_size = u32::MAX, 512, 64).contains("unpack"));
    assert!(refused(|h| h.pref_address = u64::MAX, 512, 64).contains("unpack"));
    assert!(!refused(|h| h.code32_start = u32::MAX, 512, 64).is_empty());
    // cut off anywhere
    for len in [0u64, 0x1f1, 0x210, 0x260, 512 * 5] {
        let mut file = bzimage(|_| {}, 512);
        file.set_len(len).unwrap();
        let _ = Kernel::load(&mut file, &Memory::new(HUGE_PAGE * 32).unwrap());
    }
}
