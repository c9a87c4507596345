use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::HUGE_PAGE;
use crate::port::transfer::Pending;

fn sees(memory: &Memory, address: u64) -> u8 {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

fn is_set(bitmap: &[u64], page: u64) -> bool {
    bitmap[(page / 64) as usize] >> (page % 64) & 1 == 1
}

#[test]
fn only_whole_pages_are_given_back() {
    let memory = Memory::new(2 * HUGE_PAGE).unwrap();
    memory.ram().write_slice(&[7; 5 * PAGE_SIZE], GuestAddress(0)).unwrap();
    let range = memory.range(GuestAddress(100), 3 * PAGE_SIZE as u32).unwrap();
    assert_eq!(memory.discard(range).unwrap(), 2 * PAGE_SIZE as u64);
    assert_eq!([0, 4095, 4096, 12_287, 12_288].map(|a| sees(&memory, a)), [7, 7, 0, 0, 7]);
    let nothing = memory.range(GuestAddress(100), PAGE_SIZE as u32).unwrap();
    assert_eq!(memory.discard(nothing).unwrap(), 0);
    assert_eq!(sees(&memory, 100), 7);
}

#[test]
fn a_port_does_not_send_what_was_given_back_until_it_is_written() {
    let memory = Memory::new(4 * HUGE_PAGE).unwrap();
    let bytes = memory.size() as u32;
    memory.ram().write_slice(&vec![7; memory.size()], GuestAddress(0)).unwrap();
    assert_eq!(Pending::populated(&memory).count(), (memory.size() / crate::memory::PAGE_SIZE) as u64);
    memory.discard(memory.range(GuestAddress(0), bytes).unwrap()).unwrap();
    memory.take_own_dirty();
    assert_eq!(Pending::populated(&memory).count(), 0);
    memory.ram().write_obj(1u8, GuestAddress(5 * HUGE_PAGE as u64 / 2)).unwrap();
    let page = 5 * HUGE_PAGE as u64 / 2 / PAGE_SIZE as u64;
    assert!(is_set(&memory.take_own_dirty(), page));
    assert_ne!(Pending::populated(&memory).count(), 0);
}

#[test]
fn what_is_given_back_while_a_port_goes_on_is_sent_again() {
    let memory = Memory::new(HUGE_PAGE).unwrap();
    memory.ram().write_obj(7u8, GuestAddress(PAGE_SIZE as u64)).unwrap();
    memory.take_own_dirty();
    memory.discard(memory.range(GuestAddress(PAGE_SIZE as u64), PAGE_SIZE as u32).unwrap()).unwrap();
    let dirty = memory.take_own_dirty();
    assert!(is_set(&dirty, 1) && !is_set(&dirty, 0) && !is_set(&dirty, 2));
}
