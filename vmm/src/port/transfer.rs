//! Guest memory into PAGES frames and back.
//!
//! Owns: which pages still have to be sent ([`Pending`]), the buffer one frame is put together in ([`PageWriter`]), the
//! writing of received pages and what is known of them ([`Arrived`]). Always true: a page's content is copied after its bit was taken out of the
//! dirty log, so a write during the copy is seen again; the copy, not the guest's page, is what is
//! checksummed and sent, so the frame is consistent although the guest goes on writing.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VmFd;
use migration::pages::{Pages, RunKind, TABLE_MAX, Table};
use migration::wire::{FrameType, PAGES_MAX};
use vm_memory::{Bytes, GuestAddress};

use super::connection::{Connection, ConnectionError};
use super::dead::{Dead, LeftOut, Reason};
use crate::error::{Error, Result};
use crate::memory::{Memory, PAGE_SIZE};

/// Words of the bitmap that are asked of the kernel's pagemap at once (1 MiB of entries).
const PAGEMAP_WORDS: usize = 2048;

/// Pages to be sent: bit n of word m is page 64 m + n.
#[derive(Debug, Clone, Default)]
pub struct Pending {
    words: Vec<u64>,
}

impl Pending {
    /// Every page.
    pub fn all(memory: &Memory) -> Pending {
        let mut pending = Pending::none(memory);
        memory.regions().for_each(|r| pending.words[r.words()].fill(u64::MAX));
        pending
    }

    /// Every page that may have content: those the host has given memory. A page it has not is zero, here as in the fresh
    /// memory of a destination. To be called after the dirty log was started.
    pub fn populated(memory: &Memory) -> Pending {
        if !memory.shared_regions().is_empty() {
            // Another process may have written what this one has not mapped.
            return Pending::all(memory);
        }
        match populated(memory) {
            Ok(mut pending) => {
                // What a checkpoint's file holds the host gives memory only when it is looked at.
                pending.add(memory.filed().unwrap_or_default());
                pending
            }
            Err(e) => {
                log::warn!("pagemap: {e}; all memory is looked at");
                Pending::all(memory)
            }
        }
    }

    /// No page.
    pub fn none(memory: &Memory) -> Pending {
        Pending { words: vec![0; memory.bitmap_words()] }
    }

    /// Adds a bitmap of the same form.
    pub fn add(&mut self, bitmap: &[u64]) {
        for (word, more) in self.words.iter_mut().zip(bitmap) {
            *word |= more;
        }
    }

    /// As a bitmap.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        count(&self.words)
    }

    /// Adds what the monitor itself has written since it was last asked.
    pub fn add_own(&mut self, memory: &Memory) {
        self.add(&memory.take_own_dirty());
    }

    /// Adds what the guest has written and clears it in the log, if the guest may go on writing.
    pub fn add_guest(&mut self, memory: &Memory, vm: &VmFd, clear: bool) -> Result<()> {
        let bitmap = memory.guest_dirty(vm)?;
        if clear && bitmap.iter().any(|w| *w != 0) {
            memory.clear_guest_dirty(vm, &bitmap)?;
        }
        self.add(&bitmap);
        Ok(())
    }

    /// Pages that would have to be sent now: these, and what the log has, but for those that `dead` finds without content. Nothing
    /// is cleared.
    pub fn outlook(&mut self, memory: &Memory, vm: &VmFd, dead: impl FnOnce() -> Dead) -> Result<u64> {
        self.add_own(memory);
        let mut all = self.words.clone();
        for (word, more) in all.iter_mut().zip(memory.guest_dirty(vm)?) {
            *word |= more;
        }
        for (word, less) in all.iter_mut().zip(dead().words()) {
            *word &= !less;
        }
        Ok(count(&all))
    }

    /// Takes the pages out, lowest first.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter_mut().enumerate().flat_map(|(index, word)| {
            let mut bits = std::mem::take(word);
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros();
                bits &= bits.wrapping_sub(1);
                (bit < 64).then_some(index as u64 * 64 + u64::from(bit))
            })
        })
    }
}

