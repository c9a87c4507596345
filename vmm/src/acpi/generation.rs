//! The VM generation id (Microsoft, "Virtual Machine Generation ID"): 16 bytes that change when a VM's past is not unique any
//! more: when it was restored from a checkpoint or spawned from a template, not when it was paused or ported. A guest that sees it
//! change makes new random numbers and identifiers.

use vm_memory::{Bytes, GuestAddress};

use crate::boot::info::random;
use crate::error::{Error, Result};
use crate::layout::GENERATION_ID;
use crate::memory::Memory;

/// Writes a new one; the guest is told by [`super::Event::Generation`] (not before its first instruction).
pub fn renew(memory: &Memory) -> Result<()> {
    let id: [u8; 16] = random()?;
    memory.ram().write_slice(&id, GuestAddress(GENERATION_ID)).map_err(|e| Error::Memory(e.to_string()))
}
