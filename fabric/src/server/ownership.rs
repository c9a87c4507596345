//! Questions about ownership: answered in their order, changes durable before their answer, but for one: the
//! compare-and-swap of an heir, whose naming is durable. It lies in the pause of a port, and is answered at once.
//!
//! What must hold for that: after a restart that may have forgotten such an answer, the epoch is given to nobody but the
//! heir (`sealed`), by its compare-and-swap or its HELLO, until the owner, by naming anew, has said that it has not handed
//! over, or the heir that it does not have the VM (which counts although the disk does not take it).
use super::{ConnectionId, OWNERSHIP_QUEUE_MAX};
use crate::id::{Epoch, Owner, VmId};
use crate::owner::{OwnerChange, OwnerError, OwnerRecord, OwnerTable, claim, compare_and_swap, release, reserve};
use crate::wire::{CasStatus, Frame, Hello, Refusal};
use alloc::collections::{BTreeSet, VecDeque};

#[derive(Debug)]
pub(super) enum Question {
    Get(VmId),
    Cas(VmId, Epoch, Owner),
    /// At this epoch, this owner names this heir, or this heir renounces.
    Reserve(VmId, Epoch, Owner, Option<Owner>),
    /// At this epoch, this owner says that the VM has ended for good.
    Release(VmId, Epoch, Owner),
    Hello(Hello),
}

impl Question {
    fn vm_id(&self) -> VmId {
        match self {
            Question::Get(vm_id)
            | Question::Cas(vm_id, ..)
            | Question::Reserve(vm_id, ..)
            | Question::Release(vm_id, ..) => *vm_id,
            Question::Hello(hello) => hello.vm_id,
        }
    }
}

/// An answer that may be given.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // moved once
pub(super) enum Answer {
    Frame(ConnectionId, Frame),
    /// The VM's session is to be opened, for the connection if it is still there.
    Open(Option<ConnectionId>, Hello, OwnerRecord),
    /// The VM's session is over; that is to be said with this frame.
    Over(VmId, Option<(ConnectionId, Frame)>),
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // moved once
pub(super) enum Step {
    Answer(Answer),
    Write(OwnerChange),
    /// The answer first, then the change.
    Grant(Answer, OwnerChange),
}

/// A change on its way to the disk.
#[derive(Debug)]
struct Change {
    change: OwnerChange,
    /// The record then: of no epoch if it is released.
    record: OwnerRecord,
    /// `None`: has been answered.
    question: Option<Question>,
    /// Where the answer goes, if anybody waits.
    connection: Option<ConnectionId>,
    /// The question is not answered then, but decided again.
    again: bool,
}

#[derive(Debug)]
pub(super) struct Ownership {
    /// What holds: as it is on the disk, but for a change that has been answered.
    table: OwnerTable,
    /// One at a time.
    change: Option<Change>,
    queue: VecDeque<(ConnectionId, Question)>,
    /// VMs whose heir was named before this start of the D-module, and may have been given the epoch.
    sealed: BTreeSet<VmId>,
}

/// What a question comes to.
#[derive(Clone, Copy)]
enum Outcome {
    /// The record as it is.
    Same(OwnerRecord),
    /// This is to be changed, and then the record is this.
    Change(OwnerChange, OwnerRecord),
    /// The same, and it holds at once.
    Grant(OwnerChange, OwnerRecord),
    /// This is to be changed (the asker was given it, and this D-module has forgotten that), and then the question decided again.
    Remembered(OwnerChange, OwnerRecord),
}

impl Ownership {
    /// With the table found on the disk.
    pub(super) fn new(table: OwnerTable) -> Self {
        let sealed = table.entries().filter(|(_, heir)| heir.is_some()).map(|(r, _)| r.vm_id).collect();
        Ownership { table, change: None, queue: VecDeque::new(), sealed }
    }

    /// The epoch that holds; 0 for a VM without a record.
    pub(super) fn epoch(&self, vm_id: VmId) -> Epoch {
        self.table.get(vm_id).map_or(Epoch::UNCLAIMED, |r| r.epoch)
    }

    /// Queues a question; false when there are too many.
    pub(super) fn ask(&mut self, connection: ConnectionId, question: Question) -> bool {
        let room = self.queue.len() < OWNERSHIP_QUEUE_MAX;
        if room {
            self.queue.push_back((connection, question));
        }
        room
    }

    /// Nobody waits for answers on this connection any more. Questions not begun are dropped; a change under way goes on.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.queue.retain(|(c, _)| *c != connection);
        if let Some(change) = &mut self.change {
            change.connection.take_if(|c| *c == connection);
        }
    }

