//! The first start and every restart: what an image needs besides itself is put into memory, the first vCPU at its entry.
//!
//! Owns the order of things: image, initial RAM disk, ACPI tables, command line, registers. Always true: guest memory was all
//! zeroes before, so a restart finds the machine as the first start did.

use std::ops::Range;

use guest_abi::Identity;
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::files::{BootFile, BootFiles};
use super::image::{Entry, Image};
use super::info::{InfoPage, OwnerId, random};
use super::{direct, pvh};
use crate::acpi::RESET_VALUE;
use crate::acpi::generation::{self, GenerationId};
use crate::acpi::tables::{self, Machine};
use crate::config::Config;
use crate::devices::Devices;
use crate::error::{Error, FieldError, Result};
use crate::layout::{CMDLINE, CMDLINE_AREA, RESET_PORT, RESET_VECTOR};
use crate::memory::{Memory, PAGE_SIZE};
use crate::platform::PLATFORM_BASE;

/// Code at the reset vector: writes ACPI's reset register and halts. On a machine with reduced ACPI hardware Linux does not write it
/// by itself: it would have UEFI reset the machine, and where there is none jumps to where a BIOS begins.
const RESET_CODE: [u8; 10] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    // mov dx, PORT; mov al, VALUE; out dx, al; cli; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xfa, 0xf4, 0xeb, 0xfd]
};

/// What goes with an image.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    /// Command line.
    pub cmdline: String,
    /// Where the initial RAM disk lies.
    pub initrd: Option<Range<u64>>,
}

/// What is the same at every start of a VM.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// Configuration.
    pub config: &'a Config,
    /// Files that were opened for it.
    pub files: &'a BootFiles,
    /// Identity of this process.
    pub owner: OwnerId,
    /// Number of virtio devices.
    pub devices: usize,
    /// What the guest is told of its processors.
    pub cpuid: &'a CpuId,
}

/// Puts everything beside the image into memory and the vCPU at its entry. `generation`: the VM generation id of an earlier start,
/// which a reset does not change; `None` makes a new one.
pub fn prepare(
    start: &Start<'_>,
    image: &Image,
    memory: &Memory,
    vcpu: &VcpuFd,
    generation: Option<GenerationId>,
) -> Result<()> {
    let Start { config, files, owner, devices, cpuid } = *start;
    let mut payload = Payload { cmdline: config.cmdline.clone(), initrd: None };
    if image.wants_announcements {
        payload.cmdline = announce(&config.cmdline, devices);
    }
    if let Entry::Direct(start) = &image.entry {
        if files.initrd.is_some() {
            return Err(wrong("initrd", "the image starts directly in ring 3 and has no use for one".into()));
        }
        direct::set_registers(vcpu, start)?;
        let identity = Identity { vm_id: config.vm_id, epoch: 0, owner: owner.0, entropy: random()? };
        let info = InfoPage { address: start.boot_info };
        return info.write(memory, vcpu, &payload.cmdline, PLATFORM_BASE, identity, cpuid);
    }
    if let Some(initrd) = &files.initrd {
        payload.initrd = Some(load_initrd(initrd, memory, image.end, image.initrd_end())?);
    }
    write_cmdline(memory, &payload.cmdline, image.cmdline_max())?;
    tables::write(memory, Machine { cpus: config.cpus, devices })?;
    generation::write(memory, generation.map_or_else(generation::new, Ok)?)?;
    memory.ram().write_slice(&RESET_CODE, GuestAddress(RESET_VECTOR)).map_err(|e| Error::Memory(e.to_string()))?;
    match &image.entry {
        Entry::Direct(_) => Ok(()),
        Entry::Pvh(entry) => {
            pvh::write_start_info(memory, &payload)?;
            pvh::set_registers(vcpu, *entry)
        }
        Entry::Linux(kernel) => {
            kernel.prepare(memory, &payload)?;
            kernel.set_registers(vcpu)
        }
    }
}

/// A command line with the virtio devices, for guests that read of them there.
pub fn announce(cmdline: &str, devices: usize) -> String {
    let words = (0..devices).map(|index| Devices::announcement(index as u16));
    std::iter::once(cmdline.to_owned()).filter(|c| !c.is_empty()).chain(words).collect::<Vec<_>>().join(" ")
}

fn wrong(field: &str, message: String) -> Error {
    Error::Config(vec![FieldError::new(field, message)])
}

fn write_cmdline(memory: &Memory, cmdline: &str, max: usize) -> Result<()> {
    let max = max.min(CMDLINE_AREA as usize - 1);
    if cmdline.len() > max {
        return Err(wrong("cmdline", format!("{} bytes, this image takes at most {max}", cmdline.len())));
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    memory.ram().write_slice(&line, GuestAddress(CMDLINE)).map_err(|e| Error::Memory(e.to_string()))
}

/// Loads an initial RAM disk as high as it may lie, between the image's end and `ceiling`.
fn load_initrd(initrd: &BootFile, memory: &Memory, floor: u64, ceiling: u64) -> Result<Range<u64>> {
    let (path, size) = (initrd.path(), initrd.size()?);
    let mut file = initrd.from_start()?;
    if size == 0 {
        return Err(wrong("initrd", format!("{} is empty", path.display())));
    }
    let page = PAGE_SIZE as u64;
    let start = ceiling.min(memory.low_end()).checked_sub(size).map_or(0, |s| s / page * page);
    if start < floor {
        return Err(wrong(
            "initrd",
            format!(
                "{} of {size} bytes does not fit between the image and the end of memory: give the VM more (memory)",
                path.display()
            ),
        ));
    }
    memory
        .ram()
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|e| Error::Memory(format!("initrd {}: {e}", path.display())))?;
    Ok(start..start + size)
}

#[cfg(test)]
mod tests;
