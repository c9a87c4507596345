//! Guest memory: one anonymous mapping from guest-physical address 0, and which pages of it changed.
//!
//! Owns the mapping and its KVM slot. Always true: every write of the monitor itself marks its page in the
//! mapping's bitmap ([`GuestRam`] does so by itself; writes the kernel does for us, as into a read buffer, are marked by
//! the device); every write of the guest is in KVM's dirty log while that is on. The two together are what a port must send.

mod backing;
mod discard;
pub use backing::SharedRegion;

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::error::{Error, Result, host, kvm};

/// Guest memory that marks the pages written through it.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Page size of the dirty bitmaps.
pub const PAGE_SIZE: usize = 4096;
/// Guest memory is a multiple of this, so that it can be mapped with large pages throughout.
pub const HUGE_PAGE: usize = 2 << 20;
/// Guest memory ends at or below this; device registers lie above.
pub const MEMORY_LIMIT: u64 = 0xc000_0000;

const SLOT: u32 = 0;
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

impl Memory {
    /// Maps `size` bytes of zeroed memory, a multiple of [`HUGE_PAGE`], at most [`MEMORY_LIMIT`].
    pub fn new(size: usize) -> Result<Self> {
        Memory::with_sharing(size, false)
    }

    /// As [`Memory::new`]; `shared` memory can be given to other processes: see [`Memory::shared_regions`].
    pub fn with_sharing(size: usize, shared: bool) -> Result<Self> {
        if size == 0 || !size.is_multiple_of(HUGE_PAGE) || size as u64 > MEMORY_LIMIT {
            return Err(Error::Memory(format!("{size} bytes: must be a multiple of 2 MiB, at most 3 GiB")));
        }
        let ram = backing::map(&[(GuestAddress(0), size)], shared)?;
        let memory = Memory { ram: Arc::new(ram), size };
        // SAFETY: the range is the mapping just made; the advice does not change its content.
        let rc = unsafe { libc::madvise(memory.host_base().cast(), size, libc::MADV_HUGEPAGE) };
        if rc != 0 {
            log::warn!("large pages for guest memory: {}", std::io::Error::last_os_error());
        }
        Ok(memory)
    }

    /// The memory, for reads and writes that mark pages.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Number of 4 KiB pages.
    pub fn pages(&self) -> usize {
        self.size / PAGE_SIZE
    }

    /// Host address of guest-physical address 0.
    pub fn host_base(&self) -> *mut u8 {
        self.ram.get_host_address(GuestAddress(0)).unwrap_or(std::ptr::null_mut())
    }

    /// Makes the memory the VM's.
    pub fn register(&self, vm: &VmFd) -> Result<()> {
        self.set_slot(vm, 0)
    }

    fn set_slot(&self, vm: &VmFd, flags: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags,
            guest_phys_addr: 0,
            memory_size: self.size as u64,
            userspace_addr: self.host_base() as u64,
        };
        // SAFETY: the region is our own mapping; it lives as long as `self.ram`, which `Vm` keeps longer than the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("set memory region"))
    }

    /// Starts KVM's dirty log; all pages count as clean in it, the caller sends all of them first.
    pub fn start_dirty_log(&self, vm: &VmFd) -> Result<()> {
        self.take_own_dirty();
        self.set_slot(vm, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Stops KVM's dirty log.
    pub fn stop_dirty_log(&self, vm: &VmFd) -> Result<()> {
        self.set_slot(vm, 0)
    }

    /// Pages the guest has written since they were last cleared: bit n of word m is page 64 m + n.
    pub fn guest_dirty(&self, vm: &VmFd) -> Result<Vec<u64>> {
        vm.get_dirty_log(SLOT, self.size).map_err(kvm("get dirty log"))
    }

    /// Clears the pages set in `bitmap` (as [`Self::guest_dirty`] gave it) from the dirty log, so that their next write is
    /// seen again. To be called before their content is read.
    pub fn clear_guest_dirty(&self, vm: &VmFd, bitmap: &[u64]) -> Result<()> {
        if bitmap.len() != self.pages().div_ceil(64) {
            return Err(Error::Memory(format!("dirty bitmap of {} words", bitmap.len())));
        }
        let mut request = kvm_clear_dirty_log {
            slot: SLOT,
            num_pages: u32::try_from(self.pages()).map_err(|e| Error::Memory(e.to_string()))?,
            first_page: 0,
            ..Default::default()
        };
        request.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr() as *mut libc::c_void;
        // SAFETY: the kernel only reads the bitmap, whose length was checked to be one bit per page.
        let rc = unsafe { ioctl_with_ref(vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &request) };
        if rc != 0 {
            return Err(host("KVM: clear dirty log")(std::io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Takes the pages the monitor itself has written since the last call, in the form of [`Self::guest_dirty`].
    pub fn take_own_dirty(&self) -> Vec<u64> {
        self.ram.iter().next().map(|r| r.get_mmap().bitmap().get_and_reset()).unwrap_or_default()
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
        (end <= self.size as u64).then_some(GuestRange { address: address.0, len })
    }

    /// The range in this process, for the kernel to read or fill. Who lets it be filled must call [`Memory::mark_dirty`].
    pub fn iovec(&self, range: GuestRange) -> IoVec {
        let at = self.host_base().wrapping_add(range.address as usize);
        IoVec(libc::iovec { iov_base: at.cast(), iov_len: range.len as usize })
    }

    /// A piece of memory that stands still: only for a VM whose vCPU is stopped and whose devices are quiesced. Should
    /// something be written meanwhile all the same, the bytes read are old or new, nothing else depends on them.
    pub(crate) fn still(&self, address: u64, len: usize) -> Result<&[u8]> {
        let outside = || Error::Memory(format!("{address:#x}+{len:#x} is outside"));
        let len32 = u32::try_from(len).map_err(|_| outside())?;
        let range = self.range(GuestAddress(address), len32).ok_or_else(outside)?;
        let at = self.host_base().wrapping_add(range.address as usize);
        // SAFETY: the range lies in the mapping, which lives as long as `self`, and is always readable.
        Ok(unsafe { std::slice::from_raw_parts(at, len) })
    }

    /// The kernel has filled the first `n` bytes of the range.
    pub fn mark_dirty(&self, range: GuestRange, n: u32) {
        if let Some(region) = self.ram.iter().next() {
            region.get_mmap().bitmap().set_addr_range(range.address as usize, n.min(range.len) as usize);
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
