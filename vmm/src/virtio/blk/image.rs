//! A raw image: opened, locked, measured, grown; its lock, given up and taken when a VM is ported.

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

/// An open image. What is written to it must be written under its lock.
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
        let image = Image::open_unlocked(path, readonly, direct)?;
        lock(&image.file, readonly, LOCK_PATIENCE).map_err(|e| lock_error(path, e))?;
        Ok(image)
    }

    /// The same without the lock, which another process has: for [`Image::take`].
    pub fn open_unlocked(path: &Path, readonly: bool, direct: Option<bool>) -> Result<Image> {
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

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the page cache has what was written last.
    pub fn is_cached(&self) -> bool {
        self.align == ANY && !self.readonly
    }

    /// Gives the lock up, with nothing in flight; what was written is where another host finds it.
    pub fn give(&mut self) -> io::Result<()> {
        if self.is_cached() {
            self.file.sync_data()?;
        }
        unlock(&self.file)
    }

    /// Takes the lock, if nobody else has it, and looks at the image anew; `forget`: what this host's page cache has is old.
    pub fn take(&mut self, forget: bool) -> io::Result<()> {
        lock(&self.file, self.readonly, Duration::ZERO)?;
        if forget {
            drop_cache(&self.file);
        }
        self.measure()
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
pub const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Lets go of what the page cache has of the file. It is advice; what a failure leaves a network file system checks by itself.
pub fn drop_cache(file: &File) {
    // SAFETY: no memory is involved.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// A lock of the whole file.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn kind_of_lock(readonly: bool) -> libc::c_int {
    if readonly { libc::F_RDLCK } else { libc::F_WRLCK }
}

/// A failure to lock an image, or to look into it, in words.
pub fn lock_error(path: &Path, e: io::Error) -> Error {
    let what = format!("disk {}", path.display());
    match is_held(&e) {
        true => Error::Conflict(format!("{what}: in use by another process; an image has one writer")),
        false => host(what)(e),
    }
}

fn is_held(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Whether somebody else has the file locked, as a writer or as a reader.
pub fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = whole(libc::F_WRLCK);
    // SAFETY: the call reads one flock and writes it.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } {
        0 => Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the lock up.
pub fn unlock(file: &File) -> io::Result<()> {
    // SAFETY: the call reads one flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &whole(libc::F_UNLCK)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One writer or any number of readers, of this program or QEMU; waits so long for others to let go.
pub fn lock(file: &File, readonly: bool, patience: Duration) -> io::Result<()> {
    let lock = whole(kind_of_lock(readonly));
    let begin = Instant::now();
    loop {
        // SAFETY: the call reads one flock.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if !is_held(&e) || begin.elapsed() >= patience {
            return Err(e);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
