//! A checkpoint that was read and is to be mapped: what instances of a template are made of.

use std::path::Path;

use migration::checkpoint::AT_REST;
use migration::section::Sections;

use super::chain::{self, Link};
use super::{RestoreMemory, fill};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::port::guest;
use crate::vm::VmDescription;

/// A checkpoint with all it needs, the newest first: there is one at least.
pub struct Saved {
    chain: Vec<Link>,
    /// What the VM is made of.
    pub description: VmDescription,
}

impl Saved {
    /// Reads the state files and opens the memory files.
    pub fn open(path: &Path) -> Result<Saved> {
        let chain = chain::open(path)?;
        let newest = chain.first().ok_or_else(|| Error::State("no checkpoint".into()))?;
        let description = guest::decode(&newest.checkpoint.description)?;
        Ok(Saved { description, chain })
    }

    fn newest(&self) -> &Link {
        // `open` has found one.
        &self.chain[0]
    }

    /// Whether the guest stood at the end of a park.
    pub fn is_at_rest(&self) -> bool {
        self.newest().checkpoint.flags & AT_REST != 0
    }

    /// State of vCPUs and devices.
    pub fn sections(&self) -> &Sections {
        &self.newest().checkpoint.sections
    }

    /// Its memory for a VM of this configuration, mapped copy-on-write: what is not written is in the page cache once for all that
    /// map it. Every page is compared with its checksum first. The files may be deleted then, but not changed.
    pub fn map(&self, config: &Config) -> Result<Memory> {
        let size = usize::try_from(config.memory.bytes()).unwrap_or(usize::MAX);
        let mut memory = Memory::with_sharing(size, config.shares_memory())?;
        let newest = self.newest();
        if memory.regions().last().map_or(0, |r| r.range().end) != newest.checkpoint.limit {
            return Err(Error::State(format!("checkpoint {}: its memory is of another size", newest.dir.display())));
        }
        fill::fill(&mut memory, &self.chain, RestoreMemory::Map, true)?;
        Ok(memory)
    }
}
