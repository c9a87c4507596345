//! virtio-blk.
/// A disk.
pub struct BlockDevice {}
