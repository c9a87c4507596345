//! Removing names, and giving files other ones.
use super::{check_name, is_dots};
use crate::directory::Found;
use crate::inode::{Inode, ROOT};
use crate::permission::{SEARCH, WRITE, require, require_unlink};
use crate::txn::{Res, Stop, Txn};
use fabric::fs::{Credential, FileHandle, FileKind, Status};
use fabric::op::Reply;

/// A name that is there: its directory, entry and inode.
struct Named {
    dir: u64,
    found: Found,
    number: u64,
    inode: Inode,
}

impl Txn<'_> {
    fn named(&mut self, who: &Credential, dir: u64, name: &[u8]) -> Res<Option<Named>> {
        let held = self.inode(dir)?;
        require(who, &held, SEARCH)?;
        let Some(found) = self.find(dir, name)? else { return Ok(None) };
        let number = self.follow(found)?;
        let inode = self.inode(number)?;
        Ok(Some(Named { dir, found, number, inode }))
    }

    /// An entry less leads to a file that is not a directory.
    fn unlink_file(&mut self, number: u64) -> Res<()> {
        let inode = self.inode_mut(number)?;
        inode.links = inode.links.saturating_sub(1);
        if inode.links == 0 {
            return self.discard(number);
        }
        self.stamp(number)?;
        Ok(())
    }

    /// The only entry of an empty directory is gone.
    fn unlink_dir(&mut self, parent: u64, number: u64) -> Res<()> {
        let held = self.inode_mut(parent)?;
        held.links = held.links.saturating_sub(1);
        self.discard(number)
    }

    /// An emptied directory gives its blocks back.
    fn shrink(&mut self, dir: u64) -> Res<()> {
        let inode = self.inode(dir)?;
        if inode.entries == 0 && inode.size > 0 {
            match self.cut(dir, 0) {
                // No inode for the orphan: the blocks stay with the directory. Nothing has been changed yet.
                Err(Stop::Fail(Status::NoSpace)) => return Ok(()),
                other => other?,
            }
            let changed = self.inode_mut(dir)?;
            (changed.size, changed.depth, changed.table, changed.spare) = (0, 0, 0, (0, 0));
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, who: &Credential, dir: &FileHandle, name: &[u8]) -> Res<Reply> {
        let dir = self.resolve_dir(dir)?;
        check_name(name)?;
        if is_dots(name) {
            return Err(Stop::Fail(Status::IsDirectory));
        }
        let named = self.named(who, dir, name)?.ok_or(Status::NotFound)?;
        require_unlink(who, &self.inode(dir)?, &named.inode)?;
        if named.inode.is_dir() {
            return Err(Stop::Fail(Status::IsDirectory));
        }
        let before = self.before(dir)?;
        self.remove_entry(dir, name, named.found)?;
        self.unlink_file(named.number)?;
        self.shrink(dir)?;
        self.stamp_content(dir)?;
        Ok(Reply::Wcc(self.wcc(dir, before)?))
    }

    pub(super) fn remove_dir(&mut self, who: &Credential, dir: &FileHandle, name: &[u8]) -> Res<Reply> {
        let dir = self.resolve_dir(dir)?;
        check_name(name)?;
        if is_dots(name) {
            return Err(Stop::Fail(if name == b"." { Status::Invalid } else { Status::NotEmpty }));
        }
        let named = self.named(who, dir, name)?.ok_or(Status::NotFound)?;
        require_unlink(who, &self.inode(dir)?, &named.inode)?;
        if !named.inode.is_dir() {
            return Err(Stop::Fail(Status::NotDirectory));
        }
        if named.inode.entries > 0 {
            return Err(Stop::Fail(Status::NotEmpty));
        }
        let before = self.before(dir)?;
        self.remove_entry(dir, name, named.found)?;
        self.unlink_dir(dir, named.number)?;
        self.shrink(dir)?;
        self.stamp_content(dir)?;
        Ok(Reply::Wcc(self.wcc(dir, before)?))
    }

    pub(super) fn link(&mut self, who: &Credential, handle: &FileHandle, dir: &FileHandle, name: &[u8]) -> Res<Reply> {
        let number = self.resolve(handle)?;
        let dir = self.resolve_dir(dir)?;
        check_name(name)?;
        let inode = self.inode(number)?;
        let held = self.inode(dir)?;
        require(who, &held, SEARCH)?;
        if is_dots(name) || self.find(dir, name)?.is_some() {
            return Err(Stop::Fail(Status::Exists));
        }
        require(who, &held, WRITE)?;
        if inode.is_dir() {
            return Err(Stop::Fail(Status::NotPermitted));
        }
        let before = self.before(dir)?;
        let crate::inode::Kind::File(kind) = inode.kind else { return Err(Stop::Fail(Status::Stale)) };
        self.link_to(number)?;
        self.stamp(number)?;
        self.add_entry(dir, name, number, kind as u8)?;
        self.stamp_content(dir)?;
        Ok(Reply::Linked { attr: self.attr(number)?, dir: self.wcc(dir, before)? })
    }

    pub(super) fn rename(
        &mut self,
        who: &Credential,
        (from_dir, from_name): (&FileHandle, &[u8]),
        (to_dir, to_name): (&FileHandle, &[u8]),
    ) -> Res<Reply> {
        let from_dir = self.resolve_dir(from_dir)?;
        let to_dir = self.resolve_dir(to_dir)?;
        check_name(from_name)?;
        check_name(to_name)?;
        if is_dots(from_name) || is_dots(to_name) {
            return Err(Stop::Fail(Status::Invalid));
        }
        let before = (self.before(from_dir)?, self.before(to_dir)?);
        let from = self.named(who, from_dir, from_name)?.ok_or(Status::NotFound)?;
        let to = self.named(who, to_dir, to_name)?;
        require_unlink(who, &self.inode(from_dir)?, &from.inode)?;
        match &to {
            Some(to) => require_unlink(who, &self.inode(to_dir)?, &to.inode)?,
            None => require(who, &self.inode(to_dir)?, WRITE | SEARCH)?,
        }
        // Two names of one file: nothing happens (POSIX).
        if to.as_ref().is_none_or(|to| to.number != from.number) {
            self.check_move(who, &from, to.as_ref(), to_dir)?;
            self.move_entry(&from, from_name, to, (to_dir, to_name))?;
        }
        Ok(Reply::Wcc2(self.wcc(from_dir, before.0)?, self.wcc(to_dir, before.1)?))
    }

    fn check_move(&mut self, who: &Credential, from: &Named, to: Option<&Named>, to_dir: u64) -> Res<()> {
        if let Some(to) = to {
            match (from.inode.is_dir(), to.inode.is_dir()) {
                (true, false) => return Err(Stop::Fail(Status::NotDirectory)),
                (false, true) => return Err(Stop::Fail(Status::IsDirectory)),
                (true, true) if to.inode.entries > 0 => return Err(Stop::Fail(Status::NotEmpty)),
                _ => {}
            }
        }
        if from.inode.is_dir() && from.dir != to_dir {
            if from.number == ROOT || self.is_below(to_dir, from.number)? {
                return Err(Stop::Fail(Status::Invalid));
            }
            // Its `..` changes.
            require(who, &from.inode, WRITE)?;
        }
        Ok(())
    }

    fn move_entry(
        &mut self,
        from: &Named,
        from_name: &[u8],
        to: Option<Named>,
        (to_dir, to_name): (u64, &[u8]),
    ) -> Res<()> {
        let crate::inode::Kind::File(kind) = from.inode.kind else { return Err(Stop::Fail(Status::Stale)) };
        match to {
            Some(to) => {
                self.redirect_entry(to_dir, to_name, to.found, from.number, kind as u8)?;
                if to.inode.is_dir() {
                    self.unlink_dir(to_dir, to.number)?;
                } else {
                    self.unlink_file(to.number)?;
                }
            }
            None => self.add_entry(to_dir, to_name, from.number, kind as u8)?,
        }
        self.remove_entry(from.dir, from_name, from.found)?;
        self.shrink(from.dir)?;
        if kind == FileKind::Directory && from.dir != to_dir {
            let old = self.inode_mut(from.dir)?;
            old.links = old.links.saturating_sub(1);
            self.link_to(to_dir)?;
            self.inode_mut(from.number)?.parent = to_dir;
        }
        self.stamp(from.number)?;
        self.stamp_content(from.dir)?;
        if from.dir != to_dir {
            self.stamp_content(to_dir)?;
        }
        Ok(())
    }
}
