//! What the image learns from whoever started it: memory, command line, whether there is a platform device.
//!
//! Two sources: the boot-info page of our VMM (recognised by its magic, however the vCPU was started), or the PVH
//! start info of any other. Everything is copied before the heap exists, so nothing can be overwritten under it.
use crate::ring0::{BOOT_INFO, LOW_END, LOW_START, MEMORY_END};
use crate::{platform, time};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use guest_abi::{BOOT_INFO_MAGIC, BOOT_INFO_VERSION, BootInfo, CMDLINE_MAX};
use guest_abi::{GUEST_INFO_MAGIC, GUEST_INFO_OFFSET, GUEST_INFO_VERSION, GuestInfo};

/// Why the image cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither of the two sources is there.
    #[error("no boot-info page and no PVH start info (magic {0:#x})")]
    NoInformation(u32),
    /// Another version of the contract.
    #[error("boot-info page of version {0}; this image knows version {BOOT_INFO_VERSION}")]
    Version(u32),
    /// A pointer in the start info leads where ring 3 cannot read.
    #[error("the start info's {0} at {1:#x} is not readable")]
    Unreadable(&'static str, u64),
    /// The command line does not fit or is not text.
    #[error("the command line is longer than {CMDLINE_MAX} bytes or not UTF-8")]
    Cmdline,
    /// Too little memory.
    #[error("{0} MiB of memory at address 0, at least {MIN_MEMORY_MIB} are needed")]
    Memory(u64),
}

/// Least memory that holds image, stacks and some heap.
const MIN_MEMORY_MIB: u64 = 16;
/// Most memory map entries looked at.
const MAX_MAP_ENTRIES: u64 = 64;
const HVM_START_MAGIC: u32 = 0x336e_c578;
const MAP_RAM: u32 = 1;

/// How the vCPU was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Straight in ring 3, by our VMM.
    Direct,
    /// By the PVH entry.
    Pvh,
}

/// The boot information.
pub struct Boot {
    /// How the vCPU was started.
    pub start: Start,
    /// Memory from address 0, in bytes.
    pub memory_size: u64,
    /// Command line.
    pub cmdline: CmdlineBuffer,
}

/// A command line, before there is a heap.
pub struct CmdlineBuffer {
    bytes: [u8; CMDLINE_MAX],
    len: usize,
}

impl CmdlineBuffer {
    fn of(page: &BootInfo) -> Result<CmdlineBuffer, BootError> {
        let len = page.cmdline_len as usize;
        let text = page.cmdline.get(..len).ok_or(BootError::Cmdline)?;
        core::str::from_utf8(text).map_err(|_| BootError::Cmdline)?;
        Ok(CmdlineBuffer { bytes: page.cmdline, len })
    }
}

