//! Checkpoints on disk: a VM's state and memory in a directory (the format is [`migration::checkpoint`]).
//!
//! Owns the two files and the order they come about in: `memory` first, then `state`, which is put in place by a rename when both
//! are on the disk. Always true: a directory without `state` is no checkpoint; what is read is checked, every page in the
//! memory file by its checksum, before a VM is made of it. Survives: crashes and full disks at any point (what was
//! written is removed, or is no checkpoint). So far the VM stands still while its checkpoint is written, and checkpoints have
//! no parents.

mod read;
mod write;

pub use read::Saved;
pub use write::{CheckpointRequest, Taken, take};

/// File of guest memory.
const MEMORY: &str = "memory";
/// File of everything else.
const STATE: &str = "state";
/// Its name until it is whole.
const STATE_PART: &str = "state.part";
