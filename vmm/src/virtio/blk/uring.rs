//! I/O on a raw image through io_uring.
//!
//! Owns the ring and the requests in it. Always true: a request, and with it the memory the kernel works on, stays where it is
//! until its completion has been taken; what was done in part is gone on with; requests in flight are at most [`DEPTH`].

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::image::Image;
use super::request::{Operation, Request};
use super::{DEPTH, Engine};
use crate::error::{Result, host};
use crate::memory::IoVec;

/// BLKDISCARD.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// Requests given to the kernel at once: few, so that the disk works on the first while the next are still being understood.
/// A program on the host without a VM did a third more reads a second with 2 than with all there were; not measured apart in here.
const SUBMIT_BATCH: usize = 2;
/// Zeroes to be written in one piece.
const ZEROES: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES]);
static ZERO: Zeroes = Zeroes([0; ZEROES]);

/// How zeroes are brought about; the next one where the file system or device cannot do one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Only,
    Punch,
    ZeroRange,
    Write,
}

struct InFlight {
    request: Request,
    step: Step,
}

/// See the module.
pub(super) struct Uring {
    ring: IoUring,
    fd: RawFd,
    is_device: bool,
    done: EventFd,
    requests: Vec<Option<InFlight>>,
    free: Vec<u16>,
    unsubmitted: usize,
}

impl Uring {
    /// For an image, which must live as long.
    pub fn new(image: &Image) -> Result<Uring> {
        ignore_size_signal();
        let ring = IoUring::builder().setup_clamp().build(DEPTH as u32).map_err(host("io_uring"))?;
        let done = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        ring.submitter().register_eventfd(done.as_raw_fd()).map_err(host("io_uring: register eventfd"))?;
        // Not registered with the ring: that would keep it open, and locked, for a while after the process has ended.
        let fd = image.as_raw_fd();
        Ok(Uring {
            ring,
            fd,
            is_device: image.is_device(),
            done,
            requests: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as u16).rev().collect(),
            unsubmitted: 0,
        })
    }

    fn enter(&mut self, slot: u16, mut in_flight: InFlight) {
        let request = &mut in_flight.request;
        let image = types::Fd(self.fd);
        let (offset, len) = (request.offset(), u64::from(request.len));
        let fallocate = |mode| opcode::Fallocate::new(image, len).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE);
        let write = |pieces: &[IoVec]| {
            opcode::Writev::new(image, pieces.as_ptr().cast(), pieces.len() as u32).offset(offset).build()
        };
        let entry = match (request.operation, in_flight.step) {
            (Operation::Flush, _) => opcode::Fsync::new(image).flags(types::FsyncFlags::DATASYNC).build(),
            (Operation::Read, _) => {
                let pieces = &request.pieces;
                opcode::Readv::new(image, pieces.as_ptr().cast(), pieces.len() as u32).offset(offset).build()
            }
            (Operation::Write, _) => write(&request.pieces),
            (Operation::Discard, _) | (_, Step::Punch) => fallocate(libc::FALLOC_FL_PUNCH_HOLE).build(),
            (Operation::WriteZeroes { .. }, Step::Write) => {
                if request.pieces.is_empty() {
                    request.pieces = zeroes(request.len as usize);
                }
                write(&request.pieces)
            }
            (Operation::WriteZeroes { .. }, _) => fallocate(libc::FALLOC_FL_ZERO_RANGE).build(),
        };
        self.requests[usize::from(slot)] = Some(in_flight);
        self.enqueue(&entry.user_data(slot.into()));
    }

    fn enqueue(&mut self, entry: &squeue::Entry) {
        // SAFETY: the pieces and what they point to live in `self.requests` (or are guest memory, or constant) until the
        // completion with this slot has been taken; a `Vec` in a moved `Request` keeps its place.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full: more retries than places cannot be, as places are as many as requests.
            self.push();
        }
        self.unsubmitted += 1;
        if self.unsubmitted >= SUBMIT_BATCH {
            self.push();
        }
    }

    fn take(&mut self) -> Option<(u16, i32)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data() as u16, entry.result()))
    }

    /// Whether the kernel could not do it this way, and there is another.
    fn next_step(&self, in_flight: &mut InFlight, result: i32) -> bool {
        if result != -libc::EOPNOTSUPP && result != -libc::ENOSYS {
            return false;
        }
        in_flight.step = match in_flight.step {
            Step::Punch => Step::ZeroRange,
            Step::ZeroRange => Step::Write,
            Step::Only | Step::Write => return false,
        };
        true
    }

    /// For devices that can discard, but not so that zeroes are read afterwards.
    fn discard_device(&self, request: &Request) -> i32 {
        let range = [request.offset(), u64::from(request.len)];
        // SAFETY: the call reads two numbers.
        match unsafe { libc::ioctl(self.fd, BLKDISCARD, range.as_ptr()) } {
            0 => 0,
            _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl Engine for Uring {
    fn room(&self) -> bool {
        !self.free.is_empty()
    }

    fn in_flight(&self) -> usize {
        DEPTH - self.free.len()
    }

    fn submit(&mut self, request: Request) {
        let step = match request.operation {
            Operation::WriteZeroes { unmap: true } => Step::Punch,
            Operation::WriteZeroes { unmap: false } => Step::ZeroRange,
            _ => Step::Only,
        };
        match self.free.pop() {
            Some(slot) => self.enter(slot, InFlight { request, step }),
            None => unreachable!("a request without room"),
        }
    }

    fn push(&mut self) {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(n) => self.unsubmitted -= n.min(self.unsubmitted),
                Err(e) if is_passing(&e) => {}
                Err(e) => {
                    log::error!("io_uring: {e}");
                    break;
                }
            }
        }
    }

    fn completed(&mut self) -> Option<Request> {
        loop {
            let (slot, mut result) = self.take()?;
            let Some(mut in_flight) = self.requests.get_mut(usize::from(slot)).and_then(Option::take) else { continue };
            if in_flight.request.operation == Operation::Discard && result == -libc::EOPNOTSUPP && self.is_device {
                result = self.discard_device(&in_flight.request);
            }
            // What was done in part, or cannot be done this way, goes on. Each time there is less of it.
            if self.next_step(&mut in_flight, result) || in_flight.request.advance(result) {
                self.enter(slot, in_flight);
                continue;
            }
            self.free.push(slot);
            return Some(in_flight.request);
        }
    }

    fn has_completed(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.push();
        match self.ring.submit_and_wait(1) {
            Err(e) if !is_passing(&e) => Err(e),
            _ => Ok(()),
        }
    }

    /// Each completion is an edge, so that the descriptor need not be read.
    fn event(&mut self) {}

    fn descriptor(&self) -> RawFd {
        self.done.as_raw_fd()
    }
}

impl Drop for Uring {
    /// The kernel must not work on memory that is gone.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if let Err(e) = self.wait() {
                log::error!("io_uring: {e}");
                return;
            }
            while self.completed().is_some() {}
        }
    }
}

/// Whether the kernel only wants to be asked again: requests that are under way stay so.
fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

fn zeroes(len: usize) -> Vec<IoVec> {
    let at =
        |start: usize| libc::iovec { iov_base: ZERO.0.as_ptr().cast_mut().cast(), iov_len: ZEROES.min(len - start) };
    (0..len).step_by(ZEROES).map(|start| IoVec(at(start))).collect()
}

/// A write beyond RLIMIT_FSIZE is to fail, not to end the process.
fn ignore_size_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    });
}
