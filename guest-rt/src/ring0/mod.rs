//! The ring-0 shim: constant tables and hand-written integer assembly (`shim.s`).
//!
//! Owns the IDT, GDT, TSS, page tables and the code at CPL 0. All tables are `const` data of the image at fixed
//! addresses (link/guest.ld asserts them), with accessed and dirty bits preset: no code builds them at boot and
//! nothing ever writes to them.
//!
//! Always true: no compiled Rust runs at CPL 0, and no instruction there names an SSE register. Precompiled
//! `core` uses SSE2, and a KVM without VMX or SVM emulates ring 0 instruction by instruction and knows few of
//! them. tests/image.rs holds the image to it.
//!
//! Memory map (identity; W^X throughout):
//!
//! ```text
//! 0x000000  page 0 not mapped (null pointers fault); to 1 MiB: ring 3 may read (PVH start info, command line)
//! 0x100000  ring 0, supervisor only: IDT +0, stubs +0x1000, page tables +0x2000, GDT/TSS +0xa000,
//!           text +0xb000, ring-0 stack, #DF stack, end +0xe000
//! 0x200000  4 KiB pages: boot info, guard, 1 MiB stack, guard, 64 KiB fault stack, guards
//! 0x400000  .text   (2 MiB, R-X user)         0x600000  .rodata (2 MiB, R-- user)
//! 0x800000  .data .bss heap … (RW- user)      0xc0000000 … 4 GiB MMIO (RW- user, uncached), LAPIC supervisor
//! ```
use core::sync::atomic::AtomicU64;

/// Where the VMM writes the boot-info page.
pub const BOOT_INFO: u64 = STACKS;
/// End of the memory a guest may have: above it is MMIO.
pub const MEMORY_END: u64 = 0xc000_0000;
/// First address ring 3 may read (page 0 is not mapped).
pub const LOW_START: u64 = 0x1000;
/// First address past the low memory ring 3 may read.
pub const LOW_END: u64 = 0x10_0000;

const R0_BASE: u64 = 0x10_0000;
const STUBS: u64 = R0_BASE + 0x1000;
const PT: u64 = R0_BASE + 0x2000;
const TABLES: u64 = R0_BASE + 0xa000;
const R0_STACK_TOP: u64 = R0_BASE + 0xd000;
const DF_STACK_TOP: u64 = R0_BASE + 0xe000;
/// Boot info page, guard, stack, guard, fault stack, guards.
const STACKS: u64 = 0x20_0000;
const STACK_TOP: u64 = STACKS + 0x10_2000;
const FAULT_STACK_TOP: u64 = STACKS + 0x11_3000;
const GUARDS: [u64; 3] = [STACKS + 0x1000, STACK_TOP, FAULT_STACK_TOP];
const LAPIC: u64 = 0xfee0_0000;

/// The lowest usable byte of the main stack, and the byte past its top.
#[cfg(not(test))]
pub(crate) const STACK: core::ops::Range<u64> = STACKS + 0x2000..STACK_TOP;
/// Operations of the gate into ring 0 (see `shim.s`).
#[cfg(not(test))]
pub(crate) mod gate {
    /// Arm the LAPIC timer with so many ticks (ns under QEMU and KVM) and halt until an interrupt.
    pub const HALT: u32 = 0;
    /// Return the LAPIC timer's current count.
    pub const LAPIC_COUNT: u32 = 1;
    /// Reset the machine by a triple fault.
    pub const RESET: u32 = 2;
    /// Start the LAPIC timer with so many ticks, masked.
    pub const LAPIC_START: u32 = 3;
}

#[repr(C, align(4096))]
struct Idt([[u64; 2]; 256]);

const fn idt() -> Idt {
    let mut t = [[0u64; 2]; 256];
    let mut v = 0;
    while v < 256 {
        let a = STUBS + 16 * v as u64;
        let ist = if v == 8 { 1u64 } else { 0 };
        // present, DPL 0, 64-bit interrupt gate, selector 0x08
        t[v] = [(a & 0xffff) | 0x08 << 16 | ist << 32 | 0x8e << 40 | (a >> 16 & 0xffff) << 48, a >> 32];
        v += 1;
    }
    Idt(t)
}

const PRESENT: u64 = 1 | 0x20 | 0x40; // with accessed and dirty, so that the CPU never writes them
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;
const UNCACHED: u64 = 0x18;
const NO_EXEC: u64 = 1 << 63;

#[repr(C, align(4096))]
struct PageTables([[u64; 512]; 8]);

