//! virtio-blk (virtio 1.2, section 5.2) on a raw file or block device.
//!
//! Owns the open image, its lock, and the requests in flight. Always true: a flush is answered after fdatasync has
//! succeeded; a request that fails on the host is answered with an error, counted and logged, and the VM lives; an image that is
//! written has one writer. Survives: a full disk, I/O errors, images that shrink, any request a guest can make up.

mod image;
mod request;

use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Chain, QueueError, VirtQueue, total, write_at};
use super::{Device, DeviceState, Progress, Work};
use crate::config::DiskConfig;
use crate::error::{Error, Result, host};
use crate::memory::Memory;
use crate::metrics::Exposition;
use crate::stats::Counter;
use image::Image;
use request::{Operation, Parsed, Request, Status};

/// Bytes of a sector, the unit of the protocol.
pub const SECTOR: u64 = 512;
/// Memory all requests together may have for buffers the image cannot be read into or written from directly.
pub const BOUNCE_MAX: usize = 2 << 20;

const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 128;
/// Requests in flight at most: as many as the queue holds.
const DEPTH: usize = QUEUE_SIZE as usize;
/// Data pieces of a request: all of the queue but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const ID_SIZE: usize = 20;
/// Requests logged as failed, per device; more are only counted.
const LOGGED_MAX: u64 = 100;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;

/// State that moves with the guest: there is none besides the queue once nothing is in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Size in sectors that the guest was told.
    pub capacity: u64,
}

#[derive(Debug, Default)]
struct BlkStats {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
    errors: Counter,
    bounced: Counter,
}

/// A disk.
pub struct Blk {
    id: String,
    image: Image,
    ring: IoUring,
    done: EventFd,
    requests: Vec<Option<Request>>,
    free: Vec<u16>,
    in_flight: usize,
    bounce: usize,
    unsubmitted: usize,
    stats: BlkStats,
}

impl Blk {
    /// Opens and locks the image.
    pub fn open(config: &DiskConfig) -> Result<Blk> {
        let image = Image::open(&config.path, config.readonly)?;
        let ring = IoUring::builder()
            .setup_clamp()
            .build(QUEUE_SIZE.into())
            .map_err(host(format!("{}: io_uring", config.id)))?;
        let done = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        ring.submitter().register_eventfd(done.as_raw_fd()).map_err(host("io_uring: register eventfd"))?;
        Ok(Blk {
            id: config.id.clone(),
            image,
            ring,
            done,
            requests: (0..DEPTH).map(|_| None).collect(),
            free: (0..QUEUE_SIZE).rev().collect(),
            in_flight: 0,
            bounce: 0,
            unsubmitted: 0,
            stats: BlkStats::default(),
        })
    }

    fn next_completion(&mut self) -> Option<io_uring::cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Takes what has been completed. True if there was something.
    fn reap(&mut self, queue: &mut VirtQueue, memory: &Memory) -> std::result::Result<bool, QueueError> {
        let mut any = false;
        while let Some(entry) = self.next_completion() {
            any = true;
            let slot = entry.user_data() as usize;
            let Some(mut request) = self.requests.get_mut(slot).and_then(Option::take) else { continue };
            if request.advance(entry.result()) {
                // A part was done; the rest is a request of its own. Each time it gets shorter.
                self.submit(slot, request);
                continue;
            }
            self.free.push(slot as u16);
            self.in_flight -= 1;
            self.bounce -= request.bounce_len();
            self.finish(request, queue, memory)?;
        }
        Ok(any)
    }

    /// Answers a request whose I/O has ended.
    fn finish(
        &mut self,
        mut request: Request,
        queue: &mut VirtQueue,
        memory: &Memory,
    ) -> std::result::Result<(), QueueError> {
        let status = match &request.error {
            None => Status::Ok,
            Some(e) => {
                self.stats.errors.inc();
                if self.stats.errors.get() <= LOGGED_MAX {
                    log::error!("{}: {} at sector {} failed: {e}", self.id, request.operation, request.sector);
                }
                Status::IoError
            }
        };
        let mut written = 1;
        if status == Status::Ok {
            match request.operation {
                Operation::Read => {
                    self.stats.reads.inc();
                    self.stats.read_bytes.add(request.len.into());
                    request.deliver(memory);
                    written += request.len;
                }
                Operation::Write => {
                    self.stats.writes.inc();
                    self.stats.written_bytes.add(request.len.into());
                }
                Operation::Flush => self.stats.flushes.inc(),
            }
        }
        self.answer(request.head, request.status_at, status, written, queue, memory)
    }

