//! virtio-blk (virtio 1.2, section 5.2): a disk.
//!
//! Owns the requests in flight and, until they are complete, the buffers of their callers: a future that is dropped
//! leaves its buffers with the driver until the device is done with them.
//! Always true: a request ends exactly once, with the device's status, or with an error if the device broke the
//! rules; `flush` says what it says only about writes that had ended before it began.
//! A transfer may have up to [`MAX_TRANSFER`] bytes in any number of buffers; what the device cannot take in one
//! request (`seg_max`, `size_max`, ring size) is split. When the ring is full, callers wait.
use super::VirtioError;
use super::mmio::{Transport, feature};
use super::queue::{Descriptor, Queue, QueueError, Segment};
use crate::exec::{self, Device};
use crate::sync::WaitList;
use alloc::{boxed::Box, rc::Rc, string::String, vec, vec::Vec};
use core::cell::{Cell, RefCell};
use core::future::poll_fn;
use core::task::{Poll, Waker};

/// Bytes in a sector: the unit of addresses.
pub const SECTOR: u64 = 512;
/// Most bytes of one transfer.
pub const MAX_TRANSFER: usize = 4 << 20;
/// Queue entries asked for.
const QUEUE_SIZE: u16 = 256;
/// Most data segments of one request, whatever the device allows.
const MAX_SEGMENTS: usize = 254;

/// Feature bits.
mod bit {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
}

/// Request types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    In = 0,
    Out = 1,
    Flush = 4,
    GetId = 8,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The device said VIRTIO_BLK_S_IOERR.
    #[error("the device reports an I/O error")]
    Io,
    /// The device said VIRTIO_BLK_S_UNSUPP.
    #[error("the device does not support the request")]
    Unsupported,
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// Offset or length not a multiple of 512, or a buffer's length.
    #[error("offset {offset} or length {length} is not a multiple of {SECTOR}")]
    Alignment {
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
    },
    /// Past the end, or larger than [`MAX_TRANSFER`].
    #[error("{length} bytes at {offset}: past the end of the disk, or more than {MAX_TRANSFER} bytes")]
    Range {
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
    },
    /// The device wrote less than it should, or an unknown status.
    #[error("the device answered with {written} bytes and status {status}")]
    Answer {
        /// Bytes written.
        written: u32,
        /// Status.
        status: u8,
    },
    /// The device broke the rules of the ring and is not used any more.
    #[error("the device is broken: {0}")]
    Broken(QueueError),
}

/// A part of a transfer: told when the device is done with it.
trait Part {
    fn done(&self, result: Result<(), BlockError>);
}

/// A transfer: its buffers, and how many of its parts are still out.
struct Transfer<B> {
    buffers: RefCell<Vec<B>>,
    parts: Cell<usize>,
    error: Cell<Option<BlockError>>,
    waker: RefCell<Option<Waker>>,
}

impl<B> Part for Transfer<B> {
    fn done(&self, result: Result<(), BlockError>) {
        if let Err(e) = result {
            self.error.set(self.error.get().or(Some(e)));
        }
        self.parts.set(self.parts.get() - 1);
        if self.parts.get() == 0
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}

/// What the device reads and writes besides the data. Boxed: its address must not change.
#[derive(Default)]
#[repr(C, align(16))]
struct Frame {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
    table: Vec<Descriptor>,
}

struct InFlight {
    frame: Box<Frame>,
    /// Bytes the device must write for success.
    expected: u32,
    part: Rc<dyn Part>,
}

struct State {
    queue: Queue,
    /// By head of chain.
    in_flight: Vec<Option<InFlight>>,
    /// Frames to use again.
    #[allow(
        clippy::vec_box,
        reason = "a frame keeps its address while it is in use, and is moved between here and there"
    )]
    spare: Vec<Box<Frame>>,
    broken: Option<QueueError>,
}

struct Disk {
    transport: Transport,
    state: RefCell<State>,
    room: WaitList,
    capacity: u64,
    block_size: u32,
    indirect: bool,
    read_only: bool,
    flush: bool,
    max_segments: usize,
    max_segment: u32,
}

