//! The header of a frame, and its checksum.
//!
//! ```text
//! 0  u32 magic "ORCF"     16 u64 checksum
//! 4  u16 version          24 body, padded with zeros to a multiple of 8
//! 6  u16 kind             length - data_len: bulk data, not padded
//! 8  u32 length of the frame, header and data included
//! 12 u32 data_len
//! ```
//! The checksum is the xxh3-64 of the head (header with a checksum of zero, and body), seeded with
//! the xxh3-64 of the data, or with 0 where there is none: a head can be changed without reading the data again.
use super::{MAX_FRAME, VERSION, WireError};
use crate::fs::IO_MAX;
use alloc::vec::Vec;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Size of a header.
pub const HEADER: usize = 24;
/// First bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ORCF");

const VERSION_AT: usize = 4;
const KIND_AT: usize = 6;
const LENGTH_AT: usize = 8;
const DATA_AT: usize = 12;
const CHECKSUM_AT: usize = 16;

/// A header, its lengths checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u16,
    /// Bytes of header and body: a multiple of 8.
    pub(super) head_len: usize,
    /// Bytes of bulk data.
    pub(super) data_len: usize,
}

fn u16_at(bytes: &[u8; HEADER], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Header {
    /// Checks an untrusted header, all but the checksum.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Result<Header, WireError> {
        if u32_at(bytes, 0) != MAGIC {
            return Err(WireError::Magic);
        }
        let version = u16_at(bytes, VERSION_AT);
        if version != VERSION {
            return Err(WireError::Version(version));
        }
        let (length, data_len) = (u32_at(bytes, LENGTH_AT) as usize, u32_at(bytes, DATA_AT) as usize);
        if length > MAX_FRAME || data_len > IO_MAX {
            return Err(WireError::TooLarge);
        }
        match length.checked_sub(data_len) {
            Some(head_len) if head_len >= HEADER && head_len.is_multiple_of(8) => {
                Ok(Header { kind: u16_at(bytes, KIND_AT), head_len, data_len })
            }
            _ => Err(WireError::Malformed("lengths")),
        }
    }
}

/// Hash of bulk data, as the checksum of its head needs it.
pub(super) fn hash_data(data: &[u8]) -> u64 {
    if data.is_empty() { 0 } else { xxh3_64(data) }
}

/// Starts a head: the header without lengths and checksum.
pub(super) fn begin(kind: u16) -> Vec<u8> {
    let mut head = Vec::with_capacity(256);
    head.extend_from_slice(&MAGIC.to_le_bytes());
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&kind.to_le_bytes());
    head.resize(HEADER, 0);
    head
}

/// Ends a head: padding and lengths. [`seal`] is still to be done.
pub(super) fn end(head: &mut Vec<u8>, data_len: usize) -> Result<(), WireError> {
    head.resize(head.len().next_multiple_of(8), 0);
    let length = head.len() + data_len;
    if length > MAX_FRAME || data_len > IO_MAX {
        return Err(WireError::TooLarge);
    }
    // Both fit, see MAX_FRAME.
    head[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&(length as u32).to_le_bytes());
    head[DATA_AT..DATA_AT + 4].copy_from_slice(&(data_len as u32).to_le_bytes());
    Ok(())
}

/// Writes the checksum into a head that is complete otherwise.
pub(super) fn seal(head: &mut [u8], data_hash: u64) {
    head[CHECKSUM_AT..HEADER].fill(0);
    let sum = xxh3_64_with_seed(head, data_hash);
    head[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
}

/// Checks the checksum of a head. Leaves it zero.
pub(super) fn verify(head: &mut [u8], data: &[u8]) -> Result<(), WireError> {
    let mut said = [0; 8];
    said.copy_from_slice(&head[CHECKSUM_AT..HEADER]);
    head[CHECKSUM_AT..HEADER].fill(0);
    if xxh3_64_with_seed(head, hash_data(data)) == u64::from_le_bytes(said) { Ok(()) } else { Err(WireError::Checksum) }
}
