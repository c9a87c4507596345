//! All devices of a VM behind one lock, and the decoding of guest accesses to them.
//!
//! Always true: whoever holds the lock may be the vCPU thread (an access of the guest, a park), the I/O thread (an
//! event) or a control thread (quiesce, save); nothing in here waits for another of these threads.

use vm_superio::Serial;
use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;
use crate::stats::Stats;

/// First port of the 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_PORTS: u16 = 8;
/// GSI of the 16550.
pub const SERIAL_GSI: u32 = 4;

/// The serial port's interrupt: an irqfd where there is an interrupt controller.
#[derive(Debug)]
pub struct SerialTrigger(Option<EventFd>);

impl Trigger for SerialTrigger {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |fd| fd.write(1))
    }
}

/// The devices of one VM.
pub struct Devices {
    serial: Serial<SerialTrigger, NoEvents, Console>,
}

impl Devices {
    /// A serial port and nothing else yet.
    pub fn new(console: Console, serial_irq: Option<EventFd>) -> Devices {
        Devices { serial: Serial::new(SerialTrigger(serial_irq), console) }
    }

    /// A read of the guest from memory where there is no memory. Unclaimed addresses read as ones.
    pub fn mmio_read(&mut self, _address: u64, data: &mut [u8], stats: &Stats) {
        data.fill(0xff);
        stats.vcpu.unclaimed.inc();
    }

    /// A write of the guest to memory where there is no memory.
    pub fn mmio_write(&mut self, _address: u64, _data: &[u8], stats: &Stats) {
        stats.vcpu.unclaimed.inc();
    }

    /// A read from a port.
    pub fn pio_read(&mut self, port: u16, data: &mut [u8], stats: &Stats) {
        match (port.wrapping_sub(SERIAL_PORT), &mut *data) {
            (offset @ 0..SERIAL_PORTS, [byte]) => *byte = self.serial.read(offset as u8),
            _ => {
                data.fill(0xff);
                stats.vcpu.unclaimed.inc();
            }
        }
    }

    /// A write to a port.
    pub fn pio_write(&mut self, port: u16, data: &[u8], stats: &Stats) {
        match (port.wrapping_sub(SERIAL_PORT), data) {
            (offset @ 0..SERIAL_PORTS, [byte]) => {
                if let Err(e) = self.serial.write(offset as u8, *byte) {
                    log::debug!("serial port: {e:?}");
                }
            }
            _ => stats.vcpu.unclaimed.inc(),
        }
    }

    /// Looks at all queues of all devices.
    pub fn process_all(&mut self) {}

    /// Serves an event.
    pub fn handle(&mut self, _token: crate::event::Token) {}
}
