//! The saved state of a device, as a peer or a checkpoint gives it, and then a driver on the device that took it over.
//!
//! An input is a byte for the device, a length, that much encoded state, and a program as for the device itself.

use vmm::config::{BalloonConfig, RngConfig};
use vmm::virtio::Device;
use vmm::virtio::balloon::Balloon;
use vmm::virtio::mmio::TransportState;
use vmm::virtio::rng::Rng;

use super::{Machine, STEPS_MAX, Subject};
use crate::Target;
use crate::input::Input;

/// See the module. Those devices that need nothing of the host.
pub const TARGET: Target = Target { name: "device_state", run, seeds, memory: 4 << 20, rounds: 800 };

struct Plain(u8);

impl Subject for Plain {
    fn make(&mut self) -> Box<dyn Device> {
        let device = match self.0 % 2 {
            0 => Rng::new("rng0", &RngConfig::default()).map(|d| Box::new(d) as Box<dyn Device>),
            _ => Balloon::new("balloon0", &BalloonConfig::default()).map(|d| Box::new(d) as Box<dyn Device>),
        };
        device.unwrap_or_else(|e| panic!("{e}"))
    }

    fn header(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        input.bytes(16).to_vec()
    }
}

fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let mut subject = Plain(input.u8());
    let length = usize::from(input.u16());
    let Ok(state) = postcard::from_bytes::<TransportState>(input.bytes(length)) else { return };
    let mut machine = Machine::new(subject.make());
    let taken = machine.transport.restore(&state).is_ok();
    machine.transport.resume();
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        machine = machine.step(&mut input, &mut subject);
    }
    machine.process();
    machine.events();
    if taken {
        machine.replace(&mut subject);
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in 0..2 {
        for features in [0, u64::MAX] {
            let mut machine = Machine::new(Plain(kind).make());
            machine.start(features);
            machine.chain(0, &[(super::DATA, 64, super::WRITE)], false);
            machine.transport.quiesce();
            let state = postcard::to_allocvec(&machine.transport.save()).unwrap_or_default();
            seeds.push([&[kind][..], &(state.len() as u16).to_le_bytes(), &state, &[16, 0, 0, 1, 2, 3, 4]].concat());
        }
    }
    seeds
}
