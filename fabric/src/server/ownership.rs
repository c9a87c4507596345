//! Questions about ownership: answered in their order, changes durable before their answer.
use super::{ConnectionId, OWNERSHIP_QUEUE_MAX};
use crate::id::{Epoch, Owner, VmId};
use crate::owner::{OwnerError, OwnerRecord, OwnerTable, claim, compare_and_swap};
use crate::wire::{CasStatus, Frame, Hello, Refusal};
use alloc::collections::VecDeque;

#[derive(Debug)]
pub(super) enum Question {
    Get(VmId),
    Cas(VmId, Epoch, Owner),
    Hello(Hello),
}

/// An answer that may be given.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // moved once
pub(super) enum Answer {
    Frame(ConnectionId, Frame),
    /// The VM's session is to be opened, for the connection if it is still there.
    Open(Option<ConnectionId>, Hello, OwnerRecord),
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // moved once
pub(super) enum Step {
    Answer(Answer),
    Write(OwnerTable),
}

/// A change on its way to the disk.
#[derive(Debug)]
struct Change {
    table: OwnerTable,
    record: OwnerRecord,
    question: Question,
    /// Where the answer goes, if anybody waits.
    connection: Option<ConnectionId>,
}

#[derive(Debug)]
pub(super) struct Ownership {
    /// As it is on the disk.
    durable: OwnerTable,
    /// One at a time.
    change: Option<Change>,
    queue: VecDeque<(ConnectionId, Question)>,
}

impl Ownership {
    pub(super) fn new(durable: OwnerTable) -> Self {
        Ownership { durable, change: None, queue: VecDeque::new() }
    }

    /// The epoch that holds; 0 for a VM without a record.
    pub(super) fn epoch(&self, vm_id: VmId) -> Epoch {
        self.durable.get(vm_id).map_or(Epoch::UNCLAIMED, |r| r.epoch)
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

    /// Decides the next question, unless a change is under way.
    pub(super) fn step(&mut self) -> Option<Step> {
        if self.change.is_some() {
            return None;
        }
        let (connection, question) = self.queue.pop_front()?;
        let vm_id = match &question {
            Question::Get(vm_id) | Question::Cas(vm_id, ..) => *vm_id,
            Question::Hello(hello) => hello.vm_id,
        };
        let current = self.durable.get(vm_id);
        let held = current.unwrap_or(OwnerRecord { vm_id, ..OwnerRecord::default() });
        let wanted = match &question {
            Question::Get(_) => return answer(connection, Frame::OwnerRecord(held)),
            Question::Cas(_, expect, owner) => compare_and_swap(current, vm_id, *expect, *owner),
            Question::Hello(hello) if hello.epoch == Epoch::UNCLAIMED => claim(current, vm_id, hello.owner),
            Question::Hello(hello) if hello.epoch == held.epoch => {
                if hello.owner != held.owner {
                    log::warn!("VM {:#x} has the right epoch, but another owner than recorded", vm_id.0);
                }
                Ok(held)
            }
            Question::Hello(_) => Err(OwnerError::Lost(held)),
        };
        let mut table = self.durable.clone();
        match wanted.and_then(|record| table.set(record).map(|()| record)) {
            Ok(record) if Some(record) == current => {
                let change = Change { table, record, question, connection: Some(connection) };
                Some(Step::Answer(change.done()?))
            }
            Ok(record) => {
                self.change = Some(Change { table: table.clone(), record, question, connection: Some(connection) });
                Some(Step::Write(table))
            }
            Err(error) => answer(
                connection,
                match (question, error) {
                    (Question::Hello(_), OwnerError::Lost(held)) => {
                        Frame::HelloRefused(Refusal::StaleEpoch { current: held.epoch })
                    }
                    (Question::Hello(_), OwnerError::Full) => Frame::HelloRefused(Refusal::Full),
                    (Question::Hello(_), OwnerError::Invalid) => Frame::HelloRefused(Refusal::Invalid),
                    (_, OwnerError::Lost(record)) => Frame::OwnerCasResult { status: CasStatus::Lost, record },
                    (_, OwnerError::Full | OwnerError::Invalid) => {
                        Frame::OwnerCasResult { status: CasStatus::Refused, record: held }
                    }
                },
            ),
        }
    }

    /// The change under way is durable, or its writing failed: then nobody knows whether the disk has it, the
    /// former record holds until somebody asks again.
    pub(super) fn written(&mut self, durable: bool) -> Option<Answer> {
        let change = self.change.take()?;
        if durable {
            self.durable = change.table.clone();
            return change.done();
        }
        let held = self.durable.get(change.record.vm_id);
        let record = held.unwrap_or(OwnerRecord { vm_id: change.record.vm_id, ..OwnerRecord::default() });
        let frame = match change.question {
            Question::Hello(_) => Frame::HelloRefused(Refusal::Storage),
            _ => Frame::OwnerCasResult { status: CasStatus::Unknown, record },
        };
        Some(Answer::Frame(change.connection?, frame))
    }
}

fn answer(connection: ConnectionId, frame: Frame) -> Option<Step> {
    Some(Step::Answer(Answer::Frame(connection, frame)))
}

impl Change {
    fn done(self) -> Option<Answer> {
        match self.question {
            Question::Hello(hello) => Some(Answer::Open(self.connection, hello, self.record)),
            _ => {
                let frame = Frame::OwnerCasResult { status: CasStatus::Won, record: self.record };
                Some(Answer::Frame(self.connection?, frame))
            }
        }
    }
}
