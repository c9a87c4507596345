//! Pages that need not be sent: the guest has no use for what they contain.
//!
//! Owns which they are at one instant ([`Dead`]), why, and which of all pages a stream has left out so far ([`LeftOut`]). Always
//! true, if [`Dead::look`] comes behind the reading (and clearing) of the dirty log, as the copying of pages does: a page left out has
//! no content the guest may rely on, or is written before it has, and that write the log shows. So a page is decided on
//! again each time it is due, the last time when the guest stands still, and what was decided before binds nobody.
//!
//! - **Posted**: wholly inside buffers the driver has given to a device to write to. What a driver finds there besides what the device says it
//!   has written it must not rely on (virtio 1.2, 2.7.8.2); the device's writes are marked. Buffers that are taken back unwritten, by a
//!   reset of the device or a queue, have been the device's to write to all the time: whoever gets the page next cannot know.
//! - **Free**: the guest says so ([`free`]): its allocator does not use the page, and expects nothing there.
//!
//! A guest that names a page it uses harms itself, and nobody else: what this process reads of guest memory it checks anyway.

mod free;

use migration::pages::RunKind;

use crate::memory::{GuestRange, Memory, PAGE_SIZE};
use crate::vm::Vm;

/// Pages without content, as bitmaps: bit n of word m is page 64 m + n.
#[derive(Debug, Clone, Default)]
pub struct Dead {
    posted: Vec<u64>,
    free: Vec<u64>,
    /// All of them.
    any: Vec<u64>,
}

/// Why a page is not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It lies in buffers a device is to write to.
    Posted,
    /// The guest's allocator does not use it.
    Free,
}

impl Dead {
    /// No page.
    pub fn none() -> Dead {
        Dead::default()
    }

    /// How it is now. To be called behind the reading of the dirty log.
    pub fn look(vm: &Vm) -> Dead {
        let memory = vm.memory();
        let free = vm.info().and_then(|info| free::read(memory, info)).unwrap_or_default();
        Dead::of(memory, vm.devices().posted(), free)
    }

    /// From buffers that are posted, in any order, and a bitmap of free pages.
    pub(super) fn of(memory: &Memory, mut posted: Vec<GuestRange>, free: Vec<u64>) -> Dead {
        let mut dead = Dead { posted: vec![0; memory.bitmap_words()], free, any: Vec::new() };
        // Small buffers that lie one behind the other fill whole pages together.
        posted.sort_unstable_by_key(|r| r.address().0);
        let mut piece = 0..0;
        for range in posted {
            let (start, end) = (range.address().0, range.address().0 + u64::from(range.len()));
            if start > piece.end {
                dead.add_posted(&piece);
                piece = start..end;
            }
            piece.end = piece.end.max(end);
        }
        dead.add_posted(&piece);
        dead.any.clone_from(&dead.posted);
        dead.any.iter_mut().zip(&dead.free).for_each(|(any, free)| *any |= free);
        dead
    }

    fn add_posted(&mut self, piece: &std::ops::Range<u64>) {
        let page = PAGE_SIZE as u64;
        for number in piece.start.div_ceil(page)..piece.end / page {
            if let Some(word) = self.posted.get_mut((number / 64) as usize) {
                *word |= 1 << (number % 64);
            }
        }
    }

    /// Whether a page is one, and why.
    pub fn reason(&self, page: u64) -> Option<Reason> {
        match () {
            () if has(&self.posted, page) => Some(Reason::Posted),
            () if has(&self.free, page) => Some(Reason::Free),
            () => None,
        }
    }

    /// All of them.
    pub fn words(&self) -> &[u64] {
        &self.any
    }
}

fn has(words: &[u64], page: u64) -> bool {
    words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0)
}

/// The pages a stream has left out: those of which its last word was that they are skipped. Source and destination come to the same.
#[derive(Debug, Clone, Default)]
pub struct LeftOut {
    words: Vec<u64>,
}

impl LeftOut {
    /// No page yet.
    pub fn new(memory: &Memory) -> LeftOut {
        LeftOut { words: vec![0; memory.bitmap_words()] }
    }

    /// What the stream says of a page.
    pub fn note(&mut self, page: u64, kind: RunKind) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            match kind {
                RunKind::Skipped => *word |= 1 << (page % 64),
                RunKind::Raw | RunKind::Zero => *word &= !(1 << (page % 64)),
            }
        }
    }

    /// Whether it is left out.
    pub fn has(&self, page: u64) -> bool {
        has(&self.words, page)
    }
}

#[cfg(test)]
mod tests;
