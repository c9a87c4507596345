//! Guest memory from a chain of checkpoints.
//!
//! Always true: of each page the newest checkpoint that speaks of it counts, and a page none speaks of is zero. A page that is read is
//! checked against its checksum before it is the guest's. A file that is mapped is checked as a whole before, unless
//! that was not wanted: its pages by their checksums, and that there is nothing where it says there is nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use migration::checkpoint::{PageRun, page_sum};
use vm_memory::{Bytes, GuestAddress};

use super::RestoreMemory;
use super::chain::Link;
use crate::error::{Error, Result};
use crate::memory::{Memory, PAGE_SIZE};
use crate::port::transfer::is_zero;

/// Pages read at once, at most (1 MiB).
const READ_MAX: usize = 256;

/// Puts a chain's pages, the newest checkpoint first, into fresh memory.
pub(super) fn fill(memory: &mut Memory, chain: &[Link], how: RestoreMemory, verify: bool) -> Result<()> {
    let Some((root, others)) = chain.split_last() else { return Ok(()) };
    for link in chain {
        if let Some(run) = link.checkpoint.pages.runs().iter().find(|run| !is_memory(memory, run)) {
            let address = run.first * PAGE_SIZE as u64;
            return Err(damaged(link, format!("page {address:#x} is outside of the guest's memory")));
        }
    }
    let mut buffer = vec![0; READ_MAX * PAGE_SIZE];
    // Another process's view of shared memory cannot be copy-on-write.
    let map = how == RestoreMemory::Map && memory.shared_regions().is_empty();
    let mut seen = vec![0u64; memory.bitmap_words()];
    let mut mapped = vec![0u64; memory.bitmap_words()];
    if map {
        for page in root.checkpoint.pages.runs().iter().filter(|r| r.raw).flat_map(pages) {
            mapped[(page / 64) as usize] |= 1 << (page % 64);
        }
        if verify {
            check(root, &mapped, &mut buffer)?;
        }
        memory.map_file(&root.memory, mapped.clone())?;
    }
    for link in if map { others } else { chain } {
        take_over(memory, link, &mut seen, &mapped, &mut buffer)?;
    }
    Ok(())
}

fn pages(run: &PageRun) -> impl Iterator<Item = u64> + use<> {
    run.first..run.first + u64::from(run.pages)
}

fn is_memory(memory: &Memory, run: &PageRun) -> bool {
    let bytes = run.first * PAGE_SIZE as u64..(run.first + u64::from(run.pages)) * PAGE_SIZE as u64;
    memory.regions().any(|r| r.range().start <= bytes.start && bytes.end <= r.range().end)
}

fn damaged(link: &Link, why: impl std::fmt::Display) -> Error {
    Error::State(format!("checkpoint {}: {why}", link.dir.display()))
}

fn read(link: &Link, page: u64, buffer: &mut [u8]) -> Result<()> {
    let read = link.memory.read_exact_at(buffer, page * PAGE_SIZE as u64);
    read.map_err(|e| damaged(link, format!("its memory file: {e}")))
}

/// Reads pages and checks them.
fn read_checked(link: &Link, page: u64, sums: &[u64], buffer: &mut [u8]) -> Result<()> {
    read(link, page, buffer)?;
    for (i, (bytes, sum)) in buffer.chunks_exact(PAGE_SIZE).zip(sums).enumerate() {
        if page_sum(bytes) != *sum {
            let address = (page + i as u64) * PAGE_SIZE as u64;
            return Err(damaged(link, format!("page {address:#x} is damaged")));
        }
    }
    Ok(())
}

/// Puts those pages of a checkpoint into memory that no newer one has spoken of.
fn take_over(memory: &Memory, link: &Link, seen: &mut [u64], mapped: &[u64], buffer: &mut [u8]) -> Result<()> {
    let has = |words: &[u64], page: u64| words[(page / 64) as usize] >> (page % 64) & 1 != 0;
    let write = |page: u64, bytes: &[u8]| {
        let written = memory.ram().write_slice(bytes, GuestAddress(page * PAGE_SIZE as u64));
        written.map_err(|e| Error::Memory(e.to_string()))
    };
    for (run, sums) in link.checkpoint.pages.sums() {
        let mut page = run.first;
        let end = run.first + u64::from(run.pages);
        while page < end {
            let fresh = (page..end).take(READ_MAX).take_while(|p| !has(seen, *p)).count();
            let pages = page..page + fresh as u64;
            if run.raw && fresh > 0 {
                let (buffer, sums) = (&mut buffer[..fresh * PAGE_SIZE], &sums[(page - run.first) as usize..]);
                read_checked(link, page, &sums[..fresh], buffer)?;
                write(page, buffer)?;
            } else {
                // Only what is mapped is not zero by itself.
                pages.clone().filter(|p| has(mapped, *p)).try_for_each(|p| write(p, &[0; PAGE_SIZE]))?;
            }
            pages.for_each(|p| seen[(p / 64) as usize] |= 1 << (p % 64));
            page += (fresh as u64).max(1);
        }
    }
    Ok(())
}

/// Checks a file that is to be mapped.
fn check(link: &Link, mapped: &[u64], buffer: &mut [u8]) -> Result<()> {
    let mut at = 0;
    for (run, sums) in link.checkpoint.pages.sums().filter(|(run, _)| run.raw) {
        empty(link, at..run.first, buffer)?;
        let firsts = pages(&run).step_by(READ_MAX);
        for (first, sums) in firsts.zip(sums.chunks(READ_MAX)) {
            read_checked(link, first, sums, &mut buffer[..sums.len() * PAGE_SIZE])?;
        }
        at = run.first + u64::from(run.pages);
    }
    // As far as it is mapped.
    let end = mapped.iter().rposition(|w| *w != 0).map_or(0, |last| (last as u64 + 1) * 64);
    let len = link.memory.metadata().map_err(|e| damaged(link, e))?.len() / PAGE_SIZE as u64;
    empty(link, at..end.min(len), buffer)
}

/// Checks that there is nothing in a part of the file.
fn empty(link: &Link, pages: std::ops::Range<u64>, buffer: &mut [u8]) -> Result<()> {
    let mut page = pages.start;
    while page < pages.end {
        page = match next_data(&link.memory, page) {
            Some(data) if data < pages.end => data,
            _ => return Ok(()),
        };
        let count = (pages.end - page).min(READ_MAX as u64);
        let buffer = &mut buffer[..count as usize * PAGE_SIZE];
        read(link, page, buffer)?;
        if let Some(i) = buffer.chunks_exact(PAGE_SIZE).position(|p| !is_zero(p)) {
            let address = (page + i as u64) * PAGE_SIZE as u64;
            return Err(damaged(link, format!("page {address:#x} is not the zero it should be")));
        }
        page += count;
    }
    Ok(())
}

/// The first page from `page` on in which the file may have something.
fn next_data(file: &File, page: u64) -> Option<u64> {
    let from = page * PAGE_SIZE as u64;
    // SAFETY: no memory is involved.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, libc::SEEK_DATA) };
    match (at, io::Error::last_os_error().raw_os_error()) {
        (0.., _) => Some((at as u64).max(from) / PAGE_SIZE as u64),
        (_, Some(libc::ENXIO)) => None,
        // A file system that does not know: everything may be something.
        _ => Some(page),
    }
}
