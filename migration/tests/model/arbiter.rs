//! The arbiter: one record, its heir, and a restart that may forget what was answered before it was durable.
use super::{DESTINATION, SOURCE, START, Side, State};
use migration::ownership::{Epoch, Record, Verdict};

impl State {
    /// The arbiter receives a request; the answer goes on its way.
    pub(crate) fn arbitrate(&mut self, side: Side, expected: Epoch) {
        let owner = if side == Side::Source { SOURCE } else { DESTINATION };
        if owner == self.record.owner && expected == self.record.epoch.next() {
            // Known from the heir alone: it was given, forgotten in a restart, and given back.
            self.record = Record { epoch: expected, owner: DESTINATION };
        } else if self.sealed && expected == self.record.epoch && owner != DESTINATION {
            // Nobody knows: asked again later.
            return;
        }
        let before = self.record;
        let (won, epoch) = match self.record.compete(expected, owner) {
            Verdict::Won(epoch) => (true, epoch),
            Verdict::Lost(record) => (false, record.epoch),
        };
        assert!(before == self.record || self.record.epoch == before.epoch.next());
        if before != self.record {
            self.given |= owner == DESTINATION;
            self.forgettable = self.heir && owner == DESTINATION && before.epoch == START;
            self.heir = self.forgettable;
            self.sealed = false;
        }
        self.answers.insert((side, expected, won, epoch));
    }

    pub(crate) fn restart_arbiter(&mut self) {
        self.restarts += 1;
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

    /// The arbiter was restarted in the pause and the destination, which alone could say whether it has the VM, cannot.
    pub(crate) fn untold(&self) -> bool {
        self.sealed && self.destination_runs.is_none() && self.competing.contains_key(&Side::Source)
    }
}
