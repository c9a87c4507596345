//! The arbiter: one record, its heir, and a restart that may forget what was answered before it was durable.
use super::lives::VM;
use super::{DESTINATION, SOURCE, START, Side, State};
use fabric::id::{Epoch as CfEpoch, Owner};
use fabric::owner::{OwnerError, OwnerRecord, compare_and_swap};
use migration::ownership::{Epoch, OwnerId, Record, Verdict};
use migration::source;

/// What an answer says, and of which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Told {
    Won(Epoch),
    Lost(Epoch, OwnerId),
    Behind(Epoch),
}

impl Told {
    pub(crate) fn verdict(self) -> Verdict {
        match self {
            Told::Won(epoch) => Verdict::Won(epoch),
            Told::Lost(epoch, owner) => Verdict::Lost(Record { epoch, owner }),
            Told::Behind(epoch) => Verdict::Behind(epoch),
        }
    }
}

impl State {
    /// The arbiter receives a request; the answer goes on its way.
    pub(crate) fn arbitrate(&mut self, side: Side, expected: Epoch) {
        let owner = if side == Side::Source { SOURCE } else { DESTINATION };
        let Some(told) = self.compare_and_swap(expected, owner) else { return };
        let told = match told {
            // A process that has asked from epoch 0, and was not answered.
            Told::Behind(epoch) if self.lives.takes => Told::Lost(epoch, owner),
            told => told,
        };
        self.answers.insert((side, expected, told));
    }

    /// The destination's word that it will not run with the epoch it has won; asked in the source's name, answered to nobody.
    pub(crate) fn give_back(&mut self, expected: Epoch) {
        let _ = self.compare_and_swap(expected, SOURCE);
    }

    /// `None`: nobody knows; asked again later.
    fn compare_and_swap(&mut self, expected: Epoch, owner: OwnerId) -> Option<Told> {
        let before = self.current();
        let (expect, asker) = (CfEpoch(expected.0), Owner(owner.0));
        // Known from the heir alone: it was given, forgotten in a restart, and given back.
        let forgotten = before.filter(|r| r.owner == asker && r.epoch.next() == Some(expect));
        let current = forgotten.map(|r| OwnerRecord { epoch: expect, ..r }).or(before);
        Some(match compare_and_swap(current, CfEpoch(self.floor.0), VM, expect, asker) {
            Ok(record) if Some(record) != before && self.sealed && owner != DESTINATION && forgotten.is_none() => {
                return None;
            }
            Ok(record) => {
                if Some(record) != before {
                    assert!(before.is_none_or(|r| record.epoch > r.epoch) && record.epoch.0 > self.floor.0);
                    self.set(record);
                    self.forgettable =
                        self.heir && owner == DESTINATION && before.is_some_and(|r| r.epoch.0 == START.0);
                    self.heir = self.forgettable;
                    self.sealed = false;
                }
                Told::Won(Epoch(record.epoch.0))
            }
            Err(OwnerError::Lost(record)) => Told::Lost(Epoch(record.epoch.0), OwnerId(record.owner.0)),
            Err(OwnerError::Behind(record)) => Told::Behind(Epoch(record.epoch.0)),
            Err(e) => panic!("{e}"),
        })
    }

    /// The source hears what the record was some time.
    pub(crate) fn show(&mut self, record: (Epoch, OwnerId)) {
        let (epoch, owner) = record;
        self.source_event(source::Event::Seen(Record { epoch, owner }));
    }

    /// The record as somebody reads it now.
    pub(crate) fn read(&self) -> (Epoch, OwnerId) {
        (self.record.epoch, self.record.owner)
    }

    pub(crate) fn restart_arbiter(&mut self) {
        self.restarts += 1;
        // No connection outlives it, so nothing the guest has said before the pause comes any more.
        self.lives.claim = None;
        if self.forgettable {
            self.record = Record { epoch: START, owner: SOURCE };
            self.forgettable = false;
        }
        self.sealed = self.heir;
    }

    /// What was answered is durable now.
    pub(crate) fn written(&mut self) {
        self.forgettable = false;
        self.heir = false;
    }

    pub(crate) fn renounce(&mut self) {
        self.renounces = false;
        if self.record.epoch == START {
            self.heir = false;
            self.sealed = false;
        }
    }

    /// The N-module at the destination connects again to an arbiter that has forgotten it.
    pub(crate) fn hello(&mut self) {
        if self.sealed && self.destination_runs == Some(self.record.epoch.next()) {
            self.record = Record { epoch: self.record.epoch.next(), owner: DESTINATION };
            self.sealed = false;
            self.heir = false;
        }
    }

    /// The arbiter was restarted in the pause and the destination, which alone could say whether it has the VM, is dead.
    pub(crate) fn untold(&self) -> bool {
        self.sealed && !self.destination_alive && self.competing.contains_key(&Side::Source)
    }
}
