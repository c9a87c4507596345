//! vhost-net: the kernel moves frames between the tap and guest memory, and nobody wakes up here for them.
//!
//! Owns one /dev/vhost-net for each queue pair. Always true: a ring is served by the kernel or by this process, never by
//! both; where it stands is handed over in both directions. What the kernel writes into guest memory marks no page: so
//! whoever records what changes takes the rings back first ([`super::Net::keep_rings`]). A tap that is deleted meanwhile is
//! noticed when the rings come back.

use std::sync::Arc;

use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as Handle;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::feature::MRG_RXBUF;
use super::{Net, Pair};
use crate::config::{NetConfig, Vhost as VhostMode};
use crate::error::{Error, Result};
use crate::memory::{GuestRam, Memory};
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::{Device, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Work};

/// What the kernel has to know of the features accepted: all about rings, and the length of the header.
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | MRG_RXBUF;

/// See the module.
pub(super) struct Vhost {
    handles: Vec<Handle<Arc<GuestRam>>>,
    known: u64,
    /// Queue pairs the kernel serves.
    running: usize,
}

fn failed(what: &str) -> impl FnOnce(vhost::Error) -> Error + '_ {
    move |e| {
        let source = match e {
            vhost::Error::VhostOpen(e) | vhost::Error::IoctlError(e) => e,
            other => std::io::Error::other(other.to_string()),
        };
        Error::Host { what: format!("vhost-net: {what}"), source }
    }
}

impl Vhost {
    /// Everything that needs a right or memory of the kernel.
    pub fn open(memory: &Memory, pairs: usize) -> Result<Vhost> {
        let mut known = FEATURES;
        let mut handles = Vec::new();
        for _ in 0..pairs {
            let handle = Handle::new(memory.ram().clone()).map_err(failed("/dev/vhost-net"))?;
            handle.set_owner().map_err(failed("set owner"))?;
            known &= handle.get_features().map_err(failed("get features"))?;
            handles.push(handle);
        }
        Ok(Vhost { handles, known, running: 0 })
    }

    /// Queue pairs the kernel serves.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Whether the kernel can serve a driver with these features.
    pub fn suits(&self, features: u64) -> bool {
        features & FEATURES & !self.known == 0
    }

    /// Lets the kernel serve the queues of these pairs from where they stand. On an error none is served by it.
    pub fn start(&mut self, pairs: &[Pair], work: &Work<'_>, features: u64) -> Result<()> {
        self.running = pairs.len();
        let result = self.try_start(pairs, work, features);
        if result.is_err() {
            self.stop();
        }
        result
    }

