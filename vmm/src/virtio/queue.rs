//! One virtqueue: `virtio-queue`'s split ring with what devices need around it.
//!
//! Always true: every address comes out as a [`GuestRange`]; a chain has at most [`CHAIN_MAX`] pieces; the used ring and
//! the notification fields are written only when they change (a write makes a page dirty for a port).

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::memory::{GuestRange, Memory};

/// Most pieces of one chain: more than any driver of ours or Linux uses, less than IOV_MAX.
pub const CHAIN_MAX: usize = 512;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// The driver has broken its queue; the device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct QueueError(pub String);

impl From<virtio_queue::Error> for QueueError {
    fn from(e: virtio_queue::Error) -> Self {
        QueueError(e.to_string())
    }
}

fn outside(e: vm_memory::GuestMemoryError) -> QueueError {
    QueueError(format!("ring: {e}"))
}

/// Everything about a queue that is not in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Size offered.
    pub max_size: u16,
    /// Size chosen.
    pub size: u16,
    /// Set up by the driver.
    pub ready: bool,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
    /// Next entry to take from the available ring.
    pub next_avail: u16,
    /// Next entry to write in the used ring.
    pub next_used: u16,
    /// VIRTIO_F_RING_EVENT_IDX.
    pub event_idx: bool,
}

/// A chain of descriptors, taken from the available ring.
#[derive(Debug, Default, Clone)]
pub struct Chain {
    /// What goes into the used ring.
    pub head: u16,
    /// Pieces the device reads, in order.
    pub readable: Vec<GuestRange>,
    /// Pieces the device writes, in order.
    pub writable: Vec<GuestRange>,
}

/// A queue.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// Where the available ring stood when the driver was last asked to notify.
    armed_at: Option<u16>,
    /// Something was put in the used ring since [`VirtQueue::take_used`].
    used: bool,
    /// Whoever works the ring elsewhere has decided that the driver is to be interrupted.
    wanted: bool,
    /// The device looks again by itself: the driver need not ring.
    polled: bool,
    /// The driver was told so (without event indices, VIRTQ_USED_F_NO_NOTIFY; with them, it was not asked to ring).
    muted: bool,
    /// The driver was told, in the same way, that the device has enough for now: see [`VirtQueue::rest`].
    resting: bool,
    /// Whether the driver knows that it need not ring; nobody knows where somebody else has worked the ring before.
    told: Option<bool>,
    /// Chains taken from and given back so far.
    moves: u64,
    /// Where the used ring stood when a driver that had asked for no interrupts was last found waiting.
    waited_at: Option<u16>,
}

impl VirtQueue {
    /// A queue not set up yet.
    pub fn new(max_size: u16) -> Result<VirtQueue> {
        let queue = Queue::new(max_size).map_err(|e| Error::State(e.to_string()))?;
        Ok(VirtQueue::around(queue))
    }

    /// A queue nobody has looked at yet.
    fn around(queue: Queue) -> VirtQueue {
        VirtQueue {
            queue,
            armed_at: None,
            used: false,
            wanted: false,
            polled: false,
            muted: false,
            resting: false,
            told: None,
            moves: 0,
            waited_at: None,
        }
    }

    /// The registers.
    pub fn raw(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Whether the driver has set it up.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Its size.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How many chains the driver has made available that have not been taken; at most the queue's size.
    pub fn depth(&self, memory: &Memory) -> u16 {
        if !self.queue.ready() {
            return 0;
        }
        let index = self.queue.avail_idx(memory.ram().as_ref(), Ordering::Relaxed).map_or(0, |i| i.0);
        match index.wrapping_sub(self.queue.next_avail()) {
            n if n > self.queue.size() => 0,
            n => n,
        }
    }

    /// Back to before the driver.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.armed_at = None;
        self.used = false;
        self.wanted = false;
        self.polled = false;
        self.muted = false;
        self.resting = false;
        self.told = None;
        self.waited_at = None;
    }

    /// From now on (or no longer) whoever calls looks again by itself: [`VirtQueue::arm`] then tells the driver not to ring.
    pub fn set_polled(&mut self, polled: bool) {
        self.polled = polled;
    }

    /// Whether the driver was last told that it need not ring.
    pub fn is_muted(&self) -> bool {
        self.muted
    }

    /// Grows with each chain that is taken or given back.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// Has the driver ring again, without looking at what it did meanwhile.
    pub fn unmute(&mut self, memory: &Memory) {
        if std::mem::take(&mut self.muted) && !self.resting && self.queue.ready() {
            self.armed_at = None;
            self.told = Some(false);
            if let Err(e) = self.queue.enable_notification(memory.ram().as_ref()) {
                log::error!("virtqueue: {e}");
            }
        }
    }

    /// Tells the driver that it need not ring.
    fn hush(&mut self, memory: &Memory) -> std::result::Result<(), QueueError> {
        if self.told != Some(true) && self.queue.ready() {
            self.told = Some(true);
            self.queue.disable_notification(memory.ram().as_ref())?;
        }
        Ok(())
    }

