//! Who may do what: POSIX permission bits, checked in the same attempt as the operation.
//!
//! User 0 may do everything. The owner of a regular file may read and write it whatever its mode says: a client checks at
//! open, a server at each access, and a file opened for writing and then made read-only must stay writable to its opener.
use crate::inode::Inode;
use fabric::fs::{Credential, FileKind, Status, access};

/// Read data or list.
pub(crate) const READ: u32 = 4;
/// Write data or change entries.
pub(crate) const WRITE: u32 = 2;
/// Execute or look up.
pub(crate) const SEARCH: u32 = 1;

pub(crate) const SET_UID: u32 = 0o4000;
pub(crate) const SET_GID: u32 = 0o2000;
pub(crate) const STICKY: u32 = 0o1000;
const GROUP_EXECUTE: u32 = 0o010;

pub(crate) fn in_group(who: &Credential, gid: u32) -> bool {
    who.gid == gid || who.groups.contains(&gid)
}

/// The rwx bits that hold for `who`.
pub(crate) fn granted(who: &Credential, inode: &Inode) -> u32 {
    if who.uid == 0 {
        let executable = inode.is_dir() || inode.mode & 0o111 != 0;
        READ | WRITE | if executable { SEARCH } else { 0 }
    } else if who.uid == inode.uid {
        inode.mode >> 6 & 7
    } else if in_group(who, inode.gid) {
        inode.mode >> 3 & 7
    } else {
        inode.mode & 7
    }
}

pub(crate) fn require(who: &Credential, inode: &Inode, bits: u32) -> Result<(), Status> {
    if granted(who, inode) & bits == bits { Ok(()) } else { Err(Status::Access) }
}

pub(crate) fn is_owner(who: &Credential, inode: &Inode) -> bool {
    who.uid == 0 || who.uid == inode.uid
}

pub(crate) fn require_read(who: &Credential, inode: &Inode) -> Result<(), Status> {
    // What can be executed has to be read for it.
    let bits = granted(who, inode);
    if is_owner(who, inode) || bits & (READ | SEARCH) != 0 { Ok(()) } else { Err(Status::Access) }
}

pub(crate) fn require_write(who: &Credential, inode: &Inode) -> Result<(), Status> {
    if is_owner(who, inode) { Ok(()) } else { require(who, inode, WRITE) }
}

/// Whether an entry for `inode` may be taken out of `dir`.
pub(crate) fn require_unlink(who: &Credential, dir: &Inode, inode: &Inode) -> Result<(), Status> {
    require(who, dir, WRITE | SEARCH)?;
    if dir.mode & STICKY != 0 && !is_owner(who, dir) && !is_owner(who, inode) {
        return Err(Status::NotPermitted);
    }
    Ok(())
}

/// The mode of a file after a write by `who`: set-uid and set-gid go unless that is user 0.
pub(crate) fn mode_after_write(who: &Credential, mode: u32) -> u32 {
    if who.uid == 0 { mode } else { mode_without_set_id(mode) }
}

/// Without set-uid; without set-gid if that means an executable's group (else it is a mark for mandatory locks).
pub(crate) fn mode_without_set_id(mode: u32) -> u32 {
    let keep = if mode & GROUP_EXECUTE != 0 { SET_UID | SET_GID } else { SET_UID };
    mode & !keep
}

pub(crate) fn access_bits(who: &Credential, inode: &Inode, want: u32) -> u32 {
    let bits = granted(who, inode);
    let dir = inode.is_dir();
    let mut can = 0;
    if bits & READ != 0 {
        can |= access::READ;
    }
    if bits & WRITE != 0 {
        can |= access::MODIFY | access::EXTEND | if dir { access::DELETE } else { 0 };
    }
    if bits & SEARCH != 0 {
        can |= if dir { access::LOOKUP } else { access::EXECUTE };
    }
    if matches!(inode.kind, crate::inode::Kind::File(FileKind::Symlink)) {
        can |= access::READ;
    }
    can & want
}
