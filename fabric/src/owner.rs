//! Who runs a VM: ownership records, and how they change.
//!
//! Owns: the record and the table of all of a D-module's. The table is a value; whoever holds it makes a
//! change durable before it says so to anybody.
//!
//! Always true: an epoch never goes back; a change raises it by one; `session` is the epoch of the last
//! fresh start and at most `epoch`.
//!
//! An **heir** is the process that the owner has said it may hand the VM over to. With a durable heir, its compare-and-swap can
//! be answered before the new record is durable: should that answer be given and forgotten in a crash of the D-module, the
//! heir is the only one who can take the next epoch afterwards (see [`crate::server`]), until the owner names
//! another heir, which it does only as long as it has not handed over.
use crate::id::{Epoch, Owner, VmId};
use alloc::collections::BTreeMap;

/// Most VMs a D-module keeps a record of: they must fit in one 4 KiB block.
pub const VMS_MAX: usize = 64;

/// The ownership record of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerRecord {
    /// The VM.
    pub vm_id: VmId,
    /// Requests of any other epoch are refused.
    pub epoch: Epoch,
    /// Epoch of the VM's last fresh start: kept replies of an earlier one are void.
    pub session: Epoch,
    /// The `vmm` process that runs it.
    pub owner: Owner,
}

/// Why a record was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnerError {
    /// The epoch is another one: somebody else was first.
    #[error("the epoch is {}, owned by {:x?}", .0.epoch.0, .0.owner.0)]
    Lost(OwnerRecord),
    /// No room for another VM.
    #[error("no room for another VM's ownership record")]
    Full,
    /// An heir was named before a restart of the D-module and may have it already; only the owner or the heir can tell.
    #[error("the VM may have been handed over")]
    Sealed,
    /// VM id 0, or the epochs are used up.
    #[error("not a VM that can be owned")]
    Invalid,
}

/// Compare-and-swap from `expect` to the next epoch. `current` is `None` for a VM without a record, whose epoch is 0.
///
/// Asking again for what one has already won is won (the first answer may have been lost).
/// Returns the record to make durable; it equals `current` in that case.
pub fn compare_and_swap(
    current: Option<OwnerRecord>,
    vm_id: VmId,
    expect: Epoch,
    owner: Owner,
) -> Result<OwnerRecord, OwnerError> {
    let held = current.unwrap_or(OwnerRecord { vm_id, ..OwnerRecord::default() });
    let next = expect.next().ok_or(OwnerError::Invalid)?;
    if vm_id.0 == 0 {
        Err(OwnerError::Invalid)
    } else if held.epoch == expect {
        let session = if held.session.0 == 0 { next } else { held.session };
        Ok(OwnerRecord { vm_id, epoch: next, session, owner })
    } else if held.epoch == next && held.owner == owner {
        Ok(held)
    } else {
        Err(OwnerError::Lost(held))
    }
}

/// A fresh start of the VM: whatever the epoch, the next one, and a new session. Returns the record to make durable.
pub fn claim(current: Option<OwnerRecord>, vm_id: VmId, owner: Owner) -> Result<OwnerRecord, OwnerError> {
    if vm_id.0 == 0 {
        return Err(OwnerError::Invalid);
    }
    let epoch = current.map_or(Epoch(0), |r| r.epoch).next().ok_or(OwnerError::Invalid)?;
    Ok(OwnerRecord { vm_id, epoch, session: epoch, owner })
}

/// Names the heir of a VM in place of `former` (`None`: nobody). Only its owner may, and only at the present epoch; the heir itself
/// may renounce.
pub fn reserve(
    current: Option<OwnerRecord>,
    former: Option<Owner>,
    vm_id: VmId,
    epoch: Epoch,
    asker: Owner,
    heir: Option<Owner>,
) -> Result<OwnerRecord, OwnerError> {
    let held = current.ok_or(OwnerError::Lost(OwnerRecord { vm_id, ..OwnerRecord::default() }))?;
    let may = held.owner == asker || heir.is_none() && former == Some(asker);
    if held.epoch == epoch && may { Ok(held) } else { Err(OwnerError::Lost(held)) }
}

/// All ownership records of a D-module, at most [`VMS_MAX`], and the heirs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnerTable(BTreeMap<VmId, Entry>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    record: OwnerRecord,
    heir: Option<Owner>,
}

impl OwnerTable {
    /// The record of a VM.
    pub fn get(&self, vm_id: VmId) -> Option<OwnerRecord> {
        self.0.get(&vm_id).map(|e| e.record)
    }

    /// The heir of a VM.
    pub fn heir(&self, vm_id: VmId) -> Option<Owner> {
        self.0.get(&vm_id)?.heir
    }

