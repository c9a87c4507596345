//! Who runs a VM: ownership records, and how they change.
//!
//! Owns: the record and the table of all of a D-module's. The table is a value; whoever holds it makes a
//! change durable before it says so to anybody.
//!
//! Always true: an epoch never goes back; a change raises it by one; `session` is the epoch of the last
//! fresh start and at most `epoch`. No epoch is given twice to a VM, not even when its record was released in between: the
//! table has a **floor**, the highest epoch of all records released, and a VM without a record begins above it.
//!
//! Every change says from which epoch it starts, a claim as well ([`claim`]): one that comes late, when the record has gone
//! on, changes nothing. A VM's guest that has no epoch claims while its process asks for a port of it; whatever comes of that,
//! nobody but this process can have taken an epoch a claim was based on, so it may go on from there ([`OwnerError::Behind`]).
//!
//! An **heir** is the process that the owner has said it may hand the VM over to. With a durable heir, its compare-and-swap can
//! be answered before the new record is durable: should that answer be given and forgotten in a crash of the D-module, the
//! heir is the only one who can take the next epoch afterwards (see [`crate::server`]), until the owner names
//! another heir, which it does only as long as it has not handed over.
use crate::id::{Epoch, Owner, VmId};
use alloc::collections::BTreeMap;

/// Most VMs a D-module keeps a record of.
pub const VMS_MAX: usize = 1024;
/// Most records that have an heir at a time: those are kept where they can be changed at once.
pub const HEIRS_MAX: usize = 32;

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
    /// The record is the asker's own, but its guest has claimed since: to be asked again from the record's epoch.
    #[error("the epoch is {} since the VM's own guest has claimed", .0.epoch.0)]
    Behind(OwnerRecord),
    /// A claim based on another epoch than this.
    #[error("the epoch is {}", .0.0)]
    Stale(Epoch),
    /// No room for another VM, or for another heir.
    #[error(
        "{VMS_MAX} VMs have ownership records already, or {HEIRS_MAX} an heir: release those of VMs that have ended for good"
    )]
    Full,
    /// An heir was named before a restart of the D-module and may have it already; only the owner or the heir can tell.
    #[error("the VM may have been handed over")]
    Sealed,
    /// VM id 0, or the epochs are used up.
    #[error("not a VM that can be owned")]
    Invalid,
}

/// Compare-and-swap from `expect` to the next epoch. `current` is `None` for a VM without a record, whose epoch is 0; its first
/// one is above `floor` ([`OwnerTable::floor`]).
///
/// Asking again for what one has already won is won (the first answer may have been lost). A claim of the asker's guest's is not
/// that: others of it may be on their way, and what it has led to is known only once the epoch has gone on from it.
/// Returns the record to make durable; it equals `current` in that case.
pub fn compare_and_swap(
    current: Option<OwnerRecord>,
    floor: Epoch,
    vm_id: VmId,
    expect: Epoch,
    owner: Owner,
) -> Result<OwnerRecord, OwnerError> {
    if vm_id.0 == 0 {
        return Err(OwnerError::Invalid);
    }
    let next = expect.next().ok_or(OwnerError::Invalid)?;
    match current {
        None if expect == Epoch::UNCLAIMED => {
            let first = floor.next().ok_or(OwnerError::Invalid)?;
            Ok(OwnerRecord { vm_id, epoch: first, session: first, owner })
        }
        None => Err(OwnerError::Lost(OwnerRecord { vm_id, ..OwnerRecord::default() })),
        Some(held) if held.epoch == expect => Ok(OwnerRecord { epoch: next, owner, ..held }),
        Some(held) => {
            let first = expect == Epoch::UNCLAIMED && held.epoch == held.session;
            let claimed = held.epoch == held.session;
            match held.owner == owner {
                true if first || held.epoch == next && !claimed => Ok(held),
                true if held.epoch > expect && claimed => Err(OwnerError::Behind(held)),
                _ => Err(OwnerError::Lost(held)),
            }
        }
    }
}

/// A fresh start of the VM, whoever has it: from the epoch `expect`, that of the record or the floor, to the next and a new session.
/// `given`: that one may be the heir's already, and it is the one behind it. Returns the record to make durable.
pub fn claim(
    current: Option<OwnerRecord>,
    floor: Epoch,
    vm_id: VmId,
    expect: Epoch,
    given: bool,
    owner: Owner,
) -> Result<OwnerRecord, OwnerError> {
    if vm_id.0 == 0 {
        return Err(OwnerError::Invalid);
    }
    let base = current.map_or(floor, |r| r.epoch);
    if expect != base {
        return Err(OwnerError::Stale(base));
    }
    let last = if given { base.next() } else { Some(base) };
    let epoch = last.and_then(Epoch::next).ok_or(OwnerError::Invalid)?;
    Ok(OwnerRecord { vm_id, epoch, session: epoch, owner })
}

