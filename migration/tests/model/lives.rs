//! What becomes of the record beside the port: a copy's VM ends and its process releases the record; an operator releases that of
//! a VM believed to be gone (`vmm release`), rightly or wrongly; another process starts the VM afresh, and may end as well;
//! a claim of the guest's own, from before the port, comes late. The rules are those of the D-module (`fabric::owner`).
//!
//! The operator may be wrong, so that there are two copies of a VM; what must hold then is that the D-module listens to one at most, and that
//! it is never the one that was declared gone.
use super::drivers::{Outcome, Task};
use super::{DESTINATION, FRESH, SOURCE, START, Side, State};
use fabric::id::{Epoch as CfEpoch, Owner, VmId};
use fabric::owner::{OwnerRecord, claim, release};
use migration::ownership::{Epoch, OwnerId, Record};
use migration::source::Phase;
use std::collections::BTreeSet;

pub(crate) const VM: VmId = VmId(1);

/// Takes what one of the next states differs in.
pub(crate) type Add<'a> = dyn FnMut(&dyn Fn(&mut State)) + 'a;

/// What may still happen, and what is on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Lives {
    /// Fresh starts, operators' releases, ends and claims of the ported guest that may still come.
    starts: u8,
    operators: u8,
    ends: u8,
    guest_claims: u8,
    /// Requests to release on their way: whose record, at which epoch.
    releases: BTreeSet<(OwnerId, Epoch)>,
    /// The process that has started the VM afresh, and its epoch.
    fresh: Option<Epoch>,
    /// Its record was released, by itself or an operator.
    fresh_released: bool,
    /// The record was released or claimed: those of the port have lost the VM.
    pub(crate) taken_away: bool,
    /// The guest's claim came when one side had taken the VM, or may have: neither knows then that the record is not the other's, and
    /// the VM may be lost.
    pub(crate) claimed_between: bool,
    /// What the ported guest has claimed late. It gets the answer wherever it is: on its TCP connection.
    guest_epoch: Option<Epoch>,
}

impl Lives {
    pub(crate) fn new(starts: u8, operators: u8, ends: u8, guest_claims: u8) -> Lives {
        Lives { starts, operators, ends, guest_claims, ..Lives::default() }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.releases.is_empty()
    }
}

impl State {
    /// The record as the D-module has it.
    pub(crate) fn current(&self) -> Option<OwnerRecord> {
        (self.record.epoch != Epoch(0)).then_some(OwnerRecord {
            vm_id: VM,
            epoch: CfEpoch(self.record.epoch.0),
            session: CfEpoch(self.session.0),
            owner: Owner(self.record.owner.0),
        })
    }

    pub(crate) fn set(&mut self, record: OwnerRecord) {
        self.record = Record { epoch: Epoch(record.epoch.0), owner: OwnerId(record.owner.0) };
        self.session = Epoch(record.session.0);
    }

    /// All that can happen to the record from outside of the port.
    pub(crate) fn what_others_do(&self, add: &mut Add<'_>) {
        if self.lives.operators > 0 && self.current().is_some() {
            add(&|s| {
                s.lives.operators -= 1;
                s.lives.releases.insert((s.record.owner, s.record.epoch));
            });
        }
        for asked in self.lives.releases.iter().copied() {
            add(&|s| s.release(asked));
            add(&|s| {
                s.lives.releases.remove(&asked);
            });
        }
        if self.lives.starts > 0 {
            add(&State::start_afresh);
        }
        if self.lives.guest_claims > 0 {
            add(&State::guest_claims);
        }
        if self.lives.ends > 0 {
            // A VM at which a port is under way is not released by its source (`Vm::may_go_on`).
            if self.source_runs.is_some() && self.source.phase() == Phase::Resumed {
                add(&|s| s.end(Side::Source));
            }
            if self.destination_runs.is_some() {
                add(&|s| s.end(Side::Destination));
            }
            if let Some(epoch) = self.lives.fresh {
                add(&|s| {
                    s.lives.ends -= 1;
                    s.lives.fresh = None;
                    s.lives.fresh_released = true;
                    s.lives.releases.insert((FRESH, epoch));
                });
            }
        }
    }

