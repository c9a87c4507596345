//! Ownership records and kept replies on their way to and from the disk.
//!
//! Owns: the table as it is on the disk, the change being written, the change that waits for room in the journal.
//! Always true: a change is written alone, and the sessions are told of it exactly once; a change that finds no room waits for
//! the consistency point that makes some, and is refused if that fails.
use crate::jobs::{JobId, Kind};
use crate::server::{BUSY_MAX, Now, Output, Server};
use fabric::fs::Status;
use fabric::id::{SLOTS, Slot};
use fabric::owner::OwnerChange;
use layout::{Attempt, OwnerStore, OwnerWrite, RESTARTS_MAX};

/// See the module.
pub(crate) struct Owners {
    store: OwnerStore,
    write: Option<OwnerWrite>,
    /// Waits for room in the journal.
    waits: Option<OwnerChange>,
    /// Putting records into their file failed: not tried again before the next consistency point, or for who waits.
    failed: bool,
}

impl Owners {
    pub(crate) fn new(store: OwnerStore) -> Self {
        Owners { store, write: None, waits: None, failed: false }
    }

    /// Whether a consistency point would make room for who waits.
    pub(crate) fn waits_for_point(&self) -> bool {
        self.waits.is_some() && self.store.is_settling()
    }
}

impl Server {
    pub(crate) fn write_owners(&mut self, change: OwnerChange) {
        match self.owners.store.prepare(change) {
            Some(write) => {
                // Ahead of what else is to be written.
                self.outputs.push_front(Output::WriteOwners { number: write.number, block: write.block.clone() });
                self.owners.write = Some(write);
            }
            None => {
                self.owners.waits = Some(change);
                self.owners.failed = false;
            }
        }
    }

    /// The write has ended; false if there was none.
    pub(crate) fn owners_written(&mut self, durable: bool) -> bool {
        let Some(write) = self.owners.write.take() else { return false };
        if durable {
            self.owners.store.commit(write);
        } else {
            log::error!("the ownership records could not be written");
        }
        self.sessions.owners_written(durable);
        true
    }

    /// A consistency point is durable.
    pub(crate) fn owners_settled(&mut self) {
        self.owners.store.settled(self.fs.durable_cp());
        self.owners.failed = false;
        if let Some(change) = self.owners.waits.take() {
            self.write_owners(change);
        }
    }

    /// A consistency point, or putting records into their file, has failed: who waits for room is told.
    pub(crate) fn owners_unsettled(&mut self) {
        if self.owners.waits.take().is_some() {
            self.sessions.owners_written(false);
        }
    }

    /// Begins to put records into their file, if the journal is filling up.
    pub(crate) fn begin_settling(&mut self) {
        if self.jobs.settle.is_none()
            && !self.owners.failed
            && let Some(records) = self.owners.store.to_settle()
        {
            self.jobs.add(Kind::Settle { records });
        }
    }

    pub(crate) fn attempt_settling(&mut self, id: JobId, restarts: u32, now: Now) {
        let Some(job) = self.jobs.get(id) else { return };
        let Kind::Settle { records } = &mut job.kind else { return };
        let attempt = match restarts {
            0..=RESTARTS_MAX => self.fs.settle_owners(records, now.real),
            _ => Attempt::Done(Err(Status::Delay)),
        };
        match attempt {
            Attempt::Need(blocks) => self.need(id, blocks),
            Attempt::Busy if restarts <= BUSY_MAX => self.jobs.stall(id),
            Attempt::Done(Ok(at)) => {
                let records = core::mem::take(records);
                self.jobs.remove(id);
                self.owners.store.settling(at, records);
                self.note_dirt(now);
            }
            Attempt::Busy | Attempt::Done(Err(_)) => {
                log::error!("ownership records could not be put into their file: {attempt:?}");
                self.jobs.remove(id);
                self.owners.failed = true;
                self.owners_unsettled();
            }
        }
    }

    pub(crate) fn attempt_kept(&mut self, id: JobId, restarts: u32) {
        let Some(job) = self.jobs.get(id) else { return };
        let Kind::Kept { read, next, found } = &mut job.kind else { return };
        let read = *read;
        while usize::from(*next) < SLOTS && restarts <= RESTARTS_MAX {
            match self.fs.kept(read.vm_id, Slot(*next)) {
                Attempt::Need(blocks) => return self.need(id, blocks),
                Attempt::Done(Ok(reply)) => found.extend(reply.map(|bytes| (Slot(*next), bytes))),
                Attempt::Busy | Attempt::Done(Err(_)) => break,
            }
            *next += 1;
        }
        let all = usize::from(*next) == SLOTS;
        let found = core::mem::take(found);
        self.jobs.remove(id);
        if !all {
            log::error!("the kept replies of VM {:#x} cannot be read", read.vm_id.0);
        }
        self.sessions.kept_read(read, all.then_some(found));
    }
}
