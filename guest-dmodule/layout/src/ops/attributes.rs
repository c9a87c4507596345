//! Attributes of files and of the volume.
use crate::block::BLOCK_SIZE;
use crate::fsinfo::FIRST_BLOCK;
use crate::inode::{FILE_SIZE_MAX, FIRST_INODE, ROOT};
use crate::inode_map::ORPHANS_RESERVED;
use crate::permission::{
    SET_GID, WRITE, access_bits, in_group, is_owner, mode_after_write, mode_without_set_id, require, require_write,
};
use crate::txn::{Res, Stop, Txn};
use fabric::fs::{Credential, FileHandle, SetAttr, SetTime, Status, Time, VolumeStat};
use fabric::op::Reply;

impl Txn<'_> {
    pub(super) fn open_volume(&mut self, name: &str) -> Res<Reply> {
        if name != self.fs.info.name {
            return Err(Stop::Fail(Status::NoVolume));
        }
        let attr = self.attr(ROOT)?;
        Ok(Reply::Node { attr, dir: attr })
    }

    pub(super) fn access(&mut self, who: &Credential, handle: &FileHandle, want: u32) -> Res<Reply> {
        let number = self.resolve(handle)?;
        let granted = access_bits(who, &self.inode(number)?, want);
        Ok(Reply::Access { granted, attr: self.attr(number)? })
    }

    pub(super) fn volume_stat(&mut self, handle: &FileHandle) -> Res<Reply> {
        let number = self.resolve(handle)?;
        let attr = self.attr(number)?;
        let files = self.fs.info.inodes_max - FIRST_INODE - ORPHANS_RESERVED;
        let stat = VolumeStat {
            total_bytes: (self.fs.info.blocks - FIRST_BLOCK) * BLOCK_SIZE as u64,
            free_bytes: self.fs.available() * BLOCK_SIZE as u64,
            total_files: files,
            free_files: files.saturating_sub(self.counters.inodes_used),
        };
        Ok(Reply::Stat { stat, attr })
    }

    pub(super) fn set_attr(
        &mut self,
        who: &Credential,
        handle: &FileHandle,
        set: &SetAttr,
        guard: Option<Time>,
    ) -> Res<Reply> {
        let number = self.resolve(handle)?;
        let before = self.before(number)?;
        if guard.is_some_and(|guard| guard != before.2) {
            return Err(Stop::Fail(Status::NotSync));
        }
        self.apply(who, number, set)?;
        Ok(Reply::Wcc(self.wcc(number, before)?))
    }

    /// Sets attributes of an existing object.
    pub(super) fn apply(&mut self, who: &Credential, number: u64, set: &SetAttr) -> Res<()> {
        let inode = self.inode(number)?;
        let owner = is_owner(who, &inode);
        let new_uid = set.uid.filter(|uid| *uid != inode.uid);
        let new_gid = set.gid.filter(|gid| *gid != inode.gid);
        let allowed = (set.mode.is_none() || owner)
            && (new_uid.is_none() || who.uid == 0)
            && new_gid.is_none_or(|gid| who.uid == 0 || (owner && in_group(who, gid)))
            && (owner || ![set.atime, set.mtime].iter().any(|time| matches!(time, SetTime::To(_))));
        if !allowed {
            return Err(Stop::Fail(Status::NotPermitted));
        }
        if !owner && (set.atime == SetTime::ServerNow || set.mtime == SetTime::ServerNow) {
            require(who, &inode, WRITE)?;
        }
        if let Some(size) = set.size {
            self.change_size(who, number, size)?;
        }
        let now = self.now;
        let changed = self.inode_mut(number)?;
        if let Some(mode) = set.mode {
            let foreign = who.uid != 0 && !in_group(who, new_gid.unwrap_or(inode.gid)) && !inode.is_dir();
            changed.mode = mode & if foreign { 0o7777 & !SET_GID } else { 0o7777 };
        } else if (set.uid.is_some() || set.gid.is_some()) && !inode.is_dir() {
            changed.mode = mode_without_set_id(changed.mode);
        }
        changed.uid = new_uid.unwrap_or(changed.uid);
        changed.gid = new_gid.unwrap_or(changed.gid);
        changed.atime = time(set.atime, changed.atime, now);
        changed.mtime = time(set.mtime, changed.mtime, now);
        self.stamp(number)?;
        Ok(())
    }

    fn change_size(&mut self, who: &Credential, number: u64, size: u64) -> Res<()> {
        let inode = self.inode(number)?;
        if inode.is_dir() {
            return Err(Stop::Fail(Status::IsDirectory));
        }
        if !inode.is_regular() {
            return Err(Stop::Fail(Status::Invalid));
        }
        require_write(who, &inode)?;
        if size > FILE_SIZE_MAX {
            return Err(Stop::Fail(Status::TooLarge));
        }
        self.set_size(number, size)?;
        let now = self.now;
        let changed = self.inode_mut(number)?;
        changed.mtime = now;
        changed.mode = mode_after_write(who, changed.mode);
        Ok(())
    }
}

fn time(set: SetTime, old: Time, now: Time) -> Time {
    match set {
        SetTime::Keep => old,
        SetTime::ServerNow => now,
        SetTime::To(time) => time,
    }
}
