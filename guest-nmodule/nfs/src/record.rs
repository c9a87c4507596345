//! Record marking on a byte stream (RFC 5531, section 11).
//!
//! Owns: the reassembly of one connection's records, and the shape of a reply on its way out.
//! Always true: no more than [`RECORD_MAX`] bytes are ever held, and a length is checked before memory is taken for it.
//! A record whose tail is bulk data (the payload of a WRITE) is collected in two buffers, so that the payload goes on
//! without being copied again.
use alloc::vec::Vec;

/// Longest record: a WRITE of 1 MiB with its header.
pub const RECORD_MAX: usize = (1 << 20) + 8192;
/// Records shorter than this are not split: copying them costs less than a second buffer.
const SPLIT_MIN: usize = 2048;
/// Bytes of a record looked at first to find where its bulk data begins.
const PROBE: usize = 192;
/// If the first so many bytes do not tell where bulk data begins, the record is not split.
const PROBE_MAX: usize = 1024;

/// A peer broke the record marking; the connection cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A record longer than [`RECORD_MAX`].
    #[error("RPC record of at least {0} bytes exceeds the limit")]
    TooLong(usize),
}

/// Where the bulk data of a record begins, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// At this byte.
    At(usize),
    /// It has none.
    Never,
    /// More bytes are needed to tell.
    More,
}

/// One record: `head`, then `bulk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The record, or its part before the bulk data.
    pub head: Vec<u8>,
    /// Bulk data to the end of the record, with its padding.
    pub bulk: Option<Vec<u8>>,
}

impl Record {
    /// A record in one piece.
    pub fn whole(head: Vec<u8>) -> Self {
        Record { head, bulk: None }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.head.len() + self.bulk.as_ref().map_or(0, Vec::len)
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What came of bytes given to a [`RecordReader`].
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// All bytes were used; more are needed.
    Starved,
    /// A fragment begins; with it the record has so many bytes. A caller with little memory may wait before it goes on.
    Fragment {
        /// Bytes of the record up to the end of this fragment.
        record_bytes: usize,
        /// Whether it is the last.
        last: bool,
    },
    /// A whole record.
    Record(Record),
}

/// Reassembles records from a byte stream.
#[derive(Debug)]
pub struct RecordReader {
    split: fn(&[u8]) -> Split,
    mark: [u8; 4],
    mark_len: usize,
    /// Bytes of the current fragment still to come; meaningful while `mark_len` is 4.
    fragment_left: usize,
    last_fragment: bool,
    head: Vec<u8>,
    bulk: Option<Vec<u8>>,
    /// `head` is filled to here, then `split` is asked (or, once it is known, obeyed).
    head_goal: usize,
    split_known: bool,
}

impl RecordReader {
    /// A reader at the beginning of a stream; `split` tells where a record's bulk data begins.
    pub fn new(split: fn(&[u8]) -> Split) -> Self {
        RecordReader {
            split,
            mark: [0; 4],
            mark_len: 0,
            fragment_left: 0,
            last_fragment: false,
            head: Vec::new(),
            bulk: None,
            head_goal: PROBE,
            split_known: false,
        }
    }

    /// Whether the stream stands between two records.
    pub fn is_idle(&self) -> bool {
        self.mark_len == 0 && self.received() == 0
    }

    fn received(&self) -> usize {
        self.head.len() + self.bulk.as_ref().map_or(0, Vec::len)
    }

    /// Takes bytes from the front of `input`: how many, and what came of them. To be called until it is
    /// [`Event::Starved`].
    pub fn feed(&mut self, input: &[u8]) -> Result<(usize, Event), RecordError> {
        let mut used = 0;
        loop {
            if self.mark_len < 4 {
                let take = (4 - self.mark_len).min(input.len() - used);
                self.mark[self.mark_len..self.mark_len + take].copy_from_slice(&input[used..used + take]);
                self.mark_len += take;
                used += take;
                if self.mark_len < 4 {
                    return Ok((used, Event::Starved));
                }
                return self.begin_fragment().map(|event| (used, event));
            }
            if self.fragment_left == 0 {
                self.mark_len = 0;
                if self.last_fragment {
                    return Ok((used, Event::Record(self.finish())));
                }
                continue;
            }
            if used == input.len() {
                return Ok((used, Event::Starved));
            }
            let available = self.fragment_left.min(input.len() - used);
            let taken = self.store(&input[used..used + available]);
            used += taken;
            self.fragment_left -= taken;
        }
    }

