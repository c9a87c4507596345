//! What takes hostile input, each as one plain function of bytes.
//!
//! Owns the targets ([`TARGETS`]) and a small generator ([`run`]) that feeds them briefly in the tests; `fuzz/` runs the same
//! functions under cargo-fuzz for longer. What a target holds whoever it calls to: no panic, no more than [`Target::memory`]
//! bytes of memory for one input, no loop without an end, and what the target itself asserts. A target is a function of its
//! bytes: what it needs (image, socket directory, tap) is made anew or brought back to its beginning for each input, and nothing
//! is left behind.

pub mod api;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod input;
pub mod meter;
pub mod mutate;
pub mod run;
pub mod ticket;
pub mod wire;

/// Counts what a target allocates.
#[global_allocator]
static METER: meter::Meter = meter::Meter;

/// Something that takes hostile input.
pub struct Target {
    /// Its name, for cargo-fuzz and messages.
    pub name: &'static str,
    /// Takes an input; a panic is a finding.
    pub run: fn(&[u8]),
    /// Inputs that lead somewhere, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Most bytes of memory it may have allocated at once for one input.
    pub memory: usize,
    /// Inputs in the tests.
    pub rounds: u64,
}

impl Target {
    /// Feeds one input, and checks what it cost.
    ///
    /// # Panics
    /// On a finding.
    pub fn feed(&self, input: &[u8]) {
        let ((), most) = meter::measure(|| (self.run)(input));
        assert!(most <= self.memory, "{}: {most} bytes allocated, at most {} are expected", self.name, self.memory);
    }
}

/// All of them.
pub const TARGETS: &[&Target] = &[
    &api::TARGET,
    &checkpoint::TARGET,
    &config::JSON,
    &config::FLAGS,
    &wire::FRAME,
    &wire::MESSAGE,
    &wire::PAGES,
    &ticket::TARGET,
    &device::rng::TARGET,
    &device::balloon::TARGET,
    &device::blk::TARGET,
    &device::vsock::TARGET,
    &device::net::TARGET,
    &device::state::TARGET,
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name).copied()
}