/// A disk. Clones are the same disk.
#[derive(Clone)]
pub struct BlockDevice(Rc<Disk>);

impl BlockDevice {
    /// Sets the device up.
    pub fn new(transport: Transport) -> Result<BlockDevice, VirtioError> {
        let wanted = bit::SIZE_MAX | bit::SEG_MAX | bit::RO | bit::BLK_SIZE | bit::FLUSH | feature::INDIRECT_DESC;
        let features = transport.negotiate(wanted)?;
        let queue = transport.queue(0, QUEUE_SIZE)?;
        let has = |bit| features & bit != 0;
        let capacity = u64::from(transport.config32(0)) | u64::from(transport.config32(4)) << 32;
        let max_segment = if has(bit::SIZE_MAX) { transport.config32(8) } else { u32::MAX };
        let max_segments = if has(bit::SEG_MAX) { transport.config32(12) as usize } else { MAX_SEGMENTS };
        let block_size = if has(bit::BLK_SIZE) { transport.config32(20) } else { SECTOR as u32 };
        if u64::from(max_segment) < SECTOR || max_segments == 0 {
            return Err(transport.fail(VirtioError::Config("seg_max or size_max is too small")));
        }
        if capacity.checked_mul(SECTOR).is_none() {
            return Err(transport.fail(VirtioError::Config("capacity is too large")));
        }
        // A chain has a header and a status besides the data, and is never longer than the ring.
        let room = usize::from(queue.size()).saturating_sub(2);
        if room == 0 {
            return Err(transport.fail(VirtioError::Config("the queue is too small")));
        }
        transport.ready();
        let size = usize::from(queue.size());
        let disk = Rc::new(Disk {
            capacity: capacity * SECTOR,
            block_size,
            indirect: has(feature::INDIRECT_DESC),
            read_only: has(bit::RO),
            flush: has(bit::FLUSH),
            max_segments: max_segments.min(room).min(MAX_SEGMENTS),
            max_segment: max_segment & !(SECTOR as u32 - 1),
            room: WaitList::new(),
            state: RefCell::new(State {
                queue,
                in_flight: (0..size).map(|_| None).collect(),
                spare: Vec::new(),
                broken: None,
            }),
            transport,
        });
        exec::register(disk.clone());
        Ok(BlockDevice(disk))
    }

    /// Size in bytes.
    pub fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// The block size the device likes, in bytes (offsets and lengths need only be multiples of 512).
    pub fn block_size(&self) -> u32 {
        self.0.block_size
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.0.read_only
    }

