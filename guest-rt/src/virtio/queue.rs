//! A split virtqueue (virtio 1.2, section 2.7), driver side, polled.
//!
//! Owns the ring memory and the bookkeeping of what the device holds. The bookkeeping lies outside the shared
//! memory: whatever the device writes there, a descriptor is only freed if it was handed out.
//! Always true: VIRTQ_AVAIL_F_NO_INTERRUPT is set; `free + Σ chains in flight = size`.
//! Survives: used entries that name a chain that is not in flight, or more bytes than the chain could take, or more
//! entries than are in flight: [`QueueError`], after which the device must not be trusted again.
use super::mmio::Transport;
use alloc::{alloc::alloc_zeroed, alloc::dealloc, alloc::handle_alloc_error, vec, vec::Vec};
use core::alloc::Layout;
use core::sync::atomic::{AtomicU16, Ordering, fence};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
const NONE: u16 = u16::MAX;

/// A descriptor: guest-physical address, length, flags, next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A piece of memory for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address; guest-physical is the same.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// The device writes it (else it reads it).
    pub device_writes: bool,
}

/// The device broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// A used entry names a chain that is not in flight.
    #[error("the device returned chain {0}, which it does not hold")]
    NotInFlight(u32),
    /// A used entry says more was written than there was room.
    #[error("the device says it wrote {written} bytes into {room}")]
    TooLong {
        /// What it says.
        written: u32,
        /// What there was.
        room: u32,
    },
    /// The used index went further than there are chains in flight.
    #[error("the device returned {returned} chains and holds {held}")]
    TooMany {
        /// What it says.
        returned: u16,
        /// What it held.
        held: u16,
    },
}

/// The memory a queue shares with its device.
pub struct QueueMemory {
    base: *mut u8,
    size: u16,
}

impl QueueMemory {
    /// For a queue of `size` entries, a power of two.
    pub fn new(size: u16) -> Self {
        let layout = Self::layout(size);
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        QueueMemory { base, size }
    }

    fn available_offset(size: u16) -> usize {
        usize::from(size) * 16
    }
    fn used_offset(size: u16) -> usize {
        (Self::available_offset(size) + 6 + 2 * usize::from(size)).next_multiple_of(64)
    }
    fn layout(size: u16) -> Layout {
        let bytes = Self::used_offset(size) + 6 + 8 * usize::from(size);
        // At most 32768 entries: far below isize::MAX.
        Layout::from_size_align(bytes, 64).expect("small")
    }

    /// Address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.base as u64
    }
    /// Address of the available ring.
    pub fn available(&self) -> u64 {
        self.base as u64 + Self::available_offset(self.size) as u64
    }
    /// Address of the used ring.
    pub fn used(&self) -> u64 {
        self.base as u64 + Self::used_offset(self.size) as u64
    }

    fn write_descriptor(&self, index: u16, d: Descriptor) {
        assert!(index < self.size);
        // SAFETY: inside the table; the device only reads it, and not this entry before it is made available.
        unsafe { (self.base as *mut Descriptor).add(usize::from(index)).write_volatile(d) }
    }

    fn half_word(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset.is_multiple_of(2) && offset + 2 <= Self::layout(self.size).size());
        // SAFETY: inside the memory, aligned; both sides access it atomically.
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast()) }
    }
    fn available_flags(&self) -> &AtomicU16 {
        self.half_word(Self::available_offset(self.size))
    }
    fn available_index(&self) -> &AtomicU16 {
        self.half_word(Self::available_offset(self.size) + 2)
    }
    fn available_entry(&self, i: u16) -> &AtomicU16 {
        self.half_word(Self::available_offset(self.size) + 4 + 2 * usize::from(i % self.size))
    }
    fn used_flags(&self) -> &AtomicU16 {
        self.half_word(Self::used_offset(self.size))
    }
    fn used_index(&self) -> &AtomicU16 {
        self.half_word(Self::used_offset(self.size) + 2)
    }
    fn used_entry(&self, i: u16) -> (u32, u32) {
        let at = Self::used_offset(self.size) + 4 + 8 * usize::from(i % self.size);
        // SAFETY: inside the memory, 4-byte aligned.
        unsafe {
            let p = self.base.add(at).cast::<u32>();
            (p.read_volatile(), p.add(1).read_volatile())
        }
    }
}

impl Drop for QueueMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout. A queue is only dropped with its device reset or gone.
        unsafe { dealloc(self.base, Self::layout(self.size)) }
    }
}

/// What is known of a descriptor, outside the reach of the device.
#[derive(Clone, Copy)]
struct Shadow {
    /// Next free, or next of the chain; NONE at the end.
    next: u16,
    /// For the head of a chain in flight: bytes the device may write; else None.
    room: Option<u32>,
}

/// The driver's side of a queue.
pub struct Queue {
    index: u16,
    memory: QueueMemory,
    shadow: Vec<Shadow>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Entries made available so far, and how far the device has been told.
    available: u16,
    notified: u16,
    /// Entries taken from the used ring so far.
    used: u16,
}

impl Queue {
    pub(crate) fn new(index: u16, memory: QueueMemory) -> Queue {
        let size = memory.size;
        let mut shadow = vec![Shadow { next: NONE, room: None }; usize::from(size)];
        for i in 0..size - 1 {
            shadow[usize::from(i)].next = i + 1;
        }
        memory.available_flags().store(NO_INTERRUPT, Ordering::Relaxed);
        Queue { index, memory, shadow, free_head: 0, free: size, in_flight: 0, available: 0, notified: 0, used: 0 }
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.memory.size
    }

