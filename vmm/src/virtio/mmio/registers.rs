//! The registers, and what the driver may do with them when.
//!
//! Always true: features are negotiated once, queues set up between FEATURES_OK and DRIVER_OK, and the driver's status bits
//! only ever added, until it resets the device.

use virtio_queue::QueueT;

use super::{INTERRUPT_USED, Transport};
use crate::virtio::queue::VirtQueue;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5254_554f; // "OUTR"
const CONFIG: u64 = 0x100;

/// The registers.
pub(super) mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
}

/// Bits of the status register.
pub(super) mod status {
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

impl Transport {
    /// A read of the guest at `offset` of the device's registers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG {
            self.device.read_config(offset - CONFIG, data);
            return;
        }
        let value = match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device.kind(),
            reg::VENDOR => VENDOR,
            reg::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.features() as u32,
                1 => (self.features() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => self.queue().map_or(0, |q| u32::from(q.save().max_size)),
            reg::QUEUE_READY => self.queue().map_or(0, |q| u32::from(q.ready())),
            reg::INTERRUPT_STATUS => self.interrupt_status | if self.outside > 0 { INTERRUPT_USED } else { 0 },
            reg::STATUS => u32::from(self.status),
            // There is no shared memory: length and base read as all ones.
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.config_generation,
            _ => 0,
        };
        match data.len() {
            4 => data.copy_from_slice(&value.to_le_bytes()),
            _ => data.fill(0),
        }
    }

    /// A write of the guest at `offset` of the device's registers.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG {
            self.device.write_config(offset - CONFIG, data);
            return;
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES if self.may_negotiate() => match self.driver_features_sel {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_NUM..=reg::QUEUE_READY | reg::QUEUE_DESC_LOW..=reg::QUEUE_DEVICE_HIGH => {
                self.write_queue(offset, value);
            }
            // Only where the ioeventfd does not catch it (another width); harmless.
            reg::QUEUE_NOTIFY => {
                self.process();
            }
            reg::INTERRUPT_ACK => self.interrupt_status &= !value,
            reg::STATUS => self.write_status(value as u8),
            _ => {}
        }
    }

    fn may_negotiate(&self) -> bool {
        self.status & status::DRIVER != 0 && self.status & (status::FEATURES_OK | status::DRIVER_OK) == 0
    }

    fn queue(&self) -> Option<&VirtQueue> {
        self.queues.get(self.queue_sel as usize)
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status & status::FEATURES_OK == 0 || self.status & status::DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        if offset == reg::QUEUE_READY {
            queue.raw().set_ready(value == 1);
            if value == 1 && !queue.is_valid(&self.memory) {
                queue.raw().set_ready(false);
            }
            return;
        }
        if queue.ready() {
            return;
        }
        let raw = queue.raw();
        match offset {
            reg::QUEUE_NUM => raw.set_size(u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_DESC_LOW => raw.set_desc_table_address(Some(value), None),
            reg::QUEUE_DESC_HIGH => raw.set_desc_table_address(None, Some(value)),
            reg::QUEUE_DRIVER_LOW => raw.set_avail_ring_address(Some(value), None),
            reg::QUEUE_DRIVER_HIGH => raw.set_avail_ring_address(None, Some(value)),
            reg::QUEUE_DEVICE_LOW => raw.set_used_ring_address(Some(value), None),
            reg::QUEUE_DEVICE_HIGH => raw.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        // The driver only ever adds bits (virtio 1.2, 2.1.1); NEEDS_RESET is the device's.
        let mut new = self.status | value & !status::NEEDS_RESET;
        let added = new & !self.status;
        if added & status::FEATURES_OK != 0 {
            let unknown = self.driver_features & !self.features();
            if unknown != 0 || self.driver_features & F_VERSION_1 == 0 {
                log::warn!("{}: driver wants features {:#x}", self.device.id(), self.driver_features);
                new &= !status::FEATURES_OK;
            }
        }
        self.status = new;
        if added & status::DRIVER_OK != 0 {
            if new & status::FEATURES_OK == 0 || !self.queues.iter().all(|q| !q.ready() || q.is_valid(&self.memory)) {
                self.needs_reset("set DRIVER_OK out of order");
                return;
            }
            let event_idx = self.driver_features & F_EVENT_IDX != 0;
            for queue in &mut self.queues {
                queue.raw().set_event_idx(event_idx);
            }
            match self.device.activate(self.driver_features) {
                Ok(()) => {
                    self.process();
                }
                Err(e) => self.needs_reset(&e.to_string()),
            }
        }
    }
}
