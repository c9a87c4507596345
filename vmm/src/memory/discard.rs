//! Guest memory that carries no content: pages the guest has given back.
//!
//! Always true: a page given back takes no memory of the host until it is written again, and reads as it does in a fresh VM.
//! What that means for a port: when it begins, such a page is not among those the host has given memory, so it is not
//! sent; when it is given back while the port goes on, its mark among the monitor's own writes makes it be sent once more, as a
//! zero page. From its next write on it is a page like any other: the dirty log sees that write, and the host gives it memory
//! again. So no list of such pages has to be kept in step with the guest: the page tables are that list.

use std::io;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestRange, Memory, PAGE_SIZE};

impl Memory {
    /// Gives the whole pages of `range` back to the host; what a guest tells of parts of pages is ignored. Returns the number
    /// of bytes given back.
    pub fn discard(&self, range: GuestRange) -> io::Result<u64> {
        let page = PAGE_SIZE as u64;
        let start = range.address.next_multiple_of(page);
        let end = (range.address + u64::from(range.len)) / page * page;
        if start >= end {
            return Ok(0);
        }
        let inner = GuestRange { address: start, len: (end - start) as u32 };
        let shared = self.ram.find_region(inner.address()).and_then(|region| {
            let file = region.file_offset().filter(|_| region.get_mmap().flags() & libc::MAP_SHARED != 0)?;
            Some((file, file.start() + (start - region.start_addr().0)))
        });
        let rc = match shared {
            // Memory another process has as well: the page goes only when it goes from the file.
            Some((file, offset)) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let fd = std::os::fd::AsRawFd::as_raw_fd(file.file());
                // SAFETY: no memory of this process is involved but the mapping, which stays.
                unsafe { libc::fallocate(fd, mode, offset as libc::off_t, (end - start) as libc::off_t) }
            }
            // Without the page the file's would show again: zeroes take its place for good.
            None if self.is_of_file() => {
                let at = self.iovec(inner).0;
                let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: as below; the range stays mapped, and goes with the mapping of guest memory around it.
                let new = unsafe { libc::mmap(at.iov_base, at.iov_len, prot, flags, -1, 0) };
                if new == libc::MAP_FAILED { -1 } else { 0 }
            }
            None => {
                let at = self.iovec(inner).0;
                // SAFETY: whole pages inside the mapping of guest memory, to which nothing holds references that
                // depend on its content.
                unsafe { libc::madvise(at.iov_base, at.iov_len, libc::MADV_DONTNEED) }
            }
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        // Afterwards: a port that has read the page before must read it again.
        self.mark_dirty(inner, inner.len);
        Ok(end - start)
    }
}

#[cfg(test)]
mod tests;
