//! The frames of the cluster fabric in bytes: docs/cf-protocol.md.
//!
//! Owns: the frame kinds, their encoding ([`encode`]) and the reader of a byte stream ([`FrameReader`]).
//!
//! Always true: what is encoded is decoded to the same value; a frame is at most [`MAX_FRAME`] bytes, which is
//! checked before anything is allocated; no input makes the reader panic. Bulk data (of Write, and of the reply to
//! Read) is moved between the value and the stream, not copied within this module save once when it is received.
mod bytes;
mod frame;
mod header;
mod op;
mod ownership;
mod reader;
mod value;

#[cfg(test)]
pub(crate) mod tests;

pub use frame::{
    CasStatus, Encoded, Farewell, Frame, Hello, HelloAck, Refusal, decode_kept, encode, encode_kept, reseal_request,
};
pub use header::{HEADER, MAGIC};
pub use ownership::{CLAIM, OwnerAnswer, OwnerAnswers, owner_cas, owner_get, owner_release, owner_reserve};
pub use reader::FrameReader;

use crate::fs::IO_MAX;

/// Version of the protocol.
pub const VERSION: u16 = 1;
/// Longest frame.
pub const MAX_FRAME: usize = IO_MAX + (64 << 10);
/// Longest name of a volume.
pub const VOLUME_NAME_MAX: usize = 255;
/// Most entries of one directory listing.
pub const ENTRIES_MAX: usize = 4096;
/// Most bytes of names in one directory listing: with [`ENTRIES_MAX`] entries it fits in a frame.
pub const ENTRY_BYTES_MAX: usize = 256 << 10;
/// Longest kept reply ([`encode_kept`]): the reply to any non-idempotent operation fits.
pub const KEPT_MAX: usize = 512;

/// Bytes that are not a frame, or a value that does not fit in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not the cluster fabric's protocol.
    #[error("not a cluster fabric frame")]
    Magic,
    /// Another version of it.
    #[error("protocol version {0} is not supported")]
    Version(u16),
    /// Longer than allowed.
    #[error("frame too large")]
    TooLarge,
    /// Damaged on the way.
    #[error("checksum mismatch")]
    Checksum,
    /// Not what the kind of frame has.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
}
