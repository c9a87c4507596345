//! Guest memory on top of a file that is never written: the memory file of a checkpoint, mapped copy-on-write.
//!
//! Owns which pages have their first content from there. Always true: such a page counts as one with content although the
//! host has given it no memory yet ([`super::Memory::filed`]), so a port or a checkpoint does not take it for zero; one that
//! the guest gives back becomes zero as any other ([`super::Memory::discard`]), not what the file says. The file must not change as long as
//! the memory lives: pages the guest has not written would change with it, and be gone (SIGBUS) if it became shorter.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::{Memory, PAGE_SIZE, Region};
use crate::error::{Error, Result, host};

/// Which pages: bit n of word m is page 64 m + n.
#[derive(Debug)]
pub(super) struct Filed {
    words: Vec<u64>,
}

impl Memory {
    /// Maps the file under fresh memory, each page at the offset that is its address; to be called before the memory is a
    /// VM's. `words` says which pages have content in it (as in a dirty bitmap); all others must read as zero, or lie beyond its end. Not for
    /// memory other processes share.
    pub fn map_file(&mut self, file: &File, words: Vec<u64>) -> Result<()> {
        if !self.shared_regions().is_empty() {
            return Err(Error::Memory("shared memory cannot be mapped copy-on-write".into()));
        }
        let end = words.iter().rposition(|w| *w != 0).map_or(0, |last| (last + 1) * 64 * PAGE_SIZE) as u64;
        // Nothing behind the end of the file is mapped: to touch it would be the end of the process.
        let len = file.metadata().map_err(host("memory file"))?.len() / PAGE_SIZE as u64 * PAGE_SIZE as u64;
        for region in self.regions() {
            let Some(bytes) = end.min(len).checked_sub(region.address).filter(|n| *n > 0) else { continue };
            let bytes = (bytes as usize).min(region.len);
            let offset = region.address as libc::off_t;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: replaces the beginning of our own mapping, which nobody uses yet, by one of the same length that lives as long.
            let at = unsafe { libc::mmap(region.host.cast(), bytes, protection, flags, file.as_raw_fd(), offset) };
            if at == libc::MAP_FAILED {
                return Err(host("mapping the memory file")(io::Error::last_os_error()));
            }
        }
        self.filed = Some(Arc::new(Filed { words }));
        Ok(())
    }

    /// Pages whose content may be in a file although the host has given them no memory; `None`: there are none.
    pub(crate) fn filed(&self) -> Option<&[u64]> {
        self.filed.as_deref().map(|f| f.words.as_slice())
    }

    /// Puts fresh zero pages in the place of a piece of a region that may be a file's. Whoever looks meanwhile sees the old page or
    /// the new one.
    pub(super) fn replace(&self, region: &Region, start: u64, len: usize) -> io::Result<()> {
        let at = region.host.wrapping_add((start - region.address) as usize);
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS;
        // SAFETY: the piece lies inside our own mapping, to which nothing holds references that depend on its content; the new
        // mapping is unmapped with it.
        let new = unsafe { libc::mmap(at.cast(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if new == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Whether any page of the piece may be a file's.
    pub(super) fn is_filed(&self, start: u64, len: usize) -> bool {
        let Some(words) = self.filed() else { return false };
        let pages = start / PAGE_SIZE as u64..(start + len as u64) / PAGE_SIZE as u64;
        pages.into_iter().any(|p| words.get((p / 64) as usize).is_some_and(|w| w >> (p % 64) & 1 != 0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::HUGE_PAGE;
    use crate::port::transfer::Pending;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file.write_all_at(&[7; PAGE_SIZE], 3 * PAGE_SIZE as u64).unwrap();
        file
    }

    fn byte(memory: &Memory, page: u64) -> u8 {
        memory.ram().read_obj(GuestAddress(page * PAGE_SIZE as u64)).unwrap()
    }

    #[test]
    fn what_is_written_stays_with_the_memory() {
        let file = file(HUGE_PAGE as u64);
        let mut memory = Memory::new(2 * HUGE_PAGE).unwrap();
        let mut words = vec![0; memory.bitmap_words()];
        words[0] = 1 << 3;
        memory.map_file(&file, words).unwrap();
        assert_eq!([byte(&memory, 2), byte(&memory, 3), byte(&memory, 4)], [0, 7, 0]);
        memory.ram().write_obj(9u8, GuestAddress(3 * PAGE_SIZE as u64)).unwrap();
        let mut there = [0];
        file.read_exact_at(&mut there, 3 * PAGE_SIZE as u64).unwrap();
        assert_eq!((byte(&memory, 3), there[0]), (9, 7));
    }

    #[test]
    fn a_page_that_nobody_has_touched_counts_as_one_with_content() {
        let mut memory = Memory::new(HUGE_PAGE).unwrap();
        let mut words = vec![0; memory.bitmap_words()];
        words[0] = 1 << 3;
        memory.map_file(&file(HUGE_PAGE as u64), words).unwrap();
        let mut pending = Pending::populated(&memory);
        assert!(pending.drain().any(|page| page == 3));
    }

    #[test]
    fn a_page_given_back_is_zero_and_not_the_files() {
        let mut memory = Memory::new(HUGE_PAGE).unwrap();
        let mut words = vec![0; memory.bitmap_words()];
        words[0] = 1 << 3;
        memory.map_file(&file(HUGE_PAGE as u64), words).unwrap();
        memory.ram().write_obj(9u8, GuestAddress(2 * PAGE_SIZE as u64)).unwrap();
        let range = memory.range(GuestAddress(3 * PAGE_SIZE as u64), 2 * PAGE_SIZE as u32).unwrap();
        assert_eq!(memory.discard(range).unwrap(), 2 * PAGE_SIZE as u64);
        assert_eq!([byte(&memory, 2), byte(&memory, 3)], [9, 0]);
        memory.clear().unwrap();
        assert_eq!(byte(&memory, 2), 0);
    }

    #[test]
    fn a_file_that_is_too_short_is_mapped_as_far_as_it_goes() {
        let mut memory = Memory::new(HUGE_PAGE).unwrap();
        let mut words = vec![0; memory.bitmap_words()];
        words[0] = 1 << 3 | 1 << 60;
        memory.map_file(&file(4 * PAGE_SIZE as u64), words).unwrap();
        assert_eq!([byte(&memory, 3), byte(&memory, 60)], [7, 0]);
    }
}
