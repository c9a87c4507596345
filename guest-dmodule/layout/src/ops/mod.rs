//! Operations: [`fabric::op::Op`] carried out in one attempt.
mod attributes;
mod data;
mod links;
mod listing;
mod names;

use crate::block::BLOCK_SIZE;
use crate::block::BlockPointer;
use crate::consistency::CpNumber;
use crate::fs::{FileSystem, KeepKey};
use crate::inode::{FIRST_INODE, Inode, Kind};
use crate::space::Urgency;
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::fs::{Attr, Credential, FileHandle, NAME_MAX, Status, Time, Wcc};
use fabric::op::{Op, Reply, Request};

/// Most hard links of a file.
pub const LINKS_MAX: u32 = 65_000;

impl FileSystem {
    pub(crate) fn try_execute(
        &mut self,
        request: &Request,
        now: Time,
        keep: Option<KeepKey>,
    ) -> Result<(Reply, CpNumber), (Stop, Vec<BlockPointer>)> {
        let mut txn = Txn::new(self, now);
        let attempt = txn.perform(request).and_then(|reply| {
            if let Some(key) = keep {
                txn.keep_reply(key, &reply)?;
            }
            txn.commit()?;
            Ok(reply)
        });
        match attempt {
            Ok(reply) => {
                let durable_at = self.reply_after(&request.op);
                Ok((reply, durable_at))
            }
            Err(stop) => {
                let need = core::mem::take(&mut txn.need);
                Err((stop, need))
            }
        }
    }

    fn reply_after(&self, op: &Op) -> CpNumber {
        if !op.is_stable() {
            return CpNumber(0);
        }
        self.stable_at()
    }
}

