//! Arguments of NFSv3 calls: from XDR to a file-system primitive and what its reply has to honour.
//!
//! Always true: arguments are decoded to their end before any of their values is judged, so that broken XDR is
//! GARBAGE_ARGS whatever else is wrong; what is judged wrong becomes the status RFC 1813 names.
use super::{COOKIE_VERIFIER, DIRECTORY_MAX, NfsStatus, Procedure, TRANSFER_MAX};
use crate::handle::{self, BadHandle, HANDLE_MAX};
use crate::mount;
use crate::record::{RECORD_MAX, Split};
use crate::rpc;
use crate::xdr::{Reader, XdrError, padding};
use alloc::vec::Vec;
use fabric::fs::{CreateHow, FileHandle, FileKind, NAME_MAX, SYMLINK_MAX, SetAttr, SetTime, Stability, Time};
use fabric::op::Op;

/// Bytes of the largest reply of a call that costs nothing by [`cost`]: a READLINK, or a READ of [`SMALL_READ`].
pub const SMALL_REPLY: usize = 2048;
/// A READ of at most so many bytes is like any small call.
const SMALL_READ: usize = 1024;

/// A reply's bounds, from the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limits {
    /// None but the procedure's own.
    None,
    /// READDIR: most bytes of READDIR3resok.
    ReadDir {
        /// Bytes.
        count: u32,
    },
    /// READDIRPLUS.
    ReadDirPlus {
        /// Most bytes of entries without attributes and handles.
        dircount: u32,
        /// Most bytes of READDIRPLUS3resok.
        maxcount: u32,
    },
}

/// What a call asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The primitive to execute, or why it is refused at once.
    pub op: Result<Op, NfsStatus>,
    /// Bounds of the reply.
    pub limits: Limits,
}

/// Offset of the data of a WRITE call in a record, as far as the record's first bytes tell.
pub fn write_split(head: &[u8]) -> Split {
    // A credential or verifier longer than its bound is no reason to read on.
    match locate_write_data(head) {
        Ok(Some(offset)) => Split::At(offset),
        Err(XdrError::Truncated) => Split::More,
        Ok(None) | Err(_) => Split::Never,
    }
}

fn locate_write_data(head: &[u8]) -> Result<Option<usize>, XdrError> {
    let mut reader = Reader::new(head);
    reader.u32()?;
    let fixed = [reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?];
    if fixed != [0, 2, super::PROGRAM, super::VERSION, Procedure::Write as u32] {
        return Ok(None);
    }
    for _ in 0..2 {
        reader.u32()?;
        reader.opaque(400)?;
    }
    reader.opaque(HANDLE_MAX)?;
    reader.bytes(8 + 4 + 4 + 4)?;
    Ok(Some(reader.position()))
}

/// Most memory that executing a call and holding its reply takes, roughly, beyond the record itself and
/// [`SMALL_REPLY`]. Only a guess for a call whose arguments are broken: it then costs next to nothing.
pub fn cost(head: &[u8]) -> usize {
    let guess = || -> Option<usize> {
        let mut reader = Reader::new(head);
        let call = rpc::Call::decode(&mut reader).ok()?;
        if call.program == mount::PROGRAM && call.procedure >= mount::DUMP {
            return Some(mount::LIST_MAX);
        }
        if call.program != super::PROGRAM {
            return None;
        }
        match Procedure::from_number(call.procedure)? {
            Procedure::Read => {
                reader.opaque(HANDLE_MAX).ok()?;
                reader.u64().ok()?;
                let count = reader.u32().ok()?.min(TRANSFER_MAX) as usize;
                Some(count).filter(|count| *count > SMALL_READ)
            }
            // Entries as values, then as bytes.
            Procedure::ReadDir | Procedure::ReadDirPlus => Some(5 * DIRECTORY_MAX as usize),
            _ => None,
        }
    };
    guess().unwrap_or(0)
}

type WireHandle = Result<FileHandle, BadHandle>;

impl From<BadHandle> for NfsStatus {
    fn from(_: BadHandle) -> Self {
        NfsStatus::BadHandle
    }
}

fn wire_handle(reader: &mut Reader<'_>) -> Result<WireHandle, XdrError> {
    reader.opaque(HANDLE_MAX).map(handle::decode)
}

