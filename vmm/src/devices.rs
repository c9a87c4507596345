//! All devices of a VM behind one lock, and the decoding of guest accesses to them.
//!
//! Always true: whoever holds the lock may be the vCPU thread (an access of the guest, a park), the I/O thread (an
//! event) or a control thread (quiesce, save); nothing in here waits for another of these threads.

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self, AcpiState};
use crate::console::Console;
use crate::error::{Error, FieldError, Result};
use crate::event::Token;
use crate::memory::GuestRange;
use crate::metrics::Exposition;
pub use crate::serial::{SERIAL_GSI, SERIAL_PORT, SerialState};
use crate::serial::{SERIAL_PORTS, SerialPort};
use crate::stats::Stats;
use crate::virtio::Progress;
use crate::virtio::balloon::BalloonInfo;
use crate::virtio::blk::Blk;
use crate::virtio::mmio::{GSI_BASE, MMIO_BASE, MMIO_SIZE, Transport, TransportState};
use crate::virtio::net::{Frame, Net};

/// State of all devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DevicesState {
    /// Serial port.
    pub serial: SerialState,
    /// ACPI's registers.
    pub acpi: AcpiState,
    /// virtio devices, in their order.
    pub virtio: Vec<TransportState>,
}

/// The devices of one VM.
pub struct Devices {
    serial: SerialPort,
    acpi: acpi::Registers,
    virtio: Vec<Transport>,
}

impl Devices {
    /// A serial port, ACPI's registers, and virtio devices at their places.
    pub fn new(
        console: Console,
        serial_irq: Option<EventFd>,
        acpi: acpi::Registers,
        virtio: Vec<Transport>,
    ) -> Devices {
        Devices { serial: SerialPort::new(console, serial_irq), acpi, virtio }
    }

    /// How the command line tells a guest of device `index`, in Linux's form.
    pub fn announcement(index: u16) -> String {
        let base = MMIO_BASE + u64::from(index) * MMIO_SIZE;
        format!("virtio_mmio.device=4K@{base:#x}:{}", GSI_BASE + u32::from(index))
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &[Transport] {
        &self.virtio
    }

    fn at(&mut self, address: u64) -> Option<(&mut Transport, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let device = self.virtio.get_mut(usize::try_from(offset / MMIO_SIZE).ok()?)?;
        Some((device, offset % MMIO_SIZE))
    }

    /// A read of the guest from memory where there is no memory. Unclaimed addresses read as ones.
    pub fn mmio_read(&mut self, address: u64, data: &mut [u8], stats: &Stats) {
        match self.at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => {
                data.fill(0xff);
                stats.vcpu.unclaimed.inc();
            }
        }
    }

    /// A write of the guest to memory where there is no memory.
    pub fn mmio_write(&mut self, address: u64, data: &[u8], stats: &Stats) {
        match self.at(address) {
            Some((device, offset)) => device.write(offset, data),
            None => stats.vcpu.unclaimed.inc(),
        }
    }

