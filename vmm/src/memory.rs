//! Guest memory: anonymous mappings, and which pages of them changed.
//!
//! Owns the mappings and their KVM slots: one from guest-physical address 0, and, when there is more than fits below the
//! devices, a second one from 4 GiB. A page's number is its guest-physical address by 4 KiB everywhere (bitmaps, a port's
//! page runs), so numbers in the hole between them exist, with no page. Always true: every write of the monitor itself marks its page in the
//! mapping's bitmap ([`GuestRam`] does so by itself; writes the kernel does for us, as into a read buffer, are marked by
//! the device); every write of the guest is in KVM's dirty log while that is on. The two together are what a port must send.

mod backing;
mod discard;
pub use backing::SharedRegion;

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::error::{Error, Result, host, kvm};
use crate::layout::{HIGH_RAM, LOW_RAM_MAX};

/// Guest memory that marks the pages written through it.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Page size of the dirty bitmaps.
pub const PAGE_SIZE: usize = 4096;
/// Guest memory is a multiple of this, so that it can be mapped with large pages throughout.
pub const HUGE_PAGE: usize = 2 << 20;
/// Largest guest memory: 1 TiB.
pub const MEMORY_MAX: u64 = 1 << 40;

/// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the log does not clear it; clearing is a call of its own.
const MANUAL_PROTECT: u64 = 1;

/// The call kvm-ioctls lacks.
mod ioctl {
    #![allow(missing_docs)]
    use super::{KVMIO, kvm_clear_dirty_log};
    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// The memory of one VM.
#[derive(Clone)]
pub struct Memory {
    ram: Arc<GuestRam>,
    size: usize,
}

/// One of the mappings.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// First guest-physical address.
    pub address: u64,
    /// Length in bytes, a multiple of [`HUGE_PAGE`].
    pub len: usize,
    /// Where it is in this process.
    pub host: *mut u8,
}

impl Region {
    /// Its guest-physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address + self.len as u64
    }

    /// Its words in a bitmap of page numbers.
    pub fn words(&self) -> Range<usize> {
        let word = 64 * PAGE_SIZE;
        self.address as usize / word..(self.address as usize + self.len) / word
    }
}

/// Where memory of `size` bytes lies.
fn place(size: usize) -> Vec<(GuestAddress, usize)> {
    match size.checked_sub(LOW_RAM_MAX as usize) {
        None | Some(0) => vec![(GuestAddress(0), size)],
        Some(high) => vec![(GuestAddress(0), LOW_RAM_MAX as usize), (GuestAddress(HIGH_RAM), high)],
    }
}

fn check_size(size: usize) -> Result<()> {
    if size == 0 || !size.is_multiple_of(HUGE_PAGE) || size as u64 > MEMORY_MAX {
        return Err(Error::Memory(format!("{size} bytes: must be a multiple of 2 MiB, at most 1 TiB")));
    }
    Ok(())
}

impl Memory {
    /// Maps `size` bytes of zeroed memory, a multiple of [`HUGE_PAGE`], at most [`MEMORY_MAX`].
    pub fn new(size: usize) -> Result<Self> {
        Memory::with_sharing(size, false)
    }

    /// As [`Memory::new`]; `shared` memory can be given to other processes: see [`Memory::shared_regions`].
    pub fn with_sharing(size: usize, shared: bool) -> Result<Self> {
        check_size(size)?;
        let ram = backing::map(&place(size), shared)?;
        let memory = Memory { ram: Arc::new(ram), size };
        for region in memory.regions() {
            // SAFETY: the range is a mapping just made; the advice does not change its content.
            let rc = unsafe { libc::madvise(region.host.cast(), region.len, libc::MADV_HUGEPAGE) };
            if rc != 0 {
                log::warn!("large pages for guest memory: {}", std::io::Error::last_os_error());
            }
        }
        Ok(memory)
    }

    /// Maps memory of `size` bytes from a file in which every page lies at its guest-physical address: pages that are not
    /// written are the page cache's, those that are are copied.
    pub fn of_file(size: usize, file: std::fs::File) -> Result<Self> {
        check_size(size)?;
        Ok(Memory { ram: Arc::new(backing::map_file(&place(size), &Arc::new(file))?), size })
    }

