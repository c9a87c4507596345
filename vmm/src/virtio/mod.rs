//! virtio 1.2 devices on the MMIO transport.
//!
//! A device knows its queues and its back end; the transport knows registers, interrupts and the driver's state machine.
//! Everything in a queue is hostile: a chain that makes no sense is given back or makes the device ask for a reset, and
//! never costs more than its queue's size.

pub mod balloon;
pub mod blk;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
mod testing;
mod timer;
pub mod vhost_user;
pub mod vsock;

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Result;
use crate::memory::{GuestRange, Memory};
use crate::metrics::Exposition;
use queue::{QueueError, VirtQueue};

/// VIRTIO_F_RING_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_RING_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// State of a device's own, apart from its transport and queues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum DeviceState {
    /// virtio-net.
    Net(Box<net::NetState>),
    /// virtio-blk.
    Blk(blk::BlkState),
    /// A device without state of its own.
    Stateless,
    /// virtio-rng.
    Rng(crate::limit::LimiterState),
    /// virtio-balloon.
    Balloon(balloon::BalloonState),
    /// vhost-user-blk.
    VhostUserBlk(vhost_user::blk::VhostUserBlkState),
    /// virtio-vsock.
    Vsock(vsock::VsockState),
}

/// What a device works on when it processes its queues.
pub struct Work<'a> {
    /// Its queues.
    pub queues: &'a mut [VirtQueue],
    /// Guest memory.
    pub memory: &'a Memory,
    /// For each queue, what the driver rings.
    pub doorbells: &'a [EventFd],
    /// The device's interrupt, where the VM has an interrupt controller.
    pub irq: Option<&'a EventFd>,
}

/// Whether a device has looked at everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All that was there is served or waits for an event.
    Done,
    /// The budget was used up; call again.
    More,
}

/// One device behind a transport.
pub trait Device: Send {
    /// Name in configuration, metrics and messages.
    fn id(&self) -> &str;
    /// Device type (virtio 1.2, section 5).
    fn kind(&self) -> u32;
    /// Features offered, besides those of ring and transport.
    fn features(&self) -> u64;
    /// Features of the ring it can do.
    fn ring_features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }
    /// Size of each queue; their number does not change.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device's configuration space.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes to the configuration space; by default there is nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The doorbells of its queues. True: another process or the kernel waits for them, and nobody needs to in here.
    fn take_doorbells(&mut self, _doorbells: &[EventFd]) -> Result<bool> {
        Ok(false)
    }
    /// The driver is ready and has accepted `features`.
    fn activate(&mut self, features: u64) -> Result<()>;
    /// The driver resets the device: nothing of the driver's memory may be touched afterwards.
    fn reset(&mut self);
    /// Looks at everything: queues, own descriptors. Takes from and gives to the queues what it can.
    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError>;
    /// Whether it can be polled: whether [`Device::pending`] tells of all that its driver would ring for.
    fn is_pollable(&self) -> bool {
        false
    }
    /// Whether [`Device::process`] would find something that no event tells of while the driver need not ring: a cheap look.
    fn pending(&mut self, _work: &Work<'_>) -> bool {
        false
    }
    /// Whether the host works on something for it, so that an event is near.
    fn awaits_host(&self) -> bool {
        false
    }
    /// One of the device's descriptors is ready; [`Device::process`] follows.
    fn event(&mut self) {}
    /// The guest waits by parking, after [`Device::process`]: it has looked at its rings and is to be woken for the next buffer,
    /// whatever it has said there of interrupts. A device that works its queues here wakes it anyway.
    fn parked(&mut self, _work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        Ok(())
    }
    /// The descriptors that are to cause [`Device::event`].
    fn descriptors(&self) -> Vec<RawFd>;
    /// Adds the pieces of guest memory that it will write to, and has not yet, and that are the driver's again only then. A port
    /// need not send what is in them, so it counts at any time, also after [`Device::quiesce`].
    fn posted(&self, _work: &mut Work<'_>, _out: &mut Vec<GuestRange>) {}
    /// Stops taking in what comes from outside (received frames stay where they are).
    fn stop_input(&mut self);
    /// Completes all it has begun, with the vCPU stopped. Queues are then as the guest left them, but for what was given back.
    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError>;
    /// Ends [`Device::stop_input`] and [`Device::quiesce`].
    fn resume(&mut self);
    /// State of its own. Only after [`Device::quiesce`].
    fn save(&self) -> DeviceState;
    /// Takes over a state of the same kind.
    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()>;
    /// Takes over what of a state counts as long as no driver runs.
    fn restore_idle(&mut self, state: &DeviceState) -> Result<()> {
        let _ = state;
        Ok(())
    }
    /// Whether the configuration space has changed by itself since the last call: the driver is told then.
    fn take_config_change(&mut self) -> bool {
        false
    }
    /// How many of the queues, from the first on, somebody outside this process serves: the transport then neither listens
    /// to their doorbells nor to [`Device::outside_descriptors`], and says for every interrupt that buffers were used.
    fn rings_outside(&self) -> usize {
        0
    }
    /// Which descriptors are not listened to while rings are served outside.
    fn outside_descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// From now on (or no longer) all rings are to be served by this process, so that each write to guest memory marks its
    /// page. [`Device::process`] follows, and does it.
    fn keep_rings(&mut self, _keep: bool) {}
    /// Adds its counters, each with the label `device`.
    fn metrics(&self, out: &mut Exposition);
    /// The disk this is, if it is one.
    fn as_blk(&mut self) -> Option<&mut blk::Blk> {
        None
    }
    /// The network device this is, if it is one.
    fn as_net(&mut self) -> Option<&mut net::Net> {
        None
    }
    /// The balloon this is, if it is one.
    fn as_balloon(&mut self) -> Option<&mut balloon::Balloon> {
        None
    }
}

/// Reads from a configuration space of `bytes`; what lies beyond reads as zero.
fn read_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    for (i, to) in data.iter_mut().enumerate() {
        *to = usize::try_from(offset).ok().and_then(|o| bytes.get(o.checked_add(i)?)).copied().unwrap_or(0);
    }
}
