use super::*;
use vm_memory::Bytes;

const GIB: u64 = 1 << 30;

/// Three and a half GiB, of which only what is touched exists.
fn two_regions() -> Memory {
    Memory::new((3 * GIB + GIB / 2) as usize).unwrap()
}

fn bit(bitmap: &[u64], address: u64) -> bool {
    bitmap[(address >> 18) as usize] >> (address >> 12 & 63) & 1 == 1
}

#[test]
fn what_does_not_fit_below_the_devices_lies_from_4_gib() {
    let memory = two_regions();
    assert_eq!(memory.ranges(), [0..3 * GIB, 4 * GIB..4 * GIB + GIB / 2]);
    assert_eq!(memory.low_end(), 3 * GIB);
    assert_eq!(memory.bitmap_words() as u64, (4 * GIB + GIB / 2) / 4096 / 64);
    assert_eq!(Memory::new(HUGE_PAGE).unwrap().ranges(), std::slice::from_ref(&(0..HUGE_PAGE as u64)));
    for size in [0, HUGE_PAGE - 4096, MEMORY_MAX as usize + HUGE_PAGE] {
        assert!(Memory::new(size).is_err(), "{size}");
    }
}

#[test]
fn ranges_lie_in_one_region() {
    let memory = two_regions();
    let range = |at, len| memory.range(GuestAddress(at), len);
    for (at, len) in [(0, 1), (3 * GIB - 16, 16), (4 * GIB, 4096), (4 * GIB + GIB / 2 - 1, 1), (3 * GIB, 0)] {
        assert!(range(at, len).is_some(), "{at:#x}+{len:#x}");
    }
    for (at, len) in [
        (3 * GIB - 16, 17),
        (3 * GIB, 1),
        (4 * GIB - 1, 2),
        (4 * GIB - 1, 0),
        (4 * GIB + GIB / 2 - 1, 2),
        (u64::MAX, 1),
        (0, u32::MAX),
    ] {
        assert!(range(at, len).is_none(), "{at:#x}+{len:#x}");
    }
}

#[test]
fn both_regions_are_reached_and_marked() {
    let memory = two_regions();
    for at in [3 * GIB - 8, 4 * GIB, 4 * GIB + GIB / 2 - 8] {
        memory.ram().write_obj(at, GuestAddress(at)).unwrap();
        assert_eq!(memory.still(at, 8).unwrap(), at.to_le_bytes());
        let range = memory.range(GuestAddress(at), 8).unwrap();
        // SAFETY: the range was checked to be memory, eight bytes of it.
        let seen = unsafe { std::ptr::read_unaligned(memory.iovec(range).0.iov_base.cast::<u64>()) };
        assert_eq!(seen, at);
        let own = memory.take_own_dirty();
        assert_eq!(own.len(), memory.bitmap_words());
        assert!(bit(&own, at));
        assert_eq!(own.iter().map(|w| w.count_ones()).sum::<u32>(), 1);
        memory.mark_dirty(range, 8);
        assert!(bit(&memory.take_own_dirty(), at));
    }
    assert!(memory.still(3 * GIB, 1).is_err());
}

#[test]
fn clearing_leaves_zeroes_and_says_so() {
    let memory = Memory::new(2 * HUGE_PAGE).unwrap();
    memory.ram().write_obj(7u8, GuestAddress(0x20_1000)).unwrap();
    memory.take_own_dirty();
    memory.clear().unwrap();
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x20_1000)).unwrap(), 0);
    assert!(memory.take_own_dirty().iter().all(|w| *w == u64::MAX));
}

#[test]
fn kvm_logs_writes_by_guest_physical_page() {
    let memory = two_regions();
    let vm = crate::vm::create_vm(&kvm_ioctls::Kvm::new().unwrap()).unwrap();
    enable_manual_protect(&vm).unwrap();
    memory.register(&vm).unwrap();
    memory.start_dirty_log(&vm).unwrap();
    let dirty = memory.guest_dirty(&vm).unwrap();
    assert_eq!(dirty.len(), memory.bitmap_words());
    memory.clear_guest_dirty(&vm, &dirty).unwrap();
    assert!(memory.clear_guest_dirty(&vm, &dirty[1..]).is_err());
    memory.stop_dirty_log(&vm).unwrap();
}
