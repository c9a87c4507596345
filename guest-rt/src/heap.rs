//! The heap: everything from the end of the image to the end of memory, kept by talc; whole pages apart ([`pages`]). Which pages of it
//! are free is kept where the VMM can see it ([`free`]).
//!
//! An allocation that fails ends the image with a panic that says how much was asked for (the default of `alloc`).
use core::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(any(test, feature = "hosted")))]
use talc::{TalcLock, source::Manual};

mod free;
mod pages;

/// A spin lock. There is one vCPU and no interrupt handler in ring 3, so it is never contended; it is here because
/// a global allocator must be `Sync`.
pub struct SpinLock(AtomicBool);

// SAFETY: compare-exchange with acquire, store with release: mutual exclusion.
unsafe impl lock_api::RawMutex for SpinLock {
    #[allow(clippy::declare_interior_mutable_const)]
    const INIT: SpinLock = SpinLock(AtomicBool::new(false));
    type GuardMarker = lock_api::GuardSend;
    fn lock(&self) {
        while !self.try_lock() {
            core::hint::spin_loop();
        }
    }
    fn try_lock(&self) -> bool {
        self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }
    unsafe fn unlock(&self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A mutex for the few things that must be `Sync`.
pub(crate) type Mutex<T> = lock_api::Mutex<SpinLock, T>;

#[cfg(not(any(test, feature = "hosted")))]
#[global_allocator]
static HEAP: pages::Pages<TalcLock<SpinLock, Manual>> = pages::Pages::new(TalcLock::new(Manual));

/// Gives the heap its memory; where its map of free pages is ([`guest_abi::FreePages`]), 0 if it has none.
///
/// # Safety
/// Once, before the first allocation; nothing else may use memory between the image's end and `memory_end`.
#[cfg(not(any(test, feature = "hosted")))]
pub(crate) unsafe fn init(memory_end: u64) -> u64 {
    unsafe extern "C" {
        static __heap_start: u8;
    }
    let start = &raw const __heap_start as usize;
    let end = memory_end as usize;
    // SAFETY: of the caller; the memory is mapped read-write by the page tables, one to one from address 0.
    let claimed =
        unsafe { HEAP.set_up(0, start, end, |talc, start, size| talc.lock().claim(start as *mut u8, size).is_some()) };
    assert!(claimed, "no memory for a heap: image ends at {start:#x}, memory at {memory_end:#x}");
    HEAP.map_address()
}
