//! Identifiers of the cluster fabric. All are plain numbers on the wire.

/// A VM that speaks CF: key of its session and of its ownership record. Zero names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmId(pub u64);

/// Ownership epoch of a VM. Zero: not claimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Not claimed: in a HELLO it asks for a claim.
    pub const UNCLAIMED: Epoch = Epoch(0);

    /// The epoch after this one; `None` after the last (which no cluster lives to see).
    pub fn next(self) -> Option<Epoch> {
        self.0.checked_add(1).map(Epoch)
    }
}

/// Random identity of a `vmm` process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner(pub [u64; 2]);

/// One start of a D-module. It is the write verifier as well: unstable writes made under another one may be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BootId(pub u64);

/// A slot of a session: one request is outstanding in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u16);

/// Slots of a session.
pub const SLOTS: usize = 64;

/// Number of a request within its slot; the first is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sequence(pub u64);

impl Sequence {
    /// The one after this. Wraps after 2^64 requests, 0 left out.
    pub fn next(self) -> Sequence {
        Sequence(self.0.wrapping_add(1).max(1))
    }
}