    /// Reads from `offset` (bytes) into the buffers, one after the other, and gives them back.
    pub async fn read<B: AsMut<[u8]> + 'static>(
        &self,
        offset: u64,
        mut buffers: Vec<B>,
    ) -> (Vec<B>, Result<(), BlockError>) {
        let segments = segments(buffers.iter_mut().map(|b| {
            let b = b.as_mut();
            (b.as_mut_ptr() as u64, b.len())
        }));
        self.transfer(Kind::In, offset, buffers, segments).await
    }

    /// Writes the buffers, one after the other, from `offset` (bytes) on, and gives them back. Not on the medium for
    /// certain before a [`BlockDevice::flush`] that begins after this has ended.
    pub async fn write<B: AsRef<[u8]> + 'static>(
        &self,
        offset: u64,
        buffers: Vec<B>,
    ) -> (Vec<B>, Result<(), BlockError>) {
        if self.0.read_only {
            return (buffers, Err(BlockError::ReadOnly));
        }
        let segments = segments(buffers.iter().map(|b| {
            let b = b.as_ref();
            (b.as_ptr() as u64, b.len())
        }));
        self.transfer(Kind::Out, offset, buffers, segments).await
    }

    /// Makes durable all writes that have ended. A device without a volatile cache has nothing to do.
    pub async fn flush(&self) -> Result<(), BlockError> {
        if !self.0.flush {
            return Ok(());
        }
        self.run(Kind::Flush, 0, Vec::<u8>::new(), vec![Vec::new()]).await.1
    }

    /// The device's id string.
    pub async fn serial(&self) -> Result<String, BlockError> {
        let mut id = vec![[0u8; 20]];
        let segments = vec![vec![Segment { address: id[0].as_mut_ptr() as u64, length: 20, device_writes: true }]];
        let (id, result) = self.run(Kind::GetId, 0, id, segments).await;
        result?;
        let id = id.first().map_or(&[][..], |id| id);
        let end = id.iter().position(|&b| b == 0).unwrap_or(id.len());
        Ok(String::from_utf8_lossy(&id[..end]).into_owned())
    }

    async fn transfer<B: 'static>(
        &self,
        kind: Kind,
        offset: u64,
        buffers: Vec<B>,
        segments: Vec<(u64, usize)>,
    ) -> (Vec<B>, Result<(), BlockError>) {
        let length = segments.iter().map(|(_, len)| *len as u64).sum::<u64>();
        if length > MAX_TRANSFER as u64 || offset.checked_add(length).is_none_or(|end| end > self.0.capacity) {
            return (buffers, Err(BlockError::Range { offset, length }));
        }
        if !offset.is_multiple_of(SECTOR) || segments.iter().any(|(_, len)| !len.is_multiple_of(SECTOR as usize)) {
            return (buffers, Err(BlockError::Alignment { offset, length }));
        }
        if length == 0 {
            return (buffers, Ok(()));
        }
        let requests = self.0.split(&segments, kind == Kind::In);
        self.run(kind, offset / SECTOR, buffers, requests).await
    }

    /// Submits the requests of one transfer and waits for all.
    async fn run<B: 'static>(
        &self,
        kind: Kind,
        mut sector: u64,
        buffers: Vec<B>,
        requests: Vec<Vec<Segment>>,
    ) -> (Vec<B>, Result<(), BlockError>) {
        let disk = &self.0;
        let transfer = Rc::new(Transfer {
            buffers: RefCell::new(buffers),
            parts: Cell::new(requests.len()),
            error: Cell::new(None),
            waker: RefCell::new(None),
        });
        for segments in &requests {
            let bytes: u64 = segments.iter().map(|s| u64::from(s.length)).sum();
            poll_fn(|cx| {
                // After an error the rest need not go out.
                let submitted = match transfer.error.get() {
                    Some(e) => Some(Err(e)),
                    None => disk.submit(kind, sector, segments, transfer.clone()),
                };
                match submitted {
                    Some(Ok(())) => Poll::Ready(()),
                    Some(Err(e)) => {
                        transfer.done(Err(e));
                        Poll::Ready(())
                    }
                    None => {
                        disk.room.add(cx.waker());
                        Poll::Pending
                    }
                }
            })
            .await;
            sector += bytes / SECTOR;
        }
        poll_fn(|cx| {
            if transfer.parts.get() == 0 {
                return Poll::Ready(());
            }
            *transfer.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        (transfer.buffers.take(), transfer.error.get().map_or(Ok(()), Err))
    }
}

/// Addresses and lengths of the buffers, neighbours joined, empty ones left out.
fn segments(buffers: impl Iterator<Item = (u64, usize)>) -> Vec<(u64, usize)> {
    let mut joined: Vec<(u64, usize)> = Vec::new();
    for (address, length) in buffers.filter(|(_, length)| *length > 0) {
        match joined.last_mut() {
            // Joined only at a sector boundary, so that each stays a multiple of a sector if all are.
            Some((a, l)) if *a + *l as u64 == address && l.is_multiple_of(SECTOR as usize) => *l += length,
            _ => joined.push((address, length)),
        }
    }
    joined
}

impl Disk {
    /// Cuts a transfer into requests the device can take.
    fn split(&self, segments: &[(u64, usize)], device_writes: bool) -> Vec<Vec<Segment>> {
        let mut requests = vec![Vec::new()];
        for &(mut address, mut length) in segments {
            while length > 0 {
                let piece = length.min(self.max_segment as usize);
                if requests.last().is_some_and(|r| r.len() == self.max_segments) {
                    requests.push(Vec::new());
                }
                if let Some(request) = requests.last_mut() {
                    request.push(Segment { address, length: piece as u32, device_writes });
                }
                address += piece as u64;
                length -= piece;
            }
        }
        requests
    }

    /// Puts a request in the ring. `None`: no room now.
    fn submit(&self, kind: Kind, sector: u64, data: &[Segment], part: Rc<dyn Part>) -> Option<Result<(), BlockError>> {
        let mut state = self.state.borrow_mut();
        if let Some(e) = state.broken {
            return Some(Err(BlockError::Broken(e)));
        }
        let needed = if self.indirect { 1 } else { data.len() + 2 };
        if usize::from(state.queue.free()) < needed {
            return None;
        }
        let mut frame = state.spare.pop().unwrap_or_default();
        frame.kind = kind as u32;
        frame.sector = sector;
        frame.status = u8::MAX;
        let base = &raw const *frame as u64;
        let mut chain = Vec::with_capacity(data.len() + 2);
        chain.push(Segment { address: base, length: 16, device_writes: false });
        chain.extend_from_slice(data);
        chain.push(Segment { address: &raw const frame.status as u64, length: 1, device_writes: true });
        let mut table = core::mem::take(&mut frame.table);
        // SAFETY: header, status and table lie in the boxed frame, the data in buffers the transfer owns; `in_flight`
        // holds both until the chain comes back.
        let head = unsafe {
            if self.indirect { state.queue.add_indirect(&mut table, &chain) } else { state.queue.add(&chain) }
        };
        frame.table = table;
        let head = head?;
        let expected = chain.iter().filter(|s| s.device_writes).map(|s| s.length).sum();
        state.in_flight[usize::from(head)] = Some(InFlight { frame, expected, part });
        Some(Ok(()))
    }

    /// What a finished request says.
    fn verdict(request: &InFlight, written: u32) -> Result<(), BlockError> {
        // SAFETY: inside the frame, which the request owns; the device wrote it.
        let status = unsafe { (&raw const request.frame.status).read_volatile() };
        match status {
            0 if written >= request.expected => Ok(()),
            1 => Err(BlockError::Io),
            2 => Err(BlockError::Unsupported),
            status => Err(BlockError::Answer { written, status }),
        }
    }
}

impl Device for Disk {
    fn poll(&self) -> bool {
        let mut any = false;
        loop {
            let mut state = self.state.borrow_mut();
            if state.broken.is_some() {
                return any;
            }
            let finished = match state.queue.pop() {
                Ok(None) => break,
                Ok(Some((head, written))) => state.in_flight[usize::from(head)].take().map(|r| (r, written)),
                Err(e) => {
                    log::error!("disk given up: {e}");
                    state.broken = Some(e);
                    // A reset takes the buffers away from the device; then they may go back to their owners.
                    self.transport.reset();
                    let lost: Vec<_> = state.in_flight.iter_mut().filter_map(Option::take).collect();
                    drop(state);
                    for request in lost {
                        request.part.done(Err(BlockError::Broken(e)));
                    }
                    any = true;
                    break;
                }
            };
            drop(state);
            any = true;
            if let Some((request, written)) = finished {
                request.part.done(Self::verdict(&request, written));
                self.state.borrow_mut().spare.push(request.frame);
            }
        }
        if any {
            self.room.wake_all();
        }
        any
    }

    fn pending(&self) -> bool {
        let state = self.state.borrow();
        state.broken.is_none() && state.queue.has_used()
    }

    fn is_quiet(&self) -> bool {
        let state = self.state.borrow();
        state.broken.is_some() || state.queue.in_flight() == 0
    }

    fn wants_kick(&self) -> bool {
        self.state.borrow().queue.wants_kick()
    }

    fn kick(&self) {
        self.state.borrow_mut().queue.kick(&self.transport);
    }
}

#[cfg(test)]
mod tests;
