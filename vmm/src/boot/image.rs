//! Loads an image and finds out how it wants to be started.
//!
//! The image comes from the operator, but is checked like anything else from a disk: sizes are bounded before they are
//! allocated, addresses must lie in guest memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use guest_abi::{BOOT_INFO_SIZE, CMDLINE_MAX, DirectStart, NOTE_NAME, NOTE_TYPE, NOTE_VERSION};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use zerocopy::FromBytes;

use super::files::BootFile;
use super::linux;
use crate::config::{BootMode, LINUX_CMDLINE_MAX};
use crate::error::{Error, Result};
use crate::layout::{HIGH_MEMORY, LOW_RAM_MAX};
use crate::memory::Memory;

/// Most bytes of ELF notes that are read.
const NOTES_MAX: u64 = 64 << 10;
/// Most program headers that are looked at.
const PHDRS_MAX: u16 = 64;
const PHDR_SIZE: u16 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// How the first vCPU starts.
#[derive(Debug, Clone)]
pub enum Entry {
    /// In ring 3, from the tables the image names.
    Direct(DirectStart),
    /// 32-bit protected mode at this address (PVH).
    Pvh(u64),
    /// 64-bit mode, by the Linux boot protocol.
    Linux(Box<linux::Kernel>),
}

/// An image in guest memory.
#[derive(Debug, Clone)]
pub struct Image {
    /// How to start it.
    pub entry: Entry,
    /// End of the memory it uses by itself.
    pub end: u64,
    /// It is to be told of virtio devices by the command line: ours are, others read the ACPI tables.
    pub wants_announcements: bool,
}

impl Image {
    /// Loads `image` into `memory` and chooses the start: direct where the image has the note and `mode` allows it.
    pub fn load(image: &BootFile, memory: &Memory, mode: BootMode) -> Result<Image> {
        let bad = |reason: String| Error::Image { path: image.path().to_owned(), reason };
        let mut file = image.from_start()?;
        let magic = |at: u64| -> Option<[u8; 4]> {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
        };
        let (elf, bzimage) =
            (magic(0).as_ref() == Some(b"\x7fELF"), magic(linux::MAGIC_AT).as_ref() == Some(linux::MAGIC));
        match (elf, bzimage, mode) {
            (false, true, BootMode::Auto | BootMode::Linux) => {
                let kernel = linux::Kernel::load(&mut file, memory).map_err(&bad)?;
                let end = kernel.end;
                return Ok(Image { entry: Entry::Linux(Box::new(kernel)), end, wants_announcements: false });
            }
            (false, true, _) => return Err(bad("is a Linux bzImage: boot must be auto or linux".into())),
            (false, false, _) => return Err(bad("is neither an ELF file nor a Linux bzImage".into())),
            (true, _, BootMode::Linux) => {
                return Err(bad("is an ELF file, not a Linux bzImage: boot must be auto or pvh".into()));
            }
            (true, ..) => {}
        }
        let direct = direct_note(&mut file).map_err(&bad)?;
        let loaded: KernelLoaderResult =
            Elf::load(memory.ram().as_ref(), None, &mut file, None).map_err(|e| bad(e.to_string()))?;
        // Also what has no bytes in the file.
        let ends = segments(&mut file).map_err(&bad)?.into_iter().map(|s| s.end);
        let (end, low) = (ends.max().unwrap_or(0).max(loaded.kernel_end), memory.low_end());
        if end > low {
            return Err(bad(format!("ends at {end:#x}, the VM's memory at {low:#x}: give it more (memory)")));
        }
        let pvh = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Some(entry.0),
            _ => None,
        };
        let ours = direct.is_some();
        let entry = match (mode, direct, pvh) {
            (BootMode::Auto | BootMode::Direct, Some(note), _) => Entry::Direct(check(note, memory).map_err(&bad)?),
            (BootMode::Direct, None, _) => return Err(bad("carries no note for a direct start".into())),
            (_, _, Some(entry)) => {
                if let Some(low) = segments(&mut file).map_err(&bad)?.into_iter().find(|s| s.start < HIGH_MEMORY) {
                    return Err(bad(format!("has a segment at {:#x}, where the monitor puts its tables", low.start)));
                }
                Entry::Pvh(entry)
            }
            (_, _, None) => return Err(bad("carries neither a PVH note nor one for a direct start".into())),
        };
        Ok(Image { entry, end, wants_announcements: ours })
    }

    /// End of where an initial RAM disk may lie.
    pub fn initrd_end(&self) -> u64 {
        match &self.entry {
            Entry::Linux(kernel) => kernel.initrd_end(),
            _ => u64::MAX,
        }
    }

    /// Longest command line it takes.
    pub fn cmdline_max(&self) -> usize {
        match &self.entry {
            Entry::Linux(kernel) => kernel.cmdline_max(),
            // Ours read as much as the boot-info page holds; others are most probably Linux.
            _ => CMDLINE_MAX.max(LINUX_CMDLINE_MAX),
        }
    }
}