/// Asks the kernel which pages are there (proc_pid_pagemap(5)).
fn populated(memory: &Memory) -> std::io::Result<Pending> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    const ENTRY: usize = 8;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut pending = Pending::none(memory);
    for region in memory.regions() {
        // A word of the bitmap at a time, times some.
        let mut entries = vec![0; PAGEMAP_WORDS * 64 * ENTRY];
        let first = region.host as u64 / PAGE_SIZE as u64;
        for (index, words) in pending.words[region.words()].chunks_mut(PAGEMAP_WORDS).enumerate() {
            let at = first + (index * PAGEMAP_WORDS * 64) as u64;
            let entries = &mut entries[..words.len() * 64 * ENTRY];
            pagemap.read_exact_at(entries, at * ENTRY as u64)?;
            for (page, entry) in entries.as_chunks::<ENTRY>().0.iter().enumerate() {
                if u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                    words[page / 64] |= 1 << (page % 64);
                }
            }
        }
    }
    Ok(pending)
}

fn count(words: &[u64]) -> u64 {
    words.iter().map(|w| u64::from(w.count_ones())).sum()
}

/// What a round sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Pages with content.
    pub raw: u64,
    /// Zero pages.
    pub zero: u64,
    /// Pages left out.
    pub skipped: Skipped,
}

/// Pages that were not sent as they have no content, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Skipped {
    /// In buffers of devices.
    pub posted: u64,
    /// Not used by the guest's allocator.
    pub free: u64,
}

impl Skipped {
    /// Adds those of a round.
    pub fn add(&mut self, more: Skipped) {
        self.posted += more.posted;
        self.free += more.free;
    }
}

impl Sent {
    /// All pages sent.
    pub fn pages(&self) -> u64 {
        self.raw + self.zero
    }

    /// Counts a page: what becomes of it, given why it has no content and whether it is zero.
    pub(super) fn kind(&mut self, dead: Option<Reason>, is_zero: impl FnOnce() -> Result<bool>) -> Result<RunKind> {
        match dead {
            Some(Reason::Posted) => self.skipped.posted += 1,
            Some(Reason::Free) => self.skipped.free += 1,
            None if is_zero()? => {
                self.zero += 1;
                return Ok(RunKind::Zero);
            }
            None => {
                self.raw += 1;
                return Ok(RunKind::Raw);
            }
        }
        Ok(RunKind::Skipped)
    }
}

/// What is done with a run table and the raw pages behind it.
type Emit<'a> = dyn FnMut(&Table, &[u8]) -> std::result::Result<(), SendError> + 'a;

/// Puts PAGES frames together. Its buffers are made once, before the pause.
#[derive(Debug)]
pub struct PageWriter {
    table: Table,
    data: Vec<u8>,
}

impl Default for PageWriter {
    fn default() -> Self {
        PageWriter::new()
    }
}

impl PageWriter {
    /// With all the memory it will ever need.
    pub fn new() -> PageWriter {
        PageWriter { table: Table::new(), data: Vec::with_capacity(PAGES_MAX) }
    }

    /// Sends pending pages while the guest runs, but for those that are `dead`; `out` learns which.
    pub fn send(
        &mut self,
        pending: &mut Pending,
        (dead, out): (&Dead, &mut LeftOut),
        memory: &Memory,
        connection: &mut Connection,
        stop: &dyn Fn() -> bool,
    ) -> std::result::Result<Sent, SendError> {
        let mut head = Vec::with_capacity(TABLE_MAX);
        self.frames(pending, (dead, out), memory, &mut |table, data| {
            if stop() {
                return Err(ConnectionError::Stopped.into());
            }
            head.clear();
            table.encode(&mut head);
            let header = connection.seal(FrameType::Pages, &[&head, data]);
            Ok(connection.write(&[&header, &head, data], stop)?)
        })
    }

