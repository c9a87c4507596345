//! A receive buffer: whole pages.
//!
//! While the device has it nobody needs what is in it, and the VMM can leave it behind in a port; but only pages that lie in it
//! wholly, so it shares none with anything else.
use alloc::{boxed::Box, vec};
use core::ops::{Deref, DerefMut};
use core::slice;

const PAGE: usize = 4096;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// See the module. A slice of bytes, as many as its pages have.
pub struct Buffer(Box<[Page]>);

impl Buffer {
    /// Of `size` bytes or up to a page more.
    pub fn new(size: usize) -> Buffer {
        Buffer(vec![Page([0; PAGE]); size.div_ceil(PAGE)].into_boxed_slice())
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: a page is an array of bytes, as large as its alignment, so there is nothing between two.
        unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * PAGE) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; the pages are borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * PAGE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_whole_pages() {
        for (size, len) in [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (69_632, 69_632)] {
            let mut buffer = Buffer::new(size);
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % PAGE), (len, 0));
            buffer[len - 1] = 7;
            assert_eq!(buffer.iter().map(|b| usize::from(*b)).sum::<usize>(), 7);
        }
    }
}
