//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).
//!
//! Every register access is one naturally aligned volatile read or write of 1, 2, 4 or 8 bytes: each is an exit, and
//! a KVM without VMX emulates the instruction. So registers are read once at set-up and only the doorbell is
//! written afterwards.
use super::VirtioError;
use super::queue::{Queue, QueueMemory};
use crate::cmdline::MmioDevice;
use alloc::rc::Rc;

/// Register offsets.
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

/// `"virt"`.
pub const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;

/// Device status bits.
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const FAILED: u32 = 128;
}

/// Feature bits of all devices.
pub mod feature {
    /// The driver may put a chain in a table of its own.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// virtio 1.0 and later.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Kinds of device the run time drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// No device behind this transport.
    None,
    /// virtio-net.
    Net,
    /// virtio-blk.
    Block,
    /// Something else.
    Other(u32),
}

/// Register access: the real one, or a device in a test.
pub trait Registers {
    /// Reads 32 bits.
    fn read(&self, offset: u64) -> u32;
    /// Reads 8 bits (configuration space only).
    fn read8(&self, offset: u64) -> u8;
    /// Writes 32 bits.
    fn write(&self, offset: u64, value: u32);
}

/// Registers in guest-physical memory.
pub struct MmioRegisters {
    base: u64,
}

impl MmioRegisters {
    /// The registers of a device announced on the command line, if they lie where the page tables map MMIO.
    pub fn new(device: MmioDevice) -> Result<Self, VirtioError> {
        let end = device.base.checked_add(device.size);
        let ok = device.base >= crate::ring0::MEMORY_END && device.base.is_multiple_of(4) && device.size >= 0x200;
        if !ok || end.is_none_or(|end| end > 1 << 32) {
            return Err(VirtioError::Window(device.base));
        }
        Ok(MmioRegisters { base: device.base })
    }
}

impl Registers for MmioRegisters {
    fn read(&self, offset: u64) -> u32 {
        // SAFETY: a device register (checked in `new`), aligned.
        unsafe { ((self.base + offset) as *const u32).read_volatile() }
    }
    fn read8(&self, offset: u64) -> u8 {
        // SAFETY: as above.
        unsafe { ((self.base + offset) as *const u8).read_volatile() }
    }
    fn write(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.base + offset) as *mut u32).write_volatile(value) }
    }
}

/// One device's transport.
#[derive(Clone)]
pub struct Transport(Rc<dyn Registers>);

impl Transport {
    /// Over given registers.
    pub fn new(registers: impl Registers + 'static) -> Transport {
        Transport(Rc::new(registers))
    }

    /// What is behind it.
    pub fn kind(&self) -> Result<DeviceKind, VirtioError> {
        let magic = self.0.read(register::MAGIC);
        if magic != MAGIC {
            return Err(VirtioError::Magic(magic));
        }
        let kind = match self.0.read(register::DEVICE_ID) {
            0 => return Ok(DeviceKind::None),
            1 => DeviceKind::Net,
            2 => DeviceKind::Block,
            id => return Ok(DeviceKind::Other(id)),
        };
        match self.0.read(register::VERSION) {
            VERSION => Ok(kind),
            version => Err(VirtioError::Version(version)),
        }
    }

    /// Resets the device and negotiates: the features of `wanted` that it offers, VERSION_1 always.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, VirtioError> {
        let r = &self.0;
        r.write(register::STATUS, 0);
        r.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let mut offered = 0;
        for half in [0, 1] {
            r.write(register::DEVICE_FEATURES_SEL, half);
            offered |= u64::from(r.read(register::DEVICE_FEATURES)) << (32 * half);
        }
        let features = offered & (wanted | feature::VERSION_1);
        if features & feature::VERSION_1 == 0 {
            return Err(self.fail(VirtioError::Legacy));
        }
        for half in [0, 1] {
            r.write(register::DRIVER_FEATURES_SEL, half);
            r.write(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        let so_far = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        r.write(register::STATUS, so_far);
        if r.read(register::STATUS) & status::FEATURES_OK == 0 {
            return Err(self.fail(VirtioError::Features(features)));
        }
        Ok(features)
    }

    /// Sets queue `index` up, of at most `size` entries.
    pub fn queue(&self, index: u16, size: u16) -> Result<Queue, VirtioError> {
        let r = &self.0;
        r.write(register::QUEUE_SEL, u32::from(index));
        let most = r.read(register::QUEUE_NUM_MAX);
        if most == 0 {
            return Err(self.fail(VirtioError::NoQueue(index)));
        }
        // A power of two, as split rings want.
        let size = u32::from(size).min(most).min(1 << 15);
        let size = 1u16 << (31 - size.leading_zeros());
        let memory = QueueMemory::new(size);
        r.write(register::QUEUE_NUM, u32::from(size));
        for (offset, address) in [
            (register::QUEUE_DESC, memory.descriptors()),
            (register::QUEUE_DRIVER, memory.available()),
            (register::QUEUE_DEVICE, memory.used()),
        ] {
            r.write(offset, address as u32);
            r.write(offset + 4, (address >> 32) as u32);
        }
        r.write(register::QUEUE_READY, 1);
        Ok(Queue::new(index, memory))
    }

    /// The device may start.
    pub fn ready(&self) {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.0.write(register::STATUS, all);
    }

    /// Gives the device up.
    pub fn fail(&self, error: VirtioError) -> VirtioError {
        self.0.write(register::STATUS, status::FAILED);
        error
    }

    /// Resets the device: it forgets its queues and touches memory no more.
    pub fn reset(&self) {
        self.0.write(register::STATUS, 0);
    }

    /// Rings the doorbell of a queue.
    pub fn notify(&self, queue: u16) {
        self.0.write(register::QUEUE_NOTIFY, u32::from(queue));
    }

    /// Reads 32 bits of configuration space.
    pub fn config32(&self, offset: u64) -> u32 {
        self.0.read(register::CONFIG + offset)
    }

    /// Reads 8 bits of configuration space.
    pub fn config8(&self, offset: u64) -> u8 {
        self.0.read8(register::CONFIG + offset)
    }
}
