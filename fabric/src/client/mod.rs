//! The N-module's side of a session, without I/O.
//!
//! Owns: the slots with their outstanding requests, the epoch they are sent under, the bytes to transmit.
//!
//! Always true: a request is outstanding from [`ClientSession::submit`] until its one [`Event::Completed`], whatever
//! happens to connections, to the D-module or to the VM meanwhile; a slot has at most one; every request
//! outstanding is sent again after each HELLO that is acknowledged and with each new epoch. What is queued for
//! transmission is bounded by the slots (each request at most twice) and [`CONTROL_MAX`].
//!
//! The caller carries bytes: [`ClientSession::connected`], then [`poll_transmit`](ClientSession::poll_transmit) to the
//! socket and [`receive`](ClientSession::receive) from it, [`poll_event`](ClientSession::poll_event) after each,
//! [`disconnected`](ClientSession::disconnected) at its end, and after every error.
use crate::id::{BootId, Epoch, Owner, SLOTS, Sequence, Slot, VmId};
use crate::op::{Outcome, Request};
use crate::wire::{CLAIM, Encoded, Frame, FrameReader, Hello, Refusal, VERSION, WireError, encode, reseal_request};
use alloc::{collections::VecDeque, sync::Arc, vec::Vec};

#[cfg(test)]
mod tests;

/// Most control frames (HELLO, Ping) queued.
pub const CONTROL_MAX: usize = 8;

/// A request submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    /// Its slot.
    pub slot: Slot,
    /// Its number within the slot.
    pub sequence: Sequence,
}

/// What a session has to say.
#[derive(Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // taken out of the queue once
pub enum Event {
    /// A request was executed.
    Completed(Ticket, Outcome),
    /// The session is open. The caller stores the epoch where the next start of the session finds it (boot-info page).
    Opened {
        /// Epoch that holds.
        epoch: Epoch,
        /// The D-module's start.
        boot_id: BootId,
        /// Whether the D-module has been started anew since the session was last open.
        restarted: bool,
    },
    /// Another has this VM's ownership: nothing this VM sends is executed any more, unless
    /// [`ClientSession::set_epoch`] brings a newer epoch.
    Fenced {
        /// The epoch that holds.
        current: Epoch,
    },
    /// Answer to [`ClientSession::ping`].
    Pong(u64),
}

/// A request that was not accepted.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejected {
    /// All slots are taken: submit it again after a completion.
    Full(Request),
    /// It cannot be sent at all: a value is over its limit.
    Invalid(WireError),
}

