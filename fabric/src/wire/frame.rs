//! The kinds of frames.
use super::bytes::{Reader, Writer};
use super::op::{get_op, get_outcome, put_op, put_outcome};
use super::{KEPT_MAX, WireError, header};
use crate::id::{BootId, Epoch, Owner, Sequence, Slot, VmId};
use crate::op::{Outcome, Request};
use crate::owner::OwnerRecord;
use alloc::vec::Vec;

/// First frame of an N-module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who.
    pub vm_id: VmId,
    /// The epoch it holds; of a claim ([`Hello::claims`]) the one it takes the VM from.
    pub epoch: Epoch,
    /// The `vmm` process it runs in.
    pub owner: Owner,
    /// Any number; it is echoed, so that the answer to an earlier HELLO of the connection is known as such.
    pub nonce: u64,
    /// Lowest version it speaks.
    pub version_min: u16,
    /// Highest version it speaks.
    pub version_max: u16,
    /// What it knows or wants: [`CLAIM`](super::CLAIM).
    pub capabilities: u64,
}

/// The D-module's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelloAck {
    /// The epoch that holds now.
    pub epoch: Epoch,
    /// This start of the D-module, which is the write verifier as well.
    pub boot_id: BootId,
    /// From the HELLO.
    pub nonce: u64,
    /// Version spoken from here on.
    pub version: u16,
    /// Slots of the session.
    pub slots: u16,
    /// Features both know.
    pub capabilities: u64,
}

/// Why a HELLO or a request was refused: nothing was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The epoch is not the ownership record's.
    #[error("the epoch is {} by now", current.0)]
    StaleEpoch {
        /// The record's.
        current: Epoch,
    },
    /// Neither the slot's last sequence nor the one after.
    #[error("the slot's last sequence is {}", last.0)]
    BadSequence {
        /// The slot's last.
        last: Sequence,
    },
    /// No such slot.
    #[error("no such slot")]
    BadSlot,
    /// The slot still executes its former request.
    #[error("the slot is busy")]
    Busy,
    /// No HELLO was accepted on this connection, or another connection has taken the session over.
    #[error("the connection has no session")]
    NoSession,
    /// No version in common.
    #[error("versions {min} to {max} are spoken here")]
    Version {
        /// Lowest spoken.
        min: u16,
        /// Highest spoken.
        max: u16,
    },
    /// No room for another VM: all ownership records, or all sessions, are in use.
    #[error("no room for another VM: release the ownership records of VMs that have ended for good")]
    Full,
    /// The ownership record could not be made durable.
    #[error("the ownership record could not be written")]
    Storage,
    /// VM id 0, or the epochs are used up.
    #[error("not a VM that can be owned")]
    Invalid,
}

/// How a compare-and-swap ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CasStatus {
    /// The record is now as asked for, durably.
    Won = 1,
    /// Another epoch holds: the record says whose.
    Lost = 2,
    /// No room for another VM, or not a VM that can be owned. Nothing has changed.
    Refused = 3,
    /// The disk failed; whether the record has changed is not known. Ask again.
    Unknown = 4,
    /// Another epoch holds, by a claim of the asker's own guest: to be asked again from the record's.
    Behind = 5,
}

/// Why a side ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Farewell {
    /// Done.
    Closing = 1,
    /// A newer connection has the session.
    Superseded = 2,
    /// The peer does not keep to the protocol.
    Protocol = 3,
    /// Too many connections.
    Full = 4,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // a frame is moved a few times at most
