//! Reading and writing files.
use crate::block::BLOCK_SIZE;
use crate::inode::{FILE_SIZE_MAX, HEIGHT_MAX, Kind};
use crate::permission::{mode_after_write, require_read, require_write};
use crate::txn::{Res, Stop, Txn};
use alloc::vec::Vec;
use fabric::fs::{Credential, FileHandle, FileKind, IO_MAX, SYMLINK_MAX, Stability, Status};
use fabric::op::Reply;

const BLOCK: u64 = BLOCK_SIZE as u64;

impl Txn<'_> {
    /// Has `count` data blocks from `first` on in memory; asks for all that are missing on a level at once.
    pub fn load(&mut self, number: u64, first: u64, count: u64) -> Res<()> {
        if count == 0 {
            return Ok(());
        }
        let height = self.inode(number)?.height.min(HEIGHT_MAX);
        let last = first.saturating_add(count - 1);
        for level in (0..=height).rev() {
            let shift = crate::block::FANOUT_BITS * u32::from(level);
            let mut missing = false;
            for index in first >> shift..=last >> shift {
                match self.block(number, level, index) {
                    Ok(_) => {}
                    Err(Stop::Need) => missing = true,
                    Err(stop) => return Err(stop),
                }
            }
            if missing {
                return Err(Stop::Need);
            }
        }
        Ok(())
    }

    fn readable(&mut self, number: u64) -> Res<()> {
        match self.inode(number)?.kind {
            Kind::File(FileKind::Regular) => Ok(()),
            Kind::File(FileKind::Directory) => Err(Stop::Fail(Status::IsDirectory)),
            _ => Err(Stop::Fail(Status::Invalid)),
        }
    }

    pub(super) fn read(&mut self, who: &Credential, handle: &FileHandle, offset: u64, length: u32) -> Res<Reply> {
        let number = self.resolve(handle)?;
        self.readable(number)?;
        let inode = self.inode(number)?;
        require_read(who, &inode)?;
        let length = u64::from(length).min(IO_MAX as u64).min(inode.size.saturating_sub(offset));
        let data = self.bytes(number, offset, length)?;
        Ok(Reply::Data { data, eof: offset.saturating_add(length) >= inode.size, attr: self.attr(number)? })
    }

    /// Has a part of a file in memory; says whether it reaches the end.
    pub fn prefetch(&mut self, handle: &FileHandle, offset: u64, length: u32) -> Res<bool> {
        let number = self.resolve(handle)?;
        self.readable(number)?;
        let size = self.inode(number)?.size;
        let length = u64::from(length).min(IO_MAX as u64).min(size.saturating_sub(offset));
        if length > 0 {
            self.load(number, offset / BLOCK, (offset + length - 1) / BLOCK - offset / BLOCK + 1)?;
        }
        Ok(offset.saturating_add(length) >= size)
    }

    /// Bytes of a file; `length` is bounded by the caller.
    fn bytes(&mut self, number: u64, offset: u64, length: u64) -> Res<Vec<u8>> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let end = offset + length;
        let mut data = Vec::with_capacity(length as usize);
        let mut missing = false;
        let mut at = offset;
        while at < end {
            let from = (at % BLOCK) as usize;
            let to = (end - at + from as u64).min(BLOCK) as usize;
            match self.block(number, 0, at / BLOCK) {
                Ok(Some(block)) => data.extend_from_slice(&block.bytes()[from..to]),
                Ok(None) => data.resize(data.len() + to - from, 0),
                Err(Stop::Need) => {
                    missing = true;
                    break;
                }
                Err(stop) => return Err(stop),
            }
            at += (to - from) as u64;
        }
        if missing {
            self.load(number, at / BLOCK, (end - 1) / BLOCK - at / BLOCK + 1)?;
            return Err(Stop::Need);
        }
        Ok(data)
    }

    pub(super) fn write(
        &mut self,
        who: &Credential,
        handle: &FileHandle,
        offset: u64,
        stability: Stability,
        data: &[u8],
    ) -> Res<Reply> {
        let number = self.resolve(handle)?;
        self.readable(number)?;
        let inode = self.inode(number)?;
        require_write(who, &inode)?;
        if data.len() > IO_MAX {
            return Err(Stop::Fail(Status::Invalid));
        }
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= FILE_SIZE_MAX);
        let end = end.ok_or(Stop::Fail(Status::TooLarge))?;
        let before = self.before(number)?;
        if !data.is_empty() {
            self.write_bytes(number, offset, data)?;
            let changed = self.inode_mut(number)?;
            changed.size = changed.size.max(end);
            changed.mode = mode_after_write(who, changed.mode);
            self.stamp_content(number)?;
        }
        let wcc = self.wcc(number, before)?;
        Ok(Reply::Written { count: data.len() as u32, stability, verifier: self.fs.verifier, wcc })
    }

    /// Puts bytes into a file's blocks. Only blocks of which a part stays are read.
    fn write_bytes(&mut self, number: u64, offset: u64, data: &[u8]) -> Res<()> {
        let size = self.inode(number)?.size;
        let end = offset + data.len() as u64;
        // Whole blocks, and a last one with nothing behind it that stays.
        let first = offset.next_multiple_of(BLOCK);
        let last = if end >= size { end } else { end / BLOCK * BLOCK };
        let (head, rest) = data.split_at(((first - offset) as usize).min(data.len()));
        let (run, tail) = rest.split_at((last.saturating_sub(first) as usize).min(rest.len()));
        let mut missing = false;
        for (at, piece) in [(offset, head), (last.max(first), tail)] {
            let from = (at % BLOCK) as usize;
            match (!piece.is_empty()).then(|| self.modify(number, 0, at / BLOCK)) {
                Some(Ok(bytes)) => bytes[from..from + piece.len()].copy_from_slice(piece),
                Some(Err(Stop::Need)) => missing = true,
                Some(Err(stop)) => return Err(stop),
                None => {}
            }
        }
        match self.replace_run(number, first / BLOCK, run) {
            Err(Stop::Need) => missing = true,
            other => other?,
        }
        if missing { Err(Stop::Need) } else { Ok(()) }
    }

    pub(super) fn read_link(&mut self, handle: &FileHandle) -> Res<Reply> {
        let number = self.resolve(handle)?;
        let inode = self.inode(number)?;
        if inode.kind != Kind::File(FileKind::Symlink) {
            return Err(Stop::Fail(Status::Invalid));
        }
        if inode.size > SYMLINK_MAX as u64 {
            return Err(self.corrupt("symbolic link", number));
        }
        let target = self.bytes(number, 0, inode.size)?;
        Ok(Reply::Target { target, attr: self.attr(number)? })
    }

    /// Content of a new symbolic link.
    pub(super) fn write_target(&mut self, number: u64, target: &[u8]) -> Res<()> {
        self.write_bytes(number, 0, target)?;
        self.inode_mut(number)?.size = target.len() as u64;
        Ok(())
    }
}