    /// Puts a record in, in place of the VM's former one; it has no heir.
    pub fn set(&mut self, record: OwnerRecord) -> Result<(), OwnerError> {
        if record.vm_id.0 == 0 {
            return Err(OwnerError::Invalid);
        }
        if !self.0.contains_key(&record.vm_id) && self.0.len() >= VMS_MAX {
            return Err(OwnerError::Full);
        }
        self.0.insert(record.vm_id, Entry { record, heir: None });
        Ok(())
    }

    /// Names the heir of a VM that has a record; without one it does nothing.
    pub fn set_heir(&mut self, vm_id: VmId, heir: Option<Owner>) {
        if let Some(entry) = self.0.get_mut(&vm_id) {
            entry.heir = heir;
        }
    }

    /// All records with their heirs, by VM id.
    pub fn entries(&self) -> impl Iterator<Item = (&OwnerRecord, Option<Owner>)> {
        self.0.values().map(|e| (&e.record, e.heir))
    }

    /// All records, by VM id.
    pub fn records(&self) -> impl Iterator<Item = &OwnerRecord> {
        self.0.values().map(|e| &e.record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId(7);
    const A: Owner = Owner([1, 2]);
    const B: Owner = Owner([3, 4]);

    #[test]
    fn one_of_two_wins() {
        let start = claim(None, VM, A).unwrap();
        assert_eq!((start.epoch, start.session), (Epoch(1), Epoch(1)));
        let won = compare_and_swap(Some(start), VM, Epoch(1), B).unwrap();
        assert_eq!((won.epoch, won.session, won.owner), (Epoch(2), Epoch(1), B));
        assert_eq!(compare_and_swap(Some(won), VM, Epoch(1), A), Err(OwnerError::Lost(won)));
    }

    #[test]
    fn asking_again_is_won_and_changes_nothing() {
        let won = compare_and_swap(None, VM, Epoch(0), A).unwrap();
        assert_eq!((won.epoch, won.session), (Epoch(1), Epoch(1)));
        assert_eq!(compare_and_swap(Some(won), VM, Epoch(0), A), Ok(won));
        let next = compare_and_swap(Some(won), VM, Epoch(1), A).unwrap();
        assert_eq!(compare_and_swap(Some(next), VM, Epoch(0), A), Err(OwnerError::Lost(next)));
    }

    #[test]
    fn a_fresh_start_begins_a_session() {
        let held = OwnerRecord { vm_id: VM, epoch: Epoch(9), session: Epoch(4), owner: A };
        let fresh = claim(Some(held), VM, B).unwrap();
        assert_eq!(fresh, OwnerRecord { vm_id: VM, epoch: Epoch(10), session: Epoch(10), owner: B });
        let last = OwnerRecord { epoch: Epoch(u64::MAX), ..held };
        assert_eq!(claim(Some(last), VM, B), Err(OwnerError::Invalid));
        assert_eq!(claim(None, VmId(0), B), Err(OwnerError::Invalid));
        assert_eq!(compare_and_swap(Some(last), VM, Epoch(u64::MAX), B), Err(OwnerError::Invalid));
    }

    #[test]
    fn only_the_owner_names_an_heir_and_a_change_forgets_it() {
        let held = claim(None, VM, A).unwrap();
        let lost = Err(OwnerError::Lost(held));
        assert_eq!(reserve(Some(held), None, VM, Epoch(1), A, Some(B)), Ok(held));
        assert_eq!(reserve(Some(held), None, VM, Epoch(1), B, Some(B)), lost);
        assert_eq!(reserve(Some(held), None, VM, Epoch(2), A, Some(B)), lost);
        assert!(reserve(None, None, VM, Epoch(0), A, Some(B)).is_err());
        // The heir may renounce, nothing else.
        assert_eq!(reserve(Some(held), Some(B), VM, Epoch(1), B, None), Ok(held));
        assert_eq!(reserve(Some(held), Some(B), VM, Epoch(1), B, Some(B)), lost);
        let mut table = OwnerTable::default();
        table.set_heir(VM, Some(B));
        assert_eq!(table, OwnerTable::default());
        table.set(held).unwrap();
        table.set_heir(VM, Some(B));
        assert_eq!(table.heir(VM), Some(B));
        table.set(compare_and_swap(Some(held), VM, Epoch(1), B).unwrap()).unwrap();
        assert_eq!(table.heir(VM), None);
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = OwnerTable::default();
        for vm in 1..=VMS_MAX as u64 {
            table.set(claim(None, VmId(vm), A).unwrap()).unwrap();
        }
        assert_eq!(table.set(claim(None, VmId(1000), A).unwrap()), Err(OwnerError::Full));
        let next = compare_and_swap(table.get(VM), VM, Epoch(1), B).unwrap();
        table.set(next).unwrap();
        assert_eq!(table.get(VM), Some(next));
        assert_eq!(table.records().count(), VMS_MAX);
    }
}
