//! PAGES frames: runs of guest pages, raw, zero or skipped.
//!
//! ```text
//!  0  u32 count      of runs, at most [`RUNS_MAX`]
//!  4  u32 reserved   0
//!  8  count × { u64 address, u32 pages, u32 kind (0 raw, 1 zero, 2 skipped) }
//!  …  the raw pages, in the order of their runs
//! ```
//!
//! Always true of a parsed [`Pages`]: addresses are page-aligned, every run is at least one page long and lies within
//! one of the ranges of memory given to [`Pages::parse`] and behind the one before it (so a frame costs its receiver no more than
//! memory has pages), a skipped one is there only where both sides have
//! [`feature::SKIP`], and the data is exactly as long as the raw runs.
use std::ops::Range;

use crate::message::feature;
use crate::wire::Reader;
use crate::{Error, PAGE_SIZE};

/// Most runs in one frame.
pub const RUNS_MAX: usize = 512;
/// Most raw pages in one frame (1 MiB).
pub const RAW_PAGES_MAX: usize = 256;
/// Longest run table, in bytes.
pub const TABLE_MAX: usize = 8 + RUNS_MAX * RUN_LEN;
const RUN_LEN: usize = 16;

/// What a run carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RunKind {
    /// Content.
    Raw = 0,
    /// Nothing: the pages are zero.
    Zero = 1,
    /// Nothing: the guest has no use for what the pages contain. Only with [`feature::SKIP`].
    Skipped = 2,
}

/// Consecutive pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Guest-physical address of the first page.
    pub address: u64,
    /// Length in pages.
    pub pages: u32,
    /// Kind.
    pub kind: RunKind,
}

impl Run {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE_SIZE as u64
    }
}

/// The run table of a frame being put together.
#[derive(Clone, Debug, Default)]
pub struct Table {
    runs: Vec<Run>,
    raw_pages: usize,
}

impl Table {
    /// An empty table.
    pub fn new() -> Table {
        Table { runs: Vec::with_capacity(RUNS_MAX), raw_pages: 0 }
    }

    /// Adds one page, joining it to the last run where it continues it. `false`: the frame is full, send it first.
    #[must_use]
    pub fn push(&mut self, address: u64, kind: RunKind) -> bool {
        if kind == RunKind::Raw && self.raw_pages == RAW_PAGES_MAX {
            return false;
        }
        let full = self.runs.len() == RUNS_MAX;
        match self.runs.last_mut() {
            Some(run) if run.kind == kind && run.address + run.bytes() == address && run.pages < u32::MAX => {
                run.pages += 1;
            }
            _ if full => return false,
            _ => self.runs.push(Run { address, pages: 1, kind }),
        }
        self.raw_pages += usize::from(kind == RunKind::Raw);
        true
    }

    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Raw pages in it.
    pub fn raw_pages(&self) -> usize {
        self.raw_pages
    }

    /// The runs.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Ready for the next frame.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.raw_pages = 0;
    }

    /// Appends the table as it stands at the beginning of the payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.address.to_le_bytes());
            out.extend_from_slice(&run.pages.to_le_bytes());
            out.extend_from_slice(&(run.kind as u32).to_le_bytes());
        }
    }
}

/// A checked PAGES payload.
#[derive(Clone, Copy, Debug)]
pub struct Pages<'a> {
    table: &'a [u8],
    data: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Checks a payload against the guest-physical addresses that are memory, and the features both sides have.
    pub fn parse(payload: &'a [u8], memory: &[Range<u64>], features: u64) -> Result<Pages<'a>, Error> {
        let mut r = Reader::new("PAGES", payload);
        let count = r.count(RUNS_MAX, "page runs")?;
        if r.u32()? != 0 {
            return Err(Error::Reserved("PAGES"));
        }
        let table = r.bytes(count * RUN_LEN)?;
        let data = r.rest();
        let (mut raw, mut next) = (0u64, 0u64);
        for entry in table.chunks_exact(RUN_LEN) {
            let run = parse_run(entry)?;
            let end = run.address.checked_add(run.bytes());
            let inside = |end: &u64| memory.iter().any(|m| m.start <= run.address && *end <= m.end);
            let Some(end) = end.filter(|end| run.pages > 0 && inside(end)) else {
                return Err(Error::OutsideMemory { address: run.address, pages: u64::from(run.pages) });
            };
            if !run.address.is_multiple_of(PAGE_SIZE as u64) || run.address < next {
                return Err(Error::Value { what: "page run address", value: run.address });
            }
            next = end;
            match run.kind {
                RunKind::Raw => raw += run.bytes(),
                RunKind::Skipped if features & feature::SKIP == 0 => {
                    return Err(Error::Value { what: "kind of a page run", value: run.kind as u64 });
                }
                RunKind::Zero | RunKind::Skipped => {}
            }
        }
        match (data.len() as u64).checked_sub(raw) {
            None => Err(Error::Short("PAGES")),
            Some(0) => Ok(Pages { table, data }),
            Some(n) => Err(Error::Trailing("PAGES", n as usize)),
        }
    }

    /// The runs with their content (empty for all but raw runs).
    pub fn runs(&self) -> impl Iterator<Item = (Run, &'a [u8])> {
        let mut data = self.data;
        // `parse` accepted every entry and the sum of their lengths.
        self.table.chunks_exact(RUN_LEN).filter_map(|entry| parse_run(entry).ok()).map(move |run| {
            let length = if run.kind == RunKind::Raw { run.bytes() as usize } else { 0 };
            let (head, tail) = data.split_at(length.min(data.len()));
            data = tail;
            (run, head)
        })
    }
}

fn parse_run(entry: &[u8]) -> Result<Run, Error> {
    let mut r = Reader::new("page run", entry);
    let (address, pages) = (r.u64()?, r.u32()?);
    let kind = match r.u32()? {
        0 => RunKind::Raw,
        1 => RunKind::Zero,
        2 => RunKind::Skipped,
        value => return Err(Error::Value { what: "kind of a page run", value: u64::from(value) }),
    };
    Ok(Run { address, pages, kind })
}

#[cfg(test)]
mod tests;
