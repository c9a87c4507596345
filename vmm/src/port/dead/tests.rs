use super::*;
use vm_memory::GuestAddress;

fn memory() -> Memory {
    Memory::new(4 << 20).unwrap()
}

fn check(memory: &Memory, pieces: &[(u64, u32)], expected: &[u64]) {
    let ranges = pieces.iter().map(|(at, len)| memory.range(GuestAddress(*at), *len).unwrap()).collect();
    let dead = Dead::of(memory, ranges, Vec::new());
    let pages: Vec<u64> = (0..(memory.size() / PAGE_SIZE) as u64).filter(|p| dead.reason(*p).is_some()).collect();
    assert_eq!(pages, expected, "{pieces:x?}");
    let bits: u32 = dead.words().iter().map(|w| w.count_ones()).sum();
    assert_eq!(bits as usize, pages.len());
}

#[test]
fn only_whole_pages_in_buffers_count() {
    let memory = memory();
    check(&memory, &[], &[]);
    check(&memory, &[(0x1000, 0x1000)], &[1]);
    check(&memory, &[(0x1001, 0x1fff)], &[2]);
    check(&memory, &[(0x1001, 0x1ffe)], &[]);
    check(&memory, &[(0x1000, 0xfff), (0, 0)], &[]);
    check(&memory, &[(0x40_0000 - 0x1000, 0x1000), (0, 0x1000)], &[0, 1023]);
}

#[test]
fn small_buffers_fill_pages_together() {
    let memory = memory();
    // In any order, one behind the other, over each other, and with a gap.
    check(&memory, &[(0x1800, 0x800), (0x1000, 0x800)], &[1]);
    check(&memory, &[(0x2800, 0x900), (0x1000, 0x1900), (0x1200, 0x100)], &[1, 2]);
    check(&memory, &[(0x1000, 0x7ff), (0x1800, 0x1800)], &[2]);
}

#[test]
fn free_pages_count_beside_those_in_buffers() {
    let memory = memory();
    let buffer = memory.range(GuestAddress(0x1000), 0x2000).unwrap();
    let mut free = vec![0; memory.bitmap_words()];
    free[0] = 1 << 2 | 1 << 3;
    let dead = Dead::of(&memory, vec![buffer], free);
    let reasons = [1, 2, 3, 4].map(|page| dead.reason(page));
    assert_eq!(reasons, [Some(Reason::Posted), Some(Reason::Posted), Some(Reason::Free), None]);
    assert_eq!(dead.words()[0], 0b1110);
    assert_eq!(Dead::none().reason(1), None);
}

#[test]
fn the_last_word_on_a_page_counts() {
    let memory = memory();
    let mut left_out = LeftOut::new(&memory);
    assert!(!left_out.has(70));
    left_out.note(70, RunKind::Skipped);
    left_out.note(71, RunKind::Skipped);
    left_out.note(71, RunKind::Raw);
    left_out.note(69, RunKind::Zero);
    assert_eq!((68..73).filter(|p| left_out.has(*p)).collect::<Vec<_>>(), [70]);
    // Beyond the end nothing is noted, and nothing breaks.
    left_out.note(u64::MAX, RunKind::Skipped);
    assert!(!left_out.has(u64::MAX));
}
