//! Where the pages of guest memory come from: anonymous memory, files in memory that other processes can map, or the file of a
//! checkpoint, copied page by page when it is written.
//!
//! Always true: a shared region is sealed, so that nobody who has it can make it shorter under the monitor's feet.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{GuestRam, Memory};
use crate::error::{Error, Result, host};

/// A region as another process has to map it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedRegion {
    /// First guest-physical address.
    pub guest: u64,
    /// Length in bytes.
    pub size: u64,
    /// First address in this process.
    pub here: u64,
    /// The file it is in, from offset 0 on; valid as long as the memory.
    pub fd: RawFd,
}

/// Maps zeroed memory for each range.
pub(super) fn map(ranges: &[(GuestAddress, usize)], shared: bool) -> Result<GuestRam> {
    let file = |size| match shared {
        true => shared_file(size).map(|file| Some(FileOffset::new(file, 0))),
        false => Ok(None),
    };
    let ranges: Vec<_> = ranges.iter().map(|(at, size)| Ok((*at, *size, file(*size)?))).collect::<Result<Vec<_>>>()?;
    GuestRam::from_ranges_with_files(&ranges).map_err(|e| Error::Memory(e.to_string()))
}

/// Maps each range from the same place of a file, copy-on-write.
pub(super) fn map_file(ranges: &[(GuestAddress, usize)], file: &Arc<File>) -> Result<GuestRam> {
    let failed = |e: &dyn std::fmt::Display| Error::Memory(e.to_string());
    let regions = ranges.iter().map(|(at, size)| {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        let place = FileOffset::from_arc(file.clone(), at.0);
        let region = MmapRegion::build(Some(place), *size, prot, flags).map_err(|e| failed(&e))?;
        GuestRegionMmap::new(region, *at).ok_or_else(|| failed(&"a region beyond the address space"))
    });
    GuestRam::from_regions(regions.collect::<Result<_>>()?).map_err(|e| failed(&e))
}

fn shared_file(size: usize) -> Result<File> {
    let what = || host(format!("{size} bytes of shared guest memory"));
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(what()(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just made and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size as u64).map_err(what())?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is involved.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(what()(io::Error::last_os_error())),
    }
}

impl Memory {
    /// The regions for another process to map; empty if the memory is not shared.
    pub fn shared_regions(&self) -> Vec<SharedRegion> {
        let region = |r: &<GuestRam as GuestMemoryBackend>::R| {
            let file = r.file_offset().filter(|_| r.flags() & libc::MAP_SHARED != 0)?;
            Some(SharedRegion {
                guest: r.start_addr().0,
                size: r.len(),
                here: r.as_ptr() as u64,
                fd: file.file().as_raw_fd(),
            })
        };
        self.ram().iter().filter_map(region).collect()
    }
}
