//! Finding and creating names.
use super::{check_name, group_for, is_dots};
use crate::directory::Found;
use crate::inode::{FILE_SIZE_MAX, Kind};
use crate::permission::{SEARCH, SET_GID, WRITE, in_group, require};
use crate::txn::{Res, Stop, Txn};
use fabric::fs::{CreateHow, Credential, FileHandle, FileKind, SYMLINK_MAX, SetAttr, SetTime, Status, Time};
use fabric::op::Reply;

impl Txn<'_> {
    /// The file an entry leads to; checks that the two agree.
    pub(super) fn follow(&mut self, found: Found) -> Res<u64> {
        if found.inode < crate::inode::FIRST_INODE {
            return Err(self.corrupt("entry leading to inode", found.inode));
        }
        let inode = self.inode(found.inode)?;
        match inode.kind {
            Kind::File(kind) if kind as u8 == found.kind => Ok(found.inode),
            _ => Err(self.corrupt("entry leading to inode", found.inode)),
        }
    }

    pub(super) fn lookup(&mut self, who: &Credential, dir: &FileHandle, name: &[u8]) -> Res<Reply> {
        let dir = self.resolve_dir(dir)?;
        let held = self.inode(dir)?;
        require(who, &held, SEARCH)?;
        let number = if name == b"." {
            dir
        } else if name == b".." {
            held.parent
        } else {
            check_name(name)?;
            let found = self.find(dir, name)?.ok_or(Status::NotFound)?;
            self.follow(found)?
        };
        Ok(Reply::Node { attr: self.attr(number)?, dir: self.attr(dir)? })
    }

    /// Checks that `name` can be created in `dir`; the directory's number.
    fn creatable(&mut self, who: &Credential, dir: &FileHandle, name: &[u8]) -> Res<u64> {
        let dir = self.resolve_dir(dir)?;
        check_name(name)?;
        if is_dots(name) {
            return Err(Stop::Fail(Status::Exists));
        }
        let held = self.inode(dir)?;
        require(who, &held, SEARCH)?;
        if self.find(dir, name)?.is_some() {
            return Err(Stop::Fail(Status::Exists));
        }
        require(who, &held, WRITE)?;
        Ok(dir)
    }

    /// A new object with a name in `dir`, which must have been checked.
    fn new_object(
        &mut self,
        who: &Credential,
        dir: u64,
        name: &[u8],
        kind: FileKind,
        mode: u32,
        set: &SetAttr,
    ) -> Res<u64> {
        let parent = self.inode(dir)?;
        let number = self.take_inode(Kind::File(kind))?;
        let now = self.now;
        let mut gid = group_for(who, &parent);
        let mut mode = set.mode.unwrap_or(mode) & 0o7777;
        // Only what the creator could also set afterwards; the rest is passed over, as clients expect.
        let uid = set.uid.filter(|_| who.uid == 0).unwrap_or(who.uid);
        if let Some(wanted) = set.gid
            && (who.uid == 0 || in_group(who, wanted))
        {
            gid = wanted;
        }
        if kind == FileKind::Directory {
            mode |= parent.mode & SET_GID;
        } else if who.uid != 0 && !in_group(who, gid) {
            mode &= !SET_GID;
        }
        let inode = self.inode_mut(number)?;
        (inode.mode, inode.uid, inode.gid, inode.links) = (mode, uid, gid, 1);
        (inode.atime, inode.mtime, inode.ctime) = (time(set.atime, now), time(set.mtime, now), now);
        if kind == FileKind::Directory {
            (inode.links, inode.parent) = (2, dir);
            self.link_to(dir)?;
        }
        self.add_entry(dir, name, number, kind as u8)?;
        self.stamp_content(dir)?;
        Ok(number)
    }

    /// One link more to an inode.
    pub(super) fn link_to(&mut self, number: u64) -> Res<()> {
        let inode = self.inode_mut(number)?;
        if inode.links >= super::LINKS_MAX {
            return Err(Stop::Fail(Status::TooManyLinks));
        }
        inode.links += 1;
        Ok(())
    }

    fn created(&mut self, number: u64, dir: u64, before: (u64, Time, Time)) -> Res<Reply> {
        Ok(Reply::Created { attr: self.attr(number)?, dir: self.wcc(dir, before)? })
    }

    pub(super) fn create(&mut self, who: &Credential, dir: &FileHandle, name: &[u8], how: &CreateHow) -> Res<Reply> {
        let number = self.resolve_dir(dir)?;
        check_name(name)?;
        if is_dots(name) {
            return Err(Stop::Fail(Status::Exists));
        }
        let held = self.inode(number)?;
        require(who, &held, SEARCH)?;
        let before = self.before(number)?;
        if let Some(found) = self.find(number, name)? {
            let file = self.follow(found)?;
            let inode = self.inode(file)?;
            match how {
                CreateHow::Unchecked(set) if inode.is_regular() => {
                    if set.size.is_some() {
                        self.apply(who, file, &SetAttr { size: set.size, ..SetAttr::default() })?;
                    }
                }
                CreateHow::Exclusive(verifier) if inode.is_regular() && inode.verifier == *verifier => {}
                _ => return Err(Stop::Fail(Status::Exists)),
            }
            return self.created(file, number, before);
        }
        require(who, &held, WRITE)?;
        let dir = number;
        let set = match how {
            CreateHow::Unchecked(set) | CreateHow::Guarded(set) => *set,
            CreateHow::Exclusive(_) => SetAttr::default(),
        };
        let file = self.new_object(who, dir, name, FileKind::Regular, 0o600, &set)?;
        if let CreateHow::Exclusive(verifier) = how {
            self.inode_mut(file)?.verifier = *verifier;
        }
        if let Some(size) = set.size {
            if size > FILE_SIZE_MAX {
                return Err(Stop::Fail(Status::TooLarge));
            }
            self.inode_mut(file)?.size = size;
        }
        self.created(file, dir, before)
    }

    pub(super) fn make_dir(&mut self, who: &Credential, dir: &FileHandle, name: &[u8], set: &SetAttr) -> Res<Reply> {
        let dir = self.creatable(who, dir, name)?;
        let before = self.before(dir)?;
        let made = self.new_object(who, dir, name, FileKind::Directory, 0o755, set)?;
        self.created(made, dir, before)
    }

    pub(super) fn symlink(
        &mut self,
        who: &Credential,
        dir: &FileHandle,
        name: &[u8],
        target: &[u8],
        set: &SetAttr,
    ) -> Res<Reply> {
        if target.len() > SYMLINK_MAX {
            return Err(Stop::Fail(Status::NameTooLong));
        }
        if target.is_empty() || target.contains(&0) {
            return Err(Stop::Fail(Status::Invalid));
        }
        let dir = self.creatable(who, dir, name)?;
        let before = self.before(dir)?;
        let set = SetAttr { mode: Some(0o777), ..*set };
        let link = self.new_object(who, dir, name, FileKind::Symlink, 0o777, &set)?;
        self.write_target(link, target)?;
        self.created(link, dir, before)
    }

    pub(super) fn make_node(
        &mut self,
        who: &Credential,
        dir: &FileHandle,
        name: &[u8],
        kind: FileKind,
        rdev: (u32, u32),
        set: &SetAttr,
    ) -> Res<Reply> {
        let device = matches!(kind, FileKind::BlockDevice | FileKind::CharDevice);
        if !device && !matches!(kind, FileKind::Fifo | FileKind::Socket) {
            return Err(Stop::Fail(Status::Invalid));
        }
        let dir = self.creatable(who, dir, name)?;
        if device && who.uid != 0 {
            return Err(Stop::Fail(Status::NotPermitted));
        }
        let before = self.before(dir)?;
        let node = self.new_object(who, dir, name, kind, 0o600, set)?;
        if device {
            self.inode_mut(node)?.rdev = rdev;
        }
        self.created(node, dir, before)
    }
}

fn time(set: SetTime, now: Time) -> Time {
    match set {
        SetTime::Keep | SetTime::ServerNow => now,
        SetTime::To(time) => time,
    }
}
