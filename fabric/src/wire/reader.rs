//! From a byte stream to frames.
use super::header::{HEADER, Header};
use super::{Frame, WireError, frame};
use alloc::vec::Vec;

/// Puts the frames of an untrusted byte stream together. Holds at most one frame.
///
/// After an error the stream has no meaning any more; the connection is to be ended.
#[derive(Debug, Default)]
pub struct FrameReader {
    /// Known when `head` holds a whole header.
    header: Option<Header>,
    /// There is room for what the header announces.
    admitted: bool,
    head: Vec<u8>,
    data: Vec<u8>,
}

/// Moves bytes from the front of `from` until `to` has `len`; whether it has.
fn fill(to: &mut Vec<u8>, len: usize, from: &mut &[u8]) -> bool {
    let (taken, rest) = from.split_at(from.len().min(len - to.len()));
    to.extend_from_slice(taken);
    *from = rest;
    to.len() == len
}

impl FrameReader {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        FrameReader::default()
    }

    /// Takes bytes from the front of `bytes` up to the end of a frame, and returns it; `None` when all are taken.
    /// Bulk data is copied once, to the buffer that is then part of the frame.
    pub fn push(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, WireError> {
        self.push_if(bytes, |_| true)
    }

    /// The same, but memory for a frame is only taken if `admit`, which is told how many bytes, agrees; if it does not, the bytes
    /// behind the header are left ([`Self::is_waiting`]), and the next call asks again.
    pub fn push_if(
        &mut self,
        bytes: &mut &[u8],
        admit: impl FnOnce(usize) -> bool,
    ) -> Result<Option<Frame>, WireError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                if !fill(&mut self.head, HEADER, bytes) {
                    return Ok(None);
                }
                let mut raw = [0; HEADER];
                raw.copy_from_slice(&self.head);
                let header = Header::parse(&raw)?;
                *self.header.insert(header)
            }
        };
        if !self.admitted {
            if !admit(header.head_len + header.data_len) {
                return Ok(None);
            }
            self.admitted = true;
            self.head.reserve_exact(header.head_len - HEADER);
            self.data.reserve_exact(header.data_len);
        }
        if !fill(&mut self.head, header.head_len, bytes) || !fill(&mut self.data, header.data_len, bytes) {
            return Ok(None);
        }
        self.header = None;
        self.admitted = false;
        frame::decode(header.kind, core::mem::take(&mut self.head), core::mem::take(&mut self.data)).map(Some)
    }

    /// Bytes of the frame begun, where its header is there and no room for it yet.
    pub fn is_waiting(&self) -> Option<usize> {
        self.header.filter(|_| !self.admitted).map(|h| h.head_len + h.data_len)
    }

    /// Bytes still missing of the frame begun, as far as is known; at least 1.
    pub fn missing(&self) -> usize {
        let want = self.header.map_or(HEADER, |h| h.head_len + h.data_len);
        want - self.head.len() - self.data.len()
    }
}
