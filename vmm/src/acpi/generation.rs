//! The VM generation id (Microsoft, "Virtual Machine Generation ID"): 16 bytes that change when a VM's past is not unique any
//! more: when it was restored from a checkpoint or spawned from a template, not when it was paused, ported or reset. A guest that sees it
//! change makes new random numbers and identifiers.

use vm_memory::{Bytes, GuestAddress};

use crate::boot::info::random;
use crate::error::{Error, Result};
use crate::layout::GENERATION_ID;
use crate::memory::Memory;

/// A VM generation id.
pub type GenerationId = [u8; 16];

/// A new one.
pub fn new() -> Result<GenerationId> {
    random()
}

/// The one in guest memory. A guest that has overwritten it deceives only itself.
pub fn read(memory: &Memory) -> Result<GenerationId> {
    let mut id = GenerationId::default();
    memory.ram().read_slice(&mut id, GuestAddress(GENERATION_ID)).map_err(|e| Error::Memory(e.to_string()))?;
    Ok(id)
}

/// Writes it; the guest is told of a change by [`super::Event::Generation`] (not before its first instruction).
pub fn write(memory: &Memory, id: GenerationId) -> Result<()> {
    memory.ram().write_slice(&id, GuestAddress(GENERATION_ID)).map_err(|e| Error::Memory(e.to_string()))
}