    fn begin_fragment(&mut self) -> Result<Event, RecordError> {
        let mark = u32::from_be_bytes(self.mark);
        self.last_fragment = mark & 0x8000_0000 != 0;
        self.fragment_left = (mark & 0x7fff_ffff) as usize;
        // No overflow: both are below 2^31, and `received` is at most RECORD_MAX.
        let record_bytes = self.received() + self.fragment_left;
        if record_bytes > RECORD_MAX {
            return Err(RecordError::TooLong(record_bytes));
        }
        if self.received() == 0 && self.last_fragment && record_bytes < SPLIT_MIN {
            self.stop_splitting();
        }
        Ok(Event::Fragment { record_bytes, last: self.last_fragment })
    }

    fn stop_splitting(&mut self) {
        self.split_known = true;
        self.head_goal = usize::MAX;
    }

    /// Appends from `bytes` (of the current fragment, not empty); returns how many.
    fn store(&mut self, bytes: &[u8]) -> usize {
        if let Some(bulk) = &mut self.bulk {
            bulk.extend_from_slice(bytes);
            return bytes.len();
        }
        if self.head.len() == self.head_goal {
            self.decide();
            return 0;
        }
        let take = bytes.len().min(self.head_goal - self.head.len());
        if self.head.capacity() == self.head.len() {
            // Amortised, so that a record of tiny fragments costs no quadratic time.
            self.head.reserve(self.fragment_left.min(self.head_goal - self.head.len()));
        }
        self.head.extend_from_slice(&bytes[..take]);
        take
    }

    /// `head` has reached its goal with more to come: asks where the bulk data begins, or begins them.
    fn decide(&mut self) {
        if !self.split_known {
            match (self.split)(&self.head) {
                Split::At(offset) => {
                    self.split_known = true;
                    self.head_goal = offset;
                }
                Split::More if self.head.len() < PROBE_MAX => self.head_goal += PROBE,
                Split::More | Split::Never => self.stop_splitting(),
            }
        }
        if self.split_known && self.head.len() >= self.head_goal {
            let mut bulk = Vec::with_capacity(self.head.len() - self.head_goal + self.fragment_left);
            bulk.extend_from_slice(&self.head[self.head_goal..]);
            self.head.truncate(self.head_goal);
            self.bulk = Some(bulk);
        }
    }

    fn finish(&mut self) -> Record {
        self.head_goal = PROBE;
        self.split_known = false;
        Record { head: core::mem::take(&mut self.head), bulk: self.bulk.take() }
    }
}

/// A reply on its way out: the bytes of [`Reply::slices`], one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    head: Vec<u8>,
    bulk: Vec<u8>,
}

impl Reply {
    /// Bytes a reply's head begins with, kept free for the record mark.
    pub(crate) const MARK: [u8; 4] = [0; 4];

    /// `head` begins with four bytes for the record mark.
    pub(crate) fn new(mut head: Vec<u8>, bulk: Vec<u8>) -> Self {
        let length = head.len() - Self::MARK.len() + bulk.len() + crate::xdr::padding(bulk.len());
        head[..4].copy_from_slice(&(0x8000_0000 | length as u32).to_be_bytes());
        Reply { head, bulk }
    }

    /// Record mark and head, bulk data, padding: what goes on a stream, in this order.
    pub fn slices(&self) -> [&[u8]; 3] {
        [&self.head, &self.bulk, &[0; 3][..crate::xdr::padding(self.bulk.len())]]
    }

    /// Record mark and head, bulk data (without their padding, see [`crate::xdr::padding`]).
    pub fn into_parts(self) -> (Vec<u8>, Vec<u8>) {
        (self.head, self.bulk)
    }

    /// The reply without record mark, as it goes into a datagram. Replies to datagrams have no bulk data.
    pub fn datagram(&self) -> &[u8] {
        &self.head[4..]
    }

    /// Bytes on a stream.
    pub fn len(&self) -> usize {
        self.slices().iter().map(|slice| slice.len()).sum()
    }

    /// Never: there is always a record mark.
    pub fn is_empty(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
