//! virtio-blk (virtio 1.2, section 5.2) on a file or block device, raw or with a format.
//!
//! Owns the open image, its lock, and the requests in flight. Always true: a flush is answered after fdatasync has
//! succeeded; a request that fails on the host is answered with an error, counted and logged, and the VM lives; an image that is
//! written has one writer, and is read and written only by who has its lock; what a limit holds back waits in the guest's ring.
//! Survives: a full disk, I/O errors, images that shrink, any request a guest can make up.

mod bounce;
mod engine;
mod format;
mod handover;
pub mod identity;
mod image;
mod request;
mod statistics;
mod store;
mod uring;
mod workers;

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::queue::{Chain, QueueError, VirtQueue, total, write_at};
use super::{Device, DeviceState, Progress, Work};
use crate::config::{DiskConfig, DiskFormat};
use crate::error::{Error, Result, host};
use crate::limit::{LimiterState, Limits, Throttle};
use crate::memory::{GuestRange, Memory};
use crate::metrics::Exposition;
use engine::Engine;
use format::FormatImage;
pub use handover::Flusher;
use handover::Held;
use image::Image;
use request::{DISCARD_MAX, Operation, Parsed, Request, Status, WRITE_ZEROES_MAX};
use statistics::BlkStats;
use store::Store;
use uring::Uring;
use workers::Workers;

/// Bytes of a sector, the unit of the protocol.
pub const SECTOR: u64 = 512;
/// Memory all requests together may have for buffers the image cannot be read into or written from directly; one that is
/// larger has to be alone.
pub const BOUNCE_MAX: usize = 2 << 20;
/// Largest request that is copied.
pub const BOUNCE_ONE_MAX: usize = 16 << 20;
/// Requests in flight at most, of all queues.
pub const DEPTH: usize = 256;

const KIND: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Data pieces of a request: all of the queue but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
const ID_SIZE: usize = 20;
/// Requests logged as failed, per device; more are only counted.
const LOGGED_MAX: u64 = 100;
/// `struct virtio_blk_config` up to and with the fields of write-zeroes.
const CONFIG_SIZE: usize = 60;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// State that moves with the guest; once nothing is in flight the rest is in the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Size in sectors that the guest was told.
    pub capacity: u64,
    /// Limits as they were last set, and what is left of them.
    pub limiter: LimiterState,
}

/// A disk.
pub struct Blk {
    id: String,
    path: PathBuf,
    held: Held,
    serial: [u8; ID_SIZE],
    /// Before the image, which it works on.
    engine: Box<dyn Engine>,
    image: Store,
    queue_sizes: Vec<u16>,
    /// Queue to be served first next time.
    next_queue: usize,
    bounce: usize,
    throttle: Throttle,
    resized: bool,
    stats: BlkStats,
}

impl Blk {
    /// Opens and locks the image.
    pub fn open(config: &DiskConfig) -> Result<Blk> {
        let (image, engine): (Store, Box<dyn Engine>) = match config.format {
            DiskFormat::Raw => {
                let image = Image::open(&config.path, config.readonly, config.direct)?;
                let engine = Uring::new(&image)?;
                (Store::Raw(image), Box::new(engine))
            }
            format => {
                let image = Arc::new(FormatImage::open(&config.path, format, config.readonly)?);
                let engine = Workers::new(image.clone())?;
                (Store::Format(image), Box::new(engine))
            }
        };
        Blk::new(config, image, engine, Held::Here)
    }

    fn new(config: &DiskConfig, image: Store, engine: Box<dyn Engine>, held: Held) -> Result<Blk> {
        let mut serial = [0; ID_SIZE];
        let text = config.serial.as_ref().unwrap_or(&config.id).as_bytes();
        let n = text.len().min(ID_SIZE);
        serial[..n].copy_from_slice(&text[..n]);
        Ok(Blk {
            id: config.id.clone(),
            path: config.path.clone(),
            held,
            serial,
            engine,
            image,
            queue_sizes: vec![QUEUE_SIZE; config.queues.into()],
            next_queue: 0,
            bounce: 0,
            throttle: Throttle::new(config.limits)?,
            resized: false,
            stats: BlkStats::default(),
        })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.image.sectors() * SECTOR
    }