/// The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Not what a D-module sends.
    #[error("protocol: {0}")]
    Wire(#[from] WireError),
    /// A frame out of place.
    #[error("unexpected {0}")]
    Unexpected(&'static str),
    /// The D-module refused.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The D-module ended the connection.
    #[error("the D-module ended the connection: {0:?}")]
    Goodbye(crate::wire::Farewell),
}

/// A piece of bytes to transmit.
#[derive(Clone, Debug)]
pub enum Chunk {
    /// Head of a frame.
    Head(Vec<u8>),
    /// Its data.
    Data(Arc<Vec<u8>>),
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        match self {
            Chunk::Head(bytes) => bytes,
            Chunk::Data(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Outstanding {
    head: Vec<u8>,
    data: Arc<Vec<u8>>,
    data_hash: u64,
    /// Epoch it was last queued under; `None`: not since the connection began.
    queued: Option<Epoch>,
}

#[derive(Debug, Default)]
struct SlotState {
    last: Sequence,
    outstanding: Option<Outstanding>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Disconnected,
    /// HELLO is sent, with this epoch.
    Greeting(Epoch),
    /// HELLO is sent: a claim, from this epoch.
    Claiming(Epoch),
    Open,
    /// Connected, but another has the ownership.
    Fenced,
}

/// The session of a VM with a D-module.
#[derive(Debug)]
pub struct ClientSession {
    vm_id: VmId,
    owner: Owner,
    epoch: Epoch,
    nonce: u64,
    state: State,
    boot_id: Option<BootId>,
    slots: Vec<SlotState>,
    /// Slots without a request; the one used last is used next.
    free: Vec<Slot>,
    transmit: VecDeque<Chunk>,
    events: VecDeque<Event>,
    reader: FrameReader,
}

impl ClientSession {
    /// Of a VM that holds `epoch` ([`Epoch::UNCLAIMED`]: it claims one).
    pub fn new(vm_id: VmId, epoch: Epoch, owner: Owner) -> Self {
        ClientSession {
            vm_id,
            owner,
            epoch,
            nonce: 0,
            state: State::Disconnected,
            boot_id: None,
            slots: (0..SLOTS).map(|_| SlotState::default()).collect(),
            free: (0..SLOTS as u16).rev().map(Slot).collect(),
            transmit: VecDeque::new(),
            events: VecDeque::new(),
            reader: FrameReader::new(),
        }
    }

    /// Accepts a request, and queues it if the session is open.
    pub fn submit(&mut self, request: Request) -> Result<Ticket, Rejected> {
        let Some(slot) = self.free.last().copied() else { return Err(Rejected::Full(request)) };
        let sequence = self.slots[usize::from(slot.0)].last.next();
        let frame = Frame::Request { epoch: self.epoch, slot, sequence, request };
        let encoded = encode(frame).map_err(Rejected::Invalid)?;
        let data_hash = encoded.data_hash();
        let Encoded { head, data } = encoded;
        self.free.pop();
        let state = &mut self.slots[usize::from(slot.0)];
        state.last = sequence;
        state.outstanding = Some(Outstanding { head, data: Arc::new(data), data_hash, queued: None });
        if self.state == State::Open {
            self.queue(slot);
        }
        Ok(Ticket { slot, sequence })
    }

    /// Requests outstanding.
    pub fn outstanding(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Whether requests are being sent.
    pub fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// The epoch requests are sent under.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// A connection has been made: says HELLO.
    pub fn connected(&mut self) {
        self.disconnected();
        self.greet();
    }

    /// The connection is gone, or is being given up. Outstanding requests wait for the next.
    pub fn disconnected(&mut self) {
        self.state = State::Disconnected;
        self.transmit.clear();
        self.reader = FrameReader::new();
        self.slots.iter_mut().filter_map(|s| s.outstanding.as_mut()).for_each(|o| o.queued = None);
    }

    /// The VM's identity has this epoch and owner now (a port, or the end of one that failed): outstanding requests
    /// are sent again under it, on the same connection. Does nothing if nothing has changed; an epoch never goes back.
    pub fn set_epoch(&mut self, epoch: Epoch, owner: Owner) {
        if epoch >= self.epoch {
            self.owner = owner;
        }
        if epoch <= self.epoch {
            return;
        }
        self.epoch = epoch;
        match self.state {
            State::Open => {
                // Frames that nobody has begun to transmit need not be.
                let begun = self.transmit.pop_front_if(|c| matches!(c, Chunk::Data(_)));
                self.transmit.clear();
                self.transmit.extend(begun);
                self.queue_all();
            }
            State::Fenced => self.greet(),
            // The D-module's answer to the HELLO decides.
            State::Greeting(_) | State::Claiming(_) | State::Disconnected => {}
        }
    }

    /// Asks the D-module for a sign of life. Does nothing while too much is queued.
    pub fn ping(&mut self, token: u64) {
        self.control(Frame::Ping { token });
    }

    /// Next bytes for the connection.
    pub fn poll_transmit(&mut self) -> Option<Chunk> {
        self.transmit.pop_front()
    }

    /// What has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Takes bytes from the connection. After an error: [`Self::disconnected`], and a new connection after a while.
    pub fn receive(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while let Some(frame) = self.reader.push(&mut bytes)? {
            self.frame(frame)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: Frame) -> Result<(), ClientError> {
        match frame {
            Frame::HelloAck(ack) => {
                let claimed = matches!(self.state, State::Claiming(_));
                if !claimed && !matches!(self.state, State::Greeting(_)) {
                    return Err(ClientError::Unexpected("HelloAck"));
                }
                if ack.nonce != self.nonce {
                    return Ok(());
                }
                if ack.version != VERSION || usize::from(ack.slots) < SLOTS {
                    return Err(ClientError::Unexpected("version or number of slots"));
                }
                if claimed {
                    // A claim that was made after whatever the identity has said since is this VM's all the same.
                    self.epoch = self.epoch.max(ack.epoch);
                }
                let restarted = self.boot_id.replace(ack.boot_id).is_some_and(|b| b != ack.boot_id);
                self.state = State::Open;
                self.events.push_back(Event::Opened { epoch: self.epoch, boot_id: ack.boot_id, restarted });
                self.queue_all();
            }
            Frame::HelloRefused(Refusal::StaleEpoch { current }) => match self.state {
                State::Greeting(sent) if sent != self.epoch => self.greet(),
                // Its identity has got an epoch meanwhile: a port, or the end of one.
                State::Claiming(_) if self.epoch != Epoch::UNCLAIMED => self.greet(),
                // There is a record, or was one: now it is known from which epoch the VM is to be taken.
                State::Claiming(from) if from != current => self.claim(current),
                State::Greeting(_) => self.fence(current),
                _ => return Err(ClientError::Unexpected("HelloRefused")),
            },
            Frame::HelloRefused(reason) => return Err(reason.into()),
            Frame::Response { slot, sequence, outcome } => {
                if self.is_outstanding(slot, sequence) {
                    self.complete(slot, sequence, outcome);
                }
            }
            Frame::Refused { epoch, slot, sequence, reason } => self.refused(epoch, slot, sequence, reason)?,
            Frame::Pong { token } => self.events.push_back(Event::Pong(token)),
            Frame::Ping { token } => self.control(Frame::Pong { token }),
            Frame::Goodbye { reason } => return Err(ClientError::Goodbye(reason)),
            _ => return Err(ClientError::Unexpected("kind of frame")),
        }
        Ok(())
    }

    fn refused(&mut self, epoch: Epoch, slot: Slot, sequence: Sequence, reason: Refusal) -> Result<(), ClientError> {
        // Of a request that has its reply, or that has been sent again since: no matter.
        let current_sending = self.is_outstanding(slot, sequence) && epoch == self.epoch;
        match reason {
            _ if !current_sending => Ok(()),
            Refusal::StaleEpoch { current } => {
                if self.state == State::Open {
                    self.fence(current);
                }
                Ok(())
            }
            reason => Err(reason.into()),
        }
    }

    fn fence(&mut self, current: Epoch) {
        self.state = State::Fenced;
        self.events.push_back(Event::Fenced { current });
    }

    fn is_outstanding(&self, slot: Slot, sequence: Sequence) -> bool {
        self.slots.get(usize::from(slot.0)).is_some_and(|s| s.last == sequence && s.outstanding.is_some())
    }

    fn complete(&mut self, slot: Slot, sequence: Sequence, outcome: Outcome) {
        self.slots[usize::from(slot.0)].outstanding = None;
        self.free.push(slot);
        self.events.push_back(Event::Completed(Ticket { slot, sequence }, outcome));
    }

    fn greet(&mut self) {
        if self.epoch == Epoch::UNCLAIMED {
            // Of a VM that has no record yet. What was heard on another connection is not the newest.
            return self.claim(Epoch::UNCLAIMED);
        }
        self.state = State::Greeting(self.epoch);
        self.hello(self.epoch, 0);
    }

    /// Takes the VM from this epoch, if it is the record's.
    fn claim(&mut self, from: Epoch) {
        self.state = State::Claiming(from);
        self.hello(from, CLAIM);
    }

    fn hello(&mut self, epoch: Epoch, capabilities: u64) {
        self.nonce = self.nonce.wrapping_add(1);
        self.control(Frame::Hello(Hello {
            vm_id: self.vm_id,
            epoch,
            owner: self.owner,
            nonce: self.nonce,
            version_min: VERSION,
            version_max: VERSION,
            capabilities,
        }));
    }

    fn control(&mut self, frame: Frame) {
        if self.state == State::Disconnected || self.transmit.len() >= 4 * SLOTS + CONTROL_MAX {
            return;
        }
        match encode(frame) {
            Ok(encoded) => self.transmit.push_back(Chunk::Head(encoded.head)),
            Err(e) => log::error!("control frame: {e}"), // none is over a limit
        }
    }

    fn queue(&mut self, slot: Slot) {
        let Some(o) = &mut self.slots[usize::from(slot.0)].outstanding else { return };
        reseal_request(&mut o.head, self.epoch, o.data_hash);
        o.queued = Some(self.epoch);
        self.transmit.push_back(Chunk::Head(o.head.clone()));
        if !o.data.is_empty() {
            self.transmit.push_back(Chunk::Data(o.data.clone()));
        }
    }

    fn queue_all(&mut self) {
        for slot in (0..SLOTS as u16).map(Slot) {
            self.queue(slot);
        }
    }
}
