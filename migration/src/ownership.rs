//! The record that decides which copy of a VM runs.
//!
//! One record per VM, kept by the arbiter (the D-module, or a service of the host for VMs without one). It only changes
//! by compare-and-swap of its epoch, so of two that compete with the same expected epoch exactly one wins; a
//! competitor that repeats its request because an answer got lost learns that it has already won from its own id.

/// Identity of a `vmm` process: random, never used twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnerId(pub [u64; 2]);

/// Counts the changes of owner. Grows by one with each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The one after this.
    pub fn next(self) -> Epoch {
        Epoch(self.0.saturating_add(1))
    }
}

/// Who owns a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Record {
    /// Epoch of the record.
    pub epoch: Epoch,
    /// The owner.
    pub owner: OwnerId,
}

/// Answer to a compare-and-swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The asker owns the VM at this epoch.
    Won(Epoch),
    /// Somebody else does.
    Lost(Record),
    /// The asker does, at this epoch: its guest has claimed the record since. It is to compete from there.
    Behind(Epoch),
}

impl Record {
    /// `expected` → `expected + 1` with a new owner, if the record still stands at `expected`.
    pub fn compete(&mut self, expected: Epoch, owner: OwnerId) -> Verdict {
        if self.epoch == expected {
            *self = Record { epoch: expected.next(), owner };
            return Verdict::Won(self.epoch);
        }
        if self.epoch == expected.next() && self.owner == owner {
            return Verdict::Won(self.epoch);
        }
        Verdict::Lost(*self)
    }
}
