//! The PVH start (Xen's "x86/HVM direct boot ABI"): 32-bit protected mode, paging off, RBX = start info.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{Immutable, IntoBytes};

use super::start::Payload;
use crate::error::{Error, Result, kvm};
use crate::layout::{CMDLINE, MEMMAP, RSDP, START_INFO, Stretch, memory_map};
use crate::memory::Memory;

const START_MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;
/// The list of modules follows the start info.
const MODULES: u64 = START_INFO + size_of::<StartInfo>() as u64;

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

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    paddr: u64,
    size: u64,
    cmdline_paddr: u64,
    reserved: u64,
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

/// Writes start info, list of modules and memory map; the command line is already there.
pub fn write_start_info(memory: &Memory, payload: &Payload) -> Result<()> {
    let entry = |s: Stretch| MemmapEntry {
        addr: s.address,
        size: s.len,
        kind: if s.usable { TYPE_RAM } else { TYPE_RESERVED },
        reserved: 0,
    };
    let map: Vec<MemmapEntry> = memory_map(memory).into_iter().map(entry).collect();
    // The initial RAM disk is the first module.
    let module =
        |r: &std::ops::Range<u64>| Module { paddr: r.start, size: r.end - r.start, cmdline_paddr: 0, reserved: 0 };
    let modules: Vec<Module> = payload.initrd.iter().map(module).collect();
    let info = StartInfo {
        magic: START_MAGIC,
        version: 1,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: RSDP,
        memmap_paddr: MEMMAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    for (bytes, at) in [(info.as_bytes(), START_INFO), (modules.as_bytes(), MODULES), (map.as_bytes(), MEMMAP)] {
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
