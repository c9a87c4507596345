//! Tickets: somebody who may order a port says so, for both sides to check.
//!
//! ```text
//!   0  u32 magic       "ORTK"
//!   4  u16 version     1
//!   6  u16 reserved    0
//!   8  [u8; 16] id     random: a ticket is good for one port
//!  24  u64 vm_id
//!  32  u64 epoch       first and last epoch of the VM it is good for
//!  40  u64 epoch
//!  48  u64 not before  seconds since 1970
//!  56  u64 not after
//!  64  source          u32 length, at most [`NAME_MAX`], UTF-8: a name in the source's certificate
//!      destination     likewise
//!      signature       64 bytes: Ed25519 (RFC 8032) over all bytes before it, by the issuer
//! ```
//!
//! Always true: nothing of a ticket is believed before its signature was checked with [`Signed::verify`]; the crypto is the
//! caller's, so this module has no key and no clock. What a ticket does not say, as "any VM", cannot be asked for.
use crate::Error;
use crate::message::Hello;
use crate::ownership::Epoch;
use crate::wire::{Reader, put_blob};

/// `"ORTK"`, as the first four bytes.
pub const MAGIC: u32 = u32::from_le_bytes(*b"ORTK");
/// The format described above.
pub const VERSION: u16 = 1;
/// Longest name of a host, in bytes (that of a DNS name).
pub const NAME_MAX: usize = 253;
/// Length of the signature, in bytes.
pub const SIGNATURE_LEN: usize = 64;
/// Longest ticket, in bytes.
pub const TICKET_MAX: usize = 64 + 2 * (4 + NAME_MAX) + SIGNATURE_LEN;

/// What a ticket says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// Tells tickets apart.
    pub id: [u8; 16],
    /// The VM; 0 for one that has no id.
    pub vm_id: u64,
    /// First epoch of the VM it is good for.
    pub first_epoch: Epoch,
    /// Last one.
    pub last_epoch: Epoch,
    /// From when on it is good, in seconds since 1970.
    pub not_before: u64,
    /// Until when, in seconds since 1970.
    pub not_after: u64,
    /// Who may give the VM away.
    pub source: String,
    /// Who may take it.
    pub destination: String,
}

/// A ticket that cannot be used here and now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not signed by the issuer, or changed since.
    #[error("the ticket is not signed by the issuer that is trusted here")]
    Forged,
    /// For another VM.
    #[error("the ticket is for VM {ticket}, this is VM {vm}")]
    Vm {
        /// In the ticket.
        ticket: u64,
        /// The VM's.
        vm: u64,
    },
    /// For another time of the VM's life.
    #[error("the ticket is for epochs {first} to {last}, the VM is at {epoch}")]
    Epoch {
        /// In the ticket.
        first: u64,
        /// In the ticket.
        last: u64,
        /// The VM's.
        epoch: u64,
    },
    /// Not yet good.
    #[error("the ticket is good only in {0} s: is the clock right?")]
    Early(u64),
    /// No longer good.
    #[error("the ticket expired {0} s ago")]
    Expired(u64),
}

impl Ticket {
    /// The bytes to be signed.
    ///
    /// # Panics
    /// With a name longer than [`NAME_MAX`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(TICKET_MAX);
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.id);
        for value in [self.vm_id, self.first_epoch.0, self.last_epoch.0, self.not_before, self.not_after] {
            out.extend_from_slice(&value.to_le_bytes());
        }
        for name in [&self.source, &self.destination] {
            assert!(name.len() <= NAME_MAX, "name of {} bytes", name.len());
            put_blob(&mut out, name.as_bytes());
        }
        out
    }

    /// Whether it is good at `now` (seconds since 1970) for this VM at this epoch. The names are checked against certificates,
    /// by whoever has them.
    pub fn check(&self, vm_id: u64, epoch: Epoch, now: u64) -> Result<(), TicketError> {
        if self.vm_id != vm_id {
            return Err(TicketError::Vm { ticket: self.vm_id, vm: vm_id });
        }
        if !(self.first_epoch..=self.last_epoch).contains(&epoch) {
            let (first, last) = (self.first_epoch.0, self.last_epoch.0);
            return Err(TicketError::Epoch { first, last, epoch: epoch.0 });
        }
        if now < self.not_before {
            return Err(TicketError::Early(self.not_before - now));
        }
        if now > self.not_after {
            return Err(TicketError::Expired(now - self.not_after));
        }
        Ok(())
    }

    /// [`Ticket::check`] for the VM of a HELLO.
    pub fn admits(&self, hello: &Hello, now: u64) -> Result<(), TicketError> {
        self.check(hello.vm_id, hello.epoch, now)
    }
}

/// A ticket as it came: well-formed, its signature not yet checked.
#[derive(Clone, Debug)]
pub struct Signed<'a> {
    ticket: Ticket,
    covered: &'a [u8],
    signature: [u8; SIGNATURE_LEN],
}

impl<'a> Signed<'a> {
    /// Reads a ticket and its signature.
    pub fn parse(bytes: &'a [u8]) -> Result<Signed<'a>, Error> {
        const WHAT: &str = "ticket";
        if bytes.len() > TICKET_MAX {
            return Err(Error::Bound { what: WHAT, value: bytes.len() as u64, bound: TICKET_MAX as u64 });
        }
        let (covered, signature) = bytes.split_last_chunk::<SIGNATURE_LEN>().ok_or(Error::Short(WHAT))?;
        let mut r = Reader::new(WHAT, covered);
        if r.u32()? != MAGIC {
            return Err(Error::NoTicket);
        }
        match r.u16()? {
            VERSION => {}
            got => return Err(Error::TicketVersion { got, known: VERSION }),
        }
        if r.u16()? != 0 {
            return Err(Error::Reserved(WHAT));
        }
        let ticket = Ticket {
            id: r.array()?,
            vm_id: r.u64()?,
            first_epoch: Epoch(r.u64()?),
            last_epoch: Epoch(r.u64()?),
            not_before: r.u64()?,
            not_after: r.u64()?,
            source: r.text(NAME_MAX, "source of a ticket")?,
            destination: r.text(NAME_MAX, "destination of a ticket")?,
        };
        r.finish()?;
        Ok(Signed { ticket, covered, signature: *signature })
    }

    /// The ticket, if `good` says that the signature over these bytes is the issuer's.
    pub fn verify(self, good: impl FnOnce(&[u8], &[u8; SIGNATURE_LEN]) -> bool) -> Result<Ticket, TicketError> {
        if good(self.covered, &self.signature) { Ok(self.ticket) } else { Err(TicketError::Forged) }
    }
}

#[cfg(test)]
mod tests;