impl core::ops::Deref for CmdlineBuffer {
    type Target = str;
    fn deref(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

/// Address of the boot-info page where there is one, else 0.
static PAGE: AtomicU64 = AtomicU64::new(0);

/// The boot-info page of our VMM, if it runs us.
pub(crate) fn page() -> Option<*mut BootInfo> {
    let at = PAGE.load(Relaxed);
    (at != 0).then_some(at as *mut BootInfo)
}

/// Where the guest tells the VMM of itself.
fn told(page: *mut BootInfo) -> *mut GuestInfo {
    page.cast::<u8>().wrapping_add(GUEST_INFO_OFFSET).cast()
}

/// Which lull the VMM asks for; 0: none.
pub(crate) fn lull_asked() -> u32 {
    // SAFETY: mapped for the life of the image; an aligned load of what the VMM changes with one store.
    page().map_or(0, |page| unsafe { (&raw const (*page).lull).read_volatile() })
}

/// Tells the VMM that this guest has come to a lull.
pub(crate) fn answer_lull(number: u32) {
    if let Some(page) = page() {
        // SAFETY: within the boot-info page, behind all the VMM writes, aligned.
        unsafe { (&raw mut (*told(page)).lull).write_volatile(number) }
    }
}

/// Tells the VMM where the map of free pages is, if it has given us a page to tell it in.
pub(crate) fn tell(free_pages: u64) {
    let Some(page) = page() else { return };
    let told = told(page);
    let info = GuestInfo { magic: 0, version: GUEST_INFO_VERSION, lull: 0, free_pages };
    // SAFETY: within the boot-info page, behind all the VMM writes, aligned; no Rust object is there.
    unsafe {
        told.write_volatile(info);
        // Last: who finds it finds the rest.
        (&raw mut (*told).magic).write_volatile(GUEST_INFO_MAGIC);
    }
}

/// The command line as the boot-info page has it now.
pub(crate) fn cmdline_now(page: *mut BootInfo) -> Result<CmdlineBuffer, BootError> {
    // SAFETY: [`page`] gave it: mapped for the life of the image, written by the VMM only while the vCPU is stopped; any bit
    // pattern is a BootInfo.
    CmdlineBuffer::of(&unsafe { page.read_volatile() })
}

/// Reads the boot information and sets up the platform device or its substitutes.
///
/// # Safety
/// Once, first of all; `info` is what was passed to the entry point.
pub(crate) unsafe fn discover(info: u64, pvh: bool) -> Result<Boot, BootError> {
    let start = if pvh { Start::Pvh } else { Start::Direct };
    let page = BOOT_INFO as *mut BootInfo;
    // SAFETY: the page is mapped, is part of no Rust object, and any bit pattern is a BootInfo.
    let magic = unsafe { (&raw const (*page).magic).read_volatile() };
    let boot = if magic == BOOT_INFO_MAGIC {
        // SAFETY: as above.
        let b = unsafe { page.read_volatile() };
        if b.version != BOOT_INFO_VERSION {
            return Err(BootError::Version(b.version));
        }
        PAGE.store(BOOT_INFO, Relaxed);
        platform::use_device(b.platform_base);
        Boot { start, memory_size: b.memory_size, cmdline: CmdlineBuffer::of(&b)? }
    } else {
        platform::use_legacy();
        // SAFETY: of the caller.
        unsafe { from_pvh(info)? }
    };
    time::use_page(crate::boot::page());
    let memory_size = boot.memory_size.min(MEMORY_END);
    if memory_size < MIN_MEMORY_MIB << 20 {
        return Err(BootError::Memory(memory_size >> 20));
    }
    Ok(Boot { memory_size, ..boot })
}

/// Reads a value of a PVH structure, if it lies where ring 3 may read.
unsafe fn read<T: Copy + zerocopy::FromBytes>(what: &'static str, at: u64) -> Result<T, BootError> {
    let end = at.saturating_add(size_of::<T>() as u64);
    if at < LOW_START || end > MEMORY_END || (at < BOOT_INFO && end > LOW_END) {
        return Err(BootError::Unreadable(what, at));
    }
    // SAFETY: mapped for ring 3 by the page tables; any bit pattern is a T.
    Ok(unsafe { (at as *const T).read_unaligned() })
}

unsafe fn from_pvh(info: u64) -> Result<Boot, BootError> {
    // SAFETY: `read` checks where it reads; the structures are those of the PVH boot ABI.
    unsafe {
        let magic: u32 = read("header", info)?;
        if magic != HVM_START_MAGIC {
            return Err(BootError::NoInformation(magic));
        }
        let cmdline_at: u64 = read("header", info + 24)?;
        let map: u64 = read("header", info + 40)?;
        let entries: u32 = read("header", info + 48)?;
        let mut cmdline = CmdlineBuffer { bytes: [0; CMDLINE_MAX], len: 0 };
        if cmdline_at != 0 {
            loop {
                match read::<u8>("command line", cmdline_at + cmdline.len as u64)? {
                    0 => break,
                    _ if cmdline.len == CMDLINE_MAX => return Err(BootError::Cmdline),
                    byte => {
                        cmdline.bytes[cmdline.len] = byte;
                        cmdline.len += 1;
                    }
                }
            }
        }
        if core::str::from_utf8(&cmdline.bytes[..cmdline.len]).is_err() {
            return Err(BootError::Cmdline);
        }
        // The region the image itself lies in.
        let mut memory_size = 0;
        for i in 0..u64::from(entries).min(MAX_MAP_ENTRIES) {
            let base: u64 = read("memory map", map + 24 * i)?;
            let size: u64 = read("memory map", map + 24 * i + 8)?;
            let kind: u32 = read("memory map", map + 24 * i + 16)?;
            let end = base.saturating_add(size);
            if kind == MAP_RAM && base <= crate::ring0::BOOT_INFO && end > memory_size {
                memory_size = end;
            }
        }
        Ok(Boot { start: Start::Pvh, memory_size, cmdline })
    }
}
