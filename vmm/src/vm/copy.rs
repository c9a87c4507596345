//! The right to copy a VM's memory by the dirty log: one port or one checkpoint at a time.
//!
//! Both read and clear the same log and the same bitmap of the monitor's own writes; two at once would each miss what the
//! other has seen. A reset waits until there is no claim, and there is none while a VM is reset: whoever has it gives it up when
//! [`Vm::is_to_be_reset`] says so. While there is a claim all device queues are served by this process, so that what devices write is seen as
//! well.

use std::sync::{Arc, MutexGuard, PoisonError};

use super::Vm;
use crate::checkpoint::lineage::{Broken, Lineage};
use crate::error::{Error, Result};

/// See [`Vm::claim_copy`].
pub struct CopyClaim(Arc<Vm>);

impl Drop for CopyClaim {
    fn drop(&mut self) {
        // As long as what changes is recorded, for a checkpoint that adds to the last, devices are served here.
        let recorded = self.0.lineage().is_ok();
        self.0.devices().keep_rings(recorded);
        self.0.life.end_copy();
    }
}

impl Vm {
    /// The right to use the dirty log, until the claim is dropped. What was recorded for checkpoints is void.
    pub fn claim_copy(self: &Arc<Self>) -> Result<CopyClaim> {
        let claim = self.claim_log()?;
        let mut lineage = self.lineage();
        if lineage.is_ok() {
            *lineage = Err(Broken::Ported);
        }
        drop(lineage);
        Ok(claim)
    }

    /// The same for a checkpoint, which goes on with the record of those before.
    pub(crate) fn claim_log(self: &Arc<Self>) -> Result<CopyClaim> {
        if let Some(id) = self.config().outside_device() {
            let why = "another process writes to the guest's memory, in no log (vhost_user)";
            return Err(Error::Conflict(format!("a VM with {id} cannot be ported or checkpointed: {why}")));
        }
        self.life.begin_copy()?;
        self.devices().keep_rings(true);
        Ok(CopyClaim(self.clone()))
    }

    /// What changed since the last checkpoint, or why that is not known. To be changed by who has the claim.
    pub(crate) fn lineage(&self) -> MutexGuard<'_, std::result::Result<Lineage, Broken>> {
        self.lineage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody has the claim.
    pub fn is_copied(&self) -> bool {
        self.life.is_copied()
    }

    /// Of a VM that has ended: whether a copy of it may go on, at the destination of a port or from a checkpoint.
    pub fn may_go_on(&self) -> bool {
        self.life.ended_copied()
    }

    /// While the VM is stopped: whether the guest stands at the end of a park, so that it looks at its boot-info page before
    /// anything else.
    pub fn is_at_rest(&self) -> bool {
        self.context.gate.is_at_rest()
    }
}