    /// The VM ends by itself; its process says so and is gone.
    fn end(&mut self, side: Side) {
        self.lives.ends -= 1;
        let (runs, owner) = match side {
            Side::Source => (self.source_runs, SOURCE),
            Side::Destination => (self.destination_runs, DESTINATION),
        };
        self.crash(side);
        self.lives.releases.extend(runs.map(|epoch| (owner, self.lives.guest_epoch.map_or(epoch, |e| e.max(epoch)))));
    }

    /// The arbiter receives a request to release, which waits for a change under way.
    fn release(&mut self, asked: (OwnerId, Epoch)) {
        self.lives.releases.remove(&asked);
        let (owner, epoch) = asked;
        let answer =
            release(self.current(), CfEpoch(self.floor.0), VM, CfEpoch(epoch.0), Owner(owner.0)).ok().flatten();
        if answer.is_some() && !self.sealed {
            self.floor = self.floor.max(self.record.epoch);
            self.record = Record::default();
            self.session = Epoch(0);
            self.forget_heir();
            self.lives.taken_away = true;
            self.lives.fresh_released |= owner == FRESH;
        }
    }

    fn start_afresh(&mut self) {
        self.lives.starts -= 1;
        self.claim(FRESH);
        self.lives.fresh = Some(self.record.epoch);
        self.lives.fresh_released = false;
        self.lives.taken_away = true;
    }

    /// Said by the guest at the source before the port; the guest, and its connection, may be anywhere by now.
    fn guest_claims(&mut self) {
        self.lives.guest_claims -= 1;
        self.lives.claimed_between = self.record.epoch > START || self.sealed;
        // A connection of a guest that is no more brings nothing; a record that it has lost it takes back.
        self.claim(SOURCE);
        self.lives.fresh_released |= self.lives.fresh.is_some();
        self.lives.guest_epoch = Some(self.record.epoch);
    }

    fn claim(&mut self, owner: OwnerId) {
        // The next epoch may be the heir's already.
        let given = |r: OwnerRecord| match self.sealed {
            true => r.epoch.next().map(|epoch| OwnerRecord { epoch, ..r }),
            false => Some(r),
        };
        let claimed = claim(self.current().and_then(given), CfEpoch(self.floor.0), VM, Owner(owner.0));
        self.set(claimed.expect("epochs do not run out"));
        self.forget_heir();
    }

    fn forget_heir(&mut self) {
        self.heir = false;
        self.sealed = false;
        self.forgettable = false;
    }

    /// With an arbiter, must hold always: one copy at most is listened to.
    pub(crate) fn check_records(&self) {
        let guest = |epoch: Epoch| self.lives.guest_epoch.map_or(epoch, |e| e.max(epoch));
        let ported = [(self.source_runs.map(guest), SOURCE), (self.destination_runs.map(guest), DESTINATION)];
        for (runs, owner) in ported {
            let Some(epoch) = runs else { continue };
            // Nobody else can have the next epoch of a sealed record.
            if self.sealed && owner == DESTINATION && epoch == self.record.epoch.next() {
                continue;
            }
            let claimed = self.lives.guest_epoch == Some(epoch) && self.record.owner == SOURCE;
            let holds = self.record.epoch == epoch && (self.record.owner == owner || claimed);
            let stale = if self.current().is_some() { self.record.epoch > epoch } else { self.floor >= epoch };
            assert!(holds || stale && self.lives.taken_away, "runs without owning: {self:#?}");
            assert_ne!(self.lives.fresh, Some(epoch), "two have an epoch: {self:#?}");
        }
        if let Some(epoch) = self.lives.fresh
            && !self.lives.fresh_released
        {
            assert_eq!(self.record, Record { epoch, owner: FRESH }, "the fresh start has lost its VM: {self:#?}");
        }
    }

    /// A port about to pause its guest, with these lives around it. Nothing of it matters to the record before; its timeouts and
    /// operators are the other searches' matter.
    pub(crate) fn about_to_pause(mut self, lives: Lives) -> State {
        while !self.tasks.contains(&(Side::Source, Task::Pause)) {
            if let Some((side, task)) = self.tasks.first().copied() {
                self.perform(side, task, Outcome::Good);
            } else if !self.to_destination.is_empty() {
                self.deliver_to_destination();
            } else {
                self.deliver_to_source();
            }
        }
        (self.cancels, self.timeouts, self.lives) = (1, 1, lives);
        self
    }

    /// Without further faults: what was asked for arrives.
    pub(crate) fn settle(&mut self) {
        if let Some(asked) = self.lives.releases.first().copied() {
            self.release(asked);
        }
    }
}
