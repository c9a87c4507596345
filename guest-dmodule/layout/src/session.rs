//! Kept replies: what a session's slots were last answered, in a metadata file, so that they are on disk exactly when
//! the effects of the operations are.
//!
//! Block 0: 16 bytes {vm_id u64, zero} for each VM, in the order of their first kept reply. VM i has the blocks
//! 1 + 10 i onwards, seven records of 584 bytes in each: {length u16, zero, bytes} per slot. The bytes are those of
//! [`fabric::wire::encode_kept`]: they hold the session's epoch, so a fresh start need not clear anything.
use crate::block::{BLOCK_SIZE, get_u16, get_u64, put_u16, put_u64};
use crate::fs::KeepKey;
use crate::inode::SESSION_FILE;
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::{
    fs::Status,
    id::{SLOTS, Slot, VmId},
    op::Reply,
    owner::VMS_MAX,
    wire::{KEPT_MAX, encode_kept},
};

const RECORD: usize = 584;
const HEADER: usize = 16;
const PER_BLOCK: usize = BLOCK_SIZE / RECORD;
const BLOCKS_PER_VM: u64 = SLOTS.div_ceil(PER_BLOCK) as u64;
const VM_ENTRY: usize = 16;
const _: () = assert!(HEADER + KEPT_MAX <= RECORD && VM_ENTRY * VMS_MAX <= BLOCK_SIZE && BLOCKS_PER_VM == 10);

impl Txn<'_> {
    fn session_of(&mut self, vm_id: VmId) -> Res<Option<u64>> {
        let Some(table) = self.block(SESSION_FILE, 0, 0)? else { return Ok(None) };
        Ok((0..VMS_MAX).find(|at| get_u64(table.bytes(), at * VM_ENTRY) == vm_id.0).map(|at| at as u64))
    }

    fn new_session(&mut self, vm_id: VmId) -> Res<u64> {
        let table = self.modify(SESSION_FILE, 0, 0)?;
        let free = (0..VMS_MAX).find(|at| get_u64(table, at * VM_ENTRY) == 0).ok_or(Status::Delay)?;
        put_u64(table, free * VM_ENTRY, vm_id.0);
        Ok(free as u64)
    }

    pub fn keep_reply(&mut self, key: KeepKey, reply: &Reply) -> Res<()> {
        let slot = usize::from(key.slot.0);
        if key.vm_id.0 == 0 || slot >= SLOTS {
            return Err(Stop::Fail(Status::Invalid));
        }
        let kept = encode_kept(key.session, key.sequence, &Ok(reply.clone()));
        let kept = kept.filter(|kept| kept.len() <= KEPT_MAX).ok_or_else(|| {
            log::error!("volume {}: a reply is too large to be kept", self.fs.info.name);
            Stop::Fail(Status::ServerFault)
        })?;
        let session = match self.session_of(key.vm_id)? {
            Some(session) => session,
            None => self.new_session(key.vm_id)?,
        };
        let block = 1 + session * BLOCKS_PER_VM + (slot / PER_BLOCK) as u64;
        let record = &mut self.modify(SESSION_FILE, 0, block)?[slot % PER_BLOCK * RECORD..][..RECORD];
        record.fill(0);
        put_u16(record, 0, kept.len() as u16);
        record[HEADER..HEADER + kept.len()].copy_from_slice(&kept);
        Ok(())
    }

    pub fn kept_reply(&mut self, vm_id: VmId, slot: Slot) -> Res<Option<Vec<u8>>> {
        let slot = usize::from(slot.0);
        if vm_id.0 == 0 || slot >= SLOTS {
            return Err(Stop::Fail(Status::Invalid));
        }
        let Some(session) = self.session_of(vm_id)? else { return Ok(None) };
        // All of a session's blocks are read at once: who asks for one slot asks for the others next.
        let first = 1 + session * BLOCKS_PER_VM;
        self.load(SESSION_FILE, first, BLOCKS_PER_VM)?;
        let Some(block) = self.block(SESSION_FILE, 0, first + (slot / PER_BLOCK) as u64)? else { return Ok(None) };
        let record = &block.bytes()[slot % PER_BLOCK * RECORD..][..RECORD];
        let length = usize::from(get_u16(record, 0));
        if length > KEPT_MAX {
            return Err(self.corrupt("session of VM", vm_id.0));
        }
        Ok((length > 0).then(|| record[HEADER..HEADER + length].to_vec()))
    }
}
