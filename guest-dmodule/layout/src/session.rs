//! Kept replies: what a session's slots were last answered, in a metadata file, so that they are on disk exactly when
//! the effects of the operations are.
//!
//! A table of 16 bytes {vm_id u64, zero} for each VM, 256 in a block: the first in block 0, the others behind the replies.
//! VM i of the table has the blocks 1 + 10 i onwards, seven records of 584 bytes in each: {length u16, zero, bytes} per slot.
//! The bytes are those of [`fabric::wire::encode_kept`]: they hold the session's epoch, so a fresh start need not clear
//! anything. A VM's entry is freed when its ownership record has been released.
use crate::block::{BLOCK_SIZE, get_u16, get_u64, put_u16, put_u64};
use crate::fs::KeepKey;
use crate::inode::SESSION_FILE;
use crate::owner::JOURNAL_MAX;
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
const ENTRIES_PER_BLOCK: u64 = (BLOCK_SIZE / VM_ENTRY) as u64;
const TABLE_BLOCKS: u64 = 5;
/// VMs in the table: those with an ownership record, and those released whose entry is not free yet.
const VMS: u64 = TABLE_BLOCKS * ENTRIES_PER_BLOCK;
const _: () = assert!(HEADER + KEPT_MAX <= RECORD && BLOCKS_PER_VM == 10 && VMS as usize >= VMS_MAX + JOURNAL_MAX);

/// Where a block of the table is.
const fn table_block(index: u64) -> u64 {
    if index == 0 { 0 } else { BLOCKS_PER_VM * VMS + index }
}

impl Txn<'_> {
    /// The entry of the table with this VM id.
    fn session_of(&mut self, vm_id: VmId) -> Res<Option<u64>> {
        for index in 0..TABLE_BLOCKS {
            let Some(table) = self.block(SESSION_FILE, 0, table_block(index))? else { continue };
            let held = |at: &u64| get_u64(table.bytes(), *at as usize * VM_ENTRY) == vm_id.0;
            if let Some(at) = (0..ENTRIES_PER_BLOCK).find(held) {
                return Ok(Some(index * ENTRIES_PER_BLOCK + at));
            }
        }
        Ok(None)
    }

    fn new_session(&mut self, vm_id: VmId) -> Res<u64> {
        for index in 0..TABLE_BLOCKS {
            let block = table_block(index);
            let free = match self.block(SESSION_FILE, 0, block)? {
                None => Some(0),
                Some(table) => (0..ENTRIES_PER_BLOCK as usize).find(|at| get_u64(table.bytes(), at * VM_ENTRY) == 0),
            };
            let Some(free) = free else { continue };
            put_u64(self.modify(SESSION_FILE, 0, block)?, free * VM_ENTRY, vm_id.0);
            let session = index * ENTRIES_PER_BLOCK + free as u64;
            self.clear_replies(session)?;
            return Ok(session);
        }
        Err(Stop::Fail(Status::Delay))
    }

    /// What is in the entry's blocks is another VM's, whose session may have the same epoch.
    fn clear_replies(&mut self, session: u64) -> Res<()> {
        let first = 1 + session * BLOCKS_PER_VM;
        self.load(SESSION_FILE, first, BLOCKS_PER_VM)?;
        for block in first..first + BLOCKS_PER_VM {
            if self.block(SESSION_FILE, 0, block)?.is_some() {
                self.modify(SESSION_FILE, 0, block)?.fill(0);
            }
        }
        Ok(())
    }

    /// Frees the VM's entry, if it has one.
    pub fn forget_replies(&mut self, vm_id: VmId) -> Res<()> {
        let Some(session) = self.session_of(vm_id)? else { return Ok(()) };
        let table = self.modify(SESSION_FILE, 0, table_block(session / ENTRIES_PER_BLOCK))?;
        put_u64(table, (session % ENTRIES_PER_BLOCK) as usize * VM_ENTRY, 0);
        Ok(())
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
