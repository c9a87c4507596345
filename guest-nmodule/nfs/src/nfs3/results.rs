//! Results of NFSv3 procedures: from a primitive's outcome to XDR.
//!
//! Always true: attributes go into a reply wherever the outcome has them, successful or not; the limits a client set on
//! a listing are never exceeded.
use super::arguments::Limits;
use super::{COOKIE_VERIFIER, DIRECTORY_MAX, NfsStatus, Procedure, TRANSFER_MAX};
use crate::handle::{self, HANDLE_SIZE};
use crate::xdr::{Writer, padding};
use alloc::vec::Vec;
use fabric::fs::{Attr, DirEntry, FileHandle, FileKind, NAME_MAX, Time, Wcc};
use fabric::op::{Outcome, Reply};

/// Bytes of post_op_attr with attributes.
const POST_OP_ATTR: usize = 88;
/// FSF3_LINK, FSF3_SYMLINK, FSF3_HOMOGENEOUS, FSF3_CANSETTIME (RFC 1813, 3.3.19).
const PROPERTIES: u32 = 0x01 | 0x02 | 0x08 | 0x10;
/// Preferred multiple of a transfer: the block of the data layout.
const TRANSFER_MULTIPLE: u32 = 4096;

/// What a volume can hold, for FSINFO and PATHCONF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Largest file in bytes.
    pub file_size_max: u64,
    /// Most hard links of a file.
    pub links_max: u32,
}

/// Writes the results of a procedure, beginning with the status; returns bulk data that follow (unpadded).
pub fn encode(
    procedure: Procedure,
    limits: Limits,
    capacity: &Capacity,
    outcome: Result<Outcome, NfsStatus>,
    out: &mut Writer,
) -> Vec<u8> {
    let status = match outcome {
        Ok(Ok(reply)) => match encode_success(procedure, limits, capacity, reply, out) {
            Ok(bulk) => return bulk,
            Err(failure) => failure,
        },
        Ok(Err(failure)) => (NfsStatus::of(procedure, failure.status), failure.wcc, failure.wcc2),
        Err(status) => bare(status),
    };
    encode_failure(procedure, status, out);
    Vec::new()
}

type Refusal = (NfsStatus, Wcc, Wcc);

fn bare(status: NfsStatus) -> Refusal {
    (status, Wcc::default(), Wcc::default())
}

fn encode_failure(procedure: Procedure, (status, wcc, wcc2): Refusal, out: &mut Writer) {
    use Procedure::*;
    out.u32(status as u32);
    match procedure {
        Null | GetAttr => {}
        Lookup | Access | ReadLink | Read | ReadDir | ReadDirPlus | FsStat | FsInfo | PathConf => {
            post_op_attr(out, wcc.after.as_ref());
        }
        SetAttr | Write | Create | MakeDir | Symlink | MakeNode | Remove | RemoveDir | Commit => wcc_data(out, &wcc),
        Rename => {
            wcc_data(out, &wcc);
            wcc_data(out, &wcc2);
        }
        Link => {
            post_op_attr(out, None);
            wcc_data(out, &wcc);
        }
    }
}

/// Writes status OK and the results, or writes nothing and says what is wrong.
fn encode_success(
    procedure: Procedure,
    limits: Limits,
    capacity: &Capacity,
    reply: Reply,
    out: &mut Writer,
) -> Result<Vec<u8>, Refusal> {
    let ok = NfsStatus::Ok as u32;
    match (procedure, reply) {
        (Procedure::GetAttr, Reply::Attr(attr)) => {
            out.u32(ok);
            fattr3(out, &attr);
        }
        (Procedure::SetAttr | Procedure::Remove | Procedure::RemoveDir, Reply::Wcc(wcc)) => {
            out.u32(ok);
            wcc_data(out, &wcc);
        }
        (Procedure::Lookup, Reply::Node { attr, dir }) => {
            out.u32(ok).opaque(&handle::encode(attr.handle));
            post_op_attr(out, Some(&attr));
            post_op_attr(out, Some(&dir));
        }
        (Procedure::Access, Reply::Access { granted, attr }) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.u32(granted);
        }
        (Procedure::ReadLink, Reply::Target { target, attr }) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.opaque(&target);
        }
        (Procedure::Read, Reply::Data { data, eof, attr }) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.u32(data.len() as u32).bool(eof).u32(data.len() as u32);
            return Ok(data);
        }
        (Procedure::Write, Reply::Written { count, stability, verifier, wcc }) => {
            out.u32(ok);
            wcc_data(out, &wcc);
            out.u32(count).u32(stability as u32).u64(verifier);
        }
        (
            Procedure::Create | Procedure::MakeDir | Procedure::Symlink | Procedure::MakeNode,
            Reply::Created { attr, dir },
        ) => {
            out.u32(ok);
            post_op_handle(out, attr.handle);
            post_op_attr(out, Some(&attr));
            wcc_data(out, &dir);
        }
        (Procedure::Rename, Reply::Wcc2(from, to)) => {
            out.u32(ok);
            wcc_data(out, &from);
            wcc_data(out, &to);
        }
        (Procedure::Link, Reply::Linked { attr, dir }) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            wcc_data(out, &dir);
        }
        (Procedure::ReadDir | Procedure::ReadDirPlus, Reply::Entries { entries, eof, dir }) => {
            listing(out, limits, &entries, eof, &dir)
                .map_err(|status| (status, Wcc { before: None, after: Some(dir) }, Wcc::default()))?;
        }
        (Procedure::FsStat, Reply::Stat { stat, attr }) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.u64(stat.total_bytes).u64(stat.free_bytes).u64(stat.free_bytes);
            out.u64(stat.total_files).u64(stat.free_files).u64(stat.free_files);
            // invarsec: may change at any time.
            out.u32(0);
        }
        (Procedure::FsInfo, Reply::Attr(attr)) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.u32(TRANSFER_MAX).u32(TRANSFER_MAX).u32(TRANSFER_MULTIPLE);
            out.u32(TRANSFER_MAX).u32(TRANSFER_MAX).u32(TRANSFER_MULTIPLE);
            out.u32(DIRECTORY_MAX).u64(capacity.file_size_max);
            // time_delta: times are kept to the nanosecond.
            out.u32(0).u32(1).u32(PROPERTIES);
        }
        (Procedure::PathConf, Reply::Attr(attr)) => {
            out.u32(ok);
            post_op_attr(out, Some(&attr));
            out.u32(capacity.links_max).u32(NAME_MAX as u32);
            // no_trunc, chown_restricted, case_insensitive, case_preserving.
            out.bool(true).bool(true).bool(false).bool(true);
        }
        (Procedure::Commit, Reply::Committed { verifier, wcc }) => {
            out.u32(ok);
            wcc_data(out, &wcc);
            out.u64(verifier);
        }
        // The file service answered another question.
        _ => return Err(bare(NfsStatus::ServerFault)),
    }
    Ok(Vec::new())
}

