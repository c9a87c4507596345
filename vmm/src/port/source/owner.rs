//! Who runs the VM: the arbiter is told and asked, and the guest goes on here if the destination does not have it.

use std::time::{Duration, Instant};

use migration::message::{Reason, ReasonCode};
use migration::ownership::{Epoch, OwnerId, Record};
use migration::source::Event;

use super::{Driver, micros};
use crate::port::arbiter::{Arbiter, ArbiterError};
use crate::port::limits::WATCH_MAX;
use crate::port::{faults, guest, lull, stamp};
use crate::vm::Phase as VmPhase;

/// Pause between two readings of a record that is watched.
const WATCH_PAUSE: Duration = Duration::from_millis(250);

impl Driver<'_> {
    fn arbiter(&mut self) -> Option<&mut Arbiter> {
        let address = self.arbiter_address?;
        let owner = OwnerId(self.vm.owner().0);
        let vm_id = self.vm.config().vm_id;
        Some(self.arbiter.get_or_insert_with(|| Arbiter::new(address, vm_id, owner)))
    }

    /// Tells the arbiter, while the guest still runs, who may take the VM over: its compare-and-swap in the pause is then not
    /// held up by a disk. An arbiter that does not know heirs, or has no room for one, only makes the port take longer. But one that cannot be
    /// reached, or whose disk takes no change, could not say in the pause who runs, and the guest would stand still until it can: then there is
    /// no pause.
    pub(super) fn name_heir(&mut self) {
        let Some((heir, epoch)) = self.heir else { return };
        let Some(arbiter) = self.arbiter() else { return };
        let asked = Instant::now();
        let answer = match arbiter.name(epoch, Some(heir)) {
            // It may have been restarted since the last question; the next one has a new connection.
            Err(ArbiterError::Io(..) | ArbiterError::Wire(..) | ArbiterError::Answer(..)) => {
                arbiter.name(epoch, Some(heir))
            }
            answer => answer,
        };
        self.job.update(|s| s.heir_us = Some(micros(asked.elapsed())));
        match answer {
            Ok(true) => {}
            Ok(false) => log::info!("the arbiter does not know this process as the VM's owner: no heir is named"),
            Err(e @ (ArbiterError::NoHeirs(_) | ArbiterError::Full(_))) => log::warn!("naming the heir: {e}"),
            Err(e) => self.events.push_back(Event::Failed(Reason::new(ReasonCode::Arbiter, e.to_string()))),
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

    /// Another has won, and nothing is heard of it any more.
    pub(super) fn watch(&mut self) {
        self.look_at = Instant::now();
        let text = "the VM stays paused until it is known who runs it: the destination has won it, and the connection has ended before \
                    it said that the VM runs";
        log::warn!("{text}; the ownership record is watched for {:?}", faults::limit(WATCH_MAX));
        self.job.update(|s| s.error = Some(text.into()));
    }

    /// Whether the VM was given back. An arbiter that does not answer is asked again, as long as there is time.
    pub(super) fn read_record(&mut self) {
        if Instant::now() < self.look_at {
            return;
        }
        match self.arbiter().map(Arbiter::look) {
            Some(Ok(record)) => self.events.push_back(Event::Seen(record)),
            Some(Err(e)) => log::warn!("the ownership record: {e}"),
            None => {}
        }
        self.look_at = Instant::now() + faults::limit(WATCH_PAUSE);
    }

    /// The guest goes on here, as if nothing had happened.
    pub(super) fn resume(&mut self, epoch: Option<Epoch>) {
        self.throttle = None;
        if let Some(arbiter) = &mut self.arbiter {
            arbiter.withdraw();
        }
        if let Some(epoch) = epoch {
            log::info!("the VM was taken back, with epoch {}", epoch.0);
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

/// Why a source that has watched the record does not go on, by what ended the watch.
pub(super) fn why_not(event: &Event) -> String {
    match event {
        Event::Seen(Record { epoch: Epoch(0), .. }) => "the VM has no ownership record any more".into(),
        Event::Seen(Record { epoch, .. }) => format!("the VM is owned elsewhere by now, at epoch {}", epoch.0),
        _ => {
            let waited = faults::limit(WATCH_MAX);
            format!("the destination has the VM, and has neither said that it runs nor given it back for {waited:?}")
        }
    }
}