    /// Decides the next question, unless it has to wait for a change under way.
    pub(super) fn step(&mut self) -> Option<Step> {
        if self.change.as_ref().is_some_and(|c| c.question.is_some()) {
            return None;
        }
        let (connection, question) = self.queue.pop_front()?;
        let vm_id = question.vm_id();
        let current = self.table.get(vm_id);
        let held = current.unwrap_or(OwnerRecord { vm_id, ..OwnerRecord::default() });
        if let Question::Get(_) = question {
            return answer(connection, Frame::OwnerRecord(held));
        }
        let decided = self.decide(&question, current, held);
        let changes = matches!(decided, Ok(Outcome::Change(..) | Outcome::Grant(..) | Outcome::Remembered(..)));
        if self.change.is_some() && changes {
            self.queue.push_front((connection, question));
            return None;
        }
        match decided {
            Ok(Outcome::Same(record)) => {
                self.changed(&question);
                Some(Step::Answer(done(question, record, Some(connection))?))
            }
            Ok(outcome @ (Outcome::Change(change, record) | Outcome::Remembered(change, record))) => {
                let again = matches!(outcome, Outcome::Remembered(..));
                let (question, connection) = (Some(question), Some(connection));
                self.change = Some(Change { change, record, question, connection, again });
                Some(Step::Write(change))
            }
            Ok(Outcome::Grant(change, record)) => {
                self.table.apply(&change);
                self.changed(&question);
                self.change = Some(Change { change, record, question: None, connection: None, again: false });
                Some(Step::Grant(done(question, record, Some(connection))?, change))
            }
            Err(error) => {
                if error == OwnerError::Full {
                    log::error!("VM {:#x}: {error}", vm_id.0);
                }
                answer(connection, refused(&question, error, held))
            }
        }
    }

    fn decide(
        &self,
        question: &Question,
        current: Option<OwnerRecord>,
        held: OwnerRecord,
    ) -> Result<Outcome, OwnerError> {
        let vm_id = held.vm_id;
        let floor = self.table.floor();
        let heir = self.table.heir(vm_id);
        let sealed = self.sealed.contains(&vm_id);
        let mut grant = false;
        let mut named = None;
        let record = match question {
            Question::Get(_) => held,
            // The owner knows of the next epoch from its heir alone, which gave the VM back; this D-module has forgotten it.
            Question::Cas(_, expect, owner)
                if current.is_some() && *owner == held.owner && Some(*expect) == held.epoch.next() =>
            {
                let given = OwnerRecord { epoch: *expect, ..held };
                compare_and_swap(Some(given), floor, vm_id, *expect, *owner)?
            }
            Question::Cas(_, expect, owner) => {
                let record = compare_and_swap(current, floor, vm_id, *expect, *owner)?;
                grant = record != held && heir == Some(*owner);
                if record != held && sealed && !grant {
                    log::warn!("VM {:#x} may have been handed over before this start of the D-module", vm_id.0);
                    return Err(OwnerError::Sealed);
                }
                record
            }
            Question::Reserve(_, epoch, asker, next) => {
                named = *next;
                reserve(current, heir, vm_id, *epoch, *asker, *next)?
            }
            Question::Release(_, epoch, asker) => {
                let none = OwnerRecord { vm_id, ..OwnerRecord::default() };
                // The heir's VM has ended before its guest could say that it runs. Its epoch must count as given.
                if sealed && heir == Some(*asker) && held.epoch.next() == Some(*epoch) {
                    let given = compare_and_swap(current, floor, vm_id, held.epoch, *asker)?;
                    return Ok(Outcome::Remembered(OwnerChange::Set(given, None), given));
                }
                return match release(current, floor, vm_id, *epoch, *asker)? {
                    // The heir may have the VM.
                    Some(_) if sealed => Err(OwnerError::Sealed),
                    Some(_) => Ok(Outcome::Change(OwnerChange::Release(vm_id, held.epoch), none)),
                    None => Ok(Outcome::Same(none)),
                };
            }
            // The next epoch of a sealed record may be the heir's already: nobody else gets it.
            Question::Hello(hello) if hello.claims() => claim(current, floor, vm_id, hello.epoch, sealed, hello.owner)?,
            Question::Hello(hello) if hello.epoch == held.epoch => {
                if hello.owner != held.owner {
                    log::warn!("VM {:#x} has the right epoch, but another owner than recorded", vm_id.0);
                }
                return Ok(Outcome::Same(held));
            }
            // It was given the epoch, and this D-module has forgotten it.
            Question::Hello(hello) if sealed && Some(hello.epoch) == held.epoch.next() && heir == Some(hello.owner) => {
                compare_and_swap(current, floor, vm_id, held.epoch, hello.owner)?
            }
            Question::Hello(_) => return Err(OwnerError::Lost(held)),
        };
        let naming = matches!(question, Question::Reserve(..));
        if Some(record) == current && (!naming || named == heir) {
            return Ok(Outcome::Same(record));
        }
        let change = OwnerChange::Set(record, named);
        self.table.admits(&change)?;
        Ok(if grant { Outcome::Grant(change, record) } else { Outcome::Change(change, record) })
    }