    /// Whether pages that nobody has written have content all the same.
    pub fn is_of_file(&self) -> bool {
        self.ram.iter().any(|r| r.file_offset().is_some() && r.get_mmap().flags() & libc::MAP_SHARED == 0)
    }

    /// The memory itself; writes through it mark pages.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The mappings, in the order of their addresses; the first begins at 0.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.ram.iter().map(|r| Region {
            address: r.start_addr().0,
            len: r.len() as usize,
            host: r.get_host_address(MemoryRegionAddress(0)).unwrap_or(std::ptr::null_mut()),
        })
    }

    /// Guest-physical addresses that are memory.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.regions().map(|r| r.range()).collect()
    }

    /// End of the memory below the devices.
    pub fn low_end(&self) -> u64 {
        self.regions().next().map_or(0, |r| r.range().end)
    }

    /// Words of a bitmap over page numbers, those in the hole included.
    pub fn bitmap_words(&self) -> usize {
        self.regions().map(|r| r.words().end).max().unwrap_or(0)
    }

    /// Host address of guest-physical address 0.
    pub fn host_base(&self) -> *mut u8 {
        self.regions().next().map_or(std::ptr::null_mut(), |r| r.host)
    }

    /// Makes the memory the VM's.
    pub fn register(&self, vm: &VmFd) -> Result<()> {
        self.set_slots(vm, 0)
    }

    fn set_slots(&self, vm: &VmFd, flags: u32) -> Result<()> {
        for (slot, region) in (0..).zip(self.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.address,
                memory_size: region.len as u64,
                userspace_addr: region.host as u64,
            };
            // SAFETY: the region is our own mapping; it lives as long as `self.ram`, which `Vm` keeps longer than the VM.
            unsafe { vm.set_user_memory_region(region) }.map_err(kvm("set memory region"))?;
        }
        Ok(())
    }

    /// Starts KVM's dirty log; all pages count as clean in it, the caller sends all of them first.
    pub fn start_dirty_log(&self, vm: &VmFd) -> Result<()> {
        self.take_own_dirty();
        self.set_slots(vm, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Stops KVM's dirty log.
    pub fn stop_dirty_log(&self, vm: &VmFd) -> Result<()> {
        self.set_slots(vm, 0)
    }

    /// Pages the guest has written since they were last cleared: bit n of word m is page 64 m + n.
    pub fn guest_dirty(&self, vm: &VmFd) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        for (slot, region) in (0..).zip(self.regions()) {
            let words = vm.get_dirty_log(slot, region.len).map_err(kvm("get dirty log"))?;
            append(&mut all, &region, words);
        }
        Ok(all)
    }

    /// Clears the pages set in `bitmap` (as [`Self::guest_dirty`] gave it) from the dirty log, so that their next write is
    /// seen again. To be called before their content is read.
    pub fn clear_guest_dirty(&self, vm: &VmFd, bitmap: &[u64]) -> Result<()> {
        if bitmap.len() != self.bitmap_words() {
            return Err(Error::Memory(format!("dirty bitmap of {} words", bitmap.len())));
        }
        for (slot, region) in (0..).zip(self.regions()) {
            let words = &bitmap[region.words()];
            if words.iter().all(|w| *w == 0) {
                continue;
            }
            let mut request = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(region.len / PAGE_SIZE).map_err(|e| Error::Memory(e.to_string()))?,
                first_page: 0,
                ..Default::default()
            };
            request.__bindgen_anon_1.dirty_bitmap = words.as_ptr() as *mut libc::c_void;
            // SAFETY: the kernel only reads the bitmap, which has one bit per page of the region.
            let rc = unsafe { ioctl_with_ref(vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &request) };
            if rc != 0 {
                return Err(host("KVM: clear dirty log")(std::io::Error::last_os_error()));
            }
        }
        Ok(())
    }

    /// Takes the pages the monitor itself has written since the last call, in the form of [`Self::guest_dirty`].
    pub fn take_own_dirty(&self) -> Vec<u64> {
        let mut all = Vec::new();
        for (region, mapping) in self.regions().zip(self.ram.iter()) {
            append(&mut all, &region, mapping.get_mmap().bitmap().get_and_reset());
        }
        all
    }

    /// Makes all memory zero again and gives it back to the host, for a reset: nothing of what ran before is left. Only while no
    /// vCPU runs. All pages count as written by the monitor.
    pub fn clear(&self) -> Result<()> {
        for address in self.regions().flat_map(|r| r.range().step_by(HUGE_PAGE)) {
            let range = GuestRange { address, len: HUGE_PAGE as u32 };
            self.discard(range).map_err(host("clear guest memory"))?;
        }
        Ok(())
    }
}

