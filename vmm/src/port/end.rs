//! The end of a VM for good: its ownership record is released, so that its place is free for another VM.
//!
//! Always true: only a VM that cannot go on anywhere is released. Not one that a port or checkpoint was at when it ended: the
//! destination, or the checkpoint, may be it; nor one that somebody else has taken over: the arbiter refuses that. Not released
//! either is one whose process is killed; `vmm release` is for those.

use super::arbiter::Arbiter;
use super::guest;
use crate::vm::Vm;
use migration::ownership::{Epoch, OwnerId};

/// To be called once, after the VM's threads have ended. Waits for the connection and the answer, not long.
pub fn release(vm: &Vm) {
    let (vm_id, epoch) = (vm.config().vm_id, guest::epoch(vm));
    let Some(address) = vm.config().arbiter else { return };
    if vm_id == 0 || vm.may_go_on() {
        return;
    }
    let owner = OwnerId(vm.owner().0);
    let mut arbiter = Arbiter::new(address, vm_id, owner);
    let epoch = match epoch {
        // A guest that has claimed nothing has something to release only if a port of it was begun, which took the record.
        0 => match arbiter.record() {
            Ok(record) if record.owner == owner => record.epoch,
            _ => return,
        },
        epoch => Epoch(epoch),
    };
    match arbiter.release(epoch) {
        Ok(true) => log::info!("the ownership record of VM {vm_id} is released"),
        Ok(false) => log::info!("the ownership record of VM {vm_id} stays: another process has it, or may have it"),
        Err(e) => log::warn!("the ownership record of VM {vm_id} stays (vmm release): {e}"),
    }
}