/// Everything the note points to must be in guest memory.
fn check(note: DirectStart, memory: &Memory) -> std::result::Result<DirectStart, String> {
    if note.version != NOTE_VERSION {
        return Err(format!("note for the direct start has version {}, this VMM knows {NOTE_VERSION}", note.version));
    }
    if memory.size() as u64 > memory.low_end() {
        return Err(format!("is started directly in ring 3 and can have at most {LOW_RAM_MAX} bytes of memory"));
    }
    let inside = |at: u64, len: u64| at.checked_add(len).is_some_and(|end| end <= memory.low_end());
    for (what, at, len) in [
        ("page table", note.cr3, 4096),
        ("GDT", note.gdt_base, u64::from(note.gdt_limit) + 1),
        ("IDT", note.idt_base, u64::from(note.idt_limit) + 1),
        ("TSS", note.tss_base, 0x68),
        ("entry", note.entry, 1),
        ("stack", note.stack_top, 0),
        ("boot-info page", note.boot_info, BOOT_INFO_SIZE as u64),
    ] {
        if !inside(at, len) {
            return Err(format!("{what} at {at:#x} lies outside the VM's memory of {} bytes", memory.size()));
        }
    }
    if !note.boot_info.is_multiple_of(BOOT_INFO_SIZE as u64) {
        return Err(format!("boot-info page at {:#x} is not page-aligned", note.boot_info));
    }
    Ok(note)
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn truncated(e: std::io::Error) -> String {
    format!("truncated: {e}")
}

/// The program headers.
fn phdrs(file: &File) -> std::result::Result<Vec<[u8; PHDR_SIZE as usize]>, String> {
    let mut ehdr = [0u8; 64];
    file.read_exact_at(&mut ehdr, 0).map_err(truncated)?;
    let (phoff, phentsize, phnum) = (u64_at(&ehdr, 32), u16_at(&ehdr, 54), u16_at(&ehdr, 56));
    if phentsize != PHDR_SIZE || phnum > PHDRS_MAX {
        return Err(format!("{phnum} program headers of {phentsize} bytes"));
    }
    let read = |i: u64| {
        let mut phdr = [0u8; PHDR_SIZE as usize];
        let at = phoff.checked_add(i * u64::from(PHDR_SIZE)).ok_or("program headers out of range")?;
        file.read_exact_at(&mut phdr, at).map_err(truncated)?;
        Ok(phdr)
    };
    (0..u64::from(phnum)).map(read).collect()
}

/// Guest-physical addresses of everything that is loaded.
fn segments(file: &mut File) -> std::result::Result<Vec<Range<u64>>, String> {
    let mut out = Vec::new();
    for phdr in phdrs(file)? {
        let (address, size) = (u64_at(&phdr, 24), u64_at(&phdr, 40));
        if u32_at(&phdr, 0) == PT_LOAD && size != 0 {
            out.push(address..address.checked_add(size).ok_or("a segment goes beyond the end of addresses")?);
        }
    }
    Ok(out)
}

/// Finds the note for the direct start in the image's PT_NOTE segments.
fn direct_note(file: &mut File) -> std::result::Result<Option<DirectStart>, String> {
    for phdr in phdrs(file)? {
        if u32_at(&phdr, 0) != PT_NOTE {
            continue;
        }
        let (offset, size) = (u64_at(&phdr, 8), u64_at(&phdr, 32));
        if size > NOTES_MAX {
            return Err(format!("{size} bytes of notes"));
        }
        let mut notes = Vec::with_capacity(size as usize);
        file.seek(SeekFrom::Start(offset)).map_err(truncated)?;
        file.take(size).read_to_end(&mut notes).map_err(truncated)?;
        if let Some(note) = find_note(&notes) {
            return Ok(Some(note));
        }
    }
    Ok(None)
}

/// Walks notes (ELF specification, "Note Section"): name and descriptor each padded to 4 bytes.
fn find_note(mut notes: &[u8]) -> Option<DirectStart> {
    while notes.len() >= 12 {
        let (namesz, descsz, kind) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize, u32_at(notes, 8));
        let name = notes.get(12..)?;
        let desc = name.get(namesz.checked_next_multiple_of(4)?..)?;
        let name = name.get(..namesz)?;
        if name == NOTE_NAME && kind == NOTE_TYPE {
            return DirectStart::read_from_prefix(desc.get(..descsz)?).ok().map(|(note, _)| note);
        }
        notes = desc.get(descsz.checked_next_multiple_of(4)?..)?;
    }
    None
}

#[cfg(test)]
mod tests;
