//! Devices whose queues another process works: the front end of the vhost-user protocol.
//!
//! Owns the way of such a device through its life, the same for each kind ([`VhostUser`]); a kind has registers
//! ([`Registers`]) and nothing else. Always true: a back end that dies, or does not answer within
//! [`ANSWER_TIME`], costs the guest this device (it is told to reset it) and nobody else anything; a driver that
//! resets the device makes the monitor connect again. After a reset the back end works nothing any more and has completed
//! all it had begun. It is trusted with guest memory, not with the monitor's: one that does not let go is cut off, and could
//! still write to guest memory. Pages it writes are in no dirty log: a VM with such a device cannot be ported or
//! checkpointed while it runs.

mod back_end;
pub mod blk;
pub mod net;
mod rings;
mod watch;

use std::os::fd::RawFd;
use std::path::Path;

use vmm_sys_util::eventfd::EventFd;

use super::queue::QueueError;
use super::{Device, DeviceState, F_EVENT_IDX, F_INDIRECT_DESC, Progress, Work};
use crate::error::{Error, Result};
use crate::metrics::Exposition;
use crate::stats::Counter;
pub use back_end::{ANSWER_TIME, BackEnd, Needs};

/// What one kind of device has besides its queues.
pub trait Registers: Send {
    /// Device type.
    const KIND: u32;
    /// What it needs of a back end.
    const NEEDS: Needs;

    /// Features to be offered to the driver, of those the back end offers.
    fn features(&self, offered: u64) -> u64;
    /// Features the back end is told of, of those the driver has accepted.
    fn accepted(&self, accepted: u64) -> u64 {
        accepted
    }
    /// Reads the configuration space.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver writes to the configuration space.
    fn write_config(&mut self, _back_end: &mut BackEnd, _offset: u64, _data: &[u8]) -> Result<()> {
        Ok(())
    }
    /// Another back end is there, perhaps with another configuration.
    fn connected(&mut self, _back_end: &mut BackEnd) -> Result<()> {
        Ok(())
    }
    /// The back end works the queues, or is gone while it did.
    fn serves(&mut self, _serves: bool) {}
    /// Whether the configuration space has changed since the last call.
    fn take_config_change(&mut self) -> bool;
    /// State that moves with the guest, besides the queues: those are the monitor's while the device is quiesced.
    fn save(&self) -> DeviceState;
    /// Compares a state with what is here; the reason if the guest cannot go on with this.
    fn restore(&mut self, state: &DeviceState) -> std::result::Result<(), String>;
}

/// A device of another process.
pub struct VhostUser<R> {
    id: String,
    registers: R,
    back_end: BackEnd,
    sizes: Vec<u16>,
    /// Offered by the back end when it was first connected to: a driver may have accepted them.
    offered: u64,
    /// What the driver has accepted, while it uses the device.
    active: Option<u64>,
    /// An event is to be looked at.
    event: bool,
    lost: Counter,
}

impl<R: Registers> VhostUser<R> {
    /// Connects to the back end at `path`; `registers` may ask it.
    fn connect(
        id: &str,
        path: &Path,
        sizes: Vec<u16>,
        registers: impl FnOnce(&mut BackEnd) -> Result<R>,
    ) -> Result<VhostUser<R>> {
        let mut back_end = BackEnd::connect(path, sizes.len(), R::NEEDS)?;
        let registers = registers(&mut back_end)?;
        log::info!("{id}: {}", back_end.description());
        Ok(VhostUser {
            id: id.to_owned(),
            registers,
            offered: back_end.features(),
            back_end,
            sizes,
            active: None,
            event: false,
            lost: Counter::default(),
        })
    }

    fn start(&mut self, features: u64, work: &mut Work<'_>) -> Result<()> {
        if !self.back_end.is_connected() {
            self.back_end.reconnect()?;
            self.registers.connected(&mut self.back_end)?;
            log::info!("{}: connected again: {}", self.id, self.back_end.description());
        }
        self.back_end.start(self.registers.accepted(features), work)?;
        self.registers.serves(true);
        Ok(())
    }

    /// The back end is gone.
    fn lose(&mut self, e: &Error) -> QueueError {
        crate::notice::trouble(&self.id, e.to_string());
        self.lost.inc();
        self.registers.serves(false);
        QueueError("its back end is gone".into())
    }
}

impl<R: Registers> Device for VhostUser<R> {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> u32 {
        R::KIND
    }

    fn features(&self) -> u64 {
        self.registers.features(self.offered)
    }

    fn ring_features(&self) -> u64 {
        self.offered & (F_EVENT_IDX | F_INDIRECT_DESC)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.registers.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Err(e) = self.registers.write_config(&mut self.back_end, offset, data) {
            log::warn!("{}: {e}", self.id);
        }
    }

    fn take_config_change(&mut self) -> bool {
        self.registers.take_config_change()
    }

    fn take_doorbells(&mut self, doorbells: &[EventFd]) -> Result<bool> {
        self.back_end.take_doorbells(doorbells).map(|()| true)
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.active = Some(features);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.event = false;
        if let Err(e) = self.back_end.take_back() {
            let _ = self.lose(&e);
        }
    }

    fn event(&mut self) {
        self.event = true;
    }

    fn process(&mut self, work: &mut Work<'_>) -> std::result::Result<Progress, QueueError> {
        let Some(features) = self.active else { return Ok(Progress::Done) };
        if std::mem::take(&mut self.event) {
            self.back_end.look(work.queues).map_err(|e| self.lose(&e))?;
            // Who is parked rings by parking, who is not by the doorbell.
            if self.back_end.is_started() {
                return Ok(Progress::Done);
            }
        }
        match self.back_end.is_started() {
            true => self.back_end.ring(work),
            false => self.start(features, work).map_err(|e| self.lose(&e))?,
        }
        Ok(Progress::Done)
    }

    fn parked(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.back_end.awaited(work)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        self.back_end.descriptors()
    }

    fn stop_input(&mut self) {}

    fn quiesce(&mut self, work: &mut Work<'_>) -> std::result::Result<(), QueueError> {
        self.back_end.stop(work.queues, work.memory).map_err(|e| self.lose(&e))?;
        // What the last answers have rung.
        self.back_end.look(work.queues).map_err(|e| self.lose(&e))
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        self.registers.save()
    }

    fn restore(&mut self, state: &DeviceState, features: u64) -> Result<()> {
        self.registers.restore(state).map_err(|why| Error::State(format!("{}: {why}", self.id)))?;
        self.active = Some(features);
        Ok(())
    }

    fn metrics(&self, out: &mut Exposition) {
        let labels = &[("device", self.id.as_str())];
        let connected = f64::from(u8::from(self.back_end.is_connected()));
        out.gauge("vmm_vhost_user_connected", "Whether the back end is there.", labels, connected);
        out.counter("vmm_vhost_user_lost_total", "Times the back end was lost.", labels, &self.lost);
    }
}

#[cfg(test)]
mod tests;