    /// Descriptors that can be handed out.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains the device holds.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    fn take_free(&mut self) -> u16 {
        let i = self.free_head;
        self.free_head = self.shadow[usize::from(i)].next;
        self.free -= 1;
        i
    }

    fn publish(&mut self, head: u16, room: u32) -> u16 {
        self.shadow[usize::from(head)].room = Some(room);
        self.in_flight += 1;
        self.memory.available_entry(self.available).store(head, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        // The device sees the descriptors and the entry before the index.
        self.memory.available_index().store(self.available, Ordering::Release);
        head
    }

    /// Makes a chain available; `None` if there are too few descriptors. The number identifies it until it is used.
    ///
    /// # Safety
    /// The memory of the segments stays valid, and untouched where the device writes, until the chain comes back
    /// from [`Queue::pop`].
    pub unsafe fn add(&mut self, segments: &[Segment]) -> Option<u16> {
        let count = u16::try_from(segments.len()).ok()?;
        if count == 0 || count > self.free {
            return None;
        }
        let (mut head, mut previous, mut room) = (NONE, NONE, 0u32);
        for (i, s) in segments.iter().enumerate() {
            let at = self.take_free();
            let last = i + 1 == segments.len();
            let flags = if last { 0 } else { NEXT } | if s.device_writes { WRITE } else { 0 };
            // The next descriptor to be taken is the head of the free list.
            let next = if last { 0 } else { self.free_head };
            self.memory.write_descriptor(at, Descriptor { address: s.address, length: s.length, flags, next });
            if s.device_writes {
                room = room.saturating_add(s.length);
            }
            match previous {
                NONE => head = at,
                p => self.shadow[usize::from(p)].next = at,
            }
            previous = at;
        }
        self.shadow[usize::from(previous)].next = NONE;
        Some(self.publish(head, room))
    }

    /// Makes available a chain that lies in a table (needs INDIRECT_DESC).
    ///
    /// # Safety
    /// As for [`Queue::add`]; the table too must stay as it is.
    pub unsafe fn add_indirect(&mut self, table: &mut Vec<Descriptor>, segments: &[Segment]) -> Option<u16> {
        if self.free == 0 || segments.is_empty() || segments.len() > usize::from(self.memory.size) {
            return None;
        }
        table.clear();
        let mut room = 0u32;
        for (i, s) in segments.iter().enumerate() {
            let last = i + 1 == segments.len();
            let flags = if last { 0 } else { NEXT } | if s.device_writes { WRITE } else { 0 };
            let next = if last { 0 } else { i as u16 + 1 };
            table.push(Descriptor { address: s.address, length: s.length, flags, next });
            if s.device_writes {
                room = room.saturating_add(s.length);
            }
        }
        let head = self.take_free();
        self.shadow[usize::from(head)].next = NONE;
        let d =
            Descriptor { address: table.as_ptr() as u64, length: 16 * segments.len() as u32, flags: INDIRECT, next: 0 };
        self.memory.write_descriptor(head, d);
        Some(self.publish(head, room))
    }

    /// Whether the device has returned something.
    pub fn has_used(&self) -> bool {
        self.memory.used_index().load(Ordering::Acquire) != self.used
    }

    /// The next chain the device has returned, and how many bytes it wrote.
    pub fn pop(&mut self) -> Result<Option<(u16, u32)>, QueueError> {
        let index = self.memory.used_index().load(Ordering::Acquire);
        let returned = index.wrapping_sub(self.used);
        if returned == 0 {
            return Ok(None);
        }
        if returned > self.in_flight {
            return Err(QueueError::TooMany { returned, held: self.in_flight });
        }
        let (id, written) = self.memory.used_entry(self.used);
        let head = u16::try_from(id).ok().filter(|&h| h < self.memory.size).ok_or(QueueError::NotInFlight(id))?;
        let Some(room) = self.shadow[usize::from(head)].room.take() else {
            return Err(QueueError::NotInFlight(id));
        };
        if written > room {
            return Err(QueueError::TooLong { written, room });
        }
        self.used = self.used.wrapping_add(1);
        self.in_flight -= 1;
        // Give the chain's descriptors back, by our own record of it.
        let mut last = head;
        self.free += 1;
        while self.shadow[usize::from(last)].next != NONE {
            last = self.shadow[usize::from(last)].next;
            self.free += 1;
        }
        self.shadow[usize::from(last)].next = self.free_head;
        self.free_head = head;
        Ok(Some((head, written)))
    }

    /// Whether something was made available since the last doorbell and the device wants to be told: what it says may change at any time.
    pub fn wants_kick(&self) -> bool {
        self.notified != self.available && self.memory.used_flags().load(Ordering::Relaxed) & NO_NOTIFY == 0
    }

    /// Rings the doorbell, if something was made available since the last time and the device wants to be told.
    pub fn kick(&mut self, transport: &Transport) {
        if self.notified == self.available {
            return;
        }
        self.notified = self.available;
        // The index must be visible before the flag is read, or both sides could wait for the other.
        fence(Ordering::SeqCst);
        if self.memory.used_flags().load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            transport.notify(self.index);
        }
    }
}

#[cfg(test)]
mod tests;