pub enum Frame {
    /// N → D: opens or takes over the session.
    Hello(Hello),
    /// D → N: the session is open.
    HelloAck(HelloAck),
    /// D → N: the session is not open.
    HelloRefused(Refusal),
    /// N → D: execute.
    Request {
        /// Epoch of the sender.
        epoch: Epoch,
        /// Slot.
        slot: Slot,
        /// Number within the slot.
        sequence: Sequence,
        /// What.
        request: Request,
    },
    /// D → N: executed.
    Response {
        /// Slot.
        slot: Slot,
        /// Number within the slot.
        sequence: Sequence,
        /// What it gave.
        outcome: Outcome,
    },
    /// D → N: not executed.
    Refused {
        /// Epoch of the request refused.
        epoch: Epoch,
        /// Slot.
        slot: Slot,
        /// Number within the slot.
        sequence: Sequence,
        /// Why.
        reason: Refusal,
    },
    /// VMM → D: what is the ownership record? Needs no HELLO, like all of ownership and Ping.
    OwnerGet {
        /// Of this VM.
        vm_id: VmId,
    },
    /// D → VMM: the record; `epoch` 0 if there is none.
    OwnerRecord(OwnerRecord),
    /// VMM → D: compare-and-swap.
    OwnerCas {
        /// Of this VM.
        vm_id: VmId,
        /// The epoch it should have; it becomes the next.
        expect: Epoch,
        /// New owner.
        owner: Owner,
    },
    /// VMM → D: the owner names the process it may hand the VM over to, or that process says that it does not have the VM (no
    /// heir). Answered with [`Frame::OwnerCasResult`].
    OwnerReserve {
        /// Of this VM.
        vm_id: VmId,
        /// The epoch it has.
        epoch: Epoch,
        /// Who asks: its owner, or the heir.
        owner: Owner,
        /// Who may take it next; zero: nobody.
        heir: Owner,
    },
    /// VMM → D: the owner says that the VM has ended for good: its record is not needed any more. Answered with
    /// [`Frame::OwnerCasResult`].
    OwnerRelease {
        /// This VM.
        vm_id: VmId,
        /// The epoch it has.
        epoch: Epoch,
        /// Its owner.
        owner: Owner,
    },
    /// D → VMM: how it ended, and the record that holds now.
    OwnerCasResult {
        /// How.
        status: CasStatus,
        /// What holds now.
        record: OwnerRecord,
    },
    /// Are you there?
    Ping {
        /// Comes back.
        token: u64,
    },
    /// Yes.
    Pong {
        /// From the Ping.
        token: u64,
    },
    /// Last frame of a connection.
    Goodbye {
        /// Why.
        reason: Farewell,
    },
}

/// A frame as it is sent: head, then data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Header and body.
    pub head: Vec<u8>,
    /// Bulk data, moved out of the value.
    pub data: Vec<u8>,
}

impl Encoded {
    /// Head and data in one piece.
    pub fn into_vec(self) -> Vec<u8> {
        let mut bytes = self.head;
        bytes.extend_from_slice(&self.data);
        bytes
    }
}

/// Encodes a frame. Fails on a value over a limit of [`crate::fs`] or of [`super`].
pub fn encode(frame: Frame) -> Result<Encoded, WireError> {
    let mut w = Writer { bytes: header::begin(frame.kind()), spoilt: false };
    let data = put(&mut w, frame);
    if w.spoilt {
        return Err(WireError::TooLarge);
    }
    header::end(&mut w.bytes, data.len())?;
    header::seal(&mut w.bytes, header::hash_data(&data));
    Ok(Encoded { head: w.bytes, data })
}

/// Decodes the parts of a frame whose header has been parsed: `head` is header and body, `data` the rest.
pub(super) fn decode(kind: u16, mut head: Vec<u8>, data: Vec<u8>) -> Result<Frame, WireError> {
    header::verify(&mut head, &data)?;
    let body = head.get(header::HEADER..).unwrap_or_default();
    let mut r = Reader::new(body, data);
    let frame = get(kind, &mut r)?;
    r.end()?;
    Ok(frame)
}

/// Bytes of a reply to keep: the session (epoch of its fresh start) it belongs to, its number and the outcome.
/// `None` where it does not fit in [`KEPT_MAX`], which no reply to a non-idempotent operation does.
pub fn encode_kept(session: Epoch, sequence: Sequence, outcome: &Outcome) -> Option<Vec<u8>> {
    let mut w = Writer { bytes: Vec::with_capacity(KEPT_MAX), spoilt: false };
    w.u64(session.0);
    w.u64(sequence.0);
    let data = put_outcome(&mut w, outcome.clone());
    (data.is_empty() && !w.spoilt && w.bytes.len() <= KEPT_MAX).then_some(w.bytes)
}

/// The reverse of [`encode_kept`]; zeros may follow.
pub fn decode_kept(bytes: &[u8]) -> Result<(Epoch, Sequence, Outcome), WireError> {
    let mut r = Reader::new(bytes, Vec::new());
    Ok((Epoch(r.u64()?), Sequence(r.u64()?), get_outcome(&mut r)?))
}

/// Where the epoch stands in the head of a request: first in the body.
const EPOCH: core::ops::Range<usize> = header::HEADER..header::HEADER + 8;