/// The VM has ended for good: its owner, at its present epoch, has its record released. `None`: there is none, and this epoch may
/// have been released (the first answer may have been lost).
pub fn release(
    current: Option<OwnerRecord>,
    floor: Epoch,
    vm_id: VmId,
    epoch: Epoch,
    asker: Owner,
) -> Result<Option<OwnerRecord>, OwnerError> {
    match current {
        Some(held) if held.epoch == epoch && held.owner == asker => Ok(Some(held)),
        Some(held) => Err(OwnerError::Lost(held)),
        None if epoch <= floor => Ok(None),
        None => Err(OwnerError::Lost(OwnerRecord { vm_id, ..OwnerRecord::default() })),
    }
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

/// What becomes of one VM's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerChange {
    /// It is this, with this heir.
    Set(OwnerRecord, Option<Owner>),
    /// It is released, at this epoch or the record's, whichever is later: an image that never got the latest record must know that epoch too.
    Release(VmId, Epoch),
}

impl OwnerChange {
    /// Whose.
    pub fn vm_id(&self) -> VmId {
        match self {
            OwnerChange::Set(record, _) => record.vm_id,
            OwnerChange::Release(vm_id, _) => *vm_id,
        }
    }
}

/// All ownership records of a D-module, at most [`VMS_MAX`], the heirs, at most [`HEIRS_MAX`] named, and the floor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnerTable {
    entries: BTreeMap<VmId, Entry>,
    heirs: usize,
    floor: Epoch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    record: OwnerRecord,
    heir: Option<Owner>,
}

impl OwnerTable {
    /// No records, and no epoch up to `floor` was not given.
    pub fn above(floor: Epoch) -> Self {
        OwnerTable { floor, ..OwnerTable::default() }
    }

    /// No VM without a record may get this epoch, nor one below it.
    pub fn floor(&self) -> Epoch {
        self.floor
    }

    /// The record of a VM.
    pub fn get(&self, vm_id: VmId) -> Option<OwnerRecord> {
        self.entries.get(&vm_id).map(|e| e.record)
    }

    /// The heir of a VM.
    pub fn heir(&self, vm_id: VmId) -> Option<Owner> {
        self.entries.get(&vm_id)?.heir
    }

    /// Records that have an heir.
    pub fn heirs(&self) -> usize {
        self.heirs
    }

    /// Records there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a change may be made: it is of a VM that can be owned, and there is room for it.
    pub fn admits(&self, change: &OwnerChange) -> Result<(), OwnerError> {
        match change {
            OwnerChange::Set(record, _) if record.vm_id.0 == 0 => Err(OwnerError::Invalid),
            OwnerChange::Set(record, heir) => {
                let held = self.entries.get(&record.vm_id);
                let another = heir.is_some() && held.is_none_or(|e| e.heir.is_none());
                let full = held.is_none() && self.entries.len() >= VMS_MAX || another && self.heirs >= HEIRS_MAX;
                if full { Err(OwnerError::Full) } else { Ok(()) }
            }
            OwnerChange::Release(..) => Ok(()),
        }
    }

    /// Makes a change that is admitted, or was when it was first made.
    pub fn apply(&mut self, change: &OwnerChange) {
        let former = match *change {
            OwnerChange::Set(record, heir) => {
                self.heirs += usize::from(heir.is_some());
                self.entries.insert(record.vm_id, Entry { record, heir })
            }
            OwnerChange::Release(vm_id, epoch) => {
                let former = self.entries.remove(&vm_id);
                self.floor = self.floor.max(former.map_or(epoch, |e| e.record.epoch.max(epoch)));
                former
            }
        };
        self.heirs -= usize::from(former.is_some_and(|e| e.heir.is_some()));
    }

