//! What becomes of the record beside the port: a copy's VM ends and its process releases the record; an operator releases that of
//! a VM believed to be gone (`vmm release`), rightly or wrongly; another process starts the VM afresh, and may end as well;
//! a claim of the guest's own, from before the pause, comes late. The rules are those of the D-module (`fabric::owner`).
//!
//! The operator may be wrong, so that there are two copies of a VM; what must hold then is that the D-module listens to one at most, and that
//! it is never the one that was declared gone.
use super::drivers::{Outcome, Task};
use super::search::search_from;
use super::{DESTINATION, FRESH, SOURCE, START, Side, State, start};
use fabric::id::{Epoch as CfEpoch, Owner, VmId};
use fabric::owner::{OwnerError, OwnerRecord, claim, compare_and_swap, release};
use migration::message::Ownership;
use migration::ownership::{Epoch, OwnerId, Record};
use migration::source::Phase;
use std::collections::BTreeSet;

pub(crate) const VM: VmId = VmId(1);

/// Takes what one of the next states differs in.
pub(crate) type Add<'a> = dyn FnMut(&dyn Fn(&mut State)) + 'a;

/// What may still happen, and what is on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Lives {
    /// Fresh starts, operators' releases and ends that may still come.
    starts: u8,
    operators: u8,
    ends: u8,
    /// A claim of the ported guest's on its way, and the epoch it starts from. The guest stands still, so it is the record's of before
    /// the pause, or an earlier one, with which it would change nothing.
    pub(crate) claim: Option<Epoch>,
    /// Claims of the guest's before that, which it has not heard of: since the port began.
    unheard: u8,
    /// A compare-and-swap from epoch 0 of the source's was never answered: it may still come.
    pub(crate) takes: bool,
    /// Requests to release on their way: whose record, at which epoch.
    releases: BTreeSet<(OwnerId, Epoch)>,
    /// The process that has started the VM afresh, and its epoch.
    fresh: Option<Epoch>,
    /// Its record was released, by itself or an operator.
    fresh_released: bool,
    /// The record was released or claimed: those of the port have lost the VM.
    pub(crate) taken_away: bool,
    /// What the ported guest has claimed late. Without an epoch it hears of that, or claims again; with one it does neither.
    guest_epoch: Option<Epoch>,
}

impl Lives {
    pub(crate) fn new(starts: u8, operators: u8, ends: u8) -> Lives {
        Lives { starts, operators, ends, ..Lives::default() }
    }

    /// The guest has claimed, unheard, so often, and once more.
    pub(crate) fn with_claim(self, unheard: u8) -> Lives {
        Lives { claim: Some(Epoch(START.0 + u64::from(unheard))), unheard, ..self }
    }

