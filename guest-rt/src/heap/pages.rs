//! Pages: what is exactly 4096 bytes, aligned to as much.
//!
//! talc keeps a word beside each allocation, so between two such blocks the better part of a page would be lost: a block
//! cache would take twice its size. Here they are cut from larger pieces without gaps. Owns the pages that are free ([`Free`]); a page
//! once here is never given back to talc. An allocation or a return is a few instructions. Always true: nothing is kept in a free page,
//! nor is anything expected there: the map of free pages is in step with both allocators.
use super::Mutex;
use super::free::Free;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, null_mut};

/// Size and alignment.
pub const PAGE: usize = 4096;
/// Pages cut from one piece.
const PIECE: usize = 64;

/// An allocator that serves pages itself and leaves all else to another.
pub struct Pages<A> {
    rest: A,
    free: Mutex<Free>,
}

impl<A: GlobalAlloc> Pages<A> {
    pub const fn new(rest: A) -> Self {
        Pages { rest, free: Mutex::new(Free::new()) }
    }

    /// Gives it the memory from `start` to `end`, and the other allocator, by `claim`, what is left of that. Page 0 of the map is at `base`.
    ///
    /// # Safety
    /// Once, before the first allocation. The memory is nobody else's; `base` and `start` are aligned to pages, `base` is not above
    /// `start`. `claim` gives the memory from its second argument on, as long as the third, to its first.
    pub unsafe fn set_up(
        &self,
        base: usize,
        start: usize,
        end: usize,
        claim: impl FnOnce(&A, usize, usize) -> bool,
    ) -> bool {
        let mut free = self.free.lock();
        // SAFETY: of the caller.
        let rest = unsafe { free.set_up(base, start, end) };
        let claimed = claim(&self.rest, rest, end.saturating_sub(rest));
        if claimed {
            free.claimed(rest, end);
        }
        claimed
    }

    /// Where the map of free pages is; 0 where there is none.
    pub fn map_address(&self) -> u64 {
        self.free.lock().address()
    }

    fn take(&self) -> *mut u8 {
        let mut free = self.free.lock();
        if let Some(page) = free.take() {
            return page;
        }
        self.refill(&mut free);
        free.take().unwrap_or(null_mut())
    }

    /// Cuts a piece into pages; the smaller ones where there is no room for a large one.
    fn refill(&self, free: &mut Free) {
        for pages in [PIECE, 8, 1] {
            // A power of two, and small: it cannot fail.
            let Ok(layout) = Layout::from_size_align(pages * PAGE, PAGE) else { return };
            free.begin();
            // SAFETY: the size is not zero.
            let piece = unsafe { self.rest.alloc(layout) };
            if !piece.is_null() {
                free.used(piece, layout.size());
            }
            free.end();
            if piece.is_null() {
                continue;
            }
            for i in (0..pages).rev() {
                // SAFETY: within the piece, which is ours.
                free.put(unsafe { piece.add(i * PAGE) });
            }
            return;
        }
    }
}

fn is_page(layout: Layout) -> bool {
    layout.size() == PAGE && layout.align() == PAGE
}

