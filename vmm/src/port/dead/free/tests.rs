use super::*;
use guest_abi::{GUEST_INFO_MAGIC, GUEST_INFO_OFFSET, GUEST_INFO_VERSION, GuestInfo};
use proptest::strategy::Strategy;
use zerocopy::IntoBytes;

const INFO: InfoPage = InfoPage { address: 0x20_0000 };
const MAP: u64 = 0x30_0000;

fn memory() -> Memory {
    Memory::new(8 << 20).unwrap()
}

fn put(memory: &Memory, at: u64, bytes: &[u8]) {
    memory.ram().write_slice(bytes, GuestAddress(at)).unwrap();
}

fn tell(memory: &Memory, info: GuestInfo) {
    put(memory, INFO.address + GUEST_INFO_OFFSET as u64, info.as_bytes());
}

fn good() -> GuestInfo {
    GuestInfo { magic: GUEST_INFO_MAGIC, version: GUEST_INFO_VERSION, lull: 0, free_pages: MAP }
}

fn told() -> (Memory, FreePages) {
    let memory = memory();
    tell(&memory, good());
    let header = FreePages { seq: 4, reserved: 0, pages: 2048 };
    put(&memory, MAP, header.as_bytes());
    put(&memory, MAP + 16 + 8, &(1u64 << 63 | 1).to_le_bytes());
    (memory, header)
}

#[test]
fn the_map_is_read() {
    let (memory, header) = told();
    let words = read(&memory, INFO).unwrap();
    assert_eq!(words.len(), memory.bitmap_words());
    assert_eq!((words[0], words[1], words[2..].iter().max()), (0, 1 << 63 | 1, Some(&0)));
    // Fewer pages than memory has, and not a whole word of them: bits beyond count for nothing.
    put(&memory, MAP, FreePages { pages: 127, ..header }.as_bytes());
    let words = read(&memory, INFO).unwrap();
    assert_eq!((words.len(), words[1]), (memory.bitmap_words(), 1));
    put(&memory, MAP, FreePages { pages: 0, ..header }.as_bytes());
    assert_eq!(read(&memory, INFO).unwrap().iter().max(), Some(&0));
}

#[test]
fn a_map_that_is_being_changed_is_none() {
    let (memory, header) = told();
    put(&memory, MAP, FreePages { seq: 5, ..header }.as_bytes());
    assert_eq!(read(&memory, INFO), None);
    put(&memory, MAP, FreePages { seq: 6, ..header }.as_bytes());
    assert!(read(&memory, INFO).is_some());
}

/// A writer that keeps two bits equal but for moments at which it says so: nobody ever sees them differ.
#[test]
fn half_a_change_is_never_seen() {
    let (memory, header) = told();
    let guest = memory.clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ram = guest.ram();
            let mut seq = header.seq;
            let mut next = || {
                seq = seq.wrapping_add(1);
                ram.store(seq, GuestAddress(MAP), Ordering::SeqCst).unwrap();
            };
            for turn in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                next();
                for word in [0, 31] {
                    ram.store(turn % 2, GuestAddress(MAP + 16 + 8 * word), Ordering::SeqCst).unwrap();
                }
                next();
                (0..50).for_each(|_| std::hint::spin_loop());
            }
        });
        let seen: Vec<_> = (0..20_000).filter_map(|_| read(&memory, INFO)).map(|w| (w[0], w[31])).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(!seen.is_empty());
        assert!(seen.iter().all(|(first, last)| first == last), "torn");
    });
}

#[test]
fn what_makes_no_sense_is_none() {
    let none = |memory: &Memory| assert_eq!(read(memory, INFO), None);
    none(&memory());
    for info in [
        GuestInfo { magic: 1, ..good() },
        GuestInfo { version: 0, ..good() },
        GuestInfo { version: 3, ..good() },
        GuestInfo { free_pages: 0, ..good() },
        GuestInfo { free_pages: MAP + 4, ..good() },
        GuestInfo { free_pages: 8 << 20, ..good() },
        GuestInfo { free_pages: (8 << 20) - 16, ..good() },
        GuestInfo { free_pages: u64::MAX - 7, ..good() },
    ] {
        let (memory, header) = told();
        put(&memory, (8 << 20) - 16, header.as_bytes());
        tell(&memory, info);
        none(&memory);
    }
    let (memory, header) = told();
    for pages in [2049, u64::MAX, 1 << 63, 1 << 40] {
        put(&memory, MAP, FreePages { pages, ..header }.as_bytes());
        none(&memory);
    }
    assert_eq!(read(&memory, InfoPage { address: u64::MAX - 10 }), None);
}

proptest::proptest! {
    /// Whatever a guest writes is a bitmap of its memory, or none.
    #[test]
    fn anything_is_read_or_ignored(
        at in proptest::prop_oneof![(0u64..0x10_0000).prop_map(|n| n * 8), proptest::num::u64::ANY],
        (seq, pages) in (0u32..4, proptest::prop_oneof![0u64..3000, proptest::num::u64::ANY]),
        (magic, version) in (proptest::bool::weighted(0.9), 0u32..4),
    ) {
        let memory = memory();
        let header = FreePages { seq, reserved: 0, pages };
        if memory.range(GuestAddress(at), 16).is_some() {
            put(&memory, at, header.as_bytes());
        }
        tell(&memory, GuestInfo { magic: if magic { GUEST_INFO_MAGIC } else { 0 }, version, lull: 0, free_pages: at });
        let words = read(&memory, INFO);
        proptest::prop_assert!(words.is_none() || seq % 2 == 0 && magic && (version == 1 || version == 2) && pages <= 2048);
        if let Some(words) = words {
            proptest::prop_assert_eq!(words.len(), memory.bitmap_words());
            let set = (pages..2048).any(|page| words[page as usize / 64] >> (page % 64) & 1 != 0);
            proptest::prop_assert!(!set, "a page beyond the map");
        }
    }
}
