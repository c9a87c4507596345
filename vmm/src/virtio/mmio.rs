//! The MMIO transport (virtio 1.2, section 4.2, version 2 of the registers).
//!
//! Owns the device, its queues, doorbells and interrupt, and the driver's way through the device's states. Always true: a
//! device is active only between DRIVER_OK with accepted features and valid queues, and the next reset; a driver that breaks a
//! rule finds DEVICE_NEEDS_RESET set and nothing served until it resets.

mod registers;
pub mod report;
mod saved;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::VirtQueue;
use super::{Device, F_VERSION_1, Progress, Work};
use crate::error::{Result, host, kvm};
use crate::event::Events;
use crate::gate::Gate;
use crate::memory::Memory;
use crate::metrics::Exposition;

pub use crate::layout::{GSI_BASE, MMIO_BASE, MMIO_SIZE};
use registers::{reg, status};
pub use saved::TransportState;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

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
mod posted;

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
}

#[cfg(test)]
mod tests;