    /// A read from a port.
    pub fn pio_read(&mut self, port: u16, data: &mut [u8], stats: &Stats) {
        if self.acpi.read(port, data) {
            return;
        }
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
            (offset @ 0..SERIAL_PORTS, [byte]) => self.serial.write(offset as u8, *byte),
            _ if self.acpi.write(port) => {}
            _ => stats.vcpu.unclaimed.inc(),
        }
    }

    /// Pieces of guest memory the guest has given to devices to write to, who have not yet.
    pub fn posted(&mut self) -> Vec<GuestRange> {
        let mut posted = Vec::new();
        self.virtio.iter_mut().for_each(|device| device.posted(&mut posted));
        posted
    }

    /// ACPI's registers.
    pub fn acpi(&mut self) -> &mut acpi::Registers {
        &mut self.acpi
    }

    /// Looks at all queues of all devices.
    pub fn process_all(&mut self) -> Progress {
        self.all(Transport::process)
    }

    /// [`Devices::process_all`] for who goes on with [`Devices::poll`].
    pub fn process_all_polled(&mut self) -> Progress {
        self.all(|t| t.polled(false))
    }

    /// [`Devices::process_all`] for a guest that has parked: it is woken for whatever a device has next.
    pub fn park(&mut self) -> Progress {
        self.all(Transport::park)
    }

    fn all(&mut self, f: impl Fn(&mut Transport) -> Progress) -> Progress {
        let mut progress = Progress::Done;
        for device in &mut self.virtio {
            if f(device) == Progress::More {
                progress = Progress::More;
            }
        }
        progress
    }

    /// Looks at what can be seen without an event, for who goes on looking: drivers need not ring until
    /// [`Devices::end_poll`]. True if there was anything.
    pub fn poll(&mut self) -> bool {
        self.virtio.iter_mut().fold(false, |any, device| device.poll() | any)
    }

    /// Whether the host works on something for a device, so that an event is near.
    pub fn await_host(&self) -> bool {
        self.virtio.iter().any(Transport::awaits_host)
    }

    /// Asks all drivers to ring again, and looks at what they did before they could know. [`Progress::More`] asks to be called
    /// again.
    pub fn end_poll(&mut self) -> Progress {
        let mut progress = Progress::Done;
        for device in &mut self.virtio {
            if device.end_poll() == Progress::More {
                progress = Progress::More;
            }
        }
        progress
    }

    /// Serves an event. [`Progress::More`] asks to be called with it again, best after the lock was free for a moment.
    pub fn handle(&mut self, token: Token) -> Progress {
        self.serve(token, false)
    }

    /// [`Devices::handle`] for who goes on with [`Devices::poll`].
    pub fn handle_polled(&mut self, token: Token) -> Progress {
        self.serve(token, true)
    }

    fn serve(&mut self, token: Token, polled: bool) -> Progress {
        let (index, own) = match token {
            Token::Doorbell { device, .. } => (device, false),
            Token::Device { device } => (device, true),
            Token::Console => {
                self.serial.take_input();
                return Progress::Done;
            }
            Token::Wake => return Progress::Done,
        };
        match self.virtio.get_mut(usize::from(index)) {
            Some(device) if polled => device.polled(own),
            Some(device) if own => device.event(),
            Some(device) => device.process(),
            None => Progress::Done,
        }
    }

    /// Stops feeding receive queues: frames stay in the taps. The guest may still run and send.
    pub fn stop_input(&mut self) {
        self.serial.stop_input();
        self.virtio.iter_mut().for_each(Transport::stop_input);
    }

    /// From now on (or no longer) all queues are served by this process, so that each write to guest memory marks its page: to
    /// be called before pages are recorded, and after.
    pub fn keep_rings(&mut self, keep: bool) {
        self.virtio.iter_mut().for_each(|t| t.keep_rings(keep));
    }

    /// With the vCPU stopped: all that was begun is completed, then nothing more is done.
    pub fn quiesce(&mut self) {
        self.serial.stop_input();
        self.virtio.iter_mut().for_each(Transport::quiesce);
    }

    /// Ends [`Devices::stop_input`] and [`Devices::quiesce`].
    pub fn resume(&mut self) {
        self.serial.resume();
        self.virtio.iter_mut().for_each(Transport::resume);
    }

    /// All devices as at power-on, with nothing of what the guest had begun: what is under way is waited for, so that guest
    /// memory is not touched afterwards. What belongs to the operator (limits, sizes, targets) stays.
    pub fn reset(&mut self) -> Result<()> {
        self.virtio.iter_mut().for_each(Transport::power_on);
        self.acpi.reset();
        self.serial.reset()
    }

    /// State of all devices; only while quiesced.
    pub fn save(&self) -> DevicesState {
        DevicesState {
            serial: self.serial.save(),
            acpi: self.acpi.save(),
            virtio: self.virtio.iter().map(Transport::save).collect(),
        }
    }

    /// Takes over the state of the same devices; they stay quiesced until [`Devices::resume`].
    pub fn restore(
        &mut self,
        state: &DevicesState,
        serial_irq: Option<EventFd>,
        event_irq: Option<EventFd>,
    ) -> Result<()> {
        if state.virtio.len() != self.virtio.len() {
            return Err(Error::State(format!("{} devices instead of {}", state.virtio.len(), self.virtio.len())));
        }
        for (device, state) in self.virtio.iter_mut().zip(&state.virtio) {
            device.restore(state)?;
        }
        self.acpi.restore(state.acpi, event_irq);
        self.serial.restore(&state.serial, serial_irq)
    }

    /// The disk with this id. Whoever changes what it may do calls [`Devices::process_all`] afterwards.
    pub fn disk(&mut self, id: &str) -> Result<&mut Blk> {
        self.virtio
            .iter_mut()
            .filter_map(|t| t.device_mut().as_blk())
            .find(|d| crate::virtio::Device::id(*d) == id)
            .ok_or_else(|| Error::Conflict(format!("there is no disk {id}")))
    }

    /// The disks with an image, in their order.
    pub fn disks(&mut self) -> impl Iterator<Item = &mut Blk> {
        self.virtio.iter_mut().filter_map(|t| t.device_mut().as_blk())
    }

    /// The network devices, in their order.
    pub fn nets(&mut self) -> impl Iterator<Item = &mut Net> {
        self.virtio.iter_mut().filter_map(|t| t.device_mut().as_net())
    }

    /// The network device with this id.
    pub fn net(&mut self, id: &str) -> Result<&mut Net> {
        self.nets()
            .find(|n| crate::virtio::Device::id(*n) == id)
            .ok_or_else(|| Error::Conflict(format!("there is no network device {id}")))
    }

    /// Where a terminal program finds the console, if it is a pseudo terminal.
    pub fn console_pty(&self) -> Option<std::path::PathBuf> {
        self.serial.pty()
    }

    fn balloon(&mut self) -> Result<&mut Transport> {
        self.virtio
            .iter_mut()
            .find_map(|t| t.device_mut().as_balloon().is_some().then_some(t))
            .ok_or_else(|| Error::Conflict("the VM has no balloon".into()))
    }

    /// Sets how many bytes the guest is to give back by its balloon. It does so as it can; [`Devices::balloon_info`] tells
    /// how far it is.
    pub fn set_balloon(&mut self, bytes: u64) -> Result<()> {
        let transport = self.balloon()?;
        let memory = transport.memory_size();
        if bytes >= memory {
            let message = format!("{bytes} bytes: must be less than the memory, {memory} bytes");
            return Err(Error::Config(vec![FieldError::new("target", message)]));
        }
        if let Some(balloon) = transport.device_mut().as_balloon() {
            balloon.set_target(bytes);
        }
        while transport.process() == Progress::More {}
        Ok(())
    }

    /// What is known of the balloon. The guest is asked for new statistics, which a later call finds.
    pub fn balloon_info(&mut self) -> Result<BalloonInfo> {
        let transport = self.balloon()?;
        let balloon = transport.device_mut().as_balloon();
        let info = balloon.map(|b| {
            b.ask_for_statistics();
            b.info()
        });
        while transport.process() == Progress::More {}
        info.ok_or_else(|| Error::Conflict("the VM has no balloon".into()))
    }

    /// Delivers frames to a network device before anything from its tap.
    pub fn inject_frames(&mut self, id: &str, frames: Vec<Frame>) -> Result<()> {
        self.net(id)?.inject_frames(frames)?;
        while self.process_all() == Progress::More {}
        Ok(())
    }

    /// Counters of all devices.
    pub fn metrics(&self, out: &mut Exposition) {
        for device in &self.virtio {
            device.metrics(out);
        }
    }
}
