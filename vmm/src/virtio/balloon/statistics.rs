//! What a guest says of its memory (virtio 1.2, section 5.5.6.4). Hearsay: shown to people, never acted on.

use schemars::JsonSchema;
use serde::Serialize;

use crate::memory::{GuestRange, Memory};
use crate::metrics::{Exposition, Labels};
use crate::virtio::queue::read_front;

/// A statistic on the wire: tag (2 bytes) and value (8 bytes).
const ENTRY: usize = 10;
/// Most entries that are read.
const ENTRIES_MAX: usize = 64;

/// The statistics the standard names; those the guest does not give are absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Statistics {
    /// Bytes swapped in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    /// Major page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Minor page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes not used for anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free: Option<u64>,
    /// Bytes there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Bytes a new program could have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available: Option<u64>,
    /// Bytes used for caches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caches: Option<u64>,
    /// Huge pages allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_failures: Option<u64>,
    /// Programs killed for lack of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kills: Option<u64>,
}

impl Statistics {
    /// Reads a buffer; tags that are unknown are passed over.
    pub(super) fn read(memory: &Memory, buffer: &mut Vec<GuestRange>) -> Statistics {
        let mut statistics = Statistics::default();
        let mut entry = [0; ENTRY];
        for _ in 0..ENTRIES_MAX {
            if !read_front(memory, buffer, &mut entry) {
                break;
            }
            let [t0, t1, value @ ..] = entry;
            if let Some(slot) = statistics.slot(u16::from_le_bytes([t0, t1])) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
        statistics
    }

    fn slot(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            8 => &mut self.huge_allocations,
            9 => &mut self.huge_failures,
            10 => &mut self.oom_kills,
            _ => return None,
        })
    }

    /// As metrics.
    pub(super) fn metrics(&self, labels: Labels<'_>, out: &mut Exposition) {
        for (name, help, value) in [
            ("vmm_balloon_guest_swap_in_bytes", "Bytes swapped in, as the guest says.", self.swap_in),
            ("vmm_balloon_guest_swap_out_bytes", "Bytes swapped out, as the guest says.", self.swap_out),
            ("vmm_balloon_guest_major_faults", "Major page faults, as the guest says.", self.major_faults),
            ("vmm_balloon_guest_minor_faults", "Minor page faults, as the guest says.", self.minor_faults),
            ("vmm_balloon_guest_free_bytes", "Memory not used for anything, as the guest says.", self.free),
            ("vmm_balloon_guest_total_bytes", "Memory there is, as the guest says.", self.total),
            ("vmm_balloon_guest_available_bytes", "Memory a program could have, as the guest says.", self.available),
            ("vmm_balloon_guest_caches_bytes", "Memory used for caches, as the guest says.", self.caches),
            ("vmm_balloon_guest_oom_kills", "Programs killed for lack of memory, as the guest says.", self.oom_kills),
        ] {
            if let Some(value) = value {
                out.gauge(name, help, labels, value as f64);
            }
        }
    }
}
