//! For a VMM that ports a VM: ask for the ownership record, name an heir, compare-and-swap, release it. No HELLO is needed; the
//! answers come in the order of the questions. And how an N-module claims with its HELLO.
use super::{CasStatus, Farewell, Frame, FrameReader, Hello, WireError, encode};
use crate::id::{Epoch, Owner, VmId};
use crate::owner::OwnerRecord;
use alloc::vec::Vec;

/// Capability of a HELLO that claims the VM anew, with an empty session: its epoch is the one the sender was told of by the refusal
/// of such a HELLO before.
pub const CLAIM: u64 = 1;

impl Hello {
    /// Whether it claims the VM. Epoch 0, which nobody holds, always does: of a VM that has no record, and never had one.
    pub fn claims(&self) -> bool {
        self.capabilities & CLAIM != 0 || self.epoch == Epoch::UNCLAIMED
    }
}

/// The question for a VM's record, in bytes.
pub fn owner_get(vm_id: VmId) -> Result<Vec<u8>, WireError> {
    Ok(encode(Frame::OwnerGet { vm_id })?.into_vec())
}

/// The compare-and-swap of a VM's record from epoch `expect` to the next and to `owner`, in bytes.
/// Asking again what one has won already is answered with [`CasStatus::Won`].
pub fn owner_cas(vm_id: VmId, expect: Epoch, owner: Owner) -> Result<Vec<u8>, WireError> {
    Ok(encode(Frame::OwnerCas { vm_id, expect, owner })?.into_vec())
}

/// The owner's word, at epoch `epoch`, that `heir` may take the VM over (zero: nobody), in bytes. Once it is answered with
/// [`CasStatus::Won`], a compare-and-swap of the heir's does not wait for the disk.
pub fn owner_reserve(vm_id: VmId, epoch: Epoch, owner: Owner, heir: Owner) -> Result<Vec<u8>, WireError> {
    Ok(encode(Frame::OwnerReserve { vm_id, epoch, owner, heir })?.into_vec())
}

/// The owner's word, at epoch `epoch`, that the VM has ended for good, in bytes. Answered with [`CasStatus::Won`] once its record
/// is released, or has been.
pub fn owner_release(vm_id: VmId, epoch: Epoch, owner: Owner) -> Result<Vec<u8>, WireError> {
    Ok(encode(Frame::OwnerRelease { vm_id, epoch, owner })?.into_vec())
}

/// A D-module's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerAnswer {
    /// To [`owner_get`]; `epoch` is 0 if the VM has no record.
    Record(OwnerRecord),
    /// To [`owner_cas`], [`owner_reserve`] and [`owner_release`]: how it ended, and the record that holds now.
    Cas(CasStatus, OwnerRecord),
    /// None: the D-module ends the connection. It takes a question it does not know for a mistake ([`Farewell::Protocol`]).
    Goodbye(Farewell),
}

/// Reads answers from the byte stream of a connection used for nothing else.
#[derive(Debug, Default)]
pub struct OwnerAnswers(FrameReader);

impl OwnerAnswers {
    /// At the beginning of a connection.
    pub fn new() -> Self {
        OwnerAnswers::default()
    }

    /// Takes bytes up to the end of an answer, which it returns; `None` when all bytes are taken.
    pub fn push(&mut self, bytes: &mut &[u8]) -> Result<Option<OwnerAnswer>, WireError> {
        match self.0.push(bytes)? {
            None => Ok(None),
            Some(Frame::OwnerRecord(record)) => Ok(Some(OwnerAnswer::Record(record))),
            Some(Frame::OwnerCasResult { status, record }) => Ok(Some(OwnerAnswer::Cas(status, record))),
            Some(Frame::Goodbye { reason }) => Ok(Some(OwnerAnswer::Goodbye(reason))),
            Some(_) => Err(WireError::Malformed("not an answer about ownership")),
        }
    }
}