    fn answer(
        &self,
        head: u16,
        status_at: crate::memory::GuestRange,
        status: Status,
        written: u32,
        queue: &mut VirtQueue,
        memory: &Memory,
    ) -> std::result::Result<(), QueueError> {
        if !write_at(memory, &[status_at], 0, &[status as u8]) {
            return Err(QueueError("no room for the status".into()));
        }
        queue.push(memory, head, written)
    }

    /// Hands a request to the kernel; it counts as in flight already.
    fn submit(&mut self, slot: usize, request: Request) {
        let fd = types::Fd(self.image.as_raw_fd());
        let entry = match request.operation {
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Read => {
                let pieces = request.pieces();
                opcode::Readv::new(fd, pieces.as_ptr().cast(), pieces.len() as u32).offset(request.offset()).build()
            }
            Operation::Write => {
                let pieces = request.pieces();
                opcode::Writev::new(fd, pieces.as_ptr().cast(), pieces.len() as u32).offset(request.offset()).build()
            }
        };
        self.requests[slot] = Some(request);
        self.enqueue(&entry.user_data(slot as u64));
    }

    fn enqueue(&mut self, entry: &squeue::Entry) {
        // SAFETY: the pieces and what they point to live in `self.requests` (or are guest memory) until the completion
        // with this slot has been taken; a `Vec` in a moved `Request` keeps its place.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: more retries than places cannot be, as places are as many as requests.
            self.flush_submissions();
        }
        self.unsubmitted += 1;
    }

    fn flush_submissions(&mut self) {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(n) => self.unsubmitted -= n.min(self.unsubmitted),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => {
                    log::error!("{}: io_uring: {e}", self.id);
                    break;
                }
            }
        }
    }

    /// Starts what the guest has asked for.
    fn take(&mut self, queue: &mut VirtQueue, memory: &Memory) -> std::result::Result<(), QueueError> {
        loop {
            while !self.free.is_empty() {
                let Some(chain) = queue.pop(memory)? else { break };
                if !self.start(chain, queue, memory)? {
                    // Waits in the ring until others have been answered.
                    queue.unpop(1);
                    self.flush_submissions();
                    return Ok(());
                }
            }
            self.flush_submissions();
            if self.free.is_empty() || !queue.arm(memory)? {
                return Ok(());
            }
        }
    }

    /// Starts or answers one chain; false if it has to wait for room.
    fn start(&mut self, chain: Chain, queue: &mut VirtQueue, memory: &Memory) -> std::result::Result<bool, QueueError> {
        let head = chain.head;
        let mut request = match request::parse(chain, memory)? {
            Parsed::Io(request) => request,
            Parsed::Id { data, status_at } => {
                let mut id = [0u8; ID_SIZE];
                let n = self.id.len().min(ID_SIZE);
                id[..n].copy_from_slice(&self.id.as_bytes()[..n]);
                let len = total(&data).min(ID_SIZE as u64) as usize;
                write_at(memory, &data, 0, &id[..len]);
                self.answer(head, status_at, Status::Ok, len as u32 + 1, queue, memory)?;
                return Ok(true);
            }
            Parsed::Refused { status, status_at } => {
                self.stats.errors.inc();
                self.answer(head, status_at, status, 1, queue, memory)?;
                return Ok(true);
            }
        };
        let bounces = !request.is_aligned(self.image.align());
        if !self.is_possible(&request) || bounces && request.len as usize > BOUNCE_MAX {
            self.stats.errors.inc();
            self.answer(head, request.status_at, Status::IoError, 1, queue, memory)?;
            return Ok(true);
        }
        if request.operation != Operation::Flush && request.len == 0 {
            self.answer(head, request.status_at, Status::Ok, 1, queue, memory)?;
            return Ok(true);
        }
        if bounces {
            if self.bounce + request.len as usize > BOUNCE_MAX {
                return Ok(false);
            }
            request.use_bounce(memory);
            self.bounce += request.bounce_len();
            self.stats.bounced.inc();
        } else {
            request.use_guest_memory(memory);
        }
        let Some(slot) = self.free.pop() else { return Ok(false) };
        self.in_flight += 1;
        self.submit(usize::from(slot), request);
        Ok(true)
    }

    /// Whole sectors within the disk, and no write to one that is read-only.
    fn is_possible(&self, request: &Request) -> bool {
        if request.operation == Operation::Flush {
            return true;
        }
        let sectors = u64::from(request.len) / SECTOR;
        u64::from(request.len).is_multiple_of(SECTOR)
            && request.sector.checked_add(sectors).is_some_and(|end| end <= self.image.sectors())
            && !(request.operation == Operation::Write && self.image.is_readonly())
    }

    /// Waits until nothing is in flight. Answers go to `queue`, or nowhere if there is none.
    fn drain(&mut self, mut to: Option<(&mut VirtQueue, &Memory)>) -> std::result::Result<(), QueueError> {
        let mut result = Ok(());
        while self.in_flight > 0 {
            self.flush_submissions();
            if let Err(e) = self.ring.submit_and_wait(1)
                && e.raw_os_error() != Some(libc::EINTR)
            {
                return Err(QueueError(format!("io_uring: {e}")));
            }
            match &mut to {
                Some((queue, memory)) if result.is_ok() => result = self.reap(queue, memory).map(drop),
                _ => self.discard(),
            }
        }
        result
    }

    /// Takes completions whose requests nobody wants answered any more.
    fn discard(&mut self) {
        while let Some(entry) = self.next_completion() {
            let slot = entry.user_data() as usize;
            if let Some(request) = self.requests.get_mut(slot).and_then(Option::take) {
                self.free.push(slot as u16);
                self.in_flight -= 1;
                self.bounce -= request.bounce_len();
            }
        }
    }
}

