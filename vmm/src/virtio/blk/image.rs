//! A raw image: opened, locked, measured, grown.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::SECTOR;
use crate::error::{Error, Result, host};

const STATX_DIOALIGN: u32 = 0x2000;

/// What addresses and lengths of buffers must be multiples of (powers of two).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlign {
    /// Addresses.
    pub address: u32,
    /// Length of each piece.
    pub length: u32,
}

/// The page cache takes anything.
const ANY: DirectAlign = DirectAlign { address: 1, length: 1 };

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    sectors: u64,
    readonly: bool,
    align: DirectAlign,
    is_device: bool,
    /// File system block or physical sector, in bytes.
    block: u64,
}

impl Image {
    /// Opens `path` and locks it: one writer, or any number of readers. Past the page cache if `direct` says so, or, if it says
    /// nothing, where that is possible (not on tmpfs, for one).
    pub fn open(path: &Path, readonly: bool, direct: Option<bool>) -> Result<Image> {
        let what = || format!("disk {}", path.display());
        let open =
            |flags| OpenOptions::new().read(true).write(!readonly).custom_flags(flags | libc::O_CLOEXEC).open(path);
        let past_cache = match direct {
            Some(false) => None,
            _ => match open(libc::O_DIRECT) {
                Ok(file) => direct_align(&file).map(|align| (file, align)),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => None,
                Err(e) => return Err(host(what())(e)),
            },
        };
        let (file, align) = match past_cache {
            Some(found) => found,
            None if direct == Some(true) => {
                let why = "the file system cannot do I/O past the page cache in sectors; leave direct out";
                return Err(Error::Conflict(format!("{}: {why}", what())));
            }
            None => (open(0).map_err(host(what()))?, ANY),
        };
        lock(&file, readonly).map_err(|e| match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => {
                Error::Conflict(format!("{}: in use by another process; an image has one writer", what()))
            }
            _ => host(format!("{}: lock", what()))(e),
        })?;
        let metadata = file.metadata().map_err(host(what()))?;
        let mut image = Image {
            sectors: 0,
            readonly,
            align,
            is_device: metadata.file_type().is_block_device(),
            block: metadata.blksize(),
            file,
        };
        image.measure().map_err(host(what()))?;
        Ok(image)
    }

    /// Looks how large it is now.
    pub fn measure(&mut self) -> io::Result<()> {
        self.sectors = self.file.seek(SeekFrom::End(0))? / SECTOR;
        Ok(())
    }

    /// Makes the file larger if it is smaller than `bytes`.
    pub fn grow(&mut self, bytes: u64) -> io::Result<()> {
        self.measure()?;
        if !self.is_device && bytes > self.sectors * SECTOR {
            self.file.set_len(bytes)?;
            self.measure()?;
        }
        Ok(())
    }

    /// A block device, not a file.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// What ranges to discard should be multiples of, in bytes.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it must not be written.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// What addresses and lengths of buffers must be multiples of.
    pub fn align(&self) -> DirectAlign {
        self.align
    }
}

impl AsRawFd for Image {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Alignment of buffers for O_DIRECT; `None` where it is not possible for every sector or nobody says.
fn direct_align(file: &File) -> Option<DirectAlign> {
    // SAFETY: all-zero is a valid statx; the path is an empty C string; the call fills the struct.
    let (rc, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let rc = libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &mut stat);
        (rc, stat)
    };
    if rc != 0 || stat.stx_mask & STATX_DIOALIGN == 0 {
        return None;
    }
    let (address, length) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    let possible = address.is_power_of_two() && length.is_power_of_two() && u64::from(length) <= SECTOR;
    // The kernel wants whole blocks in each piece.
    possible.then_some(DirectAlign { address, length })
}

/// How long a lock is waited for: a process that was killed lets go of its images only when the kernel has ended its last requests.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// One writer or any number of readers, of this program or QEMU.
pub fn lock(file: &File, readonly: bool) -> io::Result<()> {
    let lock = libc::flock {
        l_type: if readonly { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let begin = Instant::now();
    loop {
        // SAFETY: the call reads one flock.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        let held = matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
        if !held || begin.elapsed() > LOCK_PATIENCE {
            return Err(e);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
