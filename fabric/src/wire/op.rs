//! Operations and outcomes ([`crate::op`]) in bytes. The bulk data of Write and of a Read's reply is
//! not copied: it is taken out of the value and sent behind the head, and given back likewise.
use super::bytes::{Reader, Writer};
use super::value::DIR_ENTRY_LEAST;
use super::{ENTRIES_MAX, VOLUME_NAME_MAX, WireError};
use crate::fs::SYMLINK_MAX;
use crate::op::{Failure, Op, Outcome, Reply};
use alloc::{string::String, vec::Vec};

type Result<T> = core::result::Result<T, WireError>;

/// The code of an operation on the wire.
fn code(op: &Op) -> u16 {
    match op {
        Op::OpenVolume { .. } => 1,
        Op::GetAttr { .. } => 2,
        Op::SetAttr { .. } => 3,
        Op::Lookup { .. } => 4,
        Op::Access { .. } => 5,
        Op::ReadLink { .. } => 6,
        Op::Read { .. } => 7,
        Op::Write { .. } => 8,
        Op::Create { .. } => 9,
        Op::MakeDir { .. } => 10,
        Op::Symlink { .. } => 11,
        Op::MakeNode { .. } => 12,
        Op::Remove { .. } => 13,
        Op::RemoveDir { .. } => 14,
        Op::Rename { .. } => 15,
        Op::Link { .. } => 16,
        Op::ReadDir { .. } => 17,
        Op::VolumeStat { .. } => 18,
        Op::Commit { .. } => 19,
    }
}

/// Puts an operation; returns its bulk data.
pub(super) fn put_op(w: &mut Writer, op: Op) -> Vec<u8> {
    w.u16(code(&op));
    match op {
        Op::OpenVolume { name } => w.string(name.as_bytes(), VOLUME_NAME_MAX),
        Op::GetAttr { handle } | Op::ReadLink { handle } | Op::VolumeStat { handle } => w.handle(handle),
        Op::SetAttr { handle, set, guard } => {
            w.handle(handle);
            w.set_attr(&set);
            w.option(guard, Writer::time);
        }
        Op::Lookup { dir, name } | Op::Remove { dir, name } | Op::RemoveDir { dir, name } => {
            w.handle(dir);
            w.name(&name);
        }
        Op::Access { handle, want } => {
            w.handle(handle);
            w.u32(want);
        }
        Op::Read { handle, offset, length } => {
            w.handle(handle);
            w.u64(offset);
            w.u32(length);
        }
        Op::Write { handle, offset, stability, data } => {
            w.handle(handle);
            w.u64(offset);
            w.stability(stability);
            return w.data(data);
        }
        Op::Create { dir, name, how } => {
            w.handle(dir);
            w.name(&name);
            w.create_how(&how);
        }
        Op::MakeDir { dir, name, set } => {
            w.handle(dir);
            w.name(&name);
            w.set_attr(&set);
        }
        Op::Symlink { dir, name, target, set } => {
            w.handle(dir);
            w.name(&name);
            w.string(&target, SYMLINK_MAX);
            w.set_attr(&set);
        }
        Op::MakeNode { dir, name, kind, rdev, set } => {
            w.handle(dir);
            w.name(&name);
            w.kind(kind);
            w.rdev(rdev);
            w.set_attr(&set);
        }
        Op::Rename { from_dir, from_name, to_dir, to_name } => {
            w.handle(from_dir);
            w.name(&from_name);
            w.handle(to_dir);
            w.name(&to_name);
        }
        Op::Link { handle, dir, name } => {
            w.handle(handle);
            w.handle(dir);
            w.name(&name);
        }
        Op::ReadDir { dir, cookie, max_entries, max_bytes, plus } => {
            w.handle(dir);
            w.u64(cookie);
            w.u32(max_entries);
            w.u32(max_bytes);
            w.flag(plus);
        }
        Op::Commit { handle, offset, count } => {
            w.handle(handle);
            w.u64(offset);
            w.u32(count);
        }
    }
    Vec::new()
}

/// Gets an operation.
pub(super) fn get_op(r: &mut Reader<'_>) -> Result<Op> {
    Ok(match r.u16()? {
        1 => {
            let name =
                String::from_utf8(r.string(VOLUME_NAME_MAX)?).map_err(|_| WireError::Malformed("volume name"))?;
            Op::OpenVolume { name }
        }
        2 => Op::GetAttr { handle: r.handle()? },
        3 => Op::SetAttr { handle: r.handle()?, set: r.set_attr()?, guard: r.option(Reader::time)? },
        4 => Op::Lookup { dir: r.handle()?, name: r.name()? },
        5 => Op::Access { handle: r.handle()?, want: r.u32()? },
        6 => Op::ReadLink { handle: r.handle()? },
        7 => Op::Read { handle: r.handle()?, offset: r.u64()?, length: r.u32()? },
        8 => Op::Write { handle: r.handle()?, offset: r.u64()?, stability: r.stability()?, data: r.data() },
        9 => Op::Create { dir: r.handle()?, name: r.name()?, how: r.create_how()? },
        10 => Op::MakeDir { dir: r.handle()?, name: r.name()?, set: r.set_attr()? },
        11 => Op::Symlink { dir: r.handle()?, name: r.name()?, target: r.string(SYMLINK_MAX)?, set: r.set_attr()? },
        12 => {
            let (dir, name, kind) = (r.handle()?, r.name()?, r.kind()?);
            Op::MakeNode { dir, name, kind, rdev: r.rdev()?, set: r.set_attr()? }
        }
        13 => Op::Remove { dir: r.handle()?, name: r.name()? },
        14 => Op::RemoveDir { dir: r.handle()?, name: r.name()? },
        15 => {
            let (from_dir, from_name) = (r.handle()?, r.name()?);
            Op::Rename { from_dir, from_name, to_dir: r.handle()?, to_name: r.name()? }
        }
        16 => Op::Link { handle: r.handle()?, dir: r.handle()?, name: r.name()? },
        17 => {
            let (dir, cookie) = (r.handle()?, r.u64()?);
            Op::ReadDir { dir, cookie, max_entries: r.u32()?, max_bytes: r.u32()?, plus: r.flag()? }
        }
        18 => Op::VolumeStat { handle: r.handle()? },
        19 => Op::Commit { handle: r.handle()?, offset: r.u64()?, count: r.u32()? },
        _ => return Err(WireError::Malformed("operation")),
    })
}

