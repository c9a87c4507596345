//! A leaf of a directory: entries in ascending order of their cookie, which is the hash of the name.
//!
//! 16-byte header {magic u32, depth u8, zero u8, entries u16, end u16, zero}, then entries {cookie u64, inode u64, kind u8,
//! length u8, name}. All names in it share the first `depth` bits of their hash.
use crate::block::{BLOCK_SIZE, get_u16, get_u32, get_u64, put_u16, put_u32, put_u64};
use fabric::fs::NAME_MAX;

const MAGIC: u32 = u32::from_le_bytes(*b"DIRL");
const HEADER: usize = 16;
const ENTRY: usize = 18;

/// A name, where it stands and what it leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    pub cookie: u64,
    pub inode: u64,
    pub kind: u8,
    pub name: &'a [u8],
}

/// A leaf's bytes, checked: every entry lies within, in order.
#[derive(Clone, Copy)]
pub(crate) struct Leaf<'a> {
    bytes: &'a [u8; BLOCK_SIZE],
    pub depth: u32,
    count: usize,
    end: usize,
}

impl<'a> Leaf<'a> {
    /// `None` if the bytes cannot be a leaf.
    pub fn parse(bytes: &'a [u8; BLOCK_SIZE]) -> Option<Self> {
        let leaf = Leaf {
            bytes,
            depth: u32::from(bytes[4]),
            count: usize::from(get_u16(bytes, 6)),
            end: usize::from(get_u16(bytes, 8)),
        };
        if get_u32(bytes, 0) != MAGIC || leaf.end > BLOCK_SIZE {
            return None;
        }
        let (mut at, mut seen, mut last) = (HEADER, 0, 0);
        while at < leaf.end {
            let length = usize::from(*bytes.get(at + ENTRY - 1)?);
            if at + ENTRY + length > leaf.end || length == 0 {
                return None;
            }
            let cookie = get_u64(bytes, at);
            if cookie <= last {
                return None;
            }
            last = cookie;
            at += ENTRY + length;
            seen += 1;
        }
        (at == leaf.end && seen == leaf.count).then_some(leaf)
    }

    pub fn entries(self) -> impl Iterator<Item = Entry<'a>> {
        let mut at = HEADER;
        core::iter::from_fn(move || {
            if at >= self.end {
                return None;
            }
            let length = usize::from(self.bytes[at + ENTRY - 1]);
            let entry = Entry {
                cookie: get_u64(self.bytes, at),
                inode: get_u64(self.bytes, at + 8),
                kind: self.bytes[at + 16],
                name: &self.bytes[at + ENTRY..at + ENTRY + length],
            };
            at += ENTRY + length;
            Some(entry)
        })
    }

    /// Where the first entry stands whose cookie is not below this; the end if there is none.
    fn offset_of(self, cookie: u64) -> usize {
        let mut at = HEADER;
        while at < self.end && get_u64(self.bytes, at) < cookie {
            at += ENTRY + usize::from(self.bytes[at + ENTRY - 1]);
        }
        at
    }

    pub fn has_room(self, name: &[u8]) -> bool {
        self.end + ENTRY + name.len() <= BLOCK_SIZE
    }
}

/// Writes a leaf of these entries, which must be in order and fit.
pub(crate) fn build<'e>(bytes: &mut [u8; BLOCK_SIZE], depth: u32, entries: impl Iterator<Item = Entry<'e>>) {
    bytes.fill(0);
    put_u32(bytes, 0, MAGIC);
    bytes[4] = depth as u8;
    let (mut at, mut count) = (HEADER, 0);
    for entry in entries {
        debug_assert!(entry.name.len() <= NAME_MAX);
        put_u64(bytes, at, entry.cookie);
        put_u64(bytes, at + 8, entry.inode);
        bytes[at + 16] = entry.kind;
        bytes[at + ENTRY - 1] = entry.name.len() as u8;
        bytes[at + ENTRY..at + ENTRY + entry.name.len()].copy_from_slice(entry.name);
        at += ENTRY + entry.name.len();
        count += 1;
    }
    put_u16(bytes, 6, count);
    put_u16(bytes, 8, at as u16);
}

