//! Why a volume could not be made or mounted. What an operation is refused with is [`fabric::fs::Status`].

/// Why a volume could not be made or mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Neither of the two fsinfo blocks is one of ours, or both are damaged.
    #[error("no file system found: neither fsinfo block is valid")]
    NoFileSystem,
    /// A version this code does not know.
    #[error("file system version {0} is not known here")]
    Version(u32),
    /// An ownership table of a version this code does not know: read as none, epochs would begin anew.
    #[error("ownership table version {0} is not known here")]
    OwnersVersion(u32),
    /// Neither image of the ownership table is whole.
    #[error(
        "both images of the ownership table are damaged: nobody knows which epochs were given. If no VM that used this volume \
         runs anywhere, start with owners=forget"
    )]
    OwnersDamaged,
    /// The file of ownership records is of an older consistency point than the journal of the table has seen.
    #[error(
        "the ownership table completes consistency point {journal}, the volume is at {volume}: the newest fsinfo is damaged, or an \
         old copy of a part of the disk was put back, and epochs would go back with it. If no VM that used this volume runs anywhere, \
         start with owners=forget"
    )]
    OwnersAhead {
        /// Point the journal builds on.
        journal: u64,
        /// Point the volume is at.
        volume: u64,
    },
    /// An ownership table with a valid checksum that cannot be.
    #[error("the ownership table is inconsistent: {0}")]
    Owners(&'static str),
    /// The disk is smaller than the file system on it.
    #[error("the disk has {disk} blocks, the file system needs {volume}")]
    DiskTooSmall {
        /// Blocks of the disk.
        disk: u64,
        /// Blocks of the file system.
        volume: u64,
    },
    /// Too small or too large a disk to make a file system on.
    #[error("a file system cannot have {0} blocks")]
    Size(u64),
    /// An empty or too long volume name.
    #[error("bad volume name")]
    Name,
    /// fsinfo has a valid checksum, but what it says cannot be.
    #[error("fsinfo is inconsistent: {0}")]
    Inconsistent(&'static str),
}
