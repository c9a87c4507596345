//! virtio-blk on a file without a name.

use std::fs::File;
use std::os::fd::AsRawFd;

use vmm::config::DiskConfig;
use vmm::limit::Limits;
use vmm::virtio::Device;
use vmm::virtio::blk::Blk;

use super::rng::limits;
use super::{Subject, drive, programs};
use crate::Target;
use crate::input::Input;

/// The device. Requests the image cannot take as they are cost a copy.
pub const TARGET: Target = Target { name: "blk", run, seeds: programs, memory: 20 << 20, rounds: 300 };

/// Bytes of the image at first, and at most.
const SIZE: u64 = 1 << 20;
const SIZE_MAX: u64 = 8 << 20;

struct Disk {
    /// Gone with its descriptor.
    image: File,
    /// Bytes it has where nobody has cut it.
    size: u64,
    readonly: bool,
    queues: u16,
    limits: Limits,
}

impl Subject for Disk {
    fn make(&mut self) -> Box<dyn Device> {
        // On a host whose image was cut the guest is refused, and rightly so.
        self.image.set_len(self.size).unwrap_or_else(|e| panic!("{e}"));
        let path = format!("/proc/self/fd/{}", self.image.as_raw_fd()).into();
        let config = DiskConfig {
            id: "disk0".into(),
            path,
            readonly: self.readonly,
            queues: self.queues,
            limits: self.limits,
            direct: Some(false),
            ..Default::default()
        };
        match Blk::open(&config) {
            Ok(blk) => Box::new(blk),
            Err(e) => panic!("{e}"),
        }
    }

    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let kind = input.one_of(&[0u32, 0, 1, 1, 4, 8, 11, 13, 2, u32::MAX]);
        let sector = match input.below(4) {
            0 => input.value(),
            1 => (SIZE / 512).wrapping_sub(u64::from(input.u8())),
            _ => u64::from(input.u8()),
        };
        let mut bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        if kind == 11 || kind == 13 {
            let sectors = if input.below(4) == 0 { input.value() as u32 } else { u32::from(input.u8()) };
            bytes.extend(u64::from(input.u8()).to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(u32::from(input.u8() % 4).to_le_bytes());
        }
        bytes
    }

    fn outside(&mut self, input: &mut Input<'_>, device: &mut dyn Device) {
        let Some(blk) = device.as_blk() else { return };
        match input.below(3) {
            // The operator makes it larger.
            0 => {
                let to = (input.value() % SIZE_MAX).next_multiple_of(512).min(SIZE_MAX);
                if let Ok(size) = blk.resize(Some(to)) {
                    self.size = size;
                }
            }
            // Somebody cuts the image.
            1 => {
                let _ = self.image.set_len(u64::from(input.u16()) * 16);
            }
            _ => {
                let _ = blk.set_limits(limits(input));
            }
        }
    }
}

fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let how = input.u8();
    let image = tempfile::tempfile().unwrap_or_else(|e| panic!("{e}"));
    let limits = if how & 3 == 3 { limits(&mut input) } else { Limits::default() };
    let mut disk = Disk { image, size: SIZE, readonly: how & 12 == 12, queues: 1 + u16::from(how >> 4) % 3, limits };
    drive(input.rest(), &mut disk);
}
