//! The contract between the VMM and a guest image that it starts directly in ring 3.
//!
//! Owns: the ELF note an image carries, the boot-info page the VMM fills in, what the guest tells in it, the registers of the
//! *platform device* the guest parks, prints and ends through. Both sides compile this crate, so
//! neither can drift; docs/guest-abi.md describes it for other VMMs.
//!
//! Always true: every number is little-endian and fixed-size; every struct has the layout asserted at
//! the end of this file; [`BOOT_INFO_VERSION`] and [`NOTE_VERSION`] change whenever a layout does.
//! The VMM treats all it reads back from these structures as hostile.
#![no_std]
#![forbid(unsafe_code)]

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Owner name of the ELF note (with its terminating NUL, padded to 4 bytes: 12 bytes).
pub const NOTE_NAME: &[u8; 10] = b"Outrigger\0";
/// Type of the ELF note that describes the direct start.
pub const NOTE_TYPE: u32 = 1;
/// Version of [`DirectStart`].
pub const NOTE_VERSION: u32 = 1;

/// What a VMM needs to start the first vCPU in ring 3: descriptor of the ELF note.
///
/// The tables it names are constants inside the image; the VMM only loads registers:
/// CR0=0x8001_0033, CR4=0x620, EFER=0xd00, FCW=0x37f, MXCSR=0x1f80, RFLAGS=0x202,
/// CS=`user_cs`, SS/DS/ES/FS/GS=`user_ss`, TR=`tss_selector`, RDI=`boot_info`, RIP=`entry`, RSP=`stack_top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DirectStart {
    /// [`NOTE_VERSION`].
    pub version: u32,
    /// Reserved, zero.
    pub flags: u32,
    /// Guest-physical address of the top page table.
    pub cr3: u64,
    /// GDT base.
    pub gdt_base: u64,
    /// IDT base.
    pub idt_base: u64,
    /// TSS base (limit 0x67).
    pub tss_base: u64,
    /// First ring-3 instruction.
    pub entry: u64,
    /// Initial stack pointer, 16-byte aligned.
    pub stack_top: u64,
    /// Where the VMM writes the [`BootInfo`] page.
    pub boot_info: u64,
    /// GDT limit.
    pub gdt_limit: u16,
    /// IDT limit.
    pub idt_limit: u16,
    /// Selector of the TSS.
    pub tss_selector: u16,
    /// Selector of the 64-bit user code segment, RPL 3.
    pub user_cs: u16,
    /// Selector of the user data segment, RPL 3.
    pub user_ss: u16,
    /// Reserved, zero.
    pub reserved: [u16; 3],
}

/// `"OUTRIGGR"`: first eight bytes of the boot-info page.
pub const BOOT_INFO_MAGIC: u64 = u64::from_le_bytes(*b"OUTRIGGR");
/// Version of [`BootInfo`].
///
/// 1 had no [`BootInfo::instance`]; 2: what follows.
pub const BOOT_INFO_VERSION: u32 = 2;
/// Size of the boot-info page.
pub const BOOT_INFO_SIZE: usize = 4096;
/// Longest kernel command line, in bytes.
pub const CMDLINE_MAX: usize = 2048;
/// The word on the command line that makes an image prepare itself and wait to be made an instance. Instances are made of
/// nothing else, and do not have the word.
pub const TEMPLATE_WORD: &str = "template";

/// The clock page: nanoseconds = `ns_base` + ((tsc − `tsc_base`) × `mult`) >> `shift` (128-bit product).
///
/// Written by the VMM before the first instruction and again on restore and port, under a sequence
/// lock: `seq` is odd while it is being written. `generation` grows by one with every rewrite, so a
/// guest that sees it change knows that it was restored or ported. Time never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClockPage {
    /// Sequence lock: odd while being written.
    pub seq: u32,
    /// Grows with every restore or port.
    pub generation: u32,
    /// TSC value at which the bases were taken.
    pub tsc_base: u64,
    /// Monotonic nanoseconds at `tsc_base`, continued over restores and ports.
    pub mono_ns_base: u64,
    /// CLOCK_REALTIME nanoseconds since 1970 at `tsc_base`.
    pub real_ns_base: u64,
    /// Multiplier.
    pub mult: u32,
    /// Shift.
    pub shift: u32,
}

/// Who the VM is: read by the guest before it talks to a D-module, rewritten on port and spawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Identity {
    /// The VM's id: key of the ownership record. Zero: none given.
    pub vm_id: u64,
    /// Ownership epoch. Zero: not claimed yet; a guest that claims it at the D-module stores it here, a VMM
    /// that takes the VM over stores the epoch it won.
    pub epoch: u64,
    /// Identity of the VMM process that runs the VM (random): the owner in the ownership record.
    pub owner: [u64; 2],
    /// Entropy for this instance; the guest must mix it into its generator and never use it as it is.
    pub entropy: [u8; 32],
}