/// Puts a region's words at their place behind those of the regions before it.
fn append(all: &mut Vec<u64>, region: &Region, words: Vec<u64>) {
    if all.is_empty() && region.address == 0 {
        *all = words;
    } else {
        all.resize(region.words().start, 0);
        all.extend(words);
    }
}

/// A piece of guest memory that was checked to lie inside it: what remains of an address and a length a guest gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    address: u64,
    len: u32,
}

impl GuestRange {
    /// The first guest-physical address.
    pub fn address(&self) -> GuestAddress {
        GuestAddress(self.address)
    }

    /// Length in bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// No bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `n` bytes, and the rest; `n` beyond the end takes all.
    pub fn split_at(&self, n: u32) -> (GuestRange, GuestRange) {
        let n = n.min(self.len);
        (
            GuestRange { address: self.address, len: n },
            GuestRange { address: self.address + u64::from(n), len: self.len - n },
        )
    }
}

impl Memory {
    /// The one way from what a guest says to a [`GuestRange`].
    pub fn range(&self, address: GuestAddress, len: u32) -> Option<GuestRange> {
        let end = address.0.checked_add(u64::from(len))?;
        let inside = |r: Region| r.address <= address.0 && end <= r.range().end;
        self.regions().any(inside).then_some(GuestRange { address: address.0, len })
    }

    fn host_address(&self, range: &GuestRange) -> *mut u8 {
        // A range lies in one region; an empty one at a region's end is never touched.
        let region = self.regions().filter(|r| r.address <= range.address).last();
        region.map_or(std::ptr::null_mut(), |r| r.host.wrapping_add((range.address - r.address) as usize))
    }

    /// The range in this process, for the kernel to read or fill. Who lets it be filled must call [`Memory::mark_dirty`].
    pub fn iovec(&self, range: GuestRange) -> IoVec {
        IoVec(libc::iovec { iov_base: self.host_address(&range).cast(), iov_len: range.len as usize })
    }

    /// A piece of memory that stands still: only for a VM whose vCPU is stopped and whose devices are quiesced. Should
    /// something be written meanwhile all the same, the bytes read are old or new, nothing else depends on them.
    pub(crate) fn still(&self, address: u64, len: usize) -> Result<&[u8]> {
        let outside = || Error::Memory(format!("{address:#x}+{len:#x} is outside"));
        let len32 = u32::try_from(len).map_err(|_| outside())?;
        let range = self.range(GuestAddress(address), len32).ok_or_else(outside)?;
        // SAFETY: the range lies in a mapping, which lives as long as `self`, and is always readable.
        Ok(unsafe { std::slice::from_raw_parts(self.host_address(&range), len) })
    }

    /// The kernel has filled the first `n` bytes of the range.
    pub fn mark_dirty(&self, range: GuestRange, n: u32) {
        for region in self.ram.iter() {
            if let Some(at) = region.to_region_addr(range.address()) {
                region.get_mmap().bitmap().set_addr_range(at.0 as usize, n.min(range.len) as usize);
            }
        }
    }
}

/// A piece of guest memory as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(pub libc::iovec);

// SAFETY: the pointer is into guest memory, which is shared with the guest anyway: no thread has it to itself, and all
// access through it is by the kernel.
unsafe impl Send for IoVec {}

impl std::fmt::Debug for IoVec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:p}+{:#x}", self.0.iov_base, self.0.iov_len)
    }
}

/// Asks for a dirty log whose reading and clearing are apart (Linux 5.2). To be called before the first memory region.
pub(crate) fn enable_manual_protect(vm: &VmFd) -> Result<()> {
    let mut cap = kvm_enable_cap { cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = MANUAL_PROTECT;
    vm.enable_cap(&cap).map_err(kvm("enable manual dirty log"))
}

#[cfg(test)]
mod tests;
