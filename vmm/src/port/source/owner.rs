//! Who runs the VM: the arbiter is told and asked, and the guest goes on here if the destination does not have it.

use migration::message::{Reason, ReasonCode};
use migration::ownership::{Epoch, OwnerId};
use migration::source::Event;

use super::Driver;
use crate::port::arbiter::{Arbiter, ArbiterError};
use crate::port::{guest, lull, stamp};
use crate::vm::Phase as VmPhase;

impl Driver<'_> {
    fn arbiter(&mut self) -> Option<&mut Arbiter> {
        let address = self.arbiter_address?;
        let owner = OwnerId(self.vm.owner().0);
        let vm_id = self.vm.config().vm_id;
        Some(self.arbiter.get_or_insert_with(|| Arbiter::new(address, vm_id, owner)))
    }

    /// Tells the arbiter, while the guest still runs, who may take the VM over: its compare-and-swap in the pause is then not
    /// held up by a disk. Without that the port only takes longer; but an arbiter whose disk takes no change could not say in the
    /// pause who runs, and the guest would stand still until it can: then there is no pause.
    pub(super) fn name_heir(&mut self) {
        let Some((heir, epoch)) = self.heir else { return };
        match self.arbiter().map(|a| a.name(epoch, Some(heir))) {
            None | Some(Ok(true)) => {}
            Some(Ok(false)) => log::info!("the arbiter does not know this process as the VM's owner: no heir is named"),
            Some(Err(e @ ArbiterError::Undecided(_))) => {
                self.events.push_back(Event::Failed(Reason::new(ReasonCode::Arbiter, e.to_string())));
            }
            Some(Err(e)) => log::warn!("naming the heir: {e}"),
        }
    }

    pub(super) fn compete(&mut self, epoch: Epoch) {
        if let Some(arbiter) = self.arbiter() {
            arbiter.compete(epoch);
        }
    }

    /// A verdict, or why the VM still stands still.
    pub(super) fn hear_arbiter(&mut self) {
        let Some(arbiter) = &mut self.arbiter else { return };
        if let Some((expected, verdict)) = arbiter.poll() {
            self.events.push_back(Event::Verdict { expected, verdict });
        } else if let Some(why) = arbiter.take_trouble() {
            self.job.update(|s| s.error = Some(format!("the VM stays paused until it is known who runs it: {why}")));
        }
    }

    /// The guest goes on here, as if nothing had happened.
    pub(super) fn resume(&mut self, epoch: Option<Epoch>) {
        self.throttle = None;
        if let Some(arbiter) = &mut self.arbiter {
            arbiter.withdraw();
        }
        if self.gave_images && !self.take_images_back() {
            return;
        }
        lull::end(self.vm);
        if self.paused {
            guest::resume(self.vm, epoch, self.forwarder.take_kept());
            let paused = self.pause.exit.map(|exit| stamp::now().since(&exit) / 1000);
            self.job.update(|s| s.paused_us = paused);
        }
        self.urgent.clear();
        if self.logging
            && let Err(e) = self.vm.memory().stop_dirty_log(self.vm.fd())
        {
            log::warn!("the dirty log stays on: {e}");
        }
    }

    /// Waits until nobody else has the disks' images: a guest that goes on would write to what is another's. False if the VM was
    /// ended meanwhile.
    fn take_images_back(&mut self) -> bool {
        let mut told = false;
        while let Err(e) = self.vm.take_images() {
            if self.vm.phase() == VmPhase::Ended {
                return false;
            }
            if !told {
                told = true;
                self.urgent.clear();
                log::error!("the VM stays paused until its disks are free: {e}");
                self.job.update(|s| s.error = Some(format!("the VM stays paused until its disks are free: {e}")));
            }
            std::thread::sleep(guest::TAKE_PAUSE);
        }
        self.gave_images = false;
        true
    }
}
