//! virtio-balloon.

use vmm::config::{BalloonConfig, MemorySize};
use vmm::virtio::Device;
use vmm::virtio::balloon::Balloon;

use super::{MEMORY, Subject, drive, programs};
use crate::Target;
use crate::input::Input;

/// The device.
pub const TARGET: Target = Target { name: "balloon", run, seeds: programs, memory: 2 << 20, rounds: 400 };

struct Pages;

impl Subject for Pages {
    fn make(&mut self) -> Box<dyn Device> {
        let config = BalloonConfig { target: MemorySize::from_bytes(1 << 20), reporting: true, ..Default::default() };
        match Balloon::new("balloon0", &config) {
            Ok(balloon) => Box::new(balloon),
            Err(e) => panic!("{e}"),
        }
    }

    /// Numbers of pages, some of them in memory.
    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let in_memory = (MEMORY / 4096) as u32;
        let mut number = |_| match input.below(4) {
            0 => input.value() as u32,
            _ => u32::from(input.u16()) % in_memory,
        };
        (0..16).map(&mut number).flat_map(u32::to_le_bytes).collect()
    }

    fn outside(&mut self, input: &mut Input<'_>, device: &mut dyn Device) {
        let Some(balloon) = device.as_balloon() else { return };
        match input.below(2) {
            0 => balloon.set_target(input.value()),
            _ => balloon.ask_for_statistics(),
        }
        balloon.info();
    }
}

fn run(input: &[u8]) {
    drive(input, &mut Pages);
}