/// The boot-info page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BootInfo {
    /// [`BOOT_INFO_MAGIC`].
    pub magic: u64,
    /// [`BOOT_INFO_VERSION`].
    pub version: u32,
    /// Bytes of `cmdline` in use.
    pub cmdline_len: u32,
    /// Guest memory in bytes, from guest-physical address 0.
    pub memory_size: u64,
    /// Guest-physical base of the platform device ([`platform`]); 0 where there is none.
    pub platform_base: u64,
    /// Clock.
    pub clock: ClockPage,
    /// Identity.
    pub identity: Identity,
    /// CPU features the guest may use, so that it need not execute CPUID (slow here): leaf 1 ECX,
    /// leaf 1 EDX, leaf 7.0 EBX, leaf 7.0 ECX.
    pub cpu_features: [u32; 4],
    /// Which instance this is: 0 after a start, one more whenever the VMM makes an instance of a checkpoint of it. It then
    /// has rewritten `cmdline`, `identity` and `clock` (with a new generation) before the first entry, and devices have new
    /// addresses: a guest that finds another number than before reads all of them anew. A port does not change it.
    pub instance: u32,
    /// Not zero: the VMM asks for a [lull](GuestInfo::lull), until it is zero again. Changed while the guest runs, with one aligned
    /// store; another number is another question.
    pub lull: u32,
    /// Kernel command line, UTF-8, not NUL-terminated. Devices are announced in it in Linux's form,
    /// `virtio_mmio.device=4K@0xd0000000:5`.
    pub cmdline: [u8; CMDLINE_MAX],
}

/// Where in the boot-info page the guest puts its [`GuestInfo`], if it has something to tell; zero before.
pub const GUEST_INFO_OFFSET: usize = 3072;
/// `"OUTRTELL"`: first eight bytes of [`GuestInfo`], written last.
pub const GUEST_INFO_MAGIC: u64 = u64::from_le_bytes(*b"OUTRTELL");
/// Version of [`GuestInfo`] and [`FreePages`].
///
/// 1 had no [`GuestInfo::lull`], but zero in its place; 2: what follows.
pub const GUEST_INFO_VERSION: u32 = 2;

/// What the guest tells the VMM of itself. The VMM may ignore it, and does where it makes no sense.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GuestInfo {
    /// [`GUEST_INFO_MAGIC`].
    pub magic: u64,
    /// [`GUEST_INFO_VERSION`].
    pub version: u32,
    /// The answer to [`BootInfo::lull`]: its number, once the guest has come to a lull. It is about to be stopped for a moment, and has
    /// seen to it that as little as possible is under way to it by then: its TCP windows are closed, so that no peer waits for an
    /// acknowledgement that the stop would keep from it. Otherwise it goes on as usual.
    pub lull: u32,
    /// Guest-physical address of [`FreePages`], a multiple of 8; 0: none.
    pub free_pages: u64,
}

/// Pages the guest has no use for the content of, right behind it `pages` ÷ 64 words, rounded up: bit n of word m is page
/// 64 m + n. The VMM may leave such a page behind when it takes the guest elsewhere, and put anything in its place.
///
/// Clearing a page's bit comes before the first write to the page, in the order in which another processor sees stores, or `seq` is
/// odd from before that write until after the bit was cleared. Who reads the words takes them for true only
/// if `seq` was even before and is the same afterwards. To know what a page contains that is written meanwhile he looks at the log of written
/// pages before he reads the words, and decides on a page again when it is in the log again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FreePages {
    /// Odd: being changed. Grows.
    pub seq: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// How many pages of memory the words tell of, from guest-physical address 0.
    pub pages: u64,
}

/// Registers of the platform device: one 4 KiB page of MMIO, each a single naturally aligned store.
pub mod platform {
    /// u64 store: park the vCPU until a device has something for the guest, or until this many
    /// nanoseconds have passed ([`PARK_FOREVER`]: no deadline). Returns at once if anything was signalled since
    /// the last park. The VMM first looks at all queues itself, so no doorbell is needed before.
    pub const PARK: u64 = 0x00;
    /// No deadline.
    pub const PARK_FOREVER: u64 = u64::MAX;
    /// u64 store, `len << 48 | address`: print `len` bytes at a guest-physical address on the console.
    pub const CONSOLE: u64 = 0x08;
    /// u32 store: the guest has ended with this status; the VM stops. See [`super::exit_status`].
    pub const EXIT: u64 = 0x10;
    /// u32 store: the guest is up (the value says how far: 1 first ring-3 instruction, 2 serving, 3 a template that is
    /// prepared and parks until it is made an instance). For boot figures.
    pub const BOOT_MARK: u64 = 0x14;
}

/// Values a guest stores to [`platform::EXIT`]; the `vmm` process ends with the same status.
pub mod exit_status {
    /// Orderly shutdown.
    pub const OK: u32 = 0;
    /// The module failed and said why on the console (bad command line, missing device, …).
    pub const FAILED: u32 = 1;
    /// Fault in ring 3.
    pub const FAULT: u32 = 99;
    /// Rust panic.
    pub const PANIC: u32 = 101;
    /// Fault in ring 0.
    pub const RING0_FAULT: u32 = 102;
}

const _: () = {
    assert!(size_of::<DirectStart>() == 80);
    assert!(size_of::<ClockPage>() == 40);
    assert!(size_of::<Identity>() == 64);
    assert!(offset_of!(BootInfo, clock) == 32);
    assert!(offset_of!(BootInfo, identity) == 72);
    assert!(offset_of!(BootInfo, cpu_features) == 136);
    assert!(offset_of!(BootInfo, instance) == 152);
    assert!(offset_of!(BootInfo, lull) == 156);
    assert!(offset_of!(BootInfo, cmdline) == 160);
    assert!(size_of::<BootInfo>() <= GUEST_INFO_OFFSET);
    assert!(size_of::<GuestInfo>() == 24);
    assert!(offset_of!(GuestInfo, lull) == 12);
    assert!(GUEST_INFO_OFFSET + size_of::<GuestInfo>() <= BOOT_INFO_SIZE);
    assert!(size_of::<FreePages>() == 16);
    assert!(offset_of!(FreePages, pages) == 8);
};
