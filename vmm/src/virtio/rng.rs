//! virtio-rng (virtio 1.2, section 5.4): random bytes from the host's generator.
//!
//! Owns its limits and counters. Always true: a request gets at most [`REQUEST_MAX`] bytes and one call hands out at most
//! [`BUDGET`] requests, so that a guest that only asks keeps nobody else from the devices; what the host cannot give is
//! answered with no bytes, never with bytes that are not random.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::queue::{QueueError, total, write_at};
use super::{Device, DeviceState, Progress, Work};
use crate::config::RngConfig;
use crate::error::{Error, Result};
use crate::limit::{Limits, Throttle};
use crate::metrics::Exposition;
use crate::stats::Counter;

/// Most bytes a request gets; a driver that wants more asks again.
pub const REQUEST_MAX: usize = 64 << 10;

const KIND: u32 = 4;
const QUEUE_SIZE: u16 = 64;
/// Requests answered in one call.
const BUDGET: usize = 16;

/// An entropy source.
#[derive(Debug)]
pub struct Rng {
    id: String,
    /// Bytes on their way; kept so that a request costs no allocation.
    scratch: Vec<u8>,
    throttle: Throttle,
    requests: Counter,
    bytes: Counter,
    errors: Counter,
}

impl Rng {
    /// A source called `id`.
    pub fn new(id: &str, config: &RngConfig) -> Result<Rng> {
        let mistakes = config.limits.mistakes("rng.limits");
        if !mistakes.is_empty() {
            return Err(Error::Config(mistakes));
        }
        Ok(Rng {
            id: id.to_owned(),
            scratch: Vec::new(),
            throttle: Throttle::new(config.limits)?,
            requests: Counter::default(),
            bytes: Counter::default(),
            errors: Counter::default(),
        })
    }

    /// Changes the limits, which must be free of mistakes. The device is to be processed.
    pub fn set_limits(&mut self, limits: Limits) {
        self.throttle.set(limits);
    }

    /// Fills the buffer with `len` random bytes; with none if the host has none.
    fn fill(&mut self, len: usize) -> &[u8] {
        self.scratch.resize(len, 0);
        if let Err(e) = getrandom(&mut self.scratch) {
            log::warn!("{}: no random bytes from the host: {e}", self.id);
            self.errors.inc();
            self.scratch.clear();
        }
        &self.scratch
    }
}

/// Fills all of `bytes`.
fn getrandom(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            // A signal cuts long requests short.
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

impl Device for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let mut budget = BUDGET;
        loop {
            // How much a request wants is not known before it is taken: what it costs too much is paid off afterwards.
            while self.throttle.is_ready(1)
                && let Some(chain) = work.queues[0].pop(work.memory)?
            {
                let wanted = usize::try_from(total(&chain.writable)).unwrap_or(usize::MAX).min(REQUEST_MAX);
                let bytes = self.fill(wanted);
                let written = match write_at(work.memory, &chain.writable, 0, bytes) {
                    true => bytes.len() as u32,
                    false => 0,
                };
                self.throttle.charge(u64::from(written));
                self.requests.inc();
                self.bytes.add(u64::from(written));
                work.queues[0].push(work.memory, chain.head, written)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            if !self.throttle.is_ready(1) || !work.queues[0].arm(work.memory)? {
                return Ok(Progress::Done);
            }
        }
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.throttle.as_raw_fd()]
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, _work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        Ok(())
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Rng(self.throttle.save())
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<()> {
        match state {
            DeviceState::Rng(state) => self.throttle.restore(state),
            _ => Err(Error::State(format!("{}: not the state of an entropy source", self.id))),
        }
    }

    fn metrics(&self, out: &mut Exposition) {
        for (name, help, counter) in [
            ("vmm_rng_requests_total", "Requests for random bytes.", &self.requests),
            ("vmm_rng_bytes_total", "Random bytes given to the guest.", &self.bytes),
            ("vmm_rng_errors_total", "Requests the host had no random bytes for.", &self.errors),
        ] {
            out.counter(name, help, &[("device", &self.id)], counter);
        }
        let help = "Times the entropy source had to wait for its limits.";
        out.count("vmm_rng_throttled_total", help, &[("device", &self.id)], self.throttle.waits());
    }
}

#[cfg(test)]
mod tests;
