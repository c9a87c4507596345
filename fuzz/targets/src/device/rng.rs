//! virtio-rng.

use vmm::config::RngConfig;
use vmm::limit::{Limits, Rate};
use vmm::virtio::Device;
use vmm::virtio::rng::Rng;

use super::{Subject, drive, programs};
use crate::Target;
use crate::input::Input;

/// The device.
pub const TARGET: Target = Target { name: "rng", run, seeds: programs, memory: 2 << 20, rounds: 400 };

struct Source(Limits);

/// Limits as a configuration can have them.
pub(super) fn limits(input: &mut Input<'_>) -> Limits {
    let mut rate = || (input.below(2) == 0).then(|| Rate { rate: input.value(), burst: Some(input.value()) });
    let limits = Limits { ops: rate(), bytes: rate() };
    if limits.mistakes("limits").is_empty() { limits } else { Limits::default() }
}

impl Subject for Source {
    fn make(&mut self) -> Box<dyn Device> {
        match Rng::new("rng0", &RngConfig { limits: self.0 }) {
            Ok(rng) => Box::new(rng),
            Err(e) => panic!("{e}"),
        }
    }

    fn header(&mut self, _input: &mut Input<'_>) -> Vec<u8> {
        Vec::new()
    }
}

fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let limits = if input.below(4) == 0 { limits(&mut input) } else { Limits::default() };
    drive(input.rest(), &mut Source(limits));
}