fn directory_name<'a>(reader: &mut Reader<'a>) -> Result<(WireHandle, &'a [u8]), XdrError> {
    Ok((wire_handle(reader)?, reader.opaque(RECORD_MAX)?))
}

/// A name that may be looked up.
fn name(bytes: &[u8]) -> Result<Vec<u8>, NfsStatus> {
    if bytes.len() > NAME_MAX {
        return Err(NfsStatus::NameTooLong);
    }
    if bytes.is_empty() || bytes.contains(&0) || bytes.contains(&b'/') {
        return Err(NfsStatus::Invalid);
    }
    Ok(bytes.to_vec())
}

/// A name that may come to be or cease to be: `.` and `..` always exist and stay; `dots` says how that is told.
fn changing_name(bytes: &[u8], dots: NfsStatus) -> Result<Vec<u8>, NfsStatus> {
    if bytes == b"." || bytes == b".." { Err(dots) } else { name(bytes) }
}

/// A time, or `None` if its nanoseconds are out of range.
fn time(reader: &mut Reader<'_>) -> Result<Option<Time>, XdrError> {
    let (seconds, nanoseconds) = (reader.u32()?, reader.u32()?);
    let time = Time(i64::from(seconds) * 1_000_000_000 + i64::from(nanoseconds));
    Ok((nanoseconds < 1_000_000_000).then_some(time))
}

/// set_atime or set_mtime.
fn set_time(reader: &mut Reader<'_>) -> Result<Result<SetTime, NfsStatus>, XdrError> {
    Ok(match reader.u32()? {
        0 => Ok(SetTime::Keep),
        1 => Ok(SetTime::ServerNow),
        2 => time(reader)?.map(SetTime::To).ok_or(NfsStatus::Invalid),
        _ => return Err(XdrError::Discriminant),
    })
}

fn optional(reader: &mut Reader<'_>) -> Result<Option<u32>, XdrError> {
    if reader.bool()? { reader.u32().map(Some) } else { Ok(None) }
}

/// sattr3.
fn attributes(reader: &mut Reader<'_>) -> Result<Result<SetAttr, NfsStatus>, XdrError> {
    let mode = optional(reader)?.map(|mode| mode & 0o7777);
    let (uid, gid) = (optional(reader)?, optional(reader)?);
    let size = if reader.bool()? { Some(reader.u64()?) } else { None };
    let (atime, mtime) = (set_time(reader)?, set_time(reader)?);
    Ok((|| Ok(SetAttr { mode, uid, gid, size, atime: atime?, mtime: mtime? }))())
}

fn stability(number: u32) -> Result<Stability, XdrError> {
    match number {
        0 => Ok(Stability::Unstable),
        1 => Ok(Stability::DataSync),
        2 => Ok(Stability::FileSync),
        _ => Err(XdrError::Discriminant),
    }
}

/// `op`, or the first status that speaks against it.
fn judge(op: impl FnOnce() -> Result<Op, NfsStatus>) -> Plan {
    Plan { op: op(), limits: Limits::None }
}

