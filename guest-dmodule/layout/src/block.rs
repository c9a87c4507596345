//! Blocks: the unit of everything on disk, and pointers to them.
//!
//! Always true: block number 0 in a pointer means a hole (block 0 of the disk holds fsinfo and is never pointed
//! to); a pointer carries the hash of what it points to, so a block read from disk is believed only if it is the
//! one that was written.
use alloc::{boxed::Box, sync::Arc};
use xxhash_rust::xxh3::xxh3_64;

/// Bytes of a block.
pub const BLOCK_SIZE: usize = 4096;
/// Pointers in an indirect block.
pub(crate) const FANOUT: u64 = (BLOCK_SIZE / BlockPointer::SIZE) as u64;
/// log2 of [`FANOUT`].
pub(crate) const FANOUT_BITS: u32 = 8;

/// Number of a block on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockNumber(pub u64);

/// The bytes of a block, aligned so that a device can read and write them in place.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct BlockBuf(pub [u8; BLOCK_SIZE]);

impl AsRef<[u8]> for BlockBuf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for BlockBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A shared block buffer. A clone is the same memory; changing one that is shared copies it first, so a consistency
/// point can be written from buffers that operations go on changing.
///
/// Boxed inside the `Arc`: with the counters in front of 4096-aligned bytes every block would take 8 KiB.
#[derive(Clone)]
#[allow(clippy::redundant_allocation, reason = "an Arc of 4096-aligned bytes takes twice the memory")]
pub struct Block(Arc<Box<BlockBuf>>);

impl Block {
    /// A block of zeroes.
    pub fn zeroed() -> Self {
        Block(Arc::new(Box::new(BlockBuf([0; BLOCK_SIZE]))))
    }

    /// A block that begins with `bytes` (at most [`BLOCK_SIZE`] of them are taken) and is zero behind them.
    pub fn from_prefix(bytes: &[u8]) -> Self {
        match <&[u8; BLOCK_SIZE]>::try_from(bytes) {
            Ok(whole) => Block(Arc::new(Box::new(BlockBuf(*whole)))),
            Err(_) => {
                let mut block = Block::zeroed();
                let length = bytes.len().min(BLOCK_SIZE);
                block.bytes_mut()[..length].copy_from_slice(&bytes[..length]);
                block
            }
        }
    }

    /// The bytes, to overwrite, if nobody else has this buffer.
    pub(crate) fn bytes_unshared(&mut self) -> Option<&mut [u8; BLOCK_SIZE]> {
        Arc::get_mut(&mut self.0).map(|buf| &mut buf.0)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; BLOCK_SIZE] {
        &self.0.0
    }

    /// The bytes, to change; copies them first if the buffer is shared.
    pub fn bytes_mut(&mut self) -> &mut [u8; BLOCK_SIZE] {
        &mut Arc::make_mut(&mut self.0).0
    }

    pub(crate) fn hash(&self) -> u64 {
        xxh3_64(self.bytes())
    }

    pub(crate) fn pointer(&self, index: usize) -> BlockPointer {
        BlockPointer::read(self.bytes(), index * BlockPointer::SIZE)
    }
}

impl From<Box<BlockBuf>> for Block {
    fn from(buf: Box<BlockBuf>) -> Self {
        Block(Arc::new(buf))
    }
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

impl AsMut<[u8]> for Block {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes_mut()
    }
}

impl core::fmt::Debug for Block {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Block({:016x})", self.hash())
    }
}

/// Where a block is and what it must hold: 16 bytes, `{block: u64, xxh3-64: u64}`, little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockPointer {
    pub block: u64,
    pub hash: u64,
}

impl BlockPointer {
    pub const SIZE: usize = 16;
    pub const HOLE: BlockPointer = BlockPointer { block: 0, hash: 0 };

    pub fn is_hole(&self) -> bool {
        self.block == 0
    }

    pub fn read(bytes: &[u8], at: usize) -> Self {
        BlockPointer { block: get_u64(bytes, at), hash: get_u64(bytes, at + 8) }
    }

    pub fn write(&self, bytes: &mut [u8], at: usize) {
        put_u64(bytes, at, self.block);
        put_u64(bytes, at + 8, self.hash);
    }
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}
