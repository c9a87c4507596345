//! From the tap into the guest's receive buffers.
//!
//! Normally the kernel fills the guest's buffers itself: enough chains are collected to hold the longest frame there can
//! be, the frame is read into them, those not needed stay collected. Only when the guest has too little room for that is the frame
//! read aside and waits until it fits.

use std::collections::VecDeque;

use super::tap::Tap;
use super::{BUDGET, BUDGET_BYTES, FRAME_MAX, Frame, HEADER_SIZE, NetStats, feature};
use crate::limit::Throttle;
use crate::memory::{GuestRange, IoVec, Memory};
use crate::virtio::Progress;
use crate::virtio::queue::{QueueError, VirtQueue, write_at};

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;
/// Most pieces the kernel takes in one read (IOV_MAX).
const IOV_MAX: usize = 1024;
/// Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
const MTU_MIN: u16 = 1500;

/// A receive buffer taken from the queue and not filled yet.
#[derive(Debug)]
struct Buffer {
    head: u16,
    len: u32,
    /// Most drivers give one piece; then `rest` costs no allocation.
    first: GuestRange,
    rest: Vec<GuestRange>,
}

impl Buffer {
    fn pieces(&self) -> impl Iterator<Item = GuestRange> + '_ {
        std::iter::once(self.first).chain(self.rest.iter().copied())
    }
}

/// The receiving half of a network device.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// Frames that come before those in the tap.
    pub pending: VecDeque<Frame>,
    /// How many of these come before those in the tap's other queues, too.
    pub injected: usize,
    /// Nothing is taken from the tap for now.
    pub blocked: bool,
    /// The interface has vanished.
    pub gone: bool,
    /// Nothing is taken from the tap.
    pub stopped: bool,
    /// Only what is pending is delivered.
    pub held: bool,
    /// A frame waits, or may, until the driver gives more buffers.
    pub starved: bool,
    buffers: VecDeque<Buffer>,
    /// Room in `buffers`.
    room: u64,
    /// Pieces in `buffers`.
    pieces: usize,
    mergeable: bool,
    /// The longest frame that can come.
    frame_max: usize,
    tap_ready: bool,
    scratch: Vec<IoVec>,
    /// For [`Tap::read_frame`].
    aside: Vec<u8>,
}

impl Receiver {
    pub fn activate(&mut self, features: u64, mtu: u16) {
        self.mergeable = features & feature::MRG_RXBUF != 0;
        self.frame_max = match features & feature::LARGE_RECEIVE {
            0 => HEADER_SIZE + ETHERNET + usize::from(mtu.max(MTU_MIN)),
            _ => FRAME_MAX,
        };
        self.tap_ready = true;
    }

    pub fn reset(&mut self) {
        let (stopped, held) = (self.stopped, self.held);
        *self = Receiver { stopped, held, ..Receiver::default() };
    }

    pub fn tap_may_have_frames(&mut self) {
        self.tap_ready = true;
    }

    /// Adds the pieces of the buffers taken from the queue and not filled yet.
    pub fn collected(&self, out: &mut Vec<GuestRange>) {
        out.extend(self.buffers.iter().flat_map(Buffer::pieces));
    }

    /// Puts all buffers back in the queue.
    pub fn give_back(&mut self, queue: &mut VirtQueue) {
        queue.unpop(self.buffers.len() as u16);
        self.buffers.clear();
        self.room = 0;
        self.pieces = 0;
    }

    /// Delivers what there is.
    pub fn receive(
        &mut self,
        tap: &Tap,
        queue: &mut VirtQueue,
        memory: &Memory,
        limit: &mut Throttle,
        stats: &NetStats,
    ) -> Result<Progress, QueueError> {
        if self.stopped || !queue.ready() {
            return Ok(Progress::Done);
        }
        self.starved = false;
        let mut bytes = BUDGET_BYTES;
        for _ in 0..BUDGET {
            if bytes == 0 {
                break;
            }
            if !self.pending.is_empty() {
                if !self.deliver_pending(queue, memory, stats)? {
                    self.starved = true;
                    return Ok(Progress::Done);
                }
                continue;
            }
            if self.held || self.blocked || !self.tap_ready {
                return Ok(Progress::Done);
            }
            // How long the next frame is nobody knows before it is read; it is paid off afterwards. A timer brings us back.
            if !limit.is_ready(1) {
                return Ok(Progress::Done);
            }
            self.collect(queue, memory, self.frame_max)?;
            if self.buffers.is_empty() {
                self.starved = true;
                return Ok(Progress::Done);
            }
            let read = if self.usable_room() >= self.frame_max as u64 {
                self.read_into_buffers(tap, queue, memory, stats)?
            } else {
                self.read_aside(tap, stats)
            };
            let Some(len) = read else {
                self.tap_ready = false;
                return Ok(Progress::Done);
            };
            limit.charge(len as u64);
            bytes = bytes.saturating_sub(len as u64);
        }
        Ok(Progress::More)
    }

    /// Room one frame can use.
    fn usable_room(&self) -> u64 {
        if self.mergeable { self.room } else { self.buffers.front().map_or(0, |b| u64::from(b.len)) }
    }