    /// What the driver adds is not urgent: it need not ring until [`VirtQueue::arm`] asks it to, when the device has run out. For
    /// queues of buffers the device fills when it has something.
    pub fn rest(&mut self, memory: &Memory) -> std::result::Result<(), QueueError> {
        self.resting = true;
        self.hush(memory)
    }

    /// Another process or the kernel has used something and wants the driver interrupted.
    pub fn used_elsewhere(&mut self) {
        self.used = true;
        self.wanted = true;
    }

    /// The driver waits for the ring, which another process works, whatever it has said there of interrupts: by parking, while
    /// it cannot change its mind. Makes the other process interrupt it for the next buffer, and marks the queue used if some
    /// may have come since the driver last looked.
    pub fn awaited_elsewhere(&mut self, memory: &Memory) -> std::result::Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        let ram = memory.ram().as_ref();
        let avail = self.queue.avail_ring();
        let (at, asks) = if self.queue.event_idx_enabled() {
            // used_event, behind the available ring's entries.
            let at = avail.checked_add(4 + 2 * u64::from(self.queue.size()));
            (at, self.queue.used_idx(ram, Ordering::Acquire)?.0)
        } else {
            let flags: u16 = ram.load(GuestAddress(avail), Ordering::Relaxed).map_err(outside)?;
            (Some(avail), u16::from_le(flags) & !NO_INTERRUPT)
        };
        let at = GuestAddress(at.ok_or_else(|| QueueError("available ring outside memory".into()))?);
        let before: u16 = ram.load(at, Ordering::Relaxed).map_err(outside)?;
        if before == asks.to_le() {
            return Ok(());
        }
        ram.store(asks.to_le(), at, Ordering::Relaxed).map_err(outside)?;
        // The other side writes the index, then reads what is asked; this side the other way about: one sees the other.
        fence(Ordering::SeqCst);
        let used = self.queue.used_idx(ram, Ordering::Acquire)?.0;
        if self.waited_at != Some(used) {
            self.waited_at = Some(used);
            self.used_elsewhere();
        }
        Ok(())
    }

    /// Where the ring stands after another process or the kernel has worked it: `next_avail` is what it has taken.
    pub fn moved_elsewhere(&mut self, memory: &Memory, next_avail: u16) -> std::result::Result<(), QueueError> {
        let ram = memory.ram().as_ref();
        let next_used = self.queue.used_idx(ram, std::sync::atomic::Ordering::Acquire)?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used.0);
        self.armed_at = None;
        self.resting = false;
        self.told = None;
        Ok(())
    }

    /// Where the driver will write next; `None` if the queue is not set up.
    pub fn avail_index(&self, memory: &Memory) -> Option<u16> {
        let ready = self.queue.ready();
        ready
            .then(|| self.queue.avail_idx(memory.ram().as_ref(), std::sync::atomic::Ordering::Acquire).ok())?
            .map(|i| i.0)
    }

    /// Whether all of it lies in memory.
    pub fn is_valid(&self, memory: &Memory) -> bool {
        self.queue.is_valid(memory.ram().as_ref())
    }

    /// The next chain. A piece outside memory breaks the queue.
    pub fn pop(&mut self, memory: &Memory) -> std::result::Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let ram = memory.ram().as_ref();
        // An iterator is the only way to learn that the available index makes no sense.
        let Some(descriptors) = self.queue.iter(ram)?.next() else { return Ok(None) };
        let mut chain = Chain { head: descriptors.head_index(), ..Default::default() };
        if chain.head >= self.queue.size() {
            return Err(QueueError(format!("descriptor {} in a queue of {}", chain.head, self.queue.size())));
        }
        for d in descriptors {
            let range = memory
                .range(d.addr(), d.len())
                .ok_or_else(|| QueueError(format!("buffer {:#x}+{:#x} outside memory", d.addr().0, d.len())))?;
            let list = if d.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            if list.len() == CHAIN_MAX {
                return Err(QueueError(format!("chain of more than {CHAIN_MAX} pieces")));
            }
            list.push(range);
        }
        if chain.readable.is_empty() && chain.writable.is_empty() {
            return Err(QueueError("chain without a piece".into()));
        }
        self.moves = self.moves.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Adds the pieces the device may write of all chains that have not been taken, until there are `max` in `out` or more. A ring
    /// that makes no sense ends it: whoever serves the queue will find that, too.
    pub fn posted(&mut self, memory: &Memory, max: usize, out: &mut Vec<GuestRange>) {
        let (at, moves) = (self.queue.next_avail(), self.moves);
        for _ in 0..self.size() {
            match self.pop(memory) {
                Ok(Some(chain)) if out.len() < max => out.extend(chain.writable),
                _ => break,
            }
        }
        // Also behind a chain that was taken and found to make no sense.
        self.queue.set_next_avail(at);
        self.moves = moves;
    }

    /// Puts the last `n` chains back: they were taken, not used.
    pub fn unpop(&mut self, n: u16) {
        let next = self.queue.next_avail().wrapping_sub(n);
        self.queue.set_next_avail(next);
        self.moves = self.moves.wrapping_sub(u64::from(n));
    }

    /// Gives a chain back with `written` bytes in it.
    pub fn push(&mut self, memory: &Memory, head: u16, written: u32) -> std::result::Result<(), QueueError> {
        self.queue.add_used(memory.ram().as_ref(), head, written)?;
        self.moves = self.moves.wrapping_add(1);
        self.used = true;
        Ok(())
    }

    /// Asks the driver to ring for what it adds from now on; true if it has added something already. While the queue is polled,
    /// tells it instead that it need not.
    pub fn arm(&mut self, memory: &Memory) -> std::result::Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.resting = false;
        self.muted = self.polled;
        if self.polled {
            self.hush(memory)?;
            return Ok(false);
        }
        if self.told != Some(false) {
            self.told = Some(false);
            self.armed_at = self.queue.event_idx_enabled().then_some(self.queue.next_avail());
            return Ok(self.queue.enable_notification(memory.ram().as_ref())?);
        }
        let at = self.queue.next_avail();
        if self.queue.event_idx_enabled() && self.armed_at != Some(at) {
            self.armed_at = Some(at);
            return Ok(self.queue.enable_notification(memory.ram().as_ref())?);
        }
        // Without event indices the driver always rings; with them it still does for what comes after `at`.
        Ok(false)
    }

    /// Whether something was used since the last call, and whether the driver wants an interrupt for it.
    pub fn take_used(&mut self, memory: &Memory) -> Option<bool> {
        if !std::mem::take(&mut self.used) {
            return None;
        }
        if std::mem::take(&mut self.wanted) {
            return Some(true);
        }
        let ram = memory.ram().as_ref();
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(ram).unwrap_or(true)
        } else {
            let flags: u16 = ram.read_obj(GuestAddress(self.queue.avail_ring())).unwrap_or(0);
            flags & NO_INTERRUPT == 0
        };
        Some(wanted)
    }

    /// The state.
    pub fn save(&self) -> QueueState {
        let s = self.queue.state();
        QueueState {
            max_size: s.max_size,
            size: s.size,
            ready: s.ready,
            desc_table: s.desc_table,
            avail_ring: s.avail_ring,
            used_ring: s.used_ring,
            next_avail: s.next_avail,
            next_used: s.next_used,
            event_idx: s.event_idx_enabled,
        }
    }

    /// A queue in a saved state, checked like one a driver sets up.
    pub fn restore(state: &QueueState, max_size: u16, memory: &Memory) -> Result<VirtQueue> {
        if state.max_size != max_size {
            return Err(Error::State(format!("queue of {} instead of {max_size}", state.max_size)));
        }
        let raw = virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        };
        let queue = Queue::try_from(raw).map_err(|e| Error::State(format!("queue: {e}")))?;
        let queue = VirtQueue::around(queue);
        if queue.ready() && !queue.is_valid(memory) {
            return Err(Error::State("queue outside memory".into()));
        }
        Ok(queue)
    }
}

