//! Inodes: what the file system knows of a file, and the roots of the tree of its blocks.
//!
//! 256 bytes, little-endian:
//!
//! | at | | at | |
//! |---|---|---|---|
//! | 0 | kind u8, height u8, mode u16, links u32 | 80 | parent u64 (directories) |
//! | 8 | uid u32, gid u32 | 88 | next orphan u64 |
//! | 16 | generation u32, flags u32 (zero) | 96 | entries u64 (directories) |
//! | 24 | size u64 | 104 | hash table depth u32, first block u32 (directories) |
//! | 32 | used blocks u64 | 112 | spare blocks first u32, count u32 (directories) |
//! | 40 | device major u32, minor u32 | 120 | zero |
//! | 48 | atime, mtime, ctime i64 | 128 | 8 block pointers |
//! | 72 | verifier of an exclusive create u64 | | |
//!
//! A tree of height h has 8 roots, each covering 256^h blocks. Height 0: the roots are data blocks.
use crate::block::{BlockPointer, FANOUT_BITS, get_u16, get_u32, get_u64, put_u16, put_u32, put_u64};
use fabric::fs::{FileKind, Time};

/// Bytes of an inode.
pub(crate) const INODE_SIZE: usize = 256;
/// Inodes in a block of the inode file.
pub(crate) const INODES_PER_BLOCK: u64 = 16;
/// Pointers in an inode.
pub(crate) const ROOTS: u64 = 8;
/// Tallest tree.
pub(crate) const HEIGHT_MAX: u8 = 4;
/// Largest file, in bytes: 16 TiB.
pub const FILE_SIZE_MAX: u64 = 1 << 44;

/// Deepest hash table of a directory: 2^20 leaves.
pub(crate) const DEPTH_MAX: u32 = 20;
/// No tree has more blocks, no directory more entries.
const COUNT_MAX: u64 = 1 << 48;

/// The file that holds all inodes.
pub(crate) const INODE_FILE: u64 = 1;
/// The file with a bit for each inode in use.
pub(crate) const INODE_MAP: u64 = 2;
/// The file with a bit for each block in use.
pub(crate) const BLOCK_MAP: u64 = 3;
/// The file of kept replies.
pub(crate) const SESSION_FILE: u64 = 4;
/// The file of ownership records.
pub(crate) const OWNER_FILE: u64 = 5;
/// The root directory.
pub(crate) const ROOT: u64 = 16;
/// Inode numbers below this are those of metadata files (their inodes are in fsinfo) or not used.
pub(crate) const FIRST_INODE: u64 = 16;

/// What an inode slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing. The generation of the last file stays.
    Free,
    /// A file.
    File(FileKind),
    /// A removed file or cut-off tree whose blocks are being freed.
    Orphan,
    /// A metadata file.
    Meta,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Inode {
    pub kind: Kind,
    pub height: u8,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    pub generation: u32,
    pub size: u64,
    pub used: u64,
    pub rdev: (u32, u32),
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
    pub verifier: u64,
    pub parent: u64,
    pub next_orphan: u64,
    pub entries: u64,
    pub depth: u32,
    pub table: u32,
    pub spare: (u32, u32),
    pub roots: [BlockPointer; ROOTS as usize],
}

impl Inode {
    pub const FREE: Inode = Inode {
        kind: Kind::Free,
        height: 0,
        mode: 0,
        links: 0,
        uid: 0,
        gid: 0,
        generation: 0,
        size: 0,
        used: 0,
        rdev: (0, 0),
        atime: Time(0),
        mtime: Time(0),
        ctime: Time(0),
        verifier: 0,
        parent: 0,
        next_orphan: 0,
        entries: 0,
        depth: 0,
        table: 0,
        spare: (0, 0),
        roots: [BlockPointer::HOLE; ROOTS as usize],
    };

    pub fn meta(height: u8) -> Inode {
        Inode { kind: Kind::Meta, height, ..Inode::FREE }
    }

