//! The D-module's side of all sessions, without I/O.
//!
//! Owns: the ownership table, one session per VM with its slots and in-memory replies, which connection has which
//! session. It decides what to do with each frame; the caller executes, stores and carries bytes.
//!
//! Always true:
//! - a request is executed only under the epoch of the VM's ownership record, and only from the connection
//!   that has the session;
//! - an operation with an effect is executed once within one start of the D-module; a non-idempotent one
//!   once for good, given that its kept reply is stored in the same consistency point as its effect;
//! - a change of ownership is told to anybody only after it is durable, or (to an heir) after it is durable that nobody else
//!   can have it, and changes are made one after the other.
//!
//! A session is made when its VM says HELLO, from the kept replies if it is not a fresh start, and stays until room is needed
//! for another: one without a connection and with nothing executing may go then, which is for its VM as if the D-module had
//! been restarted.
//!
//! Bounds: the caller's number of sessions, [`EXECUTING_MAX`] requests of each, [`OWNERSHIP_QUEUE_MAX`] questions about
//! ownership, as many HELLOs waiting for kept replies.
mod opening;
mod ownership;
mod session;
#[cfg(test)]
mod tests;

use crate::id::{BootId, Epoch, Owner, Sequence, Slot, VmId};
use crate::op::{Op, Outcome, Request};
use crate::owner::{OwnerChange, OwnerTable};
use crate::wire::{self, Encoded, Farewell, Frame, Hello, Refusal, VERSION, WireError, encode, encode_kept};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use opening::Opening;
use ownership::Ownership;
pub use session::EXECUTING_MAX;
use session::{Session, Verdict};

/// Most questions about ownership waiting for a record to become durable; more connections than that are not served.
pub const OWNERSHIP_QUEUE_MAX: usize = 256;

/// A connection, as the caller numbers them; numbers are not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// A request being executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    vm_id: VmId,
    session: Epoch,
    slot: Slot,
    sequence: Sequence,
}

/// Where the reply of a non-idempotent operation is kept: to be stored in the consistency point of its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepKey {
    /// The VM.
    pub vm_id: VmId,
    /// Its slot: a newer reply replaces the one before.
    pub slot: Slot,
    /// Epoch of the VM's last fresh start.
    pub session: Epoch,
    /// Sequence in the slot.
    pub sequence: Sequence,
}

impl KeepKey {
    /// The bytes to store, at most [`wire::KEPT_MAX`].
    pub fn encode(&self, outcome: &Outcome) -> Vec<u8> {
        encode_kept(self.session, self.sequence, outcome).unwrap_or_else(|| {
            // No reply of a non-idempotent operation is that long (tested); what is kept must say that it was executed.
            log::error!("reply too long to keep");
            encode_kept(self.session, self.sequence, &Err(crate::fs::Status::ServerFault.into())).unwrap_or_default()
        })
    }
}

/// A reading of a VM's kept replies: only the answer to the one asked for last counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptRead {
    /// The VM.
    pub vm_id: VmId,
    number: u64,
}

/// What the caller is to do.
#[derive(Debug)]
pub enum Action {
    /// Send a frame.
    Send(ConnectionId, Encoded),
    /// Execute, then [`Sessions::complete`].
    Execute {
        /// For the completion.
        token: Token,
        /// What.
        request: Request,
        /// Where to keep the reply, if it is to be kept.
        keep: Option<KeepKey>,
    },
    /// Make the change of the ownership table durable, at once, then [`Sessions::owners_written`]. None other comes before that.
    WriteOwners(OwnerChange),
    /// Read all kept replies of the VM, then [`Sessions::kept_read`].
    ReadKept(KeptRead),
    /// End the connection once what was sent has left. [`Sessions::closed`] need not be called.
    Close(ConnectionId),
}

