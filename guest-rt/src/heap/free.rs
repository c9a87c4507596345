//! Which pages of the heap are free, where the VMM can see it ([`guest_abi::FreePages`]): it need not carry them anywhere.
//!
//! Owns the block at the beginning of the heap that holds the map, and behind it the numbers of the free pages that are kept
//! apart. Always true of a page that is marked: no allocation touches it, and nothing anybody will read is in it, no link and no tag of an
//! allocator either. A page's mark goes before the page is written. Where that cannot be (the other allocator splits a gap and writes
//! before this one knows which), the map says that it is [being changed](Free::begin), also to a VMM that stops the
//! vCPU just then. A page that is free and not marked costs its transport, no more.
use super::pages::PAGE;
use core::ptr::{self, null_mut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, compiler_fence};
use guest_abi::FreePages;

/// How far outside of a block talc writes at most, in bytes: what it rounds a block up by, its tag, the links of the gaps on both sides
/// (at most 8 + 31 + 24 behind it, 8 before it).
pub const MARGIN: usize = 128;
/// At the beginning of what the other allocator gets, for what it keeps there itself.
const TABLES: usize = 64 << 10;
const BITS: usize = 64;

/// The map and the free pages that are kept apart. Empty until there is memory.
pub struct Free {
    /// Address of page 0 of the map.
    base: usize,
    header: *mut FreePages,
    words: *mut AtomicU64,
    /// Pages in the map.
    pages: usize,
    /// Numbers of the free pages kept apart, the last freed on top; there is room for all.
    stack: *mut u32,
    kept: usize,
}

// SAFETY: it owns the block the pointers lead to.
unsafe impl Send for Free {}

impl Free {
    pub const fn new() -> Free {
        Free { base: 0, header: null_mut(), words: null_mut(), pages: 0, stack: null_mut(), kept: 0 }
    }

    /// Takes what it needs from the front of the memory from `start` to `end`; where the rest begins. Page 0 is at `base`.
    ///
    /// # Safety
    /// Once; the memory is nobody else's, `base` and `start` are aligned to pages, `base` is not above `start`.
    pub unsafe fn set_up(&mut self, base: usize, start: usize, end: usize) -> usize {
        let pages = (end - base) / PAGE;
        let words = start + size_of::<FreePages>();
        let stack = words + pages.div_ceil(BITS) * size_of::<u64>();
        let rest = (stack + pages * size_of::<u32>()).next_multiple_of(PAGE);
        if rest >= end {
            return start;
        }
        *self = Free {
            base,
            header: start as *mut FreePages,
            words: words as *mut AtomicU64,
            pages,
            stack: stack as *mut u32,
            kept: 0,
        };
        // SAFETY: of the caller; all of it lies between `start` and `rest`, aligned.
        unsafe {
            ptr::write_bytes(words as *mut u8, 0, stack - words);
            self.header.write(FreePages { seq: 0, reserved: 0, pages: pages as u64 });
        }
        rest
    }

    /// The other allocator has been given the memory from `start` to `end`, and nothing of it is in use.
    pub fn claimed(&self, start: usize, end: usize) {
        self.mark(start + TABLES, end.saturating_sub(MARGIN));
    }

    /// Where the map is; 0 where there is none.
    pub fn address(&self) -> u64 {
        self.header as u64
    }

    /// From here to [`Free::end`] the marks may be of pages that are being written.
    pub fn begin(&self) {
        self.turn();
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
    }

    /// See [`Free::begin`].
    pub fn end(&self) {
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        self.turn();
    }

    fn turn(&self) {
        if !self.header.is_null() {
            // SAFETY: set up, aligned, and only ever accessed as atomic since.
            let seq = unsafe { AtomicU32::from_ptr(&raw mut (*self.header).seq) };
            // Nobody else writes it: under the heap's lock. On this architecture stores are seen in their order.
            seq.store(seq.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }

    /// The other allocator has given out a block.
    pub fn used(&self, at: *mut u8, size: usize) {
        let at = at as usize;
        self.change(at.saturating_sub(MARGIN), at.saturating_add(size).saturating_add(MARGIN), false);
    }

    /// The other allocator has taken a block back.
    pub fn freed(&self, at: *mut u8, size: usize) {
        let at = at as usize;
        if size > 2 * MARGIN {
            self.mark(at + MARGIN, at + size - MARGIN);
        }
    }

    /// Keeps a page that nobody uses any more.
    pub fn put(&mut self, page: *mut u8) {
        let number = (page as usize).wrapping_sub(self.base) / PAGE;
        debug_assert!(self.kept < self.pages && number < self.pages);
        if self.kept < self.pages {
            // SAFETY: there is room for all pages.
            unsafe { self.stack.add(self.kept).write(number as u32) };
            self.kept += 1;
            self.mark(page as usize, page as usize + PAGE);
        }
    }

    /// Gives one out, the last that was put.
    pub fn take(&mut self) -> Option<*mut u8> {
        self.kept = self.kept.checked_sub(1)?;
        // SAFETY: written by `put`.
        let page = self.base + unsafe { self.stack.add(self.kept).read() } as usize * PAGE;
        self.change(page, page + PAGE, false);
        // Before the caller writes to it.
        compiler_fence(core::sync::atomic::Ordering::SeqCst);
        Some(page as *mut u8)
    }

    /// Marks the whole pages between two addresses.
    fn mark(&self, from: usize, to: usize) {
        let (from, to) = (from.next_multiple_of(PAGE), to / PAGE * PAGE);
        if from < to {
            self.change(from, to, true);
        }
    }

    /// Sets or clears the marks of all pages touched by what lies between two addresses.
    fn change(&self, from: usize, to: usize, free: bool) {
        let first = from.saturating_sub(self.base) / PAGE;
        let end = to.saturating_sub(self.base).div_ceil(PAGE).min(self.pages);
        let mut page = first;
        while page < end {
            let (word, bit) = (page / BITS, page % BITS);
            let n = (end - page).min(BITS - bit);
            let mask = (u64::MAX >> (BITS - n)) << bit;
            // SAFETY: there is a word for each page below `pages`.
            let word = unsafe { &*self.words.add(word) };
            let old = word.load(Relaxed);
            let new = if free { old | mask } else { old & !mask };
            if new != old {
                word.store(new, Relaxed);
            }
            page += n;
        }
    }

    /// Whether a page is marked.
    #[cfg(test)]
    pub fn is_marked(&self, at: usize) -> bool {
        let page = (at - self.base) / PAGE;
        // SAFETY: of the tests: within the map.
        unsafe { &*self.words.add(page / BITS) }.load(Relaxed) >> (page % BITS) & 1 != 0
    }
}
