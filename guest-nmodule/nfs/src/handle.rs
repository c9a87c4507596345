//! File handles on the wire.
//!
//! A handle is 24 bytes: `"OR"`, version 1, a zero byte, volume (u32), generation (u32), inode (u64), and the low half
//! of the xxh3-64 of these 20 bytes; all big-endian. The checksum is no secret: it tells rubbish and damage from a
//! handle that was once given out, so that the first is BADHANDLE and the second, if its file is gone, STALE.
use fabric::fs::{FileHandle, VolumeId};
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a handle.
pub const HANDLE_SIZE: usize = 24;
/// Longest handle of NFSv3 (RFC 1813, NFS3_FHSIZE).
pub const HANDLE_MAX: usize = 64;

const PREFIX: [u8; 4] = [b'O', b'R', 1, 0];

/// Not a handle that was given out here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a file handle of this server")]
pub struct BadHandle;

/// A handle in its wire form.
pub fn encode(handle: FileHandle) -> [u8; HANDLE_SIZE] {
    let mut bytes = [0; HANDLE_SIZE];
    bytes[..4].copy_from_slice(&PREFIX);
    bytes[4..8].copy_from_slice(&handle.volume.0.to_be_bytes());
    bytes[8..12].copy_from_slice(&handle.generation.to_be_bytes());
    bytes[12..20].copy_from_slice(&handle.inode.to_be_bytes());
    let sum = xxh3_64(&bytes[..20]) as u32;
    bytes[20..].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// A handle from its wire form.
pub fn decode(bytes: &[u8]) -> Result<FileHandle, BadHandle> {
    let bytes: &[u8; HANDLE_SIZE] = bytes.try_into().map_err(|_| BadHandle)?;
    let [v0, v1, v2, v3, g0, g1, g2, g3, i0, i1, i2, i3, i4, i5, i6, i7] =
        *<&[u8; 16]>::try_from(&bytes[4..20]).map_err(|_| BadHandle)?;
    let handle = FileHandle {
        volume: VolumeId(u32::from_be_bytes([v0, v1, v2, v3])),
        generation: u32::from_be_bytes([g0, g1, g2, g3]),
        inode: u64::from_be_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
    };
    if encode(handle) == *bytes { Ok(handle) } else { Err(BadHandle) }
}

#[cfg(test)]
mod tests;
