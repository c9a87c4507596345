//! The MMIO transport (virtio 1.2, section 4.2, version 2 of the registers).
//!
//! Owns the registers and the driver's way through the device's states. Always true: a device is active only between
//! DRIVER_OK with accepted features and valid queues, and the next reset; a driver that breaks a rule finds
//! DEVICE_NEEDS_RESET set and nothing served until it resets.

pub mod report;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{QueueState, VirtQueue};
use super::{Device, DeviceState, F_EVENT_IDX, F_VERSION_1, Progress, Work};
use crate::error::{Error, Result, host, kvm};
use crate::event::Events;
use crate::gate::Gate;
use crate::memory::Memory;
use crate::metrics::Exposition;

pub use crate::layout::{GSI_BASE, MMIO_BASE, MMIO_SIZE};

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5254_554f; // "OUTR"
const CONFIG: u64 = 0x100;

/// The registers.
mod reg {
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
mod status {
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

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

/// What a device works on: borrowed field by field, beside the device.
macro_rules! work {
    ($transport:expr) => {
        Work {
            queues: &mut $transport.queues,
            memory: &$transport.memory,
            doorbells: &$transport.doorbells,
            irq: $transport.irq.as_ref(),
        }
    };
}

// After the macro, which it uses.
mod poll;

/// A device and its transport.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    gate: Arc<Gate>,
    irq: Option<EventFd>,
    index: u16,
    events: Arc<Events>,
    doorbells: Vec<EventFd>,
    queues: Vec<VirtQueue>,
    status: u8,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    interrupt_status: u32,
    /// Changes whenever the configuration space has changed by itself.
    config_generation: u32,
    /// Queues, from the first on, that somebody outside serves.
    outside: usize,
    /// Nothing is served until this ends: the VM is being saved.
    quiesced: bool,
}

impl Transport {
    /// Puts `device` at place `index` of the MMIO window, with doorbells and, where there is an interrupt controller, an
    /// interrupt. Without a VM whoever writes to the registers rings the doorbells by that.
    pub fn new(
        mut device: Box<dyn Device>,
        index: u16,
        vm: Option<&VmFd>,
        irqchip: bool,
        memory: Memory,
        gate: Arc<Gate>,
        events: &Arc<Events>,
    ) -> Result<Transport> {
        let base = MMIO_BASE + u64::from(index) * MMIO_SIZE;
        let mut queues = Vec::new();
        let mut doorbells = Vec::new();
        for (n, size) in device.queue_sizes().iter().enumerate() {
            queues.push(VirtQueue::new(*size)?);
            let fd = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
            if let Some(vm) = vm {
                vm.register_ioevent(&fd, &IoEventAddress::Mmio(base + reg::QUEUE_NOTIFY), n as u32)
                    .map_err(kvm("register doorbell"))?;
            }
            doorbells.push(fd);
        }
        if !device.take_doorbells(&doorbells)? {
            for (n, fd) in doorbells.iter().enumerate() {
                events.add_doorbell(fd.as_raw_fd(), index, n as u16)?;
            }
        }
        for fd in device.descriptors() {
            events.add_device(fd, index)?;
        }
        let irq = match vm.filter(|_| irqchip) {
            Some(vm) => {
                let fd = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
                vm.register_irqfd(&fd, GSI_BASE + u32::from(index)).map_err(kvm("register irqfd"))?;
                Some(fd)
            }
            None => None,
        };
        Ok(Transport {
            device,
            memory,
            gate,
            irq,
            index,
            events: events.clone(),
            doorbells,
            outside: 0,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            interrupt_status: 0,
            config_generation: 0,
            quiesced: false,
        })
    }

    /// The device.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// The device, to be changed.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        self.device.as_mut()
    }

    /// Adds the device's counters, and those every device has.
    pub fn metrics(&self, out: &mut Exposition) {
        self.device.metrics(out);
        let device = self.device.id();
        for (n, queue) in self.queues.iter().enumerate() {
            let n = n.to_string();
            out.gauge(
                "vmm_queue_depth",
                "Chains the driver has made available and the device has not taken yet.",
                &[("device", device), ("queue", &n)],
                f64::from(queue.depth(&self.memory)),
            );
        }
    }

    /// Bytes of guest memory.
    pub fn memory_size(&self) -> u64 {
        self.memory.size() as u64
    }

    fn features(&self) -> u64 {
        self.device.features() | self.device.ring_features() | F_VERSION_1
    }

    /// Whether queues are served.
    pub fn is_active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

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

    fn reset(&mut self) {
        self.device.reset();
        self.follow_rings();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.interrupt_status = 0;
    }

