//! How a session begins and ends: a fresh start has an empty one at once; any other has it from the replies kept on the disk,
//! which are read first.
//!
//! Always true: a VM has a session, or is being opened, or neither, never both; what is opened is the session of the
//! ownership record that holds then; no more sessions and openings than the bound.
use super::session::Session;
use super::{Action, ConnectionId, KeptRead, Sessions};
use crate::id::{Epoch, SLOTS, Slot, VmId};
use crate::owner::OwnerRecord;
use crate::wire::{Farewell, Frame, Hello, HelloAck, Refusal, VERSION, decode_kept};
use alloc::vec::Vec;

/// A session whose kept replies are being read.
#[derive(Debug)]
pub(super) struct Opening {
    /// Epoch of the fresh start it began with.
    session: Epoch,
    /// Which reading: what an earlier one gives may be older than what has happened since.
    read: KeptRead,
    /// Who waits for it, and the epoch it said.
    waits: Option<(ConnectionId, Hello, Epoch)>,
}

impl Opening {
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.waits.take_if(|(c, ..)| *c == connection);
    }
}

impl Sessions {
    /// A HELLO was accepted under this record.
    pub(super) fn begin(&mut self, connection: Option<ConnectionId>, hello: Hello, record: OwnerRecord) {
        let OwnerRecord { vm_id, epoch, session, .. } = record;
        if connection.is_some_and(|c| self.is_others(c, vm_id)) {
            // The connection has, or waits for, another VM's session.
            return self.end_all(connection, Farewell::Protocol);
        }
        let held = self.sessions.get(&vm_id).map(|s| s.id());
        // What is remembered of a session before is void.
        if held.is_some_and(|id| id != session) {
            self.forget_but(vm_id, connection);
        }
        if held == Some(session) {
            if let Some(connection) = connection {
                self.open(connection, &hello, vm_id, epoch);
            }
            return;
        }
        let fresh = hello.claims();
        if let Some(opening) = self.opening.get_mut(&vm_id).filter(|o| o.session == session && !fresh) {
            let former = match connection {
                Some(connection) => opening.waits.replace((connection, hello, epoch)).map(|(c, ..)| c),
                None => None,
            };
            return self.end_all(former.filter(|c| Some(*c) != connection), Farewell::Superseded);
        }
        let former = self.opening.remove(&vm_id).and_then(|o| o.waits).map(|(c, ..)| c);
        self.end_all(former.filter(|c| Some(*c) != connection), Farewell::Superseded);
        // Of a session without a connection nothing need be known before somebody asks.
        let Some(connection) = connection else { return };
        if !self.make_room() {
            log::error!("VM {:#x}: all {} sessions are in use", vm_id.0, self.sessions_max);
            return self.send(connection, Frame::HelloRefused(Refusal::Full));
        }
        if fresh {
            self.sessions.insert(vm_id, Session::fresh(session));
            self.open(connection, &hello, vm_id, epoch);
        } else {
            self.reads += 1;
            let read = KeptRead { vm_id, number: self.reads };
            self.opening.insert(vm_id, Opening { session, read, waits: Some((connection, hello, epoch)) });
            self.actions.push_back(Action::ReadKept(read));
        }
    }

    /// The kept replies of [`Action::ReadKept`]; `None` if they cannot be read. What is not a reply is logged and left out.
    pub fn kept_read(&mut self, read: KeptRead, kept: Option<Vec<(Slot, Vec<u8>)>>) {
        let vm_id = read.vm_id;
        if self.opening.get(&vm_id).is_none_or(|o| o.read != read) {
            return;
        }
        let Some(Opening { session: id, waits, .. }) = self.opening.remove(&vm_id) else { return };
        // Nobody waits any more: it is read again when somebody does.
        let Some((connection, hello, epoch)) = waits else { return };
        let current = self.ownership.epoch(vm_id);
        if current != epoch {
            return self.send(connection, Frame::HelloRefused(Refusal::StaleEpoch { current }));
        }
        let Some(kept) = kept else {
            return self.send(connection, Frame::HelloRefused(Refusal::Storage));
        };
        let mut session = Session::restored(id);
        for (slot, bytes) in kept {
            match decode_kept(&bytes) {
                // Of a session before the last fresh start: void.
                Ok((of, ..)) if of != id => {}
                Ok((_, sequence, outcome)) => session.restore_reply(slot, sequence, outcome),
                Err(e) => log::error!("kept reply of VM {:#x}, slot {}: {e}", vm_id.0, slot.0),
            }
        }
        self.sessions.insert(vm_id, session);
        self.open(connection, &hello, vm_id, epoch);
    }

    /// The VM's session is over.
    pub(super) fn forget(&mut self, vm_id: VmId) {
        self.forget_but(vm_id, None);
        let waits = self.opening.remove(&vm_id).and_then(|o| o.waits).map(|(c, ..)| c);
        self.end_all(waits, Farewell::Superseded);
    }

    /// The same for one that is open; this connection is left alone.
    fn forget_but(&mut self, vm_id: VmId, connection: Option<ConnectionId>) {
        let former = self.sessions.remove(&vm_id).and_then(|s| s.connection());
        if former.is_some() && former == connection {
            return;
        }
        self.end_all(former, Farewell::Superseded);
    }

    fn end_all(&mut self, connection: Option<ConnectionId>, reason: Farewell) {
        if let Some(connection) = connection {
            self.end(connection, Some(reason));
        }
    }

    /// Whether the connection has the session of another VM than this, or waits for it.
    fn is_others(&self, connection: ConnectionId, vm_id: VmId) -> bool {
        let waits = |o: &Opening| o.waits.as_ref().is_some_and(|(c, ..)| *c == connection);
        self.greeted.get(&connection).is_some_and(|held| *held != vm_id)
            || self.opening.iter().any(|(of, opening)| *of != vm_id && waits(opening))
    }

    /// Sees to it that there is room for another session; false if all are in use.
    fn make_room(&mut self) -> bool {
        if self.sessions.len() + self.opening.len() < self.sessions_max {
            return true;
        }
        let idle = self.sessions.iter().find(|(_, s)| s.is_idle()).map(|(vm_id, _)| *vm_id);
        idle.and_then(|vm_id| self.sessions.remove(&vm_id)).is_some()
    }

    /// Gives the session to the connection.
    fn open(&mut self, connection: ConnectionId, hello: &Hello, vm_id: VmId, epoch: Epoch) {
        let Some(session) = self.sessions.get_mut(&vm_id) else { return };
        let former = session.attach(connection);
        self.greeted.insert(connection, vm_id);
        self.end_all(former, Farewell::Superseded);
        let ack = HelloAck {
            epoch,
            boot_id: self.boot_id,
            nonce: hello.nonce,
            version: VERSION,
            slots: SLOTS as u16,
            capabilities: 0,
        };
        self.send(connection, Frame::HelloAck(ack));
    }
}