    fn try_start(&self, pairs: &[Pair], work: &Work<'_>, features: u64) -> Result<()> {
        let Some(irq) = work.irq else { return Err(Error::Conflict("no interrupt".into())) };
        let regions: Vec<_> = work
            .memory
            .ram()
            .iter()
            .map(|r| VhostUserMemoryRegionInfo {
                guest_phys_addr: r.start_addr().raw_value(),
                memory_size: r.len(),
                userspace_addr: r.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        for (n, (handle, pair)) in self.handles.iter().zip(pairs).enumerate() {
            handle.set_features(features & FEATURES).map_err(failed("set features"))?;
            handle.set_mem_table(&regions).map_err(failed("set memory"))?;
            let queues = work.queues.iter().zip(work.doorbells).skip(2 * n).take(2);
            for (ring, (queue, doorbell)) in queues.enumerate() {
                let state = queue.save();
                let config = VringConfigData {
                    queue_max_size: state.max_size,
                    queue_size: state.size,
                    flags: 0,
                    desc_table_addr: state.desc_table,
                    used_ring_addr: state.used_ring,
                    avail_ring_addr: state.avail_ring,
                    log_addr: None,
                };
                handle.set_vring_num(ring, state.size).map_err(failed("set ring size"))?;
                handle.set_vring_base(ring, state.next_avail).map_err(failed("set ring base"))?;
                handle.set_vring_addr(ring, &config).map_err(failed("set ring"))?;
                handle.set_vring_call(ring, irq).map_err(failed("set interrupt"))?;
                handle.set_vring_kick(ring, doorbell).map_err(failed("set doorbell"))?;
            }
            for ring in 0..2 {
                handle.set_backend(ring, Some(pair.tap.file())).map_err(failed("set tap"))?;
            }
        }
        // What the driver has added meanwhile it may have rung for already.
        for doorbell in work.doorbells.iter().take(2 * pairs.len()) {
            let _ = doorbell.write(1);
        }
        Ok(())
    }

    /// Ends that: when this returns the kernel touches neither rings nor buffers any more.
    pub fn stop(&mut self) {
        for handle in self.handles.iter().take(std::mem::take(&mut self.running)) {
            for ring in 0..2 {
                if let Err(e) = handle.set_backend(ring, None) {
                    log::error!("vhost-net: take tap away: {e}");
                }
            }
        }
    }

    /// Ends it, and brings the queues to where the kernel has come.
    pub fn give_back(&mut self, queues: &mut [VirtQueue], memory: &Memory) -> Result<()> {
        let running = self.running;
        self.stop();
        for (handle, queues) in self.handles.iter().zip(queues.chunks_exact_mut(2)).take(running) {
            for (ring, queue) in queues.iter_mut().enumerate() {
                let base = handle.get_vring_base(ring).map_err(failed("get ring base"))?;
                // A ring of this kind has an index of 16 bits.
                queue.moved_elsewhere(memory, base as u16).map_err(|e| Error::State(e.to_string()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Net {
    /// Lets the kernel serve the queues where it can and the configuration has nothing against it.
    pub fn use_kernel(&mut self, config: &NetConfig, memory: &Memory, irqchip: bool) -> Result<()> {
        if config.vhost == VhostMode::Off || !irqchip && config.vhost == VhostMode::Auto {
            return Ok(());
        }
        if !irqchip {
            let why = "the image starts without an interrupt controller, which vhost-net needs: use auto or off";
            return Err(Error::Conflict(why.into()));
        }
        match Vhost::open(memory, self.pairs.len()) {
            Ok(vhost) => self.kernel = Some(vhost),
            Err(e) if config.vhost == VhostMode::On => {
                return Err(Error::Conflict(format!("{e} (load the module vhost_net, or use auto or off)")));
            }
            Err(e) => log::debug!("{}: {e}", self.id),
        }
        Ok(())
    }

    /// Whether nothing speaks against the kernel's serving the queues.
    pub(super) fn kernel_may_serve(&self) -> bool {
        let (rx, tx) = self.limits();
        let quiet = |p: &Pair| !p.receiver.stopped && !p.receiver.held && p.receiver.pending.is_empty();
        self.kernel.as_ref().is_some_and(|k| k.suits(self.accepted))
            && !(self.kept || self.gone)
            && rx.is_none()
            && tx.is_none()
            && self.pairs.iter().all(quiet)
    }

    pub(super) fn take_rings(
        &mut self,
        queues: &mut [VirtQueue],
        memory: &Memory,
    ) -> std::result::Result<(), QueueError> {
        let Some(kernel) = self.kernel.as_mut().filter(|k| k.running() > 0) else { return Ok(()) };
        let result = kernel.give_back(queues, memory).map_err(|e| QueueError(e.to_string()));
        self.event();
        result
    }

    pub(super) fn hand_rings_over(&mut self, work: &mut Work<'_>) {
        if work.irq.is_none() || !work.queues[..2 * self.active].iter().all(VirtQueue::ready) {
            return;
        }
        for (pair, queues) in self.pairs.iter_mut().zip(work.queues.chunks_exact_mut(2)) {
            if let [queue, _] = queues {
                pair.receiver.give_back(queue);
            }
        }
        let Some(kernel) = &mut self.kernel else { return };
        if let Err(e) = kernel.start(&self.pairs[..self.active], work, self.accepted) {
            log::warn!("{}: served without vhost-net: {e}", self.id);
            self.kernel = None;
        }
    }
}
