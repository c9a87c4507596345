//! The pages a guest says it has no use for: [`guest_abi::FreePages`] in its memory.
//!
//! Always true: nothing a guest writes there makes this fail, loop, or allocate more than a bit for each page of its memory. A map that
//! makes no sense, or is being changed for too long, is none.

use std::mem::offset_of;
use std::sync::atomic::{Ordering, fence};

use guest_abi::FreePages;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

use crate::boot::info::InfoPage;
use crate::memory::{Memory, PAGE_SIZE};

/// How often a map that is just being changed is looked at again. An allocation takes less than a microsecond; a stopped guest
/// does not go on with one.
const TRIES: u32 = 200;
/// After so many the guest seems to have lost its processor in the middle of one: it is offered this one.
const TRIES_BEFORE_YIELD: u32 = 100;

/// The map as it is now, in the form of a bitmap of all pages; `None`: there is none that holds.
pub(super) fn read(memory: &Memory, info: InfoPage) -> Option<Vec<u64>> {
    let at = info.told(memory)?.free_pages;
    if at == 0 || !at.is_multiple_of(align_of::<u64>() as u64) {
        return None;
    }
    let words_at = at.checked_add(size_of::<FreePages>() as u64)?;
    let header: FreePages = get(memory, at)?;
    // What lies above the devices it cannot tell of.
    if header.pages > memory.low_end() / PAGE_SIZE as u64 {
        return None;
    }
    let mut bytes = vec![0; header.pages.div_ceil(64) as usize * size_of::<u64>()];
    let seq_at = GuestAddress(at + offset_of!(FreePages, seq) as u64);
    let seq = || memory.ram().load::<u32>(seq_at, Ordering::Acquire).ok();
    for n in 0..TRIES {
        if n >= TRIES_BEFORE_YIELD {
            std::thread::yield_now();
        }
        let before = seq()?;
        if before.is_multiple_of(2) {
            memory.ram().read_slice(&mut bytes, GuestAddress(words_at)).ok()?;
            fence(Ordering::Acquire);
            if seq()? == before {
                return Some(words(memory, &bytes, header.pages));
            }
        }
        std::hint::spin_loop();
    }
    log::debug!("the map of free pages is being changed");
    None
}

fn words(memory: &Memory, bytes: &[u8], pages: u64) -> Vec<u64> {
    let mut words: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
    if let Some(last) = words.last_mut()
        && !pages.is_multiple_of(64)
    {
        *last &= (1 << (pages % 64)) - 1;
    }
    words.resize(memory.bitmap_words(), 0);
    words
}

fn get<T: FromBytes>(memory: &Memory, at: u64) -> Option<T> {
    let mut bytes = vec![0; size_of::<T>()];
    memory.ram().read_slice(&mut bytes, GuestAddress(at)).ok()?;
    T::read_from_bytes(&bytes).ok()
}

#[cfg(test)]
mod tests;
