//! Buffers of the monitor's own, for what cannot be read into or written from guest memory directly.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of a buffer: enough for any device.
const BOUNCE_ALIGN: usize = 4096;

/// An aligned buffer of the monitor's own.
#[derive(Debug)]
pub struct Bounce {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer belongs to this value alone.
unsafe impl Send for Bounce {}

impl Bounce {
    /// Zeroes.
    pub fn new(len: usize) -> Bounce {
        // A multiple of 4096 of at most a few MiB is a valid layout.
        let layout = Layout::from_size_align(len.max(1), BOUNCE_ALIGN).unwrap_or(Layout::new::<u64>());
        assert!(layout.size() >= len, "bounce buffer of {len} bytes");
        // SAFETY: the layout has a size that is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Bounce { at, layout }
    }

    /// Its bytes, while nobody else works on them.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the buffer is ours, initialised, of this size; the kernel is done with it when this is called.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Bounce {
    /// Where it is.
    pub fn address(&self) -> *mut u8 {
        self.at.as_ptr()
    }

    /// Its length.
    pub fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.at.as_ptr(), self.layout) }
    }
}