/// Writes another epoch into the head of an encoded request; `data_hash` as from [`Encoded::data_hash`].
pub fn reseal_request(head: &mut [u8], epoch: Epoch, data_hash: u64) {
    head[EPOCH].copy_from_slice(&epoch.0.to_le_bytes());
    header::seal(head, data_hash);
}

impl Encoded {
    /// Hash of the data, for [`reseal_request`].
    pub fn data_hash(&self) -> u64 {
        header::hash_data(&self.data)
    }
}

impl Frame {
    fn kind(&self) -> u16 {
        match self {
            Frame::Hello(_) => 1,
            Frame::HelloAck(_) => 2,
            Frame::HelloRefused(_) => 3,
            Frame::Request { .. } => 4,
            Frame::Response { .. } => 5,
            Frame::Refused { .. } => 6,
            Frame::OwnerGet { .. } => 7,
            Frame::OwnerRecord(_) => 8,
            Frame::OwnerCas { .. } => 9,
            Frame::OwnerCasResult { .. } => 10,
            Frame::Ping { .. } => 11,
            Frame::Pong { .. } => 12,
            Frame::Goodbye { .. } => 13,
            Frame::OwnerReserve { .. } => 14,
            Frame::OwnerRelease { .. } => 15,
        }
    }
}

fn put(w: &mut Writer, frame: Frame) -> Vec<u8> {
    match frame {
        Frame::Hello(h) => {
            w.u64(h.vm_id.0);
            w.u64(h.epoch.0);
            put_owner(w, h.owner);
            w.u64(h.nonce);
            w.u16(h.version_min);
            w.u16(h.version_max);
            w.u32(0);
            w.u64(h.capabilities);
        }
        Frame::HelloAck(a) => {
            w.u64(a.epoch.0);
            w.u64(a.boot_id.0);
            w.u64(a.nonce);
            w.u16(a.version);
            w.u16(a.slots);
            w.u32(0);
            w.u64(a.capabilities);
        }
        Frame::HelloRefused(reason) => put_refusal(w, reason),
        Frame::Request { epoch, slot, sequence, request } => {
            w.u64(epoch.0);
            w.u64(sequence.0);
            w.u16(slot.0);
            w.credential(&request.credential);
            return put_op(w, request.op);
        }
        Frame::Response { slot, sequence, outcome } => {
            w.u64(sequence.0);
            w.u16(slot.0);
            return put_outcome(w, outcome);
        }
        Frame::Refused { epoch, slot, sequence, reason } => {
            w.u64(epoch.0);
            w.u64(sequence.0);
            w.u16(slot.0);
            put_refusal(w, reason);
        }
        Frame::OwnerGet { vm_id } => w.u64(vm_id.0),
        Frame::OwnerRecord(record) => put_record(w, &record),
        Frame::OwnerCas { vm_id, expect, owner } => {
            w.u64(vm_id.0);
            w.u64(expect.0);
            put_owner(w, owner);
        }
        Frame::OwnerRelease { vm_id, epoch, owner } => {
            w.u64(vm_id.0);
            w.u64(epoch.0);
            put_owner(w, owner);
        }
        Frame::OwnerReserve { vm_id, epoch, owner, heir } => {
            w.u64(vm_id.0);
            w.u64(epoch.0);
            put_owner(w, owner);
            put_owner(w, heir);
        }
        Frame::OwnerCasResult { status, record } => {
            put_record(w, &record);
            w.u8(status as u8);
        }
        Frame::Ping { token } | Frame::Pong { token } => w.u64(token),
        Frame::Goodbye { reason } => w.u8(reason as u8),
    }
    Vec::new()
}

