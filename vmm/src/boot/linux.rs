//! The Linux boot protocol (Documentation/arch/x86/boot.rst): a bzImage, entered in 64-bit mode.
//!
//! Owns boot_params, the GDT and the identity page tables of the entry. Always true: what the kernel needs until it has read its own
//! memory map (its image, the room it decompresses itself into, boot_params, command line) lies in memory and does not overlap
//! with the initial RAM disk.

use std::fs::File;

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

use super::start::Payload;
use crate::error::{Error, Result, kvm};
use crate::layout::{CMDLINE, GDT, HIGH_MEMORY, PAGE_TABLES, RSDP, ZERO_PAGE, memory_map};
use crate::memory::Memory;

const MIB: u64 = 1 << 20;
/// Where the magic stands in a bzImage.
pub const MAGIC_AT: u64 = 0x202;
/// It.
pub const MAGIC: &[u8; 4] = b"HdrS";
/// Oldest protocol: 2.12 (Linux 3.8) has the 64-bit entry's flag.
const VERSION_MIN: u16 = 0x020c;
/// The kernel has a 64-bit entry, 0x200 behind its beginning.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// An initial RAM disk may lie above 4 GiB (there is none that does; below this bit it must be below 2 GiB).
const XLF_ABOVE_4G: u16 = 2;
/// A boot loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Code and data segments where the protocol wants them.
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
const DIRECTORIES: u64 = 4;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;

/// PG, ET, PE.
const CR0: u64 = 0x8000_0011;
/// PAE.
const CR4: u64 = 0x20;
/// LMA, LME.
const EFER: u64 = 0x500;

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Its header, as loaded.
    header: setup_header,
    /// 64-bit entry.
    pub entry: u64,
    /// End of what it uses before it knows its memory.
    pub end: u64,
}

impl Kernel {
    /// Loads a bzImage.
    pub fn load(file: &mut File, memory: &Memory) -> std::result::Result<Kernel, String> {
        // No address to load to: the header says it, and it must not be below 1 MiB.
        let loaded: KernelLoaderResult =
            BzImage::load(memory.ram().as_ref(), None, file, Some(GuestAddress(HIGH_MEMORY))).map_err(|e| match e {
                linux_loader::loader::Error::Bzimage(
                    linux_loader::loader::bzimage::Error::ReadBzImageCompressedKernel,
                ) => format!("does not fit into the VM's memory of {} bytes: give it more (memory)", memory.size()),
                e => e.to_string(),
            })?;
        let Some(header) = loaded.setup_header else { return Err("has no setup header".into()) };
        let (version, flags, pref, init) = (header.version, header.xloadflags, header.pref_address, header.init_size);
        if version < VERSION_MIN {
            return Err(format!(
                "is of boot protocol {:x}.{:02x}, at least 2.0c (Linux 3.8) is needed",
                version >> 8,
                version & 0xff
            ));
        }
        if flags & XLF_KERNEL_64 == 0 {
            return Err("has no 64-bit entry: a 32-bit kernel?".into());
        }
        let start = loaded.kernel_load.0;
        // It decompresses itself to where it prefers to be, and needs that much from there on.
        let end = start.max(pref).saturating_add(init.into()).max(loaded.kernel_end);
        if end > memory.low_end() {
            let low = memory.low_end();
            return Err(format!(
                "needs {} MiB of memory to unpack itself, the VM has {} MiB: give it more (memory)",
                end.div_ceil(MIB),
                low / MIB
            ));
        }
        Ok(Kernel { header, entry: start + ENTRY_64, end })
    }

    /// End of where an initial RAM disk may lie.
    pub fn initrd_end(&self) -> u64 {
        match self.header.xloadflags & XLF_ABOVE_4G {
            0 => u64::from(self.header.initrd_addr_max) + 1,
            _ => u64::MAX,
        }
    }

    /// Longest command line.
    pub fn cmdline_max(&self) -> usize {
        self.header.cmdline_size as usize
    }

    /// Writes boot_params, GDT and page tables.
    pub fn prepare(&self, memory: &Memory, payload: &Payload) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| Error::Memory(e.to_string());
        let mut params = boot_params { hdr: self.header, acpi_rsdp_addr: RSDP, ..Default::default() };
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.type_of_loader = LOADER_OTHER;
        params.hdr.setup_data = 0;
        params.hdr.cmd_line_ptr = CMDLINE as u32;
        if let Some(initrd) = &payload.initrd {
            let size = initrd.end - initrd.start;
            (params.hdr.ramdisk_image, params.ext_ramdisk_image) = (initrd.start as u32, (initrd.start >> 32) as u32);
            (params.hdr.ramdisk_size, params.ext_ramdisk_size) = (size as u32, (size >> 32) as u32);
        } else {
            (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (0, 0);
        }
        let mut entries = 0;
        for (slot, stretch) in params.e820_table.iter_mut().zip(memory_map(memory)) {
            let r#type = if stretch.usable { E820_RAM } else { E820_RESERVED };
            *slot = boot_e820_entry { addr: stretch.address, size: stretch.len, r#type };
            entries += 1;
        }
        params.e820_entries = entries;
        let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&params, memory.ram().as_ref()).map_err(|e| failed(&e))?;

        let gdt: Vec<u8> = GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect();
        let tables: Vec<u8> = page_tables().iter().flat_map(|e| e.to_le_bytes()).collect();
        for (at, bytes) in [(GDT, gdt), (PAGE_TABLES, tables)] {
            memory.ram().write_slice(&bytes, GuestAddress(at)).map_err(|e| failed(&e))?;
        }
        Ok(())
    }

    /// Loads the registers of the 64-bit entry.
    pub fn set_registers(&self, vcpu: &VcpuFd) -> Result<()> {
        let segment = |selector, type_, long: bool| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db: u8::from(!long),
            s: 1,
            l: u8::from(long),
            g: 1,
            ..Default::default()
        };
        let mut sregs = vcpu.get_sregs().map_err(kvm("get sregs"))?;
        let data = segment(DATA, 3, false);
        sregs.cr0 = CR0;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4;
        sregs.efer = EFER;
        sregs.cs = segment(CODE, 11, true);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.gdt = kvm_dtable { base: GDT, limit: (GDT_ENTRIES.len() * 8 - 1) as u16, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
        vcpu.set_sregs(&sregs).map_err(kvm("set sregs"))?;
        let regs = kvm_regs { rip: self.entry, rsi: ZERO_PAGE, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).map_err(kvm("set regs"))?;
        vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).map_err(kvm("set fpu"))
    }
}

/// Everything below 4 GiB at its own address.
fn page_tables() -> Vec<u64> {
    let per_page = (PAGE / 8) as usize;
    let mut tables = vec![0; per_page * (2 + DIRECTORIES as usize)];
    tables[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for i in 0..DIRECTORIES {
        tables[per_page + i as usize] = (PAGE_TABLES + (2 + i) * PAGE) | PRESENT_WRITABLE;
    }
    for (entry, page) in tables[2 * per_page..].iter_mut().zip(0..) {
        *entry = (page * LARGE_PAGE) | LARGE | PRESENT_WRITABLE;
    }
    tables
}

#[cfg(test)]
mod tests;
