//! What a chain of the guest asks of a disk.

use std::fmt;
use std::io;
use std::time::Instant;

use vm_memory::Bytes;

use super::SECTOR;
use super::bounce::Bounce;
use super::image::DirectAlign;
use crate::memory::{GuestRange, IoVec, Memory};
use crate::virtio::queue::{Chain, QueueError, read_front, total};

const HEADER_SIZE: usize = 16;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: usize = 16;
const FLAG_UNMAP: u32 = 1;
/// Longest range to discard, in sectors.
pub const DISCARD_MAX: u32 = 1 << 21;
/// Longest range to be filled with zeroes, in sectors: they may have to be written.
pub const WRITE_ZEROES_MAX: u32 = 1 << 15;

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
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
    },
}

impl Operation {
    /// Whether it changes the disk.
    pub fn changes(self) -> bool {
        matches!(self, Operation::Write | Operation::Discard | Operation::WriteZeroes { .. })
    }

    /// Whether it moves data between guest and disk.
    pub fn has_data(self) -> bool {
        matches!(self, Operation::Read | Operation::Write)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes { .. } => "write zeroes",
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

/// I/O on the image, from chain to answer.
#[derive(Debug)]
pub struct Request {
    /// Queue it came from.
    pub queue: u16,
    /// Head of its chain.
    pub head: u16,
    /// What is done.
    pub operation: Operation,
    /// From which sector on.
    pub sector: u64,
    /// Bytes of data, or of the range.
    pub len: u32,
    /// When it was taken on.
    pub since: Instant,
    /// Where the status goes.
    pub status_at: GuestRange,
    /// Why it failed.
    pub error: Option<io::Error>,
    data: Vec<GuestRange>,
    /// Copied through here, if the guest's own memory will not do.
    pub bounce: Option<Bounce>,
    /// What it still wants read or written.
    pub pieces: Vec<IoVec>,
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
    let mut range = [0u8; RANGE_SIZE];
    let mut sectors = 0u32;
    let (operation, data) = match kind {
        TYPE_DISCARD | TYPE_WRITE_ZEROES => {
            if total(&chain.readable) != RANGE_SIZE as u64 || !read_front(memory, &mut chain.readable, &mut range) {
                return Ok(Parsed::Refused { status: Status::IoError, status_at });
            }
            let [.., c0, c1, c2, c3, f0, f1, f2, f3] = range;
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            sectors = u32::from_le_bytes([c0, c1, c2, c3]);
            let (operation, allowed, most) = match kind {
                TYPE_DISCARD => (Operation::Discard, 0, DISCARD_MAX),
                _ => (Operation::WriteZeroes { unmap: flags & FLAG_UNMAP != 0 }, FLAG_UNMAP, WRITE_ZEROES_MAX),
            };
            if flags & !allowed != 0 {
                return Ok(Parsed::Refused { status: Status::Unsupported, status_at });
            }
            if sectors > most {
                return Ok(Parsed::Refused { status: Status::IoError, status_at });
            }
            (operation, Vec::new())
        }
        TYPE_IN => (Operation::Read, chain.writable),
        TYPE_OUT => (Operation::Write, chain.readable),
        TYPE_FLUSH => (Operation::Flush, Vec::new()),
        TYPE_GET_ID => return Ok(Parsed::Id { data: chain.writable, status_at }),
        _ => return Ok(Parsed::Refused { status: Status::Unsupported, status_at }),
    };
    // More than an i32 cannot be told as a result; nothing near that is ever asked for.
    let bytes =
        if operation.has_data() || operation == Operation::Flush { total(&data) } else { u64::from(sectors) * SECTOR };
    let sector = match range.first_chunk() {
        Some(start) if operation.changes() && operation != Operation::Write => u64::from_le_bytes(*start),
        _ if operation == Operation::Flush => 0,
        _ => sector,
    };
    let Some(len) = u32::try_from(bytes).ok().filter(|n| *n <= i32::MAX as u32 - SECTOR as u32) else {
        return Ok(Parsed::Refused { status: Status::IoError, status_at });
    };
    Ok(Parsed::Io(Request {
        queue: 0,
        head: chain.head,
        since: Instant::now(),
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
        self.pieces = vec![IoVec(libc::iovec { iov_base: bounce.address().cast(), iov_len: self.len as usize })];
        self.bounce = Some(bounce);
    }

    /// Bytes of the monitor's own memory it holds.
    pub fn bounce_len(&self) -> usize {
        self.bounce.as_ref().map_or(0, Bounce::len)
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
        if self.pieces.is_empty() {
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
