//! What a chain of the guest asks of a disk.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::io;
use std::ptr::NonNull;

use vm_memory::Bytes;

use super::SECTOR;
use super::image::DirectAlign;
use crate::memory::{GuestRange, IoVec, Memory};
use crate::virtio::queue::{Chain, QueueError, read_front, total};

const HEADER_SIZE: usize = 16;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
/// Alignment of a bounce buffer: enough for any device.
const BOUNCE_ALIGN: usize = 4096;

/// Status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// What is done to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
        })
    }
}

/// A chain, understood.
#[derive(Debug)]
pub enum Parsed {
    /// I/O to be done.
    Io(Request),
    /// The device's name is asked for.
    Id {
        /// Where it goes.
        data: Vec<GuestRange>,
        /// Where the status goes.
        status_at: GuestRange,
    },
    /// Answered at once.
    Refused {
        /// How.
        status: Status,
        /// Where the status goes.
        status_at: GuestRange,
    },
}

/// An aligned buffer of the monitor's own.
#[derive(Debug)]
struct Bounce {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer belongs to this value alone.
unsafe impl Send for Bounce {}

impl Bounce {
    fn new(len: usize) -> Bounce {
        // A multiple of 4096 of at most a few MiB is a valid layout.
        let layout = Layout::from_size_align(len.max(1), BOUNCE_ALIGN).unwrap_or(Layout::new::<u64>());
        assert!(layout.size() >= len, "bounce buffer of {len} bytes");
        // SAFETY: the layout has a size that is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Bounce { at, layout }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the buffer is ours, initialised, of this size; the kernel is done with it when this is called.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.at.as_ptr(), self.layout) }
    }
}

/// I/O on the image, from chain to answer.
#[derive(Debug)]
pub struct Request {
    /// Head of its chain.
    pub head: u16,
    /// What is done.
    pub operation: Operation,
    /// From which sector on.
    pub sector: u64,
    /// Bytes of data.
    pub len: u32,
    /// Where the status goes.
    pub status_at: GuestRange,
    /// Why it failed.
    pub error: Option<io::Error>,
    data: Vec<GuestRange>,
    bounce: Option<Bounce>,
    pieces: Vec<IoVec>,
    done: u32,
}

/// Understands a chain. Fails when the chain has no place for an answer: then the queue is broken.
pub fn parse(mut chain: Chain, memory: &Memory) -> Result<Parsed, QueueError> {
    let Some(last) = chain.writable.iter().rposition(|r| !r.is_empty()) else {
        return Err(QueueError("request without a place for its status".into()));
    };
    chain.writable.truncate(last + 1);
    let whole = chain.writable[last];
    let (data_part, status_at) = whole.split_at(whole.len() - 1);
    chain.writable[last] = data_part;
    let mut header = [0u8; HEADER_SIZE];
    if !read_front(memory, &mut chain.readable, &mut header) {
        return Ok(Parsed::Refused { status: Status::IoError, status_at });
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes(sector);
    let (operation, data) = match kind {
        TYPE_IN => (Operation::Read, chain.writable),
        TYPE_OUT => (Operation::Write, chain.readable),
        TYPE_FLUSH => (Operation::Flush, Vec::new()),
        TYPE_GET_ID => return Ok(Parsed::Id { data: chain.writable, status_at }),
        _ => return Ok(Parsed::Refused { status: Status::Unsupported, status_at }),
    };
    // More than an i32 cannot be told as a result; nothing near that is ever asked for.
    let Some(len) = u32::try_from(total(&data)).ok().filter(|n| *n <= i32::MAX as u32 - SECTOR as u32) else {
        return Ok(Parsed::Refused { status: Status::IoError, status_at });
    };
    Ok(Parsed::Io(Request {
        head: chain.head,
        operation,
        sector,
        len,
        status_at,
        error: None,
        data: data.into_iter().filter(|r| !r.is_empty()).collect(),
        bounce: None,
        pieces: Vec::new(),
        done: 0,
    }))
}

impl Request {
    /// Whether every piece of data can be read or written directly.
    pub fn is_aligned(&self, align: DirectAlign) -> bool {
        let odd = |n: u64, align: u32| n & u64::from(align - 1) != 0;
        !self.data.iter().any(|r| odd(r.address().0, align.address) || odd(r.len().into(), align.length))
    }

    /// Does the I/O in the guest's own memory.
    pub fn use_guest_memory(&mut self, memory: &Memory) {
        self.pieces = self.data.iter().map(|r| memory.iovec(*r)).collect();
    }

    /// Does the I/O in a buffer of the monitor's own.
    pub fn use_bounce(&mut self, memory: &Memory) {
        let mut bounce = Bounce::new(self.len as usize);
        if self.operation == Operation::Write {
            let mut at = 0;
            let bytes = bounce.bytes();
            for range in &self.data {
                let n = range.len() as usize;
                if let Err(e) = memory.ram().read_slice(&mut bytes[at..at + n], range.address()) {
                    log::error!("guest memory: {e}");
                }
                at += n;
            }
        }
        self.pieces = vec![IoVec(libc::iovec { iov_base: bounce.at.as_ptr().cast(), iov_len: self.len as usize })];
        self.bounce = Some(bounce);
    }

    /// Bytes of the monitor's own memory it holds.
    pub fn bounce_len(&self) -> usize {
        self.bounce.as_ref().map_or(0, |b| b.layout.size())
    }

    /// What is still to be read or written.
    pub fn pieces(&self) -> &[IoVec] {
        &self.pieces
    }

    /// Where in the image it goes on, in bytes.
    pub fn offset(&self) -> u64 {
        self.sector * SECTOR + u64::from(self.done)
    }

    /// Takes the kernel's result; true if it has to go on with what is left.
    pub fn advance(&mut self, result: i32) -> bool {
        let n = match u32::try_from(result) {
            Ok(n) => n,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => return true,
            Err(_) => {
                self.error = Some(io::Error::from_raw_os_error(-result));
                return false;
            }
        };
        if self.operation == Operation::Flush {
            return false;
        }
        self.done += n.min(self.len - self.done);
        if self.done == self.len {
            return false;
        }
        if n == 0 {
            self.error = Some(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"));
            return false;
        }
        let mut gone = n as usize;
        while let Some(piece) = self.pieces.first_mut() {
            if gone < piece.0.iov_len {
                piece.0.iov_base = piece.0.iov_base.cast::<u8>().wrapping_add(gone).cast();
                piece.0.iov_len -= gone;
                break;
            }
            gone -= piece.0.iov_len;
            self.pieces.remove(0);
        }
        true
    }

    /// The data of a read is there: makes it the guest's.
    pub fn deliver(&mut self, memory: &Memory) {
        match &mut self.bounce {
            None => self.data.iter().for_each(|r| memory.mark_dirty(*r, r.len())),
            Some(bounce) => {
                let mut rest = &bounce.bytes()[..];
                for range in &self.data {
                    let (now, later) = rest.split_at(range.len() as usize);
                    if let Err(e) = memory.ram().write_slice(now, range.address()) {
                        log::error!("guest memory: {e}");
                    }
                    rest = later;
                }
            }
        }
    }
}
