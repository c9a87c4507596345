//! What is left to send while the guest stands still, without a copy: the kernel takes it from guest memory.
//!
//! Always true: between [`Residue::collect`] and the end of [`Residue::write`] nothing writes to guest memory (the vCPU is
//! stopped, the devices are quiesced), so what was checksummed is what is sent. If something did all the same, the destination
//! would see it in the checksum and refuse.

use migration::pages::{RunKind, Table};
use migration::wire::{FrameType, HEADER_LEN};

use super::connection::{Connection, ConnectionError};
use super::dead::{Dead, LeftOut};
use super::transfer::{Pending, SendError, Sent, is_zero};
use crate::memory::{Memory, PAGE_SIZE};

/// Most slices of one gathering write (IOV_MAX).
const SLICES_MAX: usize = 1024;

/// One PAGES frame: its head, and where the raw runs are.
#[derive(Debug)]
struct Frame {
    head: std::ops::Range<usize>,
    runs: std::ops::Range<usize>,
}

/// See the module. The buffers are kept, so that a second attempt allocates nothing.
#[derive(Debug)]
pub(super) struct Residue {
    frames: Vec<Frame>,
    heads: Vec<u8>,
    /// Raw runs: address and length in bytes.
    runs: Vec<(u64, usize)>,
    table: Table,
}

impl Residue {
    /// With room for a few thousand pages.
    pub fn new() -> Residue {
        Residue {
            frames: Vec::with_capacity(64),
            heads: Vec::with_capacity(64 << 10),
            runs: Vec::with_capacity(4096),
            table: Table::new(),
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.heads.clear();
        self.runs.clear();
        self.table.clear();
    }

    /// Puts the frames together and seals them; they must be the next things sent.
    pub fn collect(
        &mut self,
        pending: &mut Pending,
        (dead, out): (&Dead, &mut LeftOut),
        memory: &Memory,
        connection: &mut Connection,
    ) -> Result<Sent, SendError> {
        let mut sent = Sent::default();
        for number in pending.drain() {
            let address = number * PAGE_SIZE as u64;
            let kind = sent.kind(dead.reason(number), || Ok(is_zero(memory.still(address, PAGE_SIZE)?)))?;
            out.note(number, kind);
            if !self.table.push(address, kind) {
                self.seal(memory, connection)?;
                // An empty table takes any page.
                let _ = self.table.push(address, kind);
            }
        }
        if !self.table.is_empty() {
            self.seal(memory, connection)?;
        }
        Ok(sent)
    }

    /// Ends the frame whose runs are in the table.
    fn seal(&mut self, memory: &Memory, connection: &mut Connection) -> Result<(), SendError> {
        let (head, runs) = (self.heads.len(), self.runs.len());
        self.heads.extend_from_slice(&[0; HEADER_LEN]);
        self.table.encode(&mut self.heads);
        let raw = self.table.runs().iter().filter(|r| r.kind == RunKind::Raw);
        self.runs.extend(raw.map(|r| (r.address, r.bytes() as usize)));
        self.table.clear();
        let mut parts = vec![&self.heads[head + HEADER_LEN..]];
        for (address, length) in &self.runs[runs..] {
            parts.push(memory.still(*address, *length)?);
        }
        let header = connection.seal(FrameType::Pages, &parts);
        self.heads[head..head + HEADER_LEN].copy_from_slice(&header);
        self.frames.push(Frame { head: head..self.heads.len(), runs: runs..self.runs.len() });
        Ok(())
    }

    /// Writes everything, and `rest` (sealed behind it) at the end: in one go unless it is very much.
    pub fn write(&self, memory: &Memory, connection: &mut Connection, rest: &[u8]) -> Result<(), ConnectionError> {
        let mut slices: Vec<&[u8]> = Vec::with_capacity(self.frames.len() + self.runs.len() + 1);
        for frame in &self.frames {
            slices.push(&self.heads[frame.head.clone()]);
            // `collect` has looked at all of them: none is outside of memory.
            slices.extend(self.runs[frame.runs.clone()].iter().filter_map(|(a, n)| memory.still(*a, *n).ok()));
        }
        slices.push(rest);
        slices.chunks(SLICES_MAX).try_for_each(|chunk| connection.write(chunk, &|| false))
    }
}
