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
        let header = match self.header {
            Some(header) => header,
            None => {
                if !fill(&mut self.head, HEADER, bytes) {
                    return Ok(None);
                }
                let mut raw = [0; HEADER];
                raw.copy_from_slice(&self.head);
                let header = Header::parse(&raw)?;
                self.head.reserve_exact(header.head_len - HEADER);
                self.data.reserve_exact(header.data_len);
                *self.header.insert(header)
            }
        };
        if !fill(&mut self.head, header.head_len, bytes) || !fill(&mut self.data, header.data_len, bytes) {
            return Ok(None);
        }
        self.header = None;
        frame::decode(header.kind, core::mem::take(&mut self.head), core::mem::take(&mut self.data)).map(Some)
    }

    /// Bytes still missing of the frame begun, as far as is known; at least 1.
    pub fn missing(&self) -> usize {
        let want = self.header.map_or(HEADER, |h| h.head_len + h.data_len);
        want - self.head.len() - self.data.len()
    }
}
