//! Guest memory and queues as a back end is told of them, and how far it has come with them.
//!
//! Always true: what the guest or the back end writes there is only compared, and believed where it makes sense.

use std::sync::atomic::Ordering;

use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::virtio::queue::QueueState;

/// Queues that the back end works.
pub(super) struct Running {
    pub memory: Memory,
    pub rings: Vec<Ring>,
}

/// How far the back end has come with one of them.
pub(super) struct Ring {
    pub queue: usize,
    size: u16,
    /// Where the driver counts the buffers it has made available, and the back end those it has used.
    available: GuestAddress,
    used: GuestAddress,
}

impl Ring {
    pub fn of(queue: usize, state: &QueueState) -> Ring {
        // Both stand behind the ring's flags.
        let [available, used] = [state.avail_ring, state.used_ring].map(|ring| GuestAddress(ring + 2));
        Ring { queue, size: state.size, available, used }
    }

    fn index(memory: &Memory, at: GuestAddress) -> Option<u16> {
        memory.ram().load::<u16>(at, Ordering::Acquire).ok().map(u16::from_le)
    }

    /// Whether each buffer it had taken when it stopped, `base` of them, has been used.
    pub fn is_settled(&self, base: u16, memory: &Memory) -> bool {
        Ring::index(memory, self.used) == Some(base)
    }

    /// Whether buffers are to be used yet; what makes no sense as an index is not waited for.
    pub fn has_work(&self, memory: &Memory) -> bool {
        let indices = Ring::index(memory, self.available).zip(Ring::index(memory, self.used));
        indices.is_some_and(|(available, used)| (1..=self.size).contains(&available.wrapping_sub(used)))
    }
}

/// Guest memory as the back end maps it.
pub(super) fn regions(memory: &Memory) -> Result<Vec<VhostUserMemoryRegionInfo>> {
    let regions = memory.shared_regions();
    if regions.is_empty() {
        return Err(Error::Memory("is not shared: set memory_shared for a vhost-user device".into()));
    }
    let region = |r: &crate::memory::SharedRegion| VhostUserMemoryRegionInfo {
        guest_phys_addr: r.guest,
        memory_size: r.size,
        userspace_addr: r.here,
        mmap_offset: 0,
        mmap_handle: r.fd,
    };
    Ok(regions.iter().map(region).collect())
}

/// Where a queue lies, in this process's addresses.
pub(super) fn vring(memory: &Memory, queue: &QueueState) -> Result<VringConfigData> {
    let here = |at: u64| {
        let address = memory.ram().get_host_address(GuestAddress(at));
        address.map(|p| p as u64).map_err(|e| Error::Memory(format!("queue at {at:#x}: {e}")))
    };
    Ok(VringConfigData {
        queue_max_size: queue.max_size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: here(queue.desc_table)?,
        used_ring_addr: here(queue.used_ring)?,
        avail_ring_addr: here(queue.avail_ring)?,
        log_addr: None,
    })
}