    /// Makes the disk larger: to `bytes` (the image file is made as long), or to what its image has become. The guest is told
    /// when the device next looks at its queues. It does not become smaller. Returns the new size.
    pub fn resize(&mut self, bytes: Option<u64>) -> Result<u64> {
        if self.held != Held::Here {
            return Err(Error::Conflict(format!("{}: is being ported", self.id)));
        }
        let before = self.size();
        if bytes.is_some_and(|b| !b.is_multiple_of(SECTOR)) {
            return Err(Error::Conflict(format!("{}: a size is a multiple of {SECTOR} bytes", self.id)));
        }
        if bytes.is_some_and(|b| b < before) {
            return Err(Error::Conflict(format!("{}: has {before} bytes; a disk cannot be made smaller", self.id)));
        }
        self.image.grow(bytes.unwrap_or(0)).map_err(host(format!("{}: resize", self.id)))?;
        let now = self.size();
        if bytes.is_some_and(|b| now < b) {
            let why = "make the block device larger first";
            return Err(Error::Conflict(format!("{}: its image has {now} bytes; {why}", self.id)));
        }
        self.resized |= now != before;
        Ok(now)
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        self.throttle.limits()
    }

    /// Changes the limits, from now on. Whoever does calls [`crate::devices::Devices::process_all`] afterwards.
    pub fn set_limits(&mut self, limits: Limits) -> Result<()> {
        let mistakes = limits.mistakes("limits");
        if !mistakes.is_empty() {
            return Err(Error::Config(mistakes));
        }
        self.throttle.set(limits);
        Ok(())
    }

    /// Takes what has been completed. True if there was something.
    fn reap(&mut self, queues: &mut [VirtQueue], memory: &Memory) -> std::result::Result<bool, QueueError> {
        let mut any = false;
        while let Some(request) = self.engine.completed() {
            any = true;
            self.bounce -= request.bounce_len();
            self.finish(request, queues, memory)?;
        }
        Ok(any)
    }

    /// Answers a request whose I/O has ended.
    fn finish(
        &mut self,
        mut request: Request,
        queues: &mut [VirtQueue],
        memory: &Memory,
    ) -> std::result::Result<(), QueueError> {
        let status = match &request.error {
            None => Status::Ok,
            Some(e) => {
                self.stats.errors.inc();
                if self.stats.errors.get() <= LOGGED_MAX {
                    let detail = format!("{} at sector {} failed: {e}", request.operation, request.sector);
                    crate::notice::trouble(&self.id, detail);
                }
                match e.raw_os_error() {
                    Some(libc::EOPNOTSUPP) if !request.operation.has_data() => Status::Unsupported,
                    _ => Status::IoError,
                }
            }
        };
        let mut written = 1;
        if status == Status::Ok {
            if request.operation == Operation::Read {
                request.deliver(memory);
                written += request.len;
            }
            self.stats.count(&request);
        }
        let Some(queue) = queues.get_mut(usize::from(request.queue)) else { return Ok(()) };
        answer(request.head, request.status_at, status, written, queue, memory)
    }

    /// Starts what the guest has asked for.
    fn take(&mut self, queues: &mut [VirtQueue], memory: &Memory) -> std::result::Result<(), QueueError> {
        self.next_queue = (self.next_queue + 1) % queues.len().max(1);
        for i in 0..queues.len() {
            let n = (self.next_queue + i) % queues.len();
            let go_on = self.take_from(n, queues, memory)?;
            if !go_on {
                break;
            }
        }
        self.engine.push();
        Ok(())
    }

    /// False if nothing more can be taken on at present, from whichever queue.
    fn take_from(
        &mut self,
        n: usize,
        queues: &mut [VirtQueue],
        memory: &Memory,
    ) -> std::result::Result<bool, QueueError> {
        let queue = &mut queues[n];
        loop {
            while self.engine.room() {
                let Some(chain) = queue.pop(memory)? else { break };
                if !self.start(n as u16, chain, queue, memory)? {
                    // Waits in the ring until others have been answered, or its time has come.
                    queue.unpop(1);
                    return Ok(false);
                }
            }
            if !self.engine.room() {
                return Ok(false);
            }
            // Before the driver is asked to ring, what it has given is on its way.
            self.engine.push();
            if !queue.arm(memory)? {
                return Ok(true);
            }
        }
    }

    /// Starts or answers one chain; false if it has to wait.
    fn start(
        &mut self,
        n: u16,
        chain: Chain,
        queue: &mut VirtQueue,
        memory: &Memory,
    ) -> std::result::Result<bool, QueueError> {
        let head = chain.head;
        let mut request = match request::parse(chain, memory)? {
            Parsed::Io(request) => request,
            Parsed::Id { data, status_at } => {
                let len = total(&data).min(ID_SIZE as u64) as usize;
                write_at(memory, &data, 0, &self.serial[..len]);
                answer(head, status_at, Status::Ok, len as u32 + 1, queue, memory)?;
                return Ok(true);
            }
            Parsed::Refused { status, status_at } => {
                self.stats.errors.inc();
                answer(head, status_at, status, 1, queue, memory)?;
                return Ok(true);
            }
        };
        request.queue = n;
        let as_it_is = self.image.align().is_some_and(|align| request.is_aligned(align));
        let bounces = request.operation.has_data() && !as_it_is;
        if !self.is_possible(&request) || bounces && request.len as usize > BOUNCE_ONE_MAX {
            self.stats.errors.inc();
            answer(head, request.status_at, Status::IoError, 1, queue, memory)?;
            return Ok(true);
        }
        if request.operation != Operation::Flush && request.len == 0 {
            answer(head, request.status_at, Status::Ok, 1, queue, memory)?;
            return Ok(true);
        }
        let moved = if request.operation.has_data() { request.len } else { 0 };
        if bounces && self.bounce > 0 && self.bounce + request.len as usize > BOUNCE_MAX
            || !self.throttle.admit(moved.into())
        {
            return Ok(false);
        }
        if bounces {
            request.use_bounce(memory);
            self.bounce += request.bounce_len();
            self.stats.bounced.inc();
        } else {
            request.use_guest_memory(memory);
        }
        self.engine.submit(request);
        Ok(true)
    }