impl Txn<'_> {
    fn perform(&mut self, request: &Request) -> Res<Reply> {
        let who = &request.credential;
        if matches!(request.op, Op::Remove { .. } | Op::RemoveDir { .. } | Op::SetAttr { .. }) {
            self.urgency = Urgency::Releases;
        }
        match &request.op {
            Op::OpenVolume { name } => self.open_volume(name),
            Op::GetAttr { handle } => {
                let number = self.resolve(handle)?;
                Ok(Reply::Attr(self.attr(number)?))
            }
            Op::SetAttr { handle, set, guard } => self.set_attr(who, handle, set, *guard),
            Op::Lookup { dir, name } => self.lookup(who, dir, name),
            Op::Access { handle, want } => self.access(who, handle, *want),
            Op::ReadLink { handle } => self.read_link(handle),
            Op::Read { handle, offset, length } => self.read(who, handle, *offset, *length),
            Op::Write { handle, offset, stability, data } => self.write(who, handle, *offset, *stability, data),
            Op::Create { dir, name, how } => self.create(who, dir, name, how),
            Op::MakeDir { dir, name, set } => self.make_dir(who, dir, name, set),
            Op::Symlink { dir, name, target, set } => self.symlink(who, dir, name, target, set),
            Op::MakeNode { dir, name, kind, rdev, set } => self.make_node(who, dir, name, *kind, *rdev, set),
            Op::Remove { dir, name } => self.remove(who, dir, name),
            Op::RemoveDir { dir, name } => self.remove_dir(who, dir, name),
            Op::Rename { from_dir, from_name, to_dir, to_name } => {
                self.rename(who, (from_dir, from_name), (to_dir, to_name))
            }
            Op::Link { handle, dir, name } => self.link(who, handle, dir, name),
            Op::ReadDir { dir, cookie, max_entries, max_bytes, plus } => {
                self.read_dir(who, dir, *cookie, *max_entries, *max_bytes, *plus)
            }
            Op::VolumeStat { handle } => self.volume_stat(handle),
            Op::Commit { handle, .. } => {
                let number = self.resolve(handle)?;
                if !self.inode(number)?.is_regular() {
                    return Err(Stop::Fail(Status::Invalid));
                }
                let wcc = self.wcc_unchanged(number)?;
                Ok(Reply::Committed { verifier: self.fs.verifier, wcc })
            }
        }
    }

    /// The inode a handle means.
    pub fn resolve(&mut self, handle: &FileHandle) -> Res<u64> {
        if handle.volume != self.fs.info.volume {
            return Err(Stop::Fail(Status::NoVolume));
        }
        if handle.inode < FIRST_INODE || handle.inode >= self.fs.info.inodes_max {
            return Err(Stop::Fail(Status::Stale));
        }
        let inode = self.inode(handle.inode)?;
        if !matches!(inode.kind, Kind::File(_)) || inode.generation != handle.generation {
            return Err(Stop::Fail(Status::Stale));
        }
        Ok(handle.inode)
    }

    pub fn resolve_dir(&mut self, handle: &FileHandle) -> Res<u64> {
        let number = self.resolve(handle)?;
        if self.inode(number)?.is_dir() { Ok(number) } else { Err(Stop::Fail(Status::NotDirectory)) }
    }

    pub fn attr(&mut self, number: u64) -> Res<Attr> {
        let inode = self.inode(number)?;
        let Kind::File(kind) = inode.kind else {
            return Err(self.corrupt("inode of an entry", number));
        };
        Ok(Attr {
            handle: FileHandle { volume: self.fs.info.volume, generation: inode.generation, inode: number },
            kind,
            mode: inode.mode,
            links: inode.links,
            uid: inode.uid,
            gid: inode.gid,
            size: inode.size,
            used: inode.used.saturating_mul(BLOCK_SIZE as u64),
            rdev: inode.rdev,
            atime: inode.atime,
            mtime: inode.mtime,
            ctime: inode.ctime,
        })
    }

    /// What a Wcc says of the time before.
    fn before(&mut self, number: u64) -> Res<(u64, Time, Time)> {
        let inode = self.inode(number)?;
        Ok((inode.size, inode.mtime, inode.ctime))
    }

    fn wcc(&mut self, number: u64, before: (u64, Time, Time)) -> Res<Wcc> {
        Ok(Wcc { before: Some(before), after: Some(self.attr(number)?) })
    }

    fn wcc_unchanged(&mut self, number: u64) -> Res<Wcc> {
        let before = self.before(number)?;
        self.wcc(number, before)
    }

    /// The file's attributes have changed. ctime strictly grows.
    pub fn stamp(&mut self, number: u64) -> Res<Time> {
        let now = self.now;
        let inode = self.inode_mut(number)?;
        inode.ctime = now.max(Time(inode.ctime.0.saturating_add(1)));
        Ok(inode.ctime)
    }

    /// The file's content has changed.
    pub fn stamp_content(&mut self, number: u64) -> Res<()> {
        let now = self.now;
        self.inode_mut(number)?.mtime = now;
        self.stamp(number)?;
        Ok(())
    }

    /// Attributes for a refusal, where the blocks are in memory.
    pub fn failure_attributes(&mut self, op: &Op) -> (Wcc, Wcc) {
        let (first, second) = match op {
            Op::OpenVolume { .. } => (None, None),
            Op::GetAttr { handle }
            | Op::SetAttr { handle, .. }
            | Op::Access { handle, .. }
            | Op::ReadLink { handle }
            | Op::Read { handle, .. }
            | Op::Write { handle, .. }
            | Op::VolumeStat { handle }
            | Op::Commit { handle, .. } => (Some(handle), None),
            Op::Lookup { dir, .. }
            | Op::Create { dir, .. }
            | Op::MakeDir { dir, .. }
            | Op::Symlink { dir, .. }
            | Op::MakeNode { dir, .. }
            | Op::Remove { dir, .. }
            | Op::RemoveDir { dir, .. }
            | Op::Link { dir, .. }
            | Op::ReadDir { dir, .. } => (Some(dir), None),
            Op::Rename { from_dir, to_dir, .. } => (Some(from_dir), Some(to_dir)),
        };
        let mut around = |handle: Option<&FileHandle>| {
            let number = handle.and_then(|handle| self.resolve(handle).ok());
            number.and_then(|number| self.wcc_unchanged(number).ok()).unwrap_or_default()
        };
        (around(first), around(second))
    }
}

/// Whether a name can be created, renamed or removed.
pub(crate) fn check_name(name: &[u8]) -> Result<(), Status> {
    if name.len() > NAME_MAX {
        Err(Status::NameTooLong)
    } else if name.is_empty() || name.contains(&0) || name.contains(&b'/') {
        Err(Status::Invalid)
    } else {
        Ok(())
    }
}

/// Whether a name is `.` or `..`.
pub(crate) fn is_dots(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

/// Group of a new object: the directory's if that has set-gid, else the creator's.
pub(crate) fn group_for(who: &Credential, dir: &Inode) -> u32 {
    if dir.mode & crate::permission::SET_GID != 0 { dir.gid } else { who.gid }
}