/// All sessions of a D-module.
#[derive(Debug)]
pub struct Sessions {
    boot_id: BootId,
    ownership: Ownership,
    sessions: BTreeMap<VmId, Session>,
    sessions_max: usize,
    /// VMs whose kept replies are being read, before their session is open.
    opening: BTreeMap<VmId, Opening>,
    /// Readings of kept replies so far.
    reads: u64,
    /// Connections that have had a HELLO accepted and were not superseded.
    greeted: BTreeMap<ConnectionId, VmId>,
    actions: VecDeque<Action>,
}

impl Sessions {
    /// After a start: with the ownership records as they were found on the disk, and at most so many sessions at a time.
    pub fn new(boot_id: BootId, owners: OwnerTable, sessions_max: usize) -> Self {
        Sessions {
            boot_id,
            ownership: Ownership::new(owners),
            sessions: BTreeMap::new(),
            sessions_max: sessions_max.max(1),
            opening: BTreeMap::new(),
            reads: 0,
            greeted: BTreeMap::new(),
            actions: VecDeque::new(),
        }
    }

    /// This start of the D-module: the write verifier.
    pub fn boot_id(&self) -> BootId {
        self.boot_id
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// A frame has come.
    pub fn frame(&mut self, connection: ConnectionId, frame: Frame) {
        match frame {
            Frame::Hello(hello) => self.hello(connection, hello),
            Frame::Request { epoch, slot, sequence, request } => {
                self.request(connection, epoch, slot, sequence, request)
            }
            Frame::OwnerGet { vm_id } => self.ask(connection, ownership::Question::Get(vm_id)),
            Frame::OwnerCas { vm_id, expect, owner } => {
                self.ask(connection, ownership::Question::Cas(vm_id, expect, owner))
            }
            Frame::OwnerReserve { vm_id, epoch, owner, heir } => {
                let heir = (heir != Owner::default()).then_some(heir);
                self.ask(connection, ownership::Question::Reserve(vm_id, epoch, owner, heir))
            }
            Frame::OwnerRelease { vm_id, epoch, owner } => {
                self.ask(connection, ownership::Question::Release(vm_id, epoch, owner))
            }
            Frame::Ping { token } => self.send(connection, Frame::Pong { token }),
            Frame::Pong { .. } => {}
            Frame::Goodbye { .. } => self.end(connection, None),
            Frame::HelloAck(_)
            | Frame::HelloRefused(_)
            | Frame::Response { .. }
            | Frame::Refused { .. }
            | Frame::OwnerRecord(_)
            | Frame::OwnerCasResult { .. } => self.end(connection, Some(Farewell::Protocol)),
        }
    }

    /// The connection carries bytes that are no frames: it is ended.
    pub fn broken(&mut self, connection: ConnectionId, error: WireError) {
        log::warn!("connection {}: {error}", connection.0);
        self.end(connection, Some(Farewell::Protocol));
    }

    /// The connection is gone. Requests being executed go on.
    pub fn closed(&mut self, connection: ConnectionId) {
        if let Some(vm_id) = self.greeted.remove(&connection)
            && let Some(session) = self.sessions.get_mut(&vm_id)
        {
            session.detach(connection);
        }
        for opening in self.opening.values_mut() {
            opening.forget(connection);
        }
        self.ownership.forget(connection);
    }

    /// Whether anybody still waits for the request: not if the VM has been started afresh since, or has gone on.
    pub fn is_wanted(&self, token: Token) -> bool {
        self.sessions.get(&token.vm_id).is_some_and(|s| s.is_wanted(token))
    }

    /// The connection that a request's reply would go to now.
    pub fn connection(&self, token: Token) -> Option<ConnectionId> {
        self.sessions.get(&token.vm_id).filter(|s| s.id() == token.session)?.connection()
    }

    /// A request has been executed, and its effect is as durable as it must be.
    pub fn complete(&mut self, token: Token, outcome: Outcome) {
        let Some(session) = self.sessions.get_mut(&token.vm_id) else { return };
        if let Some((connection, reply)) = session.complete(token, outcome) {
            self.actions.push_back(Action::Send(connection, reply));
        }
    }

    /// The table of [`Action::WriteOwners`] is durable, or the disk failed.
    pub fn owners_written(&mut self, durable: bool) {
        let answered = self.ownership.written(durable);
        self.answer(answered);
        self.next_question();
    }

    fn hello(&mut self, connection: ConnectionId, hello: Hello) {
        if hello.version_min > VERSION || hello.version_max < VERSION {
            let reason = Refusal::Version { min: VERSION, max: VERSION };
            self.send(connection, Frame::HelloRefused(reason));
        } else {
            self.ask(connection, ownership::Question::Hello(hello));
        }
    }

    fn ask(&mut self, connection: ConnectionId, question: ownership::Question) {
        if self.ownership.ask(connection, question) {
            self.next_question();
        } else {
            self.end(connection, Some(Farewell::Full));
        }
    }

    fn next_question(&mut self) {
        while let Some(step) = self.ownership.step() {
            match step {
                ownership::Step::Answer(answer) => self.answer(Some(answer)),
                ownership::Step::Write(change) => self.actions.push_back(Action::WriteOwners(change)),
                ownership::Step::Grant(answer, change) => {
                    self.answer(Some(answer));
                    self.actions.push_back(Action::WriteOwners(change));
                }
            }
        }
    }

    fn answer(&mut self, answer: Option<ownership::Answer>) {
        match answer {
            None => {}
            Some(ownership::Answer::Frame(connection, frame)) => self.send(connection, frame),
            Some(ownership::Answer::Open(connection, hello, record)) => self.begin(connection, hello, record),
            Some(ownership::Answer::Over(vm_id, told)) => {
                self.forget(vm_id);
                if let Some((connection, frame)) = told {
                    self.send(connection, frame);
                }
            }
        }
    }

    fn request(
        &mut self,
        connection: ConnectionId,
        epoch: Epoch,
        slot: Slot,
        sequence: Sequence,
        mut request: Request,
    ) {
        let greeted = self.greeted.get(&connection).copied();
        let current = greeted.map_or(Epoch::UNCLAIMED, |vm_id| self.ownership.epoch(vm_id));
        let verdict = match greeted.and_then(|vm_id| Some((vm_id, self.sessions.get_mut(&vm_id)?))) {
            None => Verdict::Refuse(Refusal::NoSession),
            Some(_) if epoch != current => Verdict::Refuse(Refusal::StaleEpoch { current }),
            Some((vm_id, session)) => match session.request(slot, sequence, request.op.has_effect()) {
                Verdict::Execute => {
                    clamp(&mut request.op);
                    let session = session.id();
                    let keep = request.op.is_non_idempotent().then_some(KeepKey { vm_id, slot, session, sequence });
                    let token = Token { vm_id, session, slot, sequence };
                    return self.actions.push_back(Action::Execute { token, request, keep });
                }
                verdict => verdict,
            },
        };
        match verdict {
            Verdict::Execute | Verdict::InProgress => {}
            Verdict::Replay(reply) => self.actions.push_back(Action::Send(connection, reply)),
            Verdict::Refuse(reason) => self.send(connection, Frame::Refused { epoch, slot, sequence, reason }),
        }
    }

    /// Ends a connection, saying why.
    fn end(&mut self, connection: ConnectionId, reason: Option<Farewell>) {
        self.closed(connection);
        if let Some(reason) = reason {
            self.send(connection, Frame::Goodbye { reason });
        }
        self.actions.push_back(Action::Close(connection));
    }

    fn send(&mut self, connection: ConnectionId, frame: Frame) {
        match encode(frame) {
            Ok(encoded) => self.actions.push_back(Action::Send(connection, encoded)),
            Err(e) => log::error!("frame of no variable part: {e}"),
        }
    }
}

/// Holds what a request asks for to what a reply can carry.
fn clamp(op: &mut Op) {
    match op {
        Op::Read { length, .. } => *length = (*length).min(crate::fs::IO_MAX as u32),
        Op::ReadDir { max_entries, max_bytes, .. } => {
            *max_entries = (*max_entries).clamp(1, wire::ENTRIES_MAX as u32);
            *max_bytes = (*max_bytes).min(wire::ENTRY_BYTES_MAX as u32);
        }
        _ => {}
    }
}
