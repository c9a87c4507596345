//! One VM's session: which request of each slot was last, and what became of it.
use super::{ConnectionId, Token};
use crate::fs::Status;
use crate::id::{Epoch, SLOTS, Sequence, Slot};
use crate::op::Outcome;
use crate::wire::{Encoded, Frame, Refusal, encode};
use alloc::vec::Vec;

/// Most requests of a session executing at once: each slot's, and as many that a slot has gone on from
/// (a repeated Read whose first reply had arrived after all).
pub const EXECUTING_MAX: usize = 2 * SLOTS;

/// What to do with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Execute,
    /// A repetition; the reply comes when the execution under way ends.
    InProgress,
    /// A repetition of what has been executed.
    Replay(Encoded),
    Refuse(Refusal),
}

#[derive(Debug)]
enum State {
    /// Nothing is known of the slot's last request, or there was none.
    Empty,
    Executing {
        effect: bool,
    },
    /// With the response, if it must not be executed again.
    Done(Option<Vec<u8>>),
}

#[derive(Debug)]
struct SlotState {
    last: Sequence,
    /// Whether `last` is known to be the last: not after a restart, as only some replies are kept durably.
    exact: bool,
    state: State,
}

#[derive(Debug)]
pub(super) struct Session {
    /// Epoch of the fresh start it began with.
    id: Epoch,
    connection: Option<ConnectionId>,
    slots: Vec<SlotState>,
    executing: usize,
}

fn response(slot: Slot, sequence: Sequence, outcome: Outcome) -> Encoded {
    encode(Frame::Response { slot, sequence, outcome }).unwrap_or_else(|e| {
        log::error!("reply that is no frame: {e}");
        let outcome = Err(Status::ServerFault.into());
        encode(Frame::Response { slot, sequence, outcome })
            .unwrap_or_else(|_| Encoded { head: Vec::new(), data: Vec::new() })
    })
}

impl Session {
    /// Of a VM that starts afresh: every slot begins with sequence 1.
    pub(super) fn fresh(id: Epoch) -> Self {
        Session::new(id, true)
    }

    /// After a restart of the D-module, or when it has been forgotten.
    pub(super) fn restored(id: Epoch) -> Self {
        Session::new(id, false)
    }

    fn new(id: Epoch, exact: bool) -> Self {
        let slots = (0..SLOTS).map(|_| SlotState { last: Sequence(0), exact, state: State::Empty }).collect();
        Session { id, connection: None, slots, executing: 0 }
    }

    /// Puts a durably kept reply back.
    pub(super) fn restore_reply(&mut self, slot: Slot, sequence: Sequence, outcome: Outcome) {
        if let Some(s) = self.slots.get_mut(usize::from(slot.0)) {
            s.last = sequence;
            s.state = State::Done(Some(response(slot, sequence, outcome).head));
        }
    }

    /// Whether nobody would miss it: no connection has it and nothing executes for it.
    pub(super) fn is_idle(&self) -> bool {
        self.connection.is_none() && self.executing == 0
    }

    pub(super) fn id(&self) -> Epoch {
        self.id
    }

    pub(super) fn connection(&self) -> Option<ConnectionId> {
        self.connection
    }

    /// Gives the session to a connection; returns the one that had it, if it is another.
    pub(super) fn attach(&mut self, connection: ConnectionId) -> Option<ConnectionId> {
        self.connection.replace(connection).filter(|c| *c != connection)
    }

    pub(super) fn detach(&mut self, connection: ConnectionId) {
        self.connection.take_if(|c| *c == connection);
    }

    pub(super) fn request(&mut self, slot: Slot, sequence: Sequence, effect: bool) -> Verdict {
        let Some(s) = self.slots.get_mut(usize::from(slot.0)) else { return Verdict::Refuse(Refusal::BadSlot) };
        let again = sequence == s.last && !matches!(s.state, State::Empty);
        let next = sequence == s.last.next() || (!s.exact && sequence > s.last);
        match &s.state {
            State::Executing { .. } if again => return Verdict::InProgress,
            State::Done(Some(reply)) if again => {
                return Verdict::Replay(Encoded { head: reply.clone(), data: Vec::new() });
            }
            // The one before is still at it, and will have an effect: only a broken client has gone on.
            State::Executing { effect: true } if next => return Verdict::Refuse(Refusal::Busy),
            _ if !again && !next => return Verdict::Refuse(Refusal::BadSequence { last: s.last }),
            _ if self.executing >= EXECUTING_MAX => return Verdict::Refuse(Refusal::Busy),
            _ => {}
        }
        *s = SlotState { last: sequence, exact: true, state: State::Executing { effect } };
        self.executing += 1;
        Verdict::Execute
    }

    /// Whether the request's slot still waits for it.
    pub(super) fn is_wanted(&self, token: Token) -> bool {
        self.id == token.session
            && self
                .slots
                .get(usize::from(token.slot.0))
                .is_some_and(|s| s.last == token.sequence && matches!(s.state, State::Executing { .. }))
    }

    /// Takes the outcome; returns the response and where it goes.
    pub(super) fn complete(&mut self, token: Token, outcome: Outcome) -> Option<(ConnectionId, Encoded)> {
        if self.id != token.session {
            return None;
        }
        self.executing = self.executing.saturating_sub(1);
        let s = self.slots.get_mut(usize::from(token.slot.0)).filter(|s| s.last == token.sequence)?;
        let State::Executing { effect } = s.state else { return None };
        let reply = response(token.slot, token.sequence, outcome);
        s.state = State::Done(effect.then(|| reply.head.clone()));
        self.connection.map(|c| (c, reply))
    }
}
