//! Which guest memory waits for the device to write to it.

use super::Transport;
use crate::memory::GuestRange;
use crate::virtio::Work;

impl Transport {
    /// Adds the pieces: see [`crate::virtio::Device::posted`].
    pub fn posted(&mut self, out: &mut Vec<GuestRange>) {
        if self.is_active() {
            self.device.posted(&mut work!(self), out);
        }
    }
}
