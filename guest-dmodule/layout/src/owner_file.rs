//! The file of ownership records: those that have not changed lately (`owner.rs` has the others).
//!
//! A metadata file of 64 records in each block, 64 bytes long: {vm_id, epoch, session, owner\[2\], zeroes}; vm_id 0: the place
//! is free. It is changed like any other file, so a consistency point has the whole of a change or nothing of it. With a
//! record that is released the VM's kept replies go as well.
use crate::block::{BLOCK_SIZE, BlockPointer, FANOUT, get_u64};
use crate::consistency::CpNumber;
use crate::fs::{Attempt, FileSystem};
use crate::inode::{Inode, OWNER_FILE};
use crate::owner::{get_record, is_possible, put_record};
use crate::space::Urgency;
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::fs::{Status, Time};
use fabric::id::VmId;
use fabric::owner::OwnerRecord;

const RECORD: usize = 64;
const PER_BLOCK: usize = BLOCK_SIZE / RECORD;
const BLOCKS: u64 = 18;
/// Places for records.
pub(crate) const PLACES: usize = BLOCKS as usize * PER_BLOCK;

/// What the file has, or is to have, of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedRecord {
    pub(crate) vm_id: VmId,
    /// Its place; `None`: it has had none.
    pub(crate) place: Option<u32>,
    /// Its record; `None`: it is released.
    pub(crate) record: Option<OwnerRecord>,
}

impl FileSystem {
    /// All records in the file.
    pub fn owner_records(&mut self) -> Attempt<Result<Vec<PlacedRecord>, Status>> {
        let mut txn = Txn::new(self, Time(0));
        let result = txn.owner_records();
        ended(txn, result)
    }

    /// Puts records into the file, and takes out those released with the replies kept for them. Says as of which consistency
    /// point.
    pub fn settle_owners(&mut self, records: &[PlacedRecord], now: Time) -> Attempt<Result<CpNumber, Status>> {
        if self.broken {
            return Attempt::Done(Err(Status::ServerFault));
        }
        let mut txn = Txn::new(self, now);
        // Without it, no VM more could be claimed or ported; its blocks are few and used again.
        txn.urgency = Urgency::Releases;
        let result = txn.settle_owners(records).and_then(|()| txn.commit()).map(|_| txn.fs.stable_at());
        ended(txn, result)
    }

    /// Gives all blocks of the file back, whatever is in them.
    pub fn forget_owners(&mut self, now: Time) -> Attempt<Result<(), Status>> {
        let mut txn = Txn::new(self, now);
        txn.urgency = Urgency::Releases;
        let result = txn.forget_owners().and_then(|()| txn.commit()).map(|_| ());
        ended(txn, result)
    }
}

fn ended<T>(mut txn: Txn<'_>, result: Res<T>) -> Attempt<Result<T, Status>> {
    match result {
        Ok(value) => Attempt::Done(Ok(value)),
        Err(Stop::Busy) => Attempt::Busy,
        Err(Stop::Need) => {
            let need = core::mem::take(&mut txn.need);
            Attempt::Need(txn.fs.want(need))
        }
        Err(Stop::Fail(status)) => {
            txn.fs.forget_failed(status);
            Attempt::Done(Err(status))
        }
    }
}

impl Txn<'_> {
    fn owner_records(&mut self) -> Res<Vec<PlacedRecord>> {
        self.load(OWNER_FILE, 0, BLOCKS)?;
        let mut records = Vec::new();
        for index in 0..BLOCKS {
            let Some(block) = self.block(OWNER_FILE, 0, index)? else { continue };
            for slot in 0..PER_BLOCK {
                let record = get_record(block.bytes(), slot * RECORD);
                if record == OwnerRecord::default() {
                    continue;
                }
                let place = index as usize * PER_BLOCK + slot;
                let rest =
                    (slot * RECORD + 40..(slot + 1) * RECORD).step_by(8).any(|at| get_u64(block.bytes(), at) != 0);
                if !is_possible(&record) || rest {
                    return Err(self.corrupt("ownership record", place as u64));
                }
                records.push(PlacedRecord { vm_id: record.vm_id, place: Some(place as u32), record: Some(record) });
            }
        }
        Ok(records)
    }

    fn settle_owners(&mut self, records: &[PlacedRecord]) -> Res<()> {
        let mut missing = false;
        for PlacedRecord { vm_id, place, record } in records {
            let forgotten = if record.is_none() { self.forget_replies(*vm_id) } else { Ok(()) };
            let placed = match place.map(|place| place as usize) {
                None => Ok(()),
                Some(place) => self.modify(OWNER_FILE, 0, (place / PER_BLOCK) as u64).map(|bytes| {
                    let at = place % PER_BLOCK * RECORD;
                    bytes[at..at + RECORD].fill(0);
                    if let Some(record) = record {
                        put_record(bytes, at, record);
                    }
                }),
            };
            match forgotten.and(placed) {
                Ok(()) => {}
                Err(Stop::Need) => missing = true,
                Err(stop) => return Err(stop),
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }

    fn forget_owners(&mut self) -> Res<()> {
        let inode = self.inode(OWNER_FILE)?;
        for root in inode.roots.into_iter().filter(|root| !root.is_hole()) {
            match if inode.height == 1 { self.fetch(root).map(Some) } else { Ok(None) } {
                Ok(Some(indirect)) => {
                    let children: Vec<BlockPointer> = (0..FANOUT as usize).map(|at| indirect.pointer(at)).collect();
                    for child in children {
                        self.free(child)?;
                    }
                }
                Ok(None) => {}
                Err(Stop::Fail(_)) => log::error!("blocks of the file of ownership records are lost"),
                Err(stop) => return Err(stop),
            }
            self.free(root)?;
        }
        *self.inode_mut(OWNER_FILE)? = Inode::meta(0);
        Ok(())
    }
}
