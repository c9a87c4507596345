//! Pages: what is exactly 4096 bytes, aligned to as much.
//!
//! talc keeps a word beside each allocation, so between two such blocks the better part of a page would be lost: a block
//! cache would take twice its size. Here they are cut from larger pieces without gaps. Owns the pages that are free; a page
//! once here is never given back to talc. An allocation or a return is a few instructions.
use super::Mutex;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, null_mut};

/// Size and alignment.
pub const PAGE: usize = 4096;
/// Pages cut from one piece.
const PIECE: usize = 64;

/// The free pages, linked through their first words.
struct FreeList(*mut FreePage);

struct FreePage {
    next: *mut FreePage,
}

// SAFETY: the list owns the pages on it; nothing else points to them.
unsafe impl Send for FreeList {}

/// An allocator that serves pages itself and leaves all else to another.
pub struct Pages<A> {
    rest: A,
    free: Mutex<FreeList>,
}

impl<A: GlobalAlloc> Pages<A> {
    pub const fn new(rest: A) -> Self {
        Pages { rest, free: Mutex::new(FreeList(null_mut())) }
    }

    /// The allocator behind.
    pub const fn rest(&self) -> &A {
        &self.rest
    }

    fn take(&self) -> *mut u8 {
        let mut free = self.free.lock();
        if free.0.is_null() {
            self.refill(&mut free);
        }
        let page = free.0;
        if !page.is_null() {
            // SAFETY: a page on the list is ours, and holds its link.
            free.0 = unsafe { (*page).next };
        }
        page.cast()
    }

    /// Cuts a piece into pages; the smaller ones where there is no room for a large one.
    fn refill(&self, free: &mut FreeList) {
        for pages in [PIECE, 8, 1] {
            // A power of two, and small: it cannot fail.
            let Ok(layout) = Layout::from_size_align(pages * PAGE, PAGE) else { return };
            // SAFETY: the size is not zero.
            let piece = unsafe { self.rest.alloc(layout) };
            if piece.is_null() {
                continue;
            }
            for i in (0..pages).rev() {
                // SAFETY: within the piece, which is ours, and aligned for the link.
                unsafe { free.put(piece.add(i * PAGE)) };
            }
            return;
        }
    }
}

impl FreeList {
    /// # Safety
    /// `page` is a page that nobody uses.
    unsafe fn put(&mut self, page: *mut u8) {
        let page: *mut FreePage = page.cast();
        // SAFETY: of the caller.
        unsafe { page.write(FreePage { next: self.0 }) };
        self.0 = page;
    }
}

fn is_page(layout: Layout) -> bool {
    layout.size() == PAGE && layout.align() == PAGE
}

// SAFETY: pages come from the list, where each is once; all else is the other allocator's. Which of the two an
// allocation belongs to is a function of its layout.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Pages<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: of the caller.
        if is_page(layout) { self.take() } else { unsafe { self.rest.alloc(layout) } }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: of the caller: allocated here with this layout, and not used any more.
        unsafe { if is_page(layout) { self.free.lock().put(at) } else { self.rest.dealloc(at, layout) } }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller sees to it that the size is valid with this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_page(layout) && !is_page(new) {
            // SAFETY: of the caller.
            return unsafe { self.rest.realloc(at, layout, size) };
        }
        // SAFETY: both are as large as what is copied, and do not overlap.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                ptr::copy_nonoverlapping(at, to, layout.size().min(size));
                self.dealloc(at, layout);
            }
            to
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heap::SpinLock;
    use talc::{TalcLock, source::Manual};

    const PAGE_LAYOUT: Layout = match Layout::from_size_align(PAGE, PAGE) {
        Ok(layout) => layout,
        Err(_) => panic!(),
    };

    fn heap(size: usize) -> Pages<TalcLock<SpinLock, Manual>> {
        let memory = Box::leak(vec![0u8; size].into_boxed_slice());
        let heap = Pages::new(TalcLock::new(Manual));
        // SAFETY: the memory is nobody else's for ever.
        unsafe { heap.rest().lock().claim(memory.as_mut_ptr(), size) }.unwrap();
        heap
    }

    #[test]
    fn pages_are_whole_distinct_and_without_gaps() {
        let heap = heap(16 << 20);
        let mut pages = Vec::new();
        loop {
            // SAFETY: the size is not zero.
            let page = unsafe { heap.alloc(PAGE_LAYOUT) };
            if page.is_null() {
                break;
            }
            assert_eq!(page as usize % PAGE, 0);
            // SAFETY: just allocated.
            unsafe { page.write_bytes(pages.len() as u8, PAGE) };
            pages.push(page);
        }
        assert!(pages.len() > (16 << 20) / PAGE * 95 / 100, "{} pages", pages.len());
        for (i, page) in pages.iter().enumerate() {
            // SAFETY: allocated above.
            assert!(unsafe { core::slice::from_raw_parts(*page, PAGE) }.iter().all(|b| *b == i as u8));
        }
        for page in &pages {
            // SAFETY: allocated above, not used any more.
            unsafe { heap.dealloc(*page, PAGE_LAYOUT) };
        }
        // SAFETY: the size is not zero.
        let again: usize = (0..pages.len()).filter(|_| !unsafe { heap.alloc(PAGE_LAYOUT) }.is_null()).count();
        assert_eq!(again, pages.len());
    }

    #[test]
    fn growing_into_and_out_of_a_page_keeps_the_bytes() {
        let heap = heap(1 << 20);
        let small = Layout::from_size_align(100, PAGE).unwrap();
        let large = Layout::from_size_align(3 * PAGE, PAGE).unwrap();
        // SAFETY: each with the layout it has at that time.
        unsafe {
            let at = heap.alloc(small);
            at.write_bytes(7, 100);
            let at = heap.realloc(at, small, PAGE);
            let at = heap.realloc(at, PAGE_LAYOUT, 3 * PAGE);
            assert!(core::slice::from_raw_parts(at, 100).iter().all(|b| *b == 7));
            heap.dealloc(at, large);
            let other = heap.alloc(large);
            assert_eq!(other, at, "it was the other allocator's again");
        }
    }
}