/// Decodes the arguments of a procedure other than NULL. `bulk` is what follows `reader`'s bytes, if the record was split.
pub fn decode(procedure: Procedure, r: &mut Reader<'_>, bulk: Option<Vec<u8>>) -> Result<Plan, XdrError> {
    if bulk.is_some() && procedure != Procedure::Write {
        return Err(XdrError::Discriminant);
    }
    Ok(match procedure {
        Procedure::Null => return Err(XdrError::Discriminant),
        // FSINFO and PATHCONF are answered from constants, with the object's attributes.
        Procedure::GetAttr | Procedure::FsInfo | Procedure::PathConf => {
            let handle = wire_handle(r)?;
            judge(|| Ok(Op::GetAttr { handle: handle? }))
        }
        Procedure::SetAttr => {
            let (handle, set) = (wire_handle(r)?, attributes(r)?);
            let guard = if r.bool()? { Some(time(r)?) } else { None };
            judge(|| {
                let handle = handle?;
                // No object has a ctime with such nanoseconds.
                let guard = guard.map(|time| time.ok_or(NfsStatus::NotSync)).transpose()?;
                Ok(Op::SetAttr { handle, set: set?, guard })
            })
        }
        Procedure::Lookup => {
            let (dir, bytes) = directory_name(r)?;
            judge(|| Ok(Op::Lookup { dir: dir?, name: name(bytes)? }))
        }
        Procedure::Access => {
            let (handle, want) = (wire_handle(r)?, r.u32()?);
            judge(|| Ok(Op::Access { handle: handle?, want: want & 0x3f }))
        }
        Procedure::ReadLink => {
            let handle = wire_handle(r)?;
            judge(|| Ok(Op::ReadLink { handle: handle? }))
        }
        Procedure::Read => {
            let (handle, offset, count) = (wire_handle(r)?, r.u64()?, r.u32()?);
            judge(|| Ok(Op::Read { handle: handle?, offset, length: count.min(TRANSFER_MAX) }))
        }
        Procedure::Write => decode_write(r, bulk)?,
        Procedure::Create => decode_create(r)?,
        Procedure::MakeDir => {
            let ((dir, bytes), set) = (directory_name(r)?, attributes(r)?);
            judge(|| Ok(Op::MakeDir { dir: dir?, name: changing_name(bytes, NfsStatus::Exists)?, set: set? }))
        }
        Procedure::Symlink => {
            let ((dir, bytes), set) = (directory_name(r)?, attributes(r)?);
            let target = r.opaque(RECORD_MAX)?;
            judge(|| {
                let (dir, name) = (dir?, changing_name(bytes, NfsStatus::Exists)?);
                if target.len() > SYMLINK_MAX {
                    return Err(NfsStatus::NameTooLong);
                }
                if target.is_empty() || target.contains(&0) {
                    return Err(NfsStatus::Invalid);
                }
                Ok(Op::Symlink { dir, name, target: target.to_vec(), set: set? })
            })
        }
        Procedure::MakeNode => decode_make_node(r)?,
        Procedure::Remove => {
            let (dir, bytes) = directory_name(r)?;
            judge(|| Ok(Op::Remove { dir: dir?, name: changing_name(bytes, NfsStatus::Invalid)? }))
        }
        Procedure::RemoveDir => {
            let (dir, bytes) = directory_name(r)?;
            // RFC 1813, 3.3.13: "." is INVAL, ".." is EXIST.
            let dots = if bytes == b".." { NfsStatus::Exists } else { NfsStatus::Invalid };
            judge(|| Ok(Op::RemoveDir { dir: dir?, name: changing_name(bytes, dots)? }))
        }
        Procedure::Rename => {
            let (from, to) = (directory_name(r)?, directory_name(r)?);
            judge(|| {
                let (from_dir, to_dir) = (from.0?, to.0?);
                let from_name = changing_name(from.1, NfsStatus::Invalid)?;
                let to_name = changing_name(to.1, NfsStatus::Invalid)?;
                if from_dir.volume != to_dir.volume {
                    return Err(NfsStatus::CrossDevice);
                }
                Ok(Op::Rename { from_dir, from_name, to_dir, to_name })
            })
        }
        Procedure::Link => {
            let (handle, (dir, bytes)) = (wire_handle(r)?, directory_name(r)?);
            judge(|| {
                let (handle, dir) = (handle?, dir?);
                let name = changing_name(bytes, NfsStatus::Exists)?;
                if handle.volume != dir.volume {
                    return Err(NfsStatus::CrossDevice);
                }
                Ok(Op::Link { handle, dir, name })
            })
        }
        Procedure::ReadDir => {
            let (dir, cookie, verifier, count) = (wire_handle(r)?, r.u64()?, r.array()?, r.u32()?);
            let limits = Limits::ReadDir { count: count.min(DIRECTORY_MAX) };
            // The smallest entry is 28 bytes: READDIR cannot hold more of them.
            Plan { op: list(dir, cookie, verifier, count, count, 28, false), limits }
        }
        Procedure::ReadDirPlus => {
            let (dir, cookie, verifier) = (wire_handle(r)?, r.u64()?, r.array()?);
            let (dircount, maxcount) = (r.u32()?, r.u32()?);
            let limits = Limits::ReadDirPlus { dircount, maxcount: maxcount.min(DIRECTORY_MAX) };
            // The smallest entry with attributes and handle is 28 + 88 + 8 + HANDLE_SIZE bytes.
            let entry = 124 + handle::HANDLE_SIZE as u32;
            Plan { op: list(dir, cookie, verifier, dircount, maxcount, entry, true), limits }
        }
        Procedure::FsStat => {
            let handle = wire_handle(r)?;
            judge(|| Ok(Op::VolumeStat { handle: handle? }))
        }
        Procedure::Commit => {
            let (handle, offset, count) = (wire_handle(r)?, r.u64()?, r.u32()?);
            judge(|| Ok(Op::Commit { handle: handle?, offset, count }))
        }
    })
}

