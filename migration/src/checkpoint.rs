//! The state file of a checkpoint, without I/O.
//!
//! A checkpoint is a directory of two files. `memory` holds pages of guest memory, each at the offset that is its guest-physical
//! address, so that it can be mapped; where there is nothing it is a hole. `state` is everything else, as described here:
//!
//! ```text
//!  0  [8]  "OUTRCKPT"
//!  8  u32  format     1: what follows
//! 12  u32  features   a reader refuses one it does not know
//! 16  u64  length     of the body, which is the rest of the file
//! 24  u64  xxh3-64 of the body
//! 32  [24] 0
//! 56  u64  xxh3-64 of bytes 0..56
//!
//! body:
//!     [16] id         random
//!     u64  created    nanoseconds since 1970
//!     u64  limit      end of guest-physical memory
//!     u32  flags      [`AT_REST`], [`FINAL`]
//!     u32  0
//!     u32 length, writer   program and version, for people
//!     u32  1: there is a parent, 0: there is none, and the parent's fields are empty
//!     [16] parent's id
//!     u64  bytes 56..64 of the parent's state file
//!     u32 length, path     the parent's directory; a relative one begins at the checkpoint's own
//!     u32 length, DESCRIBE payload   as on the wire
//!     u32 length, STATE payload      as on the wire
//!     u32  runs       of pages this checkpoint says something about, in ascending order
//!     runs × { u64 first page; u32 pages; u32 kind: 1 in the memory file, 2 zero }
//!     u64 × pages of kind 1: xxh3-64 of each
//! ```
//!
//! Always true of a parsed [`Checkpoint`]: every length, count and run is within its bound; runs ascend, do not overlap and lie
//! below the limit; there is a checksum for each page of the memory file. A page no checkpoint of a chain speaks of is zero.
use crate::message::{Description, Message};
use crate::section::Sections;
use crate::wire::{CONTROL_MAX, Digest, FrameType, Reader, STATE_MAX, put_blob};
use crate::{Error, PAGE_SIZE};

/// First eight bytes of a state file.
pub const MAGIC: &[u8; 8] = b"OUTRCKPT";
/// The format described above.
pub const FORMAT: u32 = 1;
/// Features this build knows: none so far.
pub const FEATURES: u32 = 0;
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 64;
/// Longest state file: the checksums of 64 GiB of pages, twice over.
pub const STATE_FILE_MAX: usize = 256 << 20;
/// Most runs of pages.
pub const RUNS_MAX: usize = 8 << 20;
/// Highest end of guest-physical memory.
pub const LIMIT_MAX: u64 = 1 << 40;
/// Longest path of a parent and longest name of a writer, in bytes.
pub const TEXT_MAX: usize = 4096;
/// Most checkpoints in a chain.
pub const CHAIN_MAX: usize = 64;

/// Flag: the guest was parked: it looks at its boot-info page before anything else. Instances can be spawned from it.
pub const AT_REST: u32 = 1;
/// Flag: the VM ended with this checkpoint; nothing happened to it afterwards.
pub const FINAL: u32 = 2;

const RUN_LEN: usize = 16;
const RAW: u32 = 1;
const ZERO: u32 = 2;

/// A checkpoint's random number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CheckpointId(pub [u8; 16]);

impl std::fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// What an incremental checkpoint adds to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// Its id.
    pub id: CheckpointId,
    /// Checksum of its header.
    pub seal: u64,
    /// Its directory, absolute or relative to the checkpoint's own.
    pub path: String,
}

/// Everything of a checkpoint but its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its random number.
    pub id: CheckpointId,
    /// When the guest stood still, in nanoseconds since 1970.
    pub created_ns: u64,
    /// End of guest-physical memory.
    pub limit: u64,
    /// [`AT_REST`], [`FINAL`].
    pub flags: u32,
    /// Program and version that wrote it.
    pub writer: String,
    /// What it adds to.
    pub parent: Option<Parent>,
    /// What the VM is made of.
    pub description: Description,
    /// State of vCPUs and devices.
    pub sections: Sections,
    /// Pages it speaks of.
    pub pages: PageTable,
}

/// What a checkpoint says of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It is in the memory file and has this checksum.
    Raw(u64),
    /// It is zero.
    Zero,
}

