//! The PVH start (Xen's "x86/HVM direct boot ABI"): 32-bit protected mode, paging off, RBX = start info.
//!
//! Owns the low-memory layout: start info, memory map and command line lie below 640 KiB, which no image uses.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

use crate::error::{Error, Result, kvm};
use crate::memory::Memory;

const START_INFO: u64 = 0x6000;
const MEMMAP: u64 = 0x7000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line, with its NUL.
pub const CMDLINE_MAX: usize = 0x1_0000;
const LOW_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
const START_MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;

/// `struct hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemmapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Writes start info, memory map and command line.
pub fn write_start_info(memory: &Memory, cmdline: &str) -> Result<()> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(Error::Memory(format!("command line of {} bytes", cmdline.len())));
    }
    let map = [
        MemmapEntry { addr: 0, size: LOW_MEMORY_END, kind: TYPE_RAM, reserved: 0 },
        MemmapEntry { addr: HIGH_MEMORY, size: memory.size() as u64 - HIGH_MEMORY, kind: TYPE_RAM, reserved: 0 },
    ];
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: 0,
        modlist_paddr: 0,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: 0,
        memmap_paddr: MEMMAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    for (bytes, at) in [(info.as_bytes(), START_INFO), (map.as_bytes(), MEMMAP), (&line[..], CMDLINE)] {
        memory.ram().write_slice(bytes, GuestAddress(at)).map_err(|e| Error::Memory(e.to_string()))?;
    }
    Ok(())
}

/// Loads the registers of the PVH entry.
pub fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs().map_err(kvm("get sregs"))?;
    let data = flat(0x10, 3);
    sregs.cr0 = 0x11; // ET, PE
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.cs = flat(0x08, 11);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    vcpu.set_sregs(&sregs).map_err(kvm("set sregs"))?;
    let regs = kvm_regs { rip: entry, rbx: START_INFO, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(kvm("set regs"))?;
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).map_err(kvm("set fpu"))
}
