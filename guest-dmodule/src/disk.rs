//! The virtio disk as a disk of blocks.
use alloc::format;
use alloc::vec::Vec;
use dserver::{Disk, DiskError};
use guest_rt::virtio::blk::{BlockDevice, BlockError};
use layout::{BLOCK_SIZE, Block, BlockNumber};

/// The virtio disk.
#[derive(Clone)]
pub struct VirtioDisk(BlockDevice);

impl VirtioDisk {
    pub fn new(device: BlockDevice) -> Self {
        VirtioDisk(device)
    }
}

fn failed(what: &str, first: BlockNumber, e: BlockError) -> DiskError {
    DiskError(format!("{what} block {}: {e}", first.0))
}

impl Disk for VirtioDisk {
    fn blocks(&self) -> u64 {
        self.0.capacity() / BLOCK_SIZE as u64
    }

    async fn read(&self, first: BlockNumber, count: usize) -> Result<Vec<Block>, DiskError> {
        let buffers: Vec<Block> = (0..count).map(|_| Block::zeroed()).collect();
        let (buffers, result) = self.0.read(first.0 * BLOCK_SIZE as u64, buffers).await;
        result.map(|()| buffers).map_err(|e| failed("reading", first, e))
    }

    async fn write(&self, first: BlockNumber, blocks: Vec<Block>) -> Result<(), DiskError> {
        let (_, result) = self.0.write(first.0 * BLOCK_SIZE as u64, blocks).await;
        result.map_err(|e| failed("writing", first, e))
    }

    async fn flush(&self) -> Result<(), DiskError> {
        self.0.flush().await.map_err(|e| DiskError(format!("flush: {e}")))
    }
}