/// Total length of pieces.
pub fn total(ranges: &[GuestRange]) -> u64 {
    ranges.iter().map(|r| u64::from(r.len())).sum()
}

/// Takes `n` bytes off the front of `ranges` into `out`; false if there are fewer.
pub fn read_front(memory: &Memory, ranges: &mut Vec<GuestRange>, out: &mut [u8]) -> bool {
    let mut done = 0;
    let mut gone = 0;
    for range in ranges.iter_mut() {
        let (take, rest) = range.split_at((out.len() - done) as u32);
        let n = take.len() as usize;
        if memory.ram().read_slice(&mut out[done..done + n], take.address()).is_err() {
            return false;
        }
        done += n;
        *range = rest;
        if !rest.is_empty() {
            break;
        }
        gone += 1;
    }
    ranges.drain(..gone);
    done == out.len()
}

/// Writes `bytes` at `offset` of `ranges`; false if they do not fit.
pub fn write_at(memory: &Memory, ranges: &[GuestRange], mut offset: u64, mut bytes: &[u8]) -> bool {
    for range in ranges {
        if bytes.is_empty() {
            break;
        }
        if offset >= u64::from(range.len()) {
            offset -= u64::from(range.len());
            continue;
        }
        let (_, rest) = range.split_at(offset as u32);
        offset = 0;
        let n = bytes.len().min(rest.len() as usize);
        if memory.ram().write_slice(&bytes[..n], rest.address()).is_err() {
            return false;
        }
        bytes = &bytes[n..];
    }
    bytes.is_empty()
}

#[cfg(test)]
mod tests;