/// The leaf with an entry more; there must be room.
pub(crate) fn insert(bytes: &mut [u8; BLOCK_SIZE], entry: Entry<'_>) -> Option<()> {
    let leaf = Leaf::parse(bytes).filter(|leaf| leaf.has_room(entry.name))?;
    let (at, end, count) = (leaf.offset_of(entry.cookie), leaf.end, leaf.count);
    let length = ENTRY + entry.name.len();
    bytes.copy_within(at..end, at + length);
    put_u64(bytes, at, entry.cookie);
    put_u64(bytes, at + 8, entry.inode);
    bytes[at + 16] = entry.kind;
    bytes[at + ENTRY - 1] = entry.name.len() as u8;
    bytes[at + ENTRY..at + length].copy_from_slice(entry.name);
    put_u16(bytes, 6, count as u16 + 1);
    put_u16(bytes, 8, (end + length) as u16);
    Some(())
}

/// The leaf without an entry, which must be there.
pub(crate) fn remove(bytes: &mut [u8; BLOCK_SIZE], cookie: u64) -> Option<()> {
    let leaf = Leaf::parse(bytes)?;
    let (at, end, count) = (leaf.offset_of(cookie), leaf.end, leaf.count);
    if at == end || get_u64(bytes, at) != cookie {
        return None;
    }
    let length = ENTRY + usize::from(bytes[at + ENTRY - 1]);
    bytes.copy_within(at + length..end, at);
    bytes[end - length..end].fill(0);
    put_u16(bytes, 6, count as u16 - 1);
    put_u16(bytes, 8, (end - length) as u16);
    Some(())
}

/// The leaf with an entry, which must be there, leading to another inode.
pub(crate) fn redirect(bytes: &mut [u8; BLOCK_SIZE], cookie: u64, inode: u64, kind: u8) -> Option<()> {
    let leaf = Leaf::parse(bytes)?;
    let (at, end) = (leaf.offset_of(cookie), leaf.end);
    if at == end || get_u64(bytes, at) != cookie {
        return None;
    }
    put_u64(bytes, at + 8, inode);
    bytes[at + 16] = kind;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn insert_remove_redirect() {
        let mut bytes = [0; BLOCK_SIZE];
        build(&mut bytes, 3, core::iter::empty());
        for cookie in [30, 10, 20] {
            insert(&mut bytes, Entry { cookie, inode: cookie + 1, kind: 1, name: b"name" }).unwrap();
        }
        redirect(&mut bytes, 20, 77, 2).unwrap();
        remove(&mut bytes, 10).unwrap();
        assert!(remove(&mut bytes, 10).is_none() && redirect(&mut bytes, 11, 1, 1).is_none());
        assert!(remove(&mut bytes, 99).is_none());
        let leaf = Leaf::parse(&bytes).unwrap();
        let got: alloc::vec::Vec<(u64, u64)> = leaf.entries().map(|e| (e.cookie, e.inode)).collect();
        assert_eq!((leaf.depth, got), (3, alloc::vec![(20, 77), (30, 31)]));
    }

    #[test]
    fn every_flipped_byte_is_refused_or_harmless() {
        let mut bytes = [0; BLOCK_SIZE];
        build(&mut bytes, 0, core::iter::empty());
        for cookie in 1..50 {
            insert(&mut bytes, Entry { cookie, inode: 9, kind: 1, name: &[b'a'; 40] }).unwrap();
        }
        for at in 0..3000 {
            for flip in [1, 0x80, 0xff] {
                let mut bad = bytes;
                bad[at] ^= flip;
                if let Some(leaf) = Leaf::parse(&bad) {
                    assert!(leaf.entries().count() < 200);
                }
            }
        }
    }
}