    /// All records with their heirs, by VM id.
    pub fn entries(&self) -> impl Iterator<Item = (&OwnerRecord, Option<Owner>)> {
        self.entries.values().map(|e| (&e.record, e.heir))
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
        let start = claim(None, Epoch(0), VM, Epoch(0), false, A).unwrap();
        assert_eq!((start.epoch, start.session), (Epoch(1), Epoch(1)));
        let won = compare_and_swap(Some(start), Epoch(0), VM, Epoch(1), B).unwrap();
        assert_eq!((won.epoch, won.session, won.owner), (Epoch(2), Epoch(1), B));
        assert_eq!(compare_and_swap(Some(won), Epoch(0), VM, Epoch(1), A), Err(OwnerError::Lost(won)));
    }

    #[test]
    fn asking_again_is_won_and_changes_nothing() {
        let won = compare_and_swap(None, Epoch(0), VM, Epoch(0), A).unwrap();
        assert_eq!((won.epoch, won.session), (Epoch(1), Epoch(1)));
        assert_eq!(compare_and_swap(Some(won), Epoch(0), VM, Epoch(0), A), Ok(won));
        let next = compare_and_swap(Some(won), Epoch(0), VM, Epoch(1), A).unwrap();
        assert_eq!(compare_and_swap(Some(next), Epoch(0), VM, Epoch(0), A), Err(OwnerError::Lost(next)));
    }

    #[test]
    fn a_fresh_start_begins_a_session() {
        let held = OwnerRecord { vm_id: VM, epoch: Epoch(9), session: Epoch(4), owner: A };
        let from = |epoch, given| claim(Some(held), Epoch(0), VM, Epoch(epoch), given, B);
        let fresh = OwnerRecord { vm_id: VM, epoch: Epoch(10), session: Epoch(10), owner: B };
        assert_eq!(from(9, false), Ok(fresh));
        // The next epoch may be the heir's already.
        assert_eq!(from(9, true), Ok(OwnerRecord { epoch: Epoch(11), session: Epoch(11), ..fresh }));
        // It has gone on, or there was none then.
        for epoch in [0, 8, 10] {
            assert_eq!(from(epoch, false), Err(OwnerError::Stale(Epoch(9))));
        }
        assert_eq!(claim(None, Epoch(3), VM, Epoch(0), false, B), Err(OwnerError::Stale(Epoch(3))));
        let last = OwnerRecord { epoch: Epoch(u64::MAX), ..held };
        assert_eq!(claim(Some(last), Epoch(0), VM, Epoch(u64::MAX), false, B), Err(OwnerError::Invalid));
        assert_eq!(claim(None, Epoch(0), VmId(0), Epoch(0), false, B), Err(OwnerError::Invalid));
        assert_eq!(compare_and_swap(Some(last), Epoch(0), VM, Epoch(u64::MAX), B), Err(OwnerError::Invalid));
    }

    #[test]
    fn a_port_goes_on_from_what_the_guest_has_claimed() {
        let cas = |held, expect, who| compare_and_swap(Some(held), Epoch(0), VM, Epoch(expect), who);
        let taken = compare_and_swap(None, Epoch(0), VM, Epoch(0), A).unwrap();
        let claimed = claim(Some(taken), Epoch(0), VM, Epoch(1), false, A).unwrap();
        assert_eq!(claimed.epoch, Epoch(2));
        // Neither has won with epoch 1, but the one whose guest it is may go on.
        assert_eq!(cas(claimed, 1, B), Err(OwnerError::Lost(claimed)));
        assert_eq!(cas(claimed, 1, A), Err(OwnerError::Behind(claimed)));
        let again = claim(Some(claimed), Epoch(0), VM, Epoch(2), false, A).unwrap();
        assert_eq!(cas(again, 1, A), Err(OwnerError::Behind(again)));
        let won = cas(again, 3, A).unwrap();
        assert_eq!((won.epoch, won.session), (Epoch(4), Epoch(3)));
        assert_eq!(cas(won, 3, A), Ok(won), "asked again");
        // What comes late now changes nothing.
        assert_eq!(claim(Some(won), Epoch(0), VM, Epoch(3), false, A), Err(OwnerError::Stale(Epoch(4))));
        assert_eq!(cas(won, 1, A), Err(OwnerError::Lost(won)));
        // Another has it by a claim of its own.
        let fresh = claim(Some(won), Epoch(0), VM, Epoch(4), false, B).unwrap();
        assert_eq!(cas(fresh, 4, A), Err(OwnerError::Lost(fresh)));
    }

