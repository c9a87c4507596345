//! Write-anywhere file system, without I/O: takes operations, blocks, time and randomness from outside.
//!
//! How to use it: [`format()`] once; [`FileSystem::mount`] with the two fsinfo blocks; then
//! [`FileSystem::execute`] for each operation. [`Attempt::Need`]: read the blocks, [`FileSystem::supply`] them, execute again.
//! [`Attempt::Busy`]: take a consistency point ([`FileSystem::begin_consistency_point`], write it,
//! [`FileSystem::consistency_point_done`]), execute again; operations may go on as soon as the point has been taken. The
//! reply of an operation leaves when [`FileSystem::durable_cp`] has reached its `durable_at`. While
//! [`FileSystem::has_work`], call [`FileSystem::work`] now and then.
//! docs/data-layout.md describes the format and why it survives a crash.
//!
//! Everything read from disk is taken for hostile: it may make operations fail, not panic or run without bound.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod block;
mod cache;
mod check;
mod consistency;
mod directory;
mod dirty;
mod error;
mod format;
mod fs;
mod fsinfo;
mod inode;
mod inode_map;
mod leaf;
mod ops;
mod owner;
mod owner_file;
mod permission;
mod session;
mod space;
mod truncate;
mod txn;

pub use block::{BLOCK_SIZE, Block, BlockBuf, BlockNumber};
pub use check::{Report, check};
pub use consistency::{ConsistencyPoint, CpNumber};
pub use error::LayoutError;
pub use format::{Format, FormatOptions, format};
pub use fs::{Attempt, Completed, FileSystem, KeepKey, MountOptions, NEED_MAX, RESTARTS_MAX, Step, Usage, Work};
pub use fsinfo::{FSINFO_BLOCKS, VOLUME_BLOCKS_MAX, VOLUME_BLOCKS_MIN, VOLUME_NAME_MAX};
pub use inode::FILE_SIZE_MAX;
pub use ops::LINKS_MAX;
pub use owner::{JOURNAL_MAX, OWNER_BLOCKS, OwnerJournal, OwnerStore, OwnerWrite, SETTLE_AT};
pub use owner_file::PlacedRecord;