    /// The question's answer holds: an heir named before this start is history.
    fn changed(&mut self, question: &Question) {
        let vm_id = question.vm_id();
        let history = matches!(question, Question::Reserve(..)) || self.table.heir(vm_id).is_none();
        if history {
            self.sealed.remove(&vm_id);
        }
    }

    /// The change under way is durable, or its writing failed: then nobody knows whether the disk has it, the
    /// former record holds until somebody asks again. One that was answered holds all the same: what is on the disk
    /// gives the epoch to the same process.
    pub(super) fn written(&mut self, durable: bool) -> Option<Answer> {
        let change = self.change.take()?;
        let question = change.question?;
        if durable {
            self.table.apply(&change.change);
            self.changed(&question);
            if change.again {
                self.queue.push_front((change.connection?, question));
                return None;
            }
            return done(question, change.record, change.connection);
        }
        // Who names nobody says that no heir has the VM, nor will have it: true, whatever the disk takes. The owner, who is to go on,
        // must not wait for a word that is not said again. (A start that finds the heir on the disk does not know of it.)
        if let Question::Reserve(vm_id, .., None) = question {
            self.sealed.remove(&vm_id);
        }
        let held = self.table.get(change.record.vm_id);
        let record = held.unwrap_or(OwnerRecord { vm_id: change.record.vm_id, ..OwnerRecord::default() });
        let frame = match question {
            Question::Hello(_) => Frame::HelloRefused(Refusal::Storage),
            _ => Frame::OwnerCasResult { status: CasStatus::Unknown, record },
        };
        Some(Answer::Frame(change.connection?, frame))
    }
}

fn answer(connection: ConnectionId, frame: Frame) -> Option<Step> {
    Some(Step::Answer(Answer::Frame(connection, frame)))
}

fn refused(question: &Question, error: OwnerError, held: OwnerRecord) -> Frame {
    match (question, error) {
        (Question::Hello(_), OwnerError::Lost(OwnerRecord { epoch: current, .. }) | OwnerError::Stale(current)) => {
            Frame::HelloRefused(Refusal::StaleEpoch { current })
        }
        (Question::Hello(_), OwnerError::Behind(held)) => {
            Frame::HelloRefused(Refusal::StaleEpoch { current: held.epoch })
        }
        (Question::Hello(_), OwnerError::Full) => Frame::HelloRefused(Refusal::Full),
        (Question::Hello(_), OwnerError::Invalid) => Frame::HelloRefused(Refusal::Invalid),
        (Question::Hello(_), OwnerError::Sealed) => Frame::HelloRefused(Refusal::Storage),
        (_, OwnerError::Lost(record)) => Frame::OwnerCasResult { status: CasStatus::Lost, record },
        (_, OwnerError::Behind(record)) => Frame::OwnerCasResult { status: CasStatus::Behind, record },
        (_, OwnerError::Sealed) => Frame::OwnerCasResult { status: CasStatus::Unknown, record: held },
        (_, OwnerError::Full | OwnerError::Invalid | OwnerError::Stale(_)) => {
            Frame::OwnerCasResult { status: CasStatus::Refused, record: held }
        }
    }
}

fn done(question: Question, record: OwnerRecord, connection: Option<ConnectionId>) -> Option<Answer> {
    match question {
        Question::Hello(hello) => Some(Answer::Open(connection, hello, record)),
        Question::Release(vm_id, ..) => {
            let frame = Frame::OwnerCasResult { status: CasStatus::Won, record };
            Some(Answer::Over(vm_id, connection.map(|c| (c, frame))))
        }
        _ => Some(Answer::Frame(connection?, Frame::OwnerCasResult { status: CasStatus::Won, record })),
    }
}