/// Pages with the same kind of content, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Number of the first page.
    pub first: u64,
    /// How many.
    pub pages: u32,
    /// In the memory file; else zero.
    pub raw: bool,
}

/// The pages a checkpoint speaks of, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    runs: Vec<PageRun>,
    sums: Vec<u64>,
}

impl PageTable {
    /// No page.
    pub fn new() -> PageTable {
        PageTable::default()
    }

    /// Adds a page.
    ///
    /// # Panics
    /// When its number is not higher than all before: an error of the program.
    pub fn push(&mut self, page: u64, content: Content) {
        let raw = matches!(content, Content::Raw(_));
        if let Content::Raw(sum) = content {
            self.sums.push(sum);
        }
        if let Some(last) = self.runs.last_mut() {
            let next = last.first + u64::from(last.pages);
            assert!(page >= next, "page {page} after {next}");
            if page == next && last.raw == raw && last.pages < u32::MAX {
                last.pages += 1;
                return;
            }
        }
        self.runs.push(PageRun { first: page, pages: 1, raw });
    }

    /// The runs.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The runs, each with the checksums of its pages (none for zero ones).
    pub fn sums(&self) -> impl Iterator<Item = (PageRun, &[u64])> {
        let mut rest = &self.sums[..];
        self.runs.iter().map(move |run| {
            let (sums, tail) = rest.split_at(if run.raw { run.pages as usize } else { 0 });
            rest = tail;
            (*run, sums)
        })
    }

    /// All pages.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Content)> {
        self.sums().flat_map(|(run, sums)| {
            (0..run.pages).map(move |i| {
                let content = sums.get(i as usize).map_or(Content::Zero, |sum| Content::Raw(*sum));
                (run.first + u64::from(i), content)
            })
        })
    }

    /// Pages in the memory file.
    pub fn raw_pages(&self) -> u64 {
        self.sums.len() as u64
    }

    /// End of the last page in the memory file, in bytes: the file is at least as long.
    pub fn memory_file_len(&self) -> u64 {
        let last = self.runs.iter().rev().find(|r| r.raw);
        last.map_or(0, |r| (r.first + u64::from(r.pages)) * PAGE_SIZE as u64)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.first.to_le_bytes());
            out.extend_from_slice(&run.pages.to_le_bytes());
            out.extend_from_slice(&(if run.raw { RAW } else { ZERO }).to_le_bytes());
        }
        self.sums.iter().for_each(|sum| out.extend_from_slice(&sum.to_le_bytes()));
    }

    fn parse(r: &mut Reader<'_>, limit: u64) -> Result<PageTable, Error> {
        let count = r.count(RUNS_MAX, "runs of pages")?;
        // The bytes must be there before memory is taken for what they say.
        let mut entries = Reader::new("table of pages", r.bytes(count * RUN_LEN)?);
        let mut runs = Vec::with_capacity(count);
        let (mut next, mut raw_pages) = (0u64, 0u64);
        for _ in 0..count {
            let (first, pages, kind) = (entries.u64()?, entries.u32()?, entries.u32()?);
            let raw = match kind {
                RAW => true,
                ZERO => false,
                value => return Err(Error::Value { what: "kind of a run of pages", value: value.into() }),
            };
            let end = first.checked_add(u64::from(pages)).filter(|end| *end <= limit / PAGE_SIZE as u64);
            match end {
                Some(end) if first >= next && pages > 0 => next = end,
                Some(_) => return Err(Error::Value { what: "first page of a run", value: first }),
                None => return Err(Error::OutsideMemory { address: first, pages: pages.into() }),
            }
            raw_pages += if raw { u64::from(pages) } else { 0 };
            runs.push(PageRun { first, pages, raw });
        }
        let bytes = usize::try_from(raw_pages).ok().and_then(|n| n.checked_mul(8)).ok_or(Error::Short("checksums"))?;
        let sums = r.bytes(bytes)?.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Ok(PageTable { runs, sums })
    }
}