    /// Whole sectors within the disk, and no change of one that is read-only.
    fn is_possible(&self, request: &Request) -> bool {
        if request.operation == Operation::Flush {
            return true;
        }
        let sectors = u64::from(request.len) / SECTOR;
        u64::from(request.len).is_multiple_of(SECTOR)
            && request.sector.checked_add(sectors).is_some_and(|end| end <= self.image.sectors())
            && !(request.operation.changes() && self.image.is_readonly())
    }

    /// Waits until nothing is in flight. Answers go to the queues, or nowhere if there are none.
    fn drain(&mut self, mut to: Option<&mut Work<'_>>) -> std::result::Result<(), QueueError> {
        let mut result = Ok(());
        while self.engine.in_flight() > 0 {
            self.engine.wait().map_err(|e| QueueError(format!("disk I/O: {e}")))?;
            match &mut to {
                Some(work) if result.is_ok() => result = self.reap(work.queues, work.memory).map(drop),
                _ => {
                    while let Some(request) = self.engine.completed() {
                        self.bounce -= request.bounce_len();
                    }
                }
            }
        }
        result
    }
}

fn answer(
    head: u16,
    status_at: GuestRange,
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

impl Device for Blk {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let several = if self.queue_sizes.len() > 1 { F_MQ } else { 0 };
        let writable = if self.image.is_readonly() { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | several | writable
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; CONFIG_SIZE];
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(12, SEG_MAX);
        put(20, SECTOR as u32);
        put(36, DISCARD_MAX);
        put(40, 1);
        put(44, u32::try_from(self.image.block() / SECTOR).unwrap_or(1).max(1));
        put(48, WRITE_ZEROES_MAX);
        put(52, 1);
        put(56, 1);
        config[..8].copy_from_slice(&self.image.sectors().to_le_bytes());
        config[34..36].copy_from_slice(&(self.queue_sizes.len() as u16).to_le_bytes());
        super::read_bytes(&config, offset, data);
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.resized)
    }

    fn activate(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        if let Err(e) = self.drain(None) {
            log::error!("{}: {e}", self.id);
        }
    }

    fn is_pollable(&self) -> bool {
        true
    }

    fn awaits_host(&self) -> bool {
        self.engine.in_flight() > 0
    }

    fn pending(&mut self, work: &Work<'_>) -> bool {
        self.engine.has_completed() || self.engine.room() && work.queues.iter().any(|q| q.depth(work.memory) > 0)
    }

    fn event(&mut self) {
        self.engine.event();
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        for _ in 0..DEPTH {
            let any = self.reap(work.queues, work.memory)?;
            self.take(work.queues, work.memory)?;
            // What the page cache had is complete already.
            if !any && !self.engine.has_completed() {
                return Ok(Progress::Done);
            }
        }
        Ok(Progress::More)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.engine.descriptor(), self.throttle.as_raw_fd()]
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.drain(Some(work))
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState { capacity: self.image.sectors(), limiter: self.throttle.save() })
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<()> {
        let DeviceState::Blk(state) = state else {
            return Err(Error::State(format!("{}: not the state of a disk", self.id)));
        };
        let here = self.image.sectors();
        if state.capacity > here {
            let there = state.capacity;
            return Err(Error::State(format!("{}: the disk had {there} sectors, it has {here} here", self.id)));
        }
        self.resized = state.capacity < here;
        self.throttle.restore(&state.limiter).map_err(|e| Error::State(format!("{}: {e}", self.id)))
    }

    fn metrics(&self, out: &mut Exposition) {
        let labels = &[("device", self.id.as_str())];
        self.stats.write(out, labels);
        out.count("vmm_blk_throttled_total", "Times a limit made it wait.", labels, self.throttle.waits());
        out.gauge("vmm_blk_in_flight", "Requests the host works on.", labels, self.engine.in_flight() as f64);
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