    fn frames(
        &mut self,
        pending: &mut Pending,
        (dead, out): (&Dead, &mut LeftOut),
        memory: &Memory,
        emit: &mut Emit<'_>,
    ) -> std::result::Result<Sent, SendError> {
        let mut sent = Sent::default();
        self.table.clear();
        self.data.clear();
        let mut page = [0u8; PAGE_SIZE];
        for number in pending.drain() {
            let address = number * PAGE_SIZE as u64;
            let kind = sent.kind(dead.reason(number), || {
                let read = memory.ram().read_slice(&mut page, GuestAddress(address));
                read.map_err(|e| Error::Memory(format!("page {address:#x}: {e}")))?;
                Ok(is_zero(&page))
            })?;
            out.note(number, kind);
            if !self.table.push(address, kind) {
                emit(&self.table, &self.data)?;
                self.table.clear();
                self.data.clear();
                // An empty table takes any page.
                let _ = self.table.push(address, kind);
            }
            if kind == RunKind::Raw {
                self.data.extend_from_slice(&page);
            }
        }
        if !self.table.is_empty() {
            emit(&self.table, &self.data)?;
            self.table.clear();
            self.data.clear();
        }
        Ok(sent)
    }
}

/// What ends the sending of pages.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// This side.
    #[error(transparent)]
    Memory(#[from] Error),
    /// The connection.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

pub(crate) fn is_zero(page: &[u8]) -> bool {
    // Most pages with content show it in their first words; comparing the rest in blocks lets it be vectorised.
    page[..64].iter().all(|b| *b == 0) && page.chunks_exact(256).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// What is known of the pages of a VM that is on its way.
#[derive(Debug, Default)]
pub struct Arrived {
    /// Those that are not zero any more, so that a zero run does not touch memory that has never been written.
    touched: Vec<u64>,
    left_out: LeftOut,
}

impl Arrived {
    /// Nothing has come.
    pub fn new(memory: &Memory) -> Arrived {
        Arrived { touched: vec![0; memory.bitmap_words()], left_out: LeftOut::new(memory) }
    }

    /// The pages that do not come.
    pub fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    /// Writes received pages into guest memory; how many they are.
    pub fn apply(&mut self, pages: &Pages<'_>, memory: &Memory) -> Result<u64> {
        let mut applied = 0;
        for (run, data) in pages.runs() {
            let first = run.address / PAGE_SIZE as u64;
            let write = |address: u64, bytes: &[u8]| {
                memory.ram().write_slice(bytes, GuestAddress(address)).map_err(|e| Error::Memory(e.to_string()))
            };
            if run.kind == RunKind::Raw {
                write(run.address, data)?;
            }
            for number in first..first + u64::from(run.pages) {
                self.left_out.note(number, run.kind);
                let Some(word) = self.touched.get_mut((number / 64) as usize) else { break };
                let bit = 1 << (number % 64);
                match run.kind {
                    RunKind::Raw => *word |= bit,
                    RunKind::Zero if *word & bit != 0 => write(number * PAGE_SIZE as u64, &[0; PAGE_SIZE])?,
                    RunKind::Zero | RunKind::Skipped => {}
                }
            }
            applied += u64::from(run.pages);
        }
        Ok(applied)
    }

    /// Fills the pages that did not come with [`POISON`]; how many they are. For tests: who needs one of them finds that.
    pub fn poison(&self, memory: &Memory) -> Result<u64> {
        let mut poisoned = 0;
        for address in memory.regions().flat_map(|r| r.range().step_by(PAGE_SIZE)) {
            if self.left_out.has(address / PAGE_SIZE as u64) {
                let written = memory.ram().write_slice(&[POISON; PAGE_SIZE], GuestAddress(address));
                written.map_err(|e| Error::Memory(e.to_string()))?;
                poisoned += 1;
            }
        }
        Ok(poisoned)
    }
}

/// What [`Arrived::poison`] fills pages with: no address, no length and no text that makes sense.
pub const POISON: u8 = 0xdb;

/// xxh3-64 of all of memory but what was left out.
pub fn digest(memory: &Memory, left_out: &LeftOut) -> Result<u64> {
    let mut hash = migration::wire::Digest::default();
    let mut page = [0u8; PAGE_SIZE];
    for address in memory.regions().flat_map(|r| r.range().step_by(PAGE_SIZE)) {
        if !left_out.has(address / PAGE_SIZE as u64) {
            memory.ram().read_slice(&mut page, GuestAddress(address)).map_err(|e| Error::Memory(e.to_string()))?;
            hash.update(&page);
        }
    }
    Ok(hash.finish())
}

#[cfg(test)]
mod tests;