    /// `None` if the bytes cannot be an inode.
    pub fn decode(raw: &[u8]) -> Option<Inode> {
        let kind = match raw[0] {
            0 => Kind::Free,
            1 => Kind::File(FileKind::Regular),
            2 => Kind::File(FileKind::Directory),
            3 => Kind::File(FileKind::Symlink),
            4 => Kind::File(FileKind::BlockDevice),
            5 => Kind::File(FileKind::CharDevice),
            6 => Kind::File(FileKind::Fifo),
            7 => Kind::File(FileKind::Socket),
            254 => Kind::Meta,
            255 => Kind::Orphan,
            _ => return None,
        };
        let height = raw[1];
        let size = get_u64(raw, 24);
        let counts_fit = get_u64(raw, 32) <= COUNT_MAX && get_u64(raw, 96) <= COUNT_MAX;
        if height > HEIGHT_MAX || size > FILE_SIZE_MAX || !counts_fit || get_u32(raw, 104) > DEPTH_MAX {
            return None;
        }
        let mut roots = [BlockPointer::HOLE; ROOTS as usize];
        for (index, root) in roots.iter_mut().enumerate() {
            *root = BlockPointer::read(raw, 128 + index * BlockPointer::SIZE);
        }
        Some(Inode {
            kind,
            height,
            mode: u32::from(get_u16(raw, 2)) & 0o7777,
            links: get_u32(raw, 4),
            uid: get_u32(raw, 8),
            gid: get_u32(raw, 12),
            generation: get_u32(raw, 16),
            size,
            used: get_u64(raw, 32),
            rdev: (get_u32(raw, 40), get_u32(raw, 44)),
            atime: Time(get_u64(raw, 48).cast_signed()),
            mtime: Time(get_u64(raw, 56).cast_signed()),
            ctime: Time(get_u64(raw, 64).cast_signed()),
            verifier: get_u64(raw, 72),
            parent: get_u64(raw, 80),
            next_orphan: get_u64(raw, 88),
            entries: get_u64(raw, 96),
            depth: get_u32(raw, 104),
            table: get_u32(raw, 108),
            spare: (get_u32(raw, 112), get_u32(raw, 116)),
            roots,
        })
    }

    pub fn encode(&self, raw: &mut [u8]) {
        raw[..INODE_SIZE].fill(0);
        raw[0] = match self.kind {
            Kind::Free => 0,
            Kind::File(kind) => kind as u8,
            Kind::Meta => 254,
            Kind::Orphan => 255,
        };
        raw[1] = self.height;
        put_u16(raw, 2, (self.mode & 0o7777) as u16);
        put_u32(raw, 4, self.links);
        put_u32(raw, 8, self.uid);
        put_u32(raw, 12, self.gid);
        put_u32(raw, 16, self.generation);
        put_u64(raw, 24, self.size);
        put_u64(raw, 32, self.used);
        put_u32(raw, 40, self.rdev.0);
        put_u32(raw, 44, self.rdev.1);
        put_u64(raw, 48, self.atime.0.cast_unsigned());
        put_u64(raw, 56, self.mtime.0.cast_unsigned());
        put_u64(raw, 64, self.ctime.0.cast_unsigned());
        put_u64(raw, 72, self.verifier);
        put_u64(raw, 80, self.parent);
        put_u64(raw, 88, self.next_orphan);
        put_u64(raw, 96, self.entries);
        put_u32(raw, 104, self.depth);
        put_u32(raw, 108, self.table);
        put_u32(raw, 112, self.spare.0);
        put_u32(raw, 116, self.spare.1);
        for (index, root) in self.roots.iter().enumerate() {
            root.write(raw, 128 + index * BlockPointer::SIZE);
        }
    }

    pub fn is_dir(&self) -> bool {
        self.kind == Kind::File(FileKind::Directory)
    }

    pub fn is_regular(&self) -> bool {
        self.kind == Kind::File(FileKind::Regular)
    }
}

/// Blocks a tree of this height can hold.
pub(crate) fn capacity(height: u8) -> u64 {
    ROOTS << (FANOUT_BITS * u32::from(height))
}

/// Blocks under one node of this level.
pub(crate) fn span(level: u8) -> u64 {
    1 << (FANOUT_BITS * u32::from(level))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_what_the_format_says() {
        let mut inode = Inode { kind: Kind::File(FileKind::Regular), mode: 0o644, links: 2, ..Inode::FREE };
        inode.size = 0x0102_0304;
        inode.ctime = Time(-1);
        inode.roots[7] = BlockPointer { block: 9, hash: 0xaa };
        let mut raw = [0xee; INODE_SIZE];
        inode.encode(&mut raw);
        assert_eq!(raw[..8], [1, 0, 0xa4, 1, 2, 0, 0, 0]);
        assert_eq!(raw[24..32], [4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(raw[64..72], [0xff; 8]);
        assert_eq!(raw[240..], [9, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0, 0, 0, 0, 0, 0, 0]);
        let back = Inode::decode(&raw).unwrap();
        assert_eq!((back.size, back.ctime, back.roots), (inode.size, inode.ctime, inode.roots));
        raw[1] = HEIGHT_MAX + 1;
        assert!(Inode::decode(&raw).is_none());
    }
}