    /// As at power-on: beside what the driver's own reset does.
    pub fn power_on(&mut self) {
        self.reset();
        self.config_generation = 0;
    }

    fn needs_reset(&mut self, why: &str) {
        log::warn!("{}: the device needs a reset: {why}", self.device.id());
        self.status |= status::NEEDS_RESET;
        self.interrupt(INTERRUPT_CONFIG, true);
    }

    fn interrupt(&mut self, kind: u32, wanted: bool) {
        self.interrupt_status |= kind;
        if wanted && let Some(irq) = &self.irq {
            let _ = irq.write(1);
        }
        self.gate.signal();
    }

    /// One of the device's descriptors is ready.
    pub fn event(&mut self) -> Progress {
        self.device.event();
        self.process()
    }

    /// Lets the device look at everything, and tells the guest what came of it.
    pub fn process(&mut self) -> Progress {
        if !self.is_active() || self.quiesced {
            return Progress::Done;
        }
        self.look(false)
    }

    fn look(&mut self, polled: bool) -> Progress {
        for queue in &mut self.queues {
            queue.set_polled(polled);
        }
        let result = self.device.process(&mut work!(self));
        self.tell_used();
        self.tell_config();
        self.follow_rings();
        result.unwrap_or_else(|e| {
            self.needs_reset(&e.0);
            Progress::Done
        })
    }

    /// [`Transport::process`] for a guest that has parked.
    pub fn park(&mut self) -> Progress {
        let progress = self.process();
        if self.is_active() && !self.quiesced {
            let result = self.device.parked(&mut work!(self));
            self.tell_used();
            if let Err(e) = result {
                self.needs_reset(&e.0);
            }
        }
        progress
    }

    fn tell_used(&mut self) {
        let used = self.queues.iter_mut().filter_map(|q| q.take_used(&self.memory)).reduce(|a, b| a | b);
        if let Some(wanted) = used {
            self.interrupt(INTERRUPT_USED, wanted);
        }
    }

    /// Whether all rings are to be served by this process: see [`Device::keep_rings`].
    pub fn keep_rings(&mut self, keep: bool) {
        self.device.keep_rings(keep);
        while self.process() == Progress::More {}
    }

    /// Listens to what concerns the rings that are served here, and to no others.
    fn follow_rings(&mut self) {
        let outside = self.device.rings_outside();
        let before = std::mem::replace(&mut self.outside, outside);
        if outside == before {
            return;
        }
        let mut result = Ok(());
        for (n, doorbell) in self.doorbells.iter().enumerate() {
            let fd = doorbell.as_raw_fd();
            let done = match (n < before, n < outside) {
                (false, true) => self.events.remove_doorbell(fd),
                (true, false) => self.events.add_doorbell(fd, self.index, n as u16),
                _ => Ok(()),
            };
            result = result.and(done);
        }
        for fd in self.device.outside_descriptors() {
            let done = match (before, outside) {
                (0, _) => self.events.remove_device(fd),
                (_, 0) => self.events.add_device(fd, self.index),
                _ => Ok(()),
            };
            result = result.and(done);
        }
        if let Err(e) = result {
            log::error!("{}: {e}", self.device.id());
        }
        if outside == 0 {
            // For what was used last the driver may have been interrupted, or not.
            self.interrupt(INTERRUPT_USED, true);
        }
    }

    /// Tells the driver that the configuration space has changed, if it has.
    fn tell_config(&mut self) {
        if self.device.take_config_change() {
            self.config_generation = self.config_generation.wrapping_add(1);
            self.interrupt(INTERRUPT_CONFIG, true);
        }
    }

    /// Stops taking in what comes from outside; the guest may still run and send.
    pub fn stop_input(&mut self) {
        self.device.stop_input();
    }

    /// With the vCPU stopped: serves what the guest has handed over, completes all that was begun, then does nothing more.
    pub fn quiesce(&mut self) {
        if self.quiesced {
            return;
        }
        self.device.stop_input();
        while self.process() == Progress::More {}
        if self.is_active() {
            let result = self.device.quiesce(&mut work!(self));
            self.tell_used();
            self.follow_rings();
            if let Err(e) = result {
                self.needs_reset(&e.0);
            }
            // Whoever goes on with the guest is to be rung for.
            self.queues.iter_mut().for_each(|q| q.unmute(&self.memory));
        }
        self.quiesced = true;
    }

    /// Ends [`Transport::quiesce`] and [`Transport::stop_input`].
    pub fn resume(&mut self) {
        self.quiesced = false;
        self.device.resume();
        while self.process() == Progress::More {}
    }

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

#[cfg(test)]
mod tests;
