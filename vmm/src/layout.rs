//! The guest-physical memory map, ports and interrupts: the one place that says what lies where, for every way to boot.
//!
//! ```text
//! 0x0000_0000_0000  memory; below 640 KiB, for guests started by PVH or the Linux boot protocol:
//!        0500       GDT of the 64-bit Linux entry (32 bytes)
//!        6000       PVH start info, list of modules
//!        7000       PVH memory map, or Linux' boot_params ("zero page")
//!        9000-EFFF  page tables of the 64-bit Linux entry (identity, 4 GiB)
//!      2_0000       command line (64 KiB)
//!      9_FC00       extended BIOS data area: reserved, empty
//!      A_0000       reserved; memory, but the guest is not told of it
//!      E_0000       ACPI: RSDP, then the tables (64 KiB)
//!      F_F000       VM generation id (16 bytes of a page)
//!      F_FFF0       reset vector (16 bytes)
//!     10_0000       images; an initial RAM disk ends where memory below the devices ends
//! 0x0000_C000_0000  end of memory below the devices ([`LOW_RAM_MAX`]); nothing up to the devices
//! 0x0000_D000_0000  virtio devices, 4 KiB each
//! 0x0000_D100_0000  platform page of a direct start
//! 0x0000_FEC0_0000  IOAPIC, 0xFEE0_0000 local APICs (KVM's)
//! 0x0000_FFFB_C000  KVM's identity map and TSS (four pages, VT-x only)
//! 0x0001_0000_0000  the rest of memory ([`HIGH_RAM`])
//! ```
//!
//! An image started directly in ring 3 owns all memory below 3 GiB; its note says where it wants its boot-info page.
//! Always true: nothing the monitor places for a guest overlaps (a test goes through the list), and what is placed is
//! checked against its area's size before it is written.

/// End of the conventional memory a guest is told of: from here to 1 MiB is reserved.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Images lie from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Memory below the devices ends here or earlier.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// What is more lies from here on.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// GDT of the 64-bit Linux entry.
pub const GDT: u64 = 0x500;
/// PVH start info, followed by the list of modules.
pub const START_INFO: u64 = 0x6000;
/// PVH memory map.
pub const MEMMAP: u64 = 0x7000;
/// Linux' boot_params.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit Linux entry: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line with its NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for it.
pub const CMDLINE_AREA: u64 = 0x1_0000;

/// ACPI's root pointer; the tables follow.
pub const RSDP: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_END: u64 = 0xf_0000;
/// VM generation id: 16 bytes.
pub const GENERATION_ID: u64 = 0xf_f000;

/// Where a PC's firmware begins, in real mode F000:FFF0: 16 bytes.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// First virtio device's registers.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of address space a virtio device has.
pub const MMIO_SIZE: u64 = 0x1000;
/// Platform page of a direct start.
pub const PLATFORM_BASE: u64 = 0xd100_0000;
/// IOAPIC, as KVM has it.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs, as KVM has them.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Where KVM may put its TSS and identity map (needed on VT-x): three pages and one.
pub const TSS_ADDRESS: usize = 0xfffb_d000;

/// First port of the 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
/// ACPI's sleep control and status registers, reset register, and events (32 bits, reading clears).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// See [`SLEEP_CONTROL_PORT`].
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// See [`SLEEP_CONTROL_PORT`].
pub const RESET_PORT: u16 = 0x602;
/// See [`SLEEP_CONTROL_PORT`].
pub const EVENT_PORT: u16 = 0x604;

/// GSI of ACPI's events.
pub const EVENT_GSI: u32 = 3;
/// GSI of the 16550.
pub const SERIAL_GSI: u32 = 4;
/// GSI of the first virtio device.
pub const GSI_BASE: u32 = 5;
/// GSIs of the IOAPIC.
pub const GSIS: u32 = 24;
/// Most virtio devices: one GSI each.
pub const DEVICES_MAX: usize = (GSIS - GSI_BASE) as usize;

/// Most vCPUs.
pub const CPUS_MAX: u32 = 32;

/// A stretch of guest-physical memory with its use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Memory for the guest, or none of its business.
    pub usable: bool,
}

/// What a guest is told of its memory (the e820 map, in the order of addresses).
pub fn memory_map(memory: &crate::memory::Memory) -> Vec<Stretch> {
    let usable = |start: u64, end: u64| Stretch { address: start, len: end - start, usable: true };
    let mut map = vec![
        usable(0, LOW_MEMORY_END),
        Stretch { address: LOW_MEMORY_END, len: HIGH_MEMORY - LOW_MEMORY_END, usable: false },
        usable(HIGH_MEMORY, memory.low_end()),
    ];
    map.extend(memory.regions().skip(1).map(|r| usable(r.range().start, r.range().end)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HUGE_PAGE, Memory};

    #[test]
    fn nothing_overlaps() {
        let areas = [
            ("GDT", GDT, 32),
            ("start info", START_INFO, 0x1000),
            ("zero page, PVH memory map", ZERO_PAGE, 0x1000),
            ("page tables", PAGE_TABLES, 6 * 0x1000),
            ("command line", CMDLINE, CMDLINE_AREA),
            ("reserved below ACPI", LOW_MEMORY_END, RSDP - LOW_MEMORY_END),
            ("ACPI", RSDP, ACPI_END - RSDP),
            ("generation id", GENERATION_ID, 16),
            ("reset vector", RESET_VECTOR, 16),
            ("images", HIGH_MEMORY, LOW_RAM_MAX - HIGH_MEMORY),
            ("virtio", MMIO_BASE, DEVICES_MAX as u64 * MMIO_SIZE),
            ("platform page", PLATFORM_BASE, 0x1000),
            ("IOAPIC", IOAPIC.into(), 0x1000),
            ("local APIC", LOCAL_APIC.into(), 0x1000),
            ("identity map and TSS", TSS_ADDRESS as u64 - 0x1000, 4 * 0x1000),
            ("high memory", HIGH_RAM, 0x1000),
        ];
        for pair in areas.windows(2) {
            let [(name, at, len), (next, next_at, _)] = [pair[0], pair[1]];
            assert!(at + len <= next_at, "{name} runs into {next}");
        }
    }

    #[test]
    fn the_map_covers_memory_and_leaves_the_hole_out() {
        const GIB: u64 = 1 << 30;
        let told = |size: u64| {
            let map = memory_map(&Memory::new(size as usize).unwrap());
            assert!(map.windows(2).all(|w| w[0].address + w[0].len <= w[1].address), "{map:?}");
            map.into_iter().filter(|s| s.usable).map(|s| (s.address, s.address + s.len)).collect::<Vec<_>>()
        };
        let huge = HUGE_PAGE as u64;
        assert_eq!(told(huge), [(0, LOW_MEMORY_END), (HIGH_MEMORY, huge)]);
        assert_eq!(told(3 * GIB), [(0, LOW_MEMORY_END), (HIGH_MEMORY, 3 * GIB)]);
        assert_eq!(told(5 * GIB), [(0, LOW_MEMORY_END), (HIGH_MEMORY, 3 * GIB), (4 * GIB, 6 * GIB)]);
    }
}
