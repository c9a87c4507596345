//! Listing directories.
use crate::directory::{DOT, DOT_DOT, FIRST_COOKIE};
use crate::inode::{INODE_FILE, INODES_PER_BLOCK};
use crate::permission::{READ, require};
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::fs::{Credential, DirEntry, FileHandle, Status};
use fabric::op::Reply;
use fabric::wire::{ENTRIES_MAX, ENTRY_BYTES_MAX};

impl Txn<'_> {
    pub(super) fn read_dir(
        &mut self,
        who: &Credential,
        dir: &FileHandle,
        cookie: u64,
        max_entries: u32,
        max_bytes: u32,
        plus: bool,
    ) -> Res<Reply> {
        let dir = self.resolve_dir(dir)?;
        let held = self.inode(dir)?;
        require(who, &held, READ)?;
        if (cookie > DOT_DOT && cookie < FIRST_COOKIE) || cookie >> 63 != 0 {
            return Err(Stop::Fail(Status::BadCookie));
        }
        let most = (max_entries as usize).clamp(1, ENTRIES_MAX);
        let mut room = (max_bytes as usize).min(ENTRY_BYTES_MAX);
        let mut entries: Vec<DirEntry> = Vec::new();
        let mut add = |cookie: u64, inode: u64, name: &[u8]| {
            if entries.len() >= most || name.len() > room {
                return false;
            }
            room -= name.len();
            entries.push(DirEntry { cookie, inode, name: name.to_vec(), attr: None });
            true
        };
        let dots = (cookie >= DOT || add(DOT, dir, b".")) && (cookie >= DOT_DOT || add(DOT_DOT, held.parent, b".."));
        let eof = dots && self.walk(dir, cookie.max(DOT_DOT), |entry| add(entry.cookie, entry.inode, entry.name))?;
        if entries.is_empty() && !eof {
            return Err(Stop::Fail(Status::Invalid));
        }
        if plus {
            self.load_inodes(&entries)?;
            for entry in &mut entries {
                // An inode that cannot be read does not hide the other entries.
                entry.attr = match self.attr(entry.inode) {
                    Ok(attr) => Some(attr),
                    Err(Stop::Fail(_)) => None,
                    Err(stop) => return Err(stop),
                };
            }
        }
        Ok(Reply::Entries { entries, eof, dir: self.attr(dir)? })
    }

    /// Has the inodes of a listing in memory.
    fn load_inodes(&mut self, entries: &[DirEntry]) -> Res<()> {
        let mut blocks: Vec<u64> = entries.iter().map(|entry| entry.inode / INODES_PER_BLOCK).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut missing = false;
        for block in blocks {
            match self.block(INODE_FILE, 0, block) {
                Ok(_) => {}
                Err(Stop::Need) => missing = true,
                Err(Stop::Fail(_)) => {}
                Err(Stop::Busy) => return Err(Stop::Busy),
            }
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }
}
