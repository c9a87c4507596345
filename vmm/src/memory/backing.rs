//! Where the pages of guest memory come from: anonymous memory, or files in memory that other processes can map.
//!
//! Always true: a shared region is sealed, so that nobody who has it can make it shorter under the monitor's feet.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

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
            let file = r.file_offset()?;
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
