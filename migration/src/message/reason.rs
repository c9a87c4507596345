//! Why a port did not take place, as both sides tell each other.
use super::zero;
use crate::Error;
use crate::wire::{Reader, put_blob};

/// Longest text of a reason, in bytes.
pub const TEXT_MAX: usize = 1024;

/// Kind of failure, for programs; the text beside it is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ReasonCode {
    /// No common protocol version.
    Version = 1,
    /// A required feature is missing.
    Feature = 2,
    /// The destination cannot hold the guest's memory.
    Memory = 3,
    /// The CPU lacks something the guest uses.
    Cpu = 4,
    /// A device cannot be made.
    Device = 5,
    /// The arbiter could not be reached or answered nonsense.
    Arbiter = 6,
    /// Somebody else owns the VM.
    NotOwner = 7,
    /// The destination is taken.
    Busy = 8,
    /// The peer broke the protocol.
    Protocol = 9,
    /// The connection was lost.
    Disconnected = 10,
    /// A step took too long.
    Timeout = 11,
    /// The operator cancelled.
    Cancelled = 12,
    /// The guest dirties memory faster than it can be sent.
    NotConverging = 13,
    /// State could not be saved or loaded.
    State = 14,
    /// Anything else.
    Internal = 15,
    /// The certificates or the ticket do not allow the port.
    Permission = 16,
}

impl ReasonCode {
    pub(super) const ALL: [ReasonCode; 16] = [
        ReasonCode::Version,
        ReasonCode::Feature,
        ReasonCode::Memory,
        ReasonCode::Cpu,
        ReasonCode::Device,
        ReasonCode::Arbiter,
        ReasonCode::NotOwner,
        ReasonCode::Busy,
        ReasonCode::Protocol,
        ReasonCode::Disconnected,
        ReasonCode::Timeout,
        ReasonCode::Cancelled,
        ReasonCode::NotConverging,
        ReasonCode::State,
        ReasonCode::Internal,
        ReasonCode::Permission,
    ];
}

/// Why a port did not take place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reason {
    /// For programs.
    pub code: ReasonCode,
    /// For people. Cut to [`TEXT_MAX`] bytes on the wire.
    pub text: String,
}

impl Reason {
    /// A reason.
    pub fn new(code: ReasonCode, text: impl Into<String>) -> Reason {
        Reason { code, text: text.into() }
    }

    /// Appends it.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.code as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        let mut end = self.text.len().min(TEXT_MAX);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        put_blob(out, &self.text.as_bytes()[..end]);
    }

    /// Reads what [`Reason::put`] wrote.
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Reason, Error> {
        let number = r.u16()?;
        let code = ReasonCode::ALL
            .into_iter()
            .find(|c| *c as u16 == number)
            .ok_or(Error::Value { what: "reason", value: u64::from(number) })?;
        zero(&r.array::<2>()?, "reason")?;
        Ok(Reason { code, text: r.text(TEXT_MAX, "text of a reason")? })
    }
}

impl core::fmt::Display for Reason {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.text)
    }
}