/// Identity map of the first 4 GiB: top, one level 3, four level 2, level 1 of the first and the second 2 MiB.
const fn page_tables() -> PageTables {
    let mut t = [[0u64; 512]; 8];
    t[0][0] = (PT + 0x1000) | PRESENT | WRITE | USER;
    let mut g = 0;
    while g < 4 {
        t[1][g] = (PT + 0x2000 + 0x1000 * g as u64) | PRESENT | WRITE | USER;
        let mut i = 0;
        while i < 512 {
            let a = (g as u64) << 30 | (i as u64) << 21;
            let flags = match a {
                0x40_0000 => USER,           // .text
                0x60_0000 => USER | NO_EXEC, // .rodata
                LAPIC => WRITE | NO_EXEC | UNCACHED,
                _ if a >= MEMORY_END => USER | WRITE | NO_EXEC | UNCACHED,
                _ => USER | WRITE | NO_EXEC,
            };
            t[2 + g][i] = a | PRESENT | LARGE | flags;
            i += 1;
        }
        g += 1;
    }
    t[2][0] = (PT + 0x6000) | PRESENT | WRITE | USER;
    t[2][1] = (PT + 0x7000) | PRESENT | WRITE | USER;
    let mut i = 0;
    while i < 512 {
        let low = 0x1000 * i as u64;
        t[6][i] = if low < LOW_START {
            0
        } else if low < LOW_END {
            low | PRESENT | USER | NO_EXEC
        } else {
            low | PRESENT | WRITE
        };
        let a = STACKS + low;
        let guard = a == GUARDS[0] || a == GUARDS[1] || a >= GUARDS[2];
        t[7][i] = if guard { 0 } else { a | PRESENT | WRITE | USER | NO_EXEC };
        i += 1;
    }
    PageTables(t)
}

#[repr(C, align(256))]
struct Tables {
    gdt: [u64; 8],
    gdtr: [u16; 8],
    idtr: [u16; 8],
    tss: [u32; TSS_WORDS],
    null_idtr: [u16; 8],
}
const TSS: u64 = TABLES + 64 + 16 + 16;
const NULL_IDTR: u64 = TSS + 4 * TSS_WORDS as u64;
/// The TSS proper, and behind it an I/O bitmap that opens ports 0 … 0x3ff to ring 3, with its closing byte.
/// Only a TSS limit that covers it makes it count: the shim's own descriptor has that, the VMM's direct start (limit
/// 0x67) has not, so under our VMM no port is open. (IOPL 3 would do the same, but a KVM without VMX loses it.)
const TSS_WORDS: usize = 26 + IO_PORTS / 32 + 2;
const IO_PORTS: usize = 0x400;
const TSS_LIMIT: u64 = 0x68 + IO_PORTS as u64 / 8;

const fn tables() -> Tables {
    let gdt = [
        0,
        0x00af_9b00_0000_ffff, // 0x08 kernel code
        0x00cf_9300_0000_ffff, // 0x10 kernel data
        0x00cf_fb00_0000_ffff, // 0x18 user code 32 (the layout sysret wants)
        0x00cf_f300_0000_ffff, // 0x20 user data
        0x00af_fb00_0000_ffff, // 0x28 user code 64
        // 0x30: TSS, available, so that ltr takes it; in the direct start the VMM loads TR itself
        TSS_LIMIT | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56,
        TSS >> 32,
    ];
    let mut gdtr = [0u16; 8];
    gdtr[0] = 63;
    gdtr[1] = TABLES as u16;
    gdtr[2] = (TABLES >> 16) as u16;
    let mut idtr = [0u16; 8];
    idtr[0] = 4095;
    idtr[1] = R0_BASE as u16;
    idtr[2] = (R0_BASE >> 16) as u16;
    let mut tss = [0u32; TSS_WORDS];
    tss[1] = R0_STACK_TOP as u32; // RSP0
    tss[9] = DF_STACK_TOP as u32; // IST1
    tss[25] = 0x68 << 16; // offset of the I/O bitmap
    tss[26 + IO_PORTS / 32] = u32::MAX;
    Tables { gdt, gdtr, idtr, tss, null_idtr: [0; 8] }
}

#[used]
#[unsafe(link_section = ".ring0.idt")]
static IDT: Idt = idt();
#[cfg_attr(not(test), unsafe(no_mangle))]
#[used]
#[unsafe(link_section = ".ring0.pt")]
static R0_PT: PageTables = page_tables();
#[cfg_attr(not(test), unsafe(no_mangle))]
#[used]
#[unsafe(link_section = ".ring0.tables")]
static R0_TABLES: Tables = tables();

/// What ring 0 saw, filled in before it resumes ring 3 at `r3_fault_entry`: vector, error code, RIP, RFLAGS, RSP,
/// CR2. The other registers are still in place then, and ring 3 saves them itself.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) static R0_FAULT: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];

#[cfg(not(any(test, feature = "hosted")))]
core::arch::global_asm!(
    include_str!("shim.s"),
    gdtr = const TABLES + 64,
    idtr = const TABLES + 80,
    null_idtr = const NULL_IDTR,
    pt = const PT,
    gdt = const TABLES,
    idt = const R0_BASE,
    tss = const TSS,
    boot_info = const BOOT_INFO,
    r0stack = const R0_STACK_TOP,
    stack_top = const STACK_TOP,
    fault_stack_top = const FAULT_STACK_TOP,
    lapic = const LAPIC,
    platform_base = const BOOT_INFO + core::mem::offset_of!(guest_abi::BootInfo, platform_base) as u64,
    magic_lo = const guest_abi::BOOT_INFO_MAGIC as u32,
    exit_reg = const guest_abi::platform::EXIT,
    ring0_fault = const guest_abi::exit_status::RING0_FAULT,
    note_type = const guest_abi::NOTE_TYPE,
    note_version = const guest_abi::NOTE_VERSION,
    op_halt = const gate::HALT,
    op_count = const gate::LAPIC_COUNT,
    op_start = const gate::LAPIC_START,
);

#[cfg(test)]
mod tests;