impl Device for Blk {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | if self.image.is_readonly() { F_RO } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 60];
        config[..8].copy_from_slice(&self.image.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        super::read_bytes(&config, offset, data);
    }

    fn activate(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        if let Err(e) = self.drain(None) {
            log::error!("{}: {e}", self.id);
        }
    }

    fn event(&mut self) {
        let _ = self.done.read();
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let queue = &mut work.queues[0];
        for _ in 0..DEPTH {
            let any = self.reap(queue, work.memory)?;
            self.take(queue, work.memory)?;
            // What the page cache had is complete already.
            if !any && self.ring.completion().is_empty() {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::More)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.done.as_raw_fd()]
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.drain(Some((&mut work.queues[0], work.memory)))
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState { capacity: self.image.sectors() })
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<()> {
        match state {
            DeviceState::Blk(state) if state.capacity == self.image.sectors() => Ok(()),
            DeviceState::Blk(state) => Err(Error::State(format!(
                "{}: the disk had {} sectors, it has {} here",
                self.id,
                state.capacity,
                self.image.sectors()
            ))),
            _ => Err(Error::State(format!("{}: not the state of a disk", self.id))),
        }
    }

    fn metrics(&self, out: &mut Exposition) {
        let (s, labels) = (&self.stats, &[("device", self.id.as_str())]);
        for (name, help, counter) in [
            ("vmm_blk_reads_total", "Reads completed.", &s.reads),
            ("vmm_blk_read_bytes_total", "Bytes read.", &s.read_bytes),
            ("vmm_blk_writes_total", "Writes completed.", &s.writes),
            ("vmm_blk_written_bytes_total", "Bytes written.", &s.written_bytes),
            ("vmm_blk_flushes_total", "Flushes completed.", &s.flushes),
            ("vmm_blk_errors_total", "Requests answered with an error.", &s.errors),
            ("vmm_blk_bounced_total", "Requests that were copied, as the image needs other alignment.", &s.bounced),
        ] {
            out.counter(name, help, labels, counter);
        }
        out.gauge("vmm_blk_in_flight", "Requests the host works on.", labels, self.in_flight as f64);
    }

    fn as_blk(&mut self) -> Option<&mut Blk> {
        Some(self)
    }
}

impl Drop for Blk {
    /// The kernel must not write to memory that is gone.
    fn drop(&mut self) {
        self.reset();
    }
}

#[cfg(test)]
mod tests;