fn list(
    dir: WireHandle,
    cookie: u64,
    verifier: [u8; 8],
    dircount: u32,
    maxcount: u32,
    entry: u32,
    plus: bool,
) -> Result<Op, NfsStatus> {
    let dir = dir?;
    if cookie != 0 && verifier != COOKIE_VERIFIER {
        return Err(NfsStatus::BadCookie);
    }
    let (dircount, maxcount) = (dircount.min(DIRECTORY_MAX), maxcount.min(DIRECTORY_MAX));
    Ok(Op::ReadDir {
        dir,
        cookie,
        max_entries: (maxcount / entry).max(1),
        // At least one name of any length, so that the answer tells "does not fit" from "at the end".
        max_bytes: dircount.min(maxcount).max(NAME_MAX as u32),
        plus,
    })
}

fn decode_write(r: &mut Reader<'_>, bulk: Option<Vec<u8>>) -> Result<Plan, XdrError> {
    let (handle, offset, count) = (wire_handle(r)?, r.u64()?, r.u32()?);
    let stability = stability(r.u32()?)?;
    let mut data = match bulk {
        None => r.opaque(RECORD_MAX)?.to_vec(),
        Some(mut bulk) => {
            let length = r.length(RECORD_MAX)?;
            if !r.rest().is_empty() || bulk.len() < length + padding(length) {
                return Err(XdrError::Truncated);
            }
            bulk.truncate(length);
            bulk
        }
    };
    // The two lengths say the same thing; where they differ the call is broken.
    if data.len() != count as usize {
        return Err(XdrError::TooLong);
    }
    data.truncate(TRANSFER_MAX as usize);
    Ok(judge(|| {
        // RFC 1813, 3.3.7: an offset and count that go beyond the largest file.
        offset.checked_add(count.into()).ok_or(NfsStatus::FileTooBig)?;
        Ok(Op::Write { handle: handle?, offset, stability, data })
    }))
}

fn decode_create(r: &mut Reader<'_>) -> Result<Plan, XdrError> {
    let (dir, bytes) = directory_name(r)?;
    let how = match r.u32()? {
        0 => attributes(r)?.map(CreateHow::Unchecked),
        1 => attributes(r)?.map(CreateHow::Guarded),
        2 => Ok(CreateHow::Exclusive(r.u64()?)),
        _ => return Err(XdrError::Discriminant),
    };
    Ok(judge(|| Ok(Op::Create { dir: dir?, name: changing_name(bytes, NfsStatus::Exists)?, how: how? })))
}

fn decode_make_node(r: &mut Reader<'_>) -> Result<Plan, XdrError> {
    let (dir, bytes) = directory_name(r)?;
    let device = |r: &mut Reader<'_>| Ok((attributes(r)?, (r.u32()?, r.u32()?)));
    let (kind, (set, rdev)) = match r.u32()? {
        3 => (Some(FileKind::BlockDevice), device(r)?),
        4 => (Some(FileKind::CharDevice), device(r)?),
        6 => (Some(FileKind::Socket), (attributes(r)?, (0, 0))),
        7 => (Some(FileKind::Fifo), (attributes(r)?, (0, 0))),
        // Regular file, directory, symbolic link: legal XDR, but not for this procedure.
        1 | 2 | 5 => (None, (Ok(SetAttr::default()), (0, 0))),
        _ => return Err(XdrError::Discriminant),
    };
    Ok(judge(|| {
        let (dir, name) = (dir?, changing_name(bytes, NfsStatus::Exists)?);
        Ok(Op::MakeNode { dir, name, kind: kind.ok_or(NfsStatus::BadType)?, rdev, set: set? })
    }))
}

#[cfg(test)]
mod tests;
