//! What connects the checkpoints of a running VM.
//!
//! Always true of a [`Lineage`] a VM has: the dirty log has been on without a gap since the checkpoint it names was taken, all queues
//! have been served by this process, and every page that has changed since is in the log, in the bitmap of the monitor's own
//! writes, or in `since`. An attempt that fails puts what it took out of the log into `since`, so the lineage goes on; a port breaks it.

use kvm_ioctls::VmFd;
use migration::checkpoint::CheckpointId;

use crate::error::Result;
use crate::memory::Memory;
use crate::port::transfer::Pending;

/// See the module.
#[derive(Debug)]
pub(crate) struct Lineage {
    /// The last checkpoint.
    pub id: CheckpointId,
    /// Checksum of its header.
    pub seal: u64,
    /// Checkpoints from the first without a parent to it.
    pub depth: usize,
    /// Changed pages that are in the log no more.
    pub since: Pending,
}

impl Lineage {
    /// Takes what has changed out of the log, and remembers it.
    pub fn drain(&mut self, memory: &Memory, vm: &VmFd) -> Result<Pending> {
        let changed = drain(memory, vm)?;
        self.since.add(changed.words());
        Ok(changed)
    }
}

/// Takes what has changed out of the log and the bitmap of the monitor's own writes.
pub(crate) fn drain(memory: &Memory, vm: &VmFd) -> Result<Pending> {
    let mut changed = Pending::none(memory);
    changed.add_own(memory);
    changed.add_guest(memory, vm, true)?;
    Ok(changed)
}

/// Why a VM has no lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// None was begun.
    NotBegun,
    /// The log was switched off as asked for.
    NotTracked,
    /// A port used the log.
    Ported,
}

impl Broken {
    /// For people.
    pub fn reason(self) -> &'static str {
        match self {
            Broken::NotBegun => "this vmm has taken no checkpoint of the VM yet: take a whole one first",
            Broken::NotTracked => "what changed since the last checkpoint was not recorded (track): take a whole one",
            Broken::Ported => {
                "a port of the VM was tried since, which used the record of what changed: take a whole one"
            }
        }
    }
}