    /// Takes buffers from the queue until there is room for `need` bytes or no more to be had.
    fn collect(&mut self, queue: &mut VirtQueue, memory: &Memory, need: usize) -> Result<(), QueueError> {
        while self.usable_room() < need as u64 && (self.mergeable || self.buffers.is_empty()) {
            if self.pieces + crate::virtio::queue::CHAIN_MAX > IOV_MAX {
                break;
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.arm(memory)? {
                    continue;
                }
                return Ok(());
            };
            let mut pieces = chain.writable.into_iter().filter(|r| !r.is_empty());
            let Some(first) = pieces.next() else {
                return Err(QueueError("receive buffer that cannot be written".into()));
            };
            let rest: Vec<_> = pieces.collect();
            let len = u64::from(first.len()) + crate::virtio::queue::total(&rest);
            if len < HEADER_SIZE as u64 {
                return Err(QueueError(format!("receive buffer of {len} bytes")));
            }
            let len = u32::try_from(len).map_err(|_| QueueError(format!("receive buffer of {len} bytes")))?;
            self.room += u64::from(len);
            self.pieces += 1 + rest.len();
            self.buffers.push_back(Buffer { head: chain.head, len, first, rest });
        }
        // A doorbell costs the guest more than all the rest of a small frame.
        queue.rest(memory)
    }

    /// Reads one frame into the collected buffers; its length, if there is one.
    fn read_into_buffers(
        &mut self,
        tap: &Tap,
        queue: &mut VirtQueue,
        memory: &Memory,
        stats: &NetStats,
    ) -> Result<Option<usize>, QueueError> {
        let usable = if self.mergeable { self.buffers.len() } else { 1 };
        self.scratch.clear();
        let pieces = self.buffers.iter().take(usable).flat_map(Buffer::pieces).map(|r| memory.iovec(r));
        self.scratch.extend(pieces);
        match tap.read(&self.scratch) {
            Ok(Some(n)) if n >= HEADER_SIZE => {
                self.use_buffers(queue, memory, n, true)?;
                stats.rx_frames.inc();
                stats.rx_bytes.add((n - HEADER_SIZE) as u64);
                Ok(Some(n))
            }
            Ok(Some(n)) => {
                stats.rx_dropped.inc();
                Ok(Some(n))
            }
            Ok(None) => Ok(None),
            Err(e) => {
                self.failed(&e);
                Ok(None)
            }
        }
    }

    fn failed(&mut self, e: &std::io::Error) {
        self.gone |= super::tap::is_gone(e);
        log::debug!("tap: {e}");
    }

    fn read_aside(&mut self, tap: &Tap, stats: &NetStats) -> Option<usize> {
        match tap.read_frame(self.frame_max, &mut self.aside) {
            Ok(Some(frame)) => {
                let len = frame.len();
                match len {
                    HEADER_SIZE.. => self.pending.push_back(frame),
                    _ => stats.rx_dropped.inc(),
                }
                Some(len)
            }
            Ok(None) => None,
            Err(e) => {
                self.failed(&e);
                None
            }
        }
    }

    fn take_pending(&mut self) -> Option<Frame> {
        self.injected = self.injected.saturating_sub(1);
        self.pending.pop_front()
    }

    /// Copies the first pending frame into buffers; false if it has to wait for more of them.
    fn deliver_pending(
        &mut self,
        queue: &mut VirtQueue,
        memory: &Memory,
        stats: &NetStats,
    ) -> Result<bool, QueueError> {
        let Some(need) = self.pending.front().map(Vec::len) else { return Ok(false) };
        self.collect(queue, memory, need)?;
        if self.usable_room() < need as u64 {
            // More room can come only if the driver still has buffers to give.
            let all = self.buffers.len() >= usize::from(queue.size());
            let never = all || self.pieces + crate::virtio::queue::CHAIN_MAX > IOV_MAX;
            if !(never || !self.mergeable && !self.buffers.is_empty()) {
                return Ok(false);
            }
            self.take_pending();
            stats.rx_dropped.inc();
            return Ok(true);
        }
        let Some(frame) = self.take_pending() else { return Ok(false) };
        let mut rest = &frame[..];
        for piece in self.buffers.iter().flat_map(Buffer::pieces) {
            let (now, later) = rest.split_at(rest.len().min(piece.len() as usize));
            if !write_at(memory, &[piece], 0, now) {
                return Err(QueueError("receive buffer outside memory".into()));
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.use_buffers(queue, memory, need, false)?;
        stats.rx_frames.inc();
        stats.rx_bytes.add((need - HEADER_SIZE) as u64);
        Ok(true)
    }

    /// Gives the guest the buffers that hold a frame of `len` bytes. `mark`: the kernel wrote them, so mark their pages.
    fn use_buffers(
        &mut self,
        queue: &mut VirtQueue,
        memory: &Memory,
        len: usize,
        mark: bool,
    ) -> Result<(), QueueError> {
        let mut count = 0u16;
        let mut covered = 0u64;
        for buffer in &self.buffers {
            count += 1;
            covered += u64::from(buffer.len);
            if covered >= len as u64 {
                break;
            }
        }
        let Some(first) = self.buffers.front() else { return Ok(()) };
        // Before the used ring says that the frame is there.
        let pieces: [GuestRange; 1] = [first.first];
        let written = match first.rest.is_empty() {
            true => write_at(memory, &pieces, NUM_BUFFERS, &count.to_le_bytes()),
            false => {
                let pieces: Vec<_> = first.pieces().collect();
                write_at(memory, &pieces, NUM_BUFFERS, &count.to_le_bytes())
            }
        };
        if !written {
            return Err(QueueError("no room for the header".into()));
        }
        let mut left = len;
        for _ in 0..count {
            let Some(buffer) = self.buffers.pop_front() else { break };
            self.room -= u64::from(buffer.len);
            self.pieces -= 1 + buffer.rest.len();
            let used = left.min(buffer.len as usize);
            left -= used;
            if mark {
                let mut unmarked = used as u32;
                for piece in buffer.pieces() {
                    memory.mark_dirty(piece, unmarked);
                    unmarked = unmarked.saturating_sub(piece.len());
                }
            }
            queue.push(memory, buffer.head, used as u32)?;
        }
        Ok(())
    }
}
