//! What a module image must look like for a VMM to boot it: a static 64-bit ELF with a PVH note and Outrigger's own note, small,
//! its segments apart, and none that ring 3 sees writable and executable at once.
use crate::Error;
use std::path::Path;

/// Largest image file, debug lines included.
pub const MAX_FILE_BYTES: u64 = 32 << 20;
/// Largest sum of segments in memory: what an image takes of the N-module's 32 MiB before its heap.
pub const MAX_MEMORY_BYTES: u64 = 16 << 20;
/// The shim of ring 0 with its tables and stacks, which ring 3 does not see: one segment for all of it.
const RING0: std::ops::Range<u64> = 0x10_0000..0x20_0000;
/// Most program headers looked at.
const MAX_SEGMENTS: usize = 32;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const FLAG_EXECUTE: u32 = 1;
const FLAG_WRITE: u32 = 2;
const PVH_NOTE: (&[u8], u32) = (b"Xen\0", 18);
const DIRECT_NOTE: (&[u8], u32) = (b"Outrigger\0", 1);

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Bytes in memory.
    pub memory_bytes: u64,
    /// Bytes in the file.
    pub file_bytes: u64,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub execute: bool,
}

/// Reads an image and refuses one that cannot boot; returns its loadable segments.
pub fn check(path: &Path) -> Result<Vec<Segment>, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    check_bytes(&bytes).map_err(|message| Error::Image { path: path.to_owned(), message })
}

fn check_bytes(elf: &[u8]) -> Result<Vec<Segment>, String> {
    if elf.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("{} bytes are more than {MAX_FILE_BYTES}", elf.len()));
    }
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF".into());
    }
    if field::<2>(elf, 16)? != 2 || field::<2>(elf, 18)? != 62 {
        return Err("not a static x86-64 executable".into());
    }
    let (table, entry, count) = (field::<8>(elf, 32)?, field::<2>(elf, 54)?, field::<2>(elf, 56)? as usize);
    if entry != 56 || count > MAX_SEGMENTS {
        return Err(format!("{count} program headers of {entry} bytes"));
    }
    let mut segments = Vec::new();
    let (mut pvh, mut direct) = (false, false);
    for i in 0..count {
        let header =
            usize::try_from(table).ok().and_then(|t| t.checked_add(i * 56)).ok_or("program headers out of range")?;
        let kind = field::<4>(elf, header)? as u32;
        let flags = field::<4>(elf, header + 4)? as u32;
        let (offset, file_bytes) = (field::<8>(elf, header + 8)?, field::<8>(elf, header + 32)?);
        let range = usize::try_from(offset).ok().zip(usize::try_from(file_bytes).ok());
        let content = range
            .and_then(|(offset, len)| elf.get(offset..offset.checked_add(len)?))
            .ok_or_else(|| format!("segment {i} is not in the file"))?;
        match kind {
            PT_LOAD => segments.push(Segment {
                address: field::<8>(elf, header + 24)?,
                memory_bytes: field::<8>(elf, header + 40)?,
                file_bytes,
                write: flags & FLAG_WRITE != 0,
                execute: flags & FLAG_EXECUTE != 0,
            }),
            PT_DYNAMIC | PT_INTERP => return Err("needs a dynamic linker".into()),
            PT_NOTE => {
                for (name, kind) in notes(content)? {
                    pvh |= (name, kind) == PVH_NOTE;
                    direct |= (name, kind) == DIRECT_NOTE;
                }
            }
            _ => {}
        }
    }
    if !pvh {
        return Err("has no PVH note (Xen, type 18)".into());
    }
    if !direct {
        return Err("has no note for the direct start (Outrigger, type 1)".into());
    }
    check_segments(&mut segments)?;
    Ok(segments)
}

fn check_segments(segments: &mut [Segment]) -> Result<(), String> {
    segments.sort_by_key(|s| s.address);
    let mut end = 0u64;
    let mut sum = 0u64;
    for s in segments.iter() {
        if s.write && s.execute && !RING0.contains(&s.address) {
            return Err(format!("segment at {:#x} is writable and executable", s.address));
        }
        if s.address < end {
            return Err(format!("segment at {:#x} overlaps the one before", s.address));
        }
        if s.file_bytes > s.memory_bytes {
            return Err(format!("segment at {:#x} is larger in the file than in memory", s.address));
        }
        end = s.address.checked_add(s.memory_bytes).ok_or("segment ends beyond the address space")?;
        sum += s.memory_bytes;
    }
    if segments.is_empty() || sum > MAX_MEMORY_BYTES {
        return Err(format!("{} segments with {sum} bytes; at most {MAX_MEMORY_BYTES}", segments.len()));
    }
    Ok(())
}

fn field<const N: usize>(elf: &[u8], at: usize) -> Result<u64, String> {
    let bytes = elf.get(at..at.saturating_add(N)).ok_or_else(|| format!("ends before byte {at}"))?;
    let mut value = [0u8; 8];
    value[..N].copy_from_slice(bytes);
    Ok(u64::from_le_bytes(value))
}

/// (name with its NUL, type) of every note.
fn notes(mut content: &[u8]) -> Result<Vec<(&[u8], u32)>, String> {
    let mut found = Vec::new();
    while content.len() >= 12 {
        let (name_len, desc_len) = (field::<4>(content, 0)? as usize, field::<4>(content, 4)? as usize);
        let kind = field::<4>(content, 8)? as u32;
        let name = content.get(12..12usize.saturating_add(name_len)).ok_or("note out of range")?;
        found.push((name, kind));
        let next = 12 + name_len.next_multiple_of(4).saturating_add(desc_len.next_multiple_of(4));
        content = content.get(next..).unwrap_or(&[]);
    }
    Ok(found)
}

#[cfg(test)]
#[path = "elf/tests.rs"]
mod tests;
