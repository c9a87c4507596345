//! ONC RPC version 2 (RFC 5531): call headers, credentials, reply headers.
//!
//! Always true: a call header is decoded without allocation apart from the bounded list of groups; whatever it says
//! wrong is answered as the RFC prescribes, never with a panic.
use crate::record::Reply;
use crate::xdr::{Reader, Writer, XdrError};
use alloc::vec::Vec;
use fabric::fs::{Credential, GROUPS_MAX};

/// Longest body of a credential or verifier (RFC 5531, section 8.2).
const AUTH_BODY_MAX: usize = 400;
/// Longest machine name in AUTH_SYS.
const MACHINE_NAME_MAX: usize = 255;
const RPC_VERSION: u32 = 2;
const CALL: u32 = 0;
const REPLY: u32 = 1;
const MSG_ACCEPTED: u32 = 0;
const MSG_DENIED: u32 = 1;
const RPC_MISMATCH: u32 = 0;
const AUTH_ERROR: u32 = 1;

/// Authentication flavors.
pub mod flavor {
    /// No authentication.
    pub const NONE: u32 = 0;
    /// User and group ids as the client says.
    pub const SYS: u32 = 1;
}

/// A transaction id, chosen by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xid(pub u32);

/// Who a call says it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auth {
    /// AUTH_NONE.
    None,
    /// AUTH_SYS.
    Sys(Credential),
}

/// Why authentication failed (RFC 5531, auth_stat).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AuthStat {
    /// Malformed credential, or a flavor that is not known.
    BadCredential = 1,
    /// Malformed verifier.
    BadVerifier = 3,
    /// Refused for security reasons (a port that is not privileged).
    TooWeak = 5,
}

/// Header of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Transaction.
    pub xid: Xid,
    /// Program number.
    pub program: u32,
    /// Version of the program.
    pub version: u32,
    /// Procedure.
    pub procedure: u32,
    /// Caller.
    pub auth: Auth,
}

/// Why a message is not a call that can be dispatched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadCall {
    /// Not a call, or too short to be answered.
    NotACall,
    /// Another version of RPC.
    VersionMismatch(Xid),
    /// The header's XDR is broken behind the transaction id.
    Garbage(Xid),
    /// Authentication failed.
    Auth(Xid, AuthStat),
}

impl Call {
    /// Takes a call header from the front of a message.
    pub fn decode(message: &mut Reader<'_>) -> Result<Call, BadCall> {
        let (Ok(xid), Ok(direction)) = (message.u32(), message.u32()) else { return Err(BadCall::NotACall) };
        let xid = Xid(xid);
        if direction != CALL {
            return Err(BadCall::NotACall);
        }
        let garbage = |_: XdrError| BadCall::Garbage(xid);
        if message.u32().map_err(garbage)? != RPC_VERSION {
            return Err(BadCall::VersionMismatch(xid));
        }
        let program = message.u32().map_err(garbage)?;
        let version = message.u32().map_err(garbage)?;
        let procedure = message.u32().map_err(garbage)?;
        let flavor = message.u32().map_err(garbage)?;
        let body = message.opaque(AUTH_BODY_MAX).map_err(|_| BadCall::Auth(xid, AuthStat::BadCredential))?;
        let auth = match flavor {
            flavor::NONE => Auth::None,
            flavor::SYS => Auth::Sys(decode_auth_sys(body).map_err(|_| BadCall::Auth(xid, AuthStat::BadCredential))?),
            _ => return Err(BadCall::Auth(xid, AuthStat::BadCredential)),
        };
        message.u32().map_err(garbage)?;
        message.opaque(AUTH_BODY_MAX).map_err(|_| BadCall::Auth(xid, AuthStat::BadVerifier))?;
        Ok(Call { xid, program, version, procedure, auth })
    }
}

/// authsys_parms (RFC 5531, appendix A).
fn decode_auth_sys(body: &[u8]) -> Result<Credential, XdrError> {
    let mut body = Reader::new(body);
    body.u32()?;
    body.opaque(MACHINE_NAME_MAX)?;
    let uid = body.u32()?;
    let gid = body.u32()?;
    let count = body.length(GROUPS_MAX)?;
    let groups = (0..count).map(|_| body.u32()).collect::<Result<Vec<u32>, XdrError>>()?;
    Ok(Credential { uid, gid, groups })
}

/// What became of a call that was accepted (RFC 5531, accept_stat), other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// No such program here.
    ProgramUnavailable,
    /// The program has versions `low` to `high`.
    ProgramMismatch {
        /// Lowest version.
        low: u32,
        /// Highest version.
        high: u32,
    },
    /// No such procedure.
    ProcedureUnavailable,
    /// The arguments are not what the procedure takes.
    GarbageArguments,
}

impl From<XdrError> for Rejection {
    fn from(_: XdrError) -> Self {
        Rejection::GarbageArguments
    }
}

/// A buffer that begins a reply: place for the record mark, then the header up to reply_stat.
fn begin(xid: Xid, reply_stat: u32, capacity: usize) -> Writer {
    let mut writer = Writer::with_capacity(capacity);
    writer.raw(&Reply::MARK).u32(xid.0).u32(REPLY).u32(reply_stat);
    writer
}

/// Begins the reply of a call that succeeded; the procedure's results follow.
pub fn success(xid: Xid, capacity: usize) -> Writer {
    let mut writer = begin(xid, MSG_ACCEPTED, capacity);
    writer.u32(flavor::NONE).u32(0).u32(0);
    writer
}

/// The reply to a call that was accepted but not executed.
pub fn rejected(xid: Xid, rejection: Rejection) -> Reply {
    let mut writer = begin(xid, MSG_ACCEPTED, 40);
    writer.u32(flavor::NONE).u32(0);
    match rejection {
        Rejection::ProgramUnavailable => writer.u32(1),
        Rejection::ProgramMismatch { low, high } => writer.u32(2).u32(low).u32(high),
        Rejection::ProcedureUnavailable => writer.u32(3),
        Rejection::GarbageArguments => writer.u32(4),
    };
    Reply::new(writer.into_bytes(), Vec::new())
}

/// The reply to a call whose authentication failed.
pub fn auth_error(xid: Xid, stat: AuthStat) -> Reply {
    let mut writer = begin(xid, MSG_DENIED, 24);
    writer.u32(AUTH_ERROR).u32(stat as u32);
    Reply::new(writer.into_bytes(), Vec::new())
}

/// The reply to a message that is no call to dispatch, if it can be answered.
pub fn refuse(bad: BadCall) -> Option<Reply> {
    match bad {
        BadCall::NotACall => None,
        BadCall::VersionMismatch(xid) => {
            let mut writer = begin(xid, MSG_DENIED, 32);
            writer.u32(RPC_MISMATCH).u32(RPC_VERSION).u32(RPC_VERSION);
            Some(Reply::new(writer.into_bytes(), Vec::new()))
        }
        BadCall::Garbage(xid) => Some(rejected(xid, Rejection::GarbageArguments)),
        BadCall::Auth(xid, stat) => Some(auth_error(xid, stat)),
    }
}

#[cfg(test)]
mod tests;