fn get(kind: u16, r: &mut Reader<'_>) -> Result<Frame, WireError> {
    Ok(match kind {
        1 => {
            let (vm_id, epoch, owner, nonce) = (VmId(r.u64()?), Epoch(r.u64()?), get_owner(r)?, r.u64()?);
            let (version_min, version_max) = (r.u16()?, r.u16()?);
            r.u32()?;
            Frame::Hello(Hello { vm_id, epoch, owner, nonce, version_min, version_max, capabilities: r.u64()? })
        }
        2 => {
            let (epoch, boot_id, nonce) = (Epoch(r.u64()?), BootId(r.u64()?), r.u64()?);
            let (version, slots) = (r.u16()?, r.u16()?);
            r.u32()?;
            Frame::HelloAck(HelloAck { epoch, boot_id, nonce, version, slots, capabilities: r.u64()? })
        }
        3 => Frame::HelloRefused(get_refusal(r)?),
        4 => {
            let (epoch, sequence, slot) = (Epoch(r.u64()?), Sequence(r.u64()?), Slot(r.u16()?));
            let request = Request { credential: r.credential()?, op: get_op(r)? };
            Frame::Request { epoch, slot, sequence, request }
        }
        5 => Frame::Response { sequence: Sequence(r.u64()?), slot: Slot(r.u16()?), outcome: get_outcome(r)? },
        6 => {
            let (epoch, sequence, slot) = (Epoch(r.u64()?), Sequence(r.u64()?), Slot(r.u16()?));
            Frame::Refused { epoch, slot, sequence, reason: get_refusal(r)? }
        }
        7 => Frame::OwnerGet { vm_id: VmId(r.u64()?) },
        8 => Frame::OwnerRecord(get_record(r)?),
        9 => Frame::OwnerCas { vm_id: VmId(r.u64()?), expect: Epoch(r.u64()?), owner: get_owner(r)? },
        10 => {
            let record = get_record(r)?;
            let status = match r.u8()? {
                1 => CasStatus::Won,
                2 => CasStatus::Lost,
                3 => CasStatus::Refused,
                4 => CasStatus::Unknown,
                5 => CasStatus::Behind,
                _ => return Err(WireError::Malformed("compare-and-swap status")),
            };
            Frame::OwnerCasResult { status, record }
        }
        11 => Frame::Ping { token: r.u64()? },
        12 => Frame::Pong { token: r.u64()? },
        13 => {
            let reason = match r.u8()? {
                1 => Farewell::Closing,
                2 => Farewell::Superseded,
                3 => Farewell::Protocol,
                4 => Farewell::Full,
                _ => return Err(WireError::Malformed("farewell")),
            };
            Frame::Goodbye { reason }
        }
        14 => Frame::OwnerReserve {
            vm_id: VmId(r.u64()?),
            epoch: Epoch(r.u64()?),
            owner: get_owner(r)?,
            heir: get_owner(r)?,
        },
        15 => Frame::OwnerRelease { vm_id: VmId(r.u64()?), epoch: Epoch(r.u64()?), owner: get_owner(r)? },
        _ => return Err(WireError::Malformed("kind")),
    })
}

fn put_owner(w: &mut Writer, owner: Owner) {
    w.u64(owner.0[0]);
    w.u64(owner.0[1]);
}

fn get_owner(r: &mut Reader<'_>) -> Result<Owner, WireError> {
    Ok(Owner([r.u64()?, r.u64()?]))
}

fn put_record(w: &mut Writer, record: &OwnerRecord) {
    w.u64(record.vm_id.0);
    w.u64(record.epoch.0);
    w.u64(record.session.0);
    put_owner(w, record.owner);
}

fn get_record(r: &mut Reader<'_>) -> Result<OwnerRecord, WireError> {
    let (vm_id, epoch, session) = (VmId(r.u64()?), Epoch(r.u64()?), Epoch(r.u64()?));
    Ok(OwnerRecord { vm_id, epoch, session, owner: get_owner(r)? })
}

fn put_refusal(w: &mut Writer, reason: Refusal) {
    let (code, detail) = match reason {
        Refusal::StaleEpoch { current } => (1, current.0),
        Refusal::BadSequence { last } => (2, last.0),
        Refusal::BadSlot => (3, 0),
        Refusal::Busy => (4, 0),
        Refusal::NoSession => (5, 0),
        Refusal::Version { min, max } => (6, u64::from(max) << 16 | u64::from(min)),
        Refusal::Full => (7, 0),
        Refusal::Storage => (8, 0),
        Refusal::Invalid => (9, 0),
    };
    w.u16(code);
    w.u64(detail);
}

fn get_refusal(r: &mut Reader<'_>) -> Result<Refusal, WireError> {
    let (code, detail) = (r.u16()?, r.u64()?);
    Ok(match code {
        1 => Refusal::StaleEpoch { current: Epoch(detail) },
        2 => Refusal::BadSequence { last: Sequence(detail) },
        3 => Refusal::BadSlot,
        4 => Refusal::Busy,
        5 => Refusal::NoSession,
        6 => Refusal::Version { min: detail as u16, max: (detail >> 16) as u16 },
        7 => Refusal::Full,
        8 => Refusal::Storage,
        9 => Refusal::Invalid,
        _ => return Err(WireError::Malformed("refusal")),
    })
}
