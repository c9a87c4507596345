//! Reading a checkpoint: the state file as a whole, the memory file to be mapped.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use migration::checkpoint::{AT_REST, Checkpoint, STATE_FILE_MAX, page_sum};

use super::{MEMORY, STATE};
use crate::error::{Error, Result, host};
use crate::memory::{Memory, PAGE_SIZE};
use crate::port::guest;
use crate::vm::VmDescription;

/// Bytes of the memory file looked at at once.
const PIECE: usize = 64 << 10;

/// A checkpoint that was read.
#[derive(Debug)]
pub struct Saved {
    path: PathBuf,
    /// Everything but memory.
    pub checkpoint: Checkpoint,
    /// What the VM is made of.
    pub description: VmDescription,
    memory: File,
}

impl Saved {
    /// Reads the state file and opens the memory file.
    pub fn open(path: &Path) -> Result<Saved> {
        let what = |name: &str| host(format!("checkpoint {}", path.join(name).display()));
        let refused = |e: &dyn std::fmt::Display| Error::State(format!("checkpoint {}: {e}", path.display()));
        let mut bytes = Vec::new();
        let file = File::open(path.join(STATE)).map_err(what(STATE))?;
        file.take(STATE_FILE_MAX as u64 + 1).read_to_end(&mut bytes).map_err(what(STATE))?;
        if bytes.len() > STATE_FILE_MAX {
            return Err(refused(&format!("a state file of more than {STATE_FILE_MAX} bytes")));
        }
        let checkpoint = Checkpoint::parse(&bytes).map_err(|e| refused(&e))?;
        if checkpoint.parent.is_some() {
            return Err(refused(&"is incremental, which this vmm cannot read"));
        }
        let description = guest::decode(&checkpoint.description)?;
        let memory = File::open(path.join(MEMORY)).map_err(what(MEMORY))?;
        let saved = Saved { path: path.to_owned(), checkpoint, description, memory };
        saved.check_length()?;
        Ok(saved)
    }

    /// Whether the guest stood at the end of a park.
    pub fn is_at_rest(&self) -> bool {
        self.checkpoint.flags & AT_REST != 0
    }

    fn refused(&self, why: impl std::fmt::Display) -> Error {
        Error::State(format!("checkpoint {}: {why}", self.path.display()))
    }

    /// A file that ends before memory does would end the process at the guest's first access there.
    fn check_length(&self) -> Result<()> {
        let length = self.memory.metadata().map_err(host(format!("checkpoint {}", self.path.display())))?.len();
        if length < self.checkpoint.limit {
            return Err(
                self.refused(format!("the memory file has {length} bytes of {}: truncated", self.checkpoint.limit))
            );
        }
        Ok(())
    }

    /// Maps the memory file, copy-on-write: what is not written is in the page cache once for all that map it. The file may be
    /// deleted then, but not changed.
    pub fn map(&self) -> Result<Memory> {
        let size = usize::try_from(self.checkpoint.description.memory_size).unwrap_or(usize::MAX);
        let file = self.memory.try_clone().map_err(host(format!("checkpoint {}", self.path.display())))?;
        let memory = Memory::of_file(size, file)?;
        if memory.regions().map(|r| r.range().end).max() != Some(self.checkpoint.limit) {
            return Err(self.refused("memory of another size than the description's"));
        }
        Ok(memory)
    }

    /// Compares every page in the memory file with its checksum, and makes sure that there is nothing but zeroes in the rest.
    pub fn verify(&self) -> Result<()> {
        let mut buffer = vec![0; PIECE];
        let read = |bytes: &mut [u8], at: u64| {
            self.memory.read_exact_at(bytes, at).map_err(host(format!("checkpoint {}", self.path.display())))
        };
        // Up to where there is nothing but what the runs so far say.
        let mut clean = 0;
        for (run, sums) in self.checkpoint.pages.sums().filter(|(run, _)| run.raw) {
            let first = run.first * PAGE_SIZE as u64;
            self.verify_zero(clean..first, &mut buffer)?;
            for (index, sums) in sums.chunks(PIECE / PAGE_SIZE).enumerate() {
                let at = first + (index * PIECE) as u64;
                let bytes = &mut buffer[..sums.len() * PAGE_SIZE];
                read(bytes, at)?;
                for ((page, sum), number) in bytes.chunks_exact(PAGE_SIZE).zip(sums).zip(at / PAGE_SIZE as u64..) {
                    if page_sum(page) != *sum {
                        return Err(self.refused(format!("page {number} is damaged: its checksum differs")));
                    }
                }
            }
            clean = first + u64::from(run.pages) * PAGE_SIZE as u64;
        }
        self.verify_zero(clean..self.checkpoint.limit, &mut buffer)
    }

    /// Makes sure that a range of the file is zero; holes are, and are not read.
    fn verify_zero(&self, range: std::ops::Range<u64>, buffer: &mut [u8]) -> Result<()> {
        let what = || host(format!("checkpoint {}", self.path.display()));
        let seek = |at: u64, whence| {
            // SAFETY: no memory is involved.
            let found = unsafe { libc::lseek(self.memory.as_raw_fd(), at as libc::off_t, whence) };
            u64::try_from(found).ok()
        };
        let mut at = range.start;
        while at < range.end {
            // None: nothing but a hole up to the end.
            let Some(data) = seek(at, libc::SEEK_DATA).filter(|data| *data < range.end) else { return Ok(()) };
            let end = seek(data, libc::SEEK_HOLE).unwrap_or(range.end).min(range.end);
            at = data;
            while at < end {
                let piece = buffer.len().min((end - at) as usize);
                self.memory.read_exact_at(&mut buffer[..piece], at).map_err(what())?;
                if let Some(byte) = buffer[..piece].iter().position(|b| *b != 0) {
                    let page = (at + byte as u64) / PAGE_SIZE as u64;
                    return Err(self.refused(format!("page {page} is damaged: it should be zero")));
                }
                at += piece as u64;
            }
            if data == end {
                return Ok(());
            }
        }
        Ok(())
    }
}