// SAFETY: pages come from the list, where each is once; all else is the other allocator's. Which of the two an
// allocation belongs to is a function of its layout.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Pages<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_page(layout) {
            return self.take();
        }
        let free = self.free.lock();
        free.begin();
        // SAFETY: of the caller.
        let at = unsafe { self.rest.alloc(layout) };
        if !at.is_null() {
            free.used(at, layout.size());
        }
        free.end();
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let mut free = self.free.lock();
        if is_page(layout) {
            return free.put(at);
        }
        free.begin();
        // SAFETY: of the caller: allocated here with this layout, and not used any more.
        unsafe { self.rest.dealloc(at, layout) };
        free.freed(at, layout.size());
        free.end();
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller sees to it that the size is valid with this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_page(layout) && !is_page(new) {
            let (free, old) = (self.free.lock(), layout.size());
            free.begin();
            // SAFETY: of the caller.
            let to = unsafe { self.rest.realloc(at, layout, size) };
            if !to.is_null() {
                free.used(to, size);
                match to == at {
                    false => free.freed(at, old),
                    // What was cut off. It begins behind the block's tag, and that is where a gap has its links.
                    true if size < old => free.freed(at.wrapping_add(size), old - size),
                    true => {}
                }
            }
            free.end();
            return to;
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
        let memory = Box::leak(vec![0u8; size + PAGE].into_boxed_slice()).as_mut_ptr() as usize;
        let start = memory.next_multiple_of(PAGE);
        let heap = Pages::new(TalcLock::new(Manual));
        // SAFETY: the memory is nobody else's for ever.
        assert!(unsafe {
            heap.set_up(start, start, start + size, |talc, at, size| talc.lock().claim(at as *mut u8, size).is_some())
        });
        heap
    }

    /// Page numbers of what is marked, all of it.
    fn marked(heap: &Pages<TalcLock<SpinLock, Manual>>, size: usize) -> Vec<usize> {
        let free = heap.free.lock();
        let base = free.address() as usize;
        (0..size / PAGE).filter(|n| free.is_marked(base + n * PAGE)).map(|n| base + n * PAGE).collect()
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

    /// Anything may be put in a page that is marked, at any time: blocks keep what they contain, and the allocators go on.
    #[test]
    fn nobody_misses_what_is_in_a_free_page() {
        const SIZE: usize = 3 << 20;
        let heap = heap(SIZE);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) as usize
        };
        let mut blocks: Vec<(*mut u8, Layout, u8)> = Vec::new();
        let (mut most, mut fewest) = (0, usize::MAX);
        let check = |at: *mut u8, size: usize, fill: u8| {
            // SAFETY: allocated with this size.
            assert!(unsafe { core::slice::from_raw_parts(at, size) }.iter().all(|b| *b == fill), "block of {size}");
        };
        for turn in 0..4000u32 {
            let fill = (turn % 200) as u8 + 1;
            let random = next();
            let size = match random % 8 {
                0..3 => 1 + random / 8 % 200,
                3 => PAGE,
                4 | 5 => 1 + random / 8 % 30_000,
                _ => 1 + random / 8 % 100_000,
            };
            // Fills up for a while, then empties.
            let grow = if turn / 1000 % 2 == 0 { 6 } else { 3 };
            match next() % 10 {
                n if n < grow || blocks.is_empty() => {
                    let align = if size == PAGE { PAGE } else { [1, 8, 64, PAGE][random / 8 % 4] };
                    let layout = Layout::from_size_align(size, align).unwrap();
                    // SAFETY: the size is not zero.
                    let at = unsafe { heap.alloc(layout) };
                    if !at.is_null() {
                        // SAFETY: just allocated.
                        unsafe { at.write_bytes(fill, size) };
                        blocks.push((at, layout, fill));
                    }
                }
                n if n < 8 => {
                    let (at, layout, fill) = blocks.swap_remove(random % blocks.len());
                    check(at, layout.size(), fill);
                    // SAFETY: allocated with this layout, not used any more.
                    unsafe { heap.dealloc(at, layout) };
                }
                _ => {
                    let index = random % blocks.len();
                    let (at, layout, fill) = blocks[index];
                    // SAFETY: allocated with this layout.
                    let to = unsafe { heap.realloc(at, layout, size) };
                    if !to.is_null() {
                        check(to, size.min(layout.size()), fill);
                        // SAFETY: as large as it was asked to be.
                        unsafe { to.write_bytes(fill, size) };
                        blocks[index] = (to, Layout::from_size_align(size, layout.align()).unwrap(), fill);
                    }
                }
            }
            let marked = marked(&heap, SIZE);
            (most, fewest) = (most.max(marked.len()), fewest.min(marked.len()));
            for page in marked {
                // SAFETY: in the heap's memory; that nobody reads it is what is tested.
                unsafe { (page as *mut u8).write_bytes(0xdb, PAGE) };
            }
        }
        blocks.iter().for_each(|(at, layout, fill)| check(*at, layout.size(), *fill));
        assert!(
            most > SIZE / PAGE / 2 && fewest < SIZE / PAGE / 4,
            "{fewest} to {most} pages marked: this tests nothing"
        );
    }

    /// A page that is free is marked, unless it is at the edge of a gap.
    #[test]
    fn what_is_free_is_marked() {
        const SIZE: usize = 8 << 20;
        let heap = heap(SIZE);
        let before = marked(&heap, SIZE).len();
        // All but the map, and what the other allocator has its tables in.
        assert!(before > SIZE / PAGE * 95 / 100, "{before} pages");
        let large = Layout::from_size_align(1 << 20, 8).unwrap();
        // SAFETY: sizes are not zero; what is returned was allocated with the same layout.
        unsafe {
            let block = heap.alloc(large);
            let with = marked(&heap, SIZE);
            assert!(
                with.len() <= before - 240
                    && !with.iter().any(|p| (block as usize..block as usize + (1 << 20)).contains(p))
            );
            let page = heap.alloc(PAGE_LAYOUT);
            assert!(!marked(&heap, SIZE).contains(&(page as usize)));
            heap.dealloc(page, PAGE_LAYOUT);
            assert!(marked(&heap, SIZE).contains(&(page as usize)));
            heap.dealloc(block, large);
        }
        assert!(marked(&heap, SIZE).len() > before - 8);
    }
}