    /// The epoch of a guest that was told to run with this one.
    fn epoch(&self, runs: Epoch) -> Epoch {
        self.guest_epoch.filter(|_| runs == START).unwrap_or(runs)
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
        if self.lives.claim.is_some() {
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
        self.lives.releases.extend(runs.map(|epoch| (owner, self.lives.epoch(epoch))));
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
        // It has asked which epoch to start from, and asks again until it is that.
        assert!(self.claim(FRESH, self.record.epoch.max(self.floor)), "a fresh start takes over");
        self.lives.fresh = Some(self.record.epoch);
        self.lives.fresh_released = false;
        self.lives.taken_away = true;
    }

    /// Said by the guest at the source before the pause; the guest, and its connection, may be anywhere by now.
    fn guest_claims(&mut self) {
        let Some(from) = self.lives.claim.take() else { return };
        if self.claim(SOURCE, from) {
            self.lives.guest_epoch = Some(self.record.epoch);
        }
    }

    /// The first of a record, where none is left: a process that has nothing any more becomes its owner.
    fn take_late(&mut self) {
        let taken = compare_and_swap(None, CfEpoch(self.floor.0), VM, CfEpoch(0), Owner(SOURCE.0));
        self.set(taken.unwrap_or_else(|e| panic!("{e}")));
        self.forget_heir();
    }

    /// False if it starts from another epoch than the record's.
    fn claim(&mut self, owner: OwnerId, from: Epoch) -> bool {
        let (floor, from) = (CfEpoch(self.floor.0), CfEpoch(from.0));
        match claim(self.current(), floor, VM, from, self.sealed, Owner(owner.0)) {
            Ok(record) => {
                self.set(record);
                self.forget_heir();
                true
            }
            Err(OwnerError::Stale(base)) => {
                assert_ne!(base, from);
                false
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn forget_heir(&mut self) {
        self.heir = false;
        self.sealed = false;
        self.forgettable = false;
    }

    /// With an arbiter, must hold always: one copy at most is listened to.
    pub(crate) fn check_records(&self) {
        let guest = |epoch: Epoch| self.lives.epoch(epoch);
        let ported = [(self.source_runs.map(guest), SOURCE), (self.destination_runs.map(guest), DESTINATION)];
        for (runs, owner) in ported {
            let Some(epoch) = runs else { continue };
            // Nobody else can have the next epoch of a sealed record.
            if self.sealed && owner == DESTINATION && epoch == self.record.epoch.next() {
                continue;
            }
            let holds = self.record.epoch == epoch && self.record.owner == owner;
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
        for _ in 0..self.lives.unheard {
            assert!(self.claim(SOURCE, self.record.epoch), "the first after the last");
            self.lives.guest_epoch = Some(self.record.epoch);
        }
        self
    }

    /// Without further faults: what was asked for arrives.
    pub(crate) fn settle(&mut self) {
        if let Some(asked) = self.lives.releases.first().copied() {
            self.release(asked);
        }
    }
}

/// What happens to the record from outside during a port.
fn lives_on(heir: bool, lives: Lives) {
    let first = start(Ownership::Arbiter, heir).about_to_pause(lives);
    let ends = search_from(&first, Ownership::Arbiter);
    assert!(ends.ported > 0 && ends.resumed > 0 && ends.taken_away > 0);
}

#[test]
fn a_record_is_released() {
    lives_on(false, Lives::new(0, 1, 1));
    lives_on(true, Lives::new(0, 1, 0));
}

/// A compare-and-swap from epoch 0 of the source's, from an earlier port, comes when the destination's VM has ended and was released: it looks as if
/// the destination had given the VM back, with the very epoch. (One course: the search has too many.)
#[test]
fn a_record_that_was_taken_late_in_the_sources_name_is_not_given_back() {
    let mut s = start(Ownership::Arbiter, false).about_to_pause(Lives { takes: true, ..Lives::new(0, 0, 1) });
    while s.destination_runs.is_none() {
        s.step(Ownership::Arbiter);
    }
    s.sever();
    s.to_source.clear();
    s.tell_source();
    while !s.watches() {
        s.step(Ownership::Arbiter);
    }
    s.end(Side::Destination);
    while !s.lives.is_settled() {
        s.settle();
    }
    s.take_late();
    assert_eq!(s.read(), (Epoch(START.0 + 2), SOURCE));
    s.show(s.read());
    assert_eq!(s.source.phase(), Phase::Competing);
    while s.source.phase() == Phase::Competing {
        s.step(Ownership::Arbiter);
    }
    assert!(s.watches() && s.resumes == 0);
    s.source_event(migration::source::Event::Timeout);
    assert!(s.torn_down);
}

#[test]
fn a_vm_is_started_afresh() {
    lives_on(false, Lives::new(1, 0, 1));
    lives_on(true, Lives::new(1, 0, 0));
}

#[test]
fn a_guest_claims_late() {
    for heir in [false, true] {
        let first = start(Ownership::Arbiter, heir).about_to_pause(Lives::new(0, 0, 0).with_claim(0));
        let ends = search_from(&first, Ownership::Arbiter);
        assert!(ends.ported > 0 && ends.resumed > 0);
    }
}

#[test]
#[ignore = "some minutes"]
fn a_guest_claims_late_and_has_claimed_before() {
    for unheard in [1, 2] {
        let first = start(Ownership::Arbiter, false).about_to_pause(Lives::new(0, 0, 0).with_claim(unheard));
        let ends = search_from(&first, Ownership::Arbiter);
        // A record that has gone on before the pause is not handed over.
        assert!(ends.ported == 0 && ends.resumed > 0);
    }
}

/// More of them together: `cargo test -p migration --test model -- --ignored` takes some minutes.
#[test]
#[ignore = "some minutes"]
fn a_record_lives_through_much() {
    for heir in [true, false] {
        let claim = |starts, operators| Lives::new(starts, operators, 0).with_claim(0);
        for lives in [Lives::new(1, 1, 0), claim(1, 0), claim(0, 1)] {
            lives_on(heir, lives);
        }
    }
}