/// Puts an outcome; returns its bulk data.
pub(super) fn put_outcome(w: &mut Writer, outcome: Outcome) -> Vec<u8> {
    let reply = match outcome {
        Ok(reply) => reply,
        Err(Failure { status, wcc, wcc2 }) => {
            w.u16(0);
            w.status(status);
            w.wcc(&wcc);
            w.wcc(&wcc2);
            return Vec::new();
        }
    };
    match reply {
        Reply::Attr(attr) => {
            w.u16(1);
            w.attr(&attr);
        }
        Reply::Node { attr, dir } => {
            w.u16(2);
            w.attr(&attr);
            w.attr(&dir);
        }
        Reply::Wcc(wcc) => {
            w.u16(3);
            w.wcc(&wcc);
        }
        Reply::Wcc2(from, to) => {
            w.u16(4);
            w.wcc(&from);
            w.wcc(&to);
        }
        Reply::Access { granted, attr } => {
            w.u16(5);
            w.u32(granted);
            w.attr(&attr);
        }
        Reply::Target { target, attr } => {
            w.u16(6);
            w.string(&target, SYMLINK_MAX);
            w.attr(&attr);
        }
        Reply::Data { data, eof, attr } => {
            w.u16(7);
            w.flag(eof);
            w.attr(&attr);
            return w.data(data);
        }
        Reply::Written { count, stability, verifier, wcc } => {
            w.u16(8);
            w.u32(count);
            w.stability(stability);
            w.u64(verifier);
            w.wcc(&wcc);
        }
        Reply::Created { attr, dir } => {
            w.u16(9);
            w.attr(&attr);
            w.wcc(&dir);
        }
        Reply::Linked { attr, dir } => {
            w.u16(10);
            w.attr(&attr);
            w.wcc(&dir);
        }
        Reply::Entries { entries, eof, dir } => {
            w.u16(11);
            w.flag(eof);
            w.attr(&dir);
            w.count(entries.len(), ENTRIES_MAX);
            entries.iter().for_each(|e| w.dir_entry(e));
        }
        Reply::Stat { stat, attr } => {
            w.u16(12);
            w.volume_stat(&stat);
            w.attr(&attr);
        }
        Reply::Committed { verifier, wcc } => {
            w.u16(13);
            w.u64(verifier);
            w.wcc(&wcc);
        }
    }
    Vec::new()
}

/// Gets an outcome.
pub(super) fn get_outcome(r: &mut Reader<'_>) -> Result<Outcome> {
    Ok(Ok(match r.u16()? {
        0 => return Ok(Err(Failure { status: r.status()?, wcc: r.wcc()?, wcc2: r.wcc()? })),
        1 => Reply::Attr(r.attr()?),
        2 => Reply::Node { attr: r.attr()?, dir: r.attr()? },
        3 => Reply::Wcc(r.wcc()?),
        4 => Reply::Wcc2(r.wcc()?, r.wcc()?),
        5 => Reply::Access { granted: r.u32()?, attr: r.attr()? },
        6 => Reply::Target { target: r.string(SYMLINK_MAX)?, attr: r.attr()? },
        7 => Reply::Data { eof: r.flag()?, attr: r.attr()?, data: r.data() },
        8 => Reply::Written { count: r.u32()?, stability: r.stability()?, verifier: r.u64()?, wcc: r.wcc()? },
        9 => Reply::Created { attr: r.attr()?, dir: r.wcc()? },
        10 => Reply::Linked { attr: r.attr()?, dir: r.wcc()? },
        11 => {
            let (eof, dir) = (r.flag()?, r.attr()?);
            let n = r.count(ENTRIES_MAX, DIR_ENTRY_LEAST)?;
            let entries = (0..n).map(|_| r.dir_entry()).collect::<Result<_>>()?;
            Reply::Entries { entries, eof, dir }
        }
        12 => Reply::Stat { stat: r.volume_stat()?, attr: r.attr()? },
        13 => Reply::Committed { verifier: r.u64()?, wcc: r.wcc()? },
        _ => return Err(WireError::Malformed("outcome")),
    }))
}