    #[test]
    fn only_the_owner_names_an_heir_and_a_change_forgets_it() {
        let held = claim(None, Epoch(0), VM, Epoch(0), false, A).unwrap();
        let lost = Err(OwnerError::Lost(held));
        assert_eq!(reserve(Some(held), None, VM, Epoch(1), A, Some(B)), Ok(held));
        assert_eq!(reserve(Some(held), None, VM, Epoch(1), B, Some(B)), lost);
        assert_eq!(reserve(Some(held), None, VM, Epoch(2), A, Some(B)), lost);
        assert!(reserve(None, None, VM, Epoch(0), A, Some(B)).is_err());
        // The heir may renounce, nothing else.
        assert_eq!(reserve(Some(held), Some(B), VM, Epoch(1), B, None), Ok(held));
        assert_eq!(reserve(Some(held), Some(B), VM, Epoch(1), B, Some(B)), lost);
        let mut table = OwnerTable::default();
        table.apply(&OwnerChange::Set(held, Some(B)));
        assert_eq!(table.heir(VM), Some(B));
        let next = compare_and_swap(Some(held), Epoch(0), VM, Epoch(1), B).unwrap();
        table.apply(&OwnerChange::Set(next, None));
        assert_eq!((table.heir(VM), table.heirs), (None, 0));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = OwnerTable::default();
        let of = |vm: u64| claim(None, Epoch(0), VmId(vm), Epoch(0), false, A).unwrap();
        for vm in 1..=VMS_MAX as u64 {
            let change = OwnerChange::Set(of(vm), None);
            assert_eq!(table.admits(&change), Ok(()));
            table.apply(&change);
        }
        assert_eq!(table.admits(&OwnerChange::Set(of(5000), None)), Err(OwnerError::Full));
        for vm in 1..=HEIRS_MAX as u64 {
            let change = OwnerChange::Set(of(vm), Some(B));
            assert_eq!(table.admits(&change), Ok(()));
            table.apply(&change);
        }
        let last = HEIRS_MAX as u64;
        assert_eq!(table.admits(&OwnerChange::Set(of(last + 1), Some(B))), Err(OwnerError::Full));
        assert_eq!(table.admits(&OwnerChange::Set(of(last), Some(A))), Ok(()));
        let next = compare_and_swap(table.get(VM), Epoch(0), VM, Epoch(1), B).unwrap();
        table.apply(&OwnerChange::Set(next, None));
        assert_eq!((table.get(VM), table.len(), table.heirs), (Some(next), VMS_MAX, HEIRS_MAX - 1));
        assert_eq!(table.admits(&OwnerChange::Set(of(last + 1), Some(B))), Ok(()));
        table.apply(&OwnerChange::Release(VmId(9), Epoch(1)));
        assert_eq!(table.admits(&OwnerChange::Set(of(5000), None)), Ok(()));
    }

    #[test]
    fn no_epoch_comes_again_after_a_release() {
        let mut table = OwnerTable::default();
        let held = OwnerRecord { vm_id: VM, epoch: Epoch(7), session: Epoch(2), owner: A };
        table.apply(&OwnerChange::Set(held, None));
        let asked = |table: &OwnerTable, epoch, who| release(table.get(VM), table.floor(), VM, Epoch(epoch), who);
        assert_eq!(asked(&table, 6, A), Err(OwnerError::Lost(held)), "not at another epoch");
        assert_eq!(asked(&table, 7, B), Err(OwnerError::Lost(held)), "not by another than the owner");
        assert_eq!(asked(&table, 7, A), Ok(Some(held)));
        table.apply(&OwnerChange::Release(VM, Epoch(7)));
        assert_eq!(asked(&table, 7, A), Ok(None), "asked again");
        assert!(asked(&table, 8, A).is_err());
        // Neither this VM nor another one that has no record gets an epoch that was in use.
        for vm in [VM, VmId(8)] {
            let fresh = claim(table.get(vm), table.floor(), vm, Epoch(7), false, B).unwrap();
            assert_eq!((fresh.epoch, fresh.session), (Epoch(8), Epoch(8)));
            assert_eq!(compare_and_swap(None, table.floor(), vm, Epoch(0), B), Ok(fresh));
            assert_eq!(compare_and_swap(Some(fresh), table.floor(), vm, Epoch(0), B), Ok(fresh), "asked again");
            assert_eq!(compare_and_swap(Some(fresh), table.floor(), vm, Epoch(0), A), Err(OwnerError::Lost(fresh)));
        }
        let none = OwnerRecord { vm_id: VM, ..OwnerRecord::default() };
        assert_eq!(compare_and_swap(None, table.floor(), VM, Epoch(7), A), Err(OwnerError::Lost(none)));
    }
}