/// READDIR3resok or READDIRPLUS3resok, with as many entries as the limits allow.
fn listing(out: &mut Writer, limits: Limits, entries: &[DirEntry], eof: bool, dir: &Attr) -> Result<(), NfsStatus> {
    let (plus, mut dir_left, max) = match limits {
        Limits::ReadDir { count } => (false, usize::MAX, count as usize),
        Limits::ReadDirPlus { dircount, maxcount } => (true, dircount as usize, maxcount as usize),
        Limits::None => return Err(NfsStatus::ServerFault),
    };
    // Directory attributes, verifier, end of list, eof.
    let mut left = max.checked_sub(POST_OP_ATTR + 8 + 4 + 4).ok_or(NfsStatus::TooSmall)?;
    let mut fitting = 0;
    for entry in entries {
        let base = 4 + 8 + 4 + entry.name.len() + padding(entry.name.len()) + 8;
        let full = match (plus, &entry.attr) {
            (false, _) => base,
            (true, None) => base + 4 + 4,
            (true, Some(_)) => base + POST_OP_ATTR + 4 + 4 + HANDLE_SIZE,
        };
        let (Some(after), Some(dir_after)) = (left.checked_sub(full), dir_left.checked_sub(base)) else { break };
        (left, dir_left) = (after, dir_after);
        fitting += 1;
    }
    if fitting == 0 && !entries.is_empty() {
        return Err(NfsStatus::TooSmall);
    }
    out.u32(NfsStatus::Ok as u32);
    post_op_attr(out, Some(dir));
    out.raw(&COOKIE_VERIFIER);
    for entry in &entries[..fitting] {
        out.bool(true).u64(entry.inode).opaque(&entry.name).u64(entry.cookie);
        if plus {
            post_op_attr(out, entry.attr.as_ref());
            match &entry.attr {
                Some(attr) => post_op_handle(out, attr.handle),
                None => {
                    out.bool(false);
                }
            }
        }
    }
    out.bool(false).bool(eof && fitting == entries.len());
    Ok(())
}

fn post_op_handle(out: &mut Writer, handle: FileHandle) {
    out.bool(true).opaque(&handle::encode(handle));
}

fn post_op_attr(out: &mut Writer, attr: Option<&Attr>) {
    out.bool(attr.is_some());
    if let Some(attr) = attr {
        fattr3(out, attr);
    }
}

fn wcc_data(out: &mut Writer, wcc: &Wcc) {
    out.bool(wcc.before.is_some());
    if let Some((size, mtime, ctime)) = wcc.before {
        out.u64(size);
        nfstime3(out, mtime);
        nfstime3(out, ctime);
    }
    post_op_attr(out, wcc.after.as_ref());
}

fn fattr3(out: &mut Writer, attr: &Attr) {
    let kind = match attr.kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::BlockDevice => 3,
        FileKind::CharDevice => 4,
        FileKind::Symlink => 5,
        FileKind::Socket => 6,
        FileKind::Fifo => 7,
    };
    out.u32(kind).u32(attr.mode).u32(attr.links).u32(attr.uid).u32(attr.gid);
    out.u64(attr.size).u64(attr.used).u32(attr.rdev.0).u32(attr.rdev.1);
    out.u64(attr.handle.volume.0.into()).u64(attr.handle.inode);
    nfstime3(out, attr.atime);
    nfstime3(out, attr.mtime);
    nfstime3(out, attr.ctime);
}

/// Unsigned seconds reach from 1970 to 2106; times beyond are shown as the nearest.
fn nfstime3(out: &mut Writer, time: Time) {
    const SECOND: i64 = 1_000_000_000;
    match u32::try_from(time.0.div_euclid(SECOND)) {
        Ok(seconds) => out.u32(seconds).u32(time.0.rem_euclid(SECOND) as u32),
        Err(_) if time.0 < 0 => out.u32(0).u32(0),
        Err(_) => out.u32(u32::MAX).u32(SECOND as u32 - 1),
    };
}

#[cfg(test)]
mod tests;
