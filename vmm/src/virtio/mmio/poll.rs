//! Looking at a device's queues over and over instead of waiting for its driver to ring.
//!
//! Always true: a driver that was told not to ring is looked at by [`Transport::poll`] until it has been told otherwise, by
//! [`Transport::end_poll`] or by any other look at the device; what it did before it could know is found then.

use super::Transport;
use crate::virtio::Progress;
use crate::virtio::Work;
use crate::virtio::queue::VirtQueue;

impl Transport {
    /// Looks at what can be seen without an event; the driver need not ring until [`Transport::end_poll`], or until
    /// [`Transport::process`] is called. True if that came to anything.
    pub fn poll(&mut self) -> bool {
        if !self.is_active() || self.quiesced || !self.device.is_pollable() || !self.device.pending(&work!(self)) {
            return false;
        }
        let before = self.moves();
        let _ = self.look(true);
        self.moves() != before
    }

    /// Whether an event of a device that can be polled is near.
    pub fn awaits_host(&self) -> bool {
        self.device.is_pollable() && self.device.awaits_host()
    }

    /// [`Transport::event`], or [`Transport::process`] for a doorbell, for who goes on polling: a driver that rings because it could
    /// not know yet is not asked to go on doing so.
    pub fn polled(&mut self, own: bool) -> Progress {
        if own {
            self.device.event();
        }
        match self.is_active() && !self.quiesced && self.device.is_pollable() {
            true => self.look(true),
            false => self.process(),
        }
    }

    /// See [`crate::devices::Devices::end_poll`].
    pub fn end_poll(&mut self) -> Progress {
        if !self.queues.iter().any(VirtQueue::is_muted) {
            return Progress::Done;
        }
        self.queues.iter_mut().for_each(|q| q.unmute(&self.memory));
        self.process()
    }

    /// Grows with everything taken from or put in a queue.
    fn moves(&self) -> u64 {
        self.queues.iter().fold(0, |sum, q| sum.wrapping_add(q.moves()))
    }
}
