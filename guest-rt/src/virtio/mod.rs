//! virtio over MMIO: transport, split queues, the drivers for disks and networks. Polled, never an interrupt.
//!
//! All a device writes (registers, rings, buffers, headers) is checked before it is believed: a device that breaks
//! the rules is given up, and its users get errors.
pub mod blk;
#[cfg(test)]
pub(crate) mod fake;
pub mod mmio;
pub mod net;
pub mod queue;

use crate::cmdline::Cmdline;
use alloc::vec::Vec;
use mmio::{DeviceKind, MmioRegisters, Transport};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// A device on the command line that does not parse.
    #[error("virtio_mmio.device={0}: not SIZE@BASE:IRQ")]
    Syntax(alloc::string::String),
    /// Registers where no MMIO is mapped.
    #[error("virtio-mmio registers at {0:#x}: must lie between 3 and 4 GiB and be 512 bytes at least")]
    Window(u64),
    /// No virtio-mmio device there.
    #[error("no virtio-mmio device: magic {0:#x}")]
    Magic(u32),
    /// Not version 2.
    #[error("virtio-mmio version {0}, need 2 (QEMU: -global virtio-mmio.force-legacy=off)")]
    Version(u32),
    /// Without VERSION_1.
    #[error("the device does not offer VIRTIO_F_VERSION_1")]
    Legacy,
    /// The device refused the features.
    #[error("the device refused features {0:#x}")]
    Features(u64),
    /// A queue is missing.
    #[error("the device has no queue {0}")]
    NoQueue(u16),
    /// Configuration space makes no sense.
    #[error("the device's configuration makes no sense: {0}")]
    Config(&'static str),
}

/// The devices found on the command line, in its order.
#[derive(Default)]
pub struct Found {
    /// Network devices.
    pub nets: Vec<net::NetDevice>,
    /// Disks.
    pub disks: Vec<blk::BlockDevice>,
}

/// Looks at all devices of the command line and sets up those the run time has drivers for.
///
/// # Errors
/// If a device of a kind it drives cannot be set up: an image must not run with half of its devices.
pub fn probe(cmdline: &Cmdline) -> Result<Found, VirtioError> {
    let mut found = Found::default();
    for device in cmdline.mmio_devices() {
        let device = device.map_err(|word| VirtioError::Syntax(word.into()))?;
        let transport = Transport::new(MmioRegisters::new(device)?);
        match transport.kind()? {
            DeviceKind::None => {}
            DeviceKind::Net => found.nets.push(net::NetDevice::new(transport)?),
            DeviceKind::Block => found.disks.push(blk::BlockDevice::new(transport)?),
            DeviceKind::Other(id) => log::info!("device {id} at {:#x}: no driver", device.base),
        }
    }
    Ok(found)
}