/// Checksum of a page, as in the table.
pub fn page_sum(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

fn sum(bytes: &[u8]) -> u64 {
    let mut digest = Digest::default();
    digest.update(bytes);
    digest.finish()
}

impl Checkpoint {
    /// The bytes of the state file; fails when something exceeds its bound.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut out = vec![0; HEADER_LEN];
        out.extend_from_slice(&self.id.0);
        out.extend_from_slice(&self.created_ns.to_le_bytes());
        out.extend_from_slice(&self.limit.to_le_bytes());
        out.extend_from_slice(&self.flags.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        put_blob(&mut out, self.writer.as_bytes());
        let none = Parent::default();
        let parent = self.parent.as_ref().unwrap_or(&none);
        out.extend_from_slice(&u32::from(self.parent.is_some()).to_le_bytes());
        out.extend_from_slice(&parent.id.0);
        out.extend_from_slice(&parent.seal.to_le_bytes());
        put_blob(&mut out, parent.path.as_bytes());
        let mut payload = Vec::new();
        Message::Describe(self.description.clone()).encode(&mut payload);
        put_blob(&mut out, &payload);
        payload.clear();
        self.sections.encode(&mut payload);
        put_blob(&mut out, &payload);
        self.pages.encode(&mut out);

        let (header, body) = out.split_at_mut(HEADER_LEN);
        header[0..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
        header[24..32].copy_from_slice(&sum(body).to_le_bytes());
        let seal = sum(&header[..56]);
        header[56..64].copy_from_slice(&seal.to_le_bytes());
        // Whatever could not be read again is not written.
        let read = Checkpoint::parse(&out)?;
        debug_assert_eq!(&read, self);
        Ok(out)
    }

    /// Reads a state file. What it says is checked against its bounds, and nothing is allocated that the file is not
    /// long enough for.
    pub fn parse(bytes: &[u8]) -> Result<Checkpoint, Error> {
        let body = Checkpoint::body(bytes)?;
        let mut r = Reader::new("state file", body);
        let id = CheckpointId(r.array()?);
        let (created_ns, limit, flags) = (r.u64()?, r.u64()?, r.u32()?);
        if limit > LIMIT_MAX || !limit.is_multiple_of(PAGE_SIZE as u64) {
            return Err(Error::Value { what: "end of guest memory", value: limit });
        }
        if flags & !(AT_REST | FINAL) != 0 || r.u32()? != 0 {
            return Err(Error::Reserved("state file"));
        }
        let writer = r.text(TEXT_MAX, "name of the writer")?;
        let has_parent = r.u32()?;
        let parent = Parent { id: CheckpointId(r.array()?), seal: r.u64()?, path: r.text(TEXT_MAX, "parent's path")? };
        let parent = match has_parent {
            0 if parent == Parent::default() => None,
            1 => Some(parent),
            value => return Err(Error::Value { what: "parent", value: value.into() }),
        };
        let Message::Describe(description) = Message::parse(FrameType::Describe, r.blob(CONTROL_MAX, "description")?)?
        else {
            return Err(Error::Short("description"));
        };
        let sections = Sections::parse(r.blob(STATE_MAX, "state")?)?;
        let pages = PageTable::parse(&mut r, limit)?;
        r.finish()?;
        Ok(Checkpoint { id, created_ns, limit, flags, writer, parent, description, sections, pages })
    }

    /// Checks the header, and the body against it.
    fn body(bytes: &[u8]) -> Result<&[u8], Error> {
        if bytes.first_chunk::<8>() != Some(MAGIC) {
            return Err(Error::Foreign);
        }
        let (header, body) = bytes.split_at_checked(HEADER_LEN).ok_or(Error::Short("state file"))?;
        let mut r = Reader::new("header of the state file", &header[8..]);
        let (format, features, length, body_sum) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
        if format != FORMAT {
            return Err(Error::Format { got: format, known: FORMAT });
        }
        if Checkpoint::seal(bytes) != Some(sum(&header[..56])) {
            return Err(Error::Damaged("header"));
        }
        if features & !FEATURES != 0 {
            return Err(Error::Features(features & !FEATURES));
        }
        if header[32..56] != [0; 24] {
            return Err(Error::Reserved("header of the state file"));
        }
        match u64::try_from(body.len()).unwrap_or(u64::MAX) {
            got if got < length => return Err(Error::Short("state file")),
            got if got > length => return Err(Error::Trailing("state file", (got - length) as usize)),
            _ if sum(body) != body_sum => return Err(Error::Damaged("body")),
            _ => {}
        }
        Ok(body)
    }

    /// Checksum of the header of a state file: what a child knows it by.
    pub fn seal(bytes: &[u8]) -> Option<u64> {
        bytes.get(56..HEADER_LEN)?.try_into().ok().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
