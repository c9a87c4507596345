//! A transport's state, taken and put in place of another's.
//!
//! Always true: a state is looked at like what a driver does, since it may come from a peer; on an error the device is reset.

use serde::{Deserialize, Serialize};

use super::Transport;
use super::registers::status;
use crate::error::{Error, Result};
use crate::virtio::DeviceState;
use crate::virtio::queue::{QueueState, VirtQueue};

/// A device and its transport, saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransportState {
    /// Name of the device.
    pub id: String,
    /// Device type.
    pub kind: u32,
    /// Status register.
    pub status: u8,
    /// Feature words selected.
    pub features_sel: [u32; 2],
    /// Features the driver has accepted.
    pub driver_features: u64,
    /// Queue selected.
    pub queue_sel: u32,
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// Configuration generation register.
    pub config_generation: u32,
    /// Queues.
    pub queues: Vec<QueueState>,
    /// The device.
    pub device: DeviceState,
}

impl Transport {
    /// State of transport, queues and device; only while quiesced.
    pub fn save(&self) -> TransportState {
        TransportState {
            id: self.device.id().to_owned(),
            kind: self.device.kind(),
            status: self.status,
            features_sel: [self.device_features_sel, self.driver_features_sel],
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt_status,
            config_generation: self.config_generation,
            queues: self.queues.iter().map(VirtQueue::save).collect(),
            device: self.device.save(),
        }
    }

    /// Takes over a saved state and stays quiesced until [`Transport::resume`]. On an error the device is reset.
    pub fn restore(&mut self, state: &TransportState) -> Result<()> {
        self.quiesced = true;
        let result = self.try_restore(state);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn try_restore(&mut self, state: &TransportState) -> Result<()> {
        let id = self.device.id().to_owned();
        let bad = |what: String| Error::State(format!("{id}: {what}"));
        if state.kind != self.device.kind() {
            return Err(bad(format!("device type {} instead of {}", state.kind, self.device.kind())));
        }
        if state.queues.len() != self.queues.len() {
            return Err(bad(format!("{} queues instead of {}", state.queues.len(), self.queues.len())));
        }
        let unknown = state.driver_features & !self.features();
        if state.status & status::FEATURES_OK != 0 && unknown != 0 {
            return Err(bad(format!("features {unknown:#x} are not offered here")));
        }
        for (queue, (saved, size)) in self.queues.iter_mut().zip(state.queues.iter().zip(self.device.queue_sizes())) {
            *queue = VirtQueue::restore(saved, *size, &self.memory)?;
        }
        self.status = state.status;
        [self.device_features_sel, self.driver_features_sel] = state.features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.interrupt_status = state.interrupt_status;
        self.config_generation = state.config_generation;
        if self.status & status::DRIVER_OK != 0 {
            self.device.restore(&state.device, self.driver_features)?;
        } else {
            self.device.restore_idle(&state.device)?;
        }
        // An interrupt may have been on its way when the state was taken; one too many does no harm.
        if self.interrupt_status != 0
            && let Some(irq) = &self.irq
        {
            let _ = irq.write(1);
        }
        Ok(())
    }
}
